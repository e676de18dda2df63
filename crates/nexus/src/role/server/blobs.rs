//! Image content on servers: every blob on every server. An upload is answered when a majority has it durably; whoever
//! misses one fetches it from its peers as soon as an image names it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use nexus_api::{BlobStream, Blobs};
use nexus_compute::image::{BlobStore, ImageError};
use nexus_control::view::View;
use nexus_env::{Endpoint, Env};
use nexus_model::kind::Image;
use nexus_model::plan::{BlobRequest, method};
use nexus_model::{ApiError, Code, Digest, FieldError, Name, Object, Timestamp, key};
use nexus_store::{Op, RangeRequest, Store, Txn};
use nexus_wire::{ByteStream, Pool, Refusal};
use tokio_util::sync::CancellationToken;

use super::fleet::Fleet;
use super::image_gc::Upload;
use crate::config::ServerConfig;

/// The largest blob, in bytes.
const MAX_BLOB: u64 = 20 << 30;
/// Pieces in which files are read.
const PIECE: usize = 256 << 10;
const HAS_DEADLINE: Duration = Duration::from_secs(5);
/// A pause after a round in which some blob could not be fetched.
const RETRY: Duration = Duration::from_secs(2);

pub struct ServerBlobs {
    pub(super) store: BlobStore,
    node: u64,
    fleet: Fleet,
    pub(super) region: Name,
    pub(super) view: View,
    pub(super) pool: Arc<Pool>,
    /// Of the group that all regions share.
    pub(super) global: Arc<dyn Store>,
    env: Env,
}

fn broken(error: &ImageError) -> ApiError {
    match error {
        ImageError::WrongDigest { .. } => ApiError::invalid(vec![FieldError::new("digest", error.to_string())]),
        ImageError::TooLong { .. } => ApiError::new(Code::TooLarge, error.to_string()),
        _ => ApiError::new(Code::Internal, error.to_string()),
    }
}

impl ServerBlobs {
    pub async fn open(
        config: &ServerConfig,
        fleet: Fleet,
        view: View,
        pool: Arc<Pool>,
        global: Arc<dyn Store>,
        env: &Env,
    ) -> anyhow::Result<Self> {
        let dir = config.data_dir.join("images");
        let store =
            tokio::task::spawn_blocking(move || BlobStore::open(dir)).await.context("opening the image store")??;
        Ok(Self {
            store,
            node: config.node_id,
            fleet,
            region: config.region.clone(),
            view,
            pool,
            global,
            env: env.clone(),
        })
    }

    /// The other servers of the region, whoever they are now.
    fn peers(&self) -> Vec<Endpoint> {
        let others = self.fleet.servers().into_iter().filter(|(node, _)| *node != self.node);
        others.filter_map(|(_, server)| server.wire.parse().ok()).collect()
    }

    /// The other servers of the region by name.
    pub(super) fn named_peers(&self) -> Vec<(String, Endpoint)> {
        let others = self.fleet.servers().into_iter().filter(|(node, _)| *node != self.node);
        others.filter_map(|(_, s)| Some((s.name.to_string(), s.wire.parse().ok()?))).collect()
    }

    /// The servers of other regions, which keep what was uploaded there.
    fn elsewhere(&self) -> Vec<Endpoint> {
        self.view.read(|world| {
            let others = world.fleet().regions.live.values().filter(|r| r.metadata.name != self.region);
            others.flat_map(|r| &r.status.servers).filter_map(|server| server.wire.parse().ok()).collect()
        })
    }

    pub fn size(&self, digest: Digest) -> Option<u64> {
        self.store.size(digest)
    }

    /// A blob's content.
    pub async fn read(
        &self,
        digest: Digest,
    ) -> Result<impl futures::Stream<Item = std::io::Result<Bytes>> + Send + use<>, Refusal> {
        let path = self.store.path(digest);
        let file = tokio::fs::File::open(path)
            .await
            .map_err(|_| Refusal::new("not-found", format!("blob {digest} is not here")))?;
        Ok(tokio_util::io::ReaderStream::with_capacity(file, PIECE))
    }

    /// Stores what a stream brings, unless it is there; answers its length.
    pub async fn take(
        &self,
        digest: Digest,
        content: impl futures::Stream<Item = std::io::Result<Bytes>> + Unpin,
    ) -> Result<u64, ApiError> {
        match self.store.size(digest) {
            Some(size) => Ok(size),
            None => self.write(digest, content).await,
        }
    }

    /// Stores what a stream brings, or finds that it is what is there already; answers its length. Whoever names a digest
    /// must have its content.
    async fn write(
        &self,
        digest: Digest,
        mut content: impl futures::Stream<Item = std::io::Result<Bytes>> + Unpin,
    ) -> Result<u64, ApiError> {
        let mut writer = self.store.put_stream_async(digest, MAX_BLOB).await.map_err(|e| broken(&e))?;
        while let Some(piece) = content.next().await {
            let piece = piece.map_err(|e| ApiError::new(Code::BadRequest, format!("its content ended early: {e}")))?;
            writer = writer.write_async(piece).await.map_err(|e| broken(&e))?;
        }
        writer.finish_async().await.map_err(|e| broken(&e))
    }

    async fn peer_has(&self, peer: &Endpoint, digest: Digest) -> bool {
        let client = self.pool.get(peer);
        let answer = client.call::<_, Option<u64>>(method::BLOB_HAS, &BlobRequest { digest }, HAS_DEADLINE).await;
        matches!(answer, Ok(Some(_)))
    }

    /// Sends a blob to the peers until a majority of all servers has it; the others fetch it later.
    async fn spread(&self, digest: Digest) -> Result<(), ApiError> {
        let peers = self.peers();
        let needed = peers.len().div_ceil(2);
        let sends = peers.iter().map(|peer| async move {
            if self.peer_has(peer, digest).await {
                return true;
            }
            let Ok(content) = self.read(digest).await else { return false };
            let client = self.pool.get(peer);
            let sent = client.upload::<_, u64, _>(method::BLOB_PUT, &BlobRequest { digest }, content).await;
            if let Err(error) = &sent {
                tracing::debug!(%peer, %digest, %error, "a blob could not be sent to a peer");
            }
            sent.is_ok()
        });
        let mut sends: futures::stream::FuturesUnordered<_> = sends.collect();
        let mut have = 0;
        while have < needed {
            match sends.next().await {
                Some(true) => have += 1,
                Some(false) => {}
                None => {
                    let detail = "too few servers can keep this blob now: try again, or look at `nexus status`";
                    return Err(ApiError::new(Code::Unavailable, detail));
                }
            }
        }
        Ok(())
    }

    /// Fetches what images name and this server lacks, whenever the log moves on.
    pub async fn replicate(&self, stop: CancellationToken) {
        let mut revision = self.view.global_revision();
        let mut checked = BTreeSet::new();
        loop {
            let wanted: BTreeSet<Digest> = self.view.read(|world| {
                let images = world.fleet().images.live.values();
                images.flat_map(|i| i.spec.blobs.iter().map(|b| b.digest)).collect()
            });
            let missing: Vec<Digest> =
                wanted.difference(&checked).copied().filter(|digest| self.store.size(*digest).is_none()).collect();
            let mut failed = false;
            for digest in &missing {
                let fetched = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    fetched = self.fetch(*digest) => fetched,
                };
                failed |= !fetched;
            }
            checked = wanted.into_iter().filter(|d| self.store.size(*d).is_some()).collect();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY), if failed => {}
                changed = revision.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // A burst of changes is looked at once.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn fetch(&self, digest: Digest) -> bool {
        for peer in self.peers().iter().chain(&self.elsewhere()) {
            let client = self.pool.get(peer);
            let content: Result<ByteStream, _> = client.bytes_stream(method::BLOB_GET, &BlobRequest { digest }).await;
            let Ok(content) = content else { continue };
            match self.take(digest, content).await {
                Ok(_) => return true,
                Err(error) => tracing::warn!(%peer, %digest, %error, "a blob could not be fetched from a peer"),
            }
        }
        false
    }
}

/// How long an upload is remembered that no image names.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

fn upload_key(project: &Name, digest: Digest) -> String {
    format!("{}{project}/{}", key::BLOBS, digest.hex())
}

impl ServerBlobs {
    /// Remembers for a day that a project brought a blob.
    async fn remember(&self, project: &Name, digest: Digest) -> Result<(), ApiError> {
        let lease = self.global.lease_grant(REMEMBERED).await.map_err(nexus_api::from_store)?;
        let upload = Upload { at: Some(Timestamp::from_millis(self.env.clock.now_millis())) };
        let value = serde_json::to_vec(&upload).expect("a time is plain data");
        let put = Op::Put { key: upload_key(project, digest).into(), value: value.into(), lease: Some(lease) };
        self.global.txn(Txn::new(Vec::new(), vec![put])).await.map(drop).map_err(nexus_api::from_store)
    }
}

#[async_trait]
impl Blobs for ServerBlobs {
    async fn belongs(&self, project: &Name, digest: Digest) -> Result<bool, ApiError> {
        let named = self.view.read(|world| {
            let names = |i: &Object<Image>| i.spec.digest == digest || i.spec.blobs.iter().any(|b| b.digest == digest);
            world.fleet().images.within(project).any(names)
        });
        if named {
            return Ok(true);
        }
        let request = RangeRequest::get(upload_key(project, digest));
        let found = self.global.range(request).await.map_err(nexus_api::from_store)?;
        Ok(!found.kvs.is_empty())
    }

    async fn has(&self, project: &Name, digest: Digest) -> Result<Option<u64>, ApiError> {
        Ok(if self.belongs(project, digest).await? { self.store.size(digest) } else { None })
    }

    async fn put(&self, project: &Name, digest: Digest, length: u64, content: BlobStream) -> Result<bool, ApiError> {
        let new = !self.belongs(project, digest).await?;
        let size = self.write(digest, content).await?;
        if size != length {
            let detail = format!("blob {digest} has {size} bytes, {length} were announced");
            return Err(ApiError::new(Code::BadRequest, detail));
        }
        self.spread(digest).await?;
        self.remember(project, digest).await?;
        Ok(new)
    }

    async fn retain(&self, project: &Name, digest: Digest, length: u64) -> Result<bool, ApiError> {
        if self.has(project, digest).await? != Some(length) {
            return Ok(false);
        }
        self.spread(digest).await?;
        self.remember(project, digest).await?;
        Ok(true)
    }

    async fn get(&self, project: &Name, digest: Digest) -> Result<Option<(u64, BlobStream)>, ApiError> {
        let Some(size) = self.has(project, digest).await? else { return Ok(None) };
        match self.read(digest).await {
            Ok(content) => Ok(Some((size, content.boxed()))),
            Err(_) => Ok(None),
        }
    }
}
