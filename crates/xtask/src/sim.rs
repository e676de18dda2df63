//! `cargo xtask sim`: hands over to `nexus-sim`, which runs seeds in processes of their own.

use std::path::Path;
use std::process::Command;

use crate::{process, target_dir};

pub fn run(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    process::run(process::cargo_command(root).args(["build", "--quiet", "--package", "nexus-sim"]))?;
    process::run(Command::new(target_dir(root).join("debug/nexus-sim")).current_dir(root).args(arguments))
}
