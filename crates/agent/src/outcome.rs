//! How an instance of a job ended, kept beside its output: whoever looks later, a restarted agent too, must not run it again.

use std::io;
use std::path::{Path, PathBuf};

use nexus_env::{Disk, write_atomic};
use nexus_model::Timestamp;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Absent when it was never started, or nobody saw how it ended.
    pub code: Option<i32>,
    pub message: String,
    pub started: Option<Timestamp>,
}

fn file(dir: &Path) -> PathBuf {
    dir.join("outcome.json")
}

/// Whether an instance has ended for good. Blocks.
pub(crate) fn is_there(disk: &dyn Disk, dir: &Path) -> bool {
    disk.exists(&file(dir)).unwrap_or(false)
}

/// What was kept in an instance's folder. Blocks.
pub(crate) fn load(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Outcome>> {
    let path = file(dir);
    if !disk.exists(&path)? {
        return Ok(None);
    }
    let text = disk.read(&path)?;
    // A file that can't be read says as much as that there is one: it has ended.
    Ok(Some(serde_json::from_slice(&text).unwrap_or_else(|_| Outcome {
        code: None,
        message: "it ended, and the note of how can't be read".into(),
        started: None,
    })))
}

/// Blocks.
pub(crate) fn save(disk: &dyn Disk, dir: &Path, outcome: &Outcome) -> io::Result<()> {
    disk.create_dir_all(dir)?;
    write_atomic(disk, &file(dir), &serde_json::to_vec(outcome)?)
}
