//! How much a link sends in a second: a token bucket (tc-tbf(8)), which kernels have that have little else.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, Nla as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use nix::errno::Errno;

use super::{Netlink, is};
use crate::{Attempt, NetError};

const KIND: &str = "tbf";
/// The number by which a bucket is known to be ours.
pub(super) const HANDLE: TcHandle = TcHandle { major: 0x9c5f, minor: 0 };
// linux/pkt_sched.h
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
pub(super) const TC_LINKLAYER_ETHERNET: u8 = 1;

/// What a link may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Limit {
    /// A second, as the kernel keeps it.
    bytes: u64,
}

impl Limit {
    /// Of so many bits a second.
    pub fn of(rate: u64) -> Self {
        Self { bytes: (rate / 8).max(1) }
    }

    pub(super) fn of_bytes(bytes: u64) -> Self {
        Self { bytes }
    }

    pub(super) fn bytes(self) -> u64 {
        self.bytes
    }

    /// As far as 32 bits can say it.
    pub(super) fn short(self) -> u32 {
        u32::try_from(self.bytes).unwrap_or(u32::MAX)
    }

    /// What may be sent at once, in the time that it takes: units of 64 ns (`PSCHED_SHIFT` in net/pkt_sched.h).
    pub(super) fn ticks(self) -> u32 {
        let nanoseconds = u128::from(self.burst()) * 1_000_000_000 / u128::from(self.bytes.max(1));
        u32::try_from(nanoseconds >> 6).unwrap_or(u32::MAX)
    }

    pub fn bits(self) -> u64 {
        self.bytes.saturating_mul(8)
    }

    /// What may be sent at once: 20 ms of the rate, within what a packet needs and what a timer's tick asks for.
    fn burst(self) -> u32 {
        (self.bytes() / 50).clamp(16 << 10, 4 << 20) as u32
    }

    /// What waits, in bytes: 50 ms more.
    fn queue(self) -> u32 {
        (u64::from(self.burst()) + self.bytes() / 20).min(64 << 20) as u32
    }

    /// `struct tc_tbf_qopt`.
    fn options(self) -> [u8; 36] {
        let mut out = [0; 36];
        out[1] = TC_LINKLAYER_ETHERNET;
        out[8..12].copy_from_slice(&self.short().to_ne_bytes());
        out[24..28].copy_from_slice(&self.queue().to_ne_bytes());
        out
    }
}

impl Netlink {
    /// The links that have a limit of ours.
    pub fn limits(&mut self) -> Result<Vec<(u32, Limit)>, NetError> {
        let answers = self
            .request(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()), NLM_F_DUMP)
            .attempt(|| "listing rate limits".into())?;
        Ok(answers.iter().filter_map(limit_of).collect())
    }

    pub fn put_limit(&mut self, link: u32, limit: Limit) -> Result<(), NetError> {
        let mut message = message_of(link);
        message.attributes.push(TcAttribute::Kind(KIND.into()));
        let other = |kind, bytes: &[u8]| TcOption::Other(DefaultNla::new(kind, bytes.to_vec()));
        let mut options = vec![other(TCA_TBF_PARMS, &limit.options())];
        options.push(other(TCA_TBF_BURST, &limit.burst().to_ne_bytes()));
        if limit.bytes() > u64::from(u32::MAX) {
            options.push(other(TCA_TBF_RATE64, &limit.bytes().to_ne_bytes()));
        }
        message.attributes.push(TcAttribute::Options(options));
        let done = self.request(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE);
        done.map(drop).attempt(|| format!("limiting link {link} to {} bits a second", limit.bits()))
    }

    pub fn take_limit(&mut self, link: u32) -> Result<(), NetError> {
        match self.request(RouteNetlinkMessage::DelQueueDiscipline(message_of(link)), 0) {
            Err(e) if !is(&e, Errno::ENOENT) => Err(e).attempt(|| format!("taking the limit from link {link}")),
            _ => Ok(()),
        }
    }
}

fn message_of(link: u32) -> TcMessage {
    let mut message = TcMessage::with_index(link as i32);
    message.header.parent = TcHandle::ROOT;
    message.header.handle = HANDLE;
    message
}

fn limit_of(message: &RouteNetlinkMessage) -> Option<(u32, Limit)> {
    let RouteNetlinkMessage::NewQueueDiscipline(found) = message else { return None };
    if found.header.handle != HANDLE {
        return None;
    }
    let bytes = options_of(found)?;
    let parameters = attribute(&bytes, TCA_TBF_PARMS)?;
    let small = u32::from_ne_bytes(parameters.get(8..12)?.try_into().ok()?);
    let large = attribute(&bytes, TCA_TBF_RATE64).and_then(|v| v.try_into().ok()).map(u64::from_ne_bytes);
    Some((found.header.index as u32, Limit { bytes: large.unwrap_or(small.into()) }))
}

/// What a queue or a class was made with, as it came.
pub(super) fn options_of(message: &TcMessage) -> Option<Vec<u8>> {
    let options = message.attributes.iter().find_map(|a| match a {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let mut bytes = Vec::new();
    for option in options {
        if let TcOption::Other(nla) = option {
            bytes = vec![0; nla.value_len()];
            nla.emit_value(&mut bytes);
        }
    }
    Some(bytes)
}

/// The value of one attribute among several.
pub(super) fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let found = u16::from_ne_bytes([bytes[2], bytes[3]]);
        let value = bytes.get(4..length)?;
        if found == kind {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_found_again_among_attributes() {
        let limit = Limit::of(80_000_000);
        assert_eq!(limit.burst(), 200_000);
        let mut bytes = vec![5, 0, 9, 0, 1, 0, 0, 0];
        bytes.extend([40, 0, 1, 0]);
        bytes.extend(limit.options());
        let found = attribute(&bytes, TCA_TBF_PARMS).unwrap();
        assert_eq!(found[8..12], 10_000_000_u32.to_ne_bytes());
        assert!(attribute(&bytes, TCA_TBF_RATE64).is_none());
        assert!(attribute(&[200, 0, 1, 0], TCA_TBF_PARMS).is_none());
    }
}
