//! Backups: a folder per backup, made while everything runs.
//!
//! ```text
//! <backups>/<name>/manifest.json     what is in it, with the SHA-256 of every other file
//! <backups>/<name>/<group>.snap      one group at one revision, with the history that it keeps
//! ```
//!
//! A backup is written under a name that begins with a dot, made durable, and renamed when it is whole, so an unfinished
//! one is never taken for good. Each group is consistent in itself; groups have no transactions across them, so their
//! revisions are simply taken one after the other.

mod restore;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_env::{Disk, on_disk};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use self::restore::{Backup, Point, Restore, Restored, next_generation};
use crate::embedded::mvcc::State;
use crate::embedded::snapshot;
use crate::embedded::{EmbeddedStore, FEATURE_LEVEL};
use crate::error::StoreError;
use crate::offline::{Folder, Salvaged, members_of};
use crate::types::{GroupId, Member, Revision};

/// The version of the manifest that this release writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const UNFINISHED: &str = ".unfinished-";
const MAX_NAME: usize = 100;

/// Why a backup can't be made, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("`{0}` is no name of a backup: 1 to {MAX_NAME} of a-z, A-Z, 0-9, `-`, `_`, `.` and `:`, no dot at first")]
    Name(String),
    #[error("there is a backup {0} already: give this one another name")]
    Exists(PathBuf),
    #[error("{0} is no backup: it has no {MANIFEST}")]
    NotABackup(PathBuf),
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("{path} was made by a newer release ({what} {found}; this one knows {supported}): use that release")]
    Newer { path: PathBuf, what: &'static str, found: u32, supported: u32 },
    #[error("{what}: {source}")]
    Disk { what: String, source: std::io::Error },
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Offline(#[from] crate::offline::OfflineError),
}

fn disk_error(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> BackupError {
    let what = what.into();
    move |source| BackupError::Disk { what, source }
}

/// One group in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupImage {
    pub group: GroupId,
    pub file: String,
    pub bytes: u64,
    pub sha256: String,
    /// The newest revision in it.
    pub revision: Revision,
    /// The oldest that can be gone back to.
    pub oldest: Revision,
    /// The hybrid timestamp of `revision`.
    pub timestamp_ms: i64,
    pub keys: u64,
    /// The epoch of the last leadership.
    pub term: u64,
    pub generation: u64,
    pub members: BTreeMap<u64, Member>,
}

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// What the groups in it may use; a release that knows less must not restore them.
    pub feature_level: u32,
    pub cluster_id: String,
    pub name: String,
    pub created_ms: i64,
    /// The release that made it.
    pub release: String,
    pub groups: Vec<GroupImage>,
}

impl Manifest {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.groups.iter().map(|g| g.bytes).sum()
    }
}

/// A folder among the backups.
#[derive(Debug)]
pub struct Listed {
    pub name: String,
    pub manifest: Result<Manifest, BackupError>,
}

fn check_name(name: &str) -> Result<(), BackupError> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
    if (1..=MAX_NAME).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(fits) {
        Ok(())
    } else {
        Err(BackupError::Name(name.chars().take(MAX_NAME).collect()))
    }
}

/// A backup that is being made. Dropped before [`Writer::finish`], it leaves an unfinished folder, which the next one of
/// the same name replaces.
pub struct Writer {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    work: PathBuf,
    manifest: Manifest,
}

impl Writer {
    /// Begins the backup `name` in the folder `root`.
    pub async fn begin(
        disk: Arc<dyn Disk>,
        root: PathBuf,
        name: &str,
        cluster_id: &str,
        now_ms: i64,
    ) -> Result<Self, BackupError> {
        check_name(name)?;
        let (done, work) = (root.join(name), root.join(format!("{UNFINISHED}{name}")));
        let folder = work.clone();
        blocking(&disk, move |disk| {
            if disk.exists(&done).map_err(disk_error("looking for the backup"))? {
                return Err(BackupError::Exists(done));
            }
            disk.remove_dir_all(&folder).map_err(disk_error("removing an unfinished backup"))?;
            disk.create_dir_all(&folder).map_err(disk_error("making the backup's folder"))
        })
        .await?;
        let manifest = Manifest {
            format: FORMAT,
            feature_level: 1,
            cluster_id: cluster_id.to_owned(),
            name: name.to_owned(),
            created_ms: now_ms,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            groups: Vec::new(),
        };
        Ok(Self { disk, root, work, manifest })
    }

    /// Adds a running group as it is now. `current` asks a quorum first, so that everything that was acknowledged before
    /// is in it; without, it is what this member knows, which works without a leader.
    pub async fn add(&mut self, store: &EmbeddedStore, current: bool) -> Result<&GroupImage, BackupError> {
        self.add_view(store.backup_view(current).await?).await
    }

    /// Adds what can be read of a stopped, perhaps damaged folder.
    pub async fn add_salvaged(&mut self, folder: &Folder) -> Result<Salvaged, BackupError> {
        let (state, said) = folder.saved();
        let facts = folder.facts();
        self.add_view(View { state, group: facts.group, term: facts.term, generation: facts.generation }).await?;
        Ok(said)
    }

    /// Adds what a running store of any engine gave.
    pub async fn add_view(&mut self, view: View) -> Result<&GroupImage, BackupError> {
        let View { state, group, term, generation } = view;
        if self.manifest.groups.iter().any(|g| g.group == group) {
            return Err(BackupError::Refused(format!("group {group} is in the backup already")));
        }
        self.manifest.feature_level = self.manifest.feature_level.max(state.feature_level());
        let file = format!("{group}.snap");
        let path = self.work.join(&file);
        let image = blocking(&self.disk, move |disk| {
            snapshot::write(&**disk, &path, &snapshot::meta_of(&state, 0), &state)
                .map_err(disk_error(format!("writing {}", path.display())))?;
            // Read back: what is vouched for is what is on the disk.
            let (sha256, bytes) = digest(&**disk, &path)?;
            let c = &state.counters;
            let members = members_of(&c.membership);
            let (revision, oldest, timestamp_ms) = (state.revision(), state.oldest(), c.timestamp_ms);
            let keys = c.live_keys;
            Ok(GroupImage {
                group,
                file,
                bytes,
                sha256,
                revision,
                oldest,
                timestamp_ms,
                keys,
                term,
                generation,
                members,
            })
        })
        .await?;
        self.manifest.groups.push(image);
        Ok(self.manifest.groups.last().expect("pushed above"))
    }

    /// Makes the backup durable and gives it its name.
    pub async fn finish(self) -> Result<Manifest, BackupError> {
        let Self { disk, root, work, manifest } = self;
        let said = manifest.clone();
        blocking(&disk, move |disk| {
            let text = serde_json::to_vec_pretty(&manifest).map_err(|e| BackupError::Refused(e.to_string()))?;
            nexus_env::write_atomic(&**disk, &work.join(MANIFEST), &text)
                .map_err(disk_error("writing the manifest"))?;
            let done = root.join(&manifest.name);
            disk.rename(&work, &done).map_err(disk_error(format!("naming {}", done.display())))?;
            disk.sync_dir(&root).map_err(disk_error(format!("syncing {}", root.display())))
        })
        .await?;
        Ok(said)
    }
}

/// What a running store gives for a backup: all that it knows, at one revision.
pub struct View {
    pub(crate) state: State,
    pub(crate) group: GroupId,
    pub(crate) term: u64,
    pub(crate) generation: u64,
}

async fn blocking<T: Send + 'static>(
    disk: &Arc<dyn Disk>,
    work: impl FnOnce(&Arc<dyn Disk>) -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    let own = disk.clone();
    on_disk(disk, move || work(&own)).await.map_err(disk_error("working on the disk"))?
}

/// The SHA-256 of a file in hexadecimal, and its length.
fn digest(disk: &dyn Disk, path: &Path) -> Result<(String, u64), BackupError> {
    let failed = |e| disk_error(format!("reading {}", path.display()))(e);
    let file = disk.open(path).map_err(failed)?;
    let (mut sum, mut at, mut buf) = (Sha256::new(), 0u64, vec![0; 1 << 20]);
    loop {
        let n = file.read_at(at, &mut buf).map_err(failed)?;
        if n == 0 {
            break;
        }
        sum.update(&buf[..n]);
        at += n as u64;
    }
    Ok((sum.finalize().iter().map(|b| format!("{b:02x}")).collect(), at))
}

fn read_manifest(disk: &dyn Disk, dir: &Path) -> Result<Manifest, BackupError> {
    let path = dir.join(MANIFEST);
    if !disk.exists(&path).map_err(disk_error(format!("looking into {}", dir.display())))? {
        return Err(BackupError::NotABackup(dir.to_owned()));
    }
    let text = disk.read(&path).map_err(disk_error(format!("reading {}", path.display())))?;
    let damaged = |reason: String| BackupError::Damaged { path: path.clone(), reason };
    // A newer manifest may have another shape, so its versions are looked at first.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    for (what, supported) in [("format", FORMAT), ("feature_level", FEATURE_LEVEL)] {
        let found = value.get(what).and_then(serde_json::Value::as_u64);
        let found = found.and_then(|n| u32::try_from(n).ok()).ok_or_else(|| damaged(format!("it has no {what}")))?;
        if found > supported {
            return Err(BackupError::Newer { path: path.clone(), what, found, supported });
        }
    }
    let manifest: Manifest = serde_json::from_value(value).map_err(|e| damaged(e.to_string()))?;
    let plain = |file: &str| !file.is_empty() && !file.starts_with('.') && !file.contains(['/', '\\', '\0']);
    match manifest.groups.iter().find(|g| !plain(&g.file)) {
        Some(image) => Err(damaged(format!("{:?} is no file of a backup", image.file))),
        None => Ok(manifest),
    }
}

/// The backups in a folder, the newest last; a missing folder has none.
pub fn list(disk: &dyn Disk, root: &Path) -> Result<Vec<Listed>, BackupError> {
    if !disk.exists(root).map_err(disk_error(format!("looking for {}", root.display())))? {
        return Ok(Vec::new());
    }
    let entries = disk.list(root).map_err(disk_error(format!("listing {}", root.display())))?;
    let folders = entries.into_iter().filter(|e| e.is_dir && !e.name.starts_with('.'));
    let mut found: Vec<Listed> =
        folders.map(|e| Listed { manifest: read_manifest(disk, &root.join(&e.name)), name: e.name }).collect();
    found.sort_by_key(|l| (l.manifest.as_ref().map_or(0, |m| m.created_ms), l.name.clone()));
    Ok(found)
}

/// Removes all but the newest `keep` backups of a cluster; answers the names of those that went. What can't be read stays.
pub fn prune(disk: &dyn Disk, root: &Path, cluster_id: &str, keep: usize) -> Result<Vec<String>, BackupError> {
    let own = |l: &Listed| l.manifest.as_ref().is_ok_and(|m| m.cluster_id == cluster_id && m.name == l.name);
    let names: Vec<String> = list(disk, root)?.into_iter().filter(own).map(|l| l.name).collect();
    let gone = names[..names.len().saturating_sub(keep.max(1))].to_vec();
    for name in &gone {
        // Renamed first: half a backup must not look like one.
        let dead = root.join(format!("{UNFINISHED}{name}"));
        disk.remove_dir_all(&dead).map_err(disk_error("removing an unfinished backup"))?;
        disk.rename(&root.join(name), &dead).map_err(disk_error(format!("removing the backup {name}")))?;
        disk.sync_dir(root).map_err(disk_error(format!("syncing {}", root.display())))?;
        disk.remove_dir_all(&dead).map_err(disk_error(format!("removing the backup {name}")))?;
    }
    Ok(gone)
}
