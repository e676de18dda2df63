//! Watches: a list that goes on, as server-sent events.
//!
//! `?watch=REVISION` sends every change after that revision; `watch=0` or an empty value begins now. `Last-Event-ID` wins
//! over both, so that a client that was cut off goes on where it was. Events:
//!
//! | event | data |
//! |---|---|
//! | `put` | the object, new or changed |
//! | `delete` | its last state, when it was deleted or no longer matches the selector |
//! | `bookmark` | an object with nothing but `metadata.revision`: nothing up to there is missing |
//! | `error` | a problem document; the stream ends. `compacted` means: list again |
//!
//! `id` is the revision to go on from. When one revision changed several objects, only the last of its events carries that
//! revision; the others carry the one before, so that no cut between them loses any.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::request::Parts;
use http::{HeaderValue, Method, header};
use nexus_model::kind::Scope;
use nexus_model::selector::Selector;
use nexus_model::{API_VERSION, ApiError, Code, key};
use nexus_store::{KeyValue, Revision, StoreError, Watch, WatchBatch, WatchEvent};
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use crate::authorize::Lens;
use crate::headers::last_event_id;
use crate::list;
use crate::problem::{from_store, from_watch};
use crate::query::Query;
use crate::render::Stored;
use crate::route::{Place, Target};
use crate::serve::{Context, Server};

struct Stream {
    server: Arc<Server>,
    watch: Watch,
    place: Place,
    selector: Selector,
    lens: Lens,
    context: Context,
    /// Is ready when the caller's right to see this has ended.
    right_ended: BoxFuture<'static, ApiError>,
    revision: u64,
    pending: VecDeque<Bytes>,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

fn frame(id: u64, event: &str, data: &[u8]) -> Bytes {
    // JSON in one line has no line break in it, so one `data` line is enough.
    let mut out = Vec::with_capacity(data.len() + 48);
    out.extend_from_slice(format!("id: {id}\nevent: {event}\ndata: ").as_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(b"\n\n");
    out.into()
}

/// The last state of a deleted object whose value the store no longer has: what its key tells.
fn from_key(place: &Place, at: &[u8], revision: u64) -> Vec<u8> {
    let at = String::from_utf8_lossy(at);
    let mut parts = at.split('/').skip(2);
    let within = parts.next().filter(|p| *p != "-");
    let name = parts.next().unwrap_or_default();
    let mut object = json!({
        "apiVersion": API_VERSION, "kind": place.kind.kind,
        "metadata": {"name": name, "revision": revision}, "spec": {}, "status": {},
    });
    if let Some(within) = within {
        let owner = if place.kind.scope == Scope::Organization { "organization" } else { "project" };
        object["metadata"][owner] = Value::from(within);
    }
    serde_json::to_vec(&object).expect("plain data")
}

impl Stream {
    fn read<'a>(&self, kv: &'a KeyValue, revision: u64) -> Option<Stored<'a>> {
        match Stored::read(kv) {
            Ok(mut stored) => {
                stored.metadata.revision = revision;
                Some(stored)
            }
            Err(error) => {
                drop(list::unreadable(kv, &error));
                None
            }
        }
    }

    fn matches(&self, stored: &Stored<'_>) -> bool {
        self.selector.matches(stored.labels()) && self.server.shows(&self.lens, &self.place, stored, &self.context)
    }

    fn translate(&self, event: &WatchEvent, revision: u64) -> Option<(&'static str, Vec<u8>)> {
        let matched = |kv: &Option<KeyValue>| {
            let stored = kv.as_ref().and_then(|kv| self.read(kv, revision));
            stored.filter(|s| self.matches(s)).is_some()
        };
        match event {
            WatchEvent::Put { kv, prev } => {
                let stored = self.read(kv, revision)?;
                if self.matches(&stored) {
                    Some(("put", stored.to_bytes()))
                } else {
                    matched(prev).then(|| ("delete", stored.to_bytes()))
                }
            }
            WatchEvent::Delete { prev: Some(prev), .. } => {
                let stored = self.read(prev, revision)?;
                self.matches(&stored).then(|| ("delete", stored.to_bytes()))
            }
            // Of whom it was, nobody can tell any more: those who see a part of the list list again at times.
            WatchEvent::Delete { prev: None, .. } if self.lens != Lens::All => None,
            WatchEvent::Delete { key, prev: None, .. } => Some(("delete", from_key(&self.place, key, revision))),
        }
    }

    fn take_in(&mut self, batch: &WatchBatch) {
        let revision = batch.revision.0;
        let events: Vec<_> = batch.events.iter().filter_map(|e| self.translate(e, revision)).collect();
        let last = events.len().saturating_sub(1);
        for (i, (event, data)) in events.iter().enumerate() {
            let id = if i == last { revision } else { revision.saturating_sub(1) };
            self.pending.push_back(frame(id, event, data));
        }
        self.revision = revision;
    }

    fn bookmark(&self) -> Bytes {
        let data =
            json!({"apiVersion": API_VERSION, "kind": self.place.kind.kind, "metadata": {"revision": self.revision}});
        frame(self.revision, "bookmark", data.to_string().as_bytes())
    }

    fn end(&mut self, mut error: ApiError) {
        error.request_id = Some(self.context.request_id.to_string());
        let data = serde_json::to_vec(&error).expect("problems are plain data");
        self.pending.push_back(frame(self.revision, "error", &data));
        self.ended = true;
    }

    async fn next(&mut self) -> Option<Bytes> {
        let every = self.server.api.limits.bookmark_every;
        let silence = tokio::time::sleep(every);
        tokio::pin!(silence);
        loop {
            if let Some(frame) = self.pending.pop_front() {
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            tokio::select! {
                biased;
                () = self.server.api.shutdown.cancelled() => {
                    self.end(ApiError::new(Code::Unavailable, "this server is stopping: watch from another"));
                }
                error = &mut self.right_ended => self.end(error),
                batch = self.watch.next() => match batch {
                    Some(Ok(batch)) => self.take_in(&batch),
                    Some(Err(error)) => self.end(from_watch(error)),
                    None => self.end(ApiError::new(Code::Unavailable, "the watch ended: begin again from the last id")),
                },
                () = &mut silence => return Some(self.bookmark()),
            }
        }
    }
}

/// Is ready, with the reason, when a caller's right to see something has ended.
pub(crate) fn right_ended(server: Arc<Server>, context: Context, target: Target) -> BoxFuture<'static, ApiError> {
    Box::pin(async move { server.right_ended(&context, &target).await })
}

/// Where a watch begins: what the client saw last, or now.
async fn begin(server: &Server, place: &Place, query: &Query, parts: &Parts) -> Result<u64, ApiError> {
    let asked = match query.get("watch") {
        None | Some("") => 0,
        Some(_) => query.number("watch", 0..=i64::MAX as u64)?.unwrap_or(0),
    };
    match last_event_id(&parts.headers)?.unwrap_or(asked) {
        0 => server.current_revision(place, list::consistency(query)?).await,
        revision => Ok(revision),
    }
}

pub(crate) async fn handle(
    server: &Arc<Server>,
    place: &Place,
    query: &Query,
    parts: &Parts,
    context: &Context,
    lens: Lens,
) -> Result<Response, ApiError> {
    for name in ["limit", "cursor", "deleting"] {
        if query.get(name).is_some() {
            return Err(ApiError::new(Code::BadRequest, format!("{name} can't be combined with watch")));
        }
    }
    let selector = list::selector(query)?;
    let permit = server.stream_permit()?;
    let after = begin(server, place, query, parts).await?;
    let prefix = key::objects(place.kind, place.within());
    let (start, end) = (Bytes::from(prefix.clone()), Bytes::from(key::prefix_end(&prefix)));
    let store = server.store(place);
    let mut watch = store.watch(start.clone(), end.clone(), Revision(after)).await;
    if let Err(StoreError::FutureRevision { .. }) = watch {
        // The client may have listed on a server that is ahead of this one: a linearizable read catches up.
        server.current_revision(place, nexus_store::Consistency::Linearizable).await?;
        watch = store.watch(start, end, Revision(after)).await;
    }
    let mut stream = Stream {
        server: Arc::clone(server),
        watch: watch.map_err(from_store)?,
        place: place.clone(),
        selector,
        lens,
        context: context.clone(),
        right_ended: right_ended(Arc::clone(server), context.clone(), Target::Collection(place.clone())),
        revision: after,
        pending: VecDeque::new(),
        ended: false,
        _permit: permit,
    };
    // The first frame says at once where the stream begins.
    stream.pending.push_back(stream.bookmark());
    let body = if parts.method == Method::HEAD {
        Body::empty()
    } else {
        Body::from_stream(futures::stream::unfold(stream, |mut stream| async move {
            let next = stream.next().await?;
            Some((Ok::<_, Infallible>(next), stream))
        }))
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}
