//! DHCPv6 (RFC 8415) for one NIC, which has one address and always the same.
//!
//! ```text
//! kind 1 | transaction 3 | options: code 2, length 2, value …
//! ```
//!
//! Of several associations that a client asks addresses for, the first gets the address and the others none.

use std::net::Ipv6Addr;

use super::Lease;
use crate::vpc::links::GATEWAY_MAC;

pub const SERVER_PORT: u16 = 547;
/// All_DHCP_Relay_Agents_and_Servers.
pub const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// A link-layer identifier (type 3, Ethernet) of the gateway's hardware address: the same on every host, as the gateway is.
const SERVER_ID: [u8; 10] = {
    let [a, b, c, d, e, f] = GATEWAY_MAC;
    [0, 3, 0, 1, a, b, c, d, e, f]
};
/// Long: answers go on only while the agent lives, and nothing can change but with the NIC.
const PREFERRED_SECONDS: u32 = 12 * 3600;
const VALID_SECONDS: u32 = 24 * 3600;
/// An identifier has at most so many bytes (RFC 8415, 11.1).
const MAX_ID: usize = 130;
const MAX_ASSOCIATIONS: usize = 4;

const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION: u8 = 11;

const CLIENT_ID: u16 = 1;
const SERVER_ID_OPTION: u16 = 2;
const ASSOCIATION: u16 = 3;
const ADDRESS: u16 = 5;
const PREFERENCE: u16 = 7;
const STATUS: u16 = 13;
const RAPID_COMMIT: u16 = 14;

const SUCCESS: u16 = 0;
const NO_ADDRESSES: u16 = 2;
const NOT_ON_LINK: u16 = 4;

/// The answer to a question, if there is one.
pub fn answer(question: &[u8], lease: &Lease) -> Option<Vec<u8>> {
    let own = lease.address6?;
    let (header, rest) = question.split_at_checked(4)?;
    let options = options(rest);
    let option = |code: u16| options.iter().find(|(c, _)| *c == code).map(|(_, v)| *v);
    let client = option(CLIENT_ID).filter(|id| (3..=MAX_ID).contains(&id.len()));
    let server = option(SERVER_ID_OPTION);
    let kind = header[0];
    let right = match kind {
        SOLICIT | CONFIRM | REBIND => client.is_some() && server.is_none(),
        REQUEST | RENEW | RELEASE | DECLINE => client.is_some() && server == Some(&SERVER_ID[..]),
        INFORMATION => server.is_none_or(|id| id == SERVER_ID),
        _ => false,
    };
    if !right {
        return None;
    }
    let rapid = kind == SOLICIT && option(RAPID_COMMIT).is_some();
    let mut out = vec![if kind == SOLICIT && !rapid { ADVERTISE } else { REPLY }];
    out.extend(&header[1..]);
    put(&mut out, SERVER_ID_OPTION, &SERVER_ID);
    if let Some(id) = client {
        put(&mut out, CLIENT_ID, id);
    }
    match kind {
        SOLICIT | REQUEST | RENEW | REBIND => {
            let associations = options.iter().filter(|(code, value)| *code == ASSOCIATION && value.len() >= 12);
            for (n, (_, association)) in associations.take(MAX_ASSOCIATIONS).enumerate() {
                let mut value = association[..4].to_vec();
                value.extend((PREFERRED_SECONDS / 2).to_be_bytes());
                value.extend((PREFERRED_SECONDS / 5 * 4).to_be_bytes());
                if n == 0 {
                    let lifetimes = [PREFERRED_SECONDS.to_be_bytes(), VALID_SECONDS.to_be_bytes()].concat();
                    put(&mut value, ADDRESS, &[&own.octets()[..], &lifetimes].concat());
                } else {
                    status(&mut value, NO_ADDRESSES, "a NIC has one address");
                }
                put(&mut out, ASSOCIATION, &value);
            }
            if rapid {
                put(&mut out, RAPID_COMMIT, &[]);
            } else if kind == SOLICIT {
                // No client need wait for other servers.
                put(&mut out, PREFERENCE, &[255]);
            }
        }
        CONFIRM => {
            let mut claimed = options
                .iter()
                .filter(|(code, value)| *code == ASSOCIATION && value.len() >= 12)
                .flat_map(|(_, value)| self::options(&value[12..]))
                .filter(|(code, value)| *code == ADDRESS && value.len() >= 16)
                .map(|(_, value)| &value[..16])
                .peekable();
            // Without an address there is nothing to confirm.
            claimed.peek()?;
            let right = claimed.all(|a| *a == own.octets());
            status(&mut out, if right { SUCCESS } else { NOT_ON_LINK }, "");
        }
        RELEASE | DECLINE => status(&mut out, SUCCESS, ""),
        _ => {}
    }
    Some(out)
}

fn put(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_be_bytes());
    out.extend((value.len() as u16).to_be_bytes());
    out.extend(value);
}

fn status(out: &mut Vec<u8>, code: u16, words: &str) {
    put(out, STATUS, &[&code.to_be_bytes()[..], words.as_bytes()].concat());
}

/// As far as they can be read.
fn options(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut out = Vec::new();
    while let Some((header, rest)) = bytes.split_at_checked(4) {
        let code = u16::from_be_bytes([header[0], header[1]]);
        let length = u16::from_be_bytes([header[2], header[3]]);
        let Some((value, rest)) = rest.split_at_checked(length.into()) else { break };
        out.push((code, value));
        bytes = rest;
    }
    out
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::Mac;

    use super::*;

    const OWN: Ipv6Addr = Ipv6Addr::new(0xfd12, 0, 0, 1, 0, 0, 0, 5);

    fn lease() -> Lease {
        Lease { mac: Mac([6, 0, 0, 0, 0, 1]), four: None, address6: Some(OWN), mtu: 1400, first: true }
    }

    fn question(kind: u8, more: &[(u16, &[u8])]) -> Vec<u8> {
        let mut out = vec![kind, 1, 2, 3];
        put(&mut out, CLIENT_ID, &[0, 3, 0, 1, 6, 0, 0, 0, 0, 1]);
        more.iter().for_each(|(code, value)| put(&mut out, *code, value));
        out
    }

    fn address_in(answer: &[u8]) -> Option<Vec<u8>> {
        let found = options(&answer[4..]);
        let association = found.iter().find(|(c, _)| *c == ASSOCIATION)?.1;
        Some(options(&association[12..]).iter().find(|(c, _)| *c == ADDRESS)?.1[..16].to_vec())
    }

    #[test]
    fn a_nic_is_given_its_own_address() {
        let association: (u16, &[u8]) = (ASSOCIATION, &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        let offer = answer(&question(SOLICIT, &[association]), &lease()).unwrap();
        assert_eq!((offer[0], &offer[1..4]), (ADVERTISE, &[1, 2, 3][..]));
        assert_eq!(address_in(&offer), Some(OWN.octets().to_vec()));
        let at_once = answer(&question(SOLICIT, &[association, (RAPID_COMMIT, &[])]), &lease()).unwrap();
        assert_eq!(at_once[0], REPLY);
        let given = answer(&question(REQUEST, &[association, (SERVER_ID_OPTION, &SERVER_ID)]), &lease()).unwrap();
        assert_eq!((given[0], address_in(&given)), (REPLY, Some(OWN.octets().to_vec())));
    }

    #[test]
    fn what_is_for_another_server_or_cut_short_is_not_answered() {
        assert_eq!(answer(&question(REQUEST, &[]), &lease()), None);
        assert_eq!(answer(&question(REQUEST, &[(SERVER_ID_OPTION, &[0, 3, 0, 1])]), &lease()), None);
        assert_eq!(answer(&question(12, &[]), &lease()), None);
        let whole = question(SOLICIT, &[]);
        for end in 0..whole.len() {
            assert_eq!(answer(&whole[..end], &lease()), None, "{end}");
        }
    }
}
