//! How many of an app's instances operators' work may take away: draining a host, a rebalance.
//!
//! What is taken has a successor that is ready first, as far as room is found for one; the budget says how few instances may be
//! ready meanwhile, counting those that others' failures took. Failures themselves ask nobody.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Amount;

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Disruption {
    /// Instances fewer than those wanted that may be ready; a share is rounded down.
    MaxUnavailable(Amount),
    /// Instances that must be ready; a share of those wanted is rounded up. More than are wanted are as many as are wanted.
    MinAvailable(Amount),
}

impl Default for Disruption {
    fn default() -> Self {
        Self::MaxUnavailable(Amount::Percent(25))
    }
}

impl Disruption {
    /// How many instances must be ready at least, of so many that are wanted.
    pub fn least(self, wanted: usize) -> usize {
        match self {
            Self::MaxUnavailable(amount) => wanted.saturating_sub(amount.floor(wanted)),
            Self::MinAvailable(amount) => amount.ceil(wanted).min(wanted),
        }
    }
}

/// `max-unavailable=1` or `min-available=50%`.
impl FromStr for Disruption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("max-unavailable", amount)) => amount.parse().map(Self::MaxUnavailable),
            Some(("min-available", amount)) => amount.parse().map(Self::MinAvailable),
            _ => Err(format!("{text:?}: write max-unavailable=1 or min-available=50%")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_budget_is_one_of_two_amounts() {
        let read = |value: serde_json::Value| serde_json::from_value::<Disruption>(value);
        assert_eq!(read(json!({"maxUnavailable": 1})).unwrap(), Disruption::MaxUnavailable(Amount::Count(1)));
        assert_eq!(read(json!({"minAvailable": "50%"})).unwrap(), Disruption::MinAvailable(Amount::Percent(50)));
        for wrong in [json!({}), json!({"minAvailable": 1, "maxUnavailable": 1}), json!({"most": 1}), json!(1)] {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
        assert_eq!("max-unavailable=25%".parse(), Ok(Disruption::default()));
        assert_eq!("min-available=2".parse(), Ok(Disruption::MinAvailable(Amount::Count(2))));
        assert!("min-available".parse::<Disruption>().is_err() && "most=1".parse::<Disruption>().is_err());
        let parse = crate::kind::find("app").unwrap().parse_spec;
        let wrong = parse(&json!({"image": "web", "disruption": {"minAvailable": "200%"}})).unwrap_err();
        assert!(wrong[0].field.starts_with("spec.disruption"), "{wrong:?}");
        assert!(parse(&json!({"image": "web", "disruption": {"minAvailable": 2}})).is_ok());
    }

    #[test]
    fn shares_are_rounded_towards_more_instances() {
        let usual = Disruption::default();
        assert_eq!([1, 3, 4, 7, 8].map(|wanted| usual.least(wanted)), [1, 3, 3, 6, 6]);
        assert_eq!(Disruption::MinAvailable(Amount::Percent(50)).least(3), 2);
        assert_eq!(Disruption::MinAvailable(Amount::Count(5)).least(3), 3, "else nothing could ever be drained");
        assert_eq!(Disruption::MaxUnavailable(Amount::Count(9)).least(3), 0);
    }
}
