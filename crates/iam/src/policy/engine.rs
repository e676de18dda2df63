//! What is known at one moment: policies, bindings, who is in which group. Decisions over it are in `decide`.
//!
//! Everything is shared by reference, so a change copies what it touches and no more: the policies of one scope are indexed
//! anew, everything else stays.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use cedar_policy::{EntityId, EntityUid};
use nexus_model::kind;
use nexus_model::selector::Labels;

use super::compile::{self, Compiled, Index, key, type_key};
use super::request::{
    Binding, Circumstances, Decision, PolicyText, Principal, Reach, Reason, Request, Resource, Role, Source,
};
use super::vocabulary::{PrincipalKind, Vocabulary};
use super::{MAX_GROUPS, MAX_POLICIES, MAX_SCOPE_TEXT, MAX_SUBJECTS, PolicyError};

/// One step from one state of the engine to the next. Each replaces what was there by that name.
#[derive(Debug, Clone)]
pub enum Change {
    Policy(PolicyText),
    RemovePolicy {
        reach: Reach,
        name: Arc<str>,
    },
    Binding(Binding),
    RemoveBinding {
        reach: Reach,
        name: Arc<str>,
    },
    /// A user or service account that may sign in, and its groups.
    Member {
        principal: Principal,
        groups: Vec<Principal>,
    },
    /// It is gone or may not sign in. Bindings that name it stay, and grant it nothing while it can't ask.
    RemoveMember(Principal),
    /// A project or organization is gone, and what was granted over it. A later one of that name begins with nothing.
    Forget(Reach),
}

/// Why a change would leave an organization without anybody who can change its policies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockOut {
    /// The owners that were tried.
    pub owners: usize,
    /// What would refuse the last of them; empty when there is no owner.
    pub by: Vec<Arc<Reason>>,
    pub missing_action: Arc<str>,
}

/// Where something is, for [`Engine::can`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Place<'a> {
    pub organization: Option<&'a str>,
    pub project: Option<&'a str>,
    pub region: Option<&'a str>,
    pub labels: Option<&'a Labels>,
}

/// The custom policies of one organization or project.
#[derive(Debug, Default, Clone)]
pub(crate) struct Policies {
    texts: BTreeMap<Arc<str>, Arc<Compiled>>,
    pub index: Arc<Index>,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Tenant {
    pub own: Policies,
    pub projects: imbl::HashMap<Arc<str>, Arc<Policies>>,
}

/// A role that a subject has, and by which binding.
#[derive(Debug)]
pub(crate) struct Grant {
    pub role: Role,
    pub reach: Reach,
    pub reason: Arc<Reason>,
}

/// What one subject was granted, by where.
#[derive(Debug, Default, Clone)]
pub(crate) struct Grants {
    pub fleet: Vec<Arc<Grant>>,
    pub organizations: HashMap<Arc<str>, Vec<Arc<Grant>>>,
    pub projects: HashMap<Arc<str>, Vec<Arc<Grant>>>,
}

impl Grants {
    fn at(&mut self, reach: &Reach) -> &mut Vec<Arc<Grant>> {
        match reach {
            Reach::Fleet => &mut self.fleet,
            Reach::Organization(organization) => self.organizations.entry(organization.clone()).or_default(),
            Reach::Project { project, .. } => self.projects.entry(project.clone()).or_default(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Grant>> {
        let deeper = self.organizations.values().chain(self.projects.values()).flatten();
        self.fleet.iter().chain(deeper)
    }

    fn is_empty(&self) -> bool {
        self.all().next().is_none()
    }
}

/// What a principal brings to every request, worked out once.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub groups: Vec<Principal>,
    pub uid: EntityUid,
    /// Its groups and organization.
    pub parents: Vec<EntityUid>,
    /// Of itself, its type and its parents.
    pub keys: Vec<u64>,
}

impl Facts {
    pub fn new(vocabulary: &Vocabulary, principal: &Principal, groups: Vec<Principal>) -> Self {
        let uid = |p: &Principal| {
            EntityUid::from_type_name_and_id(vocabulary.principal_type(p.kind()).clone(), EntityId::new(p.id()))
        };
        let mut parents: Vec<EntityUid> = groups.iter().map(uid).collect();
        let own = principal.kind().entity_type();
        let mut keys = vec![key(own, principal.id()), type_key(own)];
        keys.extend(groups.iter().map(|g| key(g.kind().entity_type(), g.id())));
        let organization = principal.organization();
        if !organization.is_empty() {
            let known = vocabulary.resource_type("Organization").expect("always in the vocabulary");
            parents.push(EntityUid::from_type_name_and_id(known.name.clone(), EntityId::new(organization)));
            keys.push(key("Organization", organization));
        }
        Self { uid: uid(principal), groups, parents, keys }
    }
}

/// Everything that decisions go by, at one moment. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    pub(crate) vocabulary: Arc<Vocabulary>,
    pub(crate) built_in: Arc<Index>,
    pub(crate) tenants: imbl::HashMap<Arc<str>, Arc<Tenant>>,
    pub(crate) grants: imbl::HashMap<Principal, Arc<Grants>>,
    pub(crate) members: imbl::HashMap<Principal, Arc<Facts>>,
    bindings: imbl::HashMap<(Reach, Arc<str>), Arc<Binding>>,
}

impl Engine {
    /// An engine that knows the built-in roles and nobody.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Result<Self, PolicyError> {
        let built_in = Arc::new(Index::new(&vocabulary, compile::built_in()?));
        Ok(Self {
            vocabulary,
            built_in,
            tenants: imbl::HashMap::new(),
            grants: imbl::HashMap::new(),
            members: imbl::HashMap::new(),
            bindings: imbl::HashMap::new(),
        })
    }

    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Makes one change. On an error nothing is changed. Does not hold policies against the schema: [`super::check`] does.
    pub fn apply(&mut self, change: Change) -> Result<(), PolicyError> {
        match change {
            Change::Policy(text) => self.set_policy(&text)?,
            Change::RemovePolicy { reach, name } => self.remove_policy(&reach, &name),
            Change::Binding(binding) => {
                check_binding(&binding)?;
                self.remove_binding(&binding.reach, &binding.name);
                self.add_binding(binding);
            }
            Change::RemoveBinding { reach, name } => self.remove_binding(&reach, &name),
            Change::Member { principal, groups } => {
                if groups.len() > MAX_GROUPS {
                    return Err(PolicyError::TooManyGroups { principal, groups: groups.len() });
                }
                let facts = Facts::new(&self.vocabulary, &principal, groups);
                self.members.insert(principal, Arc::new(facts));
            }
            Change::RemoveMember(principal) => {
                self.members.remove(&principal);
            }
            Change::Forget(reach) => self.forget(&reach),
        }
        Ok(())
    }

    fn set_policy(&mut self, text: &PolicyText) -> Result<(), PolicyError> {
        let compiled = compile::read(text)?;
        let mut policies = self.policies(&text.reach).cloned().unwrap_or_default();
        let old = policies.texts.insert(text.name.clone(), Arc::new(compiled));
        if old.is_none() && policies.texts.len() > MAX_POLICIES {
            return Err(PolicyError::TooManyPolicies { reach: text.reach.clone() });
        }
        if policies.texts.values().map(|c| c.source.text.len()).sum::<usize>() > MAX_SCOPE_TEXT {
            return Err(PolicyError::TooMuchText { reach: text.reach.clone() });
        }
        self.put_policies(&text.reach, policies);
        Ok(())
    }

    fn remove_policy(&mut self, reach: &Reach, name: &str) {
        let Some(mut policies) = self.policies(reach).cloned() else { return };
        if policies.texts.remove(name).is_some() {
            self.put_policies(reach, policies);
        }
    }

    fn policies(&self, reach: &Reach) -> Option<&Policies> {
        match reach {
            Reach::Fleet => None,
            Reach::Organization(organization) => self.tenants.get(organization).map(|t| &t.own),
            Reach::Project { organization, project } => {
                self.tenants.get(organization).and_then(|t| t.projects.get(project)).map(|p| &**p)
            }
        }
    }

    fn put_policies(&mut self, reach: &Reach, mut policies: Policies) {
        let Some(organization) = reach.owner() else { return };
        let statements = policies.texts.values().flat_map(|c| c.statements.iter().cloned()).collect();
        policies.index = Arc::new(Index::new(&self.vocabulary, statements));
        let mut tenant = self.tenants.get(organization).map(|t| (**t).clone()).unwrap_or_default();
        match reach {
            Reach::Project { project, .. } if policies.texts.is_empty() => {
                tenant.projects.remove(project);
            }
            Reach::Project { project, .. } => {
                tenant.projects.insert(project.clone(), Arc::new(policies));
            }
            _ => tenant.own = policies,
        }
        if tenant.own.texts.is_empty() && tenant.projects.is_empty() {
            self.tenants.remove(organization);
        } else {
            self.tenants.insert(organization.clone(), Arc::new(tenant));
        }
    }

    fn add_binding(&mut self, binding: Binding) {
        let Binding { name, role, reach, .. } = &binding;
        let description = format!("role {role} over {reach}, by binding {name}");
        let source = Source::Binding { role: *role, name: name.clone(), reach: reach.clone() };
        let reason = Arc::new(Reason { source, permits: true, description });
        let grant = Arc::new(Grant { role: *role, reach: reach.clone(), reason });
        for subject in &binding.subjects {
            let grants = self.grants.entry(subject.clone()).or_default();
            Arc::make_mut(grants).at(reach).push(grant.clone());
        }
        self.bindings.insert((binding.reach.clone(), binding.name.clone()), Arc::new(binding));
    }

    fn remove_binding(&mut self, reach: &Reach, name: &Arc<str>) {
        let Some(binding) = self.bindings.remove(&(reach.clone(), name.clone())) else { return };
        for subject in &binding.subjects {
            let Some(grants) = self.grants.get_mut(subject) else { continue };
            let grants = Arc::make_mut(grants);
            let same = |g: &Arc<Grant>| {
                g.reach == *reach && matches!(&g.reason.source, Source::Binding { name: n, .. } if n == name)
            };
            grants.at(reach).retain(|g| !same(g));
            if grants.is_empty() {
                self.grants.remove(subject);
            }
        }
    }

    fn forget(&mut self, reach: &Reach) {
        let within = |r: &Reach| match reach {
            Reach::Organization(organization) => r.owner() == Some(organization),
            _ => r == reach,
        };
        let gone: Vec<_> = self.bindings.keys().filter(|(r, _)| within(r)).cloned().collect();
        for (reach, name) in gone {
            self.remove_binding(&reach, &name);
        }
        match reach {
            Reach::Organization(organization) => {
                self.tenants.remove(organization);
            }
            Reach::Project { .. } => self.put_policies(reach, Policies::default()),
            Reach::Fleet => {}
        }
    }

    /// The roles that a principal has, by itself and by its groups, and where.
    pub fn roles_of(&self, principal: &Principal) -> Vec<(Role, Reach)> {
        let groups = self.members.get(principal).map_or(&[][..], |f| &f.groups);
        let subjects = std::iter::once(principal).chain(groups);
        let grants = subjects.filter_map(|s| self.grants.get(s)).flat_map(|g| g.all());
        let mut roles: Vec<_> = grants.map(|g| (g.role, g.reach.clone())).collect();
        roles.sort();
        roles.dedup();
        roles
    }

    /// The users that own an organization and may sign in.
    fn owners(&self, organization: &str) -> Vec<&Principal> {
        let is_owner = |subject: &Principal| {
            let at = self.grants.get(subject).and_then(|g| g.organizations.get(organization));
            at.is_some_and(|grants| grants.iter().any(|g| g.role == Role::Owner))
        };
        let users = self.members.iter().filter(|(p, _)| p.kind() == PrincipalKind::User);
        users.filter(|(p, f)| is_owner(p) || f.groups.iter().any(is_owner)).map(|(p, _)| p).collect()
    }

    /// Whether no owner of the organization could change its policies and bindings any more after `change`, although one can now.
    ///
    /// Owners are tried in the given circumstances, with a second factor: those of whoever asks for the change.
    pub fn would_lock_out(
        &self,
        organization: &str,
        change: &Change,
        circumstances: &Circumstances<'_>,
    ) -> Result<Option<LockOut>, PolicyError> {
        let mut after = self.clone();
        after.apply(change.clone())?;
        let circumstances = Circumstances { mfa: true, ..*circumstances };
        let locked = after.locked_out(organization, &circumstances);
        Ok(locked.filter(|_| self.locked_out(organization, &circumstances).is_none()))
    }

    fn locked_out(&self, organization: &str, circumstances: &Circumstances<'_>) -> Option<LockOut> {
        let (policy, binding) = (
            Resource::in_organization("Policy", organization, "policy"),
            Resource { grants: Some(Role::Owner), ..Resource::in_organization("RoleBinding", organization, "owners") },
        );
        let needed = [
            ("policies:create", policy),
            ("policies:update", policy),
            ("policies:delete", policy),
            ("role-bindings:create", binding),
            ("organizations:update", Resource::organization(organization)),
        ];
        // A fleet that doesn't serve some of these has nothing there to be locked out of.
        let needed: Vec<_> =
            needed.into_iter().filter(|(action, _)| self.vocabulary.action(action).is_some()).collect();
        let owners = self.owners(organization);
        let mut locked = LockOut { owners: owners.len(), by: Vec::new(), missing_action: "policies:update".into() };
        for principal in owners {
            let ask = |(action, resource)| {
                self.decide(&Request { principal, action, resource, circumstances: *circumstances })
            };
            match needed.iter().copied().map(ask).find(|d| !d.allowed) {
                None => return None,
                Some(refused) => {
                    locked.by = refused.by;
                    locked.missing_action = refused.missing_action.unwrap_or(locked.missing_action);
                }
            }
        }
        Some(locked)
    }

    /// Whether a principal may `verb` a `kind`: its name, plural or short form, or a collection such as `audit`. Without a
    /// name it asks about any that could be there.
    pub fn can(
        &self,
        principal: &Principal,
        verb: &str,
        kind: &str,
        name: Option<&str>,
        place: Place<'_>,
        circumstances: Circumstances<'_>,
    ) -> Result<Decision, PolicyError> {
        let declared = self.vocabulary.kinds().iter().find(|d| d.answers_to(kind)).or_else(|| kind::find(kind));
        let collection = declared.map_or(kind, |d| d.plural);
        let short = |word: &str| word.chars().take(64).collect::<String>();
        let asked = format!("{}:{}", short(collection), short(verb));
        let Some(action) = self.vocabulary.action(&asked) else {
            let names = self.vocabulary.actions().iter().map(|a| &*a.name);
            let near = names.map(|n| (strsim::damerau_levenshtein(n, &asked), n)).min();
            let near = near.filter(|(distance, _)| *distance <= 3).map(|(_, n)| n.to_owned());
            return Err(PolicyError::NoAction { asked, near });
        };
        let resource = place.resource(&action.resources, name.unwrap_or("any"));
        Ok(self.decide(&Request { principal, action: &action.name, resource, circumstances }))
    }
}

impl<'a> Place<'a> {
    /// What an action that takes these types is asked for here: the object, or what holds the collection.
    pub fn resource(&self, types: &[&'static str], name: &'a str) -> Resource<'a> {
        let Self { organization, project, region, labels } = *self;
        let container = |kind: &str| types.len() > 1 && types.contains(&kind);
        match (types, organization, project) {
            (_, Some(organization), Some(project)) if container("Project") => Resource::project(organization, project),
            (_, Some(organization), _) if container("Organization") => Resource::organization(organization),
            (["Fleet"], ..) => Resource::FLEET,
            (["Organization"], ..) => Resource { labels, ..Resource::organization(name) },
            (["Project"], Some(organization), _) => Resource { labels, ..Resource::project(organization, name) },
            ([kind], ..) => Resource { kind, name, organization, project, region, labels, ..Resource::default() },
            _ => Resource::FLEET,
        }
    }
}

fn check_binding(binding: &Binding) -> Result<(), PolicyError> {
    let Binding { name, role, reach, subjects } = binding;
    if role.is_of_fleet() != (*reach == Reach::Fleet) {
        return Err(PolicyError::RoleReach { role: *role, reach: reach.clone() });
    }
    if subjects.is_empty() || subjects.len() > MAX_SUBJECTS {
        return Err(PolicyError::Subjects { name: name.clone(), subjects: subjects.len() });
    }
    Ok(())
}
