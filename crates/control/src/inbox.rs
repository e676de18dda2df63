//! What waits for the writer: users' intents, and what hosts, servers and regions report, each in a queue of its own.
//!
//! Neither may keep the other out: a flood of intents must not make hosts look dead, and a region of many hosts must not
//! make users wait for ever. So each queue has its own bound, and a round takes from both in turn. Of each reporter only
//! the newest report waits, because it says everything that an older one did.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_model::Name;
use nexus_model::plan::{HostReport, RegionSummary, RoundTripReport, ServerNote};
use tokio::sync::{Notify, oneshot};

use crate::intent::{Accepted, Intent};
use crate::region::{ReportError, Undecided};

/// Intents that wait; more are refused as `overloaded`.
const INTENTS: usize = 4_096;
/// Reporters of which something waits: more hosts than a region has.
const REPORTS: usize = 65_536;

pub(crate) type IntentReply = oneshot::Sender<Result<Accepted, Undecided>>;
/// For a host's report its epoch, for a region's summary the newest revision.
pub(crate) type ReportReply = oneshot::Sender<Result<u64, ReportError>>;

/// One thing that the writer takes in.
pub(crate) enum Input {
    Intent(Box<Intent>, IntentReply),
    /// With the moment at which it came, by the monotonic clock.
    Report(Box<HostReport>, ReportReply, Duration),
    Summary(Box<RegionSummary>, ReportReply),
    Note(ServerNote),
    Trips(Box<RoundTripReport>),
}

/// Who reports.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Reporter {
    Region(Name),
    Server(u64),
    Gateway(Name),
    Host(Name),
}

/// The queue is full.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

#[derive(Default)]
struct Queues {
    intents: VecDeque<(Box<Intent>, IntentReply)>,
    reports: HashMap<Reporter, Input>,
    /// Those who reported, the longest waiting first.
    order: VecDeque<Reporter>,
}

/// Both queues. Anybody puts in, one task takes out.
#[derive(Default)]
pub(crate) struct Inbox {
    queues: Mutex<Queues>,
    bell: Notify,
}

impl Inbox {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts something in; a report takes the place of an older one of the same reporter. True if there was one.
    pub(crate) fn put(&self, input: Input) -> Result<bool, Full> {
        let reporter = match &input {
            Input::Intent(..) => None,
            Input::Report(report, ..) => Some(Reporter::Host(report.host.clone())),
            Input::Summary(summary, _) => Some(Reporter::Region(summary.region.clone())),
            Input::Note(note) => Some(Reporter::Server(note.server.node)),
            Input::Trips(report) => Some(Reporter::Gateway(report.gateway.clone())),
        };
        let mut queues = self.queues();
        let full = queues.reports.len() >= REPORTS;
        let older = match (input, reporter) {
            (Input::Intent(intent, reply), _) => {
                if queues.intents.len() >= INTENTS {
                    return Err(Full);
                }
                queues.intents.push_back((intent, reply));
                None
            }
            (input, Some(reporter)) => match queues.reports.get_mut(&reporter) {
                Some(waiting) => Some(std::mem::replace(waiting, input)),
                None if full => return Err(Full),
                None => {
                    queues.order.push_back(reporter.clone());
                    queues.reports.insert(reporter, input)
                }
            },
            (_, None) => unreachable!("only intents have no reporter"),
        };
        drop(queues);
        self.bell.notify_one();
        let replaced = older.is_some();
        if let Some(Input::Report(_, reply, _) | Input::Summary(_, reply)) = older {
            // Its sender has given up, or it would not have sent another.
            let _ = reply.send(Err(ReportError::Overloaded));
        }
        Ok(replaced)
    }

    fn is_empty(&self) -> bool {
        let queues = self.queues();
        queues.intents.is_empty() && queues.order.is_empty()
    }

    /// Returns when something waits. Cancel safe.
    pub(crate) async fn filled(&self) {
        loop {
            let rung = self.bell.notified();
            if !self.is_empty() {
                return;
            }
            rung.await;
        }
    }

    /// Says of each host whose report waits when that came.
    pub(crate) fn hosts_waiting(&self, mut tell: impl FnMut(&Name, Duration)) {
        for input in self.queues().reports.values() {
            if let Input::Report(report, _, at) = input {
                tell(&report.host, *at);
            }
        }
    }

    /// Takes out up to `most` inputs, one of each queue in turn while both have some.
    pub(crate) fn take(&self, most: usize) -> Vec<Input> {
        let mut queues = self.queues();
        let mut taken = Vec::new();
        while taken.len() < most {
            let before = taken.len();
            if let Some((intent, reply)) = queues.intents.pop_front() {
                taken.push(Input::Intent(intent, reply));
            }
            if taken.len() < most
                && let Some(reporter) = queues.order.pop_front()
                && let Some(input) = queues.reports.remove(&reporter)
            {
                taken.push(input);
            }
            if taken.len() == before {
                break;
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use nexus_model::kind::HostSpec;

    use super::*;
    use crate::intent::{Change, Provenance, Target};

    fn report(host: &str, load: f32, reply: ReportReply) -> Input {
        let report = HostReport {
            host: host.parse().unwrap(),
            spec: HostSpec::default(),
            boot_id: "boot-1".into(),
            agent_version: "test".into(),
            applied: None,
            instances: Vec::new(),
            images: Vec::new(),
            load,
            networks: None,
            certificate_ends: None,
            usage: Vec::new(),
            telemetry: Default::default(),
            failing: None,
        };
        Input::Report(Box::new(report), reply, Duration::from_secs(1))
    }

    fn intent() -> Input {
        let intent = Intent {
            request_id: "req-1".parse().unwrap(),
            actor: "admin".into(),
            by: Provenance::default(),
            target: Target { plural: "apps".into(), project: None, organization: None, name: "a".parse().unwrap() },
            change: Change::Delete,
            if_match: None,
            idempotency_key: None,
            dry_run: false,
        };
        Input::Intent(Box::new(intent), oneshot::channel().0)
    }

    #[test]
    fn a_full_queue_of_intents_keeps_no_report_out_and_both_are_taken_in_turn() {
        let inbox = Inbox::default();
        while inbox.put(intent()).is_ok() {}
        for n in 0..10 {
            assert_eq!(inbox.put(report(&format!("host-{n}"), 0.0, oneshot::channel().0)), Ok(false));
        }
        let taken = inbox.take(20);
        assert_eq!(taken.iter().filter(|i| matches!(i, Input::Report(..))).count(), 10);
        assert_eq!(taken.len(), 20);
        let rest = inbox.take(usize::MAX);
        assert_eq!(rest.len(), INTENTS - 10);
        assert!(inbox.is_empty());
    }

    #[test]
    fn of_a_host_the_newest_report_waits_in_the_place_of_the_first() {
        let inbox = Inbox::default();
        let (first, mut first_answer) = oneshot::channel();
        assert_eq!(inbox.put(report("one", 0.1, first)), Ok(false));
        assert_eq!(inbox.put(report("two", 0.2, oneshot::channel().0)), Ok(false));
        assert_eq!(inbox.put(report("one", 0.3, oneshot::channel().0)), Ok(true));
        assert_eq!(first_answer.try_recv(), Ok(Err(ReportError::Overloaded)));
        let loads = inbox.take(9).into_iter().map(|input| match input {
            Input::Report(report, ..) => report.load,
            _ => unreachable!("only reports were put in"),
        });
        assert_eq!(loads.collect::<Vec<_>>(), [0.3, 0.2]);
    }

    #[tokio::test]
    async fn the_bell_rings_for_what_came_before_the_wait() {
        let inbox = Inbox::default();
        inbox.put(report("one", 0.1, oneshot::channel().0)).unwrap();
        inbox.filled().await;
        assert_eq!(inbox.take(9).len(), 1);
        assert!(tokio::time::timeout(Duration::from_millis(20), inbox.filled()).await.is_err());
    }
}
