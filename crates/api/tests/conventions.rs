//! The conventions that every kind follows, seen from outside.

mod support;

use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use nexus_api::Limits;
use nexus_model::{Digest, key, kind};
use nexus_store::{Revision, Store, Txn};
use serde_json::{Value, json};
use support::{APPS, World, app};

fn names(list: &Value) -> Vec<String> {
    list["items"].as_array().unwrap().iter().map(|o| o["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn an_object_is_created_read_replaced_patched_and_deleted() {
    let w = World::new();
    let made = w.call("POST", APPS, &[], app("web")).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    let at = made.header("location").to_owned();
    assert_eq!(at, format!("{APPS}/web"));
    let object = made.json();
    assert_eq!((&object["kind"], &object["metadata"]["region"]), (&json!("App"), &json!("local")));
    assert_eq!(object["metadata"]["annotations"]["actor"], "admin");
    assert_eq!(object["spec"]["resources"]["pids"], 512);

    let got = w.get(&at).await;
    assert_eq!(got.json()["metadata"]["revision"], object["metadata"]["revision"]);
    assert_eq!(got.header("etag"), format!("\"{}\"", object["metadata"]["revision"]));
    let head = w.call("HEAD", &at, &[], Value::Null).await;
    assert_eq!((head.status, head.body.len()), (StatusCode::OK, 0));
    assert_eq!(head.header("content-length"), got.body.len().to_string());

    // What was fetched can be edited and sent back.
    let mut edited = got.json();
    edited["spec"]["replicas"] = json!(5);
    let put = w.call("PUT", &at, &[], edited.clone()).await;
    assert_eq!((put.status, put.json()["metadata"]["generation"].as_u64()), (StatusCode::OK, Some(2)));
    // Its revision was a precondition, which no longer holds.
    w.call("PUT", &at, &[], edited).await.problem("precondition-failed");

    let patch = json!({"metadata": {"labels": {"tier": "front"}}, "spec": {"replicas": null}});
    let patched = w.call("PATCH", &at, &[], patch).await;
    assert_eq!(patched.status, StatusCode::OK, "{:?}", patched.body);
    assert_eq!(
        (&patched.json()["spec"]["replicas"], &patched.json()["metadata"]["labels"]["tier"]),
        (&json!(1), &json!("front"))
    );

    w.call("POST", APPS, &[], app("web")).await.problem("already-exists");
    let gone = w.call("DELETE", &at, &[], Value::Null).await;
    assert_eq!(gone.status, StatusCode::OK);
    assert!(gone.json()["metadata"]["deleting"].is_string());
    w.get(&at).await.problem("not-found");
    assert_eq!(names(&w.get(APPS).await.json()), Vec::<String>::new());
    assert_eq!(names(&w.get(&format!("{APPS}?deleting=true")).await.json()), ["web"]);
    assert_eq!(names(&w.get("/v1/regions/local/projects/other/apps?deleting=true").await.json()), Vec::<String>::new());

    let put = w.call("PUT", &at, &[], json!({"spec": {"image": "web"}})).await;
    assert_eq!((put.status, put.header("location")), (StatusCode::CREATED, at.as_str()));
}

#[tokio::test]
async fn every_kind_is_served_by_its_declaration() {
    let w = World::new();
    for d in kind::all() {
        let base = match d.scope {
            kind::Scope::Global => format!("/v1/{}", d.plural),
            kind::Scope::Region => format!("/v1/regions/local/{}", d.plural),
            kind::Scope::Project => format!("/v1/regions/local/projects/default/{}", d.plural),
            kind::Scope::Organization => format!("/v1/organizations/default/{}", d.plural),
        };
        let list = w.get(&base).await;
        assert_eq!((list.status, &list.json()["kind"]), (StatusCode::OK, &json!(format!("{}List", d.kind))));
        let body = json!({"metadata": {"name": "example"}, "spec": (d.example)()});
        let made = w.call("POST", &base, &[], body).await;
        if d.verbs.create {
            assert_eq!(made.status, StatusCode::CREATED, "{}: {:?}", d.kind, made.body);
            assert_eq!(w.get(&format!("{base}/example")).await.status, StatusCode::OK);
        } else {
            made.problem("method-not-allowed");
            assert_eq!(made.header("allow"), "GET, HEAD");
            w.get(&format!("{base}/example")).await.problem("not-found");
        }
        if d.verbs.update && !d.verbs.create {
            let body = json!({"spec": (d.example)()});
            w.call("PUT", &format!("{base}/example"), &[], body).await.problem("not-found");
        }
    }
    let all = w.get("/v1/regions/local/apps").await.json();
    assert_eq!(names(&all), ["example"]);
    w.call("POST", "/v1/regions/local/apps", &[], app("x")).await.problem("method-not-allowed");
}

#[tokio::test]
async fn every_error_is_a_problem_that_says_what_to_do() {
    let w = World::new();
    let detail = |v: Value| v["detail"].as_str().unwrap().to_owned();
    assert!(detail(w.get("/v1/regions/local/projects/default/aps").await.problem("not-found")).contains("\"apps\""));
    w.get("/nowhere").await.problem("not-found");
    w.get("/v1/regions/elsewhere/apps").await.problem("not-found");
    let refused = w.call("DELETE", APPS, &[], Value::Null).await;
    refused.problem("method-not-allowed");
    assert_eq!(refused.header("allow"), "GET, HEAD, POST");

    let post = |content_type: &'static str, body: Vec<u8>| {
        let request = w.request("POST", APPS).header("content-type", content_type);
        w.send(request.body(Body::from(body)).unwrap())
    };
    post("text/plain", b"{}".into()).await.problem("unsupported-media-type");
    post("application/json", b"{".into()).await.problem("bad-request");
    post("application/json", b"".into()).await.problem("bad-request");
    post("application/json", b"{\"metadata\": {\"name\": \"\xff\"}}".into()).await.problem("bad-request");
    post("application/json", "[".repeat(1000).into()).await.problem("bad-request");
    post("application/json", vec![b' '; (1 << 20) + 1]).await.problem("too-large");
    let body = json!({"metadata": {"name": "web"}, "spec": {"image": "web", "replcas": 2}}).to_string();
    let wrong = post("application/json", body.into()).await.problem("invalid");
    assert_eq!(wrong["errors"][0]["field"], "spec.replcas");

    for query in ["limit=0", "limit=501", "limit=x", "labels=a%20b", "cursor=AAAA", "watched=1", "consistency=maybe"] {
        w.get(&format!("{APPS}?{query}")).await.problem("bad-request");
    }
    w.call("POST", &format!("{APPS}?dryrun=true"), &[], app("web")).await.problem("bad-request");
    w.call("POST", APPS, &[("idempotency-key", "")], app("web")).await.problem("bad-request");
    w.call("POST", APPS, &[("idempotency-key", "k 1")], app("web")).await.problem("bad-request");
    w.call("DELETE", &format!("{APPS}/web"), &[("if-match", "7")], Value::Null).await.problem("bad-request");
    w.call("POST", APPS, &[], app("panics")).await.problem("internal");
    assert_eq!(w.get(APPS).await.status, StatusCode::OK);
    w.get("/readyz").await.problem("unavailable");
}

#[tokio::test]
async fn a_request_keeps_its_id_and_a_bad_one_is_replaced() {
    let w = World::new();
    let made = w.call("POST", APPS, &[("x-request-id", "my-id.1")], app("web")).await;
    assert_eq!(made.header("x-request-id"), "my-id.1");
    assert_eq!(made.json()["metadata"]["requestId"], "my-id.1");
    let other = w.call("GET", APPS, &[("x-request-id", "not an id")], Value::Null).await;
    assert!(other.header("x-request-id").starts_with("req-"));
}

#[tokio::test]
async fn only_known_tokens_pass() {
    let w = World::new();
    let send = |path: &'static str, token: Option<&'static str>| {
        let mut request = Request::builder().uri(path);
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        w.send(request.body(Body::empty()).unwrap())
    };
    for token in [None, Some("Basic eDp5"), Some("Bearer wrong"), Some("Bearer")] {
        let refused = send(APPS, token).await;
        refused.problem("unauthenticated");
        assert!(refused.header("www-authenticate").starts_with("Bearer"));
        send("/v1/status", token).await.problem("unauthenticated");
    }
    for open in ["/healthz", "/metrics", "/v1/openapi.json"] {
        assert_eq!(send(open, None).await.status, StatusCode::OK);
    }
    let status = w.get("/v1/status").await.json();
    assert_eq!(
        (&status["cluster_id"], &status["topology"]["failover_mode"]),
        (&json!("cnx-local"), &json!("automatic"))
    );
    let figures = String::from_utf8(send("/metrics", None).await.body.to_vec()).unwrap();
    assert!(
        figures.contains(r#"nexus_api_requests_total{route="/v1/status",method="GET",class="4xx"} 4"#),
        "{figures}"
    );
}

#[tokio::test]
async fn a_list_goes_on_page_by_page_without_gaps() {
    let w = World::new();
    for i in 0..25 {
        let mut app = app(&format!("a-{i:02}"));
        app["metadata"]["labels"] = json!({"even": (i % 2 == 0).to_string()});
        assert_eq!(w.call("POST", APPS, &[], app).await.status, StatusCode::CREATED);
    }
    for (query, expected) in [("limit=10", 25), ("limit=5&labels=even%3Dtrue", 13), ("limit=25", 25)] {
        let mut seen = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = w.get(&format!("{APPS}?{query}{cursor}")).await.json();
            assert!(page["metadata"]["revision"].as_u64().unwrap() >= 25);
            seen.extend(names(&page));
            // An object that vanishes between two pages does not move the others.
            let Some(next) = page["metadata"]["cursor"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        seen.dedup();
        assert_eq!(seen.len(), expected, "{query}: {seen:?}");
    }
    let page = w.get(&format!("{APPS}?limit=5")).await.json();
    let cursor = page["metadata"]["cursor"].as_str().unwrap().to_owned();
    w.get(&format!("/v1/regions/local/projects/other/apps?cursor={cursor}")).await.problem("bad-request");
    let stale = w.get(&format!("{APPS}?consistency=stale&limit=1")).await;
    assert_eq!((names(&stale.json()), stale.header("x-cnx-stale-ms")), (vec!["a-00".to_owned()], "42"));
    let one = w.get(&format!("{APPS}/a-00?consistency=stale")).await;
    assert_eq!((one.status, one.header("x-cnx-stale-ms")), (StatusCode::OK, "42"));
    assert_eq!(w.get(&format!("{APPS}/a-00")).await.header("x-cnx-stale-ms"), "");
    let shared = w.get("/v1/projects?consistency=stale").await;
    assert_eq!(shared.header("x-cnx-stale-ms"), "7", "the age of what all regions share");
}

#[tokio::test]
async fn a_selective_list_does_bounded_work() {
    let w = World::new();
    let made = w.call("POST", APPS, &[], app("x")).await.json();
    let mut objects: Vec<Value> = Vec::new();
    for i in 0..10_050 {
        let mut object = made.clone();
        object["metadata"]["name"] = json!(format!("n-{i:05}"));
        objects.push(object);
    }
    objects[10_040]["metadata"]["labels"] = json!({"rare": "yes"});
    for object in &objects {
        w.store_object("apps", object).await;
    }
    let first = w.get(&format!("{APPS}?labels=rare")).await.json();
    assert_eq!(names(&first), Vec::<String>::new());
    let cursor = first["metadata"]["cursor"].as_str().unwrap();
    let second = w.get(&format!("{APPS}?labels=rare&cursor={cursor}")).await.json();
    assert_eq!(names(&second), ["n-10040"]);
    assert!(second["metadata"].get("cursor").is_none());
}

#[tokio::test]
async fn preconditions_guard_against_lost_updates() {
    let w = World::new();
    let at = format!("{APPS}/web");
    let made = w.call("POST", APPS, &[], app("web")).await;
    let tag = made.header("etag").to_owned();
    assert_eq!(w.call("GET", &at, &[("if-none-match", &tag)], Value::Null).await.status, StatusCode::NOT_MODIFIED);
    assert_eq!(w.call("GET", &at, &[("if-none-match", "\"9999\"")], Value::Null).await.status, StatusCode::OK);
    let patch = json!({"spec": {"replicas": 2}});
    assert_eq!(w.call("PATCH", &at, &[("if-match", &tag)], patch.clone()).await.status, StatusCode::OK);
    w.call("PATCH", &at, &[("if-match", &tag)], patch.clone()).await.problem("precondition-failed");
    assert_eq!(w.call("PATCH", &at, &[("if-match", "*")], patch).await.status, StatusCode::OK);
    let body = json!({"spec": {"image": "web"}});
    w.call("PUT", &format!("{APPS}/new"), &[("if-match", "*")], body.clone()).await.problem("precondition-failed");
    w.call("PUT", &at, &[("if-none-match", "*")], body.clone()).await.problem("already-exists");
    let new = w.call("PUT", &format!("{APPS}/new"), &[("if-none-match", "*")], body).await;
    assert_eq!(new.status, StatusCode::CREATED);
    w.call("DELETE", &at, &[("if-match", &tag)], Value::Null).await.problem("precondition-failed");
}

#[tokio::test]
async fn a_retry_gets_the_first_answer_and_a_dry_run_changes_nothing() {
    let w = World::new();
    let dry = w.call("POST", &format!("{APPS}?dryRun=true"), &[], app("web")).await;
    assert_eq!((dry.status, dry.header("location")), (StatusCode::OK, ""));
    w.get(&format!("{APPS}/web")).await.problem("not-found");
    let key = [("idempotency-key", "k-1")];
    let first = w.call("POST", APPS, &key, app("web")).await;
    let again = w.call("POST", APPS, &key, app("web")).await;
    assert_eq!((first.status, again.status), (StatusCode::CREATED, StatusCode::CREATED));
    assert_eq!((first.header("idempotency-replayed"), again.header("idempotency-replayed")), ("", "true"));
    assert_eq!(first.json(), again.json());
}

#[tokio::test]
async fn a_wait_ends_when_the_object_has_settled_or_its_time_is_over() {
    let w = World::new();
    let at = format!("{APPS}/web");
    let short = w.call("POST", APPS, &[("prefer", "wait=0")], app("web")).await;
    assert_eq!((short.status, short.header("x-cnx-settled")), (StatusCode::CREATED, "false"));
    assert_eq!(short.header("preference-applied"), "wait=0");

    let patch = json!({"spec": {"replicas": 2}});
    let waits = w.call("PATCH", &at, &[("prefer", "respond-async, wait=60")], patch);
    let settles = async {
        loop {
            let mut object = w.get(&at).await.json();
            if object["metadata"]["generation"] == 2 {
                // First of the old generation, which must not count.
                object["status"] = json!({"phase": "Ready", "observedGeneration": 1});
                w.store_object("apps", &object).await;
                object["status"]["observedGeneration"] = json!(2);
                return w.store_object("apps", &object).await;
            }
            tokio::task::yield_now().await;
        }
    };
    let (answer, revision) = tokio::join!(waits, settles);
    assert_eq!(answer.header("x-cnx-settled"), "true");
    assert_eq!(answer.json()["metadata"]["revision"], revision);
    assert_eq!(answer.json()["status"]["observedGeneration"], 2);

    // Kinds without a phase are settled at once.
    let org = json!({"metadata": {"name": "acme"}, "spec": {}});
    let made = w.call("POST", "/v1/organizations", &[("prefer", "wait=60")], org).await;
    assert_eq!((made.status, made.header("x-cnx-settled")), (StatusCode::CREATED, "true"));

    // A delete is settled when its tombstone is gone.
    let waits = w.call("DELETE", &at, &[("prefer", "wait=60")], Value::Null);
    let tears_down = async {
        loop {
            let list = w.get(&format!("{APPS}?deleting=true")).await.json();
            if list["items"][0]["metadata"]["deleting"].is_string() {
                let uid = list["items"][0]["metadata"]["uid"].as_str().unwrap().parse().unwrap();
                let tombstone = key::tombstone(kind::find("app").unwrap(), uid);
                return w.store.txn(Txn::delete(tombstone)).await.unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    let (answer, _) = tokio::join!(waits, tears_down);
    assert_eq!((answer.status, answer.header("x-cnx-settled")), (StatusCode::OK, "true"));
}

#[tokio::test]
async fn too_much_at_once_and_too_slow_are_refused() {
    let limits = Limits { requests: 1, streams: 0, request_timeout: Duration::from_millis(300), ..Limits::default() };
    let w = World::with(limits);
    let slow = w.call("POST", APPS, &[], app("slow"));
    let other = async {
        loop {
            let answer = w.get(APPS).await;
            if answer.status != StatusCode::OK {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    };
    let (slow, other) = tokio::join!(slow, other);
    slow.problem("timeout");
    other.problem("overloaded");
    assert_eq!(other.header("retry-after"), "1");
    w.get(&format!("{APPS}?watch=0")).await.problem("overloaded");
}

#[tokio::test]
async fn under_overload_what_matters_less_is_shed_first() {
    let limits = Limits { requests: 2, request_timeout: Duration::from_millis(500), ..Limits::default() };
    let w = World::with(limits);
    let slow = w.call("POST", APPS, &[], app("slow"));
    let others = async {
        let batch = loop {
            let batch = w.call("GET", APPS, &[("priority", "u=7")], Value::Null).await;
            if batch.status != StatusCode::OK {
                break batch;
            }
            tokio::task::yield_now().await;
        };
        (batch, w.get("/v1/regions/local/hosts").await, w.get("/healthz").await)
    };
    let (_, (batch, operator, health)) = tokio::join!(slow, others);
    batch.problem("overloaded");
    assert_eq!(batch.header("retry-after"), "5");
    assert_eq!((operator.status, health.status), (StatusCode::OK, StatusCode::OK));
}

#[tokio::test]
async fn a_blob_goes_up_and_comes_down() {
    let w = World::new();
    let content = "some layer";
    let at = format!("/v1/regions/local/projects/default/blobs/{}", Digest::of(content.as_bytes()));
    w.get(&at).await.problem("not-found");
    let put = |body: &'static str| w.send(w.request("PUT", &at).body(Body::from(body)).unwrap());
    put("something else").await.problem("invalid");
    let first = put(content).await;
    assert_eq!((first.status, first.header("location")), (StatusCode::CREATED, at.as_str()));
    assert_eq!(first.json()["size"], 10);
    assert_eq!(put(content).await.status, StatusCode::OK);
    let got = w.get(&at).await;
    assert_eq!((&got.body[..], got.header("content-length")), (content.as_bytes(), "10"));
    let head = w.call("HEAD", &at, &[], Value::Null).await;
    assert_eq!((head.body.len(), head.header("content-length")), (0, "10"));
    let known = w.call("GET", &at, &[("if-none-match", got.header("etag"))], Value::Null).await;
    assert_eq!(known.status, StatusCode::NOT_MODIFIED);
    w.get("/v1/regions/local/projects/default/blobs/sha256:12").await.problem("not-found");
    let endless = Body::from_stream(futures::stream::pending::<Result<bytes::Bytes, std::io::Error>>());
    let refused = w.send(w.request("PUT", &at).body(endless).unwrap()).await;
    assert!(refused.problem("bad-request")["detail"].as_str().unwrap().contains("Content-Length"));
    w.call("POST", &at, &[], Value::Null).await.problem("method-not-allowed");
}

/// Reads server-sent events one by one.
struct Events {
    body: Body,
    text: String,
}

impl Events {
    async fn open(w: &World, path: &str, headers: &[(&str, &str)]) -> Self {
        let mut request = w.request("GET", path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = w.raw(request.body(Body::empty()).unwrap()).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), text: String::new() }
    }

    /// `id`, event and data.
    async fn next(&mut self) -> Option<(u64, String, Value)> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    event.lines().find_map(|l| l.strip_prefix(&format!("{name}: "))).unwrap_or_default().to_owned()
                };
                let data = serde_json::from_str(&field("data")).unwrap();
                let out = (field("id").parse().unwrap(), field("event"), data);
                self.text = rest.to_owned();
                return Some(out);
            }
            let frame =
                tokio::time::timeout(Duration::from_secs(60), self.body.frame()).await.expect("an event in time");
            let data = frame?.unwrap().into_data().unwrap();
            self.text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }
}

#[tokio::test]
async fn a_watch_tells_every_change_and_can_be_resumed() {
    let w = World::new();
    let revision = w.get(APPS).await.json()["metadata"]["revision"].as_u64().unwrap();
    let mut events = Events::open(&w, &format!("{APPS}?watch={revision}"), &[]).await;
    // Revision 0 means "now", and so does nothing at all.
    let (id, event, data) = events.next().await.unwrap();
    assert_eq!((id, event.as_str(), &data["metadata"]["revision"]), (revision, "bookmark", &json!(revision)));

    w.call("POST", APPS, &[], app("web")).await;
    w.call("POST", "/v1/regions/local/projects/other/apps", &[], app("unseen")).await;
    w.call("DELETE", &format!("{APPS}/web"), &[], Value::Null).await;
    let (id, event, data) = events.next().await.unwrap();
    assert_eq!(
        (event.as_str(), &data["metadata"]["name"], &data["metadata"]["revision"]),
        ("put", &json!("web"), &json!(id))
    );
    let (last, event, data) = events.next().await.unwrap();
    assert_eq!(
        (event.as_str(), &data["spec"]["image"], &data["metadata"]["revision"]),
        ("delete", &json!("web"), &json!(last))
    );

    let id = id.to_string();
    let mut resumed = Events::open(&w, &format!("{APPS}?watch"), &[("last-event-id", &id)]).await;
    assert_eq!(resumed.next().await.unwrap().1, "bookmark");
    assert_eq!(resumed.next().await.unwrap().0, last);

    w.store.compact(Revision(last)).await.unwrap();
    w.get(&format!("{APPS}?watch={id}")).await.problem("compacted");
    w.get(&format!("{APPS}?watch=999999")).await.problem("bad-request");
    w.get(&format!("{APPS}?watch=x")).await.problem("bad-request");
    w.get(&format!("{APPS}?watch=0&limit=3")).await.problem("bad-request");

    // A server that stops says so and ends the stream.
    w.shutdown.cancel();
    let (_, event, data) = resumed.next().await.unwrap();
    assert_eq!((event.as_str(), &data["code"]), ("error", &json!("unavailable")));
    assert!(resumed.next().await.is_none());
}

#[tokio::test]
async fn a_selective_watch_tells_what_leaves_the_selection() {
    let limits = Limits { bookmark_every: Duration::from_millis(50), ..Limits::default() };
    let w = World::with(limits);
    let mut events = Events::open(&w, &format!("{APPS}?watch=0&labels=tier%3Dfront"), &[]).await;
    assert_eq!(events.next().await.unwrap().1, "bookmark");
    // Silence is filled with bookmarks.
    assert_eq!(events.next().await.unwrap().1, "bookmark");
    let mut front = app("a");
    front["metadata"]["labels"] = json!({"tier": "front"});
    w.call("POST", APPS, &[], app("b")).await;
    w.call("POST", APPS, &[], front).await;
    w.call("PATCH", &format!("{APPS}/a"), &[], json!({"metadata": {"labels": {"tier": "back"}}})).await;
    w.call("DELETE", &format!("{APPS}/a"), &[], Value::Null).await;
    let revision = w.store.revision();
    let mut seen = Vec::new();
    loop {
        let (id, event, data) = events.next().await.unwrap();
        if event != "bookmark" {
            seen.push((event, data["metadata"]["name"].as_str().unwrap().to_owned()));
        } else if id >= revision {
            break;
        }
    }
    assert_eq!(seen, [("put".to_owned(), "a".to_owned()), ("delete".into(), "a".into())]);
}

#[tokio::test]
async fn one_revision_of_many_events_is_resumed_whole() {
    let w = World::new();
    let object = w.call("POST", APPS, &[], app("x")).await.json();
    let from = w.store.revision();
    let ops = ["a", "b", "c"].map(|name| {
        let mut object = object.clone();
        object["metadata"]["name"] = json!(name);
        nexus_store::Op::put(format!("o/apps/default/{name}"), object.to_string())
    });
    w.store.txn(Txn::new(vec![], ops.into())).await.unwrap();
    let mut events = Events::open(&w, &format!("{APPS}?watch={from}"), &[]).await;
    events.next().await.unwrap();
    let ids = [events.next().await.unwrap().0, events.next().await.unwrap().0, events.next().await.unwrap().0];
    assert_eq!(ids, [from, from, from + 1]);
}

#[tokio::test]
async fn the_document_is_served_and_cached() {
    let w = World::new();
    let got = w.get("/v1/openapi.json").await;
    assert_eq!(got.json()["openapi"], "3.1.0");
    assert_eq!(got.json(), nexus_api::openapi(&"local".parse().unwrap()));
    let again = w.call("GET", "/v1/openapi.json", &[("if-none-match", got.header("etag"))], Value::Null).await;
    assert_eq!(again.status, StatusCode::NOT_MODIFIED);
}

#[tokio::test]
async fn operations_need_a_token_unless_they_bring_their_own_credential() {
    let w = World::new();
    let done = w.call("POST", "/v1/operations/server-remove", &[], json!({"name": "server-c"})).await;
    assert_eq!(done.json(), json!({"ran": "server-remove", "with": {"name": "server-c"}}));
    assert_eq!(done.header("cache-control"), "no-store");

    let bare = |path: &str, body: &str| {
        let request = http::Request::builder().method("POST").uri(path).header("content-type", "application/json");
        request.body(Body::from(body.to_owned())).unwrap()
    };
    w.send(bare("/v1/operations/server-remove", r#"{"name": "server-c"}"#)).await.problem("unauthenticated");
    let joined = w.send(bare("/v1/operations/server-join", "{}")).await;
    assert_eq!(joined.json()["ran"], "server-join");

    w.send(bare("/v1/operations/server-join", "[]")).await.problem("bad-request");
    w.call("POST", "/v1/operations/reboot-all", &[], json!({})).await.problem("not-found");
    let get = w.get("/v1/operations/server-join").await;
    get.problem("method-not-allowed");
    assert_eq!(get.header("allow"), "POST");
}
