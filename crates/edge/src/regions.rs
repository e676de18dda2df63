//! Other regions, as this gateway measures them: which of their gateways answer, how far away they are, and which one
//! takes a request that has to leave the region.
//!
//! Each gateway of another region is pinged twice a second on a connection of its own, and its round trips smoothed
//! (RFC 6298, section 2: an eighth of each new one). One that has not answered for [`LOST`] is lost until it answers
//! again. A region is as near as its nearest gateway that is heard.
//!
//! A request leaves its region at most once: a gateway that takes one in from another region has only its own instances
//! to give it to, and says when it has none, so that the sender can turn to the next region. What a region has said so
//! is remembered for [`REFUSAL`], so that not every request has to ask again.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use nexus_env::{BoxStream, Endpoint, RngExt as _};
use nexus_model::{Name, Uid, plan};
use rustls_pki_types::ServerName;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::backend::{Backend, Lease};
use crate::gateway::Core;
use crate::headers;
use crate::metrics::{Metrics, RegionMetrics};

/// Where a gateway asks another whether it is there.
pub(crate) const PING_PATH: &str = "/ping";
const PING_EVERY: Duration = Duration::from_millis(500);
const PING_TIME: Duration = Duration::from_secs(1);
/// Without an answer for so long, a gateway is not counted on.
const LOST: Duration = Duration::from_millis(1500);
/// How long a region that had no instance for a service is asked after the others.
const REFUSAL: Duration = Duration::from_secs(1);
/// Certificates are judged by the SPIFFE id in them; TLS wants a name all the same.
const SERVER_NAME: &str = "gateway.nexus.internal";

/// A gateway of another region.
pub(crate) struct Peer {
    pub address: SocketAddr,
    /// The same gateway for services of either protocol.
    http1: Arc<Backend>,
    http2: Arc<Backend>,
    pulse: Pulse,
    /// False from when it is lost until it answers again.
    heard: watch::Sender<bool>,
}

/// What pings have told. Times are microseconds since `start`; 0 stands for never.
struct Pulse {
    start: Instant,
    heard: AtomicU64,
    round_trip: AtomicU64,
}

impl Pulse {
    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.duration_since(self.start).as_micros()).unwrap_or(u64::MAX).max(1)
    }

    fn note(&self, round_trip: Duration, now: Instant) {
        let sample = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX).max(1);
        let smoothed = match self.round_trip.load(Ordering::Relaxed) {
            0 => sample,
            before => (before - before / 8).saturating_add(sample / 8).max(1),
        };
        self.round_trip.store(smoothed, Ordering::Relaxed);
        self.heard.store(self.micros(now), Ordering::Relaxed);
    }

    /// The smoothed round trip, if it has answered lately.
    fn round_trip(&self, now: Instant) -> Option<Duration> {
        let heard = self.heard.load(Ordering::Relaxed);
        let lately = heard > 0 && self.micros(now).saturating_sub(heard) < LOST.as_micros() as u64;
        lately.then(|| Duration::from_micros(self.round_trip.load(Ordering::Relaxed)))
    }
}

impl Peer {
    fn new(region: &Name, address: SocketAddr) -> Self {
        let heard = watch::Sender::new(true);
        let backend =
            |http2| Arc::new(Backend::gateway(uid(address), address.into(), region.clone(), http2, heard.subscribe()));
        Self {
            address,
            http1: backend(false),
            http2: backend(true),
            heard: heard.clone(),
            pulse: Pulse { start: Instant::now(), heard: AtomicU64::new(0), round_trip: AtomicU64::new(0) },
        }
    }

    pub fn backends(&self) -> [&Arc<Backend>; 2] {
        [&self.http1, &self.http2]
    }

    /// The smoothed round trip of a gateway that may be counted on.
    fn round_trip(&self, now: Instant) -> Option<Duration> {
        let put_aside = self.backends().iter().any(|b| b.health.is_ejected());
        self.pulse.round_trip(now).filter(|_| !put_aside)
    }
}

/// Names a gateway among the instances that a request has tried.
fn uid(address: SocketAddr) -> Uid {
    let mut bytes = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    for (byte, port) in bytes.iter_mut().zip(address.port().to_be_bytes()) {
        *byte ^= port;
    }
    Uid::from_random(bytes)
}

/// Another region.
pub(crate) struct Region {
    pub name: Name,
    pub peers: Vec<Arc<Peer>>,
    pub metrics: Arc<RegionMetrics>,
}

impl Region {
    fn round_trip(&self, now: Instant) -> Option<Duration> {
        self.peers.iter().filter_map(|p| p.round_trip(now)).min()
    }

    /// Whether any of its gateways may be counted on.
    pub fn is_heard(&self, now: Instant) -> bool {
        self.round_trip(now).is_some()
    }

    fn count(&self) {
        let now = Instant::now();
        let heard: Vec<Duration> = self.peers.iter().filter_map(|p| p.round_trip(now)).collect();
        self.metrics.gateways.set(i64::try_from(heard.len()).unwrap_or(i64::MAX));
        self.metrics.latency.set(heard.iter().min().map_or(f64::NAN, Duration::as_secs_f64));
    }
}

/// All other regions of one table.
pub(crate) type Regions = BTreeMap<Name, Arc<Region>>;

/// Makes a table's regions, with what is known of their gateways from the table before.
pub(crate) fn compile(regions: Vec<plan::RemoteRegion>, before: Option<&Regions>, metrics: &Metrics) -> Regions {
    let old = |name: &Name| before.and_then(|b| b.get(name));
    let compiled: Regions = regions
        .into_iter()
        .map(|region| {
            let held = old(&region.name);
            let peer = |address: SocketAddr| {
                let same = held.and_then(|h| h.peers.iter().find(|p| p.address == address));
                same.cloned().unwrap_or_else(|| Arc::new(Peer::new(&region.name, address)))
            };
            let peers = region.gateways.iter().copied().map(peer).collect();
            let metrics =
                held.map_or_else(|| Arc::new(metrics.region(region.name.as_str())), |held| held.metrics.clone());
            (region.name.clone(), Arc::new(Region { name: region.name, peers, metrics }))
        })
        .collect();
    for gone in before.into_iter().flat_map(BTreeMap::keys).filter(|name| !compiled.contains_key(*name)) {
        metrics.forget_region(gone.as_str());
    }
    compiled
}

/// Regions that lately had no instance for one service, and when they said so.
#[derive(Default)]
pub(crate) struct Refusals(Mutex<BTreeMap<Name, Instant>>);

impl Refusals {
    pub fn note(&self, region: &Name, now: Instant) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, at| now.duration_since(*at) < REFUSAL);
        held.insert(region.clone(), now);
    }

    fn stands(&self, region: &Name, now: Instant) -> bool {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(region).is_some_and(|at| now.duration_since(*at) < REFUSAL)
    }
}

/// What a request that leaves its region looks for.
pub(crate) struct Wanted<'a> {
    /// The regions that run the service.
    pub regions: &'a [Name],
    pub http2: bool,
    /// Gateways that were tried already.
    pub tried: &'a [Uid],
    /// Regions that have refused this request.
    pub refused: &'a [Name],
    pub refusals: &'a Refusals,
    pub max_outstanding: u32,
    pub now: Instant,
}

/// A gateway of the nearest region that may be counted on; equals take turns.
pub(crate) fn nearest(regions: &Regions, wanted: &Wanted<'_>, turn: &AtomicUsize) -> Option<Lease> {
    let now = wanted.now;
    let mut order: Vec<(bool, Duration, &Arc<Region>)> = wanted
        .regions
        .iter()
        .filter(|name| !wanted.refused.contains(name))
        .filter_map(|name| regions.get(name))
        .filter_map(|region| Some((wanted.refusals.stands(&region.name, now), region.round_trip(now)?, region)))
        .collect();
    order.sort_by_key(|(refuses, round_trip, _)| (*refuses, *round_trip));
    order.into_iter().find_map(|(_, _, region)| {
        let fits: Vec<&Arc<Backend>> = region
            .peers
            .iter()
            .filter(|p| p.round_trip(now).is_some())
            .map(|p| p.backends()[usize::from(wanted.http2)])
            .filter(|b| !wanted.tried.contains(&b.uid) && b.outstanding() < wanted.max_outstanding)
            .collect();
        least_busy(&fits, turn)
    })
}

/// Any gateway that was not found dead lately, heard or not: better a try than a certain failure.
pub(crate) fn any(regions: &Regions, wanted: &Wanted<'_>, turn: &AtomicUsize) -> Option<Lease> {
    let fits: Vec<&Arc<Backend>> = wanted
        .regions
        .iter()
        .filter(|name| !wanted.refused.contains(name))
        .filter_map(|name| regions.get(name))
        .flat_map(|region| &region.peers)
        .map(|p| p.backends()[usize::from(wanted.http2)])
        .filter(|b| !wanted.tried.contains(&b.uid) && !b.health.is_ejected())
        .filter(|b| b.outstanding() < wanted.max_outstanding)
        .collect();
    least_busy(&fits, turn)
}

fn least_busy(backends: &[&Arc<Backend>], turn: &AtomicUsize) -> Option<Lease> {
    let (count, turn) = (backends.len().max(1), turn.fetch_add(1, Ordering::Relaxed));
    let rank = |(index, b): &(usize, &&Arc<Backend>)| (b.outstanding(), (index + count - turn % count) % count);
    backends.iter().enumerate().min_by_key(rank).map(|(_, backend)| backend.lease())
}

/// Begins TLS on a new connection to a gateway of another region.
pub(crate) async fn secure(core: &Core, stream: BoxStream) -> io::Result<BoxStream> {
    let config = core.options.peer_tls.clone().ok_or_else(|| io::Error::other("no identity for other gateways"))?;
    let name = ServerName::try_from(SERVER_NAME).expect("a valid DNS name");
    Ok(Box::new(tokio_rustls::TlsConnector::from(config).connect(name, stream).await?))
}

/// Pings every gateway of the newest table's other regions, until dropped.
pub(crate) async fn keep_in_touch(core: Arc<Core>) {
    let mut tables = core.table.subscribe();
    let mut pulses = JoinSet::new();
    let mut running: BTreeMap<SocketAddr, (Arc<Peer>, AbortHandle)> = BTreeMap::new();
    loop {
        let table = tables.borrow_and_update().clone();
        let mut wanted: BTreeMap<SocketAddr, (Arc<Region>, Arc<Peer>)> = BTreeMap::new();
        for region in table.iter().flat_map(|t| t.regions.values()) {
            wanted.extend(region.peers.iter().map(|p| (p.address, (region.clone(), p.clone()))));
        }
        running.retain(|address, (peer, pulse)| {
            let same = wanted.get(address).is_some_and(|(_, p)| Arc::ptr_eq(p, peer));
            if !same {
                pulse.abort();
            }
            same
        });
        for (address, (region, peer)) in wanted {
            running.entry(address).or_insert_with(|| {
                let pulse = pulses.spawn(feel(core.clone(), region.name.clone(), peer.clone()));
                (peer, pulse)
            });
        }
        while pulses.try_join_next().is_some() {}
        if tables.changed().await.is_err() {
            return;
        }
    }
}

struct Line {
    send: http1::SendRequest<Empty<Bytes>>,
    _driver: AbortOnDropHandle<()>,
}

/// Pings one gateway for ever.
async fn feel(core: Arc<Core>, name: Name, peer: Arc<Peer>) {
    // Not all at the same instant.
    let first = Duration::from_millis(core.env.rng.below(20));
    let mut beats = interval_at(Instant::now() + first, PING_EVERY);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut line: Option<Line> = None;
    loop {
        beats.tick().await;
        match timeout(PING_TIME, ping(&core, &name, &peer, &mut line)).await.unwrap_or(Err(Silent::Late)) {
            Ok(round_trip) => {
                let now = Instant::now();
                peer.pulse.note(round_trip, now);
                for backend in peer.backends() {
                    if backend.health.wants_probe(now) {
                        backend.health.restore(now);
                    }
                }
                if !peer.heard.send_replace(true) {
                    info!(region = %name, gateway = %peer.address, "another region's gateway answers again");
                }
            }
            Err(why) => {
                line = None;
                // One answer that is late is no outage.
                if *peer.heard.borrow() && peer.pulse.round_trip(Instant::now()).is_none() {
                    peer.backends().into_iter().for_each(|b| b.forget_connections());
                    peer.heard.send_replace(false);
                    warn!(region = %name, gateway = %peer.address, reason = %why, "another region's gateway is lost");
                }
            }
        }
        if let Some(region) = core.table().and_then(|t| t.regions.get(&name).cloned()) {
            region.count();
        }
    }
}

/// Why a ping has no answer.
#[derive(Debug, thiserror::Error)]
enum Silent {
    #[error("no answer within {PING_TIME:?}")]
    Late,
    #[error("{0}")]
    Connect(io::Error),
    #[error("{0}")]
    Exchange(#[from] hyper::Error),
    #[error("it answers {0} to a ping")]
    Status(StatusCode),
    #[error("it is a gateway of another region")]
    Region,
}

async fn ping(core: &Core, name: &Name, peer: &Peer, line: &mut Option<Line>) -> Result<Duration, Silent> {
    if line.as_ref().is_none_or(|l| l.send.is_closed()) {
        let endpoint = Endpoint::Tcp(peer.address);
        let stream = core.env.transport.connect(&endpoint).await.map_err(Silent::Connect)?;
        let stream = secure(core, stream).await.map_err(Silent::Connect)?;
        let (send, driver) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(async move {
            // What went wrong is told to the ping.
            let _ = driver.await;
        });
        *line = Some(Line { send, _driver: AbortOnDropHandle::new(driver) });
    }
    let open = line.as_mut().expect("a line was opened when there was none");
    open.send.ready().await?;
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = http::Uri::from_static(PING_PATH);
    request.headers_mut().insert(HOST, http::HeaderValue::from_static(SERVER_NAME));
    let sent = Instant::now();
    let answer = open.send.send_request(request).await?;
    let round_trip = sent.elapsed();
    let (head, body) = answer.into_parts();
    body.collect().await?;
    if !head.status.is_success() {
        return Err(Silent::Status(head.status));
    }
    let is_its = head.headers.get(headers::REGION).is_some_and(|r| r.as_bytes() == name.as_str().as_bytes());
    if is_its { Ok(round_trip) } else { Err(Silent::Region) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn remote(region: &str, ports: &[u16]) -> plan::RemoteRegion {
        let gateways = ports.iter().map(|p| ([127, 0, 0, 1], *p).into()).collect();
        plan::RemoteRegion { name: name(region), tier: Default::default(), gateways }
    }

    fn wanted<'a>(regions: &'a [Name], refusals: &'a Refusals, now: Instant) -> Wanted<'a> {
        Wanted { regions, http2: false, tried: &[], refused: &[], refusals, max_outstanding: 8, now }
    }

    #[test]
    fn the_nearest_region_that_answers_is_chosen_and_lost_ones_are_not() {
        let regions = compile(vec![remote("b", &[1, 2]), remote("c", &[3])], None, &Metrics::new());
        let (names, refusals, turn) = ([name("b"), name("c")], Refusals::default(), AtomicUsize::new(0));
        let start = Instant::now();
        let choose = |now| {
            let lease = nearest(&regions, &wanted(&names, &refusals, now), &turn)?;
            Some(lease.backend().region.as_ref().unwrap().to_string())
        };
        assert_eq!(choose(start), None, "nobody has answered yet");
        assert!(any(&regions, &wanted(&names, &refusals, start), &turn).is_some());
        let pulse = |region: &str, peer: usize, millis, now| {
            regions[&name(region)].peers[peer].pulse.note(Duration::from_millis(millis), now);
        };
        pulse("b", 0, 40, start);
        pulse("c", 0, 20, start);
        assert_eq!(choose(start).as_deref(), Some("c"));
        pulse("b", 1, 10, start);
        assert_eq!(choose(start).as_deref(), Some("b"), "a region is as near as its nearest gateway");
        refusals.note(&name("b"), start);
        assert_eq!(choose(start).as_deref(), Some("c"), "a region that had no instance comes after the others");
        let later = start + REFUSAL;
        pulse("c", 0, 20, later);
        assert_eq!(choose(later).as_deref(), Some("b"));
        assert_eq!(choose(start + LOST).as_deref(), Some("c"), "b has been silent for too long");
    }

    #[test]
    fn a_region_far_away_stays_so_after_one_quick_answer() {
        let regions = compile(vec![remote("b", &[1])], None, &Metrics::new());
        let (peer, now) = (&regions[&name("b")].peers[0], Instant::now());
        for millis in [80, 80, 8] {
            peer.pulse.note(Duration::from_millis(millis), now);
        }
        assert_eq!(peer.round_trip(now), Some(Duration::from_millis(71)));
    }

    #[test]
    fn a_gateways_health_outlives_the_table_and_its_region_does_not() {
        let metrics = Metrics::new();
        let first = compile(vec![remote("b", &[1, 2]), remote("c", &[3])], None, &metrics);
        let second = compile(vec![remote("b", &[2, 4])], Some(&first), &metrics);
        assert!(Arc::ptr_eq(&first[&name("b")].peers[1], &second[&name("b")].peers[0]));
        assert!(metrics.text().contains(r#"region="b""#));
        assert!(!metrics.text().contains(r#"region="c""#));
    }

    #[test]
    fn a_busy_gateway_leaves_requests_to_the_others() {
        let regions = compile(vec![remote("b", &[1, 2])], None, &Metrics::new());
        let now = Instant::now();
        for peer in &regions[&name("b")].peers {
            peer.pulse.note(Duration::from_millis(1), now);
        }
        let (names, refusals, turn) = ([name("b")], Refusals::default(), AtomicUsize::new(0));
        let held: Vec<Lease> =
            std::iter::from_fn(|| nearest(&regions, &wanted(&names, &refusals, now), &turn)).take(99).collect();
        assert_eq!(held.len(), 16, "each takes as many as it may");
        let on_first = held.iter().filter(|l| Arc::ptr_eq(l.backend(), &regions[&name("b")].peers[0].http1)).count();
        assert_eq!(on_first, 8);
    }
}
