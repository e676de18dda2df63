//! The host daemon and the keeper of its processes.
pub mod keeper;
