//! The writer's loop over three real stores in one process: intents from any server, a leader that dies, retries, detours.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::net::{End, LONG, Net, Running, env, submit};
use common::{create, image, intent, name, web};
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Change, Intent, Passed, Writer};
use nexus_control::region::{Config, ForwardError, Region};
use nexus_control::view::View;
use nexus_control::world::World;
use nexus_model::Code;
use nexus_model::kind::*;
use nexus_store::Store;
use nexus_store::embedded::EmbeddedStore;
use serde_json::json;
use tokio::time::timeout;

struct Server {
    store: Arc<EmbeddedStore>,
    region: Arc<Region>,
    running: Running,
}

impl Server {
    async fn start(node: u64, net: &Arc<Net>) -> Self {
        let (env, end) = (env(node), End::new(node, net));
        let store = end.open(&env, "local", &[1, 2, 3]).await;
        net.stores.lock().unwrap().insert(node, Arc::downgrade(&store));
        let config = Config {
            node,
            server: format!("server-{node}"),
            bootstrap: Bootstrap {
                region: name("local"),
                domain: "localhost".into(),
                zones: vec![name("zone-a")],
                cells: vec![name("cell-a")],
            },
            fleet: None,
        };
        let region = Arc::new(Region::new(config, env, store.clone(), end));
        net.writers.lock().unwrap().insert(node, Arc::downgrade(&region));
        let mut running = Running::new(View::new("localhost"));
        running.writer(&region);
        running.follow(store.clone());
        Self { store, region, running }
    }

    /// Ends at once, as a killed process does.
    async fn kill(self) {
        self.running.kill().await;
    }

    async fn end(self) {
        self.running.end().await;
        self.store.shutdown().await;
    }
}

async fn three(net: &Arc<Net>) -> BTreeMap<u64, Server> {
    let mut servers = BTreeMap::new();
    for node in 1..=3 {
        servers.insert(node, Server::start(node, net).await);
    }
    servers
}

fn app(app: &str, key: Option<&str>) -> Intent {
    let intent = create::<App>(Some("default"), app, web(2));
    Intent { idempotency_key: key.map(str::to_owned), ..intent }
}

#[tokio::test(flavor = "multi_thread")]
async fn intents_from_any_server_survive_the_leaders_death_and_are_decided_once() {
    let net = Arc::new(Net::default());
    let mut servers = three(&net).await;
    // From every server, at once.
    let mut all = tokio::task::JoinSet::new();
    for n in 0..30 {
        let region = servers[&(n % 3 + 1)].region.clone();
        all.spawn(async move { submit(&region, app(&format!("app-{n}"), None)).await });
    }
    while let Some(done) = all.join_next().await {
        let accepted = done.unwrap().unwrap();
        assert!(accepted.created && accepted.object.metadata.revision > 0);
    }
    let first = submit(&servers[&1].region, app("once", Some("key-1"))).await.unwrap();

    let leader = servers[&1].store.status().await.leader.unwrap();
    servers.remove(&leader).unwrap().kill().await;
    let (_, survivor) = servers.iter().next().unwrap();
    let again = submit(&survivor.region, app("once", Some("key-1"))).await.unwrap();
    assert!(again.replayed, "the first answer must survive the leader");
    assert_eq!(again.object.metadata.uid, first.object.metadata.uid);
    let taken = submit(&survivor.region, app("app-7", None)).await.unwrap_err();
    assert_eq!(taken.code, Code::AlreadyExists);
    submit(&survivor.region, app("after", None)).await.unwrap();

    // Both survivors come to show the same, and the quota is what the rows say.
    for server in servers.values() {
        let used = |w: &World| w.usage(&name("default")).map(|u| u.status.used.instances);
        server.running.shows("every committed app", |w| (w.apps.live.len(), used(w)) == (32, Some(64))).await;
    }

    // With one server of three there is no majority, and that is said.
    let last = *servers.keys().next().unwrap();
    let rest: Vec<u64> = servers.keys().copied().filter(|n| *n != last).collect();
    for node in rest {
        servers.remove(&node).unwrap().kill().await;
    }
    let refused = servers[&last].region.submit(app("never", None)).await.unwrap_err();
    assert!(matches!(refused.code, Code::Unavailable | Code::Timeout), "{refused:?}");
    assert!(servers[&last].running.view.read(|w| w.apps.live.len()) == 32, "reads of what is known go on");
    servers.remove(&last).unwrap().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_to_a_leader_that_fell_silent_goes_to_its_successor_if_it_has_a_key() {
    let net = Arc::new(Net::default());
    let servers = three(&net).await;
    submit(&servers[&1].region, app("before", None)).await.unwrap();
    let leader = servers[&1].store.status().await.leader.unwrap();
    let other = servers.keys().copied().find(|n| *n != leader).unwrap();
    let region = &servers[&other].region;
    net.silent.lock().unwrap().insert(leader);
    let both = async { tokio::join!(region.submit(app("keyed", Some("k"))), region.submit(app("bare", None))) };
    let (keyed, bare) = timeout(LONG, both).await.expect("nobody waits for the silent one");
    assert!(keyed.unwrap().created);
    let bare = bare.unwrap_err();
    assert!(bare.code == Code::Timeout && bare.detail.contains("may have been committed"), "{bare:?}");
    // It was not, and the one that is back does not take it up again.
    net.silent.lock().unwrap().clear();
    assert!(submit(region, app("bare", None)).await.unwrap().created);
    for (_, server) in servers {
        server.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_larger_than_one_transaction_is_committed_whole() {
    let net = Arc::new(Net::default());
    let servers = three(&net).await;
    let region = servers[&1].region.clone();
    submit(&region, app("wide", None)).await.unwrap();
    let patch = json!({"spec": {"replicas": 200}});
    submit(&region, intent("apps", Some("default"), "wide", Change::Patch { patch })).await.unwrap();
    submit(&region, create::<Image>(Some("default"), "web", image("web"))).await.unwrap();
    servers[&1].running.shows("200 instances that wait for hosts", |w| w.instances.live.len() == 200).await;
    for (_, server) in servers {
        server.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_a_link_to_the_leader_has_its_intents_passed_on_and_decided_once() {
    let net = Arc::new(Net::default());
    let servers = three(&net).await;
    submit(&servers[&1].region, app("before", None)).await.unwrap();
    let leader = servers[&1].store.status().await.leader.unwrap();
    let mut others = servers.keys().copied().filter(|n| *n != leader);
    let (cut_off, between) = (others.next().unwrap(), others.next().unwrap());
    net.severed.lock().unwrap().insert((leader.min(cut_off), leader.max(cut_off)));
    let (store, region) = (&servers[&cut_off].store, &servers[&cut_off].region);
    let knows = async {
        while store.way_to(leader) != [between] {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(LONG, knows).await.expect("the way past the link is found");

    // Each is sent once: without a key, one that was sent twice would find its name taken.
    for n in 0..10 {
        assert!(region.submit(app(&format!("app-{n}"), None)).await.unwrap().created);
    }
    let passed = std::mem::take(&mut *net.passed.lock().unwrap());
    assert_eq!(passed.len(), 10);
    assert!(passed.iter().all(|(via, p)| (*via, p.to, p.hops.len()) == (between, leader, 0)));

    // A lost answer: with a key it is asked for again, without one nobody may.
    *net.lose_one_answer.lock().unwrap() = true;
    let keyed = region.submit(app("keyed", Some("k"))).await.unwrap();
    assert!(keyed.replayed, "the first answer again");
    *net.lose_one_answer.lock().unwrap() = true;
    let bare = region.submit(app("bare", None)).await.unwrap_err();
    assert!(bare.code == Code::Timeout && bare.detail.contains("may have been committed"), "{bare:?}");
    assert_eq!(net.passed.lock().unwrap().len(), 3);
    servers[&between].running.shows("each app once", |w| w.apps.live.len() == 13).await;

    // Whoever can't pass it on says that nothing was done, and a way that is too long is not gone.
    let lost = Passed { to: 9, hops: Vec::new(), budget_ms: 1_000, intent: app("lost", None) };
    for passed in [Passed { hops: vec![1, 2, 3, 1], ..lost.clone() }, lost] {
        let refused = servers[&between].region.pass_on(passed).await.unwrap_err();
        assert!(matches!(refused, ForwardError::NotTaken(_)), "{refused:?}");
    }
    for (_, server) in servers {
        server.end().await;
    }
}
