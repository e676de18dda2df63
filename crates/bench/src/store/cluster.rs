//! The two that are compared: three processes of ours and three of Debian's etcd, each with its own folder on the same
//! disk, mutual TLS everywhere, and clients of both.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use nexus_env::{Endpoint, Env};
use nexus_store::etcd::EtcdEndpoint;
use nexus_store::etcd::grpc::Channel;
use nexus_store::etcd::proto::{Empty, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse};
use nexus_wire::{Client, ClientOptions};

use super::pki::Pki;
use super::server::{self, Info};
use crate::http;
use crate::process;

pub const MEMBERS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(120);

/// Whose cluster it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ours,
    Etcd,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "nexus",
            Self::Etcd => "etcd",
        }
    }
}

/// Members as processes.
pub struct Cluster {
    pub kind: Kind,
    dir: tempfile::TempDir,
    pki: Pki,
    env: Env,
    /// Of each member: clients' port, peers' port, port of etcd's metrics.
    ports: Vec<[u16; 3]>,
    children: Vec<Option<Child>>,
}

fn free_ports() -> anyhow::Result<[u16; 3]> {
    let listeners: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>().context("looking for free ports")?;
    let port = |i: usize| listeners[i].local_addr().map(|a| a.port());
    Ok([port(0)?, port(1)?, port(2)?])
}

impl Cluster {
    /// Starts all members but those in `without`, and waits until they lead and serve.
    pub async fn start(kind: Kind, without: &[usize]) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("nexus-bench-store-").tempdir().context("making a folder")?;
        let pki = Pki::make(dir.path())?;
        let ports = (0..MEMBERS).map(|_| free_ports()).collect::<anyhow::Result<_>>()?;
        let children = (0..MEMBERS).map(|_| None).collect();
        let mut cluster = Self { kind, dir, pki, env: Env::real(), ports, children };
        for member in (0..MEMBERS).filter(|m| !without.contains(m)) {
            cluster.boot(member)?;
        }
        cluster.wait_writable().await?;
        Ok(cluster)
    }

    pub fn boot(&mut self, member: usize) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("m{member}.log")))?;
        let data = self.dir.path().join(format!("m{member}"));
        let mut command = match self.kind {
            Kind::Ours => {
                let mut command = Command::new(std::env::current_exe()?);
                let members = (0..MEMBERS).map(|m| format!("{}=tcp:127.0.0.1:{}", m + 1, self.ports[m][0]));
                command.args(["store-server", &(member + 1).to_string()]).arg(&data).arg(self.pki.dir());
                command.arg(members.collect::<Vec<_>>().join(","));
                command
            }
            Kind::Etcd => self.etcd(member, &data),
        };
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        self.children[member] = Some(child.context("starting a member")?);
        Ok(())
    }

    fn etcd(&self, member: usize, data: &Path) -> Command {
        let [client, peer, metrics] = self.ports[member];
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let peers = (0..MEMBERS).map(|m| format!("m{m}={}", url(self.ports[m][1])));
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{member}")]).arg("--data-dir").arg(data);
        command.args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)]);
        command.args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)]);
        command.args(["--initial-cluster", &peers.collect::<Vec<_>>().join(",")]);
        command.args(["--listen-metrics-urls", &format!("http://127.0.0.1:{metrics}")]);
        command.args(["--logger", "zap", "--log-level", "error", "--quota-backend-bytes", "8589934592"]);
        command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(self.pki.ca());
        command.arg("--cert-file").arg(self.pki.cert()).arg("--key-file").arg(self.pki.key());
        command.arg("--peer-client-cert-auth").arg("--peer-trusted-ca-file").arg(self.pki.ca());
        command.arg("--peer-cert-file").arg(self.pki.cert()).arg("--peer-key-file").arg(self.pki.key());
        command
    }

    /// As `kill -9` does.
    pub fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.children[member].take() {
            child.kill().ok();
            child.wait().ok();
        }
    }

    pub fn pids(&self) -> BTreeSet<u32> {
        self.children.iter().flatten().map(Child::id).collect()
    }

    pub fn pid(&self, member: usize) -> Option<u32> {
        self.children[member].as_ref().map(Child::id)
    }

    /// A connection to a member.
    pub fn connect(&self, member: usize) -> anyhow::Result<Conn> {
        let at = Endpoint::Tcp(([127, 0, 0, 1], self.ports[member][0]).into());
        Ok(match self.kind {
            Kind::Ours => {
                let options = ClientOptions { backoff_max: Duration::from_millis(50), ..ClientOptions::default() };
                Conn::Ours(Client::new(&self.env, at, self.pki.client(nexus_wire::ALPN)?, options))
            }
            Kind::Etcd => {
                let endpoint = EtcdEndpoint { host: "localhost".into(), at };
                let tls = self.pki.client(b"h2")?;
                Conn::Etcd(Arc::new(Channel::new(self.env.clone(), vec![endpoint], Some(tls), None)))
            }
        })
    }

    /// Waits until a write goes through some member that runs.
    pub async fn wait_writable(&self) -> anyhow::Result<usize> {
        let running: Vec<usize> = (0..MEMBERS).filter(|m| self.children[*m].is_some()).collect();
        let conns = running.iter().map(|m| self.connect(*m)).collect::<anyhow::Result<Vec<_>>>()?;
        let begun = Instant::now();
        loop {
            for (member, conn) in running.iter().zip(&conns) {
                let put = [(Bytes::from_static(b"probe"), Bytes::from_static(b"x"))];
                if conn.put(&put, Duration::from_secs(1)).await.is_ok() {
                    return Ok(*member);
                }
            }
            if begun.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(self.dir.path().join("m0.log")).unwrap_or_default();
                bail!("{} does not come up: {log}", self.kind.name());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn info(&self, member: usize) -> anyhow::Result<Info> {
        let Conn::Ours(client) = self.connect(member)? else { bail!("only for ours") };
        Ok(client.call(server::INFO, &(), DEADLINE).await?)
    }

    /// The member that leads.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        for member in (0..MEMBERS).filter(|m| self.children[*m].is_some()) {
            let leads = match self.kind {
                Kind::Ours => self.info(member).await?.is_leader,
                Kind::Etcd => self.metric(member, "etcd_server_is_leader")? == 1.0,
            };
            if leads {
                return Ok(member);
            }
        }
        bail!("nobody leads")
    }

    fn metric(&self, member: usize, name: &str) -> anyhow::Result<f64> {
        let answer = http::Client::connect(self.ports[member][2], "localhost", None)?.get("/metrics")?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("etcd says nothing of {name}"))?.trim().parse()?)
    }

    /// How often all members have made files durable.
    pub async fn syncs(&self) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for member in (0..MEMBERS).filter(|m| self.children[*m].is_some()) {
            sum += match self.kind {
                Kind::Ours => self.info(member).await?.syncs as f64,
                // Its log, and its database, which it commits every 100 ms.
                Kind::Etcd => {
                    self.metric(member, "etcd_disk_wal_fsync_duration_seconds_count")?
                        + self.metric(member, "etcd_disk_backend_commit_duration_seconds_count")?
                }
            };
        }
        Ok(sum)
    }

    pub fn cpu_seconds(&self) -> f64 {
        process::cpu_seconds(&self.pids())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..MEMBERS).for_each(|m| self.kill(m));
    }
}

/// One connection.
#[derive(Clone)]
pub enum Conn {
    Ours(Client),
    Etcd(Arc<Channel>),
}

impl Conn {
    /// Commits all puts in one transaction.
    pub async fn put(&self, puts: &[(Bytes, Bytes)], deadline: Duration) -> anyhow::Result<()> {
        match self {
            Self::Ours(client) => {
                client.call_bytes(server::PUT, server::encode_puts(puts), deadline).await?;
            }
            Self::Etcd(channel) if puts.len() == 1 => {
                let (key, value) = puts[0].clone();
                let until = tokio::time::Instant::now() + deadline;
                let request = PutRequest { key, value, lease: 0 };
                let _: Empty = channel.call("/etcdserverpb.KV/Put", &request, until).await?;
            }
            Self::Etcd(channel) => {
                let success = puts.iter().map(|(k, v)| RequestOp::put(k.clone(), v.clone(), 0)).collect();
                let request = TxnRequest { success, ..TxnRequest::default() };
                let until = tokio::time::Instant::now() + deadline;
                let _: TxnResponse = channel.call("/etcdserverpb.KV/Txn", &request, until).await?;
            }
        }
        Ok(())
    }

    /// A linearizable read of one key; answers its value's length.
    pub async fn get(&self, key: Bytes) -> anyhow::Result<usize> {
        match self {
            Self::Ours(client) => Ok(client.call_bytes(server::GET, key, DEADLINE).await?.len()),
            Self::Etcd(channel) => {
                let request = RangeRequest { key, ..RangeRequest::default() };
                let until = tokio::time::Instant::now() + DEADLINE;
                let answer: RangeResponse = channel.call("/etcdserverpb.KV/Range", &request, until).await?;
                Ok(answer.kvs.first().map_or(0, |kv| kv.value.len()))
            }
        }
    }

    pub fn close(&self) {
        if let Self::Etcd(channel) = self {
            channel.close();
        }
    }
}
