//! Who a provider is: its issuer URL, and the discovery document that must repeat it.

use std::fmt;

use serde_json::{Map, Value};
use url::{Host, Url};

use super::FederationError;
use crate::jwt::jws;

/// Bytes of a discovery document; real ones have about four thousand.
pub const MAX_DISCOVERY: usize = 64 * 1024;
const MAX_URL: usize = 2048;
const MAX_LIST: usize = 200;

/// Whether a provider may be asked without TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plaintext {
    Never,
    /// On this machine only: for tests and for developing against a provider.
    Loopback,
}

/// A provider's name, compared as text; also where its discovery document is.
#[derive(Clone, PartialEq, Eq)]
pub struct IssuerUrl {
    text: String,
    plaintext: Plaintext,
}

impl fmt::Debug for IssuerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl IssuerUrl {
    /// `https://host[:port][/path]`, without query and fragment. The text is kept as it was written.
    pub fn parse(text: &str, plaintext: Plaintext) -> Result<Self, FederationError> {
        let url = checked(text, plaintext)?;
        if url.query().is_some() {
            return Err(refused(text, "an issuer has no query"));
        }
        Ok(Self { text: text.to_owned(), plaintext })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// OIDC Discovery 1.0, section 4.
    pub fn discovery_url(&self) -> String {
        format!("{}/.well-known/openid-configuration", self.text.trim_end_matches('/'))
    }
}

/// What is needed of a discovery document. Every URL in it passed the rule that its issuer passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovery {
    pub issuer: String,
    pub authorization_endpoint: String,
    pub token_endpoint: String,
    pub jwks_uri: String,
    pub userinfo_endpoint: Option<String>,
    pub end_session_endpoint: Option<String>,
    /// Empty where the document does not say: then `client_secret_basic` holds.
    pub token_endpoint_auth_methods: Vec<String>,
    /// Empty where the document does not say.
    pub scopes: Vec<String>,
}

impl Discovery {
    /// Reads what [`IssuerUrl::discovery_url`] gave. A document that calls itself otherwise is another provider's.
    pub fn parse(body: &[u8], issuer: &IssuerUrl) -> Result<Self, FederationError> {
        const WHAT: &str = "discovery document";
        if body.len() > MAX_DISCOVERY {
            return Err(FederationError::TooLong { what: WHAT, max: MAX_DISCOVERY });
        }
        let unreadable = |reason: String| FederationError::Unreadable { what: WHAT, reason };
        let document = jws::object(body).map_err(|e| unreadable(e.to_string()))?;
        let got = jws::text(&document, "issuer").ok_or_else(|| unreadable("`issuer` is missing".to_owned()))?;
        if got != issuer.text {
            let got = got.chars().take(200).collect();
            return Err(FederationError::OtherIssuer { got, want: issuer.text.clone() });
        }
        let url = |key: &'static str| match document.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => checked(text, issuer.plaintext).map(|_| Some(text.clone())),
            Some(_) => Err(unreadable(format!("`{key}` is no text"))),
        };
        let needed = |key: &'static str| url(key)?.ok_or_else(|| unreadable(format!("`{key}` is missing")));
        Ok(Self {
            issuer: issuer.text.clone(),
            authorization_endpoint: needed("authorization_endpoint")?,
            token_endpoint: needed("token_endpoint")?,
            jwks_uri: needed("jwks_uri")?,
            userinfo_endpoint: url("userinfo_endpoint")?,
            end_session_endpoint: url("end_session_endpoint")?,
            token_endpoint_auth_methods: list(&document, "token_endpoint_auth_methods_supported"),
            scopes: list(&document, "scopes_supported"),
        })
    }
}

fn list(document: &Map<String, Value>, key: &str) -> Vec<String> {
    let texts = document.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    texts.take(MAX_LIST).map(str::to_owned).collect()
}

fn refused(url: &str, reason: &'static str) -> FederationError {
    FederationError::Url { url: url.chars().take(200).collect(), reason }
}

/// The rule for every URL of a provider. Whether its host may be reached from here is for the fetcher to say.
fn checked(text: &str, plaintext: Plaintext) -> Result<Url, FederationError> {
    if text.len() > MAX_URL {
        return Err(refused(text, "it is too long"));
    }
    let url = Url::parse(text).map_err(|_| refused(text, "it is no URL"))?;
    let is_local = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if plaintext == Plaintext::Loopback && is_local => {}
        _ => return Err(refused(text, "it must start with https://")),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused(text, "it must hold no user and password"));
    }
    if url.fragment().is_some() {
        return Err(refused(text, "it must hold no fragment"));
    }
    Ok(url)
}
