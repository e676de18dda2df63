//! What runs at which address, and what must not run any more, as nobody inside the world can know it at once.
//!
//! An instance's host, address and capacity are its own until its host has confirmed that it is gone, or an operator has
//! said that the host is. From then on (its row is erased, which a recorder hears) it must not run anywhere, because others
//! get what it had. Until then it may run beside its successor if its host is cut off: no kind of instance is exclusive yet.
//! In no case does one instance run on two hosts, or two at one address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nexus_model::{Name, Uid};

use crate::trace::Trace;

const FENCE: &str = "nothing runs past its fence";

/// An instance that exists on a host in any form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    pub uid: Uid,
    pub project: Name,
    pub host: Name,
}

#[derive(Default)]
struct State {
    /// By place in the network, which is unique also over regions.
    hosts: BTreeMap<Uid, u64>,
    addresses: BTreeMap<IpAddr, Present>,
    erased: BTreeSet<String>,
}

/// Clones share one.
#[derive(Clone)]
pub struct Fence {
    trace: Trace,
    state: Arc<Mutex<State>>,
}

impl Fence {
    pub fn new(trace: Trace) -> Self {
        Self { trace, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host makes an instance.
    pub fn begins(&self, place: u64, address: IpAddr, present: Present) {
        self.trace.count("instances begun");
        let uid = present.uid;
        let (erased, elsewhere, other) = {
            let mut state = self.state();
            let erased = state.erased.contains(&uid.to_string());
            let elsewhere = state.hosts.insert(uid, place).filter(|other| *other != place);
            (erased, elsewhere, state.addresses.insert(address, present.clone()))
        };
        let host = &present.host;
        if erased {
            self.trace.violation(FENCE, format_args!("{uid} begins on {host} after its row was erased"));
        }
        if elsewhere.is_some() {
            self.trace.violation(FENCE, format_args!("{uid} begins on {host} and still runs elsewhere"));
        }
        if let Some(other) = other.filter(|other| other.uid != uid) {
            self.trace.violation(FENCE, format_args!("{uid} begins on {host} at {address}, which {} has", other.uid));
        }
    }

    /// Nothing of an instance is left on its host.
    pub fn ends(&self, uid: Uid, address: IpAddr) {
        let mut state = self.state();
        state.hosts.remove(&uid);
        if state.addresses.get(&address).is_some_and(|p| p.uid == uid) {
            state.addresses.remove(&address);
        }
    }

    /// Its region has forgotten an instance, so its address and capacity are free.
    pub fn erased(&self, uid: &str) {
        let runs = {
            let mut state = self.state();
            state.erased.insert(uid.to_owned());
            state.addresses.values().find(|p| p.uid.to_string() == uid).cloned()
        };
        if let Some(Present { uid, host, .. }) = runs {
            self.trace.violation(FENCE, format_args!("{uid} is on {host} while its row is erased"));
        }
    }

    /// Who answers at an address.
    pub fn at(&self, address: IpAddr) -> Option<Present> {
        self.state().addresses.get(&address).cloned()
    }
}
