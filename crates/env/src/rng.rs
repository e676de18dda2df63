//! Chance: the operating system's for real work, a seeded stream for simulations and tests.

use std::sync::{Mutex, PoisonError};

use rand::{RngCore, SeedableRng};

/// A source of random bytes. The real one is fit for keys and tokens.
pub trait Rng: Send + Sync {
    fn fill(&self, buf: &mut [u8]);
}

/// What callers mostly want from an [`Rng`].
pub trait RngExt: Rng {
    /// `N` random bytes.
    fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        self.fill(&mut out);
        out
    }

    /// A random 64-bit number.
    fn u64(&self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// A number in `0..n`, without modulo bias (Lemire 2019, "Fast random integer generation in an interval").
    /// `below(0)` is 0.
    fn below(&self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let threshold = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.u64()) * u128::from(n);
            if wide as u64 >= threshold {
                return (wide >> 64) as u64;
            }
        }
    }
}

impl<T: Rng + ?Sized> RngExt for T {}

/// A cryptographically secure generator, seeded and reseeded by the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealRng;

impl Rng for RealRng {
    fn fill(&self, buf: &mut [u8]) {
        rand::rng().fill_bytes(buf);
    }
}

/// The same stream for the same seed. Never for secrets.
#[derive(Debug)]
pub struct SeededRng(Mutex<rand::rngs::StdRng>);

impl SeededRng {
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new(rand::rngs::StdRng::seed_from_u64(seed)))
    }
}

impl Rng for SeededRng {
    fn fill(&self, buf: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).fill_bytes(buf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_stream() {
        let (a, b, c) = (SeededRng::new(7), SeededRng::new(7), SeededRng::new(8));
        let of = |r: &SeededRng| (0..8).map(|_| r.u64()).collect::<Vec<_>>();
        let first = of(&a);
        assert_eq!(first, of(&b));
        assert_ne!(first, of(&c));
    }

    #[test]
    fn below_stays_below_and_reaches_every_value() {
        let rng = SeededRng::new(1);
        let mut seen = [false; 6];
        for _ in 0..1_000 {
            seen[rng.below(6) as usize] = true;
        }
        assert_eq!(seen, [true; 6]);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
    }

    #[test]
    fn real_bytes_differ() {
        assert_ne!(RealRng.bytes::<32>(), RealRng.bytes::<32>());
    }
}
