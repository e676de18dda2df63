//! The roles that one binary can play, each glued to its room.

pub mod agent;
pub mod executor;
pub mod gateway;
pub mod keeper;
pub mod server;
pub mod shim;
