//! Runs instances: containers and functions behind one [`Runtime`] contract.
//!
//! Processes belong to the host's keeper, never to the caller: a runtime asks it by [`keep::Keep`] to start them, so that
//! the agent that drives a runtime can end at any time without ending one workload.
//!
//! Architecture invariant: nothing here knows of kinds' life, of reconciling or of the control plane. A runtime does what
//! it is told about one instance, and reports what is true.

pub mod container;
pub mod function;
pub mod image;
pub mod keep;
pub mod runtime;

pub use runtime::{
    Connections, CpuSet, CpuTime, ExecIo, IDENTITY_DIR, IDENTITY_SOCKET, NoConnection, NoConnectionKind, Observed,
    PartOf, Runtime, RuntimeError, Sandbox, SecretFolder, SecretMounts, Shared, SharedMount, State,
};
