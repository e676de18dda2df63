//! One decision: which statements can apply, which entities they need, and what Cedar says of them.
//!
//! 1. The principal's roles over the resource are looked up from the bindings, at the level that the action asks for.
//! 2. The indexes offer the statements whose clauses can fit: built-in, the organization's, the project's.
//! 3. A slice of three entities is made: the principal with its groups and roles, the resource with what it is in, the action
//!    with its groups. Attributes, labels and circumstances are only put in when a statement has conditions.
//! 4. Permits are evaluated until one holds; if one does, all forbids.
//!
//! Cedar sees ancestors as direct parents, so the slice needs no entity between. Conditions can't tell: attributes are plain
//! values and never lead to another entity.

use std::sync::Arc;

use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityUid, EvalResult, Request as Question, RestrictedExpression,
    eval_expression,
};

use super::compile::{Statement, key, type_key};
use super::engine::{Engine, Facts, Grant};
use super::request::{Circumstances, Considered, Decision, Explanation, Principal, Reason, Request, Resource, Role};
use super::rules::{Holder, Level};
use super::vocabulary::{Action, PrincipalKind, ResourceType};

/// A request with everything that bears on it.
struct Case<'a> {
    request: &'a Request<'a>,
    action: &'a Action,
    principal: Arc<Facts>,
    resource: EntityUid,
    resource_parents: Vec<EntityUid>,
    /// The principal's roles over the resource, as bits.
    roles: u8,
    grants: Vec<Arc<Grant>>,
    candidates: Vec<&'a Statement>,
}

/// What Cedar is asked with.
struct Slice {
    question: Question,
    entities: Entities,
}

fn refused(action: &str, by: Vec<Arc<Reason>>, errors: Vec<String>) -> Decision {
    Decision { allowed: false, by, missing_action: Some(action.into()), errors }
}

fn string(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

fn attribute(name: &str, value: &str) -> (String, RestrictedExpression) {
    (name.to_owned(), string(value))
}

/// Whether the resource says of itself what its kind's entities must have.
fn is_complete(resource: &Resource<'_>, kind: &ResourceType) -> bool {
    let (organization, project) = (resource.organization.is_some(), resource.project.is_some());
    match (kind.holder, resource.kind) {
        (_, "Organization") => resource.organization == Some(resource.name),
        (_, "Project") => organization && resource.project == Some(resource.name),
        (Holder::Project, _) => organization && project && resource.region.is_some(),
        (Holder::Organization, _) => organization,
        (Holder::Account, _) => resource.holder.is_some_and(|h| Some(h.organization()) == resource.organization),
        (Holder::Any, _) => organization || !project,
        (Holder::Fleet, _) => !organization && !project,
    }
}

fn id_of(resource: &Resource<'_>, holder: Holder) -> String {
    let parts = match (holder, resource.kind) {
        (_, "Fleet" | "Organization" | "Project") => [None, None],
        (Holder::Project, _) => [resource.region, resource.project],
        (Holder::Fleet, _) => [resource.region, None],
        (Holder::Any, _) => [resource.organization, resource.project],
        (Holder::Organization | Holder::Account, _) => [resource.organization, None],
    };
    let mut id = String::with_capacity(64);
    for part in parts.into_iter().flatten() {
        id.push_str(part);
        id.push('/');
    }
    id.push_str(resource.name);
    id
}

impl Engine {
    fn facts(&self, principal: &Principal) -> Arc<Facts> {
        match self.members.get(principal) {
            Some(facts) => facts.clone(),
            None => Arc::new(Facts::new(&self.vocabulary, principal, Vec::new())),
        }
    }

    /// What a principal was granted where the resource is, if the place may give what `level` asks for.
    fn granted(&self, subjects: &[&Principal], resource: &Resource<'_>, level: Level) -> (u8, Vec<Arc<Grant>>) {
        let (mut roles, mut found) = (0, Vec::new());
        let mut add = |grant: &Arc<Grant>| {
            roles |= grant.role.bit();
            found.push(grant.clone());
        };
        for grants in subjects.iter().filter_map(|s| self.grants.get(*s)) {
            grants.fleet.iter().for_each(&mut add);
            let Some(organization) = resource.organization else { continue };
            if level <= Level::Organization {
                grants.organizations.get(organization).into_iter().flatten().for_each(&mut add);
            }
            if let Some(project) = resource.project.filter(|_| level <= Level::Project) {
                let there = grants.projects.get(project).into_iter().flatten();
                // A project's name may have been another organization's before.
                there.filter(|g| g.reach.owner().is_some_and(|o| **o == *organization)).for_each(&mut add);
            }
        }
        (roles, found)
    }

    /// The roles that an account has over its whole organization: what `rank` protects.
    fn standing(&self, account: &Principal, organization: &str) -> u8 {
        let facts = self.members.get(account);
        let subjects: Vec<&Principal> = std::iter::once(account).chain(facts.iter().flat_map(|f| &f.groups)).collect();
        let whole = Resource { organization: Some(organization), ..Resource::default() };
        self.granted(&subjects, &whole, Level::Organization).0
    }

    fn role_uids(&self, roles: u8) -> impl Iterator<Item = &EntityUid> {
        let held = Role::ALL.into_iter().filter(move |r| roles & r.bit() != 0);
        held.map(|r| &self.vocabulary.roles[r as usize])
    }

    fn case<'a>(&'a self, request: &'a Request<'a>) -> Result<Case<'a>, String> {
        let Request { principal: asker, resource, .. } = request;
        let action = self.vocabulary.action(request.action).ok_or("there is no such action")?;
        let kind = self.vocabulary.resource_type(resource.kind).ok_or("there is no such type of resource")?;
        if !action.resources.contains(&resource.kind) {
            return Err(format!("{} is not asked for {}", action.name, resource.kind));
        }
        if !is_complete(resource, kind) {
            return Err(format!("a request about {} does not say where it is", resource.kind));
        }
        if asker.kind() == PrincipalKind::Group {
            return Err("a group does not ask: its members do".to_owned());
        }
        let principal = self.facts(asker);
        let subjects: Vec<&Principal> = std::iter::once(*asker).chain(&principal.groups).collect();
        let (roles, grants) = self.granted(&subjects, resource, action.level);

        let uid = |entity_type: &str, id: &str| {
            let name = self.vocabulary.resource_type(entity_type).expect("always in the vocabulary").name.clone();
            EntityUid::from_type_name_and_id(name, EntityId::new(id))
        };
        let id = id_of(resource, kind.holder);
        let mut keys = vec![key(resource.kind, &id), type_key(resource.kind)];
        let mut parents = Vec::with_capacity(6);
        let mut within = |entity_type: &str, id: &str| {
            keys.push(key(entity_type, id));
            parents.push(uid(entity_type, id));
        };
        if resource.kind != "Fleet" {
            within("Fleet", "fleet");
        }
        if let Some(organization) = resource.organization.filter(|_| resource.kind != "Organization") {
            within("Organization", organization);
        }
        if let Some(project) = resource.project.filter(|_| resource.kind != "Project") {
            within("Project", project);
        }
        // An account stands where its groups do, and what it holds or grants stands with it.
        let mut standing = resource.grants.map_or(0, Role::bit);
        if let Some(organization) = resource.organization {
            let account = match resource.kind {
                "User" => Some(Principal::user(organization, resource.name)),
                "ServiceAccount" => Some(Principal::service_account(organization, resource.name)),
                "Group" => Some(Principal::group(organization, resource.name)),
                _ => resource.holder.cloned(),
            };
            if let Some(account) = account {
                standing |= self.standing(&account, organization);
                if resource.holder.is_some() {
                    within(account.kind().entity_type(), account.id());
                } else {
                    let groups = self.members.get(&account).map_or(&[][..], |f| &f.groups);
                    groups.iter().for_each(|g| within(g.kind().entity_type(), g.id()));
                }
            }
        }
        for role in Role::ALL.into_iter().filter(|r| standing & r.bit() != 0) {
            keys.push(key("Role", role.name()));
            parents.push(self.vocabulary.roles[role as usize].clone());
        }

        let mut principal_keys = Vec::with_capacity(principal.keys.len() + 2);
        principal_keys.extend_from_slice(&principal.keys);
        let held = Role::ALL.into_iter().filter(|r| roles & r.bit() != 0);
        principal_keys.extend(held.map(|r| key("Role", r.name())));
        let mut candidates = Vec::with_capacity(8);
        self.built_in.candidates(action.index, &principal_keys, &keys, &mut candidates);
        if let Some(tenant) = resource.organization.and_then(|o| self.tenants.get(o)) {
            let mut own = |index: &'a super::compile::Index, level: Level| {
                let from = candidates.len();
                index.candidates(action.index, &principal_keys, &keys, &mut candidates);
                if level < action.level {
                    let mut at = 0;
                    candidates.retain(|s| {
                        at += 1;
                        at <= from || !s.permits
                    });
                }
            };
            own(&tenant.own.index, Level::Organization);
            if let Some(project) = resource.project.and_then(|p| tenant.projects.get(p)) {
                own(&project.index, Level::Project);
            }
        }
        let resource = EntityUid::from_type_name_and_id(kind.name.clone(), EntityId::new(id));
        Ok(Case { request, action, principal, resource, resource_parents: parents, roles, grants, candidates })
    }

    fn slice(&self, case: &Case<'_>) -> Result<Slice, String> {
        let conditional = case.candidates.iter().any(|s| s.conditional);
        let context = match case.candidates.iter().any(|s| s.circumstances) {
            true => circumstances(&case.request.circumstances)?,
            false => Context::empty(),
        };
        let mut principal_parents = Vec::with_capacity(case.principal.parents.len() + 2);
        principal_parents.extend_from_slice(&case.principal.parents);
        principal_parents.extend(self.role_uids(case.roles).cloned());
        let same = case.principal.uid == case.resource;
        let (asker, resource) = (case.request.principal, &case.request.resource);
        // A user who asks about themselves is one entity: theirs as a resource, with the parents of both.
        let mut parents = case.resource_parents.clone();
        if same {
            parents.append(&mut principal_parents);
        }
        let mut entities = vec![case.action.entity.clone()];
        if conditional {
            let attributes = resource_attributes(resource);
            let labels = resource.labels.into_iter().flatten().map(|(k, v)| attribute(k, v));
            let entity = Entity::new_with_tags(case.resource.clone(), attributes, parents, labels);
            entities.push(entity.map_err(|e| e.to_string())?);
            if !same {
                let own = [attribute("name", asker.name()), attribute("organization", asker.organization())];
                let entity = Entity::new_with_tags(case.principal.uid.clone(), own, principal_parents, []);
                entities.push(entity.map_err(|e| e.to_string())?);
            }
        } else {
            entities.push(Entity::new_no_attrs(case.resource.clone(), parents.into_iter().collect()));
            if !same {
                let parents = principal_parents.into_iter().collect();
                entities.push(Entity::new_no_attrs(case.principal.uid.clone(), parents));
            }
        }
        let entities = Entities::from_entities(entities, None).map_err(|e| e.to_string())?;
        let (principal, action) = (case.principal.uid.clone(), case.action.uid.clone());
        let question = Question::new(principal, action, case.resource.clone(), context, None);
        Ok(Slice { question: question.map_err(|e| e.to_string())?, entities })
    }

    /// Whether a statement holds. One that fails holds if it forbids.
    fn holds(statement: &Statement, slice: &Slice, errors: &mut Vec<String>) -> bool {
        let problem = match eval_expression(&slice.question, &slice.entities, &statement.holds) {
            Ok(EvalResult::Bool(holds)) => return holds,
            Ok(other) => format!("{other} is no answer"),
            Err(error) => error.to_string(),
        };
        errors.push(format!("{}: {problem}", statement.reason.description).chars().take(400).collect());
        !statement.permits
    }

    /// What is said to have decided: of a role's policy the bindings that give the role.
    fn reasons(case: &Case<'_>, statement: &Statement) -> Vec<Arc<Reason>> {
        let bindings = case.grants.iter().filter(|g| statement.role == Some(g.role)).map(|g| g.reason.clone());
        let mut reasons: Vec<_> = bindings.collect();
        if reasons.is_empty() {
            reasons.push(statement.reason.clone());
        }
        reasons
    }

    /// Whether a request may be done, and by what.
    pub fn decide(&self, request: &Request<'_>) -> Decision {
        let case = match self.case(request) {
            Ok(case) => case,
            Err(error) => return refused(request.action, Vec::new(), vec![error]),
        };
        // Without a permit that could hold there is nothing to ask Cedar.
        if !case.candidates.iter().any(|s| s.permits) {
            return refused(request.action, Vec::new(), Vec::new());
        }
        let slice = match self.slice(&case) {
            Ok(slice) => slice,
            Err(error) => return refused(request.action, Vec::new(), vec![error]),
        };
        let mut errors = Vec::new();
        // Unconditional ones first: they are the cheaper.
        let permits =
            |conditional: bool| case.candidates.iter().filter(move |s| s.permits && s.conditional == conditional);
        let Some(permit) = permits(false).chain(permits(true)).find(|s| Self::holds(s, &slice, &mut errors)) else {
            return refused(request.action, Vec::new(), errors);
        };
        let forbids = case.candidates.iter().filter(|s| !s.permits);
        let against: Vec<_> =
            forbids.filter(|s| Self::holds(s, &slice, &mut errors)).map(|s| s.reason.clone()).collect();
        if !against.is_empty() {
            return refused(request.action, against, errors);
        }
        Decision { allowed: true, by: Self::reasons(&case, permit), missing_action: None, errors }
    }

    /// Why a request is answered as it is: every statement whose scope fits it, and the roles that would permit it.
    pub fn explain(&self, request: &Request<'_>) -> Explanation {
        let mut explanation = Explanation {
            decision: self.decide(request),
            considered: Vec::new(),
            roles: Vec::new(),
            roles_that_would: Vec::new(),
        };
        let Ok(case) = self.case(request) else { return explanation };
        explanation.roles = Role::ALL.into_iter().filter(|r| case.roles & r.bit() != 0).collect();
        if let Ok(slice) = self.slice(&case) {
            for statement in &case.candidates {
                let holds = Self::holds(statement, &slice, &mut Vec::new());
                let reasons = Self::reasons(&case, statement).into_iter();
                explanation.considered.extend(reasons.map(|reason| Considered { reason, holds }));
            }
        }
        let (level, tenant) = (case.action.level, request.resource.organization.is_some());
        for role in Role::ALL {
            // A role that can't be given where the resource is, or not at the action's level, would not help.
            if !role.is_of_fleet() && (!tenant || level == Level::Fleet) {
                continue;
            }
            let mut with = Vec::new();
            let fits = [key(request.resource.kind, ""), type_key(request.resource.kind)];
            self.built_in.candidates(case.action.index, &[key("Role", role.name())], &fits, &mut with);
            if with.iter().any(|s| s.permits && s.role == Some(role)) {
                explanation.roles_that_would.push(role);
            }
        }
        explanation
    }
}

fn resource_attributes(resource: &Resource<'_>) -> Vec<(String, RestrictedExpression)> {
    let mut attributes = vec![attribute("name", resource.name)];
    let mut add = |name: &str, value: Option<&str>| attributes.extend(value.map(|v| attribute(name, v)));
    add("organization", resource.organization);
    add("project", resource.project.filter(|_| resource.kind != "Project"));
    add("region", resource.region);
    add("holderKind", resource.holder.map(|h| h.kind().entity_type()));
    attributes
}

fn circumstances(of: &Circumstances<'_>) -> Result<Context, String> {
    // What comes by an IPv6 socket from an IPv4 address is that address.
    let ip = of.ip.to_canonical();
    let pairs = [
        ("ip".to_owned(), RestrictedExpression::new_ip(ip.to_string())),
        ("time".to_owned(), RestrictedExpression::new_datetime(of.time.to_string())),
        ("mfa".to_owned(), RestrictedExpression::new_bool(of.mfa)),
        ("requestId".to_owned(), string(of.request_id)),
    ];
    Context::from_pairs(pairs).map_err(|e| e.to_string())
}
