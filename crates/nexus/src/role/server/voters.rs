//! Who votes in the global group, while regions and servers come and go.
//!
//! Every server of the fleet is a member; whoever comes in reads along. The group's leader compares the members with the
//! regions that the group lists, and takes one step at a time: it gives one a vote, or takes one. The rule is in
//! [ADR 7](../../../../../docs/adr/0007-global-group.md):
//!
//! * servers of core regions vote and no others, at most nine;
//! * the votes are spread: no region has two before every other has one, as far as it has servers;
//! * no region has half of the votes, if there are three: so any one may be lost;
//! * an even number is made odd, except two: it tolerates no more losses and waits for one more answer;
//! * a voter that has been silent for a minute yields its vote to a server that reads along, if there is one too many.
//!
//! A member of a region that is not listed (yet) keeps what it has. Nothing is taken before what is to be given has been
//! given. The store refuses whatever would lose the quorum.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nexus_control::view::View;
use nexus_env::Env;
use nexus_model::Name;
use nexus_model::kind::Tier;
use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::membership::Group;

/// `global` has at most so many voters; further servers read along.
const MOST: usize = 9;
const ROUND: Duration = Duration::from_secs(2);
/// A voter that is silent for so long is not counted on.
const SILENT: Duration = Duration::from_secs(60);

/// A member of the global group.
#[derive(Debug, Clone, PartialEq)]
struct Seat {
    node: u64,
    /// Its region and whether that is a core one, if it is known.
    region: Option<(Name, bool)>,
    voter: bool,
    /// It answers now.
    answers: bool,
    /// It has answered within [`SILENT`].
    lively: bool,
}

impl Seat {
    /// Who should rather vote comes first: changes are for the better only.
    fn rank(&self) -> (bool, bool, u64) {
        (!self.lively, !self.voter, self.node)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Give(u64),
    Take(u64),
}

/// The members of core regions that are to vote, beside `others` voters whose regions are not known.
fn chosen(seats: &[Seat], others: usize) -> Vec<&Seat> {
    let mut regions: BTreeMap<&Name, Vec<&Seat>> = BTreeMap::new();
    for seat in seats.iter().filter(|s| s.voter || s.lively) {
        if let Some((region, true)) = &seat.region {
            regions.entry(region).or_default().push(seat);
        }
    }
    regions.values_mut().for_each(|r| r.sort_by_key(|s| s.rank()));
    let wide = regions.len() >= 3;
    // By turns; within a turn the better ones first, for the last may not get round.
    let mut turns: Vec<(usize, &Seat)> = Vec::new();
    for seats in regions.values() {
        turns.extend(seats.iter().enumerate().map(|(turn, seat)| (turn, *seat)));
    }
    turns.sort_by_key(|(turn, seat)| (*turn, seat.rank()));
    turns.truncate(MOST.saturating_sub(others));
    let mut chosen: Vec<&Seat> = turns.into_iter().map(|(_, seat)| seat).collect();
    let largest = |chosen: &[&Seat]| {
        let mut counts: BTreeMap<&Name, usize> = BTreeMap::new();
        for seat in chosen {
            *counts
                .entry(seat.region.as_ref().map(|(r, _)| r).expect("only seats of regions are chosen"))
                .or_default() += 1;
        }
        let most = counts.values().copied().max().unwrap_or(0);
        let last_of = |region: &Name| chosen.iter().rposition(|s| s.region.as_ref().is_some_and(|(r, _)| r == region));
        let largest = counts.into_iter().filter(|(_, count)| *count == most).filter_map(|(region, _)| last_of(region));
        largest.max_by_key(|at| chosen[*at].rank()).map(|at| (at, most))
    };
    while let Some((at, most)) = largest(&chosen) {
        let all = chosen.len() + others;
        let even = all > 2 && all.is_multiple_of(2);
        if most > 1 && wide && 2 * most >= all || even {
            chosen.remove(at);
        } else {
            break;
        }
    }
    chosen
}

/// The next change that is due.
fn next(seats: &[Seat]) -> Option<Step> {
    let others = seats.iter().filter(|s| s.voter && s.region.is_none()).count();
    let chosen = chosen(seats, others);
    let mut due = chosen.iter().filter(|s| !s.voter).peekable();
    if due.peek().is_some() {
        // If none of them answers, that is waited for, for a minute.
        return due.find(|s| s.answers).map(|s| Step::Give(s.node));
    }
    let spare = seats.iter().filter(|s| s.voter && s.region.is_some() && !chosen.iter().any(|c| c.node == s.node));
    spare.max_by_key(|s| s.rank()).map(|s| Step::Take(s.node)).filter(|_| !chosen.is_empty())
}

/// Keeps the votes as they should be while this server leads the group, until `stop`.
pub async fn keep(global: Arc<Engine>, view: View, env: Env, stop: CancellationToken) {
    // Where etcd keeps the group, nobody votes.
    if global.embedded().is_none() {
        return;
    }
    let mut heard: BTreeMap<u64, Duration> = BTreeMap::new();
    let mut said = String::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(ROUND) => {}
        }
        if !global.leads().await {
            heard.clear();
            continue;
        }
        let Some(step) = look(&global, &view, env.monotonic(), &mut heard).await else { continue };
        let done = match step {
            Step::Give(node) => global.promote(node).await,
            Step::Take(node) => global.demote(node).await,
        };
        match done {
            Ok(()) => tracing::info!(?step, "the votes on the global group were changed"),
            Err(error) => {
                let text = format!("{step:?}: {error}");
                if text != said {
                    tracing::warn!(?step, %error, "the votes on the global group can't be changed yet");
                    said = text;
                }
            }
        }
    }
}

async fn look(global: &Engine, view: &View, now: Duration, heard: &mut BTreeMap<u64, Duration>) -> Option<Step> {
    let health = global.health().await.ok()?;
    heard.retain(|node, _| health.iter().any(|h| h.node == *node));
    let regions: BTreeMap<u64, (Name, bool)> = view.read(|world| {
        let regions = world.fleet().regions.live.values();
        let servers = regions.flat_map(|r| {
            r.status.servers.iter().map(|s| (s.node, (r.metadata.name.clone(), r.spec.tier == Tier::Core)))
        });
        servers.collect()
    });
    let seats: Vec<Seat> = health
        .into_iter()
        .map(|h| {
            // Who begins to lead has heard nobody yet.
            let last = heard.entry(h.node).or_insert(now);
            if h.reachable {
                *last = now;
            }
            let lively = now.saturating_sub(*last) < SILENT;
            Seat { node: h.node, region: regions.get(&h.node).cloned(), voter: h.voter, answers: h.reachable, lively }
        })
        .collect();
    next(&seats)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDGE: char = 'e';

    /// `a1` is a server that reads along in the core region a, `A1` one that votes, `e1` one of an edge region; `?` stands
    /// for a region that is not known, and `-` after it says that it has been silent for long.
    fn seats(text: &str) -> Vec<Seat> {
        let seat = |(at, word): (usize, &str)| {
            let region = word.chars().next().unwrap();
            let known = region.to_ascii_lowercase();
            let lively = !word.ends_with('-');
            Seat {
                node: at as u64 + 1,
                region: (region != '?').then(|| (known.to_string().parse().unwrap(), known != EDGE)),
                voter: region.is_ascii_uppercase() || word.contains('!'),
                answers: lively,
                lively,
            }
        };
        text.split(' ').enumerate().map(seat).collect()
    }

    /// Takes all steps; answers who votes in the end, and how many steps it took.
    fn settle(text: &str) -> (String, usize) {
        let mut all = seats(text);
        let words: Vec<&str> = text.split(' ').collect();
        let mut steps = 0;
        while let Some(step) = next(&all) {
            steps += 1;
            assert!(steps < 50, "it never settles: {all:?}");
            let (node, voter) = match step {
                Step::Give(node) => (node, true),
                Step::Take(node) => (node, false),
            };
            all[node as usize - 1].voter = voter;
        }
        let voters = all.iter().zip(words).filter(|(s, _)| s.voter).map(|(_, w)| w.to_lowercase());
        (voters.collect::<Vec<_>>().join(" "), steps)
    }

    #[test]
    fn votes_are_spread_over_core_regions_odd_and_bounded() {
        for (members, voters) in [
            ("A1", "a1"),
            ("A1 b1", "a1 b1"),
            ("A1 B1 c1", "a1 b1 c1"),
            // A fourth region reads along until it has two servers, or another leaves.
            ("A1 B1 C1 d1", "a1 b1 c1"),
            ("B1 C1 d1", "b1 c1 d1"),
            ("A1 B1 C1 d1 d2", "a1 b1 c1 d1 d2"),
            ("A1 B1 C1 d1 e1 f1", "a1 b1 c1 d1 f1"),
            ("A1 a2 a3", "a1 a2 a3"),
            ("A1 A2 A3 a4", "a1 a2 a3"),
            ("A1 a2 a3 B1 b2 b3 C1 c2 c3 d1 d2", "a1 a2 a3 b1 b2 c1 c2 d1 d2"),
            // One region may not outvote the others.
            ("A1 A2 A3 B1 C1", "a1 b1 c1"),
            ("A1 A2 A3 B1 B2 C1", "a1 a2 b1 b2 c1"),
            ("E1 A1 B1 C1", "a1 b1 c1"),
        ] {
            assert_eq!(settle(members).0, voters, "{members}");
        }
    }

    #[test]
    fn what_is_right_stays_as_it_is() {
        for members in ["A1 B1 C1", "A1 B1 C1 d1", "a1 B1 C1 D1", "A1 B1 C1-", "A1 A2 B1 B2 C1 c2 d1-"] {
            assert_eq!(settle(members).1, 0, "{members}");
        }
    }

    #[test]
    fn a_voter_that_is_silent_for_long_yields_to_a_server_that_reads_along() {
        assert_eq!(settle("A1- B1 C1 d1").0, "b1 c1 d1");
        assert_eq!(settle("A1- a2 B1 C1").0, "a2 b1 c1");
        assert_eq!(settle("A1- B1 C1").0, "a1- b1 c1", "nobody could take its place");
        assert_eq!(settle("A1 B1 C1 d1-").0, "a1 b1 c1");
        let first = next(&seats("A1- B1 C1 d1"));
        assert_eq!(first, Some(Step::Give(4)), "what is to be given comes first");
    }

    #[test]
    fn who_is_not_known_keeps_what_it_has() {
        assert_eq!(settle("?! ?! ?!").1, 0);
        assert_eq!(settle("A1 B1 ?! ?").1, 0);
        assert_eq!(settle("E1").1, 0, "the last voter keeps its vote, wherever it is");
    }
}
