//! The shim, which creates a container and exits. Called before any thread exists, because it forks.

use std::ffi::OsString;

/// Carries out one order; `args` are those after `shim`.
pub fn run(args: Vec<OsString>) -> anyhow::Result<()> {
    std::process::exit(nexus_compute::container::shim_main(args))
}
