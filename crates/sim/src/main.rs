//! The simulator: whole regions in one process, on one seed, under faults.
//!
//! Everything that the project reaches by `nexus-env`'s doors is simulated here: time is the runtime's paused clock, which
//! jumps to the next thing to do; disks are in memory and lose what was not synced; the network is function calls that are
//! late, lost and cut. What runs on top is the real thing: the store with its consensus, the writer, the reconcilers.
//!
//! Each seed is a process of its own, because libraries keep counters and hash keys per process: so the same seed does the
//! same every time, whatever ran before. This program starts them, two or more at a time, and adds up what they say.
//!
//! ```text
//! nexus-sim --seeds N [--from K]     runs seeds and prints what was done, which faults struck where, and what failed;
//!                                    with --world NAME, only those whose world has this name
//! nexus-sim --seed S                 runs one and prints everything that happened
//! nexus-sim --mutant NAME [--seeds N] runs seeds with a planted bug until one finds it
//! ```

mod care;
mod care_judge;
mod care_users;
mod chance;
mod check;
mod clients;
mod clock;
mod coverage;
mod disk;
mod fence;
mod fleet;
mod fleet_judge;
mod fleet_users;
mod gateways;
mod hosts;
mod judge;
mod leases;
mod life;
mod members;
mod moves;
mod mutant;
mod nemesis;
mod net;
mod nics;
mod parent;
mod partial;
mod recorder;
mod region;
mod releases;
mod run;
mod server;
mod site;
mod trace;
mod users;
mod world;

use std::process::ExitCode;

use anyhow::{Context as _, bail};

use crate::mutant::Mutant;

/// The mark before a child's result.
pub const RESULT: &str = "RESULT ";

fn main() -> ExitCode {
    match Arguments::parse(std::env::args().skip(1)).and_then(|a| a.run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}

#[derive(Debug, Default)]
struct Arguments {
    seeds: Option<u64>,
    from: u64,
    seed: Option<u64>,
    /// Only seeds whose world has this name.
    world: Option<String>,
    mutant: Option<Mutant>,
    /// A child: runs this seed and prints its result.
    one: Option<u64>,
    repeat: bool,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut arguments = Self { from: 1, ..Self::default() };
        while let Some(word) = words.next() {
            let mut number = || -> anyhow::Result<u64> {
                let text = words.next().with_context(|| format!("{word} wants a number"))?;
                text.parse().with_context(|| format!("{word} wants a number, not `{text}`"))
            };
            match word.as_str() {
                "--seeds" => arguments.seeds = Some(number()?),
                "--from" => arguments.from = number()?,
                "--seed" => arguments.seed = Some(number()?),
                "--one" => arguments.one = Some(number()?),
                "--world" => arguments.world = Some(words.next().context("--world wants a name")?),
                "--repeat" => arguments.repeat = true,
                "--mutant" => {
                    let name = words.next().context("--mutant wants a name")?;
                    let known: Vec<_> = Mutant::ALL.iter().map(|m| m.name()).collect();
                    let mutant = Mutant::parse(&name).with_context(|| format!("`{name}` is none of {known:?}"))?;
                    arguments.mutant = Some(mutant);
                }
                other => {
                    bail!("unknown argument `{other}`: --seeds N [--from K] [--world NAME] | --seed S | --mutant NAME")
                }
            }
        }
        Ok(arguments)
    }

    fn run(self) -> anyhow::Result<bool> {
        if let Some(seed) = self.one.or(self.seed) {
            let verbose = self.one.is_none();
            if let Ok(filter) = std::env::var("NEXUS_LOG") {
                tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false).init();
            }
            let outcome = run::in_thread(seed, self.mutant, verbose)?;
            if verbose {
                parent::print_outcome(&outcome);
            } else {
                println!("{RESULT}{}", serde_json::to_string(&outcome)?);
            }
            return Ok(outcome.violations.is_empty());
        }
        match self.mutant {
            Some(mutant) => parent::hunt(mutant, self.from, self.seeds.unwrap_or(200)),
            None => parent::run_all(self.from, self.seeds.unwrap_or(100), self.world.as_deref(), self.repeat),
        }
    }
}
