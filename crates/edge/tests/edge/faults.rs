//! Instances that die, hang and come back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use nexus_env::{Endpoint, Env, FaultyTransport, Links, RealTransport};
use tokio::task::JoinSet;

use crate::common::*;

#[tokio::test]
async fn an_instance_that_dies_is_replaced_within_the_request_and_returns_when_it_answers() {
    let (a, b) = (named("a").await, named("b").await);
    let edge = edge(options()).await;
    edge.gateway.offer(table(1, vec![service("x", vec![backend(1, a.address), backend(2, b.address)])]));
    let client = client();
    // Both have a connection that is kept.
    while a.count() == 0 || b.count() == 0 {
        assert_eq!(ask(&client, &edge, "GET", "x.localhost", "/", "").await.status, 200);
    }
    let address = a.address;
    a.kill().await;
    for _ in 0..10 {
        assert_eq!(ask(&client, &edge, "PUT", "x.localhost", "/", "body").await.body, "b");
        assert_eq!(ask(&client, &edge, "POST", "x.localhost", "/", "body").await.body, "b");
    }
    assert_eq!(edge.counted(r#"nexus_gateway_ejections_total{service="default/x:80"}"#), 1);
    let _again = serve(address, |_| async { Response::new(Full::new(Bytes::from("again"))) }).await;
    until(async || ask(&client, &edge, "GET", "x.localhost", "/", "").await.body == "again").await;
}

#[tokio::test]
async fn what_may_have_been_done_is_done_again_only_if_that_is_harmless() {
    let b = named("b").await;
    for answer in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"] {
        let (address, count, task) = cutter(answer).await;
        let edge = edge(options()).await;
        edge.gateway.offer(table(1, vec![service("x", vec![backend(1, address)])]));
        if answer.is_empty() {
            assert_eq!(ask(&client(), &edge, "POST", "x.localhost", "/", "once").await.status, 502);
            assert_eq!(count.load(Ordering::SeqCst), 1);
        }
        // The one that cuts is nearer, so that it is asked first.
        let mut far = backend(2, b.address);
        far.zone = "zone-b".parse().unwrap();
        edge.gateway.offer(table(2, vec![service("x", vec![backend(1, address), far])]));
        let before = count.load(Ordering::SeqCst);
        assert_eq!(ask(&client(), &edge, "PUT", "x.localhost", "/", "twice").await.body, "b");
        assert_eq!(count.load(Ordering::SeqCst), before + 1);
        task.abort();
    }
}

#[tokio::test]
async fn a_host_that_swallows_connections_is_left_for_another() {
    let (a, b) = (named("a").await, named("b").await);
    let links = Links::new();
    links.name(&Endpoint::Tcp(a.address), "a");
    let transport = FaultyTransport::new(Arc::new(RealTransport), "edge", links.clone());
    let env = Env::real().with_transport(Arc::new(transport));
    let edge = edge_in(env, options()).await;
    links.cut_both("edge", "a");
    let mut far = backend(2, b.address);
    far.zone = "zone-b".parse().unwrap();
    edge.gateway.offer(table(1, vec![service("x", vec![backend(1, a.address), far])]));
    assert_eq!(ask(&client(), &edge, "POST", "x.localhost", "/", "body").await.body, "b");
    links.heal_all();
    until(async || get(&edge, "x.localhost").await.body == "a").await;
}

#[tokio::test]
async fn without_instances_a_request_waits_for_a_table_and_then_says_so() {
    let a = named("a").await;
    let edge = edge(nexus_edge::Options { patience: Duration::from_millis(300), ..options() }).await;
    assert_eq!(get(&edge, "x.localhost").await.status, 503);
    edge.gateway.offer(table(1, vec![service("x", vec![])]));
    let got = get(&edge, "x.localhost").await;
    assert_eq!((got.status.as_u16(), got.headers["retry-after"].to_str().unwrap()), (503, "1"));
    assert!(got.body.contains("default/x:80"), "{}", got.body);
    let patient = self::edge(nexus_edge::Options { patience: LONG, budget: LONG, ..options() }).await;
    patient.gateway.offer(table(1, vec![service("x", vec![])]));
    let (got, ()) = tokio::join!(get(&patient, "x.localhost"), async {
        until(async || patient.counted(r#"nexus_gateway_waiting{service="default/x:80"}"#) == 1).await;
        patient.gateway.offer(table(2, vec![service("x", vec![backend(1, a.address)])]));
    });
    assert_eq!(got.body, "a");
}

#[tokio::test]
async fn an_instance_that_is_not_ready_is_the_last_resort() {
    let (a, b) = (named("a").await, named("b").await);
    let edge = edge(options()).await;
    let mut stale = backend(1, a.address);
    stale.ready = false;
    edge.gateway.offer(table(1, vec![service("x", vec![stale.clone(), backend(2, b.address)])]));
    for _ in 0..5 {
        assert_eq!(get(&edge, "x.localhost").await.body, "b");
    }
    edge.gateway.offer(table(2, vec![service("x", vec![stale])]));
    assert_eq!(get(&edge, "x.localhost").await.body, "a");
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let held = gate.clone();
    let slow = serve(free(), move |_| {
        let held = held.clone();
        async move {
            held.notified().await;
            Response::new(Full::new(Bytes::from("done")))
        }
    })
    .await;
    let mut edge = edge(options()).await;
    edge.gateway.offer(table(1, vec![service("x", vec![backend(1, slow.address)])]));
    let mut running = Box::pin(get(&edge, "x.localhost"));
    tokio::select! {
        _ = &mut running => panic!("the instance has not answered"),
        () = until(async || slow.count() == 1) => {}
    }
    edge.stop.cancel();
    tokio::select! {
        _ = &mut running => panic!("the instance has not answered"),
        () = until(async || tokio::net::TcpStream::connect(edge.address).await.is_err()) => {}
    }
    gate.notify_one();
    assert_eq!((&mut running).await.body, "done");
    drop(running);
    tokio::time::timeout(LONG, &mut edge.task).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_see_only_success_while_instances_are_killed_and_replaced() {
    let edge = Arc::new(edge(options()).await);
    let mut instances = VecDeque::new();
    for id in 1..=3u8 {
        instances.push_back((id, named("x").await));
    }
    let publish = |revision, instances: &VecDeque<(u8, Instance)>| {
        let backends = instances.iter().map(|(id, i)| backend(*id, i.address)).collect();
        edge.gateway.offer(table(revision, vec![service("x", backends)]));
    };
    publish(1, &instances);
    let client = client();
    let mut load = JoinSet::new();
    let mut answered = 0;
    let mut check = |done: Result<Got, tokio::task::JoinError>| {
        let got = done.unwrap();
        assert_eq!(got.status, 200, "{}", got.body);
        answered += 1;
    };
    for step in 0..600u32 {
        let (client, edge) = (client.clone(), edge.clone());
        load.spawn(async move { ask(&client, &edge, "GET", "x.localhost", "/", "").await });
        if step % 60 == 30 {
            // Killed first; the table is told later, as it would be.
            let (_, oldest) = instances.pop_front().unwrap();
            oldest.kill().await;
        }
        if step % 60 == 55 {
            instances.push_back((4 + (step / 60) as u8, named("x").await));
            publish(u64::from(step), &instances);
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
        while let Some(done) = load.try_join_next() {
            check(done);
        }
    }
    while let Some(done) = load.join_next().await {
        check(done);
    }
    assert_eq!(answered, 600);
}
