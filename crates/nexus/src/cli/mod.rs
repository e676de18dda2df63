//! The command line: one file per command, all of them thin over the API.
//!
//! Results go to standard output, progress and advice to standard error.

mod access_key;
mod agent;
mod apply;
mod audit;
mod autoscale;
mod backup;
mod ca;
mod can;
mod cascade;
mod cell;
mod cloud;
mod cron;
mod debug;
mod delete;
mod deploy;
mod describe;
mod drain;
mod events;
mod exec;
mod explain;
mod federated;
mod flows;
mod get;
pub mod host;
mod image;
mod install;
mod job;
mod join;
mod leave;
mod login;
mod logs;
mod manifest;
mod master_key;
mod net;
mod output;
mod progress;
mod pull;
mod rebalance;
pub mod recover;
mod region;
pub mod report;
mod resource;
mod rollout;
mod rule;
mod secret;
pub mod server;
mod settle;
pub mod status;
mod stores;
mod table;
mod token;
mod user;
mod version;
mod webhook;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

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
    #[command(flatten)]
    User(Box<UserCommand>),
    Server(Box<server::ServerArgs>),
    Agent(Box<agent::AgentArgs>),
    /// Runs a host's keeper
    Keeper(RoleArgs),
    Gateway(Box<host::GatewayArgs>),
    #[command(hide = true)]
    Shim(InnerArgs),
    #[command(hide = true)]
    Executor(InnerArgs),
    #[command(hide = true)]
    Relay(InnerArgs),
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
    /// Whether a person or a script reads what it prints, and nothing else may break; daemons write logs instead.
    pub fn is_for_people(&self) -> bool {
        // A foreground `up` must outlive its reader: it has a cloud to stop. A user's command speaks to servers, and one
        // that breaks off must not end it in silence: a vectored write to a closed socket raises SIGPIPE too. Those
        // commands look after their output themselves, in `output`.
        !matches!(
            self,
            Self::Up(_)
                | Self::User(_)
                | Self::Server(_)
                | Self::Agent(_)
                | Self::Keeper(_)
                | Self::Gateway(_)
                | Self::Shim(_)
                | Self::Executor(_)
                | Self::Relay(_)
                | Self::HostInit(_)
                | Self::LocalSupervise { .. }
                | Self::LocalProbe { .. }
        )
    }
}

/// What people do with a cloud.
#[derive(Debug, Subcommand)]
pub enum UserCommand {
    Deploy(Box<deploy::DeployArgs>),
    Scale(deploy::ScaleArgs),
    Autoscale(autoscale::AutoscaleArgs),
    Rollout(rollout::RolloutArgs),
    Rebalance(rebalance::RebalanceArgs),
    Get(get::GetArgs),
    Describe(describe::DescribeArgs),
    Apply(apply::ApplyArgs),
    Delete(delete::DeleteArgs),
    Logs(logs::LogsArgs),
    Job(job::JobArgs),
    Cron(cron::CronArgs),
    Exec(exec::ExecArgs),
    Events(events::EventsArgs),
    Audit(audit::AuditArgs),
    Image(image::ImageArgs),
    Explain(explain::ExplainArgs),
    Host(host::HostArgs),
    Region(region::RegionArgs),
    Login(login::LoginArgs),
    Logout(login::LogoutArgs),
    #[command(name = "whoami")]
    WhoAmI(login::WhoAmIArgs),
    Password(login::PasswordArgs),
    User(user::UserArgs),
    Token(token::TokenArgs),
    AccessKey(access_key::AccessKeyArgs),
    Net(net::NetArgs),
    Secret(secret::SecretArgs),
    MasterKey(master_key::MasterKeyArgs),
    Webhook(webhook::WebhookArgs),
    SecondFactor(login::SecondFactorArgs),
    Can(can::CanArgs),
    Policy(can::PolicyArgs),
    Ca(ca::CaArgs),
    JoinToken(host::JoinTokenArgs),
    Install(install::InstallArgs),
    Backup(backup::BackupArgs),
    Debug(debug::DebugArgs),
    Completions(CompletionsArgs),
    Version(version::VersionArgs),
}

/// Prints a script that completes commands in a shell
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus completions bash > /etc/bash_completion.d/nexus\n  \
    source <(nexus completions zsh)")]
pub struct CompletionsArgs {
    shell: clap_complete::Shell,
}

/// Runs a user's command and answers the exit code: 0, or that of the remote command for `exec`.
pub fn run(command: UserCommand) -> anyhow::Result<i32> {
    let runtime = crate::local::small_runtime()?;
    let done = runtime.block_on(Box::pin(perform(command)));
    // A read of standard input that nobody ends must not keep the program.
    runtime.shutdown_background();
    done
}

/// Runs what changes the fleet, on the same terms.
pub fn operate(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = crate::local::small_runtime()?;
    let done = runtime.block_on(Box::pin(work));
    runtime.shutdown_background();
    done
}

async fn perform(command: UserCommand) -> anyhow::Result<i32> {
    match command {
        UserCommand::Deploy(args) => deploy::deploy(&args).await?,
        UserCommand::Scale(args) => deploy::scale(&args).await?,
        UserCommand::Autoscale(args) => autoscale::run(&args).await?,
        UserCommand::Rollout(args) => rollout::run(&args).await?,
        UserCommand::Rebalance(args) => rebalance::run(&args).await?,
        UserCommand::Get(args) => get::run(&args).await?,
        UserCommand::Describe(args) => describe::run(&args).await?,
        UserCommand::Apply(args) => apply::run(&args).await?,
        UserCommand::Delete(args) => delete::run(&args).await?,
        UserCommand::Logs(args) => logs::run(&args).await?,
        UserCommand::Job(args) => job::run(&args).await?,
        UserCommand::Cron(args) => cron::run(&args).await?,
        UserCommand::Exec(args) => return exec::run(&args).await,
        UserCommand::Events(args) => events::run(&args).await?,
        UserCommand::Audit(args) => audit::run(&args).await?,
        UserCommand::Image(args) => image::run(&args).await?,
        UserCommand::Explain(args) => explain::run(&args)?,
        UserCommand::Host(args) => host::run(args.command).await?,
        UserCommand::Region(args) => region::run(&args).await?,
        UserCommand::Login(args) => login::login(&args).await?,
        UserCommand::Logout(args) => login::logout(&args).await?,
        UserCommand::WhoAmI(args) => login::who_am_i(&args).await?,
        UserCommand::Password(args) => login::password(&args).await?,
        UserCommand::User(args) => user::run(&args).await?,
        UserCommand::Token(args) => token::run(&args).await?,
        UserCommand::AccessKey(args) => access_key::run(&args).await?,
        UserCommand::Net(args) => net::run(&args).await?,
        UserCommand::Secret(args) => secret::run(&args).await?,
        UserCommand::MasterKey(args) => master_key::run(&args).await?,
        UserCommand::Webhook(args) => webhook::run(&args).await?,
        UserCommand::SecondFactor(args) => login::second_factor(&args).await?,
        UserCommand::Can(args) => return can::can(&args).await,
        UserCommand::Policy(args) => can::policy(&args).await?,
        UserCommand::Ca(args) => ca::run(&args)?,
        UserCommand::JoinToken(args) => host::tokens(&args).await?,
        UserCommand::Install(args) => install::run(&args)?,
        UserCommand::Backup(args) => backup::run(&args).await?,
        UserCommand::Debug(args) => debug::run(&args).await?,
        UserCommand::Completions(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "nexus", &mut script);
            output::bytes(&script)?;
        }
        UserCommand::Version(args) => version::run(&args).await?,
    }
    Ok(0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_user_command_shows_examples() {
        let cli = Cli::command();
        let without: Vec<_> = UserCommand::augment_subcommands(clap::Command::new("x"))
            .get_subcommands()
            .map(|c| c.get_name().to_owned())
            .filter(|name| {
                let command = cli.find_subcommand(name).unwrap();
                !command.get_after_help().is_some_and(|h| h.to_string().contains("Examples:"))
            })
            .collect();
        assert!(without.is_empty(), "{without:?}");
    }
}
