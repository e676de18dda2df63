//! The messages of the SPIFFE Workload API, written down by hand: field numbers are those of the SPIFFE project's
//! `workload.proto`, and of protocol buffers' own `struct.proto` for claims. Writing them here spares the build a protocol
//! compiler.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use serde_json::Map;

/// What the requests of all methods that take no argument are.
#[derive(Clone, PartialEq, Message)]
pub struct Nothing {}

#[derive(Clone, PartialEq, Message)]
pub struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<X509Svid>,
}

#[derive(Clone, PartialEq, Message)]
pub struct X509Svid {
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// Certificates in DER, one after the other, the leaf first.
    #[prost(bytes = "bytes", tag = "2")]
    pub x509_svid: Bytes,
    /// PKCS #8 in DER.
    #[prost(bytes = "bytes", tag = "3")]
    pub x509_svid_key: Bytes,
    /// The trust domain's authorities, in DER, one after the other.
    #[prost(bytes = "bytes", tag = "4")]
    pub bundle: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct X509BundlesResponse {
    /// By the SPIFFE id of the trust domain.
    #[prost(btree_map = "string, bytes", tag = "2")]
    pub bundles: BTreeMap<String, Bytes>,
}

#[derive(Clone, PartialEq, Message)]
pub struct JwtSvidRequest {
    #[prost(string, repeated, tag = "1")]
    pub audience: Vec<String>,
    /// Empty for all that the workload has.
    #[prost(string, tag = "2")]
    pub spiffe_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct JwtSvidResponse {
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<JwtSvid>,
}

#[derive(Clone, PartialEq, Message)]
pub struct JwtSvid {
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    #[prost(string, tag = "2")]
    pub svid: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct JwtBundlesResponse {
    /// JWK sets, by the SPIFFE id of the trust domain.
    #[prost(btree_map = "string, bytes", tag = "1")]
    pub bundles: BTreeMap<String, Bytes>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ValidateJwtSvidRequest {
    #[prost(string, tag = "1")]
    pub audience: String,
    #[prost(string, tag = "2")]
    pub svid: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ValidateJwtSvidResponse {
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    #[prost(message, optional, tag = "2")]
    pub claims: Option<Struct>,
}

/// A JSON object.
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

/// A JSON value.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6")]
    pub kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    /// The value is always 0.
    #[prost(int32, tag = "1")]
    Null(i32),
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(string, tag = "3")]
    Text(String),
    #[prost(bool, tag = "4")]
    Bool(bool),
    #[prost(message, tag = "5")]
    Object(Struct),
    #[prost(message, tag = "6")]
    List(List),
}

#[derive(Clone, PartialEq, Message)]
pub struct List {
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<Value>,
}

impl From<Map<String, serde_json::Value>> for Struct {
    fn from(map: Map<String, serde_json::Value>) -> Self {
        Self { fields: map.into_iter().map(|(key, value)| (key, value.into())).collect() }
    }
}

impl From<serde_json::Value> for Value {
    fn from(value: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let kind = match value {
            Json::Null => Kind::Null(0),
            Json::Bool(value) => Kind::Bool(value),
            Json::Number(value) => Kind::Number(value.as_f64().unwrap_or(f64::NAN)),
            Json::String(value) => Kind::Text(value),
            Json::Array(values) => Kind::List(List { values: values.into_iter().map(Into::into).collect() }),
            Json::Object(map) => Kind::Object(map.into()),
        };
        Self { kind: Some(kind) }
    }
}
