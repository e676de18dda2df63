//! The southbound protocol between servers, agents and gateways.
//!
//! # The protocol
//!
//! HTTP/2 over TLS 1.3 with certificates on both sides, ALPN `h2`, over any byte stream that the environment's
//! transport connects. One connection per pair of peers carries every call between them.
//!
//! A call is `POST /wire/v1/<method>` with these headers:
//!
//! | header | meaning |
//! |---|---|
//! | `nexus-version` | the protocol version that the caller speaks, a whole number; the reply carries the server's |
//! | `nexus-request` | the request id, for logs on both sides |
//! | `nexus-deadline-ms` | how long the caller will still wait. Relative, so clocks need not agree |
//!
//! Messages are MessagePack maps with named fields. Readers ignore fields that they do not know, so either side may
//! be one release ahead. There are four shapes of call; a method has exactly one:
//!
//! | shape | request body | reply body |
//! |---|---|---|
//! | unary | a message | a message |
//! | stream | a message | frames |
//! | upload | frames: the message, then the data | a message |
//! | duplex | frames: the message, then anything | frames |
//!
//! A frame is `kind: u8, channel: u8, length: u32 (big endian), payload`. Kind 0 is an item: a message, a piece of a
//! blob, or, in a duplex call, bytes of the named channel (standard output, standard error, …; 0 elsewhere). Kind 1
//! ends the body and has no payload. Kind 2 ends it with a refusal. A body that stops without one of these two was
//! cut off, so a short blob can't be mistaken for a whole one.
//!
//! A call that went well answers 200. Any other status carries a refusal: a message `{code, detail, leader}`, whose
//! code is the callee's own or one of [`code`].
//!
//! Cancellation is a reset of the HTTP/2 stream: a caller that stops waiting resets, and the callee drops the handler
//! at its next await. Work that must not stop halfway is handed to a task of its owner's, not done in a handler.
//!
//! Liveness: while a call is open, each side that has read nothing for a ping interval sends an HTTP/2 PING, and
//! gives the connection up when nothing at all arrives within the ping timeout. A connection without calls is silent,
//! and is closed after its idle timeout. A server that is going down sends GOAWAY, ends streams with a refusal
//! [`code::DRAINING`], and lets the rest finish for a while.
//!
//! Architecture invariant: nothing here knows what a message means or what a certificate's name allows. The caller
//! brings rustls configurations, a function from certificates to an identity, and one that authorises.

mod book;
mod breaker;
mod client;
mod connection;
mod error;
mod frame;
mod keepalive;
mod pool;
mod serve;
mod server;
mod streams;

pub use book::ServerBook;
pub use client::{Client, ClientOptions};
pub use error::{Refusal, WireError, code};
pub use pool::Pool;
pub use server::{Caller, Server, ServerBuilder, ServerOptions};
pub use streams::{ByteStream, FrameSink, FrameStream, Streaming};

/// The version of the protocol that this build speaks.
pub const VERSION: u16 = 1;

/// The ALPN protocol that both sides' rustls configurations should offer.
pub const ALPN: &[u8] = b"h2";

/// The largest message, unless options say otherwise.
pub const MAX_MESSAGE: usize = 16 * 1024 * 1024;

pub(crate) const PATH_PREFIX: &str = "/wire/v1/";
pub(crate) const HEADER_VERSION: &str = "nexus-version";
pub(crate) const HEADER_REQUEST: &str = "nexus-request";
pub(crate) const HEADER_DEADLINE: &str = "nexus-deadline-ms";

/// The largest refusal that is read.
pub(crate) const MAX_REFUSAL: usize = 64 * 1024;
/// The largest set of headers, decoded.
pub(crate) const MAX_HEADERS: u32 = 16 * 1024;
/// The largest HTTP/2 frame: big enough that blobs pay little overhead, small enough that calls interleave.
pub(crate) const MAX_H2_FRAME: u32 = 64 * 1024;

/// How much memory unread small frames may cost on a connection, beyond their bytes. h2's own default (half the
/// window) would close a connection over a slow reader of a few thousand short events.
pub(crate) const SMALL_FRAME_BUDGET: usize = 16 * 1024 * 1024;

pub(crate) fn encode<T: serde::Serialize + ?Sized>(message: &T) -> Result<bytes::Bytes, String> {
    rmp_serde::to_vec_named(message).map(bytes::Bytes::from).map_err(|e| e.to_string())
}

pub(crate) fn decode<T: serde::de::DeserializeOwned>(message: &[u8]) -> Result<T, String> {
    rmp_serde::from_slice(message).map_err(|e| e.to_string())
}
