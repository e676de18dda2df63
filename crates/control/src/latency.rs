//! How far gateways are from hosts: a matrix in the memory of the writer that leads, filled by the gateways' reports.
//!
//! An entry that is not renewed is forgotten, so that a gateway that is gone vouches for nothing. A host's round trip is
//! the lowest of any gateway's. A new leader knows none until gateways have reported to it, which takes seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nexus_model::Name;
use nexus_model::kind::RoundTrip;
use nexus_model::plan::{PROBED_AT_ONCE, RoundTripReport};

/// Gateways of which one host's round trips are kept.
const GATEWAYS: usize = 64;
/// An entry is kept for so long, where a gateway measures all hosts in one round, …
pub const KEPT: Duration = Duration::from_secs(30);
/// … and for so much longer with each further round that it needs.
const KEPT_MORE: Duration = Duration::from_secs(10);
/// What has changed is written down at most so often.
const WRITTEN_EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
struct Trip {
    us: u32,
    at: Duration,
}

#[derive(Debug, Default)]
pub struct Latencies {
    by_host: BTreeMap<Name, BTreeMap<Name, Trip>>,
    written: BTreeMap<Name, Duration>,
    /// Hosts whose row may say something else.
    changed: BTreeSet<Name>,
}

impl Latencies {
    /// Takes in what a gateway has measured, of the hosts that `known` knows. Answers the hosts that it tells of.
    pub fn hear(&mut self, report: &RoundTripReport, now: Duration, known: impl Fn(&Name) -> bool) -> Vec<Name> {
        let told = report.trips.iter().take(PROBED_AT_ONCE).filter(|trip| known(&trip.host));
        let mut hosts = Vec::new();
        for trip in told {
            let row = self.by_host.entry(trip.host.clone()).or_default();
            if row.len() < GATEWAYS || row.contains_key(&report.gateway) {
                row.insert(report.gateway.clone(), Trip { us: trip.us, at: now });
                hosts.push(trip.host.clone());
            }
        }
        self.changed.extend(hosts.iter().cloned());
        hosts
    }

    /// Forgets what was not renewed, and hosts that are no more. Answers the hosts that lost an entry.
    pub fn expire(&mut self, now: Duration, hosts: usize, known: impl Fn(&Name) -> bool) -> Vec<Name> {
        let rounds = u32::try_from(hosts / PROBED_AT_ONCE).unwrap_or(u32::MAX);
        let kept = KEPT + KEPT_MORE.saturating_mul(rounds);
        let mut poorer = Vec::new();
        self.by_host.retain(|host, row| {
            let before = row.len();
            row.retain(|_, trip| now.saturating_sub(trip.at) < kept);
            if row.len() < before {
                poorer.push(host.clone());
            }
            !row.is_empty() && known(host)
        });
        self.written.retain(|host, _| known(host));
        self.changed.retain(|host| known(host));
        self.changed.extend(poorer.iter().filter(|host| known(host)).cloned());
        poorer
    }

    /// The lowest round trip of a host, in microseconds.
    pub fn lowest(&self, host: &Name) -> Option<u32> {
        self.by_host.get(host)?.values().map(|trip| trip.us).min()
    }

    /// Every gateway's round trip to a host.
    pub fn of(&self, host: &Name) -> Vec<RoundTrip> {
        let row = self.by_host.get(host).into_iter().flatten();
        row.map(|(gateway, trip)| RoundTrip { gateway: gateway.clone(), us: trip.us }).collect()
    }

    /// The hosts whose row is to be looked at now; the others' changes were written a moment ago.
    pub fn to_write(&mut self, now: Duration) -> Vec<Name> {
        let due = |host: &&Name| self.written.get(*host).is_none_or(|at| now.saturating_sub(*at) >= WRITTEN_EVERY);
        self.changed.iter().filter(due).cloned().collect()
    }

    /// Has a host's row looked at although nothing was heard of it: what it says may be of a leader before this one.
    pub fn look_at(&mut self, host: Name) {
        self.changed.insert(host);
    }

    /// A host's row was looked at, and written if that was so.
    pub fn looked_at(&mut self, host: &Name, written: bool, now: Duration) {
        self.changed.remove(host);
        if written {
            self.written.insert(host.clone(), now);
        }
    }
}

/// Whether what stands in a host's row is too far from what is so: a gateway came or went, or a round trip changed by a
/// quarter, and by more than a tenth of a millisecond.
pub fn differs(told: &[RoundTrip], now: &[RoundTrip]) -> bool {
    let far = |a: u32, b: u32| a.abs_diff(b) > 100 && u64::from(a.abs_diff(b)) * 4 >= u64::from(a.min(b));
    told.len() != now.len() || told.iter().zip(now).any(|(a, b)| a.gateway != b.gateway || far(a.us, b.us))
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::HostTrip;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn report(gateway: &str, trips: &[(&str, u32)]) -> RoundTripReport {
        let trips = trips.iter().map(|(host, us)| HostTrip { host: name(host), us: *us }).collect();
        RoundTripReport { gateway: name(gateway), trips, after: None }
    }

    #[test]
    fn the_lowest_of_the_gateways_that_still_report_counts() {
        let s = Duration::from_secs;
        let mut matrix = Latencies::default();
        let known = |host: &Name| *host != "stranger";
        matrix.hear(&report("g1", &[("a", 900), ("b", 300), ("stranger", 1)]), s(1), known);
        matrix.hear(&report("g2", &[("a", 400)]), s(20), known);
        assert_eq!((matrix.lowest(&name("a")), matrix.lowest(&name("b"))), (Some(400), Some(300)));
        assert_eq!(matrix.lowest(&name("stranger")), None);
        assert_eq!(matrix.of(&name("a")).len(), 2);
        assert_eq!(matrix.expire(s(31), 2, known), [name("a"), name("b")], "g1 is silent");
        assert_eq!((matrix.lowest(&name("a")), matrix.lowest(&name("b"))), (Some(400), None));
        assert!(matrix.expire(s(200), 20 * PROBED_AT_ONCE, known).is_empty(), "many hosts take many rounds");
        assert_eq!(matrix.expire(s(51), 2, known), [name("a")]);
    }

    #[test]
    fn a_row_is_written_when_it_moved_and_not_too_often() {
        let s = Duration::from_secs;
        let mut matrix = Latencies::default();
        matrix.hear(&report("g1", &[("a", 900)]), s(1), |_| true);
        assert_eq!(matrix.to_write(s(1)), [name("a")]);
        matrix.looked_at(&name("a"), true, s(1));
        assert!(matrix.to_write(s(2)).is_empty());
        matrix.hear(&report("g1", &[("a", 5_000)]), s(3), |_| true);
        assert!(matrix.to_write(s(3)).is_empty());
        assert_eq!(matrix.to_write(s(11)), [name("a")]);
        let trip = |us| vec![RoundTrip { gateway: name("g1"), us }];
        assert!(differs(&[], &trip(1)) && differs(&trip(20_000), &trip(30_000)) && differs(&trip(300), &trip(401)));
        assert!(
            !differs(&trip(300), &trip(390))
                && !differs(&trip(20_000), &trip(24_000))
                && !differs(&trip(20), &trip(60))
        );
    }
}
