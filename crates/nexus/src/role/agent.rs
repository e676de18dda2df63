//! The agent role.

use crate::config::AgentConfig;

/// Runs until the process is told to stop.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    anyhow::bail!("this build can't run {}: it has no agent role yet", config.name)
}
