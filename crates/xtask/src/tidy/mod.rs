//! `cargo xtask tidy`: the rules of the house that the compiler can't check.
//!
//! Each rule looks at one file's text and yields findings; the tables that they go by stand at their heads. A line that
//! must break a rule says why: `// tidy: allow(RULE): because …` on it or on the line before.

mod floors;
mod links;
mod rules;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::process;

/// A broken rule at a place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    pub path: PathBuf,
    /// From 1.
    pub line: usize,
    pub rule: &'static str,
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} ({})", self.path.display(), self.line, self.message, self.rule)
    }
}

/// A file of the project: its path from the root and its text.
#[derive(Debug)]
pub struct Source<'a> {
    pub root: &'a Path,
    pub path: &'a Path,
    pub text: &'a str,
}

impl Source<'_> {
    pub fn has_extension(&self, extension: &str) -> bool {
        self.path.extension().is_some_and(|e| e == extension)
    }

    /// The folder below `crates/`.
    pub fn room(&self) -> Option<&str> {
        self.path.strip_prefix("crates").ok()?.iter().next()?.to_str()
    }

    fn finding(&self, line: usize, rule: &'static str, message: impl Into<String>) -> Finding {
        Finding { path: self.path.to_owned(), line, rule, message: message.into() }
    }
}

/// Checks every file that git knows or would add.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let files = files(root)?;
    let mut findings = Vec::new();
    for path in &files {
        // A file that is deleted but not yet committed so has nothing to check.
        let Ok(bytes) = fs::read(root.join(path)) else { continue };
        let Ok(text) = String::from_utf8(bytes) else { continue };
        findings.extend(check(&Source { root, path, text: &text }));
    }
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => {
            println!("tidy: ok: {} files", files.len());
            Ok(())
        }
        n => bail!("tidy: {n} findings in {} files", files.len()),
    }
}

fn files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = root.to_str().context("the workspace's path is not UTF-8")?;
    let arguments = ["-C", folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let list = process::output("git", &arguments).context("`git ls-files` does not work here: git is needed")?;
    let mut files: Vec<PathBuf> = list.split('\0').filter(|p| !p.is_empty()).map(PathBuf::from).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn check(source: &Source<'_>) -> Vec<Finding> {
    let mut findings = rules::check(source);
    findings.extend(floors::check(source));
    findings.extend(links::check(source));
    let lines: Vec<&str> = source.text.lines().collect();
    findings.retain(|f| !is_allowed(&lines, f));
    findings
}

/// Whether the finding's line, or the one before it, allows it and says why.
fn is_allowed(lines: &[&str], finding: &Finding) -> bool {
    let mark = format!("tidy: allow({}):", finding.rule);
    let says_why = |line: &&str| line.split_once(&mark).is_some_and(|(_, why)| !why.trim().is_empty());
    let own = finding.line.saturating_sub(1);
    lines.get(own).is_some_and(says_why) || own.checked_sub(1).and_then(|i| lines.get(i)).is_some_and(says_why)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The rules that a file of this text breaks, with their lines.
    pub fn broken(path: &str, text: &str) -> Vec<(usize, &'static str)> {
        let root = Path::new("/nonexistent");
        let mut found: Vec<_> =
            check(&Source { root, path: Path::new(path), text }).iter().map(|f| (f.line, f.rule)).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn a_finding_can_be_allowed_with_a_reason_only() {
        let text = |why: &str| format!("//! A file.\n// tidy: allow(unwrap):{why}\nfn f() {{ x.{}() }}\n", "unwrap");
        assert_eq!(broken("crates/store/src/a.rs", &text(" it is a test of the panic itself")), []);
        assert_eq!(broken("crates/store/src/a.rs", &text("")), [(3, "unwrap")]);
    }

    #[test]
    fn findings_print_as_editors_read_them() {
        let finding = Finding { path: "a/b.rs".into(), line: 3, rule: "unwrap", message: "no".into() };
        assert_eq!(finding.to_string(), "a/b.rs:3: no (unwrap)");
    }
}
