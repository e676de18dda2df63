//! The reader's end of a watch, the same for every engine.

use async_trait::async_trait;

use crate::error::WatchError;
use crate::types::WatchBatch;

/// What an engine puts behind a [`Watch`].
#[async_trait]
pub trait WatchSource: Send {
    /// The next batch; `None` once the store is closed or an error has been given. Cancel safe.
    async fn next(&mut self) -> Option<Result<WatchBatch, WatchError>>;
}

/// A stream of the revisions that touched a range. Dropping it ends the watch.
pub struct Watch {
    source: Box<dyn WatchSource>,
}

impl Watch {
    pub fn new(source: Box<dyn WatchSource>) -> Self {
        Self { source }
    }

    /// The next batch. Cancel safe: a batch is lost only by dropping the watch.
    pub async fn next(&mut self) -> Option<Result<WatchBatch, WatchError>> {
        self.source.next().await
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}
