//! The commands of `docs/guide/bad-days.md`, in order, against a small local cloud. Needs root.
//!
//! Every block that begins with ```` ```sh run ```` is run as it stands there. After some sections the test looks whether
//! the cloud really is what the guide promises.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(90);
/// A block may stop and start the whole cloud.
const BLOCK: Duration = Duration::from_secs(240);

struct Cloud {
    temp: tempfile::TempDir,
}

/// A base whose ports are free now.
fn free_ports() -> u16 {
    let start = 12_000 + u16::try_from(std::process::id() % 40).unwrap() * 400;
    let free = |base: &u16| {
        (0..20).chain(200..220).chain(300..320).all(|o| TcpListener::bind(("127.0.0.1", base + o)).is_ok())
    };
    (0..).map(|i| start + i * 20).take(100).find(free).expect("free ports")
}

impl Cloud {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "a local cloud makes namespaces: run this as root");
        let cloud = Self { temp: tempfile::Builder::new().prefix("nexus-bad-days-").tempdir().unwrap() };
        std::fs::create_dir(cloud.path("bin")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_nexus"), cloud.path("bin/nexus")).unwrap();
        let api = free_ports();
        cloud.ok(&format!(
            "nexus up --detach --data-dir \"$DIR\" --zones 3 --hosts-per-zone 1 --timeout 120 --api-port-base {api} \
             --gateway-port-base {}",
            api + 200
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
        command.arg(BLOCK.as_secs().to_string()).args(["sh", "-euc", script]);
        command.env("PATH", path).env("DIR", self.path("cloud")).env("SAFE", self.path("safe"));
        command.env("NEXUS_CONFIG", self.path("context.json")).env("HOME", self.temp.path());
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

/// The headings of the guide with the blocks below each.
fn sections(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = vec![(String::new(), Vec::new())];
    let mut block: Option<String> = None;
    for line in text.lines() {
        match &mut block {
            Some(script) if line == "```" => {
                found.last_mut().unwrap().1.push(std::mem::take(script));
                block = None;
            }
            Some(script) => {
                script.push_str(line);
                script.push('\n');
            }
            None if line == "```sh run" => block = Some(String::new()),
            None => {
                if let Some(heading) = line.strip_prefix("## ") {
                    found.push((heading.to_owned(), Vec::new()));
                }
            }
        }
    }
    assert!(block.is_none(), "a block without an end");
    found
}

#[test]
fn the_guide_for_bad_days_does_what_it_says() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/bad-days.md");
    let sections = sections(&std::fs::read_to_string(guide).unwrap());
    assert!(sections.iter().map(|(_, blocks)| blocks.len()).sum::<usize>() >= 15);
    let cloud = Cloud::new();
    let project = |name: &str| {
        let manifest = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: {name}}}\nspec: {{}}\n");
        std::fs::write(cloud.path("project.yaml"), manifest).unwrap();
        cloud.ok("nexus apply -f project.yaml");
    };
    project("shop");
    for (heading, blocks) in sections {
        for block in blocks {
            println!("{heading}: {block}");
            cloud.ok(&block);
        }
        match heading.as_str() {
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
    }
    cloud.until("nexus get projects", "after");
}
