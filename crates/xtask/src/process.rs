//! Running other programs, and saying so.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// Whether this process is root.
pub fn is_root() -> bool {
    output("id", &["-u"]).is_some_and(|id| id.trim() == "0")
}

/// What a program prints, if it can be run and succeeds.
pub fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command, shown to the user, and fails if it does.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let words: Vec<&OsStr> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("running `{line}`"))?;
    if status.success() { Ok(()) } else { bail!("`{line}` failed ({status})") }
}

/// How the names begin of what cargo tells a package about itself.
const OF_A_PACKAGE: &[&str] = &["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];

/// The cargo that runs this.
pub fn cargo_command(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    // Set for this package by the `cargo run` that started us. Build scripts of others must not see them: one that asks for
    // them (ring's does) would run again, and everything above it be built again, whenever cargo is run in the other way.
    let ours = |name: &&OsString| OF_A_PACKAGE.iter().any(|of| name.as_encoded_bytes().starts_with(of.as_bytes()));
    for name in std::env::vars_os().map(|(name, _)| name).collect::<Vec<_>>().iter().filter(ours) {
        command.env_remove(name);
    }
    command
}

/// Runs cargo in the workspace.
pub fn cargo(root: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    run(cargo_command(root).args(arguments))
}

/// A command with root's rights: by sudo when they are not there.
pub fn privileged(program: impl AsRef<OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_is_told_nothing_of_this_package() {
        // Cargo tells whatever it runs, this test too.
        let told: Vec<OsString> = std::env::vars_os().map(|(name, _)| name).collect();
        let removed: Vec<OsString> =
            cargo_command(Path::new("/")).get_envs().map(|(name, _)| name.to_owned()).collect();
        for name in told.iter().filter(|n| n.as_encoded_bytes().starts_with(b"CARGO_PKG_VERSION")) {
            assert!(removed.contains(name), "{name:?}");
        }
    }
}
