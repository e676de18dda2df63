//! What is let in when there is more to do than can be done. Every request has a class:
//!
//! | class | which requests | let in while |
//! |---|---|---|
//! | system | health, readiness, metrics, the API's description | always |
//! | operator | the machines of a region, operations, status | there is a place |
//! | interactive | everything else | at most 7/8 of the places are taken, and the server is at most 1 s behind |
//! | batch | what says so: `Priority: u=5` or more (RFC 9218) | at most half of the places are taken, and the server is at most 100 ms behind |
//!
//! How far a server is behind is measured where it hurts: how long a task that steps aside waits for its next turn.
//! What agents and gateways say does not come this way at all, so it is never shed.
//!
//! Nobody can raise a request's class above what its path gives it; whoever can wait says so and is shed first.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use http::header::{HeaderValue, RETRY_AFTER};
use nexus_env::Env;
use nexus_model::Code;
use nexus_model::kind::Scope;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::problem::Refusal;
use crate::route::Target;

/// How far behind a server may be before it sheds.
const BATCH_LAG: Duration = Duration::from_millis(100);
const INTERACTIVE_LAG: Duration = Duration::from_secs(1);

/// RFC 9218: 0 is the most urgent, 7 the least; without the header it is 3.
const BATCH_URGENCY: u8 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Batch,
    Interactive,
    Operator,
    System,
}

impl Class {
    fn word(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Interactive => "interactive",
            Self::Operator => "operator",
            Self::System => "system",
        }
    }

    pub fn of(target: &Target, headers: &HeaderMap) -> Self {
        if target.is_open() {
            return Self::System;
        }
        if urgency(headers).is_some_and(|u| u >= BATCH_URGENCY) {
            return Self::Batch;
        }
        match target {
            Target::Collection(place) | Target::Object(place, _) | Target::Custom(place, ..)
                if place.kind.scope != Scope::Region =>
            {
                Self::Interactive
            }
            Target::Blob(..) | Target::Pull(..) => Self::Interactive,
            Target::Elsewhere(_, target) => Self::of(target, headers),
            _ => Self::Operator,
        }
    }

    /// What a client should wait before it tries again, in seconds: what matters less comes back later.
    fn retry_after(self) -> HeaderValue {
        HeaderValue::from_static(if self == Self::Batch { "5" } else { "1" })
    }
}

/// The urgency of a `Priority` header (a structured dictionary, of which only `u` matters here). What is malformed is as
/// good as absent, as the RFC wants it.
fn urgency(headers: &HeaderMap) -> Option<u8> {
    let text = headers.get("priority")?.to_str().ok()?;
    let value = text.split(',').filter_map(|item| item.trim().strip_prefix("u=")).next_back()?;
    value.split(';').next()?.trim().parse().ok().filter(|u| *u <= 7)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ShedLabels {
    class: &'static str,
}

/// Counts the ordinary requests that run, and decides who may join them.
pub(crate) struct Admission {
    places: usize,
    taken: AtomicUsize,
    /// The moving average of the wait for a turn, in microseconds.
    lag: AtomicU64,
    shed: Family<ShedLabels, Counter>,
}

/// A place among the requests that run.
pub(crate) struct Permit(Arc<Admission>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Admission {
    pub fn new(places: usize, registry: &Mutex<Registry>) -> Arc<Self> {
        let new = Self { places, taken: AtomicUsize::new(0), lag: AtomicU64::new(0), shed: Family::default() };
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register("nexus_api_shed", "Requests refused because of overload", new.shed.clone());
        Arc::new(new)
    }

    /// Lets a request in or sheds it.
    pub async fn admit(self: &Arc<Self>, class: Class, env: &Env) -> Result<Permit, Refusal> {
        if class < Class::Operator {
            self.measure(env).await;
        }
        let lag = Duration::from_micros(self.lag.load(Ordering::Relaxed));
        let behind = match class {
            Class::Batch => lag > BATCH_LAG,
            Class::Interactive => lag > INTERACTIVE_LAG,
            Class::Operator | Class::System => false,
        };
        let places = self.places_for(class);
        let room = |taken: usize| (taken < places).then_some(taken + 1);
        let taken = !behind && self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_ok();
        if taken {
            return Ok(Permit(Arc::clone(self)));
        }
        self.shed.get_or_create(&ShedLabels { class: class.word() }).inc();
        let detail = format!("too many requests at once on this server for one of class {}: try again", class.word());
        Err(Refusal::new(Code::Overloaded, detail).with(RETRY_AFTER, class.retry_after()))
    }

    fn places_for(&self, class: Class) -> usize {
        match class {
            Class::Batch => (self.places / 2).max(1),
            Class::Interactive => (self.places * 7 / 8).max(1),
            Class::Operator => self.places,
            Class::System => usize::MAX,
        }
    }

    async fn measure(&self, env: &Env) {
        let before = env.monotonic();
        tokio::task::yield_now().await;
        let waited = env.monotonic().saturating_sub(before).as_micros() as u64;
        // Over about the last sixteen requests. Racing updates lose a sample, which is harmless.
        let old = self.lag.load(Ordering::Relaxed);
        self.lag.store((old * 15 + waited) / 16, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(priority: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("priority", HeaderValue::from_str(priority).unwrap());
        headers
    }

    #[test]
    fn urgencies_are_read_as_the_rfc_says() {
        assert_eq!(urgency(&HeaderMap::new()), None);
        for (text, wanted) in [("u=7", Some(7)), ("i, u=5", Some(5)), ("u=2;x=1", Some(2)), ("u=1, u=6", Some(6))] {
            assert_eq!(urgency(&with(text)), wanted, "{text}");
        }
        for text in ["", "u", "u=8", "u=-1", "v=7", "u=abc"] {
            assert_eq!(urgency(&with(text)), None, "{text}");
        }
    }

    #[test]
    fn classes_come_from_paths_and_can_only_be_lowered() {
        let region = "local".parse().unwrap();
        let class =
            |path: &str, headers: &HeaderMap| Class::of(&crate::route::resolve(path, &region).unwrap(), headers);
        let none = HeaderMap::new();
        assert_eq!(class("/healthz", &with("u=7")), Class::System);
        assert_eq!(class("/v1/status", &none), Class::Operator);
        assert_eq!(class("/v1/regions/local/hosts", &none), Class::Operator);
        assert_eq!(class("/v1/regions/local/hosts", &with("u=6")), Class::Batch);
        assert_eq!(class("/v1/regions/local/projects/p/apps", &with("u=0")), Class::Interactive);
        assert_eq!(class("/v1/projects", &none), Class::Interactive);
    }

    #[tokio::test]
    async fn what_matters_less_is_shed_first() {
        let (admission, env) = (Admission::new(8, &Mutex::default()), Env::real());
        let mut held = Vec::new();
        for class in [Class::Batch, Class::Interactive, Class::Operator] {
            let before = held.len();
            while let Ok(permit) = admission.admit(class, &env).await {
                held.push(permit);
            }
            assert!(held.len() > before, "{class:?} gets places that lower classes don't");
        }
        assert_eq!(held.len(), 8);
        assert!(admission.admit(Class::System, &env).await.is_ok());
        let refusal = admission.admit(Class::Batch, &env).await.err().unwrap();
        assert!(refusal.headers.iter().any(|(name, value)| name == RETRY_AFTER && value == "5"));
        held.clear();
        assert!(admission.admit(Class::Batch, &env).await.is_ok());
    }

    #[tokio::test]
    async fn a_server_that_is_behind_sheds_batch_and_then_interactive_requests() {
        let (admission, env) = (Admission::new(8, &Mutex::default()), Env::real());
        admission.lag.store(1_000_000 * 8, Ordering::Relaxed);
        assert!(admission.admit(Class::Batch, &env).await.is_err());
        assert!(admission.admit(Class::Interactive, &env).await.is_err());
        assert!(admission.admit(Class::Operator, &env).await.is_ok());
        // It clears by itself once turns come quickly again, because those who are shed measure too.
        let cleared = async { while admission.admit(Class::Batch, &env).await.is_err() {} };
        tokio::time::timeout(Duration::from_secs(30), cleared).await.unwrap();
    }
}
