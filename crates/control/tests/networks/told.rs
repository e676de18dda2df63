//! What a host that listens is told, by a server whose view follows a real store.

use std::sync::{Arc, Mutex};

use futures::StreamExt as _;
use nexus_control::region::{Config, Region};
use nexus_control::view::View;
use nexus_model::plan::{HostReport, HostVersions, Listener};
use nexus_store::embedded::EmbeddedStore;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::common::net::{End, LONG, Net, Running, env, submit};
use super::*;

/// A host that applies what it is told and says so.
struct Host {
    region: Arc<Region>,
    running: Running,
    name: Name,
    spec: HostSpec,
    told: watch::Receiver<Arc<HostVersions>>,
}

impl Host {
    async fn report(&self) {
        let applied = *self.running.view.revision().borrow();
        let runs: Vec<Object<Instance>> = self
            .running
            .view
            .read(|w| w.instances_on(&self.name).filter(|i| i.metadata.deleting.is_none()).cloned().collect());
        let report = common::report(&self.name, self.spec.clone(), applied, &runs);
        let report = HostReport { networks: Some(self.told.borrow().revision), ..report };
        self.region.report(report).await.unwrap();
    }

    /// Reports until it has been told as asked.
    async fn until(&mut self, what: &str, told: impl Fn(&HostNetworks) -> bool) {
        let end = tokio::time::Instant::now() + LONG;
        loop {
            self.report().await;
            if told(&self.told.borrow_and_update()) {
                return;
            }
            timeout(Duration::from_millis(100), self.told.changed()).await.ok();
            assert!(tokio::time::Instant::now() < end, "not told in time: {what}: {:?}", self.told.borrow());
        }
    }

    /// Reports until the view is as asked.
    async fn shown(&self, what: &str, f: impl Fn(&World) -> bool) {
        let end = tokio::time::Instant::now() + LONG;
        while !self.running.view.read(&f) {
            self.report().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(tokio::time::Instant::now() < end, "not shown in time: {what}");
        }
    }

    async fn create<K: Kind>(&self, object: &str, spec: K::Spec) {
        submit(&self.region, create::<K>(Some("default"), object, spec)).await.unwrap();
    }

    async fn delete<K: Kind>(&self, object: &str) {
        submit(&self.region, intent(K::PLURAL, Some("default"), object, Change::Delete)).await.unwrap();
    }
}

/// A region with one host, led by its only server.
async fn region() -> (Host, Arc<EmbeddedStore>) {
    let net = Arc::new(Net::default());
    let (env, end) = (env(1), End::new(1, &net));
    let store = end.open(&env, "local", &[1]).await;
    net.stores.lock().unwrap().insert(1, Arc::downgrade(&store));
    let (zones, cells) = (vec![name("zone-a")], Vec::new());
    let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells };
    let config = Config { node: 1, server: "server-1".into(), bootstrap, fleet: None };
    let region = Arc::new(Region::new(config, env, store.clone(), end));
    net.writers.lock().unwrap().insert(1, Arc::downgrade(&region));
    let mut running = Running::new(View::new("localhost"));
    running.writer(&region);
    running.follow(store.clone());
    submit(&region, create::<Image>(Some("default"), "web", image("web"))).await.unwrap();
    let capacity = Capacity { cpu: MilliCpu(64_000), memory: Bytes(64 << 30), scratch: Bytes(64 << 30), instances: 99 };
    let spec = common::host("zone-a", ANY_CELL, 1, capacity);
    let told = running.view.networks(&name("zone-a-1"));
    (Host { region, running, name: name("zone-a-1"), spec, told }, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_told_of_its_networks_and_that_they_are_gone() {
    let (mut host, store) = region().await;
    host.create::<Network>("shop", Network::example()).await;
    host.create::<Subnet>("web", Subnet::example()).await;
    let nics = serde_json::from_value(json!([{"subnet": "web"}])).unwrap();
    host.create::<App>("front", AppSpec { nics, ..web(2) }).await;
    host.until("two NICs that are here", |told| {
        let here = told.networks.iter().flat_map(|n| &n.nics);
        here.filter(|nic| nic.at.as_ref().is_some_and(|at| at.host == *"zone-a-1")).count() == 2
    })
    .await;
    assert_eq!(host.told.borrow().endpoint, host.spec.address.ip());
    // A rule of a group that is new is told although no NIC changes.
    host.create::<SecurityGroup>("web", SecurityGroup::example()).await;
    host.until("a group", |told| told.networks[0].groups.len() == 2).await;
    host.delete::<SecurityGroup>("web").await;
    host.delete::<App>("front").await;
    host.until("nothing", |told| told.networks.is_empty()).await;
    host.shown("no NIC", |w| w.nics.all().count() == 0).await;
    host.delete::<Subnet>("web").await;
    // Its message stays the same, yet it is told again, or it could not say that it knows.
    let before = host.told.borrow().revision;
    host.delete::<Network>("shop").await;
    host.until("a newer revision", |told| told.revision > before && told.networks.is_empty()).await;
    host.shown("no network", |w| w.networks.all().count() == 0).await;
    host.running.end().await;
    store.shutdown().await;
}

/// What an agent has made of its messages, how many those were, and in how many of them a network came anew.
#[derive(Default)]
struct Heard {
    listener: Option<Listener>,
    messages: u32,
    anew: u32,
}

fn hear(view: &View, mut listener: Listener) -> (Arc<Mutex<Heard>>, JoinHandle<()>) {
    let request = listener.request();
    let heard = Arc::new(Mutex::new(Heard { listener: Some(listener), ..Heard::default() }));
    let (stream, into) = (view.tell_networks(request), heard.clone());
    let task = tokio::spawn(async move {
        let mut stream = Box::pin(stream);
        while let Some(message) = stream.next().await {
            let mut heard = into.lock().unwrap();
            heard.messages += 1;
            let changes = message.news.iter().flat_map(|news| &news.changes);
            heard.anew += u32::from(changes.clone().any(|c| c.anew));
            heard.listener.as_mut().unwrap().take(message).unwrap();
        }
    });
    (heard, task)
}

impl Host {
    /// Reports until what was heard is what the view has.
    async fn heard(&self, view: &View, heard: &Mutex<Heard>, what: &str) {
        let end = tokio::time::Instant::now() + LONG;
        loop {
            self.report().await;
            let told = view.networks(&self.name);
            let same = |h: &Heard| h.listener.as_ref()?.held().map(|held| held.networks == told.borrow().networks);
            if same(&heard.lock().unwrap()) == Some(true) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(tokio::time::Instant::now() < end, "not heard in time: {what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_is_told_in_a_few_changes_and_another_server_goes_on_with_them() {
    let (mut host, store) = region().await;
    host.create::<Network>("shop", Network::example()).await;
    host.create::<Subnet>("web", Subnet::example()).await;
    let nics: Vec<TemplateNic> = serde_json::from_value(json!([{"subnet": "web"}])).unwrap();
    let count = |told: &HostNetworks| told.networks.iter().map(|n| n.nics.len()).sum::<usize>();
    host.create::<App>("first", AppSpec { nics: nics.clone(), ..web(70) }).await;
    host.until("70 NICs", |told| count(told) == 70).await;
    let (heard, task) = hear(&host.running.view, Listener::new(host.name.clone(), None));
    host.heard(&host.running.view, &heard, "the whole").await;
    let (begun, before) = (tokio::time::Instant::now(), heard.lock().unwrap().messages);
    host.create::<App>("many", AppSpec { nics, ..web(20) }).await;
    host.until("90 NICs", |told| count(told) == 90).await;
    host.heard(&host.running.view, &heard, "90 NICs").await;
    {
        let heard = heard.lock().unwrap();
        let most = u32::try_from(begun.elapsed().as_millis() / 50).unwrap() + 2;
        let messages = heard.messages - before;
        assert!(messages <= most, "{messages} messages, when {most} may be sent in that time");
        assert_eq!(heard.anew, 1, "only the first tells of everything");
    }
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    let listener = heard.lock().unwrap().listener.take().unwrap();

    // A server that has just begun knows that the agent holds what is to be held, and tells what changes from there.
    let mut second = Running::new(View::new("localhost"));
    second.follow(store.clone());
    let revision = *host.running.view.revision().borrow();
    second.view.revision().wait_for(|now| *now >= revision).await.unwrap();
    let (heard, task) = hear(&second.view, listener);
    host.create::<SecurityGroup>("web", SecurityGroup::example()).await;
    host.until("a group", |told| told.networks[0].groups.len() == 2).await;
    second.shows("a group", |w| w.security_groups.all().count() == 1).await;
    host.heard(&second.view, &heard, "a group").await;
    assert_eq!(heard.lock().unwrap().anew, 0);
    task.abort();
    second.end().await;
    host.running.end().await;
    store.shutdown().await;
}
