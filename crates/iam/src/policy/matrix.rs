//! Every action against every kind of asker: the rows of the golden file, made from the vocabulary.
//!
//! A new kind or verb makes new rows, so that nobody adds one without seeing who may use it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use nexus_model::Timestamp;

use super::PolicyError;
use super::engine::{Change, Engine};
use super::request::{Binding, Circumstances, Principal, Reach, Request, Resource, Role};
use super::rules::Holder;
use super::vocabulary::Vocabulary;

/// Who is asked about. `anonymous` is whoever brings no credential, `other-tenant` the owner of another organization,
/// `operator` has the role fleet-operator; the others have the role of their name over the organization.
pub const PERSONAS: [&str; 10] = [
    "anonymous",
    "other-tenant",
    "viewer",
    "editor",
    "admin",
    "owner",
    "auditor",
    "billing",
    "fleet-viewer",
    "operator",
];

/// One action on one type of resource in an organization, and whether each of [`PERSONAS`] may do it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub action: Arc<str>,
    pub resource: &'static str,
    pub allowed: [bool; PERSONAS.len()],
}

const OURS: &str = "acme";
const THEIRS: &str = "globex";

fn principal(persona: &str) -> Option<Principal> {
    match persona {
        "anonymous" => None,
        "other-tenant" => Some(Principal::user(THEIRS, persona)),
        _ => Some(Principal::user(OURS, persona)),
    }
}

fn engine(vocabulary: Arc<Vocabulary>) -> Result<Engine, PolicyError> {
    let mut engine = Engine::new(vocabulary)?;
    for persona in PERSONAS {
        let Some(principal) = principal(persona) else { continue };
        engine.apply(Change::Member { principal: principal.clone(), groups: Vec::new() })?;
        let (role, reach) = match persona {
            "other-tenant" => (Role::Owner, Reach::organization(THEIRS)),
            "operator" => (Role::FleetOperator, Reach::Fleet),
            "fleet-viewer" => (Role::FleetViewer, Reach::Fleet),
            _ => (persona.parse()?, Reach::organization(OURS)),
        };
        engine.apply(Change::Binding(Binding { name: persona.into(), role, reach, subjects: vec![principal] }))?;
    }
    Ok(engine)
}

/// The rows, in the order in which the actions are declared.
pub fn matrix(vocabulary: Arc<Vocabulary>) -> Result<Vec<Row>, PolicyError> {
    let engine = engine(vocabulary.clone())?;
    let holder = Principal::user(OURS, "somebody");
    let circumstances = Circumstances {
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        time: Timestamp::from_millis(0),
        mfa: false,
        request_id: "matrix",
    };
    let mut rows = Vec::new();
    for action in vocabulary.actions() {
        for kind in action.resources.iter().copied() {
            let known = vocabulary.resource_type(kind);
            let known = known.ok_or_else(|| PolicyError::NoRule(action.name.to_string()))?;
            let inside = |name| Resource::in_organization(kind, OURS, name);
            let resource = match (known.holder, kind) {
                (_, "Fleet") => Resource::FLEET,
                (_, "Organization") => Resource::organization(OURS),
                (_, "Project") => Resource::project(OURS, "shop"),
                (_, "ServiceAccount") => inside("robot"),
                (Holder::Project, _) => Resource { project: Some("shop"), region: Some("eu"), ..inside("thing") },
                (Holder::Organization | Holder::Any, _) => inside("somebody"),
                (Holder::Account, _) => Resource::credential(kind, &holder, "thing"),
                (Holder::Fleet, _) => Resource { kind, name: "thing", region: Some("eu"), ..Resource::default() },
            };
            let may = |persona: &str| {
                principal(persona).is_some_and(|principal| {
                    let request = Request { principal: &principal, action: &action.name, resource, circumstances };
                    engine.decide(&request).allowed
                })
            };
            rows.push(Row { action: action.name.clone(), resource: kind, allowed: PERSONAS.map(may) });
        }
    }
    Ok(rows)
}
