//! Signing in by another identity provider and exchanging CI systems' tokens: what must work, and what must not whatever the
//! provider, its people or strangers try.

mod support;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as B64};
use bytes::Bytes;
use http::StatusCode;
use nexus_api::{Limits, ProviderDoor, ProviderRequest};
use nexus_iam::TokenSecret;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Answer, World, eventually};

const ISSUER: &str = "https://login.example/tenant";
const CLIENT: &str = "nexus";
const REDIRECT: &str = "http://127.0.0.1:4711/callback";
const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const NONCE: &str = "n-1";

fn seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

/// A provider: codes that are good once, keys that change, and what it was asked.
struct Provider {
    key: Mutex<(String, Ed25519KeyPair)>,
    codes: Mutex<BTreeMap<String, Value>>,
    asked: Mutex<Vec<ProviderRequest>>,
    /// Instead of its real answers.
    answers: Mutex<BTreeMap<&'static str, Vec<u8>>>,
}

fn key() -> Ed25519KeyPair {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap()
}

impl Provider {
    fn new() -> Arc<Self> {
        let key = Mutex::new(("k-1".to_owned(), key()));
        Arc::new(Self { key, codes: Mutex::default(), asked: Mutex::default(), answers: Mutex::default() })
    }

    fn sign(&self, claims: &Value) -> String {
        let (kid, key) = &*self.key.lock().unwrap();
        let header = json!({"alg": "EdDSA", "kid": kid, "typ": "JWT"});
        let text = format!("{}.{}", B64.encode(header.to_string()), B64.encode(claims.to_string()));
        let signature = key.sign(text.as_bytes());
        format!("{text}.{}", B64.encode(signature))
    }

    /// A code for a person; what the browser would come back with.
    fn code(&self, code: &str, claims: Value) {
        self.codes.lock().unwrap().insert(code.to_owned(), claims);
    }

    fn change_key(&self, kid: &str) {
        *self.key.lock().unwrap() = (kid.to_owned(), key());
    }

    fn answer_with(&self, path: &'static str, body: impl Into<Vec<u8>>) {
        self.answers.lock().unwrap().insert(path, body.into());
    }

    fn asked_for(&self, end: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|r| r.url.ends_with(end)).count()
    }

    fn tokens(&self, form: &str) -> Value {
        let get = |name: &str| {
            let pair = form.split('&').filter_map(|p| p.split_once('=')).find(|(k, _)| *k == name);
            percent_encoding::percent_decode_str(pair.map_or("", |p| p.1)).decode_utf8().unwrap().into_owned()
        };
        let refused = json!({"error": "invalid_grant", "error_description": "grant request is invalid"});
        let right = get("client_id") == CLIENT && get("redirect_uri") == REDIRECT;
        let challenge = B64.encode(Sha256::digest(get("code_verifier")));
        let proven = challenge == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
        match self.codes.lock().unwrap().remove(&get("code")) {
            Some(claims) if right && proven => json!({"access_token": "a-1", "id_token": self.sign(&claims)}),
            _ => refused,
        }
    }
}

#[async_trait]
impl ProviderDoor for Provider {
    async fn ask(&self, request: ProviderRequest) -> Result<Bytes, String> {
        self.asked.lock().unwrap().push(request.clone());
        if request.url.starts_with("https://slow.example") {
            std::future::pending::<()>().await;
        }
        let path = request.url.strip_prefix(ISSUER).ok_or("it can't be reached")?;
        if let Some((_, body)) = self.answers.lock().unwrap().iter().find(|(p, _)| **p == path) {
            return Ok(body.clone().into());
        }
        let answer = match path {
            "/.well-known/openid-configuration" => json!({
                "issuer": ISSUER, "authorization_endpoint": format!("{ISSUER}/auth"),
                "token_endpoint": format!("{ISSUER}/token"), "jwks_uri": format!("{ISSUER}/jwks"),
            }),
            "/jwks" => {
                let (kid, key) = &*self.key.lock().unwrap();
                let x = B64.encode(key.public_key().as_ref());
                json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": x}]})
            }
            "/token" => self.tokens(request.form.as_ref().unwrap()),
            other => return Err(format!("it answered 404 for {other}")),
        };
        Ok(answer.to_string().into())
    }
}

fn object(kind: &str, name: &str, organization: Option<&str>, spec: Value) -> Value {
    let mut metadata = json!({"name": name, "created": "2026-01-01T00:00:00Z"});
    if let Some(organization) = organization {
        metadata["organization"] = organization.into();
    }
    json!({"apiVersion": "cloudnexus/v1", "kind": kind, "metadata": metadata, "spec": spec, "status": {}})
}

struct Cloud {
    world: World,
    provider: Arc<Provider>,
    owner: String,
}

fn corp() -> Value {
    json!({
        "issuer": ISSUER, "clientId": CLIENT,
        "groups": {"eng": ["developers"], "ops": ["operators", "developers"]},
        "exchange": [{
            "audience": "https://cloud.test", "serviceAccount": "deployer", "project": "shop",
            "claims": {"repository": "acme/shop", "ref": "refs/heads/main"},
        }],
    })
}

impl Cloud {
    async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let provider = Provider::new();
        let world = World::with_providers(limits, provider.clone());
        world.publish_key().await;
        let put = async |plural: &str, object: Value| world.store_global(plural, &object).await;
        for organization in ["acme", "empty"] {
            put("organizations", object("Organization", organization, None, json!({}))).await;
        }
        put("projects", object("Project", "shop", None, json!({"organization": "acme"}))).await;
        for user in ["owner", "local"] {
            put("users", object("User", user, Some("acme"), json!({}))).await;
        }
        for group in ["developers", "operators", "choir"] {
            put("groups", object("Group", group, Some("acme"), json!({}))).await;
        }
        put("service-accounts", object("ServiceAccount", "deployer", Some("acme"), json!({}))).await;
        let bind =
            |role: &str, kind: &str, name: &str| json!({"role": role, "subjects": [{"kind": kind, "name": name}]});
        put("role-bindings", object("RoleBinding", "own", Some("acme"), bind("owner", "User", "owner"))).await;
        put("role-bindings", object("RoleBinding", "see", Some("acme"), bind("viewer", "Group", "developers"))).await;
        put("role-bindings", object("RoleBinding", "edit", Some("acme"), bind("editor", "ServiceAccount", "deployer")))
            .await;
        let secret = TokenSecret::generate([9; 32]);
        let spec = json!({
            "holder": {"kind": "User", "name": "owner"}, "expires": "2090-01-01T00:00:00Z", "hash": secret.hash().to_string(),
        });
        put("tokens", object("Token", "t", Some("acme"), spec)).await;
        let cloud = Self { world, provider, owner: secret.reveal() };
        cloud.write("identity-providers", "IdentityProvider", "corp", corp()).await;
        cloud
    }

    /// Stores something of acme's, and waits until the directory has it.
    async fn write(&self, plural: &str, kind: &str, name: &str, spec: Value) {
        let revision = self.world.store_global(plural, &object(kind, name, Some("acme"), spec)).await;
        assert!(self.world.directory.seen(revision, Duration::from_secs(60)).await);
    }

    async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        let patch = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let request = http::Request::builder().method(method).uri(path).header("content-type", patch);
        let request = request.header("authorization", format!("Bearer {}", self.owner));
        self.world.send(request.body(body.map_or(String::new(), |b| b.to_string()).into()).unwrap()).await
    }

    async fn token(&self, form: &[(&str, &str)]) -> Answer {
        let encoded = |text: &str| text.bytes().map(|b| format!("%{b:02X}")).collect::<String>();
        let form: Vec<String> = form.iter().map(|(k, v)| format!("{k}={}", encoded(v))).collect();
        let request = http::Request::post("/oauth2/token").header("content-type", "application/x-www-form-urlencoded");
        // From an address of its own: whoever fails often has to wait.
        static ADDRESS: AtomicU32 = AtomicU32::new(0x0a00_0000);
        let address = Ipv4Addr::from_bits(ADDRESS.fetch_add(1, Ordering::Relaxed)).into();
        let request = request.extension(nexus_api::PeerAddress(address));
        self.world.send(request.body(form.join("&").into()).unwrap()).await
    }

    async fn redeem(&self, code: &str) -> Answer {
        self.token(&sign_in(code)).await
    }

    /// Signs somebody in whose provider says this of them.
    async fn come(&self, claims: Value) -> Answer {
        self.provider.code("c", claims);
        self.redeem("c").await
    }

    async fn whoami(&self, granted: &Answer) -> Value {
        assert_eq!(granted.status, StatusCode::OK, "{:?}", granted.body);
        let token = granted.json()["access_token"].as_str().unwrap().to_owned();
        let request = http::Request::get("/v1/whoami").header("authorization", format!("Bearer {token}"));
        self.world.send(request.body(String::new().into()).unwrap()).await.json()
    }

    async fn exchange(&self, token: &str, more: &[(&str, &str)]) -> Answer {
        let grant = "urn:ietf:params:oauth:grant-type:token-exchange";
        let kind = "urn:ietf:params:oauth:token-type:id_token";
        let base = [
            ("grant_type", grant),
            ("subject_token", token),
            ("subject_token_type", kind),
            ("organization", "acme"),
            ("provider", "corp"),
        ];
        self.token(&[&base, more].concat()).await
    }
}

fn sign_in(code: &str) -> [(&str, &str); 7] {
    [
        ("grant_type", "urn:cloudnexus:oidc-code"),
        ("organization", "acme"),
        ("provider", "corp"),
        ("code", code),
        ("code_verifier", VERIFIER),
        ("redirect_uri", REDIRECT),
        ("nonce", NONCE),
    ]
}

fn ann() -> Value {
    json!({"iss": ISSUER, "sub": "u-1", "aud": CLIENT, "exp": seconds() + 300, "iat": seconds(), "nonce": NONCE,
           "preferred_username": "Ann.Smith@corp.example", "name": "Ann Smith", "email": "ann@corp.example",
           "groups": ["eng", "unmapped", "operators"], "amr": ["pwd", "otp"]})
}

fn job() -> Value {
    json!({"iss": ISSUER, "sub": "repo:acme/shop:ref:refs/heads/main", "aud": "https://cloud.test", "exp": seconds() + 300,
           "iat": seconds(), "repository": "acme/shop", "ref": "refs/heads/main"})
}

fn with(mut claims: Value, key: &str, value: Value) -> Value {
    claims[key] = value;
    claims
}

/// The error of a refusal and what it says.
#[track_caller]
fn refusal(answer: &Answer) -> (String, String) {
    assert!(answer.status.is_client_error() || answer.status.is_server_error(), "{:?}", answer.body);
    let body = answer.json();
    (body["error"].as_str().unwrap().to_owned(), body["error_description"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_person_becomes_a_user_with_the_groups_that_the_table_gives() {
    let cloud = Cloud::new().await;
    let granted = cloud.come(ann()).await;
    let me = cloud.whoami(&granted).await;
    assert_eq!(
        (&me["name"], &me["groups"], &me["mfa"]),
        (&json!("acme/ann-smith"), &json!(["developers"]), &json!(true))
    );
    assert_eq!(me["roles"], json!([{"role": "viewer", "over": "organization acme"}]));
    assert!(granted.json()["refresh_token"].is_string());
    let user = cloud.call("GET", "/v1/organizations/acme/users/ann-smith", None).await.json();
    let identity = json!({"provider": "corp", "issuer": ISSUER, "subject": "u-1", "groups": ["developers"]});
    assert_eq!((&user["spec"]["identity"], &user["spec"]["displayName"]), (&identity, &json!("Ann Smith")));

    // What was given by hand stays; what the provider gave goes when the provider takes it.
    cloud.write("groups", "Group", "choir", json!({"users": ["ann-smith"]})).await;
    let later = with(with(ann(), "groups", json!(["ops"])), "amr", json!(["otp"]));
    let me = cloud.whoami(&cloud.come(later).await).await;
    assert_eq!((&me["groups"], &me["mfa"]), (&json!(["choir", "developers", "operators"]), &json!(false)));
    let me = cloud.whoami(&cloud.come(with(ann(), "groups", json!([]))).await).await;
    assert_eq!((&me["groups"], &me["roles"]), (&json!(["choir"]), &json!([])));

    // Called otherwise by the provider, she is still the same person.
    let renamed = with(ann(), "preferred_username", json!("ann-jones"));
    let granted = cloud.come(renamed).await;
    assert_eq!(cloud.whoami(&granted).await["name"], "acme/ann-smith");
    // A group gives nothing while it is not there, nor without the provider's table.
    let groups = async || cloud.whoami(&granted).await["groups"].clone();
    assert_eq!(groups().await, json!(["choir", "developers"]));
    let gone = cloud.call("DELETE", "/v1/organizations/acme/groups/developers", None).await;
    assert_eq!(gone.status, StatusCode::OK, "{:?}", gone.body);
    eventually(async || groups().await == json!(["choir"])).await;
    cloud.write("groups", "Group", "developers", json!({})).await;
    assert_eq!(groups().await, json!(["choir", "developers"]));
    cloud.write("identity-providers", "IdentityProvider", "corp", json!({"issuer": ISSUER, "clientId": CLIENT})).await;
    assert_eq!(cloud.whoami(&granted).await["groups"], json!(["choir"]));
}

#[tokio::test]
async fn what_is_not_of_this_sign_in_is_refused() {
    let cloud = Cloud::new().await;
    let now = seconds();
    for (what, claims, says) in [
        ("another nonce", with(ann(), "nonce", json!("n-2")), "nonce"),
        ("no nonce", with(ann(), "nonce", Value::Null), "nonce"),
        ("another client's", with(ann(), "aud", json!("other")), "another client"),
        ("a CI system's", with(ann(), "aud", json!("https://cloud.test")), "another client"),
        ("another issuer", with(ann(), "iss", json!("https://evil.example")), "another issuer"),
        ("expired", with(ann(), "exp", json!(now - 60)), "expired"),
        ("old", with(ann(), "iat", json!(now - 3600)), "too long ago"),
        ("of the future", with(ann(), "iat", json!(now + 3600)), "not valid yet"),
        ("nobody", with(ann(), "sub", json!("")), "`sub`"),
        ("control characters", with(ann(), "sub", json!("a\u{7}b")), "can't be kept"),
        ("nameless", with(ann(), "preferred_username", json!("@corp.example")), "`preferred_username`"),
        ("groups of a wrong kind", with(ann(), "groups", json!([7])), "`groups`"),
    ] {
        let (error, description) = refusal(&cloud.come(claims).await);
        assert!(error == "invalid_grant" && description.contains(says), "{what}: {error} {description}");
    }
}

#[tokio::test]
async fn a_code_is_good_once_and_only_with_what_began_the_sign_in() {
    let cloud = Cloud::new().await;
    cloud.provider.code("c-1", ann());
    assert_eq!(cloud.redeem("c-1").await.status, StatusCode::OK);
    let (error, description) = refusal(&cloud.redeem("c-1").await);
    assert!(error == "invalid_grant" && description.contains("grant request is invalid"), "{error}: {description}");
    let changed = async |field: &str, value: &str| {
        cloud.provider.code("c", ann());
        let mut form = sign_in("c").map(|(k, v)| (k, if k == field { value } else { v }));
        form.reverse();
        refusal(&cloud.token(&form).await).0
    };
    let other = "x".repeat(43);
    assert_eq!(changed("code_verifier", &other).await, "invalid_grant");
    assert_eq!(changed("code_verifier", "short").await, "invalid_grant");
    assert_eq!(changed("redirect_uri", "http://127.0.0.1:4712/callback").await, "invalid_grant");
    for elsewhere in
        ["https://evil.example/cb", "http://127.0.0.1.evil.example/", "http://127.0.0.1@evil.example/", "x"]
    {
        assert_eq!(changed("redirect_uri", elsewhere).await, "invalid_request", "{elsewhere}");
    }
    assert_eq!(changed("nonce", "").await, "invalid_request");
    assert_eq!(changed("nonce", "n-2").await, "invalid_grant");
    assert_eq!(changed("code", &"c".repeat(5000)).await, "invalid_request");
}

#[tokio::test]
async fn whether_an_organization_is_there_is_not_told() {
    let cloud = Cloud::new().await;
    let listed = async |organization: &str| {
        let path = format!("/oauth2/providers?organization={organization}");
        cloud.world.send(http::Request::get(path).body(String::new().into()).unwrap()).await
    };
    let corp = listed("acme").await.json();
    assert_eq!(
        corp["providers"],
        json!([{"name": "corp", "displayName": "", "issuer": ISSUER, "clientId": CLIENT,
                "scopes": ["openid", "profile", "email"]}])
    );
    let (empty, ghost) = (listed("empty").await, listed("ghost").await);
    assert_eq!((empty.status, empty.json()), (StatusCode::OK, json!({"providers": []})));
    assert_eq!((ghost.status, ghost.json()), (empty.status, empty.json()));
    assert_eq!(listed("No%20Name").await.status, StatusCode::BAD_REQUEST);

    let mut refusals = Vec::new();
    for (organization, provider) in [("acme", "none"), ("empty", "corp"), ("ghost", "corp"), ("A b", "corp")] {
        let form = sign_in("c").map(|(k, v)| match k {
            "organization" => (k, organization),
            "provider" => (k, provider),
            _ => (k, v),
        });
        refusals.push(refusal(&cloud.token(&form).await));
    }
    refusals.dedup();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert!(cloud.provider.asked.lock().unwrap().is_empty(), "nobody is asked for what is not configured");
}

#[tokio::test]
async fn a_provider_takes_over_nobody() {
    let cloud = Cloud::new().await;
    // It calls one of its people like a user that is here, or like one that another of its people became.
    for name in ["owner", "local", "LOCAL@corp.example"] {
        let (error, description) = refusal(&cloud.come(with(ann(), "preferred_username", json!(name))).await);
        assert!(error == "access_denied" && description.contains("already"), "{name}: {description}");
    }
    assert_eq!(cloud.come(ann()).await.status, StatusCode::OK);
    let other = with(ann(), "sub", json!("u-2"));
    assert_eq!(refusal(&cloud.come(other.clone()).await).0, "access_denied");
    // An address is no person either.
    let other = with(with(other, "preferred_username", json!("bob")), "email", json!("ann@corp.example"));
    assert_eq!(cloud.whoami(&cloud.come(other).await).await["name"], "acme/bob");
    // The same subject of another issuer is somebody else, also where the provider's configuration was changed.
    let mut moved = corp();
    moved["issuer"] = "https://moved.example".into();
    cloud.write("identity-providers", "IdentityProvider", "corp", moved).await;
    assert_eq!(refusal(&cloud.come(ann()).await).0, "temporarily_unavailable", "its own answers don't count any more");
}

#[tokio::test]
async fn whoever_is_disabled_or_was_deleted_stays_out() {
    let cloud = Cloud::new().await;
    let granted = cloud.come(ann()).await;
    assert_eq!(granted.status, StatusCode::OK);
    let identity = json!({"provider": "corp", "issuer": ISSUER, "subject": "u-1", "groups": []});
    cloud.write("users", "User", "ann-smith", json!({"disabled": true, "identity": identity})).await;
    let (error, description) = refusal(&cloud.come(ann()).await);
    assert!(error == "access_denied" && description.contains("disabled"), "{description}");
    let refresh = granted.json()["refresh_token"].as_str().unwrap().to_owned();
    assert_eq!(
        refusal(&cloud.token(&[("grant_type", "refresh_token"), ("refresh_token", &refresh)]).await).0,
        "invalid_grant"
    );

    let gone = cloud.call("DELETE", "/v1/organizations/acme/users/ann-smith", None).await;
    assert_eq!(gone.status, StatusCode::OK);
    // The writer remembers who left; the stand-in does not.
    let person = nexus_control::rules::federation::person(ISSUER, "u-1");
    cloud.write("departures", "Departure", person.as_str(), json!({"issuer": ISSUER, "subject": "u-1"})).await;
    let (error, description) = refusal(&cloud.come(ann()).await);
    assert!(error == "access_denied" && description.contains("deleted"), "{description}");
    // Who administers the organization lets them in again, under any name.
    let body = json!({"metadata": {"name": "ann"}, "spec": {"identity": {"provider": "corp", "issuer": ISSUER, "subject": "u-1"}}});
    let made = cloud.call("POST", "/v1/organizations/acme/users", Some(body)).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    assert_eq!(cloud.whoami(&cloud.come(ann()).await).await["name"], "acme/ann");
}

#[tokio::test]
async fn groups_are_the_providers_to_say() {
    let cloud = Cloud::new().await;
    let identity = json!({"provider": "corp", "issuer": ISSUER, "subject": "u-9", "groups": ["operators"]});
    let body = json!({"metadata": {"name": "mallory"}, "spec": {"identity": identity}});
    let made = cloud.call("POST", "/v1/organizations/acme/users", Some(body.clone())).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    assert_eq!(made.json()["spec"]["identity"]["groups"], Value::Null);
    let path = "/v1/organizations/acme/users/mallory";
    for (method, body) in [("PUT", json!({"spec": body["spec"]})), ("PATCH", json!({"spec": {"identity": identity}}))] {
        let changed = cloud.call(method, path, Some(body)).await;
        assert_eq!(changed.status, StatusCode::OK, "{:?}", changed.body);
        assert_eq!(changed.json()["spec"]["identity"]["groups"], Value::Null, "{method}");
    }
}

#[tokio::test]
async fn only_who_has_the_claims_that_are_required_comes_in() {
    let cloud = Cloud::new().await;
    let mut spec = corp();
    spec["require"] = json!({"hd": "corp.example", "email_verified": "true"});
    cloud.write("identity-providers", "IdentityProvider", "corp", spec).await;
    let member = with(with(ann(), "hd", json!("corp.example")), "email_verified", json!(true));
    for stranger in
        [ann(), with(member.clone(), "hd", json!("evil.example")), with(member.clone(), "email_verified", json!(false))]
    {
        let (error, description) = refusal(&cloud.come(stranger).await);
        assert!(error == "invalid_grant" && description.contains("has not the value"), "{description}");
    }
    assert_eq!(cloud.come(member).await.status, StatusCode::OK);
}

#[tokio::test]
async fn keys_may_change_and_nobody_has_them_fetched_for_every_forgery() {
    let cloud = Cloud::new().await;
    assert_eq!(cloud.come(ann()).await.status, StatusCode::OK);
    assert_eq!(cloud.provider.asked_for("/jwks"), 1);
    assert_eq!(cloud.come(ann()).await.status, StatusCode::OK);
    assert_eq!(cloud.provider.asked_for("/jwks"), 1, "they are kept");
    // A new key within half a minute after the last look: those who come have to wait that long.
    cloud.provider.change_key("k-2");
    for _ in 0..20 {
        let (error, description) = refusal(&cloud.exchange(&cloud.provider.sign(&job()), &[]).await);
        assert!(error == "invalid_grant" && description.contains("fetch its keys"), "{description}");
    }
    assert_eq!(cloud.provider.asked_for("/jwks"), 1);
    // Signed by another under the name of a known key.
    cloud.provider.change_key("k-1");
    assert!(refusal(&cloud.exchange(&cloud.provider.sign(&job()), &[]).await).1.contains("signature"));
}

#[tokio::test]
async fn what_a_provider_answers_is_bounded_and_must_be_its_own() {
    for (path, body, says) in [
        ("/jwks", vec![b' '; 1 << 20], "more than"),
        ("/jwks", b"{}".to_vec(), "can't be read"),
        ("/.well-known/openid-configuration", vec![b'['; 1 << 20], "more than"),
        ("/.well-known/openid-configuration", br#"{"issuer": "https://other.example"}"#.to_vec(), "calls itself"),
        (
            "/.well-known/openid-configuration",
            json!({"issuer": ISSUER, "authorization_endpoint": "https://a.example", "token_endpoint": "https://a.example",
                   "jwks_uri": "http://169.254.169.254/latest"})
            .to_string()
            .into_bytes(),
            "https://",
        ),
        ("/token", vec![b'x'; 1 << 20], "more than"),
        ("/token", b"<html>".to_vec(), "can't be read"),
    ] {
        let cloud = Cloud::new().await;
        cloud.provider.answer_with(path, body);
        let answer = cloud.come(ann()).await;
        let (error, description) = refusal(&answer);
        assert_eq!((answer.status, error.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable"), "{path}");
        assert!(description.contains(says), "{path}: {description}");
        // It is left alone for a while.
        let asked = cloud.provider.asked.lock().unwrap().len();
        cloud.come(ann()).await;
        let again = cloud.provider.asked.lock().unwrap().len() - asked;
        assert!(again == 0 || path == "/token", "{path}: {again}");
    }
}

#[tokio::test]
async fn a_slow_provider_holds_up_only_its_own_people() {
    let cloud = Cloud::with(Limits { request_timeout: Duration::from_secs(2), ..Limits::default() }).await;
    cloud
        .write(
            "identity-providers",
            "IdentityProvider",
            "slow",
            json!({"issuer": "https://slow.example", "clientId": "x"}),
        )
        .await;
    let slow = sign_in("c").map(|(k, v)| (k, if k == "provider" { "slow" } else { v }));
    let forms = [slow; 10];
    let waiting = futures::future::join_all(forms.iter().map(|form| cloud.token(form)));
    let (waited, quick) = tokio::join!(waiting, cloud.come(ann()));
    assert_eq!(quick.status, StatusCode::OK, "{:?}", quick.body);
    for answer in waited {
        assert!(answer.status.is_server_error() || answer.status == StatusCode::TOO_MANY_REQUESTS, "{:?}", answer.body);
    }
    assert!(cloud.provider.asked.lock().unwrap().iter().filter(|r| r.url.contains("slow")).count() <= 10);
}

#[tokio::test]
async fn a_pipeline_becomes_its_service_account_for_a_short_while() {
    let cloud = Cloud::new().await;
    let granted = cloud.exchange(&cloud.provider.sign(&job()), &[]).await;
    let me = cloud.whoami(&granted).await;
    assert_eq!(
        (&me["name"], &me["kind"], &me["project"]),
        (&json!("acme/deployer"), &json!("service-account"), &json!("shop"))
    );
    let body = granted.json();
    assert_eq!(body["issued_token_type"], "urn:ietf:params:oauth:token-type:access_token");
    assert_eq!((&body["token_type"], &body["expires_in"]), (&json!("Bearer"), &json!(900)));
    assert!(body.get("refresh_token").is_none(), "{body}");
    let session = body["session"].as_str().unwrap();
    let path = format!("/v1/organizations/acme/sessions/{session}");
    let stored = cloud.call("GET", &path, None).await.json();
    assert_eq!(stored["spec"]["refresh"], Value::Null);
    // As a session it is ended.
    assert_eq!(cloud.call("DELETE", &path, None).await.status, StatusCode::OK);
    let token = body["access_token"].as_str().unwrap().to_owned();
    eventually(async || {
        let request = http::Request::get("/v1/whoami").header("authorization", format!("Bearer {token}"));
        cloud.world.send(request.body(String::new().into()).unwrap()).await.status == StatusCode::UNAUTHORIZED
    })
    .await;
}

#[tokio::test]
async fn a_token_that_no_rule_asks_for_is_not_exchanged() {
    let cloud = Cloud::new().await;
    let now = seconds();
    for (what, claims, says) in [
        ("another repository", with(job(), "repository", json!("evil/shop")), "`repository`"),
        ("a fork's name", with(job(), "repository", json!("acme/shop2")), "`repository`"),
        ("another branch", with(job(), "ref", json!("refs/heads/evil")), "`ref`"),
        ("no repository", with(job(), "repository", Value::Null), "`repository`"),
        ("another audience", with(job(), "aud", json!("https://other.test")), "another client"),
        ("a person's", with(job(), "aud", json!(CLIENT)), "another client"),
        ("another issuer", with(job(), "iss", json!("https://evil.example")), "another issuer"),
        ("expired", with(job(), "exp", json!(now - 60)), "expired"),
        ("two hours old", with(job(), "iat", json!(now - 7200)), "too long ago"),
    ] {
        let (error, description) = refusal(&cloud.exchange(&cloud.provider.sign(&claims), &[]).await);
        assert!(error == "invalid_grant" && description.contains(says), "{what}: {error} {description}");
    }
    let good = cloud.provider.sign(&job());
    for (more, error) in [
        (("actor_token", "x"), "invalid_request"),
        (("requested_token_type", "urn:ietf:params:oauth:token-type:refresh_token"), "invalid_request"),
        (("audience", "https://other.test"), "invalid_target"),
        (("scope", "admin"), "invalid_scope"),
    ] {
        assert_eq!(refusal(&cloud.exchange(&good, &[more]).await).0, error, "{more:?}");
    }
    assert_eq!(refusal(&cloud.exchange("no.token.atall", &[]).await).0, "invalid_grant");
    assert_eq!(refusal(&cloud.exchange(&"a".repeat(40_000), &[]).await).0, "invalid_request");
    cloud.write("service-accounts", "ServiceAccount", "deployer", json!({"disabled": true})).await;
    assert!(refusal(&cloud.exchange(&good, &[]).await).1.contains("disabled"));
}

#[tokio::test]
async fn a_clients_secret_is_told_to_its_provider_and_nobody_else() {
    let cloud = Cloud::new().await;
    let secret = "s3cret-of-the:client";
    let path = "/v1/organizations/acme/identity-providers/corp";
    let body = json!({"spec": {"clientSecret": secret}});
    let changed = cloud.call("PATCH", path, Some(body)).await;
    assert_eq!(changed.status, StatusCode::OK, "{:?}", changed.body);
    for wrong in [json!(7), json!(""), json!("x".repeat(600)), json!("a\nb")] {
        let refused = cloud.call("PATCH", path, Some(json!({"spec": {"clientSecret": wrong}}))).await;
        assert_eq!(refused.problem("invalid")["errors"][0]["field"], "spec.clientSecret", "{wrong}");
    }
    let seen = cloud.call("GET", path, None).await;
    for answer in [&changed, &seen] {
        assert!(!String::from_utf8_lossy(&answer.body).contains("s3cret"), "{:?}", answer.body);
    }
    let sealed = seen.json()["spec"]["sealedSecret"].as_str().unwrap().to_owned();
    assert!(!cloud.world.stores_text("s3cret").await);
    let revision = changed.json()["metadata"]["revision"].as_u64().unwrap();
    assert!(cloud.world.directory.seen(revision, Duration::from_secs(60)).await);
    assert_eq!(cloud.come(ann()).await.status, StatusCode::OK);
    {
        let asked = cloud.provider.asked.lock().unwrap();
        let posted = asked.iter().find(|r| r.url.ends_with("/token")).unwrap();
        let basic = posted.authorization.as_ref().unwrap().strip_prefix("Basic ").unwrap().to_owned();
        assert_eq!(STANDARD.decode(basic).unwrap(), b"nexus:s3cret-of-the%3Aclient");
        assert!(!posted.form.as_ref().unwrap().contains("s3cret"));
    }
    // Whoever may write the provider can't have the secret sent to another: neither by another issuer nor by a copy.
    let mut copy = corp();
    copy["sealedSecret"] = sealed.into();
    cloud.write("identity-providers", "IdentityProvider", "copy", copy).await;
    cloud.provider.code("c", ann());
    let form = sign_in("c").map(|(k, v)| (k, if k == "provider" { "copy" } else { v }));
    let (error, description) = refusal(&cloud.token(&form).await);
    assert!(error == "temporarily_unavailable" && description.contains("clientSecret"), "{description}");
}
