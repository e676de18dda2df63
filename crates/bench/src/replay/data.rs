//! The two CSV files, read strictly: a line that isn't understood is named, and nothing is guessed.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use nexus_placement::Node;

/// Bytes of a GiB.
pub const GI: f64 = (1u64 << 30) as f64;
/// A file of requests of a few million lines.
const MOST_BYTES: u64 = 256 << 20;

const HOST_COLUMNS: &str = "host,rack,numa0_vcpus,numa0_ram_gib,numa1_vcpus,numa1_ram_gib";
const VM_COLUMNS: &str = "vcpus,ram_gib,numa,strategy,group,domain";

/// A recorded host.
#[derive(Clone, Debug)]
pub struct Host {
    pub rack: u32,
    /// What was free on each when the recording began.
    pub nodes: Vec<Node>,
}

/// How a group's members are to lie to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strategy {
    None,
    Affinity,
    AntiAffinity,
    FaultDomain,
}

/// A recorded request.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Millicores.
    pub cpu: u32,
    /// Bytes.
    pub memory: u64,
    pub span: u8,
    pub strategy: Strategy,
    /// Unique within its strategy.
    pub group: Option<u32>,
    pub domain: u32,
}

fn read(path: &Path) -> anyhow::Result<String> {
    let file = std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut text = String::new();
    let read = file.take(MOST_BYTES + 1).read_to_string(&mut text);
    ensure!(
        read.with_context(|| format!("reading {}", path.display()))? as u64 <= MOST_BYTES,
        "{} is too large",
        path.display()
    );
    Ok(text)
}

pub fn hosts(path: &Path) -> anyhow::Result<Vec<Host>> {
    parse_hosts(&read(path)?).with_context(|| format!("in {}", path.display()))
}

pub fn requests(path: &Path) -> anyhow::Result<Vec<Vm>> {
    parse_requests(&read(path)?).with_context(|| format!("in {}", path.display()))
}

pub fn parse_hosts(text: &str) -> anyhow::Result<Vec<Host>> {
    table(text, HOST_COLUMNS, |[_, rack, cpu0, memory0, cpu1, memory1]| {
        let node = |cpu, memory| anyhow::Ok(Node { cpu: millicores(cpu)?, memory: bytes(memory)? });
        Ok(Host { rack: whole(rack)?, nodes: vec![node(cpu0, memory0)?, node(cpu1, memory1)?] })
    })
}

pub fn parse_requests(text: &str) -> anyhow::Result<Vec<Vm>> {
    table(text, VM_COLUMNS, |[cpu, memory, span, strategy, group, domain]| {
        let strategy = match strategy {
            "" => Strategy::None,
            "affinity" => Strategy::Affinity,
            "anti-affinity" => Strategy::AntiAffinity,
            "fault_domain" => Strategy::FaultDomain,
            other => bail!("there is no strategy `{other}`"),
        };
        let group = if group.is_empty() { None } else { Some(whole(group)?) };
        ensure!((strategy == Strategy::None) == group.is_none(), "a strategy and a group go together");
        let domain = if domain.is_empty() { 0 } else { whole(domain)? };
        let span = u8::try_from(whole(span)?).ok().filter(|span| (1..=2).contains(span));
        let span = span.context("a VM spans one node or two")?;
        Ok(Vm { cpu: millicores(cpu)?, memory: bytes(memory)?, span, strategy, group, domain })
    })
}

fn table<T>(text: &str, columns: &str, row: impl Fn([&str; 6]) -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    let mut lines = text.lines().enumerate();
    let head = lines.next().map_or("", |(_, line)| line.trim_start_matches('\u{feff}').trim());
    ensure!(head == columns, "the first line is `{head}`, expected `{columns}`");
    let mut rows = Vec::new();
    for (at, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let cells: Vec<&str> = line.trim().split(',').collect();
        let found = cells.len();
        let cells = <[&str; 6]>::try_from(cells).ok().with_context(|| format!("{found} columns, expected 6"));
        rows.push(cells.and_then(&row).with_context(|| format!("line {}: `{line}`", at + 1))?);
    }
    ensure!(!rows.is_empty(), "there is no line after the first");
    Ok(rows)
}

fn whole(text: &str) -> anyhow::Result<u32> {
    text.parse().with_context(|| format!("`{text}` is not a whole number"))
}

fn number(text: &str, most: f64) -> anyhow::Result<f64> {
    let number: f64 = text.parse().with_context(|| format!("`{text}` is not a number"))?;
    ensure!((0.0..=most).contains(&number), "`{text}` is not between 0 and {most}");
    Ok(number)
}

fn millicores(vcpus: &str) -> anyhow::Result<u32> {
    Ok((number(vcpus, 100_000.0)? * 1000.0).round() as u32)
}

fn bytes(gib: &str) -> anyhow::Result<u64> {
    Ok((number(gib, 10_000_000.0)? * GI).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_not_understood_is_named() {
        for (line, says) in [
            ("8,16", "2 columns"),
            ("8,16,3,,,", "one node or two"),
            ("8,x,1,,,", "`x` is not a number"),
            ("8,-1,1,,,", "not between"),
            ("8,16,1,affinity,,", "go together"),
            ("8,16,1,close,1,", "no strategy `close`"),
        ] {
            let error = format!("{:#}", parse_requests(&format!("{VM_COLUMNS}\n2,4,1,,,\n{line}\n")).unwrap_err());
            assert!(error.contains("line 3") && error.contains(says), "{error}");
        }
        assert!(parse_hosts("rack,host\n").is_err());
        assert!(parse_hosts(HOST_COLUMNS).is_err());
    }
}
