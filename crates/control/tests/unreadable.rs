//! A stored value that nobody can read stops neither a writer that takes over nor a view that starts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Change, Intent, Target, Writer};
use nexus_control::region::{Config, Forward, ForwardError, Region};
use nexus_control::view::View;
use nexus_env::{Env, MemDisk};
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Metadata, Name, Object};
use nexus_store::embedded::{self, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, Op, PeerError, RangeRequest, Store, Txn};
use tokio_util::sync::CancellationToken;

fn name(s: &str) -> Name {
    s.parse().unwrap()
}

struct Alone;

#[async_trait]
impl Peers for Alone {
    async fn call(&self, _: &PeerRef, _: &GroupId, _: Bytes) -> Result<Bytes, PeerError> {
        Err(PeerError::Unreachable("there is nobody else".into()))
    }
}

#[async_trait]
impl Forward for Alone {
    async fn forward(&self, _: u64, _: &Intent, _: Duration) -> Result<Accepted, ForwardError> {
        Err(ForwardError::NotTaken("there is nobody else".into()))
    }
}

async fn create(region: &Region, app: &str) -> Result<Accepted, ApiError> {
    let spec = AppSpec { image: name("web"), replicas: 1, ..App::example() };
    let object = Object::<App>::new(Metadata::new(name(app), Some(name("default"))), spec).to_any();
    let intent = Intent {
        request_id: "req-1".parse().unwrap(),
        actor: "admin".into(),
        target: Target { plural: "apps".into(), project: Some(name("default")), name: name(app) },
        change: Change::Create { object },
        if_match: None,
        idempotency_key: None,
        dry_run: false,
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match region.submit(intent.clone()).await {
            Err(e) if e.code.is_retryable() && tokio::time::Instant::now() < deadline => {}
            decided => return decided,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_value_stops_neither_the_writer_nor_the_view() {
    let env = Env::real().with_disk(Arc::new(MemDisk::new(1)));
    let members = BTreeMap::from([(1, "node-1".to_owned())]);
    let config = embedded::Config::new(1, "local".parse().unwrap(), "/data", members);
    let store = Arc::new(EmbeddedStore::open(config, env.clone(), Arc::new(Alone)).await.unwrap());
    let poison = "o/apps/default/shop";
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let ops = vec![Op::put(poison, "\u{1}\u{2}"), Op::put("t/instances/nonsense", "{}")];
        match store.txn(Txn::new(Vec::new(), ops)).await {
            Ok(_) => break,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
    }
    let bootstrap =
        Bootstrap { region: name("local"), domain: "localhost".into(), zones: vec![name("zone-a")], cells: Vec::new() };
    let config = Config { node: 1, server: "server-1".into(), bootstrap, fleet: None };
    let region = Arc::new(Region::new(config, env, store.clone(), Arc::new(Alone)));
    let (stop, view) = (CancellationToken::new(), View::new("localhost"));
    let mut tasks = tokio::task::JoinSet::new();
    let (runs, stopped) = (region.clone(), stop.clone());
    tasks.spawn(async move { runs.run(stopped).await });
    let (follows, contract, stopped) = (view.clone(), store.clone() as Arc<dyn Store>, stop.clone());
    tasks.spawn(async move { follows.follow(contract, stopped).await });

    create(&region, "blog").await.expect("other objects can be made");
    let refused = create(&region, "shop").await.unwrap_err();
    assert_eq!(refused.code, Code::Conflict);
    assert!(refused.detail.contains(&format!("nexus debug store get {poison}")), "{}", refused.detail);
    let mut revision = view.revision();
    tokio::time::timeout(Duration::from_secs(60), async {
        while view.read(|w| w.apps.live.len()) != 1 {
            revision.changed().await.unwrap();
        }
    })
    .await
    .expect("the view shows what can be read");
    assert_eq!(view.read(|w| w.unreadable.keys().cloned().collect::<Vec<_>>()), [poison, "t/instances/nonsense"]);

    // A value that breaks while a view follows: what it was before goes on being shown, and is named.
    let blog = "o/apps/default/blog";
    store.txn(Txn::new(Vec::new(), vec![Op::put(blog, "{")])).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), async {
        while view.read(|w| w.unreadable.len()) != 3 {
            revision.changed().await.unwrap();
        }
    })
    .await
    .expect("the view names it");
    assert_eq!(view.read(|w| w.apps.live.len()), 1);
    let kept = store.range(RangeRequest::get(poison)).await.unwrap();
    assert_eq!(&kept.kvs[0].value[..], b"\x01\x02", "nothing was written over it");
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    store.shutdown().await;
}
