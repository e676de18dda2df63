//! Links, addresses and routes of hosts and of the instances on them.
//!
//! Everything is routed and nothing is bridged on a host: an instance lives in a network namespace of its own, holds one
//! IPv6 and one IPv4 address of its host's prefixes, and sends all that it has to say to its host. [`InstanceNet`] makes
//! and removes such namespaces, [`HostNet`] lets a host forward, and [`Underlay`] is the wire between the local hosts of
//! `nexus up`, [`Backbone`] the one between its regions. [`firewall`] says which packets of instances pass, [`names`] answers
//! their questions for names.
//!
//! Every step states what must be so, never what to change: doing it twice, or again after being cut off in the middle,
//! ends in the same place.
//!
//! Architecture invariant: nothing here knows of kinds, plans or the control plane. The kernel's state is the only state.

mod backbone;
mod cable;
pub mod firewall;
mod instance;
pub mod names;
mod netlink;
mod netns;
mod underlay;
pub mod vpc;

use std::io;

pub use backbone::{Backbone, RegionLink};
pub use instance::{HostNet, InstanceAddress, InstanceNet, NAMESERVER};
pub use netns::{NetnsRef, enter, new_namespace};
pub use underlay::{HostLink, Underlay, UnderlayAddress};

/// What was attempted on the kernel's network state, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("{attempt}: {source}")]
    Kernel { attempt: String, source: io::Error },
    #[error("{attempt}: the kernel's answer can't be read: {message}")]
    Answer { attempt: String, message: String },
    #[error("{0:?} is no usable name: 1 to 64 of A-Z, a-z, 0-9, '-', '_', '.', not beginning with a dot")]
    Name(String),
    #[error("{attempt}: nft says: {message}")]
    Rules { attempt: &'static str, message: String },
    #[error("a thread for {0} can't be started")]
    Thread(String),
}

/// Adds what was attempted to an error of the system.
pub(crate) trait Attempt<T> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T, NetError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T, NetError> {
        self.map_err(|e| NetError::Kernel { attempt: what(), source: e.into() })
    }
}

/// Refuses names that could leave their folder or break a line.
pub(crate) fn check_name(name: &str) -> Result<(), NetError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if (1..=64).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.') {
        Ok(())
    } else {
        Err(NetError::Name(name.chars().take(80).collect()))
    }
}

/// The longest name of a link: `IFNAMSIZ` less its zero byte.
const LINK_NAME_MAX: usize = 15;

/// A link's name from a prefix and a longer name, the same every time: as much of the name's FNV-1a hash, in base 32,
/// as fits.
pub(crate) fn link_name(prefix: &str, name: &str) -> String {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut hash = fnv(name.as_bytes());
    let mut out = prefix.to_owned();
    for _ in 0..LINK_NAME_MAX.saturating_sub(prefix.len()).min(12) {
        out.push(DIGITS[(hash & 31) as usize] as char);
        hash >>= 5;
    }
    out
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): names links and hardware addresses, guards nothing.
pub(crate) fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_fit_and_differ() {
        let a = link_name("nxi", "6f1c0d5e-0000-8000-8000-000000000001");
        let b = link_name("nxi", "6f1c0d5e-0000-8000-8000-000000000002");
        assert_eq!((a.len(), b.len()), (15, 15));
        assert_ne!(a, b);
        assert_eq!(a, link_name("nxi", "6f1c0d5e-0000-8000-8000-000000000001"));
    }

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "a b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("6f1c0d5e-0000").is_ok());
    }
}
