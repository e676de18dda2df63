//! A stream from a client of HTTP/2 with the values of `:authority` made plain.
//!
//! gRPC's C core (Python, C++, Ruby, PHP) names a socket by its path, as in `run%2Fspiffe%2Fworkload.sock`. RFC 3986 allows
//! `%2F` in a host's name, but h2's server does not and ends the stream before anybody is asked. Nobody here reads the
//! authority; so, in frames that carry whole headers, what may not stand in it by h2's rules becomes `-`. No length changes
//! by that, neither of the frame nor of what HPACK's table (RFC 7541) counts, so both ends go on to agree.
//!
//! Everything else passes as it is, malformed frames too: judging them is h2's part. Values in Huffman's code pass as well;
//! the C core does not write any.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use nexus_env::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// `PRI * HTTP/2.0…` (RFC 9113, section 3.4).
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
/// The largest frame that h2 takes here; a larger one is not looked into.
const MAX_FRAME: usize = 16_384;
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const AUTHORITY: &[u8] = b":authority";
/// Of `:authority` in HPACK's static table.
const AUTHORITY_INDEX: usize = 1;

pub struct PlainAuthority {
    inner: BoxStream,
    /// What came in and may be part of a frame that is looked into.
    raw: BytesMut,
    /// What may be read.
    ready: BytesMut,
    /// Bytes that pass unseen before the next frame begins.
    pass: usize,
    ended: bool,
}

impl PlainAuthority {
    pub fn new(inner: BoxStream) -> Self {
        Self { inner, raw: BytesMut::new(), ready: BytesMut::new(), pass: PREFACE, ended: false }
    }

    /// Moves what is complete from `raw` to `ready`.
    fn sort(&mut self) {
        loop {
            let passing = self.pass.min(self.raw.len());
            self.ready.unsplit(self.raw.split_to(passing));
            self.pass -= passing;
            if self.pass > 0 || self.raw.len() < FRAME_HEAD {
                return;
            }
            let length = usize::from(self.raw[0]) << 16 | usize::from(self.raw[1]) << 8 | usize::from(self.raw[2]);
            let (kind, flags) = (self.raw[3], self.raw[4]);
            let whole = FRAME_HEAD + length;
            if kind == HEADERS && flags & END_HEADERS != 0 && length <= MAX_FRAME {
                if self.raw.len() < whole {
                    return;
                }
                // A block that can't be walked through is h2's to refuse.
                let _ = make_plain(&mut self.raw[FRAME_HEAD..whole], flags);
            }
            self.pass = whole;
        }
    }
}

/// Walks through the header block of a HEADERS frame's payload. `None`: it is malformed.
fn make_plain(payload: &mut [u8], flags: u8) -> Option<()> {
    let padded = flags & PADDED != 0;
    let padding = if padded { usize::from(*payload.first()?) } else { 0 };
    let mut at = usize::from(padded) + if flags & PRIORITY != 0 { 5 } else { 0 };
    let end = payload.len().checked_sub(padding)?;
    let block = payload.get_mut(..end)?;
    while at < block.len() {
        // RFC 7541, section 6: which representation it is, and the prefix of its number.
        let first = block[at];
        let (bits, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index = number(block, &mut at, bits)?;
        if !literal {
            continue;
        }
        let mut is_authority = index == AUTHORITY_INDEX;
        if index == 0 {
            let (huffman, name) = text(block, &mut at)?;
            is_authority = !huffman && block[name] == *AUTHORITY;
        }
        let (huffman, value) = text(block, &mut at)?;
        if is_authority && !huffman {
            for byte in &mut block[value] {
                if !byte.is_ascii_alphanumeric() && !matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']') {
                    *byte = b'-';
                }
            }
        }
    }
    Some(())
}

/// An integer with a prefix of so many bits (RFC 7541, section 5.1), and moves on behind it.
fn number(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let most = (1usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = *block.get(*at)?;
        *at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    // Longer than any frame that is looked into.
    None
}

/// Where a string's bytes are (RFC 7541, section 5.2) and whether they are in Huffman's code, and moves on behind it.
fn text(block: &[u8], at: &mut usize) -> Option<(bool, std::ops::Range<usize>)> {
    let huffman = block.get(*at)? & 0x80 != 0;
    let length = number(block, at, 7)?;
    let range = *at..at.checked_add(length)?;
    block.get(range.clone())?;
    *at = range.end;
    Some((huffman, range))
}

impl AsyncRead for PlainAuthority {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.ready.is_empty() && !this.ended {
            let mut piece = [0; 4096];
            let mut buffer = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                // A frame that broke off.
                this.ended = true;
                this.ready.unsplit(this.raw.split());
            } else {
                this.raw.extend_from_slice(buffer.filled());
                this.sort();
            }
        }
        let count = this.ready.len().min(out.remaining());
        out.put_slice(&this.ready[..count]);
        this.ready.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PlainAuthority {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// A literal with a new name, as the C core writes it.
    fn literal(name: &str, value: &str) -> Vec<u8> {
        let text = |t: &str| [&[u8::try_from(t.len()).unwrap()], t.as_bytes()].concat();
        [vec![0x40], text(name), text(value)].concat()
    }

    async fn through(pieces: &[&[u8]]) -> Vec<u8> {
        let (mut client, server) = tokio::io::duplex(64);
        let all: Vec<Vec<u8>> = pieces.iter().map(|p| p.to_vec()).collect();
        let writing = tokio::spawn(async move {
            for piece in all {
                client.write_all(&piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        let mut out = Vec::new();
        PlainAuthority::new(Box::new(server)).read_to_end(&mut out).await.unwrap();
        writing.await.unwrap();
        out
    }

    const START: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    #[tokio::test]
    async fn only_what_stands_in_an_authority_is_changed() {
        let path = literal(":path", "/a%2Fb");
        let block =
            [&[0x3f, 0xe1, 0x1f, 0x83][..], &path, &literal(":authority", "run%2Fw.sock"), &literal("x", "%2F")];
        let headers = frame(HEADERS, END_HEADERS, &block.concat());
        let data = frame(0, 1, b":authority\x03%2F");
        let wanted = [&path[..], &literal(":authority", "run-2Fw.sock"), &literal("x", "%2F")].concat();
        let wanted = frame(HEADERS, END_HEADERS, &[block[0], &wanted].concat());
        let all = [START, &headers, &data, &headers].concat();
        let expected = [START, &wanted, &data, &wanted].concat();
        assert_eq!(through(&[&all]).await, expected);
        // In whatever pieces it comes.
        let bytes: Vec<&[u8]> = all.chunks(1).collect();
        assert_eq!(through(&bytes).await, expected);

        // With padding and priority, and by the name's place in the static table.
        let named = [&[3, 0, 0, 0, 0, 16, 0x41, 4][..], b"a%2F", b"\0\0\0"].concat();
        let padded = frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &named);
        let named = [&[3, 0, 0, 0, 0, 16, 0x41, 4][..], b"a-2F", b"\0\0\0"].concat();
        let wanted = frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &named);
        assert_eq!(through(&[START, &padded]).await, [START, &wanted].concat());
    }

    #[tokio::test]
    async fn whatever_else_comes_passes_as_it_is() {
        let huffman = [&[0x41, 0x83][..], b"%2F"].concat();
        let unfinished = frame(HEADERS, 0, &literal(":authority", "%2F"));
        let endless = frame(HEADERS, END_HEADERS, &[0x7f, 0xff, 0xff, 0xff, 0xff]);
        let short = frame(HEADERS, END_HEADERS, &[0x41, 0x70, b'%']);
        let overpadded = frame(HEADERS, END_HEADERS | PADDED, &[200, 0x41]);
        let large = frame(HEADERS, END_HEADERS, &vec![b'%'; MAX_FRAME + 1]);
        let broken = &frame(HEADERS, END_HEADERS, b"broken off")[..12];
        let frames = [&frame(HEADERS, END_HEADERS, &huffman)[..], &unfinished, &endless, &short, &overpadded];
        let all = [START, &frames.concat(), &frame(HEADERS, END_HEADERS, b""), &large, broken].concat();
        assert_eq!(through(&[&all]).await, all);
        assert_eq!(through(&[b"GET / HTTP/1.1\r\n"]).await, b"GET / HTTP/1.1\r\n");
    }
}
