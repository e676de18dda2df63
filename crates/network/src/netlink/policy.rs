//! Rules that say which routing table a packet's way is looked up in.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{Netlink, PROTOCOL, is};
use crate::{Attempt, NetError};

/// One rule of one family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Policy {
    pub six: bool,
    /// The lowest is asked first.
    pub priority: u32,
    /// Of packets from these addresses.
    pub from: Option<(IpAddr, u8)>,
    /// Of packets that came by this link; `lo` for those that the namespace itself sends.
    pub iif: Option<String>,
    /// Of packets with this mark.
    pub mark: Option<u32>,
    pub then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Then {
    Table(u32),
    Unreachable,
}

impl Netlink {
    /// All rules of ours.
    pub fn policies(&mut self) -> Result<Vec<Policy>, NetError> {
        let mut all = Vec::new();
        for (six, family) in [(false, AddressFamily::Inet), (true, AddressFamily::Inet6)] {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let answers = self
                .request(RouteNetlinkMessage::GetRule(message), NLM_F_DUMP)
                .attempt(|| "listing routing rules".into())?;
            all.extend(answers.iter().filter_map(|a| match a {
                RouteNetlinkMessage::NewRule(rule) => policy_of(rule, six),
                _ => None,
            }));
        }
        Ok(all)
    }

    pub fn put_policy(&mut self, policy: &Policy) -> Result<(), NetError> {
        let done = self.request(RouteNetlinkMessage::NewRule(message_of(policy)), NLM_F_CREATE | NLM_F_EXCL);
        match done {
            Err(e) if is(&e, Errno::EEXIST) => Ok(()),
            other => other.map(drop).attempt(|| format!("adding the routing rule {policy}")),
        }
    }

    pub fn take_policy(&mut self, policy: &Policy) -> Result<(), NetError> {
        match self.request(RouteNetlinkMessage::DelRule(message_of(policy)), 0) {
            Err(e) if !is(&e, Errno::ENOENT) => Err(e).attempt(|| format!("removing the routing rule {policy}")),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of IPv{}", self.priority, if self.six { 6 } else { 4 })?;
        if let Some((address, length)) = self.from {
            write!(f, " from {address}/{length}")?;
        }
        if let Some(iif) = &self.iif {
            write!(f, " by {iif}")?;
        }
        if let Some(mark) = self.mark {
            write!(f, " marked {mark:#x}")?;
        }
        match self.then {
            Then::Table(table) => write!(f, " to table {table}"),
            Then::Unreachable => write!(f, " to nowhere"),
        }
    }
}

fn message_of(policy: &Policy) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if policy.six { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.attributes.push(RuleAttribute::Priority(policy.priority));
    message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    if let Some((address, length)) = policy.from {
        message.header.src_len = length;
        message.attributes.push(RuleAttribute::Source(address));
    }
    message.attributes.extend(policy.iif.clone().map(RuleAttribute::Iifname));
    message.attributes.extend(policy.mark.map(RuleAttribute::FwMark));
    match policy.then {
        Then::Unreachable => message.header.action = RuleAction::Unreachable,
        Then::Table(table) => {
            message.header.action = RuleAction::ToTable;
            message.header.table = u8::try_from(table).unwrap_or(0);
            message.attributes.push(RuleAttribute::Table(table));
        }
    }
    message
}

fn policy_of(message: &RuleMessage, six: bool) -> Option<Policy> {
    let (mut ours, mut table) = (false, u32::from(message.header.table));
    let mut policy = Policy { six, priority: 0, from: None, iif: None, mark: None, then: Then::Unreachable };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(p) => ours = u8::from(*p) == PROTOCOL,
            RuleAttribute::Priority(p) => policy.priority = *p,
            RuleAttribute::Source(a) => policy.from = Some((*a, message.header.src_len)),
            RuleAttribute::Iifname(name) => policy.iif = Some(name.clone()),
            RuleAttribute::FwMark(mark) => policy.mark = Some(*mark),
            RuleAttribute::Table(t) => table = *t,
            _ => {}
        }
    }
    if message.header.action == RuleAction::ToTable {
        policy.then = Then::Table(table);
    }
    ours.then_some(policy)
}
