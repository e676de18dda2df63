//! Where the servers are, and which one to try next.

use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Endpoint, Env, RngExt, on_disk};
use nexus_wire::{Client, Pool, ServerBook};

/// The servers that are known, and the connections to them.
pub(crate) struct Servers {
    pool: Pool,
    env: Env,
    book: Arc<ServerBook>,
}

impl Servers {
    pub fn new(env: &Env, pool: Pool, book: Arc<ServerBook>) -> Self {
        Self { pool, env: env.clone(), book }
    }

    /// Takes over what a server told, and writes it down if it is news.
    pub async fn learn(&self, servers: &[String]) {
        if !self.book.learn(servers) {
            return;
        }
        let known = self.book.all();
        self.pool.retain(|endpoint| known.contains(endpoint));
        let (book, disk) = (self.book.clone(), self.env.disk.clone());
        let saved = on_disk(&self.env.disk, move || book.save(&*disk)).await.and_then(|s| s);
        if let Err(error) = saved {
            tracing::warn!(%error, "the list of servers can't be kept: a restart begins with the configured ones");
        }
    }

    pub fn client(&self, endpoint: &Endpoint) -> Client {
        self.pool.get(endpoint)
    }

    /// The `n`th server to try, in an order that goes round.
    pub fn nth(&self, n: usize) -> Option<Endpoint> {
        self.book.nth(n)
    }

    /// A pause that doubles with each failure in a row, drawn between half and whole, so that hosts don't come back in
    /// step.
    pub async fn pause(&self, failures: u32, first: Duration, max: Duration) {
        let whole = first.saturating_mul(1 << failures.min(16)).min(max);
        let half = whole / 2;
        let jitter = self.env.rng.below(half.as_millis() as u64 + 1);
        tokio::time::sleep(half + Duration::from_millis(jitter)).await;
    }

    pub fn start(&self) -> usize {
        self.env.rng.below(1024) as usize
    }
}
