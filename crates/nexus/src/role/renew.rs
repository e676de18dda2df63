//! Keeps a role's certificates good: asks for new ones when half of their life is over.
//!
//! The key stays, only the certificate changes, so one atomic write of one file is all that happens on disk. Whatever
//! fails is tried again later: a data plane tolerates certificates that have ended for a while, and nothing here ever ends
//! a role. How long a certificate is still good is a metric of every role, `nexus_certificate_end_seconds`; a server's
//! status shows it too.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use nexus_env::{Disk, Endpoint, Env, on_disk, write_atomic};
use nexus_iam::ca::CLOCK_SKEW;
use nexus_iam::{Identity, RequestKey, SpiffeId, at_millis};
use nexus_model::plan::{GatewayNote, RenewRequest, Renewed, method};
use nexus_model::{Name, Timestamp};
use nexus_wire::Pool;
use tokio_util::sync::CancellationToken;

use super::server::certificates::end_of;
use crate::config::TlsFiles;

/// Clocks jump, so the time left is looked at again this often.
const LOOK: Duration = Duration::from_secs(60);
/// Between tries when nobody renews.
const REST_FIRST: Duration = Duration::from_secs(30);
const REST_LONGEST: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a gateway says when its certificate ends, for servers that came since.
const TELL: Duration = Duration::from_secs(30);
const TELL_LOOK: Duration = Duration::from_secs(5);

/// Signs certificates anew.
#[async_trait]
pub trait Signer: Send + Sync {
    async fn renew(&self, csr: String) -> Result<Renewed, String>;
}

/// Any server, by wire.
pub struct WireSigner {
    pub pool: Pool,
    /// Where the servers are now.
    pub servers: Arc<dyn Fn() -> Vec<Endpoint> + Send + Sync>,
}

#[async_trait]
impl Signer for WireSigner {
    async fn renew(&self, csr: String) -> Result<Renewed, String> {
        let request = RenewRequest { csr };
        let mut why = "no server is known".to_owned();
        for endpoint in (self.servers)() {
            match self.pool.get(&endpoint).call::<_, Renewed>(method::RENEW, &request, DEADLINE).await {
                Ok(renewed) => return Ok(renewed),
                Err(error) => why = format!("{endpoint}: {error}"),
            }
        }
        Err(why)
    }
}

/// One certificate of a role.
#[derive(Clone)]
pub struct Kept {
    pub files: TlsFiles,
    pub identity: Identity,
}

/// The certificates of a role, and when each ends. Cheap to clone.
#[derive(Clone)]
pub struct Certificates {
    kept: Arc<Vec<Kept>>,
    failing: Arc<AtomicBool>,
}

/// When a certificate should be renewed: at half of its life, which began when it was signed and not when it says.
fn due(not_before: SystemTime, not_after: SystemTime) -> SystemTime {
    let signed = not_before + CLOCK_SKEW;
    let life = not_after.duration_since(signed).unwrap_or_default();
    not_after - life / 2
}

impl Certificates {
    pub fn new(kept: Vec<Kept>) -> Self {
        Self { kept: Arc::new(kept), failing: Arc::default() }
    }

    /// In Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        let name = "nexus_certificate_end_seconds";
        let help = "When a certificate of this process ends, in seconds since 1970.";
        let mut out = format!("# HELP {name} {help}\n# TYPE {name} gauge\n");
        for (id, end) in self.ends() {
            let _ = writeln!(out, "{name}{{id=\"{id}\"}} {end}");
        }
        let name = "nexus_certificate_renewal_failing";
        let failing = u8::from(self.failing.load(Ordering::Relaxed));
        let help = "1 while a certificate is due and nobody renews it.";
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {failing}");
        out
    }

    /// When the first of them ends.
    pub fn first_end(&self) -> Option<Timestamp> {
        self.kept.iter().map(|k| end_of(&k.identity)).min()
    }

    /// Tells every server of the region when a gateway's certificate ends: at once, now and then, and when that changed,
    /// until `stop`. A server that can't be reached is told the next time.
    pub async fn tell(&self, gateway: Name, env: Env, signer: Arc<WireSigner>, stop: CancellationToken) {
        let mut told: Option<(Timestamp, Duration)> = None;
        loop {
            let (now, end) = (env.monotonic(), self.first_end());
            let due = |(last, at): (Timestamp, Duration)| Some(last) != end || now.saturating_sub(at) >= TELL;
            if let Some(end) = end.filter(|_| told.is_none_or(due)) {
                let note = GatewayNote { gateway: gateway.clone(), certificate_ends: end };
                let servers = signer.clone();
                // Where the servers are stands on disk.
                let endpoints = on_disk(&env.disk, move || (servers.servers)()).await.unwrap_or_default();
                let calls = endpoints.iter().map(|at| {
                    let client = signer.pool.get(at);
                    let note = &note;
                    async move { client.call::<_, ()>(method::GATEWAY_NOTE, note, DEADLINE).await.is_ok() }
                });
                let all = futures::future::join_all(calls);
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    answers = all => if !answers.is_empty() && answers.into_iter().all(|heard| heard) {
                        told = Some((end, now));
                    },
                }
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(TELL_LOOK) => {}
            }
        }
    }

    /// Every id with the end of its certificate, in seconds since 1970.
    fn ends(&self) -> Vec<(SpiffeId, u64)> {
        let seconds = |k: &Kept| u64::try_from(end_of(&k.identity).as_millis() / 1000).unwrap_or(0);
        self.kept.iter().map(|k| (k.identity.id(), seconds(k))).collect()
    }

    /// Renews what is due, now and whenever it is, until `stop`.
    pub async fn keep(&self, env: Env, signer: Arc<dyn Signer>, stop: CancellationToken) {
        let mut failures = 0u32;
        loop {
            let mut next = LOOK;
            for kept in self.kept.iter() {
                let left = || {
                    let at = due(kept.identity.not_before(), kept.identity.not_after());
                    at.duration_since(at_millis(env.now_millis())).unwrap_or_default()
                };
                match left() {
                    left if !left.is_zero() => next = next.min(left),
                    _ => match renew(kept, &env.disk, &*signer).await {
                        Ok(()) => {
                            next = next.min(left());
                            tracing::info!(id = %kept.identity.id(), "renewed a certificate");
                            failures = 0;
                            self.failing.store(false, Ordering::Relaxed);
                        }
                        Err(reason) => {
                            if failures == 0 {
                                tracing::warn!(id = %kept.identity.id(), reason, "a certificate can't be renewed yet");
                            }
                            let rest = REST_FIRST.saturating_mul(1 << failures.min(8)).min(REST_LONGEST);
                            // Short lives leave little time; what has ended is no longer in a hurry.
                            let end = kept.identity.not_after().duration_since(at_millis(env.now_millis()));
                            let rest = end.map_or(rest, |end| rest.min(end / 3));
                            next = next.min(rest);
                            failures = failures.saturating_add(1);
                            self.failing.store(true, Ordering::Relaxed);
                        }
                    },
                }
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(next.max(Duration::from_secs(1))) => {}
            }
        }
    }
}

async fn renew(kept: &Kept, disk: &Arc<dyn Disk>, signer: &dyn Signer) -> Result<(), String> {
    let id = kept.identity.id();
    let (on, path) = (disk.clone(), kept.files.key.clone());
    let key =
        on_disk(disk, move || on.read(&path)).await.and_then(|r| r).map_err(|e| format!("reading the key: {e}"))?;
    let key = String::from_utf8(key).map_err(|_| "the key is no text".to_owned())?;
    let request = RequestKey::from_pem(&key).and_then(|k| k.request(std::slice::from_ref(&id)));
    let renewed = signer.renew(request.map_err(|e| e.to_string())?).await?;
    let cert = renewed.certs.get(id.as_str()).ok_or_else(|| format!("the answer holds no certificate of {id}"))?;
    let newer = Identity::from_pem(cert, &key).map_err(|e| format!("the new certificate: {e}"))?;
    if newer.id() != id || newer.not_after() <= kept.identity.not_after() {
        return Err("the new certificate is not better than the old one".to_owned());
    }
    let (on, path, text) = (disk.clone(), kept.files.cert.clone(), cert.clone());
    let written = on_disk(disk, move || write_atomic(&*on, &path, text.as_bytes())).await.and_then(|r| r);
    // What is in memory counts for now; after a restart the old one is renewed again.
    kept.identity.replace(&newer);
    written.map_err(|e| format!("writing the certificate: {e}"))
}

#[cfg(test)]
mod tests {
    use nexus_iam::{CertRequest, CertificateAuthority};

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    struct Fake {
        ca: CertificateAuthority,
        env: Env,
        life: Duration,
    }

    #[async_trait]
    impl Signer for Fake {
        async fn renew(&self, csr: String) -> Result<Renewed, String> {
            let request = CertRequest::from_pem(&csr).unwrap();
            let id = &request.ids()[0];
            let signed = self.ca.sign(&request, id, &[], &[], at_millis(self.env.now_millis()), self.life).unwrap();
            Ok(Renewed { certs: [(id.to_string(), signed.cert_chain_pem)].into() })
        }
    }

    struct Down;

    #[async_trait]
    impl Signer for Down {
        async fn renew(&self, _: String) -> Result<Renewed, String> {
            Err("nobody answers".into())
        }
    }

    fn made(dir: &std::path::Path, life: Duration, age: Duration) -> (Certificates, Fake) {
        let env = Env::real();
        let now = at_millis(env.now_millis());
        let ca = CertificateAuthority::generate("home", now - age, 100 * DAY).unwrap();
        let id = SpiffeId::agent("home", "h1").unwrap();
        let issued = ca.issue(&id, &[], &[], now - age, life).unwrap();
        let files = TlsFiles { ca: dir.join("ca"), cert: dir.join("cert"), key: dir.join("key") };
        std::fs::write(&files.cert, &issued.cert_chain_pem).unwrap();
        std::fs::write(&files.key, &issued.key_pem).unwrap();
        let identity = Identity::from_issued(&issued).unwrap();
        (Certificates::new(vec![Kept { files, identity }]), Fake { ca, env, life: 9 * DAY })
    }

    #[tokio::test]
    async fn a_certificate_is_renewed_in_the_second_half_of_its_life_on_disk_and_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let (certificates, fake) = made(dir.path(), 9 * DAY, 5 * DAY);
        let before = certificates.ends()[0].1;
        let now = at_millis(fake.env.now_millis());
        let stop = CancellationToken::new();
        let (kept, env, signer, end) = (certificates.clone(), fake.env.clone(), Arc::new(fake), stop.clone());
        let task = tokio::spawn(async move { kept.keep(env, signer, end).await });
        let renewed = async {
            while certificates.ends()[0].1 == before {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), renewed).await.unwrap();
        stop.cancel();
        task.await.unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let on_disk = Identity::from_pem(&read("cert"), &read("key")).unwrap();
        assert!(on_disk.not_after() > now + 8 * DAY);
        assert!(certificates.metrics_text().contains("nexus_certificate_end_seconds{id=\"spiffe://home/agent/h1\"}"));
    }

    #[tokio::test]
    async fn what_can_not_be_renewed_is_told_and_nothing_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (certificates, fake) = made(dir.path(), 2 * DAY, 3 * DAY);
        let stop = CancellationToken::new();
        let keeping = certificates.keep(fake.env.clone(), Arc::new(Down), stop.clone());
        let told = async {
            while !certificates.metrics_text().contains("nexus_certificate_renewal_failing 1") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = keeping => panic!("it gave up"),
            told = tokio::time::timeout(Duration::from_secs(60), told) => told.unwrap(),
        }
        assert!(certificates.metrics_text().contains("nexus_certificate_end_seconds"));
    }

    #[test]
    fn a_young_certificate_is_left_alone() {
        let from = at_millis(1_000_000_000_000);
        let signed = from + CLOCK_SKEW;
        assert_eq!(due(from, signed + 9 * DAY), signed + 9 * DAY / 2);
        let short = Duration::from_secs(30);
        assert_eq!(due(from, signed + short), signed + short / 2, "however short it is");
    }
}
