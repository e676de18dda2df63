//! `:logs` and `:exec`, over a real connection where they need one.

mod support;

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use http::StatusCode;
use nexus_model::kind;
use serde_json::{Value, json};
use support::World;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

const INSTANCES: &str = "/v1/regions/local/projects/default/instances";

async fn world() -> World {
    let w = World::new();
    let metadata = |name: &str| {
        json!({
            "name": name, "project": "default", "region": "local", "uid": "0a0a0a0a-0000-8000-8000-000000000000",
            "generation": 1, "created": "2023-11-14T22:13:20.123Z",
        })
    };
    for (name, status) in
        [("web-1", json!({"phase": "Running", "host": "h-1"})), ("web-2", json!({"phase": "Pending"}))]
    {
        let object = json!({
            "apiVersion": "cloudnexus/v1", "kind": "Instance", "metadata": metadata(name),
            "spec": (kind::find("instance").unwrap().example)(), "status": status,
        });
        w.store_object("instances", &object).await;
    }
    w
}

#[tokio::test]
async fn logs_are_lines_of_one_stream_or_both() {
    let w = world().await;
    let both = w.get(&format!("{INSTANCES}/web-1:logs?tail=5")).await;
    assert_eq!((both.status, &both.body[..]), (StatusCode::OK, &b"from h-1, tail Some(5)\noops\n"[..]));
    assert!(both.header("content-type").starts_with("text/plain"));
    let stderr = w.get(&format!("{INSTANCES}/web-1%3Alogs?stream=stderr")).await;
    assert_eq!(&stderr.body[..], b"oops\n");
    w.get(&format!("{INSTANCES}/web-2:logs")).await.problem("conflict");
    w.get(&format!("{INSTANCES}/web-3:logs")).await.problem("not-found");
    w.get(&format!("{INSTANCES}/web-1:logs?tail=-1")).await.problem("bad-request");
    w.call("POST", &format!("{INSTANCES}/web-1:logs"), &[], Value::Null).await.problem("method-not-allowed");
    w.get(&format!("{INSTANCES}/web-1:logs?part=Not%20a%20name")).await.problem("bad-request");
    let none = w.get(&format!("{INSTANCES}/web-1:logs?part=proxy")).await;
    assert!(String::from_utf8_lossy(&none.body).contains("it has: none"));
    none.problem("not-found");
    w.get(&format!("{INSTANCES}/web-1:restart")).await.problem("not-found");

    // A followed stream ends when the server stops.
    let at = format!("{INSTANCES}/web-1:logs?follow=true");
    let (follow, ()) = tokio::join!(w.get(&at), async {
        tokio::task::yield_now().await;
        w.shutdown.cancel();
    });
    assert_eq!(follow.status, StatusCode::OK);
}

#[tokio::test]
async fn exec_carries_both_ways_and_ends_with_the_exit_code() {
    let w = world().await;
    let refused = w.get(&format!("{INSTANCES}/web-1:exec?command=sh")).await;
    refused.problem("bad-request");
    assert_eq!(refused.header("upgrade"), "websocket");
    w.get(&format!("{INSTANCES}/web-1:exec")).await.problem("bad-request");

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(axum::serve(listener, w.router.clone()).into_future());
    let open = |query: &str| {
        let url = format!("ws://{address}{INSTANCES}/web-1:exec?{query}");
        let mut request = url.into_client_request().unwrap();
        let token = format!("Bearer {}", w.token).parse().unwrap();
        request.headers_mut().insert("authorization", token);
        async move {
            let open = async {
                let stream = tokio::net::TcpStream::connect(address).await.unwrap();
                tokio_tungstenite::client_async(request, stream).await
            };
            tokio::time::timeout(Duration::from_secs(60), open).await.expect("opens in time")
        }
    };
    match open("command=missing").await {
        Err(Error::Http(response)) => assert_eq!(response.status(), StatusCode::UNPROCESSABLE_ENTITY),
        other => panic!("{other:?}"),
    }
    let (mut socket, _) = open("command=sh&command=-c+x&stdin=true").await.unwrap();
    for data in [&b"\0hello"[..], b"\0 there", b"\0"] {
        socket.send(Message::Binary(data.to_vec().into())).await.unwrap();
    }
    let mut got = Vec::new();
    let read = async {
        while let Some(message) = socket.next().await {
            match message.unwrap() {
                Message::Binary(data) => got.push(String::from_utf8(data.to_vec()).unwrap()),
                Message::Close(frame) => return frame.unwrap().code,
                _ => {}
            }
        }
        panic!("no close");
    };
    let code = tokio::time::timeout(Duration::from_secs(60), read).await.expect("ends in time");
    assert_eq!(u16::from(code), 1000);
    assert_eq!(got, ["\x02sh -c x", "\x01HELLO", "\x01 THERE", "\x037"]);

    // A wrong channel is refused.
    let (mut socket, _) = open("command=sh").await.unwrap();
    socket.send(Message::Binary(vec![9, 9].into())).await.unwrap();
    let read = async {
        loop {
            if let Message::Close(frame) = socket.next().await.unwrap().unwrap() {
                return frame.unwrap().code;
            }
        }
    };
    let code = tokio::time::timeout(Duration::from_secs(60), read).await.expect("ends in time");
    assert_eq!(u16::from(code), 1008);
    server.abort();
}
