//! Router advertisements (RFC 4861): that the gateway is there, how large packets may be, and that addresses come by DHCPv6.

use std::net::Ipv6Addr;

use super::Lease;

pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
const MANAGED: u8 = 0x80;
const HOP_LIMIT: u8 = 64;
/// The longest that there is: the gateway is on every host and goes away with the NIC alone.
const LIFETIME_SECONDS: u16 = 9000;
const MTU: u8 = 5;

/// Whether an ICMPv6 message asks for routers.
pub fn is_solicitation(message: &[u8]) -> bool {
    message.len() >= 8 && message[..2] == [SOLICITATION, 0]
}

/// What a NIC is told; the kernel adds the checksum. A NIC that is not its instance's first gets no default route.
pub fn advertisement(lease: &Lease) -> Vec<u8> {
    let lifetime = if lease.first { LIFETIME_SECONDS } else { 0 };
    let mut out = vec![ADVERTISEMENT, 0, 0, 0, HOP_LIMIT, MANAGED];
    out.extend(lifetime.to_be_bytes());
    // How long neighbours are taken as reachable, and how often they are asked: as each likes.
    out.extend([0; 8]);
    out.extend([MTU, 1, 0, 0]);
    // No NIC of IPv6 has less (RFC 8200).
    out.extend(u32::from(lease.mtu.max(1280)).to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::Mac;

    use super::*;

    #[test]
    fn an_advertisement_tells_the_router_the_mtu_and_where_addresses_come_from() {
        let mut lease =
            Lease { mac: Mac([6; 6]), four: None, address6: Some(Ipv6Addr::LOCALHOST), mtu: 1400, first: true };
        let found = advertisement(&lease);
        assert_eq!(found[..8], [134, 0, 0, 0, 64, 0x80, 0x23, 0x28]);
        assert_eq!(found[16..], [5, 1, 0, 0, 0, 0, 5, 120]);
        lease.first = false;
        assert_eq!(advertisement(&lease)[6..8], [0, 0]);
        assert!(is_solicitation(&[133, 0, 0, 0, 0, 0, 0, 0]) && !is_solicitation(&found) && !is_solicitation(&[133]));
    }
}
