//! SPIFFE ids: `spiffe://<trust domain>/<role>/<name>`, the names that certificates carry.
//!
//! The trust domain is the cluster. The first segment of the path says what the holder may be:
//!
//! | path | who |
//! |---|---|
//! | `/server/<name>` | a control plane server |
//! | `/agent/<host>` | a host's agent |
//! | `/gateway/<name>` | an edge gateway |
//! | `/operator/<name>` | a person or tool with the cluster's own keys |
//! | `/host/<host>/…` | something on a host that is not its agent, such as an engine: no role |
//! | `/api/<name>` | the northbound face, which users check by host name: no role |
//! | `/project/<project>/app/<app>` | a workload: every instance of that app. No role |
//!
//! An id without a role passes no [`Role`] check. Grammar: SPIFFE-ID, sections 2.1 to 2.4.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

const SCHEME: &str = "spiffe://";
/// SPIFFE-ID, section 2.3: no longer than this may be generated or must be accepted.
const MAX_LENGTH: usize = 2048;
/// The length of a DNS name, which a trust domain should look like.
const MAX_TRUST_DOMAIN: usize = 255;

/// What a certificate's holder is to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Server,
    Agent,
    Gateway,
    Operator,
}

impl Role {
    /// The first segment of this role's ids.
    pub fn segment(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Agent => "agent",
            Self::Gateway => "gateway",
            Self::Operator => "operator",
        }
    }

    fn of_segment(segment: &str) -> Option<Self> {
        [Self::Server, Self::Agent, Self::Gateway, Self::Operator].into_iter().find(|r| r.segment() == segment)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.segment())
    }
}

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("`{0}` does not start with `spiffe://`")]
    Scheme(String),
    #[error("a SPIFFE id has at most {MAX_LENGTH} characters, this one has {0}")]
    TooLong(usize),
    #[error("`{0}` is not a trust domain: 1 to {MAX_TRUST_DOMAIN} lower-case letters, digits, `.`, `-` and `_`")]
    TrustDomain(String),
    #[error("`{0}` is not a path segment: letters, digits, `.`, `-` and `_`, but not `.` or `..`")]
    Segment(String),
    #[error("`{0}` names a trust domain and nothing in it: a path is needed")]
    NoPath(String),
}

/// A checked SPIFFE id with a path. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the path's first `/` is.
    path_at: usize,
}

impl SpiffeId {
    /// `spiffe://<trust_domain>/<segment>/<segment>…`.
    pub fn new(trust_domain: &str, segments: &[&str]) -> Result<Self, IdError> {
        check_trust_domain(trust_domain)?;
        let mut text = format!("{SCHEME}{trust_domain}");
        let path_at = text.len();
        for segment in segments {
            check_segment(segment)?;
            text.push('/');
            text.push_str(segment);
        }
        if segments.is_empty() {
            return Err(IdError::NoPath(text));
        }
        if text.len() > MAX_LENGTH {
            return Err(IdError::TooLong(text.len()));
        }
        Ok(Self { text: text.into(), path_at })
    }

    /// The id of the holder `name` of `role`.
    pub fn of_role(trust_domain: &str, role: Role, name: &str) -> Result<Self, IdError> {
        Self::new(trust_domain, &[role.segment(), name])
    }

    pub fn server(trust_domain: &str, name: &str) -> Result<Self, IdError> {
        Self::of_role(trust_domain, Role::Server, name)
    }

    pub fn agent(trust_domain: &str, host: &str) -> Result<Self, IdError> {
        Self::of_role(trust_domain, Role::Agent, host)
    }

    pub fn gateway(trust_domain: &str, name: &str) -> Result<Self, IdError> {
        Self::of_role(trust_domain, Role::Gateway, name)
    }

    pub fn operator(trust_domain: &str, name: &str) -> Result<Self, IdError> {
        Self::of_role(trust_domain, Role::Operator, name)
    }

    pub fn api(trust_domain: &str, name: &str) -> Result<Self, IdError> {
        Self::new(trust_domain, &["api", name])
    }

    /// Something on a host that is not its agent.
    pub fn host(trust_domain: &str, host: &str, what: &str) -> Result<Self, IdError> {
        Self::new(trust_domain, &["host", host, what])
    }

    /// A workload: all instances of an app are one to others, wherever they run.
    pub fn workload(trust_domain: &str, project: &str, app: &str) -> Result<Self, IdError> {
        Self::new(trust_domain, &["project", project, "app", app])
    }

    /// A workload that is a job's: another than the app of that name.
    pub fn job(trust_domain: &str, project: &str, job: &str) -> Result<Self, IdError> {
        Self::new(trust_domain, &["project", project, "job", job])
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.path_at]
    }

    /// The path's segments, at least one.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.text[self.path_at + 1..].split('/')
    }

    /// The role, if the path is exactly `<role>/<name>`.
    pub fn role(&self) -> Option<Role> {
        let mut segments = self.segments();
        let role = Role::of_segment(segments.next()?)?;
        (segments.count() == 1).then_some(role)
    }

    /// Whose it is, if it is a workload's.
    pub fn as_workload(&self) -> Option<Workload<'_>> {
        let mut segments = self.segments();
        let parts: [Option<&str>; 5] = std::array::from_fn(|_| segments.next());
        let [Some("project"), Some(project), Some(what), Some(name), None] = parts else { return None };
        match what {
            "app" => Some(Workload::App { project, app: name }),
            "job" => Some(Workload::Job { project, job: name }),
            _ => None,
        }
    }

    /// The last segment: the name of the server, host, gateway or operator.
    pub fn name(&self) -> &str {
        self.segments().last().expect("an id has at least one segment")
    }
}

/// Whose instances a workload's id speaks of. An app and a job of one name are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload<'a> {
    App { project: &'a str, app: &'a str },
    Job { project: &'a str, job: &'a str },
}

impl Workload<'_> {
    /// The project, whatever it is in it.
    pub fn project(&self) -> &str {
        match self {
            Self::App { project, .. } | Self::Job { project, .. } => project,
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() > MAX_LENGTH {
            return Err(IdError::TooLong(text.len()));
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| IdError::Scheme(text.to_owned()))?;
        let Some((trust_domain, path)) = rest.split_once('/') else {
            check_trust_domain(rest)?;
            return Err(IdError::NoPath(text.to_owned()));
        };
        check_trust_domain(trust_domain)?;
        path.split('/').try_for_each(check_segment)?;
        Ok(Self { text: text.into(), path_at: SCHEME.len() + trust_domain.len() })
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Whether `text` can name a cluster.
pub fn check_trust_domain(text: &str) -> Result<(), IdError> {
    let fits = (1..=MAX_TRUST_DOMAIN).contains(&text.len())
        && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
    if fits { Ok(()) } else { Err(IdError::TrustDomain(text.to_owned())) }
}

fn check_segment(text: &str) -> Result<(), IdError> {
    let fits = !matches!(text, "" | "." | "..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if fits { Ok(()) } else { Err(IdError::Segment(text.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_as_written() {
        let id = SpiffeId::agent("home", "host-1").unwrap();
        assert_eq!(id.to_string(), "spiffe://home/agent/host-1");
        assert_eq!(id.as_str().parse::<SpiffeId>().unwrap(), id);
        assert_eq!((id.trust_domain(), id.role(), id.name()), ("home", Some(Role::Agent), "host-1"));
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<SpiffeId>(&json).unwrap(), id);
    }

    #[test]
    fn only_role_and_name_together_make_a_role() {
        let role = |text: &str| text.parse::<SpiffeId>().unwrap().role();
        assert_eq!(role("spiffe://home/server/a"), Some(Role::Server));
        assert_eq!(role("spiffe://home/operator/ann"), Some(Role::Operator));
        assert_eq!(role("spiffe://home/server"), None);
        assert_eq!(role("spiffe://home/server/a/b"), None);
        assert_eq!(role("spiffe://home/host/h1/server"), None);
        assert_eq!(role("spiffe://home/api/front"), None);
    }

    #[test]
    fn a_workload_is_its_app_and_has_no_role() {
        let id = SpiffeId::workload("home", "shop", "web").unwrap();
        assert_eq!(id.to_string(), "spiffe://home/project/shop/app/web");
        assert_eq!((id.as_workload(), id.role()), (Some(Workload::App { project: "shop", app: "web" }), None));
        let job = SpiffeId::job("home", "shop", "web").unwrap();
        assert_eq!(job.to_string(), "spiffe://home/project/shop/job/web");
        assert_eq!((job.as_workload(), job.role()), (Some(Workload::Job { project: "shop", job: "web" }), None));
        assert_ne!(id, job);
        assert_eq!(job.as_workload().map(|w| w.project().to_owned()).as_deref(), Some("shop"));
        let of = |text: &str| text.parse::<SpiffeId>().unwrap();
        for other in [
            "agent/h1",
            "project/shop/app",
            "project/shop/app/web/x",
            "project/shop/host/web",
            "project/shop/job/web/1",
        ] {
            assert_eq!(of(&format!("spiffe://home/{other}")).as_workload(), None, "{other}");
        }
        assert!(SpiffeId::workload("home", "shop/app/web", "x").is_err());
    }

    #[test]
    fn malformed_ids_are_refused() {
        for text in [
            "",
            "https://home/agent/a",
            "spiffe://",
            "spiffe://home",
            "spiffe://home/",
            "spiffe:///agent/a",
            "spiffe://Home/agent/a",
            "spiffe://home:1/agent/a",
            "spiffe://me@home/agent/a",
            "spiffe://home/agent//a",
            "spiffe://home/agent/../server/a",
            "spiffe://home/agent/a/",
            "spiffe://home/agent/a?b",
            "spiffe://home/agent/%61",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
        assert!(format!("spiffe://home/agent/{}", "a".repeat(3000)).parse::<SpiffeId>().is_err());
        assert!(SpiffeId::agent("home", "a/b").is_err());
    }
}
