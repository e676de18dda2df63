//! Which targets of balancers answer this host.
//!
//! Every host asks by itself, from the network's namespace and so by the way that its own clients' connections take: what it finds
//! needs no server and no other host. So many failures in a row take a target out of this host's table, so many successes bring
//! it back; when none of a listener's targets answers all are used. A target is in until it is found failing, and what was found
//! is kept over a restart of the agent.
//!
//! [`Health`] decides and knows no clock; [`ask`] sends.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_model::Uid;
use nexus_model::kind::{BalancerCheck, ExpectedAnswer};
use nexus_model::plan::{
    BalancedProtocol, FailingTarget, HostNetworks, ListenerPlan, MAX_FAILING, MAX_FAILING_WHY, NetworkPlan,
    ProxyProtocol, TargetPlan,
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{links, relay};
use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError, fnv};

/// An answer's first line is short; the rest is not read.
const MAX_HEAD: usize = 1024;

/// What is asked: an address, a port and how, whatever number of listeners leads there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    pub network: Uid,
    pub address: IpAddr,
    pub port: u16,
    pub check: BalancerCheck,
    /// The target expects to be told first who its client is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyProtocol>,
}

impl Asked {
    fn of(network: Uid, target: &TargetPlan, listener: &ListenerPlan, check: &BalancerCheck) -> Self {
        let port = check.port.unwrap_or(target.port);
        let proxy = listener.proxy_protocol.filter(|_| check.port.is_none());
        Self { network, address: target.address, port, check: check.clone(), proxy }
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(self.check.interval_seconds.max(1).into())
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.check.timeout_seconds.max(1).into())
    }
}

/// Those that do not answer, and why.
pub type Failing = BTreeMap<Asked, String>;

/// What was found so far, and what is to be asked when.
#[derive(Debug, Default)]
pub struct Health {
    targets: BTreeMap<Asked, State>,
}

#[derive(Debug, Clone)]
struct State {
    /// Why it is out, if it is.
    out: Option<String>,
    /// Answers in a row that say otherwise.
    streak: u32,
    due: Instant,
    asked: bool,
}

impl Health {
    /// Goes on from what was found before.
    pub fn resumed(failing: Failing, now: Instant) -> Self {
        let state = |why| State { out: Some(why), streak: 0, due: now, asked: false };
        Self { targets: failing.into_iter().map(|(asked, why)| (asked, state(why))).collect() }
    }

    /// Asks from now on what these networks say. Hosts begin at different times, each at the same within every interval. Answers
    /// whether any of those that are not asked any more was out.
    pub fn follow(&mut self, told: &HostNetworks, now: Instant) -> bool {
        let wanted = asked(told);
        let before = self.targets.len();
        let mut out = false;
        self.targets.retain(|asked, state| {
            let stays = wanted.contains(asked);
            out |= !stays && state.out.is_some();
            stays
        });
        if before == wanted.len() && self.targets.len() == before {
            return out;
        }
        for asked in wanted {
            self.targets.entry(asked).or_insert_with_key(|asked| {
                let share = fnv(format!("{} {asked:?}", told.host).as_bytes()) % 1024;
                let due = now + asked.interval() * share as u32 / 1024;
                State { out: None, streak: 0, due, asked: false }
            });
        }
        out
    }

    /// Those whose time has come, the longest overdue of each network first, at most so many. Of `at_once`, which may be asked
    /// together, each network has an equal share: one whose targets keep silent takes no other's turn.
    pub fn due(&mut self, now: Instant, most: usize, at_once: usize) -> Vec<Asked> {
        let mut networks: BTreeMap<Uid, (usize, Vec<(Instant, Asked)>)> = BTreeMap::new();
        for (asked, state) in &self.targets {
            let (busy, due) = networks.entry(asked.network).or_default();
            if state.asked {
                *busy += 1;
            } else if state.due <= now {
                due.push((state.due, asked.clone()));
            }
        }
        let share = (at_once / networks.len().max(1)).max(1);
        let mut turns = Vec::new();
        for (busy, mut due) in networks.into_values() {
            due.sort();
            due.truncate(share.saturating_sub(busy));
            turns.extend(due.into_iter().enumerate().map(|(n, (at, asked))| (n, at, asked)));
        }
        turns.sort();
        turns.truncate(most);
        for (.., asked) in &turns {
            if let Some(state) = self.targets.get_mut(asked) {
                (state.asked, state.due) = (true, now + asked.interval());
            }
        }
        turns.into_iter().map(|(.., asked)| asked).collect()
    }

    /// When there is next something to ask.
    pub fn next(&self) -> Option<Instant> {
        self.targets.values().filter(|s| !s.asked).map(|s| s.due).min()
    }

    /// What came of asking; nothing, if it could not be asked. Answers whether the target is in or out now and was not before.
    pub fn found(&mut self, asked: &Asked, found: Option<Result<(), String>>) -> bool {
        let Some(state) = self.targets.get_mut(asked) else { return false };
        state.asked = false;
        let Some(found) = found else { return false };
        if found.is_ok() != state.out.is_some() {
            state.streak = 0;
            return false;
        }
        state.streak += 1;
        let needed = if found.is_ok() { asked.check.successes } else { asked.check.failures };
        if state.streak < needed {
            return false;
        }
        (state.streak, state.out) = (0, found.err());
        true
    }

    pub fn failing(&self) -> Failing {
        self.targets.iter().filter_map(|(a, s)| Some((a.clone(), s.out.clone()?))).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
}

fn checked(network: &NetworkPlan) -> impl Iterator<Item = (&ListenerPlan, &BalancerCheck)> {
    network.balancers.iter().flat_map(|b| &b.listeners).filter_map(|l| Some((l, l.check.as_ref()?)))
}

/// All that a host is to ask.
fn asked(told: &HostNetworks) -> BTreeSet<Asked> {
    let mut all = BTreeSet::new();
    for network in &told.networks {
        let alone = is_alone(told, network);
        for (listener, check) in checked(network) {
            let targets = listener.targets.iter().filter(|t| alone || t.address.is_ipv6());
            all.extend(targets.map(|target| Asked::of(network.uid, target, listener, check)));
        }
    }
    all
}

/// Whether no other host of a network asks by this one's address: then one of the two would hear nothing, and nothing is concluded.
fn is_alone(told: &HostNetworks, network: &NetworkPlan) -> bool {
    let own = links::prober(told.endpoint).0;
    // Those of a network that is peered with it ask too.
    let peers = |n: &NetworkPlan| n.uid == network.uid || network.peerings.iter().any(|p| p.network == n.uid);
    let nics = told.networks.iter().filter(|n| peers(n)).flat_map(|n| &n.nics);
    let hosts: BTreeSet<IpAddr> =
        nics.filter_map(|n| Some(n.at.as_ref()?.endpoint)).filter(|e| *e != told.endpoint).collect();
    !hosts.into_iter().any(|endpoint| links::prober(endpoint).0 == own)
}

/// The same networks, with the targets marked that do not answer.
pub fn marked(told: &Arc<HostNetworks>, failing: &Failing) -> Arc<HostNetworks> {
    let is_failing = |network: Uid, t: &TargetPlan, l: &ListenerPlan, check: &BalancerCheck| {
        failing.contains_key(&Asked::of(network, t, l, check))
    };
    let has_any = |n: &NetworkPlan| checked(n).any(|(l, c)| l.targets.iter().any(|t| is_failing(n.uid, t, l, c)));
    if failing.is_empty() || !told.networks.iter().any(|n| has_any(n)) {
        return told.clone();
    }
    let mut marked = HostNetworks::clone(told);
    for network in marked.networks.iter_mut().filter(|n| has_any(n)) {
        let uid = network.uid;
        for listener in Arc::make_mut(network).balancers.iter_mut().flat_map(|b| &mut b.listeners) {
            let Some(check) = &listener.check else { continue };
            let failing: Vec<bool> = listener.targets.iter().map(|t| is_failing(uid, t, listener, check)).collect();
            for (target, failing) in listener.targets.iter_mut().zip(failing) {
                target.failing = failing;
            }
        }
    }
    Arc::new(marked)
}

/// Which targets get no new connections from this host, and why, for those who ask servers; the first so many.
pub fn told_of(told: &HostNetworks, failing: &Failing) -> Vec<FailingTarget> {
    let mut out = BTreeSet::new();
    for network in told.networks.iter().filter(|_| !failing.is_empty()) {
        for balancer in &network.balancers {
            for listener in &balancer.listeners {
                let Some(check) = &listener.check else { continue };
                let its = listener.targets.iter().filter_map(|t| {
                    let why = failing.get(&Asked::of(network.uid, t, listener, check))?;
                    Some(FailingTarget {
                        balancer: balancer.uid,
                        port: listener.port,
                        protocol: listener.protocol,
                        target: SocketAddr::new(t.address, t.port),
                        why: why.clone(),
                    })
                });
                out.extend(its);
            }
        }
    }
    out.into_iter().take(MAX_FAILING).collect()
}

/// Which targets get no new connections from this host, and why, each in a sentence.
pub fn sentences(told: &HostNetworks, failing: &Failing) -> Vec<String> {
    let mut out = Vec::new();
    for network in &told.networks {
        for balancer in &network.balancers {
            for listener in &balancer.listeners {
                let Some(check) = &listener.check else { continue };
                let why = |t: &TargetPlan| failing.get(&Asked::of(network.uid, t, listener, check));
                let protocol = match listener.protocol {
                    BalancedProtocol::Tcp => "tcp",
                    BalancedProtocol::Udp => "udp",
                };
                let all = listener.targets.iter().all(|t| why(t).is_some());
                let rest = if all { ", nor does any other, so all are used" } else { "" };
                let about =
                    format!("load balancer {}/{}, {protocol} {}", network.project, balancer.name, listener.port);
                let sentence = |(at, why): (SocketAddr, &String)| format!("{about}: {at} fails its check: {why}{rest}");
                let its = listener.targets.iter().filter_map(|t| Some((SocketAddr::new(t.address, t.port), why(t)?)));
                out.extend(its.map(sentence));
            }
        }
    }
    out
}

/// What was asked and what came of it; nothing, if it could not be asked for reasons of this host.
pub type Found = (Asked, Option<Result<(), String>>);

/// Asks targets of one network from the host whose tunnels end at `endpoint`, all at once, and tells of each as soon as it is known.
pub async fn ask(netns: NetnsRef, endpoint: IpAddr, targets: Vec<Asked>, found: mpsc::Sender<Found>) {
    let (four, six) = links::prober(endpoint);
    let asked = targets.clone();
    let open = move || {
        let source = |to: IpAddr| if to.is_ipv4() { IpAddr::from(four) } else { six.into() };
        Ok(asked.into_iter().map(|t| open(source(t.address), t.address, t.port)).collect::<Vec<_>>())
    };
    let opened = match aside(netns, "asking targets", open).await {
        Ok(opened) => opened.into_iter().map(Some).collect(),
        Err(error) => {
            tracing::debug!(%error, "targets can't be asked");
            targets.iter().map(|_| None).collect::<Vec<_>>()
        }
    };
    let each = targets.into_iter().zip(opened).map(|(asked, opened)| {
        let found = found.clone();
        async move {
            let answer = match opened {
                Some(Ok(Ok(stream))) => Some(answers(stream, &asked).await),
                Some(Ok(Err(refused))) => Some(Err(refused.to_string())),
                Some(Err(error)) => {
                    tracing::debug!(%error, address = %asked.address, "a target can't be asked");
                    None
                }
                None => None,
            };
            // Nobody wants to know any more.
            let _ = found.send((asked, answer)).await;
        }
    });
    each.collect::<JoinSet<()>>().join_all().await;
}

/// A connection that is about to open. The outer error is this host's, the inner one the network's.
fn open(from: IpAddr, to: IpAddr, port: u16) -> Result<io::Result<std::net::TcpStream>, NetError> {
    let make = || {
        let socket = Socket::new(Domain::for_address(SocketAddr::new(from, 0)), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        // Nothing of it stays, on neither side.
        socket.set_linger(Some(Duration::ZERO))?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        Ok::<_, io::Error>(socket)
    };
    let socket = make().attempt(|| format!("asking from {from}"))?;
    match socket.connect(&SocketAddr::new(to, port).into()) {
        Err(e) if e.raw_os_error() != Some(nix::libc::EINPROGRESS) => Ok(Err(e)),
        _ => Ok(Ok(socket.into())),
    }
}

/// Whether a target answers as it should; the error says how it does not, in a clause.
async fn answers(stream: std::net::TcpStream, asked: &Asked) -> Result<(), String> {
    let limit = asked.timeout();
    let talk = async {
        let mut stream = TcpStream::from_std(stream)?;
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        if let Some(version) = asked.proxy {
            stream.write_all(&relay::nobody(version)).await?;
        }
        match &asked.check.http {
            None => Ok(Ok(())),
            Some(expected) => get(&mut stream, asked, expected).await,
        }
    };
    let why = match tokio::time::timeout(limit, talk).await {
        Ok(Ok(Ok(()))) => return Ok(()),
        Ok(Ok(Err(why))) => why,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", limit.as_secs()),
    };
    Err(why[..why.floor_char_boundary(MAX_FAILING_WHY)].to_owned())
}

async fn get(stream: &mut TcpStream, asked: &Asked, expected: &ExpectedAnswer) -> io::Result<Result<(), String>> {
    let (path, host) = (&expected.path, SocketAddr::new(asked.address, asked.port));
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: nexus-health\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.contains(&b'\n') && head.len() < MAX_HEAD {
        let mut piece = [0; 256];
        match stream.read(&mut piece).await? {
            0 => break,
            n => head.extend(&piece[..n]),
        }
    }
    let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
    let status = str::from_utf8(line).ok().filter(|l| l.starts_with("HTTP/1.")).and_then(|l| l.split(' ').nth(1));
    let Some(status) = status.and_then(|s| s.trim().parse::<u16>().ok()) else {
        return Ok(Err(format!("GET {path} is not answered in HTTP/1.1")));
    };
    let good = expected.status.map_or((200..400).contains(&status), |wanted| status == wanted);
    Ok(if good { Ok(()) } else { Err(format!("GET {path} answers {status}")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Asked {
        let network = Uid::from_random([1; 16]);
        Asked { network, address: [10, 0, 0, 2].into(), port: 80, check: BalancerCheck::default(), proxy: None }
    }

    fn health(now: Instant) -> Health {
        let state = State { out: None, streak: 0, due: now, asked: false };
        Health { targets: BTreeMap::from([(target(), state)]) }
    }

    #[test]
    fn a_target_goes_out_and_comes_back_only_after_so_many_in_a_row() {
        let now = Instant::now();
        let (mut health, target) = (health(now), target());
        let bad = || Some(Err("refused".to_owned()));
        for found in [bad(), bad(), Some(Ok(())), bad(), None, bad()] {
            assert!(!health.found(&target, found));
            assert!(health.failing().is_empty());
        }
        assert!(health.found(&target, bad()));
        assert_eq!(health.failing(), Failing::from([(target.clone(), "refused".to_owned())]));
        // What a restart goes on from.
        let mut health = Health::resumed(health.failing(), now);
        for found in [Some(Ok(())), bad(), Some(Ok(()))] {
            assert!(!health.found(&target, found));
        }
        assert!(health.found(&target, Some(Ok(()))));
        assert!(health.failing().is_empty());
    }

    #[test]
    fn one_that_is_asked_is_not_asked_again_before_it_has_answered_and_its_time_has_come() {
        let now = Instant::now();
        let (mut health, target) = (health(now), target());
        assert_eq!(health.due(now, 0, 9), []);
        assert_eq!(health.due(now, 9, 9), std::slice::from_ref(&target));
        let later = now + Duration::from_secs(60);
        assert_eq!((health.due(later, 9, 9), health.next()), (Vec::new(), None));
        assert!(!health.found(&target, Some(Ok(()))));
        assert_eq!((health.due(now, 9, 9), health.next()), (Vec::new(), Some(now + Duration::from_secs(5))));
        assert_eq!(health.due(later, 9, 9), [target]);
    }

    #[test]
    fn a_network_whose_targets_keep_silent_takes_no_others_turn() {
        let now = Instant::now();
        let of = |network: u8, port: u16| Asked { network: Uid::from_random([network; 16]), port, ..target() };
        let state = || State { out: None, streak: 0, due: now, asked: false };
        let mut health = health(now);
        health.targets = (0..100).map(|port| (of(1, port), state())).chain([(of(2, 80), state())]).collect();
        let first = health.due(now, 3, 10);
        assert!(first.len() == 3 && first.contains(&of(2, 80)), "each has its turn: {first:?}");
        assert_eq!(health.due(now, 90, 10).len(), 3, "and its share of those that are asked together");
        assert_eq!(health.due(now, 90, 10), []);
        health.found(&of(2, 80), Some(Ok(())));
        assert_eq!(health.due(now + Duration::from_secs(60), 90, 10), [of(2, 80)]);
    }
}
