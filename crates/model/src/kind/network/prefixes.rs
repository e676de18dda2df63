//! Networks that rules name together, such as the offices of a company.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use crate::{Cidr, Condition, FieldError};

/// Prefix lists of a project in one region.
pub const MAX_PREFIX_LISTS: usize = 50;
/// Entries of one.
pub const MAX_PREFIXES: usize = 200;

#[derive(Debug, Clone)]
pub struct PrefixList;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PrefixListSpec {
    #[schemars(length(max = MAX_PREFIXES))]
    pub cidrs: Vec<Cidr>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PrefixListStatus {
    pub conditions: Vec<Condition>,
}

/// Why a network can't stand where one is named that may be anywhere.
pub(super) fn refuse_untrimmed(cidr: &Cidr) -> Option<String> {
    (!cidr.is_trimmed()).then(|| format!("has bits behind its prefix: write {}/{}", cidr.first(), cidr.length))
}

impl Kind for PrefixList {
    const KIND: &'static str = "PrefixList";
    const PLURAL: &'static str = "prefix-lists";
    const SHORT: &'static [&'static str] = &["prefix-list"];
    const ABOUT: &'static str = "Networks that rules of security groups name together.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[Column::count("CIDRS", "/spec/cidrs")];
    type Spec = PrefixListSpec;
    type Status = PrefixListStatus;

    fn validate(spec: &PrefixListSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.cidrs.len() > MAX_PREFIXES {
            errors.push(FieldError::new("spec.cidrs", format!("at most {MAX_PREFIXES}")));
        }
        for (i, cidr) in spec.cidrs.iter().enumerate().take(MAX_PREFIXES) {
            errors.extend(refuse_untrimmed(cidr).map(|why| FieldError::new(format!("spec.cidrs[{i}]"), why)));
        }
        errors
    }

    fn example() -> PrefixListSpec {
        PrefixListSpec { cidrs: vec!["203.0.113.0/24".parse().expect("a well-formed network")] }
    }
}
