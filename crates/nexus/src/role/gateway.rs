//! The gateway role.

use crate::config::GatewayConfig;

/// Runs until the process is told to stop.
pub async fn run(config: GatewayConfig) -> anyhow::Result<()> {
    anyhow::bail!("this build can't run {}: it has no gateway role yet", config.name)
}
