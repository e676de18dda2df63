//! What workers are told of NICs, as an engine does what it is told, fails, or does nothing.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use nexus_env::{Env, MemDisk};
use nexus_model::Timestamp;
use nexus_model::kind::BalancerCheck;
use nexus_model::plan::{
    BalancedProtocol, BalancerPlan, FlowLogs, ListenerPlan, Mac, NicPlace, PLAN_VERSION, RuleProtocol, TargetPlan,
    TraceHop, TracedPacket,
};
use nexus_network::vpc::Difference;
use nexus_network::vpc::capture::Capture;
use nexus_network::vpc::flows::Flow;
use tokio::sync::mpsc;

use super::*;
use crate::config::{Asked, Drops, Found, PlugError};

#[derive(Default)]
struct Fake {
    applied: Mutex<Vec<u64>>,
    /// Instances whose namespaces are there.
    there: Mutex<Vec<Uid>>,
    trouble: Mutex<Option<String>>,
    differences: Mutex<Vec<String>>,
    removed: Mutex<usize>,
    /// Targets of balancers that don't answer.
    silent: Mutex<Vec<IpAddr>>,
    /// What was applied last.
    wanted: Mutex<Option<Arc<HostNetworks>>>,
}

#[async_trait]
impl NetworkEngine for Fake {
    async fn apply(&self, wanted: Arc<HostNetworks>, _: Arc<Vec<Net>>) -> Result<Plugged, PlugError> {
        self.applied.lock().unwrap().push(wanted.revision);
        *self.wanted.lock().unwrap() = Some(wanted.clone());
        self.differences.lock().unwrap().clear();
        if let Some(why) = self.trouble.lock().unwrap().clone() {
            return Err(PlugError(why));
        }
        let there = self.there.lock().unwrap();
        let plugged = here(&wanted).map(|(_, at)| at).filter(|at| there.contains(&at.1)).collect();
        Ok(Plugged { plugged, ..Plugged::default() })
    }

    async fn check(&self, _: Arc<HostNetworks>, _: Arc<Vec<Net>>) -> Result<Vec<Difference>, PlugError> {
        let mends = |what: &String| !what.contains("no tunnel");
        Ok(self.differences.lock().unwrap().iter().map(|w| Difference { what: w.clone(), mends: mends(w) }).collect())
    }

    async fn remove(&self) -> Result<(), PlugError> {
        *self.removed.lock().unwrap() += 1;
        Ok(())
    }

    async fn drops(&self, wanted: Arc<HostNetworks>) -> Result<Drops, PlugError> {
        let of_networks = wanted.networks.iter().map(|n| (Some(n.uid), "no-rule".to_owned(), 3));
        Ok(of_networks.chain([(None, "closed".to_owned(), 5)]).collect())
    }

    async fn trace(
        &self,
        by: Arc<HostNetworks>,
        _: Arc<Vec<Net>>,
        nic: Uid,
        _: TracedPacket,
    ) -> Result<Trace, PlugError> {
        let what = find(&by, nic).map_or(String::new(), |(_, nic)| nic.name.to_string());
        let hops = vec![TraceHop { host: by.host.clone(), at: "route".into(), what }];
        Ok(Trace { hops, verdict: TraceVerdict::Outside, probed: None })
    }

    async fn serve(&self, _: watch::Receiver<Option<Arc<HostNetworks>>>) {}

    /// Two flows, and then silence.
    async fn flows(&self, _: Uid, out: mpsc::Sender<Flow>, _: Arc<AtomicU64>) -> Result<(), PlugError> {
        for (dropped, destination) in [(None, 2), (Some("no_ingress_rule".to_owned()), 9)] {
            let [source, destination] = [1, destination].map(|n| [10, 0, 0, n].into());
            let flow = Flow { dropped, source, destination, protocol: 6, source_port: 4000, port: 80, bytes: 60 };
            out.send(flow).await.unwrap();
        }
        std::future::pending().await
    }

    async fn probe(&self, _: ProbeOf) -> Result<Option<bool>, PlugError> {
        Ok(Some(false))
    }

    async fn ask(&self, _: IpAddr, targets: Vec<Asked>, found: mpsc::Sender<Found>) {
        for asked in targets {
            let silent = self.silent.lock().unwrap().contains(&asked.address);
            let answer = if silent { Err("no answer".to_owned()) } else { Ok(()) };
            found.send((asked, Some(answer))).await.unwrap();
        }
    }

    async fn capture(&self, _: Uid, _: &CaptureRequest) -> Result<Capture, PlugError> {
        Err(PlugError("nothing to hear".into()))
    }
}

fn uid(n: u8) -> Uid {
    Uid::from_random([n; 16])
}

/// A network with a NIC of instance 1 here, one of instance 2 elsewhere.
fn told(revision: u64, networks: usize) -> Option<Arc<HostNetworks>> {
    let nic = |n: u8, host: &str| NicPlan {
        uid: uid(10 + n),
        name: format!("nic-{n}").parse().unwrap(),
        subnet: 0,
        mac: Mac([6, 0, 0, 0, 0, n]),
        address4: Some([10, 0, 0, n].into()),
        address6: None,
        at: Some(NicPlace { host: host.parse().unwrap(), endpoint: [192, 0, 2, n].into(), instance: uid(n), index: 0 }),
        groups: vec![0],
        rate: None,
        forwards: false,
    };
    let mut nics = vec![nic(1, "h1"), nic(2, "h2")];
    nics.sort_by_key(|n| n.uid);
    let network = NetworkPlan {
        uid: uid(99),
        project: "shop".parse().unwrap(),
        name: "net".parse().unwrap(),
        vni: 7,
        mtu: 1450,
        cidrs: vec!["10.0.0.0/16".parse().unwrap()],
        subnets: Vec::new(),
        nics,
        groups: Vec::new(),
        route_tables: Vec::new(),
        peerings: Vec::new(),
        nats: Vec::new(),
        floating: Vec::new(),
        balancers: Vec::new(),
        zones: Vec::new(),
        flow_logs: FlowLogs::None,
    };
    Some(Arc::new(HostNetworks {
        version: PLAN_VERSION,
        host: "h1".parse().unwrap(),
        revision,
        endpoint: [192, 0, 2, 1].into(),
        tunnels: vec![[192, 0, 2, 2].into()],
        networks: (0..networks).map(|_| Arc::new(network.clone())).collect(),
    }))
}

struct World {
    engine: Arc<Fake>,
    networks: Networks,
    told: watch::Sender<Option<Arc<HostNetworks>>>,
    handle: AgentHandle,
    _names: watch::Sender<Option<Arc<HostNames>>>,
    _tasks: JoinSet<()>,
}

async fn world(first: Option<Arc<HostNetworks>>) -> World {
    let disk: Arc<dyn nexus_env::Disk> = Arc::new(nexus_env::MemDisk::new(1));
    world_on(Kept { disk, path: "/targets.json".into() }, first).await
}

async fn world_on(kept: Kept, first: Option<Arc<HostNetworks>>) -> World {
    let engine = Arc::new(Fake::default());
    let (told, names) = (watch::Sender::new(first), watch::Sender::new(None));
    let (mut tasks, handle) = (JoinSet::new(), AgentHandle::default());
    handle.networks_saved(u64::MAX);
    let flows = Flows::new(Env::real().with_disk(kept.disk.clone()), "/flows".into(), engine.clone());
    let starting =
        Networks::start(engine.clone(), told.subscribe(), names.subscribe(), flows, kept, &handle, &mut tasks);
    let networks = starting.await;
    World { engine, networks, told, handle, _names: names, _tasks: tasks }
}

#[tokio::test(start_paused = true)]
async fn an_instance_waits_for_its_nics_and_hears_why() {
    let w = world(None).await;
    assert_eq!(w.networks.ready(uid(5), &[]).await, Ok(()), "without NICs there is nothing to wait for");
    let why = w.networks.ready(uid(1), &[uid(11)]).await.unwrap_err();
    assert!(why.contains("not told this host"), "{why}");
    assert!(w.engine.applied.lock().unwrap().is_empty(), "what an agent before has set stays");
    assert_eq!(w.handle.snapshot().networks, Some(0));

    w.told.send_replace(told(3, 1));
    let why = w.networks.ready(uid(1), &[uid(11)]).await.unwrap_err();
    assert!(why.contains("nic-1 is not plugged in"), "{why}");
    // Its namespace comes, and with it the NIC.
    w.engine.there.lock().unwrap().push(uid(1));
    w.networks.ready(uid(1), &[uid(11)]).await.unwrap();
    assert_eq!(w.networks.trouble(uid(1), &[]), None);
    assert_eq!(w.handle.snapshot().networks, Some(3));

    *w.engine.trouble.lock().unwrap() = Some("no netlink today".into());
    w.told.send_replace(told(4, 1));
    let why = w.networks.ready(uid(2), &[uid(12)]).await.unwrap_err();
    assert!(why.contains("no netlink today"), "{why}");
    assert_eq!(w.handle.snapshot().networks, Some(3), "the newer is not said to be applied");
    // It is tried again without being asked.
    *w.engine.trouble.lock().unwrap() = None;
    let mut news = w.networks.news();
    news.wait_for(|a| a.by.as_ref().is_some_and(|by| by.revision == 4)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_somebody_took_away_comes_back_and_a_host_without_networks_keeps_nothing() {
    let w = world(told(1, 1)).await;
    let mut news = w.networks.news();
    news.wait_for(|a| a.by.is_some()).await.unwrap();
    w.engine.differences.lock().unwrap().push("table inet nexus is gone".into());
    assert_eq!(w.networks.check().await.unwrap().differences, ["table inet nexus is gone"]);
    news.mark_unchanged();
    news.changed().await.unwrap();
    assert!(w.networks.check().await.unwrap().differences.is_empty());
    assert!(w.engine.applied.lock().unwrap().len() >= 2);
    // What setting it again does not end is told, and nothing is set again for it.
    w.engine.differences.lock().unwrap().push("no tunnel leads there".into());
    news.mark_unchanged();
    tokio::time::timeout(Duration::from_secs(600), news.changed()).await.unwrap_err();
    assert_eq!(w.networks.check().await.unwrap().differences, ["no tunnel leads there"]);
    w.engine.differences.lock().unwrap().clear();
    tokio::time::sleep(Duration::from_millis(10)).await;
    let text = w.handle.metrics_text();
    let line = "nexus_agent_network_dropped_packets_total{project=\"shop\",network=\"net\",reason=\"no-rule\"} 3";
    assert!(text.contains(line) && text.contains("nexus_agent_network_nics 1"), "{text}");
    let of_host = "nexus_agent_network_dropped_packets_total{project=\"\",network=\"\",reason=\"closed\"} 5";
    assert!(text.contains(of_host), "{text}");

    w.told.send_replace(told(2, 0));
    news.wait_for(|a| a.by.as_ref().is_some_and(|by| by.revision == 2)).await.unwrap();
    assert_eq!(*w.engine.removed.lock().unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn only_nics_of_this_host_are_traced() {
    let w = world(told(1, 1)).await;
    let packet = TracedPacket { to: [10, 0, 0, 2].into(), protocol: RuleProtocol::Tcp, port: 80 };
    let ask = |nic, probe| TraceRequest { nic, packet, probe };
    w.networks.news().wait_for(|a| a.by.is_some()).await.unwrap();
    let trace = w.networks.trace(&ask(uid(11), true)).await.unwrap();
    assert_eq!((trace.hops[0].what.as_str(), trace.probed), ("nic-1", None), "silence outside says nothing");
    assert!(w.networks.trace(&ask(uid(12), false)).await.unwrap_err().contains("not on this host"));
    let six = TracedPacket { to: "fd00::1".parse().unwrap(), ..packet };
    let refused = w.networks.trace(&TraceRequest { nic: uid(11), packet: six, probe: true }).await;
    assert!(refused.unwrap_err().contains("no address of the family"));
    let request = CaptureRequest { nic: uid(11), address: None, port: None };
    assert_eq!(w.networks.capture(&request).await.err().unwrap(), "network: nothing to hear");
}

/// Looks again and again, for an hour of the test's own time.
async fn until<T>(mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(value) = found().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(3600), looking).await.expect("it comes about")
}

#[tokio::test(start_paused = true)]
async fn flows_are_noted_while_their_network_wants_it_and_go_with_it() {
    let with = |revision, flow_logs| {
        let mut all = told(revision, 1).unwrap();
        Arc::make_mut(&mut Arc::make_mut(&mut all).networks[0]).flow_logs = flow_logs;
        Some(all)
    };
    let kept = Kept { disk: Arc::new(MemDisk::new(1)), path: "/targets.json".into() };
    let w = world_on(kept.clone(), with(1, FlowLogs::All)).await;
    let network = with(1, FlowLogs::All).unwrap().networks[0].uid;
    let request = |after, limit| FlowsRequest { network, since: Timestamp::from_millis(0), after, nic: None, limit };
    let read = async |request: FlowsRequest| w.networks.flows(&request).await.unwrap();
    let all = async |w: &World, wanted: usize| {
        let noted = async || w.networks.flows(&request(None, 10)).await.unwrap();
        until(async || Some(noted().await).filter(|found| found.flows.len() == wanted)).await
    };
    let noted = all(&w, 2).await;
    assert_eq!((noted.last, noted.lost), (2, 0));
    let dropped: Vec<Option<&str>> = noted.flows.iter().map(|f| f.dropped.as_deref()).collect();
    assert_eq!(dropped, [None, Some("no_ingress_rule")], "the oldest first");
    // Of a NIC, of a moment, the newest, and what is behind those that are known.
    let nic = |name: &str| FlowsRequest { nic: Some(name.parse().unwrap()), ..request(None, 10) };
    let told_of = |flows: &HostFlows| flows.flows.iter().map(|f| f.destination.to_string()).collect::<Vec<_>>();
    assert_eq!(read(nic("nic-1")).await.flows.len(), 2, "who sent them");
    assert_eq!(told_of(&read(nic("nic-2")).await), ["10.0.0.2"]);
    assert!(read(nic("nobody")).await.flows.is_empty());
    assert_eq!(told_of(&read(request(None, 1)).await), ["10.0.0.9"]);
    assert_eq!(told_of(&read(request(Some(1), 10)).await), ["10.0.0.9"]);
    assert!(read(request(Some(2), 10)).await.flows.is_empty());
    assert_eq!(read(request(Some(99), 10)).await.flows.len(), 2, "a log that was begun anew is told whole");
    let later = FlowsRequest { since: Timestamp::from_millis(i64::MAX), ..request(None, 10) };
    assert!(read(later).await.flows.is_empty());
    // An agent that begins anew goes on with what is there, and what nobody wants any more goes.
    drop(w);
    let again = world_on(kept, with(2, FlowLogs::All)).await;
    let noted = all(&again, 4).await;
    assert_eq!(noted.last, 4);
    again.told.send_replace(with(3, FlowLogs::None));
    all(&again, 0).await;
}

/// The same with a balancer that has two targets, asked every second, out and back after two answers.
fn balanced(revision: u64) -> Option<Arc<HostNetworks>> {
    let mut told = HostNetworks::clone(&told(revision, 1).unwrap());
    let target = |n: u8| TargetPlan { address: [10, 0, 0, n].into(), port: 80, weight: 1, failing: false };
    let check = BalancerCheck { interval_seconds: 1, failures: 2, ..BalancerCheck::default() };
    let listener = ListenerPlan {
        port: 80,
        protocol: BalancedProtocol::Tcp,
        source_hash: false,
        targets: vec![target(1), target(2)],
        proxy_protocol: None,
        check: Some(check),
    };
    Arc::make_mut(&mut told.networks[0]).balancers = vec![BalancerPlan {
        uid: uid(50),
        name: "front".parse().unwrap(),
        address: [10, 0, 0, 9].into(),
        listeners: vec![listener],
    }];
    Some(Arc::new(told))
}

impl Fake {
    /// The targets that are marked in what was applied last.
    fn marked(&self) -> Vec<u8> {
        let wanted = self.wanted.lock().unwrap().clone();
        let targets = wanted.iter().flat_map(|w| &w.networks[0].balancers[0].listeners[0].targets);
        let failing = targets.filter(|t| t.failing).filter_map(|t| match t.address {
            IpAddr::V4(a) => Some(a.octets()[3]),
            IpAddr::V6(_) => None,
        });
        failing.collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_does_not_answer_goes_out_stays_out_over_a_restart_and_comes_back() {
    let disk: Arc<dyn nexus_env::Disk> = Arc::new(nexus_env::MemDisk::new(1));
    let kept = Kept { disk, path: "/targets.json".into() };
    let first = world_on(kept.clone(), balanced(1)).await;
    first.engine.silent.lock().unwrap().push([10, 0, 0, 2].into());
    let wait = async |world: &World, marked: &[u8]| {
        let is_there = || world.engine.wanted.lock().unwrap().is_some() && world.engine.marked() == marked;
        until(async || is_there().then_some(())).await;
    };
    wait(&first, &[]).await;
    wait(&first, &[2]).await;
    let check = first.networks.check().await.unwrap();
    assert_eq!(check.failing, ["load balancer shop/front, tcp 80: 10.0.0.2:80 fails its check: no answer"]);
    assert_eq!(check.differences, Vec::<String>::new());
    drop(first);
    // Before anything was asked, the first that is applied says so.
    let second = world_on(kept.clone(), balanced(1)).await;
    second.engine.silent.lock().unwrap().push([10, 0, 0, 2].into());
    wait(&second, &[2]).await;
    assert_eq!(second.engine.applied.lock().unwrap().len(), 1);
    // A newer plan does not make it answer.
    second.told.send_replace(balanced(2));
    until(async || (second.engine.applied.lock().unwrap().last() == Some(&2)).then_some(())).await;
    assert_eq!(second.engine.marked(), [2]);
    second.engine.silent.lock().unwrap().clear();
    wait(&second, &[]).await;
    assert_eq!(kept.load().await.len(), 0);
}
