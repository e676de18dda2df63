//! `cargo xtask test`: builds every test once, then runs the programs one after the other.
//!
//! They are run from here rather than by `cargo test`, so that tests that start whole clouds (targets named `e2e…`) run
//! one at a time, that one failing program does not hide the others, and that one closing line tells the outcome.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

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
    fn is_end_to_end(&self) -> bool {
        self.target.starts_with("e2e")
    }
}

/// What a program's closing lines say.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

pub fn run(root: &Path, filters: &[String]) -> anyhow::Result<()> {
    let started = Instant::now();
    packages::ensure(&[Need::Up, Need::Test])?;
    let python = python_tools(root)?;
    node_packages(root)?;
    let mut programs = build(root)?;
    // What is quick and says most comes first.
    programs.sort_by_key(Program::is_end_to_end);
    let mut total = Counts::default();
    let mut broken = Vec::new();
    for program in &programs {
        eprintln!("--- {} {}", program.package, program.target);
        let (counts, success) = run_program(program, filters, &python)?;
        total.passed += counts.passed;
        total.failed += counts.failed;
        total.ignored += counts.ignored;
        if !success {
            broken.push(format!("{} {}", program.package, program.target));
        }
    }
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

fn run_program(program: &Program, filters: &[String], python: &Path) -> anyhow::Result<(Counts, bool)> {
    let mut command = Command::new(&program.executable);
    command.current_dir(&program.folder).args(filters);
    command.env("CARGO_MANIFEST_DIR", &program.folder).env("NEXUS_TEST_PYTHON_BIN", python);
    if program.is_end_to_end() {
        command.arg("--test-threads=1");
    }
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("running {program:?}"))?;
    let output = child.stdout.take().context("the program's output was asked for")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("reading what the tests say")?;
        counts = parse_result(&line).unwrap_or(counts);
        writeln!(std::io::stdout(), "{line}").context("writing what the tests say")?;
    }
    let success = child.wait().context("waiting for the tests")?.success();
    Ok((counts, success))
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
        assert_eq!((program.package.as_str(), program.is_end_to_end()), ("store", true));
        assert_eq!(parse_artifact(&line.replace("\"test\":true", "\"test\":false").replace('\n', " ")), None);
    }
}
