//! `nexus access-key`: keys by which programs sign requests or get access tokens.

use clap::{Args, Subcommand};
use nexus_model::Name;
use nexus_model::kind;
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Listing, text};
use super::output::{self, Format};
use super::resource::new_name;
use crate::client::Parts;

/// Makes and deletes access keys: an id and a secret that sign requests (AWS Signature Version 4) or get access tokens
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus access-key create pipeline --service-account deployer --for-project shop\n  \
    nexus get access-keys\n  \
    nexus access-key delete pipeline")]
pub struct AccessKeyArgs {
    #[command(subcommand)]
    command: AccessKeyCommand,
}

#[derive(Debug, Subcommand)]
enum AccessKeyCommand {
    /// Makes one and prints its id and its secret, once
    Create {
        #[arg(value_parser = new_name)]
        name: Name,
        /// Of this service account [default: your own]
        #[arg(long, value_name = "NAME", value_parser = new_name)]
        service_account: Option<Name>,
        /// Opens nothing but this project
        #[arg(long, value_name = "NAME", value_parser = new_name)]
        for_project: Option<Name>,
        /// What it is for
        #[arg(long, default_value = "")]
        description: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Deletes one: it opens nothing from now on
    Delete {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

pub async fn run(args: &AccessKeyArgs) -> anyhow::Result<()> {
    let keys = kind::find("access-keys").expect("a kind");
    match &args.command {
        AccessKeyCommand::Delete { name, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let _: Value = cloud.client.json(Method::DELETE, &cloud.object(keys, name), Parts::default()).await?;
            output::text(&format!("access key {name} opens nothing any more"))
        }
        AccessKeyCommand::Create { name, service_account, for_project, description, output: format, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let holder = service_account.as_ref().map(|name| json!({"kind": "ServiceAccount", "name": name}));
            let spec = json!({"holder": holder, "project": for_project, "description": description});
            let body = json!({"metadata": {"name": name}, "spec": spec});
            let collection = cloud.collection(keys, &Listing::default());
            let made: Value = cloud.client.once(Method::POST, &collection, Parts::json(&body)?).await?;
            match format {
                Format::Json => output::json(&made),
                Format::Yaml => output::yaml(&made),
                _ => {
                    eprintln!("the secret is shown this once");
                    let (id, secret) = (text(&made, "/spec/id"), text(&made, "/status/secret"));
                    output::text(&format!("id      {id}\nsecret  {secret}"))
                }
            }
        }
    }
}
