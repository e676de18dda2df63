//! The way to the other members: who they are, where they live, and the envelope around every message.
//!
//! The envelope, before the message itself (little endian): version (u8), how many hops are left (u8), the group's
//! *generation* (u64), sender (u64), addressee (u64), how long the answer is waited for in milliseconds (u32), and the
//! hops (u64 each). A member that is the first hop passes the message on to the next, or to the addressee.
//!
//! Why the addressee is named: an endpoint may be given to another member. If that one answered for the one that was
//! meant, a vote or an acknowledgement would be counted for the wrong member. It refuses instead.
//!
//! Why there are generations: after an operator has begun anew with one survivor of a lost quorum, the others may come
//! back and make a quorum of what was. The survivor's generation is higher, so neither hears the other, and whoever hears
//! of a higher generation than its own stops for good.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};

use super::raft::DecodeError;
use crate::error::PeerError;
use crate::types::GroupId;

/// A member as it is called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerRef {
    pub node: u64,
    /// As the group's membership has it.
    pub endpoint: String,
}

/// How messages reach the other members. The server carries them over its southbound protocol; tests over channels.
#[async_trait]
pub trait Peers: Send + Sync {
    /// Hands `message` to the [`handle`](super::EmbeddedStore::handle) of that group's store at the member's endpoint and
    /// answers what it answers. Messages are at most about 3 MiB. The caller drops the future when its own deadline
    /// passes.
    async fn call(&self, to: &PeerRef, group: &GroupId, message: Bytes) -> Result<Bytes, PeerError>;
}

/// The version of the envelope that this release writes and reads.
const VERSION: u8 = 2;
const FIXED: usize = 30;
/// Members that one message may pass through. Enough for a chain of five.
pub const MAX_HOPS: usize = 3;

/// What is written around a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    pub generation: u64,
    pub from: u64,
    pub to: u64,
    pub budget_ms: u32,
    /// Those who still have to pass it on, in order.
    pub hops: Vec<u64>,
}

impl Envelope {
    /// The whole message.
    pub fn seal(&self, body: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(FIXED + 8 * self.hops.len() + body.len());
        out.put_u8(VERSION);
        out.put_u8(self.hops.len() as u8);
        out.put_u64_le(self.generation);
        out.put_u64_le(self.from);
        out.put_u64_le(self.to);
        out.put_u32_le(self.budget_ms);
        for hop in &self.hops {
            out.put_u64_le(*hop);
        }
        out.extend_from_slice(body);
        out.freeze()
    }

    /// The envelope and the message in it.
    pub fn open(message: &Bytes) -> Result<(Self, Bytes), DecodeError> {
        match message.first() {
            None => return Err(DecodeError::Empty),
            Some(&VERSION) => {}
            Some(&other) => return Err(DecodeError::Version(other)),
        }
        let short = || DecodeError::Envelope;
        let word = |at: usize| -> Result<u64, DecodeError> {
            let bytes = message.get(at..at + 8).ok_or_else(short)?;
            Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes were asked for")))
        };
        let hops = usize::from(*message.get(1).ok_or_else(short)?);
        let end = FIXED + 8 * hops;
        if hops > MAX_HOPS || message.len() < end {
            return Err(short());
        }
        let budget = message.get(26..30).ok_or_else(short)?;
        let envelope = Self {
            generation: word(2)?,
            from: word(10)?,
            to: word(18)?,
            budget_ms: u32::from_le_bytes(budget.try_into().expect("four bytes were asked for")),
            hops: (0..hops).map(|i| word(FIXED + 8 * i)).collect::<Result<_, _>>()?,
        };
        Ok((envelope, message.slice(end..)))
    }
}

#[derive(Debug, Default)]
struct Known {
    membership: BTreeMap<u64, String>,
    configured: BTreeMap<u64, String>,
    /// Those whose place in the membership did not answer and who are tried where the configuration has them.
    moved: BTreeSet<u64>,
}

/// Where the members live: as the group's membership says, or by what this member was started with until that is known.
/// A member that does not answer at the one place is tried at the other: it may have moved, and will say so to the leader.
#[derive(Debug, Default)]
pub struct Roster {
    known: Mutex<Known>,
}

impl Roster {
    pub fn new(configured: BTreeMap<u64, String>) -> Self {
        Self { known: Mutex::new(Known { configured, ..Known::default() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the membership says. Former members stay known: an answer may still be on its way to them.
    pub fn learn(&self, members: impl IntoIterator<Item = (u64, String)>) {
        self.lock().membership.extend(members);
    }

    pub fn find(&self, node: u64) -> Option<PeerRef> {
        let known = self.lock();
        let (first, second) = if known.moved.contains(&node) {
            (&known.configured, &known.membership)
        } else {
            (&known.membership, &known.configured)
        };
        let endpoint = first.get(&node).or_else(|| second.get(&node))?.clone();
        Some(PeerRef { node, endpoint })
    }

    /// Nobody was found at that place.
    pub fn try_other(&self, peer: &PeerRef) {
        let mut known = self.lock();
        let (a, b) = (known.membership.get(&peer.node), known.configured.get(&peer.node));
        if let (Some(a), Some(b)) = (a, b)
            && a != b
        {
            let moved = *a == peer.endpoint;
            if moved {
                known.moved.insert(peer.node)
            } else {
                known.moved.remove(&peer.node)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_comes_back_as_it_was_sealed() {
        for hops in [vec![], vec![7], vec![7, 8, 9]] {
            let envelope = Envelope { generation: 3, from: 1, to: 102, budget_ms: 1_500, hops };
            let (back, body) = Envelope::open(&envelope.seal(b"hello")).unwrap();
            assert_eq!((back, &body[..]), (envelope, &b"hello"[..]));
        }
    }

    #[test]
    fn what_is_no_envelope_is_refused_with_the_reason() {
        let sealed = Envelope { generation: 1, from: 1, to: 2, budget_ms: 0, hops: vec![3] }.seal(b"");
        assert!(matches!(Envelope::open(&Bytes::new()), Err(DecodeError::Empty)));
        for len in 1..sealed.len() {
            assert!(matches!(Envelope::open(&sealed.slice(..len)), Err(DecodeError::Envelope)), "{len}");
        }
        let mut other = sealed.to_vec();
        other[0] = 9;
        assert!(matches!(Envelope::open(&other.into()), Err(DecodeError::Version(9))));
    }
}
