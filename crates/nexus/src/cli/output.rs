//! Standard output and the forms that an answer can take.

use std::io::{self, Write as _};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

/// How objects are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    /// A table with more columns
    Wide,
    Json,
    Yaml,
    /// KIND/NAME, one a line
    Name,
}

/// Whoever read our output has gone: nothing more is to be said.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed")]
pub struct Closed;

/// Writes to standard output at once.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Closed.into()),
        Err(e) => Err(anyhow::Error::new(e).context("writing to standard output")),
    }
}

/// Writes one or more lines.
pub fn text(text: &str) -> anyhow::Result<()> {
    let mut line = text.as_bytes().to_vec();
    line.push(b'\n');
    bytes(&line)
}

/// Tells something beside the result, on standard error. Nobody may be there to read it.
pub fn note(text: &str) {
    writeln!(io::stderr().lock(), "{text}").ok();
}

pub fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    text(&serde_json::to_string_pretty(value)?)
}

pub fn yaml<T: Serialize>(value: &T) -> anyhow::Result<()> {
    bytes(serde_norway::to_string(value)?.as_bytes())
}

/// Several objects as one.
pub fn list_of(kind: &str, items: &[Value]) -> Value {
    json!({"apiVersion": nexus_model::API_VERSION, "kind": format!("{kind}List"), "items": items})
}

/// Text from objects, safe for a terminal: whatever would move the cursor or change colours becomes a space.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[31mb\nc"), "a [31mb c");
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 << 30), "5.0 GiB");
    }
}
