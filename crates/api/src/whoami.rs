//! Who somebody is, and what they may do.

use axum::body::Body;
use axum::response::Response;
use http::request::Parts;
use nexus_iam::policy::{self, Place as PolicyPlace, Principal};
use nexus_model::selector::Labels;
use nexus_model::{ApiError, Code, Name, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::caller::Proof;
use crate::input::read_json;
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::Place;
use crate::serve::{Context, Server, json as answer_json};

/// What `/v1/whoami` answers.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct WhoAmI {
    name: String,
    kind: policy::PrincipalKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    organization: Option<Name>,
    /// By what it was proved: `key`, `token NAME`, `session NAME`.
    by: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    project: Option<Name>,
    mfa: bool,
    groups: Vec<String>,
    roles: Vec<HeldRole>,
}

#[derive(Debug, Serialize)]
struct HeldRole {
    role: policy::Role,
    over: String,
}

pub(crate) fn who_am_i(server: &Server, context: &Context) -> impl Serialize + use<> {
    let caller = &context.caller;
    let (groups, roles) = server.api.directory.read(|known| {
        let groups: Vec<String> = known.groups_of(&caller.principal).iter().map(|g| g.name().to_owned()).collect();
        (groups, known.engine.roles_of(&caller.principal))
    });
    WhoAmI {
        name: caller.name.clone(),
        kind: caller.principal.kind(),
        organization: caller.holder.as_ref().map(|(o, _)| o.clone()),
        by: match &caller.proof {
            Proof::Key => "key".into(),
            Proof::Token { name, .. } => format!("token {name}"),
            Proof::AccessKey { name, .. } => format!("access key {name}"),
            Proof::Session { name, .. } => format!("session {name}"),
        },
        expires: caller.until,
        project: caller.project.clone(),
        mfa: caller.mfa,
        groups,
        roles: roles.into_iter().map(|(role, reach)| HeldRole { role, over: reach.to_string() }).collect(),
    }
}

/// What `/v1/can` is asked.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CanRequest {
    /// `create`, `list`, `exec` …
    verb: String,
    /// A kind's name, plural or short form, or a collection such as `blobs`.
    kind: String,
    #[serde(default)]
    name: Option<Name>,
    #[serde(default)]
    organization: Option<Name>,
    #[serde(default)]
    project: Option<Name>,
    #[serde(default)]
    region: Option<Name>,
    #[serde(default)]
    labels: Labels,
    /// Somebody else, as `organization/name`: only for who may read the organization's role bindings.
    #[serde(default)]
    user: Option<String>,
    /// Also every statement that was looked at.
    #[serde(default)]
    explain: bool,
}

/// Answers whether somebody may do something, and why.
pub(crate) async fn can(server: &Server, context: &Context, parts: &Parts, body: Body) -> Result<Response, Refusal> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let asked: CanRequest = serde_json::from_value(read_json(&parts.headers, body, crate::write::JSON).await?)
        .map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
    let principal = match &asked.user {
        None => context.caller.principal.clone(),
        Some(text) => {
            let (organization, name) = text
                .split_once('/')
                .ok_or_else(|| Refusal::new(Code::BadRequest, "user is ORGANIZATION/NAME, such as acme/ada"))?;
            let organization: Name =
                organization.parse().map_err(|_| ApiError::not_found("Organization", organization))?;
            let kind = nexus_model::kind::find("role-bindings").expect("a kind");
            let place = Place { kind, project: None, organization: Some(organization.clone()), region: None };
            let bindings = crate::route::Target::Collection(place);
            server.authorize(context, &bindings, &http::Method::GET, None).await?;
            Principal::user(organization.as_str(), name)
        }
    };
    // Who may not know of a project is told what is told of one that is not there.
    if let Some(project) = &asked.project {
        let kind = nexus_model::kind::find("projects").expect("a kind");
        let place = Place { kind, project: None, organization: None, region: None };
        let there = crate::route::Target::Object(place, project.to_string());
        server.authorize(context, &there, &http::Method::GET, None).await?;
    }
    let organization = server.api.directory.read(|known| match (&asked.project, &asked.organization) {
        (Some(project), _) => known.project(project).map(|p| p.spec.organization.clone()),
        (None, Some(organization)) => Some(organization.clone()),
        (None, None) => None,
    });
    let region = asked.region.as_ref().unwrap_or(&server.api.region);
    let at = PolicyPlace {
        organization: organization.as_ref().map(Name::as_str),
        project: asked.project.as_ref().map(Name::as_str),
        region: Some(region.as_str()),
        labels: Some(&asked.labels),
    };
    let now = server.now();
    let circumstances = context.caller.circumstances(now, &context.request_id);
    let name = asked.name.as_ref().map(Name::as_str);
    let answer = server.api.directory.read(|known| {
        let engine = &known.engine;
        let decision = engine.can(&principal, &asked.verb, &asked.kind, name, at, circumstances)?;
        let explanation = asked.explain.then(|| {
            let vocabulary = policy::vocabulary();
            let declared = nexus_model::kind::find(&asked.kind);
            let action = format!("{}:{}", declared.map_or(&*asked.kind, |d| d.plural), asked.verb);
            let types = vocabulary.action(&action).map_or(&[][..], |a| &a.resources);
            let resource = at.resource(types, name.unwrap_or("any"));
            engine.explain(&policy::Request { principal: &principal, action: &action, resource, circumstances })
        });
        Ok::<_, policy::PolicyError>((decision, explanation))
    });
    let (decision, explanation) = answer.map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
    let mut told = json!({
        "allowed": decision.allowed,
        "by": decision.by,
        "missingAction": decision.missing_action,
        "errors": decision.errors,
    });
    if let Some(explanation) = explanation {
        told["considered"] = json!(explanation.considered);
        told["roles"] = json!(explanation.roles);
        told["rolesThatWould"] = json!(explanation.roles_that_would);
    }
    Ok(answer_json(&told))
}
