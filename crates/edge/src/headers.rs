//! What a proxy does to headers (RFC 9110, section 7.6): takes off those of one hop, and says who asked for what.

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, Entry, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use nexus_env::Endpoint;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// From one gateway to another: the region of the sender. What carries it is passed on no further.
pub(crate) const HOP: HeaderName = HeaderName::from_static("x-nexus-hop");
/// From one gateway to another: the service that the request is for.
pub(crate) const SERVICE: HeaderName = HeaderName::from_static("x-nexus-service");
/// On a gateway's answer to another: it is its own and not an instance's, and what has become of the request.
pub(crate) const REFUSED: HeaderName = HeaderName::from_static("x-nexus-refused");
/// The region of the gateway that answers, to a ping.
pub(crate) const REGION: HeaderName = HeaderName::from_static("x-nexus-region");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let texts = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    texts.flat_map(|t| t.split(',')).any(|t| t.split(';').next().is_some_and(|t| t.trim().eq_ignore_ascii_case(token)))
}

/// The protocol that a message asks to change to.
pub(crate) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    if has_token(headers, &CONNECTION, "upgrade") { headers.get(UPGRADE).cloned() } else { None }
}

/// Removes what belongs to one hop, and everything that `Connection` names.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|t| t.split(','))
        .filter_map(|t| t.trim().parse().ok())
        // Naming these would change what the message is.
        .filter(|name| ![HOST, CONTENT_LENGTH].contains(name))
        .collect();
    for name in named.iter().chain(&[CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE]) {
        headers.remove(name);
    }
}

/// Makes a user's headers those of the request to an instance. Without `peer` they come from another gateway, which has
/// said already who asked for what.
pub(crate) fn to_instance(headers: &mut HeaderMap, host: &HeaderValue, peer: Option<&Endpoint>, http2: bool) {
    let trailers = has_token(headers, &TE, "trailers");
    let upgrade = upgrade(headers);
    strip(headers);
    // The gateway reads the body when the instance takes it, which is what the user waits for.
    headers.remove(EXPECT);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        if !http2 {
            headers.append(CONNECTION, HeaderValue::from_static("te"));
        }
    }
    if let Some(protocol) = upgrade.filter(|_| !http2) {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if let Some(Endpoint::Tcp(peer)) = peer {
        let address = peer.ip().to_canonical().to_string();
        let address = HeaderValue::try_from(address).expect("an address is ASCII");
        match headers.entry(FORWARDED_FOR) {
            Entry::Occupied(mut held) => {
                let before: Vec<_> = held.iter().filter_map(|v| v.to_str().ok()).collect();
                let all = format!("{}, {}", before.join(", "), address.to_str().unwrap_or_default());
                held.insert(HeaderValue::try_from(all).unwrap_or(address));
            }
            Entry::Vacant(free) => {
                free.insert(address);
            }
        }
    }
    if peer.is_some() {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
        headers.insert(FORWARDED_HOST, host.clone());
    }
    if http2 {
        headers.remove(HOST);
    } else {
        headers.insert(HOST, host.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_hop_go_and_the_users_address_is_added() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Private, host"),
            ("x-private", "1"),
            ("keep-alive", "5"),
            ("te", "gzip, trailers"),
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-proto", "https"),
            ("accept", "*/*"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let peer = Endpoint::Tcp("[::ffff:9.9.9.9]:1".parse().unwrap());
        to_instance(&mut headers, &HeaderValue::from_static("shop.localhost"), Some(&peer), false);
        let text = |name: &str| headers.get(name).map(|v| v.to_str().unwrap());
        assert_eq!(text("x-private"), None);
        assert_eq!(text("keep-alive"), None);
        assert_eq!(text("te"), Some("trailers"));
        assert_eq!(text("connection"), Some("te"));
        assert_eq!(text("x-forwarded-for"), Some("1.1.1.1, 9.9.9.9"));
        assert_eq!(text("x-forwarded-proto"), Some("http"));
        assert_eq!(text("x-forwarded-host"), Some("shop.localhost"));
        assert_eq!(text("host"), Some("shop.localhost"));
        assert_eq!(text("accept"), Some("*/*"));
    }
}
