//! What the gateway counts, in Prometheus' terms.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByClass {
    service: String,
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByService {
    service: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRegion {
    region: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    region: String,
    outcome: &'static str,
}

const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

const OUTCOMES: [&str; 3] = ["answered", "refused", "failed"];

fn histogram() -> Histogram {
    // From half a millisecond up to a stretched-out fail-over.
    Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0])
}

pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<ByClass, Counter>,
    retries: Family<ByService, Counter>,
    ejections: Family<ByService, Counter>,
    waiting: Family<ByService, Gauge>,
    latency: Family<ByService, Histogram, fn() -> Histogram>,
    region_requests: Family<ByOutcome, Counter>,
    region_latency: Family<ByRegion, Gauge<f64, AtomicU64>>,
    region_gateways: Family<ByRegion, Gauge>,
    taken_in: Family<ByRegion, Counter>,
    pub unrouted: Counter,
    pub connections: Gauge,
    pub revision: Gauge<u64, AtomicU64>,
}

/// One service's counters, found once instead of with every request.
pub(crate) struct ServiceMetrics {
    pub name: String,
    classes: [Counter; 5],
    pub retries: Counter,
    pub ejections: Counter,
    /// Requests that wait for an instance.
    pub waiting: Gauge,
    /// Requests that came since the last report.
    pub arrived: AtomicU32,
    latency: Histogram,
}

/// What is counted of requests to another region.
pub(crate) struct RegionMetrics {
    pub answered: Counter,
    pub refused: Counter,
    pub failed: Counter,
    /// Smoothed, to the nearest gateway; not a number while none is heard.
    pub latency: Gauge<f64, AtomicU64>,
    /// How many of its gateways are heard.
    pub gateways: Gauge,
}

impl ServiceMetrics {
    pub fn observe(&self, status: StatusCode, took: Duration) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        self.classes[class].inc();
        self.latency.observe(took.as_secs_f64());
    }
}

impl Metrics {
    pub fn new() -> Self {
        let mut new = Self {
            registry: Registry::default(),
            requests: Family::default(),
            retries: Family::default(),
            ejections: Family::default(),
            waiting: Family::default(),
            latency: Family::new_with_constructor(histogram),
            region_requests: Family::default(),
            region_latency: Family::default(),
            region_gateways: Family::default(),
            taken_in: Family::default(),
            unrouted: Counter::default(),
            connections: Gauge::default(),
            revision: Gauge::default(),
        };
        let r = &mut new.registry;
        r.register("nexus_gateway_requests", "Requests answered, by service and class of status", new.requests.clone());
        r.register("nexus_gateway_retries", "Requests sent to another instance", new.retries.clone());
        r.register("nexus_gateway_ejections", "Instances put aside for failures", new.ejections.clone());
        r.register("nexus_gateway_waiting", "Requests that wait for an instance", new.waiting.clone());
        r.register("nexus_gateway_latency_seconds", "Seconds until the answer began", new.latency.clone());
        r.register(
            "nexus_gateway_region_requests",
            "Requests passed on to another region, by what became of them",
            new.region_requests.clone(),
        );
        r.register(
            "nexus_gateway_region_latency_seconds",
            "Smoothed round trip to the nearest gateway of another region",
            new.region_latency.clone(),
        );
        r.register(
            "nexus_gateway_region_gateways",
            "Gateways of another region that answer",
            new.region_gateways.clone(),
        );
        r.register("nexus_gateway_taken_in", "Requests that another region passed on to here", new.taken_in.clone());
        r.register("nexus_gateway_unrouted", "Requests for unknown hosts and paths", new.unrouted.clone());
        r.register("nexus_gateway_connections", "Users' open connections", new.connections.clone());
        r.register("nexus_gateway_table_revision", "Revision of the routing table", new.revision.clone());
        new
    }

    pub fn service(&self, name: String) -> Arc<ServiceMetrics> {
        let own = ByService { service: name.clone() };
        let classes =
            CLASSES.map(|class| self.requests.get_or_create(&ByClass { service: name.clone(), class }).clone());
        Arc::new(ServiceMetrics {
            classes,
            retries: self.retries.get_or_create(&own).clone(),
            ejections: self.ejections.get_or_create(&own).clone(),
            waiting: self.waiting.get_or_create(&own).clone(),
            arrived: AtomicU32::new(0),
            latency: self.latency.get_or_create(&own).clone(),
            name,
        })
    }

    /// Ends the series of a service that is gone.
    pub fn forget(&self, name: &str) {
        let own = ByService { service: name.to_owned() };
        for class in CLASSES {
            self.requests.remove(&ByClass { service: name.to_owned(), class });
        }
        self.retries.remove(&own);
        self.ejections.remove(&own);
        self.waiting.remove(&own);
        self.latency.remove(&own);
    }

    pub fn region(&self, name: &str) -> RegionMetrics {
        let own = ByRegion { region: name.to_owned() };
        let outcome =
            |outcome| self.region_requests.get_or_create(&ByOutcome { region: name.to_owned(), outcome }).clone();
        RegionMetrics {
            answered: outcome(OUTCOMES[0]),
            refused: outcome(OUTCOMES[1]),
            failed: outcome(OUTCOMES[2]),
            latency: self.region_latency.get_or_create(&own).clone(),
            gateways: self.region_gateways.get_or_create(&own).clone(),
        }
    }

    /// Ends the series of a region that is gone.
    pub fn forget_region(&self, name: &str) {
        let own = ByRegion { region: name.to_owned() };
        for outcome in OUTCOMES {
            self.region_requests.remove(&ByOutcome { region: name.to_owned(), outcome });
        }
        self.region_latency.remove(&own);
        self.region_gateways.remove(&own);
        self.taken_in.remove(&own);
    }

    /// Counts a request that came from another region's gateway.
    pub fn take_in(&self, region: String) {
        self.taken_in.get_or_create(&ByRegion { region }).inc();
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        if let Err(e) = text::encode(&mut out, &self.registry) {
            tracing::error!(reason = %e, "metrics can't be written");
        }
        out
    }
}
