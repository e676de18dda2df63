//! What instances with a NIC find in their networks: apps by their NICs' addresses, and the records of private zones.
//!
//! A zone goes before everything else of the same name, the most special one first. An app of which nothing has a NIC that the
//! asker could reach is looked for as that of an asker without NICs is.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::message::{Data, Record, kind};
use super::{Net, TTL, contains};

/// The longest chain of `CNAME`s that is followed.
const MAX_CHAIN: usize = 8;

/// One instance, by its NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedNic {
    pub address4: Option<Ipv4Addr>,
    pub address6: Option<Ipv6Addr>,
    pub ready: bool,
}

/// What a record of a private zone says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ZoneData {
    A(Vec<Ipv4Addr>),
    Aaaa(Vec<Ipv6Addr>),
    /// A name, with or without a final dot.
    Cname(String),
    Txt(Vec<String>),
}

/// A private zone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Zone {
    /// The domain's labels, the outermost last.
    domain: Vec<String>,
    /// By the labels beneath the domain.
    records: BTreeMap<Vec<String>, Vec<(u32, ZoneData)>>,
}

/// All that one asker finds in its networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inside {
    /// By project and app.
    pub apps: BTreeMap<(String, String), Vec<NamedNic>>,
    pub zones: Vec<Zone>,
    /// Whose reverse names are answered here and never asked for outside.
    pub cidrs: Vec<Net>,
}

/// What a zone has under a name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// Perhaps nothing of the type that was asked for.
    Records(Vec<Record>),
    NoName,
}

fn labels(name: &str) -> Vec<String> {
    name.split('.').filter(|l| !l.is_empty()).map(str::to_ascii_lowercase).collect()
}

impl Zone {
    /// A zone of records: the name beneath the domain, the time to live, and what it says.
    pub fn new(domain: &str, records: impl IntoIterator<Item = (String, u32, ZoneData)>) -> Self {
        let mut zone = Self { domain: labels(domain), records: BTreeMap::new() };
        for (name, ttl, data) in records {
            zone.records.entry(labels(&name)).or_default().push((ttl, data));
        }
        zone
    }

    /// The records of a name beneath the domain; those of a wildcard, where there is nothing of that name and nothing below it
    /// (RFC 4592).
    fn find(&self, name: &[String]) -> Option<&[(u32, ZoneData)]> {
        if let Some(records) = self.records.get(name) {
            return Some(records);
        }
        let below = |of: &[String]| self.records.keys().any(|k| k.ends_with(of));
        if name.is_empty() || below(name) {
            return Some(&[]);
        }
        for cut in 1..=name.len() {
            let parent = &name[cut..];
            let mut wild = vec!["*".to_owned()];
            wild.extend_from_slice(parent);
            if let Some(records) = self.records.get(&wild) {
                return Some(records);
            }
            if below(parent) {
                return None;
            }
        }
        None
    }
}

impl Inside {
    /// The most special zone that a name is in, and how many labels its domain has.
    fn zone(&self, name: &[String]) -> Option<&Zone> {
        self.zones.iter().filter(|z| !z.domain.is_empty() && name.ends_with(&z.domain)).max_by_key(|z| z.domain.len())
    }

    /// What the zones say to a question, and how many labels the domain has that answers for it.
    pub(super) fn ask(&self, name: &[String], asked: u16) -> Option<(usize, Told)> {
        let zone = self.zone(name)?;
        let depth = zone.domain.len();
        let mut out: Vec<Record> = Vec::new();
        let mut at = name.to_vec();
        for step in 0..MAX_CHAIN {
            let Some(zone) = self.zone(&at) else {
                // An app of the network, or a name that the asker has to ask for.
                out.extend(self.app_at(&at).into_iter().flatten().filter_map(|nic| nic.record(asked, &at)));
                break;
            };
            let Some(records) = zone.find(&at[..at.len() - zone.domain.len()]) else {
                return Some((depth, if step == 0 { Told::NoName } else { Told::Records(out) }));
            };
            let owner = (step > 0).then(|| at.clone());
            let alias = records.iter().find_map(|(ttl, data)| match data {
                ZoneData::Cname(to) if asked != kind::CNAME => Some((*ttl, labels(to))),
                _ => None,
            });
            if let Some((ttl, to)) = alias {
                out.push(Record { owner, ttl, data: Data::Cname(to.clone()) });
                at = to;
                continue;
            }
            for (ttl, data) in records {
                let mut push = |data| out.push(Record { owner: owner.clone(), ttl: *ttl, data });
                match data {
                    ZoneData::A(all) if asked == kind::A => all.iter().for_each(|a| push(Data::A(*a))),
                    ZoneData::Aaaa(all) if asked == kind::AAAA => all.iter().for_each(|a| push(Data::Aaaa(*a))),
                    ZoneData::Cname(to) if asked == kind::CNAME => push(Data::Cname(labels(to))),
                    ZoneData::Txt(texts) if asked == kind::TXT => push(Data::Txt(texts.clone())),
                    _ => {}
                }
            }
            break;
        }
        Some((depth, Told::Records(out)))
    }

    fn app_at(&self, name: &[String]) -> Option<impl Iterator<Item = &NamedNic>> {
        let [app, project, zone] = name else { return None };
        let nics = self.app(project, app).filter(|_| zone == super::ZONE)?;
        Some(nics.iter().filter(|n| n.ready))
    }

    /// An app's NICs that the asker could reach, if there are any.
    pub fn app(&self, project: &str, app: &str) -> Option<&[NamedNic]> {
        self.apps.get(&(project.to_owned(), app.to_owned())).map(Vec::as_slice).filter(|nics| !nics.is_empty())
    }

    /// Which app an address is of, as its name's labels; `None` if the address is of none of these networks.
    pub fn reverse(&self, address: IpAddr) -> Option<Option<Vec<String>>> {
        if !self.cidrs.iter().any(|net| contains(net, address)) {
            return None;
        }
        let has =
            |n: &NamedNic| n.address4.map(IpAddr::V4) == Some(address) || n.address6.map(IpAddr::V6) == Some(address);
        let found = self.apps.iter().find(|(_, nics)| nics.iter().any(has));
        Some(found.map(|((project, app), _)| vec![app.clone(), project.clone(), super::ZONE.to_owned()]))
    }
}

impl NamedNic {
    pub(super) fn data(&self, asked: u16) -> Option<Data> {
        match asked {
            kind::A => self.address4.map(Data::A),
            kind::AAAA => self.address6.map(Data::Aaaa),
            _ => None,
        }
    }

    fn record(&self, asked: u16, owner: &[String]) -> Option<Record> {
        Some(Record { owner: Some(owner.to_vec()), ttl: TTL, data: self.data(asked)? })
    }
}
