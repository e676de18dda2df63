//! The wire between the regions of one machine: a bridge in the machine's own namespace, and a veth to each region's.
//!
//! ```text
//!   machine                     region's namespace
//!   PREFIXbb0 ── PREFIXr… ────── uplink  region's ADDRESS6
//!                                        route each other region's prefix via that region's address
//! ```
//!
//! A region's servers, gateways and the bridge to its hosts live in its namespace, so that one cable is all that joins
//! it to the others. The machine itself has no address on this wire.

use std::net::Ipv6Addr;
use std::os::fd::AsFd;

use crate::netlink::{Netlink, Route};
use crate::netns::{NetnsRef, aside, enter, sysctl};
use crate::{NetError, check_name, fnv, link_name};

const UPLINK: &str = "uplink";
/// All regions share a /64 on this wire.
const LENGTH: u8 = 64;

/// One region on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionLink {
    pub region: String,
    pub netns: NetnsRef,
    pub address6: Ipv6Addr,
    /// The other regions: prefix, its length, and the region's address on the wire.
    pub others: Vec<(Ipv6Addr, u8, Ipv6Addr)>,
}

/// A machine's wire between regions. It holds no state: the kernel does. `Underlay::destroy` of the same prefix
/// removes it.
#[derive(Debug, Clone)]
pub struct Backbone {
    prefix: String,
}

impl Backbone {
    /// `prefix` has 2 to 4 characters and begins every link's name.
    pub fn new(prefix: &str) -> Result<Self, NetError> {
        check_name(prefix)?;
        if !(2..=4).contains(&prefix.len()) {
            return Err(NetError::Name(prefix.into()));
        }
        Ok(Self { prefix: prefix.into() })
    }

    fn bridge(&self) -> String {
        format!("{}bb0", self.prefix)
    }

    fn port(&self, region: &str) -> String {
        link_name(&format!("{}r", self.prefix), region)
    }

    /// Makes the bridge, or completes it.
    pub async fn create(&self) -> Result<(), NetError> {
        let bridge = self.bridge();
        aside(NetnsRef::Own, "the backbone", move || {
            let hash = fnv(bridge.as_bytes()).to_be_bytes();
            // Locally administered, unicast.
            let hardware = [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]];
            let mut links = Netlink::open()?;
            let link = links.ensure_bridge(&bridge, hardware)?;
            // The machine only carries frames here.
            sysctl(&format!("ipv6/conf/{bridge}/addr_gen_mode"), "1")?;
            links.set_up(link.index, true)
        })
        .await
    }

    /// Connects a region, or restores what is missing of its connection.
    pub async fn attach(&self, region: &RegionLink) -> Result<(), NetError> {
        let (bridge, port, region) = (self.bridge(), self.port(&region.region), region.clone());
        aside(NetnsRef::Own, "the backbone", move || attach(&bridge, &port, &region)).await
    }

    /// Cuts a region's cable: nothing passes, in either direction, until it is healed. What is inside goes on.
    pub async fn cut(&self, region: &str) -> Result<(), NetError> {
        let port = self.port(region);
        aside(NetnsRef::Own, "the backbone", move || {
            let mut links = Netlink::open()?;
            let link = links.expect_link(&port)?;
            links.set_up(link.index, false)
        })
        .await
    }

    /// Plugs a cut cable in again.
    pub async fn heal(&self, region: &str) -> Result<(), NetError> {
        let port = self.port(region);
        aside(NetnsRef::Own, "the backbone", move || {
            let mut links = Netlink::open()?;
            let link = links.expect_link(&port)?;
            links.set_up(link.index, true)
        })
        .await
    }

    /// Takes a region off the wire for good. Harmless when it is not there.
    pub async fn detach(&self, region: &str) -> Result<(), NetError> {
        let port = self.port(region);
        aside(NetnsRef::Own, "the backbone", move || Netlink::open()?.delete_link(&port)).await
    }
}

fn attach(bridge: &str, port: &str, region: &RegionLink) -> Result<(), NetError> {
    let mut links = Netlink::open()?;
    let bridge = links.expect_link(bridge)?;
    let netns = region.netns.open()?;
    // A region that was made anew has a new namespace; a link of its name leads to the old one.
    let machine = NetnsRef::Own.open()?;
    enter(&netns)?;
    let mut inside = Netlink::open()?;
    let connected = inside.link(UPLINK)?.is_some();
    enter(&machine)?;
    if !connected {
        links.delete_link(port)?;
    }
    let outer = links.ensure_veth(port, UPLINK, netns.as_fd())?;
    links.set_bridge(outer.index, bridge.index)?;
    sysctl(&format!("ipv6/conf/{port}/addr_gen_mode"), "1")?;
    links.set_up(outer.index, true)?;

    enter(&netns)?;
    let loopback = inside.expect_link("lo")?;
    inside.set_up(loopback.index, true)?;
    let uplink = inside.expect_link(UPLINK)?;
    for key in ["accept_ra", "accept_dad", "accept_redirects"] {
        sysctl(&format!("ipv6/conf/{UPLINK}/{key}"), "0")?;
    }
    inside.set_up(uplink.index, true)?;
    inside.ensure_address(uplink.index, region.address6.into(), LENGTH)?;
    for (to, length, via) in &region.others {
        inside.ensure_route(Route {
            to: (*to).into(),
            length: *length,
            gateway: Some((*via).into()),
            link: uplink.index,
        })?;
    }
    Ok(())
}
