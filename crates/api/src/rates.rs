//! How much one caller, and one project, may ask: a bucket of tokens each, that fills at a steady rate, and a bound on what
//! one caller has running at once. Every answer to somebody who is known says where the tighter of the two buckets stands:
//!
//! | header | |
//! |---|---|
//! | `X-RateLimit-Limit` | requests that a full bucket holds |
//! | `X-RateLimit-Remaining` | of them left |
//! | `X-RateLimit-Reset` | seconds until it is full again |
//!
//! Whoever has used up theirs is answered 429 with `Retry-After`. The fleet's own keys are not bounded: on a bad day an
//! operator must get through. Buckets are each server's own.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName, HeaderValue};
use nexus_iam::policy::{Principal, PrincipalKind};
use nexus_model::{Code, Name};

use crate::caller::Caller;
use crate::problem::Refusal;

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// Requests between two looks for buckets that are full again, which are forgotten.
const SWEEP: u32 = 1024;

/// How often something may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Requests a second that are taken for ever.
    pub per_second: NonZeroU32,
    /// Requests that are taken at once after a rest.
    pub burst: NonZeroU32,
}

impl Rate {
    /// Of 0 it makes 1: a cloud that takes nothing is none.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: at_least_one(per_second), burst: at_least_one(burst) }
    }
}

const fn at_least_one(n: u32) -> NonZeroU32 {
    match NonZeroU32::new(n) {
        Some(n) => n,
        None => NonZeroU32::MIN,
    }
}

type Limiter<K> = RateLimiter<K, DashMapStateStore<K>, DefaultClock, StateInformationMiddleware>;

/// The buckets of one kind of key.
struct Buckets<K: std::hash::Hash + Eq + Clone> {
    rate: Rate,
    limiter: Limiter<K>,
    taken: AtomicU32,
}

/// Where a bucket stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    limit: u32,
    remaining: u32,
    reset: Duration,
}

impl<K: std::hash::Hash + Eq + Clone> Buckets<K> {
    fn new(rate: Rate) -> Self {
        let quota = Quota::per_second(rate.per_second).allow_burst(rate.burst);
        let limiter = RateLimiter::dashmap(quota).with_middleware::<StateInformationMiddleware>();
        Self { rate, limiter, taken: AtomicU32::new(0) }
    }

    /// Takes one request out of a bucket. An error says how long until there is one again.
    fn take(&self, key: &K) -> Result<Standing, Duration> {
        if self.taken.fetch_add(1, Ordering::Relaxed) % SWEEP == SWEEP - 1 {
            self.limiter.retain_recent();
        }
        match self.limiter.check_key(key) {
            Ok(snapshot) => {
                let (limit, remaining) = (self.rate.burst.get(), snapshot.remaining_burst_capacity());
                let missing = f64::from(limit.saturating_sub(remaining));
                let reset = Duration::from_secs_f64(missing / f64::from(self.rate.per_second.get()));
                Ok(Standing { limit, remaining, reset })
            }
            Err(not_until) => Err(not_until.wait_time_from(DefaultClock::default().now())),
        }
    }
}

/// All buckets of a server, and who has how much running.
pub(crate) struct Rates {
    callers: Buckets<Principal>,
    projects: Buckets<Name>,
    at_once: usize,
    running: Arc<Mutex<HashMap<Principal, usize>>>,
}

/// A request that was taken: where its caller's buckets stand, and its place among what they have running.
pub(crate) struct Taken {
    standing: Option<Standing>,
    _running: Option<Running>,
}

struct Running {
    all: Arc<Mutex<HashMap<Principal, usize>>>,
    whose: Principal,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.whose) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.whose);
            }
        }
    }
}

fn exhausted(detail: String, wait: Duration) -> Refusal {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    Refusal::new(Code::Overloaded, detail).with(RETRY_AFTER, HeaderValue::from(seconds.max(1)))
}

impl Rates {
    pub fn new(caller: Rate, project: Rate, at_once: usize) -> Self {
        Self { callers: Buckets::new(caller), projects: Buckets::new(project), at_once, running: Arc::default() }
    }

    /// Takes a request of a caller for a project, or says when to come again.
    pub fn take(&self, caller: &Caller, project: Option<&Name>) -> Result<Taken, Refusal> {
        if caller.principal.kind() == PrincipalKind::Operator {
            return Ok(Taken { standing: None, _running: None });
        }
        let running = self.begin(caller)?;
        let per = |rate: Rate, of: &str| format!("more than {} requests a second {of}", rate.per_second);
        let own = self.callers.take(&caller.principal).map_err(|wait| {
            exhausted(
                format!("{}: wait as Retry-After says", per(self.callers.rate, &format!("by {}", caller.name))),
                wait,
            )
        })?;
        let shared = project.map(|project| {
            self.projects.take(project).map_err(|wait| {
                let of = format!("for project {project}");
                exhausted(
                    format!("{}, by all of its users: wait as Retry-After says", per(self.projects.rate, &of)),
                    wait,
                )
            })
        });
        let standing = match shared.transpose()? {
            Some(shared) if shared.remaining < own.remaining => shared,
            _ => own,
        };
        Ok(Taken { standing: Some(standing), _running: Some(running) })
    }

    fn begin(&self, caller: &Caller) -> Result<Running, Refusal> {
        let mut all = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(caller.principal.clone()).or_insert(0);
        if *count >= self.at_once {
            let detail = format!("{} has {count} requests running, which is the most at once", caller.name);
            return Err(exhausted(detail, Duration::from_secs(1)));
        }
        *count += 1;
        Ok(Running { all: Arc::clone(&self.running), whose: caller.principal.clone() })
    }
}

impl Taken {
    /// Says in an answer where the bucket stands.
    pub fn tell(&self, headers: &mut HeaderMap) {
        let Some(standing) = self.standing else { return };
        headers.insert(LIMIT, HeaderValue::from(standing.limit));
        headers.insert(REMAINING, HeaderValue::from(standing.remaining));
        headers.insert(RESET, HeaderValue::from(standing.reset.as_secs_f64().ceil() as u64));
    }

    /// The same for a refusal.
    pub fn tell_refusal(&self, refusal: Refusal) -> Refusal {
        let mut headers = HeaderMap::new();
        self.tell(&mut headers);
        let named = headers.into_iter().filter_map(|(name, value)| Some((name?, value)));
        named.fold(refusal, |refusal, (name, value)| refusal.with(name, value))
    }
}
