//! From what a provider calls groups to groups of an organization.
//!
//! Nothing passes by itself: a provider's group means something only where the organization's table says so. So whoever
//! administers the provider can't make up a group named like one of ours.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{FederationError, claim};

/// Groups of one token. With more, the token is refused: leaving some out would take or, with a deny, give rights.
pub const MAX_GROUPS: usize = 1000;
const MAX_GROUP: usize = 256;

/// Which claim holds the groups, and what they mean.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GroupMapping {
    /// A claim's name, such as `groups`, or a JSON pointer (RFC 6901), such as `/realm_access/roles`.
    pub claim: String,
    /// The provider's group to ours.
    pub table: BTreeMap<String, Vec<String>>,
}

impl GroupMapping {
    /// Our groups of the token's holder, sorted, each once. A missing claim gives none.
    pub fn groups(&self, claims: &Map<String, Value>) -> Result<Vec<String>, FederationError> {
        let fault = |what| FederationError::Groups { claim: self.claim.clone(), what };
        let theirs: Vec<&str> = match claim(claims, &self.claim) {
            None if self.is_elsewhere(claims) => return Err(FederationError::GroupsElsewhere),
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(list)) if list.len() > MAX_GROUPS => return Err(fault("more than 1000 groups")),
            Some(Value::Array(list)) => {
                let texts: Option<_> = list.iter().map(Value::as_str).collect();
                texts.ok_or_else(|| fault("something that is no text"))?
            }
            Some(_) => return Err(fault("something that is no list of texts")),
        };
        if theirs.iter().any(|g| g.len() > MAX_GROUP) {
            return Err(fault("a group of more than 256 bytes"));
        }
        let ours: BTreeSet<&String> = theirs.iter().filter_map(|g| self.table.get(*g)).flatten().collect();
        Ok(ours.into_iter().cloned().collect())
    }

    /// Microsoft's way to say that there are too many groups for a token.
    fn is_elsewhere(&self, claims: &Map<String, Value>) -> bool {
        claims.get("_claim_names").is_some_and(|names| names.get(&self.claim).is_some())
    }
}
