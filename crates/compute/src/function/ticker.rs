//! The clock of epochs: while a request is under way, guests are made to yield once a tick; while none is, nothing wakes.
//!
//! It is a thread and not a task, because a guest that loops holds the very thread that would run the task.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use wasmtime::Engine;

/// A guest that computes shares its thread with others in turns of this length.
const TICK: Duration = Duration::from_millis(5);

/// So many ticks without a request pass before the thread sleeps, so that a stream of requests does not wake it for each.
const IDLE_TICKS: u32 = 100;

pub(super) struct Ticker {
    busy: AtomicUsize,
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

/// One request under way.
pub(super) struct Ticking(Arc<Ticker>);

impl Ticker {
    /// The thread lives as long as the process, as the engine does.
    pub(super) fn start(engine: Engine) -> std::io::Result<Arc<Self>> {
        let ticker = Arc::new(Self { busy: 0.into(), asleep: false.into(), thread: OnceLock::new() });
        let own = ticker.clone();
        let handle =
            thread::Builder::new().name("ticker".into()).stack_size(64 << 10).spawn(move || own.run(&engine))?;
        // Until this is set the thread can't be woken; it takes `IDLE_TICKS` before it could sleep, and looks itself then.
        let _ = ticker.thread.set(handle.thread().clone());
        Ok(ticker)
    }

    fn run(&self, engine: &Engine) {
        let mut idle = 0;
        loop {
            if self.busy.load(Ordering::SeqCst) > 0 {
                idle = 0;
                engine.increment_epoch();
            } else {
                idle += 1;
            }
            if idle < IDLE_TICKS {
                thread::sleep(TICK);
                continue;
            }
            self.asleep.store(true, Ordering::SeqCst);
            // Whoever came before the store did not see it: look again. Whoever comes after it unparks.
            if self.busy.load(Ordering::SeqCst) == 0 {
                thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
            idle = 0;
        }
    }

    pub(super) fn enter(self: &Arc<Self>) -> Ticking {
        self.busy.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
        Ticking(self.clone())
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}
