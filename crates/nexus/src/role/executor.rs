//! The executor, which runs functions without privileges.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::bail;

/// Runs until the process is told to stop; `args` are those after `executor`.
pub fn run(args: Vec<OsString>) -> anyhow::Result<()> {
    let words: Option<Vec<String>> = args.into_iter().map(|a| a.into_string().ok()).collect();
    let Some(words) = words else { bail!("an argument is not UTF-8") };
    let code = nexus_compute::function::executor_main(&words);
    std::process::exit(if code == ExitCode::SUCCESS { 0 } else { 1 })
}
