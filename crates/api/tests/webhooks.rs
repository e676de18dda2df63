//! Webhooks over HTTP: where they may lead, what a callback needs, and who may send things again.

mod support;

use http::StatusCode;
use serde_json::{Value, json};
use support::cloud::Cloud;
use support::{Answer, World};

const HOOKS: &str = "/v1/regions/local/projects/shop/webhooks";
const ROUTES: &str = "/v1/regions/local/projects/shop/routes";

fn hook(name: &str, url: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"url": url, "secret": {"name": "hooks"}}})
}

fn fields(answer: &Answer) -> Vec<String> {
    let problem = answer.problem("invalid");
    problem["errors"].as_array().unwrap().iter().map(|e| e["field"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn what_leads_inside_is_refused_where_it_is_written() {
    let cloud = Cloud::new().await;
    let made = cloud.call("editor", "POST", HOOKS, Some(hook("ci", "https://ci.example.com/in"))).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    let spec = &made.json()["spec"];
    assert_eq!((&spec["secret"]["key"], &spec["maxAttempts"]), (&json!("key"), &json!(14)));
    let inside = "http://127.0.0.1:8443/v1";
    let refused = cloud.call("editor", "POST", HOOKS, Some(hook("in", inside))).await;
    assert_eq!(fields(&refused), ["spec.url"]);
    let ci = format!("{HOOKS}/ci");
    for (method, body) in [("PUT", hook("ci", inside)), ("PATCH", json!({"spec": {"url": inside}}))] {
        assert_eq!(fields(&cloud.call("editor", method, &ci, Some(body)).await), ["spec.url"], "{method}");
    }
    for wrong in ["ftp://a/", "https://user@a/", "https://a/#b", "https://A/"] {
        assert_eq!(fields(&cloud.call("editor", "POST", HOOKS, Some(hook("x", wrong))).await), ["spec.url"], "{wrong}");
    }
    assert_eq!(cloud.call("viewer", "POST", HOOKS, Some(hook("v", "https://a/"))).await.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn tests_and_resends_are_for_whoever_may_edit() {
    let cloud = Cloud::new().await;
    let (test, resend) =
        (format!("{HOOKS}/example:test"), "/v1/regions/local/projects/shop/deliveries/example:resend".to_owned());
    for path in [&test, &resend] {
        assert_eq!(cloud.call("editor", "POST", path, None).await.status, StatusCode::OK, "{path}");
        assert_eq!(cloud.call("viewer", "POST", path, None).await.status, StatusCode::FORBIDDEN, "{path}");
        assert_eq!(cloud.call("other-tenant", "POST", path, None).await.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(cloud.call("editor", "GET", path, None).await.status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
    }
    let missing = format!("{HOOKS}/missing:test");
    assert_eq!(cloud.call("editor", "POST", &missing, None).await.status, StatusCode::NOT_FOUND);
    // What a delivery says is the cloud's to say.
    let delivery = "/v1/regions/local/projects/shop/deliveries/example";
    let answer = cloud.call("owner", "PATCH", delivery, Some(json!({"spec": {"url": "https://a/"}}))).await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn a_callback_is_a_url_outside_of_a_change_within_a_project() {
    let world = World::new();
    let send = async |path: &str, n: u32, headers: &[(&str, &str)]| {
        let spec = json!({"host": format!("r{n}.example.com"), "app": "web"});
        let body = match path {
            ROUTES => json!({"metadata": {"name": format!("r-{n}")}, "spec": spec}),
            _ => json!({"metadata": {"name": format!("r-{n}")}, "spec": {}}),
        };
        world.call("POST", path, headers, body).await
    };
    let to = ("callback", "https://ci.example.com/done");
    assert_eq!(send(ROUTES, 1, &[to]).await.status, StatusCode::CREATED);
    assert_eq!(send(ROUTES, 2, &[to, ("callback-secret", "hooks/a.b")]).await.status, StatusCode::CREATED);
    assert_eq!(fields(&send(ROUTES, 3, &[("callback", "http://127.0.0.1/")]).await), ["Callback"]);
    assert_eq!(fields(&send(ROUTES, 3, &[("callback", "nowhere")]).await), ["Callback"]);
    assert_eq!(fields(&send(ROUTES, 3, &[to, ("callback-secret", "a/b/c")]).await), ["Callback-Secret"]);
    assert_eq!(fields(&send(ROUTES, 3, &[("callback-secret", "hooks")]).await), ["Callback-Secret"]);
    assert_eq!(fields(&send("/v1/organizations", 4, &[to]).await), ["Callback"]);
    let none = world.call("GET", &format!("{ROUTES}/r-3"), &[], Value::Null).await;
    assert_eq!(none.status, StatusCode::NOT_FOUND, "nothing was changed");
}
