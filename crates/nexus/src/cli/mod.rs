//! The command line: one file per command, all of them thin over the API.
//!
//! Results go to standard output, progress and advice to standard error.

pub mod status;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::local::{DownArgs, LocalArgs, UpArgs};

/// A complete cloud in one program.
#[derive(Debug, Parser)]
#[command(name = "nexus", version, about, after_help = crate::exit::HELP, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Up(UpArgs),
    Down(DownArgs),
    Status(status::StatusArgs),
    Local(LocalArgs),
    /// Runs a control plane server
    Server(RoleArgs),
    /// Runs a host's agent
    Agent(RoleArgs),
    /// Runs a host's keeper
    Keeper(RoleArgs),
    /// Runs an edge gateway
    Gateway(RoleArgs),
    #[command(hide = true)]
    Shim(InnerArgs),
    #[command(hide = true)]
    Executor(InnerArgs),
    #[command(hide = true)]
    HostInit(RoleArgs),
    #[command(hide = true, name = crate::local::SUPERVISE)]
    LocalSupervise {
        #[arg(long)]
        data_dir: PathBuf,
    },
    #[command(hide = true, name = crate::local::preflight::PROBE)]
    LocalProbe {
        scratch: PathBuf,
    },
}

impl Command {
    /// Whether a person or a script reads what it prints; daemons write logs instead.
    pub fn is_for_people(&self) -> bool {
        // A foreground `up` must outlive its reader: it has a cloud to stop.
        !matches!(
            self,
            Self::Up(_)
                | Self::Server(_)
                | Self::Agent(_)
                | Self::Keeper(_)
                | Self::Gateway(_)
                | Self::Shim(_)
                | Self::Executor(_)
                | Self::HostInit(_)
                | Self::LocalSupervise { .. }
                | Self::LocalProbe { .. }
        )
    }
}

#[derive(Debug, Args)]
pub struct RoleArgs {
    /// The role's configuration, in TOML
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// What a room passes to itself: not for people.
#[derive(Debug, Args)]
pub struct InnerArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}
