//! The gateway against real instances on the loopback.

mod common;
mod exchanges;
mod faults;
mod proxying;
mod regions;
mod splits;
mod tables;
mod traffic;
