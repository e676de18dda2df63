//! `cargo xtask bench`: hands over to `nexus-bench`, which may depend on everything, in a release build. Most benches
//! measure clouds, so the release `nexus` is built beside it.

use std::path::Path;
use std::process::Command;

use crate::packages::{self, Need};
use crate::{process, target_dir};

pub fn run(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    if arguments.iter().any(|a| !a.starts_with('-')) {
        // Benches deploy the images that the tests deploy.
        packages::ensure(&[Need::Up, Need::Test, Need::Bench])?;
    }
    process::run(process::cargo_command(root).args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "nexus",
        "--package",
        "nexus-bench",
    ]))?;
    process::run(Command::new(target_dir(root).join("release/nexus-bench")).current_dir(root).args(arguments))
}
