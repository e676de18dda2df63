//! `blobs:pull`: what a pull answers, and whose credentials it is given.

mod support;

use http::StatusCode;
use serde_json::{Value, json};
use support::World;

const PULL: &str = "/v1/regions/local/projects/default/blobs:pull";

async fn pull(world: &World, body: Value) -> support::Answer {
    world.call("POST", PULL, &[], body).await
}

#[tokio::test]
async fn a_pull_answers_lines_and_last_the_image() {
    let world = World::new();
    let answer = pull(&world, json!({"reference": "registry.example/web:1"})).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["found"]["blobs"], 1);
    let spec = &lines.last().unwrap()["image"];
    // What it says can be written as it is.
    let blob = format!("/v1/regions/local/projects/default/blobs/{}", spec["digest"].as_str().unwrap());
    assert_eq!(world.call("PUT", &blob, &[], Value::Null).await.status, StatusCode::CREATED);
    let image = "/v1/regions/local/projects/default/images/web";
    assert_eq!(world.call("PUT", image, &[], json!({"spec": spec})).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn what_is_not_there_is_an_answer_and_no_stream() {
    let world = World::new();
    let gone = pull(&world, json!({"reference": "registry.example/other:1"})).await;
    assert!(gone.problem("not-found")["detail"].as_str().unwrap().contains("registry.example/other:1"));
    pull(&world, json!({"reference": "registry.example/web:1", "secret": "none"})).await.problem("not-found");
    pull(&world, json!({"reference": "registry.example/web:1", "platform": "x"})).await.problem("invalid");
    pull(&world, json!({})).await.problem("invalid");
    world.call("GET", PULL, &[], Value::Null).await.problem("method-not-allowed");
}

#[tokio::test]
async fn the_newest_version_of_a_secret_is_shown_to_the_registry() {
    let world = World::new();
    let secret = "/v1/regions/local/projects/default/secrets/registry";
    let body = json!({"reference": "registry.example/web:1", "secret": "registry"});
    for (password, status) in [("shut", StatusCode::UNPROCESSABLE_ENTITY), ("open", StatusCode::OK)] {
        assert!(
            world.call("PUT", secret, &[], json!({"spec": {"data": {"password": password}}})).await.status.is_success()
        );
        let answer = pull(&world, body.clone()).await;
        assert_eq!(answer.status, status);
        assert!(!String::from_utf8_lossy(&answer.body).contains(password));
    }
}
