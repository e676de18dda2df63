//! Who may do what: Cedar policies over a schema made from the declarations of kinds.
//!
//! * A **role** is a policy of `roles.cedar`; a [`Binding`] gives it to principals and groups over a project, an organization
//!   or the fleet. `principal in Role::"viewer"` is true when the principal has that role *over the resource asked for*.
//! * **Custom policies** ([`PolicyText`]) belong to one organization or project and are evaluated only for what lies in it. So
//!   nobody grants anything on what is another's, and a policy costs only the requests to its owner's things.
//! * **Guard-rails** are an organization's forbids. A forbid that holds wins over every permit, wherever either comes from.
//! * **Levels** ([`Level`]): permits count only from the scope that may give them. A project can't permit itself what is the
//!   organization's to give (its quota), an organization not what is the fleet's.
//! * Nothing is permitted unless something permits it. A forbid that can't be evaluated forbids.
//!
//! [`Engine`] is a value: cloning it is cheap (it shares what it holds), [`Engine::apply`] changes one thing in it. Whoever
//! serves requests keeps the newest one behind a pointer that it swaps.
//!
//! Architecture invariant: no socket, file, clock or lock lives here.

mod compile;
mod decide;
mod engine;
mod matrix;
mod request;
mod rules;
mod text;
mod vocabulary;

use std::fmt;
use std::sync::{Arc, LazyLock};

use nexus_model::kind;

pub use compile::check;
pub use engine::{Change, Engine, LockOut, Place};
pub use matrix::{PERSONAS, Row, matrix};
pub use request::{
    Binding, Circumstances, Considered, Decision, Explanation, PolicyText, Principal, Reach, Reason, Request, Resource,
    Role, Source,
};
pub use rules::{EXTRAS, GROUPS, Level, OPERATIONS, VERBS};
pub use vocabulary::{Action, PrincipalKind, Surface, Vocabulary};

/// The words for everything that this release serves.
pub fn vocabulary() -> &'static Arc<Vocabulary> {
    static MADE: LazyLock<Arc<Vocabulary>> = LazyLock::new(|| {
        let surface = Surface { kinds: kind::all(), verbs: VERBS, operations: OPERATIONS, extras: EXTRAS };
        Arc::new(Vocabulary::new(surface).expect("a test makes it"))
    });
    &MADE
}

/// The built-in roles as users read them.
pub const ROLES: &str = compile::ROLES;

/// The most bytes of one policy.
pub const MAX_TEXT: usize = 16 << 10;
/// The most statements of one policy.
pub const MAX_STATEMENTS: usize = 32;
/// The most brackets in each other in a policy.
pub const MAX_DEPTH: usize = 32;
/// The most operators of one statement: characters such as `=`, `&` and `.`, so that `==` counts as two.
pub const MAX_OPERATORS: usize = 512;
/// The most policies of one organization, and of one project.
pub const MAX_POLICIES: usize = 100;
/// The most bytes of all policies of one organization, and of one project: what bounds the cost of a decision.
pub const MAX_SCOPE_TEXT: usize = 256 << 10;
/// The most groups of one principal.
pub const MAX_GROUPS: usize = 256;
/// The most subjects of one binding.
pub const MAX_SUBJECTS: usize = 256;

/// What is wrong in a policy's text, and where: line and column from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub line: usize,
    pub column: usize,
    pub message: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.line, self.column, self.message)
    }
}

fn listed(troubles: &[Trouble]) -> String {
    troubles.iter().map(Trouble::to_string).collect::<Vec<_>>().join("\n")
}

/// Why a policy, binding or question is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("nobody has decided who may do `{0}`: add it to RULES in crates/iam/src/policy/rules.rs")]
    NoRule(String),
    #[error("the policy schema can't be made: {0}")]
    Schema(String),
    #[error(
        "there is no role {0:?}; there are owner, admin, editor, viewer, auditor, billing, fleet-operator, fleet-viewer"
    )]
    NoRole(String),
    #[error("there is no action `{asked}`{}", .near.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    NoAction { asked: String, near: Option<String> },
    #[error("policy {name} is not valid:\n{}", listed(.troubles))]
    Invalid { name: Arc<str>, troubles: Vec<Trouble> },
    #[error("policy {name} has {bytes} bytes; a policy has at most {MAX_TEXT}: split it")]
    TooLong { name: Arc<str>, bytes: usize },
    #[error("policy {name} is empty: write at least one `permit` or `forbid`")]
    Empty { name: Arc<str> },
    #[error("policy {name} has {statements} statements; a policy has at most {MAX_STATEMENTS}: split it")]
    TooManyStatements { name: Arc<str>, statements: usize },
    #[error("policy {name} has slots (`?principal`, `?resource`): name the principals and resources themselves")]
    Template { name: Arc<str> },
    #[error("guard-rail {name} has a `permit`: a guard-rail only forbids; put the permit into a policy")]
    GuardRail { name: Arc<str> },
    #[error("guard-rail {name} is not an organization's: a project's forbids are ordinary policies")]
    GuardRailReach { name: Arc<str> },
    #[error("policy {name} is of the fleet: custom policies are an organization's or a project's")]
    FleetPolicy { name: Arc<str> },
    #[error("{reach} has {MAX_POLICIES} policies, which is the most: join or remove some")]
    TooManyPolicies { reach: Reach },
    #[error("the policies of {reach} would have more than {MAX_SCOPE_TEXT} bytes together: shorten or remove some")]
    TooMuchText { reach: Reach },
    #[error(
        "role {role} can't be given over {reach}: fleet roles are the fleet's, all others an organization's or project's"
    )]
    RoleReach { role: Role, reach: Reach },
    #[error("binding {name} has {subjects} subjects; a binding has 1 to {MAX_SUBJECTS}: use groups")]
    Subjects { name: Arc<str>, subjects: usize },
    #[error("{principal} is in {groups} groups; {MAX_GROUPS} is the most")]
    TooManyGroups { principal: Principal, groups: usize },
}
