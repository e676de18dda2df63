//! NUMA nodes: processors with the memory next to them, as a host declares them and as they are used.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::HostSpec;
use crate::{Bytes, FieldError, MilliCpu};

/// NUMA nodes of a host that are told apart: as many as two sockets have that are cut in four.
pub const MAX_NUMA_NODES: usize = 8;
/// Characters of a list of processors.
const MAX_LIST: usize = 1024;
/// Characters of why a host can't keep instances to nodes.
pub const MAX_TROUBLE: usize = 200;
/// The kernel knows at most 8,192 (`CONFIG_NR_CPUS`).
const MAX_CPU: u16 = 9_999;
/// Runs of a list of processors.
const MAX_RUNS: usize = 256;

/// A list of processors as the kernel writes it: `0-7,16-23`.
const LIST_PATTERN: &str = "^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?){0,255}$";

/// One node of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NumaNode {
    /// The kernel's number of it.
    pub id: u16,
    /// Its processors, such as `0-7,16-23`.
    #[schemars(length(max = MAX_LIST), regex(pattern = LIST_PATTERN))]
    pub cpus: String,
    /// Its share of the host's processors.
    pub cpu: MilliCpu,
    /// Its share of the host's memory.
    pub memory: Bytes,
}

/// What of a node is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NumaRoom {
    pub id: u16,
    /// By instances that are kept to it.
    pub reserved_cpu: MilliCpu,
    pub reserved_memory: Bytes,
    /// The host's at most: what is kept to no node may run here.
    pub free_cpu: MilliCpu,
    pub free_memory: Bytes,
}

/// Why a text is no [`CpuList`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no list of processors: write 0-7 or 0-3,8-11")]
pub struct CpuListError(String);

/// Processors, or nodes, by number, in runs, ascending and apart (the kernel's "list format", cpuset(7)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuList(Vec<(u16, u16)>);

impl CpuList {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|(first, last)| u32::from(last - first) + 1).sum()
    }

    /// Whether a number is in it.
    pub fn has(&self, number: u16) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&number))
    }

    /// Those that are in both lists.
    #[must_use]
    pub fn both(&self, other: &CpuList) -> CpuList {
        let with = |(first, last): &(u16, u16)| {
            let (first, last) = (*first, *last);
            let cut = move |(a, b): &(u16, u16)| Some((first.max(*a), last.min(*b))).filter(|(a, b)| a <= b);
            other.0.iter().filter_map(cut).collect::<Vec<_>>()
        };
        CpuList(self.0.iter().flat_map(with).collect())
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let wrong = || CpuListError(text.chars().take(80).collect());
        let number = |text: &str| {
            let plain = (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u16>().ok().filter(|n| plain && *n <= MAX_CPU).ok_or_else(wrong)
        };
        let mut runs = Vec::new();
        for run in text.trim().split(',') {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last) = (number(first)?, number(last)?);
            if first > last || runs.len() == MAX_RUNS {
                return Err(wrong());
            }
            runs.push((first, last));
        }
        runs.sort_unstable();
        // Runs that touch are one, so that a list is written in one way.
        let mut apart: Vec<(u16, u16)> = Vec::new();
        for (first, last) in runs {
            match apart.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => apart.push((first, last)),
            }
        }
        Ok(CpuList(apart))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (first, last)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// What is wrong with what a host says of its nodes.
pub(super) fn validate(spec: &HostSpec) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let nodes = &spec.numa_nodes;
    if nodes.len() > MAX_NUMA_NODES {
        errors.push(FieldError::new("spec.numaNodes", format!("at most {MAX_NUMA_NODES}")));
    }
    for (i, node) in nodes.iter().enumerate() {
        if node.cpus.len() > MAX_LIST || node.cpus.parse::<CpuList>().is_err() {
            errors.push(FieldError::new(format!("spec.numaNodes[{i}].cpus"), "a list such as 0-7,16-23"));
        }
        if i > 0 && nodes[i - 1].id >= node.id {
            errors.push(FieldError::new(format!("spec.numaNodes[{i}].id"), "ascending, each once"));
        }
    }
    if spec.numa_trouble.chars().count() > MAX_TROUBLE {
        errors.push(FieldError::new("spec.numaTrouble", format!("at most {MAX_TROUBLE} characters")));
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read_as_the_kernel_writes_them() {
        let list = |text: &str| text.parse::<CpuList>();
        for (text, written, count) in
            [("0-7,16-23\n", "0-7,16-23", 16), ("3", "3", 1), ("4-5,0-3", "0-5", 6), ("1,1-2", "1-2", 2)]
        {
            let read = list(text).unwrap();
            assert_eq!((read.to_string().as_str(), read.count()), (written, count));
        }
        for odd in ["", "-", "a", "3-1", "1,", "99999", "-3", "1-2-3", "+1"] {
            assert!(list(odd).is_err(), "{odd:?} is read");
        }
        let both = list("0-3,8-11").unwrap().both(&list("2-9").unwrap());
        assert_eq!(both.to_string(), "2-3,8-9");
        assert!(list("0-3").unwrap().both(&list("4").unwrap()).is_empty());
    }

    #[test]
    fn what_a_host_says_of_its_nodes_is_bounded() {
        let node = |id: u16| NumaNode { id, cpus: "0-3".into(), cpu: MilliCpu(4000), memory: Bytes(1 << 30) };
        let spec = |nodes: Vec<NumaNode>| HostSpec { numa_nodes: nodes, ..HostSpec::default() };
        assert!(validate(&spec(vec![node(0), node(3)])).is_empty());
        assert_eq!(validate(&spec(vec![node(1), node(1)])).len(), 1);
        assert_eq!(validate(&spec((0..9).map(node).collect())).len(), 1);
        assert_eq!(validate(&spec(vec![NumaNode { cpus: "x".into(), ..node(0) }])).len(), 1);
    }
}
