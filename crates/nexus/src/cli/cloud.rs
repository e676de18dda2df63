//! The cloud that a command speaks to: its paths, its lists page by page, its objects.
//!
//! Objects are JSON values here, not types: what a newer server adds is shown and sent back as it came.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nexus_env::{Env, RngExt as _};
use nexus_model::kind::{KindDescriptor, Scope};
use nexus_model::selector::Selector;
use nexus_model::{Name, Timestamp};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{HeaderName, IF_MATCH, IF_NONE_MATCH};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use super::webhook::CallbackArgs;
use crate::client::{Client, ClientError, Parts};
use crate::context::Target;
use crate::exit::Fail;
use crate::local::Plan;
use crate::local::state::DataDir;

/// What the API gives at most in one page.
const PAGE: usize = 500;
/// The port of the first gateway of a local cloud, unless it was moved.
const GATEWAY_PORT: u16 = 8000;

/// Which cloud, and where in it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cloud")]
pub struct CloudArgs {
    /// The project [default: the context's]
    #[arg(short, long, value_name = "NAME", value_parser = super::resource::new_name)]
    pub project: Option<Name>,
    /// The organization [default: the context's]
    #[arg(long, visible_alias = "org", value_name = "NAME", value_parser = super::resource::new_name)]
    pub organization: Option<Name>,
    /// The region, or `global` for what all regions share; `get` also takes `all` [default: the context's]
    #[arg(long, value_name = "NAME", value_parser = super::resource::new_name)]
    pub region: Option<Name>,
    /// The context file [default: $NEXUS_CONFIG, or ~/.config/nexus/context.json]
    #[arg(long, value_name = "FILE")]
    pub context: Option<PathBuf>,
}

pub struct Cloud {
    pub client: Client,
    pub target: Target,
    data_dir: Option<PathBuf>,
    callback: CallbackArgs,
}

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    pub all_projects: bool,
    /// In place of the context's project.
    pub project: Option<Name>,
    /// In place of the context's region.
    pub region: Option<Name>,
    pub selector: Option<String>,
    /// Also what is being torn down.
    pub deleting: bool,
}

/// One page of a list.
#[derive(Debug, Deserialize)]
pub struct Page {
    #[serde(default)]
    pub metadata: PageMetadata,
    pub items: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub struct PageMetadata {
    #[serde(default)]
    pub revision: u64,
    #[serde(default)]
    pub cursor: Option<String>,
}

/// Under which condition a PUT is taken.
#[derive(Debug, Clone, Copy)]
pub enum Guard {
    None,
    /// There is no such object yet.
    New,
    /// It is as it was at this revision.
    Revision(u64),
}

/// What a PUT did.
pub struct Put {
    pub object: Value,
    pub created: bool,
}

impl Cloud {
    pub fn connect(args: &CloudArgs) -> anyhow::Result<Self> {
        let (mut target, data_dir) = crate::context::target_of(args.context.as_deref())?;
        if let Some(region) = &args.region {
            target.region = region.clone();
        }
        if let Some(project) = &args.project {
            target.project = project.clone();
        }
        if let Some(organization) = &args.organization {
            target.organization = organization.clone();
        }
        Ok(Self { client: Client::new(&target)?, target, data_dir, callback: CallbackArgs::default() })
    }

    #[cfg(test)]
    pub fn for_test(client: Client, target: Target) -> Self {
        Self { client, target, data_dir: None, callback: CallbackArgs::default() }
    }

    /// Has the end of each change that is made from now on told.
    pub fn calling_back(mut self, callback: &CallbackArgs) -> Self {
        self.callback = callback.clone();
        self
    }

    /// The folder of the local cloud that this is, if it is one.
    pub fn data_dir(&self) -> Option<&std::path::Path> {
        self.data_dir.as_deref()
    }

    pub fn now(&self) -> Timestamp {
        Timestamp::from_millis(Env::real().clock.now_millis())
    }

    /// The path of a kind's collection in its owner, a project or an organization; `None` lists over all projects.
    fn collection_in(&self, kind: &KindDescriptor, region: &Name, owner: Option<&Name>) -> String {
        let plural = kind.plural;
        match (kind.scope, owner) {
            (Scope::Global, _) => format!("/v1/{plural}"),
            (Scope::Organization, owner) => {
                format!("/v1/organizations/{}/{plural}", owner.unwrap_or(&self.target.organization))
            }
            (Scope::Region, _) | (Scope::Project, None) => format!("/v1/regions/{region}/{plural}"),
            (Scope::Project, Some(project)) => format!("/v1/regions/{region}/projects/{project}/{plural}"),
        }
    }

    pub fn collection(&self, kind: &KindDescriptor, listing: &Listing) -> String {
        let owner = listing.project.as_ref().filter(|_| kind.scope == Scope::Project).unwrap_or(self.owner(kind));
        let region = listing.region.as_ref().unwrap_or(&self.target.region);
        self.collection_in(kind, region, (!listing.all_projects).then_some(owner))
    }

    /// The context's project or organization, whichever a kind's objects belong to.
    fn owner(&self, kind: &KindDescriptor) -> &Name {
        if kind.scope == Scope::Organization { &self.target.organization } else { &self.target.project }
    }

    /// The path of an object of the context's project or organization, if its kind has one.
    pub fn object(&self, kind: &KindDescriptor, name: &Name) -> String {
        self.object_in(kind, self.owner(kind), name)
    }

    pub fn object_in(&self, kind: &KindDescriptor, owner: &Name, name: &Name) -> String {
        self.object_at(kind, &self.target.region, owner, name)
    }

    pub fn object_at(&self, kind: &KindDescriptor, region: &Name, owner: &Name, name: &Name) -> String {
        format!("{}/{name}", self.collection_in(kind, region, Some(owner)))
    }

    /// The region that an object says it is in: `global` for what all regions share.
    pub fn region_of(&self, object: &Value) -> Name {
        text(object, "/metadata/region").parse().unwrap_or_else(|_| self.target.region.clone())
    }

    /// The regions of the fleet.
    pub async fn regions(&self) -> anyhow::Result<Vec<Name>> {
        let kind = nexus_model::kind::find("regions").expect("a kind");
        let (regions, _) = self.list(kind, &Listing::default(), |_| true).await?;
        regions.iter().map(name_of).collect()
    }

    pub async fn page(
        &self,
        kind: &KindDescriptor,
        listing: &Listing,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<Page, ClientError> {
        let mut path = format!("{}?limit={}", self.collection(kind, listing), limit.clamp(1, PAGE));
        if let Some(selector) = &listing.selector {
            path.push_str(&format!("&labels={}", encode(selector)));
        }
        if listing.deleting {
            path.push_str("&deleting=true");
        }
        if let Some(cursor) = cursor {
            path.push_str(&format!("&cursor={}", encode(cursor)));
        }
        self.client.get(&path).await
    }

    /// Everything that `keep` lets through, page by page, so that what is left out costs nothing. Also the revision of the
    /// list, from which a watch goes on.
    pub async fn list(
        &self,
        kind: &KindDescriptor,
        listing: &Listing,
        mut keep: impl FnMut(&Value) -> bool,
    ) -> Result<(Vec<Value>, u64), ClientError> {
        let (mut items, mut revision, mut cursor) = (Vec::new(), None, None::<String>);
        loop {
            let page = self.page(kind, listing, PAGE, cursor.as_deref()).await?;
            // The first page's: what changed since then is seen twice rather than never.
            revision.get_or_insert(page.metadata.revision);
            items.extend(page.items.into_iter().filter(&mut keep));
            cursor = page.metadata.cursor;
            if cursor.is_none() {
                return Ok((items, revision.unwrap_or(0)));
            }
        }
    }

    pub async fn get(&self, kind: &KindDescriptor, name: &Name) -> Result<Value, ClientError> {
        self.client.get(&self.object(kind, name)).await
    }

    /// An object by its path, or `None`.
    pub async fn find(&self, path: &str) -> Result<Option<Value>, ClientError> {
        absent(self.client.get(path).await)
    }

    pub async fn put(&self, path: &str, object: &Value, guard: Guard, dry_run: bool) -> Result<Put, ClientError> {
        let mut parts = self.callback.apply(once(Parts::json(object)?)?)?;
        parts = match guard {
            Guard::None => parts,
            Guard::New => parts.header(IF_NONE_MATCH, "*")?,
            Guard::Revision(revision) => parts.header(IF_MATCH, &format!("\"{revision}\""))?,
        };
        let path = if dry_run { format!("{path}?dryRun=true") } else { path.to_owned() };
        let response = self.client.send(Method::PUT, &path, parts).await?;
        let (created, endpoint) = (response.status() == StatusCode::CREATED, response.url().to_string());
        let unreadable = |e: reqwest::Error| ClientError::Unreadable { endpoint, message: e.to_string() };
        let object = response.json().await.map_err(unreadable)?;
        Ok(Put { object, created })
    }

    /// Deletes an object and waits until nothing is left of it, at most so long. Answers whether that is so.
    pub async fn delete(&self, path: &str, wait: Option<Duration>) -> Result<bool, ClientError> {
        let mut parts = self.callback.apply(once(Parts::default())?)?;
        if let Some(wait) = wait {
            parts = parts
                .header(HeaderName::from_static("prefer"), &format!("wait={}", wait.as_secs()))?
                .timeout(wait + Duration::from_secs(15));
        }
        let response = self.client.send(Method::DELETE, path, parts).await?;
        Ok(response.headers().get("x-cnx-settled").is_some_and(|v| v == "true"))
    }

    /// The address at which an HTTP app is reached, for each of its host names.
    pub fn urls(&self, app: &Value) -> Vec<String> {
        let mut ports = app["spec"]["ports"].as_array().map(Vec::as_slice).unwrap_or_default().iter();
        if app["spec"]["runtime"] != "function" && !ports.any(|p| p["protocol"] != "tcp") {
            return Vec::new();
        }
        let port = self.gateway_port();
        let shown = if port == 80 { String::new() } else { format!(":{port}") };
        let known = app["status"]["hostnames"].as_array().map(Vec::as_slice).unwrap_or_default();
        let known: Vec<String> = known.iter().filter_map(|h| h.as_str()).map(super::output::plain).collect();
        known.iter().map(|host| format!("http://{host}{shown}")).collect()
    }

    /// Where the gateways of the cloud listen: a local cloud's plan says so, if this user may read it.
    fn gateway_port(&self) -> u16 {
        let plan = self.data_dir.as_deref().and_then(|dir| DataDir::at(dir).ok()?.plan().ok()?);
        let port = |plan: Plan| {
            let region = plan.region(self.target.region.as_str()).unwrap_or(plan.first_region());
            plan.gateways_of(region).first().map(|g| g.http.port())
        };
        plan.and_then(port).unwrap_or(GATEWAY_PORT)
    }
}

/// Turns "not found" into `None`.
pub fn absent<T>(answer: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(ClientError::Refused(problem)) if problem.status == StatusCode::NOT_FOUND => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether the API refused with this code.
pub fn is_code(error: &ClientError, code: &str) -> bool {
    error.problem().and_then(|p| p.document.as_ref()).is_some_and(|d| d["code"] == code)
}

/// A change that is sent again to another server must not be made twice, nor answered as if another had made it.
fn once(parts: Parts) -> Result<Parts, ClientError> {
    let random: [u8; 16] = Env::real().rng.bytes();
    let key: String = random.iter().map(|b| format!("{b:02x}")).collect();
    parts.header(HeaderName::from_static("idempotency-key"), &key)
}

pub fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// Checks a selector before it is sent.
pub fn selector(text: &str) -> Result<String, String> {
    text.parse::<Selector>().map(|_| text.to_owned()).map_err(|e| e.to_string())
}

/// A part of an object as text, empty when there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The name of an object that the API gave.
pub fn name_of(object: &Value) -> anyhow::Result<Name> {
    let name = text(object, "/metadata/name");
    Ok(name
        .parse()
        .map_err(|e| Fail::new(crate::exit::Exit::Failed, format!("the API named an object {name:?}: {e}")))?)
}

#[cfg(test)]
mod tests {
    use nexus_model::kind;
    use serde_json::json;

    use super::*;

    fn cloud() -> Cloud {
        let name = |n: &str| n.parse().unwrap();
        let target = Target {
            endpoints: vec!["http://127.0.0.1:1".into()],
            ca: None,
            token: None,
            session: None,
            region: name("local"),
            project: name("shop"),
            organization: name("acme"),
        };
        Cloud::for_test(Client::new(&target).unwrap(), target)
    }

    #[test]
    fn a_path_follows_the_kinds_scope() {
        let cloud = cloud();
        let name: Name = "x".parse().unwrap();
        let at = |word: &str| cloud.object(kind::find(word).unwrap(), &name);
        assert_eq!(at("org"), "/v1/organizations/x");
        assert_eq!(at("host"), "/v1/regions/local/hosts/x");
        assert_eq!(at("app"), "/v1/regions/local/projects/shop/apps/x");
        let all = Listing { all_projects: true, ..Listing::default() };
        assert_eq!(cloud.collection(kind::find("app").unwrap(), &all), "/v1/regions/local/apps");
    }

    #[test]
    fn an_app_is_reached_by_its_host_names() {
        let status = json!({"hostnames": ["web.localhost", "web.shop.localhost"]});
        let app = json!({"spec": {"ports": [{"port": 80, "protocol": "http"}]}, "status": status});
        assert_eq!(cloud().urls(&app), ["http://web.localhost:8000", "http://web.shop.localhost:8000"]);
        let tcp = json!({"spec": {"ports": [{"port": 80, "protocol": "tcp"}]}, "status": status});
        assert!(cloud().urls(&tcp).is_empty());
        assert_eq!(cloud().urls(&json!({"spec": {"runtime": "function"}, "status": status})).len(), 2);
    }
}
