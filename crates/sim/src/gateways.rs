//! Gateways without sockets: they pull routing tables from any server of their region, take only newer ones, keep what they
//! hold over restarts and cuts, and send requests by it.
//!
//! What is checked: a table says exactly what its revision does; a server that knows that an instance is gone stops naming it
//! within a second; and no request ever reaches another project's instance, however old the table.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_control::region::ReportError;
use nexus_model::plan::{AppTraffic, InstanceTraffic, RoutingTable, TrafficReport};
use nexus_model::{Name, Uid};
use tokio::time::{Instant, sleep, timeout};

use crate::chance::Dice;
use crate::server::as_servers;
use crate::site::Site;
use crate::world::World;

/// Gateways' places in the network come after the hosts'.
const FIRST: u64 = 9_001;
const STEP: Duration = Duration::from_millis(200);
const TELL_EVERY: Duration = Duration::from_secs(1);
/// A table is made 20 ms after a change, a large one within a second. The rest is for the way.
const NAMED_AFTER: Duration = Duration::from_millis(1_500);

/// Requests a second that users send to apps, all gateways together. Clones share one.
#[derive(Clone, Default)]
pub struct Demand(Arc<Mutex<BTreeMap<Name, u32>>>);

impl Demand {
    pub fn set(&self, app: &Name, per_second: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(app.clone(), per_second);
    }

    fn all(&self) -> BTreeMap<Name, u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a table says of instances: each one's project and app.
pub type Said = BTreeMap<Uid, (Name, Name)>;

/// A server's process that named an instance which it knew to be gone, and since when.
type Late = (u64, u64, Instant);

#[derive(Default)]
struct State {
    table: Option<Arc<RoutingTable>>,
    down: bool,
    late: BTreeMap<Uid, Late>,
    /// Every table that was taken, by its revision.
    taken: BTreeMap<u64, Said>,
}

pub struct Gateway {
    pub world: Arc<World>,
    pub place: u64,
    pub name: String,
    /// The servers of its region.
    pub servers: Vec<u64>,
    dice: Dice,
    state: Mutex<State>,
}

/// What a server answers: its table, and of the instances that it names those that are gone, as far as it knows.
struct Answer {
    table: Arc<RoutingTable>,
    gone: Vec<Uid>,
    life: u64,
}

pub fn said(table: &RoutingTable) -> Said {
    let of = |s: &nexus_model::plan::Service| (s.project.clone(), s.app.clone());
    table.services.iter().flat_map(|s| s.backends.iter().map(move |b| (b.uid, of(s)))).collect()
}

/// Two gateways of a region.
pub fn gateways(world: &Arc<World>, site: &Site) -> Vec<Arc<Gateway>> {
    let number = world.sites.iter().position(|s| s.name == site.name).unwrap_or(0) as u64;
    let make = |n: u64| {
        let name = format!("gateway {}-{n}", site.name);
        let (dice, servers) = (Dice::new(world.seed, &name), site.nodes.clone());
        let place = FIRST + number * 10 + n;
        Arc::new(Gateway { world: world.clone(), place, name, servers, dice, state: Mutex::default() })
    };
    (1..=if world.is_fleet() { 1 } else { 2 }).map(make).collect()
}

impl Gateway {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its process ends, or is back with the table that it kept.
    pub fn set_down(&self, down: bool) {
        self.state().down = down;
    }

    pub fn table(&self) -> Option<Arc<RoutingTable>> {
        self.state().table.clone()
    }

    /// Every table that it has taken, by revision.
    pub fn taken(&self) -> BTreeMap<u64, Said> {
        self.state().taken.clone()
    }

    pub async fn run(self: Arc<Self>) {
        let mut server = self.dice.below(self.servers.len() as u64) as usize;
        let (mut told, mut leader) = (Instant::now(), None);
        loop {
            sleep(STEP).await;
            if self.state().down {
                told = Instant::now();
                continue;
            }
            let demand = self.world.demand.all();
            if !demand.is_empty() && told.elapsed() >= TELL_EVERY {
                let span = std::mem::replace(&mut told, Instant::now()).elapsed();
                self.tell(&demand, span, &mut leader).await;
            }
            if !self.pull(self.servers[server]).await {
                server = (server + 1) % self.servers.len();
            }
            self.request();
        }
    }

    /// What passed through it in a while: its half of what users ask, shared by the ready instances that its table names.
    fn traffic(&self, demand: &BTreeMap<Name, u32>, span: Duration) -> TrafficReport {
        let millis = u64::try_from(span.as_millis()).unwrap_or(0);
        let table = self.table();
        let (mut instances, mut apps) = (Vec::new(), Vec::new());
        for service in table.iter().flat_map(|table| &table.services) {
            let per_second = demand.get(&service.app).copied().unwrap_or(0);
            let asked = u32::try_from(u64::from(per_second) * millis / 2_000).unwrap_or(0);
            if asked == 0 {
                continue;
            }
            let ready: Vec<_> = service.backends.iter().filter(|b| b.ready).collect();
            let n = ready.len() as u32;
            instances.extend(ready.iter().enumerate().map(|(i, backend)| InstanceTraffic {
                uid: backend.uid,
                requests: asked / n + u32::from((i as u32) < asked % n),
                errors: 0,
                in_flight: 0,
            }));
            apps.push(AppTraffic {
                project: service.project.clone(),
                app: service.app.clone(),
                arrived: asked,
                waiting: if ready.is_empty() { asked } else { 0 },
            });
        }
        let gateway = self.name.replace(' ', "-").parse().expect("the simulator's names are well formed");
        TrafficReport { gateway, span_ms: u32::try_from(millis).unwrap_or(u32::MAX), instances, apps }
    }

    /// Tells whoever leads what passed through. What is lost is not told again.
    async fn tell(&self, demand: &BTreeMap<Name, u32>, span: Duration, leader: &mut Option<u64>) {
        let report = self.traffic(demand, span);
        for _ in 0..2 {
            let Some(node) = leader.or_else(|| self.dice.pick(&self.servers).copied()) else { return };
            let (world, report) = (Arc::downgrade(&self.world), report.clone());
            let handle = move || {
                let server = world.upgrade()?.server(node)?;
                let region = server.part.as_ref()?.region.clone();
                let report = report.clone();
                as_servers(&server, async move { region.hear_traffic(&report) })
            };
            let exchange = self.world.net.exchange(self.place, node, "traffic", false, handle);
            *leader = match timeout(Duration::from_secs(1), exchange).await {
                Ok(Ok(Ok(()))) => {
                    *leader = Some(node);
                    return;
                }
                Ok(Ok(Err(ReportError::NotLeader { leader }))) => leader.filter(|l| *l != node),
                _ => None,
            };
            if leader.is_none() {
                return;
            }
        }
    }

    async fn pull(&self, node: u64) -> bool {
        let world = Arc::downgrade(&self.world);
        let handle = move || {
            let server = world.upgrade()?.server(node)?;
            let life = server.life.number;
            let of = server.clone();
            as_servers(&server, async move {
                let part = of.part.as_ref()?;
                let table = part.table()?;
                let gone = part.view.read(|w| {
                    let lives = |uid: &Uid| w.instance(*uid).is_some_and(|i| i.metadata.deleting.is_none());
                    let named = table.services.iter().flat_map(|s| s.backends.iter().map(|b| b.uid));
                    named.filter(|uid| !lives(uid)).collect()
                });
                Some(Answer { table, gone, life })
            })
        };
        let asked = self.world.net.exchange(self.place, node, "table", true, handle);
        let Ok(Ok(Some(answer))) = timeout(Duration::from_secs(3), asked).await else { return false };
        let mut state = self.state();
        if state.down {
            return true;
        }
        let now = Instant::now();
        let before = std::mem::take(&mut state.late);
        for uid in answer.gone {
            let same = before.get(&uid).filter(|(n, life, _)| (*n, *life) == (node, answer.life));
            let since = same.map_or(now, |(_, _, since)| *since);
            if now - since > NAMED_AFTER {
                let text = format!("{} is told of {uid} by server {node}, {:?} after", self.name, now - since);
                self.world.trace.violation("a table names nobody for long who is known to be gone", text);
            }
            state.late.insert(uid, (node, answer.life, since));
        }
        if state.table.as_ref().is_none_or(|held| held.revision < answer.table.revision) {
            self.world.trace.count("tables taken");
            state.taken.insert(answer.table.revision, said(&answer.table));
            state.table = Some(answer.table);
        }
        true
    }

    /// A user's request goes where the held table says.
    fn request(&self) {
        let Some(table) = self.table() else { return };
        let Some(service) = self.dice.pick(&table.services) else { return };
        let ready: Vec<_> = service.backends.iter().filter(|b| b.ready).collect();
        let Some(backend) = self.dice.pick(&ready) else { return };
        let trace = &self.world.trace;
        match self.world.fence.at(backend.address.ip()) {
            None => trace.count("requests: to an instance that is gone"),
            Some(there) if there.project != service.project => {
                let text = format!(
                    "{} sends a request for {}/{} to {}, which is {} of project {}",
                    self.name, service.project, service.app, backend.address, there.uid, there.project
                );
                trace.violation("no request reaches another project's instance", text);
            }
            Some(there) if there.uid != backend.uid => trace.count("requests: to a later instance of the project"),
            Some(_) => trace.count("requests: answered"),
        }
    }
}
