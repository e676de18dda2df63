//! Clients of many peers, one for each endpoint.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use nexus_env::{Endpoint, Env};

use crate::client::{Client, ClientOptions};

/// When more peers than this are known, those without a connection are forgotten; they lose only their back-off.
const MANY: usize = 4096;

/// Hands out the one client of each endpoint. Cloning is cheap.
#[derive(Clone)]
pub struct Pool {
    env: Env,
    tls: Arc<rustls::ClientConfig>,
    options: ClientOptions,
    clients: Arc<Mutex<BTreeMap<Endpoint, Client>>>,
}

impl Pool {
    pub fn new(env: &Env, tls: Arc<rustls::ClientConfig>, options: ClientOptions) -> Self {
        Self { env: env.clone(), tls, options, clients: Arc::default() }
    }

    pub fn get(&self, endpoint: &Endpoint) -> Client {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(endpoint) {
            return client.clone();
        }
        if clients.len() >= MANY {
            clients.retain(|_, client| client.is_connected());
        }
        let client = Client::new(&self.env, endpoint.clone(), self.tls.clone(), self.options.clone());
        clients.insert(endpoint.clone(), client.clone());
        client
    }

    /// Forgets a peer. Its connection closes when the last call and stream on it is over.
    pub fn forget(&self, endpoint: &Endpoint) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).remove(endpoint);
    }

    /// Forgets every peer for which `keep` is false.
    pub fn retain(&self, keep: impl Fn(&Endpoint) -> bool) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).retain(|endpoint, _| keep(endpoint));
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}
