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

use crate::NetError;
use crate::cable::{Plugged, Switch, check_prefix};
use crate::netlink::{Netlink, Route, everything};
use crate::netns::{NetnsRef, aside};

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
    switch: Switch,
    address: UnderlayAddress,
}

impl Underlay {
    /// `prefix` has 2 to 4 characters and begins every link's name.
    pub fn new(prefix: &str, address: UnderlayAddress) -> Result<Self, NetError> {
        Ok(Self { switch: Switch::new("the underlay", prefix, "br0", "h")?, address })
    }

    /// The same wire in another namespace than the machine's own.
    pub fn inside(self, netns: NetnsRef) -> Self {
        Self { switch: self.switch.inside(netns), ..self }
    }

    /// Makes the bridge, or completes it.
    pub async fn create(&self) -> Result<(), NetError> {
        // Hosts are to send everything by way of this machine; a redirect would teach them another way.
        // It passes on what instances of one host send to those of another, and nothing else of the machine's is forwarded.
        let settings = &[
            ("ipv4/conf/{}/send_redirects", "0"),
            ("ipv4/conf/{}/forwarding", "1"),
            ("ipv6/conf/{}/accept_ra", "0"),
            ("ipv6/conf/{}/force_forwarding", "1"),
        ];
        let address = self.address;
        let addresses = move |links: &mut Netlink, bridge| {
            links.ensure_address(bridge, address.address6.into(), address.length6)?;
            links.ensure_address(bridge, address.address4.into(), address.length4)
        };
        self.switch.create(settings, addresses).await
    }

    /// Connects a host, or restores what is missing of its connection: links, addresses and routes on both sides.
    pub async fn attach(&self, host: &HostLink) -> Result<(), NetError> {
        let (address, own) = (self.address, host.clone());
        self.switch.plug(&host.host, host.netns.clone(), move |ends| attach(ends, address, &own)).await
    }

    /// Takes a host off the wire for good, with its routes.
    pub async fn detach(&self, host: &HostLink) -> Result<(), NetError> {
        let prefixes = host.prefixes();
        let unroute = move |links: &mut Netlink, link| {
            let mut routes = prefixes.into_iter();
            routes.try_for_each(|(to, length, via)| links.delete_route(Route { to, length, gateway: Some(via), link }))
        };
        self.switch.unplug(&host.host, unroute).await
    }

    /// Cuts a host's cable: nothing passes, in either direction, until it is healed.
    pub async fn cut(&self, host: &str) -> Result<(), NetError> {
        self.switch.join(host, false).await
    }

    /// Plugs a cut cable in again, and puts back the routes that went with it.
    pub async fn heal(&self, host: &HostLink) -> Result<(), NetError> {
        self.attach(host).await
    }

    /// Removes every bridge and veth of the machine whose name begins with `prefix`, and so all their addresses and
    /// routes.
    pub async fn destroy(prefix: &str) -> Result<(), NetError> {
        // An empty prefix would be everything.
        check_prefix(prefix)?;
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

fn attach(mut ends: Plugged, address: UnderlayAddress, host: &HostLink) -> Result<(), NetError> {
    let sides: [(IpAddr, u8, IpAddr); 2] = [
        (host.address6.into(), address.length6, address.address6.into()),
        (host.address4.into(), address.length4, address.address4.into()),
    ];
    for (own, length, gateway) in sides {
        ends.inside.ensure_address(ends.uplink, own, length)?;
        ends.inside.ensure_route(Route {
            to: everything(gateway),
            length: 0,
            gateway: Some(gateway),
            link: ends.uplink,
        })?;
    }
    for (to, length, via) in host.prefixes() {
        ends.outside.ensure_route(Route { to, length, gateway: Some(via), link: ends.bridge })?;
    }
    Ok(())
}
