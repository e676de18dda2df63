//! The doors to the outside: [`Clock`], [`Rng`], [`Disk`] and [`Transport`], with the real ones and their fault points.
//!
//! Everything below the binary reaches time, chance, files and sockets through an [`Env`]. That is what lets one
//! process run a whole region under a seed, cut its cables and pull its plug. Sleeping is not here: it is
//! `tokio::time`, whose clock a test can pause.
//!
//! Architecture invariant: nothing here decides anything. A door carries out what it is told or says why it can't.

mod clock;
mod disk;
mod endpoint;
mod faulty;
mod memdisk;
mod memnet;
mod rng;
mod transport;

use std::sync::Arc;
use std::time::Duration;

pub use clock::{Clock, ManualClock, RealClock};
pub use disk::{DirEntry, Disk, DiskLock, File, RealDisk, on_disk, write_atomic};
pub use endpoint::{Endpoint, ParseEndpointError};
pub use faulty::{FaultyTransport, Links};
pub use memdisk::{DiskOp, Fault, MemDisk};
pub use memnet::MemTransport;
pub use rng::{RealRng, Rng, RngExt, SeededRng};
pub use transport::{BoxStream, Listener, RealTransport, Stream, Transport, listener};

/// The doors that a piece of the system is given when it is made. Cloning is cheap.
#[derive(Clone)]
pub struct Env {
    pub clock: Arc<dyn Clock>,
    pub rng: Arc<dyn Rng>,
    pub disk: Arc<dyn Disk>,
    pub transport: Arc<dyn Transport>,
}

impl Env {
    /// The machine's own clock, randomness, file system and network.
    pub fn real() -> Self {
        Self {
            clock: Arc::new(RealClock::new()),
            rng: Arc::new(RealRng),
            disk: Arc::new(RealDisk),
            transport: Arc::new(RealTransport),
        }
    }

    /// Wall time in milliseconds since the Unix epoch.
    pub fn now_millis(&self) -> i64 {
        self.clock.now_millis()
    }

    /// Time since an arbitrary start that never goes back.
    pub fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    /// The same doors with another disk.
    pub fn with_disk(mut self, disk: Arc<dyn Disk>) -> Self {
        self.disk = disk;
        self
    }

    /// The same doors with another transport.
    pub fn with_transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.transport = transport;
        self
    }

    /// The same doors with another clock.
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The same doors with another source of chance.
    pub fn with_rng(mut self, rng: Arc<dyn Rng>) -> Self {
        self.rng = rng;
        self
    }
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Env")
    }
}
