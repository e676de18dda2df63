//! Connections that stop being HTTP, such as WebSockets: bytes both ways until either side ends.

use std::sync::Arc;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tracing::debug;

use crate::backend::Lease;
use crate::gateway::Core;

/// Bytes held on their way, in each direction.
const BUFFER: usize = 16 * 1024;

/// Joins two connections once both have been let go by HTTP.
pub(crate) fn join(core: &Arc<Core>, user: OnUpgrade, instance: OnUpgrade, lease: Lease) {
    let limit = core.options.connect_timeout * 10;
    core.spawn(async move {
        let both = async { tokio::try_join!(user, instance) };
        let (user, instance) = match timeout(limit, both).await {
            Ok(Ok(both)) => both,
            Ok(Err(e)) => return debug!(reason = %e, "a connection did not change its protocol"),
            Err(_) => return debug!("a connection did not change its protocol in time"),
        };
        let (mut user, mut instance) = (TokioIo::new(user), TokioIo::new(instance));
        // Either side may vanish at any time; that is how most tunnels end.
        let _ = tokio::io::copy_bidirectional_with_sizes(&mut user, &mut instance, BUFFER, BUFFER).await;
        drop(lease);
    });
}
