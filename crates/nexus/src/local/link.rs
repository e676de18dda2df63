//! The plan's side of the wires: which bridges, which veths, which addresses. `nexus_network` does the work.

use std::path::Path;

use nexus_network::{Backbone, HostLink, NetError, NetnsRef, RegionLink, Underlay, UnderlayAddress};

use super::plan::{HostPlan, Plan, RegionPlan};

/// The wire between a region's hosts; `netns` is where the region lives.
pub fn underlay(plan: &Plan, region: &RegionPlan, netns: NetnsRef) -> Result<Underlay, NetError> {
    let address6 = plan.region6(region);
    let address = UnderlayAddress { address6, length6: 64, address4: plan.machine4(), length4: 24 };
    Ok(Underlay::new(&plan.link_prefix(), address)?.inside(netns))
}

/// The wire between the plan's regions.
pub fn backbone(plan: &Plan) -> Result<Backbone, NetError> {
    Backbone::new(&plan.link_prefix())
}

/// A region that lives in `netns`.
pub fn region_link(plan: &Plan, region: &RegionPlan, netns: NetnsRef) -> RegionLink {
    let (_, _, address6) = plan.on_backbone(region);
    let others = plan.regions.iter().filter(|r| r.index != region.index).map(|r| plan.on_backbone(r)).collect();
    RegionLink { region: region.name.to_string(), netns, address6, others }
}

/// A host whose first process is `pid`.
pub fn host_link(host: &HostPlan, pid: i32) -> HostLink {
    HostLink {
        host: host.name.to_string(),
        netns: NetnsRef::Pid(pid.cast_unsigned()),
        address6: host.address6,
        address4: host.address4,
        instances6: host.prefix6,
        instances4: host.prefix4,
    }
}

/// Whether any network link's name begins with `prefix`.
pub fn prefix_in_use(prefix: &str) -> bool {
    let links = std::fs::read_dir(Path::new("/sys/class/net")).into_iter().flatten().flatten();
    links.into_iter().any(|l| l.file_name().to_string_lossy().starts_with(prefix))
}
