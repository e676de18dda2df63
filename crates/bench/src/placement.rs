//! Placement: how fast one cell decides, how slow the slowest are, how good the choices, and that nothing is oversold.
//!
//! The peer is the rule of the Kubernetes scheduler's `MostAllocated` strategy, by a scan of every host, on the same
//! workload and in the same rounds. It decides less often a round, because a scan takes milliseconds.

use std::time::Instant;

use nexus_placement::workload::{BenchReport, Strategy, run_strategy};

use crate::report::{Row, cpu_seconds, median};

const HOSTS: u32 = 50_000;
const ROUNDS: u64 = 5;
const DECISIONS: u64 = 40_000;
const PEER_DECISIONS: u64 = 200;
const SAMPLE_RATE: f64 = 0.01;
const PEER: &str = "MostAllocated by scan";

struct Round {
    report: BenchReport,
    cpu_per_decision: f64,
}

fn measure(strategy: Strategy, decisions: u64, seed: u64, sample_rate: f64) -> Round {
    let start = Instant::now();
    let before = cpu_seconds();
    let report = run_strategy(strategy, HOSTS, decisions, seed, sample_rate, &mut || start.elapsed());
    let cpu = cpu_seconds() - before;
    let wall = start.elapsed().as_secs_f64();
    // The whole run fills the cell and judges samples too: the decisions' share of it is that of their time.
    Round { cpu_per_decision: cpu * (report.seconds / wall) / report.decisions.max(1) as f64, report }
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for seed in 1..=ROUNDS {
        eprintln!("round {seed} of {ROUNDS}");
        ours.push(measure(Strategy::Indexed, DECISIONS, seed, SAMPLE_RATE));
        peers.push(measure(Strategy::MostAllocated, PEER_DECISIONS, seed, 0.0));
    }
    let of = |rounds: &[Round], pick: fn(&BenchReport) -> f64| {
        median(&rounds.iter().map(|r| pick(&r.report)).collect::<Vec<_>>())
    };
    let micros = |pick: fn(&BenchReport) -> std::time::Duration| {
        let worst = |rounds: &[Round]| rounds.iter().map(|r| pick(&r.report)).max().unwrap_or_default();
        (worst(&ours).as_secs_f64() * 1e6, worst(&peers).as_secs_f64() * 1e6)
    };
    let cpu = median(&ours.iter().map(|r| r.cpu_per_decision).collect::<Vec<_>>());
    let (p99, peer_p99) = micros(|r| r.p99);
    let (slowest, peer_slowest) = micros(|r| r.max);
    let least = ours.iter().map(|r| r.report.score_ratio_min).fold(f64::INFINITY, f64::min);
    let oversold: u64 = ours.iter().map(|r| r.report.oversold).sum();
    if let Some(bad) = ours.iter().find(|r| !r.report.audited || r.report.oversold > 0) {
        anyhow::bail!("the figures are void: the books do not agree with a recount: {:?}", bad.report);
    }
    Ok(vec![
        Row::new("decisions", of(&ours, |r| r.per_second), "1/s")
            .peer(PEER, of(&peers, |r| r.per_second))
            .cpu_per_op(cpu),
        Row::new("decision p99, worst round", p99, "us").peer(PEER, peer_p99),
        Row::new("decision, slowest", slowest, "us").peer(PEER, peer_slowest),
        Row::new("score over the scan's best, mean", of(&ours, |r| r.score_ratio_mean), "1"),
        Row::new("score over the scan's best, least", least, "1"),
        Row::new("hosts oversold", oversold as f64, "1"),
    ])
}
