//! People and programs that another identity provider vouches for.
//!
//! A person's browser brings a code from the provider (OIDC Core 1.0, section 3.1; PKCE, RFC 7636) to whoever began the
//! sign-in, such as `nexus login`, and that sends the code here with what only it knows: the verifier and the nonce. The
//! server trades the code for an ID token, and the person becomes a user, made at their first sign-in. Issuer and subject
//! are the person: a name only names a new user, and never finds one.
//!
//! A CI system's token is exchanged (RFC 8693) for a short session of the service account that a rule of the provider names.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nexus_control::intent::Change;
use nexus_iam::envelope;
use nexus_iam::federation::{
    Discovery, ExchangeRequest, FederationError, GroupMapping, IdToken, IdTokenRules, MAX_TOKEN_ANSWER, OAuthError,
    OAuthErrorCode, Pkce, TokenAnswer, TokenType, claim, code_form, require_claims, verify_id_token,
};
use nexus_model::kind::{
    ExchangeRule, Holder, HolderKind, IdentityProvider, IdentityProviderSpec, Kind, User, UserIdentity, UserSpec,
};
use nexus_model::{AnyObject, ApiError, Code, FieldError, Name, RequestId};
use serde::Serialize;
use serde_json::{Value, json};
use url::form_urlencoded::byte_serialize;
use zeroize::Zeroizing;

use crate::credentials::{object, submit};
use crate::doors::ProviderRequest;
use crate::query::Query;
use crate::route::Place;
use crate::serve::Server;
use crate::signin::{Denied, Granted, Opening, needed, open};
use crate::tries::network;

/// The grant by which a provider's code is brought.
pub(crate) const CODE: &str = "urn:cloudnexus:oidc-code";
/// How far a provider's clock may be from this server's.
const LEEWAY: Duration = Duration::from_secs(30);
/// How long ago an ID token was given, at most: it comes straight from the provider.
const MAX_AGE: Duration = Duration::from_secs(600);
/// The same of a CI system's token, which is given when the job begins.
const MAX_EXCHANGE_AGE: Duration = Duration::from_secs(3600);
/// Of a session's factors, as many are kept.
const MAX_FACTORS: usize = 8;
const MAX_CODE: usize = 4096;

/// What somebody must know of a provider to sign in by it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Offered {
    name: Name,
    display_name: String,
    issuer: String,
    client_id: String,
    scopes: Vec<String>,
}

/// The providers by which people of an organization sign in. An organization that has none looks like one that is not there.
pub(crate) fn offered(server: &Server, organization: &Name) -> Value {
    let offered: Vec<Offered> = server.api.directory.read(|known| {
        let all = known.identity_providers(organization);
        let of = |p: &nexus_model::Object<IdentityProvider>| Offered {
            name: p.metadata.name.clone(),
            display_name: p.spec.display_name.clone(),
            issuer: p.spec.issuer.clone(),
            client_id: p.spec.client_id.clone(),
            scopes: p.spec.scopes.clone(),
        };
        all.filter(|p| !p.spec.client_id.is_empty()).map(of).collect()
    });
    json!({ "providers": offered })
}

const SECRET: &str = "a text of 1 to 512 characters, none of them a control character";

fn is_secret(text: &str) -> bool {
    (1..=512).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

fn sealing(organization: &Name, provider: &Name, issuer: &str) -> envelope::Context {
    envelope::Context::client_secret(organization.as_str(), provider.as_str(), issuer)
}

/// Makes of a change to users or identity providers what may stand in the metadata. `left` is what the change would leave.
/// True if a secret was sealed.
pub(crate) fn prepare(
    server: &Server,
    place: &Place,
    name: &Name,
    change: &mut Change,
    left: Option<&AnyObject>,
) -> Result<bool, ApiError> {
    let spec = match change {
        Change::Create { object } | Change::Put { object } => Some(&mut object.spec),
        Change::Patch { patch } => patch.get_mut("spec"),
        Change::Delete
        | Change::Rollout { .. }
        | Change::Audit { .. }
        | Change::Tell { .. }
        | Change::Rebalance { .. } => None,
    };
    let Some(spec) = spec.and_then(Value::as_object_mut) else { return Ok(false) };
    if place.kind.plural == User::PLURAL {
        // Like a status it is the server's, and may be in what was fetched and is sent back.
        if let Some(identity) = spec.get_mut("identity").and_then(Value::as_object_mut) {
            identity.shift_remove("groups");
        }
        return Ok(false);
    }
    let (IdentityProvider::PLURAL, Some(organization)) = (place.kind.plural, &place.organization) else {
        return Ok(false);
    };
    let secret = match spec.shift_remove("clientSecret") {
        None | Some(Value::Null) => return Ok(false),
        Some(Value::String(secret)) if is_secret(&secret) => Zeroizing::new(secret),
        // A patch was not read as a whole yet.
        Some(_) => return Err(ApiError::invalid(vec![FieldError::new("spec.clientSecret", SECRET)])),
    };
    let issuer = left.and_then(|l| l.spec["issuer"].as_str()).unwrap_or_default();
    let sealed = envelope::seal(&*server.api.master_keys, &sealing(organization, name, issuer), secret.as_bytes());
    let sealed = sealed.map_err(|e| ApiError::new(Code::Unavailable, format!("the secret can't be sealed: {e}")))?;
    let sealed = serde_json::to_string(&sealed).expect("a sealed value is plain data");
    spec.insert("sealedSecret".to_owned(), sealed.into());
    Ok(true)
}

/// A provider of an organization, as both grants name it.
struct Named {
    organization: Name,
    name: Name,
    spec: IdentityProviderSpec,
}

impl Named {
    /// Finds it. What is not there is told in the same words whatever is missing.
    async fn find(
        server: &Server,
        organization: &str,
        name: &str,
        usable: fn(&IdentityProviderSpec) -> bool,
    ) -> Result<Self, Denied> {
        let missing = || Denied::new("invalid_grant", "there is no such organization, or no such provider of it");
        let (Ok(organization), Ok(name)) = (organization.parse::<Name>(), name.parse::<Name>()) else {
            return Err(missing());
        };
        let look =
            || server.api.directory.read(|known| known.identity_provider(&organization, &name).map(|p| p.spec.clone()));
        let mut spec = look();
        if spec.is_none() {
            // It may have been made at another server a moment ago.
            let Ok(_turn) = server.strangers.try_acquire() else { return Err(missing()) };
            server.catch_up().await;
            spec = look();
        }
        let spec = spec.filter(usable).ok_or_else(missing)?;
        Ok(Self { organization, name, spec })
    }

    /// The client's secret, if it has one.
    fn secret(&self, server: &Server) -> Result<Option<Zeroizing<String>>, ApiError> {
        let Some(sealed) = &self.spec.sealed_secret else { return Ok(None) };
        let opened = || -> Result<Zeroizing<String>, String> {
            let sealed: envelope::Sealed = serde_json::from_str(sealed).map_err(|e| e.to_string())?;
            let context = sealing(&self.organization, &self.name, &self.spec.issuer);
            let bytes = envelope::open(&*server.api.master_keys, &context, &sealed).map_err(|e| e.to_string())?;
            Ok(Zeroizing::new(std::str::from_utf8(&bytes).map_err(|e| e.to_string())?.to_owned()))
        };
        opened().map(Some).map_err(|error| {
            tracing::warn!(provider = %self.name, organization = %self.organization, %error, "a client's secret can't be opened");
            let detail = "the client's secret of this provider can't be opened: its owner writes `clientSecret` again";
            ApiError::new(Code::Unavailable, detail)
        })
    }

    /// Trades a code for tokens.
    async fn redeem(
        &self,
        server: &Server,
        at: &Discovery,
        code: &str,
        redirect: &str,
        pkce: &Pkce,
    ) -> Result<TokenAnswer, Denied> {
        let spec = &self.spec;
        let mut form = Zeroizing::new(code_form(&spec.client_id, redirect, code, pkce));
        let mut authorization = None;
        if let Some(secret) = self.secret(server)? {
            let encoded = |text: &str| byte_serialize(text.as_bytes()).collect::<String>();
            let methods = &at.token_endpoint_auth_methods;
            let knows = |method: &str| methods.iter().any(|m| m == method);
            if knows("client_secret_post") && !knows("client_secret_basic") {
                form.push_str(&format!("&client_secret={}", encoded(&secret)));
            } else {
                // RFC 6749, section 2.3.1: both are encoded before they are joined.
                let both = Zeroizing::new(format!("{}:{}", encoded(&spec.client_id), encoded(&secret)));
                authorization = Some(Zeroizing::new(format!("Basic {}", STANDARD.encode(both.as_bytes()))));
            }
        }
        let url = at.token_endpoint.clone();
        let request = ProviderRequest { url, form: Some(form), authorization, max: MAX_TOKEN_ANSWER };
        let body = server.providers.ask(&spec.issuer, request).await?;
        TokenAnswer::parse(&body).map_err(|error| match error {
            FederationError::Refused { .. } => error.into(),
            // What can't be read is no fault of whoever signs in.
            _ => ApiError::new(Code::Unavailable, error.to_string()).into(),
        })
    }

    /// Our groups of somebody.
    fn groups(&self, token: &IdToken) -> Result<Vec<Name>, Denied> {
        let ours = |names: &std::collections::BTreeSet<Name>| names.iter().map(Name::to_string).collect();
        let table = self.spec.groups.iter().map(|(theirs, names)| (theirs.clone(), ours(names))).collect();
        let groups = GroupMapping { claim: self.spec.group_claim.clone(), table }.groups(&token.claims)?;
        Ok(groups.iter().filter_map(|g| g.parse().ok()).collect())
    }
}

impl From<FederationError> for Denied {
    fn from(error: FederationError) -> Self {
        Self::new("invalid_grant", error.to_string())
    }
}

/// RFC 8252, section 7.3: a program on the person's own machine. A code that went anywhere else is not taken.
fn is_loopback(redirect: &str) -> bool {
    let Ok(url) = url::Url::parse(redirect) else { return false };
    let own = match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        _ => false,
    };
    own && url.scheme() == "http" && url.username().is_empty() && url.password().is_none()
}

/// Counts what fails against its address, and nothing else: whoever knows a provider's name must not shut its people out.
async fn counted<T>(
    server: &Server,
    address: IpAddr,
    work: impl Future<Output = Result<T, Denied>>,
) -> Result<T, Denied> {
    let counted = [format!("from {}", network(address))];
    server.sign_ins.may_try(&counted, server.api.env.monotonic())?;
    let done = work.await;
    if done.as_ref().is_err_and(Denied::is_wrong) {
        server.sign_ins.wrong(&counted, server.api.env.monotonic());
    }
    done
}

/// A person brings the code that their provider gave them.
pub(crate) async fn by_code(
    server: &Server,
    form: &Query,
    address: IpAddr,
    request_id: &RequestId,
) -> Result<Granted, Denied> {
    let get = |name| needed(form, name);
    let (code, redirect, nonce) = (get("code")?, get("redirect_uri")?, get("nonce")?);
    let pkce = Pkce::from_verifier(get("code_verifier")?)?;
    if code.len() > MAX_CODE || nonce.len() > MAX_CODE {
        return Err(Denied::new("invalid_request", format!("at most {MAX_CODE} bytes of `code` and `nonce`")));
    }
    if !is_loopback(redirect) {
        let why = "redirect_uri must be at http://127.0.0.1 or http://[::1]: on the machine of whoever signs in";
        return Err(Denied::new("invalid_request", why));
    }
    let (organization, name) = (get("organization")?, get("provider")?);
    let work = async {
        let provider = Named::find(server, organization, name, |spec| !spec.client_id.is_empty()).await?;
        let spec = &provider.spec;
        let fetched = server.providers.of(&spec.issuer, &server.api.env).await?;
        let answer = provider.redeem(server, &fetched.discovery, code, redirect, &pkce).await?;
        let rules = IdTokenRules {
            issuer: &spec.issuer,
            client_id: &spec.client_id,
            nonce: Some(nonce),
            access_token: Some(&answer.access_token),
            now: nexus_iam::at_millis(server.api.env.now_millis()),
            leeway: LEEWAY,
            max_age: MAX_AGE,
        };
        let check = |keys: &_| verify_id_token(&answer.id_token, keys, &rules);
        let token = server.providers.verify(&spec.issuer, &server.api.env, check).await??;
        require_claims(&token.claims, &spec.require)?;
        let user = admit(server, &provider, &token, request_id).await?;
        let factors = token.amr.iter().take(MAX_FACTORS).cloned().collect();
        Ok((provider.organization, user, factors))
    };
    let (organization, name, factors) = counted(server, address, work).await?;
    let holder = Holder { kind: HolderKind::User, name };
    open(server, &organization, holder, Opening::by(factors), address, request_id).await
}

/// What is known here of a person that a provider vouches for.
enum Standing {
    Known(Name, UserIdentity),
    Disabled,
    Departed,
    New,
}

fn standing(server: &Server, organization: &Name, token: &IdToken) -> Standing {
    let (issuer, subject) = (&token.subject.issuer, &token.subject.subject);
    server.api.directory.read(|known| match known.user_of(organization, issuer, subject) {
        Some(user) if user.spec.disabled => Standing::Disabled,
        Some(user) => {
            let identity = user.spec.identity.clone().expect("it was found by it");
            Standing::Known(user.metadata.name.clone(), identity)
        }
        None if known.has_departed(organization, issuer, subject) => Standing::Departed,
        None => Standing::New,
    })
}

/// Finds or makes the user of a person, with the groups that the provider gives now.
async fn admit(server: &Server, provider: &Named, token: &IdToken, request_id: &RequestId) -> Result<Name, Denied> {
    let organization = &provider.organization;
    let groups = provider.groups(token)?;
    // Whoever was disabled or deleted at another server a moment ago stays out.
    server.catch_up().await;
    let out = |why| Err(Denied::new("access_denied", why));
    match standing(server, organization, token) {
        Standing::Disabled => out("this account is disabled: ask whoever administers the organization".to_owned()),
        Standing::Departed => out(format!(
            "the account of this person was deleted. Who administers {organization} lets them in again by making a user with \
             spec.identity {{provider: {}, subject: {:?}}}",
            provider.name, token.subject.subject
        )),
        Standing::Known(name, identity) => {
            if identity.groups.iter().flatten().ne(&groups) {
                let identity = json!({"groups": groups});
                let change = Change::Patch { patch: json!({"spec": {"identity": identity}}) };
                let actor = format!("{organization}/{name}");
                submit::<User>(server, (Some(organization), &name), change, None, &actor, request_id).await?;
                server.catch_up().await;
            }
            Ok(name)
        }
        Standing::New => make(server, provider, token, &groups, request_id).await,
    }
}

/// Makes the user of a person who was never here. A name that is taken is somebody else's, whoever that is.
async fn make(
    server: &Server,
    provider: &Named,
    token: &IdToken,
    groups: &[Name],
    request_id: &RequestId,
) -> Result<Name, Denied> {
    let organization = &provider.organization;
    let name = name_of(token, &provider.spec.username_claim)?;
    let identity = UserIdentity {
        provider: provider.name.clone(),
        issuer: token.subject.issuer.clone(),
        subject: token.subject.subject.clone(),
        groups: Some(groups.iter().cloned().collect()),
    };
    let plain = |text: &Option<String>, most| -> String {
        text.iter().flat_map(|t| t.chars()).filter(|c| !c.is_control()).take(most).collect()
    };
    let email = plain(&token.email, 254);
    let spec = UserSpec {
        display_name: plain(&token.name, 200),
        email: if email.contains('@') { email } else { String::new() },
        disabled: false,
        identity: Some(identity),
    };
    if !User::validate(&spec).is_empty() {
        return Err(Denied::new("invalid_grant", "the token's subject or its person's name can't be kept"));
    }
    let actor = format!("{organization}/{name}");
    let change = Change::Create { object: object::<User>(organization, &name, spec) };
    match submit::<User>(server, (Some(organization), &name), change, None, &actor, request_id).await {
        Ok(_) => {
            tracing::info!(%organization, user = %name, provider = %provider.name, "a user was made at their first sign-in");
            server.catch_up().await;
            Ok(name)
        }
        Err(error) if error.code == Code::AlreadyExists => {
            server.catch_up().await;
            // It may be their own first sign-in elsewhere.
            if let Standing::Known(name, _) = standing(server, organization, token) {
                return Ok(name);
            }
            Err(Denied::new(
                "access_denied",
                format!(
                    "the provider calls this person {name}, and there is a user {name} of {organization} already who is not \
                     that person. Who administers {organization} renames one of them, or says with spec.identity who it is"
                ),
            ))
        }
        Err(error) => Err(error.into()),
    }
}

/// What a new user is called: the claim, in small letters, without what stands after an `@`.
fn name_of(token: &IdToken, by: &str) -> Result<Name, Denied> {
    let said = claim(&token.claims, by).and_then(Value::as_str).unwrap_or_default();
    let local = said.split('@').next().unwrap_or_default().to_ascii_lowercase();
    let letters = local.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' });
    let name: String = letters.take(64).collect();
    name.trim_matches('-').parse().map_err(|e| {
        let detail = format!(
            "the token's claim `{by}` names no user: {e}; the provider's `usernameClaim` says which claim does"
        );
        Denied::new("invalid_grant", detail)
    })
}

fn refused(code: OAuthErrorCode, why: &str) -> Denied {
    OAuthError::new(code, why).into()
}

/// A CI system brings its token.
pub(crate) async fn exchange(
    server: &Server,
    body: &[u8],
    address: IpAddr,
    request_id: &RequestId,
) -> Result<Granted, Denied> {
    let asked = ExchangeRequest::from_form(body)?;
    if asked.actor.is_some() {
        return Err(refused(OAuthErrorCode::InvalidRequest, "nobody acts for others here: leave actor_token out"));
    }
    if !matches!(asked.subject_token_type, TokenType::IdToken | TokenType::Jwt) {
        return Err(refused(OAuthErrorCode::InvalidRequest, "subject_token_type must be that of an ID token or JWT"));
    }
    if asked.requested_token_type.is_some_and(|t| t != TokenType::AccessToken) {
        return Err(refused(OAuthErrorCode::InvalidRequest, "only access tokens are given"));
    }
    if !asked.audience.is_empty() || !asked.resource.is_empty() {
        return Err(refused(OAuthErrorCode::InvalidTarget, "access tokens are for this cloud: name no other target"));
    }
    if !asked.scope.is_empty() {
        return Err(refused(
            OAuthErrorCode::InvalidScope,
            "what is allowed are the service account's roles, no scopes",
        ));
    }
    let ours = |name: &str| {
        let found = asked.others.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        found.ok_or_else(|| Denied::new("invalid_request", format!("{name} is missing")))
    };
    let (organization, name) = (ours("organization")?, ours("provider")?);
    let work = async {
        let provider = Named::find(server, organization, name, |spec| !spec.exchange.is_empty()).await?;
        let (rule, token) = matching(server, &provider.spec, &asked.subject_token).await?;
        let holder = Holder { kind: HolderKind::ServiceAccount, name: rule.service_account.clone() };
        server.catch_up().await;
        if !server.api.directory.read(|known| known.is_active(&provider.organization, &holder)) {
            return Err(Denied::new("invalid_grant", "the rule's service account is gone or disabled"));
        }
        let subject = token.subject.subject;
        tracing::info!(organization = %provider.organization, account = %holder.name, subject, %address, "a token was exchanged");
        let factors = vec!["fed".to_owned()];
        let opening = Opening { project: rule.project.clone(), lasts: false, ..Opening::by(factors) };
        Ok((provider.organization, holder, opening))
    };
    let (organization, holder, opening) = counted(server, address, work).await?;
    let mut granted = open(server, &organization, holder, opening, address, request_id).await?;
    granted.issued_token_type = Some(TokenType::AccessToken);
    Ok(granted)
}

/// The first rule that a token fits.
async fn matching<'p>(
    server: &Server,
    spec: &'p IdentityProviderSpec,
    text: &str,
) -> Result<(&'p ExchangeRule, IdToken), Denied> {
    let rules = |audience| IdTokenRules {
        issuer: &spec.issuer,
        client_id: audience,
        nonce: None,
        access_token: None,
        now: nexus_iam::at_millis(server.api.env.now_millis()),
        leeway: LEEWAY,
        max_age: MAX_EXCHANGE_AGE,
    };
    let mut nearest = FederationError::Audience;
    for rule in &spec.exchange {
        let check = |keys: &_| verify_id_token(text, keys, &rules(&rule.audience));
        match server.providers.verify(&spec.issuer, &server.api.env, check).await? {
            Ok(token) => match require_claims(&token.claims, &rule.claims) {
                Ok(()) => return Ok((rule, token)),
                Err(unmet) => nearest = unmet,
            },
            Err(FederationError::Audience) => {}
            Err(wrong) => return Err(wrong.into()),
        }
    }
    Err(Denied::from(nearest))
}
