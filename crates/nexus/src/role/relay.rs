//! The relay of a tenant network's PROXY listeners. Called before any thread exists, because it gives up its rights first.

use std::ffi::OsString;

use anyhow::bail;

/// Runs until the process is ended; `args` are those after `relay`.
pub fn run(args: Vec<OsString>) -> anyhow::Result<()> {
    let words: Option<Vec<String>> = args.into_iter().map(|a| a.into_string().ok()).collect();
    let Some(words) = words else { bail!("an argument is not UTF-8") };
    Ok(nexus_network::vpc::relay::main(&words)?)
}
