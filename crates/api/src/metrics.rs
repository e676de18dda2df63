//! What the API counts of itself: requests by route, method and class of status, and how long they took to answer. Routes
//! are templates, so that names in paths make no new series.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::Method;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    method: &'static str,
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    route: String,
    method: &'static str,
}

pub(crate) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    durations: Family<DurationLabels, Histogram, fn() -> Histogram>,
}

fn histogram() -> Histogram {
    // From half a millisecond to the longest that an ordinary request may take.
    Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 60.0])
}

fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        // A client may invent methods; they may not invent series.
        _ => "other",
    }
}

impl Metrics {
    pub fn new(registry: &Mutex<Registry>) -> Self {
        let new = Self { requests: Family::default(), durations: Family::new_with_constructor(histogram) };
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register("nexus_api_requests", "Requests answered", new.requests.clone());
        let about = "Seconds until the answer began";
        registry.register("nexus_api_request_duration_seconds", about, new.durations.clone());
        new
    }

    pub fn observe(&self, route: String, method: &Method, status: u16, took: Duration) {
        let method = method_label(method);
        let class = match status {
            100..200 => "1xx",
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            _ => "5xx",
        };
        let labels = DurationLabels { route: route.clone(), method };
        self.durations.get_or_create(&labels).observe(took.as_secs_f64());
        self.requests.get_or_create(&RequestLabels { route, method, class }).inc();
    }
}

/// The content type of [`encode`]'s text.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(crate) fn encode(registry: &Mutex<Registry>) -> String {
    let mut out = String::new();
    let registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
    text::encode(&mut out, &registry).expect("writing to a string does not fail");
    out
}
