//! Speaking to machines whose URLs are tenants', so that without care a tenant could have a server ask whatever only the server
//! reaches: its own ports, the machines beside it, a data centre's metadata service.
//!
//! So only addresses of the public internet are reached, and the networks that the operator names. The address is judged
//! where it is connected to, after the name was looked up: a name that means another address the second time gains
//! nothing. Redirects are not followed, no proxy is used, and time is bounded.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Certificate, Url};
use rustls::CertificateError;

const CONNECT: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const ADDRESSES: usize = 16;

/// A client that follows no redirect and uses no proxy, for addresses that the operator chose.
pub fn trusted(patience: Duration) -> anyhow::Result<reqwest::Client> {
    builder().timeout(patience).build().context("making an HTTP client")
}

fn builder() -> reqwest::ClientBuilder {
    crate::install_crypto();
    reqwest::Client::builder()
        .user_agent(concat!("nexus/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(CONNECT)
}

/// The way to addresses that tenants chose.
pub struct Outbound {
    http: reqwest::Client,
    allowed: Allowed,
}

impl Outbound {
    /// `networks` may be reached beside the public internet; `setting` names them in the configuration.
    pub fn new(networks: &[String], setting: &'static str, patience: Duration) -> anyhow::Result<Self> {
        Self::made(networks, setting, builder().timeout(patience))
    }

    /// For answers that may take long, as long as no pause in them does. Certificates may be by `authorities` too.
    pub fn streaming(
        networks: &[String],
        setting: &'static str,
        silence: Duration,
        authorities: Vec<Certificate>,
    ) -> anyhow::Result<Self> {
        Self::made(networks, setting, builder().read_timeout(silence).tls_certs_merge(authorities))
    }

    fn made(networks: &[String], setting: &'static str, http: reqwest::ClientBuilder) -> anyhow::Result<Self> {
        let networks: Result<Vec<Network>, String> = networks.iter().map(|n| n.parse()).collect();
        let allowed = Allowed { networks: networks.map_err(anyhow::Error::msg)?.into(), setting };
        let http = http.dns_resolver(Lookup(allowed.clone())).build().context("making an HTTP client")?;
        Ok(Self { http, allowed })
    }

    /// The client for a URL. Names are judged by it; addresses, which are not looked up, here.
    pub fn to(&self, url: &Url) -> Result<&reqwest::Client, Elsewhere> {
        let literal = url.host_str().and_then(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().ok());
        match literal {
            Some(address) if !self.allowed.has(address) => Err(self.allowed.elsewhere()),
            _ => Ok(&self.http),
        }
    }
}

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

/// What may be reached.
#[derive(Debug, Clone)]
struct Allowed {
    networks: Arc<[Network]>,
    /// The field of the configuration that names them.
    setting: &'static str,
}

impl Allowed {
    fn has(&self, address: IpAddr) -> bool {
        is_public(address) || self.networks.iter().any(|network| network.has(address))
    }

    fn elsewhere(&self) -> Elsewhere {
        Elsewhere(self.setting)
    }
}

/// An address that may not be reached.
#[derive(Debug)]
pub struct Elsewhere(&'static str);

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(setting) = self;
        write!(f, "its address is not one that servers of this cloud reach (`{setting}` of their configuration)")
    }
}

impl std::error::Error for Elsewhere {}

/// Looks names up as the machine does, and keeps the addresses that may be reached.
struct Lookup(Allowed);

impl Resolve for Lookup {
    fn resolve(&self, name: Name) -> Resolving {
        let allowed = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let kept: Vec<SocketAddr> = found.filter(|a| allowed.has(a.ip())).take(ADDRESSES).collect();
            if kept.is_empty() {
                return Err(allowed.elsewhere().into());
            }
            Ok(Box::new(kept.into_iter()) as Addrs)
        })
    }
}

fn cause(error: &reqwest::Error) -> &(dyn std::error::Error + 'static) {
    let mut cause: &(dyn std::error::Error + 'static) = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause
}

/// What was wrong with the other side's certificate, if a request ended for that.
fn certificate(error: &reqwest::Error) -> Option<&CertificateError> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(rustls::Error::InvalidCertificate(why)) = error.downcast_ref() {
            return Some(why);
        }
        // What an I/O error was made of is not among its sources, and it may be another one.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Whether a request ended because nobody here knows the authority that signed the other side's certificate.
pub fn is_a_strangers(error: &reqwest::Error) -> bool {
    matches!(certificate(error), Some(CertificateError::UnknownIssuer))
}

/// Whether a request ended because its address may not be reached.
pub fn is_elsewhere(error: &reqwest::Error) -> bool {
    cause(error).is::<Elsewhere>()
}

/// What went wrong, in few words: reqwest's own name the URL, and the cause may name more.
pub fn told(error: &reqwest::Error) -> String {
    let cause = cause(error);
    if let Some(why) = certificate(error) {
        return match why {
            CertificateError::UnknownIssuer => "its certificate is by an authority that is not trusted here".to_owned(),
            why => format!("its certificate is not valid: {why}"),
        };
    }
    match error {
        _ if cause.is::<Elsewhere>() => cause.to_string(),
        e if e.is_timeout() => "it takes too long".to_owned(),
        e if e.is_connect() => "it can't be reached".to_owned(),
        _ => "the connection broke".to_owned(),
    }
}

#[cfg(test)]
mod tests {
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
}
