//! Quantities with their units in the type: processor time and memory.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Thousandths of one processor. Written `250m` or, in whole processors, `2` or `1.5`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MilliCpu(pub u32);

/// Bytes. Written as a whole number, alone or with `Ki`, `Mi`, `Gi`, `Ti` (powers of 1024) or `k`, `M`, `G`, `T` (of 1000).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("{0:?} is not an amount of processor: write 250m, 2 or 1.5")]
    Cpu(String),
    #[error("{0:?} is not an amount of bytes: write 64Mi, 2Gi, 500M or 1048576")]
    Bytes(String),
}

const UNITS: [(&str, u64); 8] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

fn digits(s: &str) -> bool {
    !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit())
}

impl FromStr for MilliCpu {
    type Err = QuantityError;

    fn from_str(s: &str) -> Result<Self, QuantityError> {
        let parse = || {
            if let Some(millis) = s.strip_suffix('m') {
                return digits(millis).then(|| millis.parse().ok()).flatten();
            }
            let (whole, part) = s.split_once('.').unwrap_or((s, "0"));
            if !digits(whole) || !digits(part) || part.len() > 3 {
                return None;
            }
            let part: u32 = format!("{part:0<3}").parse().ok()?;
            whole.parse::<u32>().ok()?.checked_mul(1000)?.checked_add(part)
        };
        parse().map(Self).ok_or_else(|| QuantityError::Cpu(s.to_owned()))
    }
}

impl FromStr for Bytes {
    type Err = QuantityError;

    fn from_str(s: &str) -> Result<Self, QuantityError> {
        let (number, unit) =
            UNITS.iter().find_map(|(suffix, unit)| Some((s.strip_suffix(suffix)?, *unit))).unwrap_or((s, 1));
        let parse = || if digits(number) { number.parse::<u64>().ok()?.checked_mul(unit) } else { None };
        parse().map(Self).ok_or_else(|| QuantityError::Bytes(s.to_owned()))
    }
}

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) { write!(f, "{}", self.0 / 1000) } else { write!(f, "{}m", self.0) }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS[..4].iter().rev().find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit));
        match unit {
            Some((suffix, unit)) => write!(f, "{}{suffix}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A quantity comes as a text or as a bare number in its base unit (processors, bytes).
struct TextOrNumber<T>(std::marker::PhantomData<T>);

/// What a bare number may be.
trait BareNumber: FromStr<Err = QuantityError> {
    /// The largest, as the schema says.
    const MOST: u64;

    /// One with more places than are kept, which is what arithmetic leaves behind (`0.1 + 0.2`).
    fn from_fraction(v: f64) -> Result<Self, QuantityError>;
}

impl BareNumber for MilliCpu {
    const MOST: u64 = 999_999;

    /// Rounds up: who asks for anything does not get nothing.
    fn from_fraction(v: f64) -> Result<Self, QuantityError> {
        let millis = (v * 1000.0).ceil();
        if (0.0..=f64::from(u32::MAX)).contains(&millis) {
            // In range and whole, as was just seen.
            Ok(Self(millis as u32))
        } else {
            Err(QuantityError::Cpu(v.to_string()))
        }
    }
}

impl BareNumber for Bytes {
    const MOST: u64 = (1 << 53) - 1;

    fn from_fraction(v: f64) -> Result<Self, QuantityError> {
        Err(QuantityError::Bytes(v.to_string()))
    }
}

impl<T: BareNumber> de::Visitor<'_> for TextOrNumber<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a quantity, such as \"250m\" or \"64Mi\"")
    }

    fn visit_str<E: de::Error>(self, v: &str) -> Result<T, E> {
        v.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<T, E> {
        if v > T::MOST {
            return Err(E::custom(format_args!("a bare number is at most {}: write it with its unit", T::MOST)));
        }
        v.to_string().parse().map_err(E::custom)
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<T, E> {
        if v > T::MOST as f64 {
            return Err(E::custom(format_args!("a bare number is at most {}: write it with its unit", T::MOST)));
        }
        v.to_string().parse().or_else(|_| T::from_fraction(v)).map_err(E::custom)
    }
}

macro_rules! quantity {
    ($type:ident, $number:literal, $pattern:literal) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any(TextOrNumber::<$type>(std::marker::PhantomData))
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                // A pattern speaks of texts only, bounds of numbers only.
                json_schema!({"type": ["string", $number], "pattern": $pattern, "minimum": 0, "maximum": Self::MOST})
            }
        }
    };
}

quantity!(MilliCpu, "number", "^([0-9]{1,9}m|[0-9]{1,6}(\\.[0-9]{1,3})?)$");
quantity!(Bytes, "integer", "^([0-9]{1,19}|[0-9]{1,15}(Ki|k)|[0-9]{1,12}(Mi|M)|[0-9]{1,9}(Gi|G)|[0-9]{1,6}(Ti|T))$");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_what_people_write() {
        assert_eq!("250m".parse(), Ok(MilliCpu(250)));
        assert_eq!("1.5".parse(), Ok(MilliCpu(1500)));
        assert_eq!("2".parse(), Ok(MilliCpu(2000)));
        assert_eq!("64Mi".parse(), Ok(Bytes(64 << 20)));
        assert_eq!("500M".parse(), Ok(Bytes(500_000_000)));
        for wrong in ["", "m", "-1", "1.2345", "64MB", "1e3", "99999999999999999999", "64 Mi"] {
            assert!(wrong.parse::<MilliCpu>().is_err() && wrong.parse::<Bytes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn quantities_write_the_shortest_exact_form() {
        assert_eq!(Bytes(64 << 20).to_string(), "64Mi");
        assert_eq!(Bytes(1000).to_string(), "1000");
        assert_eq!(Bytes(0).to_string(), "0");
        assert_eq!(MilliCpu(1500).to_string(), "1500m");
        assert_eq!(serde_json::from_str::<MilliCpu>("0.5").unwrap(), MilliCpu(500));
    }
}
