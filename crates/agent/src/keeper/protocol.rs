//! What the keeper and its clients say to each other.
//!
//! A Unix stream socket carries frames in both directions: four bytes of length, most significant first, then so many
//! bytes of JSON. A request names its `version` and its `op`; it is answered by one frame, and the next request of the
//! same connection is looked at after that. Requests are at most 1 MiB.
//!
//! * `spawn`, `signal`, `forget` are answered by `done` or `error`, `list` by `kept`.
//! * `run` brings three file descriptors (`SCM_RIGHTS`, with any byte of its frame): standard input, output and error.
//!   It is answered by `exit` when the command has ended. Hanging up kills the command and its process group.
//! * `watch` turns the connection round: the keeper sends `changed` at once, and then whenever a kept process has ended.
//!   One that has not been read yet stands for all that follow.
//! * `reexec` makes the keeper execute its own file again, in the same process, and is answered before it does so.
//!
//! A keeper answers a version that it does not know with `error`; fields that it does not know it passes over.

use std::io;

use nexus_compute::keep::{Kept, Spawn};
use serde::{Deserialize, Serialize};

pub(super) const VERSION: u32 = 1;

/// Bounds a request.
pub(super) const MAX_REQUEST: usize = 1 << 20;
/// Bounds an answer: a full list of the longest ids.
pub(super) const MAX_ANSWER: usize = 4 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub version: u32,
    #[serde(flatten)]
    pub op: Op,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(super) enum Op {
    Spawn { spawn: Spawn },
    List,
    Signal { id: String, signal: i32 },
    Forget { id: String },
    Run { spawn: Spawn, millis: u64 },
    Watch,
    Reexec,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase")]
pub(super) enum Answer {
    Done,
    Kept { kept: Vec<Kept> },
    Exit { code: i32 },
    Changed,
    Error { kind: ErrorKind, message: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ErrorKind {
    Start,
    Refused,
}

impl Answer {
    pub fn refused(message: impl Into<String>) -> Self {
        Self::Error { kind: ErrorKind::Refused, message: message.into() }
    }

    pub fn start(message: impl Into<String>) -> Self {
        Self::Error { kind: ErrorKind::Start, message: message.into() }
    }
}

/// A value as a frame.
pub(super) fn frame<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, value).expect("messages are plain data");
    let length = u32::try_from(out.len() - 4).expect("messages are bounded");
    out[..4].copy_from_slice(&length.to_be_bytes());
    out
}

/// Takes the first whole frame's content off `input`, if it is there.
pub(super) fn take_frame(input: &mut Vec<u8>, max: usize) -> io::Result<Option<Vec<u8>>> {
    let Some(head) = input.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    if length > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes, more than {max}")));
    }
    if input.len() < 4 + length {
        return Ok(None);
    }
    let content = input[4..4 + length].to_vec();
    input.drain(..4 + length);
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_whole_or_not_at_all() {
        let bytes = frame(&Request { version: VERSION, op: Op::Signal { id: "a".into(), signal: 15 } });
        let mut input = bytes[..bytes.len() - 1].to_vec();
        assert!(take_frame(&mut input, MAX_REQUEST).unwrap().is_none());
        input.push(bytes[bytes.len() - 1]);
        input.extend(&bytes);
        let first = take_frame(&mut input, MAX_REQUEST).unwrap().unwrap();
        assert!(matches!(serde_json::from_slice::<Request>(&first).unwrap().op, Op::Signal { signal: 15, .. }));
        assert_eq!(input, bytes);
        assert!(take_frame(&mut vec![0xff; 8], MAX_REQUEST).is_err());
    }
}
