//! Networks: an address and how many of its first bits count.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A network, such as `203.0.113.0/24` or `2001:db8::/32`. Bits behind the prefix are kept as they were written and count
/// for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    pub address: IpAddr,
    pub length: u8,
}

/// Why a text is not a [`Cidr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a network such as 203.0.113.0/24 or 2001:db8::/32")]
pub struct CidrError;

/// A text that matches is a network; a few odd spellings of one do not match.
const PATTERN: &str = concat!(
    r"^(((25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])\.){3}(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])/(3[0-2]|[12]?[0-9])",
    r"|(([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,7}:|([0-9a-f]{1,4}:){1,4}(:[0-9a-f]{1,4}){1,3}",
    r"|([0-9a-f]{1,4}:){1,6}:[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,5}(:[0-9a-f]{1,4}){1,2}",
    r"|([0-9a-f]{1,4}:){1,2}(:[0-9a-f]{1,4}){1,5}|:(:[0-9a-f]{1,4}){1,7}|::)",
    r"/(12[0-8]|1[01][0-9]|[1-9]?[0-9]))$",
);

impl Cidr {
    /// A network of the address alone.
    pub fn host(address: IpAddr) -> Self {
        Self { address, length: if address.is_ipv6() { 128 } else { 32 } }
    }

    /// The network's first address: what is behind the prefix is zero.
    pub fn first(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(a) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
                IpAddr::V4((a.to_bits() & mask).into())
            }
            IpAddr::V6(a) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
                IpAddr::V6((a.to_bits() & mask).into())
            }
        }
    }

    /// The network's last address.
    pub fn last(&self) -> IpAddr {
        match self.first() {
            IpAddr::V4(a) => {
                let behind = u32::MAX.checked_shr(u32::from(self.length)).unwrap_or(0);
                IpAddr::V4((a.to_bits() | behind).into())
            }
            IpAddr::V6(a) => {
                let behind = u128::MAX.checked_shr(u32::from(self.length)).unwrap_or(0);
                IpAddr::V6((a.to_bits() | behind).into())
            }
        }
    }

    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.is_ipv4() && Self { address, length: self.length }.first() == self.first()
    }

    /// Whether all of another network is in it.
    pub fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && self.contains(other.address)
    }

    /// Whether any address is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// Whether nothing is written behind the prefix.
    pub fn is_trimmed(&self) -> bool {
        self.first() == self.address
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (address, length) = text.split_once('/').ok_or(CidrError)?;
        let address: IpAddr = address.parse().map_err(|_| CidrError)?;
        if length.is_empty() || length.len() > 3 || !length.bytes().all(|b| b.is_ascii_digit()) {
            return Err(CidrError);
        }
        let length: u8 = length.parse().map_err(|_| CidrError)?;
        if length > Self::host(address).length {
            return Err(CidrError);
        }
        Ok(Self { address, length })
    }
}

impl Serialize for Cidr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(|e| serde::de::Error::custom(format!("{text:?} is {e}")))
    }
}

impl JsonSchema for Cidr {
    fn schema_name() -> Cow<'static, str> {
        "Cidr".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A network, such as 203.0.113.0/24 or 2001:db8::/32.",
            "pattern": PATTERN,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_know_what_is_in_them() {
        let net = |text: &str| text.parse::<Cidr>().unwrap();
        for (a, b, covers, overlaps) in [
            ("10.0.0.0/8", "10.1.0.0/16", true, true),
            ("10.1.0.0/16", "10.0.0.0/8", false, true),
            ("10.0.0.0/8", "11.0.0.0/8", false, false),
            ("0.0.0.0/0", "255.255.255.255/32", true, true),
            ("0.0.0.0/0", "::/0", false, false),
            ("fd00::/8", "fd12::/64", true, true),
        ] {
            assert_eq!((net(a).covers(&net(b)), net(a).overlaps(&net(b))), (covers, overlaps), "{a} {b}");
        }
        for (a, last) in [("10.0.0.0/30", "10.0.0.3"), ("0.0.0.0/0", "255.255.255.255"), ("fd00::/127", "fd00::1")] {
            assert_eq!(net(a).last(), last.parse::<IpAddr>().unwrap(), "{a}");
        }
        assert!(net("10.1.0.0/16").contains("10.1.255.255".parse().unwrap()));
        assert!(!net("10.1.0.0/16").contains("10.2.0.0".parse().unwrap()));
        assert!(net("10.1.0.0/16").is_trimmed() && !net("10.1.0.1/16").is_trimmed());
    }

    #[test]
    fn networks_are_read_and_what_is_none_is_refused() {
        for (text, first) in [
            ("203.0.113.7/24", "203.0.113.0"),
            ("0.0.0.0/0", "0.0.0.0"),
            ("10.1.2.3/32", "10.1.2.3"),
            ("::/0", "::"),
            ("2001:db8:ff::/33", "2001:db8::"),
            ("2001:db8::1/128", "2001:db8::1"),
        ] {
            let cidr: Cidr = text.parse().unwrap();
            assert_eq!(cidr.first(), first.parse::<IpAddr>().unwrap(), "{text}");
            assert_eq!(cidr.to_string(), text);
        }
        for text in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "10.0.0/8", "a/8", "10.0.0.0/+8", "10.0.0.0/", "::1/1000"]
        {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
