//! The roles that one binary can play, each glued to its room.

pub mod admin;
pub mod agent;
pub mod executor;
pub mod gateway;
pub mod keeper;
pub mod relay;
pub mod renew;
pub mod server;
pub mod shim;

use std::time::Duration;

/// A data plane goes on with certificates that ended this long ago: whoever renews them may be out of reach.
pub const CERTIFICATE_GRACE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Resolves when the process is asked to stop (SIGTERM or SIGINT).
pub async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).expect("SIGTERM can be handled");
    let mut int = signal(SignalKind::interrupt()).expect("SIGINT can be handled");
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
