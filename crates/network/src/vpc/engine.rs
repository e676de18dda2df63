//! Brings a host to what [`HostNetworks`] say of it, from whatever state it is in.
//!
//! In this order: the host's packet filter; networks that are no more; then for each network its namespace with its packet
//! filter, links to peered networks, all else, and its fast path; then instances' sides of NICs; then the host's way to
//! outside. So no link comes up unfiltered, and nothing leads to what is not ready.
//!
//! Each network is done on a thread of its own: one that fails stops no other. Everything is known again by its name after a
//! crash, and only differences are written: what stands is not touched, so that connections go on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nexus_model::Uid;
use nexus_model::plan::{HostNetworks, NetworkPlan};

use super::hand::{Difference, Faults, Hand, Mode};
use super::network::{self, Outcome, Site};
use super::want::{NetworkWant, NicWant};
use super::{fast_path, inside, outside, rules};
use crate::firewall::{Net, nft};
use crate::netlink::Netlink;
use crate::netns::{NetnsRef, aside, enter, is_netns};
use crate::{Attempt, InstanceNet, NetError};

/// The table of the packet filter in the host's namespace.
const HOST_TABLE: &str = "inet nexus-vpc";
/// Networks that are worked on at once: the kernel does most of it one by one.
const AT_ONCE: usize = 8;

/// Tenants' networks on one host. Cloning is cheap. It holds no state that the kernel does not, but for what makes the next change
/// small.
#[derive(Clone)]
pub struct Engine {
    own: Arc<Own>,
}

struct Own {
    dir: PathBuf,
    instances: InstanceNet,
    host: NetnsRef,
    faults: Faults,
    /// What the link with the host's endpoint sends, in bits a second, if it is ours to share out.
    uplink_rate: Option<u64>,
    /// One at a time, also when a caller has stopped waiting. The instances that had NICs last time; unknown at first.
    had: Mutex<Option<BTreeSet<Uid>>>,
    /// The packet filters and fast paths that were asked for last: whether they stand, the kernel says.
    filters: Texts,
    fast_paths: Texts,
}

/// What is done for one network after another has been done for all.
type Stage<'a> = dyn Fn(&Site<'_>, &NetworkWant, &mut Outcome) -> Result<(), NetError> + Sync + 'a;

/// By network.
type Texts = Mutex<BTreeMap<Uid, String>>;

fn locked(texts: &Texts) -> MutexGuard<'_, BTreeMap<Uid, String>> {
    texts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// NICs that stand, each with its instance.
    pub plugged: BTreeSet<(Uid, Uid)>,
    /// NICs whose instance has no namespace yet: they are plugged in by the next [`Engine::apply`] after it has.
    pub waiting: BTreeSet<(Uid, Uid)>,
    /// NICs that could not be plugged in, and why.
    pub troubles: BTreeMap<Uid, String>,
    /// Networks of which something failed, and what.
    pub networks: BTreeMap<Uid, String>,
    /// How much was written to the kernel: nothing, when all was right.
    pub changes: usize,
}

#[derive(Default)]
struct Report {
    applied: Applied,
    differences: Vec<Difference>,
}

impl Engine {
    /// `dir` is for the files by which networks' namespaces are found, and for nothing else.
    pub fn new(dir: impl Into<PathBuf>, instances: InstanceNet, host: NetnsRef) -> Self {
        Self::with(dir.into(), instances, host, Faults::default(), None)
    }

    /// The same on a host whose link to others sends so many bits a second: on it the cloud's own traffic goes before tenants',
    /// when not all of it fits.
    pub fn with_uplink(dir: impl Into<PathBuf>, instances: InstanceNet, host: NetnsRef, rate: Option<u64>) -> Self {
        Self::with(dir.into(), instances, host, Faults::default(), rate)
    }

    /// An engine all of whose changes fail once this count is used up.
    #[doc(hidden)]
    pub fn failing(dir: impl Into<PathBuf>, instances: InstanceNet, host: NetnsRef, after: Arc<AtomicI64>) -> Self {
        Self::with(dir.into(), instances, host, Faults::after(after), None)
    }

    fn with(dir: PathBuf, instances: InstanceNet, host: NetnsRef, faults: Faults, uplink_rate: Option<u64>) -> Self {
        Self {
            own: Arc::new(Own {
                dir,
                instances,
                host,
                faults,
                uplink_rate,
                had: Mutex::new(None),
                filters: Texts::default(),
                fast_paths: Texts::default(),
            }),
        }
    }

    /// Where a network's namespace is, made or not.
    pub fn namespace(&self, network: Uid) -> PathBuf {
        self.own.dir.join(network.to_string())
    }

    /// Makes it so. `closed` is what no tenant reaches outside. An error means that nothing could be done; what fails for
    /// one network or NIC is told in the answer. Goes on to its end when the caller stops waiting.
    pub async fn apply(&self, wanted: Arc<HostNetworks>, closed: Vec<Net>) -> Result<Applied, NetError> {
        self.aside(move |own| own.work(Mode::Apply, &wanted, &closed)).await.map(|r| r.applied)
    }

    /// What is not as it should be, each in a sentence; nothing is changed. Of a NIC that waits nothing is said.
    pub async fn check(&self, wanted: Arc<HostNetworks>, closed: Vec<Net>) -> Result<Vec<Difference>, NetError> {
        let report = self.aside(move |own| own.work(Mode::Check, &wanted, &closed)).await?;
        let troubles = report.applied.networks.values();
        let troubles = troubles.map(|t| Difference { what: format!("could not be looked at: {t}"), mends: true });
        Ok(report.differences.into_iter().chain(troubles).collect())
    }

    /// Removes all of ours, whatever it is of, and nothing else.
    pub async fn remove(&self) -> Result<(), NetError> {
        self.aside(Own::clear).await
    }

    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Own) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let own = self.own.clone();
        aside(self.own.host.clone(), "tenants' networks", move || work(&own)).await
    }
}

impl Own {
    fn work(&self, mode: Mode, wanted: &HostNetworks, closed: &[Net]) -> Result<Report, NetError> {
        let mut had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
        let mut report = Report::default();
        let instance = |uid: Uid| self.instances.path(&uid.to_string());
        let site = Site { mode, faults: &self.faults, dir: &self.dir, instance: &instance };

        let mut host = Hand::open(mode, &self.faults, "the host".into())?;
        let shared = if self.uplink_rate.is_some() { rules::shared_text() } else { String::new() };
        host.filter(&(rules::host_text(wanted, closed) + &shared), None)?;

        let wants: Vec<NetworkWant> = wanted.networks.iter().map(|n| NetworkWant::of(wanted, n)).collect();
        let there = networks(&self.dir)?;
        let gone: Vec<Uid> = there.into_iter().filter(|u| !wants.iter().any(|w| w.uid == *u)).collect();
        for (uid, outcome) in gone.iter().zip(each(&gone, |uid, out| network::remove(&site, *uid, out))) {
            report.take(*uid, &outcome);
        }

        let plans: Vec<(&NetworkWant, &NetworkPlan)> =
            wants.iter().zip(wanted.networks.iter().map(AsRef::as_ref)).collect();
        let before = std::mem::take(&mut *locked(&self.filters));
        let mut outcomes = each(&plans, |(want, plan), out| {
            let (text, before) = (rules::network_text(wanted, plan), before.get(&want.uid));
            network::prepare(&site, want, (&text, before.map(String::as_str)), out)?;
            locked(&self.filters).insert(want.uid, text);
            Ok(())
        });
        let before = std::mem::take(&mut *locked(&self.fast_paths));
        let hasten = |site: &Site<'_>, want: &NetworkWant, out: &mut Outcome| {
            let generation = locked(&self.filters).get(&want.uid).map(|rules| fast_path::generation(rules).to_owned());
            let Some(generation) = generation else { return Ok(()) };
            let before = before.get(&want.uid).map(String::as_str);
            let text = network::hasten(site, want, (&generation, before), out)?;
            locked(&self.fast_paths).extend(text.map(|text| (want.uid, text)));
            Ok(())
        };
        let stages: [&Stage; 3] = [&network::join, &network::complete, &hasten];
        for stage in stages {
            // A network without its packet filter gets no links.
            let well: Vec<usize> = (0..wants.len()).filter(|i| !outcomes[*i].given_up).collect();
            let next = each(&well, |i, out| stage(&site, &wants[*i], out));
            for (i, next) in well.into_iter().zip(next) {
                outcomes[i].add(next);
            }
        }
        self.inside(mode, &wants, &mut outcomes, &mut had, &mut report)?;
        for (want, outcome) in wants.iter().zip(&outcomes) {
            report.take(want.uid, outcome);
            report.nics(want, outcome);
        }

        outside::settle(&mut host, &self.dir, Some(wanted.endpoint), self.uplink_rate, &wants)?;
        report.differences.append(&mut host.differences);
        report.applied.changes += host.changes;
        match host.troubles.into_iter().next() {
            Some(trouble) => Err(trouble),
            None => Ok(report),
        }
    }

    /// The instances' sides of NICs, also of those that have none any more.
    fn inside(
        &self,
        mode: Mode,
        wants: &[NetworkWant],
        outcomes: &mut [Outcome],
        had: &mut Option<BTreeSet<Uid>>,
        report: &mut Report,
    ) -> Result<(), NetError> {
        let mut nics: BTreeMap<Uid, Vec<&NicWant>> = BTreeMap::new();
        for (want, outcome) in wants.iter().zip(&*outcomes) {
            for nic in want.nics.iter().filter(|n| outcome.linked.contains(&n.uid)) {
                nics.entry(nic.instance).or_default().push(nic);
            }
        }
        let before = match &had {
            Some(had) => had.clone(),
            // Somebody else was before us.
            None => self.all_instances()?,
        };
        let mut all: Vec<(Uid, Vec<&NicWant>)> =
            before.iter().filter(|i| !nics.contains_key(i)).map(|i| (*i, Vec::new())).collect();
        let now: BTreeSet<Uid> = nics.keys().copied().collect();
        all.extend(nics);
        let results = each_of(&all, |some| {
            let host = NetnsRef::Own.open()?;
            let mut results = Vec::with_capacity(some.len());
            for (uid, nics) in some {
                results.push(self.one_inside(mode, *uid, nics));
                enter(&host)?;
            }
            Ok(results)
        });
        let mut failed = BTreeSet::new();
        for ((uid, nics), result) in all.iter().zip(results) {
            match result {
                Ok((changes, differences, missing)) => {
                    report.applied.changes += changes;
                    report.differences.extend(differences);
                    for outcome in &mut *outcomes {
                        for nic in missing.iter().filter(|n| outcome.linked.contains(n)) {
                            outcome.nics.insert(*nic, "its link is not in its instance".into());
                        }
                    }
                }
                Err(e) => {
                    failed.insert(*uid);
                    let of = |o: &Outcome| nics.iter().filter(|n| o.linked.contains(&n.uid)).map(|n| n.uid).collect();
                    for outcome in &mut *outcomes {
                        let mine: Vec<Uid> = of(outcome);
                        outcome.nics.extend(mine.into_iter().map(|n| (n, e.clone())));
                    }
                }
            }
        }
        if mode == Mode::Apply {
            *had = Some(now.into_iter().chain(failed).collect());
        }
        Ok(())
    }

    /// One instance's side: what was changed, what differs, and which NICs are not there.
    fn one_inside(&self, mode: Mode, uid: Uid, nics: &[&NicWant]) -> Inside {
        let path = self.instances.path(&uid.to_string());
        let work = || {
            if !is_netns(&path) {
                return Ok(Default::default());
            }
            enter(&NetnsRef::Path(path.clone()).open()?)?;
            let mut hand = Hand::open(mode, &self.faults, format!("instance {uid}"))?;
            let missing = inside::settle(&mut hand, nics)?;
            match hand.troubles.into_iter().next() {
                Some(trouble) => Err(trouble),
                None => Ok((hand.changes, hand.differences, missing)),
            }
        };
        work().map_err(|e: NetError| e.to_string())
    }

    /// Every instance here that has a namespace.
    fn all_instances(&self) -> Result<BTreeSet<Uid>, NetError> {
        let folder = self.instances.path("x");
        let dir = folder.parent().unwrap_or(Path::new("/"));
        networks(dir)
    }

    fn clear(&self) -> Result<(), NetError> {
        let mut had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
        let instance = |uid: Uid| self.instances.path(&uid.to_string());
        let site = Site { mode: Mode::Apply, faults: &self.faults, dir: &self.dir, instance: &instance };
        let mut first: Option<NetError> = None;
        let gone: Vec<Uid> = networks(&self.dir)?.into_iter().collect();
        let mut report = Report::default();
        for (uid, outcome) in gone.iter().zip(each(&gone, |uid, out| network::remove(&site, *uid, out))) {
            report.take(*uid, &outcome);
        }
        *had = None;
        self.inside(Mode::Apply, &[], &mut [], &mut had, &mut report)?;
        let mut host = Hand::open(Mode::Apply, &self.faults, "the host".into())?;
        outside::settle(&mut host, &self.dir, None, None, &[])?;
        first = first.or(host.troubles.into_iter().next());
        if let Some((uid, trouble)) = report.applied.networks.into_iter().next() {
            let failed: Result<(), io::Error> = Err(io::Error::other(trouble));
            first = first.or(failed.attempt(|| format!("removing the network {uid}")).err());
        }
        // While a link is left it stays filtered.
        if first.is_none() && !outside::left(&mut Netlink::open()?)? {
            let text = format!("table {HOST_TABLE}\ndelete table {HOST_TABLE}\n");
            nft("removing the packet filter of tenants' networks", &["-f", "-"], &text)?;
            match fs::remove_dir(&self.dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound && e.kind() != io::ErrorKind::DirectoryNotEmpty => {
                    Err(e).attempt(|| format!("removing {}", self.dir.display()))?;
                }
                _ => {}
            }
        }
        first.map_or(Ok(()), Err)
    }
}

/// Changes, differences, missing NICs; or what failed.
type Inside = Result<(usize, Vec<Difference>, Vec<Uid>), String>;

impl Report {
    fn take(&mut self, network: Uid, outcome: &Outcome) {
        self.applied.changes += outcome.changes;
        self.differences.extend(outcome.differences.iter().cloned());
        if let Some(trouble) = &outcome.trouble {
            self.applied.networks.insert(network, trouble.clone());
        }
    }

    fn nics(&mut self, want: &NetworkWant, outcome: &Outcome) {
        for nic in &want.nics {
            let pair = (nic.uid, nic.instance);
            if let Some(trouble) = outcome.nics.get(&nic.uid) {
                self.applied.troubles.insert(nic.uid, trouble.clone());
            } else if outcome.linked.contains(&nic.uid) {
                self.applied.plugged.insert(pair);
            } else if outcome.waiting.contains(&nic.uid) {
                self.applied.waiting.insert(pair);
            } else if let Some(trouble) = &outcome.trouble {
                self.applied.troubles.insert(nic.uid, trouble.clone());
            }
        }
    }
}

impl Outcome {
    fn add(&mut self, next: Self) {
        self.changes += next.changes;
        self.differences.extend(next.differences);
        self.linked.extend(next.linked);
        self.waiting.extend(next.waiting);
        self.nics.extend(next.nics);
        self.trouble = self.trouble.take().or(next.trouble);
        self.given_up |= next.given_up;
    }
}

/// The ids by which files in a folder are named.
fn networks(dir: &Path) -> Result<BTreeSet<Uid>, NetError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        other => other.attempt(|| format!("listing {}", dir.display()))?,
    };
    Ok(entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Does the same for each, on a thread each that begins where this one is.
fn each<T: Sync>(all: &[T], work: impl Fn(&T, &mut Outcome) -> Result<(), NetError> + Sync) -> Vec<Outcome> {
    let one = |item: &T| {
        let mut out = Outcome::default();
        if let Err(e) = work(item, &mut out) {
            out.trouble = Some(e.to_string());
            out.given_up = true;
        }
        out
    };
    let mut outcomes = Vec::with_capacity(all.len());
    for some in all.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|item| thread(scope, || one(item))).collect();
            for thread in threads {
                let trouble = Some("its thread was lost".to_owned());
                let lost = || Outcome { trouble, given_up: true, ..Outcome::default() };
                outcomes.push(thread.and_then(|t| t.join().ok()).unwrap_or_else(lost));
            }
        });
    }
    outcomes
}

/// Does the same for each of many small things, on a few threads.
fn each_of<T: Sync>(all: &[T], work: impl Fn(&[T]) -> Result<Vec<Inside>, NetError> + Sync) -> Vec<Inside> {
    let mut results = Vec::with_capacity(all.len());
    std::thread::scope(|scope| {
        let share = all.len().div_ceil(AT_ONCE).max(16);
        let threads: Vec<_> = all.chunks(share).map(|some| (some.len(), thread(scope, || work(some)))).collect();
        for (count, thread) in threads {
            let lost = NetError::Thread("instances' networks".into());
            let result = thread.and_then(|t| t.join().ok()).unwrap_or(Err(lost));
            let failed = |e: NetError| vec![Err(e.to_string()); count];
            results.extend(result.unwrap_or_else(failed));
        }
    });
    results
}

fn thread<'scope, 'env, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, 'env>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Option<std::thread::ScopedJoinHandle<'scope, T>> {
    std::thread::Builder::new().name("netns".into()).stack_size(512 << 10).spawn_scoped(scope, work).ok()
}
