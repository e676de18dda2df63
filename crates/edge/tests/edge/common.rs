//! A gateway on a free port, instances that say who they are, and clients.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use nexus_edge::{Gateway, Options};
use nexus_env::{Endpoint, Env};
use nexus_model::Uid;
use nexus_model::kind::{Protocol, Runtime};
use nexus_model::plan::{Backend, RoutingTable, Service, TableRoute};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// No wait in a test is longer; none that passes comes near.
pub const LONG: Duration = Duration::from_secs(30);

pub struct Edge {
    pub gateway: Gateway,
    pub address: SocketAddr,
    pub stop: CancellationToken,
    pub task: JoinHandle<()>,
}

impl Edge {
    /// The value of a metric, named with its labels; 0 while there is none.
    pub fn counted(&self, metric: &str) -> u64 {
        let text = self.gateway.metrics_text();
        let values = text.lines().filter_map(|line| line.strip_prefix(metric)?.trim().parse::<u64>().ok());
        values.sum()
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn options() -> Options {
    Options::new("zone-a".parse().unwrap())
}

pub async fn edge(options: Options) -> Edge {
    edge_in(Env::real(), options).await
}

pub async fn edge_in(env: Env, options: Options) -> Edge {
    let listener = env.transport.bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let Endpoint::Tcp(address) = listener.local() else { unreachable!() };
    let (gateway, stop) = (Gateway::new(env, options), CancellationToken::new());
    let (own, own_stop) = (gateway.clone(), stop.clone());
    let task = tokio::spawn(async move { own.serve(listener, own_stop).await });
    Edge { gateway, address, stop, task }
}

/// An instance. Dropping it closes its listener and cuts its connections off.
pub struct Instance {
    pub address: SocketAddr,
    pub requests: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Instance {
    pub fn count(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Ends it and waits until it is gone.
    pub async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

pub async fn bind(address: SocketAddr) -> TcpListener {
    // A killed instance's port may linger for a moment.
    for _ in 0..500 {
        if let Ok(listener) = TcpListener::bind(address).await {
            return listener;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{address} does not become free");
}

/// Serves `handler` at an address; port 0 takes a free one.
pub async fn serve<F, H, B>(address: SocketAddr, handler: F) -> Instance
where
    F: Fn(Request<Incoming>) -> H + Clone + Send + Sync + 'static,
    H: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let listener = bind(address).await;
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let (handler, counted) = (handler.clone(), counted.clone());
            let service = hyper::service::service_fn(move |request| {
                counted.fetch_add(1, Ordering::SeqCst);
                let answer = handler(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            connections.spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
    Instance { address, requests, task }
}

pub fn free() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// An instance that answers with its name.
pub async fn named(name: &'static str) -> Instance {
    serve(free(), move |_| async move { Response::new(Full::new(Bytes::from(name))) }).await
}

/// Takes requests, counts them, and closes each connection after `answer`.
pub async fn cutter(answer: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>, JoinHandle<()>) {
    let listener = TcpListener::bind(free()).await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buf = [0; 4096];
            if stream.read(&mut buf).await.is_ok_and(|n| n > 0) {
                counted.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(answer).await;
            }
        }
    });
    (address, count, task)
}

pub fn backend(id: u8, address: SocketAddr) -> Backend {
    Backend {
        uid: Uid::from_random([id; 16]),
        address,
        zone: "zone-a".parse().unwrap(),
        epoch: 1,
        ready: true,
        newer: false,
    }
}

pub fn service(app: &str, backends: Vec<Backend>) -> Service {
    Service {
        project: "default".parse().unwrap(),
        app: app.parse().unwrap(),
        port: 80,
        protocol: Protocol::Http,
        runtime: Runtime::Container,
        backends,
        global: false,
        regions: Vec::new(),
        wakes: false,
        starting: Vec::new(),
        split: None,
    }
}

/// Every service at `APP.localhost`.
pub fn table(revision: u64, services: Vec<Service>) -> RoutingTable {
    let route = |(i, s): (usize, &Service)| TableRoute {
        host: format!("{}.localhost", s.app),
        path: "/".into(),
        service: i as u32,
    };
    let routes = services.iter().enumerate().map(route).collect();
    RoutingTable { version: 1, revision, services, routes, ..RoutingTable::default() }
}

pub type Client = legacy::Client<HttpConnector, Full<Bytes>>;

pub fn client() -> Client {
    legacy::Client::builder(TokioExecutor::new()).build_http()
}

pub struct Got {
    pub status: StatusCode,
    pub headers: http::HeaderMap,
    pub body: String,
}

pub async fn ask(client: &Client, edge: &Edge, method: &str, host: &str, path: &str, body: &'static str) -> Got {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{}{path}", edge.address))
        .header("host", host)
        .body(Full::new(Bytes::from(body)))
        .unwrap();
    let response = tokio::time::timeout(LONG, client.request(request)).await.unwrap().unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Got { status: head.status, headers: head.headers, body: String::from_utf8_lossy(&body).into_owned() }
}

pub async fn get(edge: &Edge, host: &str) -> Got {
    ask(&client(), edge, "GET", host, "/", "").await
}

/// Waits until `what` holds.
pub async fn until(mut what: impl AsyncFnMut() -> bool) {
    tokio::time::timeout(LONG, async {
        while !what().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the condition holds in time");
}
