//! What every room speaks: names, ids, quantities, the kinds with their specs and statuses, the plans that hosts and
//! gateways are told, and the errors that a user reads.
//!
//! Architecture invariant: nothing here does I/O, spawns a task or reads a clock. A value that needs the time or
//! chance is given it.

pub mod cidr;
pub mod error;
pub mod id;
pub mod key;
pub mod kind;
pub mod name;
pub mod object;
pub mod plan;
pub mod quantity;
pub mod schedule;
pub mod secret;
pub mod selector;
pub mod time;

pub use cidr::Cidr;
pub use error::{ApiError, Code, FieldError};
pub use id::{Digest, RequestId, Uid};
pub use name::Name;
pub use object::{AnyObject, Condition, Metadata, Object, OwnerRef};
pub use quantity::{Bytes, MilliCpu};
pub use secret::{SecretData, SecretValue};
pub use time::Timestamp;

/// The one version of the API and of the stored objects that this release writes.
pub const API_VERSION: &str = "cloudnexus/v1";
