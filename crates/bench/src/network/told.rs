//! What it takes to tell the hosts of a large network of one NIC's change: from the transaction until each agent holds it, in one
//! process, with the embedded store on the real disk and the view as a server runs it. Every message is encoded and decoded as the
//! wire does it, and the agent of one host follows it: the others would do so on machines of their own. Left out are HTTP/2 and
//! TLS, the writer, and what a host's kernel is told. Beside it, the same with agents of a release that takes only whole plans.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use nexus_control::view::View;
use nexus_env::Env;
use nexus_model::kind::*;
use nexus_model::plan::{Listener, Mac, NetworksMessage, NetworksRequest};
use nexus_model::{AnyObject, Metadata, Name, Object, Uid};
use nexus_store::embedded::{self, EmbeddedStore};
use nexus_store::{Op, Store, Txn};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::report::{Row, cpu_seconds, median};
use crate::scale::{Alone, name};

const HOSTS: usize = 50;
const SIZES: [usize; 2] = [4_000, MAX_NICS];
const ROUNDS: usize = 10;
/// Between changes, so that none is gathered with the one before.
const REST: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(120);

pub fn told() -> anyhow::Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for nics in SIZES {
        rows.extend(runtime.block_on(of_size(nics))?);
    }
    Ok(rows)
}

async fn of_size(nics: usize) -> anyhow::Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let members = BTreeMap::from([(1, "alone".to_owned())]);
    let config = embedded::Config::new(1, "local".parse().context("a group's name")?, dir.path(), members);
    let store = Arc::new(EmbeddedStore::open(config, Env::real(), Arc::new(Alone)).await?);
    for some in objects(nics).chunks(100) {
        let op = |object: &AnyObject| op(object);
        store.txn(Txn::new(Vec::new(), some.iter().map(op).collect::<anyhow::Result<_>>()?)).await?;
    }
    let (view, stop, mut tasks) = (View::new("localhost"), CancellationToken::new(), JoinSet::new());
    let (follows, contract, stopped) = (view.clone(), store.clone() as Arc<dyn Store>, stop.clone());
    tasks.spawn(async move { follows.follow(contract, stopped).await });
    view.revision().wait_for(|revision| *revision > 0).await?;
    let changes = one_nic(&view, &store, nics, true).await?;
    let wholes = one_nic(&view, &store, nics, false).await?;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    store.shutdown().await;
    let what = format!("one NIC of {nics} on {HOSTS} hosts");
    let row = |of: &str, unit, pick: fn(&Cost) -> f64| {
        Row::new(format!("{what}: {of}"), pick(&changes), unit).peer("whole plans", pick(&wholes))
    };
    Ok(vec![
        row("sent", "KB", |c| c.bytes / 1e3),
        row("until all hold it", "ms", |c| c.seconds * 1e3),
        row("processor time, with one agent's", "ms", |c| c.processor * 1e3),
    ])
}

/// Medians of what one change costs.
struct Cost {
    bytes: f64,
    seconds: f64,
    processor: f64,
}

async fn one_nic(view: &View, store: &EmbeddedStore, nics: usize, changes: bool) -> anyhow::Result<Cost> {
    let (out, mut heard) = mpsc::channel(10 * HOSTS);
    let mut agents = JoinSet::new();
    for host in 0..HOSTS {
        agents.spawn(agent(view.clone(), host, changes, out.clone()));
    }
    drop(out);
    let mut first = 0;
    all_at(&mut heard, &mut first, *view.revision().borrow()).await?;
    let (mut bytes, mut seconds, mut processor) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        tokio::time::sleep(REST).await;
        let mut nic = nic(nics / 2);
        nic.spec.rate = Some(1_000_000 + round as u64 + if changes { 0 } else { 1_000 });
        let (begun, before, mut sent) = (Instant::now(), cpu_seconds(), 0);
        let done = store.txn(Txn::new(Vec::new(), vec![op(&nic.to_any())?])).await?;
        all_at(&mut heard, &mut sent, done.revision().0).await?;
        seconds.push(begun.elapsed().as_secs_f64());
        processor.push(cpu_seconds() - before);
        bytes.push(sent as f64);
    }
    agents.shutdown().await;
    Ok(Cost { bytes: median(&bytes), seconds: median(&seconds), processor: median(&processor) })
}

/// Which host holds which revision now, and what that took on the wire.
type Heard = (Name, u64, usize);

/// Waits until each host holds what is of a revision.
async fn all_at(heard: &mut mpsc::Receiver<Heard>, bytes: &mut usize, revision: u64) -> anyhow::Result<()> {
    let mut at = BTreeMap::new();
    while at.len() < HOSTS {
        let Some((host, now, size)) =
            tokio::time::timeout(PATIENCE, heard.recv()).await.context("an agent's answer")?
        else {
            bail!("the agents ended")
        };
        *bytes += size;
        if now >= revision {
            at.insert(host, now);
        }
    }
    Ok(())
}

/// Hears what its host is told; the first follows it.
async fn agent(view: View, number: usize, changes: bool, out: mpsc::Sender<Heard>) {
    let host = host_name(number);
    let mut listener = Listener::new(host.clone(), None);
    let request = match changes {
        true => listener.request(),
        false => NetworksRequest { host: host.clone(), known: None, have: None },
    };
    let mut stream = Box::pin(view.tell_networks(request));
    let mut bytes = 0;
    while let Some(message) = stream.next().await {
        let text = rmp_serde::to_vec_named(&message).expect("messages are plain data");
        bytes += text.len();
        if number == 0 {
            let message: NetworksMessage = rmp_serde::from_slice(&text).expect("what was just written");
            listener.take(message).expect("it is right");
        }
        let whole = message.news.is_none_or(|news| !news.more);
        if whole && out.send((host.clone(), message.revision, std::mem::take(&mut bytes))).await.is_err() {
            return;
        }
    }
}

fn op(object: &AnyObject) -> anyhow::Result<Op> {
    let kind = nexus_model::kind::find(&object.kind).context("a kind")?;
    Ok(Op::put(nexus_model::key::of(kind, object), serde_json::to_vec(object)?))
}

fn uid(kind: u8, number: usize) -> Uid {
    let mut bytes = [kind; 16];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    Uid::from_random(bytes)
}

fn host_name(n: usize) -> Name {
    name(&format!("host-{n:03}"))
}

fn host(n: usize) -> Object<Host> {
    let spec = HostSpec {
        zone: name("zone-a"),
        cell: name(ANY_CELL),
        address: format!("10.96.0.{}:7440", n + 1).parse().expect("a well-formed address"),
        prefix6: format!("fd00:0:0:{n:x}::").parse().expect("a well-formed address"),
        prefix4: [10, 97, n as u8, 0].into(),
        ..HostSpec::default()
    };
    Object::new(Metadata { uid: uid(1, n), ..Metadata::new(host_name(n), None) }, spec)
}

fn of_project(kind: u8, n: usize, called: &str) -> Metadata {
    Metadata { uid: uid(kind, n), ..Metadata::new(name(called), Some(name("shop"))) }
}

fn nic(n: usize) -> Object<Nic> {
    let [_, b, c, d] = u32::try_from(n + 2).expect("few").to_be_bytes();
    let spec = NicSpec { subnet: name("web"), ..NicSpec::default() };
    let mut nic = Object::<Nic>::new(of_project(4, n, &format!("front-{n:06x}-nic0")), spec);
    nic.status.phase = NicPhase::Attached;
    nic.status.mac = Some(Mac([6, 0, 0, b, c, d]));
    nic.status.address4 = Some([10, b, c, d].into());
    nic.status.address6 = Some(Ipv6Addr::from((0xfd12_u128 << 112) | (n as u128 + 2)));
    nic.status.network = Some(NetworkRef { name: name("net"), uid: uid(2, 0) });
    nic.status.instance = Some(uid(5, n));
    nic.status.index = Some(0);
    nic.status.host = Some(host_name(n % HOSTS));
    nic
}

/// A network that all hosts have NICs of, with a subnet and a group.
fn objects(nics: usize) -> Vec<AnyObject> {
    let cidrs = ["10.0.0.0/8", "fd12::/48"].map(|c| c.parse().expect("a well-formed network"));
    let spec = NetworkSpec { cidrs: cidrs.to_vec(), ..NetworkSpec::default() };
    let mut network = Object::<Network>::new(of_project(2, 0, "net"), spec);
    network.status.vni = 7;
    let subnet = SubnetSpec { network: name("net"), cidr4: Some(cidrs[0]), ..SubnetSpec::default() };
    let subnet = Object::<Subnet>::new(of_project(3, 0, "web"), subnet);
    let fixed = (0..HOSTS).map(|n| host(n).to_any()).chain([network.to_any(), subnet.to_any()]);
    fixed.chain((0..nics).map(|n| nic(n).to_any())).collect()
}
