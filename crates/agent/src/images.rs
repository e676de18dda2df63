//! Images by wire: blobs from any server into the host's blob store, each once.
//!
//! A manifest is stored after all that it names, so that an image whose manifest is here is here whole. When room is made it goes
//! first, for the same reason. An image's last use stands in its manifest's file times.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nexus_compute::image::{Aged, BlobStore, ImageError, MAX_LAYERS, MAX_MANIFEST, Manifest};
use nexus_env::{Clock, Endpoint, Env};
use nexus_model::kind::{ImageFormat, Runtime};
use nexus_model::plan::{BlobRequest, ImagePlan, method};
use nexus_model::{Digest, Timestamp};
use nexus_wire::{ByteStream, ClientOptions, Pool, ServerBook};
use tokio::sync::{RwLock, Semaphore};
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
    /// Held together by those who bring images, alone by whoever removes some.
    gate: RwLock<()>,
    clock: Arc<dyn Clock>,
    /// How full the disk may be, in hundredths, before images go.
    full_at: u8,
    /// What the blobs of the store are, once they were looked at.
    parts: Arc<Mutex<BTreeMap<Digest, Part>>>,
    removed: AtomicU64,
    removed_bytes: AtomicU64,
}

/// What a blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// A manifest, and all that it names.
    Manifest(Vec<Digest>),
    Component,
    /// A layer or a configuration.
    Piece,
}

impl Part {
    fn read(blobs: &BlobStore, blob: &Aged) -> Result<Self, ImageError> {
        if blob.size > MAX_COMPONENT {
            return Ok(Self::Piece);
        }
        let mut head = [0; 4];
        let read = blobs.reader(blob.digest).and_then(|mut file| {
            file.read_exact(&mut head).map_err(|source| ImageError::Io { attempt: "reading a blob".into(), source })
        });
        match read {
            Ok(()) if head == *b"\0asm" => return Ok(Self::Component),
            Ok(()) if head[0] == b'{' && blob.size <= MAX_MANIFEST => {}
            // Too short for either.
            _ => return Ok(Self::Piece),
        }
        Ok(match serde_json::from_slice::<Manifest>(&blobs.read(blob.digest, MAX_MANIFEST)?) {
            Ok(manifest) => {
                Self::Manifest(manifest.layers.iter().chain([&manifest.config]).map(|d| d.digest).collect())
            }
            Err(_) => Self::Piece,
        })
    }
}

/// An image that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    digest: Digest,
    used: Timestamp,
}

/// The images that nothing needs, the least recently used first.
fn candidates(all: &[Aged], parts: &BTreeMap<Digest, Part>, needed: &BTreeSet<Digest>) -> Vec<Candidate> {
    let is_image = |blob: &&Aged| matches!(parts.get(&blob.digest), Some(Part::Manifest(_) | Part::Component));
    let free = all.iter().filter(is_image).filter(|blob| !needed.contains(&blob.digest));
    let mut free: Vec<Candidate> = free.map(|b| Candidate { digest: b.digest, used: b.used }).collect();
    free.sort_by_key(|c| (c.used, c.digest));
    free
}

/// The blobs that go with an image: itself first, then what no other image names.
fn going(parts: &BTreeMap<Digest, Part>, image: Digest) -> Vec<Digest> {
    let mut going = vec![image];
    if let Some(Part::Manifest(named)) = parts.get(&image) {
        let others: BTreeSet<Digest> = parts
            .iter()
            .filter(|(digest, _)| **digest != image)
            .filter_map(|(_, part)| if let Part::Manifest(named) = part { Some(named) } else { None })
            .flatten()
            .copied()
            .collect();
        going.extend(named.iter().filter(|digest| !others.contains(digest)));
    }
    going
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
            gate: RwLock::default(),
            clock: env.clock.clone(),
            full_at: 100,
            parts: Arc::default(),
            removed: AtomicU64::new(0),
            removed_bytes: AtomicU64::new(0),
        }
    }

    /// Says how full the disk may be, in hundredths, before images go.
    pub fn full_at(self, percent: u8) -> Self {
        Self { full_at: percent, ..self }
    }

    /// Prometheus text.
    pub fn metrics_text(&self) -> String {
        let held = self.whole().len();
        let (removed, bytes) = (self.removed.load(Ordering::Relaxed), self.removed_bytes.load(Ordering::Relaxed));
        let one = |name: &str, kind: &str, help: &str, value: u64| {
            format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n")
        };
        one("nexus_agent_image_blobs", "gauge", "Blobs of images that are here.", held as u64)
            + &one("nexus_agent_images_removed_total", "counter", "Images removed to make room.", removed)
            + &one("nexus_agent_image_removed_bytes_total", "counter", "Bytes of blobs removed to make room.", bytes)
    }

    fn whole(&self) -> MutexGuard<'_, BTreeSet<Digest>> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.clock.now_millis())
    }

    /// The store's blobs and what they are. Each is read once.
    async fn parts(&self) -> Result<(Vec<Aged>, BTreeMap<Digest, Part>), String> {
        let (blobs, known) = (self.blobs.clone(), self.parts.clone());
        let read = tokio::task::spawn_blocking(move || {
            let all = blobs.list_aged()?;
            let mut parts = known.lock().unwrap_or_else(PoisonError::into_inner);
            parts.retain(|digest, _| all.binary_search_by_key(digest, |blob| blob.digest).is_ok());
            for blob in &all {
                if !parts.contains_key(&blob.digest)
                    && let Ok(part) = Part::read(&blobs, blob)
                {
                    parts.insert(blob.digest, part);
                }
            }
            let parts = parts.clone();
            Ok::<_, ImageError>((all, parts))
        });
        read.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    /// The images that are left, by their runtime.
    fn left(parts: &BTreeMap<Digest, Part>, runtime: Runtime) -> Vec<Digest> {
        let fits = |part: &Part| match runtime {
            Runtime::Container => matches!(part, Part::Manifest(_)),
            Runtime::Function => *part == Part::Component,
        };
        parts.iter().filter(|(_, part)| fits(part)).map(|(digest, _)| *digest).collect()
    }

    /// Removes images until the disk is not too full any more, or nothing may go.
    async fn make_room(
        &self,
        runtimes: &BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>>,
        needed: &(dyn Fn() -> Option<BTreeSet<Digest>> + Send + Sync),
    ) -> Result<(), String> {
        let full = || self.blobs.percent_full().map(|percent| percent >= self.full_at).map_err(|e| e.to_string());
        if self.full_at >= 100 || !full()? {
            return Ok(());
        }
        // Nothing is brought meanwhile, and what was asked for before is in the plan by now.
        // A long download is not waited for: those who come after it would wait too.
        let Ok(_alone) = self.gate.try_write() else { return Ok(()) };
        let Some(needed) = needed() else { return Ok(()) };
        let (all, mut parts) = self.parts().await?;
        let now = self.now();
        for digest in &needed {
            self.blobs.touch(*digest, now);
        }
        let sizes: BTreeMap<Digest, u64> = all.iter().map(|blob| (blob.digest, blob.size)).collect();
        for candidate in candidates(&all, &parts, &needed) {
            let mut bytes = 0;
            for digest in going(&parts, candidate.digest) {
                self.whole().remove(&digest);
                self.blobs.remove_async(digest).await.map_err(|e| e.to_string())?;
                bytes += sizes.get(&digest).copied().unwrap_or(0);
                parts.remove(&digest);
            }
            for (kind, runtime) in runtimes {
                runtime.collect(Self::left(&parts, *kind)).await.map_err(|e| e.to_string())?;
            }
            self.removed.fetch_add(1, Ordering::Relaxed);
            self.removed_bytes.fetch_add(bytes, Ordering::Relaxed);
            tracing::info!(image = %candidate.digest, bytes, "an image that nothing here needs is gone");
            if !full()? {
                break;
            }
        }
        Ok(())
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
        let _brings = self.gate.read().await;
        if self.blobs.has(image.digest) {
            self.blobs.touch(image.digest, self.now());
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
        self.whole().iter().copied().collect()
    }

    async fn collect(
        &self,
        runtimes: &BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>>,
        needed: &(dyn Fn() -> Option<BTreeSet<Digest>> + Send + Sync),
    ) {
        if let Err(error) = self.make_room(runtimes, needed).await {
            tracing::warn!(error, "room can't be made on this host's disk");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aged(name: &str, used: i64) -> Aged {
        Aged { digest: Digest::of(name.as_bytes()), size: 10, used: Timestamp::from_millis(used) }
    }

    #[test]
    fn the_least_recently_used_goes_first_and_takes_what_is_its_alone() {
        let of = |name: &str| Digest::of(name.as_bytes());
        let all = [aged("new", 9), aged("old", 1), aged("used", 0), aged("f", 5), aged("base", 0), aged("own", 0)];
        let parts = BTreeMap::from([
            (of("new"), Part::Manifest(vec![of("base")])),
            (of("old"), Part::Manifest(vec![of("base"), of("own")])),
            (of("used"), Part::Manifest(vec![of("base")])),
            (of("f"), Part::Component),
            (of("base"), Part::Piece),
            (of("own"), Part::Piece),
        ]);
        let needed = BTreeSet::from([of("used")]);
        let order: Vec<Digest> = candidates(&all, &parts, &needed).into_iter().map(|c| c.digest).collect();
        assert_eq!(order, [of("old"), of("f"), of("new")]);
        assert_eq!(going(&parts, of("old")), [of("old"), of("own")]);
        assert_eq!(going(&parts, of("f")), [of("f")]);
        assert_eq!(WireImages::left(&parts, Runtime::Function), [of("f")]);
    }

    #[test]
    fn a_blob_is_known_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::open(dir.path()).unwrap();
        let layer = Digest::of(b"layer");
        let manifest = serde_json::json!({
            "config": {"digest": layer, "size": 5}, "layers": [{"digest": layer, "size": 5}],
        });
        for content in [&b"\0asm\x0d\0\x01\0"[..], manifest.to_string().as_bytes(), b"{\"os\": \"linux\"}", b"x", b""] {
            blobs.put(content).unwrap();
        }
        let mut found: Vec<Part> =
            blobs.list_aged().unwrap().iter().map(|blob| Part::read(&blobs, blob).unwrap()).collect();
        found.sort_by_key(|part| format!("{part:?}"));
        let expected = [Part::Component, Part::Manifest(vec![layer, layer]), Part::Piece, Part::Piece, Part::Piece];
        assert_eq!(found, expected);
    }
}
