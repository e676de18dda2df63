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
use nexus_control::intent::{Change, Intent, Provenance, Target as Aim};
use nexus_env::RngExt;
use nexus_iam::envelope;
use nexus_iam::jwt::{self, Claims};
use nexus_iam::password::{self, Password, PasswordHash};
use nexus_iam::policy::{self, Place as PolicyPlace, Principal};
use nexus_iam::totp::{RecoveryCodes, TotpSecret};
use nexus_iam::{TokenHash, TokenSecret};
use nexus_model::kind::{
    Credential, CredentialSpec, Holder, HolderKind, Invitation, Kind, SecondFactor, Session, SessionSpec, User,
};
use nexus_model::selector::Labels;
use nexus_model::{AnyObject, ApiError, Code, Metadata, Name, Object, RequestId, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::caller::{ACCESS, AUDIENCE, Proof, subject};
use crate::headers;
use crate::input::read_json;
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::{KEYS, Place, SIGN_IN, Verb};
use crate::serve::{Context, Server, json as answer_json};
use crate::tries::network;

/// How long a session can be refreshed.
const SESSION: Duration = Duration::from_secs(12 * 3600);
const INVITATION: Duration = Duration::from_secs(24 * 3600);
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

/// Somebody who wants to sign in, perhaps of no account.
struct Claimant {
    organization: Name,
    name: Name,
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

impl Claimant {
    /// What is counted: tries for this user, and tries from this address.
    fn counted(&self, address: IpAddr) -> Vec<String> {
        vec![format!("user {}/{}", self.organization, self.name), format!("from {}", network(address))]
    }

    fn holder(&self) -> Holder {
        Holder { kind: HolderKind::User, name: self.name.clone() }
    }
}

fn may_try(server: &Server, who: &[String]) -> Result<(), Denied> {
    let wait = server.sign_ins.wait(who, server.api.env.monotonic());
    if wait.is_zero() {
        return Ok(());
    }
    let seconds = wait.as_secs() + 1;
    Err(Denied {
        status: StatusCode::TOO_MANY_REQUESTS,
        retry_after: Some(seconds),
        ..Denied::new("slow_down", format!("too many wrong tries: the next one counts in {seconds} s"))
    })
}

/// Checks a password with the work that it takes, also for an account that is not there.
async fn check(server: &Server, stored: Option<String>, password: Password) -> Result<bool, ApiError> {
    let work = move || {
        let stored = stored.and_then(|s| s.parse::<PasswordHash>().ok());
        password::verify(stored.as_ref(), &password)
    };
    server.sign_ins.work(work).await
}

async fn hash(server: &Server, name: &Name, password: Password) -> Result<String, ApiError> {
    let weak =
        |e: password::WeakPassword| ApiError::invalid(vec![nexus_model::FieldError::new("password", e.to_string())]);
    password.check_strength(name.as_str()).map_err(weak)?;
    let made = server.sign_ins.work(move || PasswordHash::of(&password)).await?;
    made.map(|h| h.as_str().to_owned()).map_err(|e| ApiError::new(Code::Internal, e.to_string()))
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
    may_try(server, &counted)?;
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

/// What is to be stored of a credential after a code was taken; `None` if the code is wrong.
fn second_factor(
    server: &Server,
    who: &Claimant,
    credential: &CredentialSpec,
    typed: &str,
) -> Result<Option<CredentialSpec>, ApiError> {
    let Some(factor) = &credential.second_factor else { return Ok(None) };
    let secret = totp_of(server, who, factor)?;
    let now = nexus_iam::at_millis(server.api.env.now_millis());
    let with = |factor: SecondFactor| CredentialSpec { second_factor: Some(factor), ..credential.clone() };
    if let Ok(step) = secret.verify(typed, now, factor.last_step) {
        return Ok(Some(with(SecondFactor { last_step: Some(step), ..factor.clone() })));
    }
    let mut recovery = RecoveryCodes::from_hashes(factor.recovery.clone());
    let recovered = recovery.consume(typed);
    Ok(recovered.then(|| with(SecondFactor { recovery: recovery.into_hashes(), ..factor.clone() })))
}

fn totp_context(who: &Claimant) -> envelope::Context {
    envelope::Context::totp(&format!("{}/{}", who.organization, who.name))
}

fn totp_of(server: &Server, who: &Claimant, factor: &SecondFactor) -> Result<TotpSecret, ApiError> {
    let unsealed = || -> Result<TotpSecret, String> {
        let sealed: envelope::Sealed = serde_json::from_str(&factor.secret).map_err(|e| e.to_string())?;
        let bytes = envelope::open(&*server.api.master_keys, &totp_context(who), &sealed).map_err(|e| e.to_string())?;
        TotpSecret::from_bytes(&bytes).map_err(|e| e.to_string())
    };
    unsealed().map_err(|error| {
        tracing::warn!(%error, "the secret of a second factor can't be opened");
        ApiError::new(Code::Unavailable, "this server can't check second factors now: try another")
    })
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
    let counted = vec![format!("key {id}"), format!("from {address}")];
    may_try(server, &counted)?;
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
    may_try(server, &counted)?;
    let invitation = TokenSecret::parse(needed(form, "invitation")?).map(|s| s.hash());
    let password = Password::new(needed(form, "password")?.to_owned());
    // It may have been made at another server a moment ago.
    server.catch_up().await;
    let active = server.api.directory.read(|known| known.is_active(&who.organization, &who.holder()));
    let credential = if active { held(server, &who.organization, &who.name).await? } else { Held::default() };
    let now = server.now();
    let told = credential.spec.invitation.as_ref().filter(|i| i.expires > now);
    let told = told.and_then(|i| i.hash.parse::<TokenHash>().ok());
    if !told.zip(invitation.ok()).is_some_and(|(told, brought)| told == brought) {
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

/// What this server itself asks of the global group's writer.
async fn submit<K: Kind>(
    server: &Server,
    within: (Option<&Name>, &Name),
    change: Change,
    if_match: Option<u64>,
    actor: &str,
    request_id: &RequestId,
) -> Result<AnyObject, ApiError> {
    // A session's own doing is its user's.
    let by = Provenance { principal: format!("user:{actor}"), ..Provenance::default() };
    let target =
        Aim { plural: K::PLURAL.to_owned(), project: None, organization: within.0.cloned(), name: within.1.clone() };
    let intent = Intent {
        request_id: request_id.clone(),
        actor: actor.to_owned(),
        by,
        target,
        change,
        if_match,
        idempotency_key: None,
        dry_run: false,
    };
    Ok(server.api.global_writer.submit(intent).await?.object)
}

fn object<K: Kind>(organization: &Name, name: &Name, spec: K::Spec) -> AnyObject {
    let metadata = Metadata { organization: Some(organization.clone()), ..Metadata::new(name.clone(), None) };
    Object::<K>::new(metadata, spec).to_any()
}

/// A user's credential, and the revision at which it stands.
#[derive(Default)]
struct Held {
    spec: CredentialSpec,
    /// 0 if there is none yet.
    revision: u64,
}

/// Reads a user's credential as it is now: a server's own copy may not have the last code that was taken.
async fn held(server: &Server, organization: &Name, name: &Name) -> Result<Held, ApiError> {
    let kind = nexus_model::kind::stored(Credential::PLURAL).expect("every kind is listed");
    let key = nexus_model::key::object(kind, Some(organization), name);
    let found = server.api.global_store.range(nexus_store::RangeRequest::get(key)).await;
    let found = found.map_err(crate::problem::from_store)?;
    let Some(kv) = found.kvs.first() else { return Ok(Held::default()) };
    let object = Object::<Credential>::from_slice(&kv.value).map_err(|e| crate::list::unreadable(kv, &e))?;
    Ok(Held { spec: object.spec, revision: kv.mod_revision.0 })
}

/// Writes a user's credential, unless it was changed since it was read.
async fn keep(
    server: &Server,
    organization: &Name,
    name: &Name,
    spec: CredentialSpec,
    before: &Held,
    request_id: &RequestId,
) -> Result<(), ApiError> {
    let object = object::<Credential>(organization, name, spec);
    let (change, if_match) = match before.revision {
        0 => (Change::Create { object }, None),
        revision => (Change::Put { object }, Some(revision)),
    };
    let actor = format!("{organization}/{name}");
    submit::<Credential>(server, (Some(organization), name), change, if_match, &actor, request_id).await.map(drop)
}

/// Ends the sessions of somebody whose password is new: whoever knew the old one is out.
async fn end_sessions(
    server: &Server,
    who: &Claimant,
    but: Option<&Name>,
    request_id: &RequestId,
) -> Result<(), ApiError> {
    let holder = who.holder();
    let theirs = server.api.directory.read(|known| known.sessions_of(&who.organization, &holder));
    let actor = format!("{}/{}", who.organization, who.name);
    for session in theirs.iter().filter(|s| Some(*s) != but) {
        let at = (Some(&who.organization), session);
        match submit::<Session>(server, at, Change::Delete, None, &actor, request_id).await {
            Ok(_) => {}
            Err(error) if error.code == Code::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
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

fn new_secret(server: &Server) -> TokenSecret {
    TokenSecret::generate(RngExt::bytes(&*server.api.env.rng))
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

/// What `/v1/whoami` answers.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct WhoAmI {
    name: String,
    kind: policy::PrincipalKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    organization: Option<Name>,
    /// By what it was proved: `key`, `token NAME`, `session NAME`.
    by: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    project: Option<Name>,
    mfa: bool,
    groups: Vec<String>,
    roles: Vec<HeldRole>,
}

#[derive(Debug, Serialize)]
struct HeldRole {
    role: policy::Role,
    over: String,
}

pub(crate) fn who_am_i(server: &Server, context: &Context) -> impl Serialize + use<> {
    let caller = &context.caller;
    let (groups, roles) = server.api.directory.read(|known| {
        let groups: Vec<String> = known.groups_of(&caller.principal).map(|g| g.name().to_owned()).collect();
        (groups, known.engine.roles_of(&caller.principal))
    });
    WhoAmI {
        name: caller.name.clone(),
        kind: caller.principal.kind(),
        organization: caller.holder.as_ref().map(|(o, _)| o.clone()),
        by: match &caller.proof {
            Proof::Key => "key".into(),
            Proof::Token { name, .. } => format!("token {name}"),
            Proof::AccessKey { name, .. } => format!("access key {name}"),
            Proof::Session { name, .. } => format!("session {name}"),
        },
        expires: caller.until,
        project: caller.project.clone(),
        mfa: caller.mfa,
        groups,
        roles: roles.into_iter().map(|(role, reach)| HeldRole { role, over: reach.to_string() }).collect(),
    }
}

/// What `/v1/can` is asked.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CanRequest {
    /// `create`, `list`, `exec` …
    verb: String,
    /// A kind's name, plural or short form, or a collection such as `blobs`.
    kind: String,
    #[serde(default)]
    name: Option<Name>,
    #[serde(default)]
    organization: Option<Name>,
    #[serde(default)]
    project: Option<Name>,
    #[serde(default)]
    region: Option<Name>,
    #[serde(default)]
    labels: Labels,
    /// Somebody else, as `organization/name`: only for who may read the organization's role bindings.
    #[serde(default)]
    user: Option<String>,
    /// Also every statement that was looked at.
    #[serde(default)]
    explain: bool,
}

/// Answers whether somebody may do something, and why.
pub(crate) async fn can(server: &Server, context: &Context, parts: &Parts, body: Body) -> Result<Response, Refusal> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let asked: CanRequest = serde_json::from_value(read_json(&parts.headers, body, crate::write::JSON).await?)
        .map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
    let principal = match &asked.user {
        None => context.caller.principal.clone(),
        Some(text) => {
            let (organization, name) = text
                .split_once('/')
                .ok_or_else(|| Refusal::new(Code::BadRequest, "user is ORGANIZATION/NAME, such as acme/ada"))?;
            let organization: Name =
                organization.parse().map_err(|_| ApiError::not_found("Organization", organization))?;
            let kind = nexus_model::kind::find("role-bindings").expect("a kind");
            let place = Place { kind, project: None, organization: Some(organization.clone()), region: None };
            let bindings = crate::route::Target::Collection(place);
            server.authorize(context, &bindings, &http::Method::GET, None).await?;
            Principal::user(organization.as_str(), name)
        }
    };
    // Who may not know of a project is told what is told of one that is not there.
    if let Some(project) = &asked.project {
        let kind = nexus_model::kind::find("projects").expect("a kind");
        let place = Place { kind, project: None, organization: None, region: None };
        let there = crate::route::Target::Object(place, project.to_string());
        server.authorize(context, &there, &http::Method::GET, None).await?;
    }
    let organization = server.api.directory.read(|known| match (&asked.project, &asked.organization) {
        (Some(project), _) => known.project(project).map(|p| p.spec.organization.clone()),
        (None, Some(organization)) => Some(organization.clone()),
        (None, None) => None,
    });
    let region = asked.region.as_ref().unwrap_or(&server.api.region);
    let at = PolicyPlace {
        organization: organization.as_ref().map(Name::as_str),
        project: asked.project.as_ref().map(Name::as_str),
        region: Some(region.as_str()),
        labels: Some(&asked.labels),
    };
    let now = server.now();
    let circumstances = context.caller.circumstances(now, &context.request_id);
    let name = asked.name.as_ref().map(Name::as_str);
    let answer = server.api.directory.read(|known| {
        let engine = &known.engine;
        let decision = engine.can(&principal, &asked.verb, &asked.kind, name, at, circumstances)?;
        let explanation = asked.explain.then(|| {
            let vocabulary = policy::vocabulary();
            let declared = nexus_model::kind::find(&asked.kind);
            let action = format!("{}:{}", declared.map_or(&*asked.kind, |d| d.plural), asked.verb);
            let types = vocabulary.action(&action).map_or(&[][..], |a| &a.resources);
            let resource = at.resource(types, name.unwrap_or("any"));
            engine.explain(&policy::Request { principal: &principal, action: &action, resource, circumstances })
        });
        Ok::<_, policy::PolicyError>((decision, explanation))
    });
    let (decision, explanation) = answer.map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
    let mut told = json!({
        "allowed": decision.allowed,
        "by": decision.by,
        "missingAction": decision.missing_action,
        "errors": decision.errors,
    });
    if let Some(explanation) = explanation {
        told["considered"] = json!(explanation.considered);
        told["roles"] = json!(explanation.roles);
        told["rolesThatWould"] = json!(explanation.roles_that_would);
    }
    Ok(answer_json(&told))
}

/// `:set-password`, `:invite`, `:enroll-totp` and `:confirm-totp`.
pub(crate) async fn change(
    server: &Server,
    place: &Place,
    name: &Name,
    verb: Verb,
    parts: &Parts,
    body: Body,
    context: &Context,
) -> Result<Response, Refusal> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let organization = place.organization.clone().ok_or_else(|| ApiError::not_found(User::KIND, name.as_str()))?;
    let holder = Holder { kind: HolderKind::User, name: name.clone() };
    server.catch_up().await;
    if !server.api.directory.read(|known| known.is_active(&organization, &holder)) {
        return Err(ApiError::not_found(User::KIND, name.as_str()).into());
    }
    let before = held(server, &organization, name).await?;
    match verb {
        Verb::Invite => {
            let secret = new_secret(server);
            let expires = server.now().plus(INVITATION);
            let invitation = Some(Invitation { hash: secret.hash().to_string(), expires });
            let spec = CredentialSpec { invitation, ..before.spec.clone() };
            keep(server, &organization, name, spec, &before, &context.request_id).await?;
            let user = format!("{organization}/{name}");
            Ok(answer_json(&json!({"user": user, "invitation": secret.reveal(), "expires": expires})))
        }
        Verb::EnrollTotp => {
            let who = Claimant { organization: organization.clone(), name: name.clone() };
            if before.spec.second_factor.as_ref().is_some_and(|f| f.confirmed) {
                let detail = "there is a second factor already; an invitation by an administrator takes it away";
                return Err(Refusal::new(Code::Conflict, detail));
            }
            let secret = TotpSecret::generate();
            let sealed = envelope::seal(&*server.api.master_keys, &totp_context(&who), secret.expose());
            let sealed =
                sealed.map_err(|e| ApiError::new(Code::Unavailable, format!("the secret can't be sealed: {e}")))?;
            let (codes, recovery) = RecoveryCodes::generate();
            let factor = SecondFactor {
                secret: serde_json::to_string(&sealed).expect("a sealed value is plain data"),
                confirmed: false,
                last_step: None,
                recovery: recovery.into_hashes(),
            };
            let spec = CredentialSpec { second_factor: Some(factor), ..before.spec.clone() };
            keep(server, &organization, name, spec, &before, &context.request_id).await?;
            let codes: Vec<&str> = codes.iter().map(|c| c.as_str()).collect();
            let uri = secret.uri("CloudNexus", &format!("{organization}/{name}"));
            Ok(answer_json(&json!({"uri": &*uri, "secret": &*secret.to_base32(), "recoveryCodes": codes})))
        }
        Verb::ConfirmTotp => {
            let body = read_json(&parts.headers, body, crate::write::JSON).await?;
            let asked: Code6 =
                serde_json::from_value(body).map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
            let who = Claimant { organization: organization.clone(), name: name.clone() };
            let counted = who.counted(context.caller.address);
            may_try(server, &counted).map_err(|d| Refusal::new(Code::Overloaded, d.description))?;
            let Some(mut spec) = second_factor(server, &who, &before.spec, &asked.code)? else {
                server.sign_ins.wrong(&counted, server.api.env.monotonic());
                return Err(Refusal::new(Code::Forbidden, "this is not the code of now: is the device's clock right?"));
            };
            if let Some(factor) = &mut spec.second_factor {
                factor.confirmed = true;
            }
            keep(server, &organization, name, spec, &before, &context.request_id).await?;
            Ok(answer_json(&json!({"user": format!("{organization}/{name}")})))
        }
        _ => {
            let body = read_json(&parts.headers, body, crate::write::JSON).await?;
            let asked: NewPassword =
                serde_json::from_value(body).map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
            let who = Claimant { organization: organization.clone(), name: name.clone() };
            let counted = who.counted(context.caller.address);
            may_try(server, &counted).map_err(|d| Refusal::new(Code::Overloaded, d.description))?;
            if !check(server, before.spec.password.clone(), asked.old).await? {
                server.sign_ins.wrong(&counted, server.api.env.monotonic());
                return Err(Refusal::new(Code::Forbidden, "the old password is wrong"));
            }
            server.sign_ins.right(&counted);
            let password = Some(hash(server, name, asked.new).await?);
            let spec = CredentialSpec { password, invitation: None, ..before.spec.clone() };
            keep(server, &organization, name, spec, &before, &context.request_id).await?;
            let this = match &context.caller.proof {
                Proof::Session { name, .. } => Some(name),
                _ => None,
            };
            end_sessions(server, &who, this, &context.request_id).await?;
            Ok(answer_json(&json!({"user": format!("{organization}/{name}")})))
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Code6 {
    code: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewPassword {
    old: Password,
    new: Password,
}
