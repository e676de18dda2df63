//! The local cloud: a whole region on one machine, or several, made of the same processes that a fleet runs.
//!
//! ```text
//! nexus up ── prepares the data folder, then starts ── supervisor
//!                                                        ├── server ×3, gateway ×2      in the machine's namespaces
//!                                                        └── host-init ×6               pid 1 of a local host
//!                                                              ├── keeper
//!                                                              └── agent
//! ```
//!
//! State is kept twice only where it must be: what runs is what `/proc` shows, what is connected is what the kernel's links
//! say, what the user wants is a handful of marks in the data folder. So a crash of anything leaves nothing to repair.

mod backoff;
mod cgroup;
mod control;
mod down;
pub mod host_init;
mod leave;
mod link;
pub mod materials;
mod plan;
pub mod preflight;
mod procs;
mod ready;
mod spawn;
pub mod state;
pub mod supervisor;
mod up;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use nexus_model::Name;

pub use control::run as local;
pub use control::{MemberView, has_supervisor, list};
pub use down::run as down;
pub use leave::Leaving;
pub use materials::Machine;
pub use plan::Plan;
use plan::{ClassGrant, GivenChoices, RegionPlan, StorageGrant, TierGrant};
pub use procs::SUPERVISE;
use state::DataDir;
pub use up::run as up;

/// Starts a cloud on this machine, or resumes it. Doing it twice is fine.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// How many regions: 1 to 5. A cloud of several takes more in later [default: 1]
    #[arg(long, value_name = "N")]
    regions: Option<usize>,
    /// What a region is: core (the default), regional or edge, such as region-c=edge. Only core regions vote on what all
    /// regions share
    #[arg(long = "tier", value_name = "REGION=TIER")]
    tiers: Vec<TierGrant>,
    /// How many zones in each region: 1 to 26 [default: 3, or 1 with several regions]
    #[arg(long, value_name = "N")]
    zones: Option<usize>,
    /// How many hosts in each zone [default: 2]
    #[arg(long, value_name = "N")]
    hosts_per_zone: Option<usize>,
    /// What a zone's hosts, or one host, offer of a compute class: PLACE:CLASS=COUNT, such as zone-a:gpu-v100=2
    #[arg(long = "class", value_name = "PLACE:CLASS=COUNT")]
    classes: Vec<ClassGrant>,
    /// What a zone's hosts, or one host, offer of a storage class: PLACE:CLASS=SIZE, such as zone-a:high-iops=1Gi
    #[arg(long = "storage-class", value_name = "PLACE:CLASS=SIZE")]
    storage: Vec<StorageGrant>,
    /// Where everything is kept [default: /var/lib/nexus for root, or ~/.local/share/nexus]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Returns when the cloud is ready, and leaves it running
    #[arg(long)]
    detach: bool,
    /// The first region's name [default: local, or region-a with several regions]
    #[arg(long, value_name = "NAME")]
    region: Option<Name>,
    /// Servers listen on this port and those after it, with TLS; without, ten higher; each further region twenty higher
    /// [default: 8443]
    #[arg(long, value_name = "PORT")]
    api_port_base: Option<u16>,
    /// Gateways listen on this port and the next; each further region ten higher; for health and metrics, a hundred higher
    /// [default: 8000]
    #[arg(long, value_name = "PORT")]
    gateway_port_base: Option<u16>,
    /// Keeps the metadata in an etcd cluster: etcd://[USER@]HOST:PORT,HOST:PORT/PREFIX, with TLS and a user
    /// ?ca=FILE&cert=FILE&key=FILE&password-file=FILE
    #[arg(long, value_name = "URL", value_parser = store_url)]
    store: Option<String>,
    /// How many seconds to wait until all is ready
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// The text is kept as it is: it is what the cloud was made with.
fn store_url(text: &str) -> Result<String, String> {
    crate::config::StoreConfig::from_url(text).map(|_| text.to_owned())
}

impl UpArgs {
    fn given(&self) -> GivenChoices {
        GivenChoices {
            zones: self.zones,
            hosts_per_zone: self.hosts_per_zone,
            classes: self.classes.clone(),
            storage: self.storage.clone(),
            api_port_base: self.api_port_base,
            gateway_port_base: self.gateway_port_base,
            region: self.region.clone(),
            regions: self.regions,
            tiers: self.tiers.clone(),
            store: self.store.clone(),
        }
    }
}

/// Stops the local cloud and leaves nothing of it running or mounted.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// Removes the data too: apps, images, keys, logs
    #[arg(long)]
    purge: bool,
    /// The cloud's data folder [default: that of the last `nexus up`]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

/// Looks at, kills, stops and cuts off the processes of the local cloud.
#[derive(Debug, Args)]
pub struct LocalArgs {
    /// The cloud's data folder [default: that of the last `nexus up`]
    #[arg(long, value_name = "DIR", global = true)]
    data_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: LocalCommand,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum LocalCommand {
    /// Shows every server, host and gateway
    List {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Kills a server, gateway or host (with all on it), or a whole region; it stays down. `agent@HOST`, `keeper@HOST`:
    /// starts again
    Kill { name: String },
    /// Stops it in order; it stays down
    Stop { name: String },
    /// Starts what was killed or stopped
    Start { name: String },
    /// Stops it and lets it start again
    Restart { name: String },
    /// Cuts a host's cable, or that of a region to all others
    Cut { name: String },
    /// Plugs a host's or a region's cable in again
    Heal { name: String },
}

/// The user's home folder.
pub fn home() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("HOME").filter(|h| !h.is_empty());
    home.map(PathBuf::from).context("HOME is not set: name a folder with --data-dir, and a context with NEXUS_CONFIG")
}

fn default_data_dir() -> anyhow::Result<PathBuf> {
    if let Some(base) = std::env::var_os("XDG_DATA_HOME").filter(|p| !p.is_empty()) {
        return Ok(PathBuf::from(base).join("nexus"));
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/nexus"));
    }
    Ok(home()?.join(".local/share/nexus"))
}

/// The folder that a command means: the one given, the context's, or the default.
pub fn resolve_data_dir(given: Option<&Path>) -> anyhow::Result<DataDir> {
    if let Some(path) = given {
        return DataDir::at(path);
    }
    // A damaged context must not keep anyone from stopping the cloud.
    if let Some(path) = crate::context::read().ok().flatten().and_then(|c| c.data_dir) {
        return DataDir::at(&path);
    }
    DataDir::at(&default_data_dir()?)
}

/// Every server, host and gateway by name.
fn member_names(plan: &Plan) -> Vec<String> {
    plan.regions.iter().flat_map(|r| plan.members_of(r)).map(|n| n.to_string()).collect()
}

/// A process that runs in a region's network namespace: one of its servers or gateways.
fn inhabitant(dir: &DataDir, plan: &Plan, region: &RegionPlan) -> anyhow::Result<Option<procs::Process>> {
    let names: Vec<Name> = plan.members_of(region);
    let lives = |f: &procs::Found| {
        matches!(f.role.as_str(), "server" | "gateway") && names.iter().any(|n| f.path == dir.config(n.as_str()))
    };
    let running = procs::find(dir.root()).context("looking for running members")?;
    Ok(running.into_iter().find(lives).map(|f| f.process))
}

/// A runtime without threads of its own.
pub fn small_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("making a runtime")
}
