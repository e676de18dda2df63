//! Telling the leading server what is true here: every second, and at once when something changed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nexus_compute::CpuTime;
use nexus_env::{Endpoint, Env};
use nexus_model::Uid;
use nexus_model::plan::{FailingTarget, HostReport, InstanceUsage, ReportAck, method};
use nexus_wire::WireError;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::{AgentConfig, Engines};
use crate::servers::Servers;
use crate::telemetry;

const INTERVAL: Duration = Duration::from_secs(1);
/// Changes come in flocks: those that follow a report so closely travel together.
const COALESCE: Duration = Duration::from_millis(20);
const DEADLINE: Duration = Duration::from_secs(2);
/// What changes seldom is said again so often, for a server that has begun to lead.
const ALL_EVERY: Duration = Duration::from_secs(5);
/// How many servers may point to another one before the reporter stops believing them.
const HOPS: u32 = 3;

/// Reports until it is dropped.
pub(crate) async fn run(
    config: Arc<AgentConfig>,
    env: Env,
    engines: Engines,
    servers: Arc<Servers>,
    disk: watch::Receiver<Option<u32>>,
) {
    let (mut load, mut usage) = (LoadMeter::default(), UsageMeter::default());
    let mut turn = servers.start();
    let mut leader: Option<Endpoint> = None;
    let mut failures = 0;
    let mut said: Said = None;
    // When a report may hurry again.
    let mut hurry = Instant::now();
    loop {
        let facts = config.handle.snapshot();
        // Before the first look, "nothing runs here" would be a lie.
        if facts.observed {
            let report = HostReport {
                host: config.name.clone(),
                spec: config.host.clone(),
                boot_id: config.boot_id.clone(),
                agent_version: config.agent_version.clone(),
                applied: facts.plan,
                instances: facts.instances.into_values().collect(),
                images: engines.images.held(),
                load: load.measure(&env),
                networks: facts.networks,
                certificate_ends: (config.certificate_ends)(),
                usage: usage.measure(&env, &engines).await,
                telemetry: telemetry::measure(&env, *disk.borrow()),
                failing: unsaid(&said, &facts.failing, &leader, env.monotonic()),
            };
            match send(&servers, &mut leader, &mut turn, &report).await {
                Some(ack) => {
                    failures = 0;
                    servers.learn(&ack.servers).await;
                    let now = env.monotonic();
                    if report.failing.is_some() {
                        said = leader.clone().map(|leader| (leader, now, facts.failing.clone()));
                    }
                    config.handle.update(|f| {
                        f.reports_sent += 1;
                        f.last_report = Some(now);
                        f.host_epoch = ack.epoch;
                    });
                }
                None => {
                    config.handle.update(|f| f.reports_failed += 1);
                    servers.pause(failures, Duration::from_millis(100), INTERVAL).await;
                    failures += 1;
                    continue;
                }
            }
        }
        let earliest = Instant::now() + COALESCE;
        let changed = async {
            config.handle.changed().await;
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(earliest) => false,
                // Somebody may wait for this very instance. These don't come in flocks either.
                () = async { config.handle.urged().await; tokio::time::sleep_until(hurry).await } => true,
            }
        };
        if let Ok(true) = tokio::time::timeout(INTERVAL, changed).await {
            hurry = Instant::now() + COALESCE;
        }
    }
}

/// To whom which failing targets were told last, and when.
type Said = Option<(Endpoint, Duration, Arc<Vec<FailingTarget>>)>;

/// The failing targets, if whoever is to hear of them may not know them.
fn unsaid(
    said: &Said,
    failing: &Arc<Vec<FailingTarget>>,
    leader: &Option<Endpoint>,
    now: Duration,
) -> Option<Vec<FailingTarget>> {
    let known = said.as_ref().is_some_and(|(to, at, what)| {
        Some(to) == leader.as_ref() && what == failing && now.saturating_sub(*at) < ALL_EVERY
    });
    (!known).then(|| failing.to_vec())
}

/// Sends a report to whoever leads. `None` when nobody took it; then the next try goes to another server.
async fn send(
    servers: &Servers,
    leader: &mut Option<Endpoint>,
    turn: &mut usize,
    report: &HostReport,
) -> Option<ReportAck> {
    for _ in 0..HOPS {
        let endpoint = match leader {
            Some(endpoint) => endpoint.clone(),
            None => servers.nth(*turn)?,
        };
        match servers.client(&endpoint).call::<_, ReportAck>(method::REPORT, report, DEADLINE).await {
            Ok(ack) => {
                *leader = Some(endpoint);
                return Some(ack);
            }
            Err(WireError::NotLeader { leader: Some(other) }) => match other.parse::<Endpoint>() {
                Ok(other) if other != endpoint => *leader = Some(other),
                _ => break,
            },
            Err(error) => {
                tracing::debug!(server = %endpoint, %error, "a report was not taken");
                break;
            }
        }
    }
    *leader = None;
    *turn = turn.wrapping_add(1);
    None
}

/// What instances use of processors between two looks.
#[derive(Default)]
struct UsageMeter {
    at: Duration,
    known: BTreeMap<Uid, CpuTime>,
    told: Vec<InstanceUsage>,
}

/// Over a shorter time, what one look sees and another doesn't is chance; what was said before is said again.
const SHORTEST_LOOK: Duration = Duration::from_millis(500);

impl UsageMeter {
    async fn measure(&mut self, env: &Env, engines: &Engines) -> Vec<InstanceUsage> {
        let now = env.monotonic();
        let passed = now.saturating_sub(self.at);
        if passed < SHORTEST_LOOK {
            return self.told.clone();
        }
        let mut seen = BTreeMap::new();
        for runtime in engines.runtimes.values() {
            match runtime.cpu_time().await {
                Ok(used) => seen.extend(used),
                Err(error) => tracing::debug!(%error, "the processor time of instances can't be read"),
            }
        }
        self.told = used_between(&self.known, &seen, passed);
        (self.at, self.known) = (now, seen);
        self.told.clone()
    }
}

/// Thousandths of a processor that each instance used, with all its parts, of what is in both looks. What was started anew
/// counts from nothing.
fn used_between(before: &BTreeMap<Uid, CpuTime>, now: &BTreeMap<Uid, CpuTime>, passed: Duration) -> Vec<InstanceUsage> {
    let mut spent: BTreeMap<Uid, Duration> = BTreeMap::new();
    for (uid, now) in now {
        let Some(before) = before.get(uid) else { continue };
        *spent.entry(now.instance).or_default() += now.used.checked_sub(before.used).unwrap_or(now.used);
    }
    let used = |(uid, spent): (Uid, Duration)| {
        let cpu = spent.as_secs_f64() / passed.as_secs_f64() * 1000.0;
        InstanceUsage { uid, cpu: cpu.round() as u32 }
    };
    spent.into_iter().map(used).collect()
}

/// The share of the machine's processors in use between two looks at /proc/stat (proc(5)).
#[derive(Default)]
struct LoadMeter {
    busy: u64,
    total: u64,
}

impl LoadMeter {
    fn measure(&mut self, env: &Env) -> f32 {
        let text = env.disk.read(Path::new("/proc/stat")).unwrap_or_default();
        let Some((busy, total)) = parse_stat(&String::from_utf8_lossy(&text)) else { return 0.0 };
        let (spent, passed) = (busy.saturating_sub(self.busy), total.saturating_sub(self.total));
        let first = self.total == 0;
        (self.busy, self.total) = (busy, total);
        if first || passed == 0 { 0.0 } else { (spent as f32 / passed as f32).clamp(0.0, 1.0) }
    }
}

/// Busy and total ticks of all processors.
fn parse_stat(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().map_while(|t| t.parse().ok()).take(8).collect();
    let total: u64 = ticks.iter().sum();
    // idle and iowait
    let idle = ticks.get(3)? + ticks.get(4)?;
    Some((total - idle, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_uses_what_its_time_grew_by() {
        let [a, b, c, part] = [1, 2, 3, 4].map(|n| Uid::from_random([n; 16]));
        let time = |instance, ms| CpuTime { instance, used: Duration::from_millis(ms) };
        let before = [(a, time(a, 100)), (b, time(b, 900)), (part, time(b, 700))].into();
        // The part was started anew since.
        let now = [(a, time(a, 1100)), (b, time(b, 1000)), (part, time(b, 100)), (c, time(c, 5))].into();
        let used = used_between(&before, &now, Duration::from_secs(2));
        assert_eq!(used, [InstanceUsage { uid: a, cpu: 500 }, InstanceUsage { uid: b, cpu: 100 }]);
    }

    #[test]
    fn load_is_what_is_not_idle() {
        let text = "cpu  10 0 20 60 10 0 0 0 0 0\ncpu0 1 2 3";
        assert_eq!(parse_stat(text), Some((30, 100)));
        assert_eq!(parse_stat("nonsense"), None);
    }
}
