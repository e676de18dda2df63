//! Many small byte strings in few allocations, for reading a large state.
//!
//! An allocation for each value costs more than anything else about loading: the allocator grows page by page, with a
//! system call each. So what is small is copied into blocks and handed out as slices of them. A block lives as long as
//! any of its slices, which is why blocks are small, why what is large gets an allocation of its own, and why strings
//! that live differently long (keys, and the values that writes replace) belong into different packs.

use bytes::{Bytes, BytesMut};

const BLOCK: usize = 32 * 1024;
/// A string that fills more of a block than this would waste too much of its end.
const LARGE: usize = BLOCK / 8;

#[derive(Default)]
pub struct Pack {
    room: BytesMut,
}

impl Pack {
    pub fn keep(&mut self, data: &[u8]) -> Bytes {
        if data.len() > LARGE {
            return Bytes::copy_from_slice(data);
        }
        if self.room.capacity() < data.len() {
            self.room = BytesMut::with_capacity(BLOCK);
        }
        self.room.extend_from_slice(data);
        self.room.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_every_size_come_back_and_small_ones_share() {
        let mut pack = Pack::default();
        let strings: Vec<Vec<u8>> = (0..3 * LARGE).step_by(97).map(|n| vec![n as u8; n]).collect();
        let kept: Vec<Bytes> = strings.iter().map(|s| pack.keep(s)).collect();
        assert!(kept.iter().zip(&strings).all(|(k, s)| k == s));
        let [a, b] = [pack.keep(b"one"), pack.keep(b"two")];
        assert_eq!(a.as_ptr().wrapping_add(3), b.as_ptr(), "side by side");
    }
}
