//! Asks other identity providers. Their URLs are tenants', so that without care a tenant could have a server ask whatever only
//! the server reaches: its own ports, the machines beside it, a data centre's metadata service.
//!
//! So only addresses of the public internet are reached, and the networks that the operator names. The address is judged
//! where it is connected to, after the name was looked up: a name that means another address the second time gains
//! nothing. Redirects are not followed, no proxy is used, and time and size are bounded.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use nexus_api::{ProviderDoor, ProviderRequest};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{StatusCode, Url};

/// How long one question may take, its answer read to the end.
const PATIENCE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const ADDRESSES: usize = 16;

/// A range of addresses, such as `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    first: u128,
    bits: u32,
}

/// IPv4 addresses where IPv6 maps them, so that one rule holds for both.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

impl Network {
    fn mask(bits: u32) -> u128 {
        u128::MAX.checked_shl(128 - bits).unwrap_or(0)
    }

    fn has(&self, address: IpAddr) -> bool {
        number(address) & Self::mask(self.bits) == self.first
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no network, such as 10.0.0.0/8 or fd00::/8");
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let (most, before) = if address.is_ipv4() { (32, 96) } else { (128, 0) };
        let bits: u32 = bits.parse().map_err(|_| wrong())?;
        let bits = Some(bits).filter(|b| *b <= most).ok_or_else(wrong)? + before;
        let first = number(address);
        if first & !Self::mask(bits) != 0 {
            return Err(format!("{text:?} has bits set behind its prefix"));
        }
        Ok(Self { first, bits })
    }
}

/// Whether an address is of the public internet (the special-purpose registries of RFC 6890 say what is not).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => is_public_v4(v4),
            None => is_public_v6(v6),
        },
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = matches!(
        (a, b, c),
        (0 | 10 | 127 | 224.., _, _) | (100, 64..=127, _) | (192, 0, 0) | (192, 88, 99) | (198, 18..=19, _)
    );
    !(special || address.is_private() || address.is_link_local() || address.is_documentation())
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    match address.segments() {
        // Teredo and others of IETF's own; documentation; 6to4, which holds an IPv4 address.
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x2002, ..] | [0x3fff, 0..=0xfff, ..] => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Where those may be whom servers ask on behalf of tenants.
#[derive(Debug, Clone)]
pub(super) struct Allowed {
    networks: Arc<[Network]>,
    /// The field of the configuration that names them.
    setting: &'static str,
}

impl Allowed {
    pub(super) fn new(networks: &[String], setting: &'static str) -> anyhow::Result<Self> {
        let networks: Result<Vec<Network>, String> = networks.iter().map(|n| n.parse()).collect();
        Ok(Self { networks: networks.map_err(anyhow::Error::msg)?.into(), setting })
    }

    fn has(&self, address: IpAddr) -> bool {
        is_public(address) || self.networks.iter().any(|network| network.has(address))
    }

    /// Judges the address that stands in a URL itself: those are not looked up.
    pub(super) fn judge(&self, url: &Url) -> Result<(), Elsewhere> {
        let literal = url.host_str().and_then(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().ok());
        if literal.is_some_and(|address| !self.has(address)) { Err(Elsewhere(self.setting)) } else { Ok(()) }
    }
}

/// An address that servers don't reach, with the setting that could allow it.
#[derive(Debug)]
pub(super) struct Elsewhere(&'static str);

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its address is not one that servers of this cloud reach (`{}` of their configuration)", self.0)
    }
}

impl std::error::Error for Elsewhere {}

/// Looks names up as the machine does, and keeps the addresses that may be reached.
pub(super) struct Lookup(pub Allowed);

impl Resolve for Lookup {
    fn resolve(&self, name: Name) -> Resolving {
        let allowed = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let kept: Vec<SocketAddr> = found.filter(|a| allowed.has(a.ip())).take(ADDRESSES).collect();
            if kept.is_empty() {
                return Err(Elsewhere(allowed.setting).into());
            }
            Ok(Box::new(kept.into_iter()) as Addrs)
        })
    }
}

/// The way to other identity providers.
pub struct Providers {
    http: reqwest::Client,
    allowed: Allowed,
}

impl Providers {
    pub fn new(networks: &[String]) -> anyhow::Result<Self> {
        Self::patient(networks, PATIENCE)
    }

    fn patient(networks: &[String], patience: Duration) -> anyhow::Result<Self> {
        let allowed = Allowed::new(networks, "provider_networks")?;
        crate::install_crypto();
        let http = reqwest::Client::builder()
            .user_agent(concat!("nexus/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .dns_resolver(Lookup(allowed.clone()))
            .connect_timeout(CONNECT)
            .timeout(patience)
            .build()
            .context("making the client for identity providers")?;
        Ok(Self { http, allowed })
    }

    async fn asked(&self, request: ProviderRequest) -> Result<Bytes, String> {
        let url: Url = request.url.parse().map_err(|_| "its URL can't be read".to_owned())?;
        self.allowed.judge(&url).map_err(|e| e.to_string())?;
        let posts = request.form.is_some();
        let mut question = match request.form {
            Some(form) => self
                .http
                .post(url)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.as_bytes().to_vec()),
            None => self.http.get(url),
        };
        question = question.header(ACCEPT, "application/json");
        if let Some(authorization) = request.authorization {
            let value = HeaderValue::try_from(authorization.as_str()).map(|mut value| {
                value.set_sensitive(true);
                value
            });
            question = question.header(AUTHORIZATION, value.map_err(|_| "its client can't be named".to_owned())?);
        }
        let answer = question.send().await.map_err(|e| told(&e))?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED if posts => {}
            status => return Err(format!("it answered {status}")),
        }
        let mut body = BytesMut::new();
        let mut pieces = answer.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| told(&e))?;
            if body.len() + piece.len() > request.max {
                return Err(format!("its answer has more than {} bytes", request.max));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }
}

/// What went wrong, in few words: reqwest's own name the URL, and the cause may name more.
pub(super) fn told(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    match error {
        _ if cause.is::<Elsewhere>() => cause.to_string(),
        e if e.is_timeout() => "it takes too long".to_owned(),
        e if e.is_connect() => "it can't be reached".to_owned(),
        _ => "the connection broke".to_owned(),
    }
}

#[async_trait]
impl ProviderDoor for Providers {
    async fn ask(&self, request: ProviderRequest) -> Result<Bytes, String> {
        let url = request.url.clone();
        self.asked(request).await.inspect_err(|why| tracing::info!(url, why, "an identity provider gave no answer"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use zeroize::Zeroizing;

    use super::*;

    #[test]
    fn only_the_public_internet_is_reached_without_asking_the_operator() {
        let public = |text: &str| is_public(text.parse().unwrap());
        for inside in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.0.8",
            "198.18.0.1",
            "192.0.2.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fd00::1",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::1",
            "2001::1",
            "2001:db8::1",
            "100::1",
        ] {
            assert!(!public(inside), "{inside}");
        }
        for outside in
            ["1.1.1.1", "172.32.0.1", "192.0.1.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "::ffff:1.1.1.1"]
        {
            assert!(public(outside), "{outside}");
        }
    }

    #[test]
    fn a_network_has_its_addresses() {
        let has = |network: &str, address: &str| network.parse::<Network>().unwrap().has(address.parse().unwrap());
        assert!(has("10.0.0.0/8", "10.255.0.1") && !has("10.0.0.0/8", "11.0.0.1"));
        assert!(has("127.0.0.0/8", "::ffff:127.0.0.1") && !has("127.0.0.0/8", "::1"));
        assert!(has("::1/128", "::1") && !has("::1/128", "::2"));
        assert!(has("fd00::/8", "fd12::1") && has("0.0.0.0/0", "9.9.9.9") && !has("0.0.0.0/0", "fd00::1"));
        for wrong in ["10.0.0.0", "10.0.0.0/33", "10.0.0.1/8", "fd00::/129", "x/8", "10.0.0.0/-1", ""] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    /// Answers every connection with the same text, after reading some of what it is asked.
    fn provider(answer: Vec<u8>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let answer = answer.clone();
                std::thread::spawn(move || {
                    let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
                    let _ = TcpStream::write_all(&mut stream, &answer);
                });
            }
        });
        url
    }

    fn get(url: String) -> ProviderRequest {
        ProviderRequest { url, form: None, authorization: None, max: 100 }
    }

    #[tokio::test]
    async fn nothing_inside_is_asked_unless_the_operator_allows_it() {
        let url = provider(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello".to_vec());
        let by_name = url.replace("127.0.0.1", "localhost");
        let strict = Providers::new(&[]).unwrap();
        for inside in [url.clone(), by_name.clone(), url.replace("127.0.0.1", "[::ffff:127.0.0.1]")] {
            let why = strict.ask(get(inside.clone())).await.unwrap_err();
            assert!(why.contains("provider_networks"), "{inside}: {why}");
        }
        let local = Providers::new(&["127.0.0.0/8".into(), "::1/128".into()]).unwrap();
        for inside in [url, by_name] {
            assert_eq!(local.ask(get(inside)).await.unwrap(), "hello");
        }
    }

    #[tokio::test]
    async fn a_provider_that_does_not_end_its_answer_is_left() {
        let hasty = Providers::patient(&["127.0.0.0/8".into()], Duration::from_millis(300)).unwrap();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        assert_eq!(hasty.ask(get(url)).await.unwrap_err(), "it takes too long");
        // It says how much will come, and stops.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let held = std::thread::spawn(move || {
            let mut stream = silent.accept().unwrap().0;
            let asked = std::io::Read::read(&mut stream, &mut [0; 4096]).unwrap();
            assert!(asked > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhalf").unwrap();
            stream
        });
        assert_eq!(hasty.ask(get(url)).await.unwrap_err(), "it takes too long");
        drop(held.join());
    }

    #[tokio::test]
    async fn redirects_floods_and_other_answers_are_refused() {
        let local = Providers::new(&["127.0.0.0/8".into()]).unwrap();
        let ask = async |answer: &str, form: bool| {
            let form = form.then(|| Zeroizing::new("code=x".to_owned()));
            local.ask(ProviderRequest { form, ..get(provider(answer.as_bytes().to_vec())) }).await
        };
        let moved = "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n";
        assert!(ask(moved, false).await.unwrap_err().contains("302"));
        let flood = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "x".repeat(1 << 20));
        assert!(ask(&flood, false).await.unwrap_err().contains("more than 100 bytes"));
        let refused = "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(ask(refused, true).await.unwrap(), "{}");
        assert!(ask(refused, false).await.unwrap_err().contains("400"));
        assert_eq!(ask("nonsense", false).await.unwrap_err(), "the connection broke");
    }
}
