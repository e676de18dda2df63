//! Policies, parsed once and indexed by what their scopes ask for.
//!
//! A decision looks at few of the policies that hold in a scope: those whose `principal`, `action` and `resource` clauses can
//! fit. The index finds them by hashes of entity ids. It may only err by offering too much, for Cedar evaluates the clauses
//! again: two ids with one hash cost time, never a wrong answer.
//!
//! Every statement is kept as the one expression that its clauses and conditions amount to, so that Cedar is asked about the
//! candidates and nothing else. (Its authorizer would put the expression together again for each policy and request, which
//! costs more than to evaluate it.) Any forbid that holds wins, else any permit: a property test holds this against the
//! authorizer with all policies.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::sync::Arc;

use cedar_policy::{
    ActionConstraint, Effect, EntityUid, Expression, Policy, PolicySet, PrincipalConstraint, ResourceConstraint,
    ValidationMode, Validator,
};
use miette::Diagnostic;

use super::request::{PolicyText, Reach, Reason, Role, Source};
use super::vocabulary::Vocabulary;
use super::{MAX_DEPTH, MAX_OPERATORS, MAX_STATEMENTS, MAX_TEXT, PolicyError, Trouble, text};

/// One statement.
#[derive(Debug)]
pub(crate) struct Statement {
    /// Clauses and conditions as one expression.
    pub holds: Expression,
    pub permits: bool,
    /// Has `when` or `unless`: needs attributes.
    pub conditional: bool,
    /// May read the request's circumstances.
    pub circumstances: bool,
    /// The role whose policy this is.
    pub role: Option<Role>,
    pub reason: Arc<Reason>,
    actions: ActionConstraint,
    principal: Option<u64>,
    resource: Option<u64>,
}

/// The hash of an entity's id. Seeded alike everywhere, so that an index can be shared.
pub(crate) fn key(entity_type: &str, id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(entity_type.as_bytes());
    hasher.write_u8(0xff);
    hasher.write(id.as_bytes());
    hasher.finish()
}

pub(crate) fn key_of(uid: &EntityUid) -> u64 {
    key(&uid.type_name().to_string(), AsRef::<str>::as_ref(uid.id()))
}

/// The key of a type, for `is`.
pub(crate) fn type_key(entity_type: &str) -> u64 {
    key(entity_type, "\0is")
}

/// What has to hold for a statement to apply.
fn expression(policy: &Policy) -> Result<Expression, PolicyError> {
    let mut all = Vec::new();
    match policy.principal_constraint() {
        PrincipalConstraint::Any => {}
        PrincipalConstraint::In(uid) => all.push(format!("principal in {uid}")),
        PrincipalConstraint::Eq(uid) => all.push(format!("principal == {uid}")),
        PrincipalConstraint::Is(name) => all.push(format!("principal is {name}")),
        PrincipalConstraint::IsIn(name, uid) => all.push(format!("principal is {name} in {uid}")),
    }
    match policy.action_constraint() {
        ActionConstraint::Any => {}
        ActionConstraint::In(uids) => {
            let uids: Vec<_> = uids.iter().map(EntityUid::to_string).collect();
            all.push(format!("action in [{}]", uids.join(", ")));
        }
        ActionConstraint::Eq(uid) => all.push(format!("action == {uid}")),
    }
    match policy.resource_constraint() {
        ResourceConstraint::Any => {}
        ResourceConstraint::In(uid) => all.push(format!("resource in {uid}")),
        ResourceConstraint::Eq(uid) => all.push(format!("resource == {uid}")),
        ResourceConstraint::Is(name) => all.push(format!("resource is {name}")),
        ResourceConstraint::IsIn(name, uid) => all.push(format!("resource is {name} in {uid}")),
    }
    all.extend(text::conditions(&policy.to_cedar().unwrap_or_default()));
    if all.is_empty() {
        all.push("true".to_owned());
    }
    all.join(" && ").parse().map_err(|e: cedar_policy::ParseErrors| PolicyError::Schema(e.to_string()))
}

impl Statement {
    fn new(policy: &Policy, text: &str, role: Option<Role>, reason: Reason) -> Result<Self, PolicyError> {
        let principal = match policy.principal_constraint() {
            PrincipalConstraint::Any => None,
            PrincipalConstraint::In(uid) | PrincipalConstraint::Eq(uid) | PrincipalConstraint::IsIn(_, uid) => {
                Some(key_of(&uid))
            }
            PrincipalConstraint::Is(name) => Some(type_key(&name.to_string())),
        };
        let resource = match policy.resource_constraint() {
            ResourceConstraint::Any => None,
            ResourceConstraint::In(uid) | ResourceConstraint::Eq(uid) | ResourceConstraint::IsIn(_, uid) => {
                Some(key_of(&uid))
            }
            ResourceConstraint::Is(name) => Some(type_key(&name.to_string())),
        };
        let actions = policy.action_constraint();
        let (permits, conditional) = (policy.effect() == Effect::Permit, policy.has_non_scope_constraint());
        let circumstances = conditional && text.contains("context");
        let holds = expression(policy)?;
        let reason = Arc::new(reason);
        Ok(Self { holds, permits, conditional, circumstances, role, reason, actions, principal, resource })
    }

    /// Whether the resource clause can fit something with these keys.
    pub fn fits(&self, resource: &[u64]) -> bool {
        self.resource.is_none_or(|r| resource.contains(&r))
    }
}

/// The line and column, both from 1, of a byte of a text.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
    (line, column)
}

fn trouble(text: &str, e: &dyn Diagnostic) -> Trouble {
    let at = e.labels().and_then(|mut l| l.next()).map_or(0, |l| l.offset());
    let (line, column) = position(text, at);
    let mut message: String = e.to_string().chars().take(400).collect();
    if let Some(help) = e.help() {
        message.extend(format!("; {help}").chars().take(400));
    }
    Trouble { line, column, message }
}

/// A custom policy that was read.
#[derive(Debug, Clone)]
pub(crate) struct Compiled {
    pub source: PolicyText,
    pub statements: Vec<Arc<Statement>>,
}

/// Reads a policy without holding it against a schema: what was once accepted stays in force when the schema has moved on.
pub(crate) fn read(source: &PolicyText) -> Result<Compiled, PolicyError> {
    let set = parse(source)?;
    let mut policies: Vec<Policy> = set.policies().cloned().collect();
    // `policy0`, `policy1` …: the order of the text.
    policies.sort_by_key(|p| AsRef::<str>::as_ref(p.id()).trim_start_matches("policy").parse::<usize>().unwrap_or(0));
    let mut statements = Vec::with_capacity(policies.len());
    for (index, policy) in policies.into_iter().enumerate() {
        let permits = policy.effect() == Effect::Permit;
        if permits && source.guard_rail {
            return Err(PolicyError::GuardRail { name: source.name.clone() });
        }
        let what = if source.guard_rail { "guard-rail" } else { "policy" };
        let about = policy.annotation("description").or_else(|| policy.annotation("id")).unwrap_or_default();
        let colon = if about.is_empty() { "" } else { ": " };
        let description: String =
            format!("{what} {} of {}, statement {}{colon}{about}", source.name, source.reach, index + 1);
        let reason = Reason {
            source: Source::Policy {
                name: source.name.clone(),
                reach: source.reach.clone(),
                guard_rail: source.guard_rail,
                statement: index + 1,
            },
            permits,
            description: description.chars().take(300).collect(),
        };
        statements.push(Arc::new(Statement::new(&policy, &source.text, None, reason)?));
    }
    Ok(Compiled { source: source.clone(), statements })
}

fn parse(source: &PolicyText) -> Result<PolicySet, PolicyError> {
    if source.text.len() > MAX_TEXT {
        return Err(PolicyError::TooLong { name: source.name.clone(), bytes: source.text.len() });
    }
    if let Some(at) = text::too_involved(&source.text) {
        let (line, column) = position(&source.text, at);
        let message = format!(
            "too involved: at most {MAX_DEPTH} brackets or `if`s in each other, and {MAX_OPERATORS} operators in a statement"
        );
        let troubles = vec![Trouble { line, column, message }];
        return Err(PolicyError::Invalid { name: source.name.clone(), troubles });
    }
    if source.guard_rail && !matches!(source.reach, Reach::Organization(_)) {
        return Err(PolicyError::GuardRailReach { name: source.name.clone() });
    }
    if source.reach == Reach::Fleet {
        return Err(PolicyError::FleetPolicy { name: source.name.clone() });
    }
    let set: PolicySet = source.text.parse().map_err(|e: cedar_policy::ParseErrors| PolicyError::Invalid {
        name: source.name.clone(),
        troubles: e.iter().take(10).map(|e| trouble(&source.text, e)).collect(),
    })?;
    if set.templates().next().is_some() {
        return Err(PolicyError::Template { name: source.name.clone() });
    }
    match set.num_of_policies() {
        0 => Err(PolicyError::Empty { name: source.name.clone() }),
        n if n > MAX_STATEMENTS => Err(PolicyError::TooManyStatements { name: source.name.clone(), statements: n }),
        _ => Ok(set),
    }
}

/// Holds a policy against the schema, strictly. For whoever writes it, before it is stored: a policy with unlimited scope is
/// checked for every action, principal and resource, which takes milliseconds.
pub fn check(vocabulary: &Vocabulary, source: &PolicyText) -> Result<(), PolicyError> {
    let set = parse(source)?;
    read(source)?;
    let result = Validator::new(vocabulary.schema().clone()).validate(&set, ValidationMode::Strict);
    let mut troubles: Vec<Trouble> = Vec::new();
    for error in result.validation_errors() {
        let trouble = trouble(&source.text, error);
        // One mistake is found once for every kind that it touches.
        if !troubles.iter().any(|t| (t.line, t.column) == (trouble.line, trouble.column)) && troubles.len() < 10 {
            troubles.push(trouble);
        }
    }
    if troubles.is_empty() { Ok(()) } else { Err(PolicyError::Invalid { name: source.name.clone(), troubles }) }
}

/// The built-in policies.
pub(crate) const ROLES: &str = include_str!("roles.cedar");

pub(crate) fn built_in() -> Result<Vec<Arc<Statement>>, PolicyError> {
    let set: PolicySet = ROLES.parse().map_err(|e: cedar_policy::ParseErrors| PolicyError::Schema(e.to_string()))?;
    let mut statements = Vec::new();
    for policy in set.policies() {
        let id: Arc<str> = policy.annotation("id").unwrap_or_default().into();
        let role = policy.annotation("role").map(str::parse::<Role>).transpose()?;
        let about = policy.annotation("description").unwrap_or_default();
        let reason = Reason {
            permits: policy.effect() == Effect::Permit,
            description: format!("built-in rule {id}: {about}"),
            source: Source::BuiltIn { id },
        };
        // Conditions of the built-in policies never look at circumstances.
        statements.push(Arc::new(Statement::new(policy, "", role, reason)?));
    }
    Ok(statements)
}

/// The statements of one scope by what they ask for.
#[derive(Debug, Default)]
pub(crate) struct Index {
    statements: Vec<Arc<Statement>>,
    any_action: ByPrincipal,
    by_action: HashMap<u16, ByPrincipal>,
}

#[derive(Debug, Default)]
struct ByPrincipal {
    any: Vec<u32>,
    keyed: HashMap<u64, Vec<u32>>,
}

impl ByPrincipal {
    fn add(&mut self, principal: Option<u64>, statement: u32) {
        match principal {
            None => self.any.push(statement),
            Some(key) => self.keyed.entry(key).or_default().push(statement),
        }
    }
}

impl Index {
    pub fn new(vocabulary: &Vocabulary, statements: Vec<Arc<Statement>>) -> Self {
        let mut index = Self::default();
        for (at, statement) in statements.iter().enumerate() {
            let at = u32::try_from(at).expect("scopes hold few thousand statements");
            let uids: &[EntityUid] = match &statement.actions {
                ActionConstraint::Any => {
                    index.any_action.add(statement.principal, at);
                    continue;
                }
                ActionConstraint::In(uids) => uids,
                ActionConstraint::Eq(uid) => std::slice::from_ref(uid),
            };
            for action in vocabulary.actions() {
                let named = uids.iter().any(|uid| {
                    let id: &str = uid.id().as_ref();
                    id == &*action.name || action.groups.contains(&id)
                });
                if named {
                    index.by_action.entry(action.index).or_default().add(statement.principal, at);
                }
            }
        }
        index.statements = statements;
        index
    }

    /// The statements that can apply to an action of a principal with these keys, to a resource with those.
    pub fn candidates<'a>(&'a self, action: u16, principal: &[u64], resource: &[u64], found: &mut Vec<&'a Statement>) {
        for by in [Some(&self.any_action), self.by_action.get(&action)].into_iter().flatten() {
            let keyed = principal.iter().filter(|_| !by.keyed.is_empty()).filter_map(|k| by.keyed.get(k)).flatten();
            let all = by.any.iter().chain(keyed).map(|at| &*self.statements[*at as usize]);
            found.extend(all.filter(|s| s.fits(resource)));
        }
    }
}
