//! The browser's way: the authorization code flow with PKCE (RFC 6749, section 4.1; RFC 7636).
//!
//! Verifier, `state` and `nonce` are random and belong to one sign-in; the caller keeps them with the browser's session
//! until the code comes back, and uses them once.

use std::fmt;

use ring::digest;
use url::Url;
use zeroize::Zeroizing;

use super::{Discovery, FederationError};
use crate::chance;
use crate::jwt::jws;

/// Bytes of what the token endpoint answers.
pub const MAX_TOKEN_ANSWER: usize = 128 * 1024;

/// A `state` or `nonce`: 256 random bits.
pub fn random_state() -> String {
    jws::encode(chance::bytes::<32>())
}

/// What proves that whoever brings the code also asked for it. Wiped when dropped.
#[derive(Clone)]
pub struct Pkce {
    verifier: Zeroizing<String>,
    challenge: String,
}

impl fmt::Debug for Pkce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pkce").field("challenge", &self.challenge).finish_non_exhaustive()
    }
}

impl Pkce {
    pub fn generate() -> Self {
        let verifier = Zeroizing::new(random_state());
        let challenge = hash_of(&verifier);
        Self { verifier, challenge }
    }

    /// Reads what [`Self::verifier`] gave.
    pub fn from_verifier(verifier: &str) -> Result<Self, FederationError> {
        Ok(Self { verifier: Zeroizing::new(verifier.to_owned()), challenge: pkce_challenge(verifier)? })
    }

    /// Secret until the code is redeemed.
    pub fn verifier(&self) -> &str {
        &self.verifier
    }

    /// S256.
    pub fn challenge(&self) -> &str {
        &self.challenge
    }
}

/// The S256 challenge of a verifier: what our own authorization endpoint compares with what it was given.
pub fn pkce_challenge(verifier: &str) -> Result<String, FederationError> {
    let is_unreserved = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    let fits = (43..=128).contains(&verifier.len()) && verifier.bytes().all(is_unreserved);
    if fits { Ok(hash_of(verifier)) } else { Err(FederationError::Verifier) }
}

fn hash_of(verifier: &str) -> String {
    jws::encode(digest::digest(&digest::SHA256, verifier.as_bytes()))
}

/// Where the browser is sent. `scopes` should hold `openid`.
pub fn authorization_url(
    provider: &Discovery,
    client_id: &str,
    redirect_uri: &str,
    scopes: &[&str],
    state: &str,
    nonce: &str,
    pkce: &Pkce,
) -> Result<String, FederationError> {
    let unusable = |_| FederationError::Url { url: provider.authorization_endpoint.clone(), reason: "it is no URL" };
    let mut url = Url::parse(&provider.authorization_endpoint).map_err(unusable)?;
    url.query_pairs_mut().extend_pairs([
        ("response_type", "code"),
        ("client_id", client_id),
        ("redirect_uri", redirect_uri),
        ("scope", &scopes.join(" ")),
        ("state", state),
        ("nonce", nonce),
        ("code_challenge", &pkce.challenge),
        ("code_challenge_method", "S256"),
    ]);
    Ok(url.into())
}

/// What is posted to the token endpoint, as `application/x-www-form-urlencoded`. The client's secret, if it has one, goes
/// into the `Authorization` header.
pub fn code_form(client_id: &str, redirect_uri: &str, code: &str, pkce: &Pkce) -> String {
    url::form_urlencoded::Serializer::new(String::new())
        .extend_pairs([
            ("grant_type", "authorization_code"),
            ("client_id", client_id),
            ("redirect_uri", redirect_uri),
            ("code", code),
            ("code_verifier", pkce.verifier()),
        ])
        .finish()
}

/// What the token endpoint answered. Not printed: it holds tokens.
#[derive(Clone)]
pub struct TokenAnswer {
    pub access_token: Zeroizing<String>,
    pub id_token: Zeroizing<String>,
}

impl fmt::Debug for TokenAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenAnswer(…)")
    }
}

impl TokenAnswer {
    /// `body` of a success or a refusal.
    pub fn parse(body: &[u8]) -> Result<Self, FederationError> {
        const WHAT: &str = "token answer";
        if body.len() > MAX_TOKEN_ANSWER {
            return Err(FederationError::TooLong { what: WHAT, max: MAX_TOKEN_ANSWER });
        }
        let unreadable = |e: serde_json::Error| FederationError::Unreadable { what: WHAT, reason: e.to_string() };
        let answer = jws::object(body).map_err(unreadable)?;
        let short = |text: &str| text.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
        if let Some(error) = jws::text(&answer, "error") {
            let description = jws::text(&answer, "error_description").map(short);
            return Err(FederationError::Refused { error: short(error), description });
        }
        // Not by serde's message, which could repeat a value.
        let token = |key: &'static str| {
            let missing = || FederationError::Unreadable { what: WHAT, reason: format!("`{key}` is missing") };
            jws::text(&answer, key).map(|t| Zeroizing::new(t.to_owned())).ok_or_else(missing)
        };
        Ok(Self { access_token: token("access_token")?, id_token: token("id_token")? })
    }
}
