//! Functions: components of the world `wasi:http/proxy`, a fresh instance of them for every request.
//!
//! The agent's side is [`FunctionRuntime`]; it never loads a tenant's code. It has each component compiled once per host in
//! a confined process, and keeps one *executor* process per project, which runs as a user of its own without privileges,
//! file system or capabilities ([`executor_main`]), and one that stands by for the next project. For each instance the agent
//! binds a socket inside the instance's network namespace, and hands it with the compiled artefact and the folder of the logs to
//! the executor, so that the executor needs neither rights nor names; it listens when it can serve. It asks the agent for each
//! connection that a function makes to others. The executor goes on without the agent; when it ends, its instances are
//! observed as exited, and whoever drives the runtime starts them again.
//!
//! Architecture invariant: only artefacts that this host compiled are loaded, and only by an executor.

mod agent;
mod bench;
mod client;
mod compile;
mod confine;
mod control;
mod engine;
mod executor;
mod log;
mod outgoing;
mod outlet;
mod pool;
mod serve;
mod ticker;

pub use agent::{DEFAULT_PORT, FunctionConfig, FunctionRuntime};
pub use bench::{BenchError, BenchOutcome, bench_compile, bench_in_process, bench_load_and_run};
pub use executor::executor_main;
