//! An instance's network: a namespace with one link, two addresses and a way out.
//!
//! ```text
//!   instance's namespace             host's namespace
//!   eth0  ADDRESS6/128  ──── veth ──── nxi…  fe80::1, 169.254.1.1
//!         ADDRESS4/32                  route ADDRESS6/128, ADDRESS4/32 → nxi…
//!         default via fe80::1, 169.254.1.1
//! ```
//!
//! The gateway addresses are the same for every instance, so an instance learns nothing of its host, and no subnet is
//! spent on links.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, Socket, Type};

use crate::netlink::{Netlink, Route, everything};
use crate::netns::{NetnsRef, aside, create_at, delete_at, enter, is_netns, sysctl};
use crate::{Attempt, NetError, check_name, link_name};

pub(crate) const LINK_PREFIX: &str = "nxi";
pub(crate) const INSIDE: &str = "eth0";
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
pub(crate) const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Where an instance asks for names: its host, whichever that is.
pub const NAMESERVER: Ipv4Addr = GATEWAY4;

/// The addresses of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InstanceAddress {
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
}

/// The instance networks of one host. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct InstanceNet {
    /// Where the namespaces' files are.
    dir: PathBuf,
    host: NetnsRef,
}

impl InstanceNet {
    /// Instances of the host that this process runs on; their namespaces are files in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), host: NetnsRef::Own }
    }

    /// The same for a host whose network namespace is not this process's own.
    pub fn on_host(dir: impl Into<PathBuf>, host: NetnsRef) -> Self {
        Self { dir: dir.into(), host }
    }

    /// Where an instance's namespace is, made or not.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes an instance's network, or completes one that is there, and returns the path of its namespace.
    pub async fn create(&self, name: &str, address: InstanceAddress) -> Result<PathBuf, NetError> {
        check_name(name)?;
        let path = self.path(name);
        let name = name.to_owned();
        let result = path.clone();
        aside(self.host.clone(), "an instance's network", move || create(&name, &path, address)).await?;
        Ok(result)
    }

    /// Removes an instance's network. Harmless when there is none. What still runs in it is cut off.
    pub async fn delete(&self, name: &str) -> Result<(), NetError> {
        check_name(name)?;
        let path = self.path(name);
        let link = link_name(LINK_PREFIX, name);
        aside(self.host.clone(), "an instance's network", move || {
            Netlink::open()?.delete_link(&link)?;
            delete_at(&path)
        })
        .await
    }

    /// A TCP socket in an instance's network, which is not connected yet and does not block: whoever connects it, and wherever, what
    /// it sends is the instance's.
    pub async fn socket(&self, name: &str, ipv6: bool) -> Result<OwnedFd, NetError> {
        check_name(name)?;
        aside(NetnsRef::Path(self.path(name)), "an instance's socket", move || {
            let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
            // Without more of a type, socket2 closes it on exec.
            let socket =
                Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).attempt(|| "opening a socket".into())?;
            socket.set_nonblocking(true).attempt(|| "opening a socket".into())?;
            Ok(socket.into())
        })
        .await
    }

    /// The names of all instance networks that exist here, whole or not, sorted.
    pub async fn list(&self) -> Result<Vec<String>, NetError> {
        let dir = self.dir.clone();
        aside(NetnsRef::Own, "listing instance networks", move || {
            let entries = match fs::read_dir(&dir) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                other => other.attempt(|| format!("listing {}", dir.display()))?,
            };
            let mut names: Vec<String> = entries
                .filter_map(|e| e.ok()?.file_name().into_string().ok())
                .filter(|n| check_name(n).is_ok())
                .collect();
            names.sort();
            Ok(names)
        })
        .await
    }
}

fn create(name: &str, path: &Path, address: InstanceAddress) -> Result<(), NetError> {
    let outside = link_name(LINK_PREFIX, name);
    let host = NetnsRef::Own.open()?;
    let mut host_links = Netlink::open()?;

    if is_netns(path) {
        enter(&NetnsRef::Path(path.to_owned()).open()?)?;
    } else {
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir).attempt(|| format!("making {}", dir.display()))?;
        create_at(path)?;
        // An old link of this name leads to a namespace that is gone.
        host_links.delete_link(&outside)?;
    }
    // Inside. What is made from here on takes these defaults: addresses are usable at once, and none come unasked.
    for key in ["accept_dad", "accept_ra", "accept_redirects"] {
        sysctl(&format!("ipv6/conf/default/{key}"), "0")?;
    }
    let inside = NetnsRef::Own.open()?;
    let mut instance_links = Netlink::open()?;
    let loopback = instance_links.expect_link("lo")?;
    instance_links.set_up(loopback.index, true)?;

    enter(&host)?;
    let port = host_links.ensure_veth(&outside, INSIDE, inside.as_fd())?;
    sysctl(&format!("ipv6/conf/{outside}/accept_ra"), "0")?;
    // No address but the gateway's.
    sysctl(&format!("ipv6/conf/{outside}/addr_gen_mode"), "1")?;
    host_links.ensure_address(port.index, GATEWAY6.into(), 64)?;
    host_links.ensure_address(port.index, GATEWAY4.into(), 32)?;
    host_links.set_up(port.index, true)?;

    let eth0 = instance_links.expect_link(INSIDE)?;
    instance_links.set_up(eth0.index, true)?;
    // With a NIC of a tenant's network, the default route leads there: see `vpc::inside`.
    let tenants = instance_links.policies()?;
    for (own, gateway) in address.pairs() {
        instance_links.ensure_address(eth0.index, own, whole(own))?;
        let to = everything(gateway);
        if tenants.iter().any(|p| p.six == own.is_ipv6()) {
            continue;
        }
        instance_links.ensure_route(Route { to, length: 0, gateway: Some(gateway), link: eth0.index })?;
    }
    for (own, _) in address.pairs() {
        host_links.ensure_route(Route { to: own, length: whole(own), gateway: None, link: port.index })?;
    }
    Ok(())
}

impl InstanceAddress {
    fn pairs(self) -> [(IpAddr, IpAddr); 2] {
        [(self.address6.into(), GATEWAY6.into()), (self.address4.into(), GATEWAY4.into())]
    }
}

/// The prefix length that means this address alone.
fn whole(address: IpAddr) -> u8 {
    if address.is_ipv6() { 128 } else { 32 }
}

/// A host's own network.
#[derive(Debug, Clone, Copy)]
pub struct HostNet;

impl HostNet {
    /// Lets the host forward between its instances and the world, and brings its loopback up.
    pub async fn prepare() -> Result<(), NetError> {
        Self::prepare_in(NetnsRef::Own).await
    }

    /// The same for a host whose network namespace is not this process's own.
    pub async fn prepare_in(netns: NetnsRef) -> Result<(), NetError> {
        aside(netns, "a host's network", || {
            let mut links = Netlink::open()?;
            let loopback = links.expect_link("lo")?;
            links.set_up(loopback.index, true)?;
            sysctl("ipv4/ip_forward", "1")?;
            sysctl("ipv6/conf/all/forwarding", "1")
        })
        .await
    }
}
