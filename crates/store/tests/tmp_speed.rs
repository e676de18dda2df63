
mod common;
use std::sync::Arc; use std::collections::BTreeMap; use std::time::Instant;
use common::contract::Handle; use nexus_store::{embedded::*, *}; use nexus_env::Env; use bytes::Bytes; use std::sync::Mutex;
#[derive(Default)] struct Net(Mutex<BTreeMap<u64, Arc<EmbeddedStore>>>);
#[async_trait::async_trait] impl Peers for Net { async fn call(&self, to: u64, _: &GroupId, m: Bytes) -> Result<Bytes, PeerError> {
  let n = self.0.lock().unwrap().get(&to).cloned().ok_or(PeerError::Unreachable("x".into()))?; Ok(n.handle(m).await) } }
fn cpu() -> f64 { let s = std::fs::read_to_string("/proc/self/stat").unwrap(); let f: Vec<&str> = s.rsplit(')').next().unwrap().split_whitespace().collect(); (f[11].parse::<f64>().unwrap()+f[12].parse::<f64>().unwrap())/100.0 }
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn speed() {
  let dir = tempfile::tempdir_in("/work").unwrap(); let net = Arc::new(Net::default());
  let members: BTreeMap<u64,String> = (1..=3).map(|n| (n, n.to_string())).collect();
  for n in 1..=3 { let c = Config::new(n, GroupId::new("g").unwrap(), dir.path().join(n.to_string()), members.clone());
    let s = EmbeddedStore::open(c, Env::real(), net.clone()).await.unwrap(); net.0.lock().unwrap().insert(n, Arc::new(s)); }
  let all: Vec<Arc<EmbeddedStore>> = net.0.lock().unwrap().values().cloned().collect();
  let l = loop { if let Some(l) = all.iter().find(|s| s.leadership().borrow().is_self) { break l.clone() } tokio::time::sleep(std::time::Duration::from_millis(20)).await; };
  let l: Handle = l;
  let mut lat = vec![]; for i in 0..200 { let t = Instant::now(); l.txn(Txn::put(format!("a{i}"), "v")).await.unwrap(); lat.push(t.elapsed()); } lat.sort();
  println!("SPEED lone p50 {:?} p99 {:?}", lat[100], lat[198]);
  let (t, c) = (Instant::now(), cpu());
  let ts: Vec<_> = (0..64).map(|w| { let l = l.clone(); tokio::spawn(async move { for i in 0..300 { l.txn(Txn::put(format!("b{w}/{i}"), vec![b'x'; 256])).await.unwrap(); } }) }).collect();
  for x in ts { x.await.unwrap(); }
  println!("SPEED 64 clients: {:.0} txn/s, {:.0} us cpu/txn (3 members)", 19200.0/t.elapsed().as_secs_f64(), (cpu()-c)/19200.0*1e6);
  let t = Instant::now(); for _ in 0..200 { l.range(RangeRequest::get("a1")).await.unwrap(); } println!("SPEED lone read {:?}", t.elapsed()/200);
  tokio::time::sleep(std::time::Duration::from_secs(7)).await; let c = cpu(); tokio::time::sleep(std::time::Duration::from_secs(20)).await;
  println!("SPEED idle: {:.2} % of a core for 3 members", (cpu()-c)/20.0*100.0);
  for s in all { s.shutdown().await; }
}
