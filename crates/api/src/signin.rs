//! Signing in: the token endpoint, what others need to check its tokens, who somebody is, and what they may do.
//!
//! `POST /oauth2/token` (RFC 6749) takes a form with one of these grants and answers an access token, a refresh token and
//! their session:
//!
//! | `grant_type` | parameters | |
//! |---|---|---|
//! | `password` | `username` (`organization/name`), `password`; `otp` | The code of the second factor, or a recovery code, where there is one: without it the error is `mfa_required`. |
//! | `client_credentials` | `client_id`, `client_secret` | An access key's id and secret. |
//! | `refresh_token` | `refresh_token` | The refresh token changes every time. Who brings one twice has copied it: the session ends. |
//! | `urn:cloudnexus:invitation` | `username`, `invitation`, `password` | Sets a password, by what an invitation told. |
//!
//! Guessing is slow: after a few wrong passwords for a user, or from an address, each further one has to wait longer.

use std::net::IpAddr;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::header::{CACHE_CONTROL, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use http_body_util::{BodyExt, Limited};
use nexus_control::directory;
use nexus_control::intent::Change;
use nexus_env::RngExt;
use nexus_iam::jwt::{self, Claims};
use nexus_iam::password::Password;
use nexus_iam::{TokenHash, TokenSecret};
use nexus_model::kind::{CredentialSpec, Holder, HolderKind, Kind, Session, SessionSpec};
use nexus_model::{ApiError, Code, Name, Object, RequestId};
use serde::Serialize;
use serde_json::{Value, json};

use crate::caller::{ACCESS, AUDIENCE, subject};
use crate::credentials::{
    Claimant, Held, check, end_sessions, hash, held, keep, new_secret, object, second_factor, submit,
};
use crate::headers;
use crate::query::Query;
use crate::route::{KEYS, SIGN_IN};
use crate::serve::{Server, json as answer_json};
use crate::tries::{TooSoon, network};

/// How long a session can be refreshed.
const SESSION: Duration = Duration::from_secs(12 * 3600);
const MAX_FORM: usize = 16 << 10;
const FORM: &[&str] = &["application/x-www-form-urlencoded"];
const INVITED: &str = "urn:cloudnexus:invitation";
/// Why no token is given (RFC 6749, section 5.2).
struct Denied {
    status: StatusCode,
    error: &'static str,
    description: String,
    retry_after: Option<u64>,
}

impl Denied {
    fn new(error: &'static str, description: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, error, description: description.into(), retry_after: None }
    }

    fn wrong() -> Self {
        Self::new("invalid_grant", "the organization, the name or what was to prove them is wrong")
    }
}

impl From<ApiError> for Denied {
    fn from(error: ApiError) -> Self {
        let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let name = match error.code {
            Code::Overloaded => "slow_down",
            _ if error.status >= 500 => "temporarily_unavailable",
            _ => "invalid_request",
        };
        let retry_after = (error.code == Code::Unavailable || error.code == Code::Overloaded).then_some(1);
        Self { status, error: name, description: error.detail, retry_after }
    }
}

impl From<TooSoon> for Denied {
    fn from(error: TooSoon) -> Self {
        let (status, retry_after) = (StatusCode::TOO_MANY_REQUESTS, Some(error.seconds));
        Self { status, retry_after, ..Self::new("slow_down", error.to_string()) }
    }
}

/// What the token endpoint answers.
#[derive(Debug, Serialize)]
struct Granted {
    access_token: String,
    token_type: &'static str,
    expires_in: u64,
    refresh_token: String,
    session: Name,
    organization: Name,
    user: Name,
}

/// The answer of the token endpoint, good or bad.
pub(crate) async fn token(server: &Server, parts: &Parts, body: Body, request_id: &RequestId) -> Response {
    let limit = server.api.limits.request_timeout;
    let outcome = match tokio::time::timeout(limit, grant(server, parts, body, request_id)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(ApiError::new(Code::Timeout, "no answer in time").into()),
    };
    let mut response = match outcome {
        Ok(granted) => answer_json(&granted),
        Err(denied) => {
            if denied.status.is_client_error() {
                let code = Code::Unauthenticated;
                crate::audit::note(server, None, request_id, "sessions:sign-in".to_owned(), None, Err(code));
            }
            let mut response = answer_json(&json!({"error": denied.error, "error_description": denied.description}));
            *response.status_mut() = denied.status;
            if let Some(seconds) = denied.retry_after {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            response
        }
    };
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn form(parts: &Parts, body: Body) -> Result<Query, Denied> {
    headers::check_content_type(&parts.headers, FORM)?;
    let collected = Limited::new(body, MAX_FORM).collect().await;
    let bytes =
        collected.map_err(|_| Denied::new("invalid_request", format!("a form has at most {MAX_FORM} bytes")))?;
    let bytes = bytes.to_bytes();
    let text = std::str::from_utf8(&bytes).map_err(|_| Denied::new("invalid_request", "the form is not UTF-8"))?;
    let known = [
        "grant_type",
        "username",
        "password",
        "otp",
        "refresh_token",
        "invitation",
        "client_id",
        "client_secret",
        "scope",
    ];
    Ok(Query::parse(Some(text), &known, &[])?)
}

fn needed<'a>(form: &'a Query, name: &str) -> Result<&'a str, Denied> {
    form.get(name).filter(|v| !v.is_empty()).ok_or_else(|| Denied::new("invalid_request", format!("{name} is missing")))
}

fn claimant(form: &Query) -> Result<Claimant, Denied> {
    let text = needed(form, "username")?;
    let (organization, name) = text
        .split_once('/')
        .ok_or_else(|| Denied::new("invalid_request", "username is ORGANIZATION/NAME, such as acme/ada"))?;
    let parsed = organization.parse().ok().zip(name.parse().ok());
    parsed.map(|(organization, name)| Claimant { organization, name }).ok_or_else(Denied::wrong)
}

async fn grant(server: &Server, parts: &Parts, body: Body, request_id: &RequestId) -> Result<Granted, Denied> {
    let form = form(parts, body).await?;
    let address = parts.extensions.get::<crate::PeerAddress>().map_or(IpAddr::from([127, 0, 0, 1]), |p| p.0);
    match needed(&form, "grant_type")? {
        "password" => by_password(server, &form, address, request_id).await,
        "refresh_token" => refresh(server, &form, address, request_id).await,
        INVITED => by_invitation(server, &form, address, request_id).await,
        "client_credentials" => by_access_key(server, &form, address, request_id).await,
        _ => Err(Denied::new(
            "unsupported_grant_type",
            format!("the grants are `password`, `refresh_token`, `client_credentials` and `{INVITED}`"),
        )),
    }
}

async fn by_password(
    server: &Server,
    form: &Query,
    address: IpAddr,
    request_id: &RequestId,
) -> Result<Granted, Denied> {
    let who = claimant(form)?;
    let password = Password::new(needed(form, "password")?.to_owned());
    let counted = who.counted(address);
    server.sign_ins.may_try(&counted, server.api.env.monotonic())?;
    let active = server.api.directory.read(|known| known.is_active(&who.organization, &who.holder()));
    // Read in any case: whether there is such a user must not be told by the time that it takes.
    let credential = held(server, &who.organization, &who.name).await?;
    let credential = if active { credential } else { Held::default() };
    let right = check(server, credential.spec.password.clone(), password).await?;
    let wrong = || {
        server.sign_ins.wrong(&counted, server.api.env.monotonic());
        tracing::info!(user = %format!("{}/{}", who.organization, who.name), %address, "a sign-in was refused");
    };
    if !right {
        wrong();
        return Err(Denied::wrong());
    }
    let mut factors = vec!["pwd".to_owned()];
    if credential.spec.second_factor.as_ref().is_some_and(|f| f.confirmed) {
        // Only who knows the password learns that there is a second factor.
        let otp = form.get("otp").filter(|o| !o.is_empty());
        let otp = otp.ok_or_else(|| Denied::new("mfa_required", "send the code of the second factor as `otp`"))?;
        let Some(spec) = second_factor(server, &who, &credential.spec, otp)? else {
            wrong();
            return Err(Denied::new("invalid_grant", "the code of the second factor is wrong, or was used already"));
        };
        // A code is good once: of two who bring it at once, one finds the credential changed.
        keep(server, &who.organization, &who.name, spec, &credential, request_id).await?;
        factors.push("otp".to_owned());
    }
    server.sign_ins.right(&counted);
    let factors = Opening { factors, project: None };
    open(server, &who.organization, who.holder(), factors, address, request_id).await
}

/// Trades an access key for a session.
async fn by_access_key(
    server: &Server,
    form: &Query,
    address: IpAddr,
    request_id: &RequestId,
) -> Result<Granted, Denied> {
    let (id, secret) = (needed(form, "client_id")?, needed(form, "client_secret")?);
    let id: String = id.chars().take(64).collect();
    let counted = vec![format!("key {id}"), format!("from {}", network(address))];
    server.sign_ins.may_try(&counted, server.api.env.monotonic())?;
    let wrong = || Denied::new("invalid_client", "this access key is not known, or its secret is wrong");
    let key = server.api.directory.read(|known| {
        let key = known.access_key(&id)?;
        let organization = key.metadata.organization.clone()?;
        let holder = key.spec.holder.clone()?;
        known.is_active(&organization, &holder).then(|| (key.clone(), organization, holder))
    });
    let Some((key, organization, holder)) = key else {
        server.sign_ins.wrong(&counted, server.api.env.monotonic());
        return Err(wrong());
    };
    let known = server.secret_of(&key).map_err(|why| ApiError::new(Code::Unavailable, why))?;
    if !known.matches(secret) {
        server.sign_ins.wrong(&counted, server.api.env.monotonic());
        return Err(wrong());
    }
    server.sign_ins.right(&counted);
    let opening = Opening { factors: vec!["key".to_owned()], project: key.spec.project.clone() };
    open(server, &organization, holder, opening, address, request_id).await
}

async fn by_invitation(
    server: &Server,
    form: &Query,
    address: IpAddr,
    request_id: &RequestId,
) -> Result<Granted, Denied> {
    let who = claimant(form)?;
    let counted = who.counted(address);
    server.sign_ins.may_try(&counted, server.api.env.monotonic())?;
    let invitation = TokenSecret::parse(needed(form, "invitation")?).map(|s| s.hash());
    let password = Password::new(needed(form, "password")?.to_owned());
    // It may have been made at another server a moment ago.
    server.catch_up().await;
    let active = server.api.directory.read(|known| known.is_active(&who.organization, &who.holder()));
    let credential = if active { held(server, &who.organization, &who.name).await? } else { Held::default() };
    let now = server.now();
    let told = credential.spec.invitation.as_ref().filter(|i| i.expires > now);
    let told = told.and_then(|i| i.hash.parse::<TokenHash>().ok());
    if told.zip(invitation.ok()).is_none_or(|(told, brought)| told != brought) {
        server.sign_ins.wrong(&counted, server.api.env.monotonic());
        return Err(Denied::new("invalid_grant", "this invitation is not known, was used already or has expired"));
    }
    let password = hash(server, &who.name, password).await?;
    // Who lost their password may have lost what makes the codes with it.
    let spec = CredentialSpec { password: Some(password), ..CredentialSpec::default() };
    // Once only: of two who bring it at once, one finds the credential changed.
    keep(server, &who.organization, &who.name, spec, &credential, request_id).await?;
    server.sign_ins.right(&counted);
    end_sessions(server, &who, None, request_id).await?;
    let opening = Opening { factors: vec!["pwd".to_owned()], project: None };
    open(server, &who.organization, who.holder(), opening, address, request_id).await
}

fn claims(server: &Server, organization: &Name, session: &Name, spec: &SessionSpec) -> Claims {
    let now = u64::try_from(server.api.env.now_millis() / 1000).unwrap_or(0);
    let holder = spec.holder.clone().unwrap_or(Holder { kind: HolderKind::User, name: session.clone() });
    let principal = directory::principal(organization, &holder);
    let groups = server.api.directory.read(|known| {
        let groups = known.groups_of(&principal).map(|g| g.name().to_owned());
        groups.take(MAX_GROUPS_TOLD).collect()
    });
    Claims {
        iss: server.api.issuer.clone(),
        sub: subject(organization, &holder),
        aud: AUDIENCE.into(),
        exp: now + ACCESS.as_secs(),
        nbf: now,
        iat: now,
        jti: jwt::random_id(),
        sid: session.to_string(),
        org: organization.to_string(),
        groups,
        project: spec.project.as_ref().map(Name::to_string),
        amr: spec.factors.clone(),
        act: None,
    }
}

/// Groups that an access token names for others; here they are looked up.
const MAX_GROUPS_TOLD: usize = 32;

fn granted(
    server: &Server,
    organization: &Name,
    session: &Name,
    spec: &SessionSpec,
    refresh: &TokenSecret,
) -> Result<Granted, ApiError> {
    let access = server.api.signer.sign(&claims(server, organization, session, spec));
    let user = spec.holder.as_ref().map_or_else(|| session.clone(), |h| h.name.clone());
    Ok(Granted {
        access_token: access.map_err(|e| ApiError::new(Code::Internal, e.to_string()))?,
        token_type: "Bearer",
        expires_in: ACCESS.as_secs(),
        // Says which session it is of, so that it can be found without an index.
        refresh_token: format!("{organization}.{session}.{}", refresh.reveal()),
        session: session.clone(),
        organization: organization.clone(),
        user,
    })
}

/// What a session begins with.
struct Opening {
    factors: Vec<String>,
    project: Option<Name>,
}

/// Opens a session.
async fn open(
    server: &Server,
    organization: &Name,
    holder: Holder,
    opening: Opening,
    address: IpAddr,
    request_id: &RequestId,
) -> Result<Granted, Denied> {
    let id: [u8; 16] = RngExt::bytes(&*server.api.env.rng);
    let session: Name = format!("s-{}", hex::encode(id)).parse().expect("hexadecimal digits");
    let refresh = new_secret(server);
    let actor = format!("{organization}/{}", holder.name);
    let spec = SessionSpec {
        holder: Some(holder),
        expires: Some(server.now().plus(SESSION)),
        factors: opening.factors,
        project: opening.project,
        address: address.to_string(),
        refresh: Some(refresh.hash().to_string()),
        spent: None,
    };
    let change = Change::Create { object: object::<Session>(organization, &session, spec.clone()) };
    submit::<Session>(server, (Some(organization), &session), change, None, &actor, request_id).await?;
    Ok(granted(server, organization, &session, &spec, &refresh)?)
}

async fn refresh(server: &Server, form: &Query, address: IpAddr, request_id: &RequestId) -> Result<Granted, Denied> {
    let unknown = || Denied::new("invalid_grant", "this refresh token is not known, or its session has ended");
    let text = needed(form, "refresh_token")?;
    let mut parts = text.splitn(3, '.');
    let organization: Name = parts.next().and_then(|p| p.parse().ok()).ok_or_else(unknown)?;
    let session: Name = parts.next().and_then(|p| p.parse().ok()).ok_or_else(unknown)?;
    let secret = parts.next().and_then(|p| TokenSecret::parse(p).ok()).ok_or_else(unknown)?;
    let kind = nexus_model::kind::stored(Session::PLURAL).expect("every kind is listed");
    let key = nexus_model::key::object(kind, Some(&organization), &session);
    let found = server.api.global_store.range(nexus_store::RangeRequest::get(key)).await;
    let found = found.map_err(crate::problem::from_store)?;
    let kv = found.kvs.first().ok_or_else(unknown)?;
    let stored = Object::<Session>::from_slice(&kv.value).map_err(|e| crate::list::unreadable(kv, &e))?;
    let is = |hash: Option<&String>| hash.and_then(|h| h.parse::<TokenHash>().ok()).is_some_and(|h| h == secret.hash());
    let actor = format!("{organization}/{}", stored.spec.holder.as_ref().map_or("", |h| h.name.as_str()));
    if is(stored.spec.spent.as_ref()) {
        tracing::warn!(%organization, %session, %address, "a refresh token was used twice: its session is ended");
        submit::<Session>(server, (Some(&organization), &session), Change::Delete, None, &actor, request_id).await?;
        return Err(unknown());
    }
    let active = server
        .api
        .directory
        .read(|known| stored.spec.holder.as_ref().is_some_and(|holder| known.is_active(&organization, holder)));
    if !is(stored.spec.refresh.as_ref()) || !active || stored.spec.expires.is_none_or(|e| e < server.now()) {
        return Err(unknown());
    }
    let next = new_secret(server);
    let spec = SessionSpec {
        refresh: Some(next.hash().to_string()),
        spent: stored.spec.refresh.clone(),
        ..stored.spec.clone()
    };
    let change = Change::Put { object: object::<Session>(&organization, &session, spec.clone()) };
    let at = Some(kv.mod_revision.0);
    submit::<Session>(server, (Some(&organization), &session), change, at, &actor, request_id).await?;
    Ok(granted(server, &organization, &session, &spec, &next)?)
}

/// OpenID Connect Discovery, as far as whoever checks our tokens needs it.
pub(crate) fn discovery(server: &Server) -> Value {
    let issuer = &server.api.issuer;
    json!({
        "issuer": issuer,
        "jwks_uri": format!("{issuer}{KEYS}"),
        "token_endpoint": format!("{issuer}{SIGN_IN}"),
        "grant_types_supported": ["password", "refresh_token", "client_credentials", INVITED],
        "response_types_supported": ["token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["EdDSA"],
        "claims_supported": ["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "sid", "org", "groups", "project", "amr"],
    })
}

pub(crate) fn keys(server: &Server) -> Value {
    server.api.directory.read(|known| known.keys.to_jwks())
}
