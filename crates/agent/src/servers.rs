//! Where the servers are, and which one to try next.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_env::{Endpoint, Env, RngExt};
use nexus_wire::{Client, Pool};

/// The servers that are known. What a server tells replaces what was configured, which is tried again when nobody of
/// those answers.
pub(crate) struct Servers {
    pool: Pool,
    env: Env,
    configured: Vec<Endpoint>,
    told: Mutex<Arc<[Endpoint]>>,
}

impl Servers {
    pub fn new(env: &Env, pool: Pool, configured: Vec<Endpoint>) -> Self {
        Self { pool, env: env.clone(), configured, told: Mutex::new([].into()) }
    }

    /// Takes over what a server told. Text that is no endpoint is passed over.
    pub fn learn(&self, servers: &[String]) {
        let told: Vec<Endpoint> = servers.iter().take(64).filter_map(|s| s.parse().ok()).collect();
        if told.is_empty() {
            return;
        }
        let mut held = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if **held != *told {
            *held = told.into();
        }
    }

    pub fn all(&self) -> Vec<Endpoint> {
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner).to_vec();
        for endpoint in &self.configured {
            if !all.contains(endpoint) {
                all.push(endpoint.clone());
            }
        }
        all
    }

    pub fn client(&self, endpoint: &Endpoint) -> Client {
        self.pool.get(endpoint)
    }

    /// The `n`th server to try, in an order that goes round.
    pub fn nth(&self, n: usize) -> Option<Endpoint> {
        let all = self.all();
        all.get(n.checked_rem(all.len())?).cloned()
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
