//! A bridge and the cables to it: what the wire between hosts and the wire between regions have in common.
//!
//! ```text
//!   the bridge's namespace              another namespace
//!   PREFIX…0 ── PREFIX…  ════ veth ════  uplink
//! ```

use std::os::fd::AsFd;

use crate::netlink::Netlink;
use crate::netns::{NetnsRef, aside, enter, sysctl};
use crate::{NetError, check_name, fnv, link_name};

const UPLINK: &str = "uplink";

/// A bridge that other namespaces are plugged into. It holds no state: the kernel does.
#[derive(Debug, Clone)]
pub(crate) struct Switch {
    /// What it is to its users, for errors.
    what: &'static str,
    /// The bridge's name, and how the names of its ports begin.
    bridge: String,
    ports: String,
    /// Where the bridge is.
    netns: NetnsRef,
}

/// Both ends of a cable that is plugged in. The work's thread is inside, at the far end.
pub(crate) struct Plugged {
    /// The bridge's namespace, and the bridge in it.
    pub outside: Netlink,
    pub bridge: u32,
    /// The other namespace, and the cable's end in it.
    pub inside: Netlink,
    pub uplink: u32,
}

/// `prefix` has 2 to 4 characters and begins every link's name.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), NetError> {
    check_name(prefix)?;
    if (2..=4).contains(&prefix.len()) { Ok(()) } else { Err(NetError::Name(prefix.into())) }
}

impl Switch {
    /// A bridge PREFIX`bridge` whose ports begin with PREFIX`port`, in this process's namespace.
    pub fn new(what: &'static str, prefix: &str, bridge: &str, port: &str) -> Result<Self, NetError> {
        check_prefix(prefix)?;
        let (bridge, ports) = (format!("{prefix}{bridge}"), format!("{prefix}{port}"));
        Ok(Self { what, bridge, ports, netns: NetnsRef::Own })
    }

    /// The same in another namespace.
    pub fn inside(self, netns: NetnsRef) -> Self {
        Self { netns, ..self }
    }

    fn port(&self, name: &str) -> String {
        link_name(&self.ports, name)
    }

    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        aside(self.netns.clone(), self.what, work).await
    }

    /// Makes the bridge, or completes it: with these values under /proc/sys/net, in which `{}` is its name, and with what
    /// `more` does to it once it is up.
    pub async fn create(
        &self,
        settings: &'static [(&'static str, &'static str)],
        more: impl FnOnce(&mut Netlink, u32) -> Result<(), NetError> + Send + 'static,
    ) -> Result<(), NetError> {
        let bridge = self.bridge.clone();
        self.aside(move || {
            let hash = fnv(bridge.as_bytes()).to_be_bytes();
            // Locally administered, unicast.
            let hardware = [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]];
            let mut links = Netlink::open()?;
            let link = links.ensure_bridge(&bridge, hardware)?;
            for (key, value) in settings {
                sysctl(&key.replace("{}", &bridge), value)?;
            }
            links.set_up(link.index, true)?;
            more(&mut links, link.index)
        })
        .await
    }

    /// Plugs a namespace in, or restores what is missing of its cable, and then does `more` with both ends.
    pub async fn plug(
        &self,
        name: &str,
        netns: NetnsRef,
        more: impl FnOnce(Plugged) -> Result<(), NetError> + Send + 'static,
    ) -> Result<(), NetError> {
        let (bridge, port) = (self.bridge.clone(), self.port(name));
        self.aside(move || more(plug(&bridge, &port, &netns)?)).await
    }

    /// Takes a cable away for good, harmless when it is not there, and then does `more` if the bridge still stands.
    pub async fn unplug(
        &self,
        name: &str,
        more: impl FnOnce(&mut Netlink, u32) -> Result<(), NetError> + Send + 'static,
    ) -> Result<(), NetError> {
        let (bridge, port) = (self.bridge.clone(), self.port(name));
        self.aside(move || {
            let mut links = Netlink::open()?;
            links.delete_link(&port)?;
            match links.link(&bridge)? {
                Some(bridge) => more(&mut links, bridge.index),
                None => Ok(()),
            }
        })
        .await
    }

    /// Cuts a cable, or joins it again. Cut, nothing passes in either direction.
    pub async fn join(&self, name: &str, joined: bool) -> Result<(), NetError> {
        let port = self.port(name);
        self.aside(move || {
            let mut links = Netlink::open()?;
            let link = links.expect_link(&port)?;
            links.set_up(link.index, joined)
        })
        .await
    }
}

fn plug(bridge: &str, port: &str, netns: &NetnsRef) -> Result<Plugged, NetError> {
    let mut outside = Netlink::open()?;
    let bridge = outside.expect_link(bridge)?.index;
    let netns = netns.open()?;
    // Who was started anew has a new namespace; a link of its name leads to the old one.
    let here = NetnsRef::Own.open()?;
    enter(&netns)?;
    let mut inside = Netlink::open()?;
    let connected = inside.link(UPLINK)?.is_some();
    enter(&here)?;
    if !connected {
        outside.delete_link(port)?;
    }
    let outer = outside.ensure_veth(port, UPLINK, netns.as_fd())?;
    outside.set_bridge(outer.index, bridge)?;
    sysctl(&format!("ipv6/conf/{port}/addr_gen_mode"), "1")?;
    outside.set_up(outer.index, true)?;

    enter(&netns)?;
    let loopback = inside.expect_link("lo")?;
    inside.set_up(loopback.index, true)?;
    let uplink = inside.expect_link(UPLINK)?.index;
    for key in ["accept_ra", "accept_dad", "accept_redirects"] {
        sysctl(&format!("ipv6/conf/{UPLINK}/{key}"), "0")?;
    }
    inside.set_up(uplink, true)?;
    Ok(Plugged { outside, bridge, inside, uplink })
}
