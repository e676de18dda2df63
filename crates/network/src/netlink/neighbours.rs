//! Who is behind which hardware address, said once and for all: permanent neighbour entries, a tunnel's forwarding entries,
//! and addresses that are answered for (proxies). And addresses of links, as they are.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{Netlink, PROTOCOL, family, is};
use crate::{Attempt, NetError};

/// An address on a link and the hardware address behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Neighbour {
    pub link: u32,
    pub address: IpAddr,
    pub mac: [u8; 6],
}

/// Where a tunnel sends what is for a hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Forward {
    pub mac: [u8; 6],
    pub endpoint: IpAddr,
}

/// One address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkAddress {
    pub link: u32,
    pub address: IpAddr,
    pub length: u8,
}

impl Netlink {
    /// Every address of the namespace's links, and whether it is ours.
    pub fn addresses(&mut self) -> Result<Vec<(LinkAddress, bool)>, NetError> {
        let answers = self
            .request(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)
            .attempt(|| "listing addresses".into())?;
        let one = |answer: &RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
            let (mut local, mut other, mut ours) = (None, None, false);
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(a) => local = Some(*a),
                    AddressAttribute::Address(a) => other = Some(*a),
                    AddressAttribute::Protocol(p) => ours = u8::from(*p) == PROTOCOL,
                    _ => {}
                }
            }
            let address = local.or(other)?;
            Some((LinkAddress { link: message.header.index, address, length: message.header.prefix_len }, ours))
        };
        Ok(answers.iter().filter_map(one).collect())
    }

    /// Gives a link an address of ours, usable at once.
    pub fn put_address(&mut self, of: LinkAddress) -> Result<(), NetError> {
        let mut message = address_message(of);
        if of.address.is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        match self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE) {
            Err(e) if !is(&e, Errno::EEXIST) => {
                Err(e).attempt(|| format!("giving link {} {}/{}", of.link, of.address, of.length))
            }
            _ => Ok(()),
        }
    }

    pub fn take_address(&mut self, of: LinkAddress) -> Result<(), NetError> {
        match self.request(RouteNetlinkMessage::DelAddress(address_message(of)), 0) {
            Err(e) if !is(&e, Errno::EADDRNOTAVAIL) => {
                Err(e).attempt(|| format!("taking {}/{} from link {}", of.address, of.length, of.link))
            }
            _ => Ok(()),
        }
    }

    /// Our permanent neighbour entries, of both families.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, NetError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = NeighbourMessage::default();
            message.header.family = family;
            for found in self.dump_neighbours(message)? {
                let (address, mac) = (address_of(&found), mac_of(&found));
                if let (true, Some(address), Some(mac)) = (ours(&found), address, mac)
                    && found.header.state == NeighbourState::Permanent
                {
                    all.push(Neighbour { link: found.header.ifindex, address, mac });
                }
            }
        }
        Ok(all)
    }

    pub fn put_neighbour(&mut self, of: Neighbour) -> Result<(), NetError> {
        let mut message = neighbour_message(of.link, of.address);
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(of.mac.to_vec()));
        let done = self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE);
        done.map(drop).attempt(|| format!("naming the neighbour {} of link {}", of.address, of.link))
    }

    pub fn take_neighbour(&mut self, of: Neighbour) -> Result<(), NetError> {
        let message = neighbour_message(of.link, of.address);
        self.forget(message).attempt(|| format!("removing the neighbour {} of link {}", of.address, of.link))
    }

    /// What a tunnel's link forwards where.
    pub fn forwards(&mut self, link: u32) -> Result<Vec<Forward>, NetError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        let found = self.dump_neighbours(message)?;
        let one = |found: &NeighbourMessage| {
            let endpoint = address_of(found).filter(|_| found.header.ifindex == link)?;
            Some(Forward { mac: mac_of(found)?, endpoint })
        };
        Ok(found.iter().filter_map(one).collect())
    }

    pub fn put_forward(&mut self, link: u32, of: Forward) -> Result<(), NetError> {
        let mut message = forward_message(link, of);
        message.header.state = NeighbourState::Permanent;
        let done = self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE);
        done.map(drop).attempt(|| format!("leading the tunnel to {}", of.endpoint))
    }

    pub fn take_forward(&mut self, link: u32, of: Forward) -> Result<(), NetError> {
        self.forget(forward_message(link, of)).attempt(|| format!("leading the tunnel no more to {}", of.endpoint))
    }

    /// Which addresses are answered for by us on which links.
    pub fn proxies(&mut self) -> Result<Vec<(u32, IpAddr)>, NetError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = NeighbourMessage::default();
            message.header.family = family;
            message.header.flags = NeighbourFlags::Proxy;
            for found in self.dump_neighbours(message)? {
                if let (true, Some(address)) = (ours(&found), address_of(&found)) {
                    all.push((found.header.ifindex, address));
                }
            }
        }
        Ok(all)
    }

    pub fn put_proxy(&mut self, link: u32, address: IpAddr) -> Result<(), NetError> {
        let mut message = neighbour_message(link, address);
        message.header.flags = NeighbourFlags::Proxy;
        let done = self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE);
        done.map(drop).attempt(|| format!("answering for {address} on link {link}"))
    }

    pub fn take_proxy(&mut self, link: u32, address: IpAddr) -> Result<(), NetError> {
        let mut message = neighbour_message(link, address);
        message.header.flags = NeighbourFlags::Proxy;
        self.forget(message).attempt(|| format!("answering no more for {address} on link {link}"))
    }

    fn dump_neighbours(&mut self, message: NeighbourMessage) -> Result<Vec<NeighbourMessage>, NetError> {
        let answers = self
            .request(RouteNetlinkMessage::GetNeighbour(message), NLM_F_DUMP)
            .attempt(|| "listing neighbours".into())?;
        let one = |answer| match answer {
            RouteNetlinkMessage::NewNeighbour(found) => Some(found),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(one).collect())
    }

    fn forget(&mut self, message: NeighbourMessage) -> std::io::Result<()> {
        match self.request(RouteNetlinkMessage::DelNeighbour(message), 0) {
            Err(e) if is(&e, Errno::ENOENT) => Ok(()),
            other => other.map(drop),
        }
    }
}

fn address_message(of: LinkAddress) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = of.link;
    message.header.prefix_len = of.length;
    message.header.family = family(of.address);
    if let IpAddr::V4(v4) = of.address
        && v4.is_link_local()
    {
        message.header.scope = AddressScope::Link;
    }
    message.attributes.push(AddressAttribute::Local(of.address));
    message.attributes.push(AddressAttribute::Address(of.address));
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    message
}

fn neighbour_message(link: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = link;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message.attributes.push(NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    message
}

fn forward_message(link: u32, of: Forward) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = link;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(of.mac.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(of.endpoint.into()));
    message
}

fn ours(message: &NeighbourMessage) -> bool {
    let protocol = |a: &NeighbourAttribute| match a {
        NeighbourAttribute::Protocol(p) => u8::from(*p) == PROTOCOL,
        _ => false,
    };
    message.attributes.iter().any(protocol)
}

fn address_of(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => Some(IpAddr::V4(*a)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => Some(IpAddr::V6(*a)),
        // A tunnel's entries have the address of a host in a message of no address family.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            _ => None,
        },
        _ => None,
    })
}

fn mac_of(message: &NeighbourMessage) -> Option<[u8; 6]> {
    message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    })
}
