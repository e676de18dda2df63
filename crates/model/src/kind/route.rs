//! Which host names and paths gateways answer, and with which app.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, Scope, Verbs};
use crate::{Condition, FieldError, Name};

#[derive(Debug, Clone)]
pub struct Route;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouteSpec {
    /// A host name such as `shop.example.com`, or `*.example.com` for every name one label below.
    #[schemars(length(min = 1, max = 253), regex(pattern = HOST_PATTERN))]
    pub host: String,
    /// Requests whose path begins with this, at a `/`. The longest match wins.
    #[serde(default = "root")]
    #[schemars(length(min = 1, max = 1024), regex(pattern = "^/[!-~]*$"))]
    pub path: String,
    /// An app of the same project.
    pub app: Name,
    /// The app's port; its first without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
}

/// Labels (RFC 1123) with points between them, after an optional `*.`.
const HOST_PATTERN: &str = r"^(\*\.)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$";

fn root() -> String {
    "/".into()
}

impl Default for RouteSpec {
    fn default() -> Self {
        Self { host: String::new(), path: root(), app: "none".parse().expect("a well-formed name"), port: None }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for Route {
    const KIND: &'static str = "Route";
    const PLURAL: &'static str = "routes";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "Sends the requests for a host name and path to an app.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("HOST", "/spec/host"),
        Column::new("PATH", "/spec/path"),
        Column::new("APP", "/spec/app"),
        Column::new("PORT", "/spec/port"),
    ];
    type Spec = RouteSpec;
    type Status = RouteStatus;

    fn validate(spec: &RouteSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let host = spec.host.strip_prefix("*.").unwrap_or(&spec.host);
        let good = spec.host.len() <= 253 && host.split('.').all(|label| label.parse::<Name>().is_ok());
        if !good {
            errors.push(FieldError::new("spec.host", "a lower-case host name, or *. and one"));
        }
        let path = &spec.path;
        if !path.starts_with('/') || path.len() > 1024 || !path.bytes().all(|b| b.is_ascii_graphic()) {
            errors.push(FieldError::new("spec.path", "begins with / and has no space"));
        }
        if spec.port == Some(0) {
            errors.push(FieldError::new("spec.port", "between 1 and 65535"));
        }
        errors
    }

    fn example() -> RouteSpec {
        RouteSpec {
            host: "shop.example.com".into(),
            app: "web".parse().expect("a well-formed name"),
            ..RouteSpec::default()
        }
    }
}
