//! What the project needs of the machine: one table of Debian packages and Rust targets, each with its reason.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Command;

use crate::process;

/// What something is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// To build and run the cloud.
    Up,
    /// To run the tests, and for the examples.
    Test,
    /// To measure peers.
    Bench,
}

impl Need {
    fn says(self) -> &'static str {
        match self {
            Self::Up => "build and run",
            Self::Test => "tests",
            Self::Bench => "benches",
        }
    }
}

/// A Debian package, what it is for and when.
#[derive(Debug)]
pub struct Package {
    pub name: &'static str,
    pub why: &'static str,
    pub need: Need,
}

const fn package(need: Need, name: &'static str, why: &'static str) -> Package {
    Package { name, why, need }
}

/// Everything from Debian.
pub const PACKAGES: &[Package] = &[
    package(Need::Up, "gcc", "links the binary and compiles ring's assembly"),
    package(Need::Up, "libc6-dev", "headers for the above"),
    package(Need::Up, "pkg-config", "finds libseccomp"),
    package(Need::Up, "libseccomp-dev", "system call filters of containers"),
    package(Need::Up, "iproute2", "looking at links and routes by hand"),
    package(Need::Up, "nftables", "packet filters and address translation of hosts"),
    package(Need::Up, "ca-certificates", "trusting public registries"),
    package(Need::Test, "curl", "a real HTTP client"),
    package(Need::Test, "mmdebstrap", "makes the root file systems of test images"),
    package(Need::Test, "umoci", "makes OCI images of them"),
    package(Need::Test, "skopeo", "converts between image formats"),
    package(Need::Test, "docker-registry", "the registry that images are pulled from"),
    package(Need::Test, "busybox-static", "the smallest useful container"),
    package(Need::Test, "python3-venv", "the place for Python tools such as schemathesis"),
    package(Need::Test, "python3-scapy", "makes the packets that networks are tried with"),
    package(Need::Test, "nodejs", "runs the identity provider that federation is tested against"),
    package(Need::Test, "npm", "installs it"),
    package(Need::Test, "etcd-server", "the metadata engine beside our own, and the peer of its bench"),
    package(Need::Test, "etcd-client", "sets up users of etcd"),
    package(Need::Bench, "haproxy", "the peer of the load balancer"),
    package(Need::Bench, "runc", "the peer of the container runtime"),
    package(Need::Bench, "nginx-light", "the peer of the API and the gateway"),
    package(Need::Bench, "wrk", "makes the load of HTTP benches"),
];

/// Packages that people often have from elsewhere, by the program that tells: Debian's own would clash with it.
const ELSEWHERE: &[(&str, &str)] = &[("nodejs", "node"), ("npm", "npm")];

/// Targets that rustup installs.
pub const TARGETS: &[(Need, &str, &str)] = &[(Need::Test, "wasm32-wasip2", "functions written in Rust")];

fn missing_packages(needs: &[Need]) -> Option<Vec<&'static Package>> {
    let all: Vec<&Package> = PACKAGES.iter().filter(|p| needs.contains(&p.need)).collect();
    // Without dpkg, this is no Debian: nothing can be said about its packages.
    process::output("dpkg-query", &["--version"])?;
    let mut installed = BTreeSet::new();
    for package in &all {
        let program = ELSEWHERE.iter().find(|(name, _)| *name == package.name);
        if program.is_some_and(|(_, program)| process::output(program, &["--version"]).is_some()) {
            installed.insert(package.name);
            continue;
        }
        let query = ["-W", "-f", "${db:Status-Status}", package.name];
        if process::output("dpkg-query", &query).is_some_and(|s| s.trim() == "installed") {
            installed.insert(package.name);
        }
    }
    Some(all.into_iter().filter(|p| !installed.contains(p.name)).collect())
}

fn missing_targets(needs: &[Need]) -> Vec<(&'static str, &'static str)> {
    let installed = process::output("rustup", &["target", "list", "--installed"]).unwrap_or_default();
    let absent = |target: &str| !installed.lines().any(|l| l.trim() == target);
    TARGETS.iter().filter(|(n, t, _)| needs.contains(n) && absent(t)).map(|(_, t, why)| (*t, *why)).collect()
}

/// Says what is missing for `needs`, and installs it.
pub fn ensure(needs: &[Need]) -> anyhow::Result<()> {
    match missing_packages(needs) {
        None => eprintln!("not a Debian machine: `cargo xtask packages` lists what you need to have"),
        Some(missing) if missing.is_empty() => {}
        Some(missing) => {
            eprintln!("missing Debian packages:");
            for package in &missing {
                eprintln!("  {:<16} {}", package.name, package.why);
            }
            let apt = || -> Command {
                let mut command = process::privileged("env");
                command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes"]);
                command
            };
            process::run(apt().arg("update"))?;
            let names = missing.iter().map(|p| p.name);
            process::run(apt().args(["install", "--no-install-recommends"]).args(names))?;
        }
    }
    for (target, why) in missing_targets(needs) {
        eprintln!("missing Rust target {target}: {why}");
        process::run(Command::new("rustup").args(["target", "add", target]))?;
    }
    Ok(())
}

/// Prints the tables. A reader who has seen enough ends it without fuss.
pub fn show() {
    // A broken pipe is the only way in which this can fail.
    std::io::stdout().write_all(table().as_bytes()).ok();
}

fn table() -> String {
    let mut out = String::new();
    let needs = [Need::Up, Need::Test, Need::Bench];
    let missing = missing_packages(&needs);
    writeln!(out, "{:<16} {:<14} {:<10} WHY", "PACKAGE", "FOR", "STATE").expect("a text takes all that is written");
    for package in PACKAGES {
        let state = match &missing {
            None => "unknown",
            Some(missing) if missing.iter().any(|m| m.name == package.name) => "missing",
            Some(_) => "installed",
        };
        writeln!(out, "{:<16} {:<14} {state:<10} {}", package.name, package.need.says(), package.why)
            .expect("a text takes all that is written");
    }
    let missing = missing_targets(&needs);
    writeln!(out, "\n{:<16} {:<14} {:<10} WHY", "RUST TARGET", "FOR", "STATE")
        .expect("a text takes all that is written");
    for (need, target, why) in TARGETS {
        let state = if missing.iter().any(|(m, _)| m == target) { "missing" } else { "installed" };
        writeln!(out, "{target:<16} {:<14} {state:<10} {why}", need.says()).expect("a text takes all that is written");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_listed_once() {
        let names: BTreeSet<_> = PACKAGES.iter().map(|p| p.name).collect();
        assert_eq!(names.len(), PACKAGES.len());
    }
}
