//! Connections on behalf of functions, whose executor has no network: each is opened in the instance's own namespace, so that
//! addresses, routes, security groups, the project's egress, NAT, counters and flow logs are those of a container there.
//!
//! ```text
//! name ─▶ the host's resolver, asked as the instance ─▶ addresses ─▶ connect in its namespace ─(silence, failure)─▶ why not
//! ```
//!
//! The kernel decides what passes. What it drops would only be silence to the function, so a connection that does not stand soon is
//! held against the project's egress where the instance has no NIC, and against the network's own rules where it has.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream as StdTcp};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nexus_compute::{Connections, NoConnection, NoConnectionKind};
use nexus_model::Uid;
use nexus_model::plan::{HostPlan, InstancePlan, RuleProtocol, TraceRequest, TraceVerdict, TracedPacket};
use nexus_network::names::lookup::LookupError;
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::InstancePlug;
use crate::fabric::Fabric;
use crate::networks::Networks;

/// Addresses that are tried.
const TRIED: usize = 8;
/// How long an address may be silent before the next is tried beside it (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// Opens connections for this host's instances.
pub(crate) struct Connector {
    pub plans: watch::Receiver<Option<Arc<HostPlan>>>,
    pub net: Arc<dyn InstancePlug>,
    pub fabric: Option<Fabric>,
    pub networks: Option<Networks>,
}

fn no(kind: NoConnectionKind, why: impl Into<String>) -> NoConnection {
    NoConnection::of(kind, why.into())
}

#[async_trait]
impl Connections for Connector {
    async fn connect(&self, instance: Uid, host: &str, port: u16) -> Result<OwnedFd, NoConnection> {
        let plan = self.plan(instance).ok_or_else(|| no(NoConnectionKind::Busy, "the instance is not of this host"))?;
        if let Some(networks) = self.networks.as_ref().filter(|_| !plan.nics.is_empty()) {
            networks.plugged(instance, &plan.nics).await.map_err(|why| no(NoConnectionKind::Busy, why))?;
        }
        let addresses = match host.parse::<IpAddr>() {
            Ok(address) => vec![address],
            Err(_) => self.lookup(&plan, host).await?,
        };
        // An IPv4 address in the clothes of IPv6 is one of IPv4, to the kernel too.
        let addresses = sorted(addresses.into_iter().map(|a| a.to_canonical()).collect());
        // The kernel decides; why it lets nothing through is found out only when it doesn't.
        let silent = async {
            tokio::time::sleep(STAGGER).await;
            self.refused(&plan, &addresses, port).await
        };
        let ended = tokio::select! {
            biased;
            ended = self.race(instance, addresses.clone(), port) => ended,
            Some(why) = silent => return Err(no(NoConnectionKind::Prohibited, why)),
        };
        match ended {
            Ok(socket) => Ok(socket),
            Err(error) => match self.refused(&plan, &addresses, port).await {
                Some(why) => Err(no(NoConnectionKind::Prohibited, why)),
                None => Err(error),
            },
        }
    }

    async fn roots(&self) -> std::io::Result<Vec<Vec<u8>>> {
        let loaded = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await;
        let loaded = loaded.map_err(std::io::Error::other)?;
        if loaded.certs.is_empty() {
            let first = loaded.errors.first().map_or("there are none".to_owned(), ToString::to_string);
            return Err(std::io::Error::other(first));
        }
        Ok(loaded.certs.iter().map(|certificate| certificate.to_vec()).collect())
    }
}

impl Connector {
    fn plan(&self, instance: Uid) -> Option<InstancePlan> {
        let plan = self.plans.borrow().clone()?;
        plan.instances.iter().find(|i| i.uid == instance && !i.kept).cloned()
    }

    async fn lookup(&self, plan: &InstancePlan, host: &str) -> Result<Vec<IpAddr>, NoConnection> {
        let Some(fabric) = &self.fabric else {
            return Err(no(NoConnectionKind::Busy, "this host answers no names"));
        };
        fabric.lookup(plan, host).await.map_err(|error| {
            let kind = match error {
                LookupError::NoName | LookupError::NoAddress => NoConnectionKind::NoName,
                LookupError::Refused => NoConnectionKind::Prohibited,
                LookupError::Unanswered => NoConnectionKind::Busy,
            };
            no(kind, error.to_string())
        })
    }

    /// Why the instance may reach none of the addresses, if that is known.
    async fn refused(&self, plan: &InstancePlan, addresses: &[IpAddr], port: u16) -> Option<String> {
        let mut first = None;
        for address in addresses.iter().take(TRIED) {
            first = first.or(Some(self.may_reach(plan, *address, port).await.err()?));
        }
        first
    }

    /// Why the instance may not reach an address, if that is known.
    async fn may_reach(&self, plan: &InstancePlan, to: IpAddr, port: u16) -> Result<(), String> {
        // Its own, and nobody else's.
        if to.is_loopback() {
            return Ok(());
        }
        if let (Some(networks), [nic]) = (&self.networks, &plan.nics[..]) {
            let packet = TracedPacket { to, protocol: RuleProtocol::Tcp, port };
            let traced = networks.trace(&TraceRequest { nic: *nic, packet, probe: false }).await;
            return match traced {
                Ok(trace) if trace.verdict == TraceVerdict::Dropped => {
                    let why =
                        trace.hops.last().map_or("it is dropped".to_owned(), |hop| format!("{}: {}", hop.at, hop.what));
                    Err(format!("{to} is not reached: {why}"))
                }
                _ => Ok(()),
            };
        }
        let open = plan.nics.len() > 1 || self.fabric.as_ref().is_none_or(|f| f.may_reach(&plan.project, to));
        let project = &plan.project;
        let why =
            || format!("{to} is not reached: it is no instance of project {project}, nor in what its egress allows");
        if open { Ok(()) } else { Err(why()) }
    }

    /// The first connection that stands, of tries that begin one after the other.
    async fn race(&self, instance: Uid, addresses: Vec<IpAddr>, port: u16) -> Result<OwnedFd, NoConnection> {
        let mut tries = JoinSet::new();
        let mut left = addresses.into_iter().take(TRIED);
        let mut last = no(NoConnectionKind::NoName, "the name leads to no address");
        loop {
            let next = left.next();
            if let Some(address) = next {
                let (net, to) = (self.net.clone(), SocketAddr::new(address, port));
                tries.spawn(async move { one(&*net, instance, to).await });
            }
            let more = left.len() > 0;
            loop {
                tokio::select! {
                    biased;
                    Some(ended) = tries.join_next() => match ended {
                        Ok(Ok(socket)) => return Ok(socket),
                        Ok(Err(why)) => last = why,
                        Err(error) => last = no(NoConnectionKind::Busy, error.to_string()),
                    },
                    () = tokio::time::sleep(STAGGER), if more => break,
                    else => return Err(last),
                }
                if more {
                    break;
                }
            }
        }
    }
}

async fn one(net: &dyn InstancePlug, instance: Uid, to: SocketAddr) -> Result<OwnedFd, NoConnection> {
    let busy = |e: String| no(NoConnectionKind::Busy, format!("connecting to {to}: {e}"));
    let socket = net.socket(instance, to.is_ipv6()).await.map_err(|e| busy(e.to_string()))?;
    let socket = TcpSocket::from_std_stream(StdTcp::from(socket));
    let stream = socket.connect(to).await.map_err(|e| {
        let kind = match e.kind() {
            std::io::ErrorKind::ConnectionRefused => NoConnectionKind::Refused,
            std::io::ErrorKind::TimedOut => NoConnectionKind::Timeout,
            _ => NoConnectionKind::Unreachable,
        };
        no(kind, format!("connecting to {to}: {e}"))
    })?;
    Ok(stream.into_std().map_err(|e| busy(e.to_string()))?.into())
}

/// Those of the cloud first, by IPv6; of the outside, IPv4 first: an instance's own IPv6 address is a local one, and what is local does
/// not speak for itself there (RFC 6724, section 6, rule 5).
fn sorted(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let rank = |address: &IpAddr| match address {
        IpAddr::V6(six) if is_local(six) => 0,
        IpAddr::V4(_) => 1,
        IpAddr::V6(_) => 2,
    };
    addresses.sort_by_key(rank);
    addresses
}

fn is_local(address: &Ipv6Addr) -> bool {
    address.is_unique_local() || address.is_unicast_link_local() || address.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clouds_own_addresses_come_first_and_ipv4_before_the_worlds_ipv6() {
        let of = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = vec![of("2001:db8::1"), of("192.0.2.1"), of("fd00::1")];
        assert_eq!(sorted(all), [of("fd00::1"), of("192.0.2.1"), of("2001:db8::1")]);
    }
}
