//! Bodies: whole messages, and the frames that longer ones are cut into (see the crate's head for the layout).

use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{RecvStream, SendStream};

pub(crate) const HEADER: usize = 6;
/// Payloads up to this size are copied behind their header, so that both travel in one HTTP/2 frame.
const COPY_UP_TO: usize = 8 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Item = 0,
    End = 1,
    Refusal = 2,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub kind: Kind,
    pub channel: u8,
    pub payload: Bytes,
}

/// Why a body could not be read.
#[derive(Debug)]
pub(crate) enum BodyError {
    H2(h2::Error),
    TooLarge {
        limit: usize,
    },
    /// It ended in the middle of a frame, or without an end frame.
    CutOff,
    Malformed(String),
}

impl From<h2::Error> for BodyError {
    fn from(e: h2::Error) -> Self {
        Self::H2(e)
    }
}

impl std::fmt::Display for BodyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::H2(e) => write!(f, "{e}"),
            Self::TooLarge { limit } => write!(f, "a message is larger than {limit} bytes"),
            Self::CutOff => f.write_str("the body was cut off"),
            Self::Malformed(what) => f.write_str(what),
        }
    }
}

/// Reads a whole body of at most `limit` bytes.
pub(crate) async fn read_whole(mut body: RecvStream, limit: usize) -> Result<Bytes, BodyError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        if first.len() + rest.len() + chunk.len() > limit {
            return Err(BodyError::TooLarge { limit });
        }
        // Most messages come in one piece, which is then passed on as it is.
        if first.is_empty() && rest.is_empty() {
            first = chunk;
        } else {
            if rest.is_empty() {
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&chunk);
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

/// Cuts a body into frames. Reads no further ahead than one HTTP/2 frame, so a slow reader slows the sender down.
pub(crate) struct FrameReader {
    body: RecvStream,
    /// What has come and belongs to frames not yet given out. Never both at once.
    whole: Bytes,
    partial: BytesMut,
    limit: usize,
}

impl FrameReader {
    pub fn new(body: RecvStream, limit: usize) -> Self {
        Self { body, whole: Bytes::new(), partial: BytesMut::new(), limit }
    }

    /// The next frame. Cancel safe.
    pub async fn next(&mut self) -> Result<Frame, BodyError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, BodyError>> {
        loop {
            if let Some(frame) = self.take()? {
                return Poll::Ready(Ok(frame));
            }
            let Some(chunk) = ready!(self.body.poll_data(cx)) else { return Poll::Ready(Err(BodyError::CutOff)) };
            let chunk = chunk?;
            self.body.flow_control().release_capacity(chunk.len())?;
            if self.partial.is_empty() && self.whole.is_empty() {
                self.whole = chunk;
            } else {
                self.partial.extend_from_slice(&std::mem::take(&mut self.whole));
                self.partial.extend_from_slice(&chunk);
            }
        }
    }

    /// A frame that has come completely, if there is one.
    fn take(&mut self) -> Result<Option<Frame>, BodyError> {
        let have: &[u8] = if self.partial.is_empty() { &self.whole } else { &self.partial };
        let Some((head, after)) = have.split_at_checked(HEADER) else { return Ok(None) };
        let kind = match head[0] {
            0 => Kind::Item,
            1 => Kind::End,
            2 => Kind::Refusal,
            other => return Err(BodyError::Malformed(format!("a frame of unknown kind {other}"))),
        };
        let channel = head[1];
        let length = u32::from_be_bytes([head[2], head[3], head[4], head[5]]) as usize;
        if length > self.limit {
            return Err(BodyError::TooLarge { limit: self.limit });
        }
        if after.len() < length {
            return Ok(None);
        }
        let payload = if self.partial.is_empty() {
            self.whole.advance(HEADER);
            self.whole.split_to(length)
        } else {
            self.partial.advance(HEADER);
            self.partial.split_to(length).freeze()
        };
        Ok(Some(Frame { kind, channel, payload }))
    }
}

fn head(kind: Kind, channel: u8, length: usize) -> BytesMut {
    let mut head = BytesMut::with_capacity(HEADER + if length <= COPY_UP_TO { length } else { 0 });
    head.put_u8(kind as u8);
    head.put_u8(channel);
    head.put_u32(u32::try_from(length).expect("payloads are bounded far below 4 GiB"));
    head
}

/// The frame that ends a body.
pub(crate) fn end_frame() -> Bytes {
    head(Kind::End, 0, 0).freeze()
}

/// Sends one frame; `end` closes this direction behind it. If it is dropped before it is done, the stream is of no
/// further use.
pub(crate) async fn send_frame(to: &mut SendStream<Bytes>, frame: Frame, end: bool) -> Result<(), h2::Error> {
    let mut head = head(frame.kind, frame.channel, frame.payload.len());
    if frame.payload.len() <= COPY_UP_TO {
        head.extend_from_slice(&frame.payload);
        return send_whole(to, head.freeze(), end).await;
    }
    send_whole(to, head.freeze(), false).await?;
    send_whole(to, frame.payload, end).await
}

/// Sends `data` as the peer's window allows.
pub(crate) async fn send_whole(to: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), h2::Error> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let mut granted = to.capacity();
        // What was granted before is not announced again, so ask only when there is none.
        while granted == 0 {
            granted = match std::future::poll_fn(|cx| to.poll_capacity(cx)).await {
                Some(granted) => granted?,
                // The stream is no longer open for sending: the peer has reset it.
                None => return Err(h2::Reason::CANCEL.into()),
            };
        }
        let piece = data.split_to(granted.min(data.len()));
        to.send_data(piece, end && data.is_empty())?;
        if data.is_empty() {
            return Ok(());
        }
    }
    if end { to.send_data(Bytes::new(), true) } else { Ok(()) }
}
