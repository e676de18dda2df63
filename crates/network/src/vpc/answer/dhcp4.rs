//! DHCPv4 (RFC 2131) for one NIC, which has one address and always the same.
//!
//! ```text
//! op 1 | hardware type, length, hops | id 4 | seconds, flags 4 | client's, your, next, relay's address 4 each
//! hardware address 16 | server's name 64 | file 128 | 63 82 53 63 | options: kind 1, length 1, value …, 255
//! ```
//!
//! A discovery is offered the address, a request for it is granted and one for another refused. There is nothing to remember:
//! leases can't run out, and an answer depends on the plan and the question alone.

use std::net::Ipv4Addr;

use super::Lease;

pub const SERVER_PORT: u16 = 67;
pub const CLIENT_PORT: u16 = 68;

const FIXED: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Some clients throw away what is shorter (RFC 1542, 2.1).
const SHORTEST: usize = 300;
/// Long: answers go on only while the agent lives, and nothing can change but with the NIC.
const LEASE_SECONDS: u32 = 24 * 3600;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

const MASK: u8 = 1;
const ROUTER: u8 = 3;
const NAMESERVER: u8 = 6;
const MTU: u8 = 26;
const REQUESTED: u8 = 50;
const LEASE: u8 = 51;
const KIND: u8 = 53;
const SERVER: u8 = 54;
const ROUTES: u8 = 121;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub bytes: Vec<u8>,
    /// The client has its address and hears what is sent there.
    pub unicast: bool,
}

/// The answer to a question, if there is one.
pub fn answer(question: &[u8], lease: &Lease) -> Option<Answer> {
    let four = lease.four?;
    let fixed = question.get(..FIXED)?;
    // A question, of an Ethernet card, that no relay passed on.
    let plain = fixed[0] == 1 && fixed[1] == 1 && fixed[2] == 6 && fixed[24..28] == [0; 4];
    if !plain || fixed[28..34] != lease.mac.0 || fixed[236..240] != COOKIE {
        return None;
    }
    let options = options(&question[FIXED..]);
    let option = |kind: u8| options.iter().find(|(k, _)| *k == kind).map(|(_, v)| *v);
    let address = |kind: u8| option(kind).and_then(|v| <[u8; 4]>::try_from(v).ok()).map(Ipv4Addr::from);
    let [kind] = option(KIND)? else { return None };
    let client = Ipv4Addr::from(<[u8; 4]>::try_from(&fixed[12..16]).ok()?);
    let kind = match *kind {
        DISCOVER => OFFER,
        // It chose another server.
        REQUEST if option(SERVER).is_some() && address(SERVER) != Some(four.gateway) => return None,
        REQUEST => {
            let wanted = address(REQUESTED).unwrap_or(client);
            if wanted == four.address { ACK } else { NAK }
        }
        INFORM => ACK,
        _ => return None,
    };
    let informed = question_kind(&options) == INFORM;
    let mut out = vec![0; FIXED];
    out[..4].copy_from_slice(&[2, 1, 6, 0]);
    out[4..8].copy_from_slice(&fixed[4..8]);
    out[10..12].copy_from_slice(&fixed[10..12]);
    if kind != NAK {
        out[12..16].copy_from_slice(&fixed[12..16]);
    }
    if kind != NAK && !informed {
        out[16..20].copy_from_slice(&four.address.octets());
    }
    out[28..44].copy_from_slice(&fixed[28..44]);
    out[236..240].copy_from_slice(&COOKIE);
    let mut put = |kind: u8, value: &[u8]| {
        out.extend([kind, value.len() as u8]);
        out.extend(value);
    };
    put(KIND, &[kind]);
    put(SERVER, &four.gateway.octets());
    if kind != NAK {
        if !informed {
            put(LEASE, &LEASE_SECONDS.to_be_bytes());
        }
        let mask = u32::MAX.checked_shl(32 - u32::from(four.length.min(32))).unwrap_or(0);
        put(MASK, &mask.to_be_bytes());
        put(MTU, &lease.mtu.to_be_bytes());
        if lease.first {
            put(ROUTER, &four.gateway.octets());
            // Without a router in their own subnet, some clients refuse all: it is said to be on the link (RFC 3442).
            let gateway = four.gateway.octets();
            let routes = [&[32][..], &gateway, &[0; 4], &[0], &gateway].concat();
            put(ROUTES, &routes);
            put(NAMESERVER, &four.nameserver.octets());
        }
    }
    out.push(255);
    out.resize(out.len().max(SHORTEST), 0);
    Some(Answer { bytes: out, unicast: kind != NAK && !client.is_unspecified() })
}

fn question_kind(options: &[(u8, &[u8])]) -> u8 {
    options.iter().find(|(k, _)| *k == KIND).and_then(|(_, v)| v.first().copied()).unwrap_or(0)
}

/// As far as they can be read.
fn options(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut out = Vec::new();
    while let Some((&kind, rest)) = bytes.split_first() {
        match kind {
            0 => bytes = rest,
            255 => break,
            _ => {
                let Some((&length, rest)) = rest.split_first() else { break };
                let Some((value, rest)) = rest.split_at_checked(length.into()) else { break };
                out.push((kind, value));
                bytes = rest;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::Mac;

    use super::super::Lease4;
    use super::*;

    fn lease() -> Lease {
        let four = Lease4 {
            address: Ipv4Addr::new(10, 0, 1, 5),
            length: 24,
            gateway: Ipv4Addr::new(10, 0, 1, 1),
            nameserver: Ipv4Addr::new(169, 254, 1, 1),
        };
        Lease { mac: Mac([6, 0, 0, 0, 0, 1]), four: Some(four), address6: None, mtu: 1400, first: true }
    }

    fn question(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut out = vec![0; FIXED];
        out[..8].copy_from_slice(&[1, 1, 6, 0, 9, 8, 7, 6]);
        out[28..34].copy_from_slice(&lease().mac.0);
        out[236..240].copy_from_slice(&COOKIE);
        out.extend([KIND, 1, kind]);
        out.extend(more);
        out.push(255);
        out
    }

    fn said(answer: &Answer) -> (u8, [u8; 4]) {
        let found = options(&answer.bytes[FIXED..]);
        (question_kind(&found), answer.bytes[16..20].try_into().unwrap())
    }

    #[test]
    fn a_nic_is_offered_and_granted_its_own_address_and_no_other() {
        let offer = answer(&question(DISCOVER, &[]), &lease()).unwrap();
        assert_eq!(said(&offer), (OFFER, [10, 0, 1, 5]));
        assert!(!offer.unicast && offer.bytes.len() >= SHORTEST);
        let found = options(&offer.bytes[FIXED..]);
        let routes = found.iter().find(|(k, _)| *k == ROUTES).unwrap().1;
        assert_eq!(routes, [32, 10, 0, 1, 1, 0, 0, 0, 0, 0, 10, 0, 1, 1]);
        let own = question(REQUEST, &[REQUESTED, 4, 10, 0, 1, 5, SERVER, 4, 10, 0, 1, 1]);
        assert_eq!(said(&answer(&own, &lease()).unwrap()), (ACK, [10, 0, 1, 5]));
        let another = question(REQUEST, &[REQUESTED, 4, 10, 0, 1, 6]);
        assert_eq!(said(&answer(&another, &lease()).unwrap()), (NAK, [0; 4]));
        let other_server = question(REQUEST, &[REQUESTED, 4, 10, 0, 1, 5, SERVER, 4, 10, 0, 1, 9]);
        assert_eq!(answer(&other_server, &lease()), None);
    }

    #[test]
    fn what_is_no_question_of_this_nic_is_not_answered() {
        let good = question(DISCOVER, &[]);
        for at in [0, 1, 2, 24, 28, 236] {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert_eq!(answer(&bad, &lease()), None, "{at}");
        }
        for end in 0..good.len() - 1 {
            assert_eq!(answer(&good[..end], &lease()), None, "{end}");
        }
        assert_eq!(answer(&question(OFFER, &[]), &lease()), None);
        assert_eq!(answer(&question(REQUEST, &[REQUESTED, 200, 1]), &lease()).map(|a| said(&a).0), Some(NAK));
    }
}
