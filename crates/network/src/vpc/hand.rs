//! The hand that brings one namespace's state to what is wanted, by difference: what is right is not touched, and what is
//! somebody else's is not seen.
//!
//! The same code only looks when it is asked to check: each change that it would make is then a sentence instead.
//!
//! What is missing is added before anything is removed, and when an addition fails nothing is removed: what worked goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::filter::difference;
use crate::firewall::nft;
use crate::netlink::{Forward, Limit, LinkAddress, Neighbour, Netlink, Policy, RouteKind, RouteState};
use crate::netns::sysctl;
use crate::{NetError, fnv};

/// What is to be done about differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Apply,
    Check,
}

/// Makes all changes after so many fail, as if the process had ended there: tests of what a crash leaves.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults(Option<Arc<AtomicI64>>);

impl Faults {
    pub fn after(steps: Arc<AtomicI64>) -> Self {
        Self(Some(steps))
    }

    fn step(&self) -> Result<(), NetError> {
        match &self.0 {
            Some(left) if left.fetch_sub(1, Ordering::SeqCst) <= 0 => Err(NetError::Kernel {
                attempt: "a step that a test lets fail".into(),
                source: io::Error::other("told to"),
            }),
            _ => Ok(()),
        }
    }
}

/// Whether others' routes to the same destination are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    Replaced,
    LeftAlone,
}

/// In which way a host is not as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub what: String,
    /// Whether it ends when all is set again; it does not where the machine's operator has to do something.
    pub mends: bool,
}

/// The chains of a text by their tables, as `nft` writes and reads it.
fn chains(text: &str) -> BTreeSet<(&str, &str)> {
    let mut table = "";
    let mut chains = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        let named = |what: &str| line.strip_prefix(what)?.strip_suffix(" {");
        if let Some(name) = named("table ") {
            table = name;
        } else if let Some(name) = named("chain ") {
            chains.insert((table, name));
        }
    }
    chains
}

/// Works in the namespace in which its thread was when it was made.
pub(super) struct Hand<'a> {
    pub links: Netlink,
    pub mode: Mode,
    faults: &'a Faults,
    /// How a sentence begins: `network acme/blue`.
    about: String,
    pub changes: usize,
    pub differences: Vec<Difference>,
    /// What failed, in order.
    pub troubles: Vec<NetError>,
    /// For sentences.
    names: BTreeMap<u32, String>,
}

impl<'a> Hand<'a> {
    pub fn open(mode: Mode, faults: &'a Faults, about: String) -> Result<Self, NetError> {
        let (names, differences, troubles) = Default::default();
        Ok(Self { links: Netlink::open()?, mode, faults, about, changes: 0, differences, troubles, names })
    }

    pub fn name(&mut self, link: u32, name: &str) {
        self.names.insert(link, name.to_owned());
    }

    fn called(&self, link: u32) -> String {
        self.names.get(&link).cloned().unwrap_or_else(|| format!("link {link}"))
    }

    /// Says what is different.
    pub fn differs(&mut self, what: impl FnOnce() -> String) {
        self.says(what, true);
    }

    /// Says what is not as it should be, and nothing here can mend.
    pub fn lacks(&mut self, what: impl FnOnce() -> String) {
        self.says(what, false);
    }

    fn says(&mut self, what: impl FnOnce() -> String, mends: bool) {
        if self.mode == Mode::Check {
            let what = format!("{}: {}", self.about, what());
            self.differences.push(Difference { what, mends });
        }
    }

    /// One change that must succeed before anything else is done. The answer is whether it was made, which it is not when
    /// only looking.
    pub fn must(
        &mut self,
        what: impl FnOnce() -> String,
        act: impl FnOnce(&mut Netlink) -> Result<(), NetError>,
    ) -> Result<bool, NetError> {
        if self.mode == Mode::Check {
            self.differs(what);
            return Ok(false);
        }
        self.faults.step()?;
        self.changes += 1;
        act(&mut self.links).map(|()| true)
    }

    /// One change without which the others go on.
    pub fn step(
        &mut self,
        what: impl FnOnce() -> String,
        act: impl FnOnce(&mut Netlink) -> Result<(), NetError>,
    ) -> bool {
        self.must(what, act).unwrap_or_else(|e| {
            self.troubles.push(e);
            false
        })
    }

    /// A value under /proc/sys/net. One that the kernel has not is left.
    pub fn sysctl(&mut self, key: &str, value: &str) -> Result<(), NetError> {
        match fs::read_to_string(Path::new("/proc/sys/net").join(key)) {
            Ok(now) if now.trim() == value => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            _ => self.must(|| format!("the setting {key} is not {value}"), |_| sysctl(key, value)).map(drop),
        }
    }

    /// A packet filter: these tables, all in one transaction. An empty chain in each, named after the text, tells later
    /// which text stands; the same is not loaded again, so that counters go on. If the text `before` stands, what differs
    /// from it is enough. The answer is whether it was set.
    pub fn filter(&mut self, text: &str, before: Option<&str>) -> Result<bool, NetError> {
        let mark = |text: &str| format!("of_{:016x}", fnv(text.as_bytes()));
        let tables: BTreeSet<&str> =
            text.lines().filter_map(|l| l.strip_prefix("table ")?.strip_suffix(" {")).collect();
        let there = nft("looking at a network's packet filter", &["list", "chains"], "")?;
        // A chain at a link's ingress may have gone with its link.
        let found = chains(&there);
        let stands = |text: &str| {
            let marks = tables.iter().map(|table| (*table, mark(text)));
            let mut marks = marks.map(|(table, mark)| found.contains(&(table, &*mark)));
            marks.all(|stands| stands) && chains(text).is_subset(&found)
        };
        let new = mark(text);
        if stands(text) {
            return Ok(false);
        }
        let marked = |mut script: String| {
            for table in &tables {
                script += &format!("table {table} {{\n chain {new} {{ }}\n}}\n");
            }
            script
        };
        let small = before.filter(|before| stands(before)).and_then(|before| {
            let gone = |table: &&str| format!("delete chain {table} {}\n", mark(before));
            Some(marked(difference(before, text)? + &tables.iter().map(gone).collect::<String>()))
        });
        let load = |script: &str| nft("setting a network's packet filter", &["-f", "-"], script).map(drop);
        let set = |_: &mut Netlink| match small.as_deref().map(load) {
            Some(Ok(())) => Ok(()),
            // Somebody else was at it: all of it is put right.
            Some(Err(_)) | None => load(&marked(text.to_owned())),
        };
        self.must(|| "the packet filter is not the one that is to be".into(), set)
    }

    fn removable(&self, troubles: usize) -> bool {
        self.troubles.len() == troubles
    }

    /// Our addresses.
    pub fn addresses(&mut self, wanted: &BTreeSet<LinkAddress>) -> Result<(), NetError> {
        let before = self.troubles.len();
        let all = self.links.addresses()?;
        let there: BTreeSet<LinkAddress> = all.iter().map(|(a, _)| *a).collect();
        for &a in wanted.difference(&there) {
            let called = self.called(a.link);
            self.step(|| format!("{called} has not {}/{}", a.address, a.length), |l| l.put_address(a));
        }
        for &(a, _) in all.iter().filter(|(a, ours)| *ours && !wanted.contains(a)) {
            if self.removable(before) {
                let called = self.called(a.link);
                self.step(|| format!("{called} has {}/{} unasked", a.address, a.length), |l| l.take_address(a));
            }
        }
        Ok(())
    }

    /// Our permanent neighbour entries.
    pub fn neighbours(&mut self, wanted: &BTreeSet<Neighbour>) -> Result<(), NetError> {
        let before = self.troubles.len();
        let there: BTreeSet<Neighbour> = self.links.neighbours()?.into_iter().collect();
        for &n in wanted.difference(&there) {
            let called = self.called(n.link);
            self.step(|| format!("the neighbour {} of {called} is not known", n.address), |l| l.put_neighbour(n));
        }
        let keys: BTreeSet<(u32, IpAddr)> = wanted.iter().map(|n| (n.link, n.address)).collect();
        for &n in there.iter().filter(|n| !keys.contains(&(n.link, n.address))) {
            if self.removable(before) {
                let called = self.called(n.link);
                self.step(|| format!("the neighbour {} of {called} is gone", n.address), |l| l.take_neighbour(n));
            }
        }
        Ok(())
    }

    /// A tunnel's forwarding entries.
    pub fn forwards(&mut self, link: u32, wanted: &BTreeSet<Forward>) -> Result<(), NetError> {
        let before = self.troubles.len();
        let there: BTreeSet<Forward> = self.links.forwards(link)?.into_iter().collect();
        for &f in wanted.difference(&there) {
            self.step(|| format!("the tunnel does not lead to {}", f.endpoint), |l| l.put_forward(link, f));
        }
        for &f in there.difference(wanted) {
            if self.removable(before) {
                self.step(|| format!("the tunnel leads to {} still", f.endpoint), |l| l.take_forward(link, f));
            }
        }
        Ok(())
    }

    /// Our routes: these, and with `remove` no others.
    pub fn routes(&mut self, wanted: &[RouteState], others: Others, remove: bool) -> Result<(), NetError> {
        let before = self.troubles.len();
        let key = |r: &RouteState| (r.table, r.to, r.length);
        let wanted: BTreeMap<_, RouteState> = wanted.iter().map(|r| (key(r), *r)).collect();
        let mut ours: BTreeMap<_, RouteState> = BTreeMap::new();
        let mut foreign = BTreeSet::new();
        for (route, own) in self.links.route_states()? {
            if own {
                ours.insert(key(&route), route);
            } else {
                foreign.insert(key(&route));
            }
        }
        for (key, route) in &wanted {
            if ours.get(key) == Some(route) {
                continue;
            }
            let replace = ours.contains_key(key) || (others == Others::Replaced && foreign.contains(key));
            let what = || format!("the route {} is missing", self.told(route));
            let what = if self.mode == Mode::Check { what() } else { String::new() };
            self.step(|| what, |l| l.put_route(route, replace));
        }
        if remove && self.removable(before) {
            for (_, route) in ours.iter().filter(|(k, _)| !wanted.contains_key(k)) {
                let what = if self.mode == Mode::Check { self.told(route) } else { String::new() };
                self.step(|| format!("there is a route {what} unasked"), |l| l.take_route(route));
            }
        }
        Ok(())
    }

    fn told(&self, route: &RouteState) -> String {
        let to = format!("to {}/{} in table {}", route.to, route.length, route.table);
        match route.kind {
            RouteKind::Unicast { link, via: Some(via), .. } => format!("{to} via {via} by {}", self.called(link)),
            RouteKind::Unicast { link, .. } => format!("{to} by {}", self.called(link)),
            _ => format!("{to} that leads nowhere"),
        }
    }

    /// Our rules about routing tables.
    pub fn policies(&mut self, wanted: &BTreeSet<Policy>) -> Result<(), NetError> {
        let before = self.troubles.len();
        let there: BTreeSet<Policy> = self.links.policies()?.into_iter().collect();
        for p in wanted.difference(&there) {
            self.step(|| format!("the routing rule {p} is missing"), |l| l.put_policy(p));
        }
        for p in there.difference(wanted) {
            if self.removable(before) {
                self.step(|| format!("there is a routing rule {p} unasked"), |l| l.take_policy(p));
            }
        }
        Ok(())
    }

    /// That this link, and no other, is shared out: control before tenants.
    pub fn share(&mut self, wanted: Option<(u32, Limit)>) -> Result<(), NetError> {
        let there = self.links.shares()?;
        if let Some((link, whole)) = wanted
            && !there.contains(&(link, Some(whole)))
        {
            let called = self.called(link);
            if self.links.has_foreign_queue(link)? {
                self.lacks(|| {
                    format!("{called} has a queue of somebody else's, so control does not go before tenants")
                });
            } else {
                let anew = there.iter().any(|(l, _)| *l == link);
                let share = |l: &mut Netlink| {
                    if anew {
                        l.take_limit(link)?;
                    }
                    l.put_share(link, whole)
                };
                self.step(|| format!("on {called} control does not go before tenants"), share);
            }
        }
        for (link, _) in there.into_iter().filter(|(link, _)| wanted.is_none_or(|(w, _)| w != *link)) {
            let called = self.called(link);
            self.step(|| format!("{called} is shared out unasked"), |l| l.take_limit(link));
        }
        Ok(())
    }

    /// Our rate limits.
    pub fn limits(&mut self, wanted: &BTreeMap<u32, Limit>) -> Result<(), NetError> {
        let there: BTreeMap<u32, Limit> = self.links.limits()?.into_iter().collect();
        for (&link, &limit) in wanted {
            if there.get(&link) != Some(&limit) {
                let called = self.called(link);
                self.step(
                    || format!("{called} is not limited to {} bits a second", limit.bits()),
                    |l| l.put_limit(link, limit),
                );
            }
        }
        for &link in there.keys().filter(|l| !wanted.contains_key(l)) {
            let called = self.called(link);
            self.step(|| format!("{called} is limited unasked"), |l| l.take_limit(link));
        }
        Ok(())
    }
}
