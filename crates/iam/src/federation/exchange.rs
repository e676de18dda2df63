//! Token exchange (RFC 8693): a CI system's token becomes one of ours. The shape of the question, and the errors of
//! our token endpoint (RFC 6749, section 5.2).

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

pub const GRANT_TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const MAX_FORM: usize = 128 * 1024;
const MAX_PARAMETERS: usize = 50;
const MAX_TARGETS: usize = 10;
const MAX_SCOPES: usize = 50;

/// RFC 8693, section 3. SAML assertions are not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenType {
    #[serde(rename = "urn:ietf:params:oauth:token-type:access_token")]
    AccessToken,
    #[serde(rename = "urn:ietf:params:oauth:token-type:refresh_token")]
    RefreshToken,
    #[serde(rename = "urn:ietf:params:oauth:token-type:id_token")]
    IdToken,
    #[serde(rename = "urn:ietf:params:oauth:token-type:jwt")]
    Jwt,
}

impl TokenType {
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("urn:ietf:params:oauth:token-type:")? {
            "access_token" => Some(Self::AccessToken),
            "refresh_token" => Some(Self::RefreshToken),
            "id_token" => Some(Self::IdToken),
            "jwt" => Some(Self::Jwt),
            _ => None,
        }
    }
}

/// The codes of RFC 6749, section 5.2, and RFC 8693, section 2.2.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OAuthErrorCode {
    InvalidRequest,
    InvalidClient,
    InvalidGrant,
    UnauthorizedClient,
    UnsupportedGrantType,
    InvalidScope,
    InvalidTarget,
}

impl OAuthErrorCode {
    /// As the answer's `error` says it.
    pub fn word(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::InvalidClient => "invalid_client",
            Self::InvalidGrant => "invalid_grant",
            Self::UnauthorizedClient => "unauthorized_client",
            Self::UnsupportedGrantType => "unsupported_grant_type",
            Self::InvalidScope => "invalid_scope",
            Self::InvalidTarget => "invalid_target",
        }
    }
}

/// What the token endpoint answers when it refuses; as JSON it is the answer's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{description}")]
pub struct OAuthError {
    #[serde(rename = "error")]
    pub code: OAuthErrorCode,
    #[serde(rename = "error_description")]
    pub description: String,
}

impl OAuthError {
    /// The description may hold printable ASCII except `"` and `\`; other characters become `'`.
    pub fn new(code: OAuthErrorCode, description: &str) -> Self {
        let allowed = |c: char| if matches!(c, ' '..='~') && !matches!(c, '"' | '\\') { c } else { '\'' };
        Self { code, description: description.chars().take(500).map(allowed).collect() }
    }

    /// The answer's HTTP status.
    pub fn status(&self) -> u16 {
        if self.code == OAuthErrorCode::InvalidClient { 401 } else { 400 }
    }
}

fn invalid(description: &str) -> OAuthError {
    OAuthError::new(OAuthErrorCode::InvalidRequest, description)
}

/// The question. Not printed whole: it holds tokens.
#[derive(Clone)]
pub struct ExchangeRequest {
    pub subject_token: Zeroizing<String>,
    pub subject_token_type: TokenType,
    /// Who acts for the subject, if somebody does.
    pub actor: Option<(Zeroizing<String>, TokenType)>,
    pub requested_token_type: Option<TokenType>,
    pub audience: Vec<String>,
    pub resource: Vec<String>,
    pub scope: Vec<String>,
    /// Parameters of our own that are not in the RFC, such as the organization; each once.
    pub others: Vec<(String, String)>,
}

impl fmt::Debug for ExchangeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExchangeRequest")
            .field("subject_token_type", &self.subject_token_type)
            .field("requested_token_type", &self.requested_token_type)
            .field("audience", &self.audience)
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

impl ExchangeRequest {
    /// Whether a body's grant is this one.
    pub fn is_asked_in(body: &[u8]) -> bool {
        let mut pairs = url::form_urlencoded::parse(body).take(MAX_PARAMETERS);
        pairs.any(|(k, v)| k == "grant_type" && v == GRANT_TOKEN_EXCHANGE)
    }

    /// Reads a body of type `application/x-www-form-urlencoded`.
    pub fn from_form(body: &[u8]) -> Result<Self, OAuthError> {
        if body.len() > MAX_FORM {
            return Err(invalid("the request is too long"));
        }
        let mut form = Form::read(body)?;
        match form.take("grant_type").as_deref() {
            Some(GRANT_TOKEN_EXCHANGE) => {}
            Some(_) => {
                let text = format!("grant_type must be {GRANT_TOKEN_EXCHANGE}");
                return Err(OAuthError::new(OAuthErrorCode::UnsupportedGrantType, &text));
            }
            None => return Err(invalid("grant_type is missing")),
        }
        let subject_token = form.take("subject_token").ok_or_else(|| invalid("subject_token is missing"))?;
        let subject_token_type = form.token_type("subject_token_type")?;
        let subject_token_type = subject_token_type.ok_or_else(|| invalid("subject_token_type is missing"))?;
        let actor = match (form.take("actor_token"), form.token_type("actor_token_type")?) {
            (None, None) => None,
            (Some(token), Some(kind)) => Some((Zeroizing::new(token), kind)),
            _ => return Err(invalid("actor_token and actor_token_type belong together")),
        };
        let scope = form.take("scope").unwrap_or_default();
        let scope: Vec<String> = scope.split(' ').filter(|s| !s.is_empty()).map(str::to_owned).collect();
        if scope.len() > MAX_SCOPES {
            return Err(OAuthError::new(OAuthErrorCode::InvalidScope, "too many scopes"));
        }
        Ok(Self {
            subject_token: Zeroizing::new(subject_token),
            subject_token_type,
            actor,
            requested_token_type: form.token_type("requested_token_type")?,
            audience: form.targets("audience")?,
            resource: form.targets("resource")?,
            scope,
            others: form.0,
        })
    }
}

/// Parameters that were not taken yet. Only `audience` and `resource` may be there more than once (RFC 6749, section 3.2).
struct Form(Vec<(String, String)>);

impl Form {
    fn read(body: &[u8]) -> Result<Self, OAuthError> {
        let pairs = url::form_urlencoded::parse(body).take(MAX_PARAMETERS + 1);
        // RFC 6749, section 3.2: a parameter without a value counts as left out.
        let pairs: Vec<(String, String)> =
            pairs.filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.into_owned(), v.into_owned())).collect();
        if pairs.len() > MAX_PARAMETERS {
            return Err(invalid("too many parameters"));
        }
        let may_repeat = |k: &str| matches!(k, "audience" | "resource");
        let repeated = |i: usize| pairs[..i].iter().any(|(k, _)| *k == pairs[i].0) && !may_repeat(&pairs[i].0);
        match (0..pairs.len()).find(|i| repeated(*i)) {
            Some(i) => Err(invalid(&format!("{} is there twice", pairs[i].0.chars().take(40).collect::<String>()))),
            None => Ok(Self(pairs)),
        }
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().position(|(k, _)| k == key)?;
        Some(self.0.remove(at).1)
    }

    fn token_type(&mut self, key: &str) -> Result<Option<TokenType>, OAuthError> {
        match self.take(key) {
            None => Ok(None),
            Some(text) => TokenType::parse(&text)
                .map(Some)
                .ok_or_else(|| invalid(&format!("{key} is not one that is taken here"))),
        }
    }

    fn targets(&mut self, key: &str) -> Result<Vec<String>, OAuthError> {
        let mut found = Vec::new();
        while let Some(target) = self.take(key) {
            found.push(target);
        }
        if found.len() > MAX_TARGETS {
            return Err(OAuthError::new(OAuthErrorCode::InvalidTarget, "too many targets"));
        }
        Ok(found)
    }
}
