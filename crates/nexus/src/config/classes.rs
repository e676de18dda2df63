//! What is behind the classes that a host declares: device nodes and folders.

use std::collections::BTreeMap;
use std::path::PathBuf;

use nexus_model::kind::Classes;
use nexus_model::{Bytes, Name};
use serde::{Deserialize, Serialize};

/// What is behind a storage class of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageFolder {
    pub path: PathBuf,
    /// How much of it instances may reserve [default: nine tenths of what is free or theirs when the agent starts]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Bytes>,
}

/// Whether the nodes of each class can be shared out over its units, and may be given to containers.
pub fn check_devices(devices: &BTreeMap<Name, Vec<PathBuf>>, classes: &Classes) -> Result<(), String> {
    for (class, nodes) in devices {
        let Some(units) = classes.get(class) else {
            return Err(format!("{class}: say under `classes` how many of it there are"));
        };
        if *units == 0 || nodes.is_empty() || !nodes.len().is_multiple_of(*units as usize) {
            return Err(format!("{class}: {} nodes can't be shared out over {units} units", nodes.len()));
        }
        if let Some(odd) = nodes.iter().find(|node| !node.starts_with("/dev") || node.as_os_str() == "/dev") {
            return Err(format!("{class}: {} is not below /dev", odd.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_shared_out_evenly_and_stand_below_dev() {
        let gpu: Name = "gpu".parse().unwrap();
        let check = |units: u32, nodes: &[&str]| {
            let classes = Classes::from_iter([(gpu.clone(), units)].into_iter().filter(|(_, n)| *n > 0));
            check_devices(&BTreeMap::from([(gpu.clone(), nodes.iter().map(PathBuf::from).collect())]), &classes)
        };
        assert_eq!(check(2, &["/dev/a", "/dev/b"]), Ok(()));
        assert_eq!(check(1, &["/dev/a", "/dev/b"]), Ok(()));
        assert!(check(2, &["/dev/a", "/dev/b", "/dev/c"]).unwrap_err().contains("3 nodes can't be shared out"));
        assert!(check(1, &[]).is_err());
        assert!(check(0, &["/dev/a"]).unwrap_err().contains("say under `classes`"));
        assert!(check(1, &["/etc/shadow"]).unwrap_err().contains("not below /dev"));
    }
}
