//! How the daemon shows itself: what it reports of instances, and a few facts for health and metrics.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nexus_model::Uid;
use nexus_model::kind::InstancePhase;
use nexus_model::plan::{FailingTarget, InstanceReport};
use nexus_network::names::serve::Counts;
use tokio::sync::Notify;

/// A view of a running daemon. Cloning is cheap, and all clones see the same daemon.
#[derive(Clone, Default)]
pub struct AgentHandle {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    facts: Mutex<AgentSnapshot>,
    changed: Notify,
    urgent: Notify,
    names: OnceLock<Arc<Counts>>,
    networks: Mutex<NetworkFacts>,
}

/// Packets that were dropped, by project, network and reason.
pub(crate) type DropCounts = BTreeMap<(String, String, String), u64>;

#[derive(Default)]
struct NetworkFacts {
    nics: usize,
    drops: DropCounts,
    /// The revision that the kernel was brought to.
    applied: u64,
    /// The one that is on disk.
    saved: u64,
}

/// What is true of the daemon at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AgentSnapshot {
    /// Whether the host's processes have been looked at: before, nothing is known.
    pub observed: bool,
    /// The plan that is being followed.
    pub plan: Option<u64>,
    /// What instances are like, by uid.
    pub instances: BTreeMap<Uid, InstanceReport>,
    pub reports_sent: u64,
    pub reports_failed: u64,
    /// When a server last took a report, on the monotonic clock.
    pub last_report: Option<Duration>,
    /// The host's epoch as the servers know it.
    pub host_epoch: u64,
    /// Certificates that instances got, and tries that failed.
    pub certificates_issued: u64,
    pub certificates_failed: u64,
    /// The revision of tenants' networks that has been applied and is on disk, 0 before the first; none, where the host has no
    /// part in them. Neither the kernel nor the next agent has anything that is older.
    pub networks: Option<u64>,
    /// Targets of balancers that fail their checks here.
    pub failing: Arc<Vec<FailingTarget>>,
    /// Why the newest plan was not taken, or empty.
    pub plan_refused: String,
}

impl AgentHandle {
    pub fn snapshot(&self) -> AgentSnapshot {
        self.lock().clone()
    }

    /// Whether the daemon follows a plan and knows what runs.
    pub fn is_ready(&self) -> bool {
        let facts = self.lock();
        facts.observed && facts.plan.is_some()
    }

    /// The facts in Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        let facts = self.lock();
        let mut out = String::new();
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        one(
            "nexus_agent_plan_revision",
            "gauge",
            "Revision of the plan that is followed.",
            facts.plan.unwrap_or(0) as f64,
        );
        one("nexus_agent_reports_sent_total", "counter", "Reports that a server took.", facts.reports_sent as f64);
        one("nexus_agent_reports_failed_total", "counter", "Reports that no server took.", facts.reports_failed as f64);
        one(
            "nexus_agent_workload_certificates_total",
            "counter",
            "Certificates that instances got.",
            facts.certificates_issued as f64,
        );
        one(
            "nexus_agent_workload_certificate_failures_total",
            "counter",
            "Tries to get a certificate for an instance that failed.",
            facts.certificates_failed as f64,
        );
        let ready = facts.instances.values().filter(|i| i.ready).count();
        one("nexus_agent_instances_ready", "gauge", "Instances that may take requests.", ready as f64);
        let restarts: u64 = facts.instances.values().map(|i| u64::from(i.restarts)).sum();
        one("nexus_agent_instance_restarts", "gauge", "Restarts of the instances that are here.", restarts as f64);
        let _ = writeln!(out, "# HELP nexus_agent_instances Instances by phase.\n# TYPE nexus_agent_instances gauge");
        for phase in [
            InstancePhase::Scheduled,
            InstancePhase::Starting,
            InstancePhase::Running,
            InstancePhase::BackOff,
            InstancePhase::Stopping,
            InstancePhase::Exited,
        ] {
            let count = facts.instances.values().filter(|i| i.phase == phase).count();
            let _ = writeln!(out, "nexus_agent_instances{{phase=\"{phase:?}\"}} {count}");
        }
        if let Some(counts) = self.inner.names.get() {
            let name = "nexus_agent_dns_questions_total";
            let _ =
                writeln!(out, "# HELP {name} Questions of instances for names, by their end.\n# TYPE {name} counter");
            for (end, count) in counts.all() {
                let _ = writeln!(out, "{name}{{end=\"{end}\"}} {count}");
            }
        }
        let networks = self.inner.networks.lock().unwrap_or_else(PoisonError::into_inner);
        let name = "nexus_agent_network_nics";
        let _ = writeln!(
            out,
            "# HELP {name} NICs of this host's instances.\n# TYPE {name} gauge\n{name} {}",
            networks.nics
        );
        let name = "nexus_agent_network_dropped_packets_total";
        let _ = writeln!(out, "# HELP {name} Packets of tenants' networks that were dropped.\n# TYPE {name} counter");
        for ((project, network, reason), count) in &networks.drops {
            let labels = format!("project=\"{project}\",network=\"{network}\",reason=\"{reason}\"");
            let _ = writeln!(out, "{name}{{{labels}}} {count}");
        }
        out
    }

    /// Takes over how many NICs are here, and what was dropped of their networks' packets.
    pub(crate) fn drops_packets(&self, nics: usize, drops: DropCounts) {
        let mut networks = self.inner.networks.lock().unwrap_or_else(PoisonError::into_inner);
        (networks.nics, networks.drops) = (nics, drops);
    }

    pub(crate) fn has_networks(&self) {
        self.update(|facts| facts.networks = facts.networks.or(Some(0)));
    }

    /// Says that nothing is left of tenants' networks but what this revision wants.
    pub(crate) fn networks_applied(&self, revision: u64) {
        self.confirm(|networks| networks.applied = revision);
    }

    /// Says that an agent that starts would go on with this revision.
    pub(crate) fn networks_saved(&self, revision: u64) {
        self.confirm(|networks| networks.saved = revision);
    }

    fn confirm(&self, change: impl FnOnce(&mut NetworkFacts)) {
        let mut news = false;
        self.update(|facts| {
            let mut networks = self.inner.networks.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut networks);
            let confirmed = networks.applied.min(networks.saved);
            news = facts.networks.replace(confirmed) != Some(confirmed);
        });
        if news {
            self.wake_reporter();
        }
    }

    /// Says which targets of balancers fail their checks here.
    pub(crate) fn targets_fail(&self, failing: Vec<FailingTarget>) {
        let mut news = false;
        self.update(|facts| {
            news = *facts.failing != failing;
            if news {
                facts.failing = Arc::new(failing);
            }
        });
        if news {
            self.wake_reporter();
        }
    }

    /// Says where the questions of instances for names are counted. Once.
    pub(crate) fn answers_names(&self, counts: Arc<Counts>) {
        let _ = self.inner.names.set(counts);
    }

    fn lock(&self) -> MutexGuard<'_, AgentSnapshot> {
        self.inner.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut AgentSnapshot)) {
        change(&mut self.lock());
    }

    /// Sets or removes what is reported of an instance, and wakes the reporter if that is news.
    pub(crate) fn instance(&self, uid: Uid, report: Option<InstanceReport>) {
        let (news, urgent) = {
            let mut facts = self.lock();
            let before = match &report {
                Some(report) => facts.instances.insert(uid, report.clone()),
                None => facts.instances.remove(&uid),
            };
            let ready = |report: &Option<InstanceReport>| report.as_ref().is_some_and(|r| r.ready);
            (before != report, ready(&report) && !ready(&before))
        };
        if urgent {
            self.inner.urgent.notify_one();
        }
        if news {
            self.inner.changed.notify_one();
        }
    }

    pub(crate) fn wake_reporter(&self) {
        self.inner.changed.notify_one();
    }

    /// Resolves when an instance has become ready. For the reporter alone.
    pub(crate) async fn urged(&self) {
        self.inner.urgent.notified().await;
    }

    /// Resolves when a report has news to tell. For the reporter alone.
    pub(crate) async fn changed(&self) {
        self.inner.changed.notified().await;
    }
}
