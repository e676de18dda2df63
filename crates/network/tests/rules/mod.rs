//! What the rules of tenants' networks let through, on hosts that are namespaces: written for the kernel, traced, and tried.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;

use nexus_model::Uid;
use nexus_model::plan::{HostNetworks, NetworkPlan, NicPlan};
use nexus_network::vpc::{Engine, counters};

use super::*;

mod answers;
mod groups;
mod health;
mod hostile;
mod model;
mod outside;
mod plans;
mod relays;
mod text;

/// For what must not be reached: a refusal that is silent.
const BRIEFLY: Duration = Duration::from_millis(800);

/// Two hosts with engines, and the instances of all NICs.
struct Site {
    world: World,
    engines: Vec<Engine>,
    networks: Vec<Arc<NetworkPlan>>,
    instances: u8,
    closed: Vec<nexus_network::firewall::Net>,
}

impl Site {
    async fn new(hosts: u8) -> Self {
        let world = world(hosts).await;
        let engine = |n: usize| {
            let dir = world._dir.path().join(format!("vpc-{n}"));
            Engine::new(dir, world.nets[n].clone(), world.hosts[n].netns.clone())
        };
        let engines = (0..usize::from(hosts)).map(engine).collect();
        Self { engines, world, networks: Vec::new(), instances: 0, closed: nexus_network::firewall::never() }
    }

    fn told(&self, host: usize) -> Arc<HostNetworks> {
        let mut networks = self.networks.clone();
        networks.sort_by_key(|n| n.uid);
        Arc::new(plans::on_host(host as u8, self.world.hosts.len() as u8, &networks))
    }

    /// Brings all hosts to these networks, with a namespace for each NIC's instance.
    async fn apply(&mut self, networks: Vec<NetworkPlan>) {
        for nic in networks.iter().flat_map(|n| &n.nics) {
            let at = nic.at.as_ref().unwrap();
            let host = self.world.hosts.iter().position(|h| at.host == h.host.as_str()).unwrap();
            let net = &self.world.nets[host];
            let name = at.instance.to_string();
            if !net.path(&name).exists() {
                self.instances += 1;
                net.create(&name, instance(&self.world.hosts[host], 1 + self.instances)).await.unwrap();
            }
        }
        self.networks = networks.into_iter().map(Arc::new).collect();
        for host in 0..self.engines.len() {
            let applied = self.engines[host].apply(self.told(host), self.closed.clone()).await.unwrap();
            let well = applied.troubles.is_empty() && applied.networks.is_empty() && applied.waiting.is_empty();
            assert!(well, "{applied:?}");
        }
    }

    async fn change(&mut self, change: impl FnOnce(&mut NetworkPlan)) {
        let mut networks: Vec<NetworkPlan> = self.networks.iter().map(|n| NetworkPlan::clone(n)).collect();
        change(&mut networks[0]);
        self.apply(networks).await;
    }

    /// The namespace of a NIC's instance.
    fn of(&self, nic: &NicPlan) -> NetnsRef {
        let at = nic.at.as_ref().unwrap();
        let host = self.world.hosts.iter().position(|h| at.host == h.host.as_str()).unwrap();
        NetnsRef::Path(self.world.nets[host].path(&at.instance.to_string()))
    }

    /// That of the n-th NIC of the first network.
    fn nic(&self, n: usize) -> NetnsRef {
        self.of(&self.networks[0].nics[n])
    }

    fn inside_network(&self, host: usize, network: Uid) -> NetnsRef {
        NetnsRef::Path(self.engines[host].namespace(network))
    }

    /// What was dropped for a reason in the first network's namespace of a host.
    fn dropped(&self, host: usize, reason: &str) -> u64 {
        let json = firewall::run(&self.inside_network(host, self.networks[0].uid), "nft -j list counters");
        counters::parse(&json).iter().filter(|c| c.reason == reason).map(|c| c.packets).sum()
    }
}

/// Whether a connection to a listener in `to` comes about.
fn connects(from: &NetnsRef, to: &NetnsRef, at: SocketAddr, patience: Duration) -> bool {
    serves(from, to, at, at, patience).is_some()
}

/// The address that a listener on `at` in `to` sees when `from` connects to `called`.
fn serves(from: &NetnsRef, to: &NetnsRef, called: SocketAddr, at: SocketAddr, patience: Duration) -> Option<IpAddr> {
    let listener = inside(to, move || TcpListener::bind(at).unwrap());
    let end = Instant::now() + patience;
    loop {
        let asked = inside(from, move || TcpStream::connect_timeout(&called, patience.min(Duration::from_secs(1))));
        if asked.is_ok() {
            listener.set_nonblocking(true).unwrap();
            return listener.accept().ok().map(|(_, from)| from.ip());
        }
        if Instant::now() > end {
            return None;
        }
    }
}

/// Whether a datagram arrives at a socket in `to`.
fn hears(from: &NetnsRef, to: &NetnsRef, at: SocketAddr, patience: Duration) -> bool {
    let socket = inside(to, move || UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(patience)).unwrap();
    inside(from, move || {
        let any: SocketAddr = if at.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }.parse().unwrap();
        let _ = UdpSocket::bind(any).unwrap().send_to(b"hello", at);
    });
    socket.recv(&mut [0; 9]).is_ok()
}

fn pings(from: &NetnsRef, to: IpAddr) -> bool {
    let kind = if to.is_ipv6() { "-6" } else { "-4" };
    inside(from, move || {
        let mut command = Command::new("busybox");
        command.args(["ping", kind, "-c", "1", "-W", "1", &to.to_string()]);
        command.output().unwrap().status.success()
    })
}
