//! The shim: the `nexus` binary, run anew by the keeper to make one container or to run one command in one.
//!
//! Making a container forks and changes namespaces, which only a process with a single thread can do safely; that is why
//! it does not happen in the agent. `shim run` leaves the container's first process as an orphan for the keeper, writes
//! its pid to file descriptor 3 and ends. `shim exec` stays until its command ends and ends with its status. `shim once`
//! makes a container from any bundle, waits for it and removes it, like `runc run`.
//!
//! The last line of standard error says why a shim failed.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use oci_spec::runtime::Spec;
use rustix::fs::{self as rfs, Mode, OFlags, ResolveFlags};
use serde_json::{Value, json};

use super::bundle::Plan;
use super::{Failure, scratch, seccomp, user};
use crate::SecretMounts;

/// Exit statuses as shells have them.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;
const FAILED: i32 = 125;

/// The status descriptor that the keeper gives a shim.
const STATUS: i32 = 3;

const USAGE: &str = "usage: shim run DIR ID | shim exec DIR ID -- COMMAND... | shim once BUNDLE STATE-DIR ID";

/// Runs a shim with the words that follow `nexus shim`, and returns the status to exit with. The process must have one
/// thread: call it before any runtime is built.
pub fn shim_main(args: impl IntoIterator<Item = OsString>) -> i32 {
    let args: Vec<OsString> = args.into_iter().collect();
    let text: Option<Vec<&str>> = args.iter().map(|a| a.to_str()).collect();
    let result = match text.as_deref() {
        _ if fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() != 1) => {
            Err(Failure::new("a shim must have a single thread"))
        }
        Some(["run", dir, id]) => run(Path::new(dir), id).map(|()| 0),
        Some(["exec", dir, id, "--", command @ ..]) if !command.is_empty() => exec(Path::new(dir), id, command),
        Some(["once", bundle, state, id]) => once(Path::new(bundle), Path::new(state), id),
        _ => Err(Failure::new(USAGE)),
    };
    result.unwrap_or_else(|failure| {
        reap();
        // One line, because the last one is what is read.
        eprintln!("{}", failure.message.replace('\n', " "));
        failure.status
    })
}

/// Waits shortly for the processes of a failed attempt, which are ending: a container can't end before all that ran in it
/// was waited for.
fn reap() {
    for _ in 0..100 {
        match waitpid(None::<nix::unistd::Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

fn run(dir: &Path, id: &str) -> Result<(), Failure> {
    let bundle = dir.join("bundle");
    let root = bundle.join("rootfs");
    let plan = read_plan(dir)?;

    scratch::enter_private_mounts()?;
    scratch::mount_scratch(&dir.join("scratch.img"), &dir.join("scratch"), plan.scratch)?;
    scratch::mount_root(&plan.layers, dir, &root)?;
    let etc = dir.join("scratch/etc");
    fs::create_dir_all(&etc).map_err(Failure::io("making /etc files"))?;
    for (name, content) in &plan.etc {
        let path = etc.join(name);
        fs::write(&path, content).map_err(Failure::io(format!("writing /etc/{name}")))?;
        let mode = fs::Permissions::from_mode(0o644);
        fs::set_permissions(&path, mode).map_err(Failure::io(format!("writing /etc/{name}")))?;
    }
    let secrets = plan.secrets.clone();
    let mut spec = with_user(plan, &root)?;
    own_secrets(&secrets, &spec).map_err(Failure::io("handing secrets to the container's user"))?;
    limit_files(&mut spec);
    fs::write(bundle.join("config.json"), spec.to_string()).map_err(Failure::io("writing config.json"))?;

    let launch = Launch { dies_with_shim: false, secret: secret_env(&secrets)? };
    let pid = create(&bundle, &dir.join("state"), id, launch)?;
    // SAFETY: the keeper opened this descriptor for the shim; nothing else here owns it.
    let mut status = File::from(unsafe { OwnedFd::from_raw_fd(STATUS) });
    write!(status, "{pid}").map_err(Failure::io("telling the keeper the pid"))
}

fn read_plan(dir: &Path) -> Result<Plan, Failure> {
    let plan = fs::read(dir.join("plan.json")).map_err(Failure::io("reading plan.json"))?;
    serde_json::from_slice(&plan).map_err(|e| Failure::new(format!("plan.json: {e}")))
}

/// The variables that hold secrets. They are in no file of the container's but given to its process alone.
fn secret_env(secrets: &SecretMounts) -> Result<Arc<Vec<String>>, Failure> {
    secrets.read_env().map(Arc::new).map_err(Failure::io("reading the variables that hold secrets"))
}

/// Only the user that the container's process begins as may read the files: here it is known who that is.
fn own_secrets(secrets: &SecretMounts, spec: &Value) -> io::Result<()> {
    let id = |field: &str| spec["process"]["user"][field].as_u64().and_then(|id| u32::try_from(id).ok());
    secrets.folders.iter().try_for_each(|folder| own(&folder.source, id("uid"), id("gid")))
}

fn own(path: &Path, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    std::os::unix::fs::lchown(path, uid, gid)?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            own(&entry?.path(), uid, gid)?;
        }
    }
    Ok(())
}

/// Makes a container of a bundle and lets it run.
fn create(bundle: &Path, state: &Path, id: &str, launch: Launch) -> Result<i32, Failure> {
    let attempt = "making the container";
    fs::create_dir_all(state).map_err(Failure::io(attempt))?;
    let mut container = builder(state, id, launch)?
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(Failure::of(attempt))?;
    container.start().map_err(Failure::of("starting the container"))?;
    container.pid().map(|pid| pid.as_raw()).ok_or_else(|| Failure::new("the container has no pid"))
}

fn builder(state: &Path, id: &str, launch: Launch) -> Result<ContainerBuilder, Failure> {
    ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(launch)
        .with_root_path(state)
        .and_then(ContainerBuilder::validate_id)
        .map_err(Failure::of("preparing the container"))
}

/// Looks the user up in the mounted image, and makes the working directory if the image has none.
fn with_user(plan: Plan, root: &Path) -> Result<Value, Failure> {
    let root = rfs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Failure::io("opening the root")(e.into()))?;
    let user = user::resolve(&plan.user, &lookup(&root, "etc/passwd")?, &lookup(&root, "etc/group")?)
        .map_err(|e| Failure { message: e, status: FAILED })?;
    make_folder(&root, &plan.working_dir)?;
    let mut spec = plan.spec;
    let process = &mut spec["process"];
    // The main group is listed too: left out of the list, it could be dropped by a process to get around a denial.
    let groups: Vec<u32> = std::iter::once(user.gid).chain(user.groups).collect();
    process["user"] = json!({"uid": user.uid, "gid": user.gid, "additionalGids": groups});
    if let (Some(home), Some(env)) = (user.home, process["env"].as_array_mut())
        && !env.iter().any(|pair| pair.as_str().is_some_and(|p| p.starts_with("HOME=")))
    {
        env.push(format!("HOME={home}").into());
    }
    Ok(spec)
}

/// Bounds the files that a process may have open. What the host doesn't let us raise stays as it is.
fn limit_files(spec: &mut Value) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const SOFT: u64 = 65_536;
    const HARD: u64 = 1_048_576;
    if setrlimit(Resource::RLIMIT_NOFILE, SOFT, HARD).is_err() {
        tracing::debug!("the bound on open files can't be raised");
    }
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(HARD, |(_, hard)| hard.min(HARD));
    let limit = json!({"type": "RLIMIT_NOFILE", "soft": hard.min(SOFT), "hard": hard});
    if let Some(limits) = spec["process"]["rlimits"].as_array_mut() {
        limits.push(limit);
    }
}

/// A file of the image as text, empty if there is none. Links in it can't lead out of it.
fn lookup(root: &OwnedFd, path: &str) -> Result<String, Failure> {
    const MOST: u64 = 4 << 20;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Ok(file) = rfs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    else {
        return Ok(String::new());
    };
    let file = File::from(file);
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(Failure::io(format!("reading /{path}")))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn make_folder(root: &OwnedFd, path: &str) -> Result<(), Failure> {
    let attempt = || Failure::io(format!("making the working directory {path}"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut below = String::from(".");
    let mut at = root.try_clone().map_err(attempt())?;
    for part in path.split('/').filter(|p| !matches!(*p, "" | ".")) {
        below = format!("{below}/{part}");
        at = match rfs::openat2(root, &below, flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::NOENT) => {
                rfs::mkdirat(&at, part, Mode::from_raw_mode(0o755)).map_err(|e| attempt()(e.into()))?;
                rfs::openat2(root, &below, flags, Mode::empty(), resolve).map_err(|e| attempt()(e.into()))?
            }
            other => other.map_err(|e| attempt()(e.into()))?,
        };
    }
    Ok(())
}

fn exec(dir: &Path, id: &str, command: &[&str]) -> Result<i32, Failure> {
    let config = dir.join("bundle/config.json");
    let spec = fs::read(&config).map_err(Failure::io("reading config.json"))?;
    let spec: Value = serde_json::from_slice(&spec).map_err(|e| Failure::new(format!("config.json: {e}")))?;
    let mut process = spec["process"].clone();
    process["args"] = json!(command);
    let file = dir.join(format!("exec-{}.json", std::process::id()));
    fs::write(&file, process.to_string()).map_err(Failure::io("writing the process"))?;
    let launch = Launch { dies_with_shim: true, secret: secret_env(&read_plan(dir)?.secrets)? };
    let built =
        builder(&dir.join("state"), id, launch)?.as_tenant().with_process(Some(&file)).with_detach(false).build();
    let removed = fs::remove_file(&file);
    let pid = built.map_err(Failure::of("running the command"))?;
    removed.map_err(Failure::io("removing the process's file"))?;
    wait(pid.as_raw())
}

fn wait(pid: i32) -> Result<i32, Failure> {
    loop {
        match waitpid(nix::unistd::Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, status)) => return Ok(status),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(Failure::os("waiting for the command")(e)),
        }
    }
}

fn once(bundle: &Path, state: &Path, id: &str) -> Result<i32, Failure> {
    let pid = create(bundle, state, id, Launch::default())?;
    let status = wait(pid)?;
    let mut container = libcontainer::container::Container::load(state.join(id)).map_err(Failure::of("loading"))?;
    container.delete(true).map_err(Failure::of("removing the container"))?;
    Ok(status)
}

/// Runs a container of `bundle` from start to end in a shim that is `exe` (a binary that passes `shim …` to
/// [`shim_main`]), and returns its exit status: what `runc run` does, for measuring against it.
pub fn run_once(exe: &Path, bundle: &Path, state: &Path, id: &str) -> io::Result<std::process::ExitStatus> {
    let mut command = std::process::Command::new(exe);
    command.args(["shim", "once"]).arg(bundle).arg(state).arg(id).status()
}

/// The last steps inside the container: becomes the command.
#[derive(Clone, Default)]
struct Launch {
    /// Variables that stand before all others of their names.
    secret: Arc<Vec<String>>,
    /// A command that was run by exec does not outlive its shim, which is killed when its deadline passes.
    dies_with_shim: bool,
}

impl Executor for Launch {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let (words, env) = self.command(spec);
        let refuse = |message: String| Err(ExecutorValidationError::ArgValidationError(message));
        match find(&words[0], &env) {
            Lookup::Found(_) => Ok(()),
            Lookup::Missing => refuse(format!("{MARK}command {:?} is not in the image", words[0])),
            Lookup::NotExecutable => refuse(format!("{MARK}command {:?} is not an executable file", words[0])),
        }
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (words, env) = self.command(spec);
        let Lookup::Found(path) = find(&words[0], &env) else { give_up(NOT_FOUND, &words[0], "not found") };
        let text = |word: &String| CString::new(word.as_bytes()).map_err(|_| ExecutorError::InvalidArg);
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| ExecutorError::InvalidArg)?;
        let argv = words.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        let envp = env.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        if self.dies_with_shim {
            // SAFETY: sets a flag of this process.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
        }
        if let Err(e) = seccomp::install() {
            give_up(FAILED, &words[0], &format!("installing the system call filter: {e}"));
        }
        let Err(errno) = nix::unistd::execve(&path, &argv, &envp);
        give_up(NOT_EXECUTABLE, &words[0], errno.desc());
    }
}

/// Set before messages that a user is to read without what libcontainer puts around them.
const MARK: &str = "\u{1}";

impl Launch {
    fn command<'a>(&self, spec: &'a Spec) -> (&'a [String], Vec<String>) {
        let process = spec.process().as_ref().expect("libcontainer checks that there is a process");
        let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
        let taken: Vec<String> = self.secret.iter().map(|pair| name(pair)).collect();
        let others = process.env().iter().flatten().filter(|pair| !taken.contains(&name(pair)));
        let env = self.secret.iter().chain(others).cloned().collect();
        (process.args().as_deref().expect("libcontainer checks that there are arguments"), env)
    }
}

fn give_up(status: i32, command: &str, why: &str) -> ! {
    eprintln!("cannot run {command:?}: {why}");
    // Not `exit`: what libcontainer opened is not ours to flush.
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

enum Lookup {
    Found(PathBuf),
    Missing,
    NotExecutable,
}

fn find(name: &str, env: &[String]) -> Lookup {
    let path = env.iter().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or("/bin:/usr/bin");
    let candidates: Vec<PathBuf> = match name.contains('/') {
        true => vec![PathBuf::from(name)],
        false => path.split(':').map(|dir| Path::new(if dir.is_empty() { "." } else { dir }).join(name)).collect(),
    };
    let mut result = Lookup::Missing;
    for candidate in candidates {
        match fs::metadata(&candidate) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Lookup::Found(candidate),
            Ok(_) => result = Lookup::NotExecutable,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => result = Lookup::NotExecutable,
            Err(_) => {}
        }
    }
    result
}

impl Failure {
    /// What libcontainer said, without its wrapping where the cause is the user's.
    fn of<E: std::error::Error>(attempt: &str) -> impl FnOnce(E) -> Self {
        move |error| {
            let mut message = format!("{attempt}: {error}");
            let mut source = error.source();
            while let Some(inner) = source {
                let text = inner.to_string();
                if !message.contains(&text) {
                    message = format!("{message}: {text}");
                }
                source = inner.source();
            }
            match message.split_once(MARK) {
                Some((_, own)) => {
                    let own = own.trim_end_matches(['"', ')', '}']).replace("\\\"", "\"");
                    let status = if own.ends_with("executable file") { NOT_EXECUTABLE } else { NOT_FOUND };
                    Self { message: own, status }
                }
                None => Self { message, status: FAILED },
            }
        }
    }
}
