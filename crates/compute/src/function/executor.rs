//! The executor: the unprivileged process that runs one project's functions on one host.
//!
//! It is started as nobody's, and may stand by for long: whatever takes time is made before a project is known. The first instance
//! that it is given makes it that project's, for good. The agent tells it what to serve over its control socket
//! ([`super::control`]); it needs nobody to go on. One thread answers the socket, two run requests, and one ticks epochs while
//! requests are under way.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_model::{Name, Uid};
use nix::sys::socket::{getsockopt, sockopt};
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmtime::Engine;
use wasmtime::component::{Component, Linker};

use super::compile;
use super::confine::{Bounds, close_inherited, confine, isolate};
use super::control::{self, Add, Reply, Request, Served};
use super::engine::{self, Guest, Memory, PAGE, Program, Purpose, SLOTS};
use super::log::Log;
use super::outgoing::{CONNECTIONS, Outgoing, Way};
use super::serve::{Instance, Shared};
use super::ticker::Ticker;

/// How long a peer may take over one exchange.
const EXCHANGE: Duration = Duration::from_secs(5);

/// How long a removed instance's guests may take to end: each ends where it next yields.
const REMOVAL: Duration = Duration::from_secs(5);

/// Connections of an instance that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Threads that run requests. One would let a guest that computes delay every other by a tick; more than two would take the
/// host from its other tenants.
const WORKERS: usize = 2;

/// The entry of `nexus executor …`: `serve --socket PATH --user ID --root DIR` or `compile --user ID --root DIR`. It must be
/// called before the process has started a thread or opened a file.
pub fn executor_main(args: &[String]) -> ExitCode {
    close_inherited();
    let options = match Options::parse(args) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("nexus executor: {message}");
            return ExitCode::from(2);
        }
    };
    match options.command {
        Command::Compile => compile_main(&options),
        Command::Serve { ref socket } => match serve_main(&options, socket) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("nexus executor: {error}");
                ExitCode::FAILURE
            }
        },
    }
}

struct Options {
    command: Command,
    user: u32,
    root: PathBuf,
}

enum Command {
    Serve { socket: PathBuf },
    Compile,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let (verb, rest) = args.split_first().ok_or("say serve or compile")?;
        let value = |name: &str| {
            let pair = rest.chunks(2).find(|pair| pair[0] == name);
            pair.and_then(|pair| pair.get(1)).ok_or_else(|| format!("{name} is missing"))
        };
        let command = match verb.as_str() {
            "serve" => Command::Serve { socket: value("--socket")?.into() },
            "compile" => Command::Compile,
            other => return Err(format!("{other:?} is neither serve nor compile")),
        };
        let user = value("--user")?.parse().map_err(|_| "--user is not a number".to_owned())?;
        Ok(Self { command, user, root: value("--root")?.into() })
    }
}

fn compile_main(options: &Options) -> ExitCode {
    // The compiler takes a few hundred bytes per byte of code; the rest is the program and its threads' stacks.
    let bounds = Bounds { address_space: Some(6 << 30), open_files: 64, file_size: 2 << 30 };
    let outcome = isolate().and_then(|()| confine(options.user, &options.root, bounds));
    let outcome = outcome.map_err(compile::CompileError::Io);
    match outcome.and_then(|()| compile::compile_stdio()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            if error.is_the_components() { ExitCode::from(compile::UNFIT) } else { ExitCode::FAILURE }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("binding the control socket {0}: {1}")]
    Socket(PathBuf, io::Error),
    #[error("giving up privileges: {0}")]
    Confine(io::Error),
    #[error("starting the runtime: {0}")]
    Runtime(io::Error),
    #[error("starting the engine: {0:#}")]
    Engine(wasmtime::Error),
}

fn serve_main(options: &Options, socket: &Path) -> Result<(), ServeError> {
    let creator = nix::unistd::geteuid().as_raw();
    // Bound while still privileged: its folder is the agent's alone, so that nobody else can reach or replace it.
    let listener = bind(socket).map_err(|e| ServeError::Socket(socket.to_owned(), e))?;
    let bounds = Bounds { address_space: None, open_files: 65_536, file_size: 1 << 30 };
    isolate().map_err(ServeError::Confine)?;
    confine(options.user, &options.root, bounds).map_err(ServeError::Confine)?;

    let engine = engine::engine(Purpose::Serve).map_err(ServeError::Engine)?;
    let linker = engine::linker(&engine).map_err(ServeError::Engine)?;
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(WORKERS).enable_all().build().map_err(ServeError::Runtime)?;
    let ticker = Ticker::start(engine.clone()).map_err(ServeError::Runtime)?;
    let outgoing = Arc::new(Outgoing::new());
    let shared = Arc::new(Shared { slots: Arc::new(Semaphore::new(SLOTS as usize)), ticker, outgoing });
    let programs = HashMap::new();
    let owner = None;
    let mut executor =
        Executor { creator, owner, engine, linker, runtime, shared, instances: BTreeMap::new(), programs };
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // Out of descriptors, most likely; requests go on and free some.
            Err(_) => {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        // A peer that vanished, or that should not have come, changes nothing here.
        match executor.exchange(&stream) {
            Ok(Next::Go) => {}
            Ok(Next::Exit) => return Ok(()),
            Err(error) => eprintln!("nexus executor: control: {error}"),
        }
    }
}

/// Binds by the file's name from within its folder, for a socket's path may have 107 bytes only.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    let missing = || io::Error::from(io::ErrorKind::InvalidInput);
    let (folder, name) = (socket.parent().ok_or_else(missing)?, socket.file_name().ok_or_else(missing)?);
    nix::unistd::chdir(folder)?;
    match fs::remove_file(name) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(name)?;
    fs::set_permissions(name, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

enum Next {
    Go,
    Exit,
}

struct Executor {
    /// The only user who may give orders, beside the executor's own.
    creator: u32,
    /// Whose functions it serves, once it was given one.
    owner: Option<Name>,
    engine: Engine,
    linker: Linker<Guest>,
    runtime: Runtime,
    shared: Arc<Shared>,
    instances: BTreeMap<Uid, (Arc<Instance>, JoinHandle<()>)>,
    /// By the artefact's file (device and inode), so that instances of one image share their code.
    programs: HashMap<(u64, u64), Weak<Program>>,
}

impl Executor {
    fn exchange(&mut self, stream: &UnixStream) -> io::Result<Next> {
        stream.set_read_timeout(Some(EXCHANGE))?;
        stream.set_write_timeout(Some(EXCHANGE))?;
        if getsockopt(stream, sockopt::PeerCredentials)?.uid() != self.creator {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (request, fds) = control::receive(stream)?;
        self.instances.retain(|_, (_, task)| !task.is_finished());
        let exit = matches!(request, Request::ExitIfIdle) && self.instances.is_empty();
        let reply = match request {
            Request::Add(add) => self.add(*add, fds).unwrap_or_else(|refusal| refusal),
            Request::Drain(uid) => {
                if let Some((instance, _)) = self.instances.get(&uid) {
                    instance.drain.cancel();
                }
                Reply::Done
            }
            Request::Remove(uid) => self.remove(uid),
            Request::List => Reply::Instances(self.instances.values().map(|(instance, _)| served(instance)).collect()),
            Request::Whose => Reply::Owner(self.owner.clone()),
            Request::Outlet => self.outlet(fds).unwrap_or_else(|refusal| refusal),
            Request::ExitIfIdle if exit => Reply::Done,
            Request::ExitIfIdle => Reply::Busy,
        };
        control::send(stream, &reply, &[])?;
        Ok(if exit { Next::Exit } else { Next::Go })
    }

    fn add(&mut self, add: Add, fds: Vec<OwnedFd>) -> Result<Reply, Reply> {
        claim(&mut self.owner, &add.project)?;
        if let Some((instance, _)) = self.instances.get(&add.uid) {
            let same = instance.epoch == add.epoch && !instance.drain.is_cancelled();
            return if same {
                Ok(Reply::Done)
            } else {
                Err(Reply::Failed("another epoch of it runs or drains".into()))
            };
        }
        let [artefact, listener, logs] = <[OwnedFd; 3]>::try_from(fds)
            .map_err(|fds| Reply::Failed(format!("{} descriptors came in place of 3", fds.len())))?;
        let program = self.program(File::from(artefact))?;
        let memory = Memory::new(add.memory);
        if program.initial_pages > memory.pages() {
            let (needed, given) = (program.initial_pages * PAGE, memory.pages() * PAGE);
            let text = format!("it needs {needed} bytes of memory to start, and resources.memory gives it {given}");
            return Err(Reply::Unfit(text));
        }
        let listener = net::TcpListener::from(listener);
        let listen = || {
            // Not before: a connection that is taken can't be given back.
            SockRef::from(&listener).listen(BACKLOG)?;
            listener.set_nonblocking(true)?;
            let _runtime = self.runtime.enter();
            TcpListener::from_std(listener)
        };
        let listener = listen().map_err(|e| Reply::Failed(format!("listening on its port: {e}")))?;
        let log = Arc::new(Log::new(logs, add.log_max_bytes, add.log_keep));
        let (shared, instance) = (self.shared.outgoing.clone(), add.uid);
        let way = Way { shared, instance, places: Arc::new(Semaphore::new(CONNECTIONS)), log: log.clone() };
        let instance = Arc::new(Instance {
            uid: add.uid,
            epoch: add.epoch,
            since: engine::now(),
            program,
            env: add.env,
            timeout: Duration::from_secs(add.timeout_seconds.max(1).into()),
            concurrency: Arc::new(Semaphore::new(add.concurrency.max(1) as usize)),
            memory,
            log,
            way,
            shared: self.shared.clone(),
            guests: TaskTracker::new(),
            drain: CancellationToken::new(),
            kill: CancellationToken::new(),
        });
        let task = self.runtime.spawn(instance.clone().serve(listener));
        self.instances.insert(add.uid, (instance, task));
        Ok(Reply::Done)
    }

    /// Takes the socket by which connections are asked for. One that stands by has nobody to ask for.
    fn outlet(&self, fds: Vec<OwnedFd>) -> Result<Reply, Reply> {
        let [socket] = <[OwnedFd; 1]>::try_from(fds)
            .map_err(|fds| Reply::Failed(format!("{} descriptors came in place of 1", fds.len())))?;
        if self.owner.is_none() {
            return Err(Reply::Failed("this executor is nobody's".into()));
        }
        let _runtime = self.runtime.enter();
        let taken = self.shared.outgoing.outlet.replace(socket);
        taken.map(|()| Reply::Done).map_err(|e| Reply::Failed(format!("taking the socket over: {e}")))
    }

    fn program(&mut self, mut artefact: File) -> Result<Arc<Program>, Reply> {
        let failed = |e: io::Error| Reply::Failed(format!("reading the compiled component: {e}"));
        let meta = artefact.metadata().map_err(failed)?;
        let key = (meta.dev(), meta.ino());
        self.programs.retain(|_, program| program.strong_count() > 0);
        if let Some(program) = self.programs.get(&key).and_then(Weak::upgrade) {
            return Ok(program);
        }
        let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
        artefact.read_to_end(&mut bytes).map_err(failed)?;
        // SAFETY: the bytes were written by this host's own compiler into a folder that only root can write, and the agent,
        // the only peer that the socket admits, has opened that very file.
        let component = unsafe { Component::deserialize(&self.engine, &bytes) }
            .map_err(|e| Reply::Incompatible(format!("{e:#}")))?;
        let program = Arc::new(Program::new(&self.linker, &component).map_err(|e| Reply::Unfit(e.to_string()))?);
        self.programs.insert(key, Arc::downgrade(&program));
        Ok(program)
    }

    fn remove(&mut self, uid: Uid) -> Reply {
        let Some((instance, task)) = self.instances.get_mut(&uid) else { return Reply::Done };
        instance.kill.cancel();
        match self.runtime.block_on(async { tokio::time::timeout(REMOVAL, task).await }) {
            Ok(_) => {
                self.instances.remove(&uid);
                Reply::Done
            }
            Err(_) => Reply::Failed(format!("its guests did not end within {REMOVAL:?}")),
        }
    }
}

/// Makes an executor a project's. That of one project never becomes another's, whatever it is told.
fn claim(owner: &mut Option<Name>, project: &Name) -> Result<(), Reply> {
    match owner {
        Some(owner) if owner != project => Err(Reply::Failed("this executor is another project's".into())),
        Some(_) => Ok(()),
        None => {
            *owner = Some(project.clone());
            Ok(())
        }
    }
}

fn served(instance: &Instance) -> Served {
    Served { uid: instance.uid, epoch: instance.epoch, since: instance.since, draining: instance.drain.is_cancelled() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_executor_is_one_projects_for_good() {
        let (one, other): (Name, Name) = ("one".parse().unwrap(), "other".parse().unwrap());
        let mut owner = None;
        assert!(claim(&mut owner, &one).is_ok());
        assert!(claim(&mut owner, &one).is_ok());
        assert!(matches!(claim(&mut owner, &other), Err(Reply::Failed(_))));
        assert_eq!(owner, Some(one));
    }
}
