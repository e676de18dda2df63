//! Join tokens, and what is given out to who joins by one: certificates, numbers, addresses.
//!
//! A token is known by its hash alone. It is spent by the transaction that writes the record of who joined and the answer,
//! so it lets in one machine whatever happens, and a machine whose answer was lost asks again, with the same key, and gets
//! the same answer. Numbers and address prefixes are given out by transactions on the key that says which was the last.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nexus_api::operations::{
    GatewayJoin, GatewayJoined, HostJoin, HostJoined, JoinRole, MAX_TTL, MIN_TTL, ServerEntry, ServerJoin,
    ServerJoined, TokenGrant, TokenRequest,
};
use nexus_control::view::View;
use nexus_env::{Endpoint, Env, RngExt as _};
use nexus_iam::{CertRequest, SpiffeId, TokenHash, TokenSecret};
use nexus_model::kind::{ANY_CELL, Cell, Classes, validate_classes};
use nexus_model::{ApiError, Code, Digest, FieldError, Name, Object, Timestamp, key};
use nexus_store::{Compare, Op, Revision, Store, Txn};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::authority::{Authority, PublicNames};
use super::fleet::{self, Fleet, HostMembership, HostRecord, ServerRecord, ServerState, Stored, VERSION};
use super::operations::from_store;
use crate::config::ServerConfig;

/// Tokens that may wait to be used.
const MAX_TOKENS: usize = 200;
/// Characters of a token's hash by which it is listed and revoked.
const ID_LENGTH: usize = 12;
/// How long an answer is kept for a retry.
const ANSWER_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Others may be given numbers at the same time.
const TRIES: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenRecord {
    version: u32,
    role: JoinRole,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zone: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cell: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    classes: Option<Classes>,
    created: Timestamp,
    expires: Timestamp,
}

/// What a join was answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerRecord {
    version: u32,
    token: TokenHash,
    /// Who it is the answer for.
    ids: Vec<SpiffeId>,
    expires: Timestamp,
    answer: Value,
}

/// From where hosts get their addresses: a ULA /48, and 10.x/16 with those after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pool {
    version: u32,
    prefix48: Ipv6Addr,
    octet: u8,
    /// The number that was given last.
    last: u16,
}

impl Pool {
    /// The one that hosts of the region have their addresses from already, or one that follows from the cluster's id and
    /// meets none of the addresses `taken`.
    fn choose(cluster: &str, region: &Name, hosts: &[(Ipv6Addr, Ipv4Addr)], taken: &[Ipv4Addr]) -> Self {
        if let Some((six, four)) = hosts.first() {
            let s = six.segments();
            let prefix48 = Ipv6Addr::new(s[0], s[1], s[2], 0, 0, 0, 0, 0);
            return Self { version: VERSION, prefix48, octet: four.octets()[1], last: 0 };
        }
        let hash = Digest::of(format!("{cluster}/{region}").as_bytes()).hex();
        let byte = |i: usize| u8::from_str_radix(&hash[2 * i..2 * i + 2], 16).expect("hexadecimal digits");
        let h: [u8; 6] = std::array::from_fn(byte);
        let word = |a: u8, b: u8| u16::from_be_bytes([a, b]);
        let prefix48 = Ipv6Addr::new(word(0xfd, h[0]), word(h[1], h[2]), word(h[3], h[4]), 0, 0, 0, 0, 0);
        let meets = |octet: u8| taken.iter().any(|t| t.octets()[0] == 10 && t.octets()[1] == octet);
        let octet = (0..=255u8).map(|i| h[5].wrapping_add(i)).find(|o| *o != 0 && !meets(*o)).unwrap_or(1);
        Self { version: VERSION, prefix48, octet, last: 0 }
    }

    /// The prefixes with a number, or none if the number is not used.
    fn prefixes(&self, n: u16) -> Option<(Ipv6Addr, Ipv4Addr)> {
        let [high, low] = n.to_be_bytes();
        if low == 0 {
            return None;
        }
        let octet = self.octet.checked_add(high)?;
        let mut segments = self.prefix48.segments();
        segments[3] = n;
        Some((segments.into(), Ipv4Addr::new(10, octet, low, 0)))
    }

    /// The next free prefixes after the last, going round.
    fn next(&self, used6: &BTreeSet<Ipv6Addr>, used4: &BTreeSet<Ipv4Addr>) -> Option<(u16, Ipv6Addr, Ipv4Addr)> {
        (1..=u16::MAX).find_map(|i| {
            let n = self.last.wrapping_add(i);
            let (six, four) = self.prefixes(n)?;
            (!used6.contains(&six) && !used4.contains(&four)).then_some((n, six, four))
        })
    }
}

/// Lets machines in.
pub struct Joins {
    pub config: ServerConfig,
    pub env: Env,
    pub store: Arc<dyn Store>,
    pub fleet: Fleet,
    pub view: View,
    pub authority: Option<Arc<Authority>>,
    /// The hash of the administrator's token, as text.
    pub token_hash: String,
}

/// A token that is good, or the answer that its use once got.
enum Redeemed {
    Good { key: String, at: Revision, hash: TokenHash, record: TokenRecord, request: Box<CertRequest> },
    Again(Value),
}

fn refused(detail: impl Into<String>) -> ApiError {
    ApiError::new(Code::Forbidden, detail)
}

fn checked(field: &str, classes: &Classes) -> Result<(), ApiError> {
    let errors = validate_classes(field, classes);
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(errors)) }
}

fn invalid(field: &str, message: impl Into<String>) -> ApiError {
    ApiError::invalid(vec![FieldError::new(field, message)])
}

fn parsed<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, ApiError>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e: T::Err| invalid(field, e.to_string()))
}

impl Joins {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.env.now_millis())
    }

    fn authority(&self) -> Result<&Authority, ApiError> {
        self.authority.as_deref().ok_or_else(|| {
            let detail = format!(
                "server {} holds no key of the cluster's authority: ask another server, or name the key's file in the \
                 `authority` of its configuration",
                self.config.name
            );
            ApiError::new(Code::Unavailable, detail)
        })
    }

    fn id(&self, id: Result<SpiffeId, nexus_iam::IdError>) -> Result<SpiffeId, ApiError> {
        id.map_err(|e| ApiError::new(Code::Internal, e.to_string()))
    }

    /// Makes a token.
    pub async fn token(&self, role: JoinRole, asked: TokenRequest) -> Result<TokenGrant, ApiError> {
        if !(MIN_TTL..=MAX_TTL).contains(&asked.ttl_seconds) {
            return Err(invalid("ttlSeconds", format!("between {MIN_TTL} and {MAX_TTL}")));
        }
        if let Some(zone) = &asked.zone {
            self.check_zone(zone)?;
        }
        if let Some(cell) = &asked.cell {
            if role != JoinRole::Host {
                return Err(ApiError::new(Code::Conflict, "only hosts belong to a cell: leave `cell` out"));
            }
            if self.view.read(|world| world.cells.get(None, cell).is_none()) {
                return Err(ApiError::new(Code::Conflict, format!("there is no cell {cell}")));
            }
        }
        if let Some(classes) = &asked.classes {
            if role != JoinRole::Host {
                return Err(ApiError::new(Code::Conflict, "only hosts have compute classes: leave `classes` out"));
            }
            checked("classes", classes)?;
        }
        let ca_pin = self.authority()?.pin();
        if self.forget_old().await? >= MAX_TOKENS {
            let detail = format!("{MAX_TOKENS} join tokens wait to be used: revoke some, or let them expire");
            return Err(ApiError::new(Code::Conflict, detail));
        }
        let secret = TokenSecret::generate(self.env.rng.bytes());
        let hash = secret.hash().to_string();
        let now = self.now();
        let record = TokenRecord {
            version: VERSION,
            role,
            zone: asked.zone,
            cell: asked.cell,
            classes: asked.classes,
            created: now,
            expires: now.plus(Duration::from_secs(asked.ttl_seconds)),
        };
        let at = format!("{}{hash}", key::JOIN_TOKENS);
        fleet::put_if(&*self.store, &at, None, &record).await.map_err(from_store)?;
        Ok(TokenGrant {
            token: secret.reveal(),
            id: hash[..ID_LENGTH].to_owned(),
            role,
            expires: record.expires.to_string(),
            ca_pin,
            endpoints: self.fleet.servers().into_values().map(|s| s.api).collect(),
        })
    }

    /// Deletes tokens and answers whose time is over; says how many tokens are left.
    async fn forget_old(&self) -> Result<usize, ApiError> {
        let now = self.now();
        let tokens = fleet::list::<TokenRecord>(&*self.store, key::JOIN_TOKENS, false).await.map_err(from_store)?;
        let answers = fleet::list::<AnswerRecord>(&*self.store, key::JOIN_ANSWERS, false).await.map_err(from_store)?;
        let old = |prefix: &str, name: &str| format!("{prefix}{name}");
        let dead_tokens = tokens.iter().filter(|(_, t)| t.value.expires <= now);
        let dead_answers = answers.iter().filter(|(_, a)| a.value.expires <= now);
        let ops: Vec<Op> = dead_tokens
            .map(|(name, _)| old(key::JOIN_TOKENS, name))
            .chain(dead_answers.map(|(name, _)| old(key::JOIN_ANSWERS, name)))
            .take(nexus_store::MAX_TXN_OPERATIONS)
            .map(Op::delete)
            .collect();
        if !ops.is_empty() {
            self.store.txn(Txn::new(Vec::new(), ops)).await.map_err(from_store)?;
        }
        Ok(tokens.iter().filter(|(_, t)| t.value.expires > now).count())
    }

    pub async fn list_tokens(&self) -> Result<Value, ApiError> {
        let now = self.now();
        let tokens = fleet::list::<TokenRecord>(&*self.store, key::JOIN_TOKENS, false).await.map_err(from_store)?;
        let items: Vec<Value> = tokens
            .into_iter()
            .filter(|(_, t)| t.value.expires > now)
            .map(|(hash, t)| {
                let t = t.value;
                json!({
                    "id": &hash[..ID_LENGTH.min(hash.len())], "role": t.role, "zone": t.zone, "cell": t.cell,
                    "classes": t.classes, "created": t.created, "expires": t.expires,
                })
            })
            .collect();
        Ok(json!({"items": items}))
    }

    pub async fn revoke_token(&self, id: &str) -> Result<Value, ApiError> {
        let tokens = fleet::list::<TokenRecord>(&*self.store, key::JOIN_TOKENS, false).await.map_err(from_store)?;
        let fits = |hash: &str| id.len() == ID_LENGTH && hash.starts_with(id);
        let Some((hash, found)) = tokens.into_iter().find(|(hash, _)| fits(hash)) else {
            return Err(ApiError::not_found("join token", id));
        };
        let at = format!("{}{hash}", key::JOIN_TOKENS);
        if !fleet::delete_if(&*self.store, &at, found.revision).await.map_err(from_store)? {
            return Err(ApiError::new(Code::Conflict, "the token was used at this very moment"));
        }
        Ok(json!({"revoked": id}))
    }

    /// Looks at a token and the request that comes with it. Nothing is changed.
    async fn redeem(&self, token: &str, role: JoinRole, csr: &str, ids: &[SpiffeId]) -> Result<Redeemed, ApiError> {
        let again = format!("`nexus {role} token` makes a new one");
        let unknown =
            || refused(format!("this join token is not known: it was used, was revoked, or has expired; {again}"));
        let secret = TokenSecret::parse(token).map_err(|e| refused(format!("this is no join token: {e}")))?;
        let hash = secret.hash();
        let at = format!("{}{hash}", key::JOIN_TOKENS);
        let found: Option<Stored<TokenRecord>> = fleet::get(&*self.store, &at).await.map_err(from_store)?;
        let request = CertRequest::from_pem(csr);
        let now = self.now();
        let Some(found) = found else {
            // A retry: the answer was given, but may not have arrived.
            let Ok(request) = request else { return Err(unknown()) };
            let kept = format!("{}{}", key::JOIN_ANSWERS, request.key_hash());
            let kept: Option<Stored<AnswerRecord>> = fleet::get(&*self.store, &kept).await.map_err(from_store)?;
            let same = kept.filter(|k| k.value.token == hash && k.value.expires > now && k.value.ids == ids);
            return same.map(|k| Redeemed::Again(k.value.answer)).ok_or_else(unknown);
        };
        if found.value.expires <= now {
            return Err(refused(format!("this join token expired at {}; {again}", found.value.expires)));
        }
        if found.value.role != role {
            return Err(refused(format!("this join token lets a {} join, not a {role}; {again}", found.value.role)));
        }
        let request = request.map_err(|e| invalid("csr", e.to_string()))?;
        if request.ids() != ids {
            let shown = |ids: &[SpiffeId]| ids.iter().map(SpiffeId::to_string).collect::<Vec<_>>().join(", ");
            let message = format!("it asks for {}, but who joins here is {}", shown(request.ids()), shown(ids));
            return Err(invalid("csr", message));
        }
        Ok(Redeemed::Good { key: at, at: found.revision, hash, record: found.value, request: Box::new(request) })
    }

    fn check_zone(&self, zone: &Name) -> Result<(), ApiError> {
        let zones: Vec<String> = self.view.read(|world| world.zones.live.keys().map(|(_, n)| n.to_string()).collect());
        if zones.iter().any(|z| z == zone.as_str()) {
            return Ok(());
        }
        let detail = format!("there is no zone {zone}; there are: {}", zones.join(", "));
        Err(ApiError::new(Code::Conflict, detail))
    }

    /// The zone that the token and the request agree on.
    fn zone(&self, record: &TokenRecord, asked: Option<&Name>) -> Result<Name, ApiError> {
        let zone = match (&record.zone, asked) {
            (Some(bound), Some(asked)) if bound != asked => {
                return Err(refused(format!("this join token is for zone {bound}, not {asked}")));
            }
            (Some(zone), _) | (None, Some(zone)) => zone.clone(),
            (None, None) => return Err(invalid("zone", "say which zone it is in")),
        };
        self.check_zone(&zone)?;
        Ok(zone)
    }

    fn spend(
        &self,
        key: &str,
        at: Revision,
        hash: TokenHash,
        request: &CertRequest,
        answer: &Value,
    ) -> (Compare, [Op; 2]) {
        let kept = AnswerRecord {
            version: VERSION,
            token: hash,
            ids: request.ids().to_vec(),
            expires: self.now().plus(ANSWER_LIFE),
            answer: answer.clone(),
        };
        let answer_key = format!("{}{}", key::JOIN_ANSWERS, request.key_hash());
        let ops = [Op::delete(key.to_owned()), Op::put(answer_key, fleet::json(&kept))];
        (Compare::mod_revision(key.to_owned(), at), ops)
    }

    /// The cluster, region and authority that a newcomer is to trust.
    pub fn trust(&self) -> Result<Value, ApiError> {
        let ca = self.authority()?.root_pem();
        Ok(json!({"clusterId": self.config.cluster_id, "region": self.config.region, "ca": ca}))
    }

    /// Lets a server in: it gets its number and certificates here, and is taken into the group when it runs.
    pub async fn server(&self, asked: ServerJoin) -> Result<Value, ApiError> {
        let cluster = &self.config.cluster_id;
        let (own, api) = (
            self.id(SpiffeId::server(cluster, asked.name.as_str()))?,
            self.id(SpiffeId::api(cluster, asked.name.as_str()))?,
        );
        let redeemed = self.redeem(&asked.token, JoinRole::Server, &asked.csr, &[own.clone(), api.clone()]).await?;
        let with_key = |mut answer: Value| -> Result<Value, ApiError> {
            let authority = self.authority()?;
            answer["authorityCert"] = authority.cert_pem().into();
            answer["authorityKey"] = authority.key_pem().into();
            Ok(answer)
        };
        let (token_key, token_at, hash, record, request) = match redeemed {
            Redeemed::Again(answer) => return with_key(answer),
            Redeemed::Good { key, at, hash, record, request } => (key, at, hash, record, request),
        };
        let zone = self.zone(&record, asked.zone.as_ref())?;
        let wire: Endpoint = parsed("wire", &asked.wire)?;
        reachable("wire", wire.tcp())?;
        let names = PublicNames::of(asked.name.as_str(), &asked.api, &[]).map_err(|e| invalid("api", e))?;
        let authority = self.authority()?;
        for _ in 0..TRIES {
            let servers = fleet::list::<ServerRecord>(&*self.store, key::FLEET_SERVERS, false).await;
            let servers = servers.map_err(from_store)?;
            let counter: Option<Stored<u64>> = fleet::get(&*self.store, key::FLEET_NODE).await.map_err(from_store)?;
            let mut known: Vec<ServerEntry> = servers.into_iter().map(|(_, s)| s.value.entry).collect();
            if known.is_empty() {
                known = self.fleet.servers().into_values().collect();
            }
            if let Some(other) = known.iter().find(|s| s.name == asked.name) {
                let detail = format!(
                    "server {} is a member already, at {}: choose another name, or remove it first",
                    other.name, other.wire
                );
                return Err(ApiError::new(Code::AlreadyExists, detail));
            }
            if let Some(other) = known.iter().find(|s| s.wire.parse() == Ok(wire.clone())) {
                let detail = format!("server {} has the wire address {wire} already", other.name);
                return Err(ApiError::new(Code::Conflict, detail));
            }
            let highest = known.iter().map(|s| s.node).chain(self.config.members.keys().copied()).max().unwrap_or(0);
            let node = next_node(highest.max(counter.as_ref().map_or(0, |c| c.value)));
            let entry = ServerEntry {
                node,
                name: asked.name.clone(),
                zone: zone.clone(),
                wire: wire.to_string(),
                api: asked.api.trim_end_matches('/').to_owned(),
            };
            let mut members = known.clone();
            members.push(entry.clone());
            let none = PublicNames::default();
            let answer = ServerJoined {
                cluster_id: cluster.clone(),
                region: self.config.region.clone(),
                zone: zone.clone(),
                node,
                domain: self.config.domain.clone(),
                issuer: self.config.issuer.clone(),
                zones: self.config.zones.clone(),
                ca: authority.root_pem().to_owned(),
                cert: authority.sign(&request, &own, &none)?,
                api_cert: authority.sign(&request, &api, &names)?,
                token_hash: self.token_hash.clone(),
                members,
                authority_cert: None,
                authority_key: None,
                config: self.shared_config(),
            };
            let answer = serde_json::to_value(&answer).expect("an answer is plain data");
            let record = ServerRecord { version: VERSION, entry, state: ServerState::Joining };
            let (spent, ops) = self.spend(&token_key, token_at, hash, &request, &answer);
            let at = fleet::server_key(asked.name.as_str());
            let compares = vec![
                spent,
                Compare::absent(at.clone()),
                Compare::mod_revision(key::FLEET_NODE, counter.map_or(Revision::ZERO, |c| c.revision)),
            ];
            let mut ops = Vec::from(ops);
            ops.push(Op::put(at, fleet::json(&record)));
            ops.push(Op::put(key::FLEET_NODE, node.to_string()));
            match self.store.txn(Txn::new(compares, ops)).await.map_err(from_store)? {
                done if done.is_committed() => return with_key(answer),
                nexus_store::TxnOutcome::CompareFailed { index: 0, .. } => return Err(spent_meanwhile()),
                _ => {}
            }
        }
        Err(contended())
    }

    /// What every server of the region has in its configuration, beside what the answer names.
    fn shared_config(&self) -> serde_json::Map<String, Value> {
        let mut out = serde_json::Map::new();
        let all = serde_json::to_value(&self.config).expect("a configuration is plain data");
        let shared = ["tier", "global", "cells", "store", "audit_keep", "provider_networks"];
        for field in shared.into_iter().chain(["registry_networks", "blob_grace_hours", "webhook_networks"]) {
            if let Some(value) = all.get(field).filter(|v| !v.is_null()) {
                out.insert(field.to_owned(), value.clone());
            }
        }
        if let Some(seconds) = self.config.authority.as_ref().and_then(|a| a.certificate_seconds) {
            out.insert("certificate_seconds".to_owned(), seconds.into());
        }
        out
    }

    /// Lets a host in: it gets its certificate and its address prefixes, and registers itself when its agent runs.
    pub async fn host(&self, asked: HostJoin) -> Result<Value, ApiError> {
        let id = self.id(SpiffeId::agent(&self.config.cluster_id, asked.name.as_str()))?;
        let redeemed = self.redeem(&asked.token, JoinRole::Host, &asked.csr, std::slice::from_ref(&id)).await?;
        let (token_key, token_at, hash, record, request) = match redeemed {
            Redeemed::Again(answer) => return Ok(answer),
            Redeemed::Good { key, at, hash, record, request } => (key, at, hash, record, request),
        };
        let zone = self.zone(&record, asked.zone.as_ref())?;
        let cell = self.cell(&record, asked.cell.as_ref(), &zone)?;
        checked("classes", &asked.classes)?;
        if let Some(why) = record.classes.as_ref().and_then(|bound| fleet::class_objection(bound, &asked.classes)) {
            return Err(refused(why));
        }
        let classes = match &record.classes {
            Some(bound) if asked.classes.is_empty() => bound.clone(),
            _ => asked.classes,
        };
        let address: SocketAddr = parsed("address", &asked.address)?;
        reachable("address", Some(address))?;
        let authority = self.authority()?;
        let cert = authority.sign(&request, &id, &PublicNames::default())?;
        for _ in 0..TRIES {
            let pool: Option<Stored<Pool>> =
                fleet::get(&*self.store, key::FLEET_ADDRESSES).await.map_err(from_store)?;
            let records = fleet::list::<HostRecord>(&*self.store, key::FLEET_HOSTS, false).await.map_err(from_store)?;
            let registered: Vec<_> = self.view.read(|world| {
                let of = |h: &nexus_model::Object<nexus_model::kind::Host>| {
                    (h.metadata.name.clone(), h.spec.address, h.spec.prefix6, h.spec.prefix4)
                };
                world.hosts.live.values().map(of).collect()
            });
            let old = records.iter().find(|(name, _)| *name == asked.name.as_str());
            let joined = |(_, r): &&(String, Stored<HostRecord>)| r.value.state == HostMembership::Joined;
            if old.as_ref().is_some_and(joined) || registered.iter().any(|(name, ..)| *name == asked.name) {
                let detail =
                    format!("host {} is there already: choose another name, or `nexus host leave` it", asked.name);
                return Err(ApiError::new(Code::AlreadyExists, detail));
            }
            let clash = records.iter().filter(joined).find(|(_, r)| r.value.address == address.to_string());
            let clash = clash.map(|(name, _)| name.clone());
            let clash =
                clash.or_else(|| registered.iter().find(|(_, a, ..)| *a == address).map(|(n, ..)| n.to_string()));
            if let Some(other) = clash {
                return Err(ApiError::new(Code::Conflict, format!("host {other} has the address {address} already")));
            }
            let prefixes: Vec<_> = registered.iter().map(|(_, _, six, four)| (*six, *four)).collect();
            let mut next = match &pool {
                Some(pool) => pool.value,
                None => Pool::choose(&self.config.cluster_id, &self.config.region, &prefixes, &self.addresses(address)),
            };
            let (prefix6, prefix4) = match old {
                // Whoever comes back gets what it had: nobody else was given it.
                Some((_, r)) => (r.value.prefix6, r.value.prefix4),
                None => {
                    let recorded = records.iter().map(|(_, r)| (r.value.prefix6, r.value.prefix4));
                    let (used6, used4) = prefixes.iter().copied().chain(recorded).unzip();
                    let Some((n, six, four)) = next.next(&used6, &used4) else {
                        return Err(ApiError::new(Code::Conflict, "every address prefix of the region is in use"));
                    };
                    next.last = n;
                    (six, four)
                }
            };
            let answer = HostJoined {
                cluster_id: self.config.cluster_id.clone(),
                region: self.config.region.clone(),
                zone: zone.clone(),
                cell: cell.clone(),
                classes: classes.clone(),
                prefix6,
                prefix4,
                ca: authority.root_pem().to_owned(),
                cert: cert.clone(),
                servers: self.fleet.wires(),
            };
            let answer = serde_json::to_value(&answer).expect("an answer is plain data");
            let host = HostRecord {
                version: VERSION,
                zone: zone.clone(),
                cell: cell.clone(),
                address: address.to_string(),
                prefix6,
                prefix4,
                classes: record.classes.clone(),
                state: HostMembership::Joined,
            };
            let (spent, ops) = self.spend(&token_key, token_at, hash, &request, &answer);
            let at = fleet::host_key(asked.name.as_str());
            let compares = vec![
                spent,
                Compare::mod_revision(at.clone(), old.map_or(Revision::ZERO, |(_, r)| r.revision)),
                Compare::mod_revision(key::FLEET_ADDRESSES, pool.map_or(Revision::ZERO, |p| p.revision)),
            ];
            let mut ops = Vec::from(ops);
            ops.push(Op::put(at, fleet::json(&host)));
            ops.push(Op::put(key::FLEET_ADDRESSES, fleet::json(&next)));
            match self.store.txn(Txn::new(compares, ops)).await.map_err(from_store)? {
                done if done.is_committed() => return Ok(answer),
                nexus_store::TxnOutcome::CompareFailed { index: 0, .. } => return Err(spent_meanwhile()),
                _ => {}
            }
        }
        Err(contended())
    }

    /// IPv4 addresses that the fleet's machines have themselves.
    fn addresses(&self, own: SocketAddr) -> Vec<Ipv4Addr> {
        let wires = self.fleet.wires().into_iter().filter_map(|w| w.parse::<Endpoint>().ok()?.tcp());
        let v4 = |a: SocketAddr| match a.ip() {
            std::net::IpAddr::V4(a) => Some(a),
            std::net::IpAddr::V6(_) => None,
        };
        wires.chain([own]).filter_map(v4).collect()
    }

    /// The cell that a host joins: the one asked for, or the one of its zone with the most room. When none has any, the
    /// region's writer finds or makes one when the host first reports.
    fn cell(&self, record: &TokenRecord, asked: Option<&Name>, zone: &Name) -> Result<Name, ApiError> {
        let wanted = match (&record.cell, asked) {
            (Some(bound), Some(asked)) if bound != asked => {
                return Err(refused(format!("this join token is for cell {bound}, not {asked}")));
            }
            (Some(cell), _) | (None, Some(cell)) => Some(cell.clone()),
            (None, None) => None,
        };
        self.view.read(|world| {
            if let Some(cell) = wanted {
                if world.cells.get(None, &cell).is_none() {
                    return Err(invalid("cell", format!("there is no cell {cell}")));
                }
                return Ok(cell);
            }
            let hosts = |cell: &Name| world.hosts.live.values().filter(|h| h.spec.cell == *cell).count();
            // A cell without a zone is of the one in which its hosts are, or for which it was made.
            let is_here = |cell: &Object<Cell>| {
                let name = &cell.metadata.name;
                let made = || self.config.cells.iter().any(|c| c.name == *name && c.zone == *zone);
                let lives = || world.hosts.live.values().any(|h| h.spec.cell == *name && h.spec.zone == *zone);
                cell.spec.zone.as_ref().map_or_else(|| made() || lives(), |z| z == zone)
            };
            let here = world.cells.live.values().filter(|cell| is_here(cell));
            let room = here.map(|cell| {
                let name = cell.metadata.name.clone();
                ((cell.spec.max_hosts as usize).saturating_sub(hosts(&name)), name)
            });
            let roomiest = room.filter(|(room, _)| *room > 0).max_by_key(|(room, _)| *room);
            Ok(roomiest.map_or_else(|| ANY_CELL.parse().expect("a well-formed name"), |(_, name)| name))
        })
    }

    /// Lets a gateway in. Gateways are known by their certificates alone.
    pub async fn gateway(&self, asked: GatewayJoin) -> Result<Value, ApiError> {
        let id = self.id(SpiffeId::gateway(&self.config.cluster_id, asked.name.as_str()))?;
        let redeemed = self.redeem(&asked.token, JoinRole::Gateway, &asked.csr, std::slice::from_ref(&id)).await?;
        let (token_key, token_at, hash, record, request) = match redeemed {
            Redeemed::Again(answer) => return Ok(answer),
            Redeemed::Good { key, at, hash, record, request } => (key, at, hash, record, request),
        };
        let zone = self.zone(&record, asked.zone.as_ref())?;
        let authority = self.authority()?;
        let answer = GatewayJoined {
            cluster_id: self.config.cluster_id.clone(),
            region: self.config.region.clone(),
            zone,
            ca: authority.root_pem().to_owned(),
            cert: authority.sign(&request, &id, &PublicNames::default())?,
            servers: self.fleet.wires(),
        };
        let answer = serde_json::to_value(&answer).expect("an answer is plain data");
        let (spent, ops) = self.spend(&token_key, token_at, hash, &request, &answer);
        let done = self.store.txn(Txn::new(vec![spent], ops.into())).await.map_err(from_store)?;
        if done.is_committed() { Ok(answer) } else { Err(spent_meanwhile()) }
    }
}

fn spent_meanwhile() -> ApiError {
    refused("this join token was used at this very moment by another machine")
}

fn contended() -> ApiError {
    ApiError::new(Code::Unavailable, "many join at this moment: the same request may be sent again")
}

/// An address that others can reach has a port and is not "any".
fn reachable(field: &str, address: Option<SocketAddr>) -> Result<(), ApiError> {
    match address {
        Some(a) if a.port() != 0 && !a.ip().is_unspecified() && !a.ip().is_multicast() => Ok(()),
        _ => Err(invalid(field, "an IP address and port at which others reach it, such as 10.0.0.4:7440")),
    }
}

/// The number after `highest`. Numbers are `100 × region + 1 …`; when a region has used its hundred up, it goes on where
/// no other region ever comes.
pub fn next_node(highest: u64) -> u64 {
    const FAR: u64 = 1_000_000;
    if highest >= FAR || highest % 100 < 99 { highest + 1 } else { (highest / 100 + 1) * FAR + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_never_given_twice_and_never_another_regions() {
        assert_eq!(next_node(3), 4);
        assert_eq!(next_node(203), 204);
        assert_eq!(next_node(99), 1_000_001);
        assert_eq!(next_node(1_000_001), 1_000_002);
        assert_eq!(next_node(299), 3_000_001);
    }

    #[test]
    fn prefixes_are_given_out_in_turn_and_used_ones_passed_over() {
        let region: Name = "local".parse().unwrap();
        let fresh = Pool::choose("home", &region, &[], &[]);
        assert_eq!(fresh.prefix48.octets()[0], 0xfd);
        let clash = Ipv4Addr::new(10, fresh.octet, 3, 4);
        assert_ne!(Pool::choose("home", &region, &[], &[clash]).octet, fresh.octet);

        let hosts = [("fd00:1:2:1::".parse().unwrap(), Ipv4Addr::new(10, 97, 1, 0))];
        let mut pool = Pool::choose("home", &region, &hosts, &[]);
        assert_eq!((pool.prefix48.to_string().as_str(), pool.octet), ("fd00:1:2::", 97));
        let (used6, used4): (BTreeSet<_>, BTreeSet<_>) = hosts.iter().copied().unzip();
        let (n, six, four) = pool.next(&used6, &used4).unwrap();
        assert_eq!((n, six.to_string().as_str(), four), (2, "fd00:1:2:2::", Ipv4Addr::new(10, 97, 2, 0)));
        pool.last = 255;
        let (n, six, four) = pool.next(&used6, &used4).unwrap();
        assert_eq!((n, six.to_string().as_str(), four), (257, "fd00:1:2:101::", Ipv4Addr::new(10, 98, 1, 0)));
        pool.last = u16::MAX;
        assert_eq!(pool.next(&used6, &used4).unwrap().0, 2, "round again, past what is used");
    }

    #[test]
    fn an_address_for_others_is_not_any_address() {
        for bad in ["0.0.0.0:7440", "10.0.0.1:0", "[::]:7440", "224.0.0.1:1"] {
            assert!(reachable("wire", Some(bad.parse().unwrap())).is_err(), "{bad}");
        }
        assert!(reachable("wire", Some("127.0.0.1:7440".parse().unwrap())).is_ok());
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod behaviour;
