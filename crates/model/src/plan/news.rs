//! How a host is told of tenants' networks: whole once, and then what has changed.
//!
//! ```text
//! agent                                        server
//!   NetworksRequest {known, have}  ────────▶     the networks that the agent holds, each by the digest of its plan
//!   ◀──────── NetworksMessage {news, more} …     what of each differs: edits since the version held, or the network anew
//!   …                                            and so on, whenever something changes
//! ```
//!
//! A plan is known by its digest alone, whoever made it: a server that has just begun finds that an agent holds what it would
//! tell, and tells nothing. Of each network it remembers the last changes, and sends those that the agent lacks; where it knows
//! no way from what the agent holds, it sends the network anew. What passes one message comes in several, and counts when the
//! last is there. The agent works the digests out for itself: when one is another, it follows nothing of that, and asks for
//! everything. If even that seems wrong to it, the server is of a release that writes plans in another way: it is believed.
//!
//! An agent of a release that knows no edits names no `have`, and is sent whole [`HostNetworks`]; a server of such a release
//! sends them too: a [`NetworksMessage`] without news is one.

mod listener;
mod teller;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use listener::{Listener, NewsError};
pub use teller::{HostVersions, NetworkVersion, Teller};

use super::networks::*;
use crate::{Digest, Name, Uid};

/// Asks for what a host is to have of tenants' networks, from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworksRequest {
    pub host: Name,
    /// The revision that the agent already holds; the stream begins when there is a newer one.
    pub known: Option<u64>,
    /// The plans that it holds; without this it takes only wholes.
    #[serde(default)]
    pub have: Option<BTreeMap<Uid, Digest>>,
}

/// [`HostNetworks`], or what of them is new.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworksMessage {
    pub version: u32,
    pub host: Name,
    pub revision: u64,
    pub endpoint: IpAddr,
    /// None, where news say that they are the same.
    pub tunnels: Vec<IpAddr>,
    /// None, where there are news.
    pub networks: Vec<Arc<NetworkPlan>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub news: Option<News>,
}

/// What is new since the last message of a stream; since what the request said, in the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct News {
    /// Nothing of it counts before the next message is there.
    pub more: bool,
    pub same_tunnels: bool,
    /// Networks that the host has no part of any more.
    pub gone: Vec<Uid>,
    /// In this order.
    pub changes: Vec<Arc<NetworkChange>>,
    /// Of everything, once the last message of it is there.
    pub digest: Digest,
}

/// What is new of one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkChange {
    /// The network but for its lists, which are empty.
    pub head: NetworkPlan,
    /// Nothing stays of what was held of it: the edits are of empty lists.
    #[serde(default)]
    pub anew: bool,
    /// Of its plan, then. None: another change makes it whole.
    #[serde(default)]
    pub digest: Option<Digest>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<Edit<SubnetPlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Edit<NicPlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Edit<GroupPlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub route_tables: Vec<Edit<RouteTablePlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peerings: Vec<Edit<PeeringPlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nats: Vec<Edit<NatPlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub floating: Vec<Edit<FloatingPlan>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub balancers: Vec<Edit<BalancerPlan>>,
    /// All zones, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<ZoneChange>,
}

/// A zone, by what has changed since the one of its name: they may have a record of each NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ZoneChange {
    pub domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<Edit<RecordPlan>>,
}

/// A step through a list, from its beginning. What the last one leaves over stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Edit<T> {
    /// So many stay.
    Keep(u32),
    /// So many go.
    Drop(u32),
    /// These come in here.
    Put(Vec<T>),
}

/// Edits that are of another list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Foreign;

/// What makes one list of another. Any key is right; one by which both are sorted gives the fewest edits.
fn edits<T: Clone + PartialEq, K: Ord>(old: &[T], new: &[T], key: impl Fn(&T) -> K) -> Vec<Edit<T>> {
    let mut all = Vec::new();
    let (mut from, mut to) = (0, 0);
    while from < old.len() || to < new.len() {
        match (old.get(from), new.get(to)) {
            (Some(a), Some(b)) if a == b => {
                step(&mut all, Edit::Keep(1));
                (from, to) = (from + 1, to + 1);
            }
            (Some(a), Some(b)) if key(a) < key(b) => {
                step(&mut all, Edit::Drop(1));
                from += 1;
            }
            (Some(a), Some(b)) if key(a) == key(b) => {
                step(&mut all, Edit::Drop(1));
                step(&mut all, Edit::Put(vec![b.clone()]));
                (from, to) = (from + 1, to + 1);
            }
            (_, Some(b)) => {
                step(&mut all, Edit::Put(vec![b.clone()]));
                to += 1;
            }
            (Some(_), None) => {
                step(&mut all, Edit::Drop(1));
                from += 1;
            }
            (None, None) => break,
        }
    }
    if let Some(Edit::Keep(_)) = all.last() {
        all.pop();
    }
    all
}

/// Adds one step, to the last if that is of its sort.
fn step<T>(all: &mut Vec<Edit<T>>, next: Edit<T>) {
    match (all.last_mut(), next) {
        (Some(Edit::Keep(n)), Edit::Keep(more)) | (Some(Edit::Drop(n)), Edit::Drop(more)) => *n += more,
        (Some(Edit::Put(items)), Edit::Put(more)) => items.extend(more),
        (_, next) => all.push(next),
    }
}

fn edited<T: Clone>(old: &[T], edits: &[Edit<T>]) -> Result<Vec<T>, Foreign> {
    let mut new = Vec::with_capacity(old.len() + 1);
    let mut at = 0;
    for edit in edits {
        match edit {
            Edit::Keep(n) | Edit::Drop(n) => {
                let end = at + *n as usize;
                let some = old.get(at..end).ok_or(Foreign)?;
                if matches!(edit, Edit::Keep(_)) {
                    new.extend_from_slice(some);
                }
                at = end;
            }
            Edit::Put(items) => new.extend_from_slice(items),
        }
    }
    new.extend_from_slice(&old[at..]);
    Ok(new)
}

/// A network but for its lists.
fn head(plan: &NetworkPlan) -> NetworkPlan {
    NetworkPlan {
        uid: plan.uid,
        project: plan.project.clone(),
        name: plan.name.clone(),
        vni: plan.vni,
        mtu: plan.mtu,
        cidrs: plan.cidrs.clone(),
        subnets: Vec::new(),
        nics: Vec::new(),
        groups: Vec::new(),
        route_tables: Vec::new(),
        peerings: Vec::new(),
        nats: Vec::new(),
        floating: Vec::new(),
        balancers: Vec::new(),
        zones: Vec::new(),
        flow_logs: plan.flow_logs,
    }
}

impl NetworkChange {
    /// One that changes no list.
    fn nothing(plan: &NetworkPlan) -> Self {
        let zone = |zone: &ZonePlan| ZoneChange { domain: zone.domain.clone(), records: Vec::new() };
        Self {
            head: head(plan),
            anew: false,
            digest: None,
            subnets: Vec::new(),
            nics: Vec::new(),
            groups: Vec::new(),
            route_tables: Vec::new(),
            peerings: Vec::new(),
            nats: Vec::new(),
            floating: Vec::new(),
            balancers: Vec::new(),
            zones: plan.zones.iter().map(zone).collect(),
        }
    }

    fn between(old: &NetworkPlan, new: &NetworkPlan, digest: Digest) -> Self {
        let zone = |zone: &ZonePlan| ZoneChange {
            domain: zone.domain.clone(),
            records: edits(records(old, &zone.domain), &zone.records, |r| (r.name.clone(), family(&r.data))),
        };
        Self {
            head: head(new),
            anew: false,
            digest: Some(digest),
            subnets: edits(&old.subnets, &new.subnets, |s| s.name.clone()),
            nics: edits(&old.nics, &new.nics, |n| n.uid),
            groups: edits(&old.groups, &new.groups, |g| g.name.clone()),
            route_tables: edits(&old.route_tables, &new.route_tables, |t| t.name.clone()),
            peerings: edits(&old.peerings, &new.peerings, |p| p.name.clone()),
            nats: edits(&old.nats, &new.nats, |n| n.name.clone()),
            floating: edits(&old.floating, &new.floating, |f| f.name.clone()),
            balancers: edits(&old.balancers, &new.balancers, |b| b.name.clone()),
            zones: new.zones.iter().map(zone).collect(),
        }
    }

    fn applied(&self, old: &NetworkPlan) -> Result<NetworkPlan, Foreign> {
        let zone = |zone: &ZoneChange| {
            let records = edited(records(old, &zone.domain), &zone.records)?;
            Ok(ZonePlan { domain: zone.domain.clone(), records })
        };
        Ok(NetworkPlan {
            subnets: edited(&old.subnets, &self.subnets)?,
            nics: edited(&old.nics, &self.nics)?,
            groups: edited(&old.groups, &self.groups)?,
            route_tables: edited(&old.route_tables, &self.route_tables)?,
            peerings: edited(&old.peerings, &self.peerings)?,
            nats: edited(&old.nats, &self.nats)?,
            floating: edited(&old.floating, &self.floating)?,
            balancers: edited(&old.balancers, &self.balancers)?,
            zones: self.zones.iter().map(zone).collect::<Result<_, Foreign>>()?,
            ..self.head.clone()
        })
    }
}

fn records<'a>(plan: &'a NetworkPlan, domain: &str) -> &'a [RecordPlan] {
    plan.zones.iter().find(|z| z.domain == domain).map_or(&[], |z| &z.records)
}

/// Of a name, the order in which a zone has its records.
fn family(data: &RecordData) -> u8 {
    match data {
        RecordData::A(_) => 0,
        RecordData::Aaaa(_) => 1,
        RecordData::Cname(_) => 2,
        RecordData::Txt(_) => 3,
    }
}

/// The SHA-256 of a value's JSON, and how many bytes that has: about as many as go over the wire, or more.
fn digest_of<T: Serialize>(value: &T) -> (Digest, usize) {
    struct Sum(Sha256, usize);
    impl io::Write for Sum {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            self.1 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut sum = io::BufWriter::with_capacity(16 << 10, Sum(Sha256::new(), 0));
    serde_json::to_writer(&mut sum, value).expect("plans are plain data");
    let Sum(hash, bytes) = sum.into_inner().map_err(io::IntoInnerError::into_error).expect("a sum takes everything");
    (Digest::from_sha256(hash.finalize().into()), bytes)
}

/// By which all networks of a host are known.
fn digest_of_all<'a>(
    endpoint: IpAddr,
    tunnels: &[IpAddr],
    networks: impl Iterator<Item = (&'a Uid, &'a Digest)>,
) -> Digest {
    digest_of(&(endpoint, tunnels, networks.collect::<Vec<_>>())).0
}

#[cfg(test)]
#[path = "news_tests.rs"]
mod tests;
