//! The `nexus` binary: roles, command line, and the local cloud. Logic lives in the rooms below.
//!
//! Architecture invariant: the commands that fork (`shim`, `keeper`, `executor`, `host-init`, the supervisor, `up`) are
//! dispatched before any runtime or thread exists, because a fork of a threaded process can't do much safely.

mod cli;
mod client;
mod config;
mod context;
mod exit;
mod inherit;
mod local;
mod role;
mod secret_file;
mod session;

use clap::Parser as _;
use cli::{Cli, Command};
use config::{AgentConfig, Config as _, GatewayConfig, HostInitConfig, KeeperConfig, ServerConfig};

/// The store's trees are millions of small pieces that come and go: a fifth of a write's time was the C library's `malloc`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    // Before words are parsed, which takes longer than the rest of their start: whoever asks for a sleeping function waits for it.
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == "executor")
        && let Err(e) = role::executor::run(words.collect())
    {
        std::process::exit(cli::report::print(&e));
    }
    let command = Cli::parse().command;
    if command.is_for_people() {
        end_with_the_reader();
    }
    let code = match dispatch(command) {
        Ok(code) => code,
        Err(e) => cli::report::print(&e),
    };
    std::process::exit(code);
}

fn dispatch(command: Command) -> anyhow::Result<i32> {
    match command {
        // Without threads.
        Command::Shim(inner) => role::shim::run(inner.args),
        Command::Executor(inner) => role::executor::run(inner.args),
        Command::Relay(inner) => role::relay::run(inner.args),
        Command::Keeper(role) => {
            start_log();
            role::keeper::run(KeeperConfig::load(&role.config)?)
        }
        Command::HostInit(role) => local::host_init::run(&HostInitConfig::load(&role.config)?),
        Command::LocalSupervise { data_dir } => local::supervisor::run(local::state::DataDir::at(&data_dir)?),
        Command::LocalProbe { scratch } => local::preflight::probe(&scratch),
        Command::Up(args) => local::up(&args),
        Command::Down(args) => local::down(&args),
        Command::Local(args) => local::local(&args),
        // Daemons.
        Command::Server(args) => match args.command {
            Some(command) => cli::operate(cli::server::run(command)),
            None => {
                let mut config = ServerConfig::load(&args.config.unwrap_or_default())?;
                config.store = args.store.url.or(config.store);
                daemon(role::server::run(config))
            }
        },
        Command::Agent(role) => {
            let config = role.apply(AgentConfig::load(&role.config)?)?;
            daemon(role::agent::run(config))
        }
        Command::Gateway(args) => match args.command {
            Some(command) => cli::operate(cli::host::gateway(command)),
            None => daemon(role::gateway::run(GatewayConfig::load(&args.config.unwrap_or_default())?)),
        },
        // Clients.
        Command::User(command) => return cli::run(*command),
        Command::Status(args) => local::small_runtime()?.block_on(cli::status::run(&args)),
    }?;
    Ok(0)
}

/// Lets `nexus … | head` end in silence when `head` has seen enough, as other programs do; by default a write would panic.
fn end_with_the_reader() {
    // SAFETY: the default action is set before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Runs a role to its end on a runtime with as many threads as are of use.
fn daemon(role: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    start_log();
    install_crypto();
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(2, 16);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(role)
}

/// One line per outcome on standard error; `NEXUS_LOG` chooses what, as in `info,nexus_agent=debug`.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("NEXUS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,openraft=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// Makes ring the process's provider of cryptography. Harmless when it is already.
fn install_crypto() {
    rustls::crypto::ring::default_provider().install_default().ok();
}
