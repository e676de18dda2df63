//! [`FunctionRuntime`]: functions as the agent drives them.
//!
//! Under its folder, which only root may enter: `compiled/` has one artefact per component, `run/` the executors' sockets,
//! `instances/` a record of each instance that was started and not removed, `logs/` what executors say of themselves, and
//! `empty/` is all of the file system that an executor sees.
//!
//! A record is what makes an instance whose executor has ended visible as exited, and survives the agent. What runs is
//! never taken from records: the executors are asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nexus_model::{Digest, Name, Timestamp, Uid};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex as AsyncMutex, Semaphore};

use super::client;
use super::compile::UNFIT;
use super::control::{Add, Reply, Request};
use super::outlet::Outlets;
use super::pool::{self, COMPILE_USER, Pool, expect_done, is_ours, is_running};
use crate::keep::{Keep, KeepError, Kept, KeptState};
use crate::{Connections, ExecIo, Observed, Runtime, RuntimeError, Sandbox, State};

/// Where an instance listens whose template names no port.
pub const DEFAULT_PORT: u16 = 8080;

/// What artefacts and the control protocol are compatible with. An agent of another generation starts executors of its own
/// beside those that still serve. To be changed with wasmtime, with the engine's configuration and with the protocol.
pub(super) const GENERATION: &str = "w48-4";

/// How long compiling one component may take.
const COMPILE: Duration = Duration::from_secs(300);

/// What a function runtime is made of.
pub struct FunctionConfig {
    /// The runtime's own folder.
    pub dir: PathBuf,
    pub keep: Arc<dyn Keep>,
    /// Where the blob of a digest is.
    pub blob: Arc<dyn Fn(&Digest) -> PathBuf + Send + Sync>,
    /// A program that calls [`super::executor_main`] with what follows its argument `executor`.
    pub exe: PathBuf,
}

pub struct FunctionRuntime {
    config: FunctionConfig,
    pool: Pool,
    records: Records,
    /// By which executors ask for connections.
    outlets: Outlets,
    /// One start or removal in a project at a time, so that no executor is ended while it is given something.
    projects: Mutex<BTreeMap<Name, Arc<AsyncMutex<()>>>>,
    /// One compilation at a time: it takes every processor that it finds.
    compiling: Semaphore,
}

type Records = Arc<Mutex<BTreeMap<Uid, Record>>>;

/// An instance that was started and not removed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid: Uid,
    epoch: u64,
    executor: String,
    since: Timestamp,
    stopping: bool,
    ended: Option<Ended>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ended {
    code: Option<i32>,
    at: Timestamp,
    message: String,
}

pub(super) fn host(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> RuntimeError {
    let attempt = attempt.into();
    move |source| RuntimeError::Host { attempt, source }
}

pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("blocking work neither panics nor is aborted")
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FunctionRuntime {
    /// Makes the folders that are missing and reads the records that are there. Blocks shortly.
    pub fn new(config: FunctionConfig) -> Result<Self, RuntimeError> {
        for (name, mode) in
            [("", 0o700), ("compiled", 0o700), ("run", 0o700), ("instances", 0o700), ("logs", 0o700), ("empty", 0o555)]
        {
            let dir = config.dir.join(name);
            let made = fs::DirBuilder::new().recursive(true).mode(mode).create(&dir);
            made.map_err(host(format!("making the folder {}", dir.display())))?;
        }
        let records = read_records(&config.dir.join("instances")).map_err(host("reading the records of functions"))?;
        let pool = Pool::new(config.dir.clone(), config.exe.clone(), config.keep.clone());
        let (records, projects) = (Arc::new(Mutex::new(records)), Mutex::default());
        let known = records.clone();
        let serves =
            move |id: &str, uid| locked(&known).get(&uid).is_some_and(|r| r.executor == id && r.ended.is_none());
        let outlets = Outlets::new(config.dir.join("run"), Arc::new(serves));
        Ok(Self { config, pool, records, outlets, projects, compiling: Semaphore::new(1) })
    }

    /// Drops compiled artefacts of every component that is not named. What runs keeps running.
    pub async fn prune(&self, keep: &BTreeSet<Digest>) -> Result<(), RuntimeError> {
        let keep: BTreeSet<_> = keep.iter().map(artefact_name).collect();
        let dir = self.config.dir.join("compiled");
        let prune = move || -> io::Result<()> {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if !entry.file_name().to_str().is_some_and(|name| keep.contains(name)) {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        };
        let _alone = self.compiling.acquire().await.expect("never closed");
        blocking(prune).await.map_err(host("dropping compiled components"))
    }

    fn artefact(&self, image: &Digest) -> PathBuf {
        self.config.dir.join("compiled").join(artefact_name(image))
    }

    async fn compile(&self, image: Digest) -> Result<(), RuntimeError> {
        let artefact = self.artefact(&image);
        let is_there = async || {
            let artefact = artefact.clone();
            blocking(move || artefact.exists()).await
        };
        // A start does not wait for other components to be compiled.
        if is_there().await {
            return Ok(());
        }
        let _alone = self.compiling.acquire().await.expect("never closed");
        if is_there().await {
            return Ok(());
        }
        let source = (self.config.blob)(&image);
        let partial = self.config.dir.join("compiled").join(format!(".{}.part", image.hex()));
        let open = {
            let partial = partial.clone();
            move || -> io::Result<(File, File, File)> {
                let input = File::open(source)?;
                let mut options = OpenOptions::new();
                let output = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(partial)?;
                let said = File::from(nix::sys::memfd::memfd_create(
                    "compile-stderr",
                    nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
                )?);
                Ok((input, output, said))
            }
        };
        let (input, output, mut said) = blocking(open).await.map_err(host(format!("opening the component {image}")))?;
        let copy = |file: &File| file.as_fd().try_clone_to_owned().map_err(host("duplicating a descriptor"));
        let stdio = [input.into(), copy(&output)?, copy(&said)?];
        let spawn = self.pool.command("compile", format!("compile-{}", image.hex()), COMPILE_USER, &[]);
        let outcome = self.config.keep.run(spawn, stdio, COMPILE).await;
        let finish = move || -> Result<(), RuntimeError> {
            let status = match outcome {
                Ok(0) => {
                    let kept = output.sync_all().and_then(|()| fs::rename(&partial, &artefact));
                    return kept.map_err(host("keeping a compiled component"));
                }
                Ok(status) => status,
                Err(KeepError::Deadline(_)) => 128 + libc::SIGKILL,
                Err(error) => return Err(error.into()),
            };
            // The next attempt would truncate it; this only saves space.
            let _ = fs::remove_file(&partial);
            let mut text = String::new();
            let _ = said.rewind().and_then(|()| (&mut said).take(64 << 10).read_to_string(&mut text));
            let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned();
            if status == i32::from(UNFIT) {
                return Err(RuntimeError::Image { image, message: last });
            }
            if status == 128 + libc::SIGKILL || status == 128 + libc::SIGABRT {
                let message =
                    format!("compiling it took more than {COMPILE:?}, or more memory than a compiler may have");
                return Err(RuntimeError::Image { image, message });
            }
            Err(RuntimeError::Failed {
                attempt: format!("compiling {image}"),
                message: format!("status {status}: {last}"),
            })
        };
        blocking(finish).await
    }

    fn project(&self, project: &Name) -> Arc<AsyncMutex<()>> {
        locked(&self.projects).entry(project.clone()).or_default().clone()
    }

    /// Hands an instance over.
    async fn hand_over(&self, id: &str, sandbox: &Sandbox) -> Result<Reply, RuntimeError> {
        let template = &sandbox.template;
        let secret = sandbox.secrets.read_env().map_err(host("reading the variables that hold secrets"))?;
        let secret = secret.iter().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned()));
        let given = template.env.iter().map(|(key, value)| (key.clone(), value.clone()));
        let port = template.ports.first().map_or(DEFAULT_PORT, |port| port.port);
        let add = Add {
            project: sandbox.project.clone(),
            uid: sandbox.uid,
            epoch: sandbox.epoch,
            env: given.chain(secret).collect(),
            memory: template.resources.memory.0,
            concurrency: template.function.concurrency,
            timeout_seconds: template.function.timeout_seconds,
            log_max_bytes: sandbox.logs.max_bytes,
            log_keep: sandbox.logs.keep,
        };
        let (artefact, netns) = (self.artefact(&sandbox.image), sandbox.netns.clone());
        let (logs, user) = (sandbox.logs.dir.clone(), pool::user(id));
        let open = move || -> Result<Vec<OwnedFd>, RuntimeError> {
            let artefact = File::open(artefact).map_err(host("opening a compiled component"))?;
            let attempt = format!("binding port {port} in the network namespace {}", netns.display());
            let listener = client::bind(&netns, port).map_err(host(attempt))?;
            let logs = log_folder(&logs, user).map_err(host("making the folder of the logs"))?;
            Ok(vec![artefact.into(), listener, logs])
        };
        let fds = blocking(open).await?;
        let reply = self.pool.ask(id, Request::Add(Box::new(add)), fds).await;
        reply.map_err(host(format!("handing {} to its executor", sandbox.uid)))
    }

    async fn keep_record(&self, record: Record) -> Result<(), RuntimeError> {
        let dir = self.config.dir.join("instances");
        let written = record.clone();
        let outcome = blocking(move || write_record(&dir, &written)).await;
        outcome.map_err(host("writing the record of a function"))?;
        locked(&self.records).insert(record.uid, record);
        Ok(())
    }

    async fn drop_record(&self, uid: Uid) -> Result<(), RuntimeError> {
        let path = self.config.dir.join("instances").join(format!("{uid}.json"));
        let outcome = blocking(move || fs::remove_file(path)).await;
        match outcome {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(host("dropping the record of a function")(e)),
            _ => {
                locked(&self.records).remove(&uid);
                Ok(())
            }
        }
    }

    /// Why an instance is not served, once and for all.
    fn ending(record: &Record, kept: Option<&Kept>, now: Timestamp) -> Ended {
        if record.stopping {
            return Ended { code: Some(0), at: now, message: "stopped".into() };
        }
        match kept.map(|kept| &kept.state) {
            Some(KeptState::Exited { code, at, message }) => {
                let status = code.map_or("an unknown status".to_owned(), |code| format!("status {code}"));
                let reason = if message.is_empty() { String::new() } else { format!(": {message}") };
                Ended { code: *code, at: *at, message: format!("its executor ended with {status}{reason}") }
            }
            _ => Ended { code: None, at: now, message: "its executor was replaced".into() },
        }
    }
}

#[async_trait]
impl Runtime for FunctionRuntime {
    async fn prepare(&self, image: Digest) -> Result<(), RuntimeError> {
        self.compile(image).await?;
        self.pool.ready_for_more();
        Ok(())
    }

    fn connect_by(&self, connections: Arc<dyn Connections>) {
        self.outlets.connect_by(connections);
    }

    async fn warm(&self, project: &Name) {
        if let Err(error) = self.pool.warm(project).await {
            tracing::debug!(%project, %error, "no executor could be started ahead");
        }
    }

    async fn upkeep(&self) {
        self.pool.upkeep(|| self.tend()).await;
    }

    async fn close(&self) {
        if let Err(error) = self.pool.dismiss(0).await {
            tracing::warn!(%error, "the executor that stood by could not be ended");
        }
    }

    async fn start(&self, sandbox: &Sandbox) -> Result<(), RuntimeError> {
        self.compile(sandbox.image).await?;
        let project = self.project(&sandbox.project);
        let _alone = project.lock().await;
        let (id, served) = self.pool.executor(&sandbox.project).await?;
        let served = served.into_iter().find(|served| served.uid == sandbox.uid);
        let runs = served.as_ref().is_some_and(|served| served.epoch == sandbox.epoch && !served.draining);
        if !runs {
            if served.is_some() {
                expect_done(self.pool.ask(&id, Request::Remove(sandbox.uid), Vec::new()).await, sandbox.uid)?;
            }
            let mut reply = self.hand_over(&id, sandbox).await?;
            if let Reply::Incompatible(_) = reply {
                // From before the processor or the program changed. It is only a cache.
                let stale = self.artefact(&sandbox.image);
                let _ = blocking(move || fs::remove_file(stale)).await;
                self.compile(sandbox.image).await?;
                reply = self.hand_over(&id, sandbox).await?;
            }
            match reply {
                Reply::Done => {}
                Reply::Unfit(message) => return Err(RuntimeError::Image { image: sandbox.image, message }),
                Reply::Incompatible(message) | Reply::Failed(message) => {
                    return Err(RuntimeError::Failed { attempt: format!("starting {}", sandbox.uid), message });
                }
                other => return Err(unexpected(sandbox.uid, &other)),
            }
        }
        let since = served.filter(|_| runs).map_or_else(super::engine::now, |served| served.since);
        let (uid, epoch) = (sandbox.uid, sandbox.epoch);
        self.keep_record(Record { uid, epoch, executor: id.clone(), since, stopping: false, ended: None }).await?;
        self.outlets.ensure(&id);
        Ok(())
    }

    async fn stop(&self, uid: Uid) -> Result<(), RuntimeError> {
        let Some(mut record) = locked(&self.records).get(&uid).cloned() else { return Ok(()) };
        if record.ended.is_some() {
            return Ok(());
        }
        let executor = record.executor.clone();
        record.stopping = true;
        self.keep_record(record).await?;
        // One that can't be asked serves nothing: `observe` tells.
        match self.pool.ask(&executor, Request::Drain(uid), Vec::new()).await {
            Ok(reply) => expect_done(Ok(reply), uid),
            Err(_) => Ok(()),
        }
    }

    async fn remove(&self, uid: Uid) -> Result<(), RuntimeError> {
        let record = locked(&self.records).get(&uid).cloned();
        for (id, kept) in self.pool.all().await? {
            // Without a record (the agent ended between handing over and writing it down) any may have it.
            if !is_running(&kept) || record.as_ref().is_some_and(|r| r.executor != id) {
                continue;
            }
            let failed = async |attempt: String, error: io::Error| match self.pool.runs(&id).await {
                // It may have ended since it was listed; if it only does not answer, that is a failure.
                Ok(true) => Err(host(attempt)(error)),
                other => other.map(drop),
            };
            let project = match self.pool.owner(&id).await {
                Ok(Some(project)) => project,
                // It serves nothing.
                Ok(None) => continue,
                Err(error) => {
                    failed(format!("asking an executor whether it has {uid}"), error).await?;
                    continue;
                }
            };
            let project = self.project(&project);
            let _alone = project.lock().await;
            match self.pool.ask(&id, Request::Remove(uid), Vec::new()).await {
                Ok(reply) => expect_done(Ok(reply), uid)?,
                Err(error) => failed(format!("removing {uid} from its executor"), error).await?,
            }
            self.pool.retire(&id).await?;
        }
        self.drop_record(uid).await?;
        self.forget_ended().await
    }

    async fn observe(&self) -> Result<Vec<Observed>, RuntimeError> {
        // Before the executors are asked: what is started meanwhile is not in it, and so is not taken for ended.
        let records = locked(&self.records).clone();
        let executors = self.pool.all().await?;
        if self.has_compiled().await {
            self.pool.look(&executors);
        }
        let mut observed = BTreeMap::new();
        let mut silent = BTreeSet::new();
        for (id, kept) in &executors {
            if !is_running(kept) || self.pool.stands_by(id) {
                continue;
            }
            match self.pool.list(id).await {
                Ok(list) => {
                    if !list.is_empty() && is_ours(id) {
                        self.outlets.ensure(id);
                    }
                    observed.extend(list.into_iter().map(|served| {
                        let state = State::Running { since: served.since };
                        (served.uid, Observed { uid: served.uid, epoch: served.epoch, state, part: None })
                    }));
                }
                Err(error) => {
                    tracing::warn!(executor = %id, %error, "the executor can't be asked; its functions count as running");
                    silent.insert(id.clone());
                }
            }
        }
        let now = super::engine::now();
        for (uid, mut record) in records {
            if observed.contains_key(&uid) {
                continue;
            }
            let epoch = record.epoch;
            let state = if silent.contains(&record.executor) {
                State::Running { since: record.since }
            } else {
                let ended = match record.ended.clone() {
                    Some(ended) => ended,
                    None => {
                        let ended = Self::ending(&record, executors.get(&record.executor), now);
                        record.ended = Some(ended.clone());
                        self.note_ended(record).await?;
                        ended
                    }
                };
                State::Exited { code: ended.code, at: ended.at, message: ended.message }
            };
            observed.insert(uid, Observed { uid, epoch, state, part: None });
        }
        Ok(observed.into_values().collect())
    }

    async fn collect(&self, keep: Vec<Digest>) -> Result<(), RuntimeError> {
        // Executors have their artefacts open, and a start that misses one compiles it again.
        self.prune(&keep.into_iter().collect()).await?;
        self.pool.poke();
        Ok(())
    }

    async fn exec(&self, _: Uid, _: &[String], _: ExecIo, _: Duration) -> Result<i32, RuntimeError> {
        Err(RuntimeError::Unsupported("exec: a function has no processes, so it"))
    }
}

impl FunctionRuntime {
    /// Writes down that an instance has ended, unless it was removed or started anew since it was looked at.
    async fn note_ended(&self, record: Record) -> Result<(), RuntimeError> {
        let current = locked(&self.records).get(&record.uid).cloned();
        if current.is_some_and(|current| current.epoch == record.epoch && current.since == record.since) {
            self.keep_record(record).await?;
        }
        Ok(())
    }

    /// Drops the keeper's records of executors that have ended and that no instance's end needs.
    async fn forget_ended(&self) -> Result<(), RuntimeError> {
        let needed = |id: &str| locked(&self.records).values().any(|record| record.executor == id);
        self.pool.forget_ended(needed).await
    }

    /// Whether a function may have to be started here: there is a component that is ready for it.
    async fn has_compiled(&self) -> bool {
        let dir = self.config.dir.join("compiled");
        let suffix = format!("-{GENERATION}.cwasm");
        let any = move || {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.into_iter().any(|e| e.file_name().to_str().is_some_and(|name| name.ends_with(&suffix)))
        };
        blocking(any).await
    }

    /// Sees to it that one executor stands by where functions may come, and none elsewhere.
    async fn tend(&self) -> Result<(), RuntimeError> {
        self.forget_ended().await?;
        if !self.has_compiled().await {
            return self.pool.dismiss(0).await;
        }
        self.pool.stand_by().await?;
        self.pool.dismiss(1).await
    }
}

fn artefact_name(image: &Digest) -> String {
    format!("{}-{GENERATION}.cwasm", image.hex())
}

fn unexpected(uid: Uid, reply: &Reply) -> RuntimeError {
    let message = format!("an unexpected answer: {reply:?}");
    RuntimeError::Failed { attempt: format!("asking the executor of {uid}"), message }
}

/// The folder of an instance's logs, where its executor may write.
fn log_folder(dir: &Path, user: u32) -> io::Result<OwnedFd> {
    fs::create_dir_all(dir)?;
    let folder = File::open(dir)?;
    folder.set_permissions(Permissions::from_mode(0o750))?;
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::fchown(&folder, Some(user), Some(user))?;
        // A restarted instance goes on in the files that are there; they may be another user's after an upgrade.
        for entry in fs::read_dir(dir)? {
            std::os::unix::fs::lchown(entry?.path(), Some(user), Some(user))?;
        }
    }
    Ok(folder.into())
}

fn read_records(dir: &Path) -> io::Result<BTreeMap<Uid, Record>> {
    let mut records = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match serde_json::from_slice::<Record>(&fs::read(&path)?) {
            Ok(record) => {
                records.insert(record.uid, record);
            }
            // Torn by a power cut. What it told is told by the executor, if the instance lives.
            Err(error) => tracing::warn!(path = %path.display(), %error, "a function's record can't be read"),
        }
    }
    Ok(records)
}

fn write_record(dir: &Path, record: &Record) -> io::Result<()> {
    let partial = dir.join(format!(".{}.part", record.uid));
    let mut file = File::create(&partial)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    fs::rename(partial, dir.join(format!("{}.json", record.uid)))
}
