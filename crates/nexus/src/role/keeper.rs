//! The keeper role. Called before any thread exists, because a keeper forks.

use nexus_agent::keeper;

use crate::config::KeeperConfig;

/// Runs until the process is told to stop.
pub fn run(config: KeeperConfig) -> anyhow::Result<()> {
    keeper::main(keeper::KeeperConfig { socket: config.socket, state_dir: config.state_dir })?;
    Ok(())
}
