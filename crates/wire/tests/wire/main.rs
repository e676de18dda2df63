//! The protocol between real clients and servers, in one binary, since linking takes longer than running.

mod calls;
mod common;
mod connections;
