//! Three regions of one server each, with real stores in one process: the writers of the global group and of the regions
//! over links that are cut and healed.

mod common;

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use common::net::{End, LONG, Net, Running, env, submit};
use common::{create, intent, name, web};
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Change, Writer};
use nexus_control::region::{Config, Fleet, Region, Upward};
use nexus_control::view::View;
use nexus_control::world::World;
use nexus_model::kind::*;
use nexus_model::plan::RegionSummary;
use nexus_model::{Code, Object};
use nexus_store::embedded::EmbeddedStore;
use nexus_store::{RangeRequest, Store};
use serde_json::json;

const REGIONS: [&str; 3] = ["eu", "sa", "us"];

/// The way to whoever leads the global group, as this server's copy of it says. Servers are numbered as their regions are.
struct Uplink {
    end: Arc<End>,
    global: Weak<EmbeddedStore>,
}

#[async_trait]
impl Upward for Uplink {
    async fn summarize(&self, summary: &RegionSummary, _: Duration) -> Result<u64, String> {
        let leader = self.global.upgrade().ok_or("stopped")?.leadership().borrow().leader.ok_or("nobody leads")?;
        let global = self.end.reach(leader, &self.end.net.writers).ok_or("cut off")?;
        global.hear(summary.clone()).await.map_err(|e| format!("{e:?}"))
    }
}

struct Server {
    stores: [Arc<EmbeddedStore>; 2],
    region: Arc<Region>,
    global: Arc<Region>,
    running: Running,
}

impl Server {
    async fn start(node: u64, region: &str, net: &Arc<Net>) -> Self {
        let (env, end) = (env(node), End::new(node, net));
        let global_store = end.open(&env, GLOBAL, &[1, 2, 3]).await;
        let store = end.open(&env, region, &[node]).await;
        net.stores.lock().unwrap().insert(node, Arc::downgrade(&global_store));
        let upward = Arc::new(Uplink { end: end.clone(), global: Arc::downgrade(&global_store) });
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
                upward: upward.clone(),
                tier: Tier::Core,
                servers: vec![],
            }),
        };
        let global = Arc::new(Region::new(config(GLOBAL, false), env.clone(), global_store.clone(), end.clone()));
        let writer = Arc::new(Region::new(config(region, true), env, store.clone(), end));
        net.writers.lock().unwrap().insert(node, Arc::downgrade(&global));
        let mut running = Running::new(View::new("localhost").in_region(&name(region)));
        running.writer(&writer);
        running.writer(&global);
        running.follow(store.clone());
        running.follow_global(global_store.clone());
        Self { stores: [store, global_store], region: writer, global, running }
    }

    async fn end(self) {
        self.running.end().await;
        for store in &self.stores {
            store.shutdown().await;
        }
    }

    async fn shows(&self, what: &str, f: impl Fn(&World) -> bool) {
        self.running.shows(what, f).await;
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
    let mut tables = us.running.view.table();
    let routed = tables.wait_for(|t| t.regions.len() == 2 && t.services.iter().any(|s| s.app == *"wide"));
    let table = tokio::time::timeout(LONG, routed).await.unwrap().unwrap().clone();
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
    let gone = |w: &World| w.usage(&name("p-1")).is_none() && w.fleet().projects.live.len() == 7;
    lost.shows("what was deleted meanwhile is gone", gone).await;
    let place = (Some(name("p-0")), name("wide"));
    lost.shows("what was changed meanwhile is changed", |w| w.apps.live[&place].spec.replicas == 3).await;
    submit(&lost.region, create::<App>(Some("late"), "own", web(1))).await.unwrap();
    // The tombstone waited for the region that was away, and for no longer: its name is free again.
    let deadline = tokio::time::Instant::now() + LONG;
    while let Err(e) = submit(&lost.global, create::<Project>(None, "p-1", ProjectSpec::default())).await {
        assert!(e.code == Code::Conflict && tokio::time::Instant::now() < deadline, "{e:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for server in servers {
        server.end().await;
    }
}
