//! A packet filter as values: the form between a plan and what the kernel is told.
//!
//! Both sides are made of it. [`super::super::text`] writes it for `nft`, and [`super::super::verdict`] walks it with a packet in
//! hand; so what is traced is what is programmed. It knows only as much of nftables as the rules here need.
//!
//! Whatever a packet holds that is compared is a [`Field`]; what it is compared with is a span of numbers, a link's name or a
//! hardware address. Spans of one set never overlap, for the kernel refuses such sets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_model::plan::Mac;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv6() { Self::V6 } else { Self::V4 }
    }

    /// How names of sets and chains end.
    pub fn digit(self) -> char {
        match self {
            Self::V4 => '4',
            Self::V6 => '6',
        }
    }

    /// ICMP's number in this family.
    pub fn icmp(self) -> u8 {
        match self {
            Self::V4 => 1,
            Self::V6 => 58,
        }
    }

    pub fn last(self) -> u128 {
        match self {
            Self::V4 => u32::MAX.into(),
            Self::V6 => u128::MAX,
        }
    }

    pub fn address(self, number: u128) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(number as u32).into(),
            Self::V6 => Ipv6Addr::from_bits(number).into(),
        }
    }
}

/// An address as a number within its family.
pub fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => a.to_bits().into(),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// A part of a packet, or of what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    LinkIn,
    LinkOut,
    MacSource,
    Source(Family),
    Destination(Family),
    Protocol,
    SourcePort,
    /// The destination's. Of a packet without ports, whatever is in their place.
    Port,
    IcmpType(Family),
    HopLimit,
    Mark,
    /// The network identifier of a VXLAN packet.
    Vni,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    Link(String),
    /// All links whose names begin so. Never in a set.
    Links(&'static str),
    Mac(Mac),
    /// Both included.
    Span(u128, u128),
}

impl Value {
    pub fn of(address: IpAddr) -> Self {
        Self::one(number(address))
    }

    pub fn one(number: impl Into<u128>) -> Self {
        let number = number.into();
        Self::Span(number, number)
    }
}

/// One value for each field of its set.
pub type Key = Vec<Value>;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Set {
    pub fields: Vec<Field>,
    pub elements: BTreeSet<Key>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    pub fields: Vec<Field>,
    pub to: MapTo,
    pub elements: BTreeMap<Key, Target>,
}

/// What a map's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapTo {
    Verdicts,
    Addresses(Family),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Verdict(Verdict),
    Address(IpAddr),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

impl Verdict {
    pub fn goto(chain: impl Into<String>) -> Self {
        Self::Goto(chain.into())
    }
}

/// A packet goes on to a rule's acts when all its tests hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Test {
    Within {
        fields: Vec<Field>,
        set: String,
        not: bool,
    },
    Is {
        field: Field,
        values: Vec<Value>,
        not: bool,
    },
    Family(Family),
    /// An answer to what was let through.
    Answer,
    /// An error about a known connection.
    Related,
    /// Fits no connection and begins none.
    Invalid,
    /// Of a connection that these very rules let through before, in either direction.
    Known,
    New,
    /// Its destination was changed.
    Translated,
    /// In the midst of a TCP connection whose addresses nobody changes.
    Plain,
    /// Begins a TCP connection, in either direction.
    Opens,
    /// For a socket of this namespace that speaks in another's name.
    Relayed,
    /// More than so many a second from the link that it comes from.
    Flood {
        meter: &'static str,
        rate: u32,
        burst: u32,
    },
    /// No more than so many a second, of all together.
    Seldom {
        rate: u32,
        burst: u32,
    },
}

impl Test {
    pub fn within(fields: impl Into<Vec<Field>>, set: impl Into<String>) -> Self {
        Self::Within { fields: fields.into(), set: set.into(), not: false }
    }

    pub fn outside(fields: impl Into<Vec<Field>>, set: impl Into<String>) -> Self {
        Self::Within { fields: fields.into(), set: set.into(), not: true }
    }

    pub fn is(field: Field, value: Value) -> Self {
        Self::Is { field, values: vec![value], not: false }
    }

    pub fn any(field: Field, values: impl IntoIterator<Item = u128>) -> Self {
        Self::Is { field, values: values.into_iter().map(Value::one).collect(), not: false }
    }

    pub fn from(links: &'static str) -> Self {
        Self::is(Field::LinkIn, Value::Links(links))
    }

    pub fn to(links: &'static str) -> Self {
        Self::is(Field::LinkOut, Value::Links(links))
    }
}

/// A connection's new destination, with how many of all new connections are its.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    pub address: IpAddr,
    pub port: u16,
    pub weight: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    Then(Verdict),
    /// The verdict that a map has, if it has one.
    ByMap {
        fields: Vec<Field>,
        map: String,
    },
    /// To the address that a map has, if it has one; ends the hook.
    Destination {
        family: Family,
        fields: Vec<Field>,
        map: String,
    },
    /// To one of several, in turn or by the source's hash; ends the hook.
    Balance {
        family: Family,
        by_source: bool,
        shares: Vec<Share>,
    },
    /// From the address that a map has, if it has one; ends the hook.
    Source {
        family: Family,
        fields: Vec<Field>,
        map: String,
    },
    /// From this address; ends the hook.
    From(IpAddr),
    /// From an address of the link that it leaves by; ends the hook.
    Masquerade,
    Mark(u32),
    /// These rules let its connection through.
    Remember,
    /// Others of its connection may take the [fast path](super::super::fast_path).
    MayBeNoted,
    /// Who opens a TCP connection takes segments of at most so many bytes.
    Segments(u32),
    Count(String),
    /// Told to whoever follows the network's flows, with these words.
    Tell(String),
    Untracked,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub tests: Vec<Test>,
    pub acts: Vec<Act>,
}

impl Rule {
    pub fn new(tests: impl Into<Vec<Test>>, acts: impl Into<Vec<Act>>) -> Self {
        Self { tests: tests.into(), acts: acts.into() }
    }

    pub fn then(tests: impl Into<Vec<Test>>, verdict: Verdict) -> Self {
        Self::new(tests, [Act::Then(verdict)])
    }

    pub fn by_map(tests: impl Into<Vec<Test>>, fields: impl Into<Vec<Field>>, map: impl Into<String>) -> Self {
        Self::new(tests, [Act::ByMap { fields: fields.into(), map: map.into() }])
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// Where the kernel begins. Every one lets pass what its rules don't decide: a chain that drops by itself would do so also
/// while it is being put in the place of another, before its rules count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub hook: Hook,
    /// Changes addresses: looks at the first packet of a connection only.
    pub nat: bool,
    /// Before connections are known.
    pub raw: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

/// All rules of one namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    pub name: String,
    pub counters: BTreeSet<String>,
    /// Links' rates, by name.
    pub meters: BTreeSet<&'static str>,
    pub sets: BTreeMap<String, Set>,
    pub maps: BTreeMap<String, Map>,
    /// In the order in which they were made: those that are named come before those that name them.
    pub chains: Vec<(String, Chain)>,
    /// Refusals are told.
    pub tells: bool,
    /// Of what else decides which way packets go: where it differs, nothing is known from before.
    pub salt: u64,
    shared: BTreeMap<Set, String>,
}

/// Of how many refusals and new connections a second somebody is told, and how many at once.
const TOLD: (u32, u32) = (1000, 2000);

impl Table {
    pub fn new(name: impl Into<String>, tells: bool) -> Self {
        Self { name: name.into(), tells, ..Self::default() }
    }

    /// Adds a set under a name, also when it is empty.
    pub fn set(&mut self, name: impl Into<String>, fields: impl Into<Vec<Field>>, elements: BTreeSet<Key>) {
        self.sets.insert(name.into(), Set { fields: fields.into(), elements });
    }

    /// The name of a set with these elements; those that hold the same are one.
    pub fn shared(&mut self, fields: impl Into<Vec<Field>>, elements: BTreeSet<Key>) -> String {
        let set = Set { fields: fields.into(), elements };
        if let Some(name) = self.shared.get(&set) {
            return name.clone();
        }
        let name = format!("s{}", self.shared.len());
        self.shared.insert(set.clone(), name.clone());
        self.sets.insert(name.clone(), set);
        name
    }

    pub fn map(
        &mut self,
        name: impl Into<String>,
        fields: impl Into<Vec<Field>>,
        to: MapTo,
        elements: BTreeMap<Key, Target>,
    ) {
        self.maps.insert(name.into(), Map { fields: fields.into(), to, elements });
    }

    pub fn chain(&mut self, name: impl Into<String>, rules: Vec<Rule>) {
        self.chains.push((name.into(), Chain { base: None, rules }));
    }

    pub fn base(&mut self, name: &str, base: Base, rules: Vec<Rule>) {
        self.chains.push((name.to_owned(), Chain { base: Some(base), rules }));
    }

    pub fn chain_of(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|(n, _)| n == name).map(|(_, c)| c)
    }

    /// A refusal that is counted under its reason.
    pub fn refuse(&mut self, reason: &str) -> Verdict {
        let name = format!("drop_{reason}");
        if self.counters.insert(name.clone()) {
            let mut rules = Vec::new();
            if self.tells {
                rules.push(told(&format!("drop {reason}")));
            }
            rules.push(Rule::new([], [Act::Count(name.clone()), Act::Then(Verdict::Drop)]));
            self.chain(name.clone(), rules);
        }
        Verdict::Goto(name)
    }

    /// A test that holds for a link which sends more than that.
    pub fn flood(&mut self, meter: &'static str, rate: u32, burst: u32) -> Test {
        self.meters.insert(meter);
        Test::Flood { meter, rate, burst }
    }
}

/// Tells of a packet, as long as there are not too many.
pub fn told(words: &str) -> Rule {
    Rule::new([Test::Seldom { rate: TOLD.0, burst: TOLD.1 }], [Act::Tell(words.to_owned())])
}
