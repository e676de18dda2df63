//! A cloud of two organizations with people of every role.

use http::StatusCode;
use nexus_iam::TokenSecret;
use nexus_iam::policy::PERSONAS;
use nexus_model::kind::{self, Scope};
use serde_json::{Value, json};

use super::{Answer, World};

/// The digest of nothing.
pub const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

const SECRET: &str = "/v1/regions/local/projects/shop/secrets/example";

/// An organization with a project, its own people of every role, and a stranger.
pub struct Cloud {
    pub world: World,
    pub secrets: Vec<(&'static str, TokenSecret)>,
}

pub fn object(kind: &str, name: &str, organization: Option<&str>, spec: Value) -> Value {
    let mut metadata = json!({"name": name, "created": "2026-01-01T00:00:00Z"});
    if let Some(organization) = organization {
        metadata["organization"] = organization.into();
    }
    json!({"apiVersion": "cloudnexus/v1", "kind": kind, "metadata": metadata, "spec": spec, "status": {}})
}

impl Cloud {
    pub async fn new() -> Self {
        Self::with(nexus_api::Limits::default()).await
    }

    pub async fn with(limits: nexus_api::Limits) -> Self {
        let world = World::with(limits);
        let put = async |plural: &str, object: Value| {
            world.store_global(plural, &object).await;
        };
        for organization in ["acme", "globex", "system"] {
            put("organizations", object("Organization", organization, None, json!({}))).await;
        }
        put("projects", object("Project", "shop", None, json!({"organization": "acme"}))).await;
        put("projects", object("Project", "lab", None, json!({"organization": "globex"}))).await;
        let mut secrets = Vec::new();
        for (i, persona) in PERSONAS.into_iter().enumerate().filter(|(_, p)| *p != "anonymous") {
            let (organization, granted, role) = match persona {
                "other-tenant" => ("globex", "globex", "owner"),
                "operator" => ("acme", "system", "fleet-operator"),
                "fleet-viewer" => ("acme", "system", "fleet-viewer"),
                role => ("acme", "acme", role),
            };
            put("users", object("User", persona, Some(organization), json!({}))).await;
            let subject = json!([{"kind": "User", "name": persona, "organization": organization}]);
            let spec = json!({"role": role, "subjects": subject});
            put("role-bindings", object("RoleBinding", persona, Some(granted), spec)).await;
            let secret = TokenSecret::generate([100 + u8::try_from(i).unwrap(); 32]);
            let spec = json!({
                "holder": {"kind": "User", "name": persona}, "expires": "2090-01-01T00:00:00Z",
                "hash": secret.hash().to_string(),
            });
            put("tokens", object("Token", &format!("t-{persona}"), Some(organization), spec)).await;
            secrets.push((persona, secret));
        }
        for d in kind::all() {
            let mut example = object(d.kind, "example", None, (d.example)());
            match d.scope {
                Scope::Global => continue,
                Scope::Organization => example["metadata"]["organization"] = "acme".into(),
                Scope::Project => example["metadata"]["project"] = "shop".into(),
                Scope::Region => {}
            }
            if d.plural == "policies" {
                example["spec"] = json!({"text": "permit (principal, action, resource) when { false };"});
            }
            // Its values are sealed on the way in.
            if d.plural == "secrets" {
                world.call("PUT", SECRET, &[], json!({"spec": (d.example)()})).await;
                continue;
            }
            world.store_object(d.plural, &example).await;
            put(d.plural, example).await;
        }
        world.store_global("regions", &object("Region", "example", None, json!({}))).await;
        let blob = format!("/v1/regions/local/projects/shop/blobs/{EMPTY}");
        assert_eq!(world.call("PUT", &blob, &[], Value::Null).await.status, StatusCode::CREATED);
        Self { world, secrets }
    }

    pub async fn call(&self, who: &str, method: &str, path: &str, body: Option<Value>) -> Answer {
        let mut request = http::Request::builder().method(method).uri(path);
        if who != "anonymous" {
            let secret = self.secrets.iter().find(|(p, _)| *p == who).unwrap().1.reveal();
            request = request.header("authorization", format!("Bearer {secret}"));
        }
        let merge = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = match body {
            Some(body) => {
                request = request.header("content-type", merge);
                body.to_string()
            }
            None => String::new(),
        };
        self.world.send(request.body(body.into()).unwrap()).await
    }
}
