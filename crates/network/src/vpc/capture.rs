//! What passes a link, as a capture file: the format of libpcap (draft-ietf-opsawg-pcap), with Ethernet frames.
//!
//! The socket is of one link of one namespace, so that nothing else is ever seen. Packets come with the kernel's own time. What
//! comes faster than it is read is lost, not waited for; frames are kept whole up to 64 KiB.

use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg, setsockopt, socket,
    sockopt,
};
use tokio::io::unix::AsyncFd;

use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError};

const SNAPLEN: usize = 65_535;
/// What the kernel keeps while nobody reads.
const BUFFER: usize = 4 << 20;
const LINKTYPE_ETHERNET: u32 = 1;
const ETHERNET: usize = 14;

/// Which packets are asked for: all of these must fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filter {
    /// From or to this address; of ARP and neighbour discovery, about it.
    pub address: Option<IpAddr>,
    /// TCP and UDP from or to this port.
    pub port: Option<u16>,
}

/// A capture that goes on.
pub struct Capture {
    fd: AsyncFd<OwnedFd>,
    filter: Filter,
    buffer: Vec<u8>,
}

impl Capture {
    /// Begins to listen at a link of a namespace.
    pub async fn open(netns: NetnsRef, link: &str, filter: Filter) -> Result<Self, NetError> {
        let link = link.to_owned();
        let what = format!("listening at {link}");
        let fd = aside(netns, "a capture", move || listen(&link).attempt(|| format!("listening at {link}"))).await?;
        // SAFETY: an `OwnedFd` is the same open file until it is dropped, and `AsyncFd` keeps it.
        let fd = unsafe { AsyncFd::register(fd) }.attempt(|| what)?;
        Ok(Self { fd, filter, buffer: vec![0; SNAPLEN] })
    }

    /// How the file begins.
    pub fn header() -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        out.extend(0xa1b2_c3d4_u32.to_le_bytes());
        out.extend(2_u16.to_le_bytes());
        out.extend(4_u16.to_le_bytes());
        out.extend([0; 8]);
        out.extend((SNAPLEN as u32).to_le_bytes());
        out.extend(LINKTYPE_ETHERNET.to_le_bytes());
        out
    }

    /// The next packet that fits, as a record of the file. Can be dropped at any time without losing one.
    pub async fn next(&mut self) -> io::Result<Vec<u8>> {
        let Self { fd, filter, buffer } = self;
        loop {
            let mut ready = fd.readable().await?;
            let read = ready.try_io(|fd| receive(fd.get_ref(), buffer).map_err(io::Error::from));
            let (seconds, micros, length) = match read {
                // Nothing was there after all.
                Err(_) => continue,
                // The link went down and may come up again.
                Ok(Err(e)) if e.raw_os_error() == Some(Errno::ENETDOWN as i32) => continue,
                Ok(other) => other?,
            };
            let frame = &buffer[..length.min(buffer.len())];
            if !filter.fits(frame) {
                continue;
            }
            let mut out = Vec::with_capacity(16 + frame.len());
            for number in [seconds, micros, frame.len() as u32, length as u32] {
                out.extend(number.to_le_bytes());
            }
            out.extend(frame);
            return Ok(out);
        }
    }
}

/// A socket that hears what passes a link of the calling thread's namespace.
fn listen(link: &str) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // Nothing is heard before it is bound: without a protocol it would hear nothing, with one every link.
    let found =
        getifaddrs()?.find(|i| i.interface_name == link && i.address.is_some_and(|a| a.as_link_addr().is_some()));
    let address = found.and_then(|i| i.address).ok_or(Errno::ENODEV)?;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    setsockopt(&fd, sockopt::ReceiveTimestamp, &true)?;
    // Root's own, so that the system's limit does not count; less is no failure.
    let _ = setsockopt(&fd, sockopt::RcvBufForce, &BUFFER);
    let link = address.as_link_addr().ok_or(Errno::ENODEV)?;
    bind(fd.as_raw_fd(), link)?;
    // What other links brought before.
    let mut scrap = [0; 1];
    while receive(&fd, &mut scrap).is_ok() {}
    Ok(fd)
}

/// One packet: its time, and its length on the wire.
fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(u32, u32, usize)> {
    let mut space = nix::cmsg_space!(nix::sys::time::TimeVal);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
    let got = recvmsg::<()>(fd.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let time = got.cmsgs().ok().and_then(|mut all| {
        all.find_map(|c| match c {
            ControlMessageOwned::ScmTimestamp(t) => Some((t.tv_sec() as u32, t.tv_usec() as u32)),
            _ => None,
        })
    });
    let (seconds, micros) = time.unwrap_or_default();
    Ok((seconds, micros, got.bytes))
}

impl Filter {
    /// Whether a frame is asked for. One that is cut short or strange is, unless something is asked of it.
    fn fits(&self, frame: &[u8]) -> bool {
        if *self == Self::default() {
            return true;
        }
        self.look(frame).unwrap_or(false)
    }

    fn look(&self, frame: &[u8]) -> Option<bool> {
        let be16 = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        let four = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
        let six = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?));
        let ip = ETHERNET;
        let (ends, protocol, payload, first) = match be16(12)? {
            0x0800 => {
                let length = usize::from(frame.get(ip)? & 15) * 4;
                let first = be16(ip + 6)? & 0x1fff == 0;
                ([four(ip + 12)?, four(ip + 16)?], *frame.get(ip + 9)?, ip + length, first)
            }
            0x86dd => {
                // Behind a fragment's header: what a port is looked for in may be there.
                let (mut next, mut at, mut first) = (*frame.get(ip + 6)?, ip + 40, true);
                if next == 44 {
                    (next, first) = (*frame.get(at)?, be16(at + 2)? & 0xfff8 == 0);
                    at += 8;
                }
                let mut ends = [six(ip + 8)?, six(ip + 24)?];
                // Neighbour discovery is about its target.
                if next == 58 && matches!(frame.get(at), Some(135 | 136)) {
                    ends[1] = six(at + 8)?;
                }
                (ends, next, at, first)
            }
            0x0806 => ([four(ip + 14)?, four(ip + 24)?], 0, ip, false),
            _ => return Some(false),
        };
        if self.address.is_some_and(|a| !ends.contains(&a)) {
            return Some(false);
        }
        Some(match self.port {
            None => true,
            Some(port) => matches!(protocol, 6 | 17) && first && (be16(payload)? == port || be16(payload + 2)? == port),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp4(from: [u8; 4], to: [u8; 4], ports: (u16, u16), fragment: u16) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0, 0, 28, 0, 1]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, 17, 0, 0]);
        frame.extend(from.into_iter().chain(to));
        frame.extend(ports.0.to_be_bytes().into_iter().chain(ports.1.to_be_bytes()));
        frame.extend([0; 4]);
        frame
    }

    #[test]
    fn a_filter_asks_for_either_end() {
        let frame = udp4([10, 0, 0, 1], [10, 0, 0, 2], (5000, 53), 0);
        let host = |a: &str| Filter { address: Some(a.parse().unwrap()), port: None };
        let port = |port| Filter { address: None, port: Some(port) };
        for (filter, fits) in [
            (Filter::default(), true),
            (host("10.0.0.1"), true),
            (host("10.0.0.2"), true),
            (host("10.0.0.3"), false),
            (host("fd00::1"), false),
            (port(53), true),
            (port(5000), true),
            (port(80), false),
        ] {
            assert_eq!(filter.fits(&frame), fits, "{filter:?}");
        }
        assert!(!port(53).fits(&udp4([10, 0, 0, 1], [10, 0, 0, 2], (5000, 53), 185)), "a later fragment has no ports");
        for end in 0..frame.len() - 4 {
            assert!(!port(53).fits(&frame[..end]), "cut at {end}");
        }
    }

    #[test]
    fn a_file_begins_as_libpcap_writes_it() {
        let header = Capture::header();
        assert_eq!(header.len(), 24);
        assert_eq!(header[..8], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(header[16..], [0xff, 0xff, 0, 0, 1, 0, 0, 0]);
    }
}
