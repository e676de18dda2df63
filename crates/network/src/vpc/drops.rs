//! What a network's namespace has dropped so far, as its packet filter and the kernel count it.

use std::fs;

use super::counters::{Counter, no_route, parse};
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
