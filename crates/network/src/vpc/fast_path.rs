//! The fast path: packets of an established TCP connection between hosts go from link to link, past routing, connection tracking
//! and rules, for as long as a note says that these let the connection through a moment ago.
//!
//! ```text
//! NIC ─▶ its own names? plain? noted? ─▶ the tunnel, to the host of the destination
//!  vx ─▶                plain? noted? ─▶ the destination's link
//!         otherwise as ever: … forward, which marks what may be noted ─▶ vx: both directions are noted for 5 s
//! ```
//!
//! What may be noted is of a connection that the present rules know, whose addresses nobody changes, and in which no NIC that
//! forwards has a part. A note is not renewed by what it lets pass: every 5 s a packet takes the long way, so connection tracking
//! sees that a connection lives; and it sees all that begins or ends one, which ends notes too. Marks are the rules' generation,
//! so what other rules let through is not noted any more when rules change, and notes are cleared after the change. Where a packet
//! goes is as planned: notes say only that it may.
//!
//! Linux before 5.16 and an `nft` without this have only the long way.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::OnceLock;

use super::links::TUNNEL;
use super::rules::TABLE;
use super::rules::table::Family;
use super::text::elements;
use super::want::NetworkWant;
use crate::NetError;
use crate::firewall::nft;
use crate::netns::{enter, new_namespace};

/// How long a connection is not looked at after it was: seconds.
const NOTED: u32 = 5;
/// Two are of a connection. One without a place among them takes the long way.
const NOTES: u32 = 131_072;

/// A transaction that no note survives.
pub(super) const CLEARED: &str = "flush set netdev nexus notes4\nflush set netdev nexus notes6\n";

/// Whether this kernel and this `nft` know how: tried once, where it is in nobody's way.
pub(super) fn possible() -> bool {
    static POSSIBLE: OnceLock<bool> = OnceLock::new();
    let try_out = || -> Result<(), NetError> {
        enter(&new_namespace()?)?;
        let text = format!("define generation = 1\n{}", table(&[], Some("lo"), &BTreeMap::new()));
        nft("trying out the fast path", &["-f", "-"], &text).map(drop)
    };
    *POSSIBLE.get_or_init(|| {
        let tried = std::thread::scope(|scope| scope.spawn(try_out).join());
        match tried {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::info!(%error, "packets between hosts all take the long way");
                false
            }
            Err(_) => false,
        }
    })
}

/// The line of the packet filter's text that says which generation its rules are.
pub(super) fn generation(rules: &str) -> &str {
    rules.lines().next().filter(|l| l.starts_with("define ")).unwrap_or_default()
}

/// The table `netdev nexus` of a network's namespace, for the links that are there, beside rules of that [`generation`].
pub(super) fn text(want: &NetworkWant, links: &BTreeMap<String, u32>, generation: &str) -> String {
    let nics = want.nics.iter().filter(|n| !n.forwards);
    let nics = nics.filter_map(|n| {
        let addresses = n.addresses().collect();
        Some(Local { link: &n.link, index: *links.get(&n.link)?, mac: mac(n.mac), addresses })
    });
    let tunnel = links.contains_key(TUNNEL).then_some(TUNNEL);
    format!("{generation}\n{}", table(&nics.collect::<Vec<_>>(), tunnel, &want.hops))
}

struct Local<'a> {
    link: &'a str,
    index: u32,
    mac: String,
    addresses: Vec<IpAddr>,
}

fn mac(bytes: [u8; 6]) -> String {
    nexus_model::plan::Mac(bytes).to_string()
}

fn table(nics: &[Local<'_>], tunnel: Option<&str>, hops: &BTreeMap<IpAddr, IpAddr>) -> String {
    let name = format!("netdev {TABLE}");
    let mut out = format!("table {name}\ndelete table {name}\ntable {name} {{\n");
    let (mut received, mut noted) = (String::new(), String::new());
    for family in Family::BOTH {
        let six = family == Family::V6;
        let (digit, ip, kind) = if six { ('6', "ip6", "ipv6_addr") } else { ('4', "ip", "ipv4_addr") };
        let of = |address: &IpAddr| Family::of(*address) == family;
        let there =
            nics.iter().flat_map(|n| n.addresses.iter().filter(|a| of(a)).map(|a| format!("{a} : {}", n.index)));
        let elsewhere = hops.iter().filter(|(to, _)| of(to)).map(|(to, hop)| format!("{to} : {hop}"));
        let (there, elsewhere) = (elements(there), elements(elsewhere));
        let tcp = if six { "ip6 nexthdr tcp" } else { "ip protocol tcp" };
        // Without options and not in pieces: those are looked at by who knows them.
        let whole = if six { "" } else { " @nh,0,8 0x45 ip frag-off 0x4000" };
        let way = format!("{ip} saddr . {ip} daddr . tcp sport . tcp dport");
        let back = format!("{ip} daddr . {ip} saddr . tcp dport . tcp sport");
        let plain = format!("{tcp}{whole} tcp flags ! fin,syn,rst {way} @notes{digit} fwd {ip} to {ip} daddr");
        let ends = format!("{tcp} tcp flags & (fin|syn|rst) != 0 goto ended{digit}");
        let _ = write!(
            out,
            " set notes{digit} {{ type {kind} . {kind} . inet_service . inet_service; size {NOTES}; flags dynamic,timeout; timeout {NOTED}s; }}
 map hops{digit} {{ type {kind} : {kind};{elsewhere} }}
 map places{digit} {{ type {kind} : iface_index;{there} }}
 chain ended{digit} {{
  delete @notes{digit} {{ {way} }} delete @notes{digit} {{ {back} }}
 }}
"
        );
        if let Some(tunnel) = tunnel {
            let sent = format!("{plain} map @hops{digit} device \"{tunnel}\"");
            let _ = write!(out, " chain sent{digit} {{\n  {sent}\n  {ends}\n }}\n");
        }
        let _ = write!(received, "  {plain} device {ip} daddr map @places{digit}\n  {ends}\n");
        let _ = writeln!(noted, "  {tcp} update @notes{digit} {{ {way} }} update @notes{digit} {{ {back} }}");
    }
    let Some(tunnel) = tunnel else { return out + "}\n" };
    let _ = write!(
        out,
        " chain noted {{
{noted} }}
 chain from_tunnel {{
  type filter hook ingress device \"{tunnel}\" priority filter; policy accept;
{received} }}
 chain to_tunnel {{
  type filter hook egress device \"{tunnel}\" priority filter; policy accept;
  meta mark $generation goto noted
 }}
"
    );
    for nic in nics {
        let (link, mac) = (nic.link, &nic.mac);
        let _ = writeln!(out, " chain from_{link} {{");
        let _ = writeln!(out, "  type filter hook ingress device \"{link}\" priority filter; policy accept;");
        for address in &nic.addresses {
            let (digit, ip) = if address.is_ipv6() { ('6', "ip6") } else { ('4', "ip") };
            let _ = writeln!(out, "  ether saddr {mac} {ip} saddr {address} goto sent{digit}");
        }
        out.push_str(" }\n");
    }
    out + "}\n"
}
