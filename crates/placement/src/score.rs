//! How good a feasible host is for a request.
//!
//! A [`Score`] has two parts. The *tier* is spread: with [`SpreadLevel::Zone`](crate::SpreadLevel) (or `Rack`) the group's
//! count in the zone (or rack), then on the host; with `Host` only the latter. A better tier always wins. Inside a tier the *merit*
//! decides, a fixed-point sum of five terms, each between 0 and its weight:
//!
//! | term | full marks | none |
//! |---|---|---|
//! | fit | the request takes the last of the host | all of the dominant dimension is left over |
//! | balance | cpu and memory are left in equal parts | one is used up, the other untouched: stranded |
//! | class | no compute class is occupied that wasn't asked for | a GPU host for a request without GPU |
//! | image | the host holds the image | it must fetch it |
//! | load | measured idle and well ([`crate::telemetry`]) | measured busy |
//!
//! On a host with several NUMA nodes, for a request that wants some, fit and balance are one term: full marks where it
//! costs the learned mix of requests nothing, half where it costs as much as one future request ([`crate::mix`]). Whole
//! hosts and pairs of nodes stay free of themselves, because they are worth most to the mix, and so do cpu and memory in
//! the proportion that it asks for. The first of a group that is to stay together loses up to [`WEIGHT_ROOM`] where few
//! more like it have room.
//!
//! Everything is integer arithmetic on fractions of [`UNIT`], so the same state gives the same score on every machine.
//! A host's fractions are of its capacity rounded up to a sixteenth of its octave ([`nominal`]): hosts that differ only
//! by what their firmware kept are scored, and indexed, on one scale.

use std::cmp::Ordering;

/// One, in fixed point: the whole of a host's cpu or memory.
pub const UNIT: u32 = 1 << 16;

/// Fit leads: filling the fullest host that still takes the request keeps whole hosts free for the large requests and
/// for draining. Weights are in hundredths of the merit.
pub const WEIGHT_FIT: u32 = 48;
/// Half of fit: stranding a third of a host's memory behind a full cpu is as bad as leaving a sixth of the host open.
pub const WEIGHT_BALANCE: u32 = 24;
/// Compute classes are the dearest thing in the cell, so a quarter of the way across a host is walked to leave them
/// alone, but they do not lie idle for want of plain work when the rest is full: it is a preference, not a filter.
pub const WEIGHT_CLASS: u32 = 12;
/// Fetching an image costs seconds once; a worse packing costs for the life of the instance.
pub const WEIGHT_IMAGE: u32 = 10;
/// The least: the measurement is a heartbeat old, and reservations already bound what a host can be asked for.
pub const WEIGHT_LOAD: u32 = 6;

/// How many more like it the first of a group that stays together looks for: half of such groups in the production data
/// that the bench replays have no more than seven members.
pub const ROOM: u32 = 6;
/// Taken from a merit without any room for more: as much as fit weighs, so that room for all of them outweighs any difference
/// of fit, and a group doesn't start on a full host because that host is full.
pub const WEIGHT_ROOM: u32 = 48;

/// The merit of a host without a flaw. (One is added so that no feasible host has merit 0.)
pub const BEST_MERIT: u32 = 1 + UNIT * (WEIGHT_FIT + WEIGHT_BALANCE + WEIGHT_CLASS + WEIGHT_IMAGE + WEIGHT_LOAD);

/// The search stops when no host unseen can be better than the best one seen by more than one part in `SLACK`.
pub(crate) const SLACK: u32 = 64;

/// What `place` promises of the best merit there is: `SLACK / (SLACK + 1)`, rounded down.
pub const GUARANTEE: f64 = 0.984;

/// A host's score. Orders from worse to better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Score {
    /// Instances of the group in the host's zone or rack (0 unless spread over these).
    pub domain_peers: u32,
    /// Instances of the group on the host (0 unless spread).
    pub host_peers: u32,
    /// How well it packs, at most [`BEST_MERIT`].
    pub merit: u32,
}

impl Score {
    /// Whether both lie in the same spread tier, so that their merits compare.
    pub fn same_tier(&self, other: &Score) -> bool {
        (self.domain_peers, self.host_peers) == (other.domain_peers, other.host_peers)
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> Ordering {
        let tier = |s: &Score| (s.domain_peers, s.host_peers);
        tier(other).cmp(&tier(self)).then(self.merit.cmp(&other.merit))
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// `part` of `whole` in [`UNIT`]s, rounded down and capped at one.
pub(crate) fn fraction(part: u64, whole: u64) -> u32 {
    if part >= whole {
        UNIT
    } else if whole <= u64::MAX / u64::from(UNIT) {
        // part < whole <= 2^48, so the product fits, and the quotient is below UNIT.
        (part * u64::from(UNIT) / whole) as u32
    } else {
        (u128::from(part) * u128::from(UNIT) / u128::from(whole)) as u32
    }
}

/// A capacity rounded up to a sixteenth of its octave (at most 6.25 % more); at least 1.
pub(crate) fn nominal(capacity: u64) -> u64 {
    let capacity = capacity.max(1);
    let step = 1u64 << (63 - capacity.leading_zeros()).saturating_sub(4);
    capacity.div_ceil(step).saturating_mul(step)
}

/// Fit and balance of leftovers `cpu` and `memory`.
pub(crate) fn packing(cpu: u32, memory: u32) -> u32 {
    WEIGHT_FIT * (UNIT - cpu.max(memory)) + WEIGHT_BALANCE * (UNIT - cpu.abs_diff(memory))
}

/// The most that [`packing`] can be for leftovers within `cpu` and `memory`, each (least, most).
pub(crate) fn packing_bound(cpu: (u32, u32), memory: (u32, u32)) -> u32 {
    let gap = cpu.0.saturating_sub(memory.1).max(memory.0.saturating_sub(cpu.1));
    WEIGHT_FIT * (UNIT - cpu.0.max(memory.0)) + WEIGHT_BALANCE * (UNIT - gap)
}

/// What a leader's merit loses where only so many more fit.
pub(crate) fn room_term(more: u32) -> u32 {
    WEIGHT_ROOM * UNIT / ROOM * (ROOM - more.min(ROOM))
}

/// The load term of a host's measured load.
pub(crate) fn load_term(thousandths: u16) -> u32 {
    WEIGHT_LOAD * UNIT / 1000 * u32::from(1000 - thousandths.min(1000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_better_tier_beats_any_merit() {
        let even = Score { domain_peers: 1, host_peers: 3, merit: 1 };
        let packed = Score { domain_peers: 2, host_peers: 0, merit: BEST_MERIT };
        assert!(even > packed);
        assert!(Score { host_peers: 2, ..even } > even);
        assert!(Score { merit: 2, ..even } > even);
    }

    #[test]
    fn a_full_host_scores_better_than_an_empty_one_and_a_balanced_one_better_than_a_lopsided_one() {
        assert!(packing(0, 0) > packing(UNIT / 2, UNIT / 2));
        assert!(packing(UNIT / 2, UNIT / 2) > packing(UNIT / 2, 0));
        assert_eq!(packing(UNIT, 0), 0);
    }

    #[test]
    fn nominal_rounds_up_little_and_keeps_common_sizes() {
        for exact in [1, 16, 24, 48, 64_000, 96_000, 128 << 30, 384 << 30] {
            assert!(nominal(exact) >= exact && nominal(exact) <= exact + exact / 16);
        }
        assert_eq!(nominal(0), 1);
        assert_eq!(nominal(126 << 30), nominal((126 << 30) - 12345));
        assert_eq!(nominal(u64::MAX), u64::MAX);
    }

    proptest! {
        #[test]
        fn the_bound_holds(a in 0..UNIT, b in 0..UNIT, da in 0..2048u32, db in 0..2048u32, x in 0..2048u32, y in 0..2048u32) {
            let cpu = (a, (a + da).min(UNIT));
            let memory = (b, (b + db).min(UNIT));
            let bound = packing_bound(cpu, memory);
            prop_assert!(packing((a + x).min(cpu.1), (b + y).min(memory.1)) <= bound);
        }

        #[test]
        fn fractions_are_monotone(whole in 1u64.., a: u64, b: u64) {
            prop_assert!((a <= b) == (a <= b && fraction(a, whole) <= fraction(b, whole)) );
            prop_assert!(fraction(a, whole) <= UNIT);
            prop_assert_eq!(fraction(whole, whole), UNIT);
        }
    }
}
