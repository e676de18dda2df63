//! The bodies that pass through: requests that may have to be sent twice, and answers that hold what they use.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::backend::{Http1, Lease};
use crate::connections::Active;

/// A request's body. Clones are the same body, so that it can be offered to another instance if the first has not
/// begun to read it.
#[derive(Clone)]
pub(crate) enum RequestBody {
    Whole(Option<Bytes>),
    Stream(Arc<Streamed>),
}

pub(crate) struct Streamed {
    body: Mutex<Incoming>,
    begun: AtomicBool,
}

impl Streamed {
    fn body(&self) -> MutexGuard<'_, Incoming> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RequestBody {
    pub fn stream(body: Incoming) -> Self {
        Self::Stream(Arc::new(Streamed { body: Mutex::new(body), begun: AtomicBool::new(false) }))
    }

    /// Whether it can be sent from its beginning.
    pub fn is_untouched(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Stream(streamed) => !streamed.begun.load(Ordering::Relaxed),
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Stream(streamed) => {
                streamed.begun.store(true, Ordering::Relaxed);
                Pin::new(&mut *streamed.body()).poll_frame(cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Stream(streamed) => streamed.body().is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Stream(streamed) => streamed.body().size_hint(),
        }
    }
}

/// An instance's answer on its way: frames that were read ahead, and the rest.
pub(crate) struct Answer {
    pub early: VecDeque<Frame<Bytes>>,
    pub rest: Option<Incoming>,
    /// Given back when the whole answer has been read, closed otherwise.
    pub connection: Option<Http1>,
    pub lease: Option<Lease>,
}

impl Answer {
    fn finish(&mut self) {
        self.rest = None;
        if let Some(lease) = self.lease.take()
            && let Some(connection) = self.connection.take()
        {
            lease.backend().keep_http1(connection);
        }
    }

    fn is_end(&self) -> bool {
        self.early.is_empty() && self.rest.as_ref().is_none_or(Body::is_end_stream)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // hyper does not read a body that says at once that it is empty.
        if self.is_end() {
            self.finish();
        }
    }
}

/// What a user gets.
pub(crate) enum ResponseBody {
    /// The gateway's own words.
    Own(Option<Bytes>, Option<Active>),
    Instance(Box<Answer>, Option<Active>),
}

impl ResponseBody {
    /// Keeps the user's connection marked busy until the body is gone.
    pub fn hold(&mut self, busy: Active) {
        match self {
            Self::Own(_, active) | Self::Instance(_, active) => *active = Some(busy),
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let answer = match self.get_mut() {
            Self::Own(bytes, _) => return Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Instance(answer, _) => answer,
        };
        if let Some(frame) = answer.early.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(rest) = &mut answer.rest else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(rest).poll_frame(cx));
        match &frame {
            None => answer.finish(),
            Some(Err(_)) => {
                answer.connection = None;
                answer.rest = None;
            }
            Some(Ok(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes, _) => bytes.is_none(),
            Self::Instance(answer, _) => answer.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes, _) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Instance(answer, _) => {
                let early: u64 = answer.early.iter().filter_map(|f| f.data_ref()).map(|d| d.len() as u64).sum();
                let rest = answer.rest.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint);
                let mut hint = SizeHint::new();
                if let Some(upper) = rest.upper() {
                    hint.set_upper(upper + early);
                }
                hint.set_lower(rest.lower() + early);
                hint
            }
        }
    }
}
