//! `nexus host cordon`, `drain` and `label`: what operators decide of a host that stays.

use std::time::Duration;

use clap::Args;
use nexus_model::Name;
use nexus_model::kind;
use nexus_model::selector::{is_label_key, is_label_value};
use serde_json::{Map, Value, json};

use super::cloud::{Cloud, CloudArgs};
use super::resource::new_name;
use super::{join, leave, output};

#[derive(Debug, Args)]
pub struct CordonArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn cordon(args: &CordonArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    leave::decide(&cloud, &args.name, true, false).await?;
    output::text(&format!(
        "host {} takes no new instances; `nexus host uncordon {0}` takes it back into use",
        args.name
    ))
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    /// Gives up after this time and leaves the host cordoned [default: waits until it is empty]
    #[arg(long, value_name = "TIME", value_parser = join::duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn drain(args: &DrainArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    cloud.get(kind::find("host").expect("a kind"), &args.name).await?;
    leave::drain(&cloud, &args.name, args.timeout, "drain").await?;
    // What would come back once nothing keeps it away.
    leave::decide(&cloud, &args.name, true, false).await?;
    output::text(&format!("host {} is empty and cordoned; `nexus host uncordon {0}` takes it back into use", args.name))
}

#[derive(Debug, Args)]
pub struct LabelArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    /// KEY=VALUE sets a label, KEY- removes one
    #[arg(required = true, value_name = "KEY=VALUE|KEY-", value_parser = change)]
    changes: Vec<(String, Option<String>)>,
    #[command(flatten)]
    cloud: CloudArgs,
}

fn change(text: &str) -> Result<(String, Option<String>), String> {
    let wrong = || format!("{text:?}: write KEY=VALUE or KEY-, with letters, digits, '-', '_' and '.'");
    match text.split_once('=') {
        Some((key, value)) if is_label_key(key) && is_label_value(value) => {
            Ok((key.to_owned(), Some(value.to_owned())))
        }
        None => {
            let key = text.strip_suffix('-').filter(|key| is_label_key(key)).ok_or_else(wrong)?;
            Ok((key.to_owned(), None))
        }
        Some(_) => Err(wrong()),
    }
}

pub async fn label(args: &LabelArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let labels: Map<String, Value> =
        args.changes.iter().map(|(key, value)| (key.clone(), value.clone().map_or(Value::Null, Value::from))).collect();
    let path = cloud.object(kind::find("host").expect("a kind"), &args.name);
    let host: Value = cloud.client.patch(&path, &json!({"metadata": {"labels": labels}})).await?;
    let labels = host["metadata"]["labels"].as_object().into_iter().flatten();
    let labels: Vec<String> = labels.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    let shown = if labels.is_empty() { "no labels".to_owned() } else { labels.join(", ") };
    output::text(&format!("host {}: {}", args.name, output::plain(&shown)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_set_and_removed() {
        assert_eq!(change("disk=nvme").unwrap(), ("disk".to_owned(), Some("nvme".to_owned())));
        assert_eq!(change("disk=").unwrap().1, Some(String::new()));
        assert_eq!(change("example.com/disk-").unwrap(), ("example.com/disk".to_owned(), None));
        for wrong in ["disk", "=a", "-", "a b=c", "a=b c"] {
            assert!(change(wrong).is_err(), "{wrong}");
        }
    }
}
