//! Processes and network namespaces of a test's own, ended with it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

pub struct Process(pub Child);

impl Process {
    pub fn start(mut command: Command, log: PathBuf) -> Self {
        let log = std::fs::File::create(log).unwrap();
        let errors = log.try_clone().unwrap();
        Self(command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

pub fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
}

/// A network namespace with a loopback of its own.
pub struct Namespace(String);

impl Namespace {
    pub fn new(name: &str) -> Self {
        ip(&["netns", "add", name]);
        let namespace = Self(name.to_owned());
        ip(&["-n", name, "link", "set", "lo", "up"]);
        namespace
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// The same command, run in here. `ip` becomes the command itself, so it has the process's number.
    pub fn command(&self, inner: &Command) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Command::new("ip").args(["netns", "del", &self.0]).output().ok();
    }
}

/// The busybox web server of a container, as this machine sees it, by a variable that only this one was given: `NAME=value`.
#[allow(dead_code)] // Not every test program that has this file uses it.
pub fn web_server(variable: &str) -> Option<i32> {
    let has = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        environment.split(|b| *b == 0).any(|pair| pair == variable.as_bytes())
            && command.starts_with(b"/bin/busybox\0httpd")
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.into_iter().find(has)
}
