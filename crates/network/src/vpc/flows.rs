//! A network's flow log: new connections and refusals, as its packet filter tells them.
//!
//! The rules tell by netfilter's log (`log prefix "drop no_ingress_rule" group 1`), and whoever follows reads it from a netlink
//! socket in the network's namespace. Everything on the way is bounded: rules tell of so many a second, the kernel keeps so much
//! for a slow reader, and a record that has no place in the queue is counted as lost.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::text::FLOW_GROUP;
use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError};

/// One packet that began a connection or was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// Nothing, if it passed; else the reason for which it was dropped.
    pub dropped: Option<String>,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Nought where the protocol has none.
    pub source_port: u16,
    pub port: u16,
    /// Of the packet.
    pub bytes: u16,
}

/// NFNL_SUBSYS_ULOG of linux/netfilter/nfnetlink.h, and messages of linux/netfilter/nfnetlink_log.h.
const SUBSYSTEM: u16 = 4;
const PACKET: u16 = 0;
const CONFIG: u16 = 1;
const CONFIG_COMMAND: u16 = 1;
const CONFIG_MODE: u16 = 2;
const CONFIG_TIMEOUT: u16 = 4;
const CONFIG_THRESHOLD: u16 = 5;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const ATTRIBUTE_PAYLOAD: u16 = 9;
const ATTRIBUTE_PREFIX: u16 = 10;
/// Enough for an IPv6 header, a few of its extensions, and ports.
const HEADERS: u32 = 128;
/// So many hundredths of a second and so many packets the kernel waits before it tells.
const GATHER: (u32, u32) = (20, 64);
/// How often it is looked whether the namespace is still the one that is followed: the socket would keep one that is gone.
const LOOK: Duration = Duration::from_secs(15);

/// Which namespace a reference leads to by now.
fn which(netns: &NetnsRef) -> Option<u64> {
    match netns {
        NetnsRef::Path(path) => std::fs::metadata(path).ok().map(|file| file.ino()),
        _ => None,
    }
}

/// Follows the flows of one network's namespace until nobody listens any more, or another has taken its place. `lost` counts
/// those that had no place.
pub async fn follow(netns: NetnsRef, out: mpsc::Sender<Flow>, lost: Arc<AtomicU64>) -> Result<(), NetError> {
    let followed = which(&netns);
    let mut looks = tokio::time::interval(LOOK);
    let socket = aside(netns.clone(), "a network's flows", open).await?;
    // SAFETY: a socket that is owned is the same open file until it is dropped, and `AsyncFd` keeps it.
    let socket = unsafe { AsyncFd::register(socket) }.attempt(|| "waiting for a network's flows".into())?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let mut ready = tokio::select! {
            biased;
            () = out.closed() => return Ok(()),
            _ = looks.tick() => {
                if which(&netns) != followed {
                    return Ok(());
                }
                continue;
            }
            ready = socket.readable() => ready.attempt(|| "waiting for a network's flows".into())?,
        };
        let read = ready.try_io(|fd| Ok(recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?));
        match read {
            Ok(Ok(length)) => {
                for flow in flows(&buffer[..length]) {
                    if out.try_send(flow).is_err() {
                        lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            // The reader was too slow: what is lost is lost.
            Ok(Err(e)) if e.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                lost.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Err(e)) => return Err(e).attempt(|| "reading a network's flows".into()),
            Err(_would_block) => {}
        }
    }
}

fn open() -> Result<OwnedFd, NetError> {
    let attempt = || "following a network's flows".to_owned();
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let kind = SockProtocol::NetlinkNetFilter;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, kind).attempt(attempt)?;
    let mode = [&HEADERS.to_be_bytes()[..], &[COPY_PACKET, 0]].concat();
    let settings: [(u16, &[u8]); 4] = [
        (CONFIG_COMMAND, &[BIND]),
        (CONFIG_MODE, &mode),
        (CONFIG_TIMEOUT, &GATHER.0.to_be_bytes()),
        (CONFIG_THRESHOLD, &GATHER.1.to_be_bytes()),
    ];
    for (kind, value) in settings {
        send(fd.as_raw_fd(), &config(kind, value), MsgFlags::empty()).attempt(attempt)?;
        let mut answer = [0; 1024];
        let length = match recv(fd.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
            // Netlink answers before `send` returns.
            Ok(length) => length,
            Err(e) => return Err(e).attempt(attempt),
        };
        let code = answer[..length].get(16..20).and_then(|c| c.try_into().ok()).map_or(0, i32::from_ne_bytes);
        // NLMSG_ERROR, which is also how success is told. Packets may come before it.
        if answer[..length].get(4..6) == Some(&2_u16.to_ne_bytes()) && code != 0 {
            return Err(io::Error::from_raw_os_error(-code)).attempt(attempt);
        }
    }
    Ok(fd)
}

fn config(kind: u16, value: &[u8]) -> Vec<u8> {
    const REQUEST_AND_ACK: u16 = 1 | 4;
    let length = 16 + 4 + 4 + value.len().next_multiple_of(4);
    let mut out = Vec::with_capacity(length);
    out.extend((length as u32).to_ne_bytes());
    out.extend(((SUBSYSTEM << 8) | CONFIG).to_ne_bytes());
    out.extend(REQUEST_AND_ACK.to_ne_bytes());
    out.extend([0; 8]);
    out.extend([0, 0]);
    out.extend(FLOW_GROUP.to_be_bytes());
    out.extend((4 + value.len() as u16).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(length, 0);
    out
}

/// The records of one reading; what can't be read is passed over.
fn flows(mut bytes: &[u8]) -> Vec<Flow> {
    let mut out = Vec::new();
    while let Some(header) = bytes.get(..16) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let Some(message) = bytes.get(16..length) else { break };
        if kind == (SUBSYSTEM << 8) | PACKET {
            out.extend(message.get(4..).and_then(flow));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

fn flow(mut attributes: &[u8]) -> Option<Flow> {
    let (mut words, mut payload) = (None, None);
    while let Some(header) = attributes.get(..4) {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        // The two highest bits say how the value is built.
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = attributes.get(4..length)?;
        match kind {
            ATTRIBUTE_PREFIX => words = std::str::from_utf8(value).ok().map(|w| w.trim_end_matches('\0')),
            ATTRIBUTE_PAYLOAD => payload = Some(value),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let dropped = match words? {
        "allow" => None,
        other => Some(other.strip_prefix("drop ")?.to_owned()),
    };
    let packet = payload?;
    match packet.first()? >> 4 {
        4 => {
            let header = packet.get(..20)?;
            let address = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).ok().map(Ipv4Addr::from);
            let bytes = u16::from_be_bytes([header[2], header[3]]);
            let rest = packet.get(usize::from(header[0] & 15) * 4..).unwrap_or_default();
            let (source_port, port) = ports(header[9], rest);
            let (source, destination) = (address(12)?.into(), address(16)?.into());
            Some(Flow { dropped, source, destination, protocol: header[9], source_port, port, bytes })
        }
        6 => {
            let header = packet.get(..40)?;
            let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).ok().map(Ipv6Addr::from);
            let bytes = u16::from_be_bytes([header[4], header[5]]).saturating_add(40);
            let (protocol, rest) = upper(header[6], &packet[40..]);
            let (source_port, port) = ports(protocol, rest);
            let (source, destination) = (address(8)?.into(), address(24)?.into());
            Some(Flow { dropped, source, destination, protocol, source_port, port, bytes })
        }
        _ => None,
    }
}

/// Past IPv6's extension headers.
fn upper(mut next: u8, mut rest: &[u8]) -> (u8, &[u8]) {
    // Hop by hop, routing, fragment, destination: no more than these each once.
    for _ in 0..4 {
        let (0 | 43 | 44 | 60, [following, length, ..]) = (next, rest) else { break };
        let size = if next == 44 { 8 } else { usize::from(*length) * 8 + 8 };
        (next, rest) = (*following, rest.get(size..).unwrap_or_default());
    }
    (next, rest)
}

fn ports(protocol: u8, rest: &[u8]) -> (u16, u16) {
    match (protocol, rest) {
        (6 | 17 | 132, [a, b, c, d, ..]) => (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])),
        _ => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut out = (4 + value.len() as u16).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn message(words: &[u8], packet: &[u8]) -> Vec<u8> {
        let body =
            [vec![2, 0, 0, 1], attribute(ATTRIBUTE_PREFIX, words), attribute(ATTRIBUTE_PAYLOAD, packet)].concat();
        let mut out = (16 + body.len() as u32).to_ne_bytes().to_vec();
        out.extend(((SUBSYSTEM << 8) | PACKET).to_ne_bytes());
        out.extend([0; 10]);
        out.extend(body);
        out
    }

    #[test]
    fn packets_are_read_with_their_ports_and_extensions() {
        let mut four = vec![0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        four.extend([0x9c, 0x40, 0, 80]);
        let mut six = vec![0x60, 0, 0, 0, 0, 20, 0, 64];
        six.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).octets());
        six.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).octets());
        six.extend([17, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 54]);
        let bytes =
            [message(b"allow\0", &four), message(b"drop no_ingress_rule\0", &six), message(b"x\0", &four)].concat();
        let found = flows(&bytes);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(
            (found[0].dropped.as_deref(), found[0].protocol, found[0].source_port, found[0].port),
            (None, 6, 40000, 80)
        );
        assert_eq!((found[1].protocol, found[1].source_port, found[1].port, found[1].bytes), (17, 53, 54, 60));
        assert_eq!(found[1].dropped.as_deref(), Some("no_ingress_rule"));
        // Cut anywhere, it is read as far as it goes.
        for end in 0..bytes.len() {
            assert!(flows(&bytes[..end]).len() <= 2);
        }
    }
}
