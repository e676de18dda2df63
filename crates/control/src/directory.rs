//! Who is there and what they were granted: follows this server's own copy of the global group and keeps the policy engine
//! that every request is decided by.
//!
//! Like plans and routing tables it is read stale on purpose: a server that is cut off goes on answering by the newest that
//! it knows. Whoever is about to refuse should first see that it knows enough: [`Directory::seen`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use nexus_iam::TokenHash;
use nexus_iam::jwt::{KeySet, VerifyingKey};
use nexus_iam::policy::{self, Binding, Change, Engine, PolicyText, Principal, Reach};
use nexus_model::kind::*;
use nexus_model::{Name, Object, key};
use nexus_store::{Store, StoreError, WatchEvent};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::rules::federation;
use crate::view::load;
use crate::world::{Place, World};

/// What it is made of.
const PREFIXES: &[&str] = &[
    "o/access-keys/",
    "o/departures/",
    "o/groups/",
    "o/identity-providers/",
    "o/organizations/",
    "o/policies/",
    "o/projects/",
    "o/role-bindings/",
    "o/service-accounts/",
    "o/sessions/",
    "o/signing-keys/",
    "o/tokens/",
    "o/users/",
];

/// Sessions that were ended are remembered, of more the newest: an access token outlives its session by minutes at most.
const ENDED: usize = 100_000;

/// What is known at one revision.
pub struct Known {
    pub engine: Engine,
    pub keys: KeySet,
    /// Changes with the keys: what was checked by older ones counts no more.
    pub keys_epoch: u64,
    world: World,
    tokens: HashMap<TokenHash, Place>,
    access_keys: HashMap<String, Place>,
    members: BTreeMap<Place, BTreeSet<Principal>>,
    groups: HashMap<Principal, BTreeSet<Principal>>,
    bindings: HashMap<Place, Reach>,
    policies: HashMap<Place, Reach>,
    ended: BTreeSet<Name>,
    ended_order: std::collections::VecDeque<Name>,
}

/// The principal that a holder is.
pub fn principal(organization: &Name, holder: &Holder) -> Principal {
    match holder.kind {
        HolderKind::User => Principal::user(organization.as_str(), holder.name.as_str()),
        HolderKind::ServiceAccount => Principal::service_account(organization.as_str(), holder.name.as_str()),
    }
}

fn subject(organization: &Name, subject: &Subject) -> Principal {
    let organization = subject.organization.as_ref().unwrap_or(organization).as_str();
    match subject.kind {
        SubjectKind::User => Principal::user(organization, subject.name.as_str()),
        SubjectKind::ServiceAccount => Principal::service_account(organization, subject.name.as_str()),
        SubjectKind::Group => Principal::group(organization, subject.name.as_str()),
    }
}

/// What is granted in an organization reaches it, or one of its projects; in the cloud's own, the fleet.
fn reach(organization: &Name, project: Option<&Name>) -> Reach {
    match project {
        _ if *organization == *SYSTEM_ORGANIZATION => Reach::Fleet,
        Some(project) => Reach::project(organization.as_str(), project.as_str()),
        None => Reach::organization(organization.as_str()),
    }
}

/// A role binding as the engine takes it.
pub fn binding(object: &Object<RoleBinding>) -> Result<Binding, policy::PolicyError> {
    let (m, spec) = (&object.metadata, &object.spec);
    let organization = organization_of(object);
    Ok(Binding {
        name: m.name.as_str().into(),
        role: spec.role.parse()?,
        reach: reach(organization, spec.project.as_ref()),
        subjects: spec.subjects.iter().map(|s| subject(organization, s)).collect(),
    })
}

/// A policy as the engine takes it.
pub fn policy_text(object: &Object<Policy>) -> PolicyText {
    PolicyText {
        name: object.metadata.name.as_str().into(),
        reach: reach(organization_of(object), object.spec.project.as_ref()),
        guard_rail: object.spec.guard_rail,
        text: object.spec.text.as_str().into(),
    }
}

fn organization_of<K: Kind>(object: &Object<K>) -> &Name {
    object.metadata.organization.as_ref().expect("its kind belongs to an organization")
}

/// The members of a group.
pub fn members(object: &Object<Group>) -> BTreeSet<Principal> {
    let organization = organization_of(object).as_str();
    let users = object.spec.users.iter().map(|n| Principal::user(organization, n.as_str()));
    users
        .chain(object.spec.service_accounts.iter().map(|n| Principal::service_account(organization, n.as_str())))
        .collect()
}

/// An engine that knows what one organization has written, as its world shows it.
pub(crate) fn engine_of(world: &World, organization: &Name) -> Result<Engine, policy::PolicyError> {
    let mut engine = Engine::new(policy::vocabulary().clone())?;
    let mut groups: HashMap<Principal, Vec<Principal>> = HashMap::new();
    for group in world.groups.within(organization) {
        let its = Principal::group(organization.as_str(), group.metadata.name.as_str());
        for member in members(group) {
            groups.entry(member).or_default().push(its.clone());
        }
    }
    let users = world.users.within(organization).filter(|u| !u.spec.disabled).map(|u| &u.metadata.name);
    for user in users {
        let principal = Principal::user(organization.as_str(), user.as_str());
        let groups = groups.remove(&principal).unwrap_or_default();
        engine.apply(Change::Member { principal, groups })?;
    }
    for object in world.role_bindings.within(organization) {
        engine.apply(Change::Binding(binding(object)?))?;
    }
    for object in world.policies.within(organization) {
        engine.apply(Change::Policy(policy_text(object)))?;
    }
    Ok(engine)
}

impl Known {
    fn new() -> Self {
        Self {
            engine: Engine::new(policy::vocabulary().clone()).expect("the built-in policies are good"),
            keys: KeySet::default(),
            keys_epoch: 0,
            world: World::default(),
            tokens: HashMap::new(),
            access_keys: HashMap::new(),
            members: BTreeMap::new(),
            groups: HashMap::new(),
            bindings: HashMap::new(),
            policies: HashMap::new(),
            ended: BTreeSet::new(),
            ended_order: std::collections::VecDeque::new(),
        }
    }

    pub fn organization(&self, name: &Name) -> Option<&Object<Organization>> {
        self.world.organizations.get(None, name)
    }

    pub fn project(&self, name: &Name) -> Option<&Object<Project>> {
        self.world.projects.get(None, name)
    }

    pub fn session(&self, organization: &Name, name: &Name) -> Option<&Object<Session>> {
        self.world.sessions.get(Some(organization), name)
    }

    /// Whether the access key is still there by which a session was opened, if it was by one.
    pub fn has_key_of(&self, session: &SessionSpec) -> bool {
        session.access_key.as_deref().is_none_or(|id| self.access_key(id).is_some())
    }

    /// The names of a holder's sessions.
    pub fn sessions_of(&self, organization: &Name, holder: &Holder) -> Vec<Name> {
        let theirs = self.world.sessions.within(organization).filter(|s| s.spec.holder.as_ref() == Some(holder));
        theirs.map(|s| s.metadata.name.clone()).collect()
    }

    pub fn token(&self, hash: &TokenHash) -> Option<&Object<Token>> {
        let (organization, name) = self.tokens.get(hash)?;
        self.world.tokens.get(organization.as_ref(), name)
    }

    /// The access key with this public half.
    pub fn access_key(&self, id: &str) -> Option<&Object<AccessKey>> {
        let (organization, name) = self.access_keys.get(id)?;
        self.world.access_keys.get(organization.as_ref(), name)
    }

    pub fn token_named(&self, organization: &Name, name: &Name) -> Option<&Object<Token>> {
        self.world.tokens.get(Some(organization), name)
    }

    /// Whether a holder is there and may sign in.
    pub fn is_active(&self, organization: &Name, holder: &Holder) -> bool {
        let within = Some(organization);
        match holder.kind {
            HolderKind::User => self.world.users.get(within, &holder.name).is_some_and(|u| !u.spec.disabled),
            HolderKind::ServiceAccount => {
                self.world.service_accounts.get(within, &holder.name).is_some_and(|s| !s.spec.disabled)
            }
        }
    }

    pub fn identity_provider(&self, organization: &Name, name: &Name) -> Option<&Object<IdentityProvider>> {
        self.world.identity_providers.get(Some(organization), name)
    }

    pub fn identity_providers<'a>(
        &'a self,
        organization: &'a Name,
    ) -> impl Iterator<Item = &'a Object<IdentityProvider>> {
        self.world.identity_providers.within(organization)
    }

    pub fn user(&self, organization: &Name, name: &Name) -> Option<&Object<User>> {
        self.world.users.get(Some(organization), name)
    }

    /// The user who is this person of a provider.
    pub fn user_of<'a>(&'a self, organization: &'a Name, issuer: &str, subject: &str) -> Option<&'a Object<User>> {
        let is_them = |i: &UserIdentity| i.issuer == issuer && i.subject == subject;
        self.world.users.within(organization).find(|u| u.spec.identity.as_ref().is_some_and(is_them))
    }

    /// Whether this person of a provider was a user who was deleted.
    pub fn has_departed(&self, organization: &Name, issuer: &str, subject: &str) -> bool {
        self.world.departures.get(Some(organization), &federation::person(issuer, subject)).is_some()
    }

    /// The groups that somebody is in: those that name them, and those that their provider gave.
    pub fn groups_of(&self, principal: &Principal) -> BTreeSet<Principal> {
        let named = self.groups.get(principal).into_iter().flatten().cloned();
        named.chain(self.given_to(principal)).collect()
    }

    /// What a provider gave counts as long as one of that issuer is there and maps to it, and the group is.
    fn given_to(&self, principal: &Principal) -> Vec<Principal> {
        let given = || {
            let organization: Name = principal.organization().parse().ok()?;
            let user = self.user(&organization, &principal.name().parse().ok()?)?;
            let identity = user.spec.identity.as_ref()?;
            let theirs = || self.identity_providers(&organization).filter(|p| p.spec.issuer == identity.issuer);
            let counts = |group: &&Name| {
                theirs().any(|p| p.spec.groups.values().any(|ours| ours.contains(*group)))
                    && self.world.groups.get(Some(&organization), group).is_some()
            };
            let groups = identity.groups.iter().flatten().filter(counts);
            Some(groups.map(|group| Principal::group(organization.as_str(), group.as_str())).collect())
        };
        let is_user = principal.kind() == policy::PrincipalKind::User;
        is_user.then(given).flatten().unwrap_or_default()
    }

    /// Looks anew at the users of an organization to whom a provider gave groups.
    fn refresh_given(&mut self, organization: &Name, concerned: impl Fn(&UserIdentity) -> bool) {
        let theirs = self.world.users.within(organization);
        let theirs = theirs.filter(|u| u.spec.identity.as_ref().is_some_and(&concerned));
        let theirs: Vec<Principal> =
            theirs.map(|u| Principal::user(organization.as_str(), u.metadata.name.as_str())).collect();
        theirs.into_iter().for_each(|principal| self.refresh(principal));
    }

    /// Whether this session was there and was ended.
    pub fn has_ended(&self, session: &Name) -> bool {
        self.ended.contains(session)
    }

    fn apply(&mut self, change: Change) {
        if let Err(error) = self.engine.apply(change) {
            // Writers refuse such things: it is a defect, and grants nothing.
            tracing::error!(%error, "something that is stored can't be granted or enforced");
        }
    }

    fn refresh(&mut self, principal: Principal) {
        let organization: Option<Name> = principal.organization().parse().ok();
        let name: Option<Name> = principal.name().parse().ok();
        let (Some(organization), Some(name)) = (organization, name) else { return };
        let kind = match principal.kind() {
            policy::PrincipalKind::User => HolderKind::User,
            _ => HolderKind::ServiceAccount,
        };
        if self.is_active(&organization, &Holder { kind, name }) {
            let groups = self.groups_of(&principal).into_iter().take(policy::MAX_GROUPS).collect();
            self.apply(Change::Member { principal, groups });
        } else {
            self.apply(Change::RemoveMember(principal));
        }
    }

    fn regroup(&mut self, at: &Place, now: BTreeSet<Principal>) {
        let Some(organization) = &at.0 else { return };
        let group = Principal::group(organization.as_str(), at.1.as_str());
        let before = self.members.remove(at).unwrap_or_default();
        for gone in before.difference(&now) {
            if let Some(groups) = self.groups.get_mut(gone) {
                groups.remove(&group);
                if groups.is_empty() {
                    self.groups.remove(gone);
                }
            }
        }
        for member in &now {
            self.groups.entry(member.clone()).or_default().insert(group.clone());
        }
        let changed: Vec<Principal> = before.symmetric_difference(&now).cloned().collect();
        if !now.is_empty() {
            self.members.insert(at.clone(), now);
        }
        changed.into_iter().for_each(|principal| self.refresh(principal));
    }

    /// Brings what is derived in line with the row at a key, after it changed.
    fn derive(&mut self, key: &str) {
        let mut parts = key.split('/').skip(1);
        let (plural, within, name) = (parts.next(), parts.next(), parts.next());
        let Some(name) = name.and_then(|n| n.parse::<Name>().ok()) else { return };
        let within: Option<Name> = within.filter(|w| *w != "-").and_then(|w| w.parse().ok());
        let at: Place = (within.clone(), name.clone());
        match (plural.unwrap_or_default(), within) {
            (p, Some(organization)) if p == User::PLURAL => {
                self.refresh(Principal::user(organization.as_str(), name.as_str()));
            }
            (p, Some(organization)) if p == ServiceAccount::PLURAL => {
                self.refresh(Principal::service_account(organization.as_str(), name.as_str()));
            }
            (p, Some(organization)) if p == Group::PLURAL => {
                let now = self.world.groups.live.get(&at).map(members).unwrap_or_default();
                self.regroup(&at, now);
                let (organization, group) = (organization, at.1);
                self.refresh_given(&organization, |i| i.groups.as_ref().is_some_and(|g| g.contains(&group)));
            }
            (p, Some(organization)) if p == IdentityProvider::PLURAL => {
                self.refresh_given(&organization, |i| i.groups.is_some());
            }
            (p, Some(_)) if p == RoleBinding::PLURAL => {
                let now = self.world.role_bindings.live.get(&at).map(binding);
                if let Some(reach) = self.bindings.remove(&at) {
                    self.apply(Change::RemoveBinding { reach, name: name.as_str().into() });
                }
                match now {
                    Some(Ok(binding)) => {
                        self.bindings.insert(at, binding.reach.clone());
                        self.apply(Change::Binding(binding));
                    }
                    Some(Err(error)) => tracing::error!(%error, key, "a stored role binding grants nothing"),
                    None => {}
                }
            }
            (p, Some(_)) if p == Policy::PLURAL => {
                let now = self.world.policies.live.get(&at).map(policy_text);
                if let Some(reach) = self.policies.remove(&at) {
                    self.apply(Change::RemovePolicy { reach, name: name.as_str().into() });
                }
                if let Some(text) = now {
                    self.policies.insert(at, text.reach.clone());
                    self.apply(Change::Policy(text));
                }
            }
            (p, Some(_)) if p == Token::PLURAL => {
                let hash = self.world.tokens.live.get(&at).and_then(|t| t.spec.hash.as_ref()?.parse().ok());
                match hash {
                    Some(hash) => drop(self.tokens.insert(hash, at)),
                    None => self.tokens.retain(|_, place| *place != at),
                }
            }
            (p, Some(_)) if p == AccessKey::PLURAL => {
                match self.world.access_keys.live.get(&at).and_then(|k| k.spec.id.clone()) {
                    Some(id) => drop(self.access_keys.insert(id, at)),
                    None => self.access_keys.retain(|_, place| *place != at),
                }
            }
            (p, Some(_)) if p == Session::PLURAL && !self.world.sessions.live.contains_key(&at) => {
                if self.ended.insert(name.clone()) {
                    self.ended_order.push_back(name);
                }
                if let Some(oldest) = (self.ended.len() > ENDED).then(|| self.ended_order.pop_front()).flatten() {
                    self.ended.remove(&oldest);
                }
            }
            (p, None) if p == SigningKey::PLURAL => {
                let keys = self.world.signing_keys.live.values().filter_map(|k| verifying_key(&k.spec));
                self.keys = keys.collect();
                self.keys_epoch += 1;
            }
            _ => {}
        }
    }
}

fn verifying_key(spec: &SigningKeySpec) -> Option<VerifyingKey> {
    Some(VerifyingKey::new(hex::decode(&spec.key).ok()?.try_into().ok()?))
}

/// A server's directory. Cheap to clone.
#[derive(Clone)]
pub struct Directory {
    known: Arc<RwLock<Known>>,
    revision: watch::Sender<u64>,
}

impl Default for Directory {
    fn default() -> Self {
        Self { known: Arc::new(RwLock::new(Known::new())), revision: watch::Sender::default() }
    }
}

impl Directory {
    /// Reads something at the newest revision seen. Must be short: changes wait for it.
    pub fn read<T>(&self, f: impl FnOnce(&Known) -> T) -> T {
        f(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The newest revision of the global group seen; 0 before the first list.
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Waits until a revision of the global group is seen. False if it takes longer than `patience`.
    pub async fn seen(&self, revision: u64, patience: Duration) -> bool {
        let mut seen = self.revision.subscribe();
        let reached = seen.wait_for(|seen| *seen >= revision);
        tokio::time::timeout(patience, reached).await.is_ok_and(|r| r.is_ok())
    }

    /// Follows the global group until its store is closed or `stop` is cancelled.
    pub async fn follow(&self, store: Arc<dyn Store>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                end = self.follow_once(&*store) => end,
            };
            match end {
                Ok(()) => tracing::debug!("the directory fell behind and lists again"),
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "the directory can't follow the store; trying again"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn follow_once(&self, store: &dyn Store) -> Result<(), StoreError> {
        let (world, revision) = load(store, None, PREFIXES, true).await?;
        self.start_anew(world, revision.0);
        let mut watch = store.watch("o/".into(), key::prefix_end("o/").into(), revision).await?;
        while let Some(Ok(batch)) = watch.next().await {
            self.apply(&batch.events, batch.revision.0);
        }
        Ok(())
    }

    fn start_anew(&self, world: World, revision: u64) {
        let mut known = Known { world, ..Known::new() };
        let mut keys: Vec<String> = known.world.revisions.keys().cloned().collect();
        keys.sort();
        keys.iter().for_each(|key| known.derive(key));
        let mut place = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.keys_epoch += place.keys_epoch + 1;
        // What was ended before stays ended, and what has gone since the last look has ended too.
        let gone = place.world.sessions.live.keys().filter(|at| !known.world.sessions.live.contains_key(*at));
        let gone: Vec<Name> = place.ended_order.iter().cloned().chain(gone.map(|(_, name)| name.clone())).collect();
        for name in gone {
            if known.ended.insert(name.clone()) {
                known.ended_order.push_back(name);
            }
        }
        *place = known;
        drop(place);
        self.revision.send_replace(revision);
    }

    fn apply(&self, events: &[WatchEvent], revision: u64) {
        let mine = |event: &&WatchEvent| PREFIXES.iter().any(|p| event.key().starts_with(p.as_bytes()));
        let mut mine = events.iter().filter(mine).peekable();
        if mine.peek().is_some() {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            for event in mine {
                let key = String::from_utf8_lossy(event.key()).into_owned();
                match event {
                    WatchEvent::Put { kv, .. } => {
                        if let Err(error) = known.world.take_in(kv) {
                            tracing::error!(%error, "an object of the directory can't be read; it is left out");
                        }
                    }
                    WatchEvent::Delete { .. } => known.world.leave_out(&key),
                }
                known.derive(&key);
                if let Some(reach) = forgotten(&known.world, &key) {
                    known.apply(Change::Forget(reach));
                }
            }
        }
        self.revision.send_replace(revision);
    }
}

/// What reached an organization that is gone. A project's grants are erased with it, one by one.
fn forgotten(world: &World, key: &str) -> Option<Reach> {
    let name: Name = key.strip_prefix("o/organizations/-/")?.parse().ok()?;
    world.organizations.get(None, &name).is_none().then(|| Reach::organization(name.as_str()))
}
