//! The keeper: one small process per host that owns every other, so that nothing else has to stay alive.
//!
//! It starts processes, collects their exits and writes down what they say. It decides nothing. Its state is in a folder,
//! so that the next keeper goes on where this one was killed:
//!
//! * `ID.json`: the record of a kept process. One that runs is recognised by pid, start time and boot id.
//! * `ID.stdout`, `ID.stderr`: the FIFOs that its output goes through.
//! * `lock`: held while a keeper lives, so that there is one.
//! * `handover.json`: there for an instant, while the keeper executes its own file again. The process stays the same,
//!   so its children remain its children, and no exit status is lost.
//!
//! After a kill, the next keeper is no longer their parent: it notices their end by pidfd, and can't know their status.
//!
//! Architecture invariant: one thread, no timer while nothing is pending, no dependency on the agent or the network.

mod client;
mod conn;
mod handover;
mod output;
mod process;
mod protocol;
mod server;

use std::path::PathBuf;

pub use client::Client;

/// Where a keeper listens and keeps its state.
#[derive(Debug, Clone)]
pub struct KeeperConfig {
    pub socket: PathBuf,
    pub state_dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("{attempt}: {source}")]
    System { attempt: String, source: std::io::Error },
    #[error("another keeper runs with {0}")]
    Taken(PathBuf),
}

/// Runs a keeper until it is told to end by `SIGTERM` or `SIGINT`, which leaves its processes running. `SIGHUP` makes it
/// execute its own file, with the same arguments, again.
///
/// To be called from the first and only thread of a process.
pub fn main(config: KeeperConfig) -> Result<(), KeeperError> {
    server::Keeper::start(config)?.serve()
}
