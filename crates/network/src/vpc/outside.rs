//! The host's side of tenants' ways out: links to networks, routes to their addresses, and answers for floating addresses
//! on the link that has the host's endpoint, on which control goes before tenants.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use super::announce::announce;
use super::hand::{Hand, Mode, Others};
use super::links::{self, HOST_PREFIX};
use super::want::{FIRST_END, NetworkWant, SECOND_END};
use crate::netlink::{Limit, LinkAddress, LinkKind, LinkState, MAIN, Neighbour, Netlink, RouteKind, RouteState};
use crate::netns::sysctl;
use crate::{Attempt, NetError};

/// Where the settings of the link to outside are kept as they were before they were ours.
const BEFORE: &str = ".uplink";

/// Brings the host's namespace, in which the thread is, to what these networks need.
pub(super) fn settle(
    hand: &mut Hand<'_>,
    dir: &Path,
    endpoint: Option<IpAddr>,
    rate: Option<u64>,
    wants: &[NetworkWant],
) -> Result<(), NetError> {
    let there = hand.links.link_states()?;
    for link in &there {
        hand.name(link.index, &link.name);
    }
    let wanted: BTreeSet<String> = wants.iter().filter(|w| w.uplink).map(|w| links::host(w.uid)).collect();
    for link in &there {
        let ours = link.kind == LinkKind::Veth && link.name.starts_with(HOST_PREFIX);
        if ours && !wanted.contains(&link.name) {
            hand.step(|| format!("the link {} is there unasked", link.name), |l| l.delete_index(link.index));
        }
    }
    let (mut addresses, mut neighbours, mut routes) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    let mut answered = BTreeSet::new();
    for want in wants.iter().filter(|w| w.uplink) {
        let name = links::host(want.uid);
        let Some(link) = there.iter().find(|l| l.name == name) else { continue };
        for (key, value) in [("accept_ra", "0"), ("accept_redirects", "0"), ("addr_gen_mode", "1")] {
            hand.sysctl(&format!("ipv6/conf/{name}/{key}"), value)?;
        }
        hand.sysctl(&format!("ipv4/conf/{name}/send_redirects"), "0")?;
        let mac = (link.mac != Some(FIRST_END.0)).then_some(FIRST_END.0);
        let mtu = (link.mtu != want.mtu).then_some(want.mtu);
        if mac.is_some() || mtu.is_some() {
            let what = || format!("{name} has another hardware address or MTU");
            hand.step(what, |l| l.set_link(link.index, mac, mtu));
        }
        if !link.up {
            hand.step(|| format!("{name} is down"), |l| l.set_up(link.index, true));
        }
        addresses.insert(LinkAddress { link: link.index, address: FIRST_END.1.into(), length: 64 });
        neighbours.insert(Neighbour { link: link.index, address: SECOND_END.1.into(), mac: SECOND_END.0 });
        let (four, six) = links::transit(want.tunnel.vni);
        for to in [four.into(), six.into()].into_iter().chain(want.outside.iter().copied()) {
            let via = Some(SECOND_END.1.into());
            let kind = RouteKind::Unicast { link: link.index, via, source: None, mtu: None };
            routes.push(RouteState { table: MAIN, to, length: if to.is_ipv6() { 128 } else { 32 }, kind });
        }
        answered.extend(want.outside.iter().copied());
    }
    hand.addresses(&addresses)?;
    hand.neighbours(&neighbours)?;
    hand.routes(&routes, Others::LeftAlone, true)?;
    let uplink = uplink(hand, endpoint)?;
    answer(hand, dir, uplink.as_ref(), &answered)?;
    if endpoint.is_some() && rate.is_some() && uplink.is_none() {
        hand.lacks(|| "no link has the host's endpoint, so control does not go before tenants".into());
    }
    hand.share(uplink.zip(rate).map(|(link, rate)| (link.index, Limit::of(rate))))
}

/// The link that has the host's endpoint.
fn uplink(hand: &mut Hand<'_>, endpoint: Option<IpAddr>) -> Result<Option<LinkState>, NetError> {
    let Some(endpoint) = endpoint else { return Ok(None) };
    let addresses = hand.links.addresses()?;
    let link = addresses.iter().find(|(a, _)| a.address == endpoint).map(|(a, _)| a.link);
    let states = hand.links.link_states()?;
    Ok(states.into_iter().find(|l| Some(l.index) == link && l.name != "lo"))
}

/// Answers ARP and neighbour discovery for these addresses, and tells the wire of new ones.
fn answer(
    hand: &mut Hand<'_>,
    dir: &Path,
    uplink: Option<&LinkState>,
    wanted: &BTreeSet<IpAddr>,
) -> Result<(), NetError> {
    let there: BTreeSet<(u32, IpAddr)> = hand.links.proxies()?.into_iter().collect();
    let mut keys = BTreeSet::new();
    if let Some(uplink) = uplink.filter(|_| !wanted.is_empty()) {
        let settings = [
            (format!("ipv6/conf/{}/proxy_ndp", uplink.name), "1"),
            (format!("ipv4/neigh/{}/proxy_delay", uplink.name), "0"),
            (format!("ipv6/neigh/{}/proxy_delay", uplink.name), "0"),
        ];
        for (key, value) in settings {
            if hand.mode == Mode::Apply {
                remember(dir, &key, value)?;
            }
            hand.sysctl(&key, value)?;
        }
        for &address in wanted {
            keys.insert((uplink.index, address));
            if there.contains(&(uplink.index, address)) {
                continue;
            }
            let what = || format!("nobody answers for {address} on {}", uplink.name);
            let told = hand.step(what, |l| l.put_proxy(uplink.index, address));
            if let (true, Some(mac)) = (told, uplink.mac)
                && let Err(e) = announce(uplink.index, mac, address)
            {
                tracing::warn!(%address, link = uplink.name, "a floating address could not be announced: {e}");
            }
        }
    } else if !wanted.is_empty() {
        hand.lacks(|| "no link has the host's endpoint, so nobody answers for floating addresses".into());
    }
    for &(link, address) in there.difference(&keys) {
        hand.step(|| format!("{address} is answered for unasked"), |l| l.take_proxy(link, address));
    }
    if wanted.is_empty() && hand.mode == Mode::Apply {
        forget(dir)?;
    }
    Ok(())
}

/// Keeps a setting of a link that is not ours, as it was.
fn remember(dir: &Path, key: &str, value: &str) -> Result<(), NetError> {
    let Ok(now) = fs::read_to_string(Path::new("/proc/sys/net").join(key)) else { return Ok(()) };
    let path = dir.join(BEFORE);
    let kept = fs::read_to_string(&path).unwrap_or_default();
    if now.trim() == value || kept.lines().any(|l| l.split_once('=').is_some_and(|(k, _)| k == key)) {
        return Ok(());
    }
    let text = format!("{kept}{key}={}\n", now.trim());
    fs::write(&path, text).attempt(|| format!("writing {}", path.display()))
}

/// Puts the settings of links that are not ours back.
fn forget(dir: &Path) -> Result<(), NetError> {
    let path = dir.join(BEFORE);
    let Ok(kept) = fs::read_to_string(&path) else { return Ok(()) };
    for (key, value) in kept.lines().filter_map(|l| l.split_once('=')) {
        sysctl(key, value)?;
    }
    fs::remove_file(&path).attempt(|| format!("removing {}", path.display()))
}

/// Whether a link of the host is one of ours.
pub(super) fn left(links: &mut Netlink) -> Result<bool, NetError> {
    Ok(links.link_states()?.iter().any(|l| l.kind == LinkKind::Veth && l.name.starts_with(HOST_PREFIX)))
}
