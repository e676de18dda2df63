//! The five methods of the SPIFFE Workload API, for one instance.
//!
//! Who asks is known by the socket that the question came in by, so nothing in a request can make it somebody else's. What
//! a request asks for can only be the instance's own, or refused.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::HeaderMap;
use nexus_env::Env;
use nexus_iam::svid::{self, JwtBundle, SvidError};
use nexus_iam::{SpiffeId, at_millis};
use nexus_model::Uid;
use nexus_model::plan::WorkloadToken;
use tokio::sync::watch;

use super::grpc::{Answers, Reply, Service, Status, code, decoded, encoded};
use super::issuer::{IssueError, Issuer};
use super::proto::{
    JwtBundlesResponse, JwtSvid, JwtSvidRequest, JwtSvidResponse, Nothing, ValidateJwtSvidRequest,
    ValidateJwtSvidResponse, X509BundlesResponse, X509Svid, X509SvidResponse,
};
use super::svid::{Held, Svid};

const SERVICE: &str = "/SpiffeWorkloadAPI/";
/// SPIFFE Workload Endpoint, section 6: a caller says that it knows where it is, which one that was lured here does not.
const HEADER: &str = "workload.spiffe.io";
/// Tokens that are remembered, by audience.
const TOKENS: usize = 64;
/// A token that ends sooner is not given any more.
const LEAST_LEFT: Duration = Duration::from_secs(10);
/// Clocks jump, so what is served is looked at again this often.
const LOOK: Duration = Duration::from_secs(60);

/// How often something may be done: `burst` times at once, and `rate` times a second in the long run.
struct Brake {
    left: f64,
    at: Duration,
    rate: f64,
    burst: f64,
}

impl Brake {
    fn new(rate: f64, burst: f64) -> Self {
        Self { left: burst, at: Duration::ZERO, rate, burst }
    }

    fn allows(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + passed * self.rate).min(self.burst);
        let allowed = self.left >= 1.0;
        if allowed {
            self.left -= 1.0;
        }
        allowed
    }
}

/// What a call may change; the rest is read.
struct Memory {
    tokens: BTreeMap<Vec<String>, Kept>,
    /// Calls of any kind.
    calls: Brake,
    /// Those that a server must answer.
    asked: Brake,
}

#[derive(Clone)]
struct Kept {
    token: String,
    made: SystemTime,
    expires: SystemTime,
}

pub(crate) struct WorkloadApi {
    pub env: Env,
    pub instance: Uid,
    pub id: SpiffeId,
    /// The authorities, in DER, one after the other.
    pub roots: Bytes,
    pub held: watch::Receiver<Held>,
    pub keys: watch::Receiver<Arc<JwtBundle>>,
    pub issuer: Arc<dyn Issuer>,
    /// How long a caller waits for what is not there yet.
    pub patience: Duration,
    memory: Mutex<Memory>,
}

/// What an instance's API is made from.
pub(crate) struct Parts {
    pub env: Env,
    pub instance: Uid,
    pub id: SpiffeId,
    pub roots: Bytes,
    pub held: watch::Receiver<Held>,
    pub keys: watch::Receiver<Arc<JwtBundle>>,
    pub issuer: Arc<dyn Issuer>,
    pub patience: Duration,
}

fn unavailable(why: impl Into<String>) -> Status {
    Status::new(code::UNAVAILABLE, why)
}

fn refused(error: &SvidError) -> Status {
    Status::new(code::INVALID_ARGUMENT, error.to_string())
}

impl WorkloadApi {
    pub fn new(parts: Parts) -> Self {
        let Parts { env, instance, id, roots, held, keys, issuer, patience } = parts;
        let memory = Memory { tokens: BTreeMap::new(), calls: Brake::new(50.0, 200.0), asked: Brake::new(2.0, 20.0) };
        Self { env, instance, id, roots, held, keys, issuer, patience, memory: Mutex::new(memory) }
    }

    fn now(&self) -> SystemTime {
        at_millis(self.env.now_millis())
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trust_domain(&self) -> String {
        format!("spiffe://{}", self.id.trust_domain())
    }

    /// The certificate now and whenever there is a new one.
    fn certificates(&self) -> Answers {
        let roots = self.roots.clone();
        let following = Following {
            env: self.env.clone(),
            held: self.held.clone(),
            sent: None,
            until: self.env.monotonic() + self.patience,
        };
        let answers = stream::unfold(Some(following), |following| async move {
            let mut following = following?;
            let next = following.next().await;
            let more = next.is_ok().then_some(following);
            Some((next, more))
        });
        answers
            .map(move |svid| {
                let svid = svid?;
                let own = X509Svid {
                    spiffe_id: svid.id.to_string(),
                    x509_svid: svid.chain.clone(),
                    x509_svid_key: svid.key.clone(),
                    bundle: roots.clone(),
                };
                Ok(encoded(&X509SvidResponse { svids: vec![own] }))
            })
            .boxed()
    }

    /// The authorities. They don't change while the agent runs, so the stream only stays open.
    fn authorities(&self) -> Answers {
        let bundles = [(self.trust_domain(), self.roots.clone())].into();
        let answer = encoded(&X509BundlesResponse { bundles });
        stream::iter([Ok(answer)]).chain(stream::pending()).boxed()
    }

    /// The keys of tokens now and whenever they change.
    fn token_keys(&self) -> Answers {
        let (trust_domain, keys, patience) = (self.trust_domain(), self.keys.clone(), self.patience);
        let answers =
            stream::unfold(Some((keys, None)), move |state: Option<(_, Option<Arc<JwtBundle>>)>| async move {
                let (mut keys, sent): (watch::Receiver<Arc<JwtBundle>>, _) = state?;
                let newer = keys.wait_for(|k| !k.is_empty() && sent.as_ref() != Some(k));
                // Only the first may be missed: nobody waits in vain for news.
                let limit = if sent.is_none() { patience } else { Duration::MAX };
                let next = match tokio::time::timeout(limit, newer).await {
                    Ok(Ok(keys)) => Ok(keys.clone()),
                    _ => Err(unavailable("this host has heard no keys from any server yet: try again")),
                };
                let more = next.as_ref().ok().map(|sent| (keys, Some(sent.clone())));
                Some((next, more))
            });
        answers
            .map(move |keys| {
                let jwks = Bytes::from(keys?.to_jwks().to_string());
                Ok(encoded(&JwtBundlesResponse { bundles: [(trust_domain.clone(), jwks)].into() }))
            })
            .boxed()
    }

    async fn token(&self, request: JwtSvidRequest) -> Result<Bytes, Status> {
        svid::check_audiences(&request.audience).map_err(|e| refused(&e))?;
        if !request.spiffe_id.is_empty() && request.spiffe_id != self.id.as_str() {
            let why = format!("this workload is {} and gets tokens of no other", self.id);
            return Err(Status::new(code::PERMISSION_DENIED, why));
        }
        let token = self.token_for(request.audience).await?;
        Ok(encoded(&JwtSvidResponse { svids: vec![JwtSvid { spiffe_id: self.id.to_string(), svid: token }] }))
    }

    /// A remembered token until half of its life is over, then a new one; the old one as long as there is no new one.
    async fn token_for(&self, audience: Vec<String>) -> Result<String, Status> {
        let now = self.now();
        let kept = self.memory().tokens.get(&audience).cloned().filter(|k| now + LEAST_LEFT < k.expires);
        if let Some(kept) = &kept {
            let life = kept.expires.duration_since(kept.made).unwrap_or_default();
            if kept.made <= now && now < kept.made + life / 2 {
                return Ok(kept.token.clone());
            }
        }
        if !self.memory().asked.allows(self.env.monotonic()) {
            let why =
                "this workload asks for tokens of too many audiences: ask less often, tokens are good for minutes";
            return kept.map(|k| k.token).ok_or_else(|| Status::new(code::RESOURCE_EXHAUSTED, why));
        }
        match self.issuer.token(self.instance, audience.clone()).await {
            Ok(WorkloadToken { token, expires }) => {
                let expires = at_millis(expires.as_millis());
                let kept = Kept { token: token.clone(), made: now, expires };
                let mut memory = self.memory();
                memory.tokens.retain(|_, k| now < k.expires);
                if memory.tokens.len() >= TOKENS
                    && let Some(first) = memory.tokens.iter().min_by_key(|(_, k)| k.expires).map(|(a, _)| a.clone())
                {
                    memory.tokens.remove(&first);
                }
                memory.tokens.insert(audience, kept);
                Ok(token)
            }
            Err(error) => match (kept, error) {
                (Some(kept), _) => Ok(kept.token),
                (None, error @ IssueError::Refused(_)) => {
                    Err(unavailable(format!("no token was signed; try again in a moment: {error}")))
                }
                (None, error) => Err(unavailable(format!("no token can be signed now: {error}"))),
            },
        }
    }

    fn validate(&self, request: &ValidateJwtSvidRequest) -> Result<Bytes, Status> {
        let audience = std::slice::from_ref(&request.audience);
        svid::check_audiences(audience).map_err(|e| refused(&e))?;
        let keys = self.keys.borrow().clone();
        if keys.is_empty() {
            return Err(unavailable("this host has heard no keys from any server yet: try again"));
        }
        let verified = svid::verify(&request.svid, &keys, self.id.trust_domain(), &request.audience, self.now());
        let (id, claims) = verified.map_err(|e| refused(&e))?;
        Ok(encoded(&ValidateJwtSvidResponse { spiffe_id: id.to_string(), claims: Some(claims.into()) }))
    }
}

#[async_trait]
impl Service for WorkloadApi {
    fn check(&self, path: &str, headers: &HeaderMap) -> Result<(), Status> {
        if headers.get(HEADER).is_none_or(|v| v != "true") {
            let why = format!("the metadata `{HEADER}: true` is missing: use a SPIFFE client, or set it");
            return Err(Status::new(code::INVALID_ARGUMENT, why));
        }
        let known = ["FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"];
        if !path.strip_prefix(SERVICE).is_some_and(|method| known.contains(&method)) {
            let shown: String = path.chars().take(80).collect();
            return Err(Status::new(code::UNIMPLEMENTED, format!("{shown} is no method of the SPIFFE Workload API")));
        }
        if !self.memory().calls.allows(self.env.monotonic()) {
            let why = "this workload calls too often: keep one stream open instead of asking again and again";
            return Err(Status::new(code::RESOURCE_EXHAUSTED, why));
        }
        Ok(())
    }

    async fn call(&self, path: &str, message: Bytes) -> Result<Reply, Status> {
        match path.strip_prefix(SERVICE).unwrap_or_default() {
            "FetchX509SVID" => decoded::<Nothing>(message).map(|_| Reply::Many(self.certificates())),
            "FetchX509Bundles" => decoded::<Nothing>(message).map(|_| Reply::Many(self.authorities())),
            "FetchJWTBundles" => decoded::<Nothing>(message).map(|_| Reply::Many(self.token_keys())),
            "FetchJWTSVID" => self.token(decoded(message)?).await.map(Reply::One),
            "ValidateJWTSVID" => self.validate(&decoded(message)?).map(Reply::One),
            _ => Err(Status::new(code::UNIMPLEMENTED, "no such method")),
        }
    }
}

/// One stream of certificates.
struct Following {
    env: Env,
    held: watch::Receiver<Held>,
    sent: Option<Arc<Svid>>,
    /// Until when the first one is waited for.
    until: Duration,
}

impl Following {
    /// The next certificate. What is served ends with it.
    async fn next(&mut self) -> Result<Arc<Svid>, Status> {
        loop {
            let held = self.held.borrow_and_update().clone();
            let now = at_millis(self.env.now_millis());
            let good = held.svid.and_then(|svid| Some((svid.not_after.duration_since(now).ok()?, svid)));
            let left = match good.filter(|(left, _)| !left.is_zero()) {
                Some((left, svid)) if self.sent.as_ref().is_some_and(|sent| Arc::ptr_eq(sent, &svid)) => left,
                Some((_, svid)) => {
                    self.sent = Some(svid.clone());
                    return Ok(svid);
                }
                None if self.sent.is_some() => Duration::ZERO,
                None => self.until.saturating_sub(self.env.monotonic()),
            };
            if left.is_zero() {
                let what =
                    if self.sent.is_some() { "the certificate has ended" } else { "there is no certificate yet" };
                let why = if held.trouble.is_empty() { String::new() } else { format!(": {}", held.trouble) };
                return Err(unavailable(format!("{what}, and no server signs a new one now{why}")));
            }
            tokio::select! {
                biased;
                changed = self.held.changed() => if changed.is_err() {
                    return Err(unavailable("this instance is ending"));
                },
                () = tokio::time::sleep(left.min(LOOK)) => {}
            }
        }
    }
}
