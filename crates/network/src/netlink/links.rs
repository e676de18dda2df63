//! Links as they are, whole; and such as are made whole in one request: veth pairs over two namespaces, tunnels.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use nix::errno::Errno;

use super::{Netlink, is};
use crate::{Attempt, NetError};

/// One link with what tenants' networks care for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinkState {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub kind: LinkKind,
    /// Of a veth: the other end's index, and how this namespace numbers the one that it is in, if that is another.
    pub peer: Option<u32>,
    pub peer_netns: Option<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LinkKind {
    Veth,
    Vxlan(Vxlan),
    Other,
}

/// A tunnel that neither learns nor floods (RFC 7348).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vxlan {
    pub vni: u32,
    /// Where it ends on this host.
    pub local: IpAddr,
    pub port: u16,
}

/// One end of a veth pair that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VethEnd<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
    pub mtu: u32,
    /// Links of one group can be removed in one request.
    pub group: u32,
    pub up: bool,
}

impl VethEnd<'_> {
    fn message(&self) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(self.name.to_owned()));
        message.attributes.push(LinkAttribute::Address(self.mac.to_vec()));
        message.attributes.push(LinkAttribute::Mtu(self.mtu));
        message.attributes.push(LinkAttribute::Group(self.group));
        if self.up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        message
    }
}

impl Netlink {
    /// Every link of the namespace.
    pub fn link_states(&mut self) -> Result<Vec<LinkState>, NetError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let answers =
            self.request(RouteNetlinkMessage::GetLink(message), NLM_F_DUMP).attempt(|| "listing links".into())?;
        Ok(answers.iter().filter_map(state_of).collect())
    }

    /// The link of this name, if there is one.
    pub fn link_state(&mut self, name: &str) -> Result<Option<LinkState>, NetError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        match self.request(RouteNetlinkMessage::GetLink(message), 0) {
            Ok(answers) => Ok(answers.iter().find_map(state_of)),
            Err(e) if is(&e, Errno::ENODEV) => Ok(None),
            Err(e) => Err(e).attempt(|| format!("looking for the link {name}")),
        }
    }

    /// A veth pair, whole: the other end in another namespace from the start.
    pub fn add_veth(&mut self, here: &VethEnd, there: &VethEnd, netns: BorrowedFd<'_>) -> Result<(), NetError> {
        let mut peer = there.message();
        peer.attributes.push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
        let mut message = here.message();
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        let done = self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL);
        done.map(drop).attempt(|| format!("making the links {} and {}", here.name, there.name))
    }

    /// A tunnel that is in another namespace from the start, with its socket in the one of this client. Harmless when a
    /// tunnel of that number is there already: then the answer is no.
    pub fn add_vxlan(
        &mut self,
        name: &str,
        vxlan: Vxlan,
        mac: [u8; 6],
        mtu: u32,
        netns: BorrowedFd<'_>,
    ) -> Result<bool, NetError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::Address(mac.to_vec()));
        message.attributes.push(LinkAttribute::Mtu(mtu));
        message.attributes.push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
        let local = match vxlan.local {
            IpAddr::V4(a) => InfoVxlan::Local(a),
            IpAddr::V6(a) => InfoVxlan::Local6(a),
        };
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::Id(vxlan.vni),
                local,
                InfoVxlan::Port(vxlan.port),
                InfoVxlan::Learning(false),
            ])),
        ]));
        match self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL) {
            Err(e) if is(&e, Errno::EEXIST) => Ok(false),
            other => {
                other.attempt(|| format!("making the tunnel {} from {}", vxlan.vni, vxlan.local))?;
                Ok(true)
            }
        }
    }

    /// Changes a link's hardware address, MTU or both.
    pub fn set_link(&mut self, link: u32, mac: Option<[u8; 6]>, mtu: Option<u32>) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.attributes.extend(mac.map(|m| LinkAttribute::Address(m.to_vec())));
        message.attributes.extend(mtu.map(LinkAttribute::Mtu));
        let done = self.request(RouteNetlinkMessage::SetLink(message), 0);
        done.map(drop).attempt(|| format!("changing link {link}"))
    }

    /// Removes a link by its index; one that is not there is fine.
    pub fn delete_index(&mut self, link: u32) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.header.index = link;
        match self.request(RouteNetlinkMessage::DelLink(message), 0) {
            Err(e) if !is(&e, Errno::ENODEV) => Err(e).attempt(|| format!("removing link {link}")),
            _ => Ok(()),
        }
    }

    /// Removes all links of a group at once: a thousand cost hardly more than one. None is fine.
    pub fn delete_group(&mut self, group: u32) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        match self.request(RouteNetlinkMessage::DelLink(message), 0) {
            Err(e) if !is(&e, Errno::ENODEV) => Err(e).attempt(|| "removing links".into()),
            _ => Ok(()),
        }
    }

    /// How this client's namespace numbers another, if it knows it.
    pub fn netns_id(&mut self, netns: BorrowedFd<'_>) -> Result<Option<i32>, NetError> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(netns.as_raw_fd() as u32));
        let answers = self
            .request(RouteNetlinkMessage::GetNsId(message), 0)
            .attempt(|| "looking for a namespace's number".into())?;
        Ok(answers.iter().find_map(|a| match a {
            RouteNetlinkMessage::NewNsId(m) => m.attributes.iter().find_map(|a| match a {
                NsidAttribute::Id(id) => Some(*id).filter(|id| *id >= 0),
                _ => None,
            }),
            _ => None,
        }))
    }
}

fn state_of(message: &RouteNetlinkMessage) -> Option<LinkState> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let mut state = LinkState {
        index: link.header.index,
        name: String::new(),
        up: link.header.flags.contains(LinkFlags::Up),
        mac: None,
        mtu: 0,
        kind: LinkKind::Other,
        peer: None,
        peer_netns: None,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => state.name.clone_from(name),
            LinkAttribute::Address(mac) => state.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => state.mtu = *mtu,
            LinkAttribute::Link(peer) => state.peer = Some(*peer),
            LinkAttribute::LinkNetNsId(id) => state.peer_netns = Some(*id),
            LinkAttribute::LinkInfo(infos) => state.kind = kind_of(infos),
            _ => {}
        }
    }
    Some(state)
}

fn kind_of(infos: &[LinkInfo]) -> LinkKind {
    if infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Veth))) {
        return LinkKind::Veth;
    }
    let data = infos.iter().find_map(|i| match i {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    });
    let Some(data) = data else { return LinkKind::Other };
    let (mut vni, mut local, mut port) = (0, None, 0);
    for one in data {
        match one {
            InfoVxlan::Id(id) => vni = *id,
            InfoVxlan::Local(a) => local = Some(IpAddr::V4(*a)),
            InfoVxlan::Local6(a) => local = Some(IpAddr::V6(*a)),
            InfoVxlan::Port(p) => port = *p,
            _ => {}
        }
    }
    local.map_or(LinkKind::Other, |local| LinkKind::Vxlan(Vxlan { vni, local, port }))
}
