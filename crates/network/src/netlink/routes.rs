//! Routes of any table, with all that tenants' networks say in one.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{Netlink, PROTOCOL, everything, family, is};
use crate::{Attempt, NetError};

/// The routing table that is looked at without rules.
pub(crate) const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// One route. What is the same in the first three fields is the same route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RouteState {
    pub table: u32,
    pub to: IpAddr,
    pub length: u8,
    pub kind: RouteKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RouteKind {
    Unicast {
        link: u32,
        /// The next hop, on the link whatever its addresses are. IPv6 also for a route of IPv4 (RFC 5549).
        via: Option<IpAddr>,
        /// Which of its addresses the namespace uses when it sends this way.
        source: Option<IpAddr>,
        mtu: Option<u32>,
    },
    /// To the namespace itself, by the link `lo`.
    Local {
        link: u32,
    },
    /// Answered by an ICMP error.
    Unreachable,
    Blackhole,
    /// Somebody else's kind.
    Other,
}

impl Netlink {
    /// All routes of both families but for those that the kernel makes by itself, and whether each is ours.
    pub fn route_states(&mut self) -> Result<Vec<(RouteState, bool)>, NetError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers =
                self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP).attempt(|| "listing routes".into())?;
            for answer in answers {
                if let RouteNetlinkMessage::NewRoute(route) = answer
                    && !matches!(route.header.protocol, RouteProtocol::Kernel)
                    // What the kernel has learnt of a route, such as a smaller MTU on the way.
                    && !route.header.flags.contains(RouteFlags::Cloned)
                {
                    all.push((state_of(&route), u8::from(route.header.protocol) == PROTOCOL));
                }
            }
        }
        Ok(all)
    }

    /// Adds a route of ours, in place of one to the same destination in the same table, or else refusing to be beside it.
    pub fn put_route(&mut self, route: &RouteState, replace: bool) -> Result<(), NetError> {
        let message = message_of(route);
        let flags = if replace { NLM_F_REPLACE } else { NLM_F_EXCL };
        let done = self.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | flags);
        done.map(drop).attempt(|| format!("adding the route to {}/{} in table {}", route.to, route.length, route.table))
    }

    /// Removes a route of ours; one that is not there is fine.
    pub fn take_route(&mut self, route: &RouteState) -> Result<(), NetError> {
        match self.request(RouteNetlinkMessage::DelRoute(message_of(route)), 0) {
            Err(e) if !is(&e, Errno::ESRCH) => Err(e)
                .attempt(|| format!("removing the route to {}/{} in table {}", route.to, route.length, route.table)),
            _ => Ok(()),
        }
    }
}

fn wrap(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

fn unwrap(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn message_of(route: &RouteState) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.to);
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.destination_prefix_length = route.length;
    message.header.kind = match route.kind {
        RouteKind::Unicast { .. } | RouteKind::Other => RouteType::Unicast,
        RouteKind::Local { .. } => RouteType::Local,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Blackhole => RouteType::BlackHole,
    };
    message.attributes.push(RouteAttribute::Table(route.table));
    if route.length > 0 {
        message.attributes.push(RouteAttribute::Destination(wrap(route.to)));
    }
    if let RouteKind::Local { link } = route.kind {
        message.header.scope = RouteScope::Host;
        message.attributes.push(RouteAttribute::Oif(link));
    }
    if let RouteKind::Unicast { link, via, source, mtu } = route.kind {
        if via.is_none() && route.to.is_ipv4() {
            message.header.scope = RouteScope::Link;
        }
        if let Some(via) = via {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(match via {
                IpAddr::V6(v6) if route.to.is_ipv4() => RouteAttribute::Via(RouteVia::Inet6(v6)),
                same => RouteAttribute::Gateway(wrap(same)),
            });
        }
        message.attributes.push(RouteAttribute::Oif(link));
        message.attributes.extend(source.map(|s| RouteAttribute::PrefSource(wrap(s))));
        message.attributes.extend(mtu.map(|m| RouteAttribute::Metrics(vec![RouteMetric::Mtu(m)])));
    }
    message
}

fn state_of(message: &RouteMessage) -> RouteState {
    let any = everything(match message.header.address_family {
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => std::net::Ipv4Addr::UNSPECIFIED.into(),
    });
    let (mut table, mut to) = (u32::from(message.header.table), any);
    let (mut link, mut via, mut source, mut mtu) = (0, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Destination(a) => to = unwrap(a).unwrap_or(any),
            RouteAttribute::Oif(l) => link = *l,
            RouteAttribute::Gateway(a) => via = unwrap(a),
            RouteAttribute::Via(RouteVia::Inet6(a)) => via = Some((*a).into()),
            RouteAttribute::Via(RouteVia::Inet(a)) => via = Some((*a).into()),
            RouteAttribute::PrefSource(a) => source = unwrap(a),
            RouteAttribute::Metrics(all) => {
                mtu = all.iter().find_map(|m| match m {
                    RouteMetric::Mtu(m) => Some(*m),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast { link, via, source, mtu },
        RouteType::Local => RouteKind::Local { link },
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::BlackHole => RouteKind::Blackhole,
        _ => RouteKind::Other,
    };
    RouteState { table, to, length: message.header.destination_prefix_length, kind }
}
