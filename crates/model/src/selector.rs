//! Label selectors: `key=value`, `key==value`, `key!=value`, `key` (present), `!key` (absent), joined by commas.

use std::str::FromStr;

use indexmap::IndexMap;

/// Labels and annotations keep the order in which they were written.
pub type Labels = IndexMap<String, String>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    Equals(String, String),
    Differs(String, String),
    Present(String),
    Absent(String),
}

/// All terms must hold. The empty selector matches everything. At most 32 terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector(Vec<Term>);

/// Why a text is not a [`Selector`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    #[error("a selector has at most 32 terms")]
    TooMany,
    #[error("{0:?} is not a selector term: write key=value, key!=value, key or !key")]
    Term(String),
}

/// The pattern of labels' keys that the published schemas carry; what [`is_label_key`] checks.
pub const LABEL_KEY_PATTERN: &str = r"^([A-Za-z0-9._-]{1,253}/)?[A-Za-z0-9._-]{1,63}$";
/// The pattern of labels' values; what [`is_label_value`] checks.
pub const LABEL_VALUE_PATTERN: &str = r"^[A-Za-z0-9._-]{0,63}$";

/// Whether `key` may be a label's key: 1 to 63 of letters, digits, `-`, `_`, `.`, after an optional `prefix/`.
pub fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key.rsplit_once('/').unwrap_or(("x", key));
    let part = |s: &str, max| {
        (1..=max).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    part(prefix, 253) && part(name, 63)
}

/// Whether `value` may be a label's value: at most 63 of letters, digits, `-`, `_`, `.`.
pub fn is_label_value(value: &str) -> bool {
    value.len() <= 63 && value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|term| match term {
            Term::Equals(key, value) => labels.get(key) == Some(value),
            Term::Differs(key, value) => labels.get(key) != Some(value),
            Term::Present(key) => labels.contains_key(key),
            Term::Absent(key) => !labels.contains_key(key),
        })
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(s: &str) -> Result<Self, SelectorError> {
        let mut terms = Vec::new();
        for text in s.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            let term = if let Some((key, value)) = text.split_once("!=") {
                Term::Differs(key.trim().into(), value.trim().into())
            } else if let Some((key, value)) = text.split_once('=') {
                Term::Equals(key.trim().into(), value.trim_start_matches('=').trim().into())
            } else if let Some(key) = text.strip_prefix('!') {
                Term::Absent(key.trim().into())
            } else {
                Term::Present(text.into())
            };
            let well_formed = match &term {
                Term::Equals(key, value) | Term::Differs(key, value) => is_label_key(key) && is_label_value(value),
                Term::Present(key) | Term::Absent(key) => is_label_key(key),
            };
            if !well_formed {
                return Err(SelectorError::Term(text.chars().take(80).collect()));
            }
            terms.push(term);
        }
        if terms.len() > 32 { Err(SelectorError::TooMany) } else { Ok(Self(terms)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_terms_must_hold() {
        let labels: Labels = [("app".into(), "web".into()), ("tier".into(), "front".into())].into_iter().collect();
        let matches = |s: &str| s.parse::<Selector>().unwrap().matches(&labels);
        assert!(matches("") && matches("app=web") && matches("app==web,tier") && matches("!gone,app!=db"));
        assert!(!matches("app=db") && !matches("!app") && !matches("gone"));
        assert!("a b".parse::<Selector>().is_err());
    }
}
