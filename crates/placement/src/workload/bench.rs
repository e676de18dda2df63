//! The measurement: decisions a second, how long the slowest took, and how good they were.
//!
//! The clock is passed in. What is timed is the whole loop (decision, reservation, departures, host changes), less the
//! sampled scans that the quality is judged by.

use super::{FILL, Strategy, Workload};
use crate::Score;
use std::time::Duration;

/// What a run measured.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchReport {
    pub hosts: u32,
    pub flavours: usize,
    pub decisions: u64,
    /// Of the whole loop: decisions, reservations, departures and host changes.
    pub seconds: f64,
    /// Decisions over `seconds`.
    pub per_second: f64,
    /// Decisions over the time spent deciding alone.
    pub decide_per_second: f64,
    /// Of one decision.
    pub p50: Duration,
    pub p99: Duration,
    pub max: Duration,
    /// Hosts looked at one by one, on average over accepted decisions (0 for a peer).
    pub examined_mean: f64,
    /// Hosts with more reserved than they have, summed over checks made through the run. Any means failure.
    pub oversold: u64,
    /// Whether the cell's books agreed with a recount at the end.
    pub audited: bool,
    /// Decisions judged against a scan of every host.
    pub sampled: u64,
    /// Merit chosen over the best merit there was; 0 where the chosen spread tier was worse than the best.
    pub score_ratio_min: f64,
    pub score_ratio_mean: f64,
    /// The same ratio for a feasible host drawn at random, so that one sees that the measure tells hosts apart.
    pub random_ratio_mean: f64,
    /// Decisions that found no host.
    pub refused: u64,
    /// Least and most fill during the run, in thousandths.
    pub fill: (u32, u32),
}

/// Fills a cell to 80 percent and measures [`Strategy::Indexed`] on it. `sample_rate` is the share of decisions judged
/// by a full scan; `clock` is a monotonic time since any fixed instant.
pub fn run_benchmark(
    hosts: u32,
    decisions: u64,
    seed: u64,
    sample_rate: f64,
    clock: &mut dyn FnMut() -> Duration,
) -> BenchReport {
    run_strategy(Strategy::Indexed, hosts, decisions, seed, sample_rate, clock)
}

/// As [`run_benchmark`], with a strategy of choice. The cell is filled by the engine in any case.
pub fn run_strategy(
    strategy: Strategy,
    hosts: u32,
    decisions: u64,
    seed: u64,
    sample_rate: f64,
    clock: &mut dyn FnMut() -> Duration,
) -> BenchReport {
    let mut workload = filled(seed, hosts);
    let mut dice = super::Rng::new(!seed);
    let sample_below = (sample_rate.clamp(0.0, 1.0) * 1e6) as u32;
    let mut took: Vec<Duration> = Vec::with_capacity(decisions as usize);
    let (mut deciding, mut rest) = (Duration::ZERO, Duration::ZERO);
    let (mut refused, mut oversold, mut examined) = (0, 0, 0u64);
    let mut fill = (u32::MAX, 0);
    let mut ratios: Vec<f64> = Vec::new();
    let mut random: Vec<f64> = Vec::new();
    for n in 0..decisions {
        let before = clock();
        let app = workload.arrival();
        let asked = clock();
        let request = workload.request(app);
        let host = match strategy {
            Strategy::Indexed => workload.cell.place(request).ok().map(|decision| {
                examined += u64::from(decision.examined);
                decision.host
            }),
            other => other.decide(&workload.cell, request),
        };
        let answered = clock();
        took.push(answered.saturating_sub(asked));
        deciding += answered.saturating_sub(asked);
        rest += asked.saturating_sub(before);
        if dice.below(1_000_000) < sample_below {
            let best = workload.cell.place_exhaustive(request).ok().map(|decision| decision.score);
            let score = |host| workload.cell.score(host, request).expect("the host is in the cell");
            ratios.push(ratio(host.map(score), best));
            let feasible: Vec<_> = workload.cell.feasible(request).collect();
            if let Some(any) = feasible.get(dice.below(feasible.len() as u32) as usize) {
                random.push(ratio(Some(score(*any)), best));
            }
        }
        let resumed = clock();
        match host {
            Some(host) => workload.start(app, host),
            None => refused += 1,
        }
        workload.churn();
        rest += clock().saturating_sub(resumed);
        fill = (fill.0.min(workload.fill()), fill.1.max(workload.fill()));
        if n % 10_000 == 0 {
            oversold += workload.cell.oversold_hosts() as u64;
        }
    }
    oversold += workload.cell.oversold_hosts() as u64;
    took.sort_unstable();
    let at = |share: f64| took.get((took.len() as f64 * share) as usize).copied().unwrap_or_default();
    let mean = |of: &[f64]| if of.is_empty() { 1.0 } else { of.iter().sum::<f64>() / of.len() as f64 };
    let seconds = (deciding + rest).as_secs_f64();
    BenchReport {
        hosts,
        flavours: super::flavours().len(),
        decisions,
        seconds,
        per_second: decisions as f64 / seconds.max(1e-9),
        decide_per_second: decisions as f64 / deciding.as_secs_f64().max(1e-9),
        p50: at(0.50),
        p99: at(0.99),
        max: took.last().copied().unwrap_or_default(),
        examined_mean: examined as f64 / (decisions - refused).max(1) as f64,
        oversold,
        audited: workload.audit().is_ok(),
        sampled: ratios.len() as u64,
        score_ratio_min: ratios.iter().copied().fold(1.0, f64::min),
        score_ratio_mean: mean(&ratios),
        random_ratio_mean: mean(&random),
        refused,
        fill,
    }
}

/// How much of a cell was in use when it began to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    pub instances: usize,
    /// The fuller of cpu and memory, in thousandths.
    pub fill: u32,
}

/// Fills an empty cell with arrivals alone, none of them spread, until 200 in the last 1,000 are refused: a better strategy gets further.
/// (A twentieth of the arrivals want compute classes, which run out first: a lower bar would measure them alone.)
pub fn pack_until_full(strategy: Strategy, hosts: u32, seed: u64) -> Packing {
    let mut workload = Workload::without_spread(seed, hosts);
    loop {
        let mut refused = 0;
        for _ in 0..1000 {
            let app = workload.arrival();
            match strategy.decide(&workload.cell, workload.request(app)) {
                Some(host) => workload.start(app, host),
                None => refused += 1,
            }
        }
        if refused >= 200 {
            return Packing { instances: workload.running(), fill: workload.fill() };
        }
    }
}

fn filled(seed: u64, hosts: u32) -> Workload {
    let mut workload = Workload::new(seed, hosts);
    let mut refusals = 0;
    while workload.fill() < (FILL.0 + FILL.1) / 2 && refusals < 10 * u64::from(hosts) {
        let app = workload.arrival();
        match Strategy::Indexed.decide(&workload.cell, workload.request(app)) {
            Some(host) => workload.start(app, host),
            None => refusals += 1,
        }
    }
    // Holes come with age: let a good part depart and be replaced before anything is measured.
    for _ in 0..workload.running() / 4 {
        let app = workload.arrival();
        if let Some(host) = Strategy::Indexed.decide(&workload.cell, workload.request(app)) {
            workload.start(app, host);
        }
        workload.churn();
    }
    workload
}

fn ratio(chosen: Option<Score>, best: Option<Score>) -> f64 {
    match (chosen, best) {
        (Some(chosen), Some(best)) if chosen.same_tier(&best) => f64::from(chosen.merit) / f64::from(best.merit),
        (None, None) => 1.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_run_keeps_its_promises_but_speed() {
        let mut now = Duration::ZERO;
        let mut clock = || {
            now += Duration::from_micros(1);
            now
        };
        let report = run_benchmark(900, 2000, 7, 0.2, &mut clock);
        assert_eq!(report.oversold, 0);
        assert!(report.audited && report.sampled > 100);
        assert!(report.score_ratio_min >= crate::score::GUARANTEE, "{report:?}");
        assert!(report.random_ratio_mean < 0.95, "the measure must tell hosts apart: {report:?}");
        assert!(report.fill.0 >= 600 && report.fill.1 <= 950, "{report:?}");
    }
}
