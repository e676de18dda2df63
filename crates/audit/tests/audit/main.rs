//! What the room promises: proofs as in RFC 9162, an encoding that never changes by accident, and exports in which every
//! kind of tampering is found.

mod encoding;
mod export;
mod tampering;
mod tree;
mod world;
