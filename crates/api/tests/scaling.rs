//! Scaling over HTTP: a change of an app in few words, and what its load was.

mod support;

use http::StatusCode;
use nexus_control::autoscale::history::{DAY_SLOTS, History, SLOT_SECONDS};
use nexus_model::key;
use serde_json::{Value, json};
use support::{APPS, World, app};

const SCALE: &str = "/v1/architecture/scale";

#[tokio::test]
async fn a_request_to_scale_changes_the_app_as_a_patch_of_it_would() {
    let w = World::new();
    w.call("POST", APPS, &[], app("backend-api")).await;
    let asked = json!({"service": "backend-api", "strategy": "predictive", "threshold_cpu": 65, "max_replicas": 50});
    let answer = w.call("POST", SCALE, &[("idempotency-key", "once")], asked.clone()).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let scaled = answer.json()["spec"]["autoscale"].clone();
    assert_eq!((&scaled["strategy"], &scaled["maxReplicas"]), (&json!("predictive"), &json!(50)));
    assert_eq!(scaled["target"], json!({"cpuPercent": 65}));
    let again = w.call("POST", SCALE, &[("idempotency-key", "once")], asked).await;
    assert_eq!(again.header("idempotency-replayed"), "true");

    let rehearsed = json!({"service": "backend-api", "max_replicas": 7});
    let rehearsed = w.call("POST", &format!("{SCALE}?dryRun=true"), &[], rehearsed).await.json();
    assert_eq!(rehearsed["spec"]["autoscale"]["maxReplicas"], 7);
    let held = w.get(&format!("{APPS}/backend-api")).await.json();
    assert_eq!(held["spec"]["autoscale"]["maxReplicas"], 50);

    w.call("POST", SCALE, &[], json!({"service": "nobody"})).await.problem("not-found");
    w.call("POST", SCALE, &[], json!({"service": "backend-api", "threshold_cpu": 0})).await.problem("invalid");
    w.call("POST", SCALE, &[], json!({"service": "backend-api", "replicas": 3})).await.problem("invalid");
    w.call("POST", SCALE, &[], json!({"service": "backend-api", "strategy": "guess"})).await.problem("invalid");
    w.call("GET", SCALE, &[], Value::Null).await.problem("method-not-allowed");
}

#[tokio::test]
async fn the_load_of_an_app_is_what_its_rows_say() {
    let w = World::new();
    let made = w.call("POST", APPS, &[], app("web")).await.json();
    let path = format!("{APPS}/web:load");
    assert_eq!(w.get(&path).await.json()["measures"]["cpu"], json!([]));
    let uid = made["metadata"]["uid"].as_str().unwrap().parse().unwrap();
    let mut history = History::default();
    let first = 20_000 * DAY_SLOTS as u64;
    for slot in [first, first + 1, first + 3] {
        history.record(slot * SLOT_SECONDS, &[Some(250.0), None, Some(1.5)]);
    }
    w.store_row(key::load_history(uid, 20_000), history.row(20_000).unwrap()).await;
    let load = w.get(&path).await.json();
    assert_eq!((&load["begins"], &load["slotSeconds"]), (&json!(first * SLOT_SECONDS), &json!(300)));
    assert_eq!(load["measures"]["cpu"], json!([250.0, 250.0, null, 250.0]));
    assert_eq!(load["measures"]["requests"], json!([null, null, null, null]));
    w.get(&format!("{APPS}/nobody:load")).await.problem("not-found");
}
