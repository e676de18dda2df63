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

use crate::NetError;
use crate::cable::{Plugged, Switch};
use crate::netlink::Route;
use crate::netns::NetnsRef;

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
pub struct Backbone(Switch);

impl Backbone {
    /// `prefix` has 2 to 4 characters and begins every link's name.
    pub fn new(prefix: &str) -> Result<Self, NetError> {
        Ok(Self(Switch::new("the backbone", prefix, "bb0", "r")?))
    }

    /// Makes the bridge, or completes it.
    pub async fn create(&self) -> Result<(), NetError> {
        // The machine only carries frames here.
        self.0.create(&[("ipv6/conf/{}/addr_gen_mode", "1")], |_, _| Ok(())).await
    }

    /// Connects a region, or restores what is missing of its connection.
    pub async fn attach(&self, region: &RegionLink) -> Result<(), NetError> {
        let (netns, address6, others) = (region.netns.clone(), region.address6, region.others.clone());
        let address = move |mut ends: Plugged| {
            ends.inside.ensure_address(ends.uplink, address6.into(), LENGTH)?;
            for (to, length, via) in others {
                let route = Route { to: to.into(), length, gateway: Some(via.into()), link: ends.uplink };
                ends.inside.ensure_route(route)?;
            }
            Ok(())
        };
        self.0.plug(&region.region, netns, address).await
    }

    /// Cuts a region's cable: nothing passes, in either direction, until it is healed. What is inside goes on.
    pub async fn cut(&self, region: &str) -> Result<(), NetError> {
        self.0.join(region, false).await
    }

    /// Plugs a cut cable in again.
    pub async fn heal(&self, region: &str) -> Result<(), NetError> {
        self.0.join(region, true).await
    }

    /// Takes a region off the wire for good. Harmless when it is not there.
    pub async fn detach(&self, region: &str) -> Result<(), NetError> {
        self.0.unplug(region, |_, _| Ok(())).await
    }
}
