//! Which instance takes a request: a pure choice among what is known of each.
//!
//! 1. Instances that are ready and not ejected. If there are none, ejected ones; if the table holds no ready instance
//!    at all (the control plane may be gone and the table stale), those that are not ready: better a try than a
//!    certain failure.
//! 2. Of these, the gateway's own zone, unless its least busy instance has clearly more outstanding requests than
//!    another zone's: more than twice as many and [`SPILL`] besides.
//! 3. Of these, the fewest outstanding requests; equals take turns.

/// Outstanding requests by which the nearest zone must exceed twice the others' before requests leave it.
const SPILL: u32 = 8;

/// What the choice is made by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub ready: bool,
    pub ejected: bool,
    pub local: bool,
    pub outstanding: u32,
    /// Already tried for this request, or at its limit.
    pub excluded: bool,
}

/// How far down a choice may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Worst {
    /// Ready and not ejected.
    Well,
    /// Ready.
    Ready,
    /// Whatever there is.
    Any,
}

/// The index of the choice. `turn` should differ from call to call.
pub(crate) fn pick(
    candidates: impl ExactSizeIterator<Item = Candidate> + Clone,
    turn: usize,
    worst: Worst,
) -> Option<usize> {
    let any_ready = candidates.clone().any(|c| c.ready);
    let tier = |c: &Candidate| match (c.ready, c.ejected) {
        (true, false) => Some(0u8),
        (true, true) if worst >= Worst::Ready => Some(1),
        (false, ejected) if !any_ready && worst == Worst::Any => Some(2 + u8::from(ejected)),
        _ => None,
    };
    let count = candidates.len();
    // The best of the own zone and of the others: (tier, outstanding, whose turn, index).
    let mut best: [Option<(u8, u32, usize, usize)>; 2] = [None, None];
    for (index, c) in candidates.enumerate() {
        if c.excluded {
            continue;
        }
        let Some(tier) = tier(&c) else { continue };
        let rank = (tier, c.outstanding, (index + count - turn % count) % count, index);
        let slot = &mut best[usize::from(!c.local)];
        if slot.is_none_or(|held| rank < held) {
            *slot = Some(rank);
        }
    }
    match best {
        [Some(near), Some(far)] => {
            let spills = near.1 > far.1.saturating_mul(2).saturating_add(SPILL);
            Some(if far.0 < near.0 || (far.0 == near.0 && spills) { far.3 } else { near.3 })
        }
        [Some(one), None] | [None, Some(one)] => Some(one.3),
        [None, None] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: Candidate = Candidate { ready: true, ejected: false, local: true, outstanding: 0, excluded: false };
    const FAR: Candidate = Candidate { local: false, ..FINE };

    fn choose(candidates: &[Candidate], turn: usize) -> Option<usize> {
        pick(candidates.iter().copied(), turn, Worst::Any)
    }

    #[test]
    fn the_nearest_zone_is_taken_unless_it_is_clearly_busier() {
        assert_eq!(choose(&[FAR, FINE], 0), Some(1));
        assert_eq!(choose(&[FAR, Candidate { outstanding: 8, ..FINE }], 0), Some(1));
        assert_eq!(choose(&[FAR, Candidate { outstanding: 9, ..FINE }], 0), Some(0));
        assert_eq!(choose(&[FAR, Candidate { ejected: true, ..FINE }], 0), Some(0));
    }

    #[test]
    fn the_least_busy_is_taken_and_equals_take_turns() {
        let busy = Candidate { outstanding: 3, ..FINE };
        assert_eq!(choose(&[busy, FINE, busy], 7), Some(1));
        let turns: Vec<_> = (0..4).map(|t| choose(&[FINE, FINE], t).unwrap()).collect();
        assert_eq!(turns, [0, 1, 0, 1]);
    }

    #[test]
    fn an_instance_that_is_not_ready_is_only_tried_when_none_is() {
        let starting = Candidate { ready: false, ..FINE };
        let out = Candidate { ejected: true, ..FINE };
        assert_eq!(choose(&[starting, out], 0), Some(1));
        assert_eq!(choose(&[starting, Candidate { excluded: true, ..out }], 0), None);
        assert_eq!(choose(&[starting], 0), Some(0));
        assert_eq!(choose(&[], 0), None);
    }

    #[test]
    fn a_choice_goes_no_further_down_than_it_may() {
        let out = Candidate { ejected: true, ..FINE };
        let starting = Candidate { ready: false, ..FINE };
        let choose = |candidates: &[Candidate], worst| pick(candidates.iter().copied(), 0, worst);
        assert_eq!(choose(&[out, FINE], Worst::Well), Some(1));
        assert_eq!(choose(&[out], Worst::Well), None);
        assert_eq!(choose(&[out], Worst::Ready), Some(0));
        assert_eq!(choose(&[starting], Worst::Ready), None);
        assert_eq!(choose(&[starting], Worst::Any), Some(0));
    }
}
