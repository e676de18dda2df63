//! The audit log of a group, for whoever may read it: its records, an export that verifies offline, signed heads, the keys that
//! sign them, and proofs (RFC 9162, section 2.1) by which any two answers can be held against each other.
//!
//! An organization's own auditors read what is about it, and every proof, under `/v1/regions/{region}/organizations/{organization}/audit/`.
//! Heads and proofs are hashes, so they tell nothing of others.
//!
//! | path under `/v1/regions/{region}/audit/` | answer |
//! |---|---|
//! | `records` | records, the newest first, filtered, page by page |
//! | `export` | everything from a record on, as `docs/audit-format.md` describes it |
//! | `head` | the signed head of what is committed now |
//! | `heads` | the heads that were signed each minute |
//! | `keys` | the public keys of all servers that sign |
//! | `inclusion`, `consistency` | proofs |
//! | `forget` | shreds a principal's personal data |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderValue, Method};
use nexus_audit::export::EXPORT_VERSION;
use nexus_audit::tiles::{TILE, TileId, consistency_tiles, inclusion_tiles, peaks_at, peaks_tiles};
use nexus_audit::{
    Consistency, Dropped, Entry, Hash, Header, Line, Mode, Pruned, Record, SignedHead, chain_line, consistency_proof,
    entry_line, inclusion_proof,
};
use nexus_control::audit::{Heads, Notes, ReadError, place_of, principal_of, read, read_subject};
use nexus_control::intent::{Change, Deed, Intent, Provenance, Target};
use nexus_model::kind::GLOBAL;
use nexus_model::{API_VERSION, ApiError, Code, Name, RequestId, key};
use nexus_store::{RangeRequest, Store};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use crate::caller::{Proof, subject};
use crate::input;
use crate::list::{DEFAULT_LIMIT, JSON, MAX_LIMIT};
use crate::problem::from_store;
use crate::query::Query;
use crate::route::Place;
use crate::serve::{Context, Server};
use crate::write;

/// What a server brings for the logs of its two groups.
pub struct Audit {
    pub region: Heads,
    pub global: Heads,
    /// The server's own chain.
    pub notes: Notes,
}

/// What can be asked of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    Records,
    Export,
    Head,
    Heads,
    Keys,
    Inclusion,
    Consistency,
    Forget,
}

pub(crate) const ASKED: [(&str, Asked); 8] = [
    ("records", Asked::Records),
    ("export", Asked::Export),
    ("head", Asked::Head),
    ("heads", Asked::Heads),
    ("keys", Asked::Keys),
    ("inclusion", Asked::Inclusion),
    ("consistency", Asked::Consistency),
    ("forget", Asked::Forget),
];

impl Asked {
    pub fn word(self) -> &'static str {
        ASKED.iter().find(|(_, asked)| *asked == self).map_or("", |(word, _)| word)
    }

    /// What is asked of whoever asks, of the collection `audit`.
    pub fn action(self) -> &'static str {
        match self {
            Self::Export => "export",
            Self::Forget => "forget",
            _ => "list",
        }
    }

    pub fn methods(self) -> &'static [Method] {
        if self == Self::Forget { &[Method::POST] } else { &[Method::GET, Method::HEAD] }
    }
}

/// JSON has no whole numbers beyond this that all readers agree on.
pub(crate) const MAX_NUMBER: u64 = (1 << 53) - 1;
/// The longest text that a filter takes, in characters.
pub(crate) const MAX_FILTER: usize = 320;
/// Records that one request may examine.
const MAX_SCAN: u64 = 10_000;
/// Records that are read at once.
const PAGE: usize = 250;
/// Clocks of servers differ: a record may be so much older, in milliseconds, than one behind it.
const SLACK: u64 = 3_600_000;
/// Sizes that an export proves itself consistent with.
pub(crate) const MAX_PROVEN: usize = 16;
/// Heads of one answer.
const MAX_HEADS: usize = 2_000;
const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");

fn failed(error: ReadError) -> ApiError {
    match error {
        ReadError::Store(error) => from_store(error),
        ReadError::Damaged { .. } => {
            tracing::error!(%error, "the audit log can't be read");
            ApiError::new(Code::Internal, "the audit log can't be read; the server's log says why")
        }
    }
}

fn unprovable(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Code::NotFound, error.to_string())
}

fn answer(body: &Value) -> Response {
    let mut response = Response::new(Body::from(serde_json::to_vec(body).expect("an answer is plain data")));
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// One group's log.
struct Log<'a> {
    server: &'a Arc<Server>,
    is_global: bool,
    /// Only what is about this organization is told.
    organization: Option<&'a Name>,
}

impl Log<'_> {
    fn store(&self) -> &Arc<dyn Store> {
        if self.is_global { &self.server.api.global_store } else { &self.server.api.store }
    }

    /// Whether a record may be told to who asks.
    fn tells(&self, record: &Record) -> bool {
        let Some(organization) = self.organization else { return true };
        let about = record.target.as_ref().and_then(|target| target.organization.as_deref());
        about == Some(organization.as_str()) || self.is_by_theirs(record)
    }

    /// Whether somebody of the organization that is asked about did it.
    fn is_by_theirs(&self, record: &Record) -> bool {
        self.organization.is_none_or(|o| record.actor.organization.as_deref() == Some(o.as_str()))
    }

    fn heads(&self) -> &Heads {
        if self.is_global { &self.server.api.audit.global } else { &self.server.api.audit.region }
    }
}

pub(crate) async fn handle(
    server: &Arc<Server>,
    region: &Name,
    organization: Option<&Name>,
    asked: Asked,
    parts: &Parts,
    body: Body,
    context: &Context,
) -> Result<Response, ApiError> {
    let log = Log { server, is_global: *region == *GLOBAL, organization };
    let query = parts.uri.query();
    match asked {
        Asked::Records => records(&log, &Query::parse(query, RECORDS, &[])?).await,
        Asked::Export => export(&log, &Query::parse(query, &["from", "prove"], &["prove"])?).await,
        Asked::Head => {
            Query::parse(query, &[], &[])?;
            let (head, _) = log.heads().sign().await.map_err(failed)?;
            Ok(answer(&described(&head)))
        }
        Asked::Heads => heads(&log, &Query::parse(query, &[], &[])?).await,
        Asked::Keys => keys(&log, &Query::parse(query, &[], &[])?).await,
        Asked::Inclusion => inclusion(&log, &Query::parse(query, &["index"], &[])?).await,
        Asked::Consistency => consistency(&log, &Query::parse(query, &["first", "second"], &[])?).await,
        Asked::Forget => {
            Query::parse(query, &[], &[])?;
            forget(&log, parts, body, context).await
        }
    }
}

fn described(head: &SignedHead) -> Value {
    let claimed = head.claimed();
    json!({
        "group": claimed.group, "size": claimed.size, "root": claimed.root, "time": claimed.time,
        "note": head.to_string(),
    })
}

async fn heads(log: &Log<'_>, _: &Query) -> Result<Response, ApiError> {
    let rows = log.store().range(RangeRequest::prefix(key::AUDIT_HEADS).limit(MAX_HEADS)).await.map_err(from_store)?;
    let notes = rows.kvs.iter().filter_map(|kv| std::str::from_utf8(&kv.value).ok()?.parse::<SignedHead>().ok());
    let items: Vec<Value> = notes.map(|head| described(&head)).collect();
    Ok(answer(&json!({"items": items})))
}

async fn keys(log: &Log<'_>, _: &Query) -> Result<Response, ApiError> {
    let rows = log.store().range(RangeRequest::prefix(key::AUDIT_KEYS).limit(MAX_HEADS)).await.map_err(from_store)?;
    let mut keys = BTreeMap::new();
    for kv in &rows.kvs {
        let row = String::from_utf8_lossy(&kv.key);
        let server = row.strip_prefix(key::AUDIT_KEYS).and_then(|rest| rest.split('/').next()).unwrap_or_default();
        keys.insert(String::from_utf8_lossy(&kv.value).into_owned(), server.to_owned());
    }
    // Also before its row is committed: this server signs what it answers.
    let own = log.heads().public_key().to_string();
    keys.entry(own).or_insert_with(|| log.heads().server().to_owned());
    let items: Vec<Value> = keys.into_iter().map(|(key, server)| json!({"key": key, "server": server})).collect();
    Ok(answer(&json!({"items": items})))
}

async fn inclusion(log: &Log<'_>, query: &Query) -> Result<Response, ApiError> {
    let index = query.number("index", 0..=MAX_NUMBER)?;
    let index = index.ok_or_else(|| ApiError::new(Code::BadRequest, "say of which record: ?index=N"))?;
    let (head, state) = log.heads().sign().await.map_err(failed)?;
    let size = state.frontier.size();
    let ids = if index < size { inclusion_tiles(index, size) } else { Vec::new() };
    let tiles = read::tiles(&**log.store(), None, ids, size).await.map_err(failed)?;
    let path = inclusion_proof(&tiles, index, size).map_err(unprovable)?;
    let row = log.store().range(RangeRequest::get(key::audit_record(index))).await.map_err(from_store)?;
    let entry = row.kvs.first().map(|kv| Entry::from_row(&kv.value)).transpose();
    let mut hash = entry.ok().flatten().and_then(|entry| entry.record.hash().ok());
    if hash.is_none() {
        let tiles = read::tiles(&**log.store(), None, [tile_of(index)], size).await.map_err(failed)?;
        hash = hash_of(&tiles, index);
    }
    Ok(answer(&json!({"index": index, "size": size, "hash": hash, "path": path, "head": described(&head)})))
}

async fn consistency(log: &Log<'_>, query: &Query) -> Result<Response, ApiError> {
    let number = |name: &str| {
        let missing = || ApiError::new(Code::BadRequest, format!("say which two sizes: {name} is missing"));
        query.number(name, 0..=MAX_NUMBER)?.ok_or_else(missing)
    };
    let (first, second) = (number("first")?, number("second")?);
    let state = read::state(&**log.store()).await.map_err(failed)?;
    if second > state.frontier.size() {
        return Err(unprovable(format!("the log has {} records, not {second}", state.frontier.size())));
    }
    let proof = prove(log, first, second).await?;
    Ok(answer(&serde_json::to_value(proof).expect("a proof is plain data")))
}

async fn prove(log: &Log<'_>, first: u64, second: u64) -> Result<Consistency, ApiError> {
    let ids = if first <= second { consistency_tiles(first, second) } else { Vec::new() };
    let tiles = read::tiles(&**log.store(), None, ids, second).await.map_err(failed)?;
    let path = consistency_proof(&tiles, first, second).map_err(unprovable)?;
    Ok(Consistency { first, path, second })
}

/// Parameters of the list of records.
const RECORDS: &[&str] = &["limit", "cursor", "actor", "action", "kind", "name", "project", "since", "until"];

/// Which records are wanted.
struct Filter<'q> {
    actor: Option<&'q str>,
    action: Option<&'q str>,
    kind: Option<&'q str>,
    name: Option<&'q str>,
    project: Option<&'q str>,
    since: u64,
    until: u64,
}

impl<'q> Filter<'q> {
    fn of(query: &'q Query) -> Result<Self, ApiError> {
        let text = |name: &str| match query.get(name) {
            Some(text) if text.is_empty() || text.chars().count() > MAX_FILTER => {
                Err(ApiError::new(Code::BadRequest, format!("{name} has 1 to {MAX_FILTER} characters")))
            }
            text => Ok(text),
        };
        Ok(Self {
            actor: text("actor")?,
            action: text("action")?,
            kind: text("kind")?,
            name: text("name")?,
            project: text("project")?,
            since: query.number("since", 0..=MAX_NUMBER)?.unwrap_or(0),
            until: query.number("until", 0..=MAX_NUMBER)?.unwrap_or(MAX_NUMBER),
        })
    }

    fn wants(&self, entry: &Entry) -> bool {
        let record = &entry.record;
        let target = record.target.as_ref();
        let is = |asked: Option<&str>, found: Option<&str>| asked.is_none() || asked == found;
        let actor = |asked: &str| asked == record.actor.name || asked == principal_of(&record.actor);
        (self.since..self.until).contains(&record.time)
            && self.actor.is_none_or(actor)
            && is(self.action, Some(&record.action))
            && is(self.kind, target.map(|t| t.plural.as_str()))
            && is(self.name, target.map(|t| t.name.as_str()))
            && is(self.project, target.and_then(|t| t.project.as_deref()))
    }
}

/// Records, the newest first.
async fn records(log: &Log<'_>, query: &Query) -> Result<Response, ApiError> {
    let limit = query.number("limit", 1..=MAX_LIMIT)?.unwrap_or(DEFAULT_LIMIT);
    let filter = Filter::of(query)?;
    let size = read::state(&**log.store()).await.map_err(failed)?.frontier.size();
    // The cursor is the place of the last record that was shown; what came meanwhile is newer.
    let mut end = query.number("cursor", 0..=MAX_NUMBER)?.unwrap_or(size).min(size);
    let (mut items, mut scanned) = (Vec::new(), 0);
    let mut sources = Sources::default();
    'pages: while end > 0 {
        let start = end.saturating_sub(PAGE as u64);
        let request = RangeRequest::new(key::audit_record(start), key::audit_record(end)).limit(PAGE).stale();
        let page = log.store().range(request).await.map_err(from_store)?;
        for kv in page.kvs.iter().rev() {
            let Ok(entry) = Entry::from_row(&kv.value) else {
                tracing::error!(key = %String::from_utf8_lossy(&kv.key), "a record of the audit log can't be read");
                continue;
            };
            (end, scanned) = (entry.record.index, scanned + 1);
            if entry.record.time.saturating_add(SLACK) < filter.since {
                end = 0;
                break 'pages;
            }
            if log.tells(&entry.record) && filter.wants(&entry) {
                // From where strangers came is no business of the organization's.
                let source = if log.is_by_theirs(&entry.record) { sources.of(log, &entry).await? } else { None };
                items.push(shown(&entry, kv.mod_revision.0, source));
            }
            if items.len() >= limit || scanned >= MAX_SCAN {
                break 'pages;
            }
        }
        end = end.min(start);
    }
    let mut metadata = json!({"size": size});
    if end > 0 {
        metadata["cursor"] = end.to_string().into();
    }
    Ok(answer(&json!({"apiVersion": API_VERSION, "kind": "AuditRecordList", "metadata": metadata, "items": items})))
}

/// A record with what is told beside it: the revision that it was committed at, and where the request came from.
fn shown(entry: &Entry, revision: u64, source: Option<String>) -> Value {
    let mut value = serde_json::to_value(&entry.record).expect("a record is plain data");
    value["committed"] = revision.into();
    if let Some(source) = source {
        value["sourceAddress"] = source.into();
    }
    value
}

/// The keys of personal data that one answer needs.
#[derive(Default)]
struct Sources(BTreeMap<String, Option<nexus_audit::SubjectKey>>);

impl Sources {
    async fn of(&mut self, log: &Log<'_>, entry: &Entry) -> Result<Option<String>, ApiError> {
        let Some(sealed) = entry.sealed() else { return Ok(None) };
        let row = place_of(&principal_of(&entry.record.actor));
        if !self.0.contains_key(&row) {
            let found = log.store().range(RangeRequest::get(row.clone()).stale()).await.map_err(from_store)?;
            self.0.insert(row.clone(), found.kvs.first().and_then(|kv| read_subject(&kv.value)));
        }
        let key = self.0.get(&row).and_then(Option::as_ref);
        Ok(key.and_then(|key| key.open(&sealed, &entry.record.request_id).ok()).and_then(|p| p.source_address))
    }
}

async fn export(log: &Log<'_>, query: &Query) -> Result<Response, ApiError> {
    let from = query.number("from", 0..=MAX_NUMBER)?.unwrap_or(0);
    let proven = query.all("prove");
    if proven.len() > MAX_PROVEN {
        return Err(ApiError::new(Code::BadRequest, format!("prove stands there at most {MAX_PROVEN} times")));
    }
    let number = |text: &String| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let wrong = || ApiError::new(Code::BadRequest, "prove is the size of a tree head, a whole number");
        text.parse::<u64>().ok().filter(|n| digits && *n <= MAX_NUMBER).ok_or_else(wrong)
    };
    let proven = proven.iter().map(number).collect::<Result<Vec<u64>, _>>()?;
    let permit = log.server.stream_permit()?;
    let (head, state) = log.heads().sign().await.map_err(failed)?;
    let size = state.frontier.size();
    if from > size {
        return Err(unprovable(format!("the log has {size} records: nothing begins at {from}")));
    }
    let claimed = head.claimed();
    let (cluster, group) = (claimed.cluster.clone(), claimed.group.clone());
    let whole =
        Header { cluster, from, group, mode: Mode::Whole, peaks: Vec::new(), to: size, version: EXPORT_VERSION };
    let (first, entries, mut last) = if log.organization.is_some() {
        let header = Header { mode: Mode::Selected, from: 0, ..whole };
        (vec![Line::Header(header), Line::head(&head)], selected(log, from, size, permit).boxed(), Vec::new())
    } else {
        let tiles = read::tiles(&**log.store(), None, peaks_tiles(from), size).await.map_err(failed)?;
        let header = Header { peaks: peaks_at(&tiles, from).map_err(unprovable)?, ..whole };
        let notes = (!log.is_global).then(|| log.server.api.audit.notes.clone());
        let entries = entries(Arc::clone(log.store()), notes, from, size, permit).boxed();
        (vec![Line::Header(header)], entries, vec![Line::head(&head)])
    };
    for other in proven {
        // The tree of a size in the export is seen to be the reader's own; what is bigger was never signed here.
        if other < size && other > 0 {
            last.push(Line::Consistency(prove(log, other, size).await?));
        }
    }
    let lines = |of: Vec<Line>| stream::iter(of.into_iter().map(|l| Ok(line(l.to_json()))));
    let (first, last) = (lines(first), lines(last));
    let stop = log.server.api.shutdown.clone();
    let cut = stream::once(async { Err(std::io::Error::other("this server is stopping: export from another")) });
    let content = first.chain(entries).chain(last).take_until(stop.clone().cancelled_owned());
    let content = content.chain(cut.filter(move |_| std::future::ready(stop.is_cancelled())));
    let mut response = Response::new(Body::from_stream(content));
    response.headers_mut().insert(CONTENT_TYPE, NDJSON);
    Ok(response)
}

fn line(mut json: Vec<u8>) -> Bytes {
    json.push(b'\n');
    json.into()
}

fn broken(why: impl std::fmt::Display) -> std::io::Error {
    tracing::error!(%why, "an export of the audit log broke off");
    std::io::Error::other(why.to_string())
}

/// The lines of the records that are told to who asks, each with the proof that it is in the tree.
fn selected(
    log: &Log<'_>,
    from: u64,
    size: u64,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let (server, is_global, organization) = (Arc::clone(log.server), log.is_global, log.organization.cloned());
    stream::try_unfold((from, permit), move |(next, permit)| {
        let (server, organization) = (Arc::clone(&server), organization.clone());
        async move {
            if next >= size {
                return Ok(None);
            }
            let log = Log { server: &server, is_global, organization: organization.as_ref() };
            let end = size.min(next + PAGE as u64);
            let request = RangeRequest::new(key::audit_record(next), key::audit_record(end)).limit(PAGE).stale();
            let page = log.store().range(request).await.map_err(broken)?;
            let entries: Result<Vec<_>, _> = page.kvs.iter().map(|kv| Entry::from_row(&kv.value)).collect();
            let mut entries = entries.map_err(broken)?;
            entries.retain(|entry| log.tells(&entry.record));
            let mut ids = BTreeSet::new();
            for entry in &entries {
                ids.extend(inclusion_tiles(entry.record.index, size));
            }
            let tiles = read::tiles(&**log.store(), None, ids, size).await.map_err(broken)?;
            let mut out = Vec::new();
            for mut entry in entries {
                entry.inclusion = Some(inclusion_proof(&tiles, entry.record.index, size).map_err(broken)?);
                out.extend(line(entry_line(&entry.to_row())));
            }
            Ok(Some((Bytes::from(out), (end, permit))))
        }
    })
}

/// The lines of the records, and of what their anchors settle, as far as this server has it.
fn entries(
    store: Arc<dyn Store>,
    notes: Option<Notes>,
    from: u64,
    size: u64,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    stream::try_unfold((from, permit), move |(next, permit)| {
        let (store, notes) = (Arc::clone(&store), notes.clone());
        async move {
            if next >= size {
                return Ok(None);
            }
            let end = size.min(next + PAGE as u64);
            let request = RangeRequest::new(key::audit_record(next), key::audit_record(end)).limit(PAGE).stale();
            let page = store.range(request).await.map_err(broken)?;
            let mut hashes = BTreeMap::new();
            if page.kvs.len() as u64 != end - next {
                let ids = (tile_of(next).number..=tile_of(end - 1).number).map(|number| TileId { level: 0, number });
                hashes = read::tiles(&*store, None, ids, size).await.map_err(broken)?;
            }
            let mut rows = page.kvs.iter().peekable();
            let mut out = Vec::new();
            for index in next..end {
                let Some(kv) = rows.next_if(|kv| kv.key == key::audit_record(index)) else {
                    let hash =
                        hash_of(&hashes, index).ok_or_else(|| broken(format_args!("record {index} is missing")))?;
                    out.extend(line(Line::Pruned(Pruned { hash, index }).to_json()));
                    continue;
                };
                out.extend(line(entry_line(&kv.value)));
                let entry = Entry::from_row(&kv.value).map_err(broken)?;
                let Some(anchor) = entry.record.anchor else { continue };
                let rows = match &notes {
                    Some(notes) => notes.rows(&anchor).await,
                    None => None,
                };
                match rows {
                    Some(rows) => rows.iter().for_each(|row| out.extend(line(chain_line(row)))),
                    None => {
                        let dropped = Dropped { from: anchor.from, server: anchor.server, to: anchor.to };
                        out.extend(line(Line::Dropped(dropped).to_json()));
                    }
                }
            }
            Ok(Some((Bytes::from(out), (end, permit))))
        }
    })
}

fn tile_of(index: u64) -> TileId {
    TileId { level: 0, number: index / TILE as u64 }
}

/// The hash of a record that may be pruned, from the full tile that it is in.
fn hash_of(tiles: &BTreeMap<TileId, Vec<Hash>>, index: u64) -> Option<Hash> {
    let tile = tiles.get(&tile_of(index)).filter(|tile| tile.len() == TILE)?;
    tile.get(usize::try_from(index % TILE as u64).ok()?).copied()
}

/// Whose data is to be shredded.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Forget {
    principal: String,
}

async fn forget(log: &Log<'_>, parts: &Parts, body: Body, context: &Context) -> Result<Response, ApiError> {
    let body = input::read_json(&parts.headers, body, write::JSON).await?;
    let wrong =
        |e: String| ApiError::new(Code::BadRequest, format!("the body is {{\"principal\": \"user:ORG/NAME\"}}: {e}"));
    let asked: Forget = serde_json::from_value(body).map_err(|e| wrong(e.to_string()))?;
    if asked.principal.is_empty() || asked.principal.chars().count() > MAX_FILTER {
        return Err(wrong(format!("principal has 1 to {MAX_FILTER} characters")));
    }
    let writer = if log.is_global { &log.server.api.global_writer } else { &log.server.api.writer };
    let intent = Intent {
        request_id: context.request_id.clone(),
        actor: context.caller.name.clone(),
        by: provenance(context, &[]),
        target: Target {
            plural: "principals".to_owned(),
            project: None,
            organization: None,
            name: "audit".parse().expect("a well-formed name"),
        },
        change: Change::Audit { deed: Deed::Forget { principal: asked.principal.clone() } },
        if_match: None,
        idempotency_key: None,
        dry_run: false,
    };
    writer.submit(intent).await?;
    Ok(answer(&json!({"forgotten": asked.principal})))
}

/// Who asks, from where and by what right, for records.
pub(crate) fn provenance(context: &Context, policies: &[String]) -> Provenance {
    let caller = &context.caller;
    Provenance {
        principal: match &caller.holder {
            Some((organization, holder)) => subject(organization, holder),
            None => format!("operator:{}", caller.name),
        },
        address: Some(caller.address),
        policies: policies.to_vec(),
        session: match &caller.proof {
            Proof::Key => None,
            Proof::Token { name, .. } => Some(format!("token {name}")),
            Proof::AccessKey { name, .. } => Some(format!("access key {name}")),
            Proof::Session { name, .. } => Some(name.to_string()),
        },
        callback: None,
    }
}

/// Notes an answer in this server's own chain. `context` is absent if nobody knows who asked.
pub(crate) fn note(
    server: &Server,
    context: Option<&Context>,
    request_id: &RequestId,
    action: String,
    target: Option<nexus_audit::Target>,
    answer: Result<(), Code>,
) {
    let by = context.map(|c| (provenance(c, &[]), c.caller.name.clone()));
    let by = by.as_ref().map(|(by, name)| (by, name.as_str()));
    server.api.audit.notes.answered(by, action, target, answer, request_id);
}

/// Notes a request with a credential that is not known. One without any is no attempt.
pub(crate) fn unknown(server: &Server, parts: &Parts, request_id: &RequestId) {
    if parts.headers.contains_key(http::header::AUTHORIZATION) {
        note(server, None, request_id, "requests:authenticate".to_owned(), None, Err(Code::Unauthenticated));
    }
}

/// An object as records name it.
pub(crate) fn target(place: &Place, name: &str) -> nexus_audit::Target {
    let name: String = name.chars().take(MAX_FILTER).collect();
    nexus_audit::Target {
        name: place.organization.as_ref().map_or_else(|| name.clone(), |o| format!("{o}/{name}")),
        organization: place.organization.as_ref().map(Name::to_string),
        plural: place.kind.plural.to_owned(),
        project: place.project.as_ref().map(Name::to_string),
        uid: None,
    }
}
