//! Stand-in: lets everything pass, with floating addresses and NAT.

use nexus_model::plan::{HostNetworks, NetworkPlan};

use crate::firewall::Net;

pub(super) fn network_text(plan: &HostNetworks, network: &NetworkPlan) -> String {
    use std::fmt::Write as _;
    let mut out = String::from("table inet nexus\ndelete table inet nexus\ntable inet nexus {\n");
    out.push_str(" chain pre { type nat hook prerouting priority dstnat; policy accept;\n");
    let family = |a: &std::net::IpAddr| if a.is_ipv6() { "ip6" } else { "ip" };
    let mut post = String::new();
    for f in &network.floating {
        let Some(nic) = network.nics.iter().find(|n| n.uid == f.nic) else { continue };
        if nic.at.as_ref().is_none_or(|at| at.host != plan.host) {
            continue;
        }
        let own: Option<std::net::IpAddr> =
            if f.address.is_ipv6() { nic.address6.map(Into::into) } else { nic.address4.map(Into::into) };
        let Some(own) = own else { continue };
        let k = family(&own);
        let _ = writeln!(out, "  iifname \"up\" {k} daddr {} dnat {k} to {own}", f.address);
        let _ = writeln!(post, "  oifname \"up\" {k} saddr {own} snat {k} to {}", f.address);
    }
    let _ = write!(
        out,
        " }}\n chain post {{ type nat hook postrouting priority srcnat; policy accept;\n{post}  oifname \"up\" masquerade\n }}\n}}\n"
    );
    out
}

pub(super) fn host_text(_: &HostNetworks, _: &[Net]) -> String {
    "table inet nexus-vpc\ndelete table inet nexus-vpc\ntable inet nexus-vpc {
 chain post { type nat hook postrouting priority srcnat; policy accept;
  iifname \"nxu*\" ip saddr 250.0.0.0/8 masquerade
 }
}\n"
    .to_owned()
}
