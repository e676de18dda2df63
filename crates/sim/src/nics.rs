//! What must be true of NICs in every revision: an address of a network is one NIC's, also of one that its host has not parted with
//! yet; and what is placed has the NICs that it names.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nexus_model::kind::{Instance, Nic};
use nexus_model::{Object, Uid};

use crate::trace::Trace;

/// The rows as of one revision, by their keys.
#[derive(Default)]
pub struct Nics {
    nics: BTreeMap<String, Object<Nic>>,
    /// Those that have been placed and have not ended, with how many NICs each names.
    placed: BTreeMap<String, (Uid, usize)>,
    touched: bool,
}

impl Nics {
    /// Takes in what became of a row.
    pub fn take(&mut self, key: &str, value: Option<&[u8]>) {
        if key.starts_with("o/nics/") || key.starts_with("t/nics/") {
            self.touched = true;
            self.nics.remove(key);
            if let Some(nic) = value.and_then(|v| Object::from_slice(v).ok()) {
                self.nics.insert(key.to_owned(), nic);
            }
        } else if key.starts_with("o/instances/") {
            self.placed.remove(key);
            let Some(instance) = value.and_then(|v| Object::<Instance>::from_slice(v).ok()) else { return };
            let named = instance.spec.template.nics.len();
            if instance.status.host.is_some() && instance.status.finished.is_none() && named > 0 {
                self.touched = true;
                self.placed.insert(key.to_owned(), (instance.metadata.uid, named));
            }
        }
    }

    /// Judges the rows as they are after a revision.
    pub fn judge(&mut self, revision: u64, trace: &Trace) {
        if !std::mem::take(&mut self.touched) {
            return;
        }
        let mut owners: BTreeMap<(Uid, IpAddr), Uid> = BTreeMap::new();
        let mut had: BTreeMap<Uid, usize> = BTreeMap::new();
        for nic in self.nics.values() {
            let (s, uid) = (&nic.status, nic.metadata.uid);
            if let Some(instance) = s.instance.filter(|_| nic.metadata.deleting.is_none()) {
                *had.entry(instance).or_default() += 1;
            }
            let Some(network) = s.network.as_ref().map(|n| n.uid) else { continue };
            let addresses = s.address4.map(IpAddr::from).into_iter().chain(s.address6.map(IpAddr::from));
            for address in addresses {
                let other = owners.insert((network, address), uid).filter(|other| *other != uid);
                if let Some(other) = other {
                    let text = format!("revision {revision}: NICs {uid} and {other} have {address}");
                    trace.violation("an address of a network is one NIC's", text);
                }
            }
        }
        for (instance, named) in self.placed.values() {
            let has = had.get(instance).copied().unwrap_or(0);
            if has < *named {
                let text = format!("revision {revision}: instance {instance} has {has} of {named} NICs");
                trace.violation("what is placed has its NICs", text);
            }
        }
    }
}
