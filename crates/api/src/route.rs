//! Paths. A path is taken apart against the kinds' declarations, segment by segment, so that nothing is ambiguous
//! (`/v1/regions/eu` is the region's object, `/v1/regions/eu/apps` a list) and a wrong path can say what was meant.
//!
//! | scope | collection | object |
//! |---|---|---|
//! | global | `/v1/{plural}` | `/v1/{plural}/{name}` |
//! | region | `/v1/regions/{region}/{plural}` | `…/{plural}/{name}` |
//! | project | `/v1/regions/{region}/projects/{project}/{plural}` | `…/{plural}/{name}` |
//!
//! `/v1/operations/{name}` are the operators' verbs ([`operations`]).
//!
//! `/v1/regions/{region}/{plural}` of a project's kind lists over all projects. Custom verbs follow the name after a
//! colon (AIP-136).

use http::{HeaderValue, Method, header};
use nexus_model::kind::{self, KindDescriptor, Scope};
use nexus_model::{ApiError, Code, Digest, Name};
use percent_encoding::percent_decode_str;

use crate::operations::{self, Operation};
use crate::problem::Refusal;

/// Custom verbs: what can be done to one object beside reading and writing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Logs,
    Exec,
}

/// Which kinds have which custom verbs.
pub(crate) const VERBS: [(&str, &str, Verb); 2] =
    [("instances", "logs", Verb::Logs), ("instances", "exec", Verb::Exec)];

/// A collection of a kind, or one place in it.
#[derive(Clone)]
pub(crate) struct Place {
    pub kind: &'static KindDescriptor,
    /// Absent for kinds without projects, and when a list goes over all projects.
    pub project: Option<Name>,
}

/// What a path names.
#[derive(Clone)]
pub(crate) enum Target {
    Health,
    Ready,
    Metrics,
    OpenApi,
    Status,
    Collection(Place),
    /// The name is as it was written: whether a malformed one is "not found" or "invalid" depends on the method.
    Object(Place, String),
    Custom(Place, Name, Verb),
    Blob(Name, Digest),
    Operation(&'static Operation),
}

impl Target {
    /// Whether it is answered without a token.
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Health | Self::Ready | Self::Metrics | Self::OpenApi)
    }

    /// The path with its variable parts left out: the label of this route's metrics.
    pub fn template(&self) -> String {
        match self {
            Self::Health => "/healthz".into(),
            Self::Ready => "/readyz".into(),
            Self::Metrics => "/metrics".into(),
            Self::OpenApi => "/v1/openapi.json".into(),
            Self::Status => "/v1/status".into(),
            Self::Collection(place) => collection_template(place.kind, place.project.is_some()),
            Self::Object(place, _) => format!("{}/{{name}}", collection_template(place.kind, true)),
            Self::Custom(place, _, verb) => {
                let word = VERBS.iter().find(|v| v.2 == *verb).map_or("", |v| v.1);
                format!("{}/{{name}}:{word}", collection_template(place.kind, true))
            }
            Self::Blob(..) => BLOB_TEMPLATE.into(),
            Self::Operation(operation) => operation.path(),
        }
    }

    fn methods(&self) -> &'static [Method] {
        const READ: &[Method] = &[Method::GET, Method::HEAD];
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
            Self::Operation(_) => &[Method::POST],
            _ => READ,
        }
    }
}

pub(crate) const BLOB_TEMPLATE: &str = "/v1/regions/{region}/projects/{project}/blobs/{digest}";

/// The path of a kind's collection. `in_project` tells a project's list from the one over all projects.
pub(crate) fn collection_template(kind: &KindDescriptor, in_project: bool) -> String {
    match kind.scope {
        Scope::Global => format!("/v1/{}", kind.plural),
        Scope::Project if in_project => format!("/v1/regions/{{region}}/projects/{{project}}/{}", kind.plural),
        Scope::Region | Scope::Project => format!("/v1/regions/{{region}}/{}", kind.plural),
    }
}

impl Place {
    pub fn lists_all_projects(&self) -> bool {
        self.kind.scope == Scope::Project && self.project.is_none()
    }

    /// The path of an object here.
    pub fn path(&self, region: &Name, name: &Name) -> String {
        let project = self.project.as_ref().map_or("", Name::as_str);
        let collection = collection_template(self.kind, true).replace("{region}", region.as_str());
        format!("{}/{name}", collection.replace("{project}", project))
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

/// Takes a path apart. `region` is the one that this server serves.
pub(crate) fn resolve(path: &str, region: &Name) -> Result<Target, ApiError> {
    match path {
        "/healthz" => return Ok(Target::Health),
        "/readyz" => return Ok(Target::Ready),
        "/metrics" => return Ok(Target::Metrics),
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
    let in_region = |name: &str| {
        if *region == name {
            return Ok(());
        }
        let shown: String = name.chars().take(64).collect();
        Err(no_path(format!("this server serves the region {:?}, not {shown:?}", region.as_str())))
    };
    match segments[..] {
        ["openapi.json"] => Ok(Target::OpenApi),
        ["status"] => Ok(Target::Status),
        ["operations", name] => match operations::find(name) {
            Some(operation) => Ok(Target::Operation(operation)),
            None => {
                let all: Vec<_> = operations::OPERATIONS.iter().map(|o| o.name).collect();
                Err(no_path(format!("there is no such operation; there are: {}", all.join(", "))))
            }
        },
        [plural] => Ok(Target::Collection(Place { kind: kind_at(plural, &[Scope::Global])?, project: None })),
        [plural, name] => object(Place { kind: kind_at(plural, &[Scope::Global])?, project: None }, name),
        ["regions", r, plural] => {
            in_region(r)?;
            Ok(Target::Collection(Place { kind: kind_at(plural, &[Scope::Region, Scope::Project])?, project: None }))
        }
        ["regions", r, "projects", _] => {
            in_region(r)?;
            Err(no_path("projects are at /v1/projects; what a project owns is one segment further"))
        }
        ["regions", r, plural, name] => {
            in_region(r)?;
            object(Place { kind: kind_at(plural, &[Scope::Region])?, project: None }, name)
        }
        ["regions", r, "projects", project, plural] => {
            in_region(r)?;
            let kind = kind_at(plural, &[Scope::Project])?;
            Ok(Target::Collection(Place { kind, project: Some(name_of("project", project)?) }))
        }
        ["regions", r, "projects", project, "blobs", digest] => {
            in_region(r)?;
            let digest = digest.parse().map_err(|e| no_path(format!("there is no such blob: {e}")))?;
            Ok(Target::Blob(name_of("project", project)?, digest))
        }
        ["regions", r, "projects", project, plural, name] => {
            in_region(r)?;
            let kind = kind_at(plural, &[Scope::Project])?;
            object(Place { kind, project: Some(name_of("project", project)?) }, name)
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
    fn a_wrong_path_says_what_was_meant() {
        assert!(at("/v1/apps").unwrap_err().contains("/projects/{project}/apps"));
        assert!(at("/v1/regions/local/projects/p/app").unwrap_err().contains("\"apps\""));
        assert!(at("/v1/operations/server-jion").unwrap_err().contains("server-join"));
        assert!(at("/v1/regions/local/hsots").unwrap_err().contains("\"hosts\""));
        assert!(at("/v1/regions/other/apps").unwrap_err().contains("\"local\""));
        assert!(at("/v1/regions/local/projects/p/instances/a:reboot").unwrap_err().contains(":logs"));
        for path in ["/", "/v1", "/v1/", "/v2/apps", "/v1/regions/local/projects/P!/apps", "/v1/regions/local/apps/x"] {
            assert!(at(path).is_err(), "{path}");
        }
    }
}
