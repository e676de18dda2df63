//! What an app demands of the hosts that its instances are placed on, in a small language:
//!
//! | constraint | met by hosts |
//! |---|---|
//! | `latency<20ms` | whose round trip to the nearest live gateway has been measured and is below that; `us` for microseconds |
//! | `zone in (a,b)`, `zone=a` | of these zones |
//! | `label.KEY=VALUE` | that carry the label |
//! | `spread=zone`, `spread=fault-domain`, `spread=rack`, `spread=host` | whose zone (fault domain, rack, host) has no more of the app's instances than the one with the fewest that could take one |
//! | `with=APP` | that run an instance of another app of the project |
//! | `not-with=APP` | that run none of it; it holds for both apps, whichever names the other |
//! | `numa=single` | with a NUMA node that has room for a whole instance, which is then kept to that node; `numa=any` takes it back |
//!
//! Every constraint of an app must be met. They are looked at when an instance is placed: what runs is not moved because
//! its host no longer meets them. Written as a list of texts, or as one text with commas between.

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Spread;
use crate::Name;
use crate::selector::{is_label_key, is_label_value};

/// Constraints of one app.
pub const MAX_CONSTRAINTS: usize = 16;
/// Zones that one constraint names.
const MAX_ZONES: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Constraint {
    /// Microseconds; the round trip must be below.
    Latency(u32),
    Zone(Vec<Name>),
    /// Key and value.
    Label(String, String),
    /// Never [`Spread::None`].
    Spread(Spread),
    With(Name),
    NotWith(Name),
    Numa(Numa),
}

/// From how many of its host's NUMA nodes an instance takes what it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numa {
    /// Any, a part here and a part there.
    Any,
    /// One, which it is kept to.
    Single,
}

/// Why a text is no [`Constraint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no constraint: write latency<20ms, zone in (a,b), label.KEY=VALUE, spread=zone (or fault-domain, rack, host), \
     with=APP, not-with=APP or numa=single"
)]
pub struct ConstraintError(String);

/// [`Constraint::from_str`] as a pattern, without its ends.
const PATTERN: &str = concat!(
    r"(latency *< *[1-9][0-9]{0,4}(ms|us)",
    r"|zone *in *\( *N( *, *N){0,15} *\)|zone=N",
    r"|label\.([A-Za-z0-9._-]{1,253}/)?[A-Za-z0-9._-]{1,63}=[A-Za-z0-9._-]{0,63}",
    r"|spread=(zone|fault-domain|rack|host)|(not-)?with=N|numa=(any|single))",
);
const NAME: &str = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";

impl FromStr for Constraint {
    type Err = ConstraintError;

    fn from_str(text: &str) -> Result<Self, ConstraintError> {
        let wrong = || ConstraintError(text.chars().take(80).collect());
        let name = |text: &str| text.parse::<Name>().map_err(|_| wrong());
        let space =
            |text: &str, c: char| text.trim_matches(' ').strip_prefix(c).map(|t| t.trim_matches(' ').to_owned());
        if let Some(bound) = text.strip_prefix("latency").and_then(|rest| space(rest, '<')) {
            let (digits, unit) = match (bound.strip_suffix("ms"), bound.strip_suffix("us")) {
                (Some(digits), _) => (digits, 1_000),
                (_, Some(digits)) => (digits, 1),
                _ => return Err(wrong()),
            };
            let plain = digits.len() <= 5 && digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
            let n: u32 = digits.parse().ok().filter(|_| plain && !text.ends_with(' ')).ok_or_else(wrong)?;
            return Ok(Self::Latency(n * unit));
        }
        if let Some(rest) = text.strip_prefix("zone") {
            if let Some(zone) = rest.strip_prefix('=') {
                return Ok(Self::Zone(vec![name(zone)?]));
            }
            let list = rest.trim_start_matches(' ').strip_prefix("in").map(|list| list.trim_start_matches(' '));
            let list = list.and_then(|list| list.strip_prefix('(')).and_then(|list| list.strip_suffix(')'));
            let zones: Vec<&str> = list.ok_or_else(wrong)?.split(',').map(|zone| zone.trim_matches(' ')).collect();
            if zones.len() > MAX_ZONES {
                return Err(wrong());
            }
            return Ok(Self::Zone(zones.into_iter().map(name).collect::<Result<_, _>>()?));
        }
        if let Some(label) = text.strip_prefix("label.") {
            let (key, value) = label.split_once('=').ok_or_else(wrong)?;
            let good = is_label_key(key) && is_label_value(value);
            return if good { Ok(Self::Label(key.to_owned(), value.to_owned())) } else { Err(wrong()) };
        }
        match text.split_once('=') {
            Some(("spread", "zone")) => Ok(Self::Spread(Spread::Zone)),
            Some(("spread", "fault-domain")) => Ok(Self::Spread(Spread::FaultDomain)),
            Some(("spread", "rack")) => Ok(Self::Spread(Spread::Rack)),
            Some(("spread", "host")) => Ok(Self::Spread(Spread::Host)),
            Some(("with", app)) => Ok(Self::With(name(app)?)),
            Some(("not-with", app)) => Ok(Self::NotWith(name(app)?)),
            Some(("numa", "any")) => Ok(Self::Numa(Numa::Any)),
            Some(("numa", "single")) => Ok(Self::Numa(Numa::Single)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latency(us) if us.is_multiple_of(1_000) => write!(f, "latency<{}ms", us / 1_000),
            Self::Latency(us) => write!(f, "latency<{us}us"),
            Self::Zone(zones) => {
                let zones: Vec<&str> = zones.iter().map(Name::as_str).collect();
                write!(f, "zone in ({})", zones.join(","))
            }
            Self::Label(key, value) => write!(f, "label.{key}={value}"),
            Self::Spread(Spread::FaultDomain) => f.write_str("spread=fault-domain"),
            Self::Spread(Spread::Rack) => f.write_str("spread=rack"),
            Self::Spread(Spread::Host) => f.write_str("spread=host"),
            Self::Spread(Spread::Zone | Spread::None) => f.write_str("spread=zone"),
            Self::With(app) => write!(f, "with={app}"),
            Self::NotWith(app) => write!(f, "not-with={app}"),
            Self::Numa(Numa::Any) => f.write_str("numa=any"),
            Self::Numa(Numa::Single) => f.write_str("numa=single"),
        }
    }
}

/// An app's constraints, in the order in which they were written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Constraints(pub Vec<Constraint>);

impl Constraints {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Constraint> {
        self.0.iter()
    }

    /// Whether an instance is to be kept to one NUMA node. The last word on it counts.
    pub fn single_node(&self) -> bool {
        let said = self.0.iter().rev().find_map(|c| match c {
            Constraint::Numa(numa) => Some(*numa),
            _ => None,
        });
        said == Some(Numa::Single)
    }

    /// The apps that it is to be with, and those that it is not to be with.
    pub fn company(&self) -> impl Iterator<Item = (&Name, bool)> {
        self.0.iter().filter_map(|c| match c {
            Constraint::With(app) => Some((app, true)),
            Constraint::NotWith(app) => Some((app, false)),
            _ => None,
        })
    }
}

impl FromStr for Constraints {
    type Err = ConstraintError;

    /// One text, with commas between constraints; those in parentheses are the zones'.
    fn from_str(text: &str) -> Result<Self, ConstraintError> {
        let (mut parts, mut part, mut depth) = (Vec::new(), String::new(), 0u32);
        for c in text.chars() {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    parts.push(std::mem::take(&mut part));
                    continue;
                }
                _ => {}
            }
            part.push(c);
        }
        if parts.is_empty() && part.trim_matches(' ').is_empty() {
            return Ok(Self::default());
        }
        parts.push(part);
        parts.iter().map(|part| part.trim_matches(' ').parse()).collect::<Result<_, _>>().map(Self)
    }
}

impl Serialize for Constraints {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(ToString::to_string))
    }
}

impl<'de> Deserialize<'de> for Constraints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;

        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Constraints;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of constraints, or a text of them")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Constraints, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Constraints, A::Error> {
                let mut all = Vec::new();
                while let Some(text) = seq.next_element::<String>()? {
                    all.push(text.parse().map_err(de::Error::custom)?);
                }
                Ok(Constraints(all))
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}

impl JsonSchema for Constraints {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Constraints".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let one = PATTERN.replace('N', NAME);
        json_schema!({
            "description": "What hosts must be like: a list of constraints, or one text with commas between them.",
            "anyOf": [
                {
                    "type": "array",
                    "maxItems": MAX_CONSTRAINTS,
                    "items": {"type": "string", "pattern": format!("^{one}$")},
                },
                {"type": "string", "pattern": format!("^ *({one}( *, *{one}){{0,{}}})? *$", MAX_CONSTRAINTS - 1)},
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Result<Constraint, ConstraintError> {
        text.parse()
    }

    #[test]
    fn each_form_is_read_and_written() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        for (text, constraint) in [
            ("latency<20ms", Constraint::Latency(20_000)),
            ("latency<750us", Constraint::Latency(750)),
            ("zone in (a,b-2)", Constraint::Zone(vec![name("a"), name("b-2")])),
            ("label.example.com/disk=nvme", Constraint::Label("example.com/disk".into(), "nvme".into())),
            ("label.gpu=", Constraint::Label("gpu".into(), String::new())),
            ("spread=zone", Constraint::Spread(Spread::Zone)),
            ("spread=fault-domain", Constraint::Spread(Spread::FaultDomain)),
            ("spread=rack", Constraint::Spread(Spread::Rack)),
            ("spread=host", Constraint::Spread(Spread::Host)),
            ("with=db", Constraint::With(name("db"))),
            ("not-with=batch", Constraint::NotWith(name("batch"))),
            ("numa=single", Constraint::Numa(Numa::Single)),
            ("numa=any", Constraint::Numa(Numa::Any)),
        ] {
            assert_eq!(one(text).unwrap(), constraint);
            assert_eq!(constraint.to_string(), text);
        }
        assert_eq!(one("latency < 5ms").unwrap(), Constraint::Latency(5_000));
        assert_eq!(one("zone=a").unwrap(), Constraint::Zone(vec![name("a")]));
        assert_eq!(one("zone in ( a , b )").unwrap().to_string(), "zone in (a,b)");
    }

    #[test]
    fn what_is_odd_is_refused() {
        let zones = format!("zone in ({})", vec!["a"; 17].join(","));
        let wrong = [
            "",
            " ",
            "latency<0ms",
            "latency<20",
            "latency<20s",
            "latency<100000ms",
            "latency<05ms",
            "latency<+5ms",
            "latency<5ms ",
            "latency>5ms",
            "zone in ()",
            "zone in (a,)",
            "zone in a",
            "zone=",
            "zone=A",
            &zones,
            "label.a",
            "label.=b",
            "label.a=b c",
            "spread=none",
            "spread=",
            "with=",
            "with=A",
            "not-with",
            "notwith=a",
            "with=a\n",
            "rack=a",
            "with=-a",
            "numa=",
            "numa=2",
            "spread=fault",
        ];
        for text in wrong {
            assert!(one(text).is_err(), "{text:?} is read");
        }
        let right =
            ["latency <  99999us", "zone  in(a)", "zone in ( a ,b )", "label.a-b_c.d=", "with=a", "not-with=a-1"];
        for text in right {
            assert!(one(text).is_ok(), "{text:?} is not read");
        }
        for whole in ["", "  ", "latency<20ms", " zone in (a,b) ,with=c", "spread=rack, spread=host"] {
            assert!(whole.parse::<Constraints>().is_ok(), "{whole:?} is not read");
        }
        for whole in [",", "with=a,", "with=a,,with=b", "zone in (a", "with=a;with=b"] {
            assert!(whole.parse::<Constraints>().is_err(), "{whole:?} is read");
        }
    }

    #[test]
    fn a_text_and_a_list_mean_the_same() {
        let list: Constraints = serde_json::from_str(r#"["zone in (a,b)", "with=db"]"#).unwrap();
        let text: Constraints = serde_json::from_str(r#""zone in (a,b), with=db""#).unwrap();
        assert_eq!(list, text);
        assert_eq!(serde_json::to_string(&text).unwrap(), r#"["zone in (a,b)","with=db"]"#);
        let error = serde_json::from_str::<Constraints>(r#"["fast"]"#).unwrap_err().to_string();
        assert!(error.contains("\"fast\" is no constraint: write latency<20ms"), "{error}");
    }
}
