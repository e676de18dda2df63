//! Blobs that nothing names go: on each server by itself, after a grace.
//!
//! A blob is named by an image, by an instance that was placed here and still has the content of an image that has changed or
//! gone since (it may be started on another host), and by an upload that has a day to be named. What is named is touched
//! now and then, so that a blob's age is the time since it was last of use, whatever restarts lie between. Nothing goes before
//! this server has read both logs, and what it does not understand stays.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_api::operations::{Collected, ImageGc, ImageGcDone, MAX_GRACE};
use nexus_compute::image::Image;
use nexus_env::Env;
use nexus_model::plan::{BlobCollect, BlobsCollected, method};
use nexus_model::{ApiError, Code, Digest, FieldError, Name, Timestamp, key};
use nexus_store::{Consistency, RangeRequest};
use nexus_wire::{Refusal, ServerBuilder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::blobs::ServerBlobs;

/// An upload that no image names is remembered for a day; nothing of it may go before that has passed everywhere.
pub const LEAST_GRACE: u32 = 25;

pub fn default_grace() -> u32 {
    LEAST_GRACE
}

/// How often a server looks.
const INTERVAL: Duration = Duration::from_secs(600);
/// How long a server waits until it knows what whoever asks knows.
const CATCH_UP: Duration = Duration::from_secs(5);
/// How long a peer may take.
const PATIENCE: Duration = Duration::from_secs(25);
const PAGE: usize = 1_000;

/// What is remembered of an upload.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Upload {
    /// Older servers did not say.
    #[serde(default)]
    pub at: Option<Timestamp>,
}

#[derive(Debug, Clone, Default)]
struct Figures {
    blobs: Gauge,
    bytes: Gauge<i64>,
    unnamed: Gauge<i64>,
    removed: Counter,
    removed_bytes: Counter,
}

pub struct Collector {
    blobs: Arc<ServerBlobs>,
    env: Env,
    server: String,
    grace: Duration,
    figures: Figures,
    /// One sweep at a time.
    sweeping: tokio::sync::Mutex<()>,
}

impl Collector {
    pub fn new(blobs: Arc<ServerBlobs>, env: Env, server: String, grace_hours: u32) -> Self {
        let grace = Duration::from_secs(u64::from(grace_hours) * 3600);
        let (figures, sweeping) = (Figures::default(), tokio::sync::Mutex::default());
        Self { blobs, env, server, grace, figures, sweeping }
    }

    pub fn register(&self, registry: &Mutex<Registry>) {
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let Figures { blobs, bytes, unnamed, removed, removed_bytes } = self.figures.clone();
        registry.register("nexus_blobs", "Blobs of images on this server", blobs);
        registry.register("nexus_blob_bytes", "Bytes of images on this server", bytes);
        registry.register("nexus_blob_unnamed_bytes", "Bytes of those that nothing names", unnamed);
        registry.register("nexus_blobs_collected", "Blobs removed because nothing named them", removed);
        registry.register("nexus_blob_collected_bytes", "Their bytes", removed_bytes);
    }

    /// Sweeps now and then until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            let asked = BlobCollect { dry_run: false, grace_ms: None, revision: 0 };
            if let Err(error) = self.sweep(asked).await {
                tracing::warn!(%error, "blobs that nothing names could not be looked for");
            }
        }
    }

    /// What nothing may take away now, as far as this server knows.
    async fn named(&self, since: Timestamp) -> Result<BTreeSet<Digest>, ApiError> {
        let (mut named, placed) = self.blobs.view.read(|world| {
            let images = world.fleet().images.live.values();
            let named: BTreeSet<Digest> =
                images.flat_map(|i| i.spec.blobs.iter().map(|b| b.digest).chain([i.spec.digest])).collect();
            // What runs, and what an app can be taken back to.
            let of = |image: Digest, parts: &BTreeMap<Name, Digest>| {
                parts.values().copied().chain([image]).collect::<Vec<_>>()
            };
            let placed = world.instances.live.values().flat_map(|i| of(i.spec.image_digest, &i.spec.part_digests));
            let kept = world.app_revisions.live.values().flat_map(|r| of(r.spec.image_digest, &r.spec.part_digests));
            let placed: BTreeSet<Digest> = placed.chain(kept).collect();
            (named, placed)
        });
        let kept = self.blobs.store.clone();
        let older: Vec<Digest> = placed.difference(&named).copied().collect();
        let of_instances = tokio::task::spawn_blocking(move || {
            let mut of_instances = BTreeSet::new();
            for digest in older {
                of_instances.insert(digest);
                // A component has no more than itself.
                if let Ok(image) = Image::load(&kept, digest) {
                    of_instances.insert(image.manifest.config.digest);
                    of_instances.extend(image.manifest.layers.iter().map(|l| l.digest));
                }
            }
            of_instances
        });
        named.extend(of_instances.await.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?);
        let mut start = bytes::Bytes::from_static(key::BLOBS.as_bytes());
        loop {
            let request = RangeRequest::new(start.clone(), key::prefix_end(key::BLOBS)).limit(PAGE).stale();
            let page = self.blobs.global.range(request).await.map_err(nexus_api::from_store)?;
            for kv in &page.kvs {
                let text = String::from_utf8_lossy(&kv.key);
                let Some(digest) = text.rsplit('/').next().and_then(|hex| format!("sha256:{hex}").parse().ok()) else {
                    continue;
                };
                let at = serde_json::from_slice::<Upload>(&kv.value).ok().and_then(|u| u.at);
                if at.is_none_or(|at| at >= since) {
                    named.insert(digest);
                }
            }
            match page.kvs.last() {
                Some(last) if page.more => {
                    let mut next = last.key.to_vec();
                    next.push(0);
                    start = next.into();
                }
                _ => return Ok(named),
            }
        }
    }

    /// Removes, or only counts, what nothing has named for the grace.
    async fn sweep(&self, asked: BlobCollect) -> Result<BlobsCollected, ApiError> {
        let _alone = self.sweeping.lock().await;
        let mut revision = self.blobs.view.global_revision();
        let known = tokio::time::timeout(CATCH_UP, revision.wait_for(|r| *r >= asked.revision.max(1))).await;
        let listed = *self.blobs.view.revision().borrow() > 0;
        if !listed || !matches!(known, Ok(Ok(_))) {
            return Err(ApiError::new(Code::Unavailable, "this server does not know yet what images there are"));
        }
        drop(known);
        let grace = asked.grace_ms.map_or(self.grace, Duration::from_millis);
        let now = Timestamp::from_millis(self.env.clock.now_millis());
        let passed = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
        let before = Timestamp::from_millis(now.as_millis().saturating_sub(passed));
        let named = self.named(before).await?;
        let all = self.blobs.store.list_aged_async().await.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
        let mut out = BlobsCollected::default();
        for blob in all {
            out.blobs += 1;
            out.bytes += blob.size;
            if named.contains(&blob.digest) {
                // Seldom enough to cost nothing, and often enough for an age that can be believed.
                if now.since(blob.used) > self.grace / 4 {
                    self.blobs.store.touch(blob.digest, now);
                }
                continue;
            }
            out.unnamed_blobs += 1;
            out.unnamed_bytes += blob.size;
            if blob.used > before {
                continue;
            }
            if !asked.dry_run {
                let removed = self.blobs.store.remove_async(blob.digest).await;
                removed.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
            }
            out.removed_blobs += 1;
            out.removed_bytes += blob.size;
        }
        self.count(&out, asked.dry_run);
        Ok(out)
    }

    fn count(&self, found: &BlobsCollected, dry_run: bool) {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let (gone, gone_bytes) = if dry_run { (0, 0) } else { (found.removed_blobs, found.removed_bytes) };
        self.figures.blobs.set(whole(found.blobs - gone));
        self.figures.bytes.set(whole(found.bytes - gone_bytes));
        self.figures.unnamed.set(whole(found.unnamed_bytes - gone_bytes));
        self.figures.removed.inc_by(gone);
        self.figures.removed_bytes.inc_by(gone_bytes);
        if gone > 0 {
            tracing::info!(blobs = gone, bytes = gone_bytes, "blobs that nothing names are gone");
        }
    }

    /// Has every server of the region sweep.
    pub async fn operate(&self, asked: ImageGc) -> Result<ImageGcDone, ApiError> {
        if asked.grace_seconds.is_some_and(|s| s > MAX_GRACE) {
            return Err(ApiError::invalid(vec![FieldError::new("graceSeconds", format!("at most {MAX_GRACE}"))]));
        }
        let newest = RangeRequest { consistency: Consistency::Linearizable, ..RangeRequest::get(key::FORMAT) };
        let newest = self.blobs.global.range(newest).await.map_err(nexus_api::from_store)?.revision.0;
        let grace_ms = asked.grace_seconds.map(|s| s.saturating_mul(1000));
        let sweep = BlobCollect { dry_run: asked.dry_run, grace_ms, revision: newest };
        let told = |server: String, outcome: Result<BlobsCollected, String>| match outcome {
            Ok(found) => Collected { server, found, trouble: None },
            Err(trouble) => Collected { server, trouble: Some(trouble), ..Collected::default() },
        };
        let own = async { told(self.server.clone(), self.sweep(sweep).await.map_err(|e| e.detail)) };
        let peers = self.blobs.named_peers().into_iter().map(|(name, peer)| async move {
            let client = self.blobs.pool.get(&peer);
            let answer = client.call::<_, BlobsCollected>(method::BLOB_COLLECT, &sweep, PATIENCE).await;
            told(name, answer.map_err(|e| e.to_string()))
        });
        let (own, mut servers) = futures::join!(own, futures::future::join_all(peers));
        servers.push(own);
        servers.sort_by(|a, b| a.server.cmp(&b.server));
        Ok(ImageGcDone { region: self.blobs.region.to_string(), dry_run: asked.dry_run, servers })
    }
}

/// What peers may call.
pub fn methods(builder: ServerBuilder, collector: &Arc<Collector>) -> ServerBuilder {
    let collector = collector.clone();
    builder.unary(method::BLOB_COLLECT, move |_, request: BlobCollect| {
        let collector = collector.clone();
        async move { collector.sweep(request).await.map_err(|e| Refusal::new("collect", e.detail)) }
    })
}
