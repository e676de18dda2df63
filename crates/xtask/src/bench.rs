//! `cargo xtask bench`: hands over to `nexus-bench`, which may depend on everything, in a release build.

use std::path::Path;

use crate::packages::{self, Need};
use crate::process;

pub fn run(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    if arguments.iter().any(|a| !a.starts_with('-')) {
        packages::ensure(&[Need::Up, Need::Bench])?;
    }
    let mut command = process::cargo_command(root);
    process::run(command.args(["run", "--quiet", "--release", "--package", "nexus-bench", "--"]).args(arguments))
}
