//! Asking for a certificate: a key that never leaves its holder, and the signing request (PKCS #10, RFC 2986) for it.
//!
//! A request proves that its sender holds the key, and names the id that it wants as its only URI name. Nothing else in
//! it is believed: the authority writes usages, names and dates itself.

use rcgen::{
    CertificateParams, CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use ring::digest;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::ca::{named, uri};
use crate::id::SpiffeId;

/// A request is small; more is not one.
const MAX_REQUEST: usize = 16 * 1024;

/// Why a key or a request can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("making the key failed: {0}")]
    Generate(String),
    #[error("the key can't be read: {0}")]
    Key(String),
    #[error("the certificate request can't be made: {0}")]
    Make(String),
    #[error("the certificate request has more than {MAX_REQUEST} bytes")]
    TooLong,
    #[error("the certificate request can't be read, or its signature is not by its own key: {0}")]
    Unreadable(String),
    #[error("the certificate request names no SPIFFE id, or something that is none: {0}")]
    Names(String),
    #[error("the authority's certificate can't be read: {0}")]
    Certificate(String),
}

/// A key for which a certificate is asked. Its text is secret.
pub struct RequestKey(KeyPair);

impl std::fmt::Debug for RequestKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RequestKey(…)")
    }
}

impl RequestKey {
    pub fn generate() -> Result<Self, RequestError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| RequestError::Generate(e.to_string()))?;
        Ok(Self(key))
    }

    pub fn from_pem(key: &str) -> Result<Self, RequestError> {
        KeyPair::from_pem(key).map(Self).map_err(|e| RequestError::Key(e.to_string()))
    }

    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// A request for certificates with these ids, in PEM.
    pub fn request(&self, ids: &[SpiffeId]) -> Result<String, RequestError> {
        let failed = |e: &dyn std::fmt::Display| RequestError::Make(e.to_string());
        let mut params = CertificateParams::default();
        params.distinguished_name = named(ids.first().map_or("", |id| id.name()));
        for id in ids {
            params.subject_alt_names.push(uri(id.as_str()).map_err(|e| failed(&e))?);
        }
        let request = params.serialize_request(&self.0).map_err(|e| failed(&e))?;
        request.pem().map_err(|e| failed(&e))
    }
}

/// A request that was read and whose signature is its own key's.
pub struct CertRequest {
    inner: CertificateSigningRequestParams,
    ids: Vec<SpiffeId>,
}

impl std::fmt::Debug for CertRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CertRequest({:?})", self.ids)
    }
}

impl CertRequest {
    pub fn from_pem(text: &str) -> Result<Self, RequestError> {
        if text.len() > MAX_REQUEST {
            return Err(RequestError::TooLong);
        }
        let inner =
            CertificateSigningRequestParams::from_pem(text).map_err(|e| RequestError::Unreadable(e.to_string()))?;
        let mut ids = Vec::new();
        for name in &inner.params.subject_alt_names {
            let SanType::URI(text) = name else {
                return Err(RequestError::Names("only URI names may stand in it".to_owned()));
            };
            ids.push(text.as_str().parse().map_err(|e: crate::IdError| RequestError::Names(e.to_string()))?);
        }
        if ids.is_empty() {
            return Err(RequestError::Names("there is none".to_owned()));
        }
        Ok(Self { inner, ids })
    }

    /// The ids that it asks for.
    pub fn ids(&self) -> &[SpiffeId] {
        &self.ids
    }

    /// The SHA-256 of its public key, in hexadecimal: the same for every request by the same key.
    pub fn key_hash(&self) -> String {
        hex::encode(digest::digest(&digest::SHA256, self.inner.public_key.der_bytes()))
    }

    pub(crate) fn public_key(&self) -> &impl PublicKeyData {
        &self.inner.public_key
    }
}

/// What identifies an authority in a few words: `sha256:` and the SHA-256 of its certificate's DER, in hexadecimal.
pub fn pin_of(cert_pem: &str) -> Result<String, RequestError> {
    let der =
        CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(|e| RequestError::Certificate(e.to_string()))?;
    Ok(format!("sha256:{}", hex::encode(digest::digest(&digest::SHA256, &der))))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::{CertificateAuthority, Identity};

    const DAY: Duration = Duration::from_secs(86_400);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn a_request_becomes_a_certificate_for_the_key_that_stayed_at_home() {
        let ca = CertificateAuthority::generate("home", now(), 30 * DAY).unwrap();
        let id = SpiffeId::server("home", "s4").unwrap();
        let key = RequestKey::generate().unwrap();
        let request = CertRequest::from_pem(&key.request(std::slice::from_ref(&id)).unwrap()).unwrap();
        assert_eq!(request.ids(), std::slice::from_ref(&id));
        let signed = ca.sign(&request, &id, &[], &[], now(), DAY).unwrap();
        let identity = Identity::from_pem(&signed.cert_chain_pem, &key.to_pem()).unwrap();
        assert_eq!((identity.id(), identity.not_after()), (id.clone(), now() + DAY));

        let again = RequestKey::from_pem(&key.to_pem()).unwrap();
        let renewed = CertRequest::from_pem(&again.request(&[id]).unwrap()).unwrap();
        assert_eq!(renewed.key_hash(), request.key_hash(), "one key has one hash");
        assert!(!format!("{key:?}").contains("PRIVATE"));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        assert!(matches!(CertRequest::from_pem("garbage"), Err(RequestError::Unreadable(_))));
        assert!(matches!(CertRequest::from_pem(&"x".repeat(20_000)), Err(RequestError::TooLong)));
        let key = RequestKey::generate().unwrap();
        let nameless = key.request(&[]).unwrap();
        assert!(matches!(CertRequest::from_pem(&nameless), Err(RequestError::Names(_))));
        let good = key.request(&[SpiffeId::server("home", "s4").unwrap()]).unwrap();
        // One changed character in the middle: the signature does not fit any more, or nothing can be read.
        let middle = good.len() / 2;
        let other = if good.as_bytes()[middle] == b'A' { "B" } else { "A" };
        let mut bad = good.clone();
        bad.replace_range(middle..=middle, other);
        assert!(CertRequest::from_pem(&bad).is_err());
    }

    #[test]
    fn an_authority_has_one_pin() {
        let ca = CertificateAuthority::generate("home", now(), DAY).unwrap();
        let pin = pin_of(ca.root_pem()).unwrap();
        assert_eq!(pin, pin_of(&format!("\n{}", ca.root_pem())).unwrap());
        assert!(pin.starts_with("sha256:") && pin.len() == 71);
        assert!(pin_of("nothing").is_err());
    }
}
