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
use tokio::time::{Instant, sleep};

use super::client;
use super::compile::UNFIT;
use super::control::{Add, Reply, Request, Served};
use crate::keep::{Entry, Keep, KeepError, Kept, KeptState, LogFiles, Spawn};
use crate::{ExecIo, Observed, Runtime, RuntimeError, Sandbox, State};

/// Where an instance listens whose template names no port.
pub const DEFAULT_PORT: u16 = 8080;

/// What artefacts and the control protocol are compatible with. An agent of another generation starts executors of its own
/// beside those that still serve. To be changed with wasmtime, with the engine's configuration and with the protocol.
const GENERATION: &str = "w48-1";

/// How long compiling one component may take.
const COMPILE: Duration = Duration::from_secs(60);

/// How long an executor may take until it answers for the first time.
const START: Duration = Duration::from_secs(10);

/// How long to wait before an executor that does not answer yet is asked again: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_millis(1);
const RETRY: Duration = Duration::from_millis(10);

/// How long one that was told to exit may take; its record is dropped later otherwise.
const EXIT: Duration = Duration::from_secs(2);

/// Executors' users: each project has one of these, by its name's hash. Two projects that meet in one are kept apart by
/// chroot and their lack of everything to be shared.
const FIRST_USER: u32 = 200_000;
const USERS: u32 = 65_536;

/// Who compiles.
const COMPILE_USER: u32 = FIRST_USER + USERS;

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
    records: Mutex<BTreeMap<Uid, Record>>,
    /// One start or removal in a project at a time, so that no executor is ended while it is given something.
    projects: Mutex<BTreeMap<Name, Arc<AsyncMutex<()>>>>,
    /// One compilation at a time: it takes every processor that it finds.
    compiling: Semaphore,
}

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

fn host(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> RuntimeError {
    let attempt = attempt.into();
    move |source| RuntimeError::Host { attempt, source }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
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
        Ok(Self { config, records: Mutex::new(records), projects: Mutex::default(), compiling: Semaphore::new(1) })
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

    fn command(&self, verb: &str, id: String, user: u32, more: &[&str]) -> Spawn {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut argv = vec![path(&self.config.exe), "executor".into(), verb.into(), "--user".into(), user.to_string()];
        argv.extend(["--root".into(), path(&self.config.dir.join("empty"))]);
        argv.extend(more.iter().map(|arg| (*arg).to_owned()));
        Spawn {
            id,
            entry: Entry::Process,
            argv,
            // Fewer arenas of the allocator: an idle executor is to be small.
            env: vec![("MALLOC_ARENA_MAX".into(), "2".into())],
            cwd: Some("/".into()),
            // It gives up its rights itself: see `confine`.
            user: None,
            netns: None,
            cgroups: Vec::new(),
            logs: None,
        }
    }

    async fn compile(&self, image: Digest) -> Result<(), RuntimeError> {
        let _alone = self.compiling.acquire().await.expect("never closed");
        let artefact = self.artefact(&image);
        if blocking({
            let artefact = artefact.clone();
            move || artefact.exists()
        })
        .await
        {
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
        let spawn = self.command("compile", format!("compile-{}", image.hex()), COMPILE_USER, &[]);
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

    async fn ask(&self, executor: &str, request: Request, fds: Vec<OwnedFd>) -> io::Result<Reply> {
        let (folder, name) = (self.config.dir.join("run"), executor.to_owned());
        blocking(move || client::ask(&folder, &name, &request, &fds)).await
    }

    async fn list(&self, executor: &str) -> io::Result<Vec<Served>> {
        match self.ask(executor, Request::List, Vec::new()).await? {
            Reply::Instances(list) => Ok(list),
            other => Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
        }
    }

    /// Sees to it that an executor runs and answers, and returns what it serves.
    async fn executor(&self, id: &str, project: &Name) -> Result<Vec<Served>, RuntimeError> {
        let socket = self.config.dir.join("run").join(id);
        let socket = socket.to_string_lossy().into_owned();
        let mut spawn = self.command("serve", id.to_owned(), user(project), &["--socket", &socket]);
        let dir = self.config.dir.join("logs").join(project.to_string());
        spawn.logs = Some(LogFiles { dir, max_bytes: 1 << 20, keep: 1 });
        let deadline = Instant::now() + START;
        let mut pause = RETRY_FIRST;
        loop {
            // Each time, because one that was told to exit may still have been there at the first.
            self.config.keep.spawn(spawn.clone()).await?;
            match self.list(id).await {
                Ok(list) => return Ok(list),
                Err(source) if Instant::now() >= deadline => {
                    return Err(RuntimeError::Host {
                        attempt: format!("reaching the executor of project {project}"),
                        source,
                    });
                }
                Err(_) => sleep(pause).await,
            }
            pause = (pause * 2).min(RETRY);
        }
    }

    /// Hands an instance over.
    async fn hand_over(&self, id: &str, sandbox: &Sandbox) -> Result<Reply, RuntimeError> {
        let template = &sandbox.template;
        let secret = sandbox.secrets.read_env().map_err(host("reading the variables that hold secrets"))?;
        let secret = secret.iter().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned()));
        let given = template.env.iter().map(|(key, value)| (key.clone(), value.clone()));
        let port = template.ports.first().map_or(DEFAULT_PORT, |port| port.port);
        let add = Add {
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
        let (logs, user) = (sandbox.logs.dir.clone(), user(&sandbox.project));
        let open = move || -> Result<Vec<OwnedFd>, RuntimeError> {
            let artefact = File::open(artefact).map_err(host("opening a compiled component"))?;
            let attempt = format!("listening on port {port} in the network namespace {}", netns.display());
            let listener = client::listen(&netns, port).map_err(host(attempt))?;
            let logs = log_folder(&logs, user).map_err(host("making the folder of the logs"))?;
            Ok(vec![artefact.into(), listener, logs])
        };
        let fds = blocking(open).await?;
        let reply = self.ask(id, Request::Add(Box::new(add)), fds).await;
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

    async fn executors(&self) -> Result<BTreeMap<String, Kept>, RuntimeError> {
        let kept = self.config.keep.list().await?;
        Ok(kept
            .into_iter()
            .filter(|kept| kept.id.starts_with("executor-"))
            .map(|kept| (kept.id.clone(), kept))
            .collect())
    }

    /// Ends an executor that has nothing left to serve, and forgets one that has ended.
    async fn retire(&self, id: &str) -> Result<(), RuntimeError> {
        // One that can't be asked has ended, or will be asked again by the next removal.
        if !matches!(self.ask(id, Request::ExitIfIdle, Vec::new()).await, Ok(Reply::Done)) {
            return Ok(());
        }
        let deadline = Instant::now() + EXIT;
        while Instant::now() < deadline {
            match self.executors().await?.get(id).map(|kept| &kept.state) {
                Some(KeptState::Running { .. }) => sleep(RETRY).await,
                Some(KeptState::Exited { .. }) => {
                    let forgotten = self.config.keep.forget(id).await;
                    let socket = self.config.dir.join("run").join(id);
                    // It would only be replaced by the next executor.
                    let _ = blocking(move || fs::remove_file(socket)).await;
                    return Ok(forgotten?);
                }
                None => return Ok(()),
            }
        }
        Ok(())
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
        self.compile(image).await
    }

    async fn warm(&self, project: &Name) {
        let lock = self.project(project);
        let _alone = lock.lock().await;
        // One that nobody comes to need ends with the next removal.
        if let Err(error) = self.executor(&executor_id(project), project).await {
            tracing::debug!(%project, %error, "no executor could be started ahead");
        }
    }

    async fn start(&self, sandbox: &Sandbox) -> Result<(), RuntimeError> {
        self.compile(sandbox.image).await?;
        let project = self.project(&sandbox.project);
        let _alone = project.lock().await;
        let id = executor_id(&sandbox.project);
        let served = self.executor(&id, &sandbox.project).await?.into_iter().find(|served| served.uid == sandbox.uid);
        let runs = served.as_ref().is_some_and(|served| served.epoch == sandbox.epoch && !served.draining);
        if !runs {
            if served.is_some() {
                expect_done(self.ask(&id, Request::Remove(sandbox.uid), Vec::new()).await, sandbox.uid)?;
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
        self.keep_record(Record { uid, epoch, executor: id, since, stopping: false, ended: None }).await
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
        match self.ask(&executor, Request::Drain(uid), Vec::new()).await {
            Ok(reply) => expect_done(Ok(reply), uid),
            Err(_) => Ok(()),
        }
    }

    async fn remove(&self, uid: Uid) -> Result<(), RuntimeError> {
        let record = locked(&self.records).get(&uid).cloned();
        for (id, kept) in self.executors().await? {
            // Without a record (the agent ended between handing over and writing it down) any may have it.
            if !matches!(kept.state, KeptState::Running { .. }) || record.as_ref().is_some_and(|r| r.executor != id) {
                continue;
            }
            let Some(project) = project_of(&id) else { continue };
            let project = self.project(&project);
            let _alone = project.lock().await;
            match self.ask(&id, Request::Remove(uid), Vec::new()).await {
                Ok(reply) => expect_done(Ok(reply), uid)?,
                // It may have ended since it was listed; if it only does not answer, that is a failure.
                Err(e) => {
                    let state = self.executors().await?.remove(&id).map(|kept| kept.state);
                    if matches!(state, Some(KeptState::Running { .. })) {
                        return Err(host(format!("removing {uid} from its executor"))(e));
                    }
                }
            }
            self.retire(&id).await?;
        }
        self.drop_record(uid).await?;
        self.forget_ended().await
    }

    async fn observe(&self) -> Result<Vec<Observed>, RuntimeError> {
        // Before the executors are asked: what is started meanwhile is not in it, and so is not taken for ended.
        let records = locked(&self.records).clone();
        let executors = self.executors().await?;
        let mut observed = BTreeMap::new();
        let mut silent = BTreeSet::new();
        for (id, kept) in &executors {
            if !matches!(kept.state, KeptState::Running { .. }) {
                continue;
            }
            match self.list(id).await {
                Ok(list) => observed.extend(list.into_iter().map(|served| {
                    let state = State::Running { since: served.since };
                    (served.uid, Observed { uid: served.uid, epoch: served.epoch, state, part: None })
                })),
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
        self.prune(&keep.into_iter().collect()).await
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
        for (id, kept) in self.executors().await? {
            let needed = locked(&self.records).values().any(|record| record.executor == id);
            if matches!(kept.state, KeptState::Exited { .. }) && !needed {
                self.config.keep.forget(&id).await?;
            }
        }
        Ok(())
    }
}

fn artefact_name(image: &Digest) -> String {
    format!("{}-{GENERATION}.cwasm", image.hex())
}

fn executor_id(project: &Name) -> String {
    format!("executor-{project}.{GENERATION}")
}

fn project_of(executor: &str) -> Option<Name> {
    executor.strip_prefix("executor-")?.split_once('.')?.0.parse().ok()
}

fn user(project: &Name) -> u32 {
    let hash = Digest::of(project.to_string().as_bytes()).hex();
    let number = u32::from_str_radix(&hash[..8], 16).expect("eight hexadecimal digits");
    FIRST_USER + number % USERS
}

fn expect_done(reply: io::Result<Reply>, uid: Uid) -> Result<(), RuntimeError> {
    match reply.map_err(host(format!("asking the executor of {uid}")))? {
        Reply::Done => Ok(()),
        Reply::Failed(message) => Err(RuntimeError::Failed { attempt: format!("removing {uid}"), message }),
        other => Err(unexpected(uid, &other)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_found_again_in_its_executors_id() {
        let project: Name = "some-project".parse().unwrap();
        assert_eq!(project_of(&executor_id(&project)), Some(project.clone()));
        assert_eq!(project_of("container-x"), None);
        assert!((FIRST_USER..FIRST_USER + USERS).contains(&user(&project)));
        assert_eq!(user(&project), user(&project));
    }
}
