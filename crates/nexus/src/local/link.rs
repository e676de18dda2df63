//! The plan's side of the underlay: which bridge, which veth, which addresses. `nexus_network` does the work.

use std::path::Path;

use nexus_network::{HostLink, NetError, NetnsRef, Underlay, UnderlayAddress};

use super::plan::{HostPlan, Plan};

/// The wire between the plan's hosts.
pub fn underlay(plan: &Plan) -> Result<Underlay, NetError> {
    let address = UnderlayAddress { address6: plan.machine6(), length6: 64, address4: plan.machine4(), length4: 24 };
    Underlay::new(&plan.link_prefix(), address)
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
