//! The PROXY protocol's header, as HAProxy's `proxy-protocol.txt` has it (2020/03/05, sections 2.1 and 2.2): who connected to what,
//! before the stream's first byte.

use std::net::SocketAddr;

use nexus_model::plan::ProxyProtocol;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and whose connection it is: the sender's own, or another's that it passes on.
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
/// A stream over IPv4, or over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Of a connection from one address to another; both of one family, or else nothing is said of them.
pub fn header(version: ProxyProtocol, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut addresses = Vec::new();
    let family = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            addresses.extend(from.ip().octets());
            addresses.extend(to.ip().octets());
            (TCP4, "TCP4")
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            addresses.extend(from.ip().octets());
            addresses.extend(to.ip().octets());
            (TCP6, "TCP6")
        }
        _ => return nobody(version),
    };
    match version {
        ProxyProtocol::V1 => {
            format!("PROXY {} {} {} {} {}\r\n", family.1, from.ip(), to.ip(), from.port(), to.port()).into_bytes()
        }
        ProxyProtocol::V2 => {
            addresses.extend(from.port().to_be_bytes());
            addresses.extend(to.port().to_be_bytes());
            let length = [0, addresses.len() as u8];
            [&SIGNATURE[..], &[PROXY, family.0], &length, &addresses].concat()
        }
    }
}

/// Of a connection that is the sender's own, such as one that asks whether a target answers.
pub fn nobody(version: ProxyProtocol) -> Vec<u8> {
    match version {
        ProxyProtocol::V1 => b"PROXY UNKNOWN\r\n".to_vec(),
        ProxyProtocol::V2 => [&SIGNATURE[..], &[LOCAL, 0, 0, 0]].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn headers_are_as_the_specification_has_them() {
        let (a, b) = (at("192.168.0.1:56324"), at("192.168.0.11:443"));
        assert_eq!(header(ProxyProtocol::V1, a, b), b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n");
        let binary = header(ProxyProtocol::V2, a, b);
        assert_eq!(binary[..12], [0x0d, 0x0a, 0x0d, 0x0a, 0, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a]);
        let rest = [0x21, 0x11, 0, 12, 192, 168, 0, 1, 192, 168, 0, 11, 0xdc, 0x04, 0x01, 0xbb];
        assert_eq!(binary[12..], rest);
        let (a, b) = (at("[fd00::1]:1"), at("[fd00::2]:80"));
        assert_eq!(header(ProxyProtocol::V1, a, b), b"PROXY TCP6 fd00::1 fd00::2 1 80\r\n");
        let binary = header(ProxyProtocol::V2, a, b);
        assert_eq!((binary.len(), &binary[12..18]), (52, &[0x21, 0x21, 0, 36, 0xfd, 0][..]));
        assert_eq!(binary[48..], [0, 1, 0, 80]);
        // The longest that the first version may be.
        let long = at("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
        assert!(header(ProxyProtocol::V1, long, long).len() <= 107);
    }

    #[test]
    fn of_ones_own_connections_no_address_is_told() {
        assert_eq!(nobody(ProxyProtocol::V1), b"PROXY UNKNOWN\r\n");
        assert_eq!(nobody(ProxyProtocol::V2)[12..], [0x20, 0, 0, 0]);
        assert_eq!(header(ProxyProtocol::V1, at("10.0.0.1:1"), at("[fd00::1]:1")), nobody(ProxyProtocol::V1));
    }
}
