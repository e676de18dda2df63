//! An API over stand-ins: a store in memory with history and watches, a writer that writes through to it, blobs in a map,
//! and a host that echoes.

#![allow(dead_code)] // Each test program uses a part of it.

pub mod cloud;
pub mod hosts;
pub mod registry;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt;
pub use hosts::EchoHost;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use nexus_api::{
    Api, Audit, BlobStream, Blobs, ClusterHealth, ClusterStatus, Limits, Operations, Operators, ProviderDoor,
    ProviderRequest, Remote, StatusSource, Topology, WebhookDoor,
};
use nexus_control::audit::{Heads, Notes};
use nexus_control::directory::Directory;
use nexus_control::intent::{Accepted, Change, Intent, Writer};
use nexus_env::Env;
use nexus_iam::TokenSecret;
use nexus_iam::envelope::{FileKeys, KeyProvider};
use nexus_iam::jwt::SigningKey;
use nexus_model::{AnyObject, ApiError, Code, Digest, Name, Timestamp, Uid, key, kind};
use nexus_store::{
    GroupId, KeyValue, Leadership, LeaseId, Op, RangeRequest, RangeResponse, Revision, Store, StoreError, StoreStatus,
    Txn, TxnOutcome, Watch, WatchBatch, WatchError, WatchEvent, WatchSource,
};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

#[derive(Default)]
struct Inner {
    revision: u64,
    oldest: u64,
    keys: BTreeMap<Bytes, KeyValue>,
    log: Vec<WatchBatch>,
}

/// Keeps every revision's events; knows no leases and reads only the newest state.
pub struct MemStore {
    inner: Arc<Mutex<Inner>>,
    grown: watch::Sender<u64>,
    leadership: watch::Sender<Leadership>,
}

impl MemStore {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::default(),
            grown: watch::Sender::new(0),
            leadership: watch::Sender::new(Leadership::default()),
        })
    }

    pub fn revision(&self) -> u64 {
        self.inner.lock().unwrap().revision
    }
}

/// A way to a store that can be cut: what is asked fails then, and what is watched falls silent.
pub struct Link {
    store: Arc<MemStore>,
    cut: watch::Sender<bool>,
}

impl Link {
    pub fn to(store: &Arc<MemStore>) -> Arc<Self> {
        Arc::new(Self { store: store.clone(), cut: watch::Sender::new(false) })
    }

    pub fn set_cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }

    fn whole(&self) -> Result<&MemStore, StoreError> {
        if *self.cut.borrow() {
            return Err(StoreError::Unavailable { reason: "the link is cut".into() });
        }
        Ok(&self.store)
    }
}

struct Silent {
    watch: Watch,
    cut: watch::Receiver<bool>,
}

#[async_trait]
impl WatchSource for Silent {
    async fn next(&mut self) -> Option<Result<WatchBatch, WatchError>> {
        let batch = self.watch.next().await;
        self.cut.wait_for(|cut| !cut).await.ok()?;
        batch
    }
}

#[async_trait]
impl Store for Link {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.whole()?.txn(txn).await
    }

    fn keeps_order(&self) -> bool {
        true
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError> {
        self.whole()?.range(request).await
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        let watch = self.whole()?.watch(start, end, after).await?;
        Ok(Watch::new(Box::new(Silent { watch, cut: self.cut.subscribe() })))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.store.lease_keep_alive(lease).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.lease_revoke(lease).await
    }

    async fn compact(&self, before: Revision) -> Result<(), StoreError> {
        self.whole()?.compact(before).await
    }

    async fn status(&self) -> StoreStatus {
        self.store.status().await
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.store.leadership()
    }
}

fn within(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    key >= start && (end.is_empty() || key < end)
}

struct Source {
    inner: Arc<Mutex<Inner>>,
    grown: watch::Receiver<u64>,
    start: Bytes,
    end: Bytes,
    after: u64,
}

#[async_trait]
impl WatchSource for Source {
    async fn next(&mut self) -> Option<Result<WatchBatch, WatchError>> {
        loop {
            {
                let inner = self.inner.lock().unwrap();
                if self.after < inner.oldest {
                    return Some(Err(WatchError::Compacted { oldest: Revision(inner.oldest) }));
                }
                for batch in inner.log.iter().filter(|b| b.revision.0 > self.after) {
                    let events = batch.events.iter().filter(|e| within(e.key(), &self.start, &self.end)).cloned();
                    let events: Vec<_> = events.collect();
                    if !events.is_empty() {
                        self.after = batch.revision.0;
                        return Some(Ok(WatchBatch { events, ..batch.clone() }));
                    }
                }
            }
            self.grown.changed().await.ok()?;
        }
    }
}

#[async_trait]
impl Store for MemStore {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let mut inner = self.inner.lock().unwrap();
        let revision = Revision(inner.revision + 1);
        let mut events = Vec::new();
        for op in txn.ops {
            let key = op.key().clone();
            match op {
                Op::Put { key, value, .. } => {
                    let prev = inner.keys.get(&key).cloned();
                    let create_revision = prev.as_ref().map_or(revision, |p| p.create_revision);
                    let kv = KeyValue { key: key.clone(), value, create_revision, mod_revision: revision };
                    inner.keys.insert(key, kv.clone());
                    events.push(WatchEvent::Put { kv, prev });
                }
                Op::Delete { .. } => {
                    if let Some(prev) = inner.keys.remove(&key) {
                        events.push(WatchEvent::Delete { key, prev: Some(prev), mod_revision: revision });
                    }
                }
            }
        }
        inner.revision = revision.0;
        inner.log.push(WatchBatch { revision, timestamp_ms: 0, events });
        drop(inner);
        self.grown.send_replace(revision.0);
        Ok(TxnOutcome::Committed { revision })
    }

    fn keeps_order(&self) -> bool {
        true
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError> {
        let inner = self.inner.lock().unwrap();
        let found = inner.keys.range(request.start..).map(|(_, kv)| kv);
        let mut found = found.take_while(|kv| request.end.is_empty() || kv.key < request.end);
        let limit = if request.limit == 0 { usize::MAX } else { request.limit };
        let kvs: Vec<_> = found.by_ref().take(limit).cloned().collect();
        let more = found.next().is_some();
        Ok(RangeResponse { revision: Revision(inner.revision), kvs, more })
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        let inner = self.inner.lock().unwrap();
        if after.0 < inner.oldest {
            return Err(StoreError::Compacted { oldest: Revision(inner.oldest) });
        }
        if after.0 > inner.revision {
            return Err(StoreError::FutureRevision { asked: after, current: Revision(inner.revision) });
        }
        let (inner, grown) = (Arc::clone(&self.inner), self.grown.subscribe());
        Ok(Watch::new(Box::new(Source { inner, grown, start, end, after: after.0 })))
    }

    async fn lease_grant(&self, _: Duration) -> Result<LeaseId, StoreError> {
        Err(StoreError::Closed)
    }

    async fn lease_keep_alive(&self, _: LeaseId) -> Result<Duration, StoreError> {
        Err(StoreError::Closed)
    }

    async fn lease_revoke(&self, _: LeaseId) -> Result<(), StoreError> {
        Err(StoreError::Closed)
    }

    async fn compact(&self, before: Revision) -> Result<(), StoreError> {
        self.inner.lock().unwrap().oldest = before.0;
        Ok(())
    }

    async fn status(&self) -> StoreStatus {
        let inner = self.inner.lock().unwrap();
        StoreStatus {
            node: 1,
            group: GroupId::new("local").unwrap(),
            leader: Some(1),
            is_leader: true,
            epoch: 1,
            applied: Revision(inner.revision),
            oldest: Revision(inner.oldest),
            members: BTreeMap::new(),
            keys: inner.keys.len() as u64,
            leases: 0,
            watchers: 0,
            log_bytes: 0,
            snapshot_bytes: 0,
            commit_latency: Duration::ZERO,
            disk_free_bytes: None,
            state_bytes: 0,
            pressure: nexus_store::Pressure::None,
            generation: 1,
            feature_level: 1,
            supported_level: 1,
            failure: None,
        }
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }
}

/// Decides as little as the conventions need, in order.
pub struct FakeWriter {
    store: Arc<MemStore>,
    answers: tokio::sync::Mutex<HashMap<String, Accepted>>,
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let map = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// What the writer does with the sealed values of a secret.
fn split_sealed(object: &mut AnyObject, old: Option<&AnyObject>) -> Result<Option<(String, String)>, ApiError> {
    let secret = object.spec.as_object_mut().filter(|_| object.kind == "Secret");
    let Some(sealed) = secret.and_then(|spec| spec.shift_remove("sealed")) else { return Ok(None) };
    let version = object.spec["version"].as_u64().unwrap();
    if version != old.map_or(0, |old| old.spec["version"].as_u64().unwrap()) + 1 {
        return Err(ApiError::new(Code::PreconditionFailed, "it has a new version"));
    }
    let mut versions = object.status["versions"].as_array().cloned().unwrap_or_default();
    versions.push(json!({"version": version, "created": "2026-01-01T00:00:00Z"}));
    object.status = json!({"versions": versions});
    let row = key::secret_version(object.metadata.project.as_ref().unwrap(), &object.metadata.name, version);
    Ok(Some((row, sealed.as_str().unwrap().to_owned())))
}

#[async_trait]
impl Writer for FakeWriter {
    async fn submit(&self, intent: Intent) -> Result<Accepted, ApiError> {
        let mut answers = self.answers.lock().await;
        if intent.target.name == "panics" {
            panic!("as asked");
        }
        if intent.target.name == "slow" {
            std::future::pending::<()>().await;
        }
        if let Some(first) = intent.idempotency_key.as_ref().and_then(|k| answers.get(k)) {
            return Ok(Accepted { replayed: true, ..first.clone() });
        }
        let Some(kind) = kind::stored(&intent.target.plural) else {
            return Err(ApiError::new(Code::NotFound, "nothing is of this kind"));
        };
        let at = key::object(kind, intent.target.within(), &intent.target.name);
        let found = self.store.range(RangeRequest::get(at.clone())).await.unwrap().kvs.pop();
        let old: Option<AnyObject> = found.as_ref().map(|kv| serde_json::from_slice(&kv.value).unwrap());
        if let Some(wanted) = intent.if_match
            && found.as_ref().map(|kv| kv.mod_revision.0) != Some(wanted)
        {
            return Err(ApiError::new(Code::PreconditionFailed, "it has changed"));
        }
        let missing = || ApiError::not_found(kind.kind, intent.target.name.as_str());
        let mut created = old.is_none();
        let mut object = match intent.change {
            Change::Create { .. } if old.is_some() => return Err(ApiError::new(Code::AlreadyExists, "taken")),
            Change::Create { object } | Change::Put { object } => object,
            Change::Patch { patch } => {
                let mut value = serde_json::to_value(old.as_ref().ok_or_else(missing)?).unwrap();
                merge(&mut value, &patch);
                value["spec"] = (kind.parse_spec)(&value["spec"]).map_err(ApiError::invalid)?;
                serde_json::from_value(value).unwrap()
            }
            Change::Rollout { .. } | Change::Tell { .. } => old.clone().ok_or_else(missing)?,
            Change::Audit { .. } | Change::Rebalance { .. } => {
                return Err(ApiError::new(Code::NotFound, "nothing to forget"));
            }
            Change::Delete => {
                let mut object = old.clone().ok_or_else(missing)?;
                object.metadata.deleting = Some(Timestamp::from_millis(1));
                created = false;
                object
            }
        };
        match &old {
            Some(old) => {
                object.metadata.uid = old.metadata.uid;
                object.metadata.generation = old.metadata.generation + u64::from(old.spec != object.spec);
                object.status = old.status.clone();
            }
            None => {
                let mut random = [0; 16];
                random[..8].copy_from_slice(&(self.store.revision() + 1).to_be_bytes());
                object.metadata.uid = Uid::from_random(random);
            }
        }
        object.metadata.request_id = Some(intent.request_id);
        object.metadata.annotations.insert("actor".into(), intent.actor);
        let sealed = split_sealed(&mut object, old.as_ref())?;
        if !intent.dry_run {
            let bytes = serde_json::to_vec(&object).unwrap();
            let mut ops = match object.metadata.deleting {
                Some(_) => vec![Op::delete(at), Op::put(key::tombstone(kind, object.metadata.uid), bytes)],
                None => vec![Op::put(at, bytes)],
            };
            ops.extend(sealed.map(|(row, value)| Op::put(row, value)));
            object.metadata.revision = self.store.txn(Txn::new(vec![], ops)).await.unwrap().revision().0;
        }
        let accepted = Accepted { object, created, replayed: false };
        if let Some(key) = intent.idempotency_key {
            answers.insert(key, accepted.clone());
        }
        Ok(accepted)
    }
}

/// Signs with keys of its own. What is noted waits for a keeper that never runs.
fn audit(store: &Arc<MemStore>, global: &Arc<MemStore>) -> Audit {
    let env = Env::real();
    let heads = |group: &str, key: u8, store: &Arc<MemStore>| {
        Heads::new("home", group, "server-a", &[key; 32], &env, store.clone()).unwrap()
    };
    let (notes, _) = Notes::new(&env, "/nowhere".into(), "local".parse().unwrap(), "server-a".parse().unwrap());
    Audit { region: heads("local", 1, store), global: heads("global", 2, global), notes }
}

#[derive(Default)]
pub struct MemBlobs(Mutex<HashMap<Digest, Bytes>>);

#[async_trait]
impl Blobs for MemBlobs {
    /// Only what nobody has brought at all is refused here; who brought it is the server's to know.
    async fn belongs(&self, _: &Name, digest: Digest) -> Result<bool, ApiError> {
        Ok(digest != Digest::of(b"never brought"))
    }

    async fn has(&self, _: &Name, digest: Digest) -> Result<Option<u64>, ApiError> {
        Ok(self.0.lock().unwrap().get(&digest).map(|b| b.len() as u64))
    }

    async fn put(&self, _: &Name, digest: Digest, length: u64, mut content: BlobStream) -> Result<bool, ApiError> {
        let mut all = Vec::new();
        while let Some(piece) = content.next().await {
            all.extend_from_slice(&piece.map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?);
        }
        assert_eq!(all.len() as u64, length);
        if Digest::of(&all) != digest {
            return Err(ApiError::new(Code::Invalid, "the content has another digest"));
        }
        Ok(self.0.lock().unwrap().insert(digest, all.into()).is_none())
    }

    async fn retain(&self, _: &Name, digest: Digest, length: u64) -> Result<bool, ApiError> {
        Ok(self.0.lock().unwrap().get(&digest).is_some_and(|b| b.len() as u64 == length))
    }

    async fn get(&self, _: &Name, digest: Digest) -> Result<Option<(u64, BlobStream)>, ApiError> {
        let found = self.0.lock().unwrap().get(&digest).cloned();
        Ok(found.map(|b| (b.len() as u64, futures::stream::iter([Ok(b)]).boxed())))
    }
}

/// Answers with what was asked.
pub struct EchoOperations;

#[async_trait]
impl Operations for EchoOperations {
    async fn run(&self, name: &str, body: Value) -> Result<Value, ApiError> {
        Ok(json!({"ran": name, "with": body}))
    }
}

pub struct Status;

#[async_trait]
impl StatusSource for Status {
    async fn status(&self) -> ClusterStatus {
        ClusterStatus {
            cluster_id: "cnx-local".into(),
            control_plane_version: "v0.1.0".into(),
            status: ClusterHealth::Healthy,
            consensus_latency_ms: 0.4,
            active_workers: 6,
            topology: Topology { zones: vec!["zone-a".into()], failover_mode: "automatic".into() },
            region: Some("local".into()),
            leader: None,
            revision: None,
            servers: Vec::new(),
            groups: Vec::new(),
            etcd: None,
            certificates: Vec::new(),
            message: None,
        }
    }

    async fn ready(&self) -> Result<(), String> {
        Err("still catching up".into())
    }

    fn stale_ms(&self, global: bool) -> u64 {
        if global { 7 } else { 42 }
    }
}

/// A region `mirror` whose servers answer with what they were asked.
pub struct Mirror;

#[async_trait]
impl Remote for Mirror {
    fn regions(&self) -> Vec<Name> {
        vec!["mirror".parse().unwrap()]
    }

    async fn pass(&self, region: &Name, request: Request<Body>) -> Result<http::Response<Body>, ApiError> {
        let (parts, body) = request.into_parts();
        let header = |name: &str| parts.headers.get(name).map_or("", |v| v.to_str().unwrap()).to_owned();
        let seen = json!({
            "region": region, "method": parts.method.as_str(), "uri": parts.uri.to_string(),
            "token": header("authorization"), "from": header("x-nexus-passed-on"), "id": header("x-request-id"),
            "origin": header("x-nexus-origin"),
            "body": String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap(),
        });
        Ok(http::Response::builder().status(418).body(Body::from(seen.to_string())).unwrap())
    }
}

/// Other identity providers can't be reached.
pub struct NoProviders;

#[async_trait]
impl ProviderDoor for NoProviders {
    async fn ask(&self, _: ProviderRequest) -> Result<Bytes, String> {
        Err("nobody is asked".into())
    }
}

/// Only the addresses of this machine are inside.
struct Outside;

impl WebhookDoor for Outside {
    fn refuses(&self, url: &str) -> Option<String> {
        url.contains("//127.").then(|| "it is inside".to_owned())
    }
}

/// What a test may bring of its own.
struct Parts {
    env: Env,
    providers: Arc<dyn ProviderDoor>,
    master_keys: Arc<dyn KeyProvider>,
}

impl Default for Parts {
    fn default() -> Self {
        Self { env: Env::real(), providers: Arc::new(NoProviders), master_keys: Arc::new(FileKeys::generate()) }
    }
}

pub struct World {
    pub store: Arc<MemStore>,
    /// Of the group that all regions share.
    pub global: Arc<MemStore>,
    pub router: Router,
    pub token: String,
    pub directory: Directory,
    pub signer: Arc<SigningKey>,
    pub shutdown: CancellationToken,
}

/// An answer, read whole.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// Checks that this is a problem of a code, in its right form.
    #[track_caller]
    pub fn problem(&self, code: &str) -> Value {
        let body = self.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["status"], self.status.as_u16());
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(body["requestId"], self.header("x-request-id"));
        body
    }
}

impl World {
    pub fn new() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        Self::made(limits, Parts::default())
    }

    pub fn with_providers(limits: Limits, providers: Arc<dyn ProviderDoor>) -> Self {
        Self::made(limits, Parts { providers, ..Parts::default() })
    }

    /// With the master keys of a test's own.
    pub fn sealing(limits: Limits, master_keys: Arc<dyn KeyProvider>) -> Self {
        Self::made(limits, Parts { master_keys, ..Parts::default() })
    }

    fn made(limits: Limits, parts: Parts) -> Self {
        let (store, global) = (MemStore::new(), MemStore::new());
        Self::over(store, global.clone(), global, limits, parts)
    }

    /// Another server of the same region and fleet, which reaches the group that all share by a link.
    pub fn beside(&self, link: Arc<Link>, env: Env) -> Self {
        let parts = Parts { env, ..Parts::default() };
        Self::over(self.store.clone(), self.global.clone(), link, Limits::default(), parts)
    }

    fn over(
        store: Arc<MemStore>,
        global: Arc<MemStore>,
        reached: Arc<dyn Store>,
        limits: Limits,
        Parts { env, providers, master_keys }: Parts,
    ) -> Self {
        let secret = TokenSecret::generate([7; 32]);
        let shutdown = CancellationToken::new();
        let directory = Directory::default();
        let signer = Arc::new(SigningKey::generate().unwrap());
        tokio::spawn({
            let (directory, reached, shutdown) = (directory.clone(), reached.clone(), shutdown.clone());
            async move { directory.follow(reached, shutdown).await }
        });
        let api = Api {
            region: "local".parse().unwrap(),
            env,
            store: store.clone(),
            writer: Arc::new(FakeWriter { store: store.clone(), answers: Default::default() }),
            global_store: reached,
            global_writer: Arc::new(FakeWriter { store: global.clone(), answers: Default::default() }),
            remote: Arc::new(Mirror),
            directory: directory.clone(),
            operators: Operators::new([(secret.hash(), "admin".into())]),
            signer: signer.clone(),
            master_keys,
            issuer: "https://cloud.test".into(),
            blobs: Arc::new(MemBlobs::default()),
            pulls: Arc::new(registry::OneImage),
            hosts: Arc::new(EchoHost),
            providers,
            webhooks: Arc::new(Outside),
            operations: Arc::new(EchoOperations),
            status: Arc::new(Status),
            audit: Arc::new(audit(&store, &global)),
            metrics: Arc::default(),
            shutdown: shutdown.clone(),
            limits,
        };
        Self { store, global, router: nexus_api::router(api), token: secret.reveal(), directory, signer, shutdown }
    }

    pub fn request(&self, method: &str, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(path).header("authorization", format!("Bearer {}", self.token))
    }

    pub async fn raw(&self, request: Request<Body>) -> http::Response<Body> {
        let answer = self.router.clone().oneshot(request);
        tokio::time::timeout(Duration::from_secs(60), answer).await.expect("answers in time").unwrap()
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let (parts, body) = self.raw(request).await.into_parts();
        let body = tokio::time::timeout(Duration::from_secs(60), body.collect()).await.expect("ends in time");
        let answer = Answer { status: parts.status, headers: parts.headers, body: body.unwrap().to_bytes() };
        assert!(!answer.header("x-request-id").is_empty());
        answer
    }

    /// A request with headers and, if it is not null, a JSON body.
    pub async fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Answer {
        let mut request = self.request(method, path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if body.is_null() {
            Body::empty()
        } else {
            let patch = method == "PATCH";
            request =
                request.header("content-type", if patch { "application/merge-patch+json" } else { "application/json" });
            Body::from(body.to_string())
        };
        self.send(request.body(body).unwrap()).await
    }

    /// Everything that was ever written to both stores, as text.
    pub fn written(&self) -> String {
        let mut all = String::new();
        for store in [&self.store, &self.global] {
            for batch in &store.inner.lock().unwrap().log {
                all.push_str(&format!("{:?}\n", batch.events));
            }
        }
        all
    }

    /// Stores a row as the writer would, past the API.
    pub async fn store_row(&self, key: String, value: Vec<u8>) {
        self.store.txn(Txn::put(key, value)).await.unwrap();
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, &[], Value::Null).await
    }

    /// Publishes the key of this server's access tokens, as a server does when it starts.
    pub async fn publish_key(&self) {
        let key = hex::encode(self.signer.public().as_bytes());
        let object = json!({
            "apiVersion": "cloudnexus/v1", "kind": "SigningKey", "metadata": {"name": "s1"},
            "spec": {"key": key, "server": "s1"}, "status": {},
        });
        self.store_global("signing-keys", &object).await;
    }

    /// Stores an object as a reconciler would, past the API.
    pub async fn store_object(&self, plural: &str, object: &Value) -> u64 {
        Self::store_in(&self.store, plural, object).await
    }

    /// The same in the group that all regions share.
    pub async fn store_global(&self, plural: &str, object: &Value) -> u64 {
        Self::store_in(&self.global, plural, object).await
    }

    /// Whether any row of the group that all regions share holds a text.
    pub async fn stores_text(&self, text: &str) -> bool {
        let all = self.global.range(RangeRequest::new(Bytes::new(), Bytes::new())).await.unwrap();
        all.kvs.iter().any(|kv| kv.value.windows(text.len()).any(|w| w == text.as_bytes()))
    }

    async fn store_in(store: &MemStore, plural: &str, object: &Value) -> u64 {
        let object: AnyObject = serde_json::from_value(object.clone()).unwrap();
        let at = key::of(kind::stored(plural).unwrap(), &object);
        let bytes = serde_json::to_vec(&object).unwrap();
        store.txn(Txn::put(at, bytes)).await.unwrap().revision().0
    }
}

/// Waits for something, for as long as a loaded machine may need.
pub async fn eventually(mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub const APPS: &str = "/v1/regions/local/projects/default/apps";

pub fn app(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"image": "web"}})
}
