//! Containers: their limits, their walls, and what they leave behind.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use nexus_compute::container::{ContainerConfig, ContainerRuntime};
use nexus_compute::image::{BlobStore, UnpackLimits};
use nexus_compute::keep::{Keep, KeepError, LogFiles};
use nexus_compute::{
    CpuSet, ExecIo, IDENTITY_DIR, IDENTITY_SOCKET, Observed, PartOf, Runtime, RuntimeError, Sandbox, SharedMount, State,
};
use nexus_env::RealClock;
use nexus_model::kind::Template;
use nexus_model::{Bytes, Digest, Uid};
use serde_json::json;

use crate::images;
use crate::keep::{DirectKeep, NetNs, pipe};
use crate::suite::{self, PATIENCE, Subject, ended, state};

/// What a script of [`World::shell`] prints last.
const END: &str = "the-script-has-ended";

static NEXT: AtomicU8 = AtomicU8::new(1);

pub struct World {
    dir: tempfile::TempDir,
    pub keep: Arc<DirectKeep>,
    pub blobs: BlobStore,
    pub runtime: ContainerRuntime,
    netns: NetNs,
    cgroup: PathBuf,
    image: Digest,
}

impl World {
    pub fn new() -> Self {
        Self::with(json!({"Env": ["FROM=image", "BOTH=image"], "Cmd": ["/bin/true"], "WorkingDir": "/made/deep"}))
    }

    fn with(execution: serde_json::Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let keep = Arc::new(DirectKeep::new());
        let blobs = BlobStore::open(dir.path().join("blobs")).unwrap();
        let image = images::layered(&blobs, &images::busybox_layers(), execution);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup = PathBuf::from(format!("/nexus-test-{}-{number}", std::process::id()));
        let runtime = open(dir.path(), &cgroup, keep.clone(), blobs.clone());
        Self { keep, blobs, runtime, netns: NetNs::new(), cgroup, image, dir }
    }

    pub fn sandbox(&self, command: &[&str]) -> Sandbox {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut template =
            Template { command: command.iter().map(|w| (*w).to_owned()).collect(), ..Template::default() };
        template.resources.memory = Bytes(64 << 20);
        template.resources.scratch = Bytes(4 << 20);
        template.env.insert("BOTH".into(), "app".into());
        let uid = Uid::from_random([number; 16]);
        Sandbox {
            uid,
            epoch: 7,
            name: format!("web-{number}").parse().unwrap(),
            project: "demo".parse().unwrap(),
            app: "web".parse().unwrap(),
            template,
            image: self.image,
            netns: self.netns.path.clone(),
            address6: Ipv6Addr::LOCALHOST,
            address4: Ipv4Addr::LOCALHOST,
            identity: None,
            secrets: Default::default(),
            part: None,
            cpuset: None,
            shared: None,
            logs: LogFiles { dir: self.dir.path().join("logs").join(uid.to_string()), max_bytes: 1 << 20, keep: 1 },
        }
    }

    /// A script whose errors go where its output goes, in order, and whose last line is [`END`].
    fn shell(&self, script: &str) -> Sandbox {
        self.sandbox(&["sh", "-c", &format!("exec 2>&1; trap 'echo; echo {END}' EXIT\n{script}")])
    }

    /// Runs a script to its end: its status, the message, and what it printed.
    async fn output(&self, sandbox: &Sandbox) -> (Option<i32>, String, String) {
        self.runtime.start(sandbox).await.unwrap();
        let (code, message) = ended(&self.runtime, sandbox.uid).await;
        let read = || {
            let log = fs::read_to_string(sandbox.logs.dir.join("current")).unwrap_or_default();
            log.lines().map(|line| line.splitn(3, ' ').nth(2).unwrap().to_owned() + "\n").collect::<String>()
        };
        let end = format!("\n{END}\n");
        let mut lines = read();
        if sandbox.template.command.iter().any(|word| word.contains(END)) && code.is_some_and(|code| code < 128) {
            // The end of the process may be known before its last line is.
            let whole = async {
                while !lines.ends_with(&end) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    lines = read();
                }
            };
            tokio::time::timeout(PATIENCE, whole).await.unwrap();
            lines.truncate(lines.len() - end.len());
        }
        self.runtime.remove(sandbox.uid).await.unwrap();
        (code, message, lines)
    }

    async fn exec(&self, uid: Uid, command: &[&str], input: &str) -> (Result<i32, RuntimeError>, String, String) {
        self.exec_within(uid, command, input, PATIENCE).await
    }

    async fn exec_within(
        &self,
        uid: Uid,
        command: &[&str],
        input: &str,
        deadline: Duration,
    ) -> (Result<i32, RuntimeError>, String, String) {
        let (stdin, fill) = pipe();
        fs::File::from(fill).write_all(input.as_bytes()).unwrap();
        let ((mut out, stdout), (mut err, stderr)) = (pipe(), pipe());
        let command: Vec<String> = command.iter().map(|w| (*w).to_owned()).collect();
        let io = ExecIo { stdin: stdin.into(), stdout, stderr };
        let status = self.runtime.exec(uid, &command, io, deadline).await;
        let (mut printed, mut complained) = (String::new(), String::new());
        out.read_to_string(&mut printed).unwrap();
        err.read_to_string(&mut complained).unwrap();
        (status, printed, complained)
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let name = self.cgroup.strip_prefix("/").unwrap();
        let roots = fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .flatten()
            .map(|e| e.path())
            .chain([PathBuf::from("/sys/fs/cgroup")]);
        roots.map(|root| root.join(name)).filter(|path| path.exists()).collect()
    }

    fn instance(&self, uid: Uid) -> PathBuf {
        self.dir.path().join("runtime/instances").join(uid.to_string())
    }

    async fn assert_clean(&self) {
        assert_eq!(self.runtime.observe().await.unwrap(), []);
        assert_eq!(self.cgroups(), Vec::<PathBuf>::new());
        assert_eq!(fs::read_dir(self.dir.path().join("runtime/instances")).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()), "{mounts}");
        assert_eq!(self.keep.list().await.unwrap(), []);
    }
}

/// A test that failed leaves no processes and no cgroups either.
impl Drop for World {
    fn drop(&mut self) {
        for parent in self.cgroups() {
            for folder in fs::read_dir(&parent).unwrap().flatten().filter(|e| e.path().is_dir()) {
                for _ in 0..500 {
                    let processes = fs::read_to_string(folder.path().join("cgroup.procs")).unwrap_or_default();
                    for pid in processes.lines().filter_map(|line| line.parse().ok()) {
                        let _ =
                            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                    }
                    if fs::remove_dir(folder.path()).is_ok() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            let _ = fs::remove_dir(&parent);
        }
    }
}

fn open(dir: &Path, cgroup: &Path, keep: Arc<DirectKeep>, blobs: BlobStore) -> ContainerRuntime {
    ContainerRuntime::new(config(dir, cgroup), keep, blobs, Arc::new(RealClock::new())).unwrap()
}

fn config(dir: &Path, cgroup: &Path) -> ContainerConfig {
    ContainerConfig {
        dir: dir.join("runtime"),
        exe: std::env::current_exe().unwrap(),
        cgroup_parent: cgroup.to_owned(),
        nameservers: vec![Ipv4Addr::new(10, 0, 0, 53).into()],
        limits: UnpackLimits::default(),
        devices: Default::default(),
        storage: Default::default(),
    }
}

const LASTING: &str = "trap 'exit 0' TERM; sleep 1000 & wait";

impl Subject for World {
    fn runtime(&self) -> &dyn Runtime {
        &self.runtime
    }

    fn reopened(&self) -> Box<dyn Runtime> {
        Box::new(open(self.dir.path(), &self.cgroup, self.keep.clone(), self.blobs.clone()))
    }

    fn lasting(&self) -> Sandbox {
        self.shell(LASTING)
    }

    fn has_exec(&self) -> bool {
        true
    }
}

async fn containers_keep_the_contract() {
    let world = World::new();
    suite::all(&world).await;
    world.assert_clean().await;
}

async fn exit_statuses_and_signals_are_told() {
    let world = World::new();
    let (code, message, _) = world.output(&world.shell("exit 3")).await;
    assert_eq!((code, message.as_str()), (Some(3), "exited with status 3"));
    // Ends before anybody could look.
    let (code, message, _) = world.output(&world.sandbox(&["true"])).await;
    assert_eq!((code, message.as_str()), (Some(0), "exited with status 0"));
    let sandbox = world.lasting();
    world.runtime.start(&sandbox).await.unwrap();
    world.keep.signal(&format!("container-{}", sandbox.uid), 9).await.unwrap();
    let (code, message) = ended(&world.runtime, sandbox.uid).await;
    assert_eq!((code, message.as_str()), (Some(137), "ended by signal SIGKILL"));
    world.runtime.remove(sandbox.uid).await.unwrap();
    world.assert_clean().await;
}

async fn the_image_decides_what_the_app_does_not() {
    let world = World::with(json!({
        "Env": ["FROM=image", "BOTH=image"],
        "Entrypoint": ["sh", "-c"],
        "Cmd": ["echo $FROM $BOTH $HOME $PWD; id; hostname; cat /etc/hosts /etc/resolv.conf"],
        "User": "web",
        "WorkingDir": "/made/deep",
    }));
    let sandbox = world.sandbox(&[]);
    let (code, _, out) = world.output(&sandbox).await;
    assert_eq!(code, Some(0), "{out}");
    for part in ["image app /srv /made/deep", "uid=33(web) gid=44(web) groups=44(web),50(logs)", sandbox.name.as_str()]
    {
        assert!(out.contains(part), "{part}: {out}");
    }
    let search = format!("search {0}.internal internal\n", sandbox.project);
    assert!(out.contains(&search) && out.contains("options ndots:2"), "{out}");
    assert!(out.contains("nameserver 10.0.0.53") && out.contains("::1\tweb-"), "{out}");
    let mut sandbox = world.sandbox(&[]);
    sandbox.template.args = vec!["exit 5".into()];
    assert_eq!(world.output(&sandbox).await.0, Some(5));
    world.assert_clean().await;
}

async fn a_container_sees_the_socket_of_its_identity_and_can_change_nothing_there() {
    let world = World::with(json!({"Env": ["SPIFFE_ENDPOINT_SOCKET=unix:///of/the/image"], "Cmd": ["/bin/true"]}));
    let identity = world.dir.path().join("identity");
    fs::create_dir(&identity).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(identity.join(IDENTITY_SOCKET)).unwrap();
    let script = format!(
        "echo $SPIFFE_ENDPOINT_SOCKET; cd {IDENTITY_DIR}; test -S {IDENTITY_SOCKET} && echo a socket
        touch x || echo nothing is made; rm {IDENTITY_SOCKET} || echo nothing is removed"
    );
    let (_, _, out) = world.output(&Sandbox { identity: Some(identity.clone()), ..world.shell(&script) }).await;
    let lines: Vec<&str> = out.lines().filter(|l| !l.contains("Read-only file system")).collect();
    let expected = ["unix:///run/spiffe/workload.sock", "a socket", "nothing is made", "nothing is removed"];
    assert_eq!(lines, expected, "{out}");
    assert!(identity.join(IDENTITY_SOCKET).exists());

    // What the user says is meant; who has no identity is told of none.
    let mut own = Sandbox { identity: Some(identity), ..world.shell("echo $SPIFFE_ENDPOINT_SOCKET") };
    own.template.env.insert("SPIFFE_ENDPOINT_SOCKET".into(), "unix:///own".into());
    assert_eq!(world.output(&own).await.2.trim_end(), "unix:///own");
    let (_, _, none) = world.output(&world.shell("echo $SPIFFE_ENDPOINT_SOCKET; ls -d /run/spiffe")).await;
    assert!(none.starts_with("unix:///of/the/image\n") && none.contains("No such file"), "{none}");
    world.assert_clean().await;
}

async fn layers_stack_with_whiteouts() {
    let world = World::new();
    let script = "cd /; ls opaque plain; cat opaque/hard; stat -c '%a' opaque tmp";
    let (code, _, out) = world.output(&world.shell(script)).await;
    assert_eq!(code, Some(0));
    assert_eq!(out, "opaque:\nabove\nhard\n\nplain:\nkept\nabove750\n1777\n");
    world.assert_clean().await;
}

async fn memory_beyond_the_limit_kills_and_says_so() {
    let world = World::new();
    let mut sandbox = world.sandbox(&["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]);
    sandbox.template.resources.memory = Bytes(32 << 20);
    let (code, message, _) = world.output(&sandbox).await;
    assert_eq!((code, message.as_str()), (Some(137), "killed: out of memory (limit 32Mi)"));
    world.assert_clean().await;
}

/// The last processor that a list names, such as `0-3`.
fn last_of(list: &str) -> &str {
    list.trim().rsplit([',', '-']).next().unwrap()
}

async fn an_instance_is_kept_to_its_processors_and_memory() {
    let world = World::new();
    let (cpus, mems) = nexus_compute::container::cpuset(&world.cgroup).unwrap();
    let (cpu, node) = (last_of(&cpus), last_of(&mems));
    let allowed = |out: &str, what: &str| {
        let line = out.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_else(|| panic!("{what} in {out}"));
        line.trim().to_owned()
    };
    let script = "grep _allowed_list /proc/self/status";
    let (code, _, out) = world.output(&world.shell(script)).await;
    assert_eq!((code, allowed(&out, "Cpus_allowed_list:").as_str()), (Some(0), cpus.as_str()), "without a wish, all");
    let set = CpuSet { cpus: cpu.to_owned(), mems: Some(node.to_owned()) };
    let (code, _, out) = world.output(&Sandbox { cpuset: Some(set), ..world.shell(script) }).await;
    assert_eq!(code, Some(0), "{out}");
    assert_eq!(allowed(&out, "Cpus_allowed_list:"), cpu);
    assert_eq!(allowed(&out, "Mems_allowed_list:"), node);
    // Commands that are run in it are kept to the same, and a processor that isn't there is an error.
    let set = CpuSet { cpus: cpu.to_owned(), mems: None };
    let lasting = Sandbox { cpuset: Some(set), ..world.lasting() };
    world.runtime.start(&lasting).await.unwrap();
    let (status, out, _) = world.exec(lasting.uid, &["sh", "-c", script], "").await;
    assert_eq!((status.unwrap(), allowed(&out, "Cpus_allowed_list:").as_str()), (0, cpu));
    world.runtime.remove(lasting.uid).await.unwrap();
    let set = CpuSet { cpus: "4000".to_owned(), mems: None };
    let wrong = Sandbox { cpuset: Some(set), ..world.lasting() };
    let started = world.runtime.start(&wrong).await;
    assert!(started.is_err() || ended(&world.runtime, wrong.uid).await.0 != Some(0));
    world.runtime.remove(wrong.uid).await.unwrap();
    world.assert_clean().await;
}

async fn processes_beyond_the_limit_are_refused() {
    let world = World::new();
    let mut sandbox = world.shell("i=0; while [ $i -lt 30 ]; do sleep 100 & i=$((i+1)); done; echo all");
    sandbox.template.resources.pids = 10;
    let (code, _, out) = world.output(&sandbox).await;
    assert_ne!(code, Some(0));
    assert!(out.contains("can't fork") && !out.contains("all"), "{out}");
    world.assert_clean().await;
}

async fn a_full_scratch_layer_hurts_only_the_app() {
    let world = World::new();
    let sandbox = world
        .shell("cd /tmp; dd if=/dev/zero of=full bs=1M count=100; wc -c < full; rm full; echo again > new && cat new");
    let (code, _, out) = world.output(&sandbox).await;
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("No space left on device") && out.ends_with("again\n"), "{out}");
    let size: u64 = out.lines().find_map(|l| l.parse().ok()).unwrap();
    assert!((4 << 20..8 << 20).contains(&size), "{size}");
    world.assert_clean().await;
}

async fn an_instance_changes_nothing_of_the_image() {
    let world = World::new();
    let (code, ..) =
        world.output(&world.shell("echo changed > /plain/kept; rm -r /opaque; touch /bin/new; cat /plain/kept")).await;
    assert_eq!(code, Some(0));
    let (code, _, out) = world.output(&world.shell("cat /plain/kept; ls /opaque/above; ls /bin/new")).await;
    assert_ne!(code, Some(0));
    assert!(out.starts_with("kept/opaque/above\n"), "{out}");
    world.assert_clean().await;
}

async fn a_container_is_walled_in() {
    let world = World::new();
    let script = "mount -t tmpfs x /tmp; echo mount $?; unshare -n true; echo unshare $?; mknod /tmp/n c 1 3; echo mknod $?; \
        head -c 1 /proc/kcore | wc -c; echo 1 > /proc/sys/kernel/panic; echo sys $?; ls /dev; echo pid $$; \
        head -c1 /proc/1/environ >/dev/null && echo own; cat /proc/self/status";
    let (_, _, out) = world.output(&world.shell(script)).await;
    for refused in ["mount 0", "unshare 0", "mknod 0", "sys 0"] {
        assert!(!out.contains(refused), "{refused}: {out}");
    }
    assert!(out.contains("\n0\n") && out.contains("pid 1\n"), "{out}");
    assert!(!out.contains("vda") && !out.contains("loop"), "{out}");
    assert!(out.contains("Seccomp:\t2") && out.contains("NoNewPrivs:\t1"), "{out}");
    assert!(out.contains("CapBnd:\t00000000000405fb"), "{out}");
    world.assert_clean().await;
}

async fn commands_run_inside_with_their_own_streams() {
    let world = World::new();
    let sandbox = world.lasting();
    world.runtime.start(&sandbox).await.unwrap();
    let uid = sandbox.uid;
    let (status, out, err) =
        world.exec(uid, &["sh", "-c", "cat; echo $BOTH; hostname; echo bad >&2; exit 9"], "typed\n").await;
    assert_eq!((status.unwrap(), err.as_str()), (9, "bad\n"));
    assert_eq!(out, format!("typed\napp\n{}\n", sandbox.name));
    let (status, out, _) = world.exec(uid, &["cat", "/proc/self/status"], "").await;
    assert_eq!(status.unwrap(), 0);
    assert!(
        out.contains("Seccomp:\t2") && out.contains("NoNewPrivs:\t1") && out.contains("CapEff:\t00000000000405fb"),
        "{out}"
    );
    let (status, _, err) = world.exec(uid, &["no-such"], "").await;
    assert_eq!((status.unwrap(), err.as_str()), (127, "command \"no-such\" is not in the image\n"));
    let (status, _, err) = world.exec(uid, &["text"], "").await;
    assert_eq!((status.unwrap(), err.as_str()), (126, "command \"text\" is not an executable file\n"));
    // A command that takes too long ends with its shim.
    let (status, ..) = world.exec_within(uid, &["sleep", "54321"], "", Duration::from_millis(300)).await;
    assert!(matches!(status, Err(RuntimeError::Keep(KeepError::Deadline(_)))));
    let gone = async {
        while world.exec(uid, &["sh", "-c", "cat /proc/[0-9]*/cmdline"], "").await.1.contains("54321") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
    world.runtime.remove(uid).await.unwrap();
    world.assert_clean().await;
}

async fn a_command_that_does_not_exist_is_a_clear_error() {
    let world = World::new();
    let cases = [
        ("/no/such", "command \"/no/such\" is not in the image"),
        ("text", "command \"text\" is not an executable file"),
    ];
    for (command, expected) in cases {
        let sandbox = world.sandbox(&[command]);
        let error = world.runtime.start(&sandbox).await.unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
        let observed = state(&world.runtime, sandbox.uid).await.unwrap();
        assert!(
            matches!(&observed.state, State::Exited { code: None, message, .. } if *message == error),
            "{observed:?}"
        );
        // It can be tried again.
        assert_eq!(world.runtime.start(&sandbox).await.unwrap_err().to_string(), error);
        world.runtime.remove(sandbox.uid).await.unwrap();
    }
    let (code, _, out) = world.output(&world.sandbox(&["garbage"])).await;
    assert_eq!((code, out.as_str()), (Some(126), "cannot run \"garbage\": Exec format error\n"));
    let mut sandbox = world.sandbox(&["true"]);
    sandbox.image = images::layered(&world.blobs, &images::busybox_layers(), json!({"User": "nobody-here"}));
    let error = world.runtime.start(&sandbox).await.unwrap_err().to_string();
    assert!(error.ends_with("the image's /etc/passwd has no user \"nobody-here\""), "{error}");
    world.runtime.remove(sandbox.uid).await.unwrap();
    let mut sandbox = world.sandbox(&[]);
    sandbox.image = images::layered(&world.blobs, &images::busybox_layers(), json!({}));
    let error = world.runtime.start(&sandbox).await.unwrap_err().to_string();
    assert!(error.contains("names no command"), "{error}");
    world.runtime.remove(sandbox.uid).await.unwrap();
    world.assert_clean().await;
}

async fn leftovers_of_an_earlier_life_are_cleaned() {
    let world = World::new();
    // The host was switched off: folders are there, the keeper knows nothing, and no process is.
    let sandbox = world.lasting();
    world.runtime.start(&sandbox).await.unwrap();
    let id = format!("container-{}", sandbox.uid);
    world.keep.signal(&id, 9).await.unwrap();
    ended(&world.runtime, sandbox.uid).await;
    world.keep.lose_memory();
    let observed = state(&world.runtime, sandbox.uid).await.unwrap();
    assert!(matches!(&observed, Observed { epoch: 7, state: State::Exited { code: None, .. }, .. }), "{observed:?}");
    // It starts anew over what is left.
    world.runtime.start(&sandbox).await.unwrap();
    assert!(matches!(state(&world.runtime, sandbox.uid).await.unwrap().state, State::Running { .. }));

    // The keeper forgot a process that lives: its cgroup still finds it.
    let pid = world.keep.pid(&id).unwrap();
    world.keep.lose_memory();
    world.runtime.remove(sandbox.uid).await.unwrap();
    let gone = async {
        while Path::new(&format!("/proc/{pid}/root/bin")).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();

    // The agent died while it made the folder.
    let sandbox = world.lasting();
    fs::create_dir_all(world.instance(sandbox.uid).join("bundle")).unwrap();
    assert!(matches!(state(&world.runtime, sandbox.uid).await.unwrap().state, State::Exited { code: None, .. }));
    world.runtime.start(&sandbox).await.unwrap();
    // ... and while it removed it.
    fs::remove_file(world.instance(sandbox.uid).join("instance.json")).unwrap();
    world.runtime.remove(sandbox.uid).await.unwrap();
    world.assert_clean().await;
}

async fn a_full_host_is_told_as_such() {
    let world = World::new();
    let mut sandbox = world.lasting();
    sandbox.template.resources.scratch = Bytes(64 << 40);
    let error = world.runtime.start(&sandbox).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Host { .. }), "{error}");
    world.runtime.remove(sandbox.uid).await.unwrap();
    world.assert_clean().await;
}

async fn unused_layers_are_collected() {
    let world = World::new();
    let sandbox = world.lasting();
    world.runtime.start(&sandbox).await.unwrap();
    assert_eq!(world.runtime.collect(vec![]).await.unwrap(), []);
    world.runtime.remove(sandbox.uid).await.unwrap();
    assert_eq!(world.runtime.collect(vec![sandbox.image]).await.unwrap(), []);
    assert_eq!(world.runtime.collect(vec![]).await.unwrap().len(), 2);
    world.runtime.prepare(sandbox.image).await.unwrap();
    world.assert_clean().await;
}

async fn a_bundle_runs_once() {
    let world = World::new();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("bundle/rootfs");
    for made in ["bin", "proc", "dev"] {
        fs::create_dir_all(root.join(made)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/sh")).unwrap();
    let spec = json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", "exit 4"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "mounts": [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": world.netns.path}],
            "cgroupsPath": world.cgroup.join("once"),
        },
    });
    fs::write(dir.path().join("bundle/config.json"), spec.to_string()).unwrap();
    let exe = std::env::current_exe().unwrap();
    for _ in 0..3 {
        let status =
            nexus_compute::container::run_once(&exe, &dir.path().join("bundle"), &dir.path().join("state"), "once")
                .unwrap();
        assert_eq!(status.code(), Some(4));
    }
}

crate::tests![
    containers_keep_the_contract,
    exit_statuses_and_signals_are_told,
    the_image_decides_what_the_app_does_not,
    a_container_sees_the_socket_of_its_identity_and_can_change_nothing_there,
    layers_stack_with_whiteouts,
    memory_beyond_the_limit_kills_and_says_so,
    an_instance_is_kept_to_its_processors_and_memory,
    processes_beyond_the_limit_are_refused,
    a_full_scratch_layer_hurts_only_the_app,
    an_instance_changes_nothing_of_the_image,
    a_container_is_walled_in,
    commands_run_inside_with_their_own_streams,
    a_command_that_does_not_exist_is_a_clear_error,
    leftovers_of_an_earlier_life_are_cleaned,
    a_full_host_is_told_as_such,
    unused_layers_are_collected,
    a_bundle_runs_once,
    classes_bring_their_devices_and_the_folder_of_the_scratch_layer,
    parts_share_a_bounded_folder_that_outlasts_each_of_them,
];

/// A device node of this test's own: zeros without an end.
struct Node(PathBuf);

impl Node {
    fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let node = Self(PathBuf::from(format!("/dev/nexus-test-{}-{number}", std::process::id())));
        let made = std::process::Command::new("mknod").arg(&node.0).args(["c", "1", "5"]).status().unwrap();
        assert!(made.success());
        node
    }

    fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn classes_bring_their_devices_and_the_folder_of_the_scratch_layer() {
    let w = World::new();
    let (one, two) = (Node::new(), Node::new());
    let (gpu, fast): (nexus_model::Name, nexus_model::Name) = ("gpu".parse().unwrap(), "fast".parse().unwrap());
    let folder = w.dir.path().join("fast-disk");
    let config = ContainerConfig {
        devices: [(gpu.clone(), vec![vec![one.0.clone()], vec![two.0.clone()]])].into(),
        storage: [(fast.clone(), folder.clone())].into(),
        ..config(w.dir.path(), &w.cgroup)
    };
    let runtime = ContainerRuntime::new(config, w.keep.clone(), w.blobs.clone(), Arc::new(RealClock::new())).unwrap();
    let wants = || {
        let mut sandbox = w.sandbox(&["sh", "-c", LASTING]);
        sandbox.template.classes.insert(gpu.clone(), 1);
        sandbox.template.storage_class = Some(fast.clone());
        sandbox
    };
    let (first, second, third) = (wants(), wants(), wants());
    runtime.start(&first).await.unwrap();
    runtime.start(&second).await.unwrap();
    let read = |node: &Node| format!("dd if={} bs=4 count=1 2>/dev/null | wc -c", node.text());
    for (sandbox, own, other) in [(&first, &one, &two), (&second, &two, &one)] {
        let script = format!("{}; test -e {} || echo hidden", read(own), other.text());
        let (status, printed, complained) = w.exec(sandbox.uid, &["sh", "-c", &script], "").await;
        assert_eq!((status.unwrap(), printed.as_str()), (0, "4\nhidden\n"), "{complained}");
        let file = folder.join(format!("nexus-{}.img", sandbox.uid));
        assert!(fs::metadata(&file).unwrap().len() >= 4 << 20, "its scratch layer is there");
        let (status, ..) = w.exec(sandbox.uid, &["sh", "-c", "echo kept > /kept && cat /kept"], "").await;
        assert_eq!(status.unwrap(), 0);
    }
    // Devices of the same number that it was not given stay shut.
    let script = "mknod /dev/other b 7 0 2>/dev/null && echo made";
    assert_eq!(w.exec(first.uid, &["sh", "-c", script], "").await.1, "");
    let why = runtime.start(&third).await.unwrap_err().to_string();
    assert!(why.contains("1 of class gpu are wanted, and 2 of this host's 2 are in use"), "{why}");

    runtime.remove(first.uid).await.unwrap();
    assert!(!folder.join(format!("nexus-{}.img", first.uid)).exists(), "nothing is left in the folder");
    runtime.start(&third).await.unwrap();
    let (_, printed, complained) = w.exec(third.uid, &["sh", "-c", &read(&one)], "").await;
    assert_eq!(printed, "4\n", "{complained}");
    for sandbox in [&second, &third] {
        runtime.remove(sandbox.uid).await.unwrap();
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    let mut unknown = wants();
    unknown.template.storage_class = Some("slow".parse().unwrap());
    let why = runtime.start(&unknown).await.unwrap_err().to_string();
    assert!(why.contains("no folder of storage class slow"), "{why}");
    runtime.remove(unknown.uid).await.unwrap();
    w.assert_clean().await;
}

async fn parts_share_a_bounded_folder_that_outlasts_each_of_them() {
    let w = World::new();
    let fast: nexus_model::Name = "fast".parse().unwrap();
    let folder = w.dir.path().join("fast-disk");
    let config =
        || ContainerConfig { storage: [(fast.clone(), folder.clone())].into(), ..config(w.dir.path(), &w.cgroup) };
    let open = || ContainerRuntime::new(config(), w.keep.clone(), w.blobs.clone(), Arc::new(RealClock::new())).unwrap();
    let instance = Uid::from_random([200; 16]);
    for class in [None, Some(&fast)] {
        let runtime = open();
        let made = runtime.share(instance, Bytes(1 << 20), class).await.unwrap();
        let part = |name: &str, script: &str| Sandbox {
            uid: instance.part(name),
            part: Some(PartOf { instance, name: name.parse().unwrap() }),
            shared: Some(SharedMount { source: made.path.clone(), destination: "/srv/both".into() }),
            ..w.shell(script)
        };
        let (code, _, out) =
            w.output(&part("a", "echo left > /srv/both/note; ls /srv/both; stat -c %a /srv/both")).await;
        assert_eq!((code, out.as_str()), (Some(0), "note\n1777\n"));
        let lasting = part("b", LASTING);
        runtime.start(&lasting).await.unwrap();
        let observed = runtime.observe().await.unwrap();
        assert_eq!(observed.iter().map(|o| o.part.clone()).collect::<Vec<_>>(), std::slice::from_ref(&lasting.part));
        let used = runtime.cpu_time().await.unwrap();
        assert_eq!(used.get(&lasting.uid).map(|u| u.instance), Some(instance), "{used:?}");
        // Another life of the agent finds the same folder, and one that was full is full for all.
        let again = open();
        assert_eq!(again.share(instance, Bytes(1 << 20), class).await.unwrap(), made);
        assert_eq!(again.shared().await.unwrap(), [instance]);
        let (code, _, out) =
            w.output(&part("c", "cat /srv/both/note; dd if=/dev/zero of=/srv/both/big bs=64k count=64")).await;
        assert!(code != Some(0) && out.contains("left"), "{out}");
        let (status, printed, _) =
            w.exec(lasting.uid, &["sh", "-c", "echo more >> /srv/both/big; cat /srv/both/note"], "").await;
        assert_eq!((status.unwrap(), printed.as_str()), (0, "left\n"));

        // What is mounted no more, as after the host's boot, was lost: another is made.
        nix::mount::umount2(made.path.parent().unwrap(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        let anew = again.share(instance, Bytes(1 << 20), class).await.unwrap();
        assert!(anew.id != made.id && fs::read_dir(&anew.path).unwrap().count() == 0, "{anew:?} {made:?}");
        runtime.remove(lasting.uid).await.unwrap();
        for _ in 0..2 {
            again.unshare(instance).await.unwrap();
        }
        assert_eq!(again.shared().await.unwrap(), []);
        if class.is_some() {
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        }
        w.assert_clean().await;
    }
}
