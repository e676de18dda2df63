//! Where tables come from: the cache at the start, then streams from the servers.
//!
//! Up to [`STREAMS`] servers are listened to at once and the highest revision wins, so that one server that is cut off
//! from the others, but not from us, can't hold the gateway at an old table. Each stream goes round a share of the
//! servers of its own, with pauses that grow when none of them answers. Where the servers are is asked of them now and
//! then, and kept on disk too.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Endpoint, Env, RngExt, on_disk};
use nexus_model::Name;
use nexus_model::plan::{RoutingTable, ServerList, TableRequest, method};
use nexus_wire::{ClientOptions, Pool, ServerBook, Streaming};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cache;
use crate::gateway::Gateway;
use crate::traffic;

const STREAMS: usize = 2;
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// The cache is written at most this often; a change in between waits.
const SAVE_REST: Duration = Duration::from_millis(500);
/// How often a server is asked where all servers are.
const ASK: Duration = Duration::from_secs(10);
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// A stream that lasted this long was a good one: the next try need not wait.
const GOOD_STREAM: Duration = Duration::from_secs(5);

/// Where a gateway learns its routes.
#[derive(Clone)]
pub struct SourceConfig {
    pub gateway: Name,
    pub cluster_id: String,
    pub servers: Vec<Endpoint>,
    /// Where other regions' gateways reach this one.
    pub peer: Option<SocketAddr>,
    /// The folder of the cached table.
    pub data_dir: PathBuf,
    pub tls: Arc<rustls::ClientConfig>,
}

/// Keeps `gateway`'s table fresh until `stop`. The cached table is in use when the first server is asked.
pub async fn follow(gateway: Gateway, config: SourceConfig, env: Env, stop: CancellationToken) {
    let config = Arc::new(config);
    restore(&gateway, &config, &env).await;
    let (newest, saved) = watch::channel(None);
    let mut tasks = JoinSet::new();
    tasks.spawn(keep(config.clone(), env.clone(), saved));
    let pool = Pool::new(&env, config.tls.clone(), ClientOptions::default());
    let (own, disk) = (config.clone(), env.disk.clone());
    let open = move || ServerBook::open(&*disk, &own.data_dir, own.servers.clone());
    let Ok(book) = on_disk(&env.disk, open).await else { return };
    let book = Arc::new(book);
    tasks.spawn(learn(book.clone(), pool.clone(), env.clone()));
    tasks.spawn(traffic::report(gateway.clone(), config.gateway.clone(), book.clone(), pool.clone(), env.clone()));
    // With a single server, the second stream waits for company.
    for share in 0..STREAMS {
        let listener = Source {
            gateway: gateway.clone(),
            name: config.gateway.clone(),
            peer: config.peer,
            env: env.clone(),
            pool: pool.clone(),
            book: book.clone(),
            share,
            newest: newest.clone(),
        };
        tasks.spawn(listener.run());
    }
    stop.cancelled().await;
    tasks.shutdown().await;
}

async fn restore(gateway: &Gateway, config: &Arc<SourceConfig>, env: &Env) {
    let (own, disk) = (config.clone(), env.disk.clone());
    let on = disk.clone();
    let loaded = on_disk(&on, move || cache::load(&*disk, &own.data_dir, &own.cluster_id)).await;
    match loaded {
        Ok(Ok(Some(table))) => {
            let revision = table.revision;
            if gateway.offer(table) {
                info!(revision, "serving by the cached table");
            }
        }
        Ok(Ok(None)) => {}
        Ok(Err(e)) => warn!(reason = %e, "the cached table is not used"),
        Err(e) => warn!(reason = %e, "the cached table is not used"),
    }
}

/// Writes the newest table to disk whenever there is one.
async fn keep(config: Arc<SourceConfig>, env: Env, mut newest: watch::Receiver<Option<Arc<RoutingTable>>>) {
    let mut failing = false;
    while newest.changed().await.is_ok() {
        let Some(table) = newest.borrow_and_update().clone() else { continue };
        let (own, disk) = (config.clone(), env.disk.clone());
        let save = move || cache::save(&*disk, &own.data_dir, &own.cluster_id, &table);
        let saved = on_disk(&env.disk, save).await.and_then(|saved| saved);
        match saved {
            Ok(()) => failing = false,
            Err(e) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(reason = %e, "the table can't be cached: a restart without servers would serve an older one");
                }
            }
        }
        sleep(SAVE_REST).await;
    }
}

/// Asks now and then where the servers are, so that those that come are listened to and those that went are not.
async fn learn(book: Arc<ServerBook>, pool: Pool, env: Env) {
    let mut turn = env.rng.below(1024) as usize;
    loop {
        let asked = match book.nth(turn) {
            Some(server) => pool.get(&server).call::<_, ServerList>(method::SERVERS, &(), ASK_DEADLINE).await.ok(),
            None => None,
        };
        turn = turn.wrapping_add(1);
        let rest = if asked.is_some() { ASK } else { PAUSE_MAX };
        if asked.is_some_and(|list| book.learn(&list.servers)) {
            let known = book.all();
            pool.retain(|endpoint| known.contains(endpoint));
            let (own, disk) = (book.clone(), env.disk.clone());
            if let Err(e) = on_disk(&env.disk, move || own.save(&*disk)).await.and_then(|saved| saved) {
                warn!(reason = %e, "the list of servers can't be kept: a restart begins with the configured ones");
            }
        }
        sleep(rest).await;
    }
}

/// One stream's share of the servers.
struct Source {
    gateway: Gateway,
    name: Name,
    peer: Option<SocketAddr>,
    env: Env,
    pool: Pool,
    book: Arc<ServerBook>,
    /// Which of the streams this is.
    share: usize,
    newest: watch::Sender<Option<Arc<RoutingTable>>>,
}

impl Source {
    async fn run(self) {
        let mut next = self.env.rng.below(1024) as usize;
        let mut failures = 0u32;
        let mut lost = false;
        loop {
            let Some(server) = self.server(next) else {
                sleep(PAUSE_MAX).await;
                continue;
            };
            let server = &server;
            let began = Instant::now();
            let why = self.listen(server, &mut lost).await;
            if !std::mem::replace(&mut lost, true) {
                warn!(%server, reason = why, "no tables come from this server; going on with the one held");
            }
            failures = if began.elapsed() >= GOOD_STREAM { 0 } else { failures.saturating_add(1) };
            next += 1;
            let whole = PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX);
            let jitter = self.env.rng.below(whole.as_millis() as u64 / 2 + 1);
            sleep(whole / 2 + Duration::from_millis(jitter)).await;
        }
    }

    /// The server of this stream's share that is next. Another stream never listens to the same one.
    fn server(&self, next: usize) -> Option<Endpoint> {
        let mine = self.book.all().into_iter().skip(self.share).step_by(STREAMS);
        let mine: Vec<Endpoint> = mine.collect();
        mine.get(next.checked_rem(mine.len())?).cloned()
    }

    /// Takes tables from one server until its stream ends; says why it did.
    async fn listen(&self, server: &Endpoint, lost: &mut bool) -> String {
        let request = TableRequest { gateway: self.name.clone(), known: self.gateway.revision(), peer: self.peer };
        let mut tables: Streaming<RoutingTable> = match self.pool.get(server).stream(method::TABLE, &request).await {
            Ok(tables) => tables,
            Err(e) => return e.to_string(),
        };
        if std::mem::replace(lost, false) {
            info!(%server, "listening for tables again");
        }
        loop {
            match tables.next().await {
                Some(Ok(table)) => {
                    let shared = Arc::new(table);
                    if self.gateway.offer((*shared).clone()) {
                        self.newest.send_if_modified(|held| {
                            let newer = held.as_ref().is_none_or(|h| h.revision < shared.revision);
                            if newer {
                                *held = Some(shared.clone());
                            }
                            newer
                        });
                    }
                }
                Some(Err(e)) => return e.to_string(),
                None => return "the stream ended".to_owned(),
            }
        }
    }
}
