//! What `nexus describe cell` shows beside spec and status: hosts, load, who would feel its loss, and its troubles.
//!
//! Which projects are assigned to a cell is computed here as the region's scheduler does it: the assignment is documented
//! and stored nowhere (docs/guide/cells.md).

use std::collections::{BTreeMap, BTreeSet};

use nexus_control::shard;
use nexus_model::kind::{self, Capacity, SYSTEM_PROJECT};
use nexus_model::{MilliCpu, Name};
use serde_json::Value;

use super::cloud::{Cloud, Listing, name_of, text};
use super::describe::event_table;
use super::events;
use super::output::plain;
use super::table::{Columns, KindTable, Printer};

/// Rows of a table at most; what is in trouble or matters most comes first.
const HOSTS: usize = 50;
const TENANTS: usize = 20;
const INSTANCES: usize = 10;

/// A project's share of a cell.
#[derive(Debug, Default, Clone, PartialEq)]
struct Tenant {
    /// The cell is of its shard.
    assigned: bool,
    here: usize,
    everywhere: usize,
}

/// How full a cell is, over all of its hosts.
#[derive(Debug, Default, PartialEq)]
struct Load {
    reserved: [u64; 4],
    capacity: [u64; 4],
}

impl Load {
    fn add(&mut self, host: &Value) {
        let read = |pointer: &str| -> Capacity {
            let value = host.pointer(pointer).cloned().unwrap_or_default();
            serde_json::from_value(value).unwrap_or_default()
        };
        let amounts = |c: Capacity| [u64::from(c.cpu.0), c.memory.0, c.scratch.0, u64::from(c.instances)];
        let (reserved, capacity) = (amounts(read("/status/reserved")), amounts(read("/spec/capacity")));
        for i in 0..4 {
            self.reserved[i] = self.reserved[i].saturating_add(reserved[i]);
            self.capacity[i] = self.capacity[i].saturating_add(capacity[i]);
        }
    }

    fn table(&self) -> String {
        let cpu = |n: u64| MilliCpu(u32::try_from(n).unwrap_or(u32::MAX)).to_string();
        let size = super::output::size;
        let number = |n: u64| n.to_string();
        let resources: [(&str, &dyn Fn(u64) -> String); 4] =
            [("cpu", &cpu), ("memory", &size), ("scratch", &size), ("instances", &number)];
        let row = |(i, (name, show)): (usize, &(&str, &dyn Fn(u64) -> String))| {
            let (part, whole) = (self.reserved[i], self.capacity[i]);
            let percent = u128::from(part) * 100 / u128::from(whole.max(1));
            vec![(*name).to_owned(), show(part), show(whole), format!("{percent} %")]
        };
        let rows = resources.iter().enumerate().map(row).collect();
        Printer::new(&["RESOURCE", "RESERVED", "OF", "SHARE"]).lines(rows)
    }
}

/// Reads what is to be shown of a cell and lays it out: titles with their content.
pub async fn sections(cloud: &Cloud, cell: &Value) -> anyhow::Result<Vec<(&'static str, String)>> {
    let (name, region, now) = (name_of(cell)?, cloud.region_of(cell), cloud.now());
    let listing = Listing { all_projects: true, region: Some(region.clone()), ..Listing::default() };
    let find = |word: &str| kind::find(word).expect("a kind");

    let (mut zones, mut load) = (BTreeMap::new(), Load::default());
    let (mut hosts, _) = cloud
        .list(find("hosts"), &listing, |host| {
            if let (Ok(cell), Ok(zone)) = (text(host, "/spec/cell").parse(), text(host, "/spec/zone").parse()) {
                zones.insert(cell, zone);
            }
            let here = text(host, "/spec/cell") == name.as_str();
            if here {
                load.add(host);
            }
            here
        })
        .await?;
    let names: BTreeSet<String> = hosts.iter().map(|host| text(host, "/metadata/name").to_owned()).collect();

    let mut tenants: BTreeMap<Name, Tenant> = BTreeMap::new();
    let (projects, _) = cloud.list(find("projects"), &Listing::default(), |_| true).await?;
    for project in projects.iter().map(name_of) {
        let project = project?;
        let assigned = is_assigned(&region, &project, &name, &zones);
        tenants.insert(project, Tenant { assigned, ..Tenant::default() });
    }
    let (unwell, _) = cloud
        .list(find("instances"), &listing, |i| {
            let host = text(i, "/status/host");
            let Ok(project) = text(i, "/metadata/project").parse::<Name>() else { return false };
            if host.is_empty() {
                return false;
            }
            let tenant = tenants.entry(project).or_default();
            tenant.everywhere += 1;
            let here = names.contains(host);
            tenant.here += usize::from(here);
            here && i["status"]["ready"] != true
        })
        .await?;
    let listing = Listing { project: SYSTEM_PROJECT.parse().ok(), region: Some(region), ..Listing::default() };
    let (mut events, _) = cloud
        .list(find("events"), &listing, |event| {
            let (kind, about) = (text(event, "/spec/regarding/kind"), text(event, "/spec/regarding/name"));
            let ours = (kind == "Cell" && about == name.as_str()) || (kind == "Host" && names.contains(about));
            ours && text(event, "/spec/severity").eq_ignore_ascii_case("warning")
        })
        .await?;
    events::sort(&mut events);

    // What is not ready is what the reader looks for.
    hosts.sort_by_key(|host| text(host, "/status/state") == "ready");
    let mut host_table =
        KindTable::new(find("host"), Columns::default()).rows(hosts.iter().take(HOSTS).map(|host| (host, false)), now);
    if hosts.len() > HOSTS {
        host_table.push_str(&format!("\nand {} more", hosts.len() - HOSTS));
    }
    let quarantined = cell["status"]["quarantined"].as_array().map(Vec::as_slice).unwrap_or_default();
    let quarantined: Vec<String> = quarantined.iter().filter_map(Value::as_str).map(plain).collect();
    Ok(vec![
        ("Hosts", if hosts.is_empty() { "none".to_owned() } else { host_table }),
        ("Load", load.table()),
        ("Blast radius", blast_radius(&tenants)),
        ("Tenants", tenant_table(&tenants)),
        ("Quarantined", quarantined.join("\n")),
        ("Instances that are not ready", unwell_table(&unwell)),
        ("Trouble with it and its hosts", event_table(&events, now)),
    ])
}

/// Whether a cell is of a project's shard, given the zones of all cells that have hosts.
fn is_assigned(region: &Name, project: &Name, cell: &Name, zones: &BTreeMap<Name, Name>) -> bool {
    let Some(zone) = zones.get(cell) else { return false };
    let cells = zones.iter().filter(|(_, z)| *z == zone).map(|(cell, _)| cell);
    let order = shard::order(region, project, cells);
    let size = shard::size(order.len());
    order.into_iter().take(size).any(|c| c == cell)
}

fn blast_radius(tenants: &BTreeMap<Name, Tenant>) -> String {
    let percent = |part: usize, whole: usize| (part * 100).div_ceil(whole.max(1));
    let sum = |of: fn(&Tenant) -> usize| tenants.values().map(of).sum::<usize>();
    let (here, everywhere) = (sum(|t| t.here), sum(|t| t.everywhere));
    let touched = tenants.values().filter(|t| t.here > 0).count();
    let running = tenants.values().filter(|t| t.everywhere > 0).count();
    let wholly = tenants.values().filter(|t| t.here > 0 && t.here == t.everywhere).count();
    format!(
        "If it is lost, {here} of the region's {everywhere} instances are ({} %), of {touched} of the {running} projects \
         that run any ({} %).\n{wholly} projects have nothing elsewhere in the region.",
        percent(here, everywhere),
        percent(touched, running)
    )
}

fn tenant_table(tenants: &BTreeMap<Name, Tenant>) -> String {
    let assigned = tenants.values().filter(|t| t.assigned).count();
    let mut out = format!("{assigned} of {} projects are assigned to it by shuffle sharding.", tenants.len());
    let mut shown: Vec<_> = tenants.iter().filter(|(_, t)| t.assigned || t.here > 0).collect();
    shown.sort_by_key(|(name, t)| (std::cmp::Reverse(t.here), *name));
    let row = |(name, t): &(&Name, &Tenant)| {
        let assigned = if t.assigned { "yes" } else { "no: its own cells were full" };
        let loses = (t.here * 100).checked_div(t.everywhere).map_or("-".to_owned(), |percent| format!("{percent} %"));
        vec![name.to_string(), t.here.to_string(), t.everywhere.to_string(), loses, assigned.to_owned()]
    };
    if !shown.is_empty() {
        let rows = shown.iter().take(TENANTS).map(row).collect();
        out.push('\n');
        out.push_str(&Printer::new(&["PROJECT", "HERE", "IN REGION", "WOULD LOSE", "ASSIGNED"]).lines(rows));
    }
    if shown.len() > TENANTS {
        out.push_str(&format!("\nand {} more", shown.len() - TENANTS));
    }
    out
}

fn unwell_table(unwell: &[Value]) -> String {
    if unwell.is_empty() {
        return String::new();
    }
    let row = |i: &Value| {
        let word = |pointer: &str| plain(text(i, pointer));
        let name = format!("{}/{}", word("/metadata/project"), word("/metadata/name"));
        let restarts = i["status"]["restarts"].as_u64().unwrap_or(0).to_string();
        vec![name, word("/status/host"), word("/status/phase"), restarts, word("/status/message")]
    };
    let rows = unwell.iter().take(INSTANCES).map(row).collect();
    let mut out = Printer::new(&["INSTANCE", "HOST", "PHASE", "RESTARTS", "MESSAGE"]).lines(rows);
    if unwell.len() > INSTANCES {
        out.push_str(&format!("\nand {} more", unwell.len() - INSTANCES));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn a_cell_is_assigned_the_projects_whose_shard_has_it() {
        let zones: BTreeMap<Name, Name> = (1..=8).map(|i| (name(&format!("cell-{i}")), name("zone-a"))).collect();
        let of = |project: &str| {
            let is = |cell: &&Name| is_assigned(&name("local"), &name(project), cell, &zones);
            zones.keys().filter(is).count()
        };
        assert!((0..50).all(|i| of(&format!("project-{i}")) == 2), "a shard of eight cells has two");
        assert!(!is_assigned(&name("local"), &name("p"), &name("unknown"), &zones));
    }

    #[test]
    fn the_blast_radius_counts_who_would_lose_what() {
        let tenant = |here, everywhere| Tenant { assigned: true, here, everywhere };
        let tenants = BTreeMap::from([
            (name("a"), tenant(3, 3)),
            (name("b"), tenant(1, 4)),
            (name("c"), tenant(0, 2)),
            (name("idle"), tenant(0, 0)),
        ]);
        let text = blast_radius(&tenants);
        assert!(text.contains("4 of the region's 9 instances are (45 %), of 2 of the 3 projects"), "{text}");
        assert!(text.contains("1 projects have nothing elsewhere"), "{text}");
        let table = tenant_table(&tenants);
        assert!(table.starts_with("4 of 4 projects are assigned"), "{table}");
        let row = |project: &str| table.lines().find(|l| l.starts_with(project)).unwrap().to_owned();
        assert!(row("a").contains("100 %") && row("b").contains("25 %") && row("idle").contains('-'), "{table}");
    }

    #[test]
    fn load_is_summed_over_hosts_for_each_resource() {
        let host = json!({
            "spec": {"capacity": {"cpu": "4", "memory": "8Gi", "scratch": "100Gi", "instances": 250}},
            "status": {"reserved": {"cpu": "1500m", "memory": "2Gi", "scratch": "0", "instances": 3}},
        });
        let mut load = Load::default();
        load.add(&host);
        load.add(&host);
        assert_eq!(load.reserved, [3000, 4 << 30, 0, 6]);
        let table = load.table();
        let cpu = table.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(cpu, ["cpu", "3", "8", "37", "%"], "{table}");
    }
}
