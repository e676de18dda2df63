//! The way to whoever signs: any server of the region.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use nexus_model::plan::{WorkloadCertificate, WorkloadCertificateRequest, WorkloadToken, WorkloadTokenRequest, method};
use nexus_model::{Name, Uid};
use nexus_wire::WireError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::servers::Servers;

/// One server's time to answer.
const DEADLINE: Duration = Duration::from_secs(4);
/// So many servers are asked for one thing.
const ASKED: usize = 3;

/// Why nothing was signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IssueError {
    #[error("a server refused: {0}")]
    Refused(String),
    #[error("no server can be reached: {0}")]
    Unreachable(String),
}

/// Signs for instances of this host.
#[async_trait]
pub(crate) trait Issuer: Send + Sync {
    async fn certificate(&self, instance: Uid, csr: String) -> Result<WorkloadCertificate, IssueError>;
    async fn token(&self, instance: Uid, audience: Vec<String>) -> Result<WorkloadToken, IssueError>;
}

pub(crate) struct WireIssuer {
    host: Name,
    servers: Arc<Servers>,
    /// Whom to ask first: the one that answered last.
    turn: AtomicUsize,
}

impl WireIssuer {
    pub fn new(host: Name, servers: Arc<Servers>) -> Self {
        let turn = AtomicUsize::new(servers.start());
        Self { host, servers, turn }
    }

    /// Whose instances it asks for.
    pub fn host(&self) -> &Name {
        &self.host
    }

    /// A server that refuses may only be behind, or hold no key: the next one is asked all the same.
    pub async fn ask<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<A, IssueError> {
        let first = self.turn.load(Ordering::Relaxed);
        let mut failed = IssueError::Unreachable("none is known".to_owned());
        for turn in first..first + ASKED {
            let Some(endpoint) = self.servers.nth(turn) else { break };
            match self.servers.client(&endpoint).call(method, request, DEADLINE).await {
                Ok(answer) => {
                    self.turn.store(turn % 1024, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(WireError::Refused { detail, .. }) => failed = IssueError::Refused(detail),
                Err(error) if matches!(failed, IssueError::Unreachable(_)) => {
                    failed = IssueError::Unreachable(error.to_string());
                }
                Err(_) => {}
            }
        }
        Err(failed)
    }
}

#[async_trait]
impl Issuer for WireIssuer {
    async fn certificate(&self, instance: Uid, csr: String) -> Result<WorkloadCertificate, IssueError> {
        let request = WorkloadCertificateRequest { host: self.host.clone(), instance, csr };
        self.ask(method::WORKLOAD_CERTIFICATE, &request).await
    }

    async fn token(&self, instance: Uid, audience: Vec<String>) -> Result<WorkloadToken, IssueError> {
        let request = WorkloadTokenRequest { host: self.host.clone(), instance, audience };
        self.ask(method::WORKLOAD_TOKEN, &request).await
    }
}
