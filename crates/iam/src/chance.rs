//! Random bytes for secrets, from ring's generator, which asks the kernel's.
//!
//! The one place where this room takes chance by itself: a secret from a replayable source would be none.

// Under another name, since `rand` is what the crate for replayable chance is called.
use ring::rand as kernel;

/// For signatures that need chance of their own.
pub(crate) fn generator() -> kernel::SystemRandom {
    kernel::SystemRandom::new()
}

pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let generator = generator();
    let filled = kernel::SecureRandom::fill(&generator, &mut bytes);
    filled.expect("the kernel's generator answers once the machine has started");
    bytes
}
