//! How a keeper comes by its lock and socket: from the image of the same process before it, or anew.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;

use serde::{Deserialize, Serialize};

use super::output::Stream;
use super::process::stat;
use super::server::system;
use super::{KeeperConfig, KeeperError};

/// What the image before a re-execution leaves to the one after it.
#[derive(Serialize, Deserialize)]
pub(super) struct Handover {
    pub pid: i32,
    pub ticks: u64,
    pub boot: String,
    pub listener: i32,
    pub lock: i32,
    pub pipes: Vec<HandedPipe>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct HandedPipe {
    pub id: String,
    pub stream: Stream,
    pub fd: i32,
    pub partial: Vec<u8>,
}

pub(super) const HANDOVER: &str = "handover.json";

/// What an image before this one, of the same process, left. A file of any other process is stale.
pub(super) fn take_handover(config: &KeeperConfig, boot: &str) -> Option<Handover> {
    let path = config.state_dir.join(HANDOVER);
    let text = fs::read(&path).ok()?;
    let _ = fs::remove_file(path);
    let handover: Handover = serde_json::from_slice(&text).ok()?;
    let own = std::process::id() as i32;
    let same = handover.pid == own && handover.boot == boot && stat(own).is_some_and(|s| s.ticks == handover.ticks);
    same.then_some(handover)
}

/// Takes the lock and the socket of a state folder that no keeper uses.
pub(super) fn bind(config: &KeeperConfig) -> Result<(File, UnixListener), KeeperError> {
    let path = config.state_dir.join("lock");
    let open = File::options().create(true).append(true).mode(0o600).open(&path);
    let lock = system("opening the lock", open)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(KeeperError::Taken(config.state_dir.clone())),
        Err(fs::TryLockError::Error(e)) => return system("taking the lock", Err(e)),
    }
    if let Some(dir) = config.socket.parent() {
        system("making the socket's folder", fs::create_dir_all(dir))?;
    }
    // The lock is held, so nobody listens there.
    let _ = fs::remove_file(&config.socket);
    let listener = system("binding the socket", UnixListener::bind(&config.socket))?;
    let private = fs::Permissions::from_mode(0o600);
    system("closing the socket to others", fs::set_permissions(&config.socket, private))?;
    Ok((lock, listener))
}
