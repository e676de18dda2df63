//! The etcd engine: the contract suite against a real etcd, alone and as three members with TLS and users, and what is
//! special about it. Built with the feature `etcd`; needs Debian's `etcd-server` and `etcd-client`.
#![cfg(feature = "etcd")]

#[path = "common/etcd.rs"]
mod etcd;

/// The suite without the clusters of the embedded engine.
mod common {
    #[path = "contract.rs"]
    pub mod contract;

    pub use super::etcd::until;
}

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use common::contract::Handle;
use common::until;
use etcd::{Etcd, Shape};
use nexus_env::{Endpoint, Env, FaultyTransport, Links};
use nexus_store::backup::{Backup, BackupError, Restore, Writer};
use nexus_store::embedded::{self, EmbeddedStore, PeerRef, Peers};
use nexus_store::etcd::{Config, EtcdEndpoint, EtcdStore, Login};
use nexus_store::{
    Compare, GroupId, KeyValue, LeaseId, Member, Op, PeerError, Pressure, RangeRequest, Revision, Store, StoreError,
    Txn,
};

/// Keeps the cluster while a case runs, and closes the case's stores.
struct Guard {
    stores: [Arc<EtcdStore>; 2],
    _etcd: Arc<Etcd>,
}

impl Guard {
    async fn stop(self) {
        for store in self.stores {
            store.shutdown().await;
        }
    }
}

/// Every case has a group of its own in a cluster that all share, so groups are shown to be apart as well.
async fn make(place: &'static Mutex<Weak<Etcd>>, shape: Shape) -> (Guard, Handle, Handle) {
    static GROUPS: AtomicU64 = AtomicU64::new(0);
    let group = format!("case-{}", GROUPS.fetch_add(1, Ordering::Relaxed));
    let etcd = tokio::task::spawn_blocking(move || etcd::shared(place, shape)).await.unwrap();
    let one = etcd.open(1, &group).await;
    let two = etcd.open(2, &group).await;
    (Guard { stores: [one.clone(), two.clone()], _etcd: etcd }, one, two)
}

mod one_member {
    use super::*;

    static CLUSTER: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());

    async fn make() -> (Guard, Handle, Handle) {
        super::make(&CLUSTER, Shape::ONE).await
    }

    crate::contract!(make);
}

mod three_members_with_tls_and_users {
    use super::*;

    static CLUSTER: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());

    async fn make() -> (Guard, Handle, Handle) {
        super::make(&CLUSTER, Shape::THREE_SECURE).await
    }

    crate::contract!(make);
}

async fn start(shape: Shape) -> Arc<Etcd> {
    tokio::task::spawn_blocking(move || Arc::new(Etcd::start(shape))).await.unwrap()
}

/// The one of some stores that leads, and its epoch.
async fn leader(stores: &[Arc<EtcdStore>]) -> (usize, u64) {
    until("a leader", async || {
        stores.iter().enumerate().find_map(|(i, s)| {
            let now = *s.leadership().borrow();
            now.is_self.then_some((i, now.epoch))
        })
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_takes_too_few_operations_is_refused_with_the_remedy() {
    let etcd = start(Shape { max_ops: 128, ..Shape::ONE }).await;
    let refused = EtcdStore::open(etcd.config(1, "g"), Env::real()).await.err();
    assert!(matches!(&refused, Some(StoreError::Invalid(m)) if m.contains("--max-txn-ops")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_is_found_again_with_its_revisions_by_a_new_server() {
    let etcd = start(Shape::ONE).await;
    let store = etcd.open(1, "g").await;
    for i in 0..300 {
        store.txn(Txn::put(format!("k{}", i % 150), vec![b'v'; 2_000])).await.unwrap();
    }
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    let leased = Op::Put { key: "leased".into(), value: "v".into(), lease: Some(lease) };
    store.txn(Txn::new(vec![], vec![leased, Op::delete("k3")])).await.unwrap();
    let before = store.range(RangeRequest::prefix("")).await.unwrap();
    assert_eq!((before.revision, before.kvs.len()), (Revision(301), 150));
    store.shutdown().await;
    assert_eq!(store.txn(Txn::put("a", "b")).await, Err(StoreError::Closed));

    let again = etcd.open(2, "g").await;
    assert_eq!(again.range(RangeRequest::prefix("")).await.unwrap(), before);
    assert_eq!(again.status().await.oldest, Revision(301));
    until("both servers to be known", async || {
        let members = again.status().await.members;
        let servers: Vec<_> = members.iter().map(|(node, m)| (*node, m.endpoint.as_str())).collect();
        (servers == [(1, "server-1"), (2, "server-2")]).then_some(())
    })
    .await;
    again.forget_server(1).await.unwrap();
    until("the server to be forgotten", async || (again.status().await.members.len() == 1).then_some(())).await;
    let mut watch = again.watch("leased".into(), "leased\0".into(), Revision(301)).await.unwrap();
    again.lease_revoke(lease).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(ended.revision, Revision(302));
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_passes_on_and_its_epoch_grows() {
    let etcd = start(Shape::ONE).await;
    let links = Links::new();
    links.name(&etcd.endpoints()[0].at, "etcd");
    let open = async |node: u64, label: &'static str| {
        let transport = FaultyTransport::new(Env::real().transport, label, links.clone());
        let env = Env::real().with_transport(Arc::new(transport));
        Arc::new(EtcdStore::open(etcd.config(node, "g"), env).await.unwrap())
    };
    let labels = ["a", "b"];
    let stores = [open(1, "a").await, open(2, "b").await];
    let (first, epoch) = leader(&stores).await;
    let other = 1 - first;
    until("the follower to know", async || {
        let seen = *stores[other].leadership().borrow();
        (seen.leader == Some(first as u64 + 1) && seen.epoch == epoch).then_some(())
    })
    .await;
    // Cut off from etcd, the leader steps down by its own clock; the other takes over.
    links.cut_both(labels[first], "etcd");
    let second = until("the other to lead", async || {
        let now = *stores[other].leadership().borrow();
        now.is_self.then_some(now.epoch)
    })
    .await;
    assert!(second > epoch);
    assert!(!stores[first].leadership().borrow().is_self, "two lead at once");
    let cut = stores[first].txn(Txn::put("k", "v")).await.unwrap_err();
    assert!(cut.is_unknown() || cut.is_retryable(), "{cut:?}");
    let stale = stores[first].range(RangeRequest::get("k").stale()).await.unwrap();
    assert_eq!(stale.kvs, []);
    links.heal_all();
    until("the first to follow", async || {
        let seen = *stores[first].leadership().borrow();
        (seen.leader == Some(other as u64 + 1) && seen.epoch == second).then_some(())
    })
    .await;
    // A leader that goes says so, and what was unknown is settled.
    stores[other].shutdown().await;
    let (third, last) = leader(&stores).await;
    assert!(third == first && last > second);
    stores[first].txn(Txn::put("k", "v2")).await.unwrap();
    stores[first].shutdown().await;
}

/// Why a server with this configuration does not start.
async fn refusal(config: Config) -> String {
    match EtcdStore::open(config, Env::real()).await {
        Err(StoreError::Unavailable { reason }) => reason,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("etcd was good enough"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_does_not_let_a_server_in_is_named_with_the_reason() {
    let etcd = start(Shape::ONE_SECURE).await;
    let config = || Config { open_timeout: Duration::from_secs(8), ..etcd.config(1, "g") };
    let login = |password: &str| Some(Login { user: etcd::USER.into(), password: password.into() });
    let nobody = EtcdEndpoint { host: "127.0.0.1".into(), at: Endpoint::Tcp(([127, 0, 0, 1], 1).into()) };
    let cases = [
        (Config { tls: Some(etcd.tls(&etcd.file("other-ca.pem"), true)), ..config() }, "another authority"),
        (Config { tls: Some(etcd.tls(&etcd.file("ca.pem"), false)), ..config() }, "wants a certificate"),
        (Config { login: login("wrong"), ..config() }, "does not know the user nexus with this password"),
        (Config { login: None, ..config() }, "wants a user and a password"),
        (Config { prefix: "/others".into(), ..config() }, "readwrite /others/"),
        (Config { endpoints: vec![nobody], ..config() }, "can't be reached: 127.0.0.1:1: "),
    ];
    for (config, wanted) in cases {
        let said = refusal(config).await;
        assert!(said.contains(wanted), "{said:?} does not say {wanted:?}");
    }
    let plain = start(Shape::ONE).await;
    let config = Config { open_timeout: Duration::from_secs(8), ..plain.config(1, "g") };
    let said = refusal(Config { login: login("any"), ..config.clone() }).await;
    assert!(said.contains("leave the user and the password out"), "{said:?}");
    let said = refusal(Config { tls: Some(etcd.tls(&etcd.file("ca.pem"), true)), ..config }).await;
    assert!(said.contains("does not speak TLS"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_comes_late_is_waited_for() {
    for shape in [Shape { tls: true, ..Shape::ONE }, Shape { users: true, ..Shape::ONE }] {
        let etcd = start(shape).await;
        etcd.kill(0);
        let config = Config { open_timeout: Duration::from_secs(60), ..etcd.config(1, "g") };
        let opening = tokio::spawn(EtcdStore::open(config, Env::real()));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!opening.is_finished(), "it opened without etcd, or gave up");
        etcd.boot(0);
        let store = opening.await.unwrap().unwrap();
        store.txn(Txn::put("k", "v")).await.unwrap();
        store.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_told_which_endpoints_answer_and_which_servers_are_there() {
    let etcd = start(Shape::THREE_SECURE).await;
    let stores = [etcd.open(1, "g").await, etcd.open(2, "g").await, etcd.open(3, "g").await];
    let health = until("all three to be well", async || {
        let health = stores[0].etcd_health().await;
        health.endpoints.iter().all(|e| e.reachable && e.trouble.is_none()).then_some(health)
    })
    .await;
    let names: Vec<&str> = health.endpoints.iter().map(|e| &*e.name).collect();
    assert_eq!((names, health.others), (vec!["m0", "m1", "m2"], Vec::new()));
    assert_eq!(health.endpoints.iter().filter(|e| e.leader).count(), 1);
    assert!(health.endpoints.iter().all(|e| e.version.starts_with("3.") && e.db_bytes >= e.db_bytes_in_use));
    assert!(health.endpoints.iter().all(|e| e.db_bytes_in_use > 0));

    let present = async || {
        let health = stores[0].members_health();
        health.iter().map(|h| (h.node, h.reachable)).collect::<Vec<_>>()
    };
    let wanted = vec![(1, true), (2, true), (3, true)];
    until("all servers to be there", async || (present().await == wanted).then_some(())).await;
    stores[1].shutdown().await;
    let wanted = vec![(1, true), (2, false), (3, true)];
    until("the one that left to be missed", async || (present().await == wanted).then_some(())).await;

    etcd.kill(1);
    let health = until("the dead member to be noticed", async || {
        let health = stores[0].etcd_health().await;
        let rest = health.endpoints.iter().filter(|e| e.reachable && e.trouble.is_none()).count();
        (rest == 2 && !health.endpoints[1].reachable).then_some(health)
    })
    .await;
    assert_eq!(health.others, ["m1"]);
    etcd.kill(2);
    let health = until("the lost majority to be noticed", async || {
        let health = stores[0].etcd_health().await;
        let alone = &health.endpoints[0];
        alone.trouble.is_some().then_some(health)
    })
    .await;
    assert!(health.endpoints.iter().all(|e| e.trouble.is_some() && !e.leader), "{health:?}");
    for store in stores {
        store.shutdown().await;
    }
}

/// Clients count up one key by compare, while etcd's members are killed and started again: no count is lost, none is
/// made twice, and revisions go on by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_done_twice_when_etcd_members_are_killed() {
    let pause = Duration::from_millis(700);
    count_while_members_are_killed(Shape { members: 3, ..Shape::ONE }, &[0, 1, 2, 0], pause).await;
}

/// An etcd that comes back has forgotten its users' tokens, and every lease of the servers may be over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_done_twice_when_a_secure_etcd_is_restarted() {
    count_while_members_are_killed(Shape::ONE_SECURE, &[0, 0], Duration::from_millis(2_500)).await;
}

async fn count_while_members_are_killed(shape: Shape, kills: &[usize], pause: Duration) {
    let etcd = start(shape).await;
    let stores = [etcd.open(1, "g").await, etcd.open(2, "g").await];
    stores[0].txn(Txn::put("n", "0")).await.unwrap();
    let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let counters: Vec<_> = (0..4)
        .map(|i| {
            let (store, stop, acknowledged) = (stores[i % 2].clone(), stop.clone(), acknowledged.clone());
            tokio::spawn(async move {
                let mut unknown = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let Ok(found) = store.range(RangeRequest::get("n")).await else { continue };
                    let kv = &found.kvs[0];
                    let n: u64 = std::str::from_utf8(&kv.value).unwrap().parse().unwrap();
                    let next = Op::put("n", (n + 1).to_string());
                    match store.txn(Txn::new(vec![Compare::mod_revision("n", kv.mod_revision)], vec![next])).await {
                        Ok(outcome) => {
                            acknowledged.fetch_add(u64::from(outcome.is_committed()), Ordering::Relaxed);
                        }
                        Err(e) if e.is_unknown() => unknown += 1,
                        Err(e) => assert!(e.is_retryable(), "{e:?}"),
                    }
                }
                unknown
            })
        })
        .collect();
    for &member in kills {
        tokio::time::sleep(pause).await;
        etcd.kill(member);
        tokio::time::sleep(pause).await;
        etcd.boot(member);
    }
    // It goes on by itself: somebody leads, and counts are acknowledged again.
    leader(&stores).await;
    let before = acknowledged.load(Ordering::Relaxed);
    until("counting to go on", async || (acknowledged.load(Ordering::Relaxed) > before + 10).then_some(())).await;
    stop.store(true, Ordering::Relaxed);
    let mut unknown = 0;
    for counter in counters {
        unknown += counter.await.unwrap();
    }
    let sure = acknowledged.load(Ordering::Relaxed);
    let found = until("etcd to answer", async || stores[1].range(RangeRequest::get("n")).await.ok()).await;
    let n: u64 = std::str::from_utf8(&found.kvs[0].value).unwrap().parse().unwrap();
    println!("{sure} counts acknowledged, {unknown} unknown, {n} found");
    assert!(sure > 0 && (sure..=sure + unknown).contains(&n), "{sure} + {unknown} != {n}");
    assert_eq!(found.revision, Revision(n + 1), "one revision for each change");
    for store in &stores {
        store.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_changed_behind_our_back_and_a_compacted_history_are_survived() {
    let etcd = start(Shape::ONE).await;
    let store = etcd.open(1, "g").await;
    store.txn(Txn::put("a", "1")).await.unwrap();
    etcd.ctl(&["del", "/nexus/g/k/a"]);
    store.txn(Txn::put("b", "2")).await.unwrap();
    until("the copy to be loaded again", async || {
        let found = store.range(RangeRequest::prefix("")).await.ok()?;
        (found.kvs.len() == 1 && found.kvs[0].key == "b").then_some(())
    })
    .await;
    etcd.ctl(&["compact", "3"]);
    let next = store.txn(Txn::put("c", "3")).await.unwrap();
    assert_eq!(next.revision(), Revision(3));
    let mut watch = store.watch("".into(), "".into(), Revision(2)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, Revision(3));
    store.shutdown().await;
}

/// Writes large values over and over until etcd has no room; answers the first value that was refused, and why.
async fn fill(store: &EtcdStore) -> (u64, StoreError) {
    for n in 0.. {
        let mut value = format!("{n} ").into_bytes();
        value.resize(256 << 10, b'.');
        match store.txn(Txn::put("k", value)).await {
            Ok(_) => {}
            Err(e) if e.is_unknown() || e.is_retryable() => {}
            Err(e) => return (n, e),
        }
    }
    unreachable!("etcd's quota ends it")
}

/// Several groups fill one etcd at once, so that it finds some changes to be too much only when it applies them. What was
/// refused was not done; reads and leaderships go on; and when an operator has made room, writes do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_without_room_refuses_with_the_remedy_and_takes_writes_again_when_it_has_some() {
    let etcd = start(Shape { quota: 48 << 20, ..Shape::ONE }).await;
    let mut stores = Vec::new();
    for i in 0..6 {
        let config = Config { compact_after: Some(Duration::from_secs(1)), ..etcd.config(1, &format!("g{i}")) };
        stores.push(Arc::new(EtcdStore::open(config, Env::real()).await.unwrap()));
    }
    for store in &stores {
        leader(std::slice::from_ref(store)).await;
    }
    let mut filling = tokio::task::JoinSet::new();
    for store in stores.clone() {
        filling.spawn(async move {
            let (refused, error) = fill(&store).await;
            (store, refused, error)
        });
    }
    for (store, refused, error) in filling.join_all().await {
        assert!(matches!(&error, StoreError::Full(why) if why.contains("etcdctl alarm disarm")), "{error:?}");
        let status = store.status().await;
        assert!(matches!(&status.pressure, Pressure::Full(why) if why.contains("defragment")), "{status:?}");
        let kv = store.range(RangeRequest::get("k")).await.unwrap().kvs.remove(0);
        let shown: u64 = std::str::from_utf8(&kv.value).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(shown < refused, "{} was refused as not done, and is there", refused);
        // Not even what makes room is taken: etcd wants its operator.
        let delete = store.txn(Txn::new(vec![], vec![Op::delete("k")])).await;
        assert!(matches!(delete, Err(StoreError::Full(_))), "{delete:?}");
        let lease = store.lease_grant(Duration::from_secs(60)).await;
        assert!(matches!(lease, Err(StoreError::Full(_))), "{lease:?}");
    }
    let trouble = stores[0].etcd_health().await.endpoints[0].trouble.clone();
    assert!(trouble.as_ref().is_some_and(|t| t.contains("out of space")), "{trouble:?}");

    // The leaders have history forgotten also now; the rest is the operator's. How much is in use is not asked: etcd
    // counts the room of a deletion only once something was written after it, and nothing may be.
    until("history to be forgotten", async || {
        etcd.ctl(&["defrag"]);
        let health = stores[0].etcd_health().await;
        (health.endpoints[0].db_bytes < 16 << 20).then_some(())
    })
    .await;
    assert!(stores.iter().all(|s| s.leadership().borrow().is_self), "somebody lost its leadership");
    etcd.ctl(&["alarm", "disarm"]);
    for store in &stores {
        // Without a write: whoever decides what is written has none sent while it is full.
        until("the room to be noticed", async || {
            // A request that was on its way may have found the old size, and have given the alarm once more.
            if !store.etcd_health().await.has_room() {
                etcd.ctl(&["alarm", "disarm"]);
            }
            (store.status().await.pressure == Pressure::None).then_some(())
        })
        .await;
        store.txn(Txn::new(vec![], vec![Op::delete("k"), Op::put("room", "1")])).await.unwrap();
    }
    for store in stores {
        store.shutdown().await;
    }
}

/// For a member that is alone.
struct Nobody;

#[async_trait::async_trait]
impl Peers for Nobody {
    async fn call(&self, _: &PeerRef, _: &GroupId, _: bytes::Bytes) -> Result<bytes::Bytes, PeerError> {
        Err(PeerError::Unreachable("nobody is there".into()))
    }
}

/// The embedded engine, alone, in a folder.
async fn embedded(dir: &std::path::Path) -> EmbeddedStore {
    let config = embedded::Config::new(1, group(), dir, [(1, "server-1".to_owned())].into());
    let store = EmbeddedStore::open(config, Env::real(), Arc::new(Nobody)).await.unwrap();
    until("the only member to lead", async || store.leadership().borrow().is_self.then_some(())).await;
    store
}

fn group() -> GroupId {
    GroupId::new("g").unwrap()
}

/// What a restore keeps of a group: not the numbers of revisions.
async fn contents(store: &dyn Store) -> Vec<(bytes::Bytes, bytes::Bytes)> {
    let kvs = store.range(RangeRequest::prefix("")).await.unwrap().kvs;
    kvs.into_iter().map(|KeyValue { key, value, .. }| (key, value)).collect()
}

async fn write(store: &dyn Store) -> LeaseId {
    // More than fit into one transaction of etcd, by number and by bytes.
    for i in 0..300 {
        store.txn(Txn::put(format!("small/{}", i % 280), format!("{i}"))).await.unwrap();
    }
    for i in 0..4 {
        store.txn(Txn::put(format!("large/{i}"), vec![b'v'; 600_000])).await.unwrap();
    }
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    store
        .txn(Txn::new(vec![], vec![Op::Put { key: "leased".into(), value: "v".into(), lease: Some(lease) }]))
        .await
        .unwrap();
    lease
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_either_engine_goes_back_into_etcd_and_one_of_etcd_into_servers() {
    let etcd = start(Shape::ONE_SECURE).await;
    let (dir, env) = (tempfile::tempdir().unwrap(), Env::real());
    let begin = async |name: &str| Writer::begin(env.disk.clone(), dir.path().into(), name, "cnx-1", 1).await.unwrap();
    let open = |name: &str| Backup::open(&*env.disk, &dir.path().join(name)).unwrap();
    let members = [(1, Member { endpoint: "server-1".into(), voter: true })].into();
    let group = group();
    let what = |generation, revision| Restore { group: &group, node: 1, members: &members, generation, revision };

    // From the embedded engine into an etcd that has something else there.
    let own = embedded(&dir.path().join("own")).await;
    let lease = write(&own).await;
    let mut writer = begin("of-servers").await;
    writer.add(&own, true).await.unwrap();
    writer.finish().await.unwrap();
    let before = contents(&own).await;
    own.shutdown().await;
    let store = etcd.open(1, "g").await;
    store.txn(Txn::put("old", "gone")).await.unwrap();
    let newest = open("of-servers").manifest.groups[0].revision;
    let config = etcd.config(1, "g");
    let refused = nexus_store::etcd::restore(&open("of-servers"), &what(2, newest), &config, &env).await;
    assert!(matches!(&refused, Err(BackupError::Refused(why)) if why.contains("server-1")), "{refused:?}");
    let (_, first) = leader(std::slice::from_ref(&store)).await;
    store.shutdown().await;
    let done = nexus_store::etcd::restore(&open("of-servers"), &what(2, newest), &config, &env).await.unwrap();
    assert!(done.revision > newest && done.keys == before.len() as u64, "{done:?}");
    let store = etcd.open(1, "g").await;
    assert_eq!(contents(&*store).await, before);
    let (_, second) = leader(std::slice::from_ref(&store)).await;
    assert!(second > first.max(open("of-servers").manifest.groups[0].term), "an epoch went back");
    store.lease_keep_alive(lease).await.unwrap();
    store.lease_revoke(lease).await.unwrap();
    assert_eq!(store.range(RangeRequest::get("leased")).await.unwrap().kvs, []);

    // From etcd, while it runs, at a revision that is past by then; into etcd, and into a server.
    write(&*store).await;
    let at = store.status().await.applied;
    let before = contents(&*store).await;
    store.txn(Txn::new(vec![], vec![Op::delete("small/7"), Op::put("late", "1")])).await.unwrap();
    let mut writer = begin("of-etcd").await;
    writer.add_view(store.backup_view(true).await.unwrap()).await.unwrap();
    writer.finish().await.unwrap();
    store.shutdown().await;
    let done = nexus_store::etcd::restore(&open("of-etcd"), &what(4, at), &config, &env).await.unwrap();
    assert!(done.revision > at, "{done:?}");
    let store = etcd.open(2, "g").await;
    assert_eq!(contents(&*store).await, before);
    let (_, third) = leader(std::slice::from_ref(&store)).await;
    assert!(third > second, "an epoch went back");
    store.txn(Txn::put("new", "1")).await.unwrap();
    store.shutdown().await;
    open("of-etcd").restore(&env.disk, &what(5, at), &dir.path().join("again")).unwrap();
    let own = embedded(&dir.path().join("again")).await;
    assert_eq!(contents(&own).await, before);
    own.shutdown().await;
}
