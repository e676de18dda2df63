//! Who goes first when a link is full: a hierarchical token bucket (tc-htb(8)) with three classes. Packets name theirs by their
//! priority, so no classifier is needed.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use super::Netlink;
use super::shape::{HANDLE, Limit, TC_LINKLAYER_ETHERNET, attribute, options_of};
use crate::{Attempt, NetError};

const KIND: &str = "htb";
/// The class of all, below which the others are.
const WHOLE: u16 = 1;
/// By tenths: of the whole, what a class gets however much the others want, and who is first to borrow what they leave.
const CLASSES: [(u16, u64, u32); 3] = [(0x10, 1, 0), (0x20, 1, 1), (0x30, 8, 2)];
/// A class that is full takes turns by so many bytes.
const QUANTUM: u32 = 20_000;
// linux/pkt_sched.h
const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;
const HTB_VERSION: u32 = 3;

/// Whose a packet is, as its priority says it to the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Of servers, agents and gateways among each other.
    Control,
    Tenants,
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let minor = match self {
            Self::Control => CLASSES[0].0,
            Self::Tenants => CLASSES[2].0,
        };
        write!(f, "{:x}:{minor:x}", HANDLE.major)
    }
}

impl Netlink {
    /// The links that are shared out by us, with what each sends in a second. Of one that lacks a class: nothing.
    pub fn shares(&mut self) -> Result<Vec<(u32, Option<Limit>)>, NetError> {
        let queues = self
            .request(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()), NLM_F_DUMP)
            .attempt(|| "listing queues".into())?;
        let ours = |m: &RouteNetlinkMessage| match m {
            RouteNetlinkMessage::NewQueueDiscipline(m) if m.header.handle == HANDLE && is_kind(m) => {
                Some(m.header.index as u32)
            }
            _ => None,
        };
        let links: Vec<u32> = queues.iter().filter_map(ours).collect();
        links.into_iter().map(|link| Ok((link, self.shared(link)?))).collect()
    }

    fn shared(&mut self, link: u32) -> Result<Option<Limit>, NetError> {
        let of = TcMessage::with_index(link as i32);
        let classes = self
            .request(RouteNetlinkMessage::GetTrafficClass(of), NLM_F_DUMP)
            .attempt(|| format!("listing the classes of link {link}"))?;
        let rate = |minor: u16| {
            classes.iter().find_map(|m| match m {
                RouteNetlinkMessage::NewTrafficClass(m) if m.header.handle == handle(minor) => rate_of(m),
                _ => None,
            })
        };
        let whole = rate(WHOLE);
        let right = |whole: Limit| CLASSES.iter().all(|(minor, tenths, _)| rate(*minor) == Some(part(whole, *tenths)));
        Ok(whole.filter(|w| right(*w)))
    }

    /// Whether a link has a queue that somebody chose for it.
    pub fn has_foreign_queue(&mut self, link: u32) -> Result<bool, NetError> {
        let queues = self
            .request(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()), NLM_F_DUMP)
            .attempt(|| "listing queues".into())?;
        Ok(queues.iter().any(|m| match m {
            // What the kernel chose has no number.
            RouteNetlinkMessage::NewQueueDiscipline(TcMessage { header, .. }) => {
                header.index as u32 == link
                    && header.parent == TcHandle::ROOT
                    && header.handle.major != 0
                    && header.handle != HANDLE
            }
            _ => false,
        }))
    }

    /// Shares a link out that sends so much, and is not shared out by us.
    pub fn put_share(&mut self, link: u32, whole: Limit) -> Result<(), NetError> {
        let attempt = || format!("sharing out link {link}");
        let mut init = Vec::new();
        for word in [HTB_VERSION, 10, CLASSES[1].0.into(), 0, 0] {
            init.extend(word.to_ne_bytes());
        }
        let queue = message(link, TcHandle::ROOT, HANDLE, vec![other(TCA_HTB_INIT, &init)]);
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.request(RouteNetlinkMessage::NewQueueDiscipline(queue), flags).attempt(attempt)?;
        let classes = CLASSES.map(|(minor, tenths, first)| (WHOLE, minor, part(whole, tenths), first));
        for (parent, minor, rate, first) in [(0, WHOLE, whole, 0)].into_iter().chain(classes) {
            let class = message(link, handle(parent), handle(minor), options(rate, whole, first));
            self.request(RouteNetlinkMessage::NewTrafficClass(class), flags).attempt(attempt)?;
        }
        Ok(())
    }
}

fn handle(minor: u16) -> TcHandle {
    TcHandle { major: HANDLE.major, minor }
}

fn part(whole: Limit, tenths: u64) -> Limit {
    Limit::of(whole.bits() / 10 * tenths)
}

fn is_kind(message: &TcMessage) -> bool {
    message.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(kind) if kind == KIND))
}

fn other(kind: u16, bytes: &[u8]) -> TcOption {
    TcOption::Other(DefaultNla::new(kind, bytes.to_vec()))
}

fn message(link: u32, parent: TcHandle, handle: TcHandle, options: Vec<TcOption>) -> TcMessage {
    let mut message = TcMessage::with_index(link as i32);
    (message.header.parent, message.header.handle) = (parent, handle);
    message.attributes.push(TcAttribute::Kind(KIND.into()));
    message.attributes.push(TcAttribute::Options(options));
    message
}

/// `struct tc_htb_opt`, and rates that it has no room for.
fn options(rate: Limit, ceiling: Limit, first: u32) -> Vec<TcOption> {
    let mut out = [0; 44];
    for (at, limit) in [(0, rate), (12, ceiling)] {
        out[at + 1] = TC_LINKLAYER_ETHERNET;
        out[at + 8..at + 12].copy_from_slice(&limit.short().to_ne_bytes());
    }
    for (at, word) in [(24, rate.ticks()), (28, ceiling.ticks()), (32, QUANTUM), (40, first)] {
        out[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    let mut options = vec![other(TCA_HTB_PARMS, &out)];
    for (kind, limit) in [(TCA_HTB_RATE64, rate), (TCA_HTB_CEIL64, ceiling)] {
        if limit.bytes() > u64::from(u32::MAX) {
            options.push(other(kind, &limit.bytes().to_ne_bytes()));
        }
    }
    options
}

fn rate_of(message: &TcMessage) -> Option<Limit> {
    let bytes = options_of(message)?;
    let parameters = attribute(&bytes, TCA_HTB_PARMS)?;
    let small = u32::from_ne_bytes(parameters.get(8..12)?.try_into().ok()?);
    let large = attribute(&bytes, TCA_HTB_RATE64).and_then(|v| v.try_into().ok()).map(u64::from_ne_bytes);
    Some(Limit::of_bytes(large.unwrap_or(small.into())))
}
