//! What is behind compute and storage classes on this host: device nodes, and folders.
//!
//! A class's nodes are shared out evenly over its units when the host is configured. An instance gets the nodes of as many
//! units as it takes, and which these are stands in its record: what a living record names is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nexus_model::Name;
use nexus_model::kind::Classes;
use serde_json::{Value, json};

/// The nodes of each unit of a class.
pub type Units = Vec<Vec<PathBuf>>;

/// The units that an instance holds, by class.
pub(super) type Held = BTreeMap<Name, Vec<usize>>;

/// Chooses units for an instance: the lowest that are free. A class without nodes needs none.
pub(super) fn choose(
    classes: &Classes,
    behind: &BTreeMap<Name, Units>,
    others: impl Iterator<Item = Held>,
) -> Result<Held, String> {
    let mut taken: BTreeSet<(Name, usize)> = BTreeSet::new();
    for held in others {
        taken.extend(
            held.into_iter().flat_map(|(class, units)| units.into_iter().map(move |unit| (class.clone(), unit))),
        );
    }
    let mut held = Held::new();
    for (class, wanted) in classes {
        let Some(units) = behind.get(class) else { continue };
        let free = (0..units.len()).filter(|unit| !taken.contains(&(class.clone(), *unit)));
        let chosen: Vec<usize> = free.take(*wanted as usize).collect();
        if chosen.len() < *wanted as usize {
            let busy = units.len() - chosen.len();
            return Err(format!(
                "{wanted} of class {class} are wanted, and {busy} of this host's {} are in use",
                units.len()
            ));
        }
        held.insert(class.clone(), chosen);
    }
    Ok(held)
}

/// The nodes of units.
pub(super) fn nodes(held: &Held, behind: &BTreeMap<Name, Units>) -> Vec<PathBuf> {
    let of = |(class, units): (&Name, &Vec<usize>)| {
        let all = behind.get(class);
        units.iter().filter_map(|unit| all?.get(*unit)).flatten().cloned().collect::<Vec<_>>()
    };
    held.iter().flat_map(of).collect()
}

/// A node as the runtime specification has it: the device, and the rule of the devices cgroup that allows it.
pub(super) fn describe(node: &Path) -> io::Result<(Value, Value)> {
    let metadata = std::fs::metadata(node)?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => "c",
        kind if kind.is_block_device() => "b",
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no device node")),
    };
    let (major, minor) = (nix::sys::stat::major(metadata.rdev()), nix::sys::stat::minor(metadata.rdev()));
    let device = json!({
        "path": node, "type": kind, "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0,
    });
    let rule = json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": "rwm"});
    Ok((device, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn behind() -> BTreeMap<Name, Units> {
        let unit = |n: usize| vec![PathBuf::from(format!("/dev/gpu{n}")), PathBuf::from(format!("/dev/gpu{n}-ctl"))];
        BTreeMap::from([(name("gpu"), (0..3).map(unit).collect())])
    }

    #[test]
    fn the_lowest_free_units_are_chosen_and_nothing_is_given_twice() {
        let wants = |n: u32| Classes::from_iter([(name("gpu"), n), (name("fpga"), 1)]);
        let first = choose(&wants(2), &behind(), std::iter::empty()).unwrap();
        assert_eq!(first, Held::from([(name("gpu"), vec![0, 1])]), "a class without nodes needs none");
        let second = choose(&wants(1), &behind(), [first.clone()].into_iter()).unwrap();
        assert_eq!(second[&name("gpu")], [2]);
        let why = choose(&wants(1), &behind(), [first.clone(), second].into_iter()).unwrap_err();
        assert_eq!(why, "1 of class gpu are wanted, and 3 of this host's 3 are in use");
        let nodes = nodes(&first, &behind());
        assert_eq!(nodes.len(), 4);
        assert_eq!(nodes[2], Path::new("/dev/gpu1"));
    }

    #[test]
    fn a_node_is_described_and_a_file_is_refused() {
        let (device, rule) = describe(Path::new("/dev/null")).unwrap();
        assert_eq!((&device["type"], &device["major"], &device["minor"]), (&json!("c"), &json!(1), &json!(3)));
        assert_eq!(rule["allow"], true);
        assert!(describe(Path::new("/proc/self/exe")).is_err());
    }
}
