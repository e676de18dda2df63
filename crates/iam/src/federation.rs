//! Other identity providers: what is pure of an OpenID Connect relying party (OIDC Core 1.0, OIDC Discovery 1.0) and of
//! token exchange (RFC 8693).
//!
//! A sign-in goes so; whoever has sockets does the fetching:
//!
//! ```text
//! IssuerUrl::discovery_url   → fetch → Discovery::parse     who is the provider, where are its doors
//! Discovery.jwks_uri         → fetch → ProviderKeys::parse  its keys; again when one is unknown
//! Pkce, random_state         → authorization_url            the browser goes there and comes back with a code
//! code_form                  → post  → TokenAnswer::parse   the code becomes an ID token
//! verify_id_token            → Subject, GroupMapping        who it is, and in which groups
//! ```
//!
//! A person is the pair of issuer and subject. An e-mail address is never a key: a provider may hand it to somebody
//! else, and another provider may claim it.

mod claims;
mod exchange;
mod groups;
mod id_token;
mod keys;
mod login;
mod provider;

pub use claims::{claim, require_claims};
pub use exchange::{ExchangeRequest, GRANT_TOKEN_EXCHANGE, OAuthError, OAuthErrorCode, TokenType};
pub use groups::{GroupMapping, MAX_GROUPS};
pub use id_token::{IdToken, IdTokenRules, Subject, verify_id_token};
pub use keys::{MAX_PROVIDER_JWKS, ProviderKeys};
pub use login::{MAX_TOKEN_ANSWER, Pkce, TokenAnswer, authorization_url, code_form, pkce_challenge, random_state};
pub use provider::{Discovery, IssuerUrl, MAX_DISCOVERY, Plaintext};

/// Why a provider or what it says is refused. Never repeats tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FederationError {
    #[error("`{url}` can't be used: {reason}")]
    Url { url: String, reason: &'static str },
    #[error("the provider's {what} has more than {max} bytes")]
    TooLong { what: &'static str, max: usize },
    #[error("the provider's {what} can't be read: {reason}")]
    Unreadable { what: &'static str, reason: String },
    #[error("the provider calls itself `{got}`, `{want}` was configured: write it exactly as the provider does")]
    OtherIssuer { got: String, want: String },
    #[error("the ID token can't be read: {0}")]
    Malformed(String),
    #[error("the ID token is signed by `{0}`: RS256, PS256, ES256 and EdDSA are taken")]
    Algorithm(String),
    #[error("the ID token is not one: its `typ` says otherwise")]
    Type,
    #[error("the ID token demands extensions (`crit`), and none is understood")]
    Critical,
    #[error("no key of the provider fits the ID token: fetch its keys again")]
    UnknownKey,
    #[error("the ID token's signature is wrong")]
    Signature,
    #[error("the ID token's claim `{0}` is missing or of a wrong type")]
    Claim(&'static str),
    #[error("the ID token is by another issuer")]
    Issuer,
    #[error("the ID token is for another client")]
    Audience,
    #[error("the ID token has expired")]
    Expired,
    #[error("the ID token is not valid yet: are the clocks right?")]
    NotYet,
    #[error("the ID token was issued too long ago: sign in again")]
    TooOld,
    #[error("the ID token belongs to another sign-in (`nonce`): start again")]
    Nonce,
    #[error("the ID token belongs to another access token (`at_hash`)")]
    AtHash,
    #[error("the token's claim `{claim}` has not the value that is asked of it")]
    Unmet { claim: String },
    #[error("the claim `{claim}` holds {what}: let the provider send fewer or shorter groups")]
    Groups { claim: String, what: &'static str },
    #[error("the provider left the groups out of the token because there are too many: let it send only assigned ones")]
    GroupsElsewhere,
    #[error("a PKCE verifier has 43 to 128 unreserved characters")]
    Verifier,
    #[error("the provider refused: {error}{}", .description.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused { error: String, description: Option<String> },
}

#[cfg(test)]
mod tests;
