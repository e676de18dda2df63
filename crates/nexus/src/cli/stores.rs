//! Where the data folders of metadata stores are: below a server's data folder, or that of a local cloud.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_env::{Disk, Env};
use nexus_store::GroupId;
use nexus_store::offline::{Folder, OfflineError};

use crate::config::{Config as _, ServerConfig};
use crate::exit::Fail;
use crate::role::server::engine;

/// What a store's folder has and no other.
const MARK: &str = "FORMAT";
/// Below a server's data folder.
const STORE: &str = "store";
/// Of a local cloud.
const CLOUD: &str = "nexus-cloud.json";

pub fn disk() -> Arc<dyn Disk> {
    Env::real().disk.clone()
}

/// The folder of one group of one server. Where an older release kept its only group, that one stays.
pub fn folder_of(data_dir: &Path, group: &GroupId) -> PathBuf {
    let store = data_dir.join(STORE);
    match Folder::whose(&*disk(), &store) {
        Ok((_, of)) if of == *group => store,
        _ => store.join(group.as_str()),
    }
}

/// The folders of stores that `path` means: itself, those of a server's data folder, or those of every server of a local
/// cloud.
pub fn below(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let is_store = |path: &Path| path.join(MARK).is_file();
    if is_store(path) {
        return Ok(vec![path.to_owned()]);
    }
    let mut places = vec![path.to_owned(), path.join(STORE)];
    if path.join(CLOUD).is_file() {
        places.extend(servers_of(path)?.into_iter().map(|s| s.data_dir.join(STORE)));
    }
    let mut found = Vec::new();
    for place in places {
        if is_store(&place) {
            found.push(place.clone());
        }
        let Ok(entries) = std::fs::read_dir(&place) else { continue };
        // What was set aside has a dot in its name, which no group has.
        let groups = entries.flatten().filter(|e| e.file_name().to_str().is_some_and(|n| n.parse::<GroupId>().is_ok()));
        found.extend(groups.map(|e| e.path()).filter(|p| is_store(p)));
    }
    found.sort();
    found.dedup();
    if found.is_empty() {
        let folders = servers_of(path).unwrap_or_default().into_iter().map(|s| s.data_dir);
        if let Some(url) = folders.chain([path.to_owned()]).find_map(|folder| engine::etcd_of(&folder)) {
            return Err(Fail::conflict(format!(
                "the metadata of {} is in etcd, {url}, whose own tools look after it: `etcdctl get --prefix` and \
                 `etcdctl check` look inside, and after a lost quorum `etcd --force-new-cluster` or `etcdctl snapshot \
                 restore` brings it back (`nexus backup restore` works too, into an etcd that runs)",
                path.display()
            ))
            .into());
        }
        let advice = "name a server's data folder, one of its stores, or a local cloud's folder";
        return Err(Fail::not_found(format!("{} holds no metadata store: {advice}", path.display())).into());
    }
    Ok(found)
}

/// The one store that `path` means, of `group` if there are several.
pub fn one(path: &Path, group: Option<&GroupId>) -> anyhow::Result<PathBuf> {
    let mut found = below(path)?;
    if let Some(group) = group {
        found.retain(|f| Folder::whose(&*disk(), f).is_ok_and(|(_, of)| of == *group));
    }
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(Fail::not_found(format!("{} holds no store of that group", path.display())).into()),
        several => {
            let names: Vec<String> = several.iter().map(|p| format!("  {}", p.display())).collect();
            Err(Fail::usage(format!("{} holds several stores, name one:\n{}", path.display(), names.join("\n"))).into())
        }
    }
}

/// The configurations of a local cloud's servers.
pub fn servers_of(cloud: &Path) -> anyhow::Result<Vec<ServerConfig>> {
    let folder = cloud.join("config");
    let mut found = Vec::new();
    let entries = std::fs::read_dir(&folder)
        .map_err(|e| Fail::not_found(format!("{} has no configurations: {e}", folder.display())))?;
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            // Gateways' are there too, and are no servers'.
            found.extend(ServerConfig::load(&path).ok());
        }
    }
    found.sort_by_key(|s| s.node_id);
    Ok(found)
}

/// Whether `path` is the folder of a local cloud.
pub fn is_cloud(path: &Path) -> bool {
    path.join(CLOUD).is_file()
}

/// Opens a folder; one that is in use has an advice of its own.
pub fn open(path: &Path, force: bool) -> anyhow::Result<Folder> {
    match Folder::open(disk(), path, force) {
        Err(e @ OfflineError::Locked(_)) => Err(Fail::conflict(e.to_string()).into()),
        other => Ok(other?),
    }
}

/// Bytes as JSON: what is JSON as it is, anything else as text with escapes.
pub fn value(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| nexus_store::offline::show(bytes).into())
}

/// A moment of the store's clock.
pub fn time(ms: i64) -> String {
    nexus_model::Timestamp::from_millis(ms).to_string()
}
