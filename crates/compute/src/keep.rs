//! The keeper as runtimes see it: the owner of every process of a host.
//!
//! A kept process is known by an id that the asker chooses. Starting an id that runs is harmless. The record of an ended
//! process stays until it is forgotten, so that no exit is lost while nobody was listening.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use nexus_model::Timestamp;
use serde::{Deserialize, Serialize};

/// How the process that is to be kept comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Entry {
    /// `argv` itself is the process.
    Process,
    /// `argv` is a shim that creates the process as an orphan, writes its pid in decimal to file descriptor 3, and exits
    /// with 0. The keeper, being the sub-reaper, adopts that pid. A shim that exits otherwise has failed; the last line of
    /// its standard error says why.
    Shim,
}

/// Where standard output and error go: files named `current` and `1`, `2` … in a folder, newest first.
///
/// Each line is `<RFC 3339> stdout|stderr <text>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogFiles {
    pub dir: PathBuf,
    /// A file is set aside when it passes this, in bytes.
    pub max_bytes: u64,
    /// So many files are kept beside the current one.
    pub keep: u32,
}

/// A process to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spawn {
    /// 1 to 128 of `A-Z`, `a-z`, `0-9`, `-`, `_`, `.`.
    pub id: String,
    pub entry: Entry,
    pub argv: Vec<String>,
    /// The whole environment: nothing is inherited.
    pub env: Vec<(String, String)>,
    pub cwd: Option<PathBuf>,
    /// User and group to become, with no supplementary groups and no way back to privileges.
    pub user: Option<(u32, u32)>,
    /// A network namespace to enter, as a path.
    pub netns: Option<PathBuf>,
    /// Cgroup folders to join (each hierarchy's own), made by the asker.
    pub cgroups: Vec<PathBuf>,
    /// Without it, output is thrown away.
    pub logs: Option<LogFiles>,
}

/// What became of a kept process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KeptState {
    Running {
        pid: i32,
        since: Timestamp,
    },
    /// `code` is the exit status, or 128 + the signal's number as shells count. Unknown (`None`) when the process ended
    /// while no keeper lived.
    Exited {
        code: Option<i32>,
        at: Timestamp,
        /// Why it could not be started, or empty.
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    pub id: String,
    pub state: KeptState,
}

#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    #[error("the keeper can't be reached at {path}: {source}")]
    Unreachable { path: PathBuf, source: std::io::Error },
    #[error("the keeper did not answer within {0:?}")]
    Deadline(Duration),
    #[error("starting {id}: {message}")]
    Start { id: String, message: String },
    #[error("the keeper refused: {0}")]
    Refused(String),
}

/// A host's keeper.
#[async_trait]
pub trait Keep: Send + Sync {
    /// Starts a process, once: if the id runs already, nothing happens. An ended id is started anew.
    async fn spawn(&self, spawn: Spawn) -> Result<(), KeepError>;

    /// Every process that is kept or whose end has not been forgotten.
    async fn list(&self) -> Result<Vec<Kept>, KeepError>;

    /// Sends a signal to a kept process; harmless if it has ended or is not known.
    async fn signal(&self, id: &str, signal: i32) -> Result<(), KeepError>;

    /// Drops the record of an ended process. Refused while it runs.
    async fn forget(&self, id: &str) -> Result<(), KeepError>;

    /// Runs a short command on the given standard input, output and error, and returns its exit status. It is killed when
    /// the deadline passes or the caller goes away. Its `id` only names it in logs.
    async fn run(&self, spawn: Spawn, stdio: [OwnedFd; 3], deadline: Duration) -> Result<i32, KeepError>;

    /// Resolves when some kept process may have ended since the last call.
    async fn changed(&self);
}
