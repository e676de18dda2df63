//! What was done, so that it can be proven: records, the trees over them, signed heads, exports and their verification.
//!
//! [`record`] says what stands in a record and how it is encoded; [`personal`] is the part of it that can be shredded; [`log`]
//! appends; [`merkle`] and [`tiles`] make and check proofs; [`head`] signs what a log is at a moment; [`export`] is what an auditor
//! takes home, and [`verify`] says whether it is true, with public keys and nothing else; [`webhook`] signs what is sent elsewhere.
//!
//! Architecture invariant: values in, values out. No store, file, socket or clock is touched here; where rows go, and when
//! they are written, is the caller's business. `docs/audit-format.md` describes every byte for whoever verifies with other tools.

pub mod export;
pub mod hash;
pub mod head;
pub mod log;
pub mod merkle;
pub mod personal;
pub mod record;
pub mod tiles;
pub mod verify;
pub mod webhook;

pub use export::{Consistency, Dropped, Header, Line, Mode, Pruned, chain_line, entry_line};
pub use hash::Hash;
pub use head::{HeadError, PublicKey, SignedHead, Signer, TreeHead, Verifier};
pub use log::{Appended, Chain, Log, LogState, Mark, ResumeError};
pub use merkle::{Frontier, verify_consistency, verify_inclusion};
pub use personal::{Personal, PersonalError, Sealed, SubjectKey};
pub use record::{
    Actor, ActorKind, Anchor, Answer, Change, Draft, Entry, PersonalRef, Record, RecordError, Retention, Target,
};
pub use tiles::{ProofError, TileId, Tiles, consistency_proof, inclusion_proof};
pub use verify::{Break, ExportVerifier, Fault, Options, Report, verify};
