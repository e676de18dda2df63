//! Which packets of a host's instances pass: one nftables table of ours, replaced as a whole in one transaction.
//!
//! * What an instance sends bears its own addresses, or goes nowhere.
//! * Instances of one tenant reach each other, on whichever host. Those of two tenants don't: the sender's host drops it,
//!   and so does the receiver's.
//! * Of the host itself an instance reaches the resolver ([`crate::names`]) and a few pings.
//! * Outside is what the tenant may reach, through the host's own address; never infrastructure, never a network that the
//!   host itself is on, never an address that means something to a host alone.
//! * What others begin, such as a gateway's request, is answered.
//!
//! Connection tracking is not touched by a replacement, so what is open and still allowed goes on. A rule that is taken
//! away counts for open connections too: only their answers pass without being looked at, and an answer needs a question.
//!
//! What only adds to the rules that stand is added to them: taking the table away would make whoever waits for it wait for the
//! kernel's grace periods too, and a function that wakes has no time for that.
//!
//! Other tables are left alone. An instance that is not in the rules is silent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};

use nix::ifaddrs::getifaddrs;

use crate::instance::{InstanceAddress, LINK_PREFIX, NAMESERVER};
use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError, link_name};

/// The one table that is ours.
const TABLE: &str = "inet nexus";

/// What no instance reaches outside, however wide its egress: this host, links, groups, metadata services (169.254.0.0/16
/// and ULAs), and IPv4 in the clothes of IPv6. ULAs are also what all instances and hosts of other regions have.
const NEVER: &[(&str, u8)] = &[
    ("0.0.0.0", 8),
    ("127.0.0.0", 8),
    ("169.254.0.0", 16),
    ("224.0.0.0", 4),
    ("240.0.0.0", 4),
    ("::", 96),
    ("::ffff:0:0", 96),
    ("64:ff9b::", 96),
    ("fc00::", 7),
    ("fe80::", 10),
    ("ff00::", 8),
];

/// A network: its first address and how many bits count.
pub type Net = (IpAddr, u8);

/// What no tenant reaches outside, whichever host it is on: links, groups, metadata services and the addresses of instances.
pub fn never() -> Vec<Net> {
    NEVER.iter().map(|(address, length)| (address.parse().expect("a well-formed address"), *length)).collect()
}

/// One instance of this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guest {
    /// As its network was made: see [`crate::InstanceNet::create`].
    pub name: String,
    pub address: InstanceAddress,
    /// An index into [`Rules::tenants`].
    pub tenant: usize,
}

/// Those who may reach each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Tenant {
    /// Of `a-z`, `0-9` and `-`, and no other tenant's.
    pub name: String,
    /// All of its instances' addresses, here and on other hosts.
    pub members: BTreeSet<IpAddr>,
    /// All of outside is open.
    pub everything: bool,
    /// What of outside is open in any case.
    pub networks: Vec<Net>,
}

/// What must be so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Rules {
    pub guests: Vec<Guest>,
    pub tenants: Vec<Tenant>,
    /// From which all hosts give addresses to instances.
    pub instances: Vec<Net>,
    /// Hosts, servers, gateways.
    pub infrastructure: Vec<Net>,
}

/// Rules that were set, and what of the host went into them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub rules: Rules,
    attached: Vec<Net>,
}

/// The packet filter of a host. It holds no state: the kernel does.
#[derive(Debug, Clone)]
pub struct Firewall {
    pub(crate) host: NetnsRef,
}

impl Firewall {
    /// That of the host on which this process runs.
    pub fn own() -> Self {
        Self { host: NetnsRef::Own }
    }

    /// That of a host whose network namespace is not this process's own.
    pub fn on_host(host: NetnsRef) -> Self {
        Self { host }
    }

    /// Puts these rules in the place of whichever there are, at once and whole.
    pub async fn apply(&self, rules: Rules) -> Result<Standing, NetError> {
        aside(self.host.clone(), "the packet filter", move || {
            let standing = Standing { attached: attached()?, rules };
            nft("setting the packet filter", &["-f", "-"], &text(&standing.rules, &standing.attached))?;
            Ok(standing)
        })
        .await
    }

    /// Adds to the rules that stand what these have beside them. `None` if they don't stand any more, or if more than that is to
    /// be done: then nothing has been changed.
    pub async fn extend(&self, standing: Standing, rules: Rules) -> Result<Option<Standing>, NetError> {
        let Some(more) = additions(&standing.rules, &rules) else { return Ok(None) };
        aside(self.host.clone(), "the packet filter", move || {
            if attached()? != standing.attached {
                return Ok(None);
            }
            match nft("adding to the packet filter", &["-f", "-"], &more) {
                Ok(_) => Ok(Some(Standing { rules, ..standing })),
                Err(NetError::Rules { message, .. }) => {
                    tracing::debug!(message, "the packet filter can't be added to; it is set anew");
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Removes all of it. Harmless when there is nothing.
    pub async fn remove(&self) -> Result<(), NetError> {
        let text = format!("table {TABLE}\ndelete table {TABLE}\n");
        aside(self.host.clone(), "the packet filter", move || {
            nft("removing the packet filter", &["-f", "-"], &text).map(drop)
        })
        .await
    }

    /// What no tenant reaches outside, by whichever way: this, [`never`], and the networks that the host is on. Sorted.
    pub async fn closed(&self, told: Vec<Net>) -> Result<Vec<Net>, NetError> {
        aside(self.host.clone(), "the host's addresses", move || {
            let all: BTreeSet<Net> = never().into_iter().chain(told).chain(attached()?).collect();
            Ok(all.into_iter().collect())
        })
        .await
    }

    /// Whether there are rules of ours, which somebody may have flushed with all others.
    pub async fn stands(&self) -> Result<bool, NetError> {
        aside(self.host.clone(), "the packet filter", || {
            let tables = nft("looking at the packet filter", &["list", "tables"], "")?;
            Ok(tables.lines().any(|line| line.trim() == format!("table {TABLE}")))
        })
        .await
    }
}

/// Runs `nft` on the calling thread, in its namespace.
pub(crate) fn nft(attempt: &'static str, arguments: &[&str], input: &str) -> Result<String, NetError> {
    let what = || format!("{attempt} with the program nft (Debian: nftables)");
    // Found also where nobody set a path for a daemon.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/usr/bin:/bin";
    let mut command = Command::new("nft");
    command.args(arguments).env("PATH", path).env("LC_ALL", "C");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().attempt(what)?;
    let sent = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().attempt(what)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).chars().take(1000).collect();
        return Err(NetError::Rules { attempt, message });
    }
    sent.attempt(what)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The networks that the calling thread's host is on, but for those of its instances' links.
fn attached() -> Result<Vec<Net>, NetError> {
    let found = getifaddrs().attempt(|| "listing the host's addresses".into())?;
    let mut nets = Vec::new();
    for interface in found.filter(|i| !i.interface_name.starts_with(LINK_PREFIX)) {
        let (Some(address), Some(mask)) = (interface.address, interface.netmask) else { continue };
        if let (Some(a), Some(m)) = (address.as_sockaddr_in(), mask.as_sockaddr_in()) {
            nets.push((a.ip().into(), u32::from(m.ip()).count_ones() as u8));
        } else if let (Some(a), Some(m)) = (address.as_sockaddr_in6(), mask.as_sockaddr_in6()) {
            nets.push((a.ip().into(), u128::from(m.ip()).count_ones() as u8));
        }
    }
    Ok(nets)
}

/// The networks of one family, as elements of a set: each by its first address, and none within another.
fn nets(all: impl IntoIterator<Item = Net>, six: bool) -> Vec<String> {
    let mut spans: Vec<(u128, u8)> = Vec::new();
    for (address, length) in all {
        match address {
            IpAddr::V4(a) if !six => {
                let length = length.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                spans.push((u128::from(a.to_bits() & mask), length));
            }
            IpAddr::V6(a) if six => {
                let length = length.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                spans.push((a.to_bits() & mask, length));
            }
            _ => {}
        }
    }
    spans.sort_unstable();
    spans.dedup();
    let bits = if six { 128 } else { 32 };
    let mut out = Vec::new();
    // Sorted so, whatever lies within another comes after it.
    let mut last: Option<(u128, u8)> = None;
    for (first, length) in spans {
        let within = |&(f, l): &(u128, u8)| {
            let shift = bits - u32::from(l);
            l <= length && f.checked_shr(shift).unwrap_or(0) == first.checked_shr(shift).unwrap_or(0)
        };
        if last.as_ref().is_some_and(within) {
            continue;
        }
        last = Some((first, length));
        let address: IpAddr = match six {
            true => Ipv6Addr::from_bits(first).into(),
            false => Ipv4Addr::from_bits(first as u32).into(),
        };
        out.push(format!("{address}/{length}"));
    }
    out
}

fn set(out: &mut String, name: &str, kind: &str, flags: &str, elements: &[String]) {
    let _ = write!(out, " set {name} {{ type {kind}; {flags}");
    if !elements.is_empty() {
        let _ = write!(out, " elements = {{ {} }};", elements.join(", "));
    }
    out.push_str(" }\n");
}

/// Where packets of guests go on, as elements of a map.
fn ways<'a>(prefix: &str, guests: impl IntoIterator<Item = &'a Guest>, tenants: &[Tenant]) -> Vec<String> {
    let link = |g: &Guest| link_name(LINK_PREFIX, &g.name);
    guests.into_iter().map(|g| format!("\"{}\" : goto {prefix}_{}", link(g), tenants[g.tenant].name)).collect()
}

/// Guests' links with their addresses of one family.
fn pairs<'a>(guests: impl IntoIterator<Item = &'a Guest>, six: bool) -> Vec<String> {
    let link = |g: &Guest| link_name(LINK_PREFIX, &g.name);
    guests.into_iter().map(|g| format!("\"{}\" . {}", link(g), own(g, six))).collect()
}

fn own(guest: &Guest, six: bool) -> IpAddr {
    if six { guest.address.address6.into() } else { guest.address.address4.into() }
}

fn of_family<'a>(members: impl IntoIterator<Item = &'a IpAddr>, six: bool) -> Vec<String> {
    members.into_iter().filter(|a| a.is_ipv6() == six).map(IpAddr::to_string).collect()
}

fn verdicts(out: &mut String, name: &str, prefix: &str, guests: &[Guest], tenants: &[Tenant]) {
    let elements = ways(prefix, guests, tenants);
    let _ = write!(out, " map {name} {{ type ifname : verdict;");
    if !elements.is_empty() {
        let _ = write!(out, " elements = {{ {} }};", elements.join(", "));
    }
    out.push_str(" }\n");
}

const INTERVAL: &str = "flags interval;";
/// Whether it is IPv6, the digit that ends its sets' names, and the type of their elements.
const FAMILIES: [(bool, char, &str); 2] = [(false, '4', "ipv4_addr"), (true, '6', "ipv6_addr")];

/// What the table has of a tenant alone.
fn tenants_own(out: &mut String, tenant: &Tenant) {
    let name = &tenant.name;
    for (six, digit, kind) in FAMILIES {
        set(out, &format!("members{digit}_{name}"), kind, "", &of_family(&tenant.members, six));
        let networks = nets(tenant.networks.iter().copied(), six);
        set(out, &format!("networks{digit}_{name}"), kind, INTERVAL, &networks);
    }
    let rest = if tenant.everything { "accept" } else { "drop" };
    let _ = write!(
        out,
        " chain from_{name} {{
  ip daddr @members4_{name} accept
  ip6 daddr @members6_{name} accept
  ip daddr @closed4 drop
  ip6 daddr @closed6 drop
  ip daddr @networks4_{name} accept
  ip6 daddr @networks6_{name} accept
  {rest}
 }}
 chain to_{name} {{
  ip saddr @members4_{name} accept
  ip6 saddr @members6_{name} accept
  ip saddr @instances4 drop
  ip6 saddr @instances6 drop
  ip saddr @local4 drop
  ip6 saddr @local6 drop
  accept
 }}
"
    );
}

/// What makes `new` of the rules that stand, if nothing of those is taken away or changed.
fn additions(old: &Rules, new: &Rules) -> Option<String> {
    if (&old.instances, &old.infrastructure) != (&new.instances, &new.infrastructure) {
        return None;
    }
    let mut out = String::new();
    let mut add = |set: &str, elements: Vec<String>| {
        if !elements.is_empty() {
            let _ = writeln!(out, "add element {TABLE} {set} {{ {} }}", elements.join(", "));
        }
    };
    let mut made = String::new();
    let mut before: BTreeMap<&str, &Tenant> = old.tenants.iter().map(|t| (t.name.as_str(), t)).collect();
    for tenant in &new.tenants {
        let Some(was) = before.remove(tenant.name.as_str()) else {
            tenants_own(&mut made, tenant);
            continue;
        };
        let same = (was.everything, &was.networks) == (tenant.everything, &tenant.networks);
        if !same || !was.members.is_subset(&tenant.members) {
            return None;
        }
        for (six, digit, _) in FAMILIES {
            let more = of_family(tenant.members.difference(&was.members), six);
            add(&format!("members{digit}_{}", tenant.name), more);
        }
    }
    let place = |rules: &Rules, g: &Guest| (g.address, rules.tenants[g.tenant].name.clone());
    let mut here: BTreeMap<&str, _> = old.guests.iter().map(|g| (g.name.as_str(), place(old, g))).collect();
    let mut come = Vec::new();
    for guest in &new.guests {
        match here.remove(guest.name.as_str()) {
            None => come.push(guest),
            Some(was) if was == place(new, guest) => {}
            Some(_) => return None,
        }
    }
    if !before.is_empty() || !here.is_empty() {
        return None;
    }
    for (six, digit, _) in FAMILIES {
        add(&format!("own{digit}"), pairs(come.iter().copied(), six));
        add(&format!("local{digit}"), come.iter().map(|g| own(g, six).to_string()).collect());
    }
    add("senders", ways("from", come.iter().copied(), &new.tenants));
    add("receivers", ways("to", come.iter().copied(), &new.tenants));
    // Elements name the chains of their tenants.
    Some(if made.is_empty() { out } else { format!("table {TABLE} {{\n{made}}}\n{out}") })
}

/// The rules as `nft` reads them: one transaction that makes the table, if it is not there, and replaces it.
fn text(rules: &Rules, attached: &[Net]) -> String {
    let mut out = format!("table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let guests = &rules.guests;
    let closed: Vec<Net> = never()
        .into_iter()
        .chain(rules.instances.iter().copied())
        .chain(rules.infrastructure.iter().copied())
        .chain(attached.iter().copied())
        .collect();
    for (six, digit, kind) in FAMILIES {
        set(&mut out, &format!("own{digit}"), &format!("ifname . {kind}"), "", &pairs(guests, six));
        let local: BTreeSet<String> = guests.iter().map(|g| own(g, six).to_string()).collect();
        set(&mut out, &format!("local{digit}"), kind, "", &Vec::from_iter(local));
        set(&mut out, &format!("instances{digit}"), kind, INTERVAL, &nets(rules.instances.iter().copied(), six));
        set(&mut out, &format!("closed{digit}"), kind, INTERVAL, &nets(closed.iter().copied(), six));
    }
    for tenant in &rules.tenants {
        tenants_own(&mut out, tenant);
    }
    verdicts(&mut out, "senders", "from", guests, &rules.tenants);
    verdicts(&mut out, "receivers", "to", guests, &rules.tenants);
    let _ = write!(
        out,
        " chain genuine {{
  meta nfproto ipv4 iifname . ip saddr != @own4 drop
  meta nfproto ipv6 iifname . ip6 saddr != @own6 drop
 }}
 chain sent {{
  jump genuine
  ct direction reply ct state established,related accept
  iifname vmap @senders
  drop
 }}
 chain received {{
  ct direction reply ct state established,related accept
  oifname vmap @receivers
  drop
 }}
 chain for_host {{
  icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 hoplimit 255 accept
  jump genuine
  ct direction reply ct state established,related accept
  ip daddr {NAMESERVER} meta l4proto {{ tcp, udp }} th dport 53 accept
  icmp type echo-request limit rate 20/second accept
  icmpv6 type echo-request limit rate 20/second accept
  drop
 }}
 chain forward {{
  type filter hook forward priority filter; policy accept;
  iifname \"{LINK_PREFIX}*\" oifname != \"{LINK_PREFIX}*\" goto sent
  iifname \"{LINK_PREFIX}*\" oifname \"{LINK_PREFIX}*\" jump within
  oifname \"{LINK_PREFIX}*\" goto received
 }}
 chain within {{
  jump genuine
  ct direction reply ct state established,related accept
  oifname vmap @receivers
  drop
 }}
 chain input {{
  type filter hook input priority filter; policy accept;
  iifname != \"{LINK_PREFIX}*\" iifname != \"lo\" ip daddr {NAMESERVER} drop
  iifname \"{LINK_PREFIX}*\" goto for_host
 }}
 chain output {{
  type filter hook output priority filter; policy accept;
  oifname \"{LINK_PREFIX}*\" ip saddr {NAMESERVER} icmp type destination-unreachable icmp code port-unreachable drop
  oifname \"{LINK_PREFIX}*\" ip saddr {NAMESERVER} tcp sport 53 tcp flags & rst == rst drop
 }}
 chain leaving {{
  type nat hook postrouting priority srcnat; policy accept;
  oifname != \"{LINK_PREFIX}*\" ip saddr @local4 ip daddr != @instances4 masquerade
  oifname != \"{LINK_PREFIX}*\" ip6 saddr @local6 ip6 daddr != @instances6 masquerade
 }}
}}
"
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_within_others_are_left_out() {
        let net = |text: &str| {
            let (address, length) = text.split_once('/').unwrap();
            (address.parse().unwrap(), length.parse().unwrap())
        };
        let all = [
            "10.0.0.0/8",
            "10.1.0.0/16",
            "10.1.2.3/32",
            "11.0.0.9/24",
            "11.0.0.0/24",
            "fd00::1/64",
            "::/0",
            "fe80::/10",
        ];
        let all: Vec<Net> = all.into_iter().map(net).collect();
        assert_eq!(nets(all.clone(), false), ["10.0.0.0/8", "11.0.0.0/24"]);
        assert_eq!(nets(all, true), ["::/0"]);
        assert_eq!(nets([net("0.0.0.0/0"), net("9.9.9.9/32")], false), ["0.0.0.0/0"]);
    }

    #[test]
    fn no_set_is_left_without_its_type_when_it_is_empty() {
        let tenant = Tenant { name: "one".into(), ..Tenant::default() };
        let text = text(&Rules { tenants: vec![tenant], ..Rules::default() }, &[]);
        assert!(text.contains("set members6_one { type ipv6_addr;  }"), "{text}");
        assert!(text.contains("map senders { type ifname : verdict; }"), "{text}");
    }
}
