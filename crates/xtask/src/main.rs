//! `cargo xtask …`: setup, tests, benches and the project's own checks. Few dependencies, so that it builds in seconds.

mod bench;
mod packages;
mod process;
mod sim;
mod test;
mod tidy;
mod up;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

const HELP: &str = "\
cargo xtask up [ARGS…]            installs what is missing, builds, and starts the local cloud (`nexus up --detach ARGS`)
cargo xtask test [FILTERS…]       installs what tests need, builds and runs all tests, or those whose names hold a filter
cargo xtask bench NAME [--json]   measures, beside a peer where there is one; without NAME, lists the benches
cargo xtask sim --seeds N [--from K]   runs regions in one process under seeded faults; `--seed S` replays one with its trace,
                                  `--mutant NAME` plants a bug and looks for it
cargo xtask tidy                  checks the rules of the house that the compiler can't
cargo xtask fmt-check             checks the formatting
cargo xtask lint                  clippy over everything, warnings are errors
cargo xtask setup                 installs what building and testing need, and does nothing else
cargo xtask packages              says which Debian packages and Rust targets are needed, why, and which are missing";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Err(e) = run(&arguments) {
        eprintln!("error: {e:#}");
        std::process::exit(1);
    }
}

fn run(arguments: &[String]) -> anyhow::Result<()> {
    let root = root()?;
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", arguments),
    };
    let nothing_more = || {
        if rest.is_empty() { Ok(()) } else { bail!("`{command}` takes no arguments, but got {rest:?}") }
    };
    match command {
        "up" => up::run(&root, rest),
        "test" => test::run(&root, rest),
        "bench" => bench::run(&root, rest),
        "sim" => sim::run(&root, rest),
        "tidy" => nothing_more().and_then(|()| tidy::run(&root)),
        "fmt-check" => nothing_more().and_then(|()| process::cargo(&root, &["fmt", "--all", "--check"])),
        "lint" => {
            nothing_more()?;
            process::cargo(&root, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])
        }
        "setup" => nothing_more().and_then(|()| packages::ensure(&[packages::Need::Up, packages::Need::Test])),
        "packages" => nothing_more().map(|()| packages::show()),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("there is no task `{other}`\n{HELP}"),
    }
}

/// The workspace's folder.
fn root() -> anyhow::Result<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The binary may be older than a move of the folder: then the current folder is asked.
    let mut starts = vec![own.to_owned()];
    starts.extend(std::env::current_dir().ok());
    let is_root = |p: &&Path| p.join("Cargo.lock").is_file() && p.join("crates").is_dir();
    let found = starts.iter().find_map(|s| s.ancestors().find(is_root).map(Path::to_owned));
    found.context("the workspace can't be found: run this inside it")
}

/// Where cargo puts what it builds.
fn target_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |t| root.join(t))
}
