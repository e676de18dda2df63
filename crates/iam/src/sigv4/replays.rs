//! Signatures that were used: a request that is captured and sent again is refused.
//!
//! A signature is remembered as long as its request would pass the check of time, and not longer. The memory is bounded;
//! when it is full it says so, and the caller refuses the request (503) rather than let an old one in again. It is one
//! server's: what another server saw, it does not know.
//!
//! The protocol's dates have whole seconds, so two equal requests within a second have one signature. Our own
//! [`super::sign`] adds a random header and avoids that; foreign tools don't. Use this for requests that change something,
//! where a client that is refused signs anew and tries again, and leave reads and presigned links, which may be used
//! repeatedly by design, out of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use super::Verified;

/// Why a request that is rightly signed is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    #[error("this very request was received before: sign it anew")]
    Replayed,
    #[error("too many signed requests at once: try again in a moment")]
    Full,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Replays {
    capacity: usize,
    seen: BTreeMap<[u8; 32], SystemTime>,
    by_end: BTreeSet<(SystemTime, [u8; 32])>,
    /// Signatures that ended before this were forgotten: they are refused, should the clock go back.
    forgotten: SystemTime,
}

impl Replays {
    /// Each remembered signature takes about 200 bytes. `capacity` over the window (twice the skew) is the sustained
    /// rate that is possible.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, seen: BTreeMap::new(), by_end: BTreeSet::new(), forgotten: SystemTime::UNIX_EPOCH }
    }

    /// Takes a request's signature for its first and only use.
    pub fn admit(&mut self, request: &Verified, now: SystemTime) -> Result<(), ReplayError> {
        self.admit_signature(request.signature, request.usable_until, now)
    }

    fn admit_signature(&mut self, signature: [u8; 32], end: SystemTime, now: SystemTime) -> Result<(), ReplayError> {
        while let Some((ended, old)) = self.by_end.first().copied().filter(|(ended, _)| *ended < now) {
            self.by_end.pop_first();
            self.seen.remove(&old);
            self.forgotten = self.forgotten.max(ended);
        }
        if end <= self.forgotten || self.seen.contains_key(&signature) {
            return Err(ReplayError::Replayed);
        }
        if self.seen.len() >= self.capacity {
            return Err(ReplayError::Full);
        }
        self.seen.insert(signature, end);
        self.by_end.insert((end, signature));
        Ok(())
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(secs: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(secs)
    }

    #[test]
    fn a_signature_is_taken_once_and_forgotten_when_it_is_useless() {
        let mut replays = Replays::new(2);
        assert_eq!(replays.admit_signature([1; 32], at(100), at(50)), Ok(()));
        assert_eq!(replays.admit_signature([1; 32], at(100), at(60)), Err(ReplayError::Replayed));
        assert_eq!(replays.admit_signature([2; 32], at(110), at(60)), Ok(()));
        assert_eq!(replays.admit_signature([3; 32], at(120), at(60)), Err(ReplayError::Full));
        assert_eq!(replays.admit_signature([1; 32], at(100), at(60)), Err(ReplayError::Replayed), "also when full");
        assert_eq!(
            replays.admit_signature([3; 32], at(120), at(100)),
            Err(ReplayError::Full),
            "still usable at its end"
        );
        assert_eq!(replays.admit_signature([3; 32], at(120), at(101)), Ok(()));
        assert_eq!(replays.len(), 2);
        // The clock goes back, and the first could pass the check of time again.
        assert_eq!(replays.admit_signature([1; 32], at(100), at(60)), Err(ReplayError::Replayed));
    }
}
