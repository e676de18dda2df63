//! What is known of other identity providers: their discovery documents and keys, fetched when they are needed.
//!
//! Both are kept for an hour. A token by a key that is not known has them fetched anew, at most every half minute, so that a
//! provider may change its keys at any time and nobody can have it asked for each forged token. One question a provider is
//! asked at a time, and a provider that fails is left alone for some seconds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nexus_env::Env;
use nexus_iam::federation::{
    Discovery, FederationError, IssuerUrl, MAX_DISCOVERY, MAX_PROVIDER_JWKS, Plaintext, ProviderKeys,
};
use nexus_model::{ApiError, Code};
use tokio::sync::{Mutex as AsyncMutex, Semaphore};

use crate::doors::{ProviderDoor, ProviderRequest};

/// How long what was fetched is believed.
const LIFE: Duration = Duration::from_secs(3600);
/// How soon it is fetched anew for a key that is not known.
const SOONEST: Duration = Duration::from_secs(30);
/// How long a provider that failed is left alone.
const REST: Duration = Duration::from_secs(5);
/// Providers that are remembered; with more, all are forgotten and fetched again.
const REMEMBERED: usize = 1_000;
/// Questions at once, to all providers and to one.
const ASKING: usize = 64;
const ASKING_ONE: usize = 4;

/// A provider as it described itself.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub discovery: Discovery,
    pub keys: ProviderKeys,
    /// By the monotonic clock.
    at: Duration,
}

#[derive(Default)]
struct State {
    fetched: Option<Arc<Fetched>>,
    failed: Option<(Duration, ApiError)>,
}

struct Entry {
    state: AsyncMutex<State>,
    turns: Semaphore,
}

pub(crate) struct Providers {
    door: Arc<dyn ProviderDoor>,
    entries: Mutex<HashMap<String, Arc<Entry>>>,
    turns: Semaphore,
}

fn unavailable(issuer: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::new(Code::Unavailable, format!("the identity provider {issuer} gives no answer that can be used: {why}"))
}

impl Providers {
    pub fn new(door: Arc<dyn ProviderDoor>) -> Self {
        Self { door, entries: Mutex::default(), turns: Semaphore::new(ASKING) }
    }

    fn entry(&self, issuer: &str) -> Arc<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= REMEMBERED && !entries.contains_key(issuer) {
            entries.clear();
        }
        let new = || Arc::new(Entry { state: AsyncMutex::default(), turns: Semaphore::new(ASKING_ONE) });
        Arc::clone(entries.entry(issuer.to_owned()).or_insert_with(new))
    }

    /// Asks a provider something, if not too much is asked already.
    pub async fn ask(&self, issuer: &str, request: ProviderRequest) -> Result<Bytes, ApiError> {
        let full = |_| ApiError::new(Code::Overloaded, "too much is asked of identity providers at once: try again");
        let entry = self.entry(issuer);
        let _one = entry.turns.try_acquire().map_err(full)?;
        let _any = self.turns.try_acquire().map_err(full)?;
        self.door.ask(request).await.map_err(|why| unavailable(issuer, why))
    }

    /// The provider, fetched if it has to be.
    pub async fn of(&self, issuer: &str, env: &Env) -> Result<Arc<Fetched>, ApiError> {
        self.fetched(issuer, env, LIFE).await
    }

    /// Checks something by the provider's keys; once more by its newest ones if it names one that is not known.
    pub async fn verify<T>(
        &self,
        issuer: &str,
        env: &Env,
        check: impl Fn(&ProviderKeys) -> Result<T, FederationError>,
    ) -> Result<Result<T, FederationError>, ApiError> {
        match check(&self.of(issuer, env).await?.keys) {
            Err(FederationError::UnknownKey) => Ok(check(&self.fetched(issuer, env, SOONEST).await?.keys)),
            checked => Ok(checked),
        }
    }

    /// What was fetched at most `age` ago, or is now.
    async fn fetched(&self, issuer: &str, env: &Env, age: Duration) -> Result<Arc<Fetched>, ApiError> {
        let entry = self.entry(issuer);
        let mut state = entry.state.lock().await;
        let young = |at: Duration, age| env.monotonic().saturating_sub(at) < age;
        if let Some(fetched) = state.fetched.as_ref().filter(|f| young(f.at, age)) {
            return Ok(Arc::clone(fetched));
        }
        let fetched = match &state.failed {
            Some((at, error)) if young(*at, REST) => Err(error.clone()),
            _ => self.fetch(issuer, env).await,
        };
        match fetched {
            Ok(fetched) => {
                *state = State { fetched: Some(Arc::new(fetched)), failed: None };
                Ok(Arc::clone(state.fetched.as_ref().expect("set above")))
            }
            Err(error) => {
                let rests = state.failed.as_ref().is_some_and(|(at, _)| young(*at, REST));
                if !rests && error.code == Code::Unavailable {
                    state.failed = Some((env.monotonic(), error.clone()));
                }
                // Who only hoped for newer keys goes on with those that are still believed.
                state.fetched.clone().filter(|f| young(f.at, LIFE)).ok_or(error)
            }
        }
    }

    async fn fetch(&self, issuer: &str, env: &Env) -> Result<Fetched, ApiError> {
        let wrong = |e: FederationError| unavailable(issuer, e);
        let url = IssuerUrl::parse(issuer, Plaintext::Loopback).map_err(wrong)?;
        let get = |url: String, max| ProviderRequest { url, form: None, authorization: None, max };
        let document = self.ask(issuer, get(url.discovery_url(), MAX_DISCOVERY)).await?;
        let discovery = Discovery::parse(&document, &url).map_err(wrong)?;
        let keys = self.ask(issuer, get(discovery.jwks_uri.clone(), MAX_PROVIDER_JWKS)).await?;
        let keys = ProviderKeys::parse(&keys).map_err(wrong)?;
        Ok(Fetched { discovery, keys, at: env.monotonic() })
    }
}
