//! Pulls an image into the region's blobs: what its registry has and the project lacks, a few layers at a time, each checked
//! against its digest and kept by a majority of the servers before it counts.
//!
//! A blob is taken as had only if the *project* has it. Another project's may be on this server too, but whoever names a digest in a
//! registry of their own must bring its content, or they would get at what they only know the digest of.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use nexus_api::pull::PullEvent;
use nexus_api::{BlobStream, Blobs, Pull, PullStream, Pulls};
use nexus_compute::image::Descriptor;
use nexus_model::kind::{Blob, ImageFormat, ImageSource, ImageSpec};
use nexus_model::{ApiError, Code, Digest, FieldError, Name};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::registry::{Credentials, Found, Registries, Session, Wanted};

/// Images that one server pulls at once.
const AT_ONCE: usize = 8;
/// Layers of one image that come at once.
const LAYERS_AT_ONCE: usize = 3;
/// How long one image may take.
const LONGEST: Duration = Duration::from_secs(3600);
/// A connection that breaks is made again so often.
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// Progress is told each time that so many bytes have come.
const STEP: u64 = 1 << 20;
/// News that wait for a slow reader. Of progress, what does not fit is left out.
const NEWS: usize = 64;

#[derive(Debug, Clone, Default)]
struct Figures {
    images: Counter,
    failed: Counter,
    bytes: Counter,
}

pub struct ServerPulls {
    blobs: Arc<dyn Blobs>,
    registries: Arc<Registries>,
    turns: Arc<Semaphore>,
    figures: Figures,
}

impl ServerPulls {
    pub fn new(blobs: Arc<dyn Blobs>, registries: Registries) -> Self {
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        Self { blobs, registries: Arc::new(registries), turns, figures: Figures::default() }
    }

    pub fn register(&self, registry: &Mutex<Registry>) {
        let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        let Figures { images, failed, bytes } = self.figures.clone();
        registry.register("nexus_images_pulled", "Images pulled from registries", images);
        registry.register("nexus_image_pulls_failed", "Pulls that ended with an error", failed);
        registry.register("nexus_image_pull_bytes", "Bytes of blobs fetched from registries", bytes);
    }
}

/// Ends a task with whoever waits for what it does.
struct Owned(tokio::task::JoinHandle<()>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[async_trait]
impl Pulls for ServerPulls {
    async fn pull(&self, project: &Name, pull: Pull) -> Result<PullStream, ApiError> {
        let wanted = Wanted::parse(&pull.reference)?;
        let busy =
            |_| ApiError::new(Code::Overloaded, format!("this server pulls {AT_ONCE} images already: try again"));
        let turn = Arc::clone(&self.turns).try_acquire_owned().map_err(busy)?;
        let credentials = pull.credentials.map(|data| Credentials::of(&data, &wanted.registry)).transpose()?;
        let source = wanted.reference.clone();
        let session = self.registries.session(wanted, credentials);
        let found = session.find().await.inspect_err(|error| {
            self.figures.failed.inc();
            // Never with credentials: there are none in it.
            tracing::info!(reference = source, why = error.detail, "an image can't be pulled");
        })?;
        let (news, receiver) = mpsc::channel(NEWS);
        let figures = self.figures.clone();
        let work = Work { blobs: self.blobs.clone(), project: project.clone(), session, figures, news, source };
        let owned = Owned(tokio::spawn(work.run(found, turn)));
        let events = futures::stream::unfold((receiver, owned), |(mut receiver, owned)| async move {
            let event = receiver.recv().await?;
            Some((event, (receiver, owned)))
        });
        Ok(events.boxed())
    }
}

struct Work {
    blobs: Arc<dyn Blobs>,
    project: Name,
    session: Session,
    figures: Figures,
    news: mpsc::Sender<PullEvent>,
    source: String,
}

impl Work {
    async fn run(self, found: Found, turn: OwnedSemaphorePermit) {
        let done = tokio::time::timeout(LONGEST, self.bring(&found)).await;
        let late = || {
            ApiError::new(
                Code::Timeout,
                format!("not here after {} s: pull it again, what is here stays", LONGEST.as_secs()),
            )
        };
        let outcome = done.unwrap_or_else(|_| Err(late()));
        match &outcome {
            Ok(_) => self.figures.images.inc(),
            Err(error) => {
                tracing::info!(reference = self.source, why = error.detail, "an image could not be pulled");
                self.figures.failed.inc()
            }
        };
        let last = outcome.map_or_else(PullEvent::Error, PullEvent::Image);
        // Whoever asked may have gone.
        let _ = self.news.send(last).await;
        drop(turn);
    }

    async fn bring(&self, found: &Found) -> Result<ImageSpec, ApiError> {
        // A layer may stand in a manifest twice.
        let layers: BTreeMap<Digest, &Descriptor> = found.manifest.layers.iter().map(|l| (l.digest, l)).collect();
        let mut blobs: Vec<Blob> = layers.values().map(|l| Blob { digest: l.digest, size: l.size }).collect();
        for (digest, content) in [(found.manifest.config.digest, &found.config), (found.digest, &found.document)] {
            blobs.retain(|b| b.digest != digest);
            blobs.push(Blob { digest, size: content.len() as u64 });
        }
        let size = blobs.iter().map(|b| b.size).sum();
        let known = PullEvent::Found { digest: found.digest, blobs: blobs.len(), size };
        let _ = self.news.send(known).await;
        let bringing: Vec<_> = layers.values().map(|layer| self.layer(layer)).collect();
        futures::stream::iter(bringing).buffer_unordered(LAYERS_AT_ONCE).try_collect::<()>().await?;
        // What names the others comes last.
        for (digest, content) in [(found.manifest.config.digest, &found.config), (found.digest, &found.document)] {
            let size = content.len() as u64;
            let piece: BlobStream = futures::stream::iter([Ok(content.clone())]).boxed();
            self.blobs.put(&self.project, digest, size, piece).await?;
            self.tell(digest, size, size).await;
        }
        let source = ImageSource { reference: self.source.clone(), digest: found.source };
        Ok(ImageSpec { format: ImageFormat::Oci, digest: found.digest, blobs, source: Some(source) })
    }

    async fn tell(&self, digest: Digest, size: u64, received: u64) {
        let _ = self.news.send(PullEvent::Blob { digest, size, received, done: true }).await;
    }

    async fn layer(&self, layer: &Descriptor) -> Result<(), ApiError> {
        if self.blobs.retain(&self.project, layer.digest, layer.size).await? {
            self.tell(layer.digest, layer.size, layer.size).await;
            return Ok(());
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let content = self.counted(layer, self.session.blob(layer).await?);
            match self.blobs.put(&self.project, layer.digest, layer.size, content).await {
                Ok(_) => break,
                // The connection broke, or it sent less or more than it promised.
                Err(error) if error.code == Code::BadRequest && tries < TRIES => tokio::time::sleep(PAUSE).await,
                Err(error) if matches!(error.code, Code::BadRequest | Code::Invalid) => {
                    let message = format!("layer {}: {}", layer.digest, error.detail);
                    return Err(ApiError::invalid(vec![FieldError::new("reference", message)]));
                }
                Err(error) => return Err(error),
            }
        }
        self.tell(layer.digest, layer.size, layer.size).await;
        Ok(())
    }

    /// Tells on the way how much has come.
    fn counted(&self, layer: &Descriptor, content: BlobStream) -> BlobStream {
        let (news, bytes) = (self.news.clone(), self.figures.bytes.clone());
        let (digest, size, mut received, mut told) = (layer.digest, layer.size, 0u64, 0u64);
        let counted = content.inspect_ok(move |piece: &Bytes| {
            received += piece.len() as u64;
            bytes.inc_by(piece.len() as u64);
            if received >= told + STEP {
                told = received;
                let _ = news.try_send(PullEvent::Blob { digest, size, received, done: false });
            }
        });
        counted.boxed()
    }
}
