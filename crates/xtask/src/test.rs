//! `cargo xtask test`: builds every test once, then runs the programs.
//!
//! They are run from here rather than by `cargo test`, so that one failing program does not hide the others, and that one
//! closing line tells the outcome. First run those that need the processor, one after the other. Those that start whole clouds
//! mostly wait (for leases to end, for a host to be missed), so a few of them run side by side, each with one test at a time.
//! Two that take long and whose outcome no clock decides run beside all others, and give way to them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::packages::{self, Need};
use crate::{process, target_dir};

/// Python tools, by program and requirement, in a folder of their own below the target folder.
const PYTHON_TOOLS: &[(&str, &str)] =
    &[("schemathesis", "schemathesis==4.32.5"), ("componentize-py", "componentize-py==0.25.1")];

/// Python libraries that tests put into images, each in a folder of its own below the target folder: the folder's name, the
/// requirement, and the version of Python in those images (Debian 12's).
const PYTHON_LIBRARIES: &[(&str, &str, &str)] = &[("spiffe", "spiffe==0.3.2", "3.11")];

/// What tests run in Node.js, each in a folder of its own below the target folder: the package, and the release.
const NODE_PACKAGES: &[(&str, &str)] = &[("oidc-provider", "8.8.1")];

/// Programs that start whole clouds though their names don't begin with `e2e`.
const OF_CLOUDS: &[&str] = &["bad_days", "schemathesis"];
/// What runs beside all others and gives way to them, in this order.
const GIVE_WAY: &[&str] = &["seeds", "schemathesis"];
/// The longest of those that start clouds, which begin first so that none of them is left over at the end.
const LONG: &[&str] = &["e2e", "e2e_networks", "e2e_placement", "e2e_workload", "e2e_jobs", "e2e_renewal", "e2e_vpc"];
/// How many programs that start clouds run side by side at most: a cloud needs memory and disks too.
const MOST_CLOUDS: usize = 4;

/// A program full of tests.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    package: String,
    target: String,
    executable: PathBuf,
    /// Where cargo would run it.
    folder: PathBuf,
}

impl Program {
    fn starts_clouds(&self) -> bool {
        self.target.starts_with("e2e") || OF_CLOUDS.contains(&self.target.as_str())
    }

    fn name(&self) -> String {
        format!("{} {}", self.package, self.target)
    }
}

/// What a program's closing lines say.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        Self {
            passed: self.passed + more.passed,
            failed: self.failed + more.failed,
            ignored: self.ignored + more.ignored,
        }
    }
}

pub fn run(root: &Path, filters: &[String]) -> anyhow::Result<()> {
    let started = Instant::now();
    packages::ensure(&[Need::Up, Need::Test])?;
    let python = python_tools(root)?;
    node_packages(root)?;
    let programs = build(root)?;
    let runner = Runner { filters, python: &python, outputs: &target_dir(root).join("test-output") };
    let mut ends = if filters.is_empty() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        runner.beside(programs.iter().collect(), processors)?
    } else {
        // Whoever asks for few tests wants to see them run.
        programs.iter().map(|program| runner.shown(program)).collect::<anyhow::Result<_>>()?
    };
    let total = ends.iter().fold(Counts::default(), |sum, end| sum + end.counts);
    let mut broken: Vec<String> = ends.iter().filter(|e| !e.success).map(|e| e.program.name()).collect();
    ends.sort_by_key(|e| std::cmp::Reverse(e.took));
    let slowest = ends.iter().take(8).map(|e| format!("{} {} s", e.program.name(), e.took.as_secs()));
    eprintln!("--- the slowest: {}", slowest.collect::<Vec<_>>().join(", "));
    if filters.is_empty() {
        eprintln!("--- examples in the documentation");
        if process::cargo(root, &["test", "--quiet", "--workspace", "--doc"]).is_err() {
            broken.push("the documentation's examples".to_owned());
        }
    }
    let line = format!(
        "{} passed, {} failed, {} ignored in {} programs and {} s",
        total.passed,
        total.failed,
        total.ignored,
        programs.len(),
        started.elapsed().as_secs()
    );
    if !broken.is_empty() {
        bail!("{line}; failed: {}", broken.join(", "));
    }
    if total.passed == 0 {
        bail!("{line}: no test has a name that holds {filters:?}");
    }
    println!("test: ok: {line}");
    // The same once more in the plain form that tools which watch test runs look for.
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(())
}

/// Installs the Python tools and libraries, once, and returns the folder with their programs.
fn python_tools(root: &Path) -> anyhow::Result<PathBuf> {
    let venv = target_dir(root).join("python");
    let bin = venv.join("bin");
    for (program, requirement) in PYTHON_TOOLS {
        if bin.join(program).is_file() {
            continue;
        }
        process::run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        process::run(Command::new(bin.join("pip")).args(["install", "--quiet", requirement]))?;
    }
    for (library, requirement, version) in PYTHON_LIBRARIES {
        let place = target_dir(root).join(format!("python-{library}"));
        if place.join(library).is_dir() {
            continue;
        }
        let mut pip = Command::new(bin.join("pip"));
        pip.args(["install", "--quiet", "--only-binary=:all:", "--python-version", version, requirement, "--target"]);
        process::run(pip.arg(&place))?;
    }
    Ok(bin)
}

/// Installs the packages of Node.js, once. None of their own scripts is run.
fn node_packages(root: &Path) -> anyhow::Result<()> {
    for (package, release) in NODE_PACKAGES {
        let folder = target_dir(root).join(format!("node-{package}"));
        if folder.join("node_modules").join(package).is_dir() {
            continue;
        }
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        // Not `--prefix`, which would hide the machine's own npm configuration.
        let manifest = folder.join("package.json");
        std::fs::write(&manifest, "{\"private\": true}\n")
            .with_context(|| format!("writing {}", manifest.display()))?;
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--no-save", "--ignore-scripts"]).current_dir(&folder);
        process::run(npm.arg(format!("{package}@{release}")))?;
    }
    Ok(())
}

fn build(root: &Path) -> anyhow::Result<Vec<Program>> {
    let arguments = ["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"];
    eprintln!("$ cargo {}", arguments.join(" "));
    let mut child =
        process::cargo_command(root).args(arguments).stdout(Stdio::piped()).spawn().context("running cargo")?;
    let output = child.stdout.take().context("cargo's output was asked for")?;
    let mut programs = Vec::new();
    for line in BufReader::new(output).lines() {
        programs.extend(parse_artifact(&line.context("reading what cargo says")?));
    }
    if !child.wait().context("waiting for cargo")?.success() {
        bail!("the tests do not build");
    }
    programs.sort_by(|a, b| (&a.package, &a.target).cmp(&(&b.package, &b.target)));
    Ok(programs)
}

/// A test program from one line of cargo's messages, if it announces one.
fn parse_artifact(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    Some(Program {
        package: folder.file_name()?.to_str()?.to_owned(),
        target: message["target"]["name"].as_str()?.to_owned(),
        executable: message["executable"].as_str()?.into(),
        folder: folder.to_owned(),
    })
}

/// How a program's run ended.
struct End<'a> {
    program: &'a Program,
    counts: Counts,
    success: bool,
    took: Duration,
}

/// Runs programs, and shows what they say.
#[derive(Clone, Copy)]
struct Runner<'a> {
    filters: &'a [String],
    /// The folder with the Python tools.
    python: &'a Path,
    /// Where what a program says is kept while it can't be shown.
    outputs: &'a Path,
}

impl Runner<'_> {
    fn command(&self, program: &Program, gives_way: bool) -> Command {
        let mut command = Command::new(if gives_way { "nice".as_ref() } else { program.executable.as_os_str() });
        if gives_way {
            command.args(["-n", "10"]).arg(&program.executable);
        }
        command.current_dir(&program.folder).args(self.filters);
        command.env("CARGO_MANIFEST_DIR", &program.folder).env("NEXUS_TEST_PYTHON_BIN", self.python);
        if program.starts_clouds() {
            command.arg("--test-threads=1");
        }
        command
    }

    /// Runs a program, and shows what it says as it comes.
    fn shown<'a>(&self, program: &'a Program) -> anyhow::Result<End<'a>> {
        let name = program.name();
        eprintln!("--- {name}");
        let started = Instant::now();
        let mut command = self.command(program, false);
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("running {name}"))?;
        let output = child.stdout.take().context("the program's output was asked for")?;
        let counts = show(BufReader::new(output))?;
        let success = child.wait().context("waiting for the tests")?.success();
        Ok(End { program, counts, success, took: started.elapsed() })
    }

    /// Runs a program beside others, and shows what it said when it is over. Until then that is in a file.
    fn hidden<'a>(&self, program: &'a Program, gives_way: bool, screen: &Mutex<()>) -> anyhow::Result<End<'a>> {
        let name = program.name();
        let path = self.outputs.join(format!("{}-{}.txt", program.package, program.target));
        let context = || format!("{name}, whose output goes to {}", path.display());
        let output = File::create(&path).with_context(context)?;
        let errors = output.try_clone().with_context(context)?;
        eprintln!("--- {name} begins");
        let started = Instant::now();
        let status = self.command(program, gives_way).stdin(Stdio::null()).stdout(output).stderr(errors).status();
        let success = status.with_context(context)?.success();
        let took = started.elapsed();
        let _alone = screen.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!("--- {name}, after {} s", took.as_secs());
        let counts = show(BufReader::new(File::open(&path).with_context(context)?)).with_context(context)?;
        Ok(End { program, counts, success, took })
    }

    /// Runs programs beside each other, as far as so many processors allow it; one runs one program at a time.
    fn beside<'a>(&self, mut programs: Vec<&'a Program>, processors: usize) -> anyhow::Result<Vec<End<'a>>> {
        std::fs::create_dir_all(self.outputs).with_context(|| format!("making {}", self.outputs.display()))?;
        let place = |order: &[&str], p: &Program| order.iter().position(|o| *o == p.target).unwrap_or(order.len());
        let (mut behind, others): (Vec<_>, Vec<_>) =
            programs.drain(..).partition(|p| processors > 1 && GIVE_WAY.contains(&p.target.as_str()));
        behind.sort_by_key(|p| place(GIVE_WAY, p));
        // What is quick and says most comes first.
        let (mut clouds, quick): (Vec<_>, Vec<_>) = others.into_iter().partition(|p| p.starts_clouds());
        clouds.sort_by_key(|p| place(LONG, p));
        let screen = Mutex::new(());
        let run = |p| self.hidden(p, false, &screen);
        let (behind, ends) = std::thread::scope(|scope| {
            let behind = scope.spawn(|| in_lanes(behind, 1, |p| self.hidden(p, true, &screen)));
            let mut ends = in_lanes(quick, 1, run);
            ends.extend(in_lanes(clouds, processors.min(MOST_CLOUDS), run));
            (behind.join(), ends)
        });
        let behind = behind.map_err(|_| anyhow::anyhow!("running what gives way panicked"))?;
        ends.into_iter().chain(behind).collect()
    }
}

/// Does one piece of work for each item, several at a time, and begins them in their order.
fn in_lanes<T: Send, R: Send>(items: Vec<T>, lanes: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let queue = Mutex::new(VecDeque::from(items));
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                loop {
                    let item = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(item) = item else { break };
                    let result = work(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Shows what a program says, and counts its tests.
fn show(output: impl std::io::BufRead) -> anyhow::Result<Counts> {
    let mut counts = Counts::default();
    for line in output.split(b'\n') {
        let line = line.context("reading what the tests say")?;
        let line = String::from_utf8_lossy(&line);
        counts = parse_result(&line).unwrap_or(counts);
        writeln!(std::io::stdout(), "{line}").context("writing what the tests say")?;
    }
    Ok(counts)
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn parse_result(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |word: &str| rest.split("; ").find_map(|p| p.strip_suffix(word)?.trim().parse().ok());
    Some(Counts { passed: count("passed")?, failed: count("failed")?, ignored: count("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: FAILED. 12 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        assert_eq!(parse_result(line), Some(Counts { passed: 12, failed: 1, ignored: 3 }));
        assert_eq!(parse_result("test a ... ok"), None);
    }

    #[test]
    fn cargo_announces_test_programs() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/w/crates/store/Cargo.toml",
            "target":{"name":"e2e_x","kind":["test"]},"profile":{"test":true},"executable":"/t/e2e_x-1"}"#;
        let program = parse_artifact(&line.replace('\n', " ")).unwrap();
        assert_eq!((program.package.as_str(), program.starts_clouds()), ("store", true));
        assert_eq!(parse_artifact(&line.replace("\"test\":true", "\"test\":false").replace('\n', " ")), None);
    }

    #[test]
    fn lanes_do_everything_once_and_no_more_at_a_time_than_there_are() {
        let (running, most) = (Mutex::new(0), Mutex::new(0));
        let mut done = in_lanes((0..50).collect(), 3, |item: u32| {
            let now = {
                let mut running = running.lock().unwrap();
                *running += 1;
                *running
            };
            let mut most = most.lock().unwrap();
            *most = now.max(*most);
            drop(most);
            std::thread::yield_now();
            *running.lock().unwrap() -= 1;
            item
        });
        done.sort_unstable();
        assert_eq!(done, (0..50).collect::<Vec<_>>());
        assert!((1..=3).contains(&*most.lock().unwrap()));
    }

    #[test]
    fn what_runs_beside_others_is_shown_when_it_is_over_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let of = |target: &str| Program {
            package: "x".into(),
            target: target.into(),
            executable: "/bin/sh".into(),
            folder: dir.path().to_owned(),
        };
        let programs = [of("e2e_a"), of("schemathesis"), of("unit"), of("e2e_b")];
        for (status, success) in [(0, true), (1, false)] {
            let script = format!("echo 'test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured'; exit {status}");
            let filters = ["-c".to_owned(), script];
            let runner = Runner { filters: &filters, python: dir.path(), outputs: &dir.path().join("outputs") };
            for processors in [1, 2, 8] {
                let ends = runner.beside(programs.iter().collect(), processors).unwrap();
                let counts = Counts { passed: 2, failed: 0, ignored: 1 };
                assert_eq!(ends.len(), programs.len());
                assert!(ends.iter().all(|end| end.counts == counts && end.success == success));
            }
        }
    }
}
