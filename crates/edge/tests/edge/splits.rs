//! Requests split between an older and a newer template.

use nexus_model::kind::HeaderMatch;
use nexus_model::plan::{Backend, RoutingTable, Split};

use crate::common::*;

const REQUESTS: usize = 2_000;

fn split(older: &Instance, newer: Option<&Instance>, percent: u8, header: Option<HeaderMatch>) -> RoutingTable {
    let mut backends = vec![backend(1, older.address)];
    backends.extend(newer.map(|i| Backend { newer: true, ..backend(2, i.address) }));
    let mut service = service("app", backends);
    service.split = Some(Split { percent, header });
    table(1, vec![service])
}

/// How many of so many requests the newer template was given.
async fn newer(edge: &Edge, requests: usize) -> usize {
    let client = client();
    let mut count = 0;
    for _ in 0..requests {
        let got = ask(&client, edge, "GET", "app.localhost", "/", "").await;
        assert_eq!(got.status, 200);
        count += usize::from(got.body == "newer");
    }
    count
}

#[tokio::test]
async fn requests_are_split_by_weight() {
    let (old, new) = (named("older").await, named("newer").await);
    let edge = edge(options()).await;
    for (percent, least, most) in [(0, 0, 0), (25, 380, 620), (100, REQUESTS, REQUESTS)] {
        let mut table = split(&old, Some(&new), percent, None);
        table.revision = 1 + u64::from(percent);
        edge.gateway.offer(table);
        let count = newer(&edge, REQUESTS).await;
        assert!((least..=most).contains(&count), "{count} of {REQUESTS} with {percent} %");
    }
}

#[tokio::test]
async fn a_header_chooses_the_newer_template() {
    let (old, new) = (named("older").await, named("newer").await);
    let edge = edge(options()).await;
    let header = HeaderMatch { name: "X-Canary".into(), value: Some("yes".into()) };
    edge.gateway.offer(split(&old, Some(&new), 0, Some(header)));
    let with = async |value: &str| {
        let request = http::Request::get(format!("http://{}/", edge.address)).header("host", "app.localhost");
        let request = request.header("x-canary", value).body(http_body_util::Full::default()).unwrap();
        let answer = client().request(request).await.unwrap();
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    };
    for _ in 0..20 {
        assert_eq!(with("yes").await, "newer");
        assert_eq!(with("no").await, "older");
    }
    assert_eq!(newer(&edge, 50).await, 0);
}

#[tokio::test]
async fn without_a_ready_instance_of_its_template_a_request_goes_to_the_other() {
    let (old, new) = (named("older").await, named("newer").await);
    let edge = edge(options()).await;
    edge.gateway.offer(split(&old, None, 100, None));
    assert_eq!(newer(&edge, 20).await, 0);
    let mut table = split(&old, Some(&new), 100, None);
    table.services[0].backends[1].ready = false;
    table.revision = 2;
    edge.gateway.offer(table);
    assert_eq!(newer(&edge, 20).await, 0);
    // An instance that has died is no reason to fail either.
    let mut table = split(&old, Some(&new), 100, None);
    table.revision = 3;
    edge.gateway.offer(table);
    assert_eq!(newer(&edge, 20).await, 20);
    new.kill().await;
    assert_eq!(newer(&edge, 20).await, 0);
}
