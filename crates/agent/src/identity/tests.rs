//! The Workload API on real sockets, asked by the public Rust client, and by one that keeps to no rule.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use futures::StreamExt as _;
use nexus_iam::svid::{SvidKey, check_audiences};
use nexus_iam::{CertRequest, CertificateAuthority, at_millis};
use nexus_model::kind::{ImageFormat, Runtime, Template};
use nexus_model::plan::{Desired, ImagePlan, WorkloadCertificate, WorkloadToken};
use nexus_model::{Digest, Timestamp};
use spiffe::WorkloadApiClient;
use tokio::net::UnixStream;

use super::grpc::code;
use super::issuer::IssueError;
use super::*;
use crate::config::IdentityConfig;

const DEADLINE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// A server that signs for whoever asks, while it is up.
struct Server {
    env: Env,
    ca: CertificateAuthority,
    key: SvidKey,
    life: Mutex<Duration>,
    down: AtomicBool,
    tokens: AtomicUsize,
    ids: Mutex<BTreeMap<Uid, SpiffeId>>,
}

impl Server {
    fn up(&self) -> Result<(), IssueError> {
        if self.down.load(Ordering::SeqCst) { Err(IssueError::Unreachable("it is down".into())) } else { Ok(()) }
    }
}

#[async_trait]
impl Issuer for Server {
    async fn certificate(&self, instance: Uid, csr: String) -> Result<WorkloadCertificate, IssueError> {
        self.up()?;
        let request = CertRequest::from_pem(&csr).unwrap();
        let [id] = request.ids() else { panic!("one id is asked for") };
        self.ids.lock().unwrap().insert(instance, id.clone());
        let (now, life) = (at_millis(self.env.now_millis()), *self.life.lock().unwrap());
        let signed = self.ca.sign(&request, id, &[], &[], now, life).unwrap();
        Ok(WorkloadCertificate { id: id.to_string(), cert: signed.cert_chain_pem })
    }

    async fn token(&self, instance: Uid, audience: Vec<String>) -> Result<WorkloadToken, IssueError> {
        self.up()?;
        check_audiences(&audience).unwrap();
        self.tokens.fetch_add(1, Ordering::SeqCst);
        let id = self.ids.lock().unwrap().get(&instance).cloned().expect("certificates come first");
        let (now, life) = (self.env.now_millis(), Duration::from_secs(300));
        let token = self.key.sign(&id, &audience, at_millis(now), life).unwrap();
        Ok(WorkloadToken { token, expires: Timestamp::from_millis(now + 300_000) })
    }
}

struct Host {
    dir: tempfile::TempDir,
    server: Arc<Server>,
    keys: watch::Sender<Arc<JwtBundle>>,
}

impl Host {
    fn new(life: Duration) -> Self {
        let env = Env::real();
        let ca = CertificateAuthority::generate("home", at_millis(env.now_millis()), 1000 * HOUR).unwrap();
        let key = SvidKey::generate().unwrap();
        let mut bundle = JwtBundle::default();
        bundle.insert(key.public().clone()).unwrap();
        let server = Server {
            env,
            ca,
            key,
            life: Mutex::new(life),
            down: AtomicBool::new(false),
            tokens: AtomicUsize::new(0),
            ids: Mutex::default(),
        };
        Self { dir: tempfile::tempdir().unwrap(), server: Arc::new(server), keys: watch::Sender::new(Arc::new(bundle)) }
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// An agent's identities; another one is the agent after its restart.
    fn agent(&self) -> Identities {
        let settings = IdentityConfig {
            trust_domain: "home".into(),
            roots: self.server.ca.root_pem().to_owned(),
            run_dir: self.run_dir(),
        };
        let (issuer, keys) = (self.server.clone(), self.keys.subscribe());
        let made = Identities::new(&Env::real(), &settings, issuer, keys, AgentHandle::default());
        Identities { patience: Duration::from_millis(500), ..made.unwrap() }
    }

    fn is_down(&self, down: bool) {
        self.server.down.store(down, Ordering::SeqCst);
    }
}

fn plan(number: u8, app: &str) -> InstancePlan {
    InstancePlan {
        uid: Uid::from_random([number; 16]),
        name: format!("{app}-{number}").parse().unwrap(),
        project: "shop".parse().unwrap(),
        app: app.parse().unwrap(),
        epoch: 1,
        desired: Desired::Running,
        template: Template { runtime: Runtime::Container, ..Template::default() },
        image: ImagePlan { format: ImageFormat::Oci, digest: Digest::of(b"i") },
        address6: std::net::Ipv6Addr::LOCALHOST,
        address4: std::net::Ipv4Addr::LOCALHOST,
        nics: Vec::new(),
        secrets: Default::default(),
        request_id: None,
        once: false,
        kept: false,
        numa_nodes: Vec::new(),
        part_digests: Default::default(),
    }
}

async fn client(identity: &Identity) -> WorkloadApiClient {
    let socket = identity.folder.join(IDENTITY_SOCKET);
    WorkloadApiClient::connect_to(format!("unix://{}", socket.display())).await.unwrap()
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("waited for: {what}"))
}

#[tokio::test]
async fn the_public_client_gets_certificates_tokens_and_bundles() {
    let host = Host::new(HOUR);
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let client = client(&web).await;

    let svid = client.fetch_x509_svid().await.unwrap();
    assert_eq!(svid.spiffe_id().to_string(), "spiffe://home/project/shop/app/web");
    assert_eq!(svid.cert_chain().len(), 1);
    let home = "home".parse::<spiffe::TrustDomain>().unwrap();
    let bundles = client.fetch_x509_bundles().await.unwrap();
    let roots = bundles.get(&home).unwrap();
    assert_eq!(roots.authorities()[0].as_bytes(), &agent.roots[..]);
    // What a peer that knows the roots alone would say of it.
    let leaf = CertificateDer::from(svid.leaf().as_bytes().to_vec());
    let verified = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new({
            let mut store = rustls::RootCertStore::empty();
            store.add(CertificateDer::from(agent.roots.to_vec())).unwrap();
            store
        }),
        Arc::new(rustls::crypto::ring::default_provider()),
    );
    let now = rustls::pki_types::UnixTime::now();
    verified.build().unwrap().verify_client_cert(&leaf, &[], now).unwrap();

    let token = client.fetch_jwt_svid(["db", "cache"], None).await.unwrap();
    assert_eq!(token.spiffe_id(), svid.spiffe_id());
    let named = client.fetch_jwt_svid(["db"], Some(svid.spiffe_id())).await.unwrap();
    assert_eq!(named.spiffe_id(), svid.spiffe_id());
    let keys = client.fetch_jwt_bundles().await.unwrap();
    let kid = host.server.key.public().kid();
    assert!(keys.get(&home).unwrap().find_jwt_authority(kid).is_some());
    let valid = client.validate_jwt_token("cache", token.token()).await.unwrap();
    assert_eq!(valid.spiffe_id(), svid.spiffe_id());
    for (audience, text) in [("mail", token.token()), ("cache", "a.b.c"), ("", token.token())] {
        let refused = client.validate_jwt_token(audience, text).await.unwrap_err();
        assert!(refused.is_invalid_argument(), "{audience}: {refused}");
    }
    let nobody: [&str; 0] = [];
    assert!(client.fetch_jwt_svid(nobody, None).await.unwrap_err().is_invalid_argument());
}

#[tokio::test]
async fn a_workload_can_not_get_anothers_identity() {
    let host = Host::new(HOUR);
    let agent = host.agent();
    let (web, db) = (agent.open(&plan(1, "web")).await.unwrap(), agent.open(&plan(2, "db")).await.unwrap());
    let (of_web, of_db) = (client(&web).await, client(&db).await);
    let (a, b) = (of_web.fetch_x509_svid().await.unwrap(), of_db.fetch_x509_svid().await.unwrap());
    assert_eq!(a.spiffe_id().to_string(), "spiffe://home/project/shop/app/web");
    assert_eq!(b.spiffe_id().to_string(), "spiffe://home/project/shop/app/db");
    assert_ne!(a.private_key().as_bytes(), b.private_key().as_bytes());
    for other in
        [b.spiffe_id().to_string(), "spiffe://home/server/s1".into(), "spiffe://away/project/shop/app/web".into()]
    {
        let other = other.parse().unwrap();
        let refused = of_web.fetch_jwt_svid(["mail"], Some(&other)).await.unwrap_err().to_string();
        assert!(refused.contains("tokens of no other"), "{refused}");
    }
    assert_eq!(host.server.tokens.load(Ordering::SeqCst), 0, "no server was even asked");

    // Keys stand where no container and no other user of the host looks.
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(host.run_dir().join("spiffe")), 0o700);
    assert_eq!(mode(agent.file(plan(1, "web").uid)), 0o600);
    let seen: Vec<_> = fs::read_dir(&web.folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(seen, [IDENTITY_SOCKET], "the socket is all that the container sees");
    assert_eq!(mode(web.folder.join(IDENTITY_SOCKET)), 0o666, "programs of any user may ask");
}

#[tokio::test]
async fn certificates_are_renewed_at_half_life_end_in_an_outage_and_come_back() {
    let host = Host::new(Duration::from_secs(6));
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let client = client(&web).await;
    let mut stream = client.stream_x509_svids().await.unwrap();
    let mut contexts = client.stream_x509_contexts().await.unwrap();
    let begun = Instant::now();
    let first = soon("the first", stream.next()).await.unwrap().unwrap();
    let second = soon("the second", stream.next()).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(6), "it was renewed before its end");
    assert_ne!(first.leaf().as_bytes(), second.leaf().as_bytes());
    assert_ne!(first.private_key().as_bytes(), second.private_key().as_bytes(), "a key serves one certificate");
    soon("both on another stream", contexts.by_ref().take(2).collect::<Vec<_>>()).await;

    // The last one is served until it ends, and then nothing is.
    host.is_down(true);
    let ended = soon("the end", async {
        loop {
            match stream.next().await.expect("a stream ends with a reason") {
                Ok(_) => assert!(client.fetch_x509_svid().await.is_ok()),
                Err(error) => return error.to_string(),
            }
        }
    });
    let ended = ended.await;
    assert!(ended.contains("has ended") && ended.contains("it is down"), "{ended}");
    let refused = client.fetch_x509_svid().await.unwrap_err().to_string();
    assert!(refused.contains("there is no certificate yet"), "{refused}");
    // What does not need it goes on.
    assert!(client.fetch_x509_bundles().await.is_ok());

    host.is_down(false);
    soon("a new one", async {
        while client.fetch_x509_svid().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_restarts_without_servers_serves_what_it_had() {
    let host = Host::new(HOUR);
    let before = {
        let agent = host.agent();
        let web = agent.open(&plan(1, "web")).await.unwrap();
        client(&web).await.fetch_x509_svid().await.unwrap()
    };
    host.is_down(true);
    let folder = fs::metadata(host.agent().folder(plan(1, "web").uid)).unwrap();
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let after = client(&web).await.fetch_x509_svid().await.unwrap();
    assert_eq!(after.leaf().as_bytes(), before.leaf().as_bytes());
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(fs::metadata(&web.folder).unwrap().ino(), folder.ino(), "containers see the folder that they saw");

    // A file of another instance, or a damaged one, is not taken.
    drop(web);
    let (own, other) = (agent.file(plan(1, "web").uid), agent.file(plan(2, "db").uid));
    fs::copy(&own, &other).unwrap();
    fs::write(&own, "{torn").unwrap();
    for plan in [plan(1, "web"), plan(2, "db")] {
        let identity = agent.open(&plan).await.unwrap();
        assert!(client(&identity).await.fetch_x509_svid().await.is_err());
    }
    assert_eq!(agent.known().await.unwrap().len(), 2);
    for plan in [plan(1, "web"), plan(2, "db"), plan(3, "never-there")] {
        agent.remove(plan.uid).await.unwrap();
    }
    assert!(agent.known().await.unwrap().is_empty());
    assert_eq!(fs::read_dir(host.run_dir().join("spiffe/keys")).unwrap().count(), 0);
}

#[tokio::test]
async fn tokens_are_remembered_and_few_are_asked_for() {
    let host = Host::new(HOUR);
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let client = client(&web).await;
    client.fetch_x509_svid().await.unwrap();
    let first = client.fetch_jwt_svid(["db"], None).await.unwrap();
    for _ in 0..10 {
        assert_eq!(client.fetch_jwt_svid(["db"], None).await.unwrap().token(), first.token());
    }
    assert_eq!(host.server.tokens.load(Ordering::SeqCst), 1);
    host.is_down(true);
    assert!(client.fetch_jwt_svid(["db"], None).await.is_ok(), "what is remembered is good");
    let refused = client.fetch_jwt_svid(["cache"], None).await.unwrap_err().to_string();
    assert!(refused.contains("no token can be signed now"), "{refused}");
    host.is_down(false);
    assert!(client.fetch_jwt_svid(["cache"], None).await.is_ok());
    // A workload that asks for ever new audiences is slowed down, and no server hears of it.
    let mut refused = None;
    for n in 0..60 {
        if let Err(error) = client.fetch_jwt_svid([format!("a{n}")], None).await {
            refused = Some(error.to_string());
            break;
        }
    }
    assert!(refused.is_some_and(|why| why.contains("too many audiences")));
    assert!(client.fetch_jwt_svid(["db"], None).await.is_ok(), "what is remembered is still given");
}

#[tokio::test]
async fn bundles_are_pushed_when_keys_change() {
    let host = Host::new(HOUR);
    let known = host.keys.send_replace(Arc::default());
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let client = client(&web).await;
    let home = "home".parse::<spiffe::TrustDomain>().unwrap();
    let none = client.fetch_jwt_bundles().await.unwrap_err().to_string();
    assert!(none.contains("no keys from any server yet"), "{none}");
    let refused = client.validate_jwt_token("db", "a.b.c").await.unwrap_err();
    assert!(!refused.is_invalid_argument(), "nobody knows: {refused}");

    host.keys.send_replace(known.clone());
    let mut stream = client.stream_jwt_bundles().await.unwrap();
    let first = soon("the first", stream.next()).await.unwrap().unwrap();
    assert_eq!(first.get(&home).unwrap().jwt_authorities().count(), 1);
    let mut more = (*known).clone();
    more.insert(SvidKey::generate().unwrap().public().clone()).unwrap();
    host.keys.send_replace(Arc::new(more));
    let second = soon("the second", stream.next()).await.unwrap().unwrap();
    assert_eq!(second.get(&home).unwrap().jwt_authorities().count(), 2);
}

/// A client that keeps to no rule.
struct Raw {
    send: h2::client::SendRequest<Bytes>,
    _connection: JoinSet<()>,
}

/// How a call was answered: HTTP's status, gRPC's status, its message.
type Answer = (u16, Option<u32>, String);

impl Raw {
    async fn connect(identity: &Identity) -> Self {
        let stream = UnixStream::connect(identity.folder.join(IDENTITY_SOCKET)).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { connection.await.unwrap_or_default() });
        Self { send, _connection: tasks }
    }

    async fn open(&self, method: &str, headers: &[(&str, &str)], body: Bytes) -> http::Response<h2::RecvStream> {
        let mut request = http::Request::post(format!("http://localhost/SpiffeWorkloadAPI/{method}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut send = self.send.clone().ready().await.unwrap();
        let (response, mut out) = send.send_request(request.body(()).unwrap(), false).unwrap();
        let _ = out.send_data(body, true);
        soon("an answer", response).await.unwrap()
    }

    async fn call(&self, method: &str, headers: &[(&str, &str)], body: Bytes) -> Answer {
        let response = self.open(method, headers, body).await;
        let http = response.status().as_u16();
        let (head, mut body) = response.into_parts();
        while let Some(Ok(data)) = body.data().await {
            let _ = body.flow_control().release_capacity(data.len());
        }
        let trailers = body.trailers().await.ok().flatten().unwrap_or(head.headers);
        let text = |name: &str| trailers.get(name).map(|v| v.to_str().unwrap().to_owned());
        (http, text("grpc-status").map(|s| s.parse().unwrap()), text("grpc-message").unwrap_or_default())
    }
}

const GOOD: &[(&str, &str)] =
    &[("content-type", "application/grpc"), ("workload.spiffe.io", "true"), ("te", "trailers")];

fn frame(flag: u8, announced: u32, content: &[u8]) -> Bytes {
    [&[flag], &announced.to_be_bytes()[..], content].concat().into()
}

#[tokio::test]
async fn a_call_without_the_header_or_against_the_rules_is_refused() {
    let host = Host::new(HOUR);
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let raw = Raw::connect(&web).await;
    let empty = || frame(0, 0, b"");
    for method in ["FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"] {
        for headers in [&GOOD[..1], &[GOOD[0], ("workload.spiffe.io", "false")]] {
            let (http, status, why) = raw.call(method, headers, empty()).await;
            assert_eq!((http, status), (200, Some(code::INVALID_ARGUMENT)), "{method}: {why}");
            assert!(why.contains("workload.spiffe.io: true"), "{why}");
        }
    }
    let status = async |method: &str, body: Bytes| raw.call(method, GOOD, body).await.1.unwrap();
    assert_eq!(status("FetchEverything", empty()).await, code::UNIMPLEMENTED);
    assert_eq!(status("FetchJWTSVID", Bytes::new()).await, code::INVALID_ARGUMENT);
    assert_eq!(status("FetchJWTSVID", frame(0, 9, b"short")).await, code::INVALID_ARGUMENT);
    assert_eq!(status("FetchJWTSVID", frame(0, 4, b"\xff\xff\xff\xff")).await, code::INVALID_ARGUMENT);
    assert_eq!(status("FetchJWTSVID", frame(1, 1, b"x")).await, code::UNIMPLEMENTED);
    let (http, ..) = raw.call("FetchJWTSVID", &[("workload.spiffe.io", "true")], empty()).await;
    assert_eq!(http, 415);
    // After all of that the socket serves on.
    assert!(client(&web).await.fetch_x509_svid().await.is_ok());
}

#[tokio::test]
async fn calls_connections_and_messages_are_bounded() {
    let host = Host::new(HOUR);
    let agent = Identities { limits: grpc::Limits { connections: 4, calls: 6, message: 1 << 10 }, ..host.agent() };
    let web = agent.open(&plan(1, "web")).await.unwrap();
    client(&web).await.fetch_x509_svid().await.unwrap();

    let raw = Raw::connect(&web).await;
    let big = vec![b'x'; 2 << 10];
    let (_, status, why) = raw.call("FetchJWTSVID", GOOD, frame(0, 2 << 10, &big)).await;
    assert_eq!(status, Some(code::RESOURCE_EXHAUSTED), "{why}");

    // Six streams over two connections; the seventh call of the socket is refused, and goes when one ends.
    let other = Raw::connect(&web).await;
    let mut open = Vec::new();
    for n in 0..6 {
        let raw = if n % 2 == 0 { &raw } else { &other };
        open.push(raw.open("FetchX509SVID", GOOD, frame(0, 0, b"")).await);
    }
    let bundles = async || raw.call("ValidateJWTSVID", GOOD, frame(0, 0, b"")).await.1;
    assert_eq!(bundles().await, Some(code::RESOURCE_EXHAUSTED));
    drop(open);
    soon("calls to be taken again", async {
        while bundles().await == Some(code::RESOURCE_EXHAUSTED) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;

    // Whoever takes all connections locks itself out, and nobody else.
    let db = agent.open(&plan(2, "db")).await.unwrap();
    let mut held = vec![Raw::connect(&web).await, Raw::connect(&web).await];
    let waits = UnixStream::connect(web.folder.join(IDENTITY_SOCKET)).await.unwrap();
    let (send, connection) = h2::client::handshake(waits).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { connection.await.unwrap_or_default() });
    let late = Raw { send, _connection: tasks };
    let mut call = std::pin::pin!(late.call("ValidateJWTSVID", GOOD, frame(0, 0, b"")));
    assert!(client(&db).await.fetch_x509_svid().await.is_ok());
    let pending = futures::poll!(call.as_mut()).is_pending();
    assert!(pending, "four connections are open");
    held.pop();
    assert_eq!(call.await.1, Some(code::INVALID_ARGUMENT), "it was taken when another went");
}

#[tokio::test]
async fn a_workload_that_calls_without_end_is_slowed_down() {
    let host = Host::new(HOUR);
    let agent = host.agent();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    let raw = Raw::connect(&web).await;
    let mut statuses = BTreeSet::new();
    for _ in 0..2000 {
        statuses.insert(raw.call("ValidateJWTSVID", GOOD, frame(0, 0, b"")).await.1);
        if statuses.len() == 2 {
            break;
        }
    }
    assert!(statuses.contains(&Some(code::RESOURCE_EXHAUSTED)), "{statuses:?}");
}

#[tokio::test]
async fn a_long_run_folder_is_no_obstacle() {
    let host = Host::new(HOUR);
    let settings = IdentityConfig {
        trust_domain: "home".into(),
        roots: host.server.ca.root_pem().to_owned(),
        run_dir: host.dir.path().join("long".repeat(40)),
    };
    let (issuer, keys) = (host.server.clone(), host.keys.subscribe());
    let agent = Identities::new(&Env::real(), &settings, issuer, keys, AgentHandle::default()).unwrap();
    let web = agent.open(&plan(1, "web")).await.unwrap();
    assert!(web.folder.join(IDENTITY_SOCKET).as_os_str().len() > 108);
    // As a container would: by the folder.
    let folder = fs::File::open(&web.folder).unwrap();
    let short = format!("unix:///proc/self/fd/{}/{IDENTITY_SOCKET}", folder.as_raw_fd());
    let client = WorkloadApiClient::connect_to(short).await.unwrap();
    assert!(client.fetch_x509_svid().await.is_ok());
}
