//! Signed tree heads. Every server has a key of its own; its public half is a row of each group, so that whoever trusts the
//! cluster now can verify what it says later. The server that leads a group signs the head of what is committed each minute
//! and keeps it as a row; any server signs one when it is asked, because what is committed is the same on all.
//!
//! Heads bind only whoever holds them: keep some outside the cluster.

use std::sync::Arc;
use std::time::Duration;

use nexus_audit::{HeadError, LogState, PublicKey, SignedHead, Signer};
use nexus_env::Env;
use nexus_model::key;
use nexus_store::{Compare, Op, RangeRequest, Revision, Store, Txn};
use tokio_util::sync::CancellationToken;

use super::read::{self, ReadError};

/// How often a leader signs, if records came meanwhile.
const EVERY: Duration = Duration::from_secs(60);
/// Between tries after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// Heads that a group keeps as rows; the oldest go. Any of them can be proven by the tree as long as someone holds it.
const KEEP: usize = 1_500;
/// Rows that go at once.
const DROP_AT_ONCE: usize = 100;

/// A group's heads, as one server signs them.
pub struct Heads {
    server: String,
    env: Env,
    store: Arc<dyn Store>,
    signer: Signer,
}

impl Heads {
    pub fn new(
        cluster: &str,
        group: &str,
        server: &str,
        secret: &[u8; 32],
        env: &Env,
        store: Arc<dyn Store>,
    ) -> Result<Self, HeadError> {
        let signer = Signer::from_seed(cluster, group, secret)?;
        Ok(Self { server: server.to_owned(), env: env.clone(), store, signer })
    }

    /// Who signs.
    pub fn server(&self) -> &str {
        &self.server
    }

    pub fn public_key(&self) -> PublicKey {
        self.signer.public_key()
    }

    /// Signs the head of all that is committed.
    pub async fn sign(&self) -> Result<(SignedHead, LogState), ReadError> {
        let state = read::state(&*self.store).await?;
        let time = u64::try_from(self.env.now_millis()).unwrap_or(0);
        Ok((self.signer.sign(state.frontier.size(), state.frontier.root(), time), state))
    }

    /// Publishes the key, and signs each minute while this server leads, until `stop`.
    pub async fn keep(&self, stop: CancellationToken) {
        let mut published = false;
        loop {
            let done = async {
                if !published {
                    self.publish().await?;
                    published = true;
                }
                if self.store.leadership().borrow().is_self {
                    self.keep_one().await?;
                }
                Ok::<(), ReadError>(())
            };
            let wait = match done.await {
                Ok(()) => EVERY,
                Err(error) => {
                    tracing::debug!(%error, "no tree head was kept; trying again");
                    RETRY
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn publish(&self) -> Result<(), ReadError> {
        let public = self.public_key();
        let row = read::key_row(&self.server, &public.id());
        let known = self.store.range(RangeRequest::get(row.clone())).await?;
        if known.kvs.is_empty() {
            self.store.txn(Txn::new(Vec::new(), vec![Op::put(row, public.to_string())])).await?;
        }
        Ok(())
    }

    async fn keep_one(&self) -> Result<(), ReadError> {
        let (head, state) = self.sign().await?;
        if state.frontier.size() == 0 {
            return Ok(());
        }
        // The first head of a size stays.
        let row = key::audit_head(state.frontier.size());
        let none = Compare::mod_revision(row.clone(), Revision(0));
        self.store.txn(Txn::new(vec![none], vec![Op::put(row, head.to_string())])).await?;
        let all = self.store.range(RangeRequest::prefix(key::AUDIT_HEADS).limit(KEEP + DROP_AT_ONCE)).await?;
        let surplus = all.kvs.len().saturating_sub(KEEP);
        if surplus > 0 {
            let ops = all.kvs.into_iter().take(surplus).map(|kv| Op::delete(kv.key)).collect();
            self.store.txn(Txn::new(Vec::new(), ops)).await?;
        }
        Ok(())
    }
}
