//! Principals, tokens and certificates: pure verification and issuance.
//!
//! [`id`] names who talks (SPIFFE ids), [`ca`] issues the certificates that say so, [`request`] asks for one, [`tls`] turns them into rustls
//! configurations that check a peer by its id, and [`token`] is the bearer credential of users.
//!
//! [`password`] and [`totp`] check people, [`federation`] those whom another provider vouches for; [`access_key`] and
//! [`sigv4`] programs that sign their requests. [`jwt`] makes and checks the short-lived tokens that all of them get.
//! [`svid`] makes and checks the tokens by which workloads know each other.
//! [`envelope`] keeps secrets that must be read again. [`webhook`] signs what is told to others' servers.
//!
//! Architecture invariant: no socket, file or clock lives here. Time comes in as a parameter, or, where rustls itself
//! asks for it, through a [`tls::Clock`]. The one exception to "chance comes in by the door" is key generation and
//! signing, which take it from ring's system generator: a key from a replayable source would be no secret.

pub mod access_key;
pub mod ca;
mod chance;
pub mod envelope;
pub mod federation;
pub mod id;
pub mod jwt;
pub mod password;
pub mod policy;
pub mod request;
pub mod sigv4;
pub mod svid;
pub mod tls;
pub mod token;
pub mod totp;
pub mod webhook;

pub use ca::{CaError, CertificateAuthority, Issued, Signed};
pub use id::{IdError, Role, SpiffeId, Workload};
pub use request::{CertRequest, RequestError, RequestKey, pin_of};
pub use tls::{ExpiryPolicy, Identity, Policy, Roots, TlsError, client_config, peer_id, server_config};
pub use token::{TokenError, TokenHash, TokenSecret};

/// The moment `millis` milliseconds after 1970 began; earlier ones become that.
pub fn at_millis(millis: i64) -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

/// Whole seconds since 1970 began; earlier moments count as that.
pub(crate) fn unix_secs(time: std::time::SystemTime) -> u64 {
    time.duration_since(std::time::SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What percent-encoding leaves as it is: the unreserved characters of RFC 3986, section 2.3.
pub(crate) const UNRESERVED: &percent_encoding::AsciiSet =
    &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
