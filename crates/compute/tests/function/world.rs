//! What the tests share: the built example, a runtime in a folder of its own, and a small HTTP client.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use nexus_compute::function::{FunctionConfig, FunctionRuntime};
use nexus_compute::keep::LogFiles;
use nexus_compute::{Observed, Runtime, Sandbox, State};
use nexus_model::kind::{Port, Template};
use nexus_model::{Bytes as Size, Digest, Uid};
use tempfile::TempDir;

use crate::keep::TestKeep;

/// A generous bound for what happens at once on a machine that has nothing else to do.
pub const SOON: Duration = Duration::from_secs(60);

/// Builds `examples/hello-function` as its README says, and returns the component.
pub fn component() -> Vec<u8> {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hello-function");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hello-function");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--target", "wasm32-wasip2"])
        .current_dir(example)
        .env("CARGO_TARGET_DIR", &target)
        // What the outer cargo sets for this package would make the inner one build everything anew, or otherwise.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .status()
        .unwrap();
    assert!(status.success(), "the example does not build");
    std::fs::read(target.join("wasm32-wasip2/release/hello_function.wasm")).unwrap()
}

pub struct World {
    pub dir: TempDir,
    pub keep: Arc<TestKeep>,
    pub hello: Digest,
    http: Client<HttpConnector, Full<Bytes>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.keep.end_all();
    }
}

impl World {
    pub fn new(component: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        let http = Client::builder(TokioExecutor::new()).build_http();
        let mut world = Self { dir, keep: Arc::default(), hello: Digest::of(b""), http };
        world.hello = world.blob(component);
        world
    }

    pub fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.dir.path().join("blobs").join(digest.hex()), bytes).unwrap();
        digest
    }

    /// A runtime, as an agent that has just started makes it.
    pub fn runtime(&self) -> FunctionRuntime {
        let blobs = self.dir.path().join("blobs");
        FunctionRuntime::new(FunctionConfig {
            dir: self.dir.path().join("functions"),
            keep: self.keep.clone(),
            blob: Arc::new(move |digest| blobs.join(digest.hex())),
            exe: std::env::current_exe().unwrap(),
        })
        .unwrap()
    }

    pub fn sandbox(&self) -> Sandbox {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let uid = Uid::from_random([NEXT.fetch_add(1, Ordering::SeqCst); 16]);
        let ports = vec![Port { port: free_port(), protocol: Default::default(), name: None }];
        let mut template = Template { ports, ..Template::default() };
        template.env.insert("NAME".into(), "the test".into());
        template.resources.memory = Size(64 << 20);
        template.function.timeout_seconds = 20;
        Sandbox {
            uid,
            epoch: 1,
            name: "hello-1".parse().unwrap(),
            project: "default".parse().unwrap(),
            app: "hello".parse().unwrap(),
            template,
            image: self.hello,
            netns: PathBuf::from("/proc/self/ns/net"),
            address6: Ipv6Addr::LOCALHOST,
            address4: Ipv4Addr::LOCALHOST,
            identity: None,
            secrets: Default::default(),
            part: None,
            cpuset: None,
            shared: None,
            logs: LogFiles { dir: self.dir.path().join(format!("logs-{uid}")), max_bytes: 1 << 20, keep: 2 },
        }
    }

    /// Which executor serves an instance, as the agent has written it down.
    pub fn executor_of(&self, uid: Uid) -> String {
        let record = std::fs::read(self.dir.path().join(format!("functions/instances/{uid}.json"))).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        record["executor"].as_str().unwrap().to_owned()
    }

    pub async fn get(&self, sandbox: &Sandbox, path: &str) -> (u16, String) {
        let response = self.request(sandbox, path, Bytes::new()).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    pub async fn request(
        &self,
        sandbox: &Sandbox,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        let uri = format!("http://127.0.0.1:{}{path}", sandbox.template.ports[0].port);
        let method = if body.is_empty() { "GET" } else { "POST" };
        let request = Request::builder().method(method).uri(uri).body(Full::new(body)).unwrap();
        tokio::time::timeout(SOON, self.http.request(request)).await.expect("an answer in time")
    }

    pub fn log(&self, sandbox: &Sandbox) -> String {
        std::fs::read_to_string(sandbox.logs.dir.join("current")).unwrap_or_default()
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    listener.local_addr().unwrap().port()
}

pub async fn state(runtime: &dyn Runtime, uid: Uid) -> Option<State> {
    let find = |observed: Vec<Observed>| observed.into_iter().find(|o| o.uid == uid).map(|o| o.state);
    find(runtime.observe().await.unwrap())
}

pub fn running(state: &Option<State>) -> bool {
    matches!(state, Some(State::Running { .. }))
}

/// Waits for a condition.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + SOON;
    while !condition().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
