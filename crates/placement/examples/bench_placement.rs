//! Prints the placement benchmark: `cargo run --release -p nexus-placement --example bench_placement [HOSTS] [DECISIONS]`.

use nexus_placement::workload::{BenchReport, Strategy, pack_until_full, run_benchmark, run_strategy};
use std::time::Instant;

fn show(name: &str, r: &BenchReport) {
    println!(
        "{name:<15} hosts {:>6} decisions {:>8} | {:>9.0}/s all, {:>9.0}/s deciding | p50 {:>9.1?} p99 {:>9.1?} max {:>9.1?} | \
         examined {:>6.0} | ratio min {:.4} mean {:.4} (random {:.4}, {} sampled) | refused {} oversold {} audited {} | \
         fill {:?} flavours {}",
        r.hosts,
        r.decisions,
        r.per_second,
        r.decide_per_second,
        r.p50,
        r.p99,
        r.max,
        r.examined_mean,
        r.score_ratio_min,
        r.score_ratio_mean,
        r.random_ratio_mean,
        r.sampled,
        r.refused,
        r.oversold,
        r.audited,
        r.fill,
        r.flavours,
    );
}

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u64>().expect("numbers: HOSTS DECISIONS"));
    let hosts = args.next().unwrap_or(50_000) as u32;
    let decisions = args.next().unwrap_or(300_000);
    let start = Instant::now();
    let mut clock = || start.elapsed();
    show("indexed", &run_benchmark(hosts, decisions, 42, 0.01, &mut clock));
    for strategy in
        [Strategy::Indexed, Strategy::Exhaustive, Strategy::FirstFit, Strategy::BestFit, Strategy::MostAllocated]
    {
        show(strategy.name(), &run_strategy(strategy, 5000, 5000, 42, 0.05, &mut clock));
    }
    for strategy in [Strategy::Indexed, Strategy::FirstFit, Strategy::BestFit, Strategy::MostAllocated] {
        println!("{:<15} packs 1000 hosts: {:?}", strategy.name(), pack_until_full(strategy, 1000, 42));
    }
}
