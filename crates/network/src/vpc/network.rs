//! One network's namespace on this host: made, filtered, linked, routed; and removed.
//!
//! The packet filter stands before any link comes up. Each function works on a thread of its own that begins in the host's
//! namespace and ends in the network's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nexus_model::Uid;

use super::fast_path;
use super::hand::{Difference, Faults, Hand, Mode, Others};
use super::links::{self, GATEWAY_MAC, NIC_PREFIX, PEER_PREFIX, TUNNEL, UPLINK, hop};
use super::want::{FIRST_END, NetworkWant, NicWant, SECOND_END, WIDE_MTU, Way};
use crate::firewall::nft;
use crate::netlink::{LinkAddress, LinkKind, LinkState, MAIN, Neighbour, Netlink, RouteKind, RouteState, VethEnd};
use crate::netns::{NetnsRef, create_at, delete_at, enter, is_netns};
use crate::{Attempt, NetError};

/// All ends of NICs are in this group of links, so that they can be removed together.
const NICS: u32 = 0x6e78;
/// A tunnel whose namespace has just ended is in the way for as long as the kernel needs to clear it.
const CLEARED_WITHIN: Duration = Duration::from_secs(5);

/// An instance may end, and its links with it, while they are counted: so often it is looked again.
const LINKS_GO: u8 = 3;

/// What became of a network.
#[derive(Default)]
pub(super) struct Outcome {
    pub changes: usize,
    pub differences: Vec<Difference>,
    /// NICs whose links stand.
    pub linked: BTreeSet<Uid>,
    /// NICs whose instance has no namespace yet.
    pub waiting: BTreeSet<Uid>,
    pub nics: BTreeMap<Uid, String>,
    /// Of the network as a whole, and whether nothing more was tried.
    pub trouble: Option<String>,
    pub given_up: bool,
}

/// What all functions here are given.
pub(super) struct Site<'a> {
    pub mode: Mode,
    pub faults: &'a Faults,
    /// Where the namespaces' files are.
    pub dir: &'a Path,
    /// Where the namespace of an instance is, made or not.
    pub instance: &'a (dyn Fn(Uid) -> std::path::PathBuf + Sync),
}

impl Site<'_> {
    pub fn path(&self, network: Uid) -> std::path::PathBuf {
        self.dir.join(network.to_string())
    }

    fn hand(&self, want: &NetworkWant) -> Result<Hand<'_>, NetError> {
        Hand::open(self.mode, self.faults, format!("network {}", want.called))
    }
}

impl Outcome {
    pub fn take(&mut self, hand: Hand<'_>) {
        self.changes += hand.changes;
        self.differences.extend(hand.differences);
        if let (None, Some(trouble)) = (&self.trouble, hand.troubles.first()) {
            self.trouble = Some(trouble.to_string());
        }
    }
}

/// Makes the namespace with its settings and its packet filter, and removes links that are no more to be.
/// `before` is the text that was set last, if that is known.
pub(super) fn prepare(
    site: &Site<'_>,
    want: &NetworkWant,
    (text, before): (&str, Option<&str>),
    out: &mut Outcome,
) -> Result<(), NetError> {
    let path = site.path(want.uid);
    let mut hand = site.hand(want)?;
    if !is_netns(&path) {
        // A link of its name leads to a namespace that nobody finds any more.
        let make = |host: &mut Netlink| {
            host.delete_link(&links::host(want.uid))?;
            fs::create_dir_all(site.dir).attempt(|| format!("making {}", site.dir.display()))?;
            create_at(&path)
        };
        let made = hand.must(|| "it has no namespace".into(), make)?;
        out.take(hand);
        if !made {
            return Ok(());
        }
    } else {
        enter(&NetnsRef::Path(path).open()?)?;
    }
    let mut hand = site.hand(want)?;
    for (key, value) in SETTINGS {
        hand.sysctl(key, value)?;
    }
    hand.filter(text, before)?;
    for (key, value) in TRACKING {
        hand.sysctl(key, value)?;
    }
    let there = hand.links.link_states()?;
    for link in there.iter().filter(|l| stale(want, l)) {
        hand.step(|| format!("the link {} is there unasked", link.name), |l| l.delete_index(link.index));
    }
    out.take(hand);
    Ok(())
}

/// What new links begin with: addresses usable at once and none unasked; every address that has a route is answered for.
const SETTINGS: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    // Of a relay that speaks in clients' names: none that a client is likely to have chosen for a connection of its own.
    ("ipv4/ip_local_port_range", "10000\t32767"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/proxy_arp", "1"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/accept_redirects", "0"),
    ("ipv6/conf/default/addr_gen_mode", "1"),
];

/// Once there is connection tracking. The [fast path](fast_path) lets it see some of a connection's packets only, so it must not go by
/// their sequence numbers; nor take what it saw last for what nobody answered, which by itself would end in five minutes.
const TRACKING: &[(&str, &str)] = &[
    ("netfilter/nf_conntrack_tcp_be_liberal", "1"),
    ("netfilter/nf_conntrack_tcp_timeout_max_retrans", "432000"),
    ("netfilter/nf_conntrack_tcp_timeout_unacknowledged", "432000"),
];

fn stale(want: &NetworkWant, link: &LinkState) -> bool {
    let name = link.name.as_str();
    if name == UPLINK {
        return !want.uplink;
    }
    if link.kind != LinkKind::Veth {
        return false;
    }
    match name {
        _ if name.starts_with(NIC_PREFIX) => !want.nics.iter().any(|n| n.link == name),
        _ if name.starts_with(PEER_PREFIX) => !want.peerings.iter().any(|p| p.link == name),
        _ => false,
    }
}

/// Makes the links to peered networks of which this network's end is the first.
pub(super) fn join(site: &Site<'_>, want: &NetworkWant, out: &mut Outcome) -> Result<(), NetError> {
    let Some(own) = namespace(site, want.uid) else { return Ok(()) };
    enter(&own)?;
    let mut hand = site.hand(want)?;
    for peering in want.peerings.iter().filter(|p| p.first) {
        let Some(other) = namespace(site, peering.other) else { continue };
        let there = hand.links.link_state(&peering.link)?;
        if leads_into(&mut hand.links, there.as_ref(), &other)? {
            continue;
        }
        // A pair's other end can't be up before it is one; its own network sees to it.
        let end = |mac, up| VethEnd { name: &peering.link, mac, mtu: WIDE_MTU, group: 0, up };
        let make = |l: &mut Netlink| {
            l.delete_link(&peering.link)?;
            // The other network's end of a link to a namespace that is lost.
            enter(&other)?;
            let cleared = Netlink::open().and_then(|mut l| l.delete_link(&peering.link));
            enter(&own)?;
            cleared?;
            l.add_veth(&end(FIRST_END.0, true), &end(SECOND_END.0, false), other.as_fd())
        };
        hand.step(|| format!("the link {} to a peered network is missing", peering.link), make);
    }
    out.take(hand);
    Ok(())
}

fn namespace(site: &Site<'_>, network: Uid) -> Option<File> {
    let path = site.path(network);
    if is_netns(&path) { NetnsRef::Path(path).open().ok() } else { None }
}

/// Whether a veth's other end is in that namespace.
fn leads_into(links: &mut Netlink, link: Option<&LinkState>, netns: &File) -> Result<bool, NetError> {
    match link.and_then(|l| l.peer_netns) {
        Some(id) => Ok(links.netns_id(netns.as_fd())? == Some(id)),
        None => Ok(false),
    }
}

/// Makes the links of the namespace and all that is on them.
pub(super) fn complete(site: &Site<'_>, want: &NetworkWant, out: &mut Outcome) -> Result<(), NetError> {
    let host = NetnsRef::Own.open()?;
    let mut host_links = Netlink::open()?;
    let Some(own) = namespace(site, want.uid) else { return Ok(()) };
    enter(&own)?;
    let mut hand = site.hand(want)?;
    let mut there = by_name(hand.links.link_states()?);
    let made = tunnel(&mut hand, want, &there, &mut host_links, &own)?;
    let made = uplink(&mut hand, want, &there, &mut host_links, &host)? || made;
    if made {
        there = by_name(hand.links.link_states()?);
    }
    let mut made = false;
    for nic in &want.nics {
        match plug(site, &mut hand, nic, there.get(&nic.link)) {
            Ok(Plugged::Stands) => drop(out.linked.insert(nic.uid)),
            Ok(Plugged::Made) => {
                made = true;
                out.linked.insert(nic.uid);
            }
            Ok(Plugged::Waiting) => drop(out.waiting.insert(nic.uid)),
            Ok(Plugged::Missing) => {}
            Err(e) => drop(out.nics.insert(nic.uid, e.to_string())),
        }
    }
    if made {
        there = by_name(hand.links.link_states()?);
    }
    settle(&mut hand, want, &there)?;
    out.take(hand);
    Ok(())
}

fn by_name(links: Vec<LinkState>) -> BTreeMap<String, LinkState> {
    links.into_iter().map(|l| (l.name.clone(), l)).collect()
}

/// The tunnel: made in here with its socket in the host's namespace. Whether it was made.
fn tunnel(
    hand: &mut Hand<'_>,
    want: &NetworkWant,
    there: &BTreeMap<String, LinkState>,
    host: &mut Netlink,
    own: &File,
) -> Result<bool, NetError> {
    let found = there.get(TUNNEL);
    if found.is_some_and(|l| l.kind == LinkKind::Vxlan(want.tunnel)) {
        return Ok(false);
    }
    let mac = hop(want.tunnel.local).0;
    let make = |inside: &mut Netlink| {
        inside.delete_link(TUNNEL)?;
        let end = Instant::now() + CLEARED_WITHIN;
        while !host.add_vxlan(TUNNEL, want.tunnel, mac, want.mtu, own.as_fd())? {
            if Instant::now() > end {
                let taken = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
                return Err(taken).attempt(|| format!("making the tunnel {}: another has its number", want.tunnel.vni));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    hand.must(|| format!("the tunnel {} from {} is missing", want.tunnel.vni, want.tunnel.local), make)
}

/// The way out. Whether it was made.
fn uplink(
    hand: &mut Hand<'_>,
    want: &NetworkWant,
    there: &BTreeMap<String, LinkState>,
    host_links: &mut Netlink,
    host: &File,
) -> Result<bool, NetError> {
    if !want.uplink || leads_into(&mut hand.links, there.get(UPLINK), host)? {
        return Ok(false);
    }
    let outside = links::host(want.uid);
    let make = |inside: &mut Netlink| {
        inside.delete_link(UPLINK)?;
        host_links.delete_link(&outside)?;
        let end = |name, mac| VethEnd { name, mac, mtu: want.mtu, group: 0, up: true };
        // The host's end is set up once it is set.
        let there = VethEnd { up: false, ..end(&outside, FIRST_END.0) };
        inside.add_veth(&end(UPLINK, SECOND_END.0), &there, host.as_fd())
    };
    hand.must(|| "the link to the host is missing".into(), make)
}

enum Plugged {
    Stands,
    Made,
    Waiting,
    /// Only looked.
    Missing,
}

/// One NIC's link into its instance.
fn plug(site: &Site<'_>, hand: &mut Hand<'_>, nic: &NicWant, there: Option<&LinkState>) -> Result<Plugged, NetError> {
    let path = (site.instance)(nic.instance);
    if !is_netns(&path) {
        return Ok(Plugged::Waiting);
    }
    let instance = NetnsRef::Path(path).open()?;
    if leads_into(&mut hand.links, there, &instance)? {
        return Ok(Plugged::Stands);
    }
    let make = |l: &mut Netlink| {
        if let Some(there) = there {
            l.delete_index(there.index)?;
        }
        let here = VethEnd { name: &nic.link, mac: GATEWAY_MAC, mtu: WIDE_MTU, group: NICS, up: true };
        let there = VethEnd { name: &nic.inside, mac: nic.mac, mtu: nic.mtu, group: 0, up: false };
        l.add_veth(&here, &there, instance.as_fd())
    };
    let what = || format!("the NIC {} of instance {} is not plugged in", nic.uid, nic.instance);
    if !hand.must(what, make)? {
        return Ok(Plugged::Missing);
    }
    // Answers for others come at once, not after the delay that is meant for several who could answer.
    hand.sysctl(&format!("ipv4/neigh/{}/proxy_delay", nic.link), "0")?;
    Ok(Plugged::Made)
}

/// Everything on the links.
fn settle(hand: &mut Hand<'_>, want: &NetworkWant, there: &BTreeMap<String, LinkState>) -> Result<(), NetError> {
    for link in there.values() {
        hand.name(link.index, &link.name);
        let mac = match link.name.as_str() {
            TUNNEL => Some((hop(want.tunnel.local).0, want.mtu)),
            UPLINK => Some((SECOND_END.0, want.mtu)),
            name if want.nics.iter().any(|n| n.link == name) => Some((GATEWAY_MAC, WIDE_MTU)),
            name => want.peerings.iter().find(|p| p.link == name).map(|p| (p.ends()[0].0, WIDE_MTU)),
        };
        let (mac, mtu) = match mac {
            Some((mac, mtu)) => ((link.mac != Some(mac)).then_some(mac), (link.mtu != mtu).then_some(mtu)),
            None if link.name == "lo" => (None, None),
            None => continue,
        };
        if mac.is_some() || mtu.is_some() {
            let what = || format!("{} has another hardware address or MTU", link.name);
            hand.step(what, |l| l.set_link(link.index, mac, mtu));
        }
        if !link.up {
            hand.step(|| format!("{} is down", link.name), |l| l.set_up(link.index, true));
        }
    }
    let index = |name: &str| there.get(name).map(|l| l.index);
    let addresses = want.addresses.iter().filter_map(|(name, address, length)| {
        Some(LinkAddress { link: index(name)?, address: *address, length: *length })
    });
    hand.addresses(&addresses.collect())?;
    let neighbours = want
        .neighbours
        .iter()
        .filter_map(|(name, address, mac)| Some(Neighbour { link: index(name)?, address: *address, mac: *mac }));
    hand.neighbours(&neighbours.collect())?;
    if let Some(tunnel) = index(TUNNEL) {
        hand.forwards(tunnel, &want.forwards)?;
        for endpoint in &want.apart {
            hand.lacks(|| {
                format!("no tunnel leads to {endpoint}: hosts need addresses of one family, IPv4 or IPv6, to reach each other")
            });
        }
    }
    let routes = want.routes.iter().filter_map(|(&(table, to, length), way)| {
        let kind = match way {
            Way::Unreachable => RouteKind::Unreachable,
            Way::Blackhole => RouteKind::Blackhole,
            Way::Local => RouteKind::Local { link: index("lo")? },
            Way::Link { link, via, source, mtu } => match index(link) {
                Some(link) => RouteKind::Unicast { link, via: *via, source: *source, mtu: *mtu },
                // A NIC that is not plugged in: the rest of its network's CIDR says so.
                None if table == MAIN => return None,
                None => RouteKind::Unreachable,
            },
        };
        Some(RouteState { table, to, length, kind })
    });
    hand.routes(&routes.collect::<Vec<_>>(), Others::LeftAlone, true)?;
    hand.policies(&want.policies)?;
    let limits = want.limits.iter().filter_map(|(name, limit)| Some((index(name)?, *limit)));
    hand.limits(&limits.collect())
}

/// Lets packets pass from link to link, now that the links are there. The answer is the text that was set, for the next time.
pub(super) fn hasten(
    site: &Site<'_>,
    want: &NetworkWant,
    (generation, before): (&str, Option<&str>),
    out: &mut Outcome,
) -> Result<Option<String>, NetError> {
    let Some(own) = namespace(site, want.uid).filter(|_| fast_path::possible()) else { return Ok(None) };
    enter(&own)?;
    let mut hand = site.hand(want)?;
    let mut tries = 0..LINKS_GO;
    loop {
        let links = hand.links.link_states()?.into_iter().map(|l| (l.name, l.index)).collect();
        let text = fast_path::text(want, &links, generation);
        match hand.filter(&text, before) {
            Ok(false) => {}
            // What was noted while the rules were changed.
            Ok(true) => nft("clearing the notes of the fast path", &["-f", "-"], fast_path::CLEARED).map(drop)?,
            Err(NetError::Rules { .. }) if tries.next().is_some() => continue,
            Err(e) => return Err(e),
        }
        out.take(hand);
        return Ok(Some(text));
    }
}

/// Removes a network's namespace and all that is in it.
pub(super) fn remove(site: &Site<'_>, network: Uid, out: &mut Outcome) -> Result<(), NetError> {
    let path = site.path(network);
    let host = NetnsRef::Own.open()?;
    let mut hand = Hand::open(site.mode, site.faults, format!("network {network}"))?;
    let clear = |host_links: &mut Netlink| {
        if is_netns(&path) {
            // Who still is in it shall not go on.
            enter(&NetnsRef::Path(path.clone()).open()?)?;
            let mut inside = Netlink::open()?;
            inside.delete_group(NICS)?;
            for link in inside.link_states()? {
                if link.name == TUNNEL || link.name == UPLINK || link.name.starts_with(PEER_PREFIX) {
                    inside.delete_index(link.index)?;
                }
            }
            enter(&host)?;
        }
        host_links.delete_link(&links::host(network))?;
        delete_at(&path)
    };
    hand.must(|| "it is here, and is not to be".into(), clear)?;
    out.take(hand);
    Ok(())
}
