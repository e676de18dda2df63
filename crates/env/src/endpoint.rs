//! Where something listens: a TCP socket address or a Unix socket's path.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Written `tcp:1.2.3.4:80`, `tcp:[::1]:80` (or plain `1.2.3.4:80`) and `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Text that is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no endpoint: write IP:PORT, tcp:IP:PORT or unix:/absolute/path")]
pub struct ParseEndpointError {
    text: String,
}

impl Endpoint {
    /// The socket address of a TCP endpoint.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "tcp:{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || ParseEndpointError { text: text.chars().take(200).collect() };
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(refuse()) };
        }
        text.strip_prefix("tcp:").unwrap_or(text).parse().map(Self::Tcp).map_err(|_| refuse())
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_back_as_they_are_written() {
        for text in ["tcp:1.2.3.4:80", "tcp:[::1]:443", "unix:/run/nexus.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!("1.2.3.4:80".parse::<Endpoint>().unwrap().to_string(), "tcp:1.2.3.4:80");
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "tcp:", "localhost:80", "1.2.3.4", "unix:relative", "udp:1.2.3.4:1"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
