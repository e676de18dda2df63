//! Paths over regions: what all regions share is answered from its own store in whatever region, and what is in another
//! region is passed on.

mod support;

use http::Request;
use nexus_iam::jwt::{self, Claims};
use serde_json::{Value, json};
use support::cloud::{Cloud, object};
use support::*;

fn app() -> Value {
    json!({"metadata": {"name": "web"}, "spec": {"image": "web"}})
}

#[tokio::test]
async fn global_paths_use_the_shared_group_and_regional_ones_the_regions_own() {
    let world = World::new();
    let global = "/v1/regions/global/projects/default/apps";
    assert_eq!(world.call("POST", global, &[], app()).await.status, 201);
    assert_eq!((world.global.revision(), world.store.revision()), (1, 0));
    let answer = world.call("GET", &format!("{global}/web"), &[], Value::Null).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["metadata"]["region"]), (200, &json!("global")));
    assert_eq!(world.call("GET", &format!("{APPS}/web"), &[], Value::Null).await.status, 404);
    let created = world.call("POST", APPS, &[], app()).await;
    assert_eq!(created.header("location"), format!("{APPS}/web"));
    assert_eq!((world.global.revision(), world.store.revision()), (1, 1));

    // Projects have no region in their path; images may have any.
    assert_eq!(
        world.call("POST", "/v1/projects", &[], json!({"metadata": {"name": "shop"}, "spec": {}})).await.status,
        201
    );
    assert_eq!((world.global.revision(), world.store.revision()), (2, 1));
    let digest = format!("sha256:{}", "0".repeat(64));
    let spec = json!({"digest": digest, "blobs": [{"digest": digest, "size": 1}]});
    let image = json!({"metadata": {"name": "web", "region": "mirror"}, "spec": spec});
    let there = "/v1/regions/mirror/projects/default/images";
    assert_eq!(world.call("POST", there, &[], image).await.status, 201);
    for region in ["mirror", "local", "global"] {
        let path = format!("/v1/regions/{region}/projects/default/images/web");
        let got = world.call("GET", &path, &[], Value::Null).await.json();
        assert_eq!(got["metadata"]["region"], "global");
        // What was fetched can be sent back.
        assert_eq!(world.call("PUT", &path, &[], got).await.status, 200, "{region}");
    }
    let wrong = json!({"metadata": {"name": "b", "region": "elsewhere"}, "spec": {"image": "web"}});
    assert_eq!(
        world.call("POST", global, &[], wrong).await.problem("invalid")["errors"][0]["field"],
        "metadata.region"
    );
    world.call("GET", "/v1/regions/global/hosts", &[], Value::Null).await.problem("not-found");
}

#[tokio::test]
async fn another_regions_path_is_passed_on_once() {
    let world = World::new();
    let path = "/v1/regions/mirror/projects/default/apps?dryRun=true";
    let answer = world.call("POST", path, &[("x-request-id", "req-7")], app()).await;
    assert_eq!(answer.status, 418, "the answer is the other region's own");
    let seen = answer.json();
    let told = ["region", "method", "uri", "from", "id"].map(|key| seen[key].as_str().unwrap());
    assert_eq!(told, ["mirror", "POST", path, "local", "req-7"]);
    assert_eq!(seen["token"], format!("Bearer {}", world.token), "with the caller's own token");
    assert_eq!(serde_json::from_str::<Value>(seen["body"].as_str().unwrap()).unwrap(), app());
    assert_eq!(seen["origin"].as_str().unwrap().split('.').count(), 3, "and from where it came, signed");

    // Not in circles, not to nowhere, and not for strangers.
    let circle = world.call("GET", "/v1/regions/mirror/apps", &[("x-nexus-passed-on", "mirror")], Value::Null).await;
    circle.problem("unavailable");
    let nowhere = world.call("GET", "/v1/regions/mars/apps", &[], Value::Null).await;
    assert!(nowhere.problem("not-found")["detail"].as_str().unwrap().contains("mirror, local"));
    let stranger = http::Request::builder().uri("/v1/regions/mirror/apps").body(axum::body::Body::empty()).unwrap();
    world.send(stranger).await.problem("unauthenticated");
    world.call("DELETE", "/v1/regions/mirror/apps", &[], Value::Null).await.problem("method-not-allowed");
}

#[tokio::test]
async fn where_a_request_came_from_is_believed_if_a_server_says_so_of_this_very_request() {
    let cloud = Cloud::new().await;
    let world = &cloud.world;
    world.publish_key().await;
    let text = r#"forbid (principal, action, resource) unless { context.ip.isInRange(ip("10.0.0.0/8")) };"#;
    world.store_global("policies", &object("Policy", "from-home", Some("acme"), json!({"text": text}))).await;

    let secret = cloud.secrets.iter().find(|(who, _)| *who == "viewer").unwrap().1.reveal();
    let now = u64::try_from(nexus_env::Clock::now_millis(&nexus_env::RealClock::default()) / 1000).unwrap();
    let said = Claims {
        iss: "https://cloud.test".into(),
        sub: "10.1.2.3".into(),
        aud: "cloudnexus/passed-on/local".into(),
        exp: now + 60,
        nbf: now,
        iat: now,
        jti: "req-9".into(),
        sid: "mirror".into(),
        org: "mirror".into(),
        groups: Vec::new(),
        project: None,
        amr: Vec::new(),
        act: None,
    };
    let sign = |claims: &Claims| world.signer.sign(claims).unwrap();
    let ask = async |bearer: &str, origin: Option<String>| {
        let mut request = Request::get("/v1/regions/local/projects/shop/apps").header("x-request-id", "req-9");
        request = request.header("authorization", format!("Bearer {bearer}"));
        if let Some(origin) = origin {
            request = request.header("x-nexus-origin", origin);
        }
        world.send(request.body(String::new().into()).unwrap()).await
    };
    // From elsewhere nothing there may even be known of.
    eventually(async || ask(&secret, None).await.status == 404).await;
    eventually(async || ask(&secret, Some(sign(&said))).await.status == 200).await;
    let elsewhere = Claims { sub: "192.0.2.1".into(), ..said.clone() };
    assert_eq!(ask(&secret, Some(sign(&elsewhere))).await.status, 404);
    for lie in [
        Claims { aud: "cloudnexus/passed-on/mirror".into(), ..said.clone() },
        Claims { aud: "cloudnexus".into(), ..said.clone() },
        Claims { jti: "req-8".into(), ..said.clone() },
        Claims { iat: now - 120, nbf: now - 120, exp: now - 60, ..said.clone() },
        Claims { sub: "home".into(), ..said.clone() },
    ] {
        ask(&secret, Some(sign(&lie))).await.problem("unauthenticated");
    }
    let strangers = jwt::SigningKey::generate().unwrap().sign(&said).unwrap();
    ask(&secret, Some(strangers)).await.problem("unauthenticated");
    ask(&secret, Some("10.1.2.3".into())).await.problem("unauthenticated");
    ask(&sign(&said), None).await.problem("unauthenticated");
}
