//! A small, blocking rtnetlink client: one socket, one request at a time, each answered or timed out.
//!
//! The socket belongs to the network namespace in which its thread was when it was opened, wherever the thread goes
//! later. Messages are encoded by `netlink-packet-route`; this file and those beneath it decide only which ones are sent:
//! `links`, `routes`, `neighbours`, `policy` (rules that choose a routing table) `shape` (rate limits) and `share` (who goes first).
//!
//! What tenants' networks put into a namespace that is not theirs alone bears [`PROTOCOL`], so that it is told from others'.

mod links;
mod neighbours;
mod policy;
mod routes;
mod shape;
mod share;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily as SocketFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::{Attempt, NetError};

pub(crate) use links::{LinkKind, LinkState, VethEnd, Vxlan};
pub(crate) use neighbours::{Forward, LinkAddress, Neighbour};
pub(crate) use policy::{Policy, Then};
pub(crate) use routes::{MAIN, RouteKind, RouteState};
pub(crate) use shape::Limit;
pub(crate) use share::Class;

/// Who made a route, a rule, an address or a neighbour entry (`RTA_PROTOCOL` and its likes): a number of rtnetlink(7) that
/// no routing daemon uses.
pub(crate) const PROTOCOL: u8 = 156;

/// The kernel answers in microseconds; this only keeps a broken one from holding a thread for ever.
const ANSWER_SECONDS: i64 = 10;

/// A link as far as this room cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    /// Made by this room's kind of request: a bridge or a veth.
    pub virtual_kind: bool,
}

/// A route in the main table. Without a gateway the destination is on the link itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub to: IpAddr,
    pub length: u8,
    pub gateway: Option<IpAddr>,
    pub link: u32,
}

pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// A client of the calling thread's network namespace.
    pub fn open() -> Result<Self, NetError> {
        let make = || -> nix::Result<OwnedFd> {
            let fd = socket(SocketFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
            setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_SECONDS))?;
            Ok(fd)
        };
        let socket = make().attempt(|| "opening a netlink socket".into())?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; 64 << 10] })
    }

    /// Sends one request and collects what is answered until its end.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;

        let mut answers = Vec::new();
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                other => other?,
            };
            let mut rest = &self.buffer[..length];
            while rest.len() >= 16 {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
                let step = (answer.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
                rest = &rest[step..];
                // An answer to a request that was given up earlier.
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(e) => return Err(io::Error::from_raw_os_error(e.raw_code().abs())),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }

    /// Every link of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>, NetError> {
        let answers = self
            .request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .attempt(|| "listing links".into())?;
        Ok(answers.iter().filter_map(link_of).collect())
    }

    /// The link of this name, if there is one.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.request(RouteNetlinkMessage::GetLink(message), 0) {
            Ok(answers) => Ok(answers.iter().find_map(link_of)),
            Err(e) if is(&e, Errno::ENODEV) => Ok(None),
            Err(e) => Err(e).attempt(|| format!("looking for the link {name}")),
        }
    }

    /// As [`Self::link`], for links that must be there.
    pub fn expect_link(&mut self, name: &str) -> Result<Link, NetError> {
        let found = self.link(name)?.ok_or_else(|| io::Error::from(Errno::ENODEV));
        found.attempt(|| format!("looking for the link {name}"))
    }

    /// A veth pair, its peer made inside another namespace from the start: moving it there would cost 60 times as much.
    /// A pair that is there already is left as it is.
    pub fn ensure_veth(&mut self, name: &str, peer: &str, peer_netns: BorrowedFd<'_>) -> Result<Link, NetError> {
        if let Some(link) = self.link(name)? {
            return Ok(link);
        }
        let mut inside = LinkMessage::default();
        inside.attributes.push(LinkAttribute::IfName(peer.to_owned()));
        inside.attributes.push(LinkAttribute::NetNsFd(peer_netns.as_raw_fd()));
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inside))),
        ]));
        match self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL) {
            Err(e) if !is(&e, Errno::EEXIST) => Err(e).attempt(|| format!("making the links {name} and {peer}")),
            _ => self.expect_link(name),
        }
    }

    /// A bridge with a hardware address of its own: else it would change with its ports, and neighbours would send to
    /// the old one for seconds.
    pub fn ensure_bridge(&mut self, name: &str, hardware: [u8; 6]) -> Result<Link, NetError> {
        if let Some(link) = self.link(name)? {
            return Ok(link);
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::Address(hardware.to_vec()));
        // Without a querier, snooping loses neighbour discovery.
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)])),
        ]));
        match self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL) {
            Err(e) if !is(&e, Errno::EEXIST) => Err(e).attempt(|| format!("making the bridge {name}")),
            _ => self.expect_link(name),
        }
    }

    /// Removes a link (and a veth's peer with it). One that is not there is fine.
    pub fn delete_link(&mut self, name: &str) -> Result<(), NetError> {
        let Some(link) = self.link(name)? else { return Ok(()) };
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        match self.request(RouteNetlinkMessage::DelLink(message), 0) {
            Err(e) if !is(&e, Errno::ENODEV) => Err(e).attempt(|| format!("removing the link {name}")),
            _ => Ok(()),
        }
    }

    pub fn set_up(&mut self, link: u32, up: bool) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        let done = self.request(RouteNetlinkMessage::SetLink(message), 0);
        done.map(drop).attempt(|| format!("setting link {link} {}", if up { "up" } else { "down" }))
    }

    /// Makes a link a port of a bridge.
    pub fn set_bridge(&mut self, link: u32, bridge: u32) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.attributes.push(LinkAttribute::Controller(bridge));
        let done = self.request(RouteNetlinkMessage::SetLink(message), 0);
        done.map(drop).attempt(|| format!("adding link {link} to bridge {bridge}"))
    }

    /// Gives a link an address that is usable at once: without duplicate address detection.
    pub fn ensure_address(&mut self, link: u32, address: IpAddr, length: u8) -> Result<(), NetError> {
        let mut message = AddressMessage::default();
        message.header.index = link;
        message.header.prefix_len = length;
        message.header.family = family(address);
        if let IpAddr::V4(v4) = address
            && v4.is_link_local()
        {
            message.header.scope = AddressScope::Link;
        }
        if address.is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        match self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE) {
            Err(e) if !is(&e, Errno::EEXIST) => Err(e).attempt(|| format!("giving link {link} {address}/{length}")),
            _ => Ok(()),
        }
    }

    /// Puts a route into the main table, in place of one to the same destination.
    pub fn ensure_route(&mut self, route: Route) -> Result<(), NetError> {
        let message = route_message(route);
        let done = self.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE);
        done.map(drop).attempt(|| format!("routing {}/{} to link {}", route.to, route.length, route.link))
    }

    /// Removes a route; one that is not there is fine.
    pub fn delete_route(&mut self, route: Route) -> Result<(), NetError> {
        match self.request(RouteNetlinkMessage::DelRoute(route_message(route)), 0) {
            Err(e) if !is(&e, Errno::ESRCH) => {
                Err(e).attempt(|| format!("removing the route to {}/{}", route.to, route.length))
            }
            _ => Ok(()),
        }
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn link_of(message: &RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let name = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let virtual_kind = link.attributes.iter().any(|a| match a {
        LinkAttribute::LinkInfo(infos) => {
            infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Veth | InfoKind::Bridge)))
        }
        _ => false,
    });
    Some(Link { index: link.header.index, name, virtual_kind })
}

fn route_message(route: Route) -> RouteMessage {
    let wrap = |address: IpAddr| match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    };
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.to);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.destination_prefix_length = route.length;
    message.header.scope =
        if route.gateway.is_none() && route.to.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    if route.length > 0 {
        message.attributes.push(RouteAttribute::Destination(wrap(route.to)));
    }
    if let Some(gateway) = route.gateway {
        // The gateway need not be within a subnet of the link.
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(wrap(gateway)));
    }
    message.attributes.push(RouteAttribute::Oif(route.link));
    message
}

/// The default route's destination in the family of `gateway`.
pub(crate) fn everything(gateway: IpAddr) -> IpAddr {
    if gateway.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}
