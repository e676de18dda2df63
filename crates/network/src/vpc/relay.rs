//! The relay of a network's PROXY listeners on one host: nothing in the kernel can put bytes before a stream.
//!
//! ```text
//! client ─▶ balancer's address ─ prerouting: to the relay's own port ─▶ relay ─ from the client's address ─▶ target
//! ```
//!
//! It is a process in the network's namespace. Which listener a connection is for it learns from connection tracking
//! (`SO_ORIGINAL_DST`). It chooses a target as the packet filter would ([`super::rules`]): by weights in turn or by the client's
//! address, leaving out those that fail their check on this host. It connects from the client's own address (`IP_TRANSPARENT`), so
//! that groups see the client's NIC as they do without a relay, and writes the header before the client's first byte. A target that
//! can't be connected to is passed over for another, [`TRIES`] times in all; then the client's connection is reset.
//!
//! The agent tells it by a socket what there is to relay, and asks by the same whether it lives ([`told`]). What is told anew counts
//! for new connections. The process keeps no right but that of sending from addresses that are not its own.

mod header;
mod serve;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use nexus_model::plan::{HostNetworks, NetworkPlan, ProxyProtocol};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

pub use header::{header, nobody};
pub use serve::{Relay, main};

use super::links;
use super::rules::{proxied, shares, table::Family};
use crate::fnv;

/// Where a relay listens, at addresses of its host's own ([`links::prober`]).
pub const PORT: u16 = 15_001;
/// What a relay marks its connections to targets with.
pub const SENT: u32 = 0xfffe;
/// What answers to those are marked with.
pub const ANSWERS: u32 = 0xfffd;
/// Connections of one relay; more wait to be accepted. Each has two buffers of [`BUFFER`].
pub const MAX_CONNECTIONS: usize = 4_096;
/// Of one client; more are reset.
pub const MAX_OF_CLIENT: usize = 1_024;
/// Bytes on their way in either direction.
pub const BUFFER: usize = 16 << 10;
/// Targets that a connection is tried at, and for how long each.
pub const TRIES: usize = 3;
const CONNECT: Duration = Duration::from_secs(4);
/// As connection tracking has it, for open ones and for those of which one direction has ended.
const IDLE: Duration = Duration::from_secs(432_000);
const IDLE_HALF: Duration = Duration::from_secs(120);
/// Of what is told.
const MAX_PLAN: u32 = 4 << 20;
const DEADLINE: Duration = Duration::from_secs(2);

/// All that one relay does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayPlan {
    pub own: Vec<IpAddr>,
    pub listeners: Vec<RelayListener>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayListener {
    /// The balancer's.
    pub at: SocketAddr,
    pub version: ProxyProtocol,
    pub by_source: bool,
    /// With their weights.
    pub targets: Vec<(SocketAddr, u32)>,
}

/// What a relay answers to whoever asks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RelayState {
    /// Of what it was told, nought if of nothing.
    pub plan: u64,
    pub connections: u64,
    pub relayed: u64,
    pub failed: u64,
}

impl RelayPlan {
    /// What of a network there is to relay on a host; nothing, if there is no such listener.
    pub fn of(hosts: &HostNetworks, network: &NetworkPlan) -> Option<Self> {
        let all = proxied(hosts, network);
        let mut listeners = BTreeMap::new();
        for (balancer, listener) in all {
            let Some(version) = listener.proxy_protocol else { continue };
            let at = SocketAddr::new(balancer.address, listener.port);
            let targets = shares(listener, Family::of(balancer.address));
            let targets = targets.into_iter().map(|s| (SocketAddr::new(s.address, s.port), s.weight)).collect();
            listeners.entry(at).or_insert(RelayListener { at, version, by_source: listener.source_hash, targets });
        }
        let (four, six) = links::prober(hosts.endpoint);
        let listeners: Vec<_> = listeners.into_values().collect();
        (!listeners.is_empty()).then(|| Self { own: vec![four.into(), six.into()], listeners })
    }

    fn text(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a plan is plain data")
    }

    /// By which a relay says that it has this one. Never nought.
    pub fn number(&self) -> u64 {
        fnv(&self.text()).max(1)
    }
}

/// Asks a relay by its socket how it is, and tells it its plan if it has another.
pub async fn told(socket: &Path, plan: &RelayPlan) -> io::Result<RelayState> {
    let talk = async {
        let mut stream = UnixStream::connect(socket).await?;
        let state = ask(&mut stream, &[]).await?;
        if state.plan == plan.number() { Ok(state) } else { ask(&mut stream, &plan.text()).await }
    };
    tokio::time::timeout(DEADLINE, talk).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn ask(stream: &mut UnixStream, words: &[u8]) -> io::Result<RelayState> {
    write_frame(stream, words).await?;
    Ok(serde_json::from_slice(&read_frame(stream).await?)?)
}

async fn read_frame(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await?;
    if length > MAX_PLAN {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a longer message than any"));
    }
    let mut words = vec![0; length as usize];
    stream.read_exact(&mut words).await?;
    Ok(words)
}

async fn write_frame(stream: &mut UnixStream, words: &[u8]) -> io::Result<()> {
    let length = u32::try_from(words.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), words].concat()).await
}
