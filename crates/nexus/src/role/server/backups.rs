//! Backups of the groups that this server holds, in the folder that its configuration names.
//!
//! One at a time. A backup that has begun is finished even if whoever asked for it does not wait.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use nexus_api::operations::{Nothing, read};
use nexus_env::{Env, on_disk};
use nexus_model::{ApiError, Code, Timestamp};
use nexus_store::backup::{self, BackupError, Listed, Manifest, Writer};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinSet;

use super::groups::Groups;
use super::operations::{Backups, from_store};
use crate::config::ServerConfig;

/// Body of `backup-create`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Create {
    #[serde(default)]
    name: Option<String>,
    /// Only the newest so many stay.
    #[serde(default)]
    keep: Option<usize>,
    /// What this server knows, without asking a majority.
    #[serde(default)]
    stale: bool,
}

pub struct ServerBackups {
    env: Env,
    server: String,
    cluster_id: String,
    dir: PathBuf,
    groups: Groups,
    /// Held while a backup is written; with the task that writes it.
    running: Arc<Mutex<()>>,
    tasks: std::sync::Mutex<JoinSet<()>>,
}

impl ServerBackups {
    pub fn new(config: &ServerConfig, env: &Env, groups: Groups) -> Self {
        Self {
            env: env.clone(),
            server: config.name.to_string(),
            cluster_id: config.cluster_id.clone(),
            dir: config.backup_dir(),
            groups,
            running: Arc::default(),
            tasks: std::sync::Mutex::default(),
        }
    }
}

fn problem(error: BackupError) -> ApiError {
    match error {
        BackupError::Store(error) => from_store(error),
        BackupError::Name(_) => ApiError::new(Code::Invalid, error.to_string()),
        BackupError::Exists(_) | BackupError::Refused(_) => ApiError::new(Code::Conflict, error.to_string()),
        other => ApiError::new(Code::Internal, other.to_string()),
    }
}

fn described(manifest: &Manifest) -> Value {
    let groups: Vec<Value> = manifest
        .groups
        .iter()
        .map(|g| {
            json!({
                "group": g.group, "revision": g.revision, "oldest": g.oldest, "keys": g.keys, "generation": g.generation,
                "time": Timestamp::from_millis(g.timestamp_ms),
            })
        })
        .collect();
    json!({
        "name": manifest.name, "clusterId": manifest.cluster_id, "release": manifest.release, "bytes": manifest.bytes(),
        "created": Timestamp::from_millis(manifest.created_ms), "groups": groups,
    })
}

/// A list of backups as the API answers it.
pub fn listing(found: &[Listed]) -> Value {
    let items: Vec<Value> = found
        .iter()
        .map(|l| match &l.manifest {
            Ok(manifest) => described(manifest),
            Err(e) => json!({"name": l.name, "problem": e.to_string()}),
        })
        .collect();
    json!({"items": items})
}

/// `2026-03-01T12-00-00.123Z`: sorts by time, and is fine as a folder's name.
fn name_of(now_ms: i64) -> String {
    Timestamp::from_millis(now_ms).to_string().replace(':', "-")
}

#[async_trait]
impl Backups for ServerBackups {
    async fn create(&self, body: Value) -> Result<Value, ApiError> {
        let asked: Create = read(body)?;
        let Ok(running) = self.running.clone().try_lock_owned() else {
            return Err(ApiError::new(Code::Conflict, "a backup is being written already: wait for it"));
        };
        let now = self.env.now_millis();
        let name = asked.name.unwrap_or_else(|| name_of(now));
        let (disk, dir, cluster) = (self.env.disk.clone(), self.dir.clone(), self.cluster_id.clone());
        let (groups, server) = (self.groups.clone(), self.server.clone());
        let (reply, made) = oneshot::channel();
        let work = async move {
            let mut writer = Writer::begin(disk.clone(), dir.clone(), &name, &cluster, now).await?;
            for engine in [&groups.global, &groups.region] {
                writer.add_view(engine.backup_view(!asked.stale).await?).await?;
            }
            let manifest = writer.finish().await?;
            let mut answer = described(&manifest);
            answer["folder"] = dir.join(&name).display().to_string().into();
            answer["server"] = server.into();
            if let Some(keep) = asked.keep {
                let door = disk.clone();
                let removed = on_disk(&disk, move || backup::prune(&*door, &dir, &cluster, keep))
                    .await
                    .map_err(|source| BackupError::Disk { what: "removing old backups".into(), source })??;
                answer["removed"] = removed.into();
            }
            tracing::info!(backup = name, bytes = manifest.bytes(), "made a backup");
            Ok::<Value, BackupError>(answer)
        };
        {
            let mut tasks = self.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            while tasks.try_join_next().is_some() {}
            tasks.spawn(async move {
                let result = work.await;
                if let Err(error) = &result {
                    tracing::warn!(%error, "a backup was not made");
                }
                drop(running);
                // Whoever asked may have gone: the backup stands all the same.
                let _ = reply.send(result);
            });
        }
        match made.await {
            Ok(result) => result.map_err(problem),
            Err(_) => Err(ApiError::new(Code::Unavailable, "the server is stopping")),
        }
    }

    async fn list(&self, body: Value) -> Result<Value, ApiError> {
        let _: Nothing = read(body)?;
        let (disk, dir) = (self.env.disk.clone(), self.dir.clone());
        let found = on_disk(&self.env.disk, move || backup::list(&*disk, &dir))
            .await
            .map_err(|e| ApiError::new(Code::Internal, e.to_string()))?
            .map_err(problem)?;
        Ok(listing(&found))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_backup_is_named_by_the_time_it_was_made() {
        assert_eq!(super::name_of(1_772_366_400_123), "2026-03-01T12-00-00.123Z");
    }
}
