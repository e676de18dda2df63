//! `nexus events`: what happened, oldest first.

use clap::Args;
use nexus_model::Timestamp;
use nexus_model::kind;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Listing, text};
use super::get::{self, follow};
use super::output::{self, Format, plain};
use super::table::{Printer, age_of};
use super::{describe, resource};
use crate::exit::Fail;

/// Shows what happened, oldest first
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus events\n  \
    nexus events --for app/web -w\n  \
    nexus events -A -o json\n\n\
    Events of hosts and other kinds without a project are in the project `system`.")]
pub struct EventsArgs {
    /// Goes on and shows each event as it happens
    #[arg(short, long)]
    watch: bool,
    /// Only of one object, such as app/web
    #[arg(long = "for", value_name = "KIND/NAME")]
    of: Option<String>,
    /// Over all projects
    #[arg(short = 'A', long, conflicts_with = "of")]
    all_projects: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Oldest first. RFC 3339 of one zone and precision sorts as text; the rest is parsed.
pub fn sort(events: &mut [Value]) {
    let moment = |e: &Value| serde_json::from_value::<Timestamp>(e["spec"]["last"].clone()).unwrap_or_default();
    events.sort_by_key(moment);
}

fn row(event: &Value, all_projects: bool, now: Timestamp) -> Vec<String> {
    let word = |key: &str| plain(text(event, key));
    let mut row = Vec::new();
    if all_projects {
        row.push(word("/metadata/project"));
    }
    let object = format!("{}/{}", word("/spec/regarding/kind").to_lowercase(), word("/spec/regarding/name"));
    row.extend([
        age_of(&event["spec"]["last"], now),
        word("/spec/severity"),
        word("/spec/reason"),
        object,
        event["spec"]["count"].as_u64().unwrap_or(1).to_string(),
        word("/spec/message"),
    ]);
    row
}

fn printer(all_projects: bool) -> Printer {
    let titles = ["PROJECT", "LAST", "SEVERITY", "REASON", "OBJECT", "COUNT", "MESSAGE"];
    Printer::new(&titles[usize::from(!all_projects)..])
}

pub async fn run(args: &EventsArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let kind = kind::find("events").expect("a kind");
    let mut listing = Listing { all_projects: args.all_projects, ..Listing::default() };
    let mut regarding = None;
    if let Some(of) = &args.of {
        let asked = resource::parse(std::slice::from_ref(of))?;
        let [one] = asked.as_slice() else { return Err(Fail::usage("--for takes one object").into()) };
        let [name] = one.names.as_slice() else {
            return Err(Fail::usage("--for takes an object, such as app/web").into());
        };
        let of = one.kind();
        if of.scope != nexus_model::kind::Scope::Project {
            listing.project = nexus_model::kind::SYSTEM_PROJECT.parse().ok();
        }
        if of.home == nexus_model::kind::Home::Global {
            listing.region = nexus_model::kind::GLOBAL.parse().ok();
        }
        // What was deleted has a past too: then its name must do.
        let living = cloud.find(&cloud.object(of, name)).await?;
        let uid = living.as_ref().map(|o| text(o, "/metadata/uid").to_owned());
        regarding = Some((of.kind, name.to_string(), uid, living.map(|o| (of, o))));
    }
    let wanted = |event: &Value| match &regarding {
        None => true,
        Some((_, _, Some(uid), _)) => text(event, "/spec/regarding/uid") == uid,
        Some((kind, name, None, _)) => {
            text(event, "/spec/regarding/kind") == *kind && text(event, "/spec/regarding/name") == name
        }
    };
    let (mut events, revision) = match &regarding {
        // Without a watch, no revision is needed.
        Some((_, _, _, Some((of, object)))) if !args.watch => (describe::events_of(&cloud, of, object).await?, 0),
        _ => cloud.list(kind, &listing, wanted).await?,
    };
    sort(&mut events);
    let mut printer = printer(args.all_projects);
    match args.output {
        Format::Json if args.watch => {
            for event in &events {
                output::text(&json!({"event": "put", "object": event}).to_string())?;
            }
        }
        Format::Json => output::json(&output::list_of(kind.kind, &events))?,
        Format::Yaml => output::yaml(&output::list_of(kind.kind, &events))?,
        Format::Name => {
            for event in &events {
                output::text(&resource::title(kind, text(event, "/metadata/name")))?;
            }
        }
        Format::Table | Format::Wide if events.is_empty() => output::note("there are no events"),
        Format::Table | Format::Wide => {
            let now = cloud.now();
            output::text(&printer.lines(events.iter().map(|e| row(e, args.all_projects, now)).collect()))?;
        }
    }
    if !args.watch {
        return Ok(());
    }
    follow(&cloud, kind, &listing, Some(revision), |change: get::Change<'_>| {
        // Old events are cleared away; that is no event.
        if change.deleted || !wanted(change.object) {
            return Ok(());
        }
        match args.output {
            Format::Table | Format::Wide => {
                output::text(&printer.lines(vec![row(change.object, args.all_projects, cloud.now())]))
            }
            Format::Json => output::text(&json!({"event": "put", "object": change.object}).to_string()),
            Format::Yaml => output::text("---").and_then(|()| output::yaml(change.object)),
            Format::Name => output::text(&resource::title(kind, text(change.object, "/metadata/name"))),
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_oldest_first() {
        let event = |name: &str, last: &str| json!({"metadata": {"name": name}, "spec": {"last": last}});
        let mut events = vec![
            event("b", "2023-11-14T22:13:21.000Z"),
            event("a", "2023-11-14T22:13:20Z"),
            event("c", "2023-11-14T23:13:21.500+01:00"),
        ];
        sort(&mut events);
        let names: Vec<_> = events.iter().map(|e| text(e, "/metadata/name")).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[test]
    fn a_row_names_the_object() {
        let event = json!({"metadata": {"project": "p"}, "spec": {
            "regarding": {"kind": "App", "name": "web"}, "severity": "Warning", "reason": "R", "message": "a\nb",
            "count": 3, "last": "2023-11-14T22:13:20.000Z"}});
        let now = Timestamp::from_millis(1_700_000_005_000);
        assert_eq!(row(&event, true, now), ["p", "5s", "Warning", "R", "app/web", "3", "a b"]);
        let lines = printer(false).lines(vec![row(&event, false, now)]);
        assert_eq!(lines.lines().count(), 2);
        assert!(lines.starts_with("LAST"));
    }
}
