//! What keeps guessing slow, and hashing from filling a server: tries are counted, and passwords worked on in a line.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use http::header::RETRY_AFTER;
use nexus_model::{ApiError, Code};
use tokio::sync::Semaphore;

use crate::problem::Refusal;

/// Wrong tries before the next must wait.
const FREE_TRIES: u32 = 5;
/// The longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(300);
/// Users and addresses whose tries are counted; of more, the oldest are forgotten.
const COUNTED: usize = 20_000;
/// Passwords that are hashed at once: each takes 19 MiB and some tens of milliseconds of a core.
const HASHING: usize = 2;
/// Those that are hashed or wait for it: whoever finds no place comes again, before they fill the places of all requests.
const LINE: usize = 64;

/// What a server remembers of sign-ins.
pub(crate) struct SignIns {
    tries: Mutex<HashMap<String, Tries>>,
    hashing: Arc<Semaphore>,
    line: Arc<Semaphore>,
}

#[derive(Debug, Clone, Copy)]
struct Tries {
    wrong: u32,
    /// By the monotonic clock.
    last: Duration,
}

impl Default for SignIns {
    fn default() -> Self {
        let places = |n| Arc::new(Semaphore::new(n));
        Self { tries: Mutex::default(), hashing: places(HASHING), line: places(LINE) }
    }
}

impl Tries {
    /// How long after the last wrong try the next may come.
    fn pause(self) -> Duration {
        match self.wrong.checked_sub(FREE_TRIES) {
            None => Duration::ZERO,
            Some(over) => Duration::from_secs(1 << over.min(9)).min(LONGEST),
        }
    }
}

impl SignIns {
    /// How long somebody has to wait before they may try.
    fn wait(&self, who: &[String], now: Duration) -> Duration {
        let tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        let left = who.iter().filter_map(|w| tries.get(w)).map(|t| (t.last + t.pause()).saturating_sub(now));
        left.max().unwrap_or_default()
    }

    /// Whether somebody's next try is due.
    pub fn may_try(&self, who: &[String], now: Duration) -> Result<(), TooSoon> {
        let wait = self.wait(who, now);
        if wait.is_zero() { Ok(()) } else { Err(TooSoon { seconds: wait.as_secs() + 1 }) }
    }

    pub fn wrong(&self, who: &[String], now: Duration) {
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        if tries.len() + who.len() > COUNTED {
            let mut ages: Vec<Duration> = tries.values().map(|t| t.last).collect();
            let half = *ages.select_nth_unstable(COUNTED / 2).1;
            tries.retain(|_, t| t.last > half);
        }
        for who in who {
            let entry = tries.entry(who.clone()).or_insert(Tries { wrong: 0, last: now });
            // Who has rested long enough begins anew.
            let rested = now.saturating_sub(entry.last) > 2 * LONGEST;
            *entry = Tries { wrong: if rested { 1 } else { entry.wrong.saturating_add(1) }, last: now };
        }
    }

    pub fn right(&self, who: &[String]) {
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        for who in who {
            tries.remove(who);
        }
    }

    /// Does what takes a core for a while, when its turn has come. The turn lasts as long as the work, also for a caller who
    /// has hung up.
    pub async fn work<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
        let full = |_| ApiError::new(Code::Overloaded, "too many sign in at once: try again in a moment");
        let place = Arc::clone(&self.line).try_acquire_owned().map_err(full)?;
        let turn = Arc::clone(&self.hashing).acquire_owned().await.expect("never closed");
        let done = tokio::task::spawn_blocking(move || {
            let _held = (place, turn);
            f()
        });
        done.await.map_err(|_| ApiError::new(Code::Internal, "working on a password failed"))
    }
}

/// A try that came before it was due.
pub(crate) struct TooSoon {
    pub seconds: u64,
}

impl std::fmt::Display for TooSoon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "too many wrong tries: the next one counts in {} s", self.seconds)
    }
}

impl From<TooSoon> for Refusal {
    fn from(error: TooSoon) -> Self {
        Self::new(Code::Overloaded, error.to_string()).with(RETRY_AFTER, HeaderValue::from(error.seconds))
    }
}

/// The address that tries are counted by: of IPv6 the /64, which is what one customer has at least.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn tries_are_counted_by_what_one_customer_has() {
        let of = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
    }

    #[test]
    fn a_flood_of_names_does_not_forget_who_is_being_guessed_at() {
        let sign_ins = SignIns::default();
        let at = |n: usize| Duration::from_millis(n as u64);
        let guessed = ["user acme/ada".to_owned()];
        (0..10).for_each(|_| sign_ins.wrong(&guessed, at(1)));
        for n in 0..3 * COUNTED {
            sign_ins.wrong(&[format!("user flood/{n}")], at(n));
            if n % 1000 == 0 {
                sign_ins.wrong(&guessed, at(n));
            }
        }
        assert!(!sign_ins.wait(&guessed, at(3 * COUNTED)).is_zero());
        assert!(sign_ins.tries.lock().unwrap().len() <= COUNTED);
    }

    #[tokio::test]
    async fn a_full_line_is_told_so_and_a_turn_outlasts_its_caller() {
        let sign_ins = Arc::new(SignIns::default());
        let (begun, seen) = mpsc::channel();
        let mut gates = Vec::new();
        let mut tasks = Vec::new();
        for _ in 0..LINE {
            let (gate, shut) = mpsc::channel::<()>();
            gates.push(gate);
            let (sign_ins, begun) = (Arc::clone(&sign_ins), begun.clone());
            tasks.push(tokio::spawn(async move {
                let work = move || {
                    begun.send(()).unwrap();
                    shut.recv().unwrap_err();
                };
                sign_ins.work(work).await
            }));
            tokio::task::yield_now().await;
        }
        assert_eq!(sign_ins.work(|| ()).await.unwrap_err().code, Code::Overloaded);
        for _ in 0..HASHING {
            seen.recv().unwrap();
        }
        // Who hangs up while their password is hashed still holds the turn; nobody else's begins.
        tasks[0].abort();
        assert!((&mut tasks[0]).await.unwrap_err().is_cancelled());
        assert_eq!(sign_ins.hashing.available_permits(), 0);
        drop(gates);
        for task in tasks.drain(1..) {
            task.await.unwrap().unwrap();
        }
        sign_ins.work(|| ()).await.unwrap();
    }
}
