//! What operators do to the fleet itself, beside its objects: `POST /v1/operations/{name}` with a JSON body.
//!
//! Each operation is declared once in [`OPERATIONS`]: its path, its description and its body's schema come from there.
//! The binary answers them by [`Operations`](crate::Operations). An *open* operation carries its own credential in its
//! body, the join token, because whoever joins has no other yet.

use axum::body::Body;
use axum::response::Response;
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::request::Parts;
use nexus_model::kind::{Classes, classes_schema};
use nexus_model::plan::BlobsCollected;
use nexus_model::{ApiError, Name};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::input::read_json;
use crate::query::Query;
use crate::serve::Server;
use crate::write::JSON;

/// One operation.
#[derive(Debug)]
pub struct Operation {
    /// The last segment of its path.
    pub name: &'static str,
    /// Its id in the OpenAPI document.
    pub id: &'static str,
    pub about: &'static str,
    /// Whether it is answered without a bearer token.
    pub open: bool,
    schema: fn() -> Value,
}

impl PartialEq for Operation {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// A join token's shortest and longest life, in seconds.
pub const MIN_TTL: u64 = 1;
pub const MAX_TTL: u64 = 7 * 24 * 3600;
pub const DEFAULT_TTL: u64 = 3600;

fn default_ttl() -> u64 {
    DEFAULT_TTL
}

/// What a join token lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JoinRole {
    Server,
    Host,
    Gateway,
}

impl std::fmt::Display for JoinRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Server => "server",
            Self::Host => "host",
            Self::Gateway => "gateway",
        })
    }
}

/// Asks for a join token: `server-token`, `host-token`, `gateway-token`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenRequest {
    /// How long it can be used, in seconds.
    #[serde(default = "default_ttl")]
    #[schemars(range(min = 1, max = 604_800))]
    pub ttl_seconds: u64,
    /// Binds it to a zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    /// Binds a host's token to a cell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cell: Option<Name>,
    /// Binds a host's token to compute classes: the host may never declare another, nor more of one. An empty map allows none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "classes_schema")]
    pub classes: Option<Classes>,
}

/// A join token. Its text is told once.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenGrant {
    pub token: String,
    /// By which it is listed and revoked.
    pub id: String,
    pub role: JoinRole,
    /// RFC 3339.
    pub expires: String,
    /// Identifies the cluster's authority: `sha256:` and the hash of its certificate.
    pub ca_pin: String,
    /// Where to join, any of them.
    pub endpoints: Vec<String>,
}

/// Names something: `server-remove`, and (by id) `token-revoke`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Named {
    pub name: Name,
}

/// `token-revoke`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenId {
    #[schemars(regex(pattern = "^[0-9a-f]{12}$"))]
    pub id: String,
}

/// `region-remove`: a region whose servers have stopped, with their node ids.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RegionRemove {
    pub name: Name,
    #[schemars(length(max = 100))]
    pub nodes: Vec<u64>,
}

/// No parameters: `trust`, `token-list`, `server-list`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// `server-replace`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Replace {
    pub old: Name,
    /// A server that has joined.
    pub new: Name,
}

/// `host-leave`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostLeave {
    pub name: Name,
    /// Also while instances run there; they are started elsewhere.
    #[serde(default)]
    pub force: bool,
}

/// The answer to `host-leave`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostLeft {
    pub left: Name,
    /// How many ran there.
    #[serde(default)]
    pub instances: usize,
    /// Some of them, as `project/name`.
    #[serde(default)]
    pub lost: Vec<String>,
}

/// `rebalance`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rebalance {
    /// That of the server that is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Name>,
    /// At most so many moves.
    #[serde(default = "default_moves")]
    #[schemars(range(min = 1, max = 50))]
    pub max: u32,
    /// Only says what would be moved.
    #[serde(default)]
    pub dry_run: bool,
}

fn default_moves() -> u32 {
    10
}

/// One move of a plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Relocation {
    pub project: Name,
    pub instance: Name,
    pub from: Name,
    pub to: Name,
    /// In a few words.
    pub why: String,
}

/// The answer to `rebalance`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rebalanced {
    pub region: Name,
    pub moves: Vec<Relocation>,
    /// Whether they have begun.
    pub begun: bool,
}

/// `server-join`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServerJoin {
    pub token: String,
    pub name: Name,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    /// Where peers, agents and gateways reach it, such as `10.0.0.4:7440`.
    pub wire: String,
    /// Where users reach its API, such as `https://10.0.0.4:8443`.
    pub api: String,
    /// PKCS #10, in PEM, for the ids `server/<name>` and `api/<name>` of the cluster's trust domain.
    pub csr: String,
}

/// A member of a region's control plane, as whoever joins learns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerEntry {
    pub node: u64,
    pub name: Name,
    pub zone: Name,
    pub wire: String,
    pub api: String,
}

/// The answer to `server-join`: everything that the new server's configuration is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerJoined {
    pub cluster_id: String,
    pub region: Name,
    pub zone: Name,
    pub node: u64,
    pub domain: String,
    /// Whom access tokens are by, if the configuration says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    pub zones: Vec<Name>,
    /// The root's certificate and the two new ones, in PEM.
    pub ca: String,
    pub cert: String,
    pub api_cert: String,
    /// The hash of the administrator's token.
    pub token_hash: String,
    pub members: Vec<ServerEntry>,
    /// The region's authority, so that the new server can sign too: its certificate with those above it, and its key, which is
    /// never kept in the store. Older servers sign with the root, and give its key alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority_cert: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority_key: Option<String>,
    /// What else the server that answered has in its configuration and the new one needs, by field.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub config: serde_json::Map<String, Value>,
}

/// `host-join`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostJoin {
    pub token: String,
    pub name: Name,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cell: Option<Name>,
    /// Compute classes that it has. Without any: those of the token.
    #[serde(default, skip_serializing_if = "Classes::is_empty")]
    #[schemars(schema_with = "classes_schema")]
    pub classes: Classes,
    /// Where servers reach the agent, such as `10.0.0.21:7450`. What else it offers its agent says by itself.
    pub address: String,
    /// PKCS #10, in PEM, for the id `agent/<name>`.
    pub csr: String,
}

/// The answer to `host-join`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostJoined {
    pub cluster_id: String,
    pub region: Name,
    pub zone: Name,
    pub cell: Name,
    /// What its agent is to declare.
    #[serde(default, skip_serializing_if = "Classes::is_empty")]
    pub classes: Classes,
    pub prefix6: std::net::Ipv6Addr,
    pub prefix4: std::net::Ipv4Addr,
    pub ca: String,
    pub cert: String,
    /// The wire endpoints of the region's servers.
    pub servers: Vec<String>,
}

/// `gateway-join`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayJoin {
    pub token: String,
    pub name: Name,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    /// PKCS #10, in PEM, for the id `gateway/<name>`.
    pub csr: String,
}

/// The answer to `gateway-join`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayJoined {
    pub cluster_id: String,
    pub region: Name,
    pub zone: Name,
    pub ca: String,
    pub cert: String,
    pub servers: Vec<String>,
}

/// The answer to `trust`: what a newcomer checks against the pin that it was given.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trust {
    pub cluster_id: String,
    pub region: Name,
    pub ca: String,
}

/// `backup-create`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackupCreate {
    /// Chosen by the server, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,63}$"))]
    pub name: Option<String>,
    /// Only the newest so many stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1_000_000))]
    pub keep: Option<usize>,
    /// What this server knows, without asking a majority.
    #[serde(default)]
    pub stale: bool,
}

/// How many sealed values a server found, and what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SealedCount {
    pub seen: u64,
    /// Put under the current master key.
    pub rewrapped: u64,
    /// Neither opened nor changed: damaged, or under a key that is not in the file.
    pub failed: u64,
}

/// The answer to `master-key-status` and `master-key-rewrap`: of one region and of what all regions share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MasterKeys {
    pub region: String,
    pub server: String,
    /// The key by which this server seals now.
    pub current: String,
    /// How many values need each key, after whatever was done.
    pub used: std::collections::BTreeMap<String, u64>,
    pub secrets: SealedCount,
    pub access_keys: SealedCount,
    pub second_factors: SealedCount,
    /// Of identity providers.
    pub client_secrets: SealedCount,
    /// Some of what failed, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
}

/// The longest that unnamed blobs can be asked to be kept, in seconds: a year.
pub const MAX_GRACE: u64 = 31_536_000;

/// `image-gc`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ImageGc {
    /// Only tells what would go.
    #[serde(default)]
    pub dry_run: bool,
    /// Blobs go that nothing has named for so long; without it, as long as the servers' configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = MAX_GRACE))]
    pub grace_seconds: Option<u64>,
}

/// What one server has of images' content, and what of it went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Collected {
    pub server: String,
    #[serde(flatten)]
    pub found: BlobsCollected,
    /// Why it could not look, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// The answer to `image-gc`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageGcDone {
    pub region: String,
    pub dry_run: bool,
    pub servers: Vec<Collected>,
}

pub(crate) fn schema<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.meta_schema = None;
    settings.inline_subschemas = true;
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    if let Some(map) = schema.as_object_mut() {
        map.shift_remove("title");
    }
    schema
}

const fn of(name: &'static str, id: &'static str, about: &'static str, open: bool, schema: fn() -> Value) -> Operation {
    Operation { name, id, about, open, schema }
}

/// Every operation.
pub static OPERATIONS: &[Operation] = &[
    of("trust", "trust", "The cluster's authority, to be checked against a pin", true, schema::<Nothing>),
    of("server-token", "serverToken", "Make a token by which one server may join", false, schema::<TokenRequest>),
    of("host-token", "hostToken", "Make a token by which one host may join", false, schema::<TokenRequest>),
    of("gateway-token", "gatewayToken", "Make a token by which one gateway may join", false, schema::<TokenRequest>),
    of("token-list", "tokenList", "Join tokens that were not used yet", false, schema::<Nothing>),
    of("token-revoke", "tokenRevoke", "Take a join token back", false, schema::<TokenId>),
    of("server-join", "serverJoin", "Join the region's control plane, by a token", true, schema::<ServerJoin>),
    of("host-join", "hostJoin", "Join the region as a host, by a token", true, schema::<HostJoin>),
    of("gateway-join", "gatewayJoin", "Join the region as a gateway, by a token", true, schema::<GatewayJoin>),
    of("server-list", "serverList", "The region's servers and how each does", false, schema::<Nothing>),
    of("server-remove", "serverRemove", "Take a server out of the control plane", false, schema::<Named>),
    of("server-replace", "serverReplace", "Put one server in another's place", false, schema::<Replace>),
    of(
        "region-remove",
        "regionRemove",
        "Take a region's servers out of the global group",
        false,
        schema::<RegionRemove>,
    ),
    of("host-leave", "hostLeave", "Take a host out of the region", false, schema::<HostLeave>),
    of("backup-create", "backupCreate", "Write a backup", false, schema::<BackupCreate>),
    of("backup-list", "backupList", "The backups that are there", false, schema::<Nothing>),
    of("master-key-status", "masterKeyStatus", "Which master keys sealed values need", false, schema::<Nothing>),
    of(
        "master-key-rewrap",
        "masterKeyRewrap",
        "Put every sealed value under the current master key",
        false,
        schema::<Nothing>,
    ),
    of("image-gc", "imageGc", "Remove content of images that nothing names any more", false, schema::<ImageGc>),
    of("rebalance", "rebalance", "Move instances to where they stand better", false, schema::<Rebalance>),
];

pub(crate) fn find(name: &str) -> Option<&'static Operation> {
    OPERATIONS.iter().find(|o| o.name == name)
}

impl Operation {
    pub fn path(&self) -> String {
        format!("/v1/operations/{}", self.name)
    }

    /// Its body's schema, for the OpenAPI document.
    pub(crate) fn schema(&self) -> Value {
        (self.schema)()
    }
}

/// Reads the body, runs the operation and answers what it answers.
pub(crate) async fn handle(
    server: &Server,
    operation: &'static Operation,
    parts: &Parts,
    body: Body,
) -> Result<Response, ApiError> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let body = read_json(&parts.headers, body, JSON).await?;
    if !body.is_object() {
        return Err(ApiError::new(nexus_model::Code::BadRequest, "the body must be a JSON object"));
    }
    let answer = server.api.operations.run(operation.name, body).await?;
    let bytes = serde_json::to_vec(&answer).expect("an answer is plain data");
    let mut response = Response::new(Body::from(bytes));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // Some answers hold what nobody between should keep.
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Reads an operation's body, and says which field is wrong.
pub fn read<T: serde::de::DeserializeOwned>(body: Value) -> Result<T, ApiError> {
    serde_json::from_value(body)
        .map_err(|e| ApiError::new(nexus_model::Code::Invalid, format!("the operation's body: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_a_closed_schema_of_its_own() {
        for (i, operation) in OPERATIONS.iter().enumerate() {
            assert!(OPERATIONS[..i].iter().all(|o| o.name != operation.name && o.id != operation.id));
            let schema = operation.schema();
            assert_eq!(schema["type"], "object", "{}", operation.name);
            assert!(schema.get("additionalProperties").is_some(), "{}: {schema}", operation.name);
            assert!(!schema.to_string().contains("$ref"), "{}: {schema}", operation.name);
        }
        assert_eq!(find("server-token").unwrap().schema()["properties"]["ttlSeconds"]["maximum"], MAX_TTL);
    }

    #[test]
    fn a_wrong_body_says_what_is_wrong() {
        let error = read::<Replace>(serde_json::json!({"old": "a", "nwe": "b"})).unwrap_err();
        assert!(error.detail.contains("nwe"), "{error}");
    }
}
