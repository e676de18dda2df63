//! A real etcd cluster on loopback, in a folder of its own, ended with the last handle.
#![allow(dead_code)] // Each test binary uses its own part.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nexus_store::GroupId;
use nexus_store::etcd::{Config, EtcdEndpoint, EtcdStore, Login};
use tokio_rustls::rustls;

use nexus_env::{Endpoint, Env};

/// A user who may do what the engine needs, and nothing else.
pub const USER: &str = "nexus";
pub const PASSWORD: &str = "correct horse";

/// How a cluster is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub members: usize,
    /// TLS in front of clients, who must show a certificate.
    pub tls: bool,
    /// Whoever comes must log in.
    pub users: bool,
    pub max_ops: usize,
    /// Bytes that its database may take; 0 for as many as etcd takes by itself.
    pub quota: usize,
}

impl Shape {
    pub const ONE: Self = Self { members: 1, tls: false, users: false, max_ops: 1_024, quota: 0 };
    pub const ONE_SECURE: Self = Self { tls: true, users: true, ..Self::ONE };
    pub const THREE_SECURE: Self = Self { members: 3, max_ops: 256, ..Self::ONE_SECURE };
}

pub struct Etcd {
    dir: tempfile::TempDir,
    shape: Shape,
    /// Client and peer ports.
    ports: Vec<(u16, u16)>,
    children: Mutex<Vec<Option<Child>>>,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Etcd {
    /// Starts a cluster and waits until it serves.
    pub fn start(shape: Shape) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ports = (0..shape.members).map(|_| (free_port(), free_port())).collect();
        let children = Mutex::new((0..shape.members).map(|_| None).collect());
        let etcd = Self { dir, shape, ports, children };
        if shape.tls {
            etcd.certificates();
        }
        (0..shape.members).for_each(|m| etcd.boot(m));
        etcd.wait();
        if shape.users {
            etcd.ctl(&["user", "add", "root:another", "--interactive=false"]);
            etcd.ctl(&["user", "grant-role", "root", "root"]);
            etcd.ctl(&["role", "add", "nexus"]);
            etcd.ctl(&["role", "grant-permission", "nexus", "--prefix=true", "readwrite", "/nexus/"]);
            etcd.ctl(&["user", "add", &format!("{USER}:{PASSWORD}"), "--interactive=false"]);
            etcd.ctl(&["user", "grant-role", USER, "nexus"]);
            etcd.ctl(&["auth", "enable"]);
        }
        etcd
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn authority(&self, name: &str) -> rcgen::Issuer<'static, rcgen::KeyPair> {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        std::fs::write(self.file(name), params.self_signed(&key).unwrap().pem()).unwrap();
        rcgen::Issuer::new(params, key)
    }

    fn certificates(&self) {
        self.authority("other-ca.pem");
        let issuer = self.authority("ca.pem");
        for name in ["server", "client"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let params = rcgen::CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
            let cert = params.signed_by(&key, &issuer).unwrap();
            std::fs::write(self.file(&format!("{name}.pem")), cert.pem()).unwrap();
            std::fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
        }
    }

    fn scheme(&self) -> &'static str {
        if self.shape.tls { "https" } else { "http" }
    }

    /// Starts a member, anew or again.
    pub fn boot(&self, member: usize) {
        let (client, peer) = self.ports[member];
        let peers = self.ports.iter().enumerate().map(|(m, (_, p))| format!("m{m}=http://127.0.0.1:{p}"));
        let client = format!("{}://127.0.0.1:{client}", self.scheme());
        let peer = format!("http://127.0.0.1:{peer}");
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.file(&format!("m{member}.log"))).unwrap();
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("m{member}")])
            .arg("--data-dir")
            .arg(self.file(&format!("m{member}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.collect::<Vec<_>>().join(",")])
            .args(["--max-txn-ops", &self.shape.max_ops.to_string()])
            .args(["--quota-backend-bytes", &self.shape.quota.to_string()])
            .args(["--logger", "zap", "--log-level", "warn"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if self.shape.tls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(self.file("ca.pem"));
            command.arg("--cert-file").arg(self.file("server.pem")).arg("--key-file").arg(self.file("server.key"));
        }
        let child = command.spawn().expect("running etcd: install Debian's etcd-server");
        self.children.lock().unwrap()[member] = Some(child);
    }

    /// Kills a member as `kill -9` does.
    pub fn kill(&self, member: usize) {
        if let Some(mut child) = self.children.lock().unwrap()[member].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("etcdctl");
        let endpoints: Vec<String> =
            self.ports.iter().map(|(p, _)| format!("{}://127.0.0.1:{p}", self.scheme())).collect();
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(endpoints.join(","));
        if self.shape.tls {
            command.arg("--cacert").arg(self.file("ca.pem"));
            command.arg("--cert").arg(self.file("client.pem")).arg("--key").arg(self.file("client.key"));
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// An operator's command.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let output = self.ctl_command(arguments).output().expect("running etcdctl: install Debian's etcd-client");
        assert!(output.status.success(), "etcdctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.ctl_command(&["endpoint", "health"]).output().is_ok_and(|o| o.status.success()) {
            let log = || std::fs::read_to_string(self.file("m0.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "etcd does not come up: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn endpoints(&self) -> Vec<EtcdEndpoint> {
        let at = |port: u16| Endpoint::Tcp(([127, 0, 0, 1], port).into());
        self.ports.iter().map(|(p, _)| EtcdEndpoint { host: "localhost".into(), at: at(*p) }).collect()
    }

    /// The cluster as the command line takes it: with the user's own prefix, and files for what the shape asks of clients.
    pub fn url(&self) -> String {
        let hosts: Vec<String> = self.ports.iter().map(|(p, _)| format!("127.0.0.1:{p}")).collect();
        let (mut user, mut options) = (String::new(), Vec::new());
        let mut file = |option: &str, name: &str| options.push(format!("{option}={}", self.file(name).display()));
        if self.shape.tls {
            file("ca", "ca.pem");
            file("cert", "client.pem");
            file("key", "client.key");
        }
        if self.shape.users {
            user = format!("{USER}@");
            std::fs::write(self.file("password"), format!("{PASSWORD}\n")).unwrap();
            file("password-file", "password");
        }
        format!("etcd://{user}{}/nexus?{}", hosts.join(","), options.join("&"))
    }

    pub fn config(&self, node: u64, group: &str) -> Config {
        let mut config = Config::new(node, GroupId::new(group).unwrap(), self.endpoints());
        config.endpoint = format!("server-{node}");
        if self.shape.tls {
            config.tls = Some(self.tls(&self.file("ca.pem"), true));
        }
        if self.shape.users {
            config.login = Some(Login { user: USER.into(), password: PASSWORD.into() });
        }
        config
    }

    /// How clients speak TLS who trust an authority, with this cluster's certificate for clients or none.
    pub fn tls(&self, ca: &Path, certificate: bool) -> Arc<rustls::ClientConfig> {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = if certificate {
            let cert = CertificateDer::from_pem_file(self.file("client.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(self.file("client.key")).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }

    pub async fn open(&self, node: u64, group: &str) -> Arc<EtcdStore> {
        Arc::new(EtcdStore::open(self.config(node, group), Env::real()).await.unwrap())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.shape.members).for_each(|m| self.kill(m));
    }
}

/// Waits for something, for as long as a loaded machine may need.
pub async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = found().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The cluster that tests of one shape share while any of them runs.
pub fn shared(place: &Mutex<Weak<Etcd>>, shape: Shape) -> Arc<Etcd> {
    let mut weak = place.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(etcd) = weak.upgrade() {
        return etcd;
    }
    let etcd = Arc::new(Etcd::start(shape));
    *weak = Arc::downgrade(&etcd);
    etcd
}
