//! The NUMA nodes that an operator gives a host, in place of the kernel's.

use std::str::FromStr;

use nexus_agent::numa::RawNode;
use nexus_model::Bytes;
use nexus_model::kind::{CpuList, MAX_NUMA_NODES};
use serde::{Deserialize, Serialize};

/// One node of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    pub id: u16,
    /// Such as `0-7,16-23`.
    pub cpus: String,
    pub memory: Bytes,
}

impl NodeConfig {
    /// The node; the configuration was checked.
    pub fn raw(&self) -> Option<RawNode> {
        Some(RawNode { id: self.id, cpus: self.cpus.parse().ok()?, memory: self.memory })
    }
}

impl FromStr for NodeConfig {
    type Err = String;

    /// `0=cpus:0-7,16-23,memory:16Gi`
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: write ID=cpus:LIST,memory:SIZE, such as 0=cpus:0-7,memory:16Gi");
        let (id, rest) = text.split_once('=').ok_or_else(wrong)?;
        let (cpus, memory) = rest.strip_prefix("cpus:").and_then(|r| r.split_once(",memory:")).ok_or_else(wrong)?;
        let node = NodeConfig {
            id: id.parse().map_err(|_| wrong())?,
            cpus: cpus.parse::<CpuList>().map_err(|e| e.to_string())?.to_string(),
            memory: memory.parse().map_err(|e| format!("{memory:?}: {e}"))?,
        };
        if node.memory.0 == 0 { Err(wrong()) } else { Ok(node) }
    }
}

/// Whether the nodes are nodes, and apart.
pub fn check(nodes: &[NodeConfig]) -> Result<(), String> {
    match nodes.len() {
        0 => return Ok(()),
        1 => return Err("a host that is one node needs none: give two or more".to_owned()),
        n if n > MAX_NUMA_NODES => return Err(format!("at most {MAX_NUMA_NODES}")),
        _ => {}
    }
    for (at, node) in nodes.iter().enumerate() {
        let cpus = node.cpus.parse::<CpuList>().map_err(|e| format!("node {}: {e}", node.id))?;
        if node.memory.0 == 0 {
            return Err(format!("node {} has no memory", node.id));
        }
        for other in &nodes[..at] {
            if other.id == node.id {
                return Err(format!("node {} is given twice", node.id));
            }
            if other.cpus.parse::<CpuList>().is_ok_and(|list| !list.both(&cpus).is_empty()) {
                return Err(format!("nodes {} and {} share processors", other.id, node.id));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_read_and_are_apart() {
        let node = |text: &str| text.parse::<NodeConfig>();
        let two = [node("0=cpus:0-3,8-11,memory:16Gi").unwrap(), node("1=cpus:4-7,memory:16Gi").unwrap()];
        assert_eq!((two[0].id, two[0].cpus.as_str(), two[0].memory), (0, "0-3,8-11", Bytes(16 << 30)));
        for odd in ["0", "0=cpus:0-3", "x=cpus:0,memory:1Gi", "0=cpus:,memory:1Gi", "0=cpus:0,memory:0", "0=memory:1Gi"]
        {
            assert!(node(odd).is_err(), "{odd:?} is read");
        }
        assert_eq!(check(&two), Ok(()));
        assert!(check(&two[..1]).unwrap_err().contains("give two or more"));
        let shared = [two[0].clone(), node("1=cpus:3-7,memory:1Gi").unwrap()];
        assert_eq!(check(&shared).unwrap_err(), "nodes 0 and 1 share processors");
        assert_eq!(check(&[two[0].clone(), two[0].clone()]).unwrap_err(), "node 0 is given twice");
    }
}
