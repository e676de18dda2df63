//! The wire between the hosts of one machine: a bridge in the machine's own namespace, and a veth to each host's.
//!
//! ```text
//!   machine                                       host's namespace
//!   PREFIXbr0  ADDRESS6, ADDRESS4 ── PREFIXh… ──── uplink  host's ADDRESS6, ADDRESS4
//!   route host's instances /64, /24 via host              default via the bridge
//! ```
//!
//! All links of an underlay begin with its prefix, so that [`Underlay::destroy`] finds them after any crash and touches
//! nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use crate::netlink::{Netlink, Route, everything};
use crate::netns::{NetnsRef, aside, enter, sysctl};
use crate::{NetError, check_name, fnv, link_name};

const UPLINK: &str = "uplink";

/// The bridge's own addresses, and how long the prefixes are that all hosts share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnderlayAddress {
    pub address6: Ipv6Addr,
    pub length6: u8,
    pub address4: Ipv4Addr,
    pub length4: u8,
}

/// One host on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLink {
    pub host: String,
    pub netns: NetnsRef,
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
    /// The /64 of its instances.
    pub instances6: Ipv6Addr,
    /// The /24 of its instances.
    pub instances4: Ipv4Addr,
}

/// A machine's wire. It holds no state: the kernel does.
#[derive(Debug, Clone)]
pub struct Underlay {
    prefix: String,
    address: UnderlayAddress,
    /// Where the bridge is.
    netns: NetnsRef,
}

impl Underlay {
    /// `prefix` has 2 to 4 characters and begins every link's name.
    pub fn new(prefix: &str, address: UnderlayAddress) -> Result<Self, NetError> {
        check_name(prefix)?;
        if !(2..=4).contains(&prefix.len()) {
            return Err(NetError::Name(prefix.into()));
        }
        Ok(Self { prefix: prefix.into(), address, netns: NetnsRef::Own })
    }

    /// The same wire in another namespace than the machine's own.
    pub fn inside(self, netns: NetnsRef) -> Self {
        Self { netns, ..self }
    }

    fn bridge(&self) -> String {
        format!("{}br0", self.prefix)
    }

    fn port(&self, host: &str) -> String {
        link_name(&format!("{}h", self.prefix), host)
    }

    /// Makes the bridge, or completes it.
    pub async fn create(&self) -> Result<(), NetError> {
        let (bridge, address) = (self.bridge(), self.address);
        aside(self.netns.clone(), "the underlay", move || {
            let hash = fnv(bridge.as_bytes()).to_be_bytes();
            // Locally administered, unicast.
            let hardware = [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]];
            let mut links = Netlink::open()?;
            let link = links.ensure_bridge(&bridge, hardware)?;
            // Hosts are to send everything by way of this machine; a redirect would teach them another way.
            sysctl(&format!("ipv4/conf/{bridge}/send_redirects"), "0")?;
            sysctl(&format!("ipv6/conf/{bridge}/accept_ra"), "0")?;
            links.set_up(link.index, true)?;
            links.ensure_address(link.index, address.address6.into(), address.length6)?;
            links.ensure_address(link.index, address.address4.into(), address.length4)
        })
        .await
    }

    /// Connects a host, or restores what is missing of its connection: links, addresses and routes on both sides.
    pub async fn attach(&self, host: &HostLink) -> Result<(), NetError> {
        let (bridge, port) = (self.bridge(), self.port(&host.host));
        let (address, host) = (self.address, host.clone());
        aside(self.netns.clone(), "the underlay", move || attach(&bridge, &port, address, &host)).await
    }

    /// Takes a host off the wire for good, with its routes.
    pub async fn detach(&self, host: &HostLink) -> Result<(), NetError> {
        let (bridge, port, host) = (self.bridge(), self.port(&host.host), host.clone());
        aside(self.netns.clone(), "the underlay", move || {
            let mut links = Netlink::open()?;
            links.delete_link(&port)?;
            if let Some(bridge) = links.link(&bridge)? {
                for (to, length, via) in host.prefixes() {
                    links.delete_route(Route { to, length, gateway: Some(via), link: bridge.index })?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Cuts a host's cable: nothing passes, in either direction, until it is healed.
    pub async fn cut(&self, host: &str) -> Result<(), NetError> {
        let port = self.port(host);
        aside(self.netns.clone(), "the underlay", move || {
            let mut links = Netlink::open()?;
            let link = links.expect_link(&port)?;
            links.set_up(link.index, false)
        })
        .await
    }

    /// Plugs a cut cable in again, and puts back the routes that went with it.
    pub async fn heal(&self, host: &HostLink) -> Result<(), NetError> {
        self.attach(host).await
    }

    /// Removes every bridge and veth of the machine whose name begins with `prefix`, and so all their addresses and
    /// routes.
    pub async fn destroy(prefix: &str) -> Result<(), NetError> {
        // An empty prefix would be everything.
        Self::new(
            prefix,
            UnderlayAddress {
                address6: Ipv6Addr::UNSPECIFIED,
                length6: 0,
                address4: Ipv4Addr::UNSPECIFIED,
                length4: 0,
            },
        )?;
        let prefix = prefix.to_owned();
        aside(NetnsRef::Own, "the underlay", move || {
            let mut links = Netlink::open()?;
            for link in links.links()? {
                if link.virtual_kind && link.name.starts_with(&prefix) {
                    links.delete_link(&link.name)?;
                }
            }
            Ok(())
        })
        .await
    }
}

impl HostLink {
    /// Its instances' prefixes and the address of its own to send them to.
    fn prefixes(&self) -> [(IpAddr, u8, IpAddr); 2] {
        [(self.instances6.into(), 64, self.address6.into()), (self.instances4.into(), 24, self.address4.into())]
    }
}

fn attach(bridge: &str, port: &str, address: UnderlayAddress, host: &HostLink) -> Result<(), NetError> {
    let mut links = Netlink::open()?;
    let bridge = links.expect_link(bridge)?;
    let netns = host.netns.open()?;
    // A host that was started anew has a new namespace; a link of its name leads to the old one.
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
    let sides: [(IpAddr, u8, IpAddr); 2] = [
        (host.address6.into(), address.length6, address.address6.into()),
        (host.address4.into(), address.length4, address.address4.into()),
    ];
    for (own, length, gateway) in sides {
        inside.ensure_address(uplink.index, own, length)?;
        inside.ensure_route(Route {
            to: everything(gateway),
            length: 0,
            gateway: Some(gateway),
            link: uplink.index,
        })?;
    }
    for (to, length, via) in host.prefixes() {
        links.ensure_route(Route { to, length, gateway: Some(via), link: bridge.index })?;
    }
    Ok(())
}
