//! What a network's namespace, and the host's own of all networks, have dropped so far, as packet filters and the kernel count it.

use std::fs;

use super::counters::{Counter, no_route, parse};
use super::rules::HOST_TABLE;
use crate::NetError;
use crate::firewall::nft;
use crate::netns::{NetnsRef, aside};

/// By reason; `no_route` is for what nothing leads to.
pub async fn drops(netns: NetnsRef) -> Result<Vec<Counter>, NetError> {
    aside(netns, "a network's counters", || {
        let mut all = parse(&nft("reading a network's counters", &["-j", "list", "counters"], "")?);
        // Of the thread, which is in the namespace. What can't be read counts nothing.
        let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        let packets = no_route(&read("snmp"), &read("snmp6"));
        all.push(Counter { reason: "no_route".into(), packets, bytes: 0 });
        Ok(all)
    })
    .await
}

/// What the host's own table has dropped between networks and the host, of all networks together. Nothing, while there is no such
/// table.
pub async fn host_drops(netns: NetnsRef) -> Result<Vec<Counter>, NetError> {
    aside(netns, "the host's counters of tenants' networks", || {
        let what = "reading the host's counters of tenants' networks";
        if !nft(what, &["list", "tables", "inet"], "")?.lines().any(|l| l.split(' ').any(|w| w == HOST_TABLE)) {
            return Ok(Vec::new());
        }
        Ok(parse(&nft(what, &["-j", "list", "counters", "table", "inet", HOST_TABLE], "")?))
    })
    .await
}
