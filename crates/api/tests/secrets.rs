//! Secrets over HTTP: what is written in clear is nowhere again but in the one answer that reveals it.

mod support;

use std::sync::Arc;

use http::StatusCode;
use nexus_iam::TokenSecret;
use nexus_iam::envelope::{Context, DataKey, EnvelopeError, FileKeys, KeyId, KeyProvider, WrappedKey};
use serde_json::{Value, json};
use support::{Answer, World, eventually};

const SECRETS: &str = "/v1/regions/local/projects/shop/secrets";
const DB: &str = "/v1/regions/local/projects/shop/secrets/db";
const CANARY: &str = "canary-hunter2-canary";

/// Two organizations with a project each, and people of one of them by their roles.
struct Cloud {
    world: World,
}

const PEOPLE: [(&str, &str, &str); 6] = [
    ("owner", "acme", "owner"),
    ("admin", "acme", "admin"),
    ("editor", "acme", "editor"),
    ("viewer", "acme", "viewer"),
    ("auditor", "acme", "auditor"),
    ("stranger", "globex", "owner"),
];

fn token(who: &str) -> TokenSecret {
    let at = PEOPLE.iter().position(|p| p.0 == who).unwrap();
    TokenSecret::generate([50 + u8::try_from(at).unwrap(); 32])
}

impl Cloud {
    async fn new() -> Self {
        Self::with(Arc::new(FileKeys::generate())).await
    }

    async fn with(keys: Arc<dyn KeyProvider>) -> Self {
        let world = World::sealing(nexus_api::Limits::default(), keys);
        let put = async |plural: &str, kind: &str, name: &str, organization: Option<&str>, spec: Value| {
            let mut metadata = json!({"name": name, "created": "2026-01-01T00:00:00Z"});
            if let Some(organization) = organization {
                metadata["organization"] = organization.into();
            }
            let object =
                json!({"apiVersion": "cloudnexus/v1", "kind": kind, "metadata": metadata, "spec": spec, "status": {}});
            world.store_global(plural, &object).await;
        };
        for (organization, project) in [("acme", "shop"), ("globex", "lab")] {
            put("organizations", "Organization", organization, None, json!({})).await;
            put("projects", "Project", project, None, json!({"organization": organization})).await;
        }
        for (who, organization, role) in PEOPLE {
            put("users", "User", who, Some(organization), json!({})).await;
            let spec = json!({"role": role, "subjects": [{"kind": "User", "name": who, "organization": organization}]});
            put("role-bindings", "RoleBinding", who, Some(organization), spec).await;
            let holder = json!({"kind": "User", "name": who});
            let spec =
                json!({"holder": holder, "expires": "2090-01-01T00:00:00Z", "hash": token(who).hash().to_string()});
            put("tokens", "Token", &format!("t-{who}"), Some(organization), spec).await;
        }
        let cloud = Self { world };
        eventually(async || cloud.call("viewer", "GET", SECRETS, &[], Value::Null).await.status == StatusCode::OK)
            .await;
        cloud
    }

    async fn call(&self, who: &str, method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Answer {
        let mut request = http::Request::builder().method(method).uri(path);
        request = request.header("authorization", format!("Bearer {}", token(who).reveal()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let text = if body.is_null() { String::new() } else { body.to_string() };
        self.world.send(request.header("content-type", kind).body(text.into()).unwrap()).await
    }

    async fn set(&self, who: &str, value: &str) -> Answer {
        self.call(who, "PUT", DB, &[], json!({"spec": {"data": {"password": value}}})).await
    }

    async fn reveal(&self, who: &str, query: &str) -> Answer {
        self.call(who, "GET", &format!("{DB}:reveal{query}"), &[], Value::Null).await
    }
}

#[tokio::test]
async fn a_value_is_stored_sealed_and_read_back_by_reveal_alone() {
    let cloud = Cloud::new().await;
    let mut seen = String::new();
    let mut look = |answer: Answer| {
        seen.push_str(&String::from_utf8_lossy(&answer.body));
        seen.push_str(&format!("{:?}", answer.headers));
        answer
    };
    let key = [("idempotency-key", "one")];
    let body = json!({"metadata": {"name": "db"}, "spec": {"data": {"password": CANARY}, "binary": {"raw": "AP8="}}});
    let made = look(cloud.call("editor", "POST", SECRETS, &key, body.clone()).await);
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    assert_eq!(made.json()["spec"], json!({"version": 1, "keys": ["password", "raw"]}));
    let again = look(cloud.call("editor", "POST", SECRETS, &key, body).await);
    assert_eq!(again.header("idempotency-replayed"), "true");
    look(cloud.call("editor", "PATCH", DB, &[], json!({"metadata": {"labels": {"a": "b"}}})).await);
    look(cloud.call("editor", "PATCH", DB, &[], json!({"spec": {"data": {"user": CANARY}}})).await);
    look(
        cloud.call("editor", "PUT", &format!("{DB}?dryRun=true"), &[], json!({"spec": {"data": {"x": CANARY}}})).await,
    );
    look(cloud.call("viewer", "GET", DB, &[], Value::Null).await);
    look(cloud.call("viewer", "GET", SECRETS, &[], Value::Null).await);
    // What is wrong is told without what was brought.
    look(cloud.call("editor", "PUT", DB, &[], json!({"spec": {"data": {"a/b": CANARY}}})).await);
    look(cloud.call("editor", "PUT", DB, &[], json!({"spec": {"binary": {"a": CANARY}}})).await);
    look(cloud.call("editor", "PUT", DB, &[], json!({"spec": {"data": CANARY}})).await);
    look(cloud.call("editor", "PUT", DB, &[], json!({"spec": {"data": {"a": [CANARY]}}})).await);
    look(cloud.call("editor", "PUT", DB, &[], json!({"spec": CANARY})).await);
    look(cloud.call("editor", "PATCH", DB, &[], json!({"spec": {"data": CANARY}})).await);
    look(cloud.call("editor", "PATCH", DB, &[], json!({"spec": {"binary": {"a": CANARY}}})).await);
    look(cloud.call("viewer", "PUT", DB, &[], json!({"spec": {"data": {"x": CANARY}}})).await);
    assert!(!seen.contains(CANARY), "{seen}");
    let written = cloud.world.written();
    assert!(written.contains("s/shop/db/00000000000000000002") && !written.contains(CANARY), "{written}");
    let base64 = nexus_model::SecretValue::new(CANARY.into()).to_base64();
    assert!(!written.contains(base64.as_str()), "nor is it only encoded");

    let revealed = cloud.reveal("owner", "").await;
    assert_eq!(revealed.header("cache-control"), "no-store");
    let revealed = revealed.json();
    assert_eq!(revealed["data"], json!({"password": CANARY, "user": CANARY}));
    assert_eq!((&revealed["binary"], &revealed["version"]), (&json!({"raw": "AP8="}), &json!(2)));
    assert_eq!(cloud.reveal("owner", "?version=1").await.json()["data"], json!({"password": CANARY}));
    cloud.reveal("owner", "?version=3").await.problem("not-found");
}

#[tokio::test]
async fn what_is_applied_again_makes_no_new_version() {
    let cloud = Cloud::new().await;
    let first = cloud.set("editor", "one").await.json();
    assert_eq!(cloud.set("editor", "one").await.json()["spec"], first["spec"]);
    assert_eq!(cloud.set("editor", "two").await.json()["spec"]["version"], 2);
    // What was read may be sent back with other labels: the values stay.
    let read = cloud.call("editor", "GET", DB, &[], Value::Null).await.json();
    let body = json!({"metadata": {"name": "db", "labels": {"tier": "gold"}}, "spec": read["spec"]});
    let labelled = cloud.call("editor", "PUT", DB, &[], body).await.json();
    assert_eq!((&labelled["spec"]["version"], &labelled["metadata"]["labels"]["tier"]), (&json!(2), &json!("gold")));
    assert_eq!(cloud.reveal("admin", "").await.json()["data"]["password"], "two");
    // A patch changes the keys that it names and takes others away.
    let patch = json!({"spec": {"data": {"user": "ada", "password": null}}});
    let patched = cloud.call("editor", "PATCH", DB, &[], patch.clone()).await.json();
    assert_eq!(patched["spec"], json!({"version": 3, "keys": ["user"]}));
    assert_eq!(cloud.call("editor", "PATCH", DB, &[], patch).await.json()["spec"]["version"], 3);
    cloud.call("editor", "PATCH", DB, &[], json!({"spec": {"data": {"user": null}}})).await.problem("invalid");
    // Guards against lost updates hold.
    let old = [("if-match", "\"1\"")];
    cloud.call("editor", "PUT", DB, &old, json!({"spec": {"data": {"a": "b"}}})).await.problem("precondition-failed");
    cloud.call("editor", "PUT", DB, &[], json!({"spec": {"data": {"a": "b"}, "sealed": "x"}})).await.problem("invalid");
    let key = [("idempotency-key", "two")];
    for (value, status) in [("one", 201), ("one", 201), ("other", 409)] {
        let body = json!({"metadata": {"name": "once"}, "spec": {"data": {"k": value}}});
        let answer = cloud.call("editor", "POST", SECRETS, &key, body).await;
        assert_eq!(answer.status.as_u16(), status, "{:?}", answer.body);
    }
}

#[tokio::test]
async fn only_owners_and_administrators_reveal_and_nobody_else_learns_a_value_by_trying() {
    let cloud = Cloud::new().await;
    cloud.set("editor", CANARY).await;
    for (who, _, _) in PEOPLE {
        let answer = cloud.reveal(who, "").await;
        let expected = match who {
            "owner" | "admin" => StatusCode::OK,
            "stranger" => StatusCode::NOT_FOUND,
            _ => StatusCode::FORBIDDEN,
        };
        assert_eq!(answer.status, expected, "{who}");
        assert_eq!(String::from_utf8_lossy(&answer.body).contains(CANARY), expected == StatusCode::OK, "{who}");
    }
    let hidden = cloud.reveal("stranger", "").await.problem("not-found");
    assert_eq!(hidden["detail"], "there is no Project \"shop\"");
    // A dry run tells whoever may not reveal nothing of whether a guess is right.
    let guess = async |who: &str, value: &str| {
        let body = json!({"spec": {"data": {"password": value}}});
        cloud.call(who, "PUT", &format!("{DB}?dryRun=true"), &[], body).await.json()["spec"]["version"].clone()
    };
    assert_eq!((guess("editor", CANARY).await, guess("editor", "wrong").await), (json!(2), json!(2)));
    assert_eq!((guess("owner", CANARY).await, guess("owner", "wrong").await), (json!(1), json!(2)));
    let post = cloud.call("owner", "POST", &format!("{DB}:reveal"), &[], Value::Null).await;
    post.problem("method-not-allowed");
}

/// Has no keys.
struct Keyless;

impl KeyProvider for Keyless {
    fn current(&self) -> KeyId {
        KeyId::new("none")
    }

    fn wrap(&self, _: &DataKey, _: &Context) -> Result<WrappedKey, EnvelopeError> {
        Err(EnvelopeError::Provider("this server has no master keys".into()))
    }

    fn unwrap(&self, _: &WrappedKey, _: &Context) -> Result<DataKey, EnvelopeError> {
        Err(EnvelopeError::Provider("this server has no master keys".into()))
    }
}

#[tokio::test]
async fn damaged_values_and_missing_keys_are_told_and_never_guessed_over() {
    let cloud = Cloud::new().await;
    cloud.set("editor", "one").await;
    // Copied from another secret: bound to its name, it does not open here.
    cloud.call("editor", "PUT", &format!("{SECRETS}/other"), &[], json!({"spec": {"data": {"password": "x"}}})).await;
    let name = |n: &str| n.parse().unwrap();
    let rows = nexus_model::key::secret_version(&name("shop"), &name("other"), 1);
    let range = nexus_store::Store::range(&*cloud.world.store, nexus_store::RangeRequest::get(rows)).await.unwrap();
    let row = nexus_model::key::secret_version(&name("shop"), &name("db"), 1);
    cloud.world.store_row(row, range.kvs[0].value.to_vec()).await;
    let problem = cloud.reveal("owner", "").await.problem("unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("version 1 of secret db can't be opened"), "{problem}");
    let patch = json!({"spec": {"data": {"user": "ada"}}});
    cloud.call("editor", "PATCH", DB, &[], patch).await.problem("unavailable");
    assert_eq!(cloud.set("editor", "anew").await.json()["spec"]["version"], 2, "what is lost can be written anew");
    assert_eq!(cloud.reveal("owner", "").await.json()["data"]["password"], "anew");

    let keyless = Cloud::with(Arc::new(Keyless)).await;
    let problem = keyless.set("editor", "one").await.problem("unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("no master keys"), "{problem}");
    assert!(!keyless.world.written().contains("s/shop/"));
}
