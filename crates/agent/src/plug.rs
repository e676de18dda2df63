//! Instances' networks and tenants' by `nexus-network`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use nexus_model::Uid;
use nexus_model::plan::{CaptureRequest, HostNetworks, Trace, TracedPacket};
use nexus_network::firewall::{Firewall, Net};
use nexus_network::vpc::capture::{Capture, Filter};
use nexus_network::vpc::flows::{self, Flow};
use nexus_network::vpc::{Difference, Engine, answer, drops, health, links, probe, verdict};
use nexus_network::{InstanceAddress, InstanceNet, NetnsRef};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::Relays;
use crate::config::{Asked, Drops, Found, InstancePlug, NetworkEngine, PlugError, Plugged, ProbeOf};

#[async_trait]
impl InstancePlug for InstanceNet {
    async fn plug(&self, uid: Uid, address6: Ipv6Addr, address4: Ipv4Addr) -> Result<PathBuf, PlugError> {
        let address = InstanceAddress { address6, address4 };
        self.create(&uid.to_string(), address).await.map_err(|e| PlugError(e.to_string()))
    }

    async fn unplug(&self, uid: Uid) -> Result<(), PlugError> {
        self.delete(&uid.to_string()).await.map_err(|e| PlugError(e.to_string()))
    }

    async fn socket(&self, uid: Uid, ipv6: bool) -> Result<OwnedFd, PlugError> {
        InstanceNet::socket(self, &uid.to_string(), ipv6).await.map_err(failed)
    }

    async fn plugged(&self) -> Result<Vec<Uid>, PlugError> {
        let names = self.list().await.map_err(|e| PlugError(e.to_string()))?;
        Ok(names.iter().filter_map(|n| n.parse().ok()).collect())
    }
}

const TRACES: usize = 2;

/// Tenants' networks of the host that this process runs on.
pub struct HostNetworksEngine {
    engine: Engine,
    instances: InstanceNet,
    relays: Relays,
    /// Packets that are followed at once: each looks at all of its network's rules.
    tracing: Arc<Semaphore>,
}

impl HostNetworksEngine {
    /// The files of networks' namespaces go into `dir`. `uplink_rate` is what the host's link to others sends, in bits a second,
    /// if control is to go before tenants there.
    pub fn new(dir: PathBuf, instances: InstanceNet, uplink_rate: Option<u64>, relays: Relays) -> Self {
        let engine = Engine::with_uplink(dir, instances.clone(), NetnsRef::Own, uplink_rate);
        Self { engine, instances, relays, tracing: Arc::new(Semaphore::new(TRACES)) }
    }

    /// All that is closed, with what the host itself is on.
    async fn closed(&self, told: &[Net]) -> Result<Vec<Net>, PlugError> {
        Firewall::own().closed(told.to_vec()).await.map_err(failed)
    }
}

fn failed(error: nexus_network::NetError) -> PlugError {
    PlugError(error.to_string())
}

#[async_trait]
impl NetworkEngine for HostNetworksEngine {
    async fn apply(&self, wanted: Arc<HostNetworks>, closed: Arc<Vec<Net>>) -> Result<Plugged, PlugError> {
        let done = self.engine.apply(wanted, self.closed(&closed).await?).await.map_err(failed)?;
        Ok(Plugged { plugged: done.plugged, troubles: done.troubles, networks: done.networks })
    }

    async fn check(&self, wanted: Arc<HostNetworks>, closed: Arc<Vec<Net>>) -> Result<Vec<Difference>, PlugError> {
        let relays = self.relays.differences(&wanted);
        let mut all = self.engine.check(wanted, self.closed(&closed).await?).await.map_err(failed)?;
        all.extend(relays.into_iter().map(|what| Difference { what, mends: true }));
        Ok(all)
    }

    async fn remove(&self) -> Result<(), PlugError> {
        self.engine.remove().await.map_err(failed)
    }

    async fn drops(&self, wanted: Arc<HostNetworks>) -> Result<Drops, PlugError> {
        let mut out = Vec::new();
        for network in &wanted.networks {
            let netns = NetnsRef::Path(self.engine.namespace(network.uid));
            let counted = drops::drops(netns).await.map_err(failed)?;
            out.extend(counted.into_iter().map(|c| (Some(network.uid), c.reason, c.packets)));
        }
        let of_host = drops::host_drops(NetnsRef::Own).await.map_err(failed)?;
        out.extend(of_host.into_iter().map(|c| (None, c.reason, c.packets)));
        Ok(out)
    }

    async fn trace(
        &self,
        by: Arc<HostNetworks>,
        closed: Arc<Vec<Net>>,
        nic: Uid,
        packet: TracedPacket,
    ) -> Result<Trace, PlugError> {
        let turn = self.tracing.clone().acquire_owned().await.expect("never closed");
        let closed = self.closed(&closed).await?;
        let traced = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            verdict::trace_beyond(&by, &closed, nic, packet)
        });
        traced.await.map_err(|e| PlugError(e.to_string()))
    }

    async fn serve(&self, mut by: watch::Receiver<Option<Arc<HostNetworks>>>) {
        let (relayed, engine) = (by.clone(), self.engine.clone());
        let relaying = self.relays.run(relayed, move |network| engine.namespace(network));
        let answers = async {
            let Some(first) = by.wait_for(Option::is_some).await.ok().and_then(|by| by.clone()) else { return };
            let (sender, networks) = watch::channel(first);
            let engine = self.engine.clone();
            let follow = async {
                while by.changed().await.is_ok() {
                    if let Some(newer) = by.borrow_and_update().clone() {
                        sender.send_replace(newer);
                    }
                }
            };
            let answering = answer::run(networks, move |network| NetnsRef::Path(engine.namespace(network)));
            tokio::select! {
                biased;
                () = follow => {}
                () = answering => {}
            }
        };
        tokio::join!(relaying, answers);
    }

    async fn probe(&self, probe: ProbeOf) -> Result<Option<bool>, PlugError> {
        let netns = NetnsRef::Path(self.instances.path(&probe.instance.to_string()));
        probe::probe(netns, links::inside(probe.index), probe.from, probe.packet).await.map_err(failed)
    }

    async fn ask(&self, endpoint: IpAddr, targets: Vec<Asked>, found: mpsc::Sender<Found>) {
        let Some(network) = targets.first().map(|t| t.network) else { return };
        health::ask(NetnsRef::Path(self.engine.namespace(network)), endpoint, targets, found).await;
    }

    async fn capture(&self, network: Uid, request: &CaptureRequest) -> Result<Capture, PlugError> {
        let netns = NetnsRef::Path(self.engine.namespace(network));
        let filter = Filter { address: request.address, port: request.port };
        Capture::open(netns, &links::nic(request.nic), filter).await.map_err(failed)
    }

    async fn flows(&self, network: Uid, out: mpsc::Sender<Flow>, lost: Arc<AtomicU64>) -> Result<(), PlugError> {
        flows::follow(NetnsRef::Path(self.engine.namespace(network)), out, lost).await.map_err(failed)
    }
}
