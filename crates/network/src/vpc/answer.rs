//! DHCP and router discovery, answered on the host of each NIC by what the plan says of it: for workloads that set up their
//! links themselves, such as virtual machines. Nobody else is asked, so it goes on while all servers are away.
//!
//! One task of the agent keeps one small server for each network that has a NIC here. It listens in the network's namespace,
//! where the packet filter lets through no more than a few questions a second of each NIC, and answers by the link on which a
//! question came: a NIC is told its own addresses, whatever it says of itself.

pub mod dhcp4;
pub mod dhcp6;
pub mod ra;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use nexus_model::Uid;
use nexus_model::plan::{HostNetworks, Mac, NetworkPlan};
use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::{links, rules};
use crate::instance::NAMESERVER;
use crate::netlink::Netlink;
use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError};

/// Questions are of one packet of a usual link.
const MAX_QUESTION: usize = 1500;
/// New links are looked for so often; a question from an unknown one makes it look at once, but not more often than this.
const LOOK: Duration = Duration::from_secs(2);
const LOOK_AT_LEAST: Duration = Duration::from_millis(100);
/// Routers say unasked that they are there (RFC 4861 allows up to 30 minutes).
const ADVERTISE: Duration = Duration::from_secs(600);
/// For a namespace that is not there yet.
const RETRY: Duration = Duration::from_millis(500);

/// What one NIC is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub mac: Mac,
    pub four: Option<Lease4>,
    pub address6: Option<Ipv6Addr>,
    pub mtu: u16,
    /// It is its instance's first: the default route leads to it.
    pub first: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease4 {
    pub address: Ipv4Addr,
    /// Of the subnet.
    pub length: u8,
    pub gateway: Ipv4Addr,
    pub nameserver: Ipv4Addr,
}

/// The leases of a network's NICs on this host, by the NICs' links.
pub fn leases(hosts: &HostNetworks, plan: &NetworkPlan) -> BTreeMap<String, Lease> {
    let lease = |nic: &nexus_model::plan::NicPlan| {
        let subnet = plan.subnets.get(nic.subnet as usize)?;
        let four = || {
            let (address, gateway) = (nic.address4?, subnet.gateway4?);
            Some(Lease4 { address, length: subnet.cidr4?.length, gateway, nameserver: NAMESERVER })
        };
        let first = nic.at.as_ref().is_some_and(|at| at.index == 0);
        let lease = Lease { mac: nic.mac, four: four(), address6: nic.address6, mtu: plan.mtu, first };
        Some((links::nic(nic.uid), lease))
    };
    rules::local(hosts, plan).filter_map(lease).collect()
}

type Leases = BTreeMap<String, Lease>;

/// Serves the NICs of all networks of this host, for ever or until it is dropped. `netns` says where a network's namespace is.
pub async fn run(mut networks: watch::Receiver<Arc<HostNetworks>>, netns: impl Fn(Uid) -> NetnsRef + Send) {
    let mut servers: HashMap<Uid, (watch::Sender<Leases>, tokio::task::AbortHandle)> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let wanted = networks.borrow_and_update().clone();
        let mut gone: Vec<Uid> = servers.keys().copied().collect();
        for plan in &wanted.networks {
            let leases = leases(&wanted, plan);
            if leases.is_empty() {
                continue;
            }
            gone.retain(|uid| *uid != plan.uid);
            if let Some((told, _)) = servers.get(&plan.uid) {
                told.send_if_modified(|old| std::mem::replace(old, leases.clone()) != leases);
            } else {
                let (told, heard) = watch::channel(leases);
                let task = tasks.spawn(serve(netns(plan.uid), heard));
                servers.insert(plan.uid, (told, task));
            }
        }
        for (_, task) in gone.iter().filter_map(|uid| servers.remove(uid)) {
            task.abort();
        }
        loop {
            tokio::select! {
                biased;
                changed = networks.changed() => match changed {
                    Ok(()) => break,
                    // Nobody tells anything new: what is known goes on.
                    Err(_) => {
                        while tasks.join_next().await.is_some() {}
                        return;
                    }
                },
                Some(_) = tasks.join_next() => {}
            }
        }
    }
}

/// Serves one network's NICs.
pub async fn serve(netns: NetnsRef, mut leases: watch::Receiver<Leases>) {
    let mut told = false;
    loop {
        let error = match Server::open(&netns).await {
            Ok(mut server) => match server.run(&netns, &mut leases).await {
                Ok(()) => return,
                Err(error) => error,
            },
            Err(error) => error,
        };
        if !told {
            told = true;
            tracing::debug!(%error, "DHCP of a network can't be answered yet; trying again");
        }
        sleep(RETRY).await;
    }
}

struct Server {
    four: AsyncFd<Socket>,
    six: AsyncFd<Socket>,
    routers: AsyncFd<Socket>,
    /// By the links' numbers.
    links: BTreeMap<u32, String>,
    looked: Option<Instant>,
}

impl Server {
    async fn open(netns: &NetnsRef) -> Result<Self, NetError> {
        let opened = aside(netns.clone(), "a network's DHCP", || {
            let open = || -> io::Result<[Socket; 3]> {
                let four = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
                four.set_reuse_address(true)?;
                four.set_broadcast(true)?;
                setsockopt(&four, sockopt::Ipv4PacketInfo, &true)?;
                four.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, dhcp4::SERVER_PORT).into())?;
                let six = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
                six.set_only_v6(true)?;
                six.set_reuse_address(true)?;
                six.bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, dhcp6::SERVER_PORT, 0, 0).into())?;
                let routers = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
                routers.set_multicast_hops_v6(255)?;
                routers.set_unicast_hops_v6(255)?;
                routers.set_multicast_loop_v6(false)?;
                for socket in [&four, &six, &routers] {
                    socket.set_nonblocking(true)?;
                }
                Ok([four, six, routers])
            };
            open().attempt(|| "opening the sockets of a network's DHCP".into())
        });
        let [four, six, routers] = opened.await?;
        // SAFETY: a socket that is owned is the same open file until it is dropped, and `AsyncFd` keeps it.
        let ready = |s| unsafe { AsyncFd::register(s) }.attempt(|| "waiting for DHCP's questions".into());
        Ok(Self {
            four: ready(four)?,
            six: ready(six)?,
            routers: ready(routers)?,
            links: BTreeMap::new(),
            looked: None,
        })
    }

    /// Until something fails.
    async fn run(&mut self, netns: &NetnsRef, leases: &mut watch::Receiver<Leases>) -> Result<(), NetError> {
        let mut look = interval(LOOK);
        let mut advertise = interval(ADVERTISE);
        for tick in [&mut look, &mut advertise] {
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let [mut four, mut six, mut router] = [[0; MAX_QUESTION]; 3];
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                changed = leases.changed(), if open => open = changed.is_ok(),
                _ = look.tick() => {
                    let now = leases.borrow().clone();
                    self.look(netns, &now).await?;
                }
                _ = advertise.tick() => {
                    for (&index, link) in &self.links {
                        if let Some(lease) = leases.borrow().get(link) {
                            self.advertise(index, lease);
                        }
                    }
                }
                heard = hear4(&self.four, &mut four) => {
                    let (length, index, from) = heard.attempt(|| "hearing DHCP's questions".into())?;
                    if let Some(lease) = self.lease(netns, leases, index).await? {
                        self.answer4(&four[..length], index, from, &lease);
                    }
                }
                heard = hear6(&self.six, &mut six) => {
                    let (length, from) = heard.attempt(|| "hearing DHCPv6's questions".into())?;
                    if let Some(lease) = self.lease(netns, leases, from.scope_id()).await?
                        && let Some(answer) = dhcp6::answer(&six[..length], &lease)
                    {
                        // Who does not hear it asks again.
                        let _ = self.six.get_ref().send_to(&answer, &from.into());
                    }
                }
                heard = hear6(&self.routers, &mut router) => {
                    let (length, from) = heard.attempt(|| "hearing router solicitations".into())?;
                    if ra::is_solicitation(&router[..length])
                        && let Some(lease) = self.lease(netns, leases, from.scope_id()).await?
                    {
                        self.advertise(from.scope_id(), &lease);
                    }
                }
            }
        }
    }

    async fn lease(
        &mut self,
        netns: &NetnsRef,
        leases: &watch::Receiver<Leases>,
        index: u32,
    ) -> Result<Option<Lease>, NetError> {
        let all = leases.borrow().clone();
        if !self.links.contains_key(&index) && self.looked.is_none_or(|at| at.elapsed() >= LOOK_AT_LEAST) {
            self.look(netns, &all).await?;
        }
        Ok(self.links.get(&index).and_then(|link| all.get(link)).cloned())
    }

    /// Finds links that came and forgets those that went. NICs that are new are told of their router.
    async fn look(&mut self, netns: &NetnsRef, leases: &Leases) -> Result<(), NetError> {
        self.looked = Some(Instant::now());
        let all = aside(netns.clone(), "a network's links", || Netlink::open()?.links()).await?;
        let found: BTreeMap<u32, String> =
            all.into_iter().filter(|l| l.name.starts_with(links::NIC_PREFIX)).map(|l| (l.index, l.name)).collect();
        for (&index, link) in found.iter().filter(|(index, _)| !self.links.contains_key(index)) {
            // It may be gone again, or have been joined before this agent's restart: then nothing is lost.
            let _ = self.six.get_ref().join_multicast_v6(&dhcp6::SERVERS, index);
            if let Some(lease) = leases.get(link) {
                self.advertise(index, lease);
            }
        }
        self.links = found;
        Ok(())
    }

    fn advertise(&self, index: u32, lease: &Lease) {
        if lease.address6.is_some() {
            let to = SocketAddrV6::new(ra::ALL_NODES, 0, 0, index);
            // A link that is just being made has no address yet; the NIC asks.
            let _ = self.routers.get_ref().send_to(&ra::advertisement(lease), &to.into());
        }
    }

    fn answer4(&self, question: &[u8], index: u32, from: SocketAddrV4, lease: &Lease) {
        let Some(answer) = dhcp4::answer(question, lease) else { return };
        let Some(four) = lease.four else { return };
        // Who has its address is answered there; all others hear what is for everybody on their link.
        let has = *from.ip() == four.address && answer.unicast;
        let to = if has { four.address } else { Ipv4Addr::BROADCAST };
        let info = libc::in_pktinfo {
            ipi_ifindex: index as i32,
            ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(four.gateway.octets()) },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        let to = SockaddrIn::from(SocketAddrV4::new(to, dhcp4::CLIENT_PORT));
        let parts = [io::IoSlice::new(&answer.bytes)];
        let fd = self.four.get_ref().as_raw_fd();
        // Who does not hear it asks again.
        let _ = sendmsg(fd, &parts, &[ControlMessage::Ipv4PacketInfo(&info)], MsgFlags::MSG_DONTWAIT, Some(&to));
    }
}

/// A question with the link that it came by.
async fn hear4(socket: &AsyncFd<Socket>, buffer: &mut [u8]) -> io::Result<(usize, u32, SocketAddrV4)> {
    loop {
        let mut ready = socket.readable().await?;
        let heard = ready.try_io(|fd| {
            let mut space = nix::cmsg_space!(libc::in_pktinfo);
            let mut parts = [io::IoSliceMut::new(buffer)];
            let fd = fd.as_fd().as_raw_fd();
            let message = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
            let index = message.cmsgs()?.find_map(|c| match c {
                ControlMessageOwned::Ipv4PacketInfo(info) => Some(info.ipi_ifindex as u32),
                _ => None,
            });
            let from = message.address.map_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0), SocketAddrV4::from);
            Ok((message.bytes, index.unwrap_or(0), from))
        });
        match heard {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// A question with where it came from; the link is in the address's scope.
async fn hear6(socket: &AsyncFd<Socket>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddrV6)> {
    loop {
        let mut ready = socket.readable().await?;
        let heard = ready.try_io(|fd| receive_from(fd.get_ref(), buffer));
        match heard {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

fn receive_from(socket: &Socket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddrV6)> {
    use nix::sys::socket::{SockaddrIn6, recvfrom};
    let (length, from) = recvfrom::<SockaddrIn6>(socket.as_raw_fd(), buffer)?;
    match from.map(|a| SocketAddr::V6(a.into())) {
        Some(SocketAddr::V6(from)) => Ok((length, from)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
