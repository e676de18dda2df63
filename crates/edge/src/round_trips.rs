//! How far the region's hosts are from this gateway, measured and told to the region's leading server.
//!
//! A round trip is the time in which a TCP connection to the host's agent opens: the kernel answers, however busy the
//! agent is, and nothing is sent over it. Of the last [`KEPT`] the lowest counts, because what delays one on its way says
//! nothing about the way. The server says which hosts are next, so that a gateway measures hosts of any number, a bounded
//! number in each round. A host that does not answer is not told of, and what was known of it is forgotten.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use nexus_env::{Endpoint, Env, on_disk};
use nexus_model::Name;
use nexus_model::plan::{HostTrip, PROBED_AT_ONCE, RoundTripAck, RoundTripReport, method};
use nexus_wire::{ClientOptions, Pool, ServerBook, WireError};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::source::SourceConfig;

/// Between two rounds.
const EVERY: Duration = Duration::from_secs(3);
/// Round trips of one host of which the lowest counts.
const KEPT: usize = 5;
/// Connections that are opened at once.
const AT_ONCE: usize = 32;
/// What takes longer is no answer.
const DEADLINE: Duration = Duration::from_secs(2);
/// Hosts of which round trips are kept.
const HOSTS: usize = 50_000;
/// How many servers may point to another one before this stops believing them.
const HOPS: u32 = 3;

/// Measures and tells until `stop`.
pub async fn measure(config: SourceConfig, env: Env, stop: CancellationToken) {
    let pool = Pool::new(&env, config.tls.clone(), ClientOptions::default());
    let mut round = Round { config: Arc::new(config), env, pool, turn: 0, leader: None, lasts: BTreeMap::new() };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = round.run() => {}
    }
}

struct Round {
    config: Arc<SourceConfig>,
    env: Env,
    pool: Pool,
    turn: usize,
    leader: Option<Endpoint>,
    /// The last round trips of each host, in microseconds.
    lasts: BTreeMap<Name, VecDeque<u32>>,
}

impl Round {
    async fn run(&mut self) {
        let (mut trips, mut after) = (Vec::new(), None);
        loop {
            let report = RoundTripReport { gateway: self.config.gateway.clone(), trips, after: after.clone() };
            // A report that nobody took is old when somebody would.
            trips = Vec::new();
            if let Some(ack) = self.tell(&report).await {
                let begins = after.is_none();
                after = ack.hosts.last().map(|(name, _)| name.clone()).or(after);
                trips = self.probe(ack.hosts).await;
                // The first round is told of at once.
                if begins && after.is_some() {
                    continue;
                }
            }
            sleep(EVERY).await;
        }
    }

    /// Sends a report to whoever leads. `None` when nobody took it; then the next try goes to another server.
    async fn tell(&mut self, report: &RoundTripReport) -> Option<RoundTripAck> {
        let (own, disk) = (self.config.clone(), self.env.disk.clone());
        let open = move || ServerBook::open(&*disk, &own.data_dir, own.servers.clone());
        let book = on_disk(&self.env.disk, open).await.ok()?;
        for _ in 0..HOPS {
            let endpoint = match &self.leader {
                Some(endpoint) => endpoint.clone(),
                None => book.nth(self.turn)?,
            };
            match self.pool.get(&endpoint).call(method::ROUND_TRIPS, report, DEADLINE).await {
                Ok(ack) => {
                    self.leader = Some(endpoint);
                    return Some(ack);
                }
                Err(WireError::NotLeader { leader: Some(other) }) => match other.parse::<Endpoint>() {
                    Ok(other) if other != endpoint => self.leader = Some(other),
                    _ => break,
                },
                Err(error) => {
                    debug!(server = %endpoint, %error, "round trips were not taken");
                    break;
                }
            }
        }
        self.leader = None;
        self.turn = self.turn.wrapping_add(1);
        None
    }

    async fn probe(&mut self, hosts: Vec<(Name, std::net::SocketAddr)>) -> Vec<HostTrip> {
        let env = &self.env;
        let probes = hosts.into_iter().take(PROBED_AT_ONCE).map(|(host, address)| async move {
            let begun = env.monotonic();
            let opened = timeout(DEADLINE, env.transport.connect(&Endpoint::Tcp(address))).await;
            let took = env.monotonic().saturating_sub(begun);
            let took = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
            (host, matches!(opened, Ok(Ok(_))).then_some(took.max(1)))
        });
        let measured: Vec<(Name, Option<u32>)> =
            futures::stream::iter(probes).buffer_unordered(AT_ONCE).collect().await;
        if self.lasts.len() > HOSTS {
            self.lasts.clear();
        }
        let mut trips = Vec::new();
        for (host, took) in measured {
            let Some(took) = took else {
                self.lasts.remove(&host);
                continue;
            };
            let lasts = self.lasts.entry(host.clone()).or_default();
            lasts.push_back(took);
            if lasts.len() > KEPT {
                lasts.pop_front();
            }
            let us = lasts.iter().copied().min().unwrap_or(took);
            trips.push(HostTrip { host, us });
        }
        trips
    }
}
