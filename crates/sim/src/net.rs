//! The network between servers, hosts and gateways: every message takes time, some are late, lost, answered in vain or
//! delivered twice, and links can be cut, each direction by itself.
//!
//! It keeps the promises of the real southbound protocol and no more: an answer belongs to its question; what is refused as
//! unreachable was not delivered; what is lost may have been handled. Only messages that the receiver must tolerate twice
//! (consensus retries them itself) are delivered twice. What a cut holds back may arrive when the link heals, long after its
//! sender gave up.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_store::PeerError;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::trace::Trace;

/// What is sent seldom comes twice so many times as often, or hundreds of seeds could pass without it.
const RARE: u64 = 8;

/// How a network behaves that is not cut.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Milliseconds of one way.
    pub delay: (u64, u64),
    /// Of a thousand messages, so many break their connection.
    pub loss: u64,
    /// So many come late, after others that were sent later.
    pub late: u64,
    /// So many of those that may come twice do.
    pub twice: u64,
}

impl Weather {
    pub const FAIR: Self = Self { delay: (0, 3), loss: 0, late: 0, twice: 0 };
    pub const ROUGH: Self = Self { delay: (0, 12), loss: 8, late: 40, twice: 20 };
    pub const FOUL: Self = Self { delay: (1, 60), loss: 60, late: 150, twice: 60 };
}

struct State {
    weather: Weather,
    cut: BTreeSet<(u64, u64)>,
    /// Kinds of messages of which the next few are lost, or their answers.
    doomed: BTreeMap<(String, bool), u64>,
    tasks: JoinSet<()>,
}

pub struct Net {
    trace: Trace,
    dice: Dice,
    state: Mutex<State>,
    changed: Notify,
}

/// What the receiver does with a message: `None` if nobody is there.
pub type Handling<T> = Option<Pin<Box<dyn Future<Output = Option<T>> + Send>>>;

enum Passage {
    Arrived,
    /// It will not arrive, and the sender can know that.
    Refused,
    Lost,
}

impl Net {
    pub fn new(trace: Trace, dice: Dice) -> Arc<Self> {
        let state =
            State { weather: Weather::FAIR, cut: BTreeSet::new(), doomed: BTreeMap::new(), tasks: JoinSet::new() };
        Arc::new(Self { trace, dice, state: Mutex::new(state), changed: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_weather(&self, weather: Weather) {
        self.state().weather = weather;
    }

    pub fn cut(&self, from: u64, to: u64) {
        self.state().cut.insert((from, to));
    }

    pub fn cut_both(&self, a: u64, b: u64) {
        self.cut(a, b);
        self.cut(b, a);
    }

    /// The next few messages of a kind are lost, or their answers.
    pub fn doom(&self, kind: &str, answers: bool, count: u64) {
        self.state().doomed.insert((kind.to_owned(), answers), count);
    }

    pub fn spare_all(&self) {
        self.state().doomed.clear();
    }

    fn is_doomed(&self, kind: &str, is_answer: bool) -> bool {
        let mut state = self.state();
        let Some(left) = state.doomed.get_mut(&(kind.to_owned(), is_answer)) else { return false };
        let doomed = *left > 0;
        *left = left.saturating_sub(1);
        doomed
    }

    pub fn heal(&self, from: u64, to: u64) {
        self.state().cut.remove(&(from, to));
        self.changed.notify_waiters();
    }

    pub fn heal_all(&self) {
        self.state().cut.clear();
        self.changed.notify_waiters();
    }

    pub fn is_cut(&self, from: u64, to: u64) -> bool {
        self.state().cut.contains(&(from, to))
    }

    async fn healed(&self, from: u64, to: u64) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.is_cut(from, to) {
                return;
            }
            changed.await;
        }
    }

    /// One way of one message.
    async fn pass(&self, from: u64, to: u64, kind: &str, is_answer: bool) -> Passage {
        let what = if is_answer { "answer" } else { "message" };
        if self.is_cut(from, to) {
            self.trace.count(&format!("fault: {what} in a cut: {kind}"));
            // A cable that is cut does not say so; the connection's own watch finds out in seconds.
            let patience = self.dice.millis(800, 4_000);
            let held = self.dice.chance(500);
            if held && timeout(patience, self.healed(from, to)).await.is_ok() {
                self.trace.count("fault: message held and delivered late");
            } else {
                if !held {
                    sleep(patience).await;
                }
                return if self.dice.chance(500) { Passage::Refused } else { Passage::Lost };
            }
        }
        let weather = self.state().weather;
        if self.is_doomed(kind, is_answer) || self.dice.chance(weather.loss) {
            self.trace.count(&format!("fault: {what} lost: {kind}"));
            sleep(self.dice.millis(0, 200)).await;
            return Passage::Lost;
        }
        let mut delay = self.dice.range(weather.delay.0 * 1_000, weather.delay.1 * 1_000);
        if self.dice.chance(weather.late) {
            self.trace.count("fault: message late");
            delay += self.dice.range(10_000, 400_000);
        }
        sleep(Duration::from_micros(delay)).await;
        // A cut catches what is under way, too.
        if self.is_cut(from, to) { Passage::Lost } else { Passage::Arrived }
    }

    /// Sends a message and waits for its answer. `handle` is asked at the moment of arrival, perhaps more than once.
    pub async fn exchange<T: Send + 'static>(
        self: &Arc<Self>,
        from: u64,
        to: u64,
        kind: &'static str,
        may_come_twice: bool,
        handle: impl Fn() -> Handling<T> + Send + 'static,
    ) -> Result<T, PeerError> {
        self.trace.count(&format!("message: {kind}"));
        let (reply, answer) = oneshot::channel();
        let net = self.clone();
        let journey = async move {
            let arrived = net.pass(from, to, kind, false).await;
            net.trace.note(format_args!(
                "{from} -> {to}: {kind}{}",
                match arrived {
                    Passage::Arrived => "",
                    Passage::Refused => " (refused)",
                    Passage::Lost => " (lost)",
                }
            ));
            let outcome = match arrived {
                Passage::Refused => Err(PeerError::Unreachable(format!("no way to {to}"))),
                Passage::Lost => Err(PeerError::Lost(format!("the connection to {to} broke"))),
                Passage::Arrived => {
                    let rarely_sent = if kind == "summary" { RARE } else { 1 };
                    if may_come_twice && net.dice.chance(net.state().weather.twice * rarely_sent) {
                        net.trace.count(&format!("fault: message twice: {kind}"));
                        net.again(handle()).await;
                    }
                    match handle() {
                        None => Err(PeerError::Unreachable(format!("{to} is down"))),
                        Some(handling) => match handling.await {
                            None => Err(PeerError::Lost(format!("{to} died"))),
                            Some(answer) => match net.pass(to, from, kind, true).await {
                                Passage::Arrived => Ok(answer),
                                _ => Err(PeerError::Lost(format!("the answer of {to} was lost"))),
                            },
                        },
                    }
                }
            };
            // Whoever gave up meanwhile does not hear it.
            let _ = reply.send(outcome);
        };
        {
            let mut state = self.state();
            while state.tasks.try_join_next().is_some() {}
            state.tasks.spawn(journey);
        }
        answer.await.unwrap_or_else(|_| Err(PeerError::Lost("the network ended".into())))
    }

    /// A copy of a message, handled a little apart from the other.
    async fn again<T: Send + 'static>(&self, handling: Handling<T>) {
        let Some(handling) = handling else { return };
        let before = self.dice.chance(500);
        let pause = self.dice.millis(0, 60);
        self.state().tasks.spawn(async move {
            sleep(pause).await;
            drop(handling.await);
        });
        if before {
            sleep(pause).await;
        }
    }
}

/// What a message of the store's protocol is, by the names that its encoding carries.
pub fn store_message(message: &[u8]) -> &'static str {
    const KINDS: &[&str] = &[
        "Append",
        "PreVote",
        "Vote",
        "Snapshot",
        "Forward",
        "ReadIndex",
        "KeepAlive",
        "Relay",
        "Membership",
        "Health",
    ];
    let head = &message[..message.len().min(256)];
    for at in 0..head.len() {
        if !head[at].is_ascii_uppercase() {
            continue;
        }
        if let Some(kind) = KINDS.iter().find(|kind| head[at..].starts_with(kind.as_bytes())) {
            return kind;
        }
    }
    "other"
}
