//! Whether a request may be done: the one place where that is asked, for every route.
//!
//! [`action_of`] names a route's action, and the policy engine decides it for what the path names: an object, or what holds a
//! collection. Where that is not allowed, whoever may not even know of the project or organization is told that it is not
//! there, in the very words of a real miss and before anything of it was read.
//!
//! Grants are read from this server's own copy of the global group. Before anything is refused, the copy is brought up to
//! date and asked again, so that what was granted by another server a moment ago is known here. If that can't be done
//! because the group has no leader now, what is known counts.
//!
//! Lists of projects, organizations and credentials are open to everybody, and show what the caller may see ([`Lens`]).

use std::time::Duration;

use http::Method;
use http::header::AUTHORIZATION;
use http::request::Parts;
use nexus_control::directory::{self, Known};
use nexus_iam::policy::{self, Decision, Principal, PrincipalKind, Reason, Request, Resource, Role};
use nexus_model::kind::{
    AccessKey, Holder, Kind, Organization, OrganizationSpec, Policy, Project, Quota, RoleBinding, SYSTEM_ORGANIZATION,
    Session, Token,
};
use nexus_model::selector::Labels;
use nexus_model::{AnyObject, ApiError, Code, Name, RequestId};
use nexus_store::Consistency;
use serde_json::Value;

use crate::audit;
use crate::caller::Caller;
use crate::list::find;
use crate::problem::Refusal;
use crate::render::Stored;
use crate::route::{Place, Target, Verb};
use crate::serve::{Context, Server};

/// How long a refusal waits for this server's copy of the global group.
const CATCH_UP: Duration = Duration::from_secs(2);

/// What of a list its caller sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lens {
    All,
    /// The credentials of one holder.
    Of(Holder),
    /// What the caller may get, one by one.
    Visible,
}

/// What was allowed, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub lens: Lens,
    /// The policies that allowed it, as people read them.
    pub by: Vec<String>,
}

impl Allowed {
    fn see(lens: Lens) -> Self {
        Self { lens, by: Vec::new() }
    }
}

/// The action that a route asks for; none is asked of routes that are open to whoever is known.
pub(crate) fn action_of(target: &Target, method: &Method, exists: bool) -> Option<String> {
    let plural = |place: &Place| place.kind.plural;
    let reads = matches!(*method, Method::GET | Method::HEAD);
    Some(match target {
        Target::Collection(place) if reads => format!("{}:list", plural(place)),
        Target::Collection(place) => format!("{}:create", plural(place)),
        Target::Object(place, _) if reads => format!("{}:get", plural(place)),
        Target::Object(place, _) => match *method {
            Method::DELETE => format!("{}:delete", plural(place)),
            Method::PUT if !exists && place.kind.verbs.create => format!("{}:create", plural(place)),
            _ => format!("{}:update", plural(place)),
        },
        Target::Custom(place, _, verb) if verb.is_order() => format!("{}:update", plural(place)),
        // What a network's packets do is its tenant's to see, like the network.
        Target::Custom(place, _, Verb::Flows) => format!("{}:get", plural(place)),
        Target::Custom(place, _, verb) => format!("{}:{}", plural(place), verb.word()),
        Target::Blob(..) if reads => "blobs:get".into(),
        Target::Blob(..) => "blobs:put".into(),
        Target::Pull(..) => "blobs:pull".into(),
        Target::Status => "status:get".into(),
        Target::Operation(operation) if !operation.open => format!("operations:{}", operation.name),
        Target::Audit(.., asked) => format!("audit:{}", asked.action()),
        // Every one is named here, so that a new route is nobody's before somebody has decided about it.
        Target::WhoAmI | Target::Can | Target::PolicySchema => return None,
        Target::Health | Target::Ready | Target::Metrics | Target::OpenApi => return None,
        Target::SignIn | Target::Discovery | Target::Keys | Target::Providers => return None,
        Target::Operation(_) => return None,
        // The change of an app that it means asks for itself.
        Target::Scale => return None,
        // Its own region decides.
        Target::Elsewhere(..) => return None,
    })
}

/// What is known of the object that a request is about, beside its place.
#[derive(Debug, Default, Clone)]
struct Facts {
    exists: bool,
    /// Of what a body says.
    name: Option<Name>,
    labels: Labels,
    /// Of a role binding: the role that it gives.
    grants: Option<Role>,
    /// Of a credential: whose it is.
    holder: Option<Holder>,
    /// Of a project: its organization.
    organization: Option<Name>,
    /// Of a role binding or policy: the project that it is for.
    project: Option<Name>,
    /// Of a project or organization.
    quota: Option<Quota>,
}

impl Facts {
    fn of_spec(place: &Place, labels: Labels, spec: &Value, exists: bool) -> Self {
        let plural = place.kind.plural;
        let mut facts = Self { exists, labels, ..Self::default() };
        if plural == RoleBinding::PLURAL {
            facts.grants = spec["role"].as_str().and_then(|r| r.parse().ok());
        }
        if is_credential(plural) {
            facts.holder = serde_json::from_value(spec["holder"].clone()).ok();
        }
        if plural == Project::PLURAL || plural == Organization::PLURAL {
            facts.quota = serde_json::from_value(spec["quota"].clone()).ok();
        }
        if plural == RoleBinding::PLURAL || plural == Policy::PLURAL {
            facts.project = spec["project"].as_str().and_then(|p| p.parse().ok());
        }
        if plural == Project::PLURAL {
            facts.organization = spec["organization"].as_str().and_then(|o| o.parse().ok());
        }
        facts
    }
}

/// Why something is not allowed.
enum Refused {
    /// What holds it is not there, or not for this caller to know of.
    Missing(&'static str, Name),
    Forbidden(Box<Decision>, String),
    Bound(Name),
}

/// Where the thing that a request is about belongs.
struct Belongs<'a> {
    organization: Option<&'a Name>,
    project: Option<&'a Name>,
}

/// Finds the organization of what a path names. A missing one is `Err`.
fn belongs<'a>(known: &'a Known, target: &'a Target, facts: &'a Facts) -> Result<Belongs<'a>, (&'static str, Name)> {
    let of_project = |project: &'a Name| {
        let found = known.project(project).ok_or((Project::KIND, project.clone()))?;
        Ok(Belongs { organization: Some(&found.spec.organization), project: Some(project) })
    };
    let fleet = Belongs { organization: None, project: None };
    let (place, name) = match target {
        Target::Blob(_, project, _) | Target::Pull(_, project) => return of_project(project),
        Target::Audit(_, Some(organization), _) => {
            let found = known.organization(organization).ok_or((Organization::KIND, organization.clone()))?;
            return Ok(Belongs { organization: Some(&found.metadata.name), project: None });
        }
        Target::Collection(place) => (place, None),
        Target::Object(place, name) => (place, Some(name.as_str())),
        Target::Custom(place, name, _) => (place, Some(name.as_str())),
        _ => return Ok(fleet),
    };
    if let Some(project) = &place.project {
        return of_project(project);
    }
    if let Some(organization) = &place.organization {
        let found = known.organization(organization).ok_or((Organization::KIND, organization.clone()))?;
        // What is granted or forbidden over one project is that project's: its own administrators keep it.
        let project = facts.project.as_ref().and_then(|p| known.project(p));
        let project = project.filter(|p| p.spec.organization == *organization).map(|p| &p.metadata.name);
        return Ok(Belongs { organization: Some(&found.metadata.name), project });
    }
    let name = |kind: &'static str| {
        let name: Option<Name> = name.and_then(|n| n.parse().ok());
        name.ok_or((kind, "unnamed".parse().expect("a well-formed name")))
    };
    match (place.kind.plural, target) {
        (p, Target::Collection(_)) if p == Project::PLURAL => match &facts.organization {
            // A create says itself whose it will be.
            Some(organization) => {
                let found = known.organization(organization).ok_or((Organization::KIND, organization.clone()))?;
                Ok(Belongs { organization: Some(&found.metadata.name), project: None })
            }
            None => Ok(fleet),
        },
        (p, Target::Object(..)) if p == Project::PLURAL => {
            let name = name(Project::KIND)?;
            let found = known.project(&name);
            match (found, &facts.organization) {
                (Some(p), _) => {
                    Ok(Belongs { organization: Some(&p.spec.organization), project: Some(&p.metadata.name) })
                }
                // A PUT that makes it.
                (None, Some(organization)) => {
                    let found = known.organization(organization).ok_or((Organization::KIND, organization.clone()))?;
                    Ok(Belongs { organization: Some(&found.metadata.name), project: None })
                }
                (None, None) => Err((Project::KIND, name)),
            }
        }
        (p, Target::Object(..)) if p == Organization::PLURAL => {
            let name = name(Organization::KIND)?;
            match known.organization(&name) {
                Some(found) => Ok(Belongs { organization: Some(&found.metadata.name), project: None }),
                // Only who may make organizations may know that there is none.
                None if facts.exists => Ok(fleet),
                None => Err((Organization::KIND, name)),
            }
        }
        _ => Ok(fleet),
    }
}

fn is_credential(plural: &str) -> bool {
    [Token::PLURAL, AccessKey::PLURAL, Session::PLURAL].contains(&plural)
}

/// The credential that a path names, if it names one.
fn credential(target: &Target) -> Option<(&'static str, Name)> {
    match target {
        Target::Object(place, name) if is_credential(place.kind.plural) => Some((place.kind.kind, name.parse().ok()?)),
        _ => None,
    }
}

/// The policy engine's name for what a request is about.
fn resource<'a>(
    target: &'a Target,
    action: &str,
    belongs: &Belongs<'a>,
    facts: &'a Facts,
    holder: Option<&'a Principal>,
) -> Resource<'a> {
    let types = policy::vocabulary().action(action).map_or(&[][..], |a| &a.resources);
    let organization = belongs.organization.map(Name::as_str);
    // What is granted in the cloud's own organization is the fleet's.
    let fleets = |plural: &str| plural == RoleBinding::PLURAL && organization == Some(SYSTEM_ORGANIZATION);
    let (place, name) = match target {
        Target::Collection(place) => (Some(place), facts.name.as_ref().map_or("", Name::as_str)),
        Target::Object(place, name) => (Some(place), name.as_str()),
        Target::Custom(place, name, _) => (Some(place), name.as_str()),
        _ => (None, ""),
    };
    let plural = place.map_or("", |p| p.kind.plural);
    let at = policy::Place {
        organization: organization.filter(|_| !fleets(plural)),
        project: belongs.project.map(Name::as_str),
        region: place.and_then(|p| p.region.as_ref()).map(Name::as_str),
        labels: Some(&facts.labels),
    };
    Resource { grants: facts.grants, holder, ..at.resource(types, name) }
}

fn decide(
    known: &Known,
    caller: &Caller,
    action: &str,
    resource: Resource<'_>,
    request_id: &RequestId,
    now: nexus_model::Timestamp,
) -> Decision {
    let circumstances = caller.circumstances(now, request_id);
    known.engine.decide(&Request { principal: &caller.principal, action, resource, circumstances })
}

impl Server {
    /// Whether a caller may know that a project or organization is there.
    fn sees(&self, known: &Known, context: &Context, belongs: &Belongs<'_>) -> bool {
        let now = self.now();
        let (action, resource) = match (belongs.organization, belongs.project) {
            (Some(organization), Some(project)) => {
                ("projects:get", Resource::project(organization.as_str(), project.as_str()))
            }
            (Some(organization), None) => ("organizations:get", Resource::organization(organization.as_str())),
            _ => return true,
        };
        // Its own organization is no secret to anybody in it.
        let own = |o: &&Name| belongs.project.is_none() && context.caller.principal.organization() == o.as_str();
        belongs.organization.filter(own).is_some()
            || decide(known, &context.caller, action, resource, &context.request_id, now).allowed
    }

    /// Decides with what is known now.
    fn judge(
        &self,
        known: &Known,
        context: &Context,
        target: &Target,
        action: &str,
        facts: &Facts,
    ) -> Result<Allowed, Refused> {
        let caller = &context.caller;
        let operator = caller.principal.kind() == PrincipalKind::Operator;
        let belongs = match belongs(known, target, facts) {
            Ok(belongs) => belongs,
            // The handler tells an operator what is missing.
            Err(_) if operator => Belongs { organization: None, project: None },
            Err((kind, name)) => return Err(Refused::Missing(kind, name)),
        };
        if let Some(only) = &caller.project
            && belongs.project != Some(only)
        {
            return Err(Refused::Bound(only.clone()));
        }
        if operator && belongs.organization.is_none() {
            return Ok(Allowed { lens: Lens::All, by: vec!["the fleet's own key".to_owned()] });
        }
        let organization = belongs.organization.map_or("", Name::as_str);
        // A credential that is not there is nobody's: whoever has some of their own may be told so.
        let facts = match credential(target) {
            Some(_) if !facts.exists && facts.holder.is_none() => {
                &Facts { holder: caller.holder.as_ref().map(|(_, h)| h.clone()), ..facts.clone() }
            }
            _ => facts,
        };
        let holder = facts.holder.as_ref().and_then(|h| Some(directory::principal(belongs.organization?, h)));
        let resource = resource(target, action, &belongs, facts, holder.as_ref());
        let decision = decide(known, caller, action, resource, &context.request_id, self.now());
        if decision.allowed {
            let by = decision.by.iter().take(4).map(|r| r.description.clone()).collect();
            return Ok(Allowed { lens: Lens::All, by });
        }
        if let Some((kind, name)) = credential(target)
            && self.sees(known, context, &belongs)
        {
            // Others' credentials are no business of whoever may not list them.
            return Err(Refused::Missing(kind, name));
        }
        if let Some(lens) = self.lens(known, context, target, action, organization) {
            return Ok(Allowed::see(lens));
        }
        if !self.sees(known, context, &belongs) {
            let (kind, name) = match (belongs.project, belongs.organization) {
                (Some(project), _) => (Project::KIND, project.clone()),
                (None, Some(organization)) => (Organization::KIND, organization.clone()),
                (None, None) => return Err(Refused::Forbidden(Box::new(decision), organization.to_owned())),
            };
            return Err(Refused::Missing(kind, name));
        }
        let at = match (belongs.project, belongs.organization) {
            (Some(project), _) => format!(" in project {project}"),
            (None, Some(organization)) => format!(" in organization {organization}"),
            (None, None) => " over the fleet".to_owned(),
        };
        Err(Refused::Forbidden(Box::new(decision), at))
    }

    /// What of a list that is not wholly open the caller sees.
    fn lens(&self, known: &Known, context: &Context, target: &Target, action: &str, within: &str) -> Option<Lens> {
        let Target::Collection(place) = target else { return None };
        if !action.ends_with(":list") {
            return None;
        }
        match place.kind.plural {
            p if p == Project::PLURAL || p == Organization::PLURAL => Some(Lens::Visible),
            p if is_credential(p) => {
                let (organization, holder) = context.caller.holder.as_ref()?;
                if organization.as_str() != within {
                    return None;
                }
                let own = Resource::in_organization(
                    context.caller.principal.kind().entity_type(),
                    organization.as_str(),
                    holder.name.as_str(),
                );
                let now = self.now();
                let may = decide(known, &context.caller, action, own, &context.request_id, now).allowed;
                may.then(|| Lens::Of(holder.clone()))
            }
            _ => None,
        }
    }

    /// Whether a list shows an object to its caller.
    pub fn shows(&self, lens: &Lens, place: &Place, stored: &Stored<'_>, context: &Context) -> bool {
        match lens {
            Lens::All => true,
            Lens::Of(holder) => stored.spec()["holder"] == serde_json::to_value(holder).unwrap_or_default(),
            Lens::Visible => {
                let target = Target::Object(place.clone(), stored.metadata.name.to_string());
                let action = format!("{}:get", place.kind.plural);
                let facts = Facts { exists: true, labels: stored.labels().clone(), ..Facts::default() };
                self.api.directory.read(|known| {
                    let found = belongs(known, &target, &facts);
                    found.is_ok() && self.judge(known, context, &target, &action, &facts).is_ok()
                })
            }
        }
    }

    /// What is stored of the object that a request is about, as this server knows it.
    async fn facts(&self, target: &Target) -> Result<Facts, ApiError> {
        let (place, name) = match target {
            Target::Object(place, name) => (place, name.parse::<Name>().ok()),
            Target::Custom(place, name, _) => (place, Some(name.clone())),
            _ => return Ok(Facts::default()),
        };
        let Some(name) = name else { return Ok(Facts::default()) };
        let Some(kv) = find(self, place, &name, Consistency::Stale).await? else { return Ok(Facts::default()) };
        let Ok(stored) = Stored::read(&kv) else { return Ok(Facts { exists: true, ..Facts::default() }) };
        Ok(Facts::of_spec(place, stored.labels().clone(), &stored.spec(), true))
    }

    /// Whether the caller sees where a target belongs, asked before anything there is read.
    fn may_look(&self, context: &Context, target: &Target) -> bool {
        let facts = Facts { exists: true, ..Facts::default() };
        self.api.directory.read(|known| match belongs(known, target, &facts) {
            Ok(belongs) => self.sees(known, context, &belongs),
            Err(_) => false,
        })
    }

    /// Allows a request, or says why not. `body` is the object that a change would make or leave, as far as it says.
    pub async fn authorize(
        &self,
        context: &Context,
        target: &Target,
        method: &Method,
        body: Option<&AnyObject>,
    ) -> Result<Allowed, Refusal> {
        let first = self.attempt(context, target, method, body).await?;
        let refused = match first {
            Ok(allowed) => return Ok(allowed),
            Err(refused) => refused,
        };
        let refused = match self.catch_up().await {
            true => match self.attempt(context, target, method, body).await? {
                Ok(allowed) => return Ok(allowed),
                Err(refused) => refused,
            },
            false => refused,
        };
        let refusal = told(context, refused);
        let action = action_of(target, method, false).unwrap_or_default();
        let of = match target {
            Target::Object(place, name) => Some(audit::target(place, name)),
            Target::Custom(place, name, _) => Some(audit::target(place, name.as_str())),
            Target::Collection(place) => {
                Some(audit::target(place, body.map_or("", |object| object.metadata.name.as_str())))
            }
            _ => None,
        };
        audit::note(self, Some(context), &context.request_id, action, of, Err(refusal.error.code));
        Err(refusal)
    }

    /// Whether a request would be allowed by what is known now. Nothing is refused by it, so nothing is noted.
    pub async fn may(&self, context: &Context, target: &Target, method: &Method) -> bool {
        matches!(self.attempt(context, target, method, None).await, Ok(Ok(_)))
    }

    async fn attempt(
        &self,
        context: &Context,
        target: &Target,
        method: &Method,
        body: Option<&AnyObject>,
    ) -> Result<Result<Allowed, Refused>, ApiError> {
        let stored = if self.may_look(context, target) { self.facts(target).await? } else { Facts::default() };
        let Some(action) = action_of(target, method, stored.exists) else { return Ok(Ok(Allowed::see(Lens::All))) };
        let judge = |facts: &Facts| self.api.directory.read(|known| self.judge(known, context, target, &action, facts));
        let place = match target {
            Target::Collection(place) | Target::Object(place, _) => Some(place),
            _ => None,
        };
        let written = place.zip(body).map(|(place, b)| {
            let facts = Facts::of_spec(place, b.metadata.labels.clone(), &b.spec, false);
            Facts { name: Some(b.metadata.name.clone()), ..facts }
        });
        let raised = |written: &Facts| {
            let usual = match place.map_or("", |p| p.kind.plural) {
                p if p == Organization::PLURAL => Some(OrganizationSpec::default().quota),
                p if p == Project::PLURAL => Some(Quota::default()),
                _ => None,
            };
            // A quota is changed only by whoever may set it, whatever else they may do with what it bounds.
            written.quota.is_some() && written.quota != stored.quota.or(usual)
        };
        if let Some(written) = written.as_ref().filter(|w| raised(w)) {
            let action = format!("{}:set-quota", place.map_or("", |p| p.kind.plural));
            let facts = Facts { exists: stored.exists, ..written.clone() };
            let judged = self.api.directory.read(|known| self.judge(known, context, target, &action, &facts));
            if let Err(refused) = judged {
                return Ok(Err(refused));
            }
        }
        Ok(match written {
            // What is changed must be theirs to change as it is and as it will be, or a label would be a way around.
            Some(written) if stored.exists => {
                let written = Facts { exists: true, ..written };
                judge(&stored).and_then(|_| judge(&written))
            }
            Some(written) => judge(&written),
            None => judge(&stored),
        })
    }

    /// Tells who sent a request, also by a credential that another server gave a moment ago.
    pub async fn recognize(&self, parts: &Parts) -> Result<Caller, Refusal> {
        let known = self.authenticate(parts);
        if known.is_ok() || !parts.headers.contains_key(AUTHORIZATION) {
            return known;
        }
        // Anybody can bring credentials that nobody knows: only for a few at once is the group asked.
        let Ok(_turn) = self.strangers.try_acquire() else { return known };
        if self.catch_up().await { self.authenticate(parts) } else { known }
    }

    /// Brings this server's copy of the global group up to date. False if that can't be done now.
    pub async fn catch_up(&self) -> bool {
        let request = nexus_store::RangeRequest::get(nexus_model::key::FORMAT);
        match tokio::time::timeout(CATCH_UP, self.api.global_store.range(request)).await {
            Ok(Ok(answer)) => self.api.directory.seen(answer.revision.0, CATCH_UP).await,
            _ => false,
        }
    }

    /// Waits until a caller's right to read a collection has ended, and says why it has.
    pub async fn right_ended(&self, context: &Context, target: &Target) -> ApiError {
        let mut seen = self.api.directory.revision();
        let action = action_of(target, &Method::GET, true);
        loop {
            let now = self.now();
            let ended = self.api.directory.read(|known| {
                if let Err(why) = context.caller.stands(known, now) {
                    return Some(ApiError::new(Code::Unauthenticated, why));
                }
                let action = action.as_deref()?;
                let facts = Facts { exists: true, ..Facts::default() };
                match self.judge(known, context, target, action, &facts) {
                    Ok(_) => None,
                    Err(refused) => Some(*told(context, refused).error),
                }
            });
            if let Some(ended) = ended {
                return ended;
            }
            // Whatever changes meanwhile is looked at together; what ends by time is looked for too.
            tokio::time::sleep(LOOK).await;
            let _ = tokio::time::timeout(LOOK_ANYWAY, seen.changed()).await;
            seen.mark_unchanged();
        }
    }
}

/// How soon a stream notices that its right has ended, after something changed and in any case.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_ANYWAY: Duration = Duration::from_secs(2);

fn described(by: &[std::sync::Arc<Reason>]) -> String {
    by.iter().take(3).map(|r| r.description.as_str()).collect::<Vec<_>>().join("; ")
}

fn told(context: &Context, refused: Refused) -> Refusal {
    let who = &context.caller.name;
    match refused {
        Refused::Missing(kind, name) => ApiError::not_found(kind, name.as_str()).into(),
        Refused::Bound(only) => {
            Refusal::new(Code::Forbidden, format!("this token opens project {only} and nothing else"))
        }
        Refused::Forbidden(decision, at) => {
            let action = decision.missing_action.as_deref().unwrap_or("this");
            let why = match decision.by.as_slice() {
                [] => "nothing permits it; ask whoever administers it for a role that does, `nexus can` tells which"
                    .into(),
                by => format!("forbidden by {}", described(by)),
            };
            Refusal::new(Code::Forbidden, format!("{who} may not `{action}`{at}: {why}"))
        }
    }
}
