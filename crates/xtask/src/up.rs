//! `cargo xtask up`: from a fresh machine to a running cloud.

use std::path::Path;

use crate::packages::{self, Need};
use crate::{process, target_dir};

pub fn run(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    packages::ensure(&[Need::Up])?;
    // Of the whole workspace, so that features are chosen as for the tests and one build serves both.
    process::cargo(root, &["build", "--workspace", "--bin", "nexus"])?;
    let program = target_dir(root).join("debug/nexus");
    let mut command = process::privileged(&program);
    process::run(command.args(["up", "--detach"]).args(arguments))?;
    if !std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|f| f.join("nexus").is_file())) {
        let folder = target_dir(root).join("debug");
        eprintln!("`nexus` is in {0}: export PATH=\"{0}:$PATH\"", folder.display());
    }
    Ok(())
}
