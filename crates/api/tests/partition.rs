//! A revocation while a server is cut off from the group that knows of it.

mod support;

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use nexus_env::{Clock as _, Env, ManualClock, RealClock};
use nexus_iam::jwt::{self, Claims};
use nexus_model::{key, kind};
use nexus_store::{Store as _, Txn};
use serde_json::json;
use support::{Link, World, eventually};

const ACCESS: u64 = 15 * 60;

/// An access token of `s-1`, Ada's session, signed by the first server.
fn token(world: &World, at_millis: i64) -> String {
    let now = u64::try_from(at_millis / 1000).unwrap();
    let claims = Claims {
        iss: "https://cloud.test".into(),
        sub: "user:acme/ada".into(),
        aud: "cloudnexus".into(),
        exp: now + ACCESS,
        nbf: now,
        iat: now,
        jti: jwt::random_id(),
        sid: "s-1".into(),
        org: "acme".into(),
        groups: Vec::new(),
        project: None,
        amr: vec!["pwd".into()],
        act: None,
    };
    world.signer.sign(&claims).unwrap()
}

async fn knows(world: &World, token: &str) -> bool {
    let request = http::Request::get("/v1/whoami").header("authorization", format!("Bearer {token}"));
    match world.send(request.body(String::new().into()).unwrap()).await.status {
        StatusCode::OK => true,
        StatusCode::UNAUTHORIZED => false,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_server_that_is_cut_off_believes_a_revoked_session_until_its_token_ends_and_no_longer() {
    let world = World::new();
    let start = RealClock::default().now_millis();
    let clock = Arc::new(ManualClock::at(start));
    let link = Link::to(&world.global);
    let cut_off = world.beside(link.clone(), Env::real().with_clock(clock.clone()));
    let object = |kind: &str, name: &str, organization: Option<&str>, spec: serde_json::Value| {
        let metadata = json!({"name": name, "organization": organization, "created": "2026-01-01T00:00:00Z"});
        json!({"apiVersion": "cloudnexus/v1", "kind": kind, "metadata": metadata, "spec": spec, "status": {}})
    };
    world.publish_key().await;
    world.store_global("organizations", &object("Organization", "acme", None, json!({}))).await;
    world.store_global("users", &object("User", "ada", Some("acme"), json!({}))).await;
    let holder = json!({"kind": "User", "name": "ada"});
    let session = json!({"holder": holder, "expires": "2090-01-01T00:00:00Z", "address": "127.0.0.1"});
    world.store_global("sessions", &object("Session", "s-1", Some("acme"), session)).await;
    let first = token(&world, start);
    for server in [&world, &cut_off] {
        eventually(async || knows(server, &first).await).await;
    }

    link.set_cut(true);
    let at = key::object(kind::stored("sessions").unwrap(), Some(&"acme".parse().unwrap()), &"s-1".parse().unwrap());
    world.global.txn(Txn::delete(at)).await.unwrap();
    eventually(async || !knows(&world, &first).await).await;

    // It can't know, but what it believes has an end, and it gives nothing new.
    clock.advance(Duration::from_secs(ACCESS - 60));
    assert!(knows(&cut_off, &first).await, "a server without the group goes on with what it knows");
    let form = "grant_type=refresh_token&refresh_token=acme.s-1.cnx_0000000000000000000000000000000000000000000";
    let request = http::Request::post("/oauth2/token").header("content-type", "application/x-www-form-urlencoded");
    let refused = cut_off.send(request.body(form.to_owned().into()).unwrap()).await;
    assert!(!refused.status.is_success(), "{:?}", refused.body);
    clock.advance(Duration::from_secs(120));
    assert!(!knows(&cut_off, &first).await, "the token has ended");

    // Another token of that session is good by its date alone; it is refused once the link is whole.
    let later = token(&world, clock.now_millis());
    assert!(knows(&cut_off, &later).await);
    link.set_cut(false);
    eventually(async || !knows(&cut_off, &later).await).await;
}
