//! What was dropped, by reason: the named counters of the tables, and the kernel's own of packets without a route.

use serde_json::Value;

/// One reason and what was dropped for it since the rules were last replaced.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counter {
    /// Such as `no_ingress_rule`.
    pub reason: String,
    pub packets: u64,
    pub bytes: u64,
}

/// Reads what `nft -j list counters` says. Others' tables are passed over; what can't be read is nothing.
pub fn parse(json: &str) -> Vec<Counter> {
    let all: Value = serde_json::from_str(json).unwrap_or_default();
    let read = |entry: &Value| {
        let counter = entry.get("counter")?;
        let table = counter.get("table")?.as_str()?;
        if table != super::rules::TABLE && table != super::rules::HOST_TABLE {
            return None;
        }
        let reason = counter.get("name")?.as_str()?.strip_prefix("drop_")?;
        let number = |key: &str| counter.get(key).and_then(Value::as_u64);
        Some(Counter { reason: reason.to_owned(), packets: number("packets")?, bytes: number("bytes")? })
    };
    let mut out: Vec<Counter> = all["nftables"].as_array().into_iter().flatten().filter_map(read).collect();
    out.sort();
    out
}

/// Packets for which a namespace had no route, by its /proc/net/snmp and /proc/net/snmp6 (of the thread that is in it:
/// /proc/thread-self/net/…).
pub fn no_route(snmp: &str, snmp6: &str) -> u64 {
    let mut lines = snmp.lines().filter_map(|l| l.strip_prefix("Ip: "));
    let four = lines.next().zip(lines.next()).and_then(|(names, values)| {
        let of = |name: &str| {
            let at = names.split(' ').position(|n| n == name)?;
            values.split(' ').nth(at)?.parse::<u64>().ok()
        };
        // What is forwarded and finds no route is an address error of those who sent it.
        Some(of("OutNoRoutes")? + of("InAddrErrors")?)
    });
    let of6 = |name: &str| {
        let value = snmp6.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
        value.unwrap_or(0)
    };
    four.unwrap_or(0) + of6("Ip6InNoRoutes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_and_others_passed_over() {
        let json = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"counter": {"family": "inet", "name": "drop_rogue", "table": "nexus", "handle": 5, "packets": 3, "bytes": 180}},
            {"counter": {"family": "inet", "name": "drop_closed", "table": "nexus-vpc", "handle": 5, "packets": 1, "bytes": 60}},
            {"counter": {"family": "inet", "name": "drop_rogue", "table": "theirs", "handle": 5, "packets": 9, "bytes": 9}},
            {"counter": {"family": "inet", "name": "other", "table": "nexus", "handle": 5, "packets": 9, "bytes": 9}}]}"#;
        let counter = |reason: &str, packets, bytes| Counter { reason: reason.into(), packets, bytes };
        assert_eq!(parse(json), [counter("closed", 1, 60), counter("rogue", 3, 180)]);
        assert_eq!(parse(""), []);
        assert_eq!(parse("[1, {}]"), []);
    }

    #[test]
    fn packets_without_a_route_are_the_kernels_to_count() {
        let snmp = "Ip: Forwarding InAddrErrors OutNoRoutes\nIp: 1 7 5\nIcmp: InMsgs\nIcmp: 2\n";
        assert_eq!(no_route(snmp, "Ip6InReceives    9\nIp6InNoRoutes     \t4\n"), 16);
        assert_eq!(no_route("", ""), 0);
    }
}
