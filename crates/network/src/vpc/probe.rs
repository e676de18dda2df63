//! A real packet from an instance's NIC, and whether it came through: told by an answer that only its receiver gives.
//!
//! * TCP: a connection is opened and broken off. Accepted or refused, it came through.
//! * ICMP: an echo request, and its reply.
//! * UDP: one datagram. That nobody listens, or an answer, says that it came through; silence says nothing.
//!
//! The instance's own network stack sends it, bound to the NIC, so that it passes what every packet of the NIC passes.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nexus_model::plan::{RuleProtocol, TracedPacket};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError};

/// Long enough for a lost packet to be sent again (RFC 6298: after a second).
const PATIENCE: Duration = Duration::from_millis(2500);

/// Sends from `from`, which `link` of the namespace has. `None` when that can't be known.
pub async fn probe(
    netns: NetnsRef,
    link: String,
    from: IpAddr,
    packet: TracedPacket,
) -> Result<Option<bool>, NetError> {
    let what = format!("sending a packet from {from} at {link} to {}", packet.to);
    aside(netns, "a probe", move || send(&link, from, packet).attempt(|| what)).await
}

fn send(link: &str, from: IpAddr, packet: TracedPacket) -> io::Result<Option<bool>> {
    match packet.protocol {
        RuleProtocol::Tcp => tcp(link, from, packet).map(Some),
        RuleProtocol::Udp => udp(link, from, packet),
        RuleProtocol::Icmp => icmp(link, from, packet.to).map(Some),
        RuleProtocol::Any => Err(io::Error::other("a packet has one protocol")),
    }
}

fn open(link: &str, from: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(from, 0)), kind, Some(protocol))?;
    socket.bind_device(Some(link.as_bytes()))?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// What a network says on the way: the packet went no further.
fn turned_back(error: &io::Error) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, PermissionDenied, TimedOut};
    matches!(error.kind(), HostUnreachable | NetworkUnreachable | PermissionDenied | TimedOut)
}

/// Waits until something is there to read, or `write`; false when the time is up.
fn wait(socket: &Socket, until: Instant, write: bool) -> io::Result<bool> {
    let flags = if write { PollFlags::POLLOUT } else { PollFlags::POLLIN };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(socket.as_fd(), flags)], timeout) {
            Ok(n) => return Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn tcp(link: &str, from: IpAddr, packet: TracedPacket) -> io::Result<bool> {
    let socket = open(link, from, Type::STREAM, Protocol::TCP)?;
    // Nothing of it is to stay: neither side keeps a connection that was never used.
    socket.set_linger(Some(Duration::ZERO))?;
    let until = Instant::now() + PATIENCE;
    let result = match socket.connect(&SocketAddr::new(packet.to, packet.port).into()) {
        Err(e) if e.raw_os_error() == Some(nix::libc::EINPROGRESS) => {
            if !wait(&socket, until, true)? {
                return Ok(false);
            }
            socket.take_error()?.map_or(Ok(()), Err)
        }
        other => other,
    };
    match result {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset) => Ok(true),
        Err(e) if turned_back(&e) => Ok(false),
        Err(e) => Err(e),
    }
}

fn udp(link: &str, from: IpAddr, packet: TracedPacket) -> io::Result<Option<bool>> {
    let socket = open(link, from, Type::DGRAM, Protocol::UDP)?;
    let sent = socket.connect(&SocketAddr::new(packet.to, packet.port).into()).and_then(|()| socket.send(b"nexus"));
    match sent {
        Ok(_) => {}
        Err(e) if turned_back(&e) => return Ok(Some(false)),
        Err(e) => return Err(e),
    }
    if !wait(&socket, Instant::now() + PATIENCE, false)? {
        return Ok(None);
    }
    match (&socket).read(&mut [0; 1]) {
        Ok(_) => Ok(Some(true)),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(Some(true)),
        Err(e) if turned_back(&e) => Ok(Some(false)),
        Err(e) => Err(e),
    }
}

/// The checksum of RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn icmp(link: &str, from: IpAddr, to: IpAddr) -> io::Result<bool> {
    let (protocol, request, reply) = match from {
        IpAddr::V4(_) => (Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Protocol::ICMPV6, 128, 129),
    };
    let socket = open(link, from, Type::RAW, protocol)?;
    // Told from others' by the process, and by what it carries.
    let id = (std::process::id() as u16).to_be_bytes();
    let mut message = vec![request, 0, 0, 0, id[0], id[1], 0, 1];
    message.extend(*b"nexus net trace");
    if from.is_ipv4() {
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    // From then on, nothing but its own packets are heard.
    let sent = socket.connect(&SocketAddr::new(to, 0).into()).and_then(|()| socket.send(&message));
    match sent {
        Ok(_) => {}
        Err(e) if turned_back(&e) => return Ok(false),
        Err(e) => return Err(e),
    }
    let until = Instant::now() + PATIENCE;
    while wait(&socket, until, false)? {
        let mut buffer = [0; 256];
        let length = match (&socket).read(&mut buffer) {
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) if turned_back(&e) => return Ok(false),
            Err(e) => return Err(e),
        };
        let got = &buffer[..length];
        // IPv4's header comes with it, IPv6's does not.
        let at = if from.is_ipv4() { got.first().map_or(0, |b| usize::from(b & 15) * 4) } else { 0 };
        let answers = got.get(at) == Some(&reply) && got.get(at + 4..) == Some(&message[4..]);
        if answers {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[1]), !0x0100);
    }
}
