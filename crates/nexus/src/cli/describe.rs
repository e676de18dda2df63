//! `nexus describe`: all about one object, so that "why is it not ready?" is answered in one place.

use clap::Args;
use nexus_model::Timestamp;
use nexus_model::kind::{self, KindDescriptor, SYSTEM_PROJECT, Scope};
use serde_json::Value;

use super::cloud::{Cloud, CloudArgs, Listing, text};
use super::output::{self, plain};
use super::table::{Columns, KindTable, Printer, age_of};
use super::{cell, resource, settle};
use crate::client::ClientError;

/// The newest so many events are shown.
const EVENTS: usize = 20;
/// An app with more instances shows those that are not ready first, and so many in all.
const INSTANCES: usize = 50;

/// Shows all about an object: spec, status, conditions, events and, for an app, its instances
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus describe app web\n  \
    nexus describe app/web\n  \
    nexus describe job report\n  \
    nexus describe host zone-a-1\n  \
    nexus describe cell zone-a-cell-1")]
pub struct DescribeArgs {
    /// KIND NAME…, or KIND/NAME…
    #[arg(required = true, value_name = "KIND NAME")]
    what: Vec<String>,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(args: &DescribeArgs) -> anyhow::Result<()> {
    let asked = resource::parse(&args.what)?;
    let cloud = Cloud::connect(&args.cloud)?;
    let mut first = true;
    for one in &asked {
        let kind = one.kind();
        if one.names.is_empty() {
            let message = format!("name one of the {}; `nexus get {}` lists them", kind.plural, kind.plural);
            return Err(crate::exit::Fail::usage(message).into());
        }
        for name in &one.names {
            let object = cloud.get(kind, name).await?;
            let text = describe(&cloud, kind, &object).await?;
            if !std::mem::replace(&mut first, false) {
                output::text("")?;
            }
            output::text(text.trim_end())?;
        }
    }
    Ok(())
}

async fn describe(cloud: &Cloud, kind: &'static KindDescriptor, object: &Value) -> anyhow::Result<String> {
    let now = cloud.now();
    let mut out = header(kind, object, now);
    section(&mut out, "Spec", &yaml(&object["spec"])?);
    let mut status = object["status"].clone();
    if let Some(map) = status.as_object_mut() {
        map.shift_remove("conditions");
        // Shown as a table.
        map.shift_remove("parts");
        map.shift_remove("out");
    }
    section(&mut out, "Status", &yaml(&status)?);
    section(&mut out, "Conditions", &conditions(object, now));
    if kind.kind == "Instance" {
        section(&mut out, "Parts", &part_table(std::slice::from_ref(object), now));
    }
    if kind.kind == "Host" {
        section(&mut out, "NUMA nodes", &node_table(object));
    }
    if kind.kind == "LoadBalancer" {
        section(&mut out, "Targets", &target_table(object));
    }
    if kind.kind == "Cell" {
        for (title, content) in cell::sections(cloud, object).await? {
            section(&mut out, title, &content);
        }
    }
    if matches!(kind.kind, "App" | "Job") {
        let urls = cloud.urls(object);
        section(&mut out, "Addresses", &urls.join("\n"));
        let instances = settle::instances_of(cloud, object).await?;
        let parts = part_table(&instances, now);
        section(&mut out, "Instances", &instance_table(instances, now));
        section(&mut out, "Parts", &parts);
    }
    if !settle::is_settled(object) {
        let why = settle::why(cloud, kind, object).await;
        section(&mut out, "Why it is not ready", &why.join("\n"));
    }
    if kind.kind != "Event" {
        let events = events_of(cloud, kind, object).await?;
        section(&mut out, "Events", &event_table(&events, now));
    }
    Ok(out)
}

fn header(kind: &KindDescriptor, object: &Value, now: Timestamp) -> String {
    let meta = &object["metadata"];
    let mut lines = vec![("Name", text(meta, "/name").to_owned()), ("Kind", kind.kind.to_owned())];
    for (title, key) in [("Project", "/project"), ("Region", "/region"), ("Uid", "/uid")] {
        if !text(meta, key).is_empty() {
            lines.push((title, text(meta, key).to_owned()));
        }
    }
    let number = |key: &str| meta[key].as_u64().unwrap_or(0);
    lines.push(("Generation", format!("{} (revision {})", number("generation"), number("revision"))));
    lines.push(("Created", format!("{} ({} ago)", text(meta, "/created"), age_of(&meta["created"], now))));
    if !text(meta, "/deleting").is_empty() {
        lines.push(("Deleting", format!("for {}", age_of(&meta["deleting"], now))));
    }
    if meta["deletionProtection"] == true {
        lines.push(("Protected", "a delete is refused".to_owned()));
    }
    if meta["owner"].is_object() {
        lines.push(("Owner", format!("{}/{}", text(meta, "/owner/kind").to_lowercase(), text(meta, "/owner/name"))));
    }
    for (title, key) in [("Labels", "labels"), ("Annotations", "annotations")] {
        let pairs = meta[key].as_object().into_iter().flatten();
        let pairs: Vec<_> = pairs.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
        if !pairs.is_empty() {
            lines.push((title, pairs.join(", ")));
        }
    }
    lines.into_iter().map(|(title, value)| format!("{:<13}{}\n", format!("{title}:"), plain(&value))).collect()
}

/// An object's part as YAML, without what would move the cursor.
fn yaml(value: &Value) -> anyhow::Result<String> {
    if value.as_object().is_none_or(serde_json::Map::is_empty) {
        return Ok(String::new());
    }
    Ok(serde_norway::to_string(value)?.lines().map(plain).collect::<Vec<_>>().join("\n"))
}

/// A titled, indented part; nothing if it is empty.
fn section(out: &mut String, title: &str, content: &str) {
    if content.is_empty() {
        return;
    }
    out.push_str(&format!("\n{title}:\n"));
    for line in content.lines() {
        out.push_str(&format!("  {line}\n"));
    }
}

fn conditions(object: &Value, now: Timestamp) -> String {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    if conditions.is_empty() {
        return String::new();
    }
    let row = |c: &Value| {
        let word = |key: &str| plain(text(c, key));
        vec![word("/type"), word("/status"), word("/reason"), age_of(&c["since"], now), word("/message")]
    };
    Printer::new(&["TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"]).lines(conditions.iter().map(row).collect())
}

/// A balancer's targets that get no new connections, and why.
fn target_table(balancer: &Value) -> String {
    let status = &balancer["status"];
    let (Some(healthy), Some(all)) = (status["healthyTargets"].as_u64(), status["targets"].as_u64()) else {
        return String::new();
    };
    let out = status["out"].as_array().map(Vec::as_slice).unwrap_or_default();
    let summary = format!("{healthy}/{all} take new connections");
    if out.is_empty() {
        return summary;
    }
    let row = |o: &Value| {
        let address = text(o, "/address");
        let at = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let said = match o["hosts"].as_u64() {
            None | Some(0) => "-".to_owned(),
            Some(n) => n.to_string(),
        };
        let instance = Some(text(o, "/instance")).filter(|i| !i.is_empty()).unwrap_or("-");
        vec![
            plain(&format!("{at}:{}", o["targetPort"])),
            plain(&format!("{} {}", text(o, "/protocol"), o["port"])),
            plain(instance),
            plain(text(o, "/reason")),
            said,
            plain(text(o, "/message")),
        ]
    };
    let titles = ["TARGET", "LISTENER", "INSTANCE", "OUT", "HOSTS", "MESSAGE"];
    format!("{summary}; out are:\n{}", Printer::new(&titles).lines(out.iter().map(row).collect()))
}

/// A host's NUMA nodes: what they have, what is kept to them, and what is free.
fn node_table(host: &Value) -> String {
    let rooms = host["status"]["numaNodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut rows = Vec::new();
    for node in host["spec"]["numaNodes"].as_array().into_iter().flatten() {
        let room = rooms.iter().find(|room| room["id"] == node["id"]).unwrap_or(&Value::Null);
        let word = |of: &Value, key: &str| match &of[key] {
            Value::Null => "-".to_owned(),
            Value::String(text) => plain(text),
            other => other.to_string(),
        };
        rows.push(vec![
            word(node, "id"),
            word(node, "cpus"),
            word(node, "cpu"),
            word(room, "reservedCpu"),
            word(room, "freeCpu"),
            word(node, "memory"),
            word(room, "reservedMemory"),
            word(room, "freeMemory"),
        ]);
    }
    if rows.is_empty() {
        return String::new();
    }
    Printer::new(&["NODE", "CPUS", "CPU", "RESERVED", "FREE", "MEMORY", "RESERVED", "FREE"]).lines(rows)
}

fn instance_table(mut instances: Vec<Value>, now: Timestamp) -> String {
    if instances.is_empty() {
        return "none".to_owned();
    }
    // What is not ready is what the reader looks for.
    instances.sort_by_key(|i| i["status"]["ready"] == true);
    let kind = kind::find("instance").expect("a kind");
    let mut table = KindTable::new(kind, Columns { wide: true, ..Columns::default() });
    let mut out = table.rows(instances.iter().take(INSTANCES).map(|i| (i, false)), now);
    if instances.len() > INSTANCES {
        out.push_str(&format!("\nand {} more", instances.len() - INSTANCES));
    }
    out
}

/// The init steps and sidecars of instances.
fn part_table(instances: &[Value], now: Timestamp) -> String {
    let mut rows = Vec::new();
    for instance in instances.iter().take(INSTANCES) {
        for part in instance["status"]["parts"].as_array().into_iter().flatten() {
            let word = |key: &str| plain(text(part, key));
            let number = |key: &str| part[key].as_i64().map_or_else(|| "-".to_owned(), |n| n.to_string());
            let ready = if part["role"] == "Sidecar" { (part["ready"] == true).to_string() } else { "-".to_owned() };
            let of = text(instance, "/metadata/name");
            rows.push(vec![
                plain(of),
                word("/name"),
                word("/role"),
                word("/state"),
                ready,
                number("restarts"),
                number("exitCode"),
                age_of(&part["started"], now),
                word("/message"),
            ]);
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let titles = ["INSTANCE", "PART", "ROLE", "STATE", "READY", "RESTARTS", "EXIT", "STARTED", "WHY"];
    Printer::new(&titles).lines(rows)
}

/// The events of one object, oldest first.
pub async fn events_of(cloud: &Cloud, kind: &KindDescriptor, object: &Value) -> anyhow::Result<Vec<Value>> {
    let uid = text(object, "/metadata/uid").to_owned();
    let project = if kind.scope == Scope::Project { text(object, "/metadata/project") } else { SYSTEM_PROJECT };
    let region = Some(cloud.region_of(object));
    let listing = Listing { project: project.parse().ok(), region, ..Listing::default() };
    let events = kind::find("events").expect("a kind");
    let listed = cloud.list(events, &listing, |e| text(e, "/spec/regarding/uid") == uid).await;
    let (mut found, _) = match listed {
        // What belongs to no project has its events in the cloud's own, which only operators read.
        Err(error) if kind.scope != Scope::Project && is_refused(&error) => return Ok(Vec::new()),
        listed => listed?,
    };
    super::events::sort(&mut found);
    Ok(found)
}

fn is_refused(error: &ClientError) -> bool {
    error.problem().is_some_and(|p| matches!(p.status.as_u16(), 403 | 404))
}

pub fn event_table(events: &[Value], now: Timestamp) -> String {
    if events.is_empty() {
        return String::new();
    }
    let row = |e: &Value| {
        let word = |key: &str| plain(text(e, key));
        let count = e["spec"]["count"].as_u64().unwrap_or(1).to_string();
        vec![
            age_of(&e["spec"]["last"], now),
            count,
            word("/spec/severity"),
            word("/spec/reason"),
            word("/spec/message"),
        ]
    };
    let newest = &events[events.len().saturating_sub(EVENTS)..];
    Printer::new(&["LAST", "COUNT", "SEVERITY", "REASON", "MESSAGE"]).lines(newest.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_description_begins_with_what_the_object_is() {
        let object = json!({
            "metadata": {"name": "web", "project": "shop", "generation": 2, "revision": 7,
                "created": "2023-11-14T22:13:20.000Z", "labels": {"a": "b"}},
            "status": {"conditions": [
                {"type": "Ready", "status": "False", "reason": "Waiting", "message": "no host",
                 "since": "2023-11-14T22:13:20.000Z"}]},
        });
        let now = Timestamp::from_millis(1_700_000_060_000);
        let text = header(kind::find("app").unwrap(), &object, now);
        assert!(text.starts_with("Name:        web\nKind:        App\nProject:     shop\n"), "{text}");
        assert!(text.contains("(1m ago)") && text.contains("Labels:      a=b\n"), "{text}");
        let table = conditions(&object, now);
        assert!(table.lines().nth(1).unwrap().starts_with("Ready   False    Waiting"), "{table}");
    }

    #[test]
    fn a_hosts_nodes_are_shown_with_what_is_free() {
        let host = json!({
            "spec": {"numaNodes": [{"id": 1, "cpus": "8-15", "cpu": "8", "memory": "16Gi"}, {"id": 2, "cpus": "3"}]},
            "status": {"numaNodes": [{"id": 1, "reservedCpu": "5", "freeCpu": "3", "freeMemory": "4Gi"}]},
        });
        let table = node_table(&host);
        let rows: Vec<Vec<&str>> = table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["1", "8-15", "8", "5", "3", "16Gi", "-", "4Gi"]);
        assert_eq!(rows[1][..3], ["2", "3", "-"]);
        assert_eq!(node_table(&json!({})), "");
    }
}
