//! The commands of guides, `docs/guide/bad-days.md`, `cells.md` and `first-app.md`, in order, each against a small local cloud.
//! Needs root.
//!
//! Every block that begins with ```` ```sh run ```` is run as it stands there. After some sections the test looks whether
//! the cloud really is what the guide promises.

#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/images.rs"]
mod images;
#[path = "e2e/ports.rs"]
mod ports;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(90);
/// A block may stop and start the whole cloud.
const BLOCK: Duration = Duration::from_secs(240);

/// One cloud at a time is enough for a small machine.
static TURN: Mutex<()> = Mutex::new(());

struct Cloud {
    temp: tempfile::TempDir,
    /// Where the guides say 8000.
    gateway: u16,
    _turn: MutexGuard<'static, ()>,
}

impl Cloud {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "a local cloud makes namespaces: run this as root");
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let temp = tempfile::Builder::new().prefix("nexus-bad-days-").tempdir().unwrap();
        let api = ports::range(400);
        let cloud = Self { _turn: turn, temp, gateway: api + 200 };
        std::fs::create_dir(cloud.path("bin")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_nexus"), cloud.path("bin/nexus")).unwrap();
        let _turn = ports::starting();
        cloud.ok(&format!(
            "nexus up --detach --data-dir \"$DIR\" --zones 3 --hosts-per-zone 1 --timeout 120 --api-port-base {api} \
             --gateway-port-base {}",
            cloud.gateway
        ));
        cloud
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// Runs a script as the guide's reader would.
    fn sh(&self, script: &str) -> Output {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("timeout");
        let script = script.replace("localhost:8000", &format!("localhost:{}", self.gateway));
        command.arg(BLOCK.as_secs().to_string()).args(["sh", "-euc", &script]);
        command.env("PATH", path).env("DIR", self.path("cloud")).env("SAFE", self.path("safe"));
        command.env("IMAGE", self.path("busybox"));
        command.env("NEXUS_CONFIG", self.path("context.json")).env("HOME", self.temp.path());
        // A reader's toolchain is where it was, though this home is another.
        for (variable, folder) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
            let usual = std::env::home_dir().unwrap_or_default().join(folder);
            command.env(variable, std::env::var_os(variable).unwrap_or_else(|| usual.into()));
        }
        command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
        command.env_remove("CNX_URL").env_remove("CNX_TOKEN").current_dir(self.temp.path());
        command.output().unwrap()
    }

    fn ok(&self, script: &str) -> String {
        let output = self.sh(script);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success(),
            "{}\n{script}\n--- out\n{out}\n--- err\n{err}\n{}",
            output.status,
            self.logs()
        );
        out.into_owned()
    }

    /// Tries until a script succeeds and prints what is wanted.
    fn until(&self, script: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.sh(script);
            let out = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() && out.contains(wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{script}: waited in vain for {wanted:?}: {output:?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = std::fs::read_to_string(self.path("cloud/logs").join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(20)..].join("\n"))
        };
        ["server-a.log", "server-b.log", "server-c.log"].map(tail).concat()
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let output = self.sh("nexus down --purge --data-dir \"$DIR\"");
        if !output.status.success() && !std::thread::panicking() {
            panic!("{output:?}");
        }
    }
}

/// Runs a guide's blocks, and `after` each of its sections what looks whether it came out as the guide promises.
fn follow(guide: &str, at_least: usize, cloud: &Cloud, mut after: impl FnMut(&str)) {
    for (heading, blocks) in guide::sections(guide, at_least) {
        for guide::Block { place, script } in blocks {
            assert_eq!(place, None, "this test has one machine");
            println!("{heading}: {script}");
            cloud.ok(&script);
        }
        after(&heading);
    }
}

#[test]
fn the_guide_for_bad_days_does_what_it_says() {
    let cloud = Cloud::new();
    let project = |name: &str| {
        let manifest = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: {name}}}\nspec: {{}}\n");
        std::fs::write(cloud.path("project.yaml"), manifest).unwrap();
        cloud.ok("nexus apply -f project.yaml");
    };
    project("shop");
    follow("bad-days.md", 15, &cloud, |heading| {
        match heading {
            // What comes after the good day's backup is gone with everything.
            "A server dies" => {
                cloud.until("nexus local list -o json", "server-b");
                project("later");
            }
            "The quorum is lost" => {
                cloud.until("nexus get projects", "later");
                cloud.until("nexus status", "healthy");
                let marks = cloud.ok("cat \"$DIR\"/data/server-*/store/*/generation");
                assert!(marks.lines().count() >= 3 && marks.lines().all(|l| l != "1"), "{marks}");
            }
            "Somebody deleted the wrong thing" => cloud.until("nexus get projects", "shop"),
            "Everything is gone" => {
                cloud.until("nexus status", "healthy");
                let projects = cloud.ok("nexus get projects");
                assert!(projects.contains("shop") && !projects.contains("later"), "{projects}");
                project("after");
            }
            _ => {}
        }
    });
    cloud.until("nexus get projects", "after");
}

#[test]
fn the_guide_for_cells_does_what_it_says() {
    let cloud = Cloud::new();
    images::busybox(&cloud.path(""));
    follow("cells.md", 8, &cloud, |heading| match heading {
        "Load and blast radius" => {
            // Of the six instances of three zones, each cell has two: a third of what runs, and something of each project.
            cloud.until(
                "nexus get cells -o json | tr -d ' \\n'",
                "\"instances\":2,\"instancesPercent\":34,\"projects\":2",
            );
            let told = cloud.ok("nexus describe cell zone-a-cell-1");
            for what in ["Hosts:", "zone-a-1", "Load:", "scratch", "2 of the region's 6 instances are (34 %)"] {
                assert!(told.contains(what), "{what}: {told}");
            }
            let rows: Vec<_> = told.lines().filter(|l| l.contains("33 %") && l.ends_with("yes")).collect();
            assert_eq!(rows.len(), 2, "each of the two projects would lose a third: {told}");
        }
        "When a cell is in trouble" => {
            let told = cloud.ok("nexus describe cell zone-b-cell-1");
            assert!(told.contains("Trouble with it and its hosts:") && told.contains("Dead"), "{told}");
            cloud.until("nexus get hosts zone-b-1 -o json | tr -d ' '", "\"state\":\"ready\"");
        }
        "A new cell" => assert!(cloud.ok("nexus get cells").contains("zone-a-cell-2")),
        _ => {}
    });
}

/// Copies a folder's files, without what builds have put there.
fn copy_sources(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap).filter(|e| e.file_name() != "target") {
        if entry.file_type().unwrap().is_dir() {
            copy_sources(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn the_guide_to_a_first_app_does_what_it_says() {
    let cloud = Cloud::new();
    images::nginx(&cloud.path(""));
    cloud.ok("tar -C nginx -cf nginx.tar .");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hello-function");
    copy_sources(&example, &cloud.path("examples/hello-function"));
    let answers = |name: &str, wanted: &str| cloud.until(&format!("curl -sS http://{name}.localhost:8000"), wanted);
    follow("first-app.md", 7, &cloud, |heading| match heading {
        "A container" => {
            cloud.until("nexus get app web -o json | tr -d ' '", "\"readyReplicas\":5");
            answers("web", images::PAGE.trim());
        }
        "A function" => answers("hello", "world"),
        "When something dies" => {
            answers("web", images::PAGE.trim());
            cloud.until("nexus status", "healthy");
        }
        "Enough" => cloud.until("nexus get instances --deleting -o json | tr -d ' \\n'", "\"items\":[]"),
        _ => {}
    });
}
