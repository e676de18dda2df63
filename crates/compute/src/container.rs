//! The container runtime: OCI images by libcontainer, one folder per instance, every process the keeper's.
//!
//! What an instance needs is on disk in its folder, `instances/<uid>`, before the keeper is asked to start it, so that an
//! agent that was restarted knows everything again from the folders and the keeper's list. The container itself is made
//! by a shim (see [`shim_main`]), which also makes its mounts, in a mount namespace that ends with it: there is nothing
//! to unmount, ever. What is left of an ended instance is a folder, a cgroup and a line in the keeper's list, and
//! [`Runtime::remove`] takes away all three in any order and as often as it is asked.
//!
//! An instance that has ended stays as it is until it is removed: starting it again does nothing, so that a repeated
//! start never runs a command twice. One that could not be started at all is started anew.

mod bundle;
mod cgroup;
mod devices;
mod scratch;
mod seccomp;
mod shared;
mod shim;
mod turns;
mod user;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nexus_env::Clock;
use nexus_model::{Bytes, Digest, Name, Timestamp, Uid};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::image::{self, BlobStore, Image, UnpackLimits};
use crate::keep::{Entry, Keep, KeepError, Kept, KeptState, Spawn};
use crate::{CpuTime, ExecIo, Observed, PartOf, Runtime, RuntimeError, Sandbox, Shared, State};
use turns::{Turn, Turns};

pub use cgroup::cpuset;
pub use devices::Units;
pub use shim::{run_once, shim_main};

/// Where and how containers run on this host.
#[derive(Debug, Clone)]
pub struct ContainerConfig {
    /// The runtime's own folder: `layers/`, `instances/` and `shared/`.
    pub dir: PathBuf,
    /// The binary that, run with `shim …`, calls [`shim_main`].
    pub exe: PathBuf,
    /// The cgroup under which each container gets one, as an absolute path from the hierarchies' roots.
    pub cgroup_parent: PathBuf,
    /// What containers find in `/etc/resolv.conf`.
    pub nameservers: Vec<IpAddr>,
    pub limits: UnpackLimits,
    /// The device nodes behind compute classes, by unit.
    pub devices: BTreeMap<Name, Units>,
    /// The folder behind each storage class.
    pub storage: BTreeMap<Name, PathBuf>,
}

/// How long a killed container may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

/// Stands for an instance's shared folder where turns are taken. No part has this name.
const SHARED: &str = "/shared";

/// What a shim finds programs by.
const SHIM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub struct ContainerRuntime {
    inner: Arc<Inner>,
}

struct Inner {
    config: ContainerConfig,
    keep: Arc<dyn Keep>,
    blobs: BlobStore,
    clock: Arc<dyn Clock>,
    turns: Arc<Turns>,
    /// Held while units of compute classes are chosen and written down.
    choosing: Mutex<()>,
}

/// `instance.json`: what observing needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid: Uid,
    epoch: u64,
    image: Digest,
    memory: Bytes,
    stop_signal: String,
    made: Timestamp,
    /// Why it could not be started, and when that was.
    failed: Option<(Timestamp, String)>,
    /// The units of compute classes that it holds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    units: devices::Held,
    /// Of an init step or a sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    part: Option<PartOf>,
}

impl ContainerRuntime {
    /// Opens the runtime's folder; instances that are in it are observed as they are. Blocks shortly.
    pub fn new(
        config: ContainerConfig,
        keep: Arc<dyn Keep>,
        blobs: BlobStore,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, RuntimeError> {
        // Other processes are told these paths in words.
        if [&config.dir, &config.exe].iter().any(|path| path.to_str().is_none() || path.is_relative()) {
            let message = "its folder and binary need absolute paths in UTF-8".into();
            return Err(RuntimeError::Failed { attempt: "opening the container runtime".into(), message });
        }
        for made in ["layers", "instances", "shared"] {
            fs::create_dir_all(config.dir.join(made)).map_err(host(format!("making {}", config.dir.display())))?;
        }
        // Layers that an earlier process began to unpack.
        let layers = config.dir.join("layers");
        for entry in fs::read_dir(&layers).map_err(host("listing layers"))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(".new-") {
                fs::remove_dir_all(entry.path()).map_err(host("removing a half-unpacked layer"))?;
            }
        }
        Ok(Self {
            inner: Arc::new(Inner { config, keep, blobs, clock, turns: Arc::default(), choosing: Mutex::default() }),
        })
    }

    /// Removes unpacked layers that neither `images` nor any instance here needs, and says which.
    pub async fn collect(&self, images: Vec<Digest>) -> Result<Vec<Digest>, RuntimeError> {
        // Nothing starts or is prepared meanwhile.
        let turn = self.inner.turns.all().await;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let _turn = turn;
            inner.collect(images)
        })
        .await
    }
}

impl Inner {
    fn instance(&self, uid: Uid) -> PathBuf {
        self.config.dir.join("instances").join(uid.to_string())
    }

    fn layers(&self) -> PathBuf {
        self.config.dir.join("layers")
    }

    fn cgroup(&self, uid: Uid) -> PathBuf {
        self.config.cgroup_parent.join(kept_id(uid))
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.clock.now_millis())
    }

    fn collect(&self, mut images: Vec<Digest>) -> Result<Vec<Digest>, RuntimeError> {
        images.extend(self.records()?.into_iter().map(|r| r.image));
        let mut needed = BTreeSet::new();
        for digest in images {
            match Image::load(&self.blobs, digest) {
                Ok(image) => needed.extend(image.manifest.layers.iter().map(|l| l.digest)),
                // An image whose blobs are gone tells nothing of its layers: keep everything rather than guess.
                Err(_) => return Ok(Vec::new()),
            }
        }
        let mut removed = Vec::new();
        for entry in fs::read_dir(self.layers()).map_err(host("listing layers"))?.flatten() {
            let name = entry.file_name();
            let Some(layer) = name.to_str().and_then(|n| format!("sha256:{n}").parse::<Digest>().ok()) else {
                continue;
            };
            if !needed.contains(&layer) {
                fs::remove_dir_all(entry.path()).map_err(host(format!("removing layer {layer}")))?;
                removed.push(layer);
            }
        }
        Ok(removed)
    }

    /// The records of all instances. A folder without a readable one was cut off while it was made: nothing runs of it.
    fn records(&self) -> Result<Vec<Record>, RuntimeError> {
        let dir = self.config.dir.join("instances");
        let mut records = Vec::new();
        for entry in fs::read_dir(&dir).map_err(host("listing instances"))?.flatten() {
            let Some(uid) = entry.file_name().to_str().and_then(|n| n.parse::<Uid>().ok()) else { continue };
            match self.record(uid) {
                Some(record) => records.push(record),
                None => records.push(Record {
                    uid,
                    epoch: 0,
                    image: Digest::of(b""),
                    memory: Bytes(0),
                    stop_signal: "KILL".into(),
                    made: Timestamp::default(),
                    failed: Some((Timestamp::default(), "it was not made completely".into())),
                    units: devices::Held::new(),
                    part: None,
                }),
            }
        }
        Ok(records)
    }

    fn record(&self, uid: Uid) -> Option<Record> {
        let bytes = fs::read(self.instance(uid).join("instance.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn write_record(&self, record: &Record) -> Result<(), RuntimeError> {
        let dir = self.instance(record.uid);
        let bytes = serde_json::to_vec(record).expect("a record has no keys that JSON refuses");
        let temporary = dir.join("instance.json.new");
        fs::write(&temporary, bytes)
            .and_then(|()| fs::rename(&temporary, dir.join("instance.json")))
            .map_err(host(format!("recording instance {}", record.uid)))
    }

    /// Makes an instance's folder, complete for the shim.
    fn make(&self, sandbox: &Sandbox) -> Result<(), RuntimeError> {
        let of_image = |e: image::ImageError| e.of_image(sandbox.image);
        let image = Image::load(&self.blobs, sandbox.image).map_err(of_image)?;
        let layers = image::unpack(&self.blobs, &image, &self.layers(), self.config.limits).map_err(of_image)?;
        let dir = self.instance(sandbox.uid);
        let attempt = || host(format!("making instance {}", sandbox.uid));
        for made in ["bundle/rootfs", "scratch", "state"] {
            fs::create_dir_all(dir.join(made)).map_err(attempt())?;
        }
        let choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let others = self.records()?.into_iter().filter(|r| r.uid != sandbox.uid).map(|r| r.units);
        let units = devices::choose(&sandbox.template.classes, &self.config.devices, others).map_err(|message| {
            RuntimeError::Failed { attempt: format!("giving {} its devices", sandbox.name), message }
        })?;
        let nodes = devices::nodes(&units, &self.config.devices);
        self.write_record(&Record {
            uid: sandbox.uid,
            epoch: sandbox.epoch,
            image: sandbox.image,
            memory: sandbox.template.resources.memory,
            stop_signal: sandbox.template.stop_signal.clone(),
            made: self.now(),
            failed: None,
            units,
            part: sandbox.part.clone(),
        })?;
        drop(choosing);
        let described = nodes
            .iter()
            .map(|node| devices::describe(node).map_err(host(format!("looking at the device {}", node.display()))));
        let devices = described.collect::<Result<Vec<_>, _>>()?;
        let plan = bundle::plan(bundle::Inputs {
            sandbox,
            image: &image.config.config.unwrap_or_default(),
            layers,
            dir: &dir,
            cgroup: &self.cgroup(sandbox.uid),
            limits_swap: cgroup::limits_swap(),
            nameservers: &self.config.nameservers,
            devices,
        });
        let plan = plan.map_err(|message| RuntimeError::Image { image: sandbox.image, message })?;
        let plan = serde_json::to_vec(&plan).expect("a plan has no keys that JSON refuses");
        fs::write(dir.join("plan.json"), plan).map_err(attempt())?;
        let scratch = sandbox.template.resources.scratch;
        let image = dir.join("scratch.img");
        if let Some(class) = &sandbox.template.storage_class {
            let Some(folder) = self.config.storage.get(class) else {
                let message = format!("this host has no folder of storage class {class}");
                return Err(RuntimeError::Failed { attempt: format!("making instance {}", sandbox.name), message });
            };
            // The instance's folder leads to the file, which is where the class is.
            let file = folder.join(scratch_name(sandbox.uid));
            fs::create_dir_all(folder).map_err(host(format!("making {}", folder.display())))?;
            scratch::reserve(&file, scratch.0)
                .map_err(host(format!("reserving {scratch} of storage class {class}")))?;
            return std::os::unix::fs::symlink(&file, &image).map_err(attempt());
        }
        scratch::reserve(&image, scratch.0).map_err(host(format!("reserving {scratch} of scratch")))
    }

    /// Ends and removes everything of an instance but its line in the keeper's list.
    fn clear(&self, uid: Uid) -> Result<(), RuntimeError> {
        let folders = cgroup::folders(&self.cgroup(uid)).map_err(host("finding cgroups"))?;
        cgroup::destroy(&folders, KILL_PATIENCE).map_err(host(format!("removing the cgroups of {uid}")))?;
        // First what the folder leads to, also of a class that this host has no more: without the folder nobody would know.
        let led_to = fs::read_link(self.instance(uid).join("scratch.img")).ok();
        let of_classes = self.config.storage.values().map(|folder| folder.join(scratch_name(uid)));
        for file in of_classes.chain(led_to.filter(|file| file.ends_with(scratch_name(uid)))) {
            match fs::remove_file(&file) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(host(format!("removing {}", file.display()))(e));
                }
                _ => {}
            }
        }
        match fs::remove_dir_all(self.instance(uid)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(host(format!("removing instance {uid}"))(e)),
            _ => Ok(()),
        }
    }

    async fn kept(&self, uid: Uid) -> Result<Option<KeptState>, RuntimeError> {
        let id = kept_id(uid);
        Ok(self.keep.list().await?.into_iter().find(|kept| kept.id == id).map(|kept| kept.state))
    }

    /// Kills the instance's process, waits for its end and makes the keeper forget it.
    async fn end(&self, uid: Uid) -> Result<(), RuntimeError> {
        let id = kept_id(uid);
        let begun = Instant::now();
        loop {
            match self.kept(uid).await? {
                None => return Ok(()),
                Some(KeptState::Exited { .. }) => {
                    self.keep.forget(&id).await?;
                    return Ok(());
                }
                Some(KeptState::Running { .. }) if begun.elapsed() > KILL_PATIENCE => {
                    let message = format!("its process is still there {KILL_PATIENCE:?} after it was killed");
                    return Err(RuntimeError::Failed { attempt: format!("ending instance {uid}"), message });
                }
                Some(KeptState::Running { .. }) => {
                    self.keep.signal(&id, Signal::SIGKILL as i32).await?;
                    // Another caller may be told of the change in our place: look again soon in any case.
                    let _ = tokio::time::timeout(Duration::from_millis(50), self.keep.changed()).await;
                }
            }
        }
    }

    async fn start(self: &Arc<Self>, sandbox: &Sandbox, turn: Turn) -> Result<(), RuntimeError> {
        match self.kept(sandbox.uid).await? {
            Some(KeptState::Running { .. }) => return Ok(()),
            Some(KeptState::Exited { message, .. }) if message.is_empty() => return Ok(()),
            _ => {}
        }
        self.end(sandbox.uid).await?;
        let (inner, copy) = (Arc::clone(self), sandbox.clone());
        let made = blocking(move || {
            let _turn = turn;
            inner.clear(copy.uid)?;
            inner.make(&copy)
        });
        let started = match made.await {
            Ok(()) => self.keep.spawn(self.spawn(sandbox)).await.map_err(|e| match e {
                KeepError::Start { message, .. } => {
                    RuntimeError::Failed { attempt: format!("starting {}", sandbox.name), message }
                }
                other => other.into(),
            }),
            Err(e) => Err(e),
        };
        if let Err(error) = &started
            && !matches!(error, RuntimeError::Keep(_))
        {
            // So that observing tells it to whoever missed this answer.
            let (inner, uid, message) = (Arc::clone(self), sandbox.uid, error.to_string());
            blocking(move || match inner.record(uid) {
                Some(record) => inner.write_record(&Record { failed: Some((inner.now(), message)), ..record }),
                None => Ok(()),
            })
            .await?;
        }
        started
    }

    fn spawn(&self, sandbox: &Sandbox) -> Spawn {
        let id = kept_id(sandbox.uid);
        let dir = self.instance(sandbox.uid).display().to_string();
        Spawn {
            entry: Entry::Shim,
            argv: vec![self.config.exe.display().to_string(), "shim".into(), "run".into(), dir, id.clone()],
            env: vec![("PATH".into(), SHIM_PATH.into())],
            cwd: None,
            user: None,
            netns: None,
            cgroups: Vec::new(),
            logs: Some(sandbox.logs.clone()),
            id,
        }
    }

    fn judge(&self, record: &Record, kept: Option<&KeptState>) -> State {
        match kept {
            Some(KeptState::Running { since, .. }) => State::Running { since: *since },
            Some(KeptState::Exited { code, at, message }) => {
                let message = if message.is_empty() { self.epitaph(record, *code) } else { message.clone() };
                State::Exited { code: *code, at: *at, message }
            }
            None => {
                let (at, message) = record.failed.clone().unwrap_or_else(|| {
                    (record.made, "it ended while nobody watched: the host or its keeper was restarted".into())
                });
                State::Exited { code: None, at, message }
            }
        }
    }

    /// What a user should know of an end.
    fn epitaph(&self, record: &Record, code: Option<i32>) -> String {
        let killed = cgroup::folders(&self.cgroup(record.uid)).map(|f| cgroup::killed_for_memory(&f)).unwrap_or(0) > 0;
        let limit = format!("out of memory (limit {})", record.memory);
        match code {
            Some(137) if killed => format!("killed: {limit}"),
            Some(code) if killed => format!("exited with status {code} after a process was killed: {limit}"),
            Some(code @ 129..=192) => match Signal::try_from(code - 128) {
                Ok(signal) => format!("ended by signal {}", signal.as_str()),
                Err(_) => format!("ended by signal {}", code - 128),
            },
            Some(code) => format!("exited with status {code}"),
            None => "ended, its exit status is not known".into(),
        }
    }
}

/// The file of an instance's writable layer in a storage class's folder.
fn scratch_name(uid: Uid) -> String {
    format!("nexus-{uid}.img")
}

fn kept_id(uid: Uid) -> String {
    format!("container-{uid}")
}

fn host(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> RuntimeError {
    let attempt = attempt.into();
    move |source| RuntimeError::Host { attempt, source }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RuntimeError> + Send + 'static,
) -> Result<T, RuntimeError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| match e.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(e) => Err(host("running file work")(io::Error::other(e))),
    })
}

#[async_trait]
impl Runtime for ContainerRuntime {
    async fn prepare(&self, image: Digest) -> Result<(), RuntimeError> {
        let turn = self.inner.turns.shared().await;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let _turn = turn;
            let loaded = Image::load(&inner.blobs, image);
            let unpacked = loaded.and_then(|i| image::unpack(&inner.blobs, &i, &inner.layers(), inner.config.limits));
            unpacked.map(drop).map_err(|e| e.of_image(image))
        })
        .await
    }

    async fn start(&self, sandbox: &Sandbox) -> Result<(), RuntimeError> {
        let turn = self.inner.turns.of(sandbox.uid).await;
        self.inner.start(sandbox, turn.clone()).await
    }

    async fn stop(&self, uid: Uid) -> Result<(), RuntimeError> {
        let inner = Arc::clone(&self.inner);
        let Some(record) = blocking(move || Ok(inner.record(uid))).await? else { return Ok(()) };
        let signal: Signal = format!("SIG{}", record.stop_signal).parse().unwrap_or(Signal::SIGTERM);
        Ok(self.inner.keep.signal(&kept_id(uid), signal as i32).await?)
    }

    async fn remove(&self, uid: Uid) -> Result<(), RuntimeError> {
        let turn = self.inner.turns.of(uid).await;
        self.inner.end(uid).await?;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let _turn = turn;
            inner.clear(uid)
        })
        .await?;
        // libcontainer makes the parent cgroup and leaves it: the last instance takes it along, unless one starts now.
        if let Some(_turn) = self.inner.turns.try_all() {
            let instances = self.inner.config.dir.join("instances");
            if fs::read_dir(&instances).is_ok_and(|mut left| left.next().is_none()) {
                let parents = cgroup::folders(&self.inner.config.cgroup_parent).map_err(host("finding cgroups"))?;
                cgroup::remove_parent(&parents);
            }
        }
        Ok(())
    }

    async fn observe(&self) -> Result<Vec<Observed>, RuntimeError> {
        let inner = Arc::clone(&self.inner);
        let records = blocking(move || inner.records()).await?;
        // One that is being started or removed now is neither here nor not here: it is told of next time. The order
        // matters: what began after the folders were listed is either among these or finished before the list below.
        let busy = self.inner.turns.taken();
        let kept: HashMap<String, KeptState> =
            self.inner.keep.list().await?.into_iter().map(|Kept { id, state }| (id, state)).collect();
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let idle = records.into_iter().filter(|r| !busy.contains(&r.uid) && inner.instance(r.uid).exists());
            let observe = |record: Record| {
                let state = inner.judge(&record, kept.get(&kept_id(record.uid)));
                Observed { uid: record.uid, epoch: record.epoch, state, part: record.part }
            };
            Ok(idle.map(observe).collect())
        })
        .await
    }

    async fn collect(&self, keep: Vec<Digest>) -> Result<(), RuntimeError> {
        Self::collect(self, keep).await.map(drop)
    }

    async fn cpu_time(&self) -> Result<BTreeMap<Uid, CpuTime>, RuntimeError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let used = |r: Record| {
                let folders = cgroup::folders(&inner.cgroup(r.uid)).ok()?;
                let instance = r.part.map_or(r.uid, |part| part.instance);
                Some((r.uid, CpuTime { instance, used: cgroup::cpu_time(&folders)? }))
            };
            Ok(inner.records()?.into_iter().filter_map(used).collect())
        })
        .await
    }

    async fn share(&self, instance: Uid, size: Bytes, class: Option<&Name>) -> Result<Shared, RuntimeError> {
        // Not the instance's own: whoever looks at it meanwhile is to see it.
        let turn = self.inner.turns.of(instance.part(SHARED)).await;
        let (inner, class) = (Arc::clone(&self.inner), class.cloned());
        blocking(move || {
            let _turn = turn;
            inner.share(instance, size, class.as_ref())
        })
        .await
    }

    async fn unshare(&self, instance: Uid) -> Result<(), RuntimeError> {
        let turn = self.inner.turns.of(instance.part(SHARED)).await;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let _turn = turn;
            inner.unshare(instance)
        })
        .await
    }

    async fn shared(&self) -> Result<Vec<Uid>, RuntimeError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.shared()).await
    }

    async fn exec(&self, uid: Uid, command: &[String], io: ExecIo, deadline: Duration) -> Result<i32, RuntimeError> {
        if !matches!(self.inner.kept(uid).await?, Some(KeptState::Running { .. })) {
            return Err(RuntimeError::NotRunning(uid));
        }
        let id = kept_id(uid);
        let dir = self.inner.instance(uid).display().to_string();
        let mut argv = vec![self.inner.config.exe.display().to_string()];
        argv.extend(["shim".into(), "exec".into(), dir, id.clone(), "--".into()]);
        argv.extend_from_slice(command);
        let spawn = Spawn {
            id: format!("{id}.exec"),
            entry: Entry::Process,
            argv,
            env: vec![("PATH".into(), SHIM_PATH.into())],
            cwd: None,
            user: None,
            netns: None,
            cgroups: Vec::new(),
            logs: None,
        };
        Ok(self.inner.keep.run(spawn, [io.stdin, io.stdout, io.stderr], deadline).await?)
    }
}

/// Why a shim failed, for the last line of its standard error.
#[derive(Debug)]
struct Failure {
    message: String,
    status: i32,
}

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: 125 }
    }

    fn io(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let attempt = attempt.into();
        move |e| Self::new(format!("{attempt}: {e}"))
    }

    fn os(attempt: &str) -> impl FnOnce(nix::Error) -> Self {
        move |e| Self::new(format!("{attempt}: {}", e.desc()))
    }
}
