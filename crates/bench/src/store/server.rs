//! `nexus-bench store-server`: a member of a replicated store in a process of its own, on the real disk, spoken to by
//! the southbound protocol. It does what a server of the cloud does with its store, and nothing else.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use nexus_env::{DirEntry, Disk, DiskLock, Endpoint, Env, File, RealDisk};
use nexus_store::embedded::{Config, EmbeddedStore, PeerRef, Peers};
use nexus_store::{
    GroupId, Op, PeerError, RangeRequest, Revision, Store as _, StoreError, Txn, WatchEvent, prefix_end,
};
use nexus_wire::{ClientOptions, Pool, Refusal, Server, ServerOptions};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::pki::Pki;

pub const PEER: &str = "bench.peer";
pub const PUT: &str = "bench.put";
pub const GET: &str = "bench.get";
pub const INFO: &str = "bench.info";
pub const WATCH: &str = "bench.watch";

/// What a member says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    pub is_leader: bool,
    pub revision: u64,
    pub keys: u64,
    pub watchers: u64,
    /// How often it made files durable.
    pub syncs: u64,
}

/// Keys and values of one transaction, as bytes: each with its length before it.
pub fn encode_puts(puts: &[(Bytes, Bytes)]) -> Bytes {
    let mut out = BytesMut::with_capacity(puts.iter().map(|(k, v)| 8 + k.len() + v.len()).sum());
    for part in puts.iter().flat_map(|(k, v)| [k, v]) {
        out.put_u32(part.len() as u32);
        out.put_slice(part);
    }
    out.freeze()
}

fn decode_puts(mut message: Bytes) -> Option<Vec<Op>> {
    let mut part = || {
        let length = message.try_get_u32().ok()? as usize;
        (length <= message.len()).then(|| message.split_to(length))
    };
    let mut ops = Vec::new();
    while let Some(key) = part() {
        ops.push(Op::Put { key, value: part()?, lease: None });
    }
    Some(ops)
}

struct Wires {
    pool: Pool,
}

#[async_trait]
impl Peers for Wires {
    async fn call(&self, to: &PeerRef, _group: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        let endpoint: Endpoint =
            to.endpoint.parse().map_err(|e| PeerError::Unreachable(format!("{}: {e}", to.endpoint)))?;
        let client = self.pool.get(&endpoint);
        client.call_bytes(PEER, message, Duration::from_secs(30)).await.map_err(|e| {
            let text = e.to_string();
            if e.may_have_run() { PeerError::Lost(text) } else { PeerError::Unreachable(text) }
        })
    }
}

/// The real disk, counting how often something was made durable.
struct CountingDisk {
    inner: RealDisk,
    syncs: Arc<AtomicU64>,
}

struct CountingFile {
    inner: Box<dyn File>,
    syncs: Arc<AtomicU64>,
}

impl File for CountingFile {
    fn append(&self, data: &[u8]) -> io::Result<()> {
        self.inner.append(data)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buf)
    }
    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.inner.sync()
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.inner.truncate(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
}

impl CountingDisk {
    fn counted(&self, inner: Box<dyn File>) -> Box<dyn File> {
        Box::new(CountingFile { inner, syncs: self.syncs.clone() })
    }
}

impl Disk for CountingDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(self.counted(self.inner.open(path)?))
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(self.counted(self.inner.create(path)?))
    }
    fn create_reserved(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(self.counted(self.inner.create_reserved(path, bytes)?))
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.inner.read(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.inner.list(dir)
    }
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.inner.create_dir_all(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.inner.sync_dir(dir)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }
    fn free_space(&self, path: &Path) -> io::Result<u64> {
        self.inner.free_space(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        self.inner.lock(path)
    }
}

fn refusal(error: StoreError) -> Refusal {
    Refusal::internal(error.to_string())
}

/// Runs until it is killed. `arguments`: node, data folder, certificates, and the members as `1=ADDRESS,2=…`.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    let [node, dir, certificates, members] = arguments else { anyhow::bail!("NODE DIR CERTIFICATES MEMBERS") };
    let node: u64 = node.parse().context("the node")?;
    let members: BTreeMap<u64, String> = members
        .split(',')
        .map(|m| {
            let (id, at) = m.split_once('=').context("a member is ID=ADDRESS")?;
            Ok((id.parse()?, at.to_owned()))
        })
        .collect::<anyhow::Result<_>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(node, dir.into(), Pki::open(Path::new(certificates)), members))
}

async fn serve(node: u64, dir: PathBuf, pki: Pki, members: BTreeMap<u64, String>) -> anyhow::Result<()> {
    let syncs = Arc::new(AtomicU64::new(0));
    let env = Env::real().with_disk(Arc::new(CountingDisk { inner: RealDisk, syncs: syncs.clone() }));
    let endpoint: Endpoint = members.get(&node).context("this node is no member")?.parse()?;
    let peers = Wires { pool: Pool::new(&env, pki.client(nexus_wire::ALPN)?, ClientOptions::default()) };
    let config = Config::new(node, GroupId::new("bench")?, dir, members);
    let store = Arc::new(EmbeddedStore::open(config, env.clone(), Arc::new(peers)).await?);
    let [peer, put, get, info, watch] = std::array::from_fn(|_| store.clone());
    Server::builder(&env, endpoint, pki.server(nexus_wire::ALPN)?)
        .options(ServerOptions { idle_timeout: Duration::from_secs(3_600), ..ServerOptions::default() })
        .authorize(|_, _| true)
        .unary_bytes(PEER, move |_, message| {
            let store = peer.clone();
            async move { Ok(store.handle(message).await) }
        })
        .unary_bytes(PUT, move |_, message| {
            let store = put.clone();
            async move {
                let ops = decode_puts(message).ok_or_else(|| Refusal::internal("a broken put"))?;
                let outcome = store.txn(Txn::new(Vec::new(), ops)).await.map_err(refusal)?;
                Ok(Bytes::copy_from_slice(&outcome.revision().0.to_be_bytes()))
            }
        })
        .unary_bytes(GET, move |_, key| {
            let store = get.clone();
            async move {
                let mut found = store.range(RangeRequest::get(key)).await.map_err(refusal)?;
                Ok(found.kvs.pop().map(|kv| kv.value).unwrap_or_default())
            }
        })
        .unary(INFO, move |_, ()| {
            let (store, syncs) = (info.clone(), syncs.clone());
            async move {
                let status = store.status().await;
                Ok(Info {
                    is_leader: status.is_leader,
                    revision: status.applied.0,
                    keys: status.keys,
                    watchers: status.watchers,
                    syncs: syncs.load(Ordering::Relaxed),
                })
            }
        })
        .stream(WATCH, move |_, (prefix, after): (Bytes, u64)| {
            let store = watch.clone();
            async move {
                let end = prefix_end(&prefix);
                let watch = store.watch(prefix, end, Revision(after)).await.map_err(refusal)?;
                Ok(futures::stream::unfold(watch, |mut watch| async move {
                    loop {
                        let batch = match watch.next().await? {
                            Ok(batch) if batch.events.is_empty() => continue,
                            Ok(batch) => batch,
                            Err(e) => return Some((Err(Refusal::internal(e.to_string())), watch)),
                        };
                        let values = batch.events.into_iter().filter_map(|event| match event {
                            WatchEvent::Put { kv, .. } => Some(kv.value),
                            WatchEvent::Delete { .. } => None,
                        });
                        return Some((Ok((batch.revision.0, values.collect::<Vec<Bytes>>())), watch));
                    }
                }))
            }
        })
        .serve(CancellationToken::new())
        .await?;
    Ok(())
}
