//! Waits until a cloud serves: every server and gateway says it is ready, and every host works.

use std::time::{Duration, Instant};

use nexus_model::Name;
use serde::Deserialize;

use super::plan::Plan;
use super::state::{DataDir, Mark};
use crate::client::{Client, Parts};
use crate::context::Target;

const ASK: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(150);

/// What of `GET /v1/status` matters here.
#[derive(Debug, Deserialize)]
struct Status {
    active_workers: u64,
}

/// How far a start has come.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    /// Members that do not answer or say that they are not ready, with what they say.
    waiting: Vec<(Name, String)>,
    /// Ready hosts, if the API could be asked, and how many there should be.
    hosts: Option<u64>,
    expected_hosts: u64,
}

impl Progress {
    fn is_ready(&self) -> bool {
        self.waiting.is_empty() && self.hosts.is_some_and(|h| h >= self.expected_hosts)
    }

    fn line(&self) -> String {
        let names: Vec<&str> = self.waiting.iter().map(|(n, _)| n.as_str()).collect();
        let hosts = match self.hosts {
            Some(n) => format!("hosts ready: {n} of {}", self.expected_hosts),
            None => format!("hosts ready: unknown, of {}", self.expected_hosts),
        };
        if names.is_empty() { hosts } else { format!("{hosts}; waiting for {}", names.join(", ")) }
    }
}

/// How the wait ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Ready,
    /// The user wants no more of it.
    Interrupted,
    /// Not ready in time: what is missing and which logs tell why.
    Late(String),
}

/// Waits, telling the user about every change. `interrupted` is asked between tries.
pub async fn wait(
    dir: &DataDir,
    plan: &Plan,
    target: &Target,
    patience: Duration,
    interrupted: impl Fn() -> bool,
) -> anyhow::Result<Outcome> {
    let deadline = Instant::now() + patience;
    // Each region speaks for its own hosts.
    let mut apis = Vec::new();
    for region in &plan.regions {
        let endpoints = plan.servers_of(region).iter().map(|s| format!("https://{}", s.api_tls)).collect();
        apis.push(Client::new(&Target { endpoints, region: region.name.clone(), ..target.clone() })?);
    }
    let mut probes = Vec::new();
    let probe = |url: String| Client::new(&Target { endpoints: vec![url], ..target.clone() });
    for server in plan.servers() {
        probes.push((server.name, probe(format!("https://{}", server.api_tls))?));
    }
    for gateway in plan.gateways() {
        probes.push((gateway.name, probe(format!("http://{}", gateway.admin))?));
    }
    let mut shown = String::new();
    loop {
        let progress = look(dir, plan, &apis, &probes).await;
        if progress.is_ready() {
            return Ok(Outcome::Ready);
        }
        let line = progress.line();
        if line != shown {
            eprintln!("{line}");
            shown = line;
        }
        if interrupted() {
            return Ok(Outcome::Interrupted);
        }
        if Instant::now() > deadline {
            return Ok(Outcome::Late(explain(dir, plan, &progress)));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn look(dir: &DataDir, plan: &Plan, apis: &[Client], probes: &[(Name, Client)]) -> Progress {
    let stopped = |name: &Name| dir.is_marked(name.as_str(), Mark::Stopped);
    let asked = probes.iter().filter(|(name, _)| !stopped(name)).map(|(name, client)| async move {
        let answer = client.send(reqwest::Method::GET, "/readyz", Parts::default().timeout(ASK)).await;
        answer.err().map(|e| (name.clone(), e.to_string()))
    });
    let waiting = futures::future::join_all(asked).await.into_iter().flatten().collect();
    let parts = || Parts::default().timeout(ASK);
    let asked = apis.iter().map(|api| api.json::<Status>(reqwest::Method::GET, "/v1/status", parts()));
    let statuses = futures::future::join_all(asked).await;
    let hosts = statuses.into_iter().map(|s| s.ok().map(|s| s.active_workers)).sum::<Option<u64>>();
    let expected = plan.hosts().iter().filter(|h| !stopped(&h.name)).count();
    Progress { waiting, hosts, expected_hosts: expected as u64 }
}

fn explain(dir: &DataDir, plan: &Plan, progress: &Progress) -> String {
    let mut text = progress.line();
    for (name, why) in &progress.waiting {
        text.push_str(&format!("\n  {name}: {why}\n    see {}", dir.log(name.as_str()).display()));
    }
    if progress.waiting.is_empty() {
        let hosts = plan.hosts();
        let first = hosts.first().map(|h| h.name.to_string()).unwrap_or_default();
        let log = |name: String| dir.log(&name).display().to_string();
        text.push_str(&format!(
            "\n  `nexus get hosts` names the missing ones; see for each host logs like {} and {}",
            log(format!("agent@{first}")),
            log(first)
        ));
    }
    text.push_str(&format!("\n  what starts and ends is in {}", dir.log("supervisor").display()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_everyone() {
        let ready = Progress { waiting: Vec::new(), hosts: Some(6), expected_hosts: 6 };
        assert!(ready.is_ready());
        assert!(
            !Progress { hosts: Some(5), ..Progress { waiting: Vec::new(), hosts: None, expected_hosts: 6 } }.is_ready()
        );
        assert!(!Progress { hosts: None, waiting: Vec::new(), expected_hosts: 0 }.is_ready());
        let waiting = vec![("gateway-1".parse().unwrap(), "refused".to_owned())];
        let late = Progress { waiting, ..ready };
        assert!(!late.is_ready());
        assert_eq!(late.line(), "hosts ready: 6 of 6; waiting for gateway-1");
    }
}
