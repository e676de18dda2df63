//! Query strings, read strictly: a parameter that is not known, given twice or malformed is refused, because a misspelt
//! `dryRun` must not change anything.

use std::ops::RangeInclusive;
use std::str::FromStr;

use nexus_model::{ApiError, Code};
use percent_encoding::percent_decode_str;

/// The decoded parameters of one request.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

/// Bounds one request's parameters.
const MAX_PARAMETERS: usize = 300;

fn bad(detail: String) -> ApiError {
    ApiError::new(Code::BadRequest, detail)
}

fn decode(text: &str) -> Result<String, ApiError> {
    let plus = text.replace('+', " ");
    let decoded = percent_decode_str(&plus).decode_utf8();
    decoded.map(|t| t.into_owned()).map_err(|_| bad("the query is not UTF-8".into()))
}

impl Query {
    /// Reads `raw`. Only `allowed` parameters may be there, and only those in `repeated` more than once.
    pub fn parse(raw: Option<&str>, allowed: &[&str], repeated: &[&str]) -> Result<Self, ApiError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in raw.unwrap_or("").split('&').filter(|p| !p.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let (key, value) = (decode(key)?, decode(value)?);
            if !allowed.contains(&key.as_str()) {
                let shown: String = key.chars().take(64).collect();
                let known = if allowed.is_empty() {
                    "none is known here".into()
                } else {
                    format!("known: {}", allowed.join(", "))
                };
                return Err(bad(format!("there is no query parameter {shown:?}; {known}")));
            }
            if pairs.iter().any(|(k, _)| *k == key) && !repeated.contains(&key.as_str()) {
                return Err(bad(format!("the query parameter {key} is given twice")));
            }
            if pairs.len() == MAX_PARAMETERS {
                return Err(bad(format!("at most {MAX_PARAMETERS} query parameters")));
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    pub fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(k, _)| k == name).map(|(_, v)| v.clone()).collect()
    }

    /// `true` or `false`; false when absent.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(bad(format!("{name} is true or false"))),
        }
    }

    /// A whole number within a range.
    pub fn number<T: FromStr + PartialOrd + std::fmt::Display>(
        &self,
        name: &str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(n) if digits && range.contains(&n) => Ok(Some(n)),
            _ => Err(bad(format!("{name} is a whole number between {} and {}", range.start(), range.end()))),
        }
    }

    /// One of a few words.
    pub fn one_of(&self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        let found = words.iter().find(|w| **w == text);
        found.copied().map(Some).ok_or_else(|| bad(format!("{name} is one of: {}", words.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_parameters_pass_and_only_once() {
        let q = Query::parse(Some("limit=5&labels=a%3Db+"), &["limit", "labels"], &[]).unwrap();
        assert_eq!((q.number("limit", 1..=500), q.get("labels")), (Ok(Some(5)), Some("a=b ")));
        for wrong in ["dryrun=true", "limit=1&limit=2", "limit=%ff"] {
            assert!(Query::parse(Some(wrong), &["limit", "dryRun"], &[]).is_err(), "{wrong}");
        }
        let q = Query::parse(Some("limit=+5&dryRun=yes"), &["limit", "dryRun"], &[]).unwrap();
        assert!(q.number("limit", 1..=500).is_err() && q.flag("dryRun").is_err());
        assert_eq!(Query::parse(Some("c=a&c=b"), &["c"], &["c"]).unwrap().all("c"), ["a", "b"]);
    }
}
