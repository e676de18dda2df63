//! The values of secrets on this host: in memory alone, and each instance's in a folder that only its container sees.
//!
//! ```text
//! <run folder>/secrets/          a tmpfs of its own, for root alone; never swapped where the kernel can promise that
//!   <instance>/env               variables, a zero byte after each
//!   <instance>/files/<n>/        what the container finds at the path of the n-th reference of its app
//!     ..7/password               the values of version 7, for the container's user alone
//!     ..data -> ..7              moves to the next version in one step, so that a reader never sees half of it
//!     password -> ..data/password
//!   <instance>/delivered.json    which versions these are
//! ```
//!
//! Values are fetched before an instance starts, and again when the plan says that there is a newer version of files that
//! follow it. Nothing that runs depends on that: while no server answers, what is here stays, and an instance that is
//! started again gets it again. It outlives the agent, not the machine.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nexus_compute::{SecretFolder, SecretMounts};
use nexus_model::kind::SecretRef;
use nexus_model::plan::{InstancePlan, WorkloadSecret, WorkloadSecretRequest, method};
use nexus_model::{Name, SecretData, Uid};
use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use crate::identity::issuer::{IssueError, WireIssuer};

/// Bytes of all secrets of the host: those of 250 instances that name the most that they may.
const SIZE: &str = "256m";
/// Between tries to get a newer version, doubling.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// Whoever gives out the values of secrets to this host.
#[async_trait]
pub(crate) trait SecretSource: Send + Sync {
    async fn secret(&self, instance: Uid, name: &Name, version: Option<u64>) -> Result<WorkloadSecret, IssueError>;
}

#[async_trait]
impl SecretSource for WireIssuer {
    async fn secret(&self, instance: Uid, name: &Name, version: Option<u64>) -> Result<WorkloadSecret, IssueError> {
        let request = WorkloadSecretRequest { host: self.host().clone(), instance, name: name.clone(), version };
        self.ask(method::WORKLOAD_SECRET, &request).await
    }
}

pub(crate) struct Secrets {
    dir: PathBuf,
    source: Arc<dyn SecretSource>,
}

/// What is here of an instance: `versions[i]` of `refs[i]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Delivered {
    refs: Vec<SecretRef>,
    versions: Vec<u64>,
}

/// Keeps an instance's files at the newest versions while it is held.
pub(crate) struct Follower {
    _task: JoinSet<()>,
}

/// Mounts a file system in memory at `dir`, unless an agent before this one did. Blocks shortly.
pub(crate) fn mount_memory(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let parent = dir.parent().unwrap_or(Path::new("/"));
    if fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=0700,size={SIZE}");
    let mounted = |options: &str| mount(Some("nexus-secrets"), dir, Some("tmpfs"), flags, Some(options));
    // Linux 6.4 and later keep it out of swap.
    Ok(mounted(&format!("{options},noswap")).or_else(|_| mounted(&options))?)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

impl Secrets {
    pub fn new(dir: PathBuf, source: Arc<dyn SecretSource>) -> Self {
        Self { dir, source }
    }

    fn of(&self, instance: Uid) -> PathBuf {
        self.dir.join(instance.to_string())
    }

    /// What a container is to see of them.
    pub fn mounts(&self, plan: &InstancePlan) -> SecretMounts {
        let (refs, dir) = (&plan.template.secrets, self.of(plan.uid));
        let folders = refs.iter().enumerate();
        let folders =
            folders.filter_map(|(i, r)| Some(SecretFolder { source: folder(&dir, i), destination: r.folder()? }));
        let env = refs.iter().any(|r| !r.env.is_empty()).then(|| dir.join("env"));
        SecretMounts { env, folders: folders.collect() }
    }

    /// Fetches all that a part of an instance names and lays it ready for its start. Without any server, what is here of it
    /// already is good for another start.
    pub async fn prepare(&self, instance: Uid, plan: &InstancePlan) -> Result<(), String> {
        let refs = plan.template.secrets.clone();
        if refs.is_empty() {
            return Ok(());
        }
        let dir = self.of(plan.uid);
        let mut values = Vec::new();
        for wanted in &refs {
            match self.source.secret(instance, &wanted.name, wanted.version).await {
                Ok(secret) => values.push(secret),
                Err(IssueError::Unreachable(why)) => {
                    let held = blocking(move || Ok(delivered(&dir))).await.map_err(|e| e.to_string())?;
                    if held.is_some_and(|held| held.refs == refs) {
                        tracing::warn!(uid = %plan.uid, why, "no server gives out secrets: what is here is used again");
                        return Ok(());
                    }
                    return Err(format!("secret {}: {}", wanted.name, IssueError::Unreachable(why)));
                }
                Err(refused) => return Err(format!("secret {}: {refused}", wanted.name)),
            }
        }
        let env = variables(&refs, &values)?;
        let lay = move || lay_out(&dir, refs, &values, &env);
        blocking(lay).await.map_err(|e| format!("its secrets can't be laid ready: {e}"))
    }

    /// Sees to it that files which follow their secret come to the versions of a plan.
    pub fn follow(self: &Arc<Self>, instance: Uid, plan: &Arc<InstancePlan>) -> Option<Follower> {
        if plan.secrets.is_empty() {
            return None;
        }
        let (secrets, plan) = (self.clone(), plan.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut pause = RETRY;
            while let Err(reason) = secrets.catch_up(instance, &plan).await {
                tracing::warn!(uid = %plan.uid, name = %plan.name, reason, "a secret's files stay at an old version");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MOST);
            }
        });
        Some(Follower { _task: task })
    }

    async fn catch_up(&self, instance: Uid, plan: &InstancePlan) -> Result<(), String> {
        let dir = self.of(plan.uid);
        let read = dir.clone();
        let held = blocking(move || Ok(delivered(&read))).await.map_err(|e| e.to_string())?;
        // Not laid out by this release: the next start does it.
        let Some(mut held) = held.filter(|held| held.refs == plan.template.secrets) else { return Ok(()) };
        for (i, wanted) in plan.template.secrets.iter().enumerate().filter(|(_, r)| r.follows()) {
            let Some(newest) = plan.secrets.get(&wanted.name) else { continue };
            if held.versions[i] == *newest {
                continue;
            }
            let secret = self.source.secret(instance, &wanted.name, None).await;
            let secret = secret.map_err(|e| format!("secret {}: {e}", wanted.name))?;
            let version = secret.version;
            if version != held.versions[i] {
                held.versions[i] = version;
                let (dir, held) = (dir.clone(), held.clone());
                let replace = move || {
                    replace(&folder(&dir, i), version, &secret.data)?;
                    note(&dir, &held)
                };
                blocking(replace).await.map_err(|e| format!("secret {}: {e}", wanted.name))?;
                tracing::info!(uid = %plan.uid, secret = %wanted.name, version, "a secret's files were replaced");
            }
            if version < *newest {
                return Err(format!("secret {}: the server that was asked knows no version {newest} yet", wanted.name));
            }
        }
        Ok(())
    }

    /// Removes everything of an instance that is gone. Harmless when there is nothing.
    pub async fn remove(&self, instance: Uid) -> Result<(), String> {
        let dir = self.of(instance);
        let removed = blocking(move || match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        });
        removed.await.map_err(|e| format!("its secrets can't be removed: {e}"))
    }

    /// The instances of which something is here.
    pub async fn known(&self) -> io::Result<Vec<Uid>> {
        let dir = self.dir.clone();
        blocking(move || {
            let mut found = Vec::new();
            for entry in fs::read_dir(dir)? {
                found.extend(entry?.file_name().to_str().and_then(|n| n.parse::<Uid>().ok()));
            }
            Ok(found)
        })
        .await
    }
}

fn folder(dir: &Path, reference: usize) -> PathBuf {
    dir.join("files").join(reference.to_string())
}

/// The variables of all references, a zero byte after each.
fn variables(refs: &[SecretRef], values: &[WorkloadSecret]) -> Result<Zeroizing<Vec<u8>>, String> {
    let room: usize = values.iter().flat_map(|v| v.data.0.values()).map(|v| v.expose().len() + 200).sum();
    let mut env = Zeroizing::new(Vec::with_capacity(room));
    for (wanted, secret) in refs.iter().zip(values) {
        for (variable, key) in &wanted.env {
            let name = &wanted.name;
            let value = secret.data.0.get(key);
            let value = value.ok_or_else(|| format!("secret {name} has no key {key} in version {}", secret.version))?;
            let text = value.text().filter(|text| !text.contains('\0'));
            let why = "is no text without zero bytes, which no variable can hold: mount it as a file";
            let text = text.ok_or_else(|| format!("secret {name}: the value of {key} {why}"))?;
            for part in [variable.as_str(), "=", text, "\0"] {
                env.extend_from_slice(part.as_bytes());
            }
        }
    }
    Ok(env)
}

fn delivered(dir: &Path) -> Option<Delivered> {
    let held: Delivered = serde_json::from_slice(&fs::read(dir.join("delivered.json")).ok()?).ok()?;
    (held.versions.len() == held.refs.len()).then_some(held)
}

fn note(dir: &Path, held: &Delivered) -> io::Result<()> {
    let fresh = dir.join("delivered.new");
    fs::write(&fresh, serde_json::to_vec(held)?)?;
    fs::rename(fresh, dir.join("delivered.json"))
}

fn lay_out(dir: &Path, refs: Vec<SecretRef>, values: &[WorkloadSecret], env: &[u8]) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => fs::create_dir_all(dir)?,
    }
    write_private(&dir.join("env"), 0o600, env)?;
    for (i, (wanted, secret)) in refs.iter().zip(values).enumerate() {
        if wanted.folder().is_some() {
            fs::create_dir_all(folder(dir, i))?;
            replace(&folder(dir, i), secret.version, &secret.data)?;
        }
    }
    note(dir, &Delivered { refs, versions: values.iter().map(|v| v.version).collect() })
}

fn write_private(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?.write_all(content)
}

/// Puts another version's files in the place of those that are there, all in one step.
fn replace(folder: &Path, version: u64, data: &SecretData) -> io::Result<()> {
    let owner = fs::metadata(folder)?;
    let (uid, gid) = (Some(owner.uid()), Some(owner.gid()));
    let name = format!("..{version}");
    let (fresh, data_link) = (folder.join(&name), folder.join("..data"));
    let current = fs::read_link(&data_link).ok();
    if current.as_deref() != Some(Path::new(&name)) {
        // Left by an agent that was cut off.
        if fresh.exists() {
            fs::remove_dir_all(&fresh)?;
        }
        fs::create_dir(&fresh)?;
        for (key, value) in &data.0 {
            let path = fresh.join(key);
            write_private(&path, 0o400, value.expose())?;
            chown(&path, uid, gid)?;
        }
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
        chown(&fresh, uid, gid)?;
        point(&data_link, Path::new(&name))?;
    }
    for key in data.0.keys() {
        let link = folder.join(key);
        if fs::symlink_metadata(&link).is_err() {
            point(&link, &Path::new("..data").join(key))?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(found) = entry.file_name().into_string() else { continue };
        match found.strip_prefix("..") {
            Some(_) if found == name || found == "..data" => {}
            // A version before this one, or a link that was cut off.
            Some(_) if entry.file_type()?.is_dir() => fs::remove_dir_all(entry.path())?,
            Some(_) => fs::remove_file(entry.path())?,
            None if data.0.contains_key(&found) => {}
            None => fs::remove_file(entry.path())?,
        }
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

/// Makes a link, or moves it to another target, in one step.
fn point(link: &Path, target: &Path) -> io::Result<()> {
    let mut name = std::ffi::OsString::from("..link-");
    name.push(link.file_name().unwrap_or_default());
    let fresh = link.with_file_name(name);
    let _ = fs::remove_file(&fresh);
    symlink(target, &fresh)?;
    fs::rename(fresh, link)
}

#[cfg(test)]
#[path = "secrets_tests.rs"]
mod tests;
