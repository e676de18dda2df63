//! What servers are told of what passes through.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use nexus_edge::{SourceConfig, follow};
use nexus_env::Env;
use nexus_iam::tls::{self, Policy};
use nexus_iam::{Role, SpiffeId};
use nexus_model::plan::{TrafficReport, method};
use nexus_wire::{Refusal, Server};
use tokio_util::sync::CancellationToken;

use crate::common::*;
use crate::tables::Pki;

#[tokio::test]
async fn requests_errors_and_those_who_wait_are_told_to_the_server_that_leads() {
    let dir = tempfile::tempdir().unwrap();
    let (env, pki) = (Env::real(), Pki::new());
    let told: Arc<Mutex<Vec<TrafficReport>>> = Arc::default();
    let stop = CancellationToken::new();
    let mut servers = Vec::new();
    let mut leader: Option<String> = None;
    // The second does not lead, and says who does.
    for name in ["server-1", "server-2"] {
        let own = pki.identity(SpiffeId::server("home", name).unwrap());
        let policy = Policy::roles("home", &[Role::Gateway]);
        let config = tls::server_config(&own, pki.roots(), policy, &[nexus_wire::ALPN], pki.clock()).unwrap();
        let (heard, elsewhere) = (told.clone(), leader.clone());
        let server = Server::builder(&env, "127.0.0.1:0".parse().unwrap(), config)
            .identify(|chain| tls::peer_id(chain).map(|id| id.to_string()))
            .unary(method::TRAFFIC, move |_, report: TrafficReport| {
                let answer = match &elsewhere {
                    Some(leader) => Err(Refusal::not_leader(Some(leader.clone()))),
                    None => {
                        heard.lock().unwrap().push(report);
                        Ok(())
                    }
                };
                async move { answer }
            })
            .bind()
            .await
            .unwrap();
        let at = server.local();
        leader = Some(at.to_string());
        servers.push(at);
        tokio::spawn(server.serve(stop.clone()));
    }

    let well = named("well").await;
    let answer = |_| async {
        let mut answer = Response::new(Full::new(Bytes::from_static(b"no")));
        *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        answer
    };
    let ill = serve(free(), answer).await;
    let edge = edge(nexus_edge::Options { patience: Duration::from_secs(60), ..options() }).await;
    let services = vec![
        service("well", vec![backend(1, well.address)]),
        service("ill", vec![backend(2, ill.address)]),
        service("none", vec![]),
    ];
    edge.gateway.offer(table(1, services));
    let source = SourceConfig {
        gateway: "gateway-1".parse().unwrap(),
        cluster_id: "home".into(),
        servers: vec![servers[1].clone()],
        peer: None,
        data_dir: dir.path().join("cache"),
        tls: pki.client(),
    };
    let following = tokio::spawn(follow(edge.gateway.clone(), source, env, stop.clone()));
    for _ in 0..5 {
        assert_eq!(get(&edge, "well.localhost").await.body, "well");
    }
    for _ in 0..3 {
        assert_eq!(get(&edge, "ill.localhost").await.status, StatusCode::INTERNAL_SERVER_ERROR);
    }
    let waits = get(&edge, "none.localhost");
    tokio::pin!(waits);
    let sums = |id: u8| {
        let uid = backend(id, well.address).uid;
        let told = told.lock().unwrap();
        let of = told.iter().flat_map(|r| &r.instances).filter(|i| i.uid == uid);
        of.fold((0, 0), |sum, i| (sum.0 + i.requests, sum.1 + i.errors))
    };
    let waiting = || {
        let told = told.lock().unwrap();
        told.iter().flat_map(|r| &r.apps).any(|a| *a.app.as_str() == *"none" && a.waiting == 1)
    };
    tokio::select! {
        got = &mut waits => panic!("it was to wait: {}", got.status),
        () = until(async || sums(1) == (5, 0) && sums(2) == (3, 3) && waiting()) => {}
    }
    let arrived = told.lock().unwrap().iter().flat_map(|r| &r.apps).map(|a| a.arrived).sum::<u32>();
    assert_eq!(arrived, 9);
    stop.cancel();
    following.await.unwrap();
}

#[tokio::test]
async fn a_request_for_an_app_that_sleeps_waits_until_an_instance_is_ready() {
    let instance = named("awake").await;
    let patience = Duration::from_millis(50);
    let edge = edge(nexus_edge::Options { patience, budget: patience, ..options() }).await;
    let asleep = |backends| nexus_model::plan::Service { wakes: true, ..service("app", backends) };
    edge.gateway.offer(table(1, vec![asleep(vec![]), service("down", vec![])]));
    let got = get(&edge, "app.localhost");
    tokio::pin!(got);
    // Whoever asks for an app that is down is told so long before.
    tokio::select! {
        got = &mut got => panic!("it was to wait: {}", got.status),
        refused = get(&edge, "down.localhost") => assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE),
    }
    let starting = nexus_model::plan::Backend { ready: false, ..backend(1, instance.address) };
    edge.gateway.offer(table(2, vec![asleep(vec![starting]), service("down", vec![])]));
    let others = async || {
        for _ in 0..3 {
            assert_eq!(get(&edge, "down.localhost").await.status, StatusCode::SERVICE_UNAVAILABLE);
        }
    };
    tokio::select! {
        got = &mut got => panic!("it was to wait: {}", got.status),
        () = others() => assert_eq!(instance.count(), 0, "what starts is not asked"),
    }
    edge.gateway.offer(table(3, vec![asleep(vec![backend(1, instance.address)])]));
    assert_eq!(got.await.body, "awake");
}

#[tokio::test]
async fn the_first_request_for_an_app_that_sleeps_goes_to_who_starts_as_soon_as_that_can_be_connected_to() {
    let instance = named("awake").await;
    let edge = edge(options()).await;
    let service = |starting| nexus_model::plan::Service { wakes: true, starting, ..service("app", vec![]) };
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let starting = |n, address| nexus_model::plan::Backend { ready: false, ..backend(n, address) };
    edge.gateway.offer(table(1, vec![service(vec![starting(1, closed)])]));
    let got = futures::future::join_all((0..3).map(|_| get(&edge, "app.localhost")));
    tokio::pin!(got);
    tokio::select! {
        _ = &mut got => panic!("nobody listens there"),
        () = tokio::time::sleep(Duration::from_millis(100)) => {}
    }
    edge.gateway.offer(table(2, vec![service(vec![starting(1, closed), starting(2, instance.address)])]));
    tokio::select! {
        _ = &mut got => panic!("one knocks; the others wait for the table"),
        () = until(async || instance.count() == 1) => {}
    }
    // As soon as it is known to be ready all go there.
    edge.gateway
        .offer(table(3, vec![nexus_model::plan::Service { wakes: true, ..service_of(backend(2, instance.address)) }]));
    assert!(got.await.iter().all(|answer| answer.body == "awake"));
    assert_eq!(instance.count(), 3);
}

fn service_of(backend: nexus_model::plan::Backend) -> nexus_model::plan::Service {
    service("app", vec![backend])
}
