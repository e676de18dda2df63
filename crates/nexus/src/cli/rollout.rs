//! `nexus rollout`: how far an app's newest template is, and what its users order about it.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::{Args, Subcommand};
use nexus_model::Name;
use nexus_model::kind::{self, KindDescriptor};
use reqwest::Method;
use serde_json::{Map, Value, json};
use similar::TextDiff;

use super::cloud::{Cloud, CloudArgs, Listing, text};
use super::output::{self, Format, plain};
use super::table::{Printer, age_of};
use super::{resource, settle};
use crate::client::Parts;
use crate::exit::{Exit, Fail};

/// Shows how an app's newest template comes along, holds it up, goes on or back
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus rollout status web\n  \
    nexus rollout status web --wait\n  \
    nexus rollout pause web\n  \
    nexus rollout resume web      # also the next step of a canary, and a rollout that has failed once more\n  \
    nexus rollout promote web     # all requests to the new template, without the steps that are left\n  \
    nexus rollout history web\n  \
    nexus rollout history web --revision 3\n  \
    nexus rollout undo web\n  \
    nexus rollout undo web --to-revision 2 --wait")]
pub struct RolloutArgs {
    #[command(subcommand)]
    command: RolloutCommand,
}

#[derive(Debug, Args)]
struct Of {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
struct Waiting {
    /// Waits until the app's instances are as its newest template wants them
    #[arg(long)]
    wait: bool,
    /// How many seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

#[derive(Debug, Subcommand)]
enum RolloutCommand {
    /// Shows how far an app's rollout is
    Status {
        #[command(flatten)]
        of: Of,
        #[command(flatten)]
        waiting: Waiting,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Holds a rollout up where it is
    Pause {
        #[command(flatten)]
        of: Of,
    },
    /// Goes on: after a pause, to a canary's next step, or again after a failure
    Resume {
        #[command(flatten)]
        of: Of,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Skips the steps that are left
    Promote {
        #[command(flatten)]
        of: Of,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Goes back to what served before, or to a revision that is kept
    Undo {
        #[command(flatten)]
        of: Of,
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        to_revision: Option<u64>,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Lists the revisions that are kept, and what each changed
    History {
        #[command(flatten)]
        of: Of,
        /// Shows one of them, as a diff to the one before it
        #[arg(long, value_name = "N")]
        revision: Option<u64>,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
}

fn apps() -> &'static KindDescriptor {
    kind::find("apps").expect("a kind")
}

fn name_of(of: &Of) -> Result<Name, Fail> {
    let text = match of.app.split_once('/') {
        Some((word, name)) if apps().answers_to(word) => name,
        Some((word, _)) => return Err(Fail::usage(format!("{word:?}: only apps have rollouts"))),
        None => &of.app,
    };
    resource::find_name(apps(), text)
}

pub async fn run(args: &RolloutArgs) -> anyhow::Result<()> {
    match &args.command {
        RolloutCommand::Status { of, waiting, output } => status(of, waiting, *output).await,
        RolloutCommand::Pause { of } => order(of, "pause", "paused", &json!({}), None).await,
        RolloutCommand::Resume { of, waiting } => order(of, "resume", "resumed", &json!({}), Some(waiting)).await,
        RolloutCommand::Promote { of, waiting } => order(of, "promote", "promoted", &json!({}), Some(waiting)).await,
        RolloutCommand::Undo { of, to_revision, waiting } => {
            let body = to_revision.map_or_else(|| json!({}), |n| json!({"toRevision": n}));
            order(of, "undo", "undone", &body, Some(waiting)).await
        }
        RolloutCommand::History { of, revision, output } => history(of, *revision, *output).await,
    }
}

async fn order(of: &Of, verb: &str, done: &str, body: &Value, waiting: Option<&Waiting>) -> anyhow::Result<()> {
    let name = name_of(of)?;
    let cloud = Cloud::connect(&of.cloud)?;
    let path = cloud.object(apps(), &name);
    let object: Value = cloud.client.json(Method::POST, &format!("{path}:{verb}"), Parts::json(body)?).await?;
    output::text(&format!("the rollout of {} is {done}", resource::title(apps(), name.as_str())))?;
    if let Some(waiting) = waiting.filter(|w| w.wait) {
        settle::wait(&cloud, apps(), &path, &object, None, Duration::from_secs(waiting.timeout)).await?;
    }
    Ok(())
}

async fn status(of: &Of, waiting: &Waiting, format: Format) -> anyhow::Result<()> {
    let name = name_of(of)?;
    let cloud = Cloud::connect(&of.cloud)?;
    let mut app = cloud.get(apps(), &name).await?;
    if waiting.wait {
        let path = cloud.object(apps(), &name);
        app = settle::wait(&cloud, apps(), &path, &app, None, Duration::from_secs(waiting.timeout)).await?;
    }
    match format {
        Format::Json => output::json(&app["status"]["rollout"]),
        Format::Yaml => output::yaml(&app["status"]["rollout"]),
        Format::Name => output::text(&resource::title(apps(), name.as_str())),
        Format::Table | Format::Wide => output::text(&told(&app).join("\n")),
    }?;
    match settle::failure(&app) {
        Some(why) if waiting.wait => Err(Fail::new(Exit::Failed, why).into()),
        _ => Ok(()),
    }
}

/// A rollout in a few lines.
fn told(app: &Value) -> Vec<String> {
    let (status, rollout) = (&app["status"], &app["status"]["rollout"]);
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let mut rows: Vec<(&str, String)> = Vec::new();
    let regions = status["regions"].as_array().map(Vec::as_slice).unwrap_or_default();
    if regions.is_empty() {
        rows.push(("phase", rollout["phase"].as_str().unwrap_or("Pending").to_owned()));
    }
    for region in regions {
        let phase = region["rollout"].as_str().unwrap_or("Pending");
        let count = format!("{} of {} ready", number(&region["readyReplicas"]), number(&region["desiredReplicas"]));
        rows.push(("region", format!("{}: {phase}, {count}", text(region, "/region"))));
    }
    let revision = match number(&rollout["stableRevision"]) {
        0 => number(&rollout["revision"]).to_string(),
        stable => format!("{}, before it {stable}", number(&rollout["revision"])),
    };
    rows.push(("revision", revision));
    rows.push(("strategy", app["spec"]["rollout"]["strategy"].as_str().unwrap_or("rolling").to_owned()));
    if let Some(percent) = rollout["trafficPercent"].as_u64() {
        rows.push(("requests", format!("{percent} % to the newest")));
    }
    let (ready, newest) = (number(&status["readyReplicas"]), number(&status["updatedReplicas"]));
    let wanted = number(&status["desiredReplicas"]);
    rows.push(("instances", format!("{wanted} wanted, {ready} ready, {newest} of the newest revision")));
    if rollout["orders"]["paused"] == true && rollout["phase"] != "Paused" {
        rows.push(("paused", "the next rollout waits to be resumed".to_owned()));
    }
    let refused = plain(text(rollout, "/surgeRefused"));
    if !refused.is_empty() {
        rows.push(("held back", refused));
    }
    let message = plain(text(rollout, "/message"));
    if !message.is_empty() {
        rows.push(("message", message));
    }
    rows.into_iter().map(|(title, value)| format!("{title:<10} {value}")).collect()
}

/// What a revision changed of the one before it: fields of its template, and its image's content.
fn changes(before: Option<&Value>, after: &Value) -> String {
    let Some(before) = before else { return "-".to_owned() };
    let mut found = Vec::new();
    differing("", &before["spec"]["template"], &after["spec"]["template"], &mut found);
    if before["spec"]["imageDigest"] != after["spec"]["imageDigest"] {
        found.push("the image's content".to_owned());
    }
    let (old, new) = (&before["spec"]["partDigests"], &after["spec"]["partDigests"]);
    for (image, digest) in new.as_object().into_iter().flatten() {
        // One that was not named before is told of by the part that names it.
        if old.get(image).is_some_and(|before| before != digest) {
            found.push(format!("the content of image {image}"));
        }
    }
    let secrets = |r: &Value| (r["spec"]["secrets"].clone(), r["spec"]["partSecrets"].clone());
    if found.is_empty() && secrets(before) != secrets(after) {
        found.push("versions of secrets".to_owned());
    }
    const SHOWN: usize = 4;
    let more = found.len().saturating_sub(SHOWN);
    found.truncate(SHOWN);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    if found.is_empty() { "-".to_owned() } else { plain(&format!("{}{tail}", found.join(", "))) }
}

fn differing(at: &str, before: &Value, after: &Value, found: &mut Vec<String>) {
    let empty = Map::new();
    match (before, after) {
        (a, b) if a == b => {}
        // Parts are told apart by their names.
        (Value::Array(_) | Value::Null, Value::Array(_) | Value::Null) if matches!(at, "init" | "sidecars") => {
            let by_name = |list: &Value| -> Value {
                let parts = list.as_array().into_iter().flatten();
                parts.map(|part| (text(part, "/name").to_owned(), part.clone())).collect::<Map<_, _>>().into()
            };
            let (a, b) = (by_name(before), by_name(after));
            let known = found.len();
            for name in a.as_object().into_iter().chain(b.as_object()).flat_map(Map::keys).collect::<BTreeSet<_>>() {
                match (a.get(name), b.get(name)) {
                    (Some(a), Some(b)) => differing(&format!("{at}.{name}"), a, b, found),
                    _ => found.push(format!("{at}.{name}")),
                }
            }
            if found.len() == known {
                found.push(format!("the order of {at}"));
            }
        }
        (Value::Object(_), Value::Object(_)) | (Value::Null, Value::Object(_)) | (Value::Object(_), Value::Null) => {
            let (a, b) = (before.as_object().unwrap_or(&empty), after.as_object().unwrap_or(&empty));
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                differing(
                    &path,
                    &a.get(key).cloned().unwrap_or_default(),
                    &b.get(key).cloned().unwrap_or_default(),
                    found,
                );
            }
        }
        _ => found.push(at.to_owned()),
    }
}

async fn history(of: &Of, revision: Option<u64>, format: Format) -> anyhow::Result<()> {
    let name = name_of(of)?;
    let cloud = Cloud::connect(&of.cloud)?;
    let app = cloud.get(apps(), &name).await?;
    let uid = text(&app, "/metadata/uid");
    let listing = Listing { project: text(&app, "/metadata/project").parse().ok(), ..Listing::default() };
    let revisions = kind::find("app-revisions").expect("a kind");
    let (mut all, _) = cloud.list(revisions, &listing, |r| text(r, "/metadata/owner/uid") == uid).await?;
    let number = |r: &Value| r["spec"]["revision"].as_u64().unwrap_or(0);
    all.sort_by_key(number);
    if let Some(wanted) = revision {
        let at = all.iter().position(|r| number(r) == wanted);
        let missing = || Fail::not_found(format!("app {name} has no revision {wanted} any more"));
        let at = at.ok_or_else(missing)?;
        let before = at.checked_sub(1).map(|before| &all[before]);
        return match format {
            Format::Json => output::json(&all[at]),
            Format::Yaml => output::yaml(&all[at]),
            _ => output::bytes(diff(before, &all[at])?.as_bytes()),
        };
    }
    match format {
        Format::Json => output::json(&output::list_of("AppRevisionList", &all)),
        Format::Yaml => output::yaml(&output::list_of("AppRevisionList", &all)),
        Format::Name => {
            all.iter().try_for_each(|r| output::text(&resource::title(revisions, text(r, "/metadata/name"))))
        }
        Format::Table | Format::Wide => {
            let rollout = &app["status"]["rollout"];
            let state = |r: &Value| {
                let of = |key: &str| rollout[key] == r["spec"]["revision"];
                let failed = rollout["failed"] == true;
                match (of("revision"), of("stableRevision"), failed) {
                    (true, _, true) => "failed",
                    (true, _, false) => "newest",
                    (_, true, true) => "serves",
                    (_, true, false) if rollout["phase"] != "Complete" => "before it",
                    _ => "",
                }
            };
            let mut rows = Vec::new();
            for (i, r) in all.iter().enumerate() {
                let before = i.checked_sub(1).map(|before| &all[before]);
                rows.push(vec![
                    number(r).to_string(),
                    age_of(&r["metadata"]["created"], cloud.now()),
                    plain(text(r, "/spec/template/image")),
                    text(r, "/spec/imageDigest").chars().take(19).collect(),
                    state(r).to_owned(),
                    changes(before, r),
                ]);
            }
            let titles = ["REVISION", "AGE", "IMAGE", "CONTENT", "STATE", "CHANGED"];
            output::text(Printer::new(&titles).lines(rows).trim_end())
        }
    }
}

/// A revision as a unified diff to the one before it; the first as a whole.
fn diff(before: Option<&Value>, after: &Value) -> anyhow::Result<String> {
    let shown = |r: &Value| {
        let mut part = r["spec"]["template"].clone();
        part["imageDigest"] = r["spec"]["imageDigest"].clone();
        if r["spec"]["partDigests"].is_object() {
            part["partDigests"] = r["spec"]["partDigests"].clone();
        }
        serde_norway::to_string(&part)
    };
    let title = |r: &Value| format!("revision {}", r["spec"]["revision"]);
    let old = before.map(shown).transpose()?.unwrap_or_default();
    let new = shown(after)?;
    let diff = TextDiff::from_lines(old.as_str(), new.as_str());
    let from = before.map_or_else(|| "nothing".to_owned(), title);
    Ok(diff.unified_diff().context_radius(3).header(&from, &title(after)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision(n: u64, env: &str, digest: &str) -> Value {
        json!({"spec": {"revision": n, "imageDigest": digest, "template": {"image": "web", "env": {"COLOUR": env}}}})
    }

    #[test]
    fn history_names_what_each_revision_changed() {
        let (a, b, c) = (revision(1, "red", "x"), revision(2, "green", "x"), revision(3, "green", "y"));
        assert_eq!(changes(None, &a), "-");
        assert_eq!(changes(Some(&a), &b), "env.COLOUR");
        assert_eq!(changes(Some(&b), &c), "the image's content");
        let text = diff(Some(&a), &b).unwrap();
        assert!(text.contains("-  COLOUR: red") && text.contains("+  COLOUR: green"), "{text}");
        let with = |parts: Value, content: &str| {
            let mut r = revision(4, "red", "x");
            (r["spec"]["template"]["init"], r["spec"]["partDigests"]) = (parts, json!({"tools": content}));
            r
        };
        let old = with(json!([{"name": "fetch", "image": "tools"}, {"name": "migrate"}]), "x");
        let new = with(json!([{"name": "fetch", "image": "tools", "command": ["a"]}, {"name": "warm"}]), "y");
        assert_eq!(
            changes(Some(&old), &new),
            "init.fetch.command, init.migrate, init.warm, the content of image tools"
        );
        let turned = with(json!([{"name": "migrate"}, {"name": "fetch", "image": "tools"}]), "x");
        assert_eq!(changes(Some(&old), &turned), "the order of init");
        assert_eq!(changes(Some(&a), &old), "init.fetch, init.migrate");
        let text = diff(Some(&old), &new).unwrap();
        assert!(text.contains("+- name: warm") && text.contains("+  tools: y"), "{text}");
        let mut none = a.clone();
        none["spec"]["template"].as_object_mut().unwrap().remove("env");
        assert_eq!(changes(Some(&none), &a), "env.COLOUR");
    }

    #[test]
    fn status_says_where_a_rollout_is() {
        let app = json!({
            "spec": {"rollout": {"strategy": "canary"}},
            "status": {"desiredReplicas": 4, "readyReplicas": 5, "updatedReplicas": 1, "rollout": {
                "phase": "Waiting", "revision": 3, "stableRevision": 2, "trafficPercent": 10, "message": "step 1 of 2"}},
        });
        let lines = told(&app).join("\n");
        for part in ["Waiting", "3, before it 2", "canary", "10 %", "4 wanted, 5 ready, 1 of", "step 1 of 2"] {
            assert!(lines.contains(part), "{part}: {lines}");
        }
    }
}
