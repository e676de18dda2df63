//! Answers to mutations, and `Prefer: wait` (RFC 7240): after a change, the answer is held until the object has settled.
//!
//! Settled, for any kind: its `status.phase` is `Ready`, `Running`, `Stopped`, `Complete` or `Failed` and, if it tells which generation it
//! speaks of, that is this one. Kinds without a phase are settled at once; a delete is settled when its tombstone is gone.
//! The outcome of the change does not depend on the wait: when the time is over, or the store can't be watched, the
//! answer is the object as last seen, with `X-Cnx-Settled: false`.

use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use nexus_model::kind::KindDescriptor;
use nexus_model::object::is_settled;
use nexus_model::{Uid, key};
use nexus_store::{KeyValue, RangeRequest, WatchEvent};

use crate::headers::{IDEMPOTENCY_REPLAYED, PREFERENCE_APPLIED, SETTLED};
use crate::list::object_response;
use crate::render::{Stored, object_bytes};
use crate::route::Place;
use crate::serve::Server;
use crate::write::Done;

/// Between two looks at a store that could not be watched.
const RETRY: Duration = Duration::from_millis(200);

/// What a look at the object's key shows.
enum Look {
    Settled,
    NotYet,
    /// The object is no longer there, or another has its name: it will not settle.
    Gone,
}

struct Waiting<'a> {
    server: &'a Server,
    place: &'a Place,
    kind: &'static KindDescriptor,
    key: String,
    uid: Uid,
    deleted: bool,
    /// The object as last seen, and its revision.
    last: Option<(Vec<u8>, u64)>,
}

impl Waiting<'_> {
    fn look(&mut self, kv: Option<&KeyValue>) -> Look {
        let Some(kv) = kv else { return if self.deleted { Look::Settled } else { Look::Gone } };
        let Ok(stored) = Stored::read(kv) else { return Look::Gone };
        if stored.metadata.uid != self.uid {
            return Look::Gone;
        }
        self.last = Some((stored.to_bytes(), kv.mod_revision.0));
        if self.deleted {
            return Look::NotYet;
        }
        let info = self.server.schemas.of(self.kind);
        if !info.has_phase {
            return Look::Settled;
        }
        let status = stored.status();
        // A status that was not written yet says nothing, not even of what its kind has.
        let known = status["phase"].is_string();
        let current = !info.has_observed_generation || status["observedGeneration"].is_u64();
        let settled = known && current && is_settled(&status, stored.metadata.generation);
        if settled { Look::Settled } else { Look::NotYet }
    }

    /// True once the object has settled, false if it never will.
    async fn settled(&mut self) -> bool {
        let store = self.server.store(self.place);
        loop {
            let Ok(now) = store.range(RangeRequest::get(self.key.clone())).await else {
                tokio::time::sleep(RETRY).await;
                continue;
            };
            match self.look(now.kvs.first()) {
                Look::Settled => return true,
                Look::Gone => return false,
                Look::NotYet => {}
            }
            let get = RangeRequest::get(self.key.clone());
            let Ok(mut watch) = store.watch(get.start, get.end, now.revision).await else {
                tokio::time::sleep(RETRY).await;
                continue;
            };
            while let Some(Ok(batch)) = watch.next().await {
                for event in batch.events {
                    let look = match event {
                        WatchEvent::Put { kv, .. } => self.look(Some(&kv)),
                        WatchEvent::Delete { .. } => self.look(None),
                    };
                    match look {
                        Look::Settled => return true,
                        Look::Gone => return false,
                        Look::NotYet => {}
                    }
                }
            }
            // The watch broke off; look again.
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// The answer to a mutation, after the wait that it asked for.
pub(crate) async fn answer(server: &Server, done: Done) -> Response {
    let Done { place, accepted, deleted, dry_run, wait } = done;
    let place = &place;
    let metadata = accepted.object.metadata.clone();
    let mut shown = None;
    let mut settled = None;
    if let Some(wait) = wait.filter(|_| !dry_run) {
        // A wait is worth less than a request: when there is no room, the answer comes at once.
        let ended = match server.stream_permit() {
            Ok(_permit) => {
                let mut waiting = Waiting {
                    server,
                    place,
                    kind: place.kind,
                    key: if deleted {
                        key::tombstone(place.kind, metadata.uid)
                    } else {
                        key::object(place.kind, place.within(), &metadata.name)
                    },
                    uid: metadata.uid,
                    deleted,
                    last: None,
                };
                let ended = tokio::select! {
                    biased;
                    ended = waiting.settled() => ended,
                    () = server.api.shutdown.cancelled() => false,
                    () = tokio::time::sleep(wait) => false,
                };
                shown = waiting.last;
                ended
            }
            Err(_) => false,
        };
        settled = Some((wait, ended));
    }
    let (body, revision) = shown.unwrap_or_else(|| (object_bytes(accepted.object), metadata.revision));
    let mut response = object_response(body, revision);
    if accepted.created && !dry_run {
        *response.status_mut() = StatusCode::CREATED;
        let path = place.path(&metadata.name);
        let value = HeaderValue::from_maybe_shared(Bytes::from(path)).expect("paths of names are plain ASCII");
        response.headers_mut().insert(header::LOCATION, value);
    }
    if accepted.replayed {
        response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
    if let Some((wait, ended)) = settled {
        let applied = HeaderValue::try_from(format!("wait={}", wait.as_secs())).expect("digits");
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
        let ended = if ended { "true" } else { "false" };
        response.headers_mut().insert(SETTLED, HeaderValue::from_static(ended));
    }
    response
}
