//! What a server counts of the deliveries that it sends, by webhook.
//!
//! Names of webhooks are tenants' to choose, so there is a bound: when more than [`MOST`] are counted, the one that was
//! counted the longest ago and waits for nothing gives way, and begins at zero if it comes again.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_model::Object;
use nexus_model::kind::Delivery;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Receivers that are told apart.
const MOST: usize = 500;

/// Whom deliveries are for: a webhook of a project, or (without one) whoever asks for callbacks in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct Receiver {
    /// `global`, or the region.
    group: String,
    project: String,
    webhook: String,
}

impl Receiver {
    pub fn of(group: &str, delivery: &Object<Delivery>) -> Self {
        let text = |name: Option<&nexus_model::Name>| name.map(ToString::to_string).unwrap_or_default();
        Self {
            group: group.to_owned(),
            project: text(delivery.metadata.project.as_ref()),
            webhook: text(delivery.spec.webhook.as_ref()),
        }
    }
}

#[derive(Debug, Default)]
struct Series {
    waiting: u64,
    delivered: u64,
    failed: u64,
    dead: u64,
    /// When it was last counted: the turn.
    at: u64,
}

#[derive(Debug, Default)]
struct Inner {
    series: BTreeMap<Receiver, Series>,
    turn: u64,
}

impl Inner {
    fn of(&mut self, receiver: &Receiver) -> &mut Series {
        self.turn += 1;
        if self.series.len() >= MOST && !self.series.contains_key(receiver) {
            let idle = self.series.iter().min_by_key(|(_, s)| (s.waiting > 0, s.at)).map(|(r, _)| r.clone());
            idle.and_then(|idle| self.series.remove(&idle));
        }
        let series = self.series.entry(receiver.clone()).or_default();
        series.at = self.turn;
        series
    }
}

/// Cloning is cheap, and all clones count together.
#[derive(Clone)]
pub struct Figures {
    inner: Arc<Mutex<Inner>>,
    seconds: Histogram,
}

impl Default for Figures {
    fn default() -> Self {
        // To the patience of a try, which is ten seconds.
        let seconds = Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]);
        Self { inner: Arc::default(), seconds }
    }
}

impl Figures {
    fn hold(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn register(&self, registry: &Mutex<Registry>) {
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let about = "Seconds that a receiver of a delivery took to answer, or not to";
        registry.register("nexus_webhook_delivery_duration_seconds", about, self.seconds.clone());
        registry.register_collector(Box::new(self.clone()));
    }

    /// Says how many deliveries of a group are on their way: nothing else of it waits.
    pub fn waiting(&self, group: &str, waiting: &BTreeMap<Receiver, u64>) {
        let mut inner = self.hold();
        for (_, series) in inner.series.iter_mut().filter(|(r, s)| r.group == group && s.waiting > 0) {
            series.waiting = 0;
        }
        for (receiver, count) in waiting.iter().take(MOST) {
            inner.of(receiver).waiting = *count;
        }
    }

    /// Counts one try.
    pub fn tried(&self, receiver: &Receiver, taken: bool, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
        let mut inner = self.hold();
        let series = inner.of(receiver);
        series.delivered += u64::from(taken);
        series.failed += u64::from(!taken);
    }

    /// Counts one that was given up.
    pub fn died(&self, receiver: &Receiver) {
        self.hold().of(receiver).dead += 1;
    }
}

impl fmt::Debug for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Figures")
    }
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let inner = self.hold();
        let about = "Deliveries on their way, at the server that leads their group";
        let mut family =
            encoder.encode_descriptor("nexus_webhook_deliveries_waiting", about, None, MetricType::Gauge)?;
        for (receiver, series) in &inner.series {
            let gauge = ConstGauge::new(i64::try_from(series.waiting).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(receiver)?)?;
        }
        type Pick = fn(&Series) -> u64;
        let counters: [(&str, &str, Pick); 3] = [
            ("nexus_webhook_deliveries_delivered", "Deliveries that were taken", |s| s.delivered),
            ("nexus_webhook_deliveries_failed", "Tries that were not taken", |s| s.failed),
            ("nexus_webhook_deliveries_dead", "Deliveries that were given up", |s| s.dead),
        ];
        for (name, about, pick) in counters {
            let mut family = encoder.encode_descriptor(name, about, None, MetricType::Counter)?;
            for (receiver, series) in &inner.series {
                ConstCounter::new(pick(series)).encode(family.encode_family(receiver)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receiver(webhook: usize) -> Receiver {
        Receiver { group: "local".into(), project: "shop".into(), webhook: format!("hook-{webhook}") }
    }

    #[test]
    fn names_make_no_more_series_than_are_allowed_and_what_waits_is_not_forgotten() {
        let figures = Figures::default();
        figures.waiting("local", &[(receiver(0), 3)].into());
        for n in 1..2 * MOST {
            figures.tried(&receiver(n), true, Duration::from_millis(1));
        }
        let inner = figures.hold();
        assert_eq!((inner.series.len(), inner.series[&receiver(0)].waiting), (MOST, 3));
        assert!(inner.series.contains_key(&receiver(2 * MOST - 1)) && !inner.series.contains_key(&receiver(1)));
        drop(inner);
        figures.waiting("local", &BTreeMap::new());
        assert_eq!(figures.hold().series[&receiver(0)].waiting, 0);
    }

    #[test]
    fn figures_are_shown_by_receiver() {
        let (figures, registry) = (Figures::default(), Mutex::new(Registry::default()));
        figures.register(&registry);
        figures.waiting("local", &[(receiver(1), 2)].into());
        figures.tried(&receiver(1), false, Duration::from_millis(300));
        figures.died(&receiver(1));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry.lock().unwrap()).unwrap();
        let labels = r#"{group="local",project="shop",webhook="hook-1"}"#;
        for line in [
            format!("nexus_webhook_deliveries_waiting{labels} 2"),
            format!("nexus_webhook_deliveries_delivered_total{labels} 0"),
            format!("nexus_webhook_deliveries_failed_total{labels} 1"),
            format!("nexus_webhook_deliveries_dead_total{labels} 1"),
            "nexus_webhook_delivery_duration_seconds_count 1".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
