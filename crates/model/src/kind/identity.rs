//! Who may do what: the people and programs of an organization, and what they are given.
//!
//! Of credentials, what can be read of them is here too; what a password's hash or a key is kept in is a *private* kind,
//! which no route, schema or list shows.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, Scope, UserIdentity, Verbs};
use crate::{Condition, FieldError, Name, Timestamp};

/// The most members of a group, and subjects of a role binding.
pub const MAX_SUBJECTS: usize = 256;
/// Texts for people hold no control characters.
pub(super) const PRINTABLE: &str = r"^[^\u0000-\u001f\u007f-\u009f]*$";
const ADDRESS: &str = r"^$|^[^\u0000-\u001f\u007f-\u009f]*@[^\u0000-\u001f\u007f-\u009f]*$";
/// The most bytes of a policy.
pub const MAX_POLICY: usize = 16 << 10;

#[derive(Debug, Clone)]
pub struct User;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UserSpec {
    #[schemars(length(max = 200), regex(pattern = PRINTABLE))]
    pub display_name: String,
    /// Where invitations go. Not an identity: people sign in by organization and name.
    #[schemars(length(max = 254), regex(pattern = ADDRESS))]
    pub email: String,
    /// Nothing is allowed to it, and its sessions end.
    pub disabled: bool,
    /// Who signs in as this user by an identity provider. A replace that leaves it out keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<UserIdentity>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UserStatus {
    pub conditions: Vec<Condition>,
}

pub(super) fn text(field: &str, value: &str, most: usize) -> Vec<FieldError> {
    if value.chars().count() > most || value.chars().any(char::is_control) {
        vec![FieldError::new(field, format!("at most {most} characters, none of them a control character"))]
    } else {
        Vec::new()
    }
}

impl Kind for User {
    const KIND: &'static str = "User";
    const PLURAL: &'static str = "users";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A person of an organization.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] =
        &[Column::new("DISPLAY NAME", "/spec/displayName"), Column::new("DISABLED", "/spec/disabled")];
    type Spec = UserSpec;
    type Status = UserStatus;

    fn validate(spec: &UserSpec) -> Vec<FieldError> {
        let mut errors = text("spec.displayName", &spec.display_name, 200);
        errors.extend(text("spec.email", &spec.email, 254));
        if !spec.email.is_empty() && !spec.email.contains('@') {
            errors.push(FieldError::new("spec.email", "an address such as ada@example.org"));
        }
        errors.extend(spec.identity.iter().flat_map(UserIdentity::validate));
        errors
    }

    fn example() -> UserSpec {
        UserSpec { display_name: "Ada Lovelace".into(), email: "ada@example.org".into(), ..UserSpec::default() }
    }
}

#[derive(Debug, Clone)]
pub struct ServiceAccount;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceAccountSpec {
    #[schemars(length(max = 200), regex(pattern = PRINTABLE))]
    pub display_name: String,
    /// Nothing is allowed to it, and its tokens and keys are refused.
    pub disabled: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceAccountStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for ServiceAccount {
    const KIND: &'static str = "ServiceAccount";
    const PLURAL: &'static str = "service-accounts";
    const SHORT: &'static [&'static str] = &["sa"];
    const ABOUT: &'static str = "A program of an organization: it has tokens and access keys, and no password.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] =
        &[Column::new("DISPLAY NAME", "/spec/displayName"), Column::new("DISABLED", "/spec/disabled")];
    type Spec = ServiceAccountSpec;
    type Status = ServiceAccountStatus;

    fn validate(spec: &ServiceAccountSpec) -> Vec<FieldError> {
        text("spec.displayName", &spec.display_name, 200)
    }

    fn example() -> ServiceAccountSpec {
        ServiceAccountSpec { display_name: "The deployer of the shop".into(), disabled: false }
    }
}

#[derive(Debug, Clone)]
pub struct Group;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GroupSpec {
    #[schemars(length(max = 200), regex(pattern = PRINTABLE))]
    pub display_name: String,
    #[schemars(length(max = 256))]
    pub users: BTreeSet<Name>,
    #[schemars(length(max = 256))]
    pub service_accounts: BTreeSet<Name>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GroupStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for Group {
    const KIND: &'static str = "Group";
    const PLURAL: &'static str = "groups";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "Users and service accounts of an organization that are given roles together.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] =
        &[Column::count("USERS", "/spec/users"), Column::count("SERVICE ACCOUNTS", "/spec/serviceAccounts")];
    type Spec = GroupSpec;
    type Status = GroupStatus;

    fn validate(spec: &GroupSpec) -> Vec<FieldError> {
        let mut errors = text("spec.displayName", &spec.display_name, 200);
        if spec.users.len() + spec.service_accounts.len() > MAX_SUBJECTS {
            errors.push(FieldError::new("spec.users", format!("at most {MAX_SUBJECTS} members in all")));
        }
        errors
    }

    fn example() -> GroupSpec {
        let name = |n: &str| n.parse().expect("a well-formed name");
        GroupSpec { display_name: "Developers".into(), users: [name("ada")].into(), ..GroupSpec::default() }
    }
}

#[derive(Debug, Clone)]
pub struct RoleBinding;

/// Who is given something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    pub kind: SubjectKind,
    pub name: Name,
    /// Another organization's: without it, the binding's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<Name>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum SubjectKind {
    User,
    ServiceAccount,
    Group,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RoleBindingSpec {
    /// `owner`, `admin`, `editor`, `viewer`, `auditor` or `billing`.
    #[schemars(length(max = 63))]
    pub role: String,
    /// Over this project of the organization; without it, over the whole organization.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    #[schemars(length(min = 1, max = 256))]
    pub subjects: Vec<Subject>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RoleBindingStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for RoleBinding {
    const KIND: &'static str = "RoleBinding";
    const PLURAL: &'static str = "role-bindings";
    const SHORT: &'static [&'static str] = &["rb"];
    const ABOUT: &'static str =
        "Gives a role over an organization, or one of its projects, to users, service accounts and groups.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("ROLE", "/spec/role"),
        Column::new("PROJECT", "/spec/project"),
        Column::count("SUBJECTS", "/spec/subjects"),
    ];
    type Spec = RoleBindingSpec;
    type Status = RoleBindingStatus;

    fn validate(spec: &RoleBindingSpec) -> Vec<FieldError> {
        if (1..=MAX_SUBJECTS).contains(&spec.subjects.len()) {
            Vec::new()
        } else {
            vec![FieldError::new("spec.subjects", format!("1 to {MAX_SUBJECTS}"))]
        }
    }

    fn example() -> RoleBindingSpec {
        let name = |n: &str| n.parse().expect("a well-formed name");
        RoleBindingSpec {
            role: "editor".into(),
            project: Some(name("shop")),
            subjects: vec![Subject { kind: SubjectKind::Group, name: name("developers"), organization: None }],
        }
    }
}

#[derive(Debug, Clone)]
pub struct Policy;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicySpec {
    /// For this project of the organization; without it, for all that the organization owns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    /// Only forbids, of the whole organization, which its projects can't lift.
    pub guard_rail: bool,
    /// Cedar, checked against the published schema when it is written.
    #[schemars(length(min = 1, max = 16384))]
    pub text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for Policy {
    const KIND: &'static str = "Policy";
    const PLURAL: &'static str = "policies";
    const SHORT: &'static [&'static str] = &["pol"];
    const ABOUT: &'static str = "What is permitted and forbidden beside the built-in roles, in Cedar.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] =
        &[Column::new("PROJECT", "/spec/project"), Column::new("GUARD RAIL", "/spec/guardRail")];
    type Spec = PolicySpec;
    type Status = PolicyStatus;

    fn validate(spec: &PolicySpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.text.trim().is_empty() || spec.text.len() > MAX_POLICY {
            errors.push(FieldError::new("spec.text", format!("1 to {MAX_POLICY} bytes")));
        }
        if spec.guard_rail && spec.project.is_some() {
            errors.push(FieldError::new("spec.guardRail", "a guard-rail is the whole organization's"));
        }
        errors
    }

    fn example() -> PolicySpec {
        PolicySpec {
            project: None,
            guard_rail: true,
            text: "forbid (principal, action == Action::\"instances:exec\", resource)\nunless { context.mfa };\n"
                .into(),
        }
    }
}

/// Whose a credential is: a user or service account of the credential's organization.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    pub kind: HolderKind,
    pub name: Name,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum HolderKind {
    User,
    ServiceAccount,
}

#[derive(Debug, Clone)]
pub struct Token;

/// The longest life of a token, in days.
pub const MAX_TOKEN_DAYS: u64 = 366;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TokenSpec {
    /// Without it, whoever creates the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// At most 366 days ahead; without it, in 30 days.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// Opens nothing but this project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    #[schemars(length(max = 200), regex(pattern = PRINTABLE))]
    pub description: String,
    /// By which the token is known: the SHA-256 of its text. Written by the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(equal = 64))]
    pub hash: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TokenStatus {
    /// The token itself, in the answer to its create and nowhere else.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub token: Option<String>,
    pub conditions: Vec<Condition>,
}

impl Kind for Token {
    const KIND: &'static str = "Token";
    const PLURAL: &'static str = "tokens";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str =
        "A long-lived bearer token of a user or service account. Its text is told once, in the answer to its create.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs { create: true, update: false, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("HOLDER", "/spec/holder/name"),
        Column::new("PROJECT", "/spec/project"),
        Column::new("EXPIRES", "/spec/expires"),
    ];
    type Spec = TokenSpec;
    type Status = TokenStatus;

    fn validate(spec: &TokenSpec) -> Vec<FieldError> {
        text("spec.description", &spec.description, 200)
    }

    fn example() -> TokenSpec {
        let name = |n: &str| n.parse().expect("a well-formed name");
        TokenSpec {
            holder: Some(Holder { kind: HolderKind::ServiceAccount, name: name("deployer") }),
            project: Some(name("shop")),
            description: "for the pipeline".into(),
            ..TokenSpec::default()
        }
    }
}

#[derive(Debug, Clone)]
pub struct AccessKey;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessKeySpec {
    /// Without it, whoever creates the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// Opens nothing but this project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    #[schemars(length(max = 200), regex(pattern = PRINTABLE))]
    pub description: String,
    /// The public half. Written by the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(equal = 20))]
    pub id: Option<String>,
    /// The secret half, sealed by the master key. Written by the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub sealed: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessKeyStatus {
    /// The secret half, in the answer to the key's create and nowhere else.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub secret: Option<String>,
    pub conditions: Vec<Condition>,
}

impl Kind for AccessKey {
    const KIND: &'static str = "AccessKey";
    const PLURAL: &'static str = "access-keys";
    const SHORT: &'static [&'static str] = &["ak"];
    const ABOUT: &'static str =
        "An id and a secret by which programs sign requests (AWS Signature Version 4) or get access tokens.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs { create: true, update: false, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("ID", "/spec/id"),
        Column::new("HOLDER", "/spec/holder/name"),
        Column::new("PROJECT", "/spec/project"),
    ];
    type Spec = AccessKeySpec;
    type Status = AccessKeyStatus;

    fn validate(spec: &AccessKeySpec) -> Vec<FieldError> {
        text("spec.description", &spec.description, 200)
    }

    fn example() -> AccessKeySpec {
        let name = |n: &str| n.parse().expect("a well-formed name");
        AccessKeySpec {
            holder: Some(Holder { kind: HolderKind::ServiceAccount, name: name("deployer") }),
            project: Some(name("shop")),
            ..AccessKeySpec::default()
        }
    }
}

#[derive(Debug, Clone)]
pub struct Session;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// Until when it can be refreshed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// How its holder proved who they are (RFC 8176): `pwd`, `otp`.
    #[schemars(length(max = 8))]
    pub factors: Vec<String>,
    /// Opens nothing but this project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    /// The id of the access key by which it was opened, and with which it ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub access_key: Option<String>,
    /// From where it was opened.
    #[schemars(length(max = 64))]
    pub address: String,
    /// The SHA-256 of the refresh token that is good now, and of the one before it: who brings that one has copied it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refresh: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spent: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for Session {
    const KIND: &'static str = "Session";
    const PLURAL: &'static str = "sessions";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A sign-in that has not ended. Deleting it ends it, and what was signed in by it.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs { create: false, update: false, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("HOLDER", "/spec/holder/name"),
        Column::new("FROM", "/spec/address"),
        Column::new("EXPIRES", "/spec/expires"),
    ];
    type Spec = SessionSpec;
    type Status = SessionStatus;

    fn validate(_: &SessionSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> SessionSpec {
        let holder = Holder { kind: HolderKind::User, name: "ada".parse().expect("a well-formed name") };
        SessionSpec { holder: Some(holder), factors: vec!["pwd".into()], ..SessionSpec::default() }
    }
}

/// What a user proves themself with. Private: no route shows it.
#[derive(Debug, Clone)]
pub struct Credential;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CredentialSpec {
    /// An argon2id hash in PHC form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Sets a first or new password, once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invitation: Option<Invitation>,
    /// Asked for beside the password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second_factor: Option<SecondFactor>,
}

/// One-time codes (RFC 6238).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecondFactor {
    /// The shared secret, sealed by the master key.
    pub secret: String,
    /// It is asked for only when its holder has shown that they can make codes.
    pub confirmed: bool,
    /// The time step of the last code that was taken: no code is taken twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_step: Option<u64>,
    /// The hashes of recovery codes that are left.
    #[serde(default)]
    pub recovery: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Invitation {
    /// The SHA-256 of its text.
    pub hash: String,
    pub expires: Timestamp,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NoStatus {}

impl Kind for Credential {
    const KIND: &'static str = "Credential";
    const PLURAL: &'static str = "credentials";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "What a user proves themself with.";
    const SCOPE: Scope = Scope::Organization;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::READ_ONLY;
    const COLUMNS: &'static [Column] = &[];
    type Spec = CredentialSpec;
    type Status = NoStatus;

    fn validate(_: &CredentialSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> CredentialSpec {
        CredentialSpec::default()
    }
}

/// The public half of a key by which a server signs access tokens. Private: it is published as a JWK set.
#[derive(Debug, Clone)]
pub struct SigningKey;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SigningKeySpec {
    /// 32 bytes of an Ed25519 public key, in hexadecimal.
    pub key: String,
    /// The server that has the private half.
    pub server: String,
}

impl Kind for SigningKey {
    const KIND: &'static str = "SigningKey";
    const PLURAL: &'static str = "signing-keys";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A key by which a server signs access tokens.";
    const SCOPE: Scope = Scope::Global;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::READ_ONLY;
    const COLUMNS: &'static [Column] = &[];
    type Spec = SigningKeySpec;
    type Status = NoStatus;

    fn validate(_: &SigningKeySpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> SigningKeySpec {
        SigningKeySpec { key: "00".repeat(32), server: "s1".into() }
    }
}
