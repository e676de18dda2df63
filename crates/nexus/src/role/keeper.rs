//! The keeper role. Called before any thread exists, because a keeper forks.

use crate::config::KeeperConfig;

/// Runs until the process is told to stop.
pub fn run(config: KeeperConfig) -> anyhow::Result<()> {
    anyhow::bail!("this build can't keep processes at {}: it has no keeper role yet", config.socket.display())
}
