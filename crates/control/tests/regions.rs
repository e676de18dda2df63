//! Three regions of one server each, with real stores in one process: the writers of the global group and of the regions
//! over links that are cut and healed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Change, Intent, Target, Writer};
use nexus_control::region::{Config, Fleet, Forward, ForwardError, Region, Upward};
use nexus_control::view::View;
use nexus_env::{Env, MemDisk};
use nexus_model::kind::*;
use nexus_model::plan::RegionSummary;
use nexus_model::{ApiError, Code, Metadata, Name, Object};
use nexus_store::embedded::{self, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, PeerError, RangeRequest, Store};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const REGIONS: [&str; 3] = ["eu", "sa", "us"];

fn name(s: &str) -> Name {
    s.parse().unwrap()
}

/// The wire between servers, which are numbered as their regions are.
#[derive(Default)]
struct Net {
    stores: Mutex<BTreeMap<u64, Weak<EmbeddedStore>>>,
    globals: Mutex<BTreeMap<u64, Weak<Region>>>,
    cut: Mutex<BTreeSet<u64>>,
}

impl Net {
    fn reach<T>(&self, from: u64, to: u64, all: &Mutex<BTreeMap<u64, Weak<T>>>) -> Option<Arc<T>> {
        let cut = self.cut.lock().unwrap();
        if from != to && (cut.contains(&from) || cut.contains(&to)) {
            return None;
        }
        all.lock().unwrap().get(&to).and_then(Weak::upgrade)
    }
}

/// One server's end of the wire.
struct End {
    node: u64,
    net: Arc<Net>,
    /// Who leads the global group, as this server's copy of it says.
    global: Mutex<Option<Weak<EmbeddedStore>>>,
}

#[async_trait]
impl Peers for End {
    async fn call(&self, to: &PeerRef, _: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        match self.net.reach(self.node, to.node, &self.net.stores) {
            Some(store) => {
                let answer = store.handle(message).await;
                match self.net.reach(self.node, to.node, &self.net.stores) {
                    Some(_) => Ok(answer),
                    None => Err(PeerError::Lost("cut".into())),
                }
            }
            None => Err(PeerError::Unreachable(format!("{} is cut off", to.node))),
        }
    }
}

#[async_trait]
impl Forward for End {
    async fn forward(&self, node: u64, intent: &Intent, _: Duration) -> Result<Accepted, ForwardError> {
        let Some(region) = self.net.reach(self.node, node, &self.net.globals) else {
            return Err(ForwardError::NotTaken(format!("{node} is cut off")));
        };
        match region.submit_here(intent.clone()).await {
            Some(Ok(accepted)) => Ok(accepted),
            Some(Err(error)) => Err(ForwardError::Answered(error)),
            None => Err(ForwardError::NotTaken("not the leader".into())),
        }
    }
}

#[async_trait]
impl Upward for End {
    async fn summarize(&self, summary: &RegionSummary, _: Duration) -> Result<u64, String> {
        let store = self.global.lock().unwrap().as_ref().and_then(Weak::upgrade).ok_or("stopped")?;
        let leader = store.leadership().borrow().leader.ok_or("nobody leads")?;
        let global = self.net.reach(self.node, leader, &self.net.globals).ok_or("cut off")?;
        global.hear(summary.clone()).await.map_err(|e| format!("{e:?}"))
    }
}

struct Server {
    stores: [Arc<EmbeddedStore>; 2],
    region: Arc<Region>,
    global: Arc<Region>,
    view: View,
    stop: CancellationToken,
    tasks: tokio::task::JoinSet<()>,
}

impl Server {
    async fn start(node: u64, region: &str, net: &Arc<Net>) -> Self {
        let end = Arc::new(End { node, net: net.clone(), global: Mutex::default() });
        let env = Env::real().with_disk(Arc::new(MemDisk::new(node)));
        let open = |group: &str, members: BTreeMap<u64, String>| {
            let config = embedded::Config::new(node, group.parse().unwrap(), format!("/{group}"), members);
            EmbeddedStore::open(config, env.clone(), end.clone())
        };
        let all = (1..=3).map(|n| (n, format!("node-{n}"))).collect();
        let global_store = Arc::new(open(GLOBAL, all).await.unwrap());
        let store = Arc::new(open(region, [(node, format!("node-{node}"))].into()).await.unwrap());
        net.stores.lock().unwrap().insert(node, Arc::downgrade(&global_store));
        *end.global.lock().unwrap() = Some(Arc::downgrade(&global_store));
        let config = |group: &str, own: bool| Config {
            node,
            server: format!("server-{node}"),
            bootstrap: Bootstrap {
                region: name(group),
                domain: "localhost".into(),
                zones: if own { vec![name("zone-a")] } else { vec![] },
                cells: if own { vec![name("cell-a")] } else { vec![] },
            },
            fleet: own.then(|| Fleet {
                store: global_store.clone(),
                upward: end.clone(),
                tier: Tier::Core,
                servers: vec![],
            }),
        };
        let global = Arc::new(Region::new(config(GLOBAL, false), env.clone(), global_store.clone(), end.clone()));
        let writer = Arc::new(Region::new(config(region, true), env, store.clone(), end.clone()));
        net.globals.lock().unwrap().insert(node, Arc::downgrade(&global));
        let (stop, view) = (CancellationToken::new(), View::new("localhost").in_region(&name(region)));
        let mut tasks = tokio::task::JoinSet::new();
        for runs in [writer.clone(), global.clone()] {
            let stop = stop.clone();
            tasks.spawn(async move { runs.run(stop).await });
        }
        let (follows, contract, stopped) = (view.clone(), store.clone() as Arc<dyn Store>, stop.clone());
        tasks.spawn(async move { follows.follow(contract, stopped).await });
        let (follows, contract, stopped) = (view.clone(), global_store.clone() as Arc<dyn Store>, stop.clone());
        tasks.spawn(async move { follows.follow_global(contract, stopped).await });
        Self { stores: [store, global_store], region: writer, global, view, stop, tasks }
    }

    async fn end(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        for store in &self.stores {
            store.shutdown().await;
        }
    }

    /// Waits until this server's view of region and fleet is as asked.
    async fn shows(&self, what: &str, f: impl Fn(&nexus_control::world::World) -> bool) {
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            while !self.view.read(&f) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(waited.await.is_ok(), "{what}");
    }
}

fn intent(plural: &str, project: Option<&str>, object: &str, change: Change) -> Intent {
    Intent {
        request_id: "req-1".parse().unwrap(),
        actor: "admin".into(),
        target: Target { plural: plural.into(), project: project.map(name), name: name(object) },
        change,
        if_match: None,
        idempotency_key: None,
        dry_run: false,
    }
}

fn create<K: Kind>(project: Option<&str>, object: &str, spec: K::Spec) -> Intent {
    let object_ = Object::<K>::new(Metadata::new(name(object), project.map(name)), spec).to_any();
    intent(K::PLURAL, project, object, Change::Create { object: object_ })
}

fn web(replicas: u32) -> AppSpec {
    AppSpec { image: name("web"), replicas, ..App::example() }
}

/// Sends an intent again until it was decided for good.
async fn submit(writer: &Region, intent: Intent) -> Result<Accepted, ApiError> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match writer.submit(intent.clone()).await {
            Err(e) if e.code.is_retryable() && tokio::time::Instant::now() < deadline => {}
            decided => return decided,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_is_cut_off_stops_nobody_goes_on_and_converges_when_it_returns() {
    let net = Arc::new(Net::default());
    let mut servers = Vec::new();
    for (i, region) in REGIONS.iter().enumerate() {
        servers.push(Server::start(i as u64 + 1, region, &net).await);
    }
    let [eu, sa, us] = &servers[..] else { panic!("three servers") };
    for server in [eu, sa, us] {
        server.shows("all regions register", |w| w.fleet().regions.live.len() == 3).await;
    }

    // What one region is promised, the next request to another can rely on.
    for n in 0..5 {
        let project = format!("p-{n}");
        submit(&sa.global, create::<Project>(None, &project, ProjectSpec::default())).await.unwrap();
        submit(&us.region, create::<App>(Some(&project), "web", web(1))).await.unwrap();
    }
    submit(&us.global, create::<App>(Some("p-0"), "wide", web(6))).await.unwrap();
    for server in [eu, sa, us] {
        let place = (Some(name("p-0")), name("wide"));
        server.shows("a share in each region", |w| w.apps.live.get(&place).is_some_and(|a| a.spec.replicas == 2)).await;
    }
    let mut tables = us.view.table();
    let routed = tables.wait_for(|t| t.regions.len() == 2 && t.services.iter().any(|s| s.app == *"wide"));
    let table = tokio::time::timeout(Duration::from_secs(60), routed).await.unwrap().unwrap().clone();
    assert_eq!((table.region.as_str(), table.regions.len()), ("us", 2));
    let wide = table.services.iter().find(|s| s.app == *"wide").unwrap();
    assert_eq!((wide.global, wide.regions.as_slice()), (true, &[name("eu"), name("sa")][..]));

    // Cut off the region whose server leads the global group.
    let leader = eu.stores[1].leadership().borrow().leader.unwrap();
    let lost = &servers[leader as usize - 1];
    let rest: Vec<&Server> = servers.iter().filter(|s| !Arc::ptr_eq(&s.region, &lost.region)).collect();
    net.cut.lock().unwrap().insert(leader);
    submit(&rest[0].global, create::<Project>(None, "late", ProjectSpec::default())).await.unwrap();
    submit(&rest[1].global, intent("projects", None, "p-1", Change::Delete)).await.unwrap();
    submit(
        &rest[1].global,
        intent("apps", Some("p-0"), "wide", Change::Patch { patch: json!({"spec": {"replicas": 9}}) }),
    )
    .await
    .unwrap();
    // It goes on with what it knows, says what it can't do, and shows what it has.
    submit(&lost.region, create::<App>(Some("p-1"), "own", web(1))).await.unwrap();
    let refused = lost.region.submit(create::<App>(Some("late"), "own", web(1))).await.unwrap_err();
    assert!(matches!(refused.code, Code::NotFound | Code::Unavailable), "{refused:?}");
    let refused = lost.global.submit(create::<Project>(None, "never", ProjectSpec::default())).await.unwrap_err();
    assert!(matches!(refused.code, Code::Unavailable | Code::Timeout), "{refused:?}");
    let known = lost.stores[1].range(RangeRequest::prefix("o/projects/").stale()).await.unwrap();
    assert!(known.kvs.len() >= 7, "{}", known.kvs.len());
    rest[0]
        .shows("the lost region is said to be silent", |w| {
            let silent =
                |r: &Object<nexus_model::kind::Region>| r.status.conditions.iter().any(|c| c.reason == "Silent");
            w.fleet().regions.live.values().any(silent)
        })
        .await;

    net.cut.lock().unwrap().clear();
    let gone = |w: &nexus_control::world::World| w.usage(&name("p-1")).is_none() && w.fleet().projects.live.len() == 7;
    lost.shows("what was deleted meanwhile is gone", gone).await;
    let place = (Some(name("p-0")), name("wide"));
    lost.shows("what was changed meanwhile is changed", |w| w.apps.live[&place].spec.replicas == 3).await;
    submit(&lost.region, create::<App>(Some("late"), "own", web(1))).await.unwrap();
    // The tombstone waited for the region that was away, and for no longer: its name is free again.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while let Err(e) = submit(&lost.global, create::<Project>(None, "p-1", ProjectSpec::default())).await {
        assert!(e.code == Code::Conflict && tokio::time::Instant::now() < deadline, "{e:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for server in servers {
        server.end().await;
    }
}
