//! What an app's load was, in slots of five minutes over two weeks: what forecasts and backtests are made from.
//!
//! Every decision of the writer adds a sample of each measure; a slot is their mean. The leader keeps histories in memory and
//! writes each app's present day as one row of the store now and then ([`History::row`]), so that another leader goes on with all
//! but the last minutes. What is missing is a gap, never a nought.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

pub const SLOT_SECONDS: u64 = 300;
pub const DAY_SLOTS: usize = 288;
pub const DAYS: u64 = 14;
pub const SLOTS: usize = DAY_SLOTS * DAYS as usize;
const DAY_SECONDS: u64 = 86_400;

/// What load is measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Measure {
    /// Thousandths of a processor that all instances use together.
    Cpu,
    /// Requests that end within a second.
    Requests,
    /// Requests at once, those that wait among them.
    Concurrency,
}

impl Measure {
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Requests, Self::Concurrency];

    pub fn index(self) -> usize {
        self as usize
    }
}

/// One number for each measure; `None` where it is not known.
pub type Loads = [Option<f64>; 3];

type Slot = [f32; 3];
const UNKNOWN: Slot = [f32::NAN; 3];

/// Slots that are over, and the samples of the one that is not.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// The number of the first slot since 1970.
    first: u64,
    slots: VecDeque<Slot>,
    sums: [f64; 3],
    counts: [u32; 3],
}

/// The version of a row.
const FORMAT: u8 = 1;

impl History {
    /// The slot that is not over.
    fn open(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    fn mean(&self) -> Slot {
        std::array::from_fn(|i| {
            if self.counts[i] > 0 { (self.sums[i] / f64::from(self.counts[i])) as f32 } else { f32::NAN }
        })
    }

    /// Goes on to a slot: what lies between is a gap.
    fn turn_to(&mut self, slot: u64) {
        if self.slots.is_empty() && self.counts == [0; 3] {
            self.first = slot;
        }
        if slot > self.open() + SLOTS as u64 {
            *self = Self { first: slot, ..Self::default() };
        }
        while self.open() < slot {
            let mean = self.mean();
            self.push(mean);
            (self.sums, self.counts) = ([0.0; 3], [0; 3]);
        }
    }

    fn push(&mut self, slot: Slot) {
        self.slots.push_back(slot);
        if self.slots.len() > SLOTS {
            self.slots.pop_front();
            self.first += 1;
        }
    }

    /// Takes in what the load is at a moment, in seconds since 1970. A clock that went back adds to the open slot.
    pub fn record(&mut self, seconds: u64, loads: &Loads) {
        self.turn_to(seconds / SLOT_SECONDS);
        for (i, load) in loads.iter().enumerate() {
            if let Some(load) = load.filter(|l| l.is_finite()) {
                self.sums[i] += load;
                self.counts[i] += 1;
            }
        }
    }

    /// Slots that are over, oldest first, without gaps: one is filled with what was before it, the first ones with what came after.
    pub fn series(&self, measure: Measure) -> Vec<f64> {
        let values = self.slots.iter().map(|s| f64::from(s[measure.index()]));
        let mut last = values.clone().find(|v| v.is_finite()).unwrap_or(0.0);
        values
            .map(|v| {
                last = if v.is_finite() { v } else { last };
                last
            })
            .collect()
    }

    /// Slots that are over, oldest first.
    pub fn values(&self, measure: Measure) -> Vec<Option<f64>> {
        self.slots.iter().map(|s| Some(f64::from(s[measure.index()])).filter(|v| v.is_finite())).collect()
    }

    /// How many slots are over and known.
    pub fn known(&self, measure: Measure) -> usize {
        self.slots.iter().filter(|s| s[measure.index()].is_finite()).count()
    }

    /// The time of the first slot, in seconds since 1970.
    pub fn begins(&self) -> u64 {
        self.first * SLOT_SECONDS
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A day's slots as a row of the store, the open one with what is known of it; `None` if nothing of the day is known.
    pub fn row(&self, day: u64) -> Option<Vec<u8>> {
        let from = day * DAY_SLOTS as u64;
        let slot = |n: u64| match n.checked_sub(self.first) {
            Some(i) if n < self.open() => self.slots.get(i as usize).copied().unwrap_or(UNKNOWN),
            Some(_) if n == self.open() => self.mean(),
            _ => UNKNOWN,
        };
        let slots: Vec<Slot> = (from..from + DAY_SLOTS as u64).map(slot).collect();
        // What comes after the last that is known need not be written.
        let known = slots.iter().rposition(|s| s.iter().any(|v| v.is_finite()))? + 1;
        let mut row = vec![FORMAT];
        row.extend(slots[..known].iter().flatten().flat_map(|v| v.to_le_bytes()));
        Some(row)
    }

    /// Takes in rows of [`History::row`], by day. Rows that can't be read are gaps.
    pub fn from_rows(rows: impl IntoIterator<Item = (u64, Vec<u8>)>) -> Self {
        let mut rows: Vec<(u64, Vec<u8>)> = rows.into_iter().filter(|(_, row)| row.first() == Some(&FORMAT)).collect();
        rows.sort();
        let mut history = Self::default();
        let Some((last_day, _)) = rows.last() else { return history };
        let oldest = last_day.saturating_sub(DAYS);
        for (day, row) in rows.iter().filter(|(day, _)| *day >= oldest) {
            history.turn_to(day * DAY_SLOTS as u64);
            for slot in row[1..].chunks_exact(12).take(DAY_SLOTS) {
                let value = |i: usize| slot[i * 4..i * 4 + 4].try_into().map_or(f32::NAN, f32::from_le_bytes);
                history.push(std::array::from_fn(value));
            }
        }
        history
    }
}

/// The day of a moment, both since 1970.
pub fn day_of(seconds: u64) -> u64 {
    seconds / DAY_SECONDS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(slot: u64) -> u64 {
        slot * SLOT_SECONDS + 7
    }

    #[test]
    fn a_slot_is_the_mean_of_its_samples_and_a_gap_is_no_nought() {
        let mut history = History::default();
        for (slot, load) in [(100, 2.0), (100, 4.0), (101, 10.0), (104, 1.0)] {
            history.record(at(slot), &[Some(load), None, Some(load * 2.0)]);
        }
        assert_eq!(history.series(Measure::Cpu), [3.0, 10.0, 10.0, 10.0]);
        assert_eq!(history.series(Measure::Concurrency), [6.0, 20.0, 20.0, 20.0]);
        assert_eq!((history.known(Measure::Cpu), history.known(Measure::Requests)), (2, 0));
        assert_eq!(history.begins(), 100 * SLOT_SECONDS);
    }

    #[test]
    fn rows_bring_a_history_back() {
        let mut history = History::default();
        let first = 20_000 * DAY_SLOTS as u64 + 250;
        for slot in first..first + 400 {
            history.record(at(slot), &[Some(slot as f64), Some(1.0), None]);
        }
        let days: Vec<u64> = (19_999..20_005).collect();
        let rows = days.iter().filter_map(|day| Some((*day, history.row(*day)?)));
        let back = History::from_rows(rows.chain([(20_001, vec![9, 9])]));
        let (mine, theirs) = (history.series(Measure::Cpu), back.series(Measure::Cpu));
        // The open slot was in the row; before the first everything of that day is a gap.
        assert_eq!(&theirs[250..], &[&mine[..], &[(first + 399) as f64]].concat()[..]);
        assert_eq!(back.known(Measure::Requests), 400);
    }

    #[test]
    fn two_weeks_are_kept() {
        let mut history = History::default();
        for slot in 0..SLOTS as u64 + 50 {
            history.record(at(slot), &[Some(slot as f64), None, None]);
        }
        assert_eq!(history.series(Measure::Cpu).len(), SLOTS);
        history.record(at(10 * SLOTS as u64), &[Some(1.0), None, None]);
        assert!(history.is_empty());
    }
}
