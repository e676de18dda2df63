//! The last table on disk, so that a gateway that starts with every server dead serves at once.

use std::io;
use std::path::Path;

use nexus_env::{Disk, write_atomic};
use nexus_model::plan::RoutingTable;
use serde::{Deserialize, Serialize};

const FILE: &str = "table.json";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Cached {
    version: u32,
    /// Revisions of another cluster can't be compared with ours.
    cluster: String,
    table: RoutingTable,
}

/// Why what is there can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error("reading the cached table: {0}")]
    Read(#[source] io::Error),
    #[error("the cached table is damaged: {0}")]
    Damaged(String),
    #[error("the cached table is one of cluster {0}")]
    OtherCluster(String),
    #[error("the cached table has format {0}, which this build does not know")]
    Format(u32),
}

/// Blocks.
pub(crate) fn load(disk: &dyn Disk, dir: &Path, cluster: &str) -> Result<Option<RoutingTable>, CacheError> {
    let path = dir.join(FILE);
    if !disk.exists(&path).map_err(CacheError::Read)? {
        return Ok(None);
    }
    let bytes = disk.read(&path).map_err(CacheError::Read)?;
    let cached: Cached = serde_json::from_slice(&bytes).map_err(|e| CacheError::Damaged(e.to_string()))?;
    if cached.version > VERSION {
        return Err(CacheError::Format(cached.version));
    }
    if cached.cluster != cluster {
        return Err(CacheError::OtherCluster(cached.cluster));
    }
    Ok(Some(cached.table))
}

/// Blocks.
pub(crate) fn save(disk: &dyn Disk, dir: &Path, cluster: &str, table: &RoutingTable) -> io::Result<()> {
    let cached = Cached { version: VERSION, cluster: cluster.to_owned(), table: table.clone() };
    let bytes = serde_json::to_vec(&cached).map_err(io::Error::other)?;
    disk.create_dir_all(dir)?;
    write_atomic(disk, &dir.join(FILE), &bytes)
}
