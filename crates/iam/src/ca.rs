//! The cluster's certificate authorities: a self-signed root, and an intermediate for each region that signs its leafs.
//!
//! Everybody trusts the root alone, so its key is needed only to make intermediates and can be kept offline. Keys are
//! ECDSA P-256. Authorities may sign certificates and nothing else, and below an intermediate nothing may sign (path
//! length 0). A leaf carries its SPIFFE id as its only URI name, may act as TLS client and server, and starts a little in
//! the past, so that a host whose clock is slow can use it at once. Nothing outlives who signed it.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::id::{IdError, SpiffeId, check_trust_domain};
use crate::request::CertRequest;

/// How far in the past certificates start.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// A common name has at most 64 characters (RFC 5280, appendix A.1, ub-common-name).
const MAX_COMMON_NAME: usize = 64;
/// Certificates of an authority's file.
const MAX_CHAIN: usize = 4;

/// Why the authority can't be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("making the {what} failed: {reason}")]
    Crypto { what: &'static str, reason: String },
    #[error("the authority's {what} can't be read: {reason}")]
    Unreadable { what: &'static str, reason: String },
    #[error("the authority's key does not belong to its certificate")]
    KeyMismatch,
    #[error("the certificate may not sign others: it is not an authority's")]
    NotAnAuthority,
    #[error("this authority may sign leafs alone: an intermediate is signed by the root")]
    NotARoot,
    #[error("an authority's file holds its certificate and then those above it, up to the root: {0}")]
    Chain(&'static str),
    #[error("the authority of `{authority}` does not issue for `{id}`")]
    OtherTrustDomain { authority: String, id: SpiffeId },
    #[error("`{0}` is not a DNS name")]
    DnsName(String),
    #[error("the authority's own certificate has expired: it must be replaced before it can issue")]
    Expired,
    #[error(transparent)]
    Id(#[from] IdError),
}

fn crypto(what: &'static str) -> impl FnOnce(rcgen::Error) -> CaError {
    move |e| CaError::Crypto { what, reason: e.to_string() }
}

fn unreadable(what: &'static str, reason: impl fmt::Display) -> CaError {
    CaError::Unreadable { what, reason: reason.to_string() }
}

/// A root or an intermediate, and the key to it.
pub struct CertificateAuthority {
    trust_domain: String,
    /// From the authority itself up to the root.
    chain: Vec<CertificateDer<'static>>,
    /// Of the root.
    root_pem: String,
    /// When the first of the chain ends.
    not_after: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// An authority as text, to be kept. Whoever holds `key` is the cluster.
#[derive(Clone)]
pub struct CaPem {
    /// The authority's certificate, and then those above it, up to the root.
    pub cert: String,
    pub key: String,
}

impl fmt::Debug for CaPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaPem").field("cert", &self.cert).finish_non_exhaustive()
    }
}

/// A leaf certificate with its key.
#[derive(Clone)]
pub struct Issued {
    pub id: SpiffeId,
    /// The leaf first, then the intermediate; the root is not part of it, since peers have it already.
    pub cert_chain_pem: String,
    pub key_pem: String,
    pub not_after: SystemTime,
}

/// A leaf certificate for a key that its holder keeps.
#[derive(Debug, Clone)]
pub struct Signed {
    pub id: SpiffeId,
    /// The leaf first, then the intermediate; the root is not part of it.
    pub cert_chain_pem: String,
    pub not_after: SystemTime,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// A new root for `trust_domain`, good from now for `validity`.
    pub fn generate(trust_domain: &str, now: SystemTime, validity: Duration) -> Result<Self, CaError> {
        check_trust_domain(trust_domain)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto("root key"))?;
        let name = format!("CloudNexus root of {trust_domain}");
        let params = authority(trust_domain, &name, 1, now, now + validity)?;
        let cert = params.self_signed(&key).map_err(crypto("root certificate"))?;
        Self::from_pem(&cert.pem(), &key.serialize_pem())
    }

    /// A new intermediate under this root: `name` says whose, such as a region. It ends with the root at the latest.
    pub fn intermediate(&self, name: &str, now: SystemTime, validity: Duration) -> Result<Self, CaError> {
        if !self.may_sign_authorities()? {
            return Err(CaError::NotARoot);
        }
        if now >= self.not_after {
            return Err(CaError::Expired);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto("key"))?;
        let name = format!("CloudNexus {name} of {}", self.trust_domain);
        let mut params = authority(&self.trust_domain, &name, 0, now, (now + validity).min(self.not_after))?;
        params.use_authority_key_identifier_extension = true;
        let cert = params.signed_by(&key, &self.issuer).map_err(crypto("certificate"))?;
        Self::from_pem(&format!("{}{}", cert.pem(), self.to_pem().cert), &key.serialize_pem())
    }

    /// Reads an authority back. The certificate must be an authority's, name its trust domain and fit the key; one that is
    /// not a root's is followed by those above it.
    pub fn from_pem(certs: &str, key: &str) -> Result<Self, CaError> {
        let chain = CertificateDer::pem_slice_iter(certs.as_bytes()).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|e| unreadable("certificate", e))?;
        if chain.len() > MAX_CHAIN {
            return Err(CaError::Chain("there are too many"));
        }
        let (parsed, root) = read_chain(&chain)?;
        let trust_domain = uri_names(&parsed)
            .iter()
            .find_map(|u| u.strip_prefix("spiffe://").map(str::to_owned))
            .ok_or_else(|| unreadable("certificate", "it names no trust domain"))?;
        check_trust_domain(&trust_domain)?;
        let key = KeyPair::from_pem(key).map_err(|e| unreadable("key", e))?;
        if parsed.public_key().raw != key.subject_public_key_info().as_slice() {
            return Err(CaError::KeyMismatch);
        }
        let not_after = chain.iter().filter_map(not_after).min().ok_or(CaError::NotAnAuthority)?;
        let issuer = Issuer::from_ca_cert_der(&chain[0], key).map_err(|e| unreadable("certificate", e))?;
        let root_pem = pem_of(root);
        Ok(Self { trust_domain, chain, root_pem, not_after, issuer })
    }

    pub fn to_pem(&self) -> CaPem {
        CaPem { cert: self.chain.iter().map(pem_of).collect(), key: self.issuer.key().serialize_pem() }
    }

    /// The root, for everyone's [`crate::tls::Roots`].
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Whether this is the root itself.
    pub fn is_root(&self) -> bool {
        self.chain.len() == 1
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    fn may_sign_authorities(&self) -> Result<bool, CaError> {
        let (_, parsed) = X509Certificate::from_der(&self.chain[0]).map_err(|e| unreadable("certificate", e))?;
        let constraints = parsed.basic_constraints().map_err(|e| unreadable("certificate", e))?;
        Ok(constraints.is_some_and(|c| c.value.ca && c.value.path_len_constraint.is_none_or(|l| l > 0)))
    }

    /// A leaf with those above it that peers don't have.
    fn with_chain(&self, leaf: &str) -> String {
        let below_root = &self.chain[..self.chain.len() - 1];
        below_root.iter().fold(leaf.to_owned(), |pem, above| pem + &pem_of(above))
    }

    /// A new key and a certificate for `id`. `dns_names` and `ip_addrs` are for clients that check host names, such as
    /// users' tools; peers inside the cluster check the id. The validity is cut at the authority's own end.
    pub fn issue(
        &self,
        id: &SpiffeId,
        dns_names: &[String],
        ip_addrs: &[IpAddr],
        now: SystemTime,
        validity: Duration,
    ) -> Result<Issued, CaError> {
        let (params, not_after) = self.leaf(id, dns_names, ip_addrs, now, validity)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto("key"))?;
        let cert = params.signed_by(&key, &self.issuer).map_err(crypto("certificate"))?;
        Ok(Issued {
            id: id.clone(),
            cert_chain_pem: self.with_chain(&cert.pem()),
            key_pem: key.serialize_pem(),
            not_after,
        })
    }

    /// A certificate for `id` and the key of a request. Only the key is taken from the request: who asks for what is
    /// the caller's to check, by [`CertRequest::ids`].
    pub fn sign(
        &self,
        request: &CertRequest,
        id: &SpiffeId,
        dns_names: &[String],
        ip_addrs: &[IpAddr],
        now: SystemTime,
        validity: Duration,
    ) -> Result<Signed, CaError> {
        let (params, not_after) = self.leaf(id, dns_names, ip_addrs, now, validity)?;
        let cert = params.signed_by(request.public_key(), &self.issuer).map_err(crypto("certificate"))?;
        Ok(Signed { id: id.clone(), cert_chain_pem: self.with_chain(&cert.pem()), not_after })
    }

    fn leaf(
        &self,
        id: &SpiffeId,
        dns_names: &[String],
        ip_addrs: &[IpAddr],
        now: SystemTime,
        validity: Duration,
    ) -> Result<(CertificateParams, SystemTime), CaError> {
        if id.trust_domain() != self.trust_domain {
            return Err(CaError::OtherTrustDomain { authority: self.trust_domain.clone(), id: id.clone() });
        }
        if now >= self.not_after {
            return Err(CaError::Expired);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = named(id.name());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names.push(uri(id.as_str())?);
        for name in dns_names {
            let fits = rustls_pki_types::DnsName::try_from(name.strip_prefix("*.").unwrap_or(name)).is_ok();
            let name = Ia5String::try_from(name.as_str()).ok().filter(|_| fits);
            params.subject_alt_names.push(SanType::DnsName(name.ok_or_else(|| CaError::DnsName(join(dns_names)))?));
        }
        params.subject_alt_names.extend(ip_addrs.iter().copied().map(SanType::IpAddress));
        let not_after = (now + validity).min(self.not_after);
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = not_after.into();
        Ok((params, not_after))
    }
}

fn authority(
    trust_domain: &str,
    name: &str,
    path_len: u8,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    // X509-SVID, section 3: a signing certificate names its trust domain, without a path.
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = not_after.into();
    Ok(params)
}

/// The first of a chain, read, and its last, which must be a root; each must be signed by the next.
fn read_chain<'a>(
    chain: &'a [CertificateDer<'static>],
) -> Result<(X509Certificate<'a>, &'a CertificateDer<'static>), CaError> {
    let mut parsed = Vec::new();
    for der in chain {
        let (_, cert) = X509Certificate::from_der(der).map_err(|e| unreadable("certificate", e))?;
        if !cert.is_ca() {
            return Err(CaError::NotAnAuthority);
        }
        parsed.push(cert);
    }
    let root = chain.last().ok_or_else(|| unreadable("certificate", "there is none"))?;
    for (i, cert) in parsed.iter().enumerate() {
        let above = parsed.get(i + 1).unwrap_or(cert);
        if cert.verify_signature(Some(above.public_key())).is_err() {
            return Err(CaError::Chain("one is not signed by the next, or the last is no root"));
        }
    }
    Ok((parsed.swap_remove(0), root))
}

fn not_after(der: &CertificateDer<'static>) -> Option<SystemTime> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    Some(moment(cert.validity().not_after.timestamp()))
}

fn pem_of(der: &CertificateDer<'static>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der.as_ref()), config)
}

fn join(names: &[String]) -> String {
    names.join(", ")
}

pub(crate) fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name.chars().take(MAX_COMMON_NAME).collect::<String>());
    name
}

pub(crate) fn uri(text: &str) -> Result<SanType, CaError> {
    Ok(SanType::URI(Ia5String::try_from(text).map_err(crypto("name"))?))
}

/// Every URI among a certificate's names.
pub(crate) fn uri_names(cert: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = cert.subject_alternative_name() else { return Vec::new() };
    let uris = names.value.general_names.iter().filter_map(|n| match n {
        GeneralName::URI(u) => Some((*u).to_owned()),
        _ => None,
    });
    uris.collect()
}

/// Unix seconds; moments before 1970 become 1970.
pub(crate) fn moment(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn now() -> SystemTime {
        moment(1_800_000_000)
    }

    #[test]
    fn an_authority_reads_back_and_signs_the_same() {
        let ca = CertificateAuthority::generate("home", now(), DAY).unwrap();
        let pem = ca.to_pem();
        let again = CertificateAuthority::from_pem(&pem.cert, &pem.key).unwrap();
        assert_eq!((again.trust_domain(), again.not_after()), ("home", now() + DAY));
        assert!(!format!("{ca:?}{pem:?}").contains("PRIVATE"));
        let other = CertificateAuthority::generate("home", now(), DAY).unwrap().to_pem();
        assert!(matches!(CertificateAuthority::from_pem(&pem.cert, &other.key), Err(CaError::KeyMismatch)));
        let id = SpiffeId::agent("home", "h1").unwrap();
        let leaf = ca.issue(&id, &[], &[], now(), DAY).unwrap();
        let leaf_as_ca = CertificateAuthority::from_pem(&leaf.cert_chain_pem, &leaf.key_pem);
        assert!(matches!(leaf_as_ca, Err(CaError::NotAnAuthority)));
    }

    #[test]
    fn an_intermediate_signs_for_its_root_and_for_no_other_authority() {
        let root = CertificateAuthority::generate("home", now(), 10 * DAY).unwrap();
        let west = root.intermediate("west", now(), 20 * DAY).unwrap();
        assert_eq!((west.not_after(), west.is_root(), root.is_root()), (now() + 10 * DAY, false, true));
        assert_eq!(west.root_pem(), root.root_pem());
        assert!(matches!(west.intermediate("east", now(), DAY), Err(CaError::NotARoot)));

        let pem = west.to_pem();
        let again = CertificateAuthority::from_pem(&pem.cert, &pem.key).unwrap();
        assert_eq!(again.to_pem().cert, pem.cert);
        let id = SpiffeId::agent("home", "h1").unwrap();
        let leaf = again.issue(&id, &[], &[], now(), DAY).unwrap();
        assert_eq!(leaf.cert_chain_pem.matches("BEGIN").count(), 2, "the leaf and the intermediate");

        // Without the root, under another root or in another order it is no chain.
        let (first, _) = pem.cert.split_at(pem.cert[1..].find("-----BEGIN").unwrap() + 1);
        assert!(matches!(CertificateAuthority::from_pem(first, &pem.key), Err(CaError::Chain(_))));
        let other = CertificateAuthority::generate("home", now(), DAY).unwrap();
        let mixed = format!("{first}{}", other.root_pem());
        assert!(matches!(CertificateAuthority::from_pem(&mixed, &pem.key), Err(CaError::Chain(_))));
        let turned = format!("{}{first}", root.root_pem());
        assert!(matches!(CertificateAuthority::from_pem(&turned, &root.to_pem().key), Err(CaError::Chain(_))));
    }

    #[test]
    fn a_leaf_says_what_it_may_do() {
        let ca = CertificateAuthority::generate("home", now(), DAY).unwrap();
        let id = SpiffeId::server("home", "s1").unwrap();
        let ip = "10.0.0.1".parse().unwrap();
        let leaf = ca.issue(&id, &["s1.home.test".into()], &[ip], now(), 30 * DAY).unwrap();
        assert_eq!(leaf.not_after, now() + DAY, "a leaf does not outlive the root");
        let der = CertificateDer::from_pem_slice(leaf.cert_chain_pem.as_bytes()).unwrap();
        let (_, cert) = X509Certificate::from_der(&der).unwrap();
        assert!(!cert.is_ca());
        assert_eq!(uri_names(&cert), ["spiffe://home/server/s1"]);
        let usage = cert.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth && !usage.any);
        assert_eq!(moment(cert.validity().not_before.timestamp()), now() - CLOCK_SKEW);
    }

    #[test]
    fn what_should_not_be_issued_is_not() {
        let ca = CertificateAuthority::generate("home", now(), DAY).unwrap();
        let id = SpiffeId::agent("home", "h1").unwrap();
        let elsewhere = SpiffeId::agent("away", "h1").unwrap();
        let refused = ca.issue(&elsewhere, &[], &[], now(), DAY);
        assert!(matches!(refused, Err(CaError::OtherTrustDomain { .. })));
        assert!(matches!(ca.issue(&id, &["a b".into()], &[], now(), DAY), Err(CaError::DnsName(_))));
        assert!(matches!(ca.issue(&id, &[], &[], now() + DAY, DAY), Err(CaError::Expired)));
        assert!(CertificateAuthority::generate("Not A Domain", now(), DAY).is_err());
    }
}
