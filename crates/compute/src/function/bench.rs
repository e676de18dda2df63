//! The peers that the function benchmark compares itself with: the same engine, the same component, a fresh instance per
//! request, but in one process on one thread, without sockets; and a bare program that loads what was compiled and runs it once.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use tokio::sync::oneshot;
use wasmtime::component::Component;
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;

use super::engine::{self, Guest, Memory, Program, Purpose};

/// What [`bench_in_process`] measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOutcome {
    pub requests: u32,
    pub elapsed: Duration,
    /// The body of the last answer.
    pub body: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("the engine: {0:#}")]
    Engine(#[from] wasmtime::Error),
    #[error("the component: {0}")]
    Unfit(String),
    #[error("the runtime: {0}")]
    Runtime(#[from] std::io::Error),
    #[error("a request was not answered: {0}")]
    Unanswered(String),
}

/// Compiles a component, then answers `requests` GETs of `path` one after another on the calling thread. Compiling is not in
/// the time that it returns.
pub fn bench_in_process(component: &[u8], path: &str, requests: u32) -> Result<BenchOutcome, BenchError> {
    let engine = engine::engine(Purpose::Measure)?;
    let component = Component::new(&engine, component)?;
    let linker = engine::linker(&engine)?;
    let program = Program::new(&linker, &component).map_err(|e| BenchError::Unfit(e.to_string()))?;
    let memory = Memory::new(1 << 30);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut body = Vec::new();
        let start = Instant::now();
        for _ in 0..requests {
            body = answer(&engine, &program, &memory, path).await?;
        }
        Ok(BenchOutcome { requests, elapsed: start.elapsed(), body })
    })
}

/// Compiles a component to a file, as a host does.
pub fn bench_compile(component: &[u8], artefact: &Path) -> Result<(), BenchError> {
    let compiled = super::compile::compile(component).map_err(|e| BenchError::Unfit(e.to_string()))?;
    Ok(std::fs::write(artefact, compiled)?)
}

/// Loads what [`bench_compile`] wrote and answers one GET of `path`, with an engine of its own that is made for no more than that.
pub fn bench_load_and_run(artefact: &Path, path: &str) -> Result<Vec<u8>, BenchError> {
    let engine = engine::engine(Purpose::Once)?;
    let linker = engine::linker(&engine)?;
    // SAFETY: the bench has compiled the file itself, into a folder of its own.
    let component = unsafe { Component::deserialize_file(&engine, artefact)? };
    let program = Program::new(&linker, &component).map_err(|e| BenchError::Unfit(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(answer(&engine, &program, &Memory::new(1 << 30), path))
}

async fn answer(
    engine: &wasmtime::Engine,
    program: &Program,
    memory: &Memory,
    path: &str,
) -> Result<Vec<u8>, BenchError> {
    let body = Empty::<Bytes>::new();
    let request = Request::get(path).header("host", "localhost").body(body);
    let request = request.map_err(|e| BenchError::Unanswered(e.to_string()))?;
    let mut store = Guest::store(engine, &[], None, memory);
    let (sender, answered) = oneshot::channel();
    let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
    let out = store.data_mut().http().new_response_outparam(sender)?;
    let run = async move {
        let proxy = program.pre.instantiate_async(&mut store).await?;
        proxy.wasi_http_incoming_handler().call_handle(&mut store, request, out).await
    };
    let read = async {
        let response = answered.await.map_err(|_| BenchError::Unanswered("it set no response".into()))?;
        let response = response.map_err(|code| BenchError::Unanswered(format!("{code:?}")))?;
        let body = response.into_body().collect().await;
        Ok(body.map_err(|e| BenchError::Unanswered(e.to_string()))?.to_bytes().to_vec())
    };
    // Both at once: the guest waits for its reader when the body is large.
    let (ran, body) = tokio::join!(run, read);
    ran?;
    body
}
