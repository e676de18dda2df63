//! Ports for clouds under test. Test programs run beside each other, so whoever takes a block of ports holds it until its
//! program ends, by a name that only one socket of the machine can have, before anybody listens there.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Below those that the kernel gives to outgoing connections: one of these could take a port before its server does.
const FIRST: u16 = 10_000;
const BLOCK: u16 = 100;
const BLOCKS: u16 = 220;

/// What this program holds.
static HELD: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// Holds a block of ports, if nobody else does.
fn hold(first: u16) -> Option<UnixListener> {
    let name = SocketAddr::from_abstract_name(format!("nexus-test-ports-{first}")).expect("a short name");
    UnixListener::bind_addr(&name).ok()
}

/// The first of `n` ports in a row that are free now and that no other test takes.
pub fn range(n: u16) -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let blocks = n.div_ceil(BLOCK);
    for _ in 0..2 * u32::from(BLOCKS) {
        let turn = std::process::id().wrapping_mul(17).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let block = u16::try_from(turn % u32::from(BLOCKS - blocks)).expect("below the number of blocks");
        let first = FIRST + block * BLOCK;
        let held: Option<Vec<_>> = (0..blocks).map(|b| hold(first + b * BLOCK)).collect();
        let Some(held) = held else { continue };
        if (first..first + n).all(|p| TcpListener::bind(("127.0.0.1", p)).is_ok()) {
            HELD.lock().unwrap_or_else(PoisonError::into_inner).extend(held);
            return first;
        }
    }
    panic!("no {n} free ports in a row");
}

/// Whoever holds this may start a cloud: two that start at once could choose the same addresses.
pub fn starting() -> UnixListener {
    let name = SocketAddr::from_abstract_name("nexus-test-cloud-starts").expect("a short name");
    let begun = Instant::now();
    loop {
        match UnixListener::bind_addr(&name) {
            Ok(turn) => return turn,
            Err(why) => assert!(begun.elapsed() < Duration::from_secs(600), "another cloud starts for ever: {why}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One port that is free now and that no other test takes.
#[allow(dead_code)] // Not every test program needs one.
pub fn one() -> u16 {
    static OWN: Mutex<Option<u16>> = Mutex::new(None);
    static USED: AtomicU16 = AtomicU16::new(0);
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    let used = USED.fetch_add(1, Ordering::Relaxed) % BLOCK;
    if used == 0 {
        *own = None;
    }
    *own.get_or_insert_with(|| range(BLOCK)) + used
}
