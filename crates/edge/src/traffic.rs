//! Telling the leading server what passes through: every second, and at once when a request finds nobody to take it.
//!
//! What is counted lives where it happens, in atomic counters of instances and services, and a report takes it from there.
//! Reports say nothing twice: one that is lost is lost, and the next second says more.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_env::{Endpoint, Env, RngExt};
use nexus_model::plan::{AppTraffic, InstanceTraffic, MAX_TRAFFIC, TrafficReport, method};
use nexus_model::{Name, Uid};
use nexus_wire::{Pool, ServerBook, WireError};
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use crate::backend::Backend;
use crate::gateway::{Core, Gateway};

const INTERVAL: Duration = Duration::from_secs(1);
/// However often the bell rings, so long passes after a report that it brought.
const SHORTEST: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_secs(2);
/// How many servers may point to another one before the reporter stops believing them.
const HOPS: u32 = 3;

/// Reports until it is dropped.
pub(crate) async fn report(gateway: Gateway, name: Name, book: Arc<ServerBook>, pool: Pool, env: Env) {
    let core = gateway.0.clone();
    let mut meter = Meter { held: Vec::new(), since: Instant::now() };
    let mut turn = env.rng.below(1024) as usize;
    let mut leader: Option<Endpoint> = None;
    let mut pause = INTERVAL;
    loop {
        let rung = timeout(pause, core.bell.notified()).await.is_ok();
        let report = meter.take(&core, name.clone());
        send(&book, &pool, &mut leader, &mut turn, &report).await;
        // Whoever rings first is heard at once; those after it share a report.
        if rung {
            sleep(SHORTEST).await;
        }
        pause = if rung { INTERVAL - SHORTEST } else { INTERVAL };
    }
}

/// Sends a report to whoever leads. When nobody takes it, the next goes to another server.
async fn send(book: &ServerBook, pool: &Pool, leader: &mut Option<Endpoint>, turn: &mut usize, report: &TrafficReport) {
    for _ in 0..HOPS {
        let Some(endpoint) = leader.clone().or_else(|| book.nth(*turn)) else { return };
        match pool.get(&endpoint).call::<_, ()>(method::TRAFFIC, report, DEADLINE).await {
            Ok(()) => {
                *leader = Some(endpoint);
                return;
            }
            Err(WireError::NotLeader { leader: Some(other) }) => match other.parse::<Endpoint>() {
                Ok(other) if other != endpoint => *leader = Some(other),
                _ => break,
            },
            Err(error) => {
                debug!(server = %endpoint, %error, "a report of traffic was not taken");
                break;
            }
        }
    }
    *leader = None;
    *turn = turn.wrapping_add(1);
}

struct Meter {
    /// The instances of the last report, and those that were busy though no table named them: what these finish after they have
    /// gone from the table counts too.
    held: Vec<Arc<Backend>>,
    since: Instant,
}

impl Meter {
    /// Takes what was counted since the last call.
    fn take(&mut self, core: &Core, gateway: Name) -> TrafficReport {
        let now = Instant::now();
        let span = now.duration_since(std::mem::replace(&mut self.since, now));
        let span_ms = u32::try_from(span.as_millis()).unwrap_or(u32::MAX);
        let table = core.table();
        let services = table.iter().flat_map(|t| &t.services);
        let mut next: Vec<Arc<Backend>> =
            services.clone().flat_map(|s| s.members.iter().map(|m| m.backend.clone())).collect();
        let named: HashSet<*const Backend> = next.iter().map(Arc::as_ptr).collect();
        let gone: Vec<_> = self.held.drain(..).filter(|b| !named.contains(&Arc::as_ptr(b))).collect();
        // A port of an instance each: they count together.
        let mut found: BTreeMap<Uid, InstanceTraffic> = BTreeMap::new();
        for backend in next.iter().chain(&gone) {
            let (requests, errors) = backend.take_counts();
            let in_flight = backend.outstanding();
            if requests == 0 && in_flight == 0 {
                continue;
            }
            let none = InstanceTraffic { uid: backend.uid, requests: 0, errors: 0, in_flight: 0 };
            let sum = found.entry(backend.uid).or_insert(none);
            sum.requests = sum.requests.saturating_add(requests);
            sum.errors = sum.errors.saturating_add(errors);
            sum.in_flight = sum.in_flight.saturating_add(in_flight);
        }
        next.extend(gone.into_iter().filter(|b| b.outstanding() > 0));
        self.held = next;
        let mut of_app: BTreeMap<(&Name, &Name), (u32, u32)> = BTreeMap::new();
        for service in services {
            let arrived = service.metrics.arrived.swap(0, Ordering::Relaxed);
            let waiting = u32::try_from(service.metrics.waiting.get()).unwrap_or(0);
            if arrived > 0 || waiting > 0 {
                let sum = of_app.entry((&service.project, &service.app)).or_default();
                *sum = (sum.0.saturating_add(arrived), sum.1.saturating_add(waiting));
            }
        }
        let mut instances: Vec<InstanceTraffic> = found.into_values().collect();
        instances.sort_by_key(|i| std::cmp::Reverse(u64::from(i.requests) + u64::from(i.in_flight)));
        instances.truncate(MAX_TRAFFIC);
        let apps = of_app.into_iter().map(|((project, app), (arrived, waiting))| AppTraffic {
            project: project.clone(),
            app: app.clone(),
            arrived,
            waiting,
        });
        let mut apps: Vec<AppTraffic> = apps.collect();
        apps.sort_by_key(|a| std::cmp::Reverse((a.waiting, a.arrived)));
        apps.truncate(MAX_TRAFFIC);
        TrafficReport { gateway, span_ms, instances, apps }
    }
}
