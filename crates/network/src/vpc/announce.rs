//! Tells everybody on a wire who answers for an address from now on: a gratuitous ARP (RFC 5227 section 3), or an
//! unsolicited neighbour advertisement (RFC 4861 section 7.2.6).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// Sends it once from the calling thread's namespace.
pub(super) fn announce(link: u32, mac: [u8; 6], address: IpAddr) -> io::Result<()> {
    let (kind, frame) = match address {
        IpAddr::V4(a) => (ARP, arp(mac, a)),
        IpAddr::V6(a) => (IPV6, advertisement(mac, a)),
    };
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zeroes are a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = kind.to_be();
    to.sll_ifindex = link as i32;
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&frame[..6]);
    // SAFETY: both pointers are to values that live through the call, with their own lengths.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut out = Vec::with_capacity(42);
    out.extend([0xff; 6]);
    out.extend(mac);
    out.extend(ARP.to_be_bytes());
    // Ethernet, IPv4, their lengths, a request.
    out.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    out.extend(mac);
    out.extend(address.octets());
    out.extend([0; 6]);
    out.extend(address.octets());
    out
}

fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let everybody = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 136; a router, and this goes before what was known.
    let mut body = vec![136, 0, 0, 0, 0xa0, 0, 0, 0];
    body.extend(address.octets());
    // The target's link-layer address.
    body.extend([2, 1]);
    body.extend(mac);
    let sum = checksum(address, everybody, &body);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut out = Vec::with_capacity(86);
    out.extend([0x33, 0x33, 0, 0, 0, 1]);
    out.extend(mac);
    out.extend(IPV6.to_be_bytes());
    out.extend([0x60, 0, 0, 0]);
    out.extend((body.len() as u16).to_be_bytes());
    // ICMPv6, and the hop limit that shows that no router passed it on.
    out.extend([58, 255]);
    out.extend(address.octets());
    out.extend(everybody.octets());
    out.extend(body);
    out
}

/// Of ICMPv6 (RFC 4443 section 2.3).
fn checksum(from: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> u16 {
    let mut all = Vec::with_capacity(40 + body.len());
    all.extend(from.octets());
    all.extend(to.octets());
    all.extend((body.len() as u32).to_be_bytes());
    all.extend([0, 0, 0, 58]);
    all.extend(body);
    let mut sum: u32 = all.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_over_what_holds_it_is_nought() {
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let frame = advertisement([2, 0, 0, 0, 0, 9], address);
        assert_eq!(frame.len(), 86);
        assert_eq!(checksum(address, "ff02::1".parse().unwrap(), &frame[54..]), 0);
        assert_eq!(arp([2, 0, 0, 0, 0, 9], Ipv4Addr::new(203, 0, 113, 7)).len(), 42);
    }
}
