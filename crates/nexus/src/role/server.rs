//! The server role.

use crate::config::ServerConfig;

/// Runs until the process is told to stop.
pub async fn run(config: ServerConfig) -> anyhow::Result<()> {
    anyhow::bail!("this build can't run {}: it has no server role yet", config.name)
}
