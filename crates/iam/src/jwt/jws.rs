//! The form of a signed token (JWS compact serialization, RFC 7515) and of public keys (JWK, RFC 7517), read strictly.
//!
//! base64url without padding and with one text per value; JSON objects whose keys, at every depth, occur once: two
//! readers of one token must not see two tokens. What a token or key means is for [`super`] and
//! [`crate::federation`] to say.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// A token taken apart; nothing in it is believed yet.
pub(crate) struct Compact<'a> {
    /// `header.payload`, as it was signed.
    pub signed: &'a str,
    pub header: Map<String, Value>,
    pub payload: Vec<u8>,
    pub signature: Vec<u8>,
}

pub(crate) fn split(token: &str) -> Result<Compact<'_>, String> {
    let three = || "it does not have three parts".to_owned();
    let (signed, signature) = token.rsplit_once('.').ok_or_else(three)?;
    let (header, payload) = signed.split_once('.').ok_or_else(three)?;
    if payload.contains('.') {
        return Err(three());
    }
    Ok(Compact {
        signed,
        header: object(&decode(header, "header")?).map_err(|e| format!("its header is not one JSON object: {e}"))?,
        payload: decode(payload, "payload")?,
        signature: decode(signature, "signature")?,
    })
}

/// Canonical base64url.
pub(crate) fn decode(text: &str, what: &str) -> Result<Vec<u8>, String> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| format!("its {what} is not base64url without padding"))
}

pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A JSON object in which no key occurs twice. Depth is bounded by serde_json (128).
pub(crate) fn object(bytes: &[u8]) -> Result<Map<String, Value>, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Once.deserialize(&mut reader)?;
    reader.end()?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(serde_json::Error::custom("an object is expected")),
    }
}

/// The text at `key`.
pub(crate) fn text<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    map.get(key).and_then(Value::as_str)
}

/// Reads a JSON value and refuses objects with a key twice.
struct Once;

impl<'de> DeserializeSeed<'de> for Once {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Once {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(Once)? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom("a key occurs twice"));
            }
            let value = entries.next_value_seed(Once)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_occurs_twice_is_refused_at_any_depth() {
        assert_eq!(object(br#"{"a": [{"b": 1}, {"b": -2.5}], "c": null, "d": true}"#).unwrap().len(), 3);
        for bad in [
            r#"{"a": 1, "a": 2}"#,
            r#"{"x": [{"a": 1, "\u0061": 2}]}"#,
            r#"[]"#,
            r#"{} {}"#,
            r#"{"a": 1} x"#,
            "",
            &"[".repeat(100_000),
            &r#"{"a":"#.repeat(1000),
        ] {
            assert!(object(bad.as_bytes()).is_err(), "{}", &bad[..bad.len().min(40)]);
        }
    }

    #[test]
    fn only_canonical_compact_tokens_come_apart() {
        let header = encode("{}");
        assert!(split(&format!("{header}.AA.AA")).is_ok());
        for bad in [
            "",
            ".",
            "..",
            "a.b",
            &format!("{header}.AA"),
            &format!("{header}.AA.AA.AA"),
            &format!("{header}.AB.AA"),
            &format!("{header}.AA==.AA"),
            &format!("{header}.AA.A+"),
            &format!("{header}.AA. AA"),
            &format!("{header}.AA.AA\n"),
        ] {
            assert!(split(bad).is_err(), "{bad:?}");
        }
    }
}
