//! Servers in one process, with real stores: the wire between them, whose ends can be cut off, and what runs on each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_control::intent::{Accepted, Intent, Passed, Writer};
use nexus_control::region::{Forward, ForwardError, Region};
use nexus_control::view::View;
use nexus_control::world::World;
use nexus_env::{Env, MemDisk};
use nexus_model::ApiError;
use nexus_store::embedded::{Config, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, PeerError, Store};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// No wait is longer; none that passes comes near.
pub const LONG: Duration = Duration::from_secs(60);

/// The wire between servers: calls go straight to whoever lives and is not cut off.
#[derive(Default)]
pub struct Net {
    pub stores: Mutex<BTreeMap<u64, Weak<EmbeddedStore>>>,
    pub writers: Mutex<BTreeMap<u64, Weak<Region>>>,
    pub cut: Mutex<BTreeSet<u64>>,
    /// Links that are down, the lower end first.
    pub severed: Mutex<BTreeSet<(u64, u64)>>,
    /// What is sent to these, or by them, is lost without a sign.
    pub silent: Mutex<BTreeSet<u64>>,
    /// What was handed to servers that were to pass it on.
    pub passed: Mutex<Vec<(u64, Passed)>>,
    /// The next answer that was passed back is lost.
    pub lose_one_answer: Mutex<bool>,
}

/// One server's end of it.
pub struct End {
    pub node: u64,
    pub net: Arc<Net>,
}

impl End {
    pub fn new(node: u64, net: &Arc<Net>) -> Arc<Self> {
        Arc::new(Self { node, net: net.clone() })
    }

    /// The end of a server that has no others.
    pub fn alone() -> Arc<Self> {
        Self::new(1, &Arc::default())
    }

    pub fn reach<T>(&self, to: u64, all: &Mutex<BTreeMap<u64, Weak<T>>>) -> Option<Arc<T>> {
        let cut = self.net.cut.lock().unwrap();
        let link = (self.node.min(to), self.node.max(to));
        let severed = self.net.severed.lock().unwrap().contains(&link);
        if self.node != to && (severed || cut.contains(&self.node) || cut.contains(&to)) {
            return None;
        }
        all.lock().unwrap().get(&to).and_then(Weak::upgrade)
    }

    async fn travel(&self, to: u64) {
        let lost = {
            let silent = self.net.silent.lock().unwrap();
            self.node != to && (silent.contains(&self.node) || silent.contains(&to))
        };
        if lost {
            std::future::pending::<()>().await;
        }
    }

    /// Opens this server's member of a group with these members, on an empty disk.
    pub async fn open(self: &Arc<Self>, env: &Env, group: &str, members: &[u64]) -> Arc<EmbeddedStore> {
        let members = members.iter().map(|n| (*n, format!("node-{n}"))).collect();
        let config = Config::new(self.node, group.parse().unwrap(), format!("/{group}"), members);
        Arc::new(EmbeddedStore::open(config, env.clone(), self.clone()).await.unwrap())
    }
}

pub fn env(node: u64) -> Env {
    Env::real().with_disk(Arc::new(MemDisk::new(node)))
}

#[async_trait]
impl Peers for End {
    async fn call(&self, to: &PeerRef, _: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        self.travel(to.node).await;
        let Some(store) = self.reach(to.node, &self.net.stores) else {
            return Err(PeerError::Unreachable(format!("{} is dead or cut off", to.node)));
        };
        let answer = store.handle(message).await;
        match self.reach(to.node, &self.net.stores) {
            Some(_) => Ok(answer),
            None => Err(PeerError::Lost("cut".into())),
        }
    }
}

#[async_trait]
impl Forward for End {
    async fn forward(&self, node: u64, intent: &Intent, _: Duration) -> Result<Accepted, ForwardError> {
        self.travel(node).await;
        let Some(writer) = self.reach(node, &self.net.writers) else {
            return Err(ForwardError::NotTaken(format!("{node} is dead or cut off")));
        };
        match writer.submit_here(intent.clone()).await {
            Some(Ok(accepted)) => Ok(accepted),
            Some(Err(error)) => Err(ForwardError::Answered(error)),
            None => Err(ForwardError::NotTaken("not the leader".into())),
        }
    }

    async fn pass(&self, via: u64, passed: &Passed, _: Duration) -> Result<Accepted, ForwardError> {
        self.travel(via).await;
        let Some(writer) = self.reach(via, &self.net.writers) else {
            return Err(ForwardError::NotTaken(format!("{via} is dead or cut off")));
        };
        self.net.passed.lock().unwrap().push((via, passed.clone()));
        let answer = writer.pass_on(passed.clone()).await;
        if std::mem::take(&mut *self.net.lose_one_answer.lock().unwrap()) {
            return Err(ForwardError::Unknown("the answer was lost".into()));
        }
        answer
    }
}

/// Sends an intent again until it was decided for good.
pub async fn submit(writer: &Region, intent: Intent) -> Result<Accepted, ApiError> {
    let deadline = Instant::now() + LONG;
    loop {
        match writer.submit(intent.clone()).await {
            Err(e) if e.code.is_retryable() && Instant::now() < deadline => {}
            decided => return decided,
        }
    }
}

/// Writers and a view that run.
pub struct Running {
    pub view: View,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Running {
    pub fn new(view: View) -> Self {
        Self { view, stop: CancellationToken::new(), tasks: JoinSet::new() }
    }

    pub fn writer(&mut self, writer: &Arc<Region>) {
        let (writer, stop) = (writer.clone(), self.stop.clone());
        self.tasks.spawn(async move { writer.run(stop).await });
    }

    pub fn follow(&mut self, store: Arc<dyn Store>) {
        let (view, stop) = (self.view.clone(), self.stop.clone());
        self.tasks.spawn(async move { view.follow(store, stop).await });
    }

    pub fn follow_global(&mut self, store: Arc<dyn Store>) {
        let (view, stop) = (self.view.clone(), self.stop.clone());
        self.tasks.spawn(async move { view.follow_global(store, stop).await });
    }

    /// Waits until the view is as asked.
    pub async fn shows(&self, what: &str, f: impl Fn(&World) -> bool) {
        let shown = timeout(LONG, async {
            while !self.view.read(&f) {
                sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(shown.await.is_ok(), "not shown in time: {what}");
    }

    pub async fn end(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }

    /// Ends at once, as a killed process does.
    pub async fn kill(mut self) {
        self.tasks.shutdown().await;
    }
}
