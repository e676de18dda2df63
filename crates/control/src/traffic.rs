//! What gateways say of the requests that they pass on: how many each instance has finished, how many of them failed, how many
//! it is busy with, and how many wait for an app that has nobody to take them.
//!
//! Reports come every second from every gateway, to the server whose writer leads. They are never committed: a new leader
//! begins with nothing and knows a window's worth after a window. What is counted is kept for [`KEPT`]; what is true at one
//! moment (in flight, waiting; from hosts, processor time) is believed for [`STALE`] after the gateway was last heard.
//!
//! Wire handlers write here and the writer's reconcilers read, so the inside is behind a lock; all time is the monotonic clock of
//! whoever calls.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_model::plan::{InstanceUsage, TrafficReport};
use nexus_model::{Name, Uid};
use tokio::sync::Notify;

/// How long counts are kept: the longest window that can be asked for.
pub const KEPT: Duration = Duration::from_secs(300);
/// A gateway that is silent for so long says nothing of what is in flight or waits.
pub const STALE: Duration = Duration::from_secs(5);
/// Counts are kept by so many seconds.
const BUCKET_SECONDS: u64 = 2;
/// Instances, apps and gateways of which anything is kept; what comes beyond is passed over.
const INSTANCES: usize = 65_536;
const APPS: usize = 16_384;
const GATEWAYS: usize = 1_000;
/// A report speaks of no longer a time than this, whatever it says.
const LONGEST_SPAN: Duration = Duration::from_secs(10);

/// What one instance did in a window of time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Requests that it finished, or that failed at it.
    pub requests: u64,
    /// Of these, those that were answered with 5xx, or not at all.
    pub errors: u64,
    /// Requests that it is busy with now.
    pub in_flight: u32,
    /// Requests that it was busy with on average over the window.
    pub concurrency: f64,
    /// The time that is counted: the window, to the nearest bucket and report.
    pub span: Duration,
}

impl Load {
    pub fn per_second(&self) -> f64 {
        if self.span.is_zero() { 0.0 } else { self.requests as f64 / self.span.as_secs_f64() }
    }

    /// The share of requests that failed; `None` if there were none.
    pub fn error_rate(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.errors as f64 / self.requests as f64)
    }
}

/// What users wanted of an app in a window of time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Requests that came.
    pub arrived: u64,
    /// Requests that wait now for an instance.
    pub waiting: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    at: u64,
    count: u32,
    errors: u32,
    /// Milliseconds times requests in flight.
    busy: u64,
}

#[derive(Debug, Default)]
struct Ring(VecDeque<Bucket>);

impl Ring {
    fn add(&mut self, at: u64, count: u32, errors: u32, busy: u64) {
        let oldest = at.saturating_sub(KEPT.as_secs() / BUCKET_SECONDS);
        while self.0.front().is_some_and(|b| b.at < oldest) {
            self.0.pop_front();
        }
        match self.0.back_mut() {
            Some(last) if last.at >= at => {
                last.count = last.count.saturating_add(count);
                last.errors = last.errors.saturating_add(errors);
                last.busy = last.busy.saturating_add(busy);
            }
            _ => self.0.push_back(Bucket { at, count, errors, busy }),
        }
    }

    fn over(&self, window: Duration, now: Duration) -> impl Iterator<Item = &Bucket> {
        let from = now.saturating_sub(window).as_secs() / BUCKET_SECONDS;
        self.0.iter().rev().take_while(move |b| b.at >= from)
    }
}

/// What one gateway last said of the moment.
#[derive(Debug)]
struct Heard {
    at: Duration,
    in_flight: HashMap<Uid, u32>,
    waiting: HashMap<(Name, Name), u32>,
}

#[derive(Debug, Default)]
struct Inner {
    now: Duration,
    pruned: Duration,
    instances: HashMap<Uid, Ring>,
    apps: HashMap<(Name, Name), Ring>,
    gateways: BTreeMap<Name, Heard>,
    /// Thousandths of a processor that instances use, and when that was told.
    cpu: HashMap<Uid, (Duration, f64)>,
}

impl Inner {
    /// What the buckets of a window are of. Reports come every second, so half of one is on average not told yet.
    fn span(&self, window: Duration) -> Duration {
        let from = self.now.saturating_sub(window).as_secs() / BUCKET_SECONDS * BUCKET_SECONDS;
        self.now.saturating_sub(Duration::from_secs(from)) + Duration::from_millis(500)
    }

    fn heard(&self) -> impl Iterator<Item = &Heard> {
        self.gateways.values().filter(|g| self.now.saturating_sub(g.at) < STALE)
    }
}

/// What is known of the traffic in this server's region while it leads.
#[derive(Debug, Default)]
pub struct Traffic {
    inner: Mutex<Inner>,
    /// Rings when requests begin to wait for an app.
    bell: Notify,
}

impl Traffic {
    fn hold(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when requests have begun to wait for an app since the last call. For the writer alone; cancel safe.
    pub async fn rung(&self) {
        self.bell.notified().await;
    }

    /// Takes in a gateway's report that came at `now`.
    pub fn hear(&self, report: &TrafficReport, now: Duration) {
        let inner = &mut *self.hold();
        inner.now = inner.now.max(now);
        let bucket = now.as_secs() / BUCKET_SECONDS;
        let span = Duration::from_millis(report.span_ms.into()).min(LONGEST_SPAN).as_millis() as u64;
        for i in &report.instances {
            if inner.instances.len() < INSTANCES || inner.instances.contains_key(&i.uid) {
                let busy = span * u64::from(i.in_flight);
                let errors = i.errors.min(i.requests);
                inner.instances.entry(i.uid).or_default().add(bucket, i.requests, errors, busy);
            }
        }
        for app in &report.apps {
            let place = (app.project.clone(), app.app.clone());
            if inner.apps.len() < APPS || inner.apps.contains_key(&place) {
                inner.apps.entry(place).or_default().add(bucket, app.arrived, 0, 0);
            }
        }
        let heard = Heard {
            at: now,
            in_flight: report.instances.iter().map(|i| (i.uid, i.in_flight)).filter(|(_, n)| *n > 0).collect(),
            waiting: report
                .apps
                .iter()
                .filter(|a| a.waiting > 0)
                .map(|a| ((a.project.clone(), a.app.clone()), a.waiting))
                .collect(),
        };
        if inner.gateways.len() < GATEWAYS || inner.gateways.contains_key(&report.gateway) {
            let places: Vec<_> = heard.waiting.keys().cloned().collect();
            let before = inner.gateways.insert(report.gateway.clone(), heard);
            // Once for each wait, however often it is told: the writer looks by itself, too.
            if places.iter().any(|place| before.as_ref().is_none_or(|b| !b.waiting.contains_key(place))) {
                self.bell.notify_one();
            }
        }
    }

    /// Takes in what a host says of its instances' processor time. Half of what was known before is kept: one second is a short time.
    pub fn hear_usage(&self, usage: &[InstanceUsage], now: Duration) {
        let inner = &mut *self.hold();
        inner.now = inner.now.max(now);
        for i in usage {
            if inner.cpu.len() < INSTANCES || inner.cpu.contains_key(&i.uid) {
                let used = f64::from(i.cpu);
                let known = inner.cpu.get(&i.uid).filter(|(at, _)| now.saturating_sub(*at) < STALE);
                let used = known.map_or(used, |(_, before)| (before + used) / 2.0);
                inner.cpu.insert(i.uid, (now, used));
            }
        }
    }

    /// Thousandths of a processor that an instance uses, if its host said so lately.
    pub fn cpu_of(&self, instance: Uid) -> Option<f64> {
        let inner = self.hold();
        let (at, used) = inner.cpu.get(&instance)?;
        (inner.now.saturating_sub(*at) < STALE).then_some(*used)
    }

    /// Goes on to `now`, and forgets what is too old. Called a few times a second.
    pub fn advance(&self, now: Duration) {
        let inner = &mut *self.hold();
        inner.now = inner.now.max(now);
        if inner.now.saturating_sub(inner.pruned) < STALE {
            return;
        }
        inner.pruned = inner.now;
        let oldest = inner.now.saturating_sub(KEPT).as_secs() / BUCKET_SECONDS;
        let lives = |ring: &Ring| ring.0.back().is_some_and(|b| b.at >= oldest);
        inner.instances.retain(|_, ring| lives(ring));
        inner.apps.retain(|_, ring| lives(ring));
        let now = inner.now;
        inner.gateways.retain(|_, g| now.saturating_sub(g.at) < KEPT);
        inner.cpu.retain(|_, (at, _)| now.saturating_sub(*at) < STALE);
    }

    /// Forgets everything: for a server that begins to lead.
    pub fn clear(&self) {
        *self.hold() = Inner::default();
    }

    /// What an instance did within the last `window`, up to [`KEPT`]; counts are exact to two seconds.
    pub fn of(&self, instance: Uid, window: Duration) -> Load {
        let inner = self.hold();
        let mut load =
            Load { in_flight: inner.heard().filter_map(|g| g.in_flight.get(&instance)).sum(), ..Load::default() };
        load.span = inner.span(window);
        let mut busy = 0u64;
        for bucket in inner.instances.get(&instance).into_iter().flat_map(|ring| ring.over(window, inner.now)) {
            load.requests += u64::from(bucket.count);
            load.errors += u64::from(bucket.errors);
            busy += bucket.busy;
        }
        load.concurrency = busy as f64 / load.span.as_millis().max(1) as f64;
        load
    }

    /// What users wanted of an app within the last `window`.
    pub fn of_app(&self, project: &Name, app: &Name, window: Duration) -> Demand {
        let inner = self.hold();
        let place = (project.clone(), app.clone());
        let buckets = inner.apps.get(&place).into_iter().flat_map(|ring| ring.over(window, inner.now));
        Demand {
            arrived: buckets.map(|b| u64::from(b.count)).sum(),
            waiting: inner.heard().filter_map(|g| g.waiting.get(&place)).sum(),
        }
    }

    /// Apps for which requests wait now.
    pub fn waited_for(&self) -> Vec<(Name, Name)> {
        let inner = self.hold();
        let mut places: Vec<_> = inner.heard().flat_map(|g| g.waiting.keys().cloned()).collect();
        places.sort();
        places.dedup();
        places
    }

    /// How many gateways are heard. With none, silence says nothing.
    pub fn gateways(&self) -> usize {
        self.hold().heard().count()
    }
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::{AppTraffic, InstanceTraffic};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn uid(n: u8) -> Uid {
        Uid::from_random([n; 16])
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn report(gateway: &str, instances: &[(u8, u32, u32, u32)], waiting: u32) -> TrafficReport {
        TrafficReport {
            gateway: name(gateway),
            span_ms: 1000,
            instances: instances
                .iter()
                .map(|(n, requests, errors, in_flight)| InstanceTraffic {
                    uid: uid(*n),
                    requests: *requests,
                    errors: *errors,
                    in_flight: *in_flight,
                })
                .collect(),
            apps: vec![AppTraffic { project: name("p"), app: name("a"), arrived: 10, waiting }],
        }
    }

    #[test]
    fn all_gateways_together_tell_what_an_instance_does() {
        let traffic = Traffic::default();
        for second in 0..10 {
            traffic.hear(&report("one", &[(1, 30, 3, 4)], 0), SECOND * second);
            traffic.hear(&report("two", &[(1, 10, 0, 2), (2, 5, 5, 0)], 2), SECOND * second);
        }
        let load = traffic.of(uid(1), SECOND * 10);
        assert_eq!((load.requests, load.errors, load.in_flight), (400, 30, 6));
        assert!((load.concurrency - 6.0).abs() < 0.5, "{load:?}");
        assert!((load.per_second() - 40.0).abs() < 3.0, "{load:?}");
        assert_eq!(load.error_rate(), Some(0.075));
        assert_eq!(traffic.of(uid(2), SECOND * 10).error_rate(), Some(1.0));
        assert_eq!(traffic.of(uid(3), SECOND * 10).error_rate(), None);
        assert_eq!(traffic.of_app(&name("p"), &name("a"), SECOND * 10), Demand { arrived: 200, waiting: 2 });
        assert_eq!(traffic.waited_for(), [(name("p"), name("a"))]);
        assert_eq!(traffic.gateways(), 2);
    }

    #[test]
    fn a_window_leaves_out_what_was_before_it() {
        let traffic = Traffic::default();
        traffic.hear(&report("one", &[(1, 100, 100, 0)], 0), SECOND);
        traffic.hear(&report("one", &[(1, 7, 0, 0)], 0), SECOND * 60);
        assert_eq!(traffic.of(uid(1), SECOND * 10).requests, 7);
        assert_eq!(traffic.of(uid(1), SECOND * 10).errors, 0);
        assert_eq!(traffic.of(uid(1), KEPT).requests, 107);
    }

    #[test]
    fn what_a_silent_gateway_said_of_the_moment_is_forgotten_at_once_and_its_counts_later() {
        let traffic = Traffic::default();
        traffic.hear(&report("one", &[(1, 9, 0, 4)], 3), SECOND);
        traffic.advance(SECOND * 3);
        assert_eq!(traffic.of(uid(1), KEPT).in_flight, 4);
        traffic.advance(SECOND * 10);
        assert_eq!((traffic.of(uid(1), KEPT).in_flight, traffic.of(uid(1), KEPT).requests), (0, 9));
        assert_eq!(traffic.of_app(&name("p"), &name("a"), KEPT).waiting, 0);
        assert_eq!(traffic.gateways(), 0);
        traffic.advance(SECOND * 400);
        assert_eq!(traffic.of(uid(1), KEPT).requests, 0);
        assert!(traffic.hold().instances.is_empty());
    }

    #[test]
    fn a_newer_report_that_names_an_instance_no_more_says_that_nothing_is_in_flight() {
        let traffic = Traffic::default();
        traffic.hear(&report("one", &[(1, 0, 0, 4)], 0), SECOND);
        traffic.hear(&report("one", &[], 0), SECOND * 2);
        assert_eq!(traffic.of(uid(1), KEPT).in_flight, 0);
    }
}
