//! Chance under a seed.
//!
//! What the project itself decides by chance comes from [`Dice`]. But libraries have chance of their own: hash maps their
//! keys, the runtime the order of its `select!`s, the consensus library its generator. All of them begin with what the
//! kernel gives, by `getrandom`, as a function of the C library or as a bare system call. This program defines both symbols
//! itself; the linker and the loader prefer a program's own. Once [`fix`] was called they answer from a seeded stream, so
//! that a process that runs one seed does the same each time. Before that they go to the kernel.

use std::ffi::{c_char, c_long, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::time::Duration;

use nexus_env::{Rng, RngExt, SeededRng};

static FIXED: AtomicBool = AtomicBool::new(false);
static STREAM: AtomicU64 = AtomicU64::new(0);

/// From now on the kernel's chance is this seed's, for the whole process.
pub fn fix(seed: u64) {
    STREAM.store(mix(seed ^ 0x6e65_7875_732d_7369), Ordering::SeqCst);
    FIXED.store(true, Ordering::SeqCst);
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// # Safety
/// `buffer` must be valid for `len` bytes.
unsafe fn fill(buffer: *mut u8, len: usize) {
    let mut word = [0u8; 8];
    for i in 0..len {
        if i % 8 == 0 {
            word = mix(STREAM.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst)).to_le_bytes();
        }
        // SAFETY: `i < len`, and the caller vouches for `len` bytes.
        unsafe { buffer.add(i).write(word[i % 8]) };
    }
}

/// The C library's own function of a name, which this program's hides.
fn hidden(slot: &AtomicPtr<c_void>, name: &'static std::ffi::CStr) -> *mut c_void {
    let known = slot.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: a plain look-up by a terminated name.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr().cast::<c_char>()) };
    assert!(!found.is_null(), "the C library has {name:?}");
    slot.store(found, Ordering::Relaxed);
    found
}

static REAL_GETRANDOM: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static REAL_SYSCALL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// `getrandom(2)`.
///
/// # Safety
/// As the C library's: `buffer` must be valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, len: usize, flags: c_uint) -> isize {
    if FIXED.load(Ordering::SeqCst) {
        // SAFETY: the caller's promise is ours.
        unsafe { fill(buffer.cast(), len) };
        return isize::try_from(len).unwrap_or(isize::MAX);
    }
    let real = hidden(&REAL_GETRANDOM, c"getrandom");
    // SAFETY: the C library's function of this name has this signature.
    unsafe {
        let real: unsafe extern "C" fn(*mut c_void, usize, c_uint) -> isize = std::mem::transmute(real);
        real(buffer, len, flags)
    }
}

/// `syscall(2)`. It is variadic in C; six integer arguments are passed alike.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if number == libc::SYS_getrandom && FIXED.load(Ordering::SeqCst) {
        let len = usize::try_from(b).unwrap_or(0);
        // SAFETY: the caller's promise is ours: `a` points at `b` bytes.
        unsafe { fill(a as *mut u8, len) };
        return b;
    }
    let real = hidden(&REAL_SYSCALL, c"syscall");
    // SAFETY: the C library's function takes up to six arguments in these places.
    unsafe {
        let real: unsafe extern "C" fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long =
            std::mem::transmute(real);
        real(number, a, b, c, d, e, f)
    }
}

/// A stream of chance of one seed and purpose. Clones share it.
#[derive(Debug, Clone)]
pub struct Dice(Arc<SeededRng>);

impl Dice {
    pub fn new(seed: u64, purpose: &str) -> Self {
        let salt =
            purpose.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(Arc::new(SeededRng::new(mix(seed.wrapping_add(salt)))))
    }

    pub fn rng(&self) -> Arc<dyn Rng> {
        self.0.clone()
    }

    pub fn u64(&self) -> u64 {
        self.0.u64()
    }

    /// `0..n`; 0 for 0.
    pub fn below(&self, n: u64) -> u64 {
        self.0.below(n)
    }

    /// `from..to`.
    pub fn range(&self, from: u64, to: u64) -> u64 {
        from + self.below(to.saturating_sub(from))
    }

    pub fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.range(from, to))
    }

    /// True so many times in a thousand.
    pub fn chance(&self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    pub fn pick<'a, T>(&self, from: &'a [T]) -> Option<&'a T> {
        from.get(usize::try_from(self.below(from.len() as u64)).unwrap_or(0))
    }
}
