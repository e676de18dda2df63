//! `:trace`, `:capture`, `:check` and `:flows`: what is asked of hosts, and what is refused before.

mod support;

use http::StatusCode;
use nexus_model::kind;
use serde_json::{Value, json};
use support::World;

const NICS: &str = "/v1/regions/local/projects/default/nics";

async fn world() -> World {
    let w = World::new();
    for (name, status) in
        [("web-nic0", json!({"phase": "Attached", "host": "h-1"})), ("lone", json!({"phase": "Available"}))]
    {
        let object = json!({
            "apiVersion": "cloudnexus/v1", "kind": "Nic",
            "metadata": {
                "name": name, "project": "default", "region": "local", "uid": "0b0b0b0b-0000-8000-8000-000000000000",
                "generation": 1, "created": "2023-11-14T22:13:20.123Z",
            },
            "spec": (kind::find("nic").unwrap().example)(), "status": status,
        });
        w.store_object("nics", &object).await;
    }
    w
}

fn body(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap()
}

#[tokio::test]
async fn a_trace_is_asked_of_the_nics_host() {
    let w = world().await;
    let plain = w.get(&format!("{NICS}/web-nic0:trace?to=10.0.0.5&port=80")).await;
    assert_eq!(plain.status, StatusCode::OK);
    let hop = json!({"host": "h-1", "at": "route", "what": "10.0.0.5 Tcp 80"});
    assert_eq!(body(&plain.body), json!({"hops": [hop], "verdict": "delivered"}));
    let probed = w.get(&format!("{NICS}/web-nic0:trace?to=fd00::5&protocol=icmp&probe=true")).await;
    assert_eq!(body(&probed.body)["probed"], true);
    for bad in [
        "",
        "to=web&port=1",
        "to=10.0.0.5",
        "to=10.0.0.5&port=0",
        "to=10.0.0.5&port=1&protocol=icmp",
        "to=10.0.0.5&port=1&x=1",
    ] {
        w.get(&format!("{NICS}/web-nic0:trace?{bad}")).await.problem("bad-request");
    }
    w.get(&format!("{NICS}/lone:trace?to=10.0.0.5&port=80")).await.problem("conflict");
    w.get(&format!("{NICS}/none:trace?to=10.0.0.5&port=80")).await.problem("not-found");
    w.call("POST", &format!("{NICS}/web-nic0:trace"), &[], Value::Null).await.problem("method-not-allowed");
}

#[tokio::test]
async fn a_capture_is_a_file_that_comes_in_pieces() {
    let w = world().await;
    let file = w.get(&format!("{NICS}/web-nic0:capture?address=10.0.0.5&port=80")).await;
    assert_eq!((file.status, &file.body[..]), (StatusCode::OK, &b"header Some(10.0.0.5) Some(80)"[..]));
    assert_eq!(file.header("content-type"), "application/vnd.tcpdump.pcap");
    w.get(&format!("{NICS}/web-nic0:capture?port=1")).await.problem("conflict");
    w.get(&format!("{NICS}/web-nic0:capture?port=x")).await.problem("bad-request");
    w.get(&format!("{NICS}/lone:capture")).await.problem("conflict");
}

#[tokio::test]
async fn a_host_says_what_differs() {
    let w = world().await;
    let host = json!({
        "apiVersion": "cloudnexus/v1", "kind": "Host",
        "metadata": {
            "name": "h-1", "region": "local", "uid": "0c0c0c0c-0000-8000-8000-000000000000", "generation": 1,
            "created": "2023-11-14T22:13:20.123Z",
        },
        "spec": (kind::find("host").unwrap().example)(), "status": {},
    });
    w.store_object("hosts", &host).await;
    let found = w.get("/v1/regions/local/hosts/h-1:check").await;
    let expected = json!({"revision": 7, "networks": 1, "nics": 2, "differences": ["h-1 lacks a route"]});
    assert_eq!(body(&found.body), expected);
    w.get("/v1/regions/local/hosts/h-2:check").await.problem("not-found");
    w.get("/v1/regions/local/hosts/h-1:check?deep=true").await.problem("bad-request");
}

#[tokio::test]
async fn flows_of_all_hosts_come_in_the_order_of_their_times() {
    let w = world().await;
    for (name, kept) in [("shop", "all"), ("quiet", "none")] {
        let object = json!({
            "apiVersion": "cloudnexus/v1", "kind": "Network",
            "metadata": {
                "name": name, "project": "default", "region": "local", "uid": "0d0d0d0d-0000-8000-8000-000000000000",
                "generation": 1, "created": "2023-11-14T22:13:20.123Z",
            },
            "spec": {"cidrs": ["10.0.0.0/16"], "flowLogs": kept}, "status": {},
        });
        w.store_object("networks", &object).await;
    }
    let at = "/v1/regions/local/projects/default/networks";
    let found = body(&w.get(&format!("{at}/shop:flows?nic=web-nic0")).await.body);
    let flows = found["items"].as_array().unwrap();
    let hosts: Vec<&str> = flows.iter().map(|f| f["host"].as_str().unwrap()).collect();
    assert_eq!(hosts, ["h-1", "h-2", "h-1", "h-2"]);
    assert_eq!((&flows[0]["sourceNic"], flows[0].get("dropped")), (&json!("web-nic0"), None));
    assert_eq!(flows[2]["dropped"], "no_ingress_rule");
    assert_eq!(found["silent"], json!([{"host": "h-3", "why": "it is away"}]), "who did not answer is named");
    assert_eq!(found["lost"], 2);
    let newest = body(&w.get(&format!("{at}/shop:flows?limit=1&sinceSeconds=60")).await.body);
    assert_eq!((newest["items"].as_array().unwrap().len(), &newest["items"][0]["host"]), (1, &json!("h-2")));
    w.get(&format!("{at}/quiet:flows")).await.problem("conflict");
    w.get(&format!("{at}/none:flows")).await.problem("not-found");
    for bad in ["limit=0", "limit=10001", "sinceSeconds=0", "nic=A!", "follow=1", "x=1"] {
        w.get(&format!("{at}/shop:flows?{bad}")).await.problem("bad-request");
    }
}
