//! Finding a claim, and asking for its value.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::FederationError;

/// The claim of that name, or at that JSON pointer (RFC 6901), such as `/realm_access/roles`.
pub fn claim<'c>(claims: &'c Map<String, Value>, name: &str) -> Option<&'c Value> {
    let Some(path) = name.strip_prefix('/') else { return claims.get(name) };
    let mut words = path.split('/').map(|w| w.replace("~1", "/").replace("~0", "~"));
    let first = claims.get(&words.next()?)?;
    words.try_fold(first, |value, word| value.get(&word))
}

/// Whether every claim has the value that is wanted of it, or has it among its values. Numbers and truth values are compared
/// by their text: `true` is `"true"`.
pub fn require_claims(claims: &Map<String, Value>, wanted: &BTreeMap<String, String>) -> Result<(), FederationError> {
    let is = |value: &Value, text: &str| match value {
        Value::String(found) => found == text,
        Value::Bool(_) | Value::Number(_) => serde_json::from_str(text).is_ok_and(|wanted: Value| wanted == *value),
        _ => false,
    };
    let unmet = wanted.iter().find(|(name, text)| match claim(claims, name) {
        Some(Value::Array(list)) => !list.iter().any(|value| is(value, text)),
        Some(value) => !is(value, text),
        None => true,
    });
    unmet.map_or(Ok(()), |(claim, _)| Err(FederationError::Unmet { claim: claim.clone() }))
}
