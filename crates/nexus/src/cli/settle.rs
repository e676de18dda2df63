//! Waiting until an object is as its spec wants it, and saying why it is not.

use std::time::Duration;

use nexus_model::Name;
use nexus_model::kind::{self, GLOBAL, KindDescriptor};
use serde_json::Value;

use super::cloud::{Cloud, Listing, text};
use super::output::plain;
use super::progress::Progress;
use super::resource;
use crate::client::ClientError;
use crate::exit::{Exit, Fail};

const LOOK: Duration = Duration::from_millis(300);
/// So many instances are named in an explanation; the rest are counted.
const NAMED: usize = 10;

/// Whether an object has settled, by the same rule as the API's `Prefer: wait`: its phase is a good one and speaks of the
/// newest generation. An object without a phase has nothing to wait for.
pub fn is_settled(object: &Value) -> bool {
    nexus_model::object::is_settled(&object["status"], object["metadata"]["generation"].as_u64().unwrap_or(0))
}

/// Whether the last orders about an app's rollout have been followed.
fn is_heeded(object: &Value) -> bool {
    let rollout = &object["status"]["rollout"];
    rollout["orders"] == rollout["heeded"]
}

/// Whether what is said of an app's rollout takes its newest spec and the last orders in.
fn is_current(object: &Value) -> bool {
    object["status"]["observedGeneration"].as_u64() >= object["metadata"]["generation"].as_u64() && is_heeded(object)
}

/// Whether an app's rollout stands where only its users bring it on, or only the old instances are still to go: nothing
/// to wait for.
pub fn rests(object: &Value) -> bool {
    is_current(object) && matches!(text(object, "/status/rollout/phase"), "Waiting" | "Paused" | "Switched")
}

/// Why an app's newest template will not come, if its rollout has ended in a failure.
pub fn failure(object: &Value) -> Option<String> {
    let rollout = text(object, "/status/rollout/phase");
    let ended = matches!(rollout, "RolledBack" | "Stalled") || text(object, "/status/phase") == "RolledBack";
    (ended && is_current(object)).then(|| plain(text(object, "/status/rollout/message")))
}

/// Whether an app has as many instances as it wants, of the template that it went back to before `made`: all that can come of a
/// change that brings no template, such as that of its replicas.
fn serves_as_before(made: &Value, object: &Value) -> bool {
    failed_before(made, object)
        && is_current(object)
        && text(object, "/status/phase") == "RolledBack"
        && object["status"]["readyReplicas"].as_u64() >= object["status"]["desiredReplicas"].as_u64()
}

/// Whether a rollout had failed already when a change that brings no template was made.
fn failed_before(made: &Value, object: &Value) -> bool {
    let (then, now) = (&made["status"]["rollout"], &object["status"]["rollout"]);
    then["failed"] == true && then["revision"] == now["revision"]
}

/// What somebody who waits has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// That the newest template serves.
    Template,
    /// So many instances, whatever became of the newest template before.
    Replicas,
}

/// How far it is, in a few words.
pub fn state(object: &Value) -> String {
    let status = &object["status"];
    let phase = status["phase"].as_str().unwrap_or("Unknown");
    let count = |key: &str| status[key].as_u64();
    match (count("readyReplicas"), count("desiredReplicas"), count("succeeded"), object["spec"]["completions"].as_u64())
    {
        (Some(ready), Some(wanted), ..) => format!("{phase}, {ready} of {wanted} ready"),
        (.., Some(done), Some(wanted)) => {
            let (active, failed) = (count("active").unwrap_or(0), count("failed").unwrap_or(0));
            format!("{phase}, {done} of {wanted} succeeded, {active} active, {failed} failed")
        }
        _ => phase.to_owned(),
    }
}

/// The conditions that do not hold, each as a sentence.
pub fn complaints(object: &Value) -> Vec<String> {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let failing = conditions.iter().filter(|c| c["status"] != "True");
    let sentence = |c: &Value| {
        let (kind, reason, message) = (text(c, "/type"), text(c, "/reason"), text(c, "/message"));
        plain(&if message.is_empty() { format!("{kind}: {reason}") } else { format!("{kind}: {reason}: {message}") })
    };
    let mut all: Vec<String> = failing.map(sentence).collect();
    let message = text(object, "/status/message");
    if !message.is_empty() && !all.iter().any(|c| c.contains(message)) {
        all.push(plain(message));
    }
    all
}

/// The instances that an app owns.
pub async fn instances_of(cloud: &Cloud, app: &Value) -> Result<Vec<Value>, ClientError> {
    let kind = kind::find("instances").expect("a kind");
    let (name, uid) = (text(app, "/metadata/name"), text(app, "/metadata/uid"));
    let project = text(app, "/metadata/project").parse().ok();
    let region = cloud.region_of(app);
    if region == *GLOBAL {
        let (instances, silent) = shares_of(cloud, app).await;
        silent.iter().for_each(|(region, why)| super::output::note(&format!("region {region}: {why}")));
        return Ok(instances);
    }
    let listing = Listing { project, region: Some(region), ..Listing::default() };
    // The owner tells instances of this app from those of a former one of the same name.
    let mine = |i: &Value| {
        let owner = text(i, "/metadata/owner/uid");
        if owner.is_empty() { text(i, "/spec/app") == name } else { owner == uid }
    };
    Ok(cloud.list(kind, &listing, mine).await?.0)
}

/// The instances of a global app in all of its regions, and the regions that can't be asked, each with why: they must not
/// hide the others'.
pub async fn shares_of(cloud: &Cloud, app: &Value) -> (Vec<Value>, Vec<(Name, String)>) {
    let kind = kind::find("instances").expect("a kind");
    let project: Option<Name> = text(app, "/metadata/project").parse().ok();
    let name = text(app, "/metadata/name");
    let regions = app["status"]["regions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let (mut all, mut silent) = (Vec::new(), Vec::new());
    for region in regions.iter().filter_map(|r| text(r, "/region").parse::<Name>().ok()) {
        let listing = Listing { project: project.clone(), region: Some(region.clone()), ..Listing::default() };
        match cloud.list(kind, &listing, |i| text(i, "/spec/app") == name).await {
            Ok((mut instances, _)) => all.append(&mut instances),
            Err(e) => silent.push((region, e.to_string())),
        }
    }
    (all, silent)
}

/// Why an object has not settled, line by line: its own conditions and, for an app, those of its instances.
pub async fn why(cloud: &Cloud, kind: &KindDescriptor, object: &Value) -> Vec<String> {
    let mut lines = complaints(object);
    if kind.kind != "App" {
        return lines;
    }
    // An explanation must not fail for want of a detail.
    let Ok(instances) = instances_of(cloud, object).await else { return lines };
    let unready: Vec<&Value> = instances.iter().filter(|i| i["status"]["ready"] != true).collect();
    for instance in unready.iter().take(NAMED) {
        let mut reasons = complaints(instance);
        reasons.dedup();
        let reason = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join("; ")) };
        lines.push(plain(&format!(
            "{} is {}{reason}",
            resource::title(kind::find("instance").expect("a kind"), text(instance, "/metadata/name")),
            state(instance)
        )));
    }
    if unready.len() > NAMED {
        lines.push(format!("and {} more instances are not ready", unready.len() - NAMED));
    }
    lines
}

/// Whether every instance of an app runs this content.
async fn runs(cloud: &Cloud, app: &Value, digest: &str) -> Result<bool, ClientError> {
    let instances = instances_of(cloud, app).await?;
    Ok(instances.iter().all(|i| text(i, "/spec/imageDigest") == digest))
}

/// Looks at the object that was made at `path`, again and again, until `look` has found what it wants; nothing, if the time runs
/// out. Ctrl-C leaves the object as it is, and `advice` says what to do then.
pub async fn follow<T>(
    cloud: &Cloud,
    path: &str,
    title: &str,
    made: &Value,
    timeout: Duration,
    advice: &str,
    mut look: impl AsyncFnMut(&Value, &mut Progress) -> anyhow::Result<Option<T>>,
) -> anyhow::Result<Option<T>> {
    let mut progress = Progress::new();
    let following = async {
        let mut object = made.clone();
        loop {
            if let Some(found) = look(&object, &mut progress).await? {
                return anyhow::Ok(found);
            }
            tokio::time::sleep(LOOK).await;
            match cloud.find(path).await {
                Ok(Some(newer)) if newer["metadata"]["uid"] == made["metadata"]["uid"] => object = newer,
                Ok(_) => return Err(Fail::new(Exit::Failed, format!("{title} was deleted meanwhile")).into()),
                // A server that is away comes back, or the time runs out.
                Err(e) if e.exit() == Exit::Unavailable => {}
                Err(e) => return Err(e.into()),
            }
        }
    };
    tokio::select! {
        biased;
        found = following => found.map(Some),
        () = tokio::time::sleep(timeout) => Ok(None),
        _ = tokio::signal::ctrl_c() => Err(Fail::new(Exit::Failed, format!("interrupted: {advice}")).into()),
    }
}

/// Waits until the object at `path` has settled and, with a digest, every instance runs that content. Ctrl-C and the timeout leave it as it is.
pub async fn wait(
    cloud: &Cloud,
    kind: &'static KindDescriptor,
    path: &str,
    made: &Value,
    digest: Option<&str>,
    timeout: Duration,
) -> anyhow::Result<Value> {
    wait_for(cloud, kind, path, made, (Asked::Template, digest), timeout).await
}

/// Waits likewise for what was asked for, with a digest or without one.
pub async fn wait_for(
    cloud: &Cloud,
    kind: &'static KindDescriptor,
    path: &str,
    made: &Value,
    (asked, digest): (Asked, Option<&str>),
    timeout: Duration,
) -> anyhow::Result<Value> {
    let title = resource::title(kind, text(made, "/metadata/name"));
    let mut last = made.clone();
    let advice = format!("{title} stays as it is; `nexus describe {title}` shows how it goes on");
    let ended = follow(cloud, path, &title, made, timeout, &advice, async |object, progress| {
        last.clone_from(object);
        let counts = asked == Asked::Replicas;
        if let Some(why) = failure(object).filter(|_| !counts || !failed_before(made, object)) {
            let advice = format!("`nexus rollout status {}` shows more", text(made, "/metadata/name"));
            return Err(Fail::new(Exit::Failed, format!("{title} was not updated: {why}\n  {advice}")).into());
        }
        let done = rests(object)
            || counts && serves_as_before(made, object)
            || is_settled(object)
                && is_heeded(object)
                && match digest {
                    None => true,
                    // Not to be asked is not to know.
                    Some(digest) => runs(cloud, object, digest).await.unwrap_or(false),
                };
        if done {
            return Ok(Some(object.clone()));
        }
        let complaint = complaints(object).into_iter().next().map(|c| format!(" ({c})")).unwrap_or_default();
        progress.say(&format!("{title}: {}{complaint}", state(object)));
        Ok(None)
    });
    if let Some(object) = ended.await? {
        return Ok(object);
    }
    // The explanation has a deadline of its own: it is asked of a cloud that may be in trouble.
    let reasons = tokio::time::timeout(Duration::from_secs(10), why(cloud, kind, &last)).await;
    let mut message = format!("{title} is not ready after {} seconds: {}", timeout.as_secs(), state(&last));
    for reason in reasons.unwrap_or_default() {
        message.push_str(&format!("\n  {reason}"));
    }
    message.push_str(&format!("\n  `nexus describe {title}` shows more"));
    Err(Fail::unavailable(message).into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settled_means_a_good_phase_of_the_newest_generation() {
        let app = |phase: &str, observed: u64| json!({"metadata": {"generation": 2}, "status": {"phase": phase, "observedGeneration": observed}});
        assert!(is_settled(&app("Ready", 2)) && is_settled(&app("Stopped", 2)));
        assert!(!is_settled(&app("Ready", 1)) && !is_settled(&app("Progressing", 2)));
        assert!(is_settled(&json!({"metadata": {"generation": 1}, "status": {}})));
    }

    #[test]
    fn a_rollout_that_waits_for_its_users_or_has_failed_is_not_waited_for() {
        let app = |phase: &str, observed: u64| {
            json!({"metadata": {"generation": 2}, "status": {"phase": "Progressing", "observedGeneration": observed,
                "rollout": {"phase": phase, "message": "revision 2 has failed"}}})
        };
        assert!(rests(&app("Waiting", 2)) && rests(&app("Switched", 2)) && !rests(&app("Waiting", 1)));
        assert!(!rests(&app("Progressing", 2)) && failure(&app("Progressing", 2)).is_none());
        assert_eq!(failure(&app("RolledBack", 2)).unwrap(), "revision 2 has failed");
        assert!(failure(&app("RolledBack", 1)).is_none());
        let mut ordered = app("Waiting", 2);
        ordered["status"]["rollout"]["orders"] = json!({"resumed": 1});
        ordered["status"]["rollout"]["heeded"] = json!({"resumed": 0});
        assert!(!rests(&ordered), "it is about to go on");
    }

    #[test]
    fn an_older_rollouts_failure_is_not_that_of_a_change_of_the_replicas() {
        let app = |phase: &str, ready: u64, observed: u64, revision: u64, failed: bool| {
            json!({"metadata": {"generation": 3}, "status": {"phase": phase, "observedGeneration": observed,
                "readyReplicas": ready, "desiredReplicas": 3,
                "rollout": {"phase": if failed { "RolledBack" } else { "Progressing" }, "revision": revision, "failed": failed}}})
        };
        let made = app("RolledBack", 2, 2, 2, true);
        assert!(!serves_as_before(&made, &made), "nobody has looked at the change yet");
        let still = app("Progressing", 2, 3, 2, true);
        assert!(failed_before(&made, &still) && !serves_as_before(&made, &still));
        assert!(serves_as_before(&made, &app("RolledBack", 3, 3, 2, true)));
        // One that failed meanwhile is news, whether it was under way or came with another template.
        let went = app("Progressing", 2, 2, 2, false);
        assert!(!failed_before(&went, &app("RolledBack", 3, 3, 2, true)));
        assert!(!failed_before(&made, &app("RolledBack", 3, 3, 3, true)));
    }

    #[test]
    fn what_fails_is_told_once() {
        let instance = json!({"status": {"message": "no space", "conditions": [
            {"type": "Scheduled", "status": "True", "reason": "Placed", "message": "on a host"},
            {"type": "Ready", "status": "False", "reason": "Waiting", "message": "no space"},
        ]}});
        assert_eq!(complaints(&instance), ["Ready: Waiting: no space"]);
        assert_eq!(complaints(&json!({"status": {"message": "alone"}})), ["alone"]);
    }
}
