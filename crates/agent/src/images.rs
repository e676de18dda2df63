//! Images by wire: blobs from any server into the host's blob store, each once.
//!
//! A manifest is stored after all that it names, so that an image whose manifest is here is here whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nexus_compute::image::{BlobStore, MAX_LAYERS, MAX_MANIFEST, Manifest};
use nexus_env::{Endpoint, Env};
use nexus_model::Digest;
use nexus_model::kind::ImageFormat;
use nexus_model::plan::{BlobRequest, ImagePlan, method};
use nexus_wire::{ByteStream, ClientOptions, Pool, ServerBook};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::config::{FetchError, ImageFetcher};

/// A server that sends nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(30);
const NO_SERVER: &str = "no server is known";
const DOWNLOADS_AT_ONCE: usize = 4;
/// Bounds a component; a layer is bounded by what its manifest says.
const MAX_COMPONENT: u64 = 1 << 30;

/// Fetches from servers.
pub struct WireImages {
    blobs: BlobStore,
    pool: Pool,
    servers: Arc<ServerBook>,
    whole: Mutex<BTreeSet<Digest>>,
    /// One permit for each image that is being fetched, so that others wait for it.
    fetching: Mutex<BTreeMap<Digest, Arc<Semaphore>>>,
    downloads: Semaphore,
}

impl WireImages {
    /// A fetcher that asks `servers` in turn. Blocks while it looks at what is here.
    pub fn new(env: &Env, tls: Arc<rustls::ClientConfig>, servers: Arc<ServerBook>, blobs: BlobStore) -> Self {
        // Whatever is in the store and was an image's root is here whole; other blobs are never asked for as images.
        let whole = blobs.list().unwrap_or_default().into_iter().map(|(digest, _)| digest).collect();
        Self {
            blobs,
            pool: Pool::new(env, tls, ClientOptions::default()),
            servers,
            whole: Mutex::new(whole),
            fetching: Mutex::default(),
            downloads: Semaphore::new(DOWNLOADS_AT_ONCE),
        }
    }

    async fn fetch(&self, image: &ImagePlan) -> Result<(), String> {
        match image.format {
            ImageFormat::Wasm => self.blob(image.digest, MAX_COMPONENT).await,
            ImageFormat::Oci => {
                let bytes = self.manifest(image.digest).await?;
                let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| format!("its manifest: {e}"))?;
                if manifest.layers.len() > MAX_LAYERS {
                    return Err(format!("its manifest names {} layers", manifest.layers.len()));
                }
                for blob in manifest.layers.iter().chain([&manifest.config]) {
                    self.blob(blob.digest, blob.size).await?;
                }
                let blobs = self.blobs.clone();
                let put = tokio::task::spawn_blocking(move || blobs.put(&bytes)).await;
                put.map_err(|e| e.to_string())?.map(drop).map_err(|e| e.to_string())
            }
        }
    }

    async fn blob(&self, digest: Digest, limit: u64) -> Result<(), String> {
        if self.blobs.has(digest) {
            return Ok(());
        }
        let _permit = self.downloads.acquire().await.map_err(|e| e.to_string())?;
        let mut why = NO_SERVER.to_owned();
        for endpoint in &self.servers.all() {
            let stored = match self.open(endpoint, digest).await {
                Ok(stream) => self.store(stream, digest, limit).await,
                Err(e) => Err(e),
            };
            match stored {
                Ok(()) => return Ok(()),
                Err(e) => why = format!("blob {digest} from {endpoint}: {e}"),
            }
        }
        Err(why)
    }

    async fn manifest(&self, digest: Digest) -> Result<Vec<u8>, String> {
        let mut why = NO_SERVER.to_owned();
        for endpoint in &self.servers.all() {
            let read = match self.open(endpoint, digest).await {
                Ok(stream) => small(stream).await,
                Err(e) => Err(e),
            };
            match read {
                Ok(bytes) if Digest::of(&bytes) == digest => return Ok(bytes),
                Ok(_) => why = format!("manifest {digest} from {endpoint}: its content has another digest"),
                Err(e) => why = format!("manifest {digest} from {endpoint}: {e}"),
            }
        }
        Err(why)
    }

    async fn open(&self, endpoint: &Endpoint, digest: Digest) -> Result<ByteStream, String> {
        let client = self.pool.get(endpoint);
        client.bytes_stream(method::BLOB_GET, &BlobRequest { digest }).await.map_err(|e| e.to_string())
    }

    async fn store(&self, mut stream: ByteStream, digest: Digest, limit: u64) -> Result<(), String> {
        let mut writer = self.blobs.put_stream_async(digest, limit).await.map_err(|e| e.to_string())?;
        while let Some(piece) = next(&mut stream).await? {
            writer = writer.write_async(piece).await.map_err(|e| e.to_string())?;
        }
        writer.finish_async().await.map(drop).map_err(|e| e.to_string())
    }
}

async fn next(stream: &mut ByteStream) -> Result<Option<bytes::Bytes>, String> {
    match timeout(SILENCE, stream.next()).await {
        Err(_) => Err(format!("nothing came for {} s", SILENCE.as_secs())),
        Ok(piece) => piece.transpose().map_err(|e| e.to_string()),
    }
}

async fn small(mut stream: ByteStream) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    while let Some(piece) = next(&mut stream).await? {
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(format!("the manifest is longer than {MAX_MANIFEST} bytes"));
        }
    }
    Ok(bytes)
}

#[async_trait]
impl ImageFetcher for WireImages {
    async fn ensure(&self, image: &ImagePlan) -> Result<(), FetchError> {
        if self.blobs.has(image.digest) {
            self.whole.lock().unwrap_or_else(PoisonError::into_inner).insert(image.digest);
            return Ok(());
        }
        let turn = {
            let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            fetching.entry(image.digest).or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
        };
        let fail = |message: String| FetchError { image: image.digest, message };
        let permit = turn.acquire().await.map_err(|e| fail(e.to_string()))?;
        // Whoever was first may have brought it.
        let result = if self.blobs.has(image.digest) { Ok(()) } else { self.fetch(image).await };
        drop(permit);
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        // Only this caller and the map hold it: nobody waits.
        if Arc::strong_count(&turn) <= 2 {
            fetching.remove(&image.digest);
        }
        drop(fetching);
        result.map_err(fail)?;
        self.whole.lock().unwrap_or_else(PoisonError::into_inner).insert(image.digest);
        Ok(())
    }

    fn held(&self) -> Vec<Digest> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}
