//! The long bodies that callers and handlers hold: items, blobs and tagged bytes.

use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use h2::SendStream;
use nexus_env::Endpoint;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::connection::{Connection, Hold};
use crate::error::{Refusal, WireError};
use crate::frame::{BodyError, Frame, FrameReader, Kind, end_frame, send_frame};

/// A reply that comes in frames, with what keeps its connection alive.
pub(crate) struct Reply {
    pub frames: FrameReader,
    pub hold: Hold,
    /// After the frames and the hold, so that the stream is reset before its connection may go.
    pub _connection: Arc<Connection>,
    pub endpoint: Endpoint,
    pub method: String,
    pub version: u16,
}

impl Reply {
    /// The next item; `None` at the end.
    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, WireError>>> {
        let frame = match ready!(self.frames.poll_next(cx)) {
            Ok(frame) => frame,
            Err(e) => return Poll::Ready(Some(Err(WireError::from_body(e, &self.endpoint, |e| self.hold.broken(e))))),
        };
        Poll::Ready(match frame.kind {
            Kind::Item => Some(Ok(frame)),
            Kind::End => None,
            Kind::Refusal => Some(Err(match crate::decode::<Refusal>(&frame.payload) {
                Ok(refusal) => WireError::from_refusal(refusal, &self.method, Duration::ZERO, self.version),
                Err(e) => WireError::Protocol(format!("a refusal that can't be read: {e}")),
            })),
        })
    }
}

/// The answers of a stream call. Ends (`None`) after the peer's last answer or the first error. Dropping it cancels
/// the call.
pub struct Streaming<A> {
    /// `None` once it has ended: the stream is let go at once, not when the holder gets around to it.
    reply: Option<Reply>,
    item: PhantomData<fn() -> A>,
}

impl<A: DeserializeOwned> Streaming<A> {
    pub(crate) fn new(reply: Reply) -> Self {
        Self { reply: Some(reply), item: PhantomData }
    }

    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Result<A, WireError>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl<A: DeserializeOwned> Stream for Streaming<A> {
    type Item = Result<A, WireError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(reply) = &mut self.reply else { return Poll::Ready(None) };
        let item = ready!(reply.poll_item(cx)).map(|frame| {
            let frame = frame?;
            crate::decode(&frame.payload).map_err(|e| WireError::Protocol(format!("an item can't be read: {e}")))
        });
        if !matches!(item, Some(Ok(_))) {
            self.reply = None;
        }
        Poll::Ready(item)
    }
}

/// What a handler reads of a request.
enum Source {
    /// At the callee, where nothing but frames is to be held.
    Request(FrameReader),
    Reply(Box<Reply>),
    Ended,
}

impl Source {
    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, WireError>>> {
        let item = match self {
            Self::Reply(reply) => ready!(reply.poll_item(cx)),
            Self::Request(frames) => match ready!(frames.poll_next(cx)) {
                Ok(frame) => match frame.kind {
                    Kind::Item => Some(Ok(frame)),
                    Kind::End => None,
                    Kind::Refusal => Some(Err(WireError::Protocol("a caller does not refuse".to_owned()))),
                },
                Err(BodyError::TooLarge { limit }) => Some(Err(WireError::TooLarge { limit })),
                Err(e) => Some(Err(WireError::Protocol(format!("the request stopped: {e}")))),
            },
            Self::Ended => None,
        };
        if !matches!(item, Some(Ok(_))) {
            *self = Self::Ended;
        }
        Poll::Ready(item)
    }
}

/// The pieces of a blob. Ends with `None` only if the blob is whole; a cut one ends with an error. Errors are
/// [`WireError`]s inside [`io::Error`]s, so that it can be read as a file is.
pub struct ByteStream(Source);

impl ByteStream {
    pub(crate) fn from_reply(reply: Reply) -> Self {
        Self(Source::Reply(Box::new(reply)))
    }

    pub(crate) fn from_request(frames: FrameReader) -> Self {
        Self(Source::Request(frames))
    }

    /// Cancel safe.
    pub async fn next(&mut self) -> Option<io::Result<Bytes>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for ByteStream {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_item(cx).map(|item| item.map(|frame| frame.map(|f| f.payload).map_err(io::Error::other)))
    }
}

/// The receiving half of a duplex call: `(channel, bytes)`.
pub struct FrameStream(Source);

impl FrameStream {
    pub(crate) fn from_reply(reply: Reply) -> Self {
        Self(Source::Reply(Box::new(reply)))
    }

    pub(crate) fn from_request(frames: FrameReader) -> Self {
        Self(Source::Request(frames))
    }

    /// `None` when the peer has finished. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<(u8, Bytes), WireError>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for FrameStream {
    type Item = Result<(u8, Bytes), WireError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_item(cx).map(|item| item.map(|frame| frame.map(|f| (f.channel, f.payload))))
    }
}

/// The sending half of a duplex call. A caller that drops it says that no more will come, which is what the end of
/// standard input means; to cancel, drop the receiving half too.
pub struct FrameSink(Sink);

enum Sink {
    Direct {
        to: SendStream<Bytes>,
        max: usize,
        /// A send was dropped halfway, so the peer could not tell where the next frame begins.
        torn: bool,
    },
    Queue {
        to: mpsc::Sender<Out>,
        max: usize,
    },
}

/// What a handler's side puts on the wire.
pub(crate) enum Out {
    Frame(u8, Bytes),
    End(Result<(), Refusal>),
}

impl FrameSink {
    pub(crate) fn direct(to: SendStream<Bytes>, max: usize) -> Self {
        Self(Sink::Direct { to, max, torn: false })
    }

    pub(crate) fn queue(to: mpsc::Sender<Out>, max: usize) -> Self {
        Self(Sink::Queue { to, max })
    }

    /// Sends bytes on a channel; waits while the peer reads too slowly.
    pub async fn send(&mut self, channel: u8, bytes: Bytes) -> Result<(), WireError> {
        let max = match &self.0 {
            Sink::Direct { max, .. } | Sink::Queue { max, .. } => *max,
        };
        if bytes.len() > max {
            return Err(WireError::TooLarge { limit: max });
        }
        let gone = || WireError::Protocol("the peer takes no more frames".to_owned());
        match &mut self.0 {
            Sink::Direct { to, torn, .. } => {
                if std::mem::replace(torn, true) {
                    return Err(WireError::Local("an earlier send was stopped halfway".to_owned()));
                }
                let frame = Frame { kind: Kind::Item, channel, payload: bytes };
                send_frame(to, frame, false).await.map_err(|_| gone())?;
                *torn = false;
                Ok(())
            }
            Sink::Queue { to, .. } => to.send(Out::Frame(channel, bytes)).await.map_err(|_| gone()),
        }
    }
}

impl Drop for FrameSink {
    fn drop(&mut self) {
        if let Sink::Direct { to, torn, .. } = &mut self.0 {
            if *torn {
                to.send_reset(h2::Reason::CANCEL);
            } else {
                // Six bytes, which HTTP/2 keeps until the window allows; a stream that is over already needs none.
                let _ = to.send_data(end_frame(), true);
            }
        }
    }
}
