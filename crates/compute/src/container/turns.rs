//! Whose turn it is: work on one instance is done by one caller at a time, and removing what instances share waits until
//! nobody works.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nexus_model::Uid;
use tokio::sync::Notify;

#[derive(Default)]
pub(super) struct Turns {
    state: Mutex<Taken>,
    freed: Notify,
}

#[derive(Default)]
struct Taken {
    uids: BTreeSet<Uid>,
    /// Callers that use what is shared.
    shared: usize,
    all: bool,
}

/// A turn, given back when its last holder drops it: a caller that goes away leaves it to the file work that it began.
#[derive(Clone)]
pub(super) struct Turn {
    _held: Arc<Held>,
}

struct Held {
    turns: Arc<Turns>,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    One(Uid),
    Shared,
    All,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, Taken> {
        // Each change is one step, so that a panic leaves no half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, what: What) -> Option<Turn> {
        let mut state = self.state();
        let free = match what {
            _ if state.all => false,
            What::One(uid) => state.uids.insert(uid),
            What::Shared => {
                state.shared += 1;
                true
            }
            What::All => {
                let free = state.uids.is_empty() && state.shared == 0;
                state.all = free;
                free
            }
        };
        drop(state);
        free.then(|| Turn { _held: Arc::new(Held { turns: Arc::clone(self), what }) })
    }

    async fn wait(self: &Arc<Self>, what: What) -> Turn {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(turn) = self.take(what) {
                return turn;
            }
            freed.await;
        }
    }

    /// The turn to work on one instance.
    pub async fn of(self: &Arc<Self>, uid: Uid) -> Turn {
        self.wait(What::One(uid)).await
    }

    /// The turn to use what instances share.
    pub async fn shared(self: &Arc<Self>) -> Turn {
        self.wait(What::Shared).await
    }

    /// The turn to remove what instances share.
    pub async fn all(self: &Arc<Self>) -> Turn {
        self.wait(What::All).await
    }

    pub fn try_all(self: &Arc<Self>) -> Option<Turn> {
        self.take(What::All)
    }

    /// The instances that somebody works on.
    pub fn taken(&self) -> BTreeSet<Uid> {
        self.state().uids.clone()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        match self.what {
            What::One(uid) => drop(state.uids.remove(&uid)),
            What::Shared => state.shared -= 1,
            What::All => state.all = false,
        }
        drop(state);
        self.turns.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_instance_is_worked_on_by_one_caller() {
        let turns = Arc::new(Turns::default());
        let (a, b) = (Uid::from_random([1; 16]), Uid::from_random([2; 16]));
        let first = turns.of(a).await;
        let _other = turns.of(b).await;
        assert!(turns.take(What::One(a)).is_none() && turns.try_all().is_none());
        assert_eq!(turns.taken().len(), 2);
        let (second, ()) = tokio::join!(turns.of(a), async { drop(first) });
        drop(second);
    }

    #[tokio::test]
    async fn what_is_shared_waits_for_all() {
        let turns = Arc::new(Turns::default());
        let using = turns.shared().await;
        assert!(turns.try_all().is_none());
        drop(using);
        let all = turns.all().await;
        assert!(turns.take(What::One(Uid::default())).is_none());
        drop(all);
        assert!(turns.take(What::Shared).is_some());
    }
}
