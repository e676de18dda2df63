//! `cargo xtask bench NAME [--json]`: the benches by name. A new one is a file and a line in [`BENCHES`].

mod access;
mod api;
mod autoscale;
mod cloud;
mod container;
mod failover;
mod function;
mod http;
mod load;
mod local;
mod network;
mod placement;
mod policy;
mod process;
mod regions;
mod replay;
mod report;
mod rollout;
mod scale;
mod store;
mod wake;
mod watch;

use report::Row;

/// As in `nexus`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A bench: its name, what it measures, and how.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn() -> anyhow::Result<Vec<Row>>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "placement",
        about: "decisions of one cell with 50,000 hosts, on one core; or recorded requests: see `placement --help`",
        run: placement::run,
    },
    Bench { name: "policy", about: "who may do what: decisions with 100 policies, 10,000 entities", run: policy::run },
    Bench { name: "access", about: "reads by access token, with 100 policies, 10,000 entities", run: access::run },
    Bench {
        name: "function",
        about: "components: deployed to first answer, a fresh instance per request",
        run: function::run,
    },
    Bench { name: "wake", about: "a function from zero instances to its first answer", run: wake::run },
    Bench { name: "container", about: "containers: deployed to first answer, start to exit", run: container::run },
    Bench { name: "failover", about: "a host with 100 containers dies", run: failover::run },
    Bench {
        name: "autoscale",
        about: "real series: minutes with too few instances and cost, by forecast and by a reactive rule",
        run: autoscale::run,
    },
    Bench { name: "api", about: "100,000 objects: creates, lists, gets", run: api::run },
    Bench { name: "scale", about: "one region's control plane under 10,000 hosts, 100,000 instances", run: scale::run },
    Bench { name: "store", about: "the metadata store beside etcd; a large state; a leader's death", run: store::run },
    Bench { name: "watch", about: "5,000 watches of the metadata store under load", run: watch::run },
    Bench { name: "rollout", about: "a rollout of 50 containers, surge 25 %", run: rollout::run },
    Bench {
        name: "network",
        about: "tenants' networks: between two hosts, NICs, a balancer, a change on ten hosts, and told",
        run: network::run,
    },
    Bench { name: "local", about: "the local cloud: coming up, and idle", run: local::run },
    Bench { name: "regions", about: "three regions: idle, and when the leading one is lost", run: regions::run },
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // What the code under measure warns of belongs to the figures.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    if let Err(e) = run(&arguments) {
        eprintln!("error: {e:#}");
        std::process::exit(1);
    }
}

fn run(arguments: &[String]) -> anyhow::Result<()> {
    // A member of a measured cluster is this program once more.
    if let Some((_, rest)) = arguments.split_first().filter(|(first, _)| *first == "store-server") {
        return store::server::run(rest);
    }
    // What a sleeping function's first answer is compared with, likewise.
    if let Some((_, rest)) = arguments.split_first().filter(|(first, _)| *first == "load-and-run") {
        return wake::bare(rest);
    }
    let json = arguments.iter().any(|a| a == "--json");
    let names: Vec<&str> = arguments.iter().map(String::as_str).filter(|a| *a != "--json").collect();
    // Only one bench has options.
    if let ["placement", options @ ..] = &names[..]
        && !options.is_empty()
    {
        warn_of_debug();
        let rows = replay::run(options)?;
        return tell(&rows, json);
    }
    let [name] = names[..] else {
        println!("cargo xtask bench NAME [--json]; NAME is one of");
        for bench in BENCHES {
            println!("  {:<12} {}", bench.name, bench.about);
        }
        return if names.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("one name is needed, not {names:?}")) };
    };
    let Some(bench) = BENCHES.iter().find(|b| b.name == name) else {
        let known: Vec<&str> = BENCHES.iter().map(|b| b.name).collect();
        anyhow::bail!("there is no bench `{name}`; there are {}", known.join(", "));
    };
    warn_of_debug();
    tell(&(bench.run)()?, json)
}

fn warn_of_debug() {
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing");
    }
}

fn tell(rows: &[Row], json: bool) -> anyhow::Result<()> {
    match (json, rows) {
        (_, []) => Ok(()),
        (true, _) => report::print_json(rows),
        (false, _) => report::print_table(rows),
    }
}
