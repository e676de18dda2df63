//! Rules about one file's own text.

use super::{Finding, Source};

/// About 300 lines are comfortable; this many are a sign that two ideas share a room.
const MAX_LINES: usize = 800;

/// Rooms that reach the outside only by `nexus-env`'s doors, so that a simulator can own time, chance, files and sockets.
const BEHIND_DOORS: &[&str] = &[
    "model",
    "store",
    "wire",
    "iam",
    "placement",
    "audit",
    "control",
    "api",
    "edge",
    "object",
    "volume",
    "entity",
    "ledger",
];

/// What such a room must not say, and what it says instead.
const DOORS: &[(&str, &str)] = &[
    ("SystemTime::now", "`Env::now_millis`"),
    ("rand::", "`Env`'s `Rng`"),
    ("std::fs", "`Env`'s `Disk`"),
    ("tokio::fs", "`Env`'s `Disk`"),
    ("TcpStream", "`Env`'s `Transport`"),
    ("TcpListener", "`Env`'s `Transport`"),
    ("UdpSocket", "`Env`'s `Transport`"),
    ("UnixStream", "`Env`'s `Transport`"),
];

// In pieces, so that this file does not find itself.
const UNWRAP: &str = concat!(".unwrap", "()");
const UNFINISHED: &[&str] = &[concat!("todo", "!("), concat!("unimplemented", "!(")];
/// Places of one machine, which mean nothing on another.
const MACHINE_PATHS: &[&str] = &[concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/tmp/", "bash")];

const TEXT_FILES: &[&str] = &["rs", "md", "toml", "sh", "yaml", "yml", "json", "py"];

pub fn check(source: &Source<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let is_rust = source.has_extension("rs");
    let is_text = source.path.extension().is_none_or(|e| TEXT_FILES.iter().any(|t| e == *t));
    // Cargo writes the lock file, lawyers the licence.
    if is_text && !source.path.ends_with("LICENSE") {
        every_text(source, &mut findings);
    }
    if is_rust {
        rust(source, &mut findings);
    }
    findings
}

fn every_text(source: &Source<'_>, findings: &mut Vec<Finding>) {
    for (index, line) in source.text.lines().enumerate() {
        if line.ends_with([' ', '\t']) {
            findings.push(source.finding(index + 1, "trailing-whitespace", "whitespace at the end of the line"));
        }
        if let Some(path) = MACHINE_PATHS.iter().find(|p| names_path(line, p)) {
            findings.push(source.finding(index + 1, "machine-path", format!("`{path}` exists on one machine only")));
        }
    }
}

fn rust(source: &Source<'_>, findings: &mut Vec<Finding>) {
    let head = source.text.lines().find(|l| !l.starts_with("#!"));
    if !head.is_some_and(|l| l.starts_with("//!")) {
        findings.push(source.finding(1, "file-head", "a file opens by saying what it is for (`//! …`)"));
    }
    let lines = source.text.lines().count();
    if lines > MAX_LINES {
        findings.push(source.finding(lines, "file-length", format!("{lines} lines: at most {MAX_LINES}")));
    }
    let doors = source.room().filter(|r| BEHIND_DOORS.contains(r)).is_some();
    let std_instant = source.text.lines().any(imports_std_instant);
    let is_test_file = is_test_path(source);
    let mut in_tests = is_test_file;
    for (index, line) in source.text.lines().enumerate() {
        let number = index + 1;
        let code = without_comment(line);
        // Unit tests stand at the end of a file. `mod tests;` alone keeps them in another one.
        if code.trim() == "#[cfg(test)]" {
            let next = source.text.lines().skip(index + 1).map(str::trim).find(|l| !l.starts_with("#["));
            in_tests |= next.is_some_and(|l| l.contains("mod ") && l.ends_with('{'));
        }
        for word in UNFINISHED.iter().filter(|w| code.contains(**w)) {
            findings.push(source.finding(number, "unfinished", format!("`{word}…)`: nothing is left open")));
        }
        if in_tests {
            continue;
        }
        if code.contains(UNWRAP) {
            findings.push(source.finding(
                number,
                "unwrap",
                "`expect` with the reason why this can't happen, or an error",
            ));
        }
        if doors {
            let instant = code.contains("Instant::now") && (std_instant || code.contains("std::time::Instant"));
            let instant = instant.then_some(("Instant::now", "`Env::monotonic`"));
            let words = DOORS.iter().copied().filter(|(word, _)| contains_word(code, word)).chain(instant);
            for (word, instead) in words {
                let message = format!("`{word}` goes around the doors of nexus-env: use {instead}");
                findings.push(source.finding(number, "doors", message));
            }
        }
    }
}

/// Whether a whole file is tests, benches or examples.
fn is_test_path(source: &Source<'_>) -> bool {
    let folder = |name: &str| source.path.iter().any(|p| p == name);
    let stem = source.path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    folder("tests") || folder("benches") || folder("examples") || stem == "tests" || stem.ends_with("_tests")
}

fn imports_std_instant(line: &str) -> bool {
    line.trim_start().starts_with("use std::time::") && line.contains("Instant")
}

/// The line up to its comment. A `//` within a text, as in an address, follows a colon.
fn without_comment(line: &str) -> &str {
    let mut from = 0;
    while let Some(at) = line[from..].find("//").map(|at| at + from) {
        if !line[..at].ends_with(':') {
            return &line[..at];
        }
        from = at + 2;
    }
    line
}

/// Whether the line names the path from the root of the file system, not a folder of that name deeper down.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.}*".contains(c)))
}

/// Whether the word stands there by itself, not as the end of a longer name.
fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::super::tests::broken;
    use super::*;

    #[test]
    fn a_good_file_breaks_nothing() {
        let text = "//! A file.\n\nfn f() -> &'static str {\n    \"https://example.org\" // not .unwrap()\n}\n";
        assert_eq!(broken("crates/store/src/a.rs", text), []);
    }

    #[test]
    fn files_open_with_prose_and_are_short() {
        assert_eq!(broken("crates/store/src/a.rs", "fn f() {}\n"), [(1, "file-head")]);
        assert_eq!(broken("crates/store/src/a.rs", "#![allow(x)]\n//! Good.\n"), []);
        let long = format!("//! Long.\n{}", "fn f() {}\n".repeat(MAX_LINES));
        assert_eq!(broken("crates/store/src/a.rs", &long), [(MAX_LINES + 1, "file-length")]);
    }

    #[test]
    fn unwraps_are_for_tests() {
        let text = format!("//! A.\nfn f() {{ x{UNWRAP} }}\n#[cfg(test)]\nmod tests {{\n fn g() {{ x{UNWRAP} }}\n}}\n");
        assert_eq!(broken("crates/store/src/a.rs", &text), [(2, "unwrap")]);
        assert_eq!(broken("crates/store/tests/a.rs", &text), []);
        let import = format!("//! A.\n#[cfg(test)]\nuse x::Y;\nfn f() {{ x{UNWRAP} }}\n");
        assert_eq!(broken("crates/store/src/a.rs", &import), [(4, "unwrap")], "an import under test starts no tests");
    }

    #[test]
    fn nothing_is_left_open_not_even_in_tests() {
        let text = format!("//! A.\nfn f() {{ {}) }}\n", UNFINISHED[0]);
        assert_eq!(broken("crates/store/tests/a.rs", &text), [(2, "unfinished")]);
    }

    #[test]
    fn rooms_behind_doors_do_not_go_around_them() {
        for line in [
            "std::fs::read(p)",
            "SystemTime::now()",
            "let s: TcpStream;",
            "rand::random()",
            "std::time::Instant::now()",
        ] {
            let text = format!("//! A.\nfn f() {{ {line} }}\n");
            assert_eq!(broken("crates/store/src/a.rs", &text), [(2, "doors")], "{line}");
            assert_eq!(broken("crates/compute/src/a.rs", &text), [], "{line} is compute's own business");
        }
        let tokio = "//! A.\nuse tokio::time::Instant;\nfn f() { Instant::now() }\n";
        assert_eq!(broken("crates/store/src/a.rs", tokio), [], "a test can pause tokio's clock");
        let std = "//! A.\nuse std::time::{Duration, Instant};\nfn f() { Instant::now() }\n";
        assert_eq!(broken("crates/store/src/a.rs", std), [(3, "doors")]);
        assert_eq!(broken("crates/store/src/a.rs", "//! A.\nfn f() { strand::x() }\n"), []);
    }

    #[test]
    fn machine_paths_and_trailing_blanks_are_found_in_any_text() {
        assert_eq!(broken("docs/a.md", &format!("see {}x\n", MACHINE_PATHS[0])), [(1, "machine-path")]);
        assert_eq!(broken("docs/a.md", &format!("see /proc/{{pid}}{}x\n", MACHINE_PATHS[1])), []);
        assert_eq!(broken("docs/a.md", "text \n"), [(1, "trailing-whitespace")]);
        assert_eq!(broken("logo.png", "text \n"), []);
    }
}
