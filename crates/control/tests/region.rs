//! The writer's loop over three real stores in one process: intents from any server, a leader that dies, retries.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Change, Intent, Target, Writer};
use nexus_control::region::{Config, Forward, ForwardError, Region};
use nexus_control::view::View;
use nexus_env::{Env, MemDisk};
use nexus_model::kind::{Blob, *};
use nexus_model::{ApiError, Code, Metadata, Name, Object};
use nexus_store::embedded::{self, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, PeerError, Store};
use serde_json::json;
use tokio_util::sync::CancellationToken;

fn name(s: &str) -> Name {
    s.parse().unwrap()
}

/// The wire between servers: calls go straight to whoever lives.
#[derive(Default)]
struct Net {
    stores: Mutex<BTreeMap<u64, Weak<EmbeddedStore>>>,
    regions: Mutex<BTreeMap<u64, Weak<Region>>>,
}

#[async_trait]
impl Peers for Net {
    async fn call(&self, to: &PeerRef, _: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        let store = self.stores.lock().unwrap().get(&to.node).and_then(Weak::upgrade);
        match store {
            Some(store) => Ok(store.handle(message).await),
            None => Err(PeerError::Unreachable(format!("{} is dead", to.node))),
        }
    }
}

#[async_trait]
impl Forward for Net {
    async fn forward(&self, node: u64, intent: &Intent, _: Duration) -> Result<Accepted, ForwardError> {
        let region = self.regions.lock().unwrap().get(&node).and_then(Weak::upgrade);
        let Some(region) = region else { return Err(ForwardError::NotTaken(format!("{node} is dead"))) };
        match region.submit_here(intent.clone()).await {
            Some(Ok(accepted)) => Ok(accepted),
            Some(Err(error)) => Err(ForwardError::Answered(error)),
            None => Err(ForwardError::NotTaken("not the leader".into())),
        }
    }
}

struct Server {
    store: Arc<EmbeddedStore>,
    region: Arc<Region>,
    view: View,
    stop: CancellationToken,
    tasks: tokio::task::JoinSet<()>,
}

impl Server {
    async fn start(node: u64, net: &Arc<Net>) -> Self {
        let disk = Arc::new(MemDisk::new(node));
        let env = Env::real().with_disk(disk);
        let members = (1..=3).map(|n| (n, format!("node-{n}"))).collect();
        let config = embedded::Config::new(node, "local".parse().unwrap(), "/data", members);
        let store = Arc::new(EmbeddedStore::open(config, env.clone(), net.clone()).await.unwrap());
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
        let region = Arc::new(Region::new(config, env, store.clone(), net.clone()));
        net.regions.lock().unwrap().insert(node, Arc::downgrade(&region));
        let (stop, view) = (CancellationToken::new(), View::new("localhost"));
        let mut tasks = tokio::task::JoinSet::new();
        let (runs, stopped) = (region.clone(), stop.clone());
        tasks.spawn(async move { runs.run(stopped).await });
        let (follows, contract, stopped) = (view.clone(), store.clone() as Arc<dyn Store>, stop.clone());
        tasks.spawn(async move { follows.follow(contract, stopped).await });
        Self { store, region, view, stop, tasks }
    }

    /// Ends at once, as a killed process does.
    async fn kill(mut self) {
        self.tasks.abort_all();
        while self.tasks.join_next().await.is_some() {}
        drop(self.region);
        drop(self.store);
    }

    async fn end(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.store.shutdown().await;
    }
}

fn create(app: &str, key: Option<&str>) -> Intent {
    let spec = AppSpec { image: name("web"), replicas: 2, ..App::example() };
    let object = Object::<App>::new(Metadata::new(name(app), Some(name("default"))), spec).to_any();
    Intent {
        request_id: "req-1".parse().unwrap(),
        actor: "admin".into(),
        target: Target { plural: "apps".into(), project: Some(name("default")), name: name(app) },
        change: Change::Create { object },
        if_match: None,
        idempotency_key: key.map(str::to_owned),
        dry_run: false,
    }
}

/// Sends an intent again until it was decided for good.
async fn submit(region: &Region, intent: Intent) -> Result<Accepted, ApiError> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match region.submit(intent.clone()).await {
            Err(e) if e.code.is_retryable() && tokio::time::Instant::now() < deadline => {}
            decided => return decided,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn intents_from_any_server_survive_the_leaders_death_and_are_decided_once() {
    let net = Arc::new(Net::default());
    let mut servers = BTreeMap::new();
    for node in 1..=3 {
        servers.insert(node, Server::start(node, &net).await);
    }
    // From every server, at once.
    let mut all = tokio::task::JoinSet::new();
    for n in 0..30 {
        let region = servers[&(n % 3 + 1)].region.clone();
        all.spawn(async move { submit(&region, create(&format!("app-{n}"), None)).await });
    }
    while let Some(done) = all.join_next().await {
        let accepted = done.unwrap().unwrap();
        assert!(accepted.created && accepted.object.metadata.revision > 0);
    }
    let first = submit(&servers[&1].region, create("once", Some("key-1"))).await.unwrap();

    let leader = servers[&1].store.status().await.leader.unwrap();
    servers.remove(&leader).unwrap().kill().await;
    let (_, survivor) = servers.iter().next().unwrap();
    let again = submit(&survivor.region, create("once", Some("key-1"))).await.unwrap();
    assert!(again.replayed, "the first answer must survive the leader");
    assert_eq!(again.object.metadata.uid, first.object.metadata.uid);
    let taken = submit(&survivor.region, create("app-7", None)).await.unwrap_err();
    assert_eq!(taken.code, Code::AlreadyExists);
    submit(&survivor.region, create("after", None)).await.unwrap();

    // Both survivors come to show the same, and the quota is what the rows say.
    for server in servers.values() {
        let mut revision = server.view.revision();
        let shown = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                let (apps, used) = server
                    .view
                    .read(|w| (w.apps.live.len(), w.usage(&name("default")).map(|u| u.status.used.instances)));
                if (apps, used) == (32, Some(64)) {
                    return;
                }
                revision.changed().await.unwrap();
            }
        });
        shown.await.expect("the view shows every committed app");
    }

    // With one server of three there is no majority, and that is said.
    let last = *servers.keys().next().unwrap();
    let rest: Vec<u64> = servers.keys().copied().filter(|n| *n != last).collect();
    for node in rest {
        servers.remove(&node).unwrap().kill().await;
    }
    let refused = servers[&last].region.submit(create("never", None)).await.unwrap_err();
    assert!(matches!(refused.code, Code::Unavailable | Code::Timeout), "{refused:?}");
    assert!(servers[&last].view.read(|w| w.apps.live.len()) == 32, "reads of what is known go on");
    servers.remove(&last).unwrap().end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_larger_than_one_transaction_is_committed_whole() {
    let net = Arc::new(Net::default());
    let mut servers = BTreeMap::new();
    for node in 1..=3 {
        servers.insert(node, Server::start(node, &net).await);
    }
    let region = servers[&1].region.clone();
    submit(&region, create("wide", None)).await.unwrap();
    let mut patch = create("wide", None);
    patch.change = Change::Patch { patch: json!({"spec": {"replicas": 200}}) };
    submit(&region, patch).await.unwrap();
    let mut image = create("web", None);
    image.target.plural = "images".into();
    let digest = nexus_model::Digest::of(b"web");
    let spec = ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 3 }] };
    let object = Object::<Image>::new(Metadata::new(name("web"), Some(name("default"))), spec).to_any();
    image.change = Change::Create { object };
    submit(&region, image).await.unwrap();
    let view = servers[&1].view.clone();
    let mut revision = view.revision();
    tokio::time::timeout(Duration::from_secs(60), async {
        while view.read(|w| w.instances.live.len()) != 200 {
            revision.changed().await.unwrap();
        }
    })
    .await
    .expect("200 instances wait for hosts");
    for (_, server) in servers {
        server.end().await;
    }
}
