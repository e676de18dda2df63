//! Joining, against a store of one member and a clock that moves when it is told to.

use bytes::Bytes;
use nexus_env::ManualClock;
use nexus_iam::RequestKey;
use nexus_model::kind::{self, Cell, CellSpec, HostSpec, Zone, ZoneSpec};
use nexus_model::{Metadata, Object};
use nexus_store::RangeRequest;
use nexus_store::embedded::EmbeddedStore;
use tokio_util::sync::CancellationToken;

use super::super::tests::{HOUR, START, config, store};
use super::*;

struct World {
    joins: Arc<Joins>,
    clock: Arc<ManualClock>,
    store: Arc<EmbeddedStore>,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

impl World {
    async fn new() -> Self {
        let (config, dir) = config();
        let store = store("local").await;
        put::<Zone>(&store, "zone-a", ZoneSpec::default()).await;
        put::<Zone>(&store, "zone-b", ZoneSpec::default()).await;
        let cell = CellSpec { zone: Some(name("zone-a")), ..CellSpec::default() };
        put::<Cell>(&store, "zone-a-cell-1", cell).await;

        let clock = Arc::new(ManualClock::at(START));
        let env = Env::real().with_clock(clock.clone());
        let (fleet, view) = (Fleet::new(&config), View::new("localhost"));
        let stop = CancellationToken::new();
        let (follower, followed, end) = (view.clone(), store.clone() as Arc<dyn Store>, stop.clone());
        tokio::spawn(async move { follower.follow(followed, end).await });
        let mut seen = view.revision();
        let zones = || view.read(|w| w.zones.live.len());
        while zones() < 2 {
            tokio::time::timeout(Duration::from_secs(30), seen.changed()).await.expect("the view follows").unwrap();
        }
        let authority = Authority::load(&config, &env).unwrap();
        let contract: Arc<dyn Store> = store.clone();
        let joins = Joins { config, env, store: contract, fleet, view, authority, token_hash: "00".repeat(32) };
        Self { joins: Arc::new(joins), clock, store, stop, _dir: dir }
    }

    async fn token(&self, role: JoinRole, zone: Option<&str>) -> String {
        let request = TokenRequest { ttl_seconds: 3600, zone: zone.map(name), cell: None, classes: None };
        self.joins.token(role, request).await.unwrap().token
    }

    /// Everything in the store that joining could change.
    async fn records(&self) -> Vec<(Bytes, Bytes)> {
        let all = self.store.range(RangeRequest::prefix("sys/")).await.unwrap();
        all.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect()
    }

    async fn end(self) {
        self.stop.cancel();
        self.store.shutdown().await;
    }
}

async fn put<K: kind::Kind>(store: &EmbeddedStore, name: &str, spec: K::Spec) {
    let object = Object::<K>::new(Metadata::new(name.parse().unwrap(), None), spec).to_any();
    let at = key::object(kind::find(K::PLURAL).unwrap(), None, &object.metadata.name);
    store.txn(Txn::put(at, serde_json::to_vec(&object).unwrap())).await.unwrap();
}

fn csr(key: &RequestKey, ids: &[&str]) -> String {
    let ids: Vec<SpiffeId> = ids.iter().map(|id| format!("spiffe://home/{id}").parse().unwrap()).collect();
    key.request(&ids).unwrap()
}

fn server(token: &str, who: &str, csr: String) -> ServerJoin {
    ServerJoin {
        token: token.to_owned(),
        name: name(who),
        zone: None,
        wire: format!("10.0.0.{}:7440", 10 + who.len()),
        api: "https://10.0.0.9:8443".to_owned(),
        csr,
    }
}

fn host(token: &str, who: &str, address: &str) -> HostJoin {
    let key = RequestKey::generate().unwrap();
    HostJoin {
        token: token.to_owned(),
        name: name(who),
        zone: Some(name("zone-a")),
        cell: None,
        classes: Classes::new(),
        address: address.to_owned(),
        csr: csr(&key, &[&format!("agent/{who}")]),
    }
}

#[tokio::test]
async fn who_may_not_join_learns_why_and_changes_nothing() {
    let w = World::new().await;
    let token = w.token(JoinRole::Server, Some("zone-b")).await;
    let for_hosts = w.token(JoinRole::Host, None).await;
    let key = RequestKey::generate().unwrap();
    let good = || csr(&key, &["server/m2", "api/m2"]);
    let before = w.records().await;
    let other_zone = ServerJoin { zone: Some(name("zone-a")), ..server(&token, "m2", good()) };
    let nowhere = ServerJoin { wire: "0.0.0.0:7440".into(), ..server(&token, "m2", good()) };
    let taken = ServerJoin { wire: "10.0.0.1:7440".into(), ..server(&token, "m2", good()) };
    let no_url = ServerJoin { api: "10.0.0.9".into(), ..server(&token, "m2", good()) };
    let cases = [
        (server("garbage", "m2", good()), Code::Forbidden, "no join token"),
        (server(&token[..20], "m2", good()), Code::Forbidden, "copied whole"),
        (server(&TokenSecret::generate([9; 32]).reveal(), "m2", good()), Code::Forbidden, "not known"),
        (server(&TokenSecret::generate([9; 32]).reveal(), "m2", "x".into()), Code::Forbidden, "not known"),
        (server(&for_hosts, "m2", good()), Code::Forbidden, "lets a host join"),
        (server(&token, "m2", "garbage".into()), Code::Invalid, "csr"),
        (server(&token, "m2", csr(&key, &["server/m3", "api/m3"])), Code::Invalid, "server/m3"),
        (server(&token, "m2", csr(&key, &["server/m2"])), Code::Invalid, "api/m2"),
        (server(&token, "m2", csr(&key, &["agent/m2", "api/m2"])), Code::Invalid, "agent/m2"),
        (server(&token, "m1", csr(&key, &["server/m1", "api/m1"])), Code::AlreadyExists, "m1"),
        (other_zone, Code::Forbidden, "zone-b"),
        (nowhere, Code::Invalid, "wire"),
        (taken, Code::Conflict, "m1"),
        (no_url, Code::Invalid, "api"),
    ];
    for (asked, code, why) in cases {
        let error = w.joins.server(asked).await.unwrap_err();
        assert!(error.code == code && error.detail.contains(why), "{why}: {error}");
        assert_eq!(w.records().await, before, "{why}");
    }
    w.clock.advance(2 * HOUR);
    let late = w.joins.server(server(&token, "m2", good())).await.unwrap_err();
    assert!(late.code == Code::Forbidden && late.detail.contains("expired"), "{late}");
    assert_eq!(w.records().await, before);
    w.end().await;
}

#[tokio::test]
async fn a_token_lets_in_one_server_which_may_ask_again() {
    let w = World::new().await;
    let token = w.token(JoinRole::Server, Some("zone-b")).await;
    let key = RequestKey::generate().unwrap();
    let asked = || server(&token, "m2", csr(&key, &["server/m2", "api/m2"]));
    let first = w.joins.server(asked()).await.unwrap();
    let joined: ServerJoined = serde_json::from_value(first.clone()).unwrap();
    assert_eq!((joined.node, joined.members.len(), joined.zone.as_str()), (2, 2, "zone-b"));
    assert!(joined.authority_key.is_some());
    assert_eq!(joined.config["audit_keep"]["change_days"], 400, "what is the region's, not the server's");
    nexus_iam::Identity::from_pem(&joined.cert, &key.to_pem()).unwrap();
    assert_eq!(w.joins.server(asked()).await.unwrap(), first, "a retry gets the same answer");

    let stored = w.records().await;
    let text: String = stored.iter().map(|(_, v)| String::from_utf8_lossy(v).into_owned()).collect();
    assert!(!text.contains("PRIVATE KEY") && !text.contains(&token), "no secret is kept");

    let other = RequestKey::generate().unwrap();
    let second = w.joins.server(server(&token, "m3", csr(&other, &["server/m3", "api/m3"]))).await.unwrap_err();
    assert!(second.detail.contains("not known"), "{second}");
    // The same key, but for another name: that is no retry.
    let renamed = w.joins.server(server(&token, "m3", csr(&key, &["server/m3", "api/m3"]))).await.unwrap_err();
    assert!(renamed.detail.contains("not known"), "{renamed}");
    assert_eq!(w.records().await, stored);

    // Numbers are never given twice, not even after a server has gone.
    fleet::delete_if(&*w.store, &fleet::server_key("m2"), {
        let found: Stored<ServerRecord> = fleet::get(&*w.store, &fleet::server_key("m2")).await.unwrap().unwrap();
        found.revision
    })
    .await
    .unwrap();
    let token = w.token(JoinRole::Server, Some("zone-b")).await;
    let again = w.joins.server(server(&token, "m4", csr(&other, &["server/m4", "api/m4"]))).await.unwrap();
    assert_eq!(again["node"], 3);
    w.end().await;
}

#[tokio::test]
async fn two_hosts_never_share_a_prefix() {
    let w = World::new().await;
    let mut joined = Vec::new();
    let mut tokens = Vec::new();
    for _ in 0..4 {
        tokens.push(w.token(JoinRole::Host, Some("zone-a")).await);
    }
    // All at once: each is given its own by a transaction of its own.
    let asks = tokens.iter().enumerate().map(|(n, token)| {
        let (joins, asked) = (w.joins.clone(), host(token, &format!("host-{n}"), &format!("10.0.1.{n}:7450")));
        tokio::spawn(async move { joins.host(asked).await })
    });
    for ask in asks.collect::<Vec<_>>() {
        joined.push(serde_json::from_value::<HostJoined>(ask.await.unwrap().unwrap()).unwrap());
    }
    let six: BTreeSet<_> = joined.iter().map(|j| j.prefix6).collect();
    let four: BTreeSet<_> = joined.iter().map(|j| j.prefix4).collect();
    assert_eq!((six.len(), four.len()), (4, 4), "{joined:#?}");
    assert!(joined.iter().all(|j| j.cell.as_str() == "zone-a-cell-1"));
    let token = w.token(JoinRole::Host, Some("zone-b")).await;
    let elsewhere = HostJoin { zone: None, ..host(&token, "host-b", "10.0.2.1:7450") };
    let other = w.joins.host(elsewhere).await.unwrap();
    assert_eq!(other["cell"], kind::ANY_CELL, "a zone without a cell that has room is left to the writer");

    let token = w.token(JoinRole::Host, Some("zone-a")).await;
    let twice = w.joins.host(host(&token, "host-0", "10.0.1.9:7450")).await.unwrap_err();
    assert_eq!(twice.code, Code::AlreadyExists, "{twice}");
    let address = w.joins.host(host(&token, "host-9", "10.0.1.0:7450")).await.unwrap_err();
    assert!(address.code == Code::Conflict && address.detail.contains("host-0"), "{address}");

    // Who left and comes back has what it had.
    let at = fleet::host_key("host-0");
    let found: Stored<HostRecord> = fleet::get(&*w.store, &at).await.unwrap().unwrap();
    let left = HostRecord { state: HostMembership::Left, ..found.value.clone() };
    assert!(fleet::put_if(&*w.store, &at, Some(found.revision), &left).await.unwrap());
    let back = w.joins.host(host(&token, "host-0", "10.0.1.9:7450")).await.unwrap();
    assert_eq!(back["prefix6"], found.value.prefix6.to_string());
    w.end().await;
}

#[tokio::test]
async fn a_host_is_held_to_what_its_token_let_it_join_as() {
    let w = World::new().await;
    let classes = |text: &str| serde_json::from_str::<Classes>(text).unwrap();
    let bound = |classes| TokenRequest {
        ttl_seconds: 3600,
        zone: Some(name("zone-a")),
        cell: Some(name("zone-a-cell-1")),
        classes: Some(classes),
    };
    let misplaced = w.joins.token(JoinRole::Gateway, TokenRequest { cell: None, ..bound(classes("{}")) }).await;
    assert_eq!(misplaced.unwrap_err().code, Code::Conflict, "gateways have no classes");
    let none = w.joins.token(JoinRole::Host, bound(classes(r#"{"gpu": 0}"#))).await;
    assert_eq!(none.unwrap_err().code, Code::Invalid);

    let token = w.joins.token(JoinRole::Host, bound(classes(r#"{"gpu": 2}"#))).await.unwrap().token;
    for more in [r#"{"gpu": 3}"#, r#"{"gpu": 1, "fpga": 1}"#] {
        let asked = HostJoin { classes: classes(more), ..host(&token, "host-a", "10.0.1.1:7450") };
        let refused = w.joins.host(asked).await.unwrap_err();
        assert!(refused.code == Code::Forbidden && refused.detail.contains("allows"), "{refused}");
    }
    let joined = w.joins.host(host(&token, "host-a", "10.0.1.1:7450")).await.unwrap();
    let joined: HostJoined = serde_json::from_value(joined).unwrap();
    assert_eq!(joined.classes, classes(r#"{"gpu": 2}"#), "without any, it has those of the token");

    let fleet = w.joins.fleet.clone();
    let stop = CancellationToken::new();
    let following = tokio::spawn({
        let (fleet, store, stop) = (fleet.clone(), w.store.clone() as Arc<dyn Store>, stop.clone());
        async move { fleet.follow(store, stop).await }
    });
    let agent = name("host-a");
    let honest = HostSpec {
        zone: joined.zone,
        cell: joined.cell,
        prefix6: joined.prefix6,
        prefix4: joined.prefix4,
        classes: joined.classes,
        ..HostSpec::default()
    };
    let lies = [
        ("zone", HostSpec { zone: name("zone-b"), ..honest.clone() }),
        ("cell", HostSpec { cell: name("zone-a-cell-2"), ..honest.clone() }),
        ("prefixes", HostSpec { prefix4: Ipv4Addr::new(10, 99, 0, 0), ..honest.clone() }),
        ("class", HostSpec { classes: classes(r#"{"gpu": 4}"#), ..honest.clone() }),
    ];
    let known = async {
        while fleet.refuses(&agent, &lies[0].1).is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), known).await.expect("the record is seen");
    for (what, lie) in &lies {
        let why = fleet.refuses(&agent, lie).unwrap();
        assert!(why.contains(what), "{why}");
    }
    let fewer = HostSpec { classes: classes(r#"{"gpu": 1}"#), ..honest.clone() };
    assert_eq!((fleet.refuses(&agent, &honest), fleet.refuses(&agent, &fewer)), (None, None));
    assert_eq!(fleet.refuses(&name("host-b"), &lies[0].1), None, "one without a record");
    stop.cancel();
    following.await.unwrap();
    w.end().await;
}

#[tokio::test]
async fn tokens_are_listed_without_their_text_and_revoked_by_id() {
    let w = World::new().await;
    let text = w.token(JoinRole::Gateway, None).await;
    let listed = w.joins.list_tokens().await.unwrap();
    assert!(!listed.to_string().contains(&text[4..]), "{listed}");
    let id = listed["items"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(w.joins.revoke_token("0123456789ab").await.unwrap_err().code, Code::NotFound);
    w.joins.revoke_token(&id).await.unwrap();
    assert_eq!(w.joins.list_tokens().await.unwrap()["items"].as_array().unwrap().len(), 0);

    w.token(JoinRole::Gateway, None).await;
    w.clock.advance(2 * HOUR);
    assert_eq!(w.joins.list_tokens().await.unwrap()["items"].as_array().unwrap().len(), 0, "expired");
    w.token(JoinRole::Gateway, None).await;
    let kept = w.store.range(RangeRequest::prefix(key::JOIN_TOKENS)).await.unwrap();
    assert_eq!(kept.kvs.len(), 1, "an expired one is deleted when the next is made");
    let unknown = TokenRequest { ttl_seconds: 60, zone: Some(name("zone-z")), cell: None, classes: None };
    assert_eq!(w.joins.token(JoinRole::Server, unknown).await.unwrap_err().code, Code::Conflict);
    w.end().await;
}
