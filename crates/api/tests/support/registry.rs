//! A registry that pulls are tried with.

use async_trait::async_trait;
use futures::StreamExt as _;
use nexus_api::pull::PullEvent;
use nexus_api::{Pull, PullStream, Pulls};
use nexus_model::kind::{Blob, ImageSpec};
use nexus_model::{ApiError, Code, Digest, Name};

/// A registry with one image, `registry.example/web:1`, which wants the password `open` when it is asked for one.
pub struct OneImage;

#[async_trait]
impl Pulls for OneImage {
    async fn pull(&self, _: &Name, pull: Pull) -> Result<PullStream, ApiError> {
        if pull.reference != "registry.example/web:1" {
            return Err(ApiError::new(Code::NotFound, format!("the registry has no {}", pull.reference)));
        }
        if pull.credentials.is_some_and(|data| data.0.get("password").is_none_or(|p| p.expose() != b"open")) {
            return Err(ApiError::new(Code::Invalid, "the registry refuses these credentials"));
        }
        let digest = Digest::of(b"");
        let found = PullEvent::Found { digest, blobs: 1, size: 0 };
        let spec = ImageSpec { digest, blobs: vec![Blob { digest, size: 0 }], ..ImageSpec::default() };
        Ok(futures::stream::iter([found, PullEvent::Image(spec)]).boxed())
    }
}
