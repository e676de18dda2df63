//! Mutual TLS between members of the cluster: rustls configurations that check who a peer *is*.
//!
//! A peer is accepted when its chain ends in the cluster's root and its SPIFFE id passes a [`Policy`]; host names and
//! addresses say nothing, so a host may move. Both sides present certificates, TLS 1.3 only, and no session is
//! resumed: every connection shows and checks a certificate anew, so a role that was taken away ends with the
//! connections that are open.
//!
//! A data plane must outlive its control plane, so a peer whose certificate ran out while the authority was away can
//! be tolerated for a while ([`ExpiryPolicy::Tolerate`]). Everything else about such a certificate is still checked.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::ca::{Issued, moment, uri_names};
use crate::id::{Role, SpiffeId};

/// Why a configuration can't be built.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the {what} can't be read: {reason}")]
    Unreadable { what: &'static str, reason: String },
    #[error("there is no root certificate to trust")]
    NoRoots,
    #[error("the certificate names no single SPIFFE id")]
    NoId,
    #[error("TLS can't be set up: {0}")]
    Rustls(#[from] rustls::Error),
}

fn unreadable(what: &'static str, reason: impl fmt::Display) -> TlsError {
    TlsError::Unreadable { what, reason: reason.to_string() }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What rustls asks for the time of day when it checks a certificate.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    pub fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// From a source of milliseconds since 1970, such as the environment's clock.
    pub fn millis(now: impl Fn() -> i64 + Send + Sync + 'static) -> Self {
        Self::new(move || crate::at_millis(now()))
    }

    /// A clock that stands still.
    pub fn fixed(now: SystemTime) -> Self {
        Self::new(move || now)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        (self.0)().duration_since(SystemTime::UNIX_EPOCH).ok().map(UnixTime::since_unix_epoch)
    }
}

/// A certificate and key to present. Clones share it, so [`Identity::replace`] renews every configuration built from
/// it; connections that are open keep what they began with.
#[derive(Clone)]
pub struct Identity(Arc<RwLock<Arc<CertifiedKey>>>);

impl Identity {
    pub fn from_pem(cert_chain: &str, key: &str) -> Result<Self, TlsError> {
        let chain = CertificateDer::pem_slice_iter(cert_chain.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| unreadable("certificate chain", e))?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| unreadable("key", e))?;
        // Also refuses a key that does not fit the certificate.
        let certified = CertifiedKey::from_der(chain, key, &provider())?;
        if peer_id(&certified.cert).is_none() {
            return Err(TlsError::NoId);
        }
        Ok(Self(Arc::new(RwLock::new(Arc::new(certified)))))
    }

    pub fn from_issued(issued: &Issued) -> Result<Self, TlsError> {
        Self::from_pem(&issued.cert_chain_pem, &issued.key_pem)
    }

    /// Takes over the certificate and key that `newer` has now.
    pub fn replace(&self, newer: &Identity) {
        let newer = newer.current();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = newer;
    }

    pub fn id(&self) -> SpiffeId {
        peer_id(&self.current().cert).expect("checked when the identity was made")
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> SystemTime {
        let current = self.current();
        not_after(&current.cert[0]).expect("read when the identity was made")
    }

    /// From when the certificate is good.
    pub fn not_before(&self) -> SystemTime {
        let current = self.current();
        let parsed = X509Certificate::from_der(&current.cert[0]).map(|(_, c)| c.validity().not_before.timestamp());
        moment(parsed.expect("read when the identity was made"))
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.id())
    }
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The roots that are trusted: more than one while the authority is being replaced.
#[derive(Debug, Clone)]
pub struct Roots(Arc<RootCertStore>);

impl Roots {
    /// One or more certificates, one after the other.
    pub fn from_pem(pem: &str) -> Result<Self, TlsError> {
        let mut store = RootCertStore::empty();
        for cert in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            store.add(cert.map_err(|e| unreadable("root certificate", e))?)?;
        }
        if store.is_empty() {
            return Err(TlsError::NoRoots);
        }
        Ok(Self(Arc::new(store)))
    }
}

/// What to do with a peer whose certificate has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpiryPolicy {
    Strict,
    /// Accept it for this long after its end.
    Tolerate {
        grace: Duration,
    },
}

type Allow = dyn Fn(&SpiffeId) -> bool + Send + Sync;

/// Which peers are let in. Begins with nobody: a role or a predicate must be named.
#[derive(Clone)]
pub struct Policy {
    trust_domain: String,
    allow: Arc<Allow>,
    expiry: ExpiryPolicy,
}

impl Policy {
    /// Members of `trust_domain` with one of `roles`.
    pub fn roles(trust_domain: impl Into<String>, roles: &[Role]) -> Self {
        let roles = roles.to_vec();
        Self::matching(trust_domain, move |id| id.role().is_some_and(|role| roles.contains(&role)))
    }

    /// Members of `trust_domain` for whom `allow` is true.
    pub fn matching(
        trust_domain: impl Into<String>,
        allow: impl Fn(&SpiffeId) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { trust_domain: trust_domain.into(), allow: Arc::new(allow), expiry: ExpiryPolicy::Strict }
    }

    pub fn expiry(mut self, expiry: ExpiryPolicy) -> Self {
        self.expiry = expiry;
        self
    }

    /// Whether `id` is let in, expiry aside.
    pub fn allows(&self, id: &SpiffeId) -> bool {
        id.trust_domain() == self.trust_domain && (self.allow)(id)
    }

    fn check_id(&self, cert: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        match peer_id(std::slice::from_ref(cert)) {
            Some(id) if self.allows(&id) => Ok(()),
            // The alert says only that the certificate was not accepted: our policy is no business of a stranger's.
            Some(_) | None => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    /// Runs `check` now and, if all that fails is the date and the policy tolerates it, again at the leaf's last
    /// valid moment.
    fn check_at(
        &self,
        leaf: &CertificateDer<'_>,
        now: UnixTime,
        check: impl Fn(UnixTime) -> Result<(), rustls::Error>,
    ) -> Result<(), rustls::Error> {
        use CertificateError::{Expired, ExpiredContext};
        let failed = match check(now) {
            Err(e @ rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. })) => e,
            other => return other,
        };
        let ExpiryPolicy::Tolerate { grace } = self.expiry else { return Err(failed) };
        let end = not_after(leaf).and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        match end {
            Some(end) if now.as_secs() <= end.saturating_add(grace).as_secs() => {
                check(UnixTime::since_unix_epoch(end))?;
                let peer = peer_id(std::slice::from_ref(leaf));
                tracing::debug!(peer = ?peer, "accepted a certificate that has expired, within its grace");
                Ok(())
            }
            _ => Err(failed),
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("trust_domain", &self.trust_domain)
            .field("expiry", &self.expiry)
            .finish_non_exhaustive()
    }
}

/// The id in a peer's chain: its leaf must carry exactly one URI name, and that a SPIFFE id (X509-SVID, section 2).
/// Says nothing about whether the chain is genuine: use it on chains that a handshake has verified.
pub fn peer_id(chain: &[CertificateDer<'_>]) -> Option<SpiffeId> {
    let (_, cert) = X509Certificate::from_der(chain.first()?).ok()?;
    match uri_names(&cert).as_slice() {
        [one] => one.parse().ok(),
        _ => None,
    }
}

fn not_after(cert: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, cert) = X509Certificate::from_der(cert).ok()?;
    Some(moment(cert.validity().not_after.timestamp()))
}

/// A listener's side: peers must present a certificate of `roots` that passes `policy`.
pub fn server_config(
    identity: &Identity,
    roots: &Roots,
    policy: Policy,
    alpn: &[&[u8]],
    clock: Clock,
) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = WebPkiClientVerifier::builder_with_provider(roots.0.clone(), provider())
        .build()
        .map_err(|e| unreadable("root certificate", e))?;
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(ClientVerifier { chain, policy }))
        .with_cert_resolver(Arc::new(identity.clone()));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(Arc::new(config))
}

/// A caller's side: the listener must present a certificate of `roots` that passes `policy`, whatever its host name.
pub fn client_config(
    identity: &Identity,
    roots: &Roots,
    policy: Policy,
    alpn: &[&[u8]],
    clock: Clock,
) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let verifier = ServerVerifier { roots: roots.0.clone(), algorithms, policy };
    let mut config = ClientConfig::builder_with_details(provider, Arc::new(clock))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(identity.clone()));
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(Arc::new(config))
}

/// The northbound listener's side: users bring tokens, not certificates, and check our host name.
pub fn public_server_config(identity: &Identity, alpn: &[&[u8]], clock: Clock) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock))
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(identity.clone()));
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(Arc::new(config))
}

/// A user's side of the northbound face: the listener must have a certificate of `roots` for the host name asked for.
pub fn public_client_config(roots: &Roots, alpn: &[&[u8]], clock: Clock) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(clock))
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_root_certificates(roots.0.clone())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(Arc::new(config))
}

/// Checks the listener, from the caller's side.
#[derive(Debug)]
struct ServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    policy: Policy,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        self.policy.check_at(leaf, now, |at| {
            let algorithms = self.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, at, algorithms)
        })?;
        self.policy.check_id(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Checks the caller, from the listener's side.
#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    policy: Policy,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.policy.check_at(leaf, now, |at| self.chain.verify_client_cert(leaf, intermediates, at).map(|_| ()))?;
        self.policy.check_id(leaf)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
