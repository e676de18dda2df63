//! Who asks: what a request proves of its sender, and whether that still holds.
//!
//! | credential | where it is known from | whose |
//! |---|---|---|
//! | the fleet's own key | this server's configuration | an operator |
//! | a token (`cnx_…`) | its `Token` object, by hash | a user or service account |
//! | a signature (SigV4) | its `AccessKey` object, by id | a user or service account |
//! | an access token (JWT) | its signature, by a server's published key | whoever's session it names |
//!
//! An access token is believed until it expires, unless this server knows that its session has ended. A server that is cut
//! off may not know; it is a quarter of an hour at most.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use http::header::WWW_AUTHENTICATE;
use http::request::Parts;
use nexus_control::directory::{self, Known};
use nexus_iam::jwt::{self, Claims, Expectations};
use nexus_iam::policy::{Circumstances, Principal};
use nexus_iam::{TokenHash, TokenSecret};
use nexus_model::kind::{Holder, HolderKind};
use nexus_model::{Code, Name, RequestId, Timestamp};
use sha2::{Digest, Sha256};

use crate::elsewhere;
use crate::headers::{self, Bearer};
use crate::problem::Refusal;
use crate::serve::Server;
use crate::signature;

/// For whom access tokens are.
pub(crate) const AUDIENCE: &str = "cloudnexus";
/// How long an access token is good.
pub(crate) const ACCESS: Duration = Duration::from_secs(15 * 60);
/// How far servers' clocks may differ.
pub(crate) const LEEWAY: Duration = Duration::from_secs(5);
/// A session that this server has not heard of yet may be this young: it was opened at another server just now.
const YOUNG: Duration = Duration::from_secs(10);

/// The address that a request came from, put into its extensions by whoever accepts connections.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddress(pub IpAddr);

/// By what a request proved who sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Proof {
    /// One of the fleet's own keys.
    Key,
    Token {
        organization: Name,
        name: Name,
        hash: TokenHash,
    },
    AccessKey {
        name: Name,
        id: String,
    },
    Session {
        organization: Name,
        name: Name,
        /// When the access token was given.
        issued: Timestamp,
    },
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub principal: Principal,
    /// What events call it.
    pub name: String,
    /// Absent for the fleet's own keys.
    pub holder: Option<(Name, Holder)>,
    pub proof: Proof,
    /// The only project that the credential opens.
    pub project: Option<Name>,
    pub mfa: bool,
    pub address: IpAddr,
    /// Until when the credential is good.
    pub until: Option<Timestamp>,
    /// What the request's body must hash to.
    pub signed_body: Option<[u8; 32]>,
}

impl Caller {
    fn of_holder(organization: Name, holder: Holder, proof: Proof, address: IpAddr) -> Self {
        Self {
            principal: directory::principal(&organization, &holder),
            name: format!("{organization}/{}", holder.name),
            holder: Some((organization, holder)),
            proof,
            project: None,
            mfa: false,
            address,
            until: None,
            signed_body: None,
        }
    }

    /// Whether what it proved still holds; if not, why.
    pub fn stands(&self, known: &Known, now: Timestamp) -> Result<(), &'static str> {
        let Some((organization, holder)) = &self.holder else { return Ok(()) };
        if self.until.is_some_and(|until| until < now) {
            return Err("this credential has expired: sign in again");
        }
        match &self.proof {
            Proof::Key => {}
            Proof::Token { organization, name, hash } => {
                let same = |t: &str| t.parse::<TokenHash>().is_ok_and(|h| h == *hash);
                let token = known.token_named(organization, name);
                if !token.is_some_and(|t| t.spec.hash.as_deref().is_some_and(same)) {
                    return Err("this token was revoked");
                }
            }
            Proof::AccessKey { id, .. } => {
                if known.access_key(id).is_none() {
                    return Err("this access key was deleted");
                }
            }
            Proof::Session { organization, name, issued } => {
                let ended = "this session has ended: sign in again";
                match known.session(organization, name) {
                    Some(session) if session.spec.expires.is_some_and(|e| e < now) => return Err(ended),
                    Some(session) if !known.has_key_of(&session.spec) => return Err("this access key was deleted"),
                    Some(_) => {}
                    None if known.has_ended(name) || now.since(*issued) > YOUNG => return Err(ended),
                    None => {}
                }
            }
        }
        if known.is_active(organization, holder) { Ok(()) } else { Err("this account is gone or disabled") }
    }

    /// The circumstances of a request of its.
    pub fn circumstances<'a>(&self, now: Timestamp, request_id: &'a RequestId) -> Circumstances<'a> {
        Circumstances { ip: self.address, time: now, mfa: self.mfa, request_id: request_id.as_str() }
    }
}

/// Whether these factors are several (RFC 8176). A provider may let people in by a code alone.
fn is_mfa(factors: &[String]) -> bool {
    let has = |factor: &str| factors.iter().any(|f| f == factor);
    has("mfa") || (has("pwd") && has("otp"))
}

/// `user:acme/ada`, as an access token's subject.
pub(crate) fn subject(organization: &Name, holder: &Holder) -> String {
    let kind = match holder.kind {
        HolderKind::User => "user",
        HolderKind::ServiceAccount => "service-account",
    };
    format!("{kind}:{organization}/{}", holder.name)
}

fn parse_subject(text: &str) -> Option<(Name, Holder)> {
    let (kind, rest) = text.split_once(':')?;
    let (organization, name) = rest.split_once('/')?;
    let kind = match kind {
        "user" => HolderKind::User,
        "service-account" => HolderKind::ServiceAccount,
        _ => return None,
    };
    Some((organization.parse().ok()?, Holder { kind, name: name.parse().ok()? }))
}

fn unauthenticated(detail: impl Into<String>, challenge: &'static str) -> Refusal {
    Refusal::new(Code::Unauthenticated, detail).with(WWW_AUTHENTICATE, HeaderValue::from_static(challenge))
}

const SIGNED: &str = r#"AWS4-HMAC-SHA256 realm="nexus""#;
const INVALID: &str = r#"Bearer realm="nexus", error="invalid_token""#;

impl Server {
    pub fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.api.env.now_millis())
    }

    /// Tells who sent a request. A credential that proves nothing is refused, whatever it would have opened.
    pub fn authenticate(&self, parts: &Parts) -> Result<Caller, Refusal> {
        let peer = || parts.extensions.get::<PeerAddress>().map_or(Ipv4Addr::LOCALHOST.into(), |p| p.0);
        let address = match elsewhere::origin(self, &parts.headers) {
            Some(origin) => origin.map_err(|why| unauthenticated(why, INVALID))?,
            None => peer(),
        };
        if signature::is_signed(parts) {
            let signed = self.by_signature(parts).map_err(|why| unauthenticated(why, SIGNED))?;
            let proof = Proof::AccessKey { name: signed.name, id: signed.id };
            let caller = Caller::of_holder(signed.organization, signed.holder, proof, address);
            let caller = Caller { project: signed.project, signed_body: signed.body, ..caller };
            let now = self.now();
            return match self.api.directory.read(|known| caller.stands(known, now)) {
                Ok(()) => Ok(caller),
                Err(why) => Err(unauthenticated(why, SIGNED)),
            };
        }
        let token = match headers::bearer(&parts.headers) {
            Bearer::Token(token) => token,
            Bearer::None => {
                let detail = "send the header `Authorization: Bearer TOKEN`; `nexus login` gets a token";
                return Err(unauthenticated(detail, r#"Bearer realm="nexus""#));
            }
        };
        let caller = match TokenSecret::parse(token) {
            Ok(secret) => self.by_token(&secret, address),
            Err(_) => self.by_access_token(token, address),
        };
        let caller = caller.map_err(|why| unauthenticated(why, INVALID))?;
        let now = self.now();
        match self.api.directory.read(|known| caller.stands(known, now)) {
            Ok(()) => Ok(caller),
            Err(why) => Err(unauthenticated(why, INVALID)),
        }
    }

    fn by_token(&self, secret: &TokenSecret, address: IpAddr) -> Result<Caller, String> {
        let hash = secret.hash();
        if let Some(operator) = self.api.operators.find(&hash) {
            return Ok(Caller {
                principal: Principal::operator(operator),
                name: operator.to_owned(),
                holder: None,
                proof: Proof::Key,
                project: None,
                mfa: true,
                address,
                until: None,
                signed_body: None,
            });
        }
        let unknown = || "this token is not known, or was revoked".to_owned();
        let token = self.api.directory.read(|known| {
            let token = known.token(&hash)?;
            Some((token.metadata.organization.clone()?, token.metadata.name.clone(), token.spec.clone()))
        });
        let (organization, name, spec) = token.ok_or_else(unknown)?;
        let proof = Proof::Token { organization: organization.clone(), name, hash };
        let caller = Caller::of_holder(organization, spec.holder.ok_or_else(unknown)?, proof, address);
        Ok(Caller { project: spec.project, until: spec.expires, ..caller })
    }

    fn by_access_token(&self, token: &str, address: IpAddr) -> Result<Caller, String> {
        let claims = self.claims(token)?;
        let (organization, holder) = parse_subject(&claims.sub).ok_or("the token's subject is nobody of this cloud")?;
        if claims.org != organization.as_str() {
            return Err("the token's organization is not its subject's".into());
        }
        let name = claims.sid.parse().map_err(|_| "the token's session has no proper name")?;
        let seconds = |s: u64| Timestamp::from_millis(i64::try_from(s.saturating_mul(1000)).unwrap_or(i64::MAX));
        let proof = Proof::Session { organization: organization.clone(), name, issued: seconds(claims.iat) };
        let caller = Caller::of_holder(organization, holder, proof, address);
        let project = claims.project.as_deref().map(str::parse).transpose();
        Ok(Caller {
            project: project.map_err(|_| "the token's project has no proper name")?,
            mfa: is_mfa(&claims.amr),
            until: Some(seconds(claims.exp)),
            ..caller
        })
    }

    fn claims(&self, token: &str) -> Result<Arc<Claims>, String> {
        let now = nexus_iam::at_millis(self.api.env.now_millis());
        let expected = Expectations { issuer: &self.api.issuer, audience: AUDIENCE, now, leeway: LEEWAY };
        let hash: [u8; 32] = Sha256::digest(token).into();
        self.api.directory.read(|known| {
            if let Some(claims) = self.checked.get(&hash, known.keys_epoch, self.api.env.now_millis()) {
                return Ok(claims);
            }
            let claims = Arc::new(jwt::verify(token, &known.keys, expected).map_err(|e| e.to_string())?);
            self.checked.put(hash, known.keys_epoch, &claims);
            Ok(claims)
        })
    }
}

/// Access tokens whose signature was found good, by their hash, until they expire or the keys change: a token comes with
/// many requests, and checking it takes longer than all else about them.
#[derive(Debug, Default)]
pub(crate) struct Checked(Mutex<Good>);

#[derive(Debug, Default)]
struct Good {
    /// Of the keys by which they were checked.
    epoch: u64,
    claims: HashMap<[u8; 32], Arc<Claims>>,
}

/// The most that are remembered.
const CHECKED: usize = 10_000;

impl Checked {
    fn get(&self, hash: &[u8; 32], epoch: u64, now_millis: i64) -> Option<Arc<Claims>> {
        let checked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let claims = checked.claims.get(hash).filter(|_| checked.epoch == epoch)?;
        let now = u64::try_from(now_millis / 1000).unwrap_or(0);
        (claims.iat <= now && now < claims.exp).then(|| Arc::clone(claims))
    }

    fn put(&self, hash: [u8; 32], epoch: u64, claims: &Arc<Claims>) {
        let mut checked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if checked.epoch != epoch || checked.claims.len() >= CHECKED {
            *checked = Good { epoch, claims: HashMap::new() };
        }
        checked.claims.insert(hash, Arc::clone(claims));
    }
}
