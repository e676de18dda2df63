//! Whether a host can have tenants' networks at all. It is found out by trying: a tunnel is made in a namespace that nobody else
//! sees, and goes with it. What a kernel lacks is told before an instance with a NIC has been sent there.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use crate::NetError;
use crate::netlink::{Netlink, Vxlan};
use crate::netns::{NetnsRef, aside, enter, new_namespace};

/// Makes what a network of a tenant's needs of the kernel, where it is in nobody's way.
pub async fn try_out() -> Result<(), NetError> {
    aside(NetnsRef::Own, "trying out tenants' networks", || {
        let netns = new_namespace()?;
        enter(&netns)?;
        let tunnel = Vxlan { vni: 1, local: Ipv4Addr::LOCALHOST.into(), port: 4789 };
        Netlink::open()?.add_vxlan("probe", tunnel, [2, 0, 0, 0, 0, 1], 1400, netns.as_fd())?;
        Ok(())
    })
    .await
}
