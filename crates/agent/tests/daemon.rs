//! The daemon against a fake runtime that outlives it, and servers that are real but for what they know.

#[path = "daemon/numa.rs"]
mod numa;
#[path = "daemon/parts.rs"]
mod parts;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nexus_agent::{
    AgentConfig, AgentHandle, Engines, FetchError, IdentityConfig, ImageFetcher, InstancePlug, PlugError, run,
};
use nexus_compute::keep::{Keep, KeepError, Kept, Spawn};
use nexus_compute::{ExecIo, IDENTITY_SOCKET, Observed, PartOf, Runtime, RuntimeError, Sandbox, Shared, State};
use nexus_env::{Endpoint, Env};
use nexus_model::kind::{self, HostSpec, ImageFormat, InstancePhase, Port, Protocol, Template};
use nexus_model::plan::{
    Desired, ExecRequest, HostPlan, HostReport, ImagePlan, InstancePlan, InstanceReport, LogsRequest, PLAN_VERSION,
    PlanRequest, ReportAck, channel, method,
};
use nexus_model::{Bytes, Digest, Name, Timestamp, Uid};
use nexus_wire::{Client, ClientOptions, Refusal, Server, ServerBook};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);

struct Pki {
    root: CertificateDer<'static>,
    /// The same in PEM.
    root_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        Self { root: root.der().clone(), root_pem: root.pem(), issuer: Issuer::new(params, key) }
    }

    fn leaf(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = ["nexus.internal", "127.0.0.1"].map(str::to_owned).to_vec();
        let cert = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        (vec![cert.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    fn roots(&self) -> Arc<rustls::RootCertStore> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        Arc::new(roots)
    }

    fn server(&self) -> Arc<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let callers = rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots(), provider.clone());
        let (chain, key) = self.leaf();
        let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_client_cert_verifier(callers.build().unwrap());
        let mut config = config.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![nexus_wire::ALPN.to_vec()];
        Arc::new(config)
    }

    fn client(&self) -> Arc<rustls::ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (chain, key) = self.leaf();
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_root_certificates(self.roots());
        let mut config = config.with_client_auth_cert(chain, key).unwrap();
        config.alpn_protocols = vec![nexus_wire::ALPN.to_vec()];
        Arc::new(config)
    }
}

/// A runtime whose instances are rows in a table: they outlive any daemon.
#[derive(Default)]
struct Fake {
    cpusets: Mutex<BTreeMap<Uid, Option<nexus_compute::CpuSet>>>,
    prepared: Mutex<BTreeSet<Digest>>,
    rows: Mutex<BTreeMap<Uid, Observed>>,
    starts: Mutex<Vec<(Uid, u64, Instant)>>,
    /// Instances whose identity was served when they were started.
    identified: Mutex<BTreeSet<Uid>>,
    stops: Mutex<Vec<Uid>>,
    refuse: Mutex<BTreeSet<Uid>>,
    /// The ids of shared folders.
    shares: Mutex<BTreeMap<Uid, String>>,
    changed: Notify,
}

impl Fake {
    fn starts_of(&self, uid: Uid) -> Vec<u64> {
        self.starts.lock().unwrap().iter().filter(|s| s.0 == uid).map(|s| s.1).collect()
    }

    fn exit(&self, uid: Uid, code: i32) {
        let at = Timestamp::from_millis(1);
        if let Some(row) = self.rows.lock().unwrap().get_mut(&uid) {
            row.state = State::Exited { code: Some(code), at, message: String::new() };
        }
        self.changed.notify_one();
    }

    fn runs(&self, uid: Uid) -> bool {
        self.rows.lock().unwrap().get(&uid).is_some_and(|o| matches!(o.state, State::Running { .. }))
    }

    fn put(&self, uid: Uid, epoch: u64) {
        let state = State::Running { since: Timestamp::from_millis(1) };
        self.rows.lock().unwrap().insert(uid, Observed { uid, epoch, state, part: None });
    }
}

#[async_trait]
impl Runtime for Fake {
    async fn prepare(&self, image: Digest) -> Result<(), RuntimeError> {
        self.prepared.lock().unwrap().insert(image);
        Ok(())
    }

    async fn start(&self, sandbox: &Sandbox) -> Result<(), RuntimeError> {
        self.starts.lock().unwrap().push((sandbox.uid, sandbox.epoch, Instant::now()));
        self.cpusets.lock().unwrap().insert(sandbox.uid, sandbox.cpuset.clone());
        if sandbox.identity.as_ref().is_some_and(|folder| UnixStream::connect(folder.join(IDENTITY_SOCKET)).is_ok()) {
            self.identified.lock().unwrap().insert(sandbox.uid);
        }
        if self.refuse.lock().unwrap().contains(&sandbox.uid) {
            return Err(RuntimeError::Failed { attempt: "starting".into(), message: "no such command".into() });
        }
        assert_eq!(sandbox.shared.is_some(), self.shares.lock().unwrap().contains_key(&instance_of(sandbox)));
        self.put(sandbox.uid, sandbox.epoch);
        self.rows.lock().unwrap().get_mut(&sandbox.uid).unwrap().part = sandbox.part.clone();
        Ok(())
    }

    async fn share(&self, instance: Uid, _: Bytes, _: Option<&Name>) -> Result<Shared, RuntimeError> {
        let id = format!("folder {}", self.starts.lock().unwrap().len());
        let id = self.shares.lock().unwrap().entry(instance).or_insert(id).clone();
        Ok(Shared { path: "/shared".into(), id })
    }

    async fn unshare(&self, instance: Uid) -> Result<(), RuntimeError> {
        self.shares.lock().unwrap().remove(&instance);
        Ok(())
    }

    async fn shared(&self) -> Result<Vec<Uid>, RuntimeError> {
        Ok(self.shares.lock().unwrap().keys().copied().collect())
    }

    async fn stop(&self, uid: Uid) -> Result<(), RuntimeError> {
        self.stops.lock().unwrap().push(uid);
        self.exit(uid, 143);
        Ok(())
    }

    async fn remove(&self, uid: Uid) -> Result<(), RuntimeError> {
        self.rows.lock().unwrap().remove(&uid);
        Ok(())
    }

    async fn collect(&self, _: Vec<Digest>) -> Result<(), RuntimeError> {
        Ok(())
    }

    async fn observe(&self) -> Result<Vec<Observed>, RuntimeError> {
        Ok(self.rows.lock().unwrap().values().cloned().collect())
    }

    async fn exec(&self, uid: Uid, command: &[String], io: ExecIo, _: Duration) -> Result<i32, RuntimeError> {
        if !self.runs(uid) {
            return Err(RuntimeError::NotRunning(uid));
        }
        let mut child = std::process::Command::new(&command[0])
            .args(&command[1..])
            .stdin(io.stdin)
            .stdout(io.stdout)
            .stderr(io.stderr)
            .spawn()
            .unwrap();
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        Ok(status.code().unwrap_or(-1))
    }
}

fn instance_of(sandbox: &Sandbox) -> Uid {
    sandbox.part.as_ref().map_or(sandbox.uid, |part| part.instance)
}

struct FakeKeep(Arc<Fake>);

#[async_trait]
impl Keep for FakeKeep {
    async fn spawn(&self, _: Spawn) -> Result<(), KeepError> {
        Ok(())
    }
    async fn list(&self) -> Result<Vec<Kept>, KeepError> {
        Ok(Vec::new())
    }
    async fn signal(&self, _: &str, _: i32) -> Result<(), KeepError> {
        Ok(())
    }
    async fn forget(&self, _: &str) -> Result<(), KeepError> {
        Ok(())
    }
    async fn run(&self, _: Spawn, _: [OwnedFd; 3], _: Duration) -> Result<i32, KeepError> {
        Ok(0)
    }
    async fn changed(&self) {
        self.0.changed.notified().await;
    }
}

struct NoImages;

#[async_trait]
impl ImageFetcher for NoImages {
    async fn ensure(&self, _: &ImagePlan) -> Result<(), FetchError> {
        Ok(())
    }
    fn held(&self) -> Vec<Digest> {
        Vec::new()
    }
}

#[derive(Default)]
struct FakeNet(Mutex<BTreeSet<Uid>>);

#[async_trait]
impl InstancePlug for FakeNet {
    async fn plug(&self, uid: Uid, _: Ipv6Addr, _: Ipv4Addr) -> Result<PathBuf, PlugError> {
        self.0.lock().unwrap().insert(uid);
        Ok("/netns".into())
    }
    async fn unplug(&self, uid: Uid) -> Result<(), PlugError> {
        self.0.lock().unwrap().remove(&uid);
        Ok(())
    }
    async fn plugged(&self) -> Result<Vec<Uid>, PlugError> {
        Ok(self.0.lock().unwrap().iter().copied().collect())
    }
}

/// A control plane that says what a test tells it to.
struct Plane {
    at: Endpoint,
    plan: watch::Sender<HostPlan>,
    report: watch::Receiver<Option<HostReport>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

async fn plane(pki: &Pki, leader: Option<String>) -> Plane {
    let (plan, plans) = watch::channel(plan(0, []));
    let (reports, report) = watch::channel(None);
    let server = Server::builder(&Env::real(), "127.0.0.1:0".parse().unwrap(), pki.server())
        .identify(|_| Some("agent".into()))
        .stream(method::PLAN, move |_, request: PlanRequest| {
            let plans = plans.clone();
            async move {
                let known = request.known;
                let next = async move |(mut plans, mut known): (watch::Receiver<HostPlan>, Option<u64>)| {
                    let newer = |p: &HostPlan| p.revision > 0 && Some(p.revision) != known;
                    let plan = plans.wait_for(newer).await.ok()?.clone();
                    known = Some(plan.revision);
                    Some((Ok(plan), (plans, known)))
                };
                Ok(futures::stream::unfold((plans, known), next))
            }
        })
        .unary(method::REPORT, move |_, report: HostReport| {
            let (reports, leader) = (reports.clone(), leader.clone());
            async move {
                if leader.is_some() {
                    return Err(Refusal::not_leader(leader));
                }
                reports.send_replace(Some(report));
                Ok(ReportAck { epoch: 1, servers: Vec::new() })
            }
        })
        .bind()
        .await
        .unwrap();
    let (at, stop) = (server.local(), CancellationToken::new());
    let task = tokio::spawn(server.serve(stop.clone()));
    Plane { at, plan, report, stop, task }
}

impl Plane {
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        self.stop.cancel();
    }

    /// Waits for a report of which something is true.
    async fn report(&mut self, what: &str, fits: impl Fn(&HostReport) -> bool) -> HostReport {
        let found = self.report.wait_for(|r| r.as_ref().is_some_and(&fits));
        if let Ok(report) = tokio::time::timeout(DEADLINE, found).await {
            return report.unwrap().clone().unwrap();
        }
        panic!("not reported: {what}; last: {:?}", self.report.borrow());
    }

    async fn instance(&mut self, uid: Uid, what: &str, fits: impl Fn(&InstanceReport) -> bool) -> InstanceReport {
        let report = self.report(what, |r| r.instances.iter().any(|i| i.uid == uid && fits(i))).await;
        report.instances.into_iter().find(|i| i.uid == uid).unwrap()
    }
}

fn uid(n: u8) -> Uid {
    Uid::from_random([n; 16])
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn instance(n: u8, epoch: u64) -> InstancePlan {
    InstancePlan {
        uid: uid(n),
        name: name(&format!("web-{n}")),
        project: name("default"),
        app: name("web"),
        epoch,
        desired: Desired::Running,
        template: Template { stop_grace_seconds: 5, ..Template::default() },
        image: ImagePlan { format: kind::ImageFormat::Oci, digest: Digest::of(b"image") },
        address6: Ipv6Addr::LOCALHOST,
        address4: Ipv4Addr::LOCALHOST,
        nics: Vec::new(),
        secrets: Default::default(),
        request_id: None,
        once: false,
        kept: false,
        numa_nodes: Vec::new(),
        part_digests: Default::default(),
    }
}

fn plan(revision: u64, instances: impl IntoIterator<Item = InstancePlan>) -> HostPlan {
    HostPlan {
        version: PLAN_VERSION,
        host: name("host-1"),
        revision,
        instances: instances.into_iter().collect(),
        prepare: Vec::new(),
    }
}

struct Host {
    pki: Pki,
    dir: tempfile::TempDir,
    runtime: Arc<Fake>,
    net: Arc<FakeNet>,
}

struct Daemon {
    handle: AgentHandle,
    address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Host {
    fn new() -> Self {
        Self { pki: Pki::new(), dir: tempfile::tempdir().unwrap(), runtime: Arc::default(), net: Arc::default() }
    }

    fn start(&self, servers: &[Endpoint]) -> Daemon {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let handle = AgentHandle::default();
        let config = AgentConfig {
            name: name("host-1"),
            host: HostSpec { address, ..HostSpec::default() },
            numa: numa::one_node(),
            servers: Arc::new(ServerBook::open(&nexus_env::RealDisk, self.dir.path(), servers.to_vec())),
            data_dir: self.dir.path().to_owned(),
            boot_id: "boot".into(),
            agent_version: "test".into(),
            client_tls: self.pki.client(),
            server_tls: self.pki.server(),
            identify: Arc::new(|_| Some("server".into())),
            authorize: Arc::new(|_, _| true),
            certificate_ends: Arc::new(|| None),
            secrets_dir: None,
            identity: Some(IdentityConfig {
                trust_domain: "home".into(),
                roots: self.pki.root_pem.clone(),
                run_dir: self.dir.path().join("run"),
            }),
            handle: handle.clone(),
        };
        let runtimes: BTreeMap<_, Arc<dyn Runtime>> = [(kind::Runtime::Container, self.runtime.clone() as _)].into();
        let engines = Engines {
            firewall: None,
            networks: None,
            runtimes,
            images: Arc::new(NoImages),
            net: self.net.clone(),
            keep: Arc::new(FakeKeep(self.runtime.clone())),
        };
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let task = tokio::spawn(async move { run(config, Env::real(), engines, token).await.unwrap() });
        Daemon { handle, address, shutdown, task }
    }
}

impl Daemon {
    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.unwrap().unwrap();
    }
}

async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is() {
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_plan_is_followed_acknowledged_and_undone() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(5, [instance(1, 1), instance(2, 1)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.phase == InstancePhase::Running && i.ready).await;
    let report = plane.report("applied", |r| r.applied == Some(5)).await;
    assert_eq!((report.boot_id.as_str(), report.host.as_str()), ("boot", "host-1"));
    assert!(host.runtime.runs(uid(2)) && daemon.handle.is_ready());
    assert!(daemon.handle.metrics_text().contains("nexus_agent_plan_revision 5"));

    // One is to go by the plan's word, the other by its absence.
    plane.plan.send_replace(plan(6, [InstancePlan { desired: Desired::Gone, ..instance(1, 1) }]));
    plane.report("both gone", |r| r.applied == Some(6) && r.instances.is_empty()).await;
    assert!(!host.runtime.runs(uid(1)) && !host.runtime.runs(uid(2)));
    assert_eq!(host.runtime.stops.lock().unwrap().len(), 2, "both were asked first");
    assert!(host.net.0.lock().unwrap().is_empty());
    daemon.stop().await;
}

#[tokio::test]
async fn what_the_plan_names_is_made_ready_before_an_instance_comes() {
    let host = Host::new();
    let plane = plane(&host.pki, None).await;
    let image = ImagePlan { format: ImageFormat::Oci, digest: Digest::of(b"ahead") };
    plane.plan.send_replace(HostPlan { prepare: vec![image.clone()], ..plan(5, []) });
    let daemon = host.start(std::slice::from_ref(&plane.at));
    eventually("it is ready", || host.runtime.prepared.lock().unwrap().contains(&image.digest)).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_restarted_daemon_goes_on_from_its_cached_plan_without_any_server() {
    let host = Host::new();
    let mut first = plane(&host.pki, None).await;
    first.plan.send_replace(plan(5, [instance(1, 1), instance(2, 1)]));
    let daemon = host.start(std::slice::from_ref(&first.at));
    first.report("both run", |r| r.instances.iter().filter(|i| i.ready).count() == 2).await;
    let at = first.at.clone();
    first.kill().await;
    daemon.stop().await;

    // One ends while nobody looks.
    host.runtime.exit(uid(2), 1);
    let daemon = host.start(&[at]);
    eventually("the other is started again", || host.runtime.starts_of(uid(2)).len() == 2).await;
    assert_eq!(host.runtime.starts_of(uid(1)).len(), 1, "what runs is left alone");
    eventually("it is ready", || daemon.handle.is_ready()).await;
    assert_eq!(daemon.handle.snapshot().plan, Some(5));
    daemon.stop().await;
    assert!(host.runtime.runs(uid(1)) && host.runtime.runs(uid(2)));
}

#[tokio::test]
async fn without_any_plan_nothing_is_touched_and_with_one_the_superseded_goes() {
    let host = Host::new();
    host.runtime.put(uid(7), 3);
    host.net.0.lock().unwrap().extend([uid(7), uid(8)]);
    let mut plane = plane(&host.pki, None).await;
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(7), "is told", |i| i.epoch == 3 && i.phase == InstancePhase::Running).await;
    assert!(host.runtime.runs(uid(7)));
    plane.plan.send_replace(plan(1, []));
    plane.report("gone", |r| r.applied == Some(1) && r.instances.is_empty()).await;
    assert!(!host.runtime.runs(uid(7)));
    eventually("networks of nobody go too", || host.net.0.lock().unwrap().is_empty()).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_container_can_ask_who_it_is_from_its_start_to_its_end_and_runs_without_an_answer() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    // Left by an instance of long ago.
    let folders = host.dir.path().join("run/spiffe");
    std::fs::create_dir_all(folders.join(uid(9).to_string())).unwrap();
    let mut function = instance(2, 1);
    function.template.runtime = kind::Runtime::Function;
    plane.plan.send_replace(plan(1, [instance(1, 1), function]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    // These servers know nothing of workloads: they are of an earlier release.
    plane.instance(uid(1), "runs", |i| i.ready).await;
    assert_eq!(*host.runtime.identified.lock().unwrap(), [uid(1)].into());
    let refused = || daemon.handle.snapshot().certificates_failed > 0;
    eventually("a certificate was asked for", refused).await;
    eventually("the leftover is gone", || !folders.join(uid(9).to_string()).exists()).await;
    assert!(!folders.join(uid(2).to_string()).exists(), "functions have none");

    // Served again by the next daemon, for what runs already.
    daemon.stop().await;
    let socket = folders.join(uid(1).to_string()).join(IDENTITY_SOCKET);
    assert!(UnixStream::connect(&socket).is_err());
    let daemon = host.start(std::slice::from_ref(&plane.at));
    eventually("it is served again", || UnixStream::connect(&socket).is_ok()).await;
    assert_eq!(host.runtime.starts_of(uid(1)), [1]);

    plane.plan.send_replace(plan(2, []));
    plane.report("gone", |r| r.applied == Some(2) && r.instances.is_empty()).await;
    eventually("nothing is left of its identity", || !folders.join(uid(1).to_string()).exists()).await;
    daemon.stop().await;
}

#[tokio::test]
async fn an_epoch_goes_forward_only() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [instance(1, 4)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.ready && i.epoch == 4).await;
    plane.plan.send_replace(plan(2, [instance(1, 3)]));
    plane.report("applied", |r| r.applied == Some(2)).await;
    plane.plan.send_replace(plan(3, [instance(1, 5)]));
    plane.instance(uid(1), "runs anew", |i| i.ready && i.epoch == 5).await;
    assert_eq!(host.runtime.starts_of(uid(1)), [4, 5]);
    daemon.stop().await;
}

#[tokio::test]
async fn what_ends_is_restarted_with_growing_pauses_and_harms_nobody() {
    let host = Host::new();
    host.runtime.refuse.lock().unwrap().insert(uid(2));
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [instance(1, 1), instance(2, 1)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.ready).await;
    host.runtime.exit(uid(1), 3);
    let report = plane.instance(uid(1), "restarted", |i| i.ready && i.restarts == 1).await;
    assert_eq!(report.exit_code, Some(3));
    let report = plane.instance(uid(2), "says why", |i| i.message.contains("no such command")).await;
    assert_eq!((report.phase, report.ready), (InstancePhase::BackOff, false));
    eventually("it is tried three times", || host.runtime.starts_of(uid(2)).len() >= 3).await;
    let times: Vec<Instant> =
        host.runtime.starts.lock().unwrap().iter().filter(|s| s.0 == uid(2)).map(|s| s.2).collect();
    assert!(times[2] - times[1] >= Duration::from_secs(1), "the second pause is a second");
    host.runtime.refuse.lock().unwrap().clear();
    plane.instance(uid(2), "runs at last", |i| i.ready).await;
    daemon.stop().await;
}

#[tokio::test]
async fn readiness_follows_the_port() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let port = Port { port: at.port(), protocol: Protocol::Http, name: None };
    let template = Template { ports: vec![port], ..Template::default() };
    plane.plan.send_replace(plan(1, [InstancePlan { template, ..instance(1, 1) }]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    let report = plane.instance(uid(1), "runs", |i| i.phase == InstancePhase::Running && !i.message.is_empty()).await;
    assert!(!report.ready);
    let listener = std::net::TcpListener::bind(at).unwrap();
    // Only the IPv4 address answers.
    let report = plane.instance(uid(1), "is ready", |i| i.ready).await;
    assert_eq!((report.endpoint, report.message.as_str()), (Some(at), ""));
    drop(listener);
    plane.instance(uid(1), "is not ready any more", |i| !i.ready && i.message.contains("not ready")).await;
    assert_eq!(host.runtime.starts_of(uid(1)).len(), 1, "readiness restarts nothing");
    daemon.stop().await;
}

#[tokio::test]
async fn reports_find_the_leader() {
    let host = Host::new();
    let mut leader = plane(&host.pki, None).await;
    let follower = plane(&host.pki, Some(leader.at.to_string())).await;
    let dead: Endpoint = "127.0.0.1:1".parse().unwrap();
    let daemon = host.start(&[dead, follower.at.clone()]);
    leader.report("any", |_| true).await;
    daemon.stop().await;
}

async fn client(host: &Host, daemon: &Daemon) -> Client {
    eventually("it listens", || daemon.handle.snapshot().observed).await;
    Client::new(&Env::real(), Endpoint::Tcp(daemon.address), host.pki.client(), ClientOptions::default())
}

#[tokio::test]
async fn logs_are_read_across_rotation_and_followed() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [instance(1, 1)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.ready).await;
    let dir = host.dir.path().join("logs").join(uid(1).to_string());
    std::fs::create_dir_all(&dir).unwrap();
    let line = |path: &Path, stream: &str, text: &str| {
        use std::io::Write;
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(file, "2026-01-01T00:00:00.000Z {stream} {text}").unwrap();
    };
    line(&dir.join("2"), "stdout", "one");
    line(&dir.join("1"), "stderr", "two");
    line(&dir.join("current"), "stdout", "three");
    let client = client(&host, &daemon).await;
    let ask = |follow, tail| LogsRequest { uid: uid(1), follow, tail, part: None };
    let all = read(&client, &ask(false, None)).await;
    assert_eq!(all, [(1, "one\n".into()), (2, "two\n".into()), (1, "three\n".into())]);
    let last = read(&client, &ask(false, Some(2))).await;
    assert_eq!(last, [(2, "two\n".into()), (1, "three\n".into())]);

    let (_sink, mut frames) = client.duplex(method::LOGS, &ask(true, Some(1))).await.unwrap();
    let mut next = async || tokio::time::timeout(DEADLINE, frames.next()).await.unwrap().unwrap().unwrap().1;
    assert_eq!(next().await, "three\n");
    line(&dir.join("current"), "stdout", "four");
    assert_eq!(next().await, "four\n");
    std::fs::rename(dir.join("current"), dir.join("1")).unwrap();
    line(&dir.join("current"), "stdout", "five");
    assert_eq!(next().await, "five\n");
    let unknown = LogsRequest { uid: uid(9), follow: false, tail: None, part: None };
    let refused = match client.duplex(method::LOGS, &unknown).await {
        Ok((_sink, mut frames)) => frames.next().await.unwrap().unwrap_err(),
        Err(e) => e,
    };
    assert!(refused.to_string().contains("not on this host"), "{refused}");
    daemon.stop().await;
}

async fn read(client: &Client, request: &LogsRequest) -> Vec<(u8, String)> {
    let (_sink, mut frames) = client.duplex(method::LOGS, request).await.unwrap();
    let mut all = Vec::new();
    while let Some(frame) = tokio::time::timeout(DEADLINE, frames.next()).await.unwrap() {
        let (channel, bytes) = frame.unwrap();
        all.push((channel, String::from_utf8(bytes.to_vec()).unwrap()));
    }
    all
}

#[tokio::test]
async fn a_command_gets_input_and_gives_output_and_its_status() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [instance(1, 1)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.ready).await;
    let client = client(&host, &daemon).await;
    let command = ["sh", "-c", "cat; echo trouble >&2; exit 5"].map(str::to_owned).to_vec();
    let request = ExecRequest { uid: uid(1), command, stdin: true, part: None };
    let (mut sink, mut frames) = client.duplex(method::EXEC, &request).await.unwrap();
    let input = "x".repeat(200_000);
    let (mut out, mut err, mut code) = (String::new(), String::new(), String::new());
    let send = async {
        for piece in input.as_bytes().chunks(10_000) {
            sink.send(channel::STDIN, bytes::Bytes::copy_from_slice(piece)).await.unwrap();
        }
        sink.send(channel::STDIN, bytes::Bytes::new()).await.unwrap();
    };
    let receive = async {
        while let Some(frame) = tokio::time::timeout(DEADLINE, frames.next()).await.unwrap() {
            let (channel, bytes) = frame.unwrap();
            let text = match channel {
                channel::STDOUT => &mut out,
                channel::STDERR => &mut err,
                _ => &mut code,
            };
            text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
    };
    tokio::join!(send, receive);
    assert_eq!((out.len(), err.as_str(), code.as_str()), (input.len(), "trouble\n", "5"));
    daemon.stop().await;
}

#[tokio::test]
async fn images_are_fetched_once_whole_and_checked() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nexus_agent::images::WireImages;
    use nexus_compute::image::BlobStore;
    use nexus_model::plan::BlobRequest;

    let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
    let (config, layer) = (b"{}".to_vec(), vec![7u8; 300_000]);
    let entry = |bytes: &[u8]| serde_json::json!({"digest": Digest::of(bytes).to_string(), "size": bytes.len()});
    let manifest = serde_json::json!({"config": entry(&config), "layers": [entry(&layer)]}).to_string().into_bytes();
    let image = ImagePlan { format: kind::ImageFormat::Oci, digest: Digest::of(&manifest) };
    let forged = Digest::of(b"what was asked for");
    let mut served: BTreeMap<Digest, Vec<u8>> = [config, layer, manifest].map(|b| (Digest::of(&b), b)).into();
    served.insert(forged, b"something else".to_vec());
    let (served, asked) = (Arc::new(served), Arc::new(AtomicUsize::new(0)));
    let count = asked.clone();
    let server = Server::builder(&Env::real(), "127.0.0.1:0".parse().unwrap(), pki.server())
        .identify(|_| Some("agent".into()))
        .bytes_stream(method::BLOB_GET, move |_, request: BlobRequest| {
            let (served, count) = (served.clone(), count.clone());
            async move {
                count.fetch_add(1, Ordering::SeqCst);
                let blob = served.get(&request.digest).ok_or_else(|| Refusal::new("unknown", "no such blob"))?;
                let pieces: Vec<std::io::Result<bytes::Bytes>> =
                    blob.chunks(50_000).map(|c| Ok(bytes::Bytes::copy_from_slice(c))).collect();
                Ok(futures::stream::iter(pieces))
            }
        })
        .bind()
        .await
        .unwrap();
    let servers = vec!["127.0.0.1:1".parse().unwrap(), server.local()];
    let serving = tokio::spawn(server.serve(CancellationToken::new()));
    let blobs = BlobStore::open(dir.path()).unwrap();
    let images = WireImages::new(&Env::real(), pki.client(), Arc::new(ServerBook::new(servers)), blobs.clone());

    let many = futures::future::join_all((0..8).map(|_| images.ensure(&image))).await;
    assert!(many.iter().all(Result::is_ok), "{many:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 3, "each blob once");
    assert_eq!(blobs.list().unwrap().len(), 3);
    assert_eq!(images.held(), [image.digest]);
    for digest in [forged, Digest::of(b"nowhere")] {
        for format in [kind::ImageFormat::Oci, kind::ImageFormat::Wasm] {
            images.ensure(&ImagePlan { format, digest }).await.unwrap_err();
        }
        assert!(!blobs.has(digest));
    }
    serving.abort();
}

#[tokio::test]
async fn a_jobs_instance_runs_once_and_only_its_output_stays() {
    let host = Host::new();
    host.runtime.refuse.lock().unwrap().insert(uid(2));
    let once = |n| InstancePlan { once: true, ..instance(n, 1) };
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [once(1), once(2)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.phase == InstancePhase::Running).await;
    let logs = host.dir.path().join("logs").join(uid(1).to_string());
    host.runtime.exit(uid(1), 3);
    let report = plane.instance(uid(1), "has ended", |i| i.phase == InstancePhase::Exited).await;
    assert_eq!((report.exit_code, report.restarts, report.ready), (Some(3), 0, false));
    assert!(report.message.contains("exited with 3"), "{report:?}");
    assert!(!host.net.0.lock().unwrap().contains(&uid(1)), "its address is free once its end is told");
    // What can't be started fails at last.
    let report = plane.instance(uid(2), "is given up", |i| i.phase == InstancePhase::Exited).await;
    assert_eq!((report.exit_code, host.runtime.starts_of(uid(2)).len()), (None, 5));
    daemon.stop().await;

    // An agent that starts with the plan of before must not run it again.
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.report.borrow_and_update();
    tokio::time::timeout(DEADLINE, plane.report.changed()).await.unwrap().unwrap();
    plane
        .instance(uid(1), "has ended, as before", |i| i.phase == InstancePhase::Exited && i.exit_code == Some(3))
        .await;
    assert_eq!(host.runtime.starts_of(uid(1)).len(), 1);
    let kept = InstancePlan { desired: Desired::Gone, kept: true, ..once(1) };
    plane.plan.send_replace(plan(2, [kept]));
    plane.report("the plan is applied", |r| r.applied == Some(2)).await;
    assert!(logs.join("outcome.json").exists());
    plane.plan.send_replace(plan(3, []));
    eventually("nothing of it is left", || !logs.exists()).await;
    daemon.stop().await;
    plane.kill().await;
}
