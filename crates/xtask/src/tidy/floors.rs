//! Who may depend on whom: the floors of the house, and where versions stand.
//!
//! A room may use only rooms on lower floors. Rooms for development may use everything and are used by none that ships.
//! Dev-dependencies may go anywhere below the binary: they don't ship.

use super::{Finding, Source};

/// Every room that may exist and its floor.
const FLOORS: &[(&str, u8)] = &[
    ("model", 1),
    ("env", 1),
    ("store", 2),
    ("wire", 2),
    ("iam", 2),
    ("placement", 2),
    ("audit", 2),
    ("compute", 3),
    ("network", 3),
    ("volume", 3),
    ("object", 3),
    ("edge", 3),
    ("ledger", 3),
    ("entity", 3),
    ("sql", 3),
    ("control", 4),
    ("agent", 4),
    ("api", 5),
    ("nexus", 6),
    ("sim", DEV),
    ("bench", DEV),
    ("xtask", DEV),
];
/// Above everything that ships.
const DEV: u8 = 9;

/// Edges that go down and are forbidden all the same.
fn is_forbidden(from: &str, to: &str) -> bool {
    // The control plane plans; it must not know the engines that carry plans out.
    from == "control" && floor(to) == Some(3)
}

fn floor(room: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

/// Checks the manifest of a room.
pub fn check(source: &Source<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(room) = source.room().filter(|_| source.path.ends_with("Cargo.toml")) else { return findings };
    if source.path.iter().count() != 3 {
        return findings;
    }
    let Some(own) = floor(room) else {
        findings.push(source.finding(1, "floors", format!("the room `{room}` is not in the table of floors")));
        return findings;
    };
    let mut section = String::new();
    for (index, line) in source.text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let number = index + 1;
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.trim_matches(['[', ']']).to_owned();
            // `[dependencies.NAME]`
            if let Some((table, name)) = section.rsplit_once("dependencies.") {
                edge(source, number, room, own, name, table.ends_with("dev-"), &mut findings);
            }
            continue;
        }
        if !section.ends_with("dependencies") {
            if section.contains("dependencies.") && line.starts_with("version") {
                findings.push(version(source, number));
            }
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        let name = key.trim().split('.').next().unwrap_or_default().trim_matches('"');
        let inherits = key.contains(".workspace") || value.replace(' ', "").contains("workspace=true");
        if !inherits {
            findings.push(version(source, number));
        }
        edge(source, number, room, own, name, section.ends_with("dev-dependencies"), &mut findings);
    }
    findings
}

fn version(source: &Source<'_>, line: usize) -> Finding {
    source.finding(line, "versions", "versions stand in the workspace's Cargo.toml: write `NAME.workspace = true`")
}

fn edge(source: &Source<'_>, line: usize, from: &str, own: u8, name: &str, dev: bool, findings: &mut Vec<Finding>) {
    let Some(to) = (if name == "nexus" { Some(name) } else { name.strip_prefix("nexus-") }) else { return };
    let Some(below) = floor(to) else {
        findings.push(source.finding(line, "floors", format!("the room `{to}` is not in the table of floors")));
        return;
    };
    let allowed = if dev { below < 6 || below < own } else { below < own && !is_forbidden(from, to) };
    if !allowed {
        let message = format!("`{from}` (floor {own}) may not depend on `{to}` (floor {below}): only on lower floors");
        findings.push(source.finding(line, "floors", message));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::broken;

    fn manifest(room: &str, section: &str, dependency: &str) -> Vec<(usize, &'static str)> {
        let text = format!("[package]\nname = \"nexus-{room}\"\nversion = \"1\"\n\n[{section}]\n{dependency}\n");
        broken(&format!("crates/{room}/Cargo.toml"), &text)
    }

    #[test]
    fn dependencies_go_down() {
        assert_eq!(manifest("store", "dependencies", "nexus-env.workspace = true"), []);
        assert_eq!(manifest("api", "dependencies", "nexus-control = { workspace = true }"), []);
        assert_eq!(manifest("store", "dependencies", "nexus-control.workspace = true"), [(6, "floors")]);
        assert_eq!(manifest("store", "dependencies", "nexus-wire.workspace = true"), [(6, "floors")], "the same floor");
        assert_eq!(manifest("agent", "dependencies", "nexus-control.workspace = true"), [(6, "floors")]);
        assert_eq!(manifest("control", "dependencies", "nexus-compute.workspace = true"), [(6, "floors")]);
        assert_eq!(manifest("nexus", "dependencies", "nexus-sim.workspace = true"), [(6, "floors")]);
        assert_eq!(manifest("bench", "dependencies", "nexus-control.workspace = true"), []);
        assert_eq!(manifest("store", "dependencies", "nexus-cellar.workspace = true"), [(6, "floors")]);
        assert_eq!(manifest("cellar", "dependencies", ""), [(1, "floors")]);
    }

    #[test]
    fn tests_may_look_up_but_not_to_the_binary() {
        assert_eq!(manifest("store", "dev-dependencies", "nexus-wire.workspace = true"), []);
        assert_eq!(manifest("store", "dev-dependencies", "nexus.workspace = true"), [(6, "floors")]);
        assert_eq!(manifest("bench", "dev-dependencies", "nexus.workspace = true"), []);
    }

    #[test]
    fn versions_stand_in_the_workspace() {
        assert_eq!(manifest("store", "dependencies", "serde = \"1\""), [(6, "versions")]);
        assert_eq!(manifest("store", "dependencies", "serde = { version = \"1\" }"), [(6, "versions")]);
        assert_eq!(manifest("store", "dependencies", "serde = { workspace = true, features = [] }"), []);
        assert_eq!(manifest("store", "dependencies.serde", "version = \"1\""), [(6, "versions")]);
        assert_eq!(manifest("store", "target.'cfg(unix)'.dependencies", "libc = \"1\""), [(6, "versions")]);
    }
}
