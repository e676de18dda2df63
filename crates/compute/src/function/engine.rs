//! The wasm engine: one configuration for compiling, serving and measuring, what guests may call, and what a guest's store
//! holds.
//!
//! A guest gets clocks, randomness, its variables, its log, its request, and HTTP to whom its instance may reach
//! ([`super::outgoing`]). The file system is empty, and of the network there is nothing else: sockets and names are refused.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nexus_env::{Clock, RealClock};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Config, Engine, OptLevel, PoolingAllocationConfig, ResourceLimiterAsync, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::{
    DEFAULT_FORBIDDEN_HEADERS, Error as HttpError, ForbiddenHeaderFilter, RequestOptions, WasiBody, WasiHttpCtx,
    WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

use super::log::{Channel, LogStream};
use super::outgoing::{self, Sending, Way};

/// Guests under way at once in one executor, whatever their instances allow. Each slot is only reserved address space (4 GiB
/// and guards) until it is used.
pub(super) const SLOTS: u32 = 512;

/// Bytes of a page of linear memory.
pub(super) const PAGE: u64 = 64 << 10;

/// What 32-bit linear memory can address, in pages.
const MAX_PAGES: u64 = (4 << 30) / PAGE;

/// How long growth waits for other requests of the instance to release memory before it is refused.
const MEMORY_WAIT: Duration = Duration::from_secs(1);

/// Handles (headers, streams, pollables) that one guest may hold: they live in the executor's memory, not in the guest's.
const MAX_HANDLES: usize = 10_000;

/// Random bytes that one call may ask for, for the same reason.
const MAX_RANDOM: u64 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Compile,
    /// Runs artefacts; can't compile, and so carries no compiler's memory.
    Serve,
    /// Compiles and runs as `Serve` does.
    Measure,
    /// Runs one artefact, once: nothing is made ready for others.
    Once,
}

pub(super) fn engine(purpose: Purpose) -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config.epoch_interruption(true).max_wasm_stack(512 << 10).async_stack_size(1 << 20);
    match purpose {
        Purpose::Serve | Purpose::Once => config.enable_compiler(false),
        Purpose::Compile | Purpose::Measure => config.cranelift_opt_level(OptLevel::Speed),
    };
    if matches!(purpose, Purpose::Serve | Purpose::Measure) {
        config.allocation_strategy(pool());
    }
    Engine::new(&config)
}

fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(SLOTS)
        .total_core_instances(SLOTS * 8)
        .total_memories(SLOTS)
        .total_tables(SLOTS * 4)
        .total_stacks(SLOTS)
        .max_core_instances_per_component(64)
        .max_memories_per_component(8)
        .max_tables_per_component(32)
        .table_elements(100_000)
        // A handful of warm slots serves the usual load; more would only hold memory while nothing happens. What a request
        // dirtied is given back at its end but for these first bytes, which are cheaper to clear than to fault in again.
        .max_unused_warm_slots(8)
        .linear_memory_keep_resident(128 << 10)
        .table_keep_resident(16 << 10)
        .async_stack_keep_resident(16 << 10);
    pool
}

/// Everything that a guest may import.
pub(super) fn linker(engine: &Engine) -> wasmtime::Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    Ok(linker)
}

/// A component that is ready to be instantiated.
pub(super) struct Program {
    pub pre: ProxyPre<Guest>,
    /// The linear memory that an instance has before it asks for any, in pages.
    pub initial_pages: u64,
}

/// Why a component can't be served, for its author.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    #[error(
        "the component does not export wasi:http/incoming-handler@0.2 (it exports {0}); build it for wasi:http/proxy"
    )]
    NoHandler(String),
    #[error("the component can't be linked: {0:#}")]
    Link(wasmtime::Error),
}

impl Program {
    pub(super) fn new(linker: &Linker<Guest>, component: &Component) -> Result<Self, Unfit> {
        let ty = component.component_type();
        let exports: Vec<_> = ty.exports(linker.engine()).map(|(name, item)| (name.to_owned(), item.ty)).collect();
        let handles = |(name, item): &(String, ComponentItem)| {
            name.starts_with("wasi:http/incoming-handler@0.2.") && matches!(item, ComponentItem::ComponentInstance(_))
        };
        if !exports.iter().any(handles) {
            let names: Vec<_> = exports.into_iter().map(|(name, _)| name).collect();
            let names = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
            return Err(Unfit::NoHandler(names));
        }
        let pre = linker.instantiate_pre(component).and_then(ProxyPre::new).map_err(Unfit::Link)?;
        let initial_pages = component
            .resources_required()
            .map_or(0, |required| u64::from(required.num_memories > 0) * required.max_initial_memory_size.unwrap_or(0));
        Ok(Self { pre, initial_pages })
    }
}

/// The linear memory that the requests of one instance share: what placement has reserved, and no more.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    free: Arc<Semaphore>,
    pages: u32,
}

impl Memory {
    pub(super) fn new(bytes: u64) -> Self {
        let pages = u32::try_from((bytes / PAGE).clamp(1, 1 << 24)).expect("clamped");
        Self { free: Arc::new(Semaphore::new(pages as usize)), pages }
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages.into()
    }
}

/// What a guest's store holds.
pub(super) struct Guest {
    table: ResourceTable,
    wasi: WasiCtx,
    http: WasiHttpCtx,
    hooks: Hooks,
    limiter: Limiter,
}

impl Guest {
    /// A store for one request. Without a way to others and to a log, there are no outgoing requests and output is thrown away.
    pub(super) fn store(engine: &Engine, env: &[(String, String)], way: Option<&Way>, memory: &Memory) -> Store<Self> {
        let mut wasi = WasiCtx::builder();
        wasi.envs(env).allow_tcp(false).allow_udp(false).allow_ip_name_lookup(false).max_random_size(MAX_RANDOM);
        if let Some(Way { log, .. }) = way {
            wasi.stdout(LogStream::new(log.clone(), Channel::Stdout));
            wasi.stderr(LogStream::new(log.clone(), Channel::Stderr));
        }
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_HANDLES);
        let limiter = Limiter { memory: memory.clone(), held: 0, refused: None };
        let hooks = Hooks { way: way.cloned() };
        let guest = Self { table, wasi: wasi.build(), http: WasiHttpCtx::new(), hooks, limiter };
        let mut store = Store::new(engine, guest);
        store.limiter_async(|guest| &mut guest.limiter);
        store.set_epoch_deadline(1);
        store.epoch_deadline_async_yield_and_update(1);
        store
    }

    /// Why memory was refused, if it was: that is what a trap that follows is about.
    pub(super) fn memory_refusal(&self) -> Option<String> {
        self.limiter.refused.clone()
    }
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for Guest {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { ctx: &mut self.http, table: &mut self.table, hooks: &mut self.hooks }
    }
}

struct Hooks {
    way: Option<Way>,
}

static FORBIDDEN: LazyLock<ForbiddenHeaderFilter> =
    LazyLock::new(|| Arc::new(|name| DEFAULT_FORBIDDEN_HEADERS.contains(name)));

impl WasiHttpHooks for Hooks {
    fn forbidden_header_filter(&mut self) -> ForbiddenHeaderFilter {
        FORBIDDEN.clone()
    }

    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Sending<()>,
    ) -> Sending<(http::Response<WasiBody>, Sending<()>)> {
        match self.way.clone() {
            Some(way) => Box::new(outgoing::send(way, request, options.unwrap_or_default())),
            None => Box::new(async { Err(HttpError::HttpRequestDenied) }),
        }
    }
}

struct Limiter {
    memory: Memory,
    /// Pages.
    held: u32,
    refused: Option<String>,
}

impl Drop for Limiter {
    fn drop(&mut self) {
        self.memory.free.add_permits(self.held as usize);
    }
}

#[async_trait::async_trait]
impl ResourceLimiterAsync for Limiter {
    async fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let pages = |bytes: usize| (bytes as u64).div_ceil(PAGE);
        let more = pages(desired).saturating_sub(pages(current));
        let total = u64::from(self.held) + more;
        if total > u64::from(self.memory.pages) || total > MAX_PAGES {
            self.refused = Some(format!(
                "it asked for {} MiB of memory; {} MiB are allowed",
                (total * PAGE) >> 20,
                (u64::from(self.memory.pages) * PAGE) >> 20
            ));
            return Ok(false);
        }
        let more = u32::try_from(more).expect("not more than the limit, which is a u32");
        let permit = match self.memory.free.try_acquire_many(more) {
            Ok(permit) => permit,
            // Others hold it. An innocent request should not fail because a neighbour is about to.
            Err(_) => match timeout(MEMORY_WAIT, self.memory.free.acquire_many(more)).await {
                Ok(Ok(permit)) => permit,
                _ => {
                    self.refused = Some("the instance's other requests hold all of its memory".into());
                    return Ok(false);
                }
            },
        };
        permit.forget();
        self.held += more;
        Ok(true)
    }

    async fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= 100_000)
    }
}

/// Wall time for records, which outlive the process.
pub(super) fn now() -> nexus_model::Timestamp {
    nexus_model::Timestamp::from_millis(RealClock::new().now_millis())
}
