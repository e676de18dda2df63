//! Where the servers of a world stand: one region of its own, or the regions of a fleet.
//!
//! In a fleet every server is also a member of the group that all regions share. One server of each core region votes there;
//! all others read along. So the group has a majority exactly if a majority of the core regions has.

use nexus_model::Name;
use nexus_model::kind::{GLOBAL, Tier};
use nexus_store::GroupId;

use crate::region::name;

/// Which of a server's groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Its region's; the only one in worlds without a fleet.
    Own,
    /// The one that all regions share.
    Global,
}

#[derive(Debug, Clone)]
pub struct Site {
    pub name: Name,
    pub tier: Tier,
    pub nodes: Vec<u64>,
    pub zones: &'static [&'static str],
    pub hosts_per_zone: usize,
    /// It is no part of the fleet at first.
    pub joins_later: bool,
}

impl Site {
    /// One region that belongs to no fleet.
    pub fn alone(servers: u64) -> Vec<Self> {
        let nodes = (1..=servers).collect();
        let zones = &["a", "b", "c"];
        vec![Self { name: name("local"), tier: Tier::Core, nodes, zones, hosts_per_zone: 2, joins_later: false }]
    }

    /// Three core regions. One of them has three servers, or there is a fourth region, at the edge, that only reads along. In
    /// two of three worlds another region joins later, now and then one that is at the edge.
    pub fn fleet(turn: u64) -> Vec<Self> {
        let site = |region: &str, tier: Tier, nodes: &[u64]| Self {
            name: name(region),
            tier,
            nodes: nodes.to_vec(),
            zones: &["a"],
            hosts_per_zone: 2,
            joins_later: false,
        };
        let mut sites = vec![site("eu", Tier::Core, &[1]), site("sa", Tier::Core, &[2]), site("us", Tier::Core, &[3])];
        if turn.is_multiple_of(2) {
            sites.push(site("xs", Tier::Edge, &[4]));
        } else {
            sites[0].nodes.extend([4, 5]);
        }
        if !turn.is_multiple_of(3) {
            let tier = if turn.is_multiple_of(5) { Tier::Edge } else { Tier::Core };
            let node = sites.iter().flat_map(|site| &site.nodes).max().map_or(1, |last| last + 1);
            sites.push(Self { joins_later: true, ..site("ap", tier, &[node]) });
        }
        sites
    }

    /// The server that votes in the global group, if the region is a core one.
    pub fn voter(&self) -> Option<u64> {
        self.nodes.first().copied().filter(|_| self.tier == Tier::Core)
    }

    pub fn group(&self) -> GroupId {
        GroupId::new(self.name.as_str()).expect("a well-formed name")
    }

    pub fn zone_names(&self) -> Vec<Name> {
        self.zones.iter().map(|z| name(&format!("zone-{z}"))).collect()
    }

    pub fn cell_names(&self) -> Vec<Name> {
        self.zones.iter().map(|z| name(&format!("cell-{z}"))).collect()
    }
}

pub fn global_group() -> GroupId {
    GroupId::new(GLOBAL).expect("a well-formed name")
}
