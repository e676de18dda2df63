//! The resolver of a host's instances: what one DNS message (RFC 1035) is answered with.
//!
//! ```text
//! APP.PROJECT.internal          A, AAAA    the ready instances of an app, in another order each time
//! APP.PROJECT.REGION.internal   likewise
//! _PORT._tcp.APP.PROJECT…       SRV        the port of that name of each ready instance (RFC 2782), with the addresses
//! 10-0-1-2.APP.PROJECT…         A, AAAA    one ready instance: what an SRV record leads to
//! …in-addr.arpa, …ip6.arpa      PTR        APP.PROJECT.internal, for the addresses of instances
//! ```
//!
//! An instance with a NIC finds more, and some of it elsewhere: see [`Inside`].
//!
//! Who asks is known by the address that the question comes from, which the packet filter vouches for. An instance is
//! told of its own project; another's names are not there (NXDOMAIN). An app that has nothing ready exists and has no
//! addresses. While nothing is known of the asker's project, the answer is SERVFAIL, and resolvers ask again. Names of the
//! world outside are passed on for those who may reach something there, and else refused.
//!
//! Architecture invariant: nothing here waits, reads a clock or opens a socket. [`serve`] does.

mod inside;
pub mod lookup;
mod message;
pub mod serve;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::firewall::Net;
use inside::Told;
pub use inside::{Inside, NamedNic, Zone, ZoneData};
pub use message::Code;
use message::{Answer, Data, IN, Question, Record, Unreadable, bare, kind};

/// The zone.
const ZONE: &str = "internal";
/// The transport of every port that an app has.
const TCP: &str = "_tcp";
/// Seconds: what a name leads to changes with every rollout.
const TTL: u32 = 5;
/// Addresses in one answer; of more, as many by chance.
const MAX_ADDRESSES: usize = 512;
/// The largest answer by UDP, whatever the asker says that it takes (DNS flag day 2020).
const MAX_UDP: u16 = 1232;
const MAX_MESSAGE: usize = u16::MAX as usize;

/// One instance that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
    pub ready: bool,
    /// It answers on IPv4 alone.
    pub only4: bool,
    /// Names and numbers.
    pub ports: Vec<(String, u16)>,
}

impl Named {
    fn address(&self, kind: u16) -> Option<Data> {
        match kind {
            kind::A => Some(Data::A(self.address4)),
            kind::AAAA => (!self.only4).then_some(Data::Aaaa(self.address6)),
            _ => None,
        }
    }

    fn port(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|(of, _)| of == name).map(|(_, port)| *port)
    }

    /// What it is called below its app.
    fn label(&self) -> String {
        self.address4.to_string().replace('.', "-")
    }
}

/// A project's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Project {
    /// By app, also those that have no instance.
    pub apps: BTreeMap<String, Vec<Named>>,
    /// Names of the world outside are answered.
    pub outside: bool,
}

impl Project {
    /// What the labels before an app's name lead to.
    fn below<'a>(&'a self, app: &str, labels: &'a [String]) -> Found<'a> {
        let Some(instances) = self.apps.get(app) else { return Found::Nothing };
        match labels {
            [transport] if transport == TCP && instances.iter().any(|i| !i.ports.is_empty()) => Found::Between,
            [service, transport] if transport == TCP => match service.strip_prefix('_') {
                Some(port) if instances.iter().any(|i| i.port(port).is_some()) => Found::Service(port, instances),
                _ => Found::Nothing,
            },
            [one] => match instances.iter().find(|i| i.ready && i.label() == *one) {
                Some(instance) => Found::Instance(instance),
                None => Found::Nothing,
            },
            _ => Found::Nothing,
        }
    }
}

/// All that a host knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    pub region: String,
    pub projects: BTreeMap<String, Project>,
    /// The projects of the host's own instances, by the addresses that they ask from.
    pub askers: HashMap<Ipv4Addr, String>,
    /// What those of them that have NICs find in their networks.
    pub inside: HashMap<Ipv4Addr, Arc<Inside>>,
    /// Whose reverse names are answered here and never asked for outside.
    pub instances: Vec<Net>,
}

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    Udp,
    Tcp,
}

/// What is to be done with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Sent back.
    Answer(Vec<u8>, Outcome),
    /// Asked of the host's own resolvers, as it is.
    Forward,
    /// Passed over: it is no question, or from nobody who may ask.
    Ignore,
}

/// How a question was answered, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Answered,
    NoData,
    NoName,
    /// A name from outside, and the asker's project has no egress.
    Refused,
    /// The message is malformed or asks for what no resolver of this kind does.
    Bad,
    /// Nothing is known of the asker's project yet.
    Unknown,
}

/// What a name is to an asker.
enum Found<'a> {
    App(&'a [Named]),
    /// A port's name, and all instances of its app.
    Service(&'a str, &'a [Named]),
    Instance(&'a Named),
    /// There are names below it.
    Between,
    Zone,
    Nothing,
}

impl Directory {
    /// Decides on one message from `asker`. `below` answers a number below its argument, by chance.
    pub fn decide(
        &self,
        message: &[u8],
        asker: Ipv4Addr,
        carrier: Carrier,
        below: &mut dyn FnMut(usize) -> usize,
    ) -> Verdict {
        let Some(own) = self.askers.get(&asker) else { return Verdict::Ignore };
        let question = match Question::read(message) {
            Ok(question) => question,
            Err(Unreadable::NoQuestion) => return Verdict::Ignore,
            Err(Unreadable::Bad(code)) => return Verdict::Answer(bare(message, code), Outcome::Bad),
        };
        let reply = Reply { question: &question, carrier, authoritative: false };
        if question.edns.is_some_and(|e| e.version > 0) {
            return reply.fails(Code::BadVers, Outcome::Bad);
        }
        if question.class != IN || matches!(question.kind, kind::AXFR | kind::IXFR) {
            return reply.fails(Code::Refused, Outcome::Bad);
        }
        let networks = self.inside.get(&asker).map(Arc::as_ref);
        if let Some(verdict) = networks.and_then(|inside| self.in_networks(inside, &reply, below)) {
            return verdict;
        }
        let reversed = question.reversed().filter(|a| self.instances.iter().any(|net| contains(net, *a)));
        match question.labels.last().map(String::as_str) {
            Some(ZONE) => self.inside(reply, own, below),
            // RFC 6761: never asked for outside.
            Some("localhost" | "invalid" | "test") => reply.nothing(),
            _ => match reversed {
                Some(address) => self.reverse(reply, own, address),
                None if self.projects.get(own).is_some_and(|p| p.outside) => Verdict::Forward,
                None => reply.fails(Code::Refused, Outcome::Refused),
            },
        }
    }

    /// The answer to a question that could not be passed on.
    pub fn failed(message: &[u8], carrier: Carrier) -> Option<Vec<u8>> {
        let question = Question::read(message).ok()?;
        match (Reply { question: &question, carrier, authoritative: false }).fails(Code::ServFail, Outcome::Bad) {
            Verdict::Answer(bytes, _) => Some(bytes),
            _ => None,
        }
    }

    fn inside(&self, mut reply: Reply<'_>, own: &str, below: &mut dyn FnMut(usize) -> usize) -> Verdict {
        let Some(project) = self.projects.get(own) else {
            return reply.fails(Code::ServFail, Outcome::Unknown);
        };
        reply.authoritative = true;
        let question = reply.question;
        match self.find(project, own, &question.labels[..question.labels.len() - 1]) {
            Found::App(instances) => {
                let mut ready: Vec<&Named> = instances.iter().filter(|i| i.ready).collect();
                shuffle(&mut ready, below);
                let data = |i: &&Named| i.address(question.kind);
                reply.has(ready.iter().filter_map(data).take(MAX_ADDRESSES).collect())
            }
            Found::Service(port, instances) if question.kind == kind::SRV => {
                let mut ready: Vec<&Named> = instances.iter().filter(|i| i.ready).collect();
                shuffle(&mut ready, below);
                let (mut answers, mut more) = (Vec::new(), Vec::new());
                for (instance, port) in ready.into_iter().filter_map(|i| Some((i, i.port(port)?))).take(MAX_ADDRESSES) {
                    // The app's name as it was asked for, after the port's and the transport's.
                    let app = question.labels.iter().skip(2).cloned();
                    let target: Vec<String> = std::iter::once(instance.label()).chain(app).collect();
                    let addresses = [kind::A, kind::AAAA].into_iter().filter_map(|kind| instance.address(kind));
                    more.extend(addresses.map(|address| (target.clone(), address)));
                    answers.push(Data::Srv { port, target });
                }
                reply.has_with(answers, more)
            }
            Found::Service(..) => reply.has(Vec::new()),
            Found::Instance(instance) => reply.has(instance.address(question.kind).into_iter().collect()),
            Found::Zone if question.kind == kind::SOA => reply.has(vec![Data::Soa]),
            Found::Between | Found::Zone => reply.has(Vec::new()),
            Found::Nothing => reply.nothing(),
        }
    }

    /// What an asker's networks say, if the question is theirs.
    fn in_networks(
        &self,
        inside: &Inside,
        reply: &Reply<'_>,
        below: &mut dyn FnMut(usize) -> usize,
    ) -> Option<Verdict> {
        let question = reply.question;
        let authoritative = Reply { authoritative: true, ..*reply };
        if let Some((depth, told)) = inside.ask(&question.labels, question.kind) {
            return Some(match told {
                Told::NoName => {
                    authoritative.done(Code::NxDomain, Vec::new(), Vec::new(), Some(depth), Outcome::NoName)
                }
                Told::Records(records) if records.is_empty() => {
                    authoritative.done(Code::NoError, Vec::new(), Vec::new(), Some(depth), Outcome::NoData)
                }
                Told::Records(records) => {
                    authoritative.done(Code::NoError, records, Vec::new(), None, Outcome::Answered)
                }
            });
        }
        if let Some(found) = question.reversed().and_then(|address| inside.reverse(address)) {
            return Some(match found {
                Some(name) if question.kind == kind::PTR => authoritative.has(vec![Data::Ptr(name)]),
                Some(_) => authoritative.has(Vec::new()),
                None => authoritative.nothing(),
            });
        }
        let nics = match &question.labels[..] {
            [app, project, zone] if zone == ZONE => inside.app(project, app)?,
            [app, project, region, zone] if zone == ZONE && *region == self.region => inside.app(project, app)?,
            _ => return None,
        };
        let mut ready: Vec<&NamedNic> = nics.iter().filter(|n| n.ready).collect();
        shuffle(&mut ready, below);
        Some(authoritative.has(ready.iter().filter_map(|n| n.data(question.kind)).take(MAX_ADDRESSES).collect()))
    }

    /// What the labels before the zone's name; the last is the outermost.
    fn find<'a>(&'a self, project: &'a Project, own: &str, labels: &'a [String]) -> Found<'a> {
        let app = |name: &str| project.apps.get(name).map_or(Found::Nothing, |i| Found::App(i));
        match labels {
            [] => Found::Zone,
            [one] if one == own || *one == self.region => Found::Between,
            [name, of] if of == own => match app(name) {
                // A region that bears the project's name.
                Found::Nothing if name == own && *of == self.region => Found::Between,
                found => found,
            },
            [of, region] if of == own && *region == self.region => Found::Between,
            [name, of, region] if of == own && *region == self.region => app(name),
            [more @ .., name, of, region] if of == own && *region == self.region => project.below(name, more),
            [more @ .., name, of] if of == own => project.below(name, more),
            _ => Found::Nothing,
        }
    }

    fn reverse(&self, mut reply: Reply<'_>, own: &str, address: IpAddr) -> Verdict {
        let Some(project) = self.projects.get(own) else {
            return reply.fails(Code::ServFail, Outcome::Unknown);
        };
        reply.authoritative = true;
        let here = |i: &Named| address == i.address6 || address == i.address4;
        let app = project.apps.iter().find(|(_, instances)| instances.iter().any(here));
        match app {
            Some((app, _)) if reply.question.kind == kind::PTR => {
                reply.has(vec![Data::Ptr(vec![app.clone(), own.to_owned(), ZONE.to_owned()])])
            }
            Some(_) => reply.has(Vec::new()),
            None => reply.nothing(),
        }
    }
}

fn contains(net: &Net, address: IpAddr) -> bool {
    match (net.0, address) {
        (IpAddr::V4(n), IpAddr::V4(a)) => {
            (n.to_bits() ^ a.to_bits()).checked_shr(32 - u32::from(net.1.min(32))).unwrap_or(0) == 0
        }
        (IpAddr::V6(n), IpAddr::V6(a)) => {
            (n.to_bits() ^ a.to_bits()).checked_shr(128 - u32::from(net.1.min(128))).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// Fisher and Yates' shuffle.
fn shuffle<T>(items: &mut [T], below: &mut dyn FnMut(usize) -> usize) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(i + 1).min(i));
    }
}

/// The ways to answer a question.
struct Reply<'a> {
    question: &'a Question<'a>,
    carrier: Carrier,
    authoritative: bool,
}

impl Reply<'_> {
    fn fails(&self, code: Code, outcome: Outcome) -> Verdict {
        self.done(code, Vec::new(), Vec::new(), None, outcome)
    }

    fn nothing(&self) -> Verdict {
        self.done(Code::NxDomain, Vec::new(), Vec::new(), Some(1), Outcome::NoName)
    }

    fn has(&self, data: Vec<Data>) -> Verdict {
        self.has_with(data, Vec::new())
    }

    /// With what is told of other names beside, as far as there is room.
    fn has_with(&self, data: Vec<Data>, more: Vec<(Vec<String>, Data)>) -> Verdict {
        let outcome = if data.is_empty() { Outcome::NoData } else { Outcome::Answered };
        let negative = data.is_empty().then_some(1);
        let answers = data.into_iter().map(|data| Record { owner: None, ttl: TTL, data }).collect();
        self.done(Code::NoError, answers, more, negative, outcome)
    }

    /// As much as fits. That something is left out is told by a bit, and it can be had by TCP; whoever does not look at that has
    /// some of it.
    fn done(
        &self,
        code: Code,
        answers: Vec<Record>,
        more: Vec<(Vec<String>, Data)>,
        negative: Option<usize>,
        outcome: Outcome,
    ) -> Verdict {
        let limit = match self.carrier {
            Carrier::Udp => self.question.payload().min(MAX_UDP).into(),
            Carrier::Tcp => MAX_MESSAGE,
        };
        let (question, authoritative) = (self.question, self.authoritative);
        let answer = Answer { question, code, authoritative, answers, more, negative, ttl: TTL, payload: MAX_UDP };
        Verdict::Answer(answer.write(limit), outcome)
    }
}

#[cfg(test)]
#[path = "names/tests.rs"]
mod tests;
