//! `nexus host leave`: empties a host and takes it out of the region.
//!
//! The host is cordoned, so that nothing new comes, and drained: the region moves its instances as it would replace those
//! of an old version, each going when another is ready in its place. What can't be moved stays, and the command says what
//! it waits for. Whoever breaks it off leaves the host cordoned with what is still there. With `--force` nothing is waited
//! for: the host is out at once, and what was on it is started elsewhere.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nexus_api::operations::{HostLeave, HostLeft};
use nexus_model::Name;
use nexus_model::kind;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::cloud::{Cloud, CloudArgs, Listing, text};
use super::progress::Progress;
use super::resource::new_name;
use super::{join, output, settle};
use crate::client::ClientError;
use crate::exit::{Exit, Fail};

const LOOK: Duration = Duration::from_millis(500);
/// Looks between two questions for what it waits for: those cost more.
const ASK: u32 = 4;
/// What may be said after the host could not be emptied.
const LAST: Duration = Duration::from_secs(10);
/// So many apps that a host waits for, and so many lost instances, are named.
const NAMED: usize = 3;

#[derive(Debug, Args)]
pub struct LeaveArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    /// At once, also while instances run there; they are started on other hosts, without what was on its disks
    #[arg(long)]
    force: bool,
    /// Gives up after this time and leaves the host cordoned [default: waits until it is empty]
    #[arg(long, value_name = "TIME", value_parser = join::duration, conflicts_with = "force")]
    timeout: Option<Duration>,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
pub struct UncordonArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    #[command(flatten)]
    cloud: CloudArgs,
}

fn path_of(cloud: &Cloud, name: &Name) -> String {
    cloud.object(kind::find("host").expect("a kind"), name)
}

pub async fn decide(cloud: &Cloud, name: &Name, cordoned: bool, draining: bool) -> Result<Value, ClientError> {
    let wanted = json!({"spec": {"cordoned": cordoned, "draining": draining}});
    cloud.client.patch(&path_of(cloud, name), &wanted).await
}

pub async fn uncordon(args: &UncordonArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    decide(&cloud, &args.name, false, false).await?;
    output::text(&format!("host {} takes instances again", args.name))
}

pub async fn run(args: &LeaveArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let name = &args.name;
    if !args.force {
        drain(&cloud, name, args.timeout, "leave").await?;
    }
    let body = HostLeave { name: name.clone(), force: args.force };
    let left: HostLeft = join::run(&cloud, "host-leave", &body).await?;
    output::text(&format!("host {name} has left; stop its agent and its keeper on its machine"))?;
    if left.instances > 0 {
        let named = left.lost.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if left.instances > NAMED { format!(" and {} more", left.instances - NAMED) } else { String::new() };
        output::note(&format!(
            "Lost: {} instances that ran there, with all that was on its disks: {named}{more}.\nOthers are started in \
             their place on other hosts; `nexus get instances --all-projects` shows how far they are.",
            left.instances
        ));
    }
    Ok(())
}

/// How the wait for an empty host ended.
enum Ended {
    Empty,
    Interrupted,
    OutOfTime,
}

/// Empties a host, for the command `nexus host WORD`. One that has not registered yet, or is dead, has nothing to be moved.
pub async fn drain(cloud: &Cloud, name: &Name, timeout: Option<Duration>, word: &str) -> anyhow::Result<()> {
    let Some(host) = cloud.find(&path_of(cloud, name)).await? else { return Ok(()) };
    if is_empty(&host) {
        // Nothing may come between this look and the leave.
        return decide(cloud, name, true, false).await.map(drop).map_err(Into::into);
    }
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for Ctrl-C")?;
    decide(cloud, name, true, true).await?;
    output::note(&format!(
        "host {name} is cordoned; its {} instances move to other hosts. Ctrl-C leaves it cordoned",
        instances_on(&host)
    ));
    let out_of_time = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let mut progress = Progress::new();
    let ended = tokio::select! {
        biased;
        empty = until_empty(cloud, name, &mut progress) => empty.map(|()| Ended::Empty)?,
        _ = interrupt.recv() => Ended::Interrupted,
        () = out_of_time => Ended::OutOfTime,
    };
    drop(progress);
    let (exit, why) = match ended {
        Ended::Empty => return Ok(()),
        Ended::Interrupted => (Exit::Failed, "interrupted".to_owned()),
        Ended::OutOfTime => {
            (Exit::Unavailable, format!("it is not empty after {} s", timeout.unwrap_or_default().as_secs()))
        }
    };
    // What is asked last is asked of a cloud that may be in trouble; and while it still drains, it says what it waits for.
    let blocks = tokio::time::timeout(LAST, waits_for(cloud, name)).await.ok().flatten();
    let blocks = blocks.map(|b| format!("\n  {b}")).unwrap_or_default();
    let host = tokio::time::timeout(LAST, cloud.find(&path_of(cloud, name))).await.ok().and_then(Result::ok).flatten();
    let by_budget = host.as_ref().and_then(drained).is_some_and(|(_, by_budget)| by_budget);
    let advice = if by_budget { advice(name) } else { String::new() };
    let stopped = tokio::time::timeout(LAST, decide(cloud, name, true, false)).await;
    let moving = match stopped {
        Ok(Ok(_)) => "the instances that are still there run on",
        _ => "its instances are still being moved, because no server could be told to stop that",
    };
    let message = format!(
        "{why}: host {name} stays cordoned: nothing new is placed there, {moving}{blocks}\n  `nexus host {word} {name}` goes \
         on, `nexus host uncordon {name}` takes it back into use{advice}"
    );
    Err(Fail::new(exit, message).into())
}

/// What to do about a budget that keeps instances on a host.
fn advice(name: &Name) -> String {
    format!(
        "\n  Where a budget is in the way: have the app's other instances become ready (`nexus describe app NAME`), or allow more \
         by its spec.disruption; `nexus host leave {name} --force` asks no budget"
    )
}

fn instances_on(host: &Value) -> u64 {
    host.pointer("/status/reserved/instances").and_then(Value::as_u64).unwrap_or(0)
}

/// Whether nothing has to be moved: what a dead host had runs elsewhere already.
fn is_empty(host: &Value) -> bool {
    instances_on(host) == 0 || text(host, "/status/state") == "dead"
}

async fn until_empty(cloud: &Cloud, name: &Name, progress: &mut Progress) -> anyhow::Result<()> {
    let mut waits = None;
    for round in 0u32.. {
        match cloud.find(&path_of(cloud, name)).await {
            Ok(Some(host)) if !is_empty(&host) => {
                if round % ASK == ASK - 1 {
                    waits = waits_for(cloud, name).await;
                }
                let waits = waits.as_ref().map(|w| format!("; {w}")).unwrap_or_default();
                progress.say(&format!("host {name}: {} instances are still there{waits}", instances_on(&host)));
            }
            Ok(_) => return Ok(()),
            // A server that is away comes back.
            Err(e) if e.exit() == Exit::Unavailable => {}
            Err(e) => return Err(e.into()),
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// What the region says of a drained host, and what to do if apps' budgets keep instances there.
fn drained(host: &Value) -> Option<(String, bool)> {
    let conditions = host["status"]["conditions"].as_array()?;
    let condition = conditions.iter().find(|c| c["type"] == "Drained" && c["status"] == "False")?;
    Some((output::plain(text(condition, "/message")), text(condition, "/reason") == "Budget"))
}

/// What keeps instances on a host: what the region says, and what their apps say of those that should take their place.
async fn waits_for(cloud: &Cloud, name: &Name) -> Option<String> {
    let listing = Listing { all_projects: true, ..Listing::default() };
    let instances = kind::find("instances").expect("a kind");
    let (here, _) = cloud.list(instances, &listing, |i| text(i, "/status/host") == name.as_str()).await.ok()?;
    if here.is_empty() {
        return Some("they are being stopped".to_owned());
    }
    let apps = kind::find("apps").expect("a kind");
    let of: BTreeSet<(Name, Name)> = here
        .iter()
        .filter_map(|i| Some((text(i, "/metadata/project").parse().ok()?, text(i, "/spec/app").parse().ok()?)))
        .collect();
    let host = cloud.find(&path_of(cloud, name)).await.ok().flatten();
    let mut all: Vec<String> = host.as_ref().and_then(drained).map(|(says, _)| says).into_iter().collect();
    for (project, app) in of.iter().take(NAMED) {
        let found = cloud.find(&cloud.object_in(apps, project, app)).await.ok().flatten();
        let says = found.map(|app| settle::complaints(&app).join("; ")).unwrap_or_default();
        all.push(if says.is_empty() {
            format!("app {project}/{app} moves")
        } else {
            format!("app {project}/{app}: {says}")
        });
    }
    if of.len() > NAMED {
        all.push(format!("and {} more apps", of.len() - NAMED));
    }
    Some(all.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_host_has_nothing_to_be_moved() {
        let host = |state: &str, n: u64| json!({"status": {"state": state, "reserved": {"instances": n}}});
        assert!(is_empty(&host("ready", 0)) && is_empty(&host("dead", 3)));
        assert!(!is_empty(&host("ready", 1)) && !is_empty(&host("suspect", 1)));
    }

    #[test]
    fn what_a_drain_waits_for_is_what_the_region_says() {
        let host = |reason: &str| {
            let drained =
                json!({"type": "Drained", "status": "False", "reason": reason, "message": "app shop/web: 2 of 3"});
            json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, drained]}})
        };
        assert_eq!(drained(&host("Budget")), Some(("app shop/web: 2 of 3".to_owned(), true)));
        assert_eq!(drained(&host("Draining")).map(|(_, by_budget)| by_budget), Some(false));
        assert_eq!(drained(&json!({"status": {}})), None);
    }
}
