//! What users prove themselves with: passwords, invitations, second factors; stored as credentials of the global group.

use std::net::IpAddr;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::request::Parts;
use nexus_control::intent::{Change, Intent, Provenance, Target as Aim};
use nexus_env::RngExt;
use nexus_iam::TokenSecret;
use nexus_iam::envelope;
use nexus_iam::password::{self, Password, PasswordHash};
use nexus_iam::totp::{RecoveryCodes, TotpSecret};
use nexus_model::kind::{
    Credential, CredentialSpec, Holder, HolderKind, Invitation, Kind, SecondFactor, Session, User,
};
use nexus_model::{AnyObject, ApiError, Code, Metadata, Name, Object, RequestId};
use serde::Deserialize;
use serde_json::json;

use crate::caller::Proof;
use crate::input::read_json;
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::{Place, Verb};
use crate::serve::{Context, Server, json as answer_json};
use crate::tries::network;

const INVITATION: Duration = Duration::from_secs(24 * 3600);

/// Somebody who wants to sign in, perhaps of no account.
pub(crate) struct Claimant {
    pub organization: Name,
    pub name: Name,
}

impl Claimant {
    /// What is counted: tries for this user, and tries from this address.
    pub fn counted(&self, address: IpAddr) -> Vec<String> {
        vec![format!("user {}/{}", self.organization, self.name), format!("from {}", network(address))]
    }

    pub fn holder(&self) -> Holder {
        Holder { kind: HolderKind::User, name: self.name.clone() }
    }
}

/// Checks a password with the work that it takes, also for an account that is not there.
pub(crate) async fn check(server: &Server, stored: Option<String>, password: Password) -> Result<bool, ApiError> {
    let work = move || {
        let stored = stored.and_then(|s| s.parse::<PasswordHash>().ok());
        password::verify(stored.as_ref(), &password)
    };
    server.sign_ins.work(work).await
}

pub(crate) async fn hash(server: &Server, name: &Name, password: Password) -> Result<String, ApiError> {
    let weak =
        |e: password::WeakPassword| ApiError::invalid(vec![nexus_model::FieldError::new("password", e.to_string())]);
    password.check_strength(name.as_str()).map_err(weak)?;
    let made = server.sign_ins.work(move || PasswordHash::of(&password)).await?;
    made.map(|h| h.as_str().to_owned()).map_err(|e| ApiError::new(Code::Internal, e.to_string()))
}

/// What is to be stored of a credential after a code was taken; `None` if the code is wrong.
pub(crate) fn second_factor(
    server: &Server,
    who: &Claimant,
    credential: &CredentialSpec,
    typed: &str,
) -> Result<Option<CredentialSpec>, ApiError> {
    let Some(factor) = &credential.second_factor else { return Ok(None) };
    let with = |factor: SecondFactor| CredentialSpec { second_factor: Some(factor), ..credential.clone() };
    if let Some(step) = code_of_now(server, who, factor, typed)? {
        return Ok(Some(with(SecondFactor { last_step: Some(step), ..factor.clone() })));
    }
    let mut recovery = RecoveryCodes::from_hashes(factor.recovery.clone());
    let recovered = recovery.consume(typed);
    Ok(recovered.then(|| with(SecondFactor { recovery: recovery.into_hashes(), ..factor.clone() })))
}

/// The time step of a code that is right and was not taken before.
fn code_of_now(server: &Server, who: &Claimant, factor: &SecondFactor, typed: &str) -> Result<Option<u64>, ApiError> {
    let now = nexus_iam::at_millis(server.api.env.now_millis());
    Ok(totp_of(server, who, factor)?.verify(typed, now, factor.last_step).ok())
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

/// What this server itself asks of the global group's writer.
pub(crate) async fn submit<K: Kind>(
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

pub(crate) fn object<K: Kind>(organization: &Name, name: &Name, spec: K::Spec) -> AnyObject {
    let metadata = Metadata { organization: Some(organization.clone()), ..Metadata::new(name.clone(), None) };
    Object::<K>::new(metadata, spec).to_any()
}

/// A user's credential, and the revision at which it stands.
#[derive(Default)]
pub(crate) struct Held {
    pub spec: CredentialSpec,
    /// 0 if there is none yet.
    pub revision: u64,
}

/// Reads a user's credential as it is now: a server's own copy may not have the last code that was taken.
pub(crate) async fn held(server: &Server, organization: &Name, name: &Name) -> Result<Held, ApiError> {
    let kind = nexus_model::kind::stored(Credential::PLURAL).expect("every kind is listed");
    let key = nexus_model::key::object(kind, Some(organization), name);
    let found = server.api.global_store.range(nexus_store::RangeRequest::get(key)).await;
    let found = found.map_err(crate::problem::from_store)?;
    let Some(kv) = found.kvs.first() else { return Ok(Held::default()) };
    let object = Object::<Credential>::from_slice(&kv.value).map_err(|e| crate::list::unreadable(kv, &e))?;
    Ok(Held { spec: object.spec, revision: kv.mod_revision.0 })
}

/// Writes a user's credential, unless it was changed since it was read.
pub(crate) async fn keep(
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
pub(crate) async fn end_sessions(
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

pub(crate) fn new_secret(server: &Server) -> TokenSecret {
    TokenSecret::generate(RngExt::bytes(&*server.api.env.rng))
}

/// A user whose credential is to change, and how it stands.
struct Changing<'a> {
    server: &'a Server,
    who: Claimant,
    before: Held,
    context: &'a Context,
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
    let who = Claimant { organization, name: name.clone() };
    server.catch_up().await;
    if !server.api.directory.read(|known| known.is_active(&who.organization, &who.holder())) {
        return Err(ApiError::not_found(User::KIND, name.as_str()).into());
    }
    let before = held(server, &who.organization, name).await?;
    let changing = Changing { server, who, before, context };
    match verb {
        Verb::Invite => changing.invite().await,
        Verb::EnrollTotp => changing.enroll_totp().await,
        Verb::ConfirmTotp => changing.confirm_totp(asked(parts, body).await?).await,
        _ => changing.set_password(asked(parts, body).await?).await,
    }
}

async fn asked<T: serde::de::DeserializeOwned>(parts: &Parts, body: Body) -> Result<T, Refusal> {
    let body = read_json(&parts.headers, body, crate::write::JSON).await?;
    Ok(serde_json::from_value(body).map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?)
}

impl Changing<'_> {
    async fn keep(&self, spec: CredentialSpec) -> Result<(), ApiError> {
        let Claimant { organization, name } = &self.who;
        keep(self.server, organization, name, spec, &self.before, &self.context.request_id).await
    }

    fn user(&self) -> String {
        format!("{}/{}", self.who.organization, self.who.name)
    }

    /// What is counted, if the next try is due.
    fn try_now(&self) -> Result<Vec<String>, Refusal> {
        let counted = self.who.counted(self.context.caller.address);
        self.server.sign_ins.may_try(&counted, self.server.api.env.monotonic())?;
        Ok(counted)
    }

    async fn invite(&self) -> Result<Response, Refusal> {
        let secret = new_secret(self.server);
        let expires = self.server.now().plus(INVITATION);
        let invitation = Some(Invitation { hash: secret.hash().to_string(), expires });
        self.keep(CredentialSpec { invitation, ..self.before.spec.clone() }).await?;
        Ok(answer_json(&json!({"user": self.user(), "invitation": secret.reveal(), "expires": expires})))
    }

    async fn enroll_totp(&self) -> Result<Response, Refusal> {
        if self.before.spec.second_factor.as_ref().is_some_and(|f| f.confirmed) {
            let detail = "there is a second factor already; an invitation by an administrator takes it away";
            return Err(Refusal::new(Code::Conflict, detail));
        }
        let secret = TotpSecret::generate();
        let sealed = envelope::seal(&*self.server.api.master_keys, &totp_context(&self.who), secret.expose());
        let sealed =
            sealed.map_err(|e| ApiError::new(Code::Unavailable, format!("the secret can't be sealed: {e}")))?;
        let (codes, recovery) = RecoveryCodes::generate();
        let factor = SecondFactor {
            secret: serde_json::to_string(&sealed).expect("a sealed value is plain data"),
            confirmed: false,
            last_step: None,
            recovery: recovery.into_hashes(),
        };
        self.keep(CredentialSpec { second_factor: Some(factor), ..self.before.spec.clone() }).await?;
        let codes: Vec<&str> = codes.iter().map(|c| c.as_str()).collect();
        let uri = secret.uri("CloudNexus", &self.user());
        Ok(answer_json(&json!({"uri": &*uri, "secret": &*secret.to_base32(), "recoveryCodes": codes})))
    }

    /// Takes a code, which a recovery code is not: it is shown that the device makes them.
    async fn confirm_totp(&self, asked: Confirmation) -> Result<Response, Refusal> {
        let counted = self.try_now()?;
        let Some(factor) = &self.before.spec.second_factor else {
            return Err(Refusal::new(Code::Conflict, "there is no second factor to confirm: begin with enroll-totp"));
        };
        let Some(step) = code_of_now(self.server, &self.who, factor, &asked.code)? else {
            self.server.sign_ins.wrong(&counted, self.server.api.env.monotonic());
            return Err(Refusal::new(Code::Forbidden, "this is not the code of now: is the device's clock right?"));
        };
        let factor = SecondFactor { confirmed: true, last_step: Some(step), ..factor.clone() };
        self.keep(CredentialSpec { second_factor: Some(factor), ..self.before.spec.clone() }).await?;
        Ok(answer_json(&json!({"user": self.user()})))
    }

    async fn set_password(&self, asked: NewPassword) -> Result<Response, Refusal> {
        let (server, request_id) = (self.server, &self.context.request_id);
        let counted = self.try_now()?;
        if !check(server, self.before.spec.password.clone(), asked.old).await? {
            server.sign_ins.wrong(&counted, server.api.env.monotonic());
            return Err(Refusal::new(Code::Forbidden, "the old password is wrong"));
        }
        server.sign_ins.right(&counted);
        let password = Some(hash(server, &self.who.name, asked.new).await?);
        self.keep(CredentialSpec { password, invitation: None, ..self.before.spec.clone() }).await?;
        let this = match &self.context.caller.proof {
            Proof::Session { name, .. } => Some(name),
            _ => None,
        };
        end_sessions(server, &self.who, this, request_id).await?;
        Ok(answer_json(&json!({"user": self.user()})))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Confirmation {
    code: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewPassword {
    old: Password,
    new: Password,
}
