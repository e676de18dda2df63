//! A provider's public keys (JWK set) and the four algorithms by which its tokens may be signed.
//!
//! A key decides which algorithm it is for, never the token: an RSA key checks no MAC. Symmetric keys and unknown kinds
//! in a set are passed over, since providers publish them beside the good ones.

use ring::signature::{
    self, ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256,
    RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde_json::Value;

use super::FederationError;
use crate::jwt::jws;

/// Bytes of a set; real ones have a few thousand.
pub const MAX_PROVIDER_JWKS: usize = 256 * 1024;
const MAX_KEYS: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Ps256,
    Es256,
    EdDsa,
}

impl Algorithm {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "RS256" => Some(Self::Rs256),
            "PS256" => Some(Self::Ps256),
            "ES256" => Some(Self::Es256),
            "EdDSA" => Some(Self::EdDsa),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point.
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    kid: Option<String>,
    /// The only algorithm that the key is for, if its publisher says so.
    only: Option<Algorithm>,
    material: Material,
}

impl Key {
    fn fits(&self, algorithm: Algorithm) -> bool {
        let kind = match self.material {
            Material::Rsa { .. } => matches!(algorithm, Algorithm::Rs256 | Algorithm::Ps256),
            Material::P256(_) => algorithm == Algorithm::Es256,
            Material::Ed25519(_) => algorithm == Algorithm::EdDsa,
        };
        kind && self.only.is_none_or(|only| only == algorithm)
    }

    fn verify(&self, algorithm: Algorithm, message: &[u8], sig: &[u8]) -> bool {
        let raw = |by: &'static dyn signature::VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(by, key).verify(message, sig).is_ok()
        };
        match (&self.material, algorithm) {
            (Material::Rsa { n, e }, Algorithm::Rs256) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, message, sig).is_ok()
            }
            (Material::Rsa { n, e }, Algorithm::Ps256) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PSS_2048_8192_SHA256, message, sig).is_ok()
            }
            (Material::P256(point), Algorithm::Es256) => raw(&ECDSA_P256_SHA256_FIXED, point),
            (Material::Ed25519(key), Algorithm::EdDsa) => raw(&ED25519, key),
            _ => false,
        }
    }
}

/// See the head of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProviderKeys(Vec<Key>);

impl ProviderKeys {
    /// Reads a JWK set as the provider published it.
    pub fn parse(body: &[u8]) -> Result<Self, FederationError> {
        const WHAT: &str = "key set";
        if body.len() > MAX_PROVIDER_JWKS {
            return Err(FederationError::TooLong { what: WHAT, max: MAX_PROVIDER_JWKS });
        }
        let unreadable = |reason: String| FederationError::Unreadable { what: WHAT, reason };
        let set = jws::object(body).map_err(|e| unreadable(e.to_string()))?;
        let keys = set.get("keys").and_then(Value::as_array);
        let keys = keys.ok_or_else(|| unreadable("it has no list `keys`".to_owned()))?;
        if keys.len() > MAX_KEYS {
            return Err(unreadable(format!("it has more than {MAX_KEYS} keys")));
        }
        Ok(Self(keys.iter().filter_map(usable).collect()))
    }

    /// How many can be used.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A token that names no key is taken only where a single key fits: keys are not tried one by one.
    pub(super) fn verify(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), FederationError> {
        let mut fitting = self.0.iter().filter(|k| k.fits(algorithm) && (kid.is_none() || k.kid.as_deref() == kid));
        let (Some(key), None) = (fitting.next(), fitting.next()) else { return Err(FederationError::UnknownKey) };
        if key.verify(algorithm, message, signature) { Ok(()) } else { Err(FederationError::Signature) }
    }
}

/// The key, if it can check signatures that are taken here.
fn usable(jwk: &Value) -> Option<Key> {
    let member = |key: &str| jwk.get(key).and_then(Value::as_str);
    let bytes = |key: &str| jws::decode(member(key)?, key).ok();
    if jwk.get("use").is_some_and(|u| u != "sig") {
        return None;
    }
    let checks = |ops: &Value| ops.as_array().is_some_and(|l| l.iter().any(|o| o == "verify"));
    if jwk.get("key_ops").is_some_and(|ops| !checks(ops)) {
        return None;
    }
    let only = match jwk.get("alg") {
        None => None,
        Some(alg) => Some(Algorithm::parse(alg.as_str()?)?),
    };
    let material = match (member("kty")?, member("crv")) {
        ("RSA", _) => {
            // Some write a leading zero, which ring does not take.
            let plain = |b: Vec<u8>| b.into_iter().skip_while(|x| *x == 0).collect::<Vec<u8>>();
            Material::Rsa { n: plain(bytes("n")?), e: plain(bytes("e")?) }
        }
        ("EC", Some("P-256")) => {
            let (x, y) = (bytes("x")?, bytes("y")?);
            let fits = x.len() == 32 && y.len() == 32;
            fits.then(|| Material::P256([&[4], x.as_slice(), &y].concat()))?
        }
        ("OKP", Some("Ed25519")) => Material::Ed25519(bytes("x").filter(|x| x.len() == 32)?),
        _ => return None,
    };
    let kid = match jwk.get("kid") {
        None => None,
        Some(kid) => Some(kid.as_str()?.to_owned()),
    };
    Some(Key { kid, only, material })
}
