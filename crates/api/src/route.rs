//! Paths. A path is taken apart against the kinds' declarations, segment by segment, so that nothing is ambiguous
//! (`/v1/regions/eu` is the region's object, `/v1/regions/eu/apps` a list) and a wrong path can say what was meant.
//!
//! | scope | collection | object |
//! |---|---|---|
//! | global | `/v1/{plural}` | `/v1/{plural}/{name}` |
//! | region | `/v1/regions/{region}/{plural}` | `…/{plural}/{name}` |
//! | project | `/v1/regions/{region}/projects/{project}/{plural}` | `…/{plural}/{name}` |
//! | organization | `/v1/organizations/{organization}/{plural}` | `…/{plural}/{name}` |
//!
//! `/v1/operations/{name}` are the operators' verbs ([`operations`]); `/oauth2/…` and what is below `/.well-known` are
//! where people and programs sign in ([`crate::signin`]); `/v1/whoami`, `/v1/can` and `/v1/policy-schema` say who asks and
//! what they may do.
//!
//! The region `global` stands for the group that all regions share: images are there, and apps and routes of no one region.
//! Its paths, and those of this server's region, are answered here; images in whatever region's path. Any other
//! region's path is passed on to a server of that region.
//!
//! `/v1/regions/{region}/{plural}` of a project's kind lists over all projects. Custom verbs follow the name after a
//! colon (AIP-136).

use http::{HeaderValue, Method, header};
use nexus_model::kind::{self, GLOBAL, Home, KindDescriptor, Scope};
use nexus_model::{ApiError, Code, Digest, Name};
use percent_encoding::percent_decode_str;

use crate::audit::{ASKED, Asked};
use crate::operations::{self, Operation};
use crate::problem::Refusal;

/// Custom verbs: what can be done to one object beside reading and writing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Logs,
    Exec,
    Reveal,
    Test,
    Resend,
    SetPassword,
    Invite,
    EnrollTotp,
    ConfirmTotp,
    Load,
    Pause,
    Resume,
    Promote,
    Undo,
    Trace,
    Capture,
    Check,
    Flows,
}

/// Which kinds have which custom verbs.
pub(crate) const VERBS: [(&str, &str, Verb); 18] = [
    ("instances", "logs", Verb::Logs),
    ("instances", "exec", Verb::Exec),
    ("secrets", "reveal", Verb::Reveal),
    ("users", "set-password", Verb::SetPassword),
    ("users", "invite", Verb::Invite),
    ("users", "enroll-totp", Verb::EnrollTotp),
    ("users", "confirm-totp", Verb::ConfirmTotp),
    ("apps", "load", Verb::Load),
    ("apps", "pause", Verb::Pause),
    ("apps", "resume", Verb::Resume),
    ("apps", "promote", Verb::Promote),
    ("apps", "undo", Verb::Undo),
    ("webhooks", "test", Verb::Test),
    ("deliveries", "resend", Verb::Resend),
    ("nics", "trace", Verb::Trace),
    ("nics", "capture", Verb::Capture),
    ("hosts", "check", Verb::Check),
    ("networks", "flows", Verb::Flows),
];

impl Verb {
    pub fn word(self) -> &'static str {
        VERBS.iter().find(|v| v.2 == self).map_or("", |v| v.1)
    }

    fn methods(self) -> &'static [Method] {
        match self {
            Self::Logs | Self::Exec => READ,
            Self::Reveal | Self::Load | Self::Trace | Self::Capture | Self::Check | Self::Flows => &[Method::GET],
            Self::Test | Self::Resend => &[Method::POST],
            Self::SetPassword | Self::Invite | Self::EnrollTotp | Self::ConfirmTotp => &[Method::POST],
            Self::Pause | Self::Resume | Self::Promote | Self::Undo => &[Method::POST],
        }
    }

    /// Whether it orders something about an app's rollout: who may change the app may do that.
    pub fn is_order(self) -> bool {
        matches!(self, Self::Pause | Self::Resume | Self::Promote | Self::Undo)
    }
}

const READ: &[Method] = &[Method::GET, Method::HEAD];

/// A collection of a kind, or one place in it.
#[derive(Clone)]
pub(crate) struct Place {
    pub kind: &'static KindDescriptor,
    /// Absent for kinds without projects, and when a list goes over all projects.
    pub project: Option<Name>,
    /// Absent for kinds that belong to no organization.
    pub organization: Option<Name>,
    /// As the path says it; absent for kinds without regions.
    pub region: Option<Name>,
}

/// What a path names.
#[derive(Clone)]
pub(crate) enum Target {
    Health,
    Ready,
    Metrics,
    OpenApi,
    Status,
    SignIn,
    Discovery,
    Keys,
    Providers,
    WhoAmI,
    Can,
    PolicySchema,
    /// A change of an app, which its body names.
    Scale,
    Collection(Place),
    /// The name is as it was written: whether a malformed one is "not found" or "invalid" depends on the method.
    Object(Place, String),
    Custom(Place, Name, Verb),
    /// The region in its path, project and digest.
    Blob(Name, Name, Digest),
    /// The region in its path, and the project that an image of a registry is for.
    Pull(Name, Name),
    Operation(&'static Operation),
    /// The audit log of a region, or of `global`; of one organization, what is about it.
    Audit(Name, Option<Name>, Asked),
    /// In another region.
    Elsewhere(Name, Box<Target>),
}

impl Target {
    /// Whether it is answered without a token.
    pub fn is_open(&self) -> bool {
        matches!(
            self,
            Self::Health
                | Self::Ready
                | Self::Metrics
                | Self::OpenApi
                | Self::Discovery
                | Self::Keys
                | Self::Providers
                | Self::SignIn
        )
    }

    /// The path with its variable parts left out: the label of this route's metrics.
    pub fn template(&self) -> String {
        match self {
            Self::Health => "/healthz".into(),
            Self::Ready => "/readyz".into(),
            Self::Metrics => "/metrics".into(),
            Self::OpenApi => "/v1/openapi.json".into(),
            Self::Status => "/v1/status".into(),
            Self::SignIn => SIGN_IN.into(),
            Self::Discovery => DISCOVERY.into(),
            Self::Keys => KEYS.into(),
            Self::Providers => PROVIDERS.into(),
            Self::WhoAmI => "/v1/whoami".into(),
            Self::Can => "/v1/can".into(),
            Self::PolicySchema => "/v1/policy-schema".into(),
            Self::Scale => SCALE.into(),
            Self::Collection(place) => collection_template(place.kind, place.project.is_some()),
            Self::Object(place, _) => format!("{}/{{name}}", collection_template(place.kind, true)),
            Self::Custom(place, _, verb) => {
                format!("{}/{{name}}:{}", collection_template(place.kind, true), verb.word())
            }
            Self::Blob(..) => BLOB_TEMPLATE.into(),
            Self::Pull(..) => PULL_TEMPLATE.into(),
            Self::Operation(operation) => operation.path(),
            Self::Audit(_, organization, asked) => audit_template(*asked, organization.is_some()),
            Self::Elsewhere(_, target) => target.template(),
        }
    }

    /// The region that the path names, if it names one.
    pub fn region(&self) -> Option<&Name> {
        match self {
            Self::Collection(place) | Self::Object(place, _) | Self::Custom(place, ..) => place.region.as_ref(),
            Self::Blob(region, ..) | Self::Pull(region, _) | Self::Audit(region, ..) | Self::Elsewhere(region, _) => {
                Some(region)
            }
            _ => None,
        }
    }

    /// The project that the path names, if it names one.
    pub fn project(&self) -> Option<&Name> {
        match self {
            Self::Collection(place) | Self::Object(place, _) | Self::Custom(place, ..) => place.project.as_ref(),
            Self::Blob(_, project, _) | Self::Pull(_, project) => Some(project),
            Self::Elsewhere(_, target) => target.project(),
            _ => None,
        }
    }

    fn methods(&self) -> &'static [Method] {
        match self {
            Self::Collection(place) => match place.kind.verbs.create && !place.lists_all_projects() {
                true => &[Method::GET, Method::HEAD, Method::POST],
                false => READ,
            },
            Self::Object(place, _) => match (place.kind.verbs.update, place.kind.verbs.delete) {
                (true, true) => &[Method::GET, Method::HEAD, Method::PUT, Method::PATCH, Method::DELETE],
                (true, false) => &[Method::GET, Method::HEAD, Method::PUT, Method::PATCH],
                (false, true) => &[Method::GET, Method::HEAD, Method::DELETE],
                (false, false) => READ,
            },
            Self::Blob(..) => &[Method::GET, Method::HEAD, Method::PUT],
            Self::Operation(_) | Self::SignIn | Self::Can | Self::Pull(..) | Self::Scale => &[Method::POST],
            Self::Custom(_, _, verb) => verb.methods(),
            Self::Audit(.., asked) => asked.methods(),
            Self::Elsewhere(_, target) => target.methods(),
            _ => READ,
        }
    }
}

pub(crate) const SCALE: &str = "/v1/architecture/scale";
pub(crate) const SIGN_IN: &str = "/oauth2/token";
pub(crate) const PROVIDERS: &str = "/oauth2/providers";
pub(crate) const DISCOVERY: &str = "/.well-known/openid-configuration";
pub(crate) const KEYS: &str = "/.well-known/jwks.json";
pub(crate) const BLOB_TEMPLATE: &str = "/v1/regions/{region}/projects/{project}/blobs/{digest}";
pub(crate) const PULL_TEMPLATE: &str = "/v1/regions/{region}/projects/{project}/blobs:pull";

pub(crate) fn audit_template(asked: Asked, in_organization: bool) -> String {
    let of = if in_organization { "/organizations/{organization}" } else { "" };
    format!("/v1/regions/{{region}}{of}/audit/{}", asked.word())
}

fn audit_at(region: &str, organization: Option<&str>, word: &str, here: &Name) -> Result<Target, ApiError> {
    let open = || ASKED.iter().filter(|(_, asked)| organization.is_none() || *asked != Asked::Forget);
    let Some((_, asked)) = open().find(|(w, _)| *w == word) else {
        let all: Vec<_> = open().map(|(w, _)| *w).collect();
        return Err(no_path(format!("the audit log has no such path; it has: {}", all.join(", "))));
    };
    let name = name_of("region", region)?;
    let organization = organization.map(|o| name_of("organization", o)).transpose()?;
    let elsewhere = (name != *here && name != *GLOBAL).then(|| name.clone());
    Ok(wherever(elsewhere, Target::Audit(name, organization, *asked)))
}

/// The path of a kind's collection. `in_project` tells a project's list from the one over all projects.
pub(crate) fn collection_template(kind: &KindDescriptor, in_project: bool) -> String {
    match kind.scope {
        Scope::Global => format!("/v1/{}", kind.plural),
        Scope::Project if in_project => format!("/v1/regions/{{region}}/projects/{{project}}/{}", kind.plural),
        Scope::Region | Scope::Project => format!("/v1/regions/{{region}}/{}", kind.plural),
        Scope::Organization => format!("/v1/organizations/{{organization}}/{}", kind.plural),
    }
}

impl Place {
    pub fn lists_all_projects(&self) -> bool {
        self.kind.scope == Scope::Project && self.project.is_none()
    }

    /// Whether the group that all regions share keeps what is here.
    pub fn is_global(&self) -> bool {
        self.kind.home == Home::Global || self.region.as_ref().is_some_and(|r| *r == *GLOBAL)
    }

    /// What names here are unique in: a project or an organization.
    pub fn within(&self) -> Option<&Name> {
        self.project.as_ref().or(self.organization.as_ref())
    }

    /// The path of an object here.
    pub fn path(&self, name: &Name) -> String {
        let mut collection = collection_template(self.kind, true);
        let parts = [("{region}", &self.region), ("{project}", &self.project), ("{organization}", &self.organization)];
        for (part, value) in parts {
            collection = collection.replace(part, value.as_ref().map_or("", Name::as_str));
        }
        format!("{collection}/{name}")
    }
}

fn no_path(detail: impl Into<String>) -> ApiError {
    ApiError::new(Code::NotFound, detail)
}

/// A kind that belongs at a path, or why there is none.
fn kind_at(plural: &str, scopes: &[Scope]) -> Result<&'static KindDescriptor, ApiError> {
    let shown: String = plural.chars().take(64).collect();
    if let Some(kind) = kind::all().iter().find(|d| d.plural == plural) {
        if scopes.contains(&kind.scope) {
            return Ok(kind);
        }
        let path = collection_template(kind, true);
        return Err(no_path(format!("{} are at {path}", kind.plural)));
    }
    let here = || kind::all().iter().filter(|d| scopes.contains(&d.scope));
    if let Some(kind) = kind::find(plural) {
        return Err(no_path(format!("there is no collection {shown:?}; did you mean {:?}?", kind.plural)));
    }
    let near = kind::all().iter().map(|d| (strsim::damerau_levenshtein(d.plural, &shown), d.plural)).min();
    Err(no_path(match near {
        Some((distance, near)) if distance <= 3 => format!("there is no collection {shown:?}; did you mean {near:?}?"),
        _ => {
            let all: Vec<_> = here().map(|d| d.plural).collect();
            format!("there is no collection {shown:?}; here are: {}", all.join(", "))
        }
    }))
}

fn name_of(what: &str, text: &str) -> Result<Name, ApiError> {
    text.parse().map_err(|e| {
        let shown: String = text.chars().take(64).collect();
        no_path(format!("there is no {what} {shown:?}: {e}"))
    })
}

fn object(place: Place, last: &str) -> Result<Target, ApiError> {
    let Some((name, word)) = last.split_once(':') else { return Ok(Target::Object(place, last.to_owned())) };
    let mine = || VERBS.iter().filter(|v| v.0 == place.kind.plural);
    let Some((_, _, verb)) = mine().find(|v| v.1 == word) else {
        let known: Vec<_> = mine().map(|v| format!(":{}", v.1)).collect();
        let known = if known.is_empty() { "no verbs of their own".into() } else { known.join(", ") };
        let shown: String = word.chars().take(64).collect();
        return Err(no_path(format!("there is no verb {shown:?}; {} have {known}", place.kind.plural)));
    };
    let name = name_of(place.kind.kind, name)?;
    Ok(Target::Custom(place, name, *verb))
}

/// A place in a region, and the region if it is neither `here` nor `global`.
fn place(
    kind: &'static KindDescriptor,
    region: &str,
    project: Option<&str>,
    here: &Name,
) -> Result<(Place, Option<Name>), ApiError> {
    let region = name_of("region", region)?;
    if region == *GLOBAL && kind.home == Home::Region {
        let path = collection_template(kind, true);
        return Err(no_path(format!("{} belong to a region: {path}, with the region's own name", kind.plural)));
    }
    let answered = region == *here || region == *GLOBAL || kind.home == Home::Global;
    let elsewhere = (!answered).then(|| region.clone());
    let project = project.map(|p| name_of("project", p)).transpose()?;
    Ok((Place { kind, project, organization: None, region: Some(region) }, elsewhere))
}

fn in_organization(organization: &str, plural: &str) -> Result<Place, ApiError> {
    let kind = kind_at(plural, &[Scope::Organization])?;
    let organization = name_of("organization", organization)?;
    Ok(Place { kind, project: None, organization: Some(organization), region: None })
}

fn wherever(elsewhere: Option<Name>, target: Target) -> Target {
    match elsewhere {
        Some(region) => Target::Elsewhere(region, Box::new(target)),
        None => target,
    }
}

/// Takes a path apart. `region` is the one that this server serves.
pub(crate) fn resolve(path: &str, region: &Name) -> Result<Target, ApiError> {
    match path {
        "/healthz" => return Ok(Target::Health),
        "/readyz" => return Ok(Target::Ready),
        "/metrics" => return Ok(Target::Metrics),
        SIGN_IN => return Ok(Target::SignIn),
        DISCOVERY => return Ok(Target::Discovery),
        KEYS => return Ok(Target::Keys),
        SCALE => return Ok(Target::Scale),
        PROVIDERS => return Ok(Target::Providers),
        _ => {}
    }
    let Some(rest) = path.strip_prefix("/v1/") else {
        return Err(no_path("nothing is at this path; the API is at /v1, its description at /v1/openapi.json"));
    };
    let segments: Result<Vec<_>, _> = rest
        .split('/')
        .map(|s| percent_decode_str(s).decode_utf8().map_err(|_| no_path("the path is not UTF-8")))
        .collect();
    let segments = segments?;
    let segments: Vec<&str> = segments.iter().map(|s| &**s).collect();
    match segments[..] {
        ["openapi.json"] => Ok(Target::OpenApi),
        ["status"] => Ok(Target::Status),
        ["whoami"] => Ok(Target::WhoAmI),
        ["can"] => Ok(Target::Can),
        ["policy-schema"] => Ok(Target::PolicySchema),
        ["operations", name] => match operations::find(name) {
            Some(operation) => Ok(Target::Operation(operation)),
            None => {
                let all: Vec<_> = operations::OPERATIONS.iter().map(|o| o.name).collect();
                Err(no_path(format!("there is no such operation; there are: {}", all.join(", "))))
            }
        },
        [plural] => {
            let kind = kind_at(plural, &[Scope::Global])?;
            Ok(Target::Collection(Place { kind, project: None, organization: None, region: None }))
        }
        [plural, name] => {
            let kind = kind_at(plural, &[Scope::Global])?;
            object(Place { kind, project: None, organization: None, region: None }, name)
        }
        ["regions", _, "projects", _] => {
            Err(no_path("projects are at /v1/projects; what a project owns is one segment further"))
        }
        ["regions", r, "projects", project, "blobs", digest] => {
            // Every server has or fetches every blob, whichever region the path names.
            let region = name_of("region", r)?;
            let digest = digest.parse().map_err(|e| no_path(format!("there is no such blob: {e}")))?;
            Ok(Target::Blob(region, name_of("project", project)?, digest))
        }
        ["regions", r, "projects", project, "blobs:pull"] => {
            // Not in whatever region: its secrets are there.
            let name = name_of("region", r)?;
            let elsewhere = (name != *region && name != *GLOBAL).then(|| name.clone());
            Ok(wherever(elsewhere, Target::Pull(name, name_of("project", project)?)))
        }
        ["organizations", organization, plural] => Ok(Target::Collection(in_organization(organization, plural)?)),
        ["organizations", organization, plural, name] => object(in_organization(organization, plural)?, name),
        ["regions", r, plural] => {
            let kind = kind_at(plural, &[Scope::Region, Scope::Project])?;
            let (place, elsewhere) = place(kind, r, None, region)?;
            Ok(wherever(elsewhere, Target::Collection(place)))
        }
        ["regions", r, "audit", word] => audit_at(r, None, word, region),
        ["regions", r, "organizations", organization, "audit", word] => audit_at(r, Some(organization), word, region),
        ["regions", r, plural, name] => {
            let kind = kind_at(plural, &[Scope::Region])?;
            let (place, elsewhere) = place(kind, r, None, region)?;
            Ok(wherever(elsewhere, object(place, name)?))
        }
        ["regions", r, "projects", project, plural] => {
            let kind = kind_at(plural, &[Scope::Project])?;
            let (place, elsewhere) = place(kind, r, Some(project), region)?;
            Ok(wherever(elsewhere, Target::Collection(place)))
        }
        ["regions", r, "projects", project, plural, name] => {
            let kind = kind_at(plural, &[Scope::Project])?;
            let (place, elsewhere) = place(kind, r, Some(project), region)?;
            Ok(wherever(elsewhere, object(place, name)?))
        }
        _ => Err(no_path("nothing is at this path; the API's description is at /v1/openapi.json")),
    }
}

/// Refuses a method that the target does not have, and names those that it has.
pub(crate) fn check_method(target: &Target, method: &Method) -> Result<(), Refusal> {
    let methods = target.methods();
    if methods.contains(method) {
        return Ok(());
    }
    let allow = methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
    let detail = match target {
        Target::Collection(p) if p.lists_all_projects() => {
            format!(
                "this list goes over all projects and can only be read; create at {}",
                collection_template(p.kind, true)
            )
        }
        Target::Collection(p) | Target::Object(p, _) => {
            format!("{} allow {allow} here, not {method}", p.kind.plural)
        }
        _ => format!("only {allow}"),
    };
    let value = HeaderValue::try_from(allow).expect("method names are header values");
    Err(Refusal::new(Code::MethodNotAllowed, detail).with(header::ALLOW, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Result<String, String> {
        resolve(path, &"local".parse().unwrap()).map(|t| t.template()).map_err(|e| e.detail)
    }

    #[test]
    fn every_scope_has_its_path() {
        assert_eq!(at("/v1/regions").unwrap(), "/v1/regions");
        assert_eq!(at("/v1/regions/elsewhere").unwrap(), "/v1/regions/{name}");
        assert_eq!(at("/v1/regions/local/hosts/h-1").unwrap(), "/v1/regions/{region}/hosts/{name}");
        assert_eq!(at("/v1/regions/local/apps").unwrap(), "/v1/regions/{region}/apps");
        let app = "/v1/regions/{region}/projects/{project}/apps/{name}";
        assert_eq!(at("/v1/regions/local/projects/p/apps/web").unwrap(), app);
        let logs = "/v1/regions/{region}/projects/{project}/instances/{name}:logs";
        assert_eq!(at("/v1/regions/local/projects/p/instances/web-1%3Alogs").unwrap(), logs);
    }

    #[test]
    fn other_regions_paths_are_passed_on_and_global_ones_are_not() {
        let to = |path: &str| resolve(path, &"local".parse().unwrap()).map_err(|e| e.detail).unwrap();
        let elsewhere = |path: &str| matches!(to(path), Target::Elsewhere(region, _) if region == *"other");
        for path in ["apps", "hosts", "projects/p/apps", "projects/p/apps/a", "projects/p/instances/i:logs"] {
            assert!(elsewhere(&format!("/v1/regions/other/{path}")), "{path}");
        }
        for path in ["projects/p/images", "projects/p/images/a", "images"] {
            assert!(!elsewhere(&format!("/v1/regions/other/{path}")), "{path}");
        }
        let is_global = |path: &str| match to(path) {
            Target::Collection(place) | Target::Object(place, _) => place.is_global(),
            _ => false,
        };
        for path in ["regions/global/projects/p/apps/a", "projects", "regions/other", "regions/local/images"] {
            assert!(is_global(&format!("/v1/{path}")), "{path}");
        }
        assert!(!is_global("/v1/regions/local/projects/p/apps"));
    }

    #[test]
    fn a_wrong_path_says_what_was_meant() {
        assert!(at("/v1/apps").unwrap_err().contains("/projects/{project}/apps"));
        assert!(at("/v1/regions/local/projects/p/app").unwrap_err().contains("\"apps\""));
        assert!(at("/v1/operations/server-jion").unwrap_err().contains("server-join"));
        assert!(at("/v1/regions/local/hsots").unwrap_err().contains("\"hosts\""));
        assert!(at("/v1/regions/global/hosts").unwrap_err().contains("belong to a region"));
        assert!(at("/v1/regions/local/projects/p/instances/a:reboot").unwrap_err().contains(":logs"));
        for path in ["/", "/v1", "/v1/", "/v2/apps", "/v1/regions/local/projects/P!/apps", "/v1/regions/local/apps/x"] {
            assert!(at(path).is_err(), "{path}");
        }
    }
}
