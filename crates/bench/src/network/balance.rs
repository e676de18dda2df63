//! New connections a second through a load balancer, which is a few rules on the client's host, and through HAProxy in TCP mode in
//! an instance of the same network: on a host of its own, as one that serves clients of many hosts is, and on the client's host,
//! which is as near as it can be. The same clients and targets; each connection carries a byte to a target and one back.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nexus_model::plan::{BalancedProtocol, BalancerPlan, ListenerPlan, TargetPlan};
use nexus_network::NetnsRef;

use super::{ROUNDS, World, command, connect, inside, network, uid};
use crate::process::Owned;
use crate::report::{Row, median};

const LOAD: Duration = Duration::from_secs(3);
const CLIENTS: usize = 16;
const ANSWERERS: usize = 4;
const FRONT: u16 = 80;
const BACK: u16 = 8080;

pub async fn connections(world: &World) -> anyhow::Result<Vec<Row>> {
    let mut plan = network(3, 0)?;
    // The client and one HAProxy on one host, two targets on another, the other HAProxy on a third.
    let [client, near, first, second, apart] = [40_u16, 41, 42, 43, 44];
    let instances = [(0, client), (0, near), (1, first), (1, second), (2, apart)];
    plan.nics = instances.iter().map(|(host, n)| world.nic(*host, *n, *n)).collect::<anyhow::Result<_>>()?;
    let address = |n: u16| IpAddr::from(Ipv4Addr::new(10, 0, 0, n as u8));
    let target = |n: u16| TargetPlan { address: address(n), port: BACK, weight: 1, failing: false };
    let listener = ListenerPlan {
        port: FRONT,
        protocol: BalancedProtocol::Tcp,
        source_hash: false,
        targets: vec![target(first), target(second)],
        proxy_protocol: None,
        check: None,
    };
    plan.balancers =
        vec![BalancerPlan { uid: uid(6, 3), name: "front".parse()?, address: address(200), listeners: vec![listener] }];
    let mut places = Vec::new();
    for (host, n) in instances {
        places.push(world.instance(host, n).await?);
    }
    let engines = [0, 1, 2].map(|host| world.engine(host));
    for (host, engine) in engines.iter().enumerate() {
        let applied = engine.apply(world.told(host, std::slice::from_ref(&plan))?, Vec::new()).await?;
        let own = instances.iter().filter(|(at, _)| *at == host).count();
        ensure!(applied.plugged.len() == own && applied.networks.is_empty(), "{applied:?}");
    }
    for place in &places {
        // Connections come and go faster than ports would be free again otherwise.
        command(place, "sysctl -q -w net.ipv4.tcp_tw_reuse=1")?;
        inside(place, || std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535"))??;
    }
    let served = Arc::new(AtomicU64::new(0));
    for place in &places[2..4] {
        let listener = inside(place, || TcpListener::bind(("0.0.0.0", BACK)))??;
        for _ in 0..ANSWERERS {
            let (listener, served) = (listener.try_clone()?, served.clone());
            std::thread::spawn(move || answer(&listener, &served));
        }
    }
    let targets = [address(first), address(second)];
    let _apart = haproxy(world, &places[4], address(apart), targets)?;
    let _near = haproxy(world, &places[1], address(near), targets)?;
    let ways = [200, apart, near].map(|n| SocketAddr::new(address(n), FRONT));
    for way in ways {
        drop(connect(&places[0], way)?);
    }
    let mut rates = ways.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (way, rates) in ways.iter().zip(&mut rates) {
            let before = served.load(Ordering::Relaxed);
            let made = load(&places[0], *way)?;
            let by_targets = served.load(Ordering::Relaxed) - before;
            ensure!(by_targets as f64 >= made as f64 * 0.99, "{made} connections, of which {by_targets} at targets");
            rates.push(made as f64 / LOAD.as_secs_f64());
        }
    }
    let [ours, apart, near] = rates.map(|r| median(&r));
    for engine in &engines {
        engine.remove().await?;
    }
    let rows = [("HAProxy on a host of its own", apart), ("HAProxy on the client's host", near)];
    Ok(rows.map(|(peer, theirs)| Row::new("new connections through a balancer", ours, "1/s").peer(peer, theirs)).into())
}

fn answer(listener: &TcpListener, served: &AtomicU64) {
    while let Ok((mut stream, _)) = listener.accept() {
        let mut word = [0];
        if stream.read_exact(&mut word).is_ok() && stream.write_all(&word).is_ok() {
            served.fetch_add(1, Ordering::Relaxed);
            // Until the client has gone.
            let _ = stream.read(&mut word);
        }
    }
}

/// As its documentation begins: as many threads as there are processors, in turn.
fn haproxy(world: &World, place: &NetnsRef, own: IpAddr, targets: [IpAddr; 2]) -> anyhow::Result<Owned> {
    let [first, second] = targets;
    let file = world.dir.path().join(format!("haproxy-{own}.cfg"));
    let text = format!(
        "global
  maxconn 4000
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend front
  bind {own}:{FRONT}
  default_backend back
backend back
  balance roundrobin
  server first {first}:{BACK}
  server second {second}:{BACK}
"
    );
    std::fs::write(&file, text)?;
    let child = inside(place, move || Command::new("haproxy").arg("-db").arg("-f").arg(file).spawn())?;
    Ok(Owned(child.context("haproxy: `cargo xtask` installs it")?))
}

/// So many connections were made and answered.
fn load(client: &NetnsRef, to: SocketAddr) -> anyhow::Result<u64> {
    let (made, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let clients = || {
        let (made, end) = (made.clone(), end.clone());
        move || -> std::io::Result<()> {
            while !end.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                let mut word = [7];
                stream.write_all(&word)?;
                stream.read_exact(&mut word)?;
                made.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    };
    let threads: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (client, work) = (client.clone(), clients());
            std::thread::spawn(move || inside(&client, work))
        })
        .collect();
    let start = Instant::now();
    std::thread::sleep(LOAD.saturating_sub(start.elapsed()));
    let count = made.load(Ordering::Relaxed);
    end.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a client was lost"))??.context("a client")?;
    }
    Ok(count)
}
