//! Principals, tokens and certificates: pure verification and issuance.
//!
//! [`id`] names who talks (SPIFFE ids), [`ca`] issues the certificates that say so, [`request`] asks for one, [`tls`] turns them into rustls
//! configurations that check a peer by its id, and [`token`] is the bearer credential of users.
//!
//! Architecture invariant: no socket, file or clock lives here. Time comes in as a parameter, or, where rustls itself
//! asks for it, through a [`tls::Clock`]. The one exception to "chance comes in by the door" is key generation and
//! signing, which take it from ring's system generator: a key from a replayable source would be no secret.

pub mod ca;
pub mod id;
pub mod request;
pub mod tls;
pub mod token;

pub use ca::{CaError, CertificateAuthority, Issued, Signed};
pub use id::{IdError, Role, SpiffeId};
pub use request::{CertRequest, RequestError, RequestKey, pin_of};
pub use tls::{ExpiryPolicy, Identity, Policy, Roots, TlsError, client_config, peer_id, server_config};
pub use token::{TokenError, TokenHash, TokenSecret};

/// The moment `millis` milliseconds after 1970 began; earlier ones become that.
pub fn at_millis(millis: i64) -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}
