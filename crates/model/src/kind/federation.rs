//! Other identity providers of an organization, and what is remembered of the people that came from them.

use std::collections::{BTreeMap, BTreeSet};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::identity::{NoStatus, PRINTABLE, text};
use super::{Column, Home, Kind, Scope, Verbs};
use crate::{Condition, FieldError, Name, Timestamp};

/// The most groups of a provider that are mapped, and the most of ours that one of them gives.
pub const MAX_MAPPED: usize = 256;
/// The most rules for CI systems of one provider.
pub const MAX_EXCHANGE_RULES: usize = 32;
/// The most claims that a rule asks for.
const MAX_CLAIMS: usize = 16;
const MAX_SCOPES: usize = 16;
/// Of a claim's name and of its value.
const MAX_CLAIM: usize = 256;
const MAX_URL: usize = 2048;

/// Who a user is at a provider. Issuer and subject together are the person; a name or an e-mail address is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UserIdentity {
    pub provider: Name,
    /// The provider's issuer when the user was made. Written by the server.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 2048))]
    pub issuer: String,
    #[schemars(length(min = 1, max = 255), regex(pattern = PRINTABLE))]
    pub subject: String,
    /// The groups that the provider gave at the last sign-in: they count as long as it maps to them. Written by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<BTreeSet<Name>>,
}

impl UserIdentity {
    pub fn validate(&self) -> Vec<FieldError> {
        if self.subject.is_empty() || self.subject.len() > 255 || self.subject.chars().any(char::is_control) {
            let message = "1 to 255 characters, none of them a control character: the token's `sub`";
            return vec![FieldError::new("spec.identity.subject", message)];
        }
        Vec::new()
    }
}

#[derive(Debug, Clone)]
pub struct IdentityProvider;

/// What of a claim is asked: its name (or a JSON pointer to it) and the value that it has, or that is one of its values.
pub type ClaimValues = BTreeMap<String, String>;

/// The name or the value of a claim.
fn claim_schema() -> Schema {
    json_schema!({"type": "string", "minLength": 1, "maxLength": MAX_CLAIM, "pattern": PRINTABLE})
}

fn claims_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object", "maxProperties": MAX_CLAIMS, "propertyNames": claim_schema(),
        "additionalProperties": claim_schema(),
    })
}

/// A CI system's token that becomes a service account's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExchangeRule {
    /// The token's `aud`.
    #[schemars(length(min = 1, max = 256), regex(pattern = PRINTABLE))]
    pub audience: String,
    /// What else the token says, such as `repository: acme/shop`: all of it, and one at least.
    #[schemars(schema_with = "claims_schema", extend("minProperties" = 1))]
    pub claims: ClaimValues,
    /// Who brings such a token is this service account.
    pub service_account: Name,
    /// Opens nothing but this project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct IdentityProviderSpec {
    #[schemars(length(max = 200), regex(pattern = PRINTABLE))]
    pub display_name: String,
    /// Its URL, exactly as it writes it itself in its tokens.
    #[schemars(length(min = 1, max = 2048), regex(pattern = "^https?://"))]
    pub issuer: String,
    /// The cloud's id with the provider. Without it nobody signs in by the provider; tokens of CI systems are still taken.
    #[schemars(length(max = 256), regex(pattern = PRINTABLE))]
    pub client_id: String,
    /// For providers that don't take public clients. Never shown: the server keeps it sealed, for this issuer and client, also
    /// when a later change leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = PRINTABLE), extend("writeOnly" = true))]
    pub client_secret: Option<String>,
    /// The client's secret, sealed by the master key for this very issuer. Written by the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub sealed_secret: Option<String>,
    /// `openid` is among them.
    #[schemars(length(min = 1, max = MAX_SCOPES), inner(regex(pattern = SCOPE_PATTERN)))]
    #[schemars(extend("contains" = {"const": "openid"}))]
    pub scopes: Vec<String>,
    /// The claim that names new users: what stands before an `@`, in small letters.
    #[schemars(length(min = 1, max = 256), regex(pattern = PRINTABLE))]
    pub username_claim: String,
    /// The claim that holds the provider's groups: its name, or a JSON pointer.
    #[schemars(length(min = 1, max = 256), regex(pattern = PRINTABLE))]
    pub group_claim: String,
    /// What the provider's groups give here. Groups that are not named give nothing.
    #[schemars(extend("maxProperties" = MAX_MAPPED, "propertyNames" = claim_schema()))]
    pub groups: BTreeMap<String, BTreeSet<Name>>,
    /// Only who has all of these claims may sign in, such as `hd: acme.com`.
    #[schemars(schema_with = "claims_schema")]
    pub require: ClaimValues,
    /// Which tokens of CI systems are taken: the first rule that fits counts.
    #[schemars(length(max = MAX_EXCHANGE_RULES))]
    pub exchange: Vec<ExchangeRule>,
}

impl Default for IdentityProviderSpec {
    fn default() -> Self {
        Self {
            display_name: String::new(),
            issuer: String::new(),
            client_id: String::new(),
            client_secret: None,
            sealed_secret: None,
            scopes: ["openid", "profile", "email"].map(str::to_owned).into(),
            username_claim: "preferred_username".into(),
            group_claim: "groups".into(),
            groups: BTreeMap::new(),
            require: ClaimValues::new(),
            exchange: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct IdentityProviderStatus {
    pub conditions: Vec<Condition>,
}

fn short(field: &str, value: &str, most: usize) -> Vec<FieldError> {
    if value.is_empty() { vec![FieldError::new(field, "is required")] } else { text(field, value, most) }
}

fn claims(field: &str, claims: &ClaimValues) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if claims.len() > MAX_CLAIMS {
        errors.push(FieldError::new(field, format!("at most {MAX_CLAIMS}")));
    }
    for (claim, value) in claims.iter().take(MAX_CLAIMS) {
        let at = format!("{field}.{}", claim.chars().take(80).collect::<String>());
        errors.extend(short(&at, claim, MAX_CLAIM));
        errors.extend(short(&at, value, MAX_CLAIM));
    }
    errors
}

/// What [`is_scope`] takes (RFC 6749, section 3.3).
const SCOPE_PATTERN: &str = r"^[!#-\[\]-~]{1,128}$";

fn is_scope(text: &str) -> bool {
    !text.is_empty() && text.len() <= 128 && text.bytes().all(|b| matches!(b, b'!' | b'#'..=b'[' | b']'..=b'~'))
}

impl Kind for IdentityProvider {
    const KIND: &'static str = "IdentityProvider";
    const PLURAL: &'static str = "identity-providers";
    const SHORT: &'static [&'static str] = &["idp"];
    const ABOUT: &'static str = "An OpenID Connect provider by which people of an organization sign in, and whose CI systems' tokens are taken.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("ISSUER", "/spec/issuer"),
        Column::new("CLIENT", "/spec/clientId"),
        Column::count("GROUPS", "/spec/groups"),
        Column::count("EXCHANGE", "/spec/exchange"),
    ];
    type Spec = IdentityProviderSpec;
    type Status = IdentityProviderStatus;

    fn validate(spec: &IdentityProviderSpec) -> Vec<FieldError> {
        let mut errors = text("spec.displayName", &spec.display_name, 200);
        errors.extend(short("spec.issuer", &spec.issuer, MAX_URL));
        errors.extend(text("spec.clientId", &spec.client_id, 256));
        errors.extend(short("spec.usernameClaim", &spec.username_claim, MAX_CLAIM));
        errors.extend(short("spec.groupClaim", &spec.group_claim, MAX_CLAIM));
        if let Some(secret) = &spec.client_secret {
            errors.extend(short("spec.clientSecret", secret, 512));
            if spec.client_id.is_empty() {
                errors.push(FieldError::new("spec.clientSecret", "a secret is a client's: give its `clientId` too"));
            }
        }
        let long = spec.sealed_secret.as_ref().is_some_and(|s| s.len() > 4096);
        if long {
            errors.push(FieldError::new("spec.sealedSecret", "is written by the server: leave it out"));
        }
        if spec.client_id.is_empty() && spec.exchange.is_empty() {
            let message = "needed for people to sign in; without it, a rule in `exchange` is";
            errors.push(FieldError::new("spec.clientId", message));
        }
        if spec.scopes.len() > MAX_SCOPES || !spec.scopes.iter().all(|s| is_scope(s)) {
            errors.push(FieldError::new("spec.scopes", format!("at most {MAX_SCOPES} words of visible ASCII")));
        } else if !spec.scopes.iter().any(|s| s == "openid") {
            errors.push(FieldError::new("spec.scopes", "`openid` must be among them"));
        }
        if spec.groups.len() > MAX_MAPPED || spec.groups.values().any(|ours| ours.len() > MAX_MAPPED) {
            errors.push(FieldError::new("spec.groups", format!("at most {MAX_MAPPED}")));
        }
        for theirs in spec.groups.keys().take(MAX_MAPPED) {
            errors.extend(short("spec.groups", theirs, MAX_CLAIM));
        }
        errors.extend(claims("spec.require", &spec.require));
        if spec.exchange.len() > MAX_EXCHANGE_RULES {
            errors.push(FieldError::new("spec.exchange", format!("at most {MAX_EXCHANGE_RULES} rules")));
        }
        for (i, rule) in spec.exchange.iter().take(MAX_EXCHANGE_RULES).enumerate() {
            let at = |field: &str| format!("spec.exchange[{i}].{field}");
            errors.extend(short(&at("audience"), &rule.audience, MAX_CLAIM));
            errors.extend(claims(&at("claims"), &rule.claims));
            if rule.claims.is_empty() {
                let message = "one at least: a public provider gives tokens to everybody, with any audience they want";
                errors.push(FieldError::new(at("claims"), message));
            }
        }
        errors
    }

    fn example() -> IdentityProviderSpec {
        let name = |n: &str| n.parse::<Name>().expect("a well-formed name");
        IdentityProviderSpec {
            display_name: "Acme's own".into(),
            issuer: "https://login.acme.example".into(),
            client_id: "cloudnexus".into(),
            groups: [("engineering".to_owned(), [name("developers")].into())].into(),
            ..IdentityProviderSpec::default()
        }
    }
}

/// A person who came from a provider and whose user was deleted: they stay out although the provider knows them. Its name is
/// made of issuer and subject. Private: no route shows it.
#[derive(Debug, Clone)]
pub struct Departure;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DepartureSpec {
    pub issuer: String,
    pub subject: String,
    /// What the user was called.
    pub user: String,
    pub left: Option<Timestamp>,
}

impl Kind for Departure {
    const KIND: &'static str = "Departure";
    const PLURAL: &'static str = "departures";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A person of a provider whose user was deleted.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::READ_ONLY;
    const COLUMNS: &'static [Column] = &[];
    type Spec = DepartureSpec;
    type Status = NoStatus;

    fn validate(_: &DepartureSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> DepartureSpec {
        DepartureSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(change: impl FnOnce(&mut IdentityProviderSpec)) -> Vec<String> {
        let mut spec = IdentityProvider::example();
        change(&mut spec);
        IdentityProvider::validate(&spec).into_iter().map(|e| e.field).collect()
    }

    fn rule() -> ExchangeRule {
        let claims = [("repository".to_owned(), "acme/shop".to_owned())].into();
        let service_account = "deployer".parse().unwrap();
        ExchangeRule { audience: "cloud".into(), claims, service_account, project: None }
    }

    #[test]
    fn what_would_let_strangers_in_is_refused() {
        assert!(fields(|s| s.exchange = vec![rule()]).is_empty());
        assert_eq!(
            fields(|s| s.exchange = vec![ExchangeRule { claims: BTreeMap::new(), ..rule() }]),
            ["spec.exchange[0].claims"]
        );
        assert_eq!(
            fields(|s| s.exchange = vec![ExchangeRule { audience: String::new(), ..rule() }]),
            ["spec.exchange[0].audience"]
        );
        assert_eq!(fields(|s| s.require = [("hd".to_owned(), String::new())].into()), ["spec.require.hd"]);
    }

    #[test]
    fn a_provider_is_for_people_or_for_programs() {
        assert_eq!(fields(|s| s.client_id.clear()), ["spec.clientId"]);
        assert!(fields(|s| (s.client_id, s.exchange) = (String::new(), vec![rule()])).is_empty());
        assert_eq!(fields(|s| s.scopes = vec!["email".into()]), ["spec.scopes"]);
        assert_eq!(fields(|s| s.scopes.push("a b".into())), ["spec.scopes"]);
        assert_eq!(fields(|s| s.issuer.clear()), ["spec.issuer"]);
        assert_eq!(fields(|s| s.username_claim = "x".repeat(257)), ["spec.usernameClaim"]);
        assert_eq!(fields(|s| s.exchange = vec![rule(); MAX_EXCHANGE_RULES + 1]), ["spec.exchange"]);
    }
}
