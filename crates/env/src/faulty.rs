//! A transport with cables that can be pulled. Each process is a label; a cut between two labels holds back what flows
//! in that direction, as a dead cable does: nothing errs, nothing arrives, and what was sent comes when the link heals.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{BoxStream, Endpoint, Listener, Transport};

#[derive(Default)]
struct State {
    cut: BTreeSet<(String, String)>,
    /// Pairs count up when their connections are reset; a stream remembers the count it was born with.
    resets: BTreeMap<(String, String), u64>,
    labels: BTreeMap<Endpoint, String>,
    wakers: Vec<Waker>,
}

/// The cables between labels, shared by every [`FaultyTransport`] of a test.
#[derive(Clone, Default)]
pub struct Links(Arc<Mutex<State>>);

impl Links {
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let wakers = {
            let mut state = self.state();
            change(&mut state);
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Says which label listens at an endpoint. Endpoints without a label can't be cut.
    pub fn name(&self, at: &Endpoint, label: &str) {
        self.change(|s| drop(s.labels.insert(at.clone(), label.to_owned())));
    }

    /// Nothing flows from `from` to `to` any more; the other direction is left as it is.
    pub fn cut(&self, from: &str, to: &str) {
        self.change(|s| {
            s.cut.insert((from.to_owned(), to.to_owned()));
        });
    }

    /// Cuts both directions.
    pub fn cut_both(&self, a: &str, b: &str) {
        self.cut(a, b);
        self.cut(b, a);
    }

    /// What was held back flows again.
    pub fn heal(&self, from: &str, to: &str) {
        self.change(|s| {
            s.cut.remove(&(from.to_owned(), to.to_owned()));
        });
    }

    /// Heals every link.
    pub fn heal_all(&self) {
        self.change(|s| s.cut.clear());
    }

    /// Breaks the open connections between two labels; new ones can be made.
    pub fn reset(&self, a: &str, b: &str) {
        self.change(|s| {
            for pair in [(a.to_owned(), b.to_owned()), (b.to_owned(), a.to_owned())] {
                *s.resets.entry(pair).or_default() += 1;
            }
        });
    }

    /// Whether something can flow from `from` to `to` now.
    pub fn is_cut(&self, from: &str, to: &str) -> bool {
        self.state().cut.contains(&(from.to_owned(), to.to_owned()))
    }
}

/// One process's view of a network whose links can be cut. Gates sit on the connecting side and guard both directions,
/// so both ends need only share the [`Links`].
pub struct FaultyTransport {
    inner: Arc<dyn Transport>,
    label: String,
    links: Links,
}

impl FaultyTransport {
    pub fn new(inner: Arc<dyn Transport>, label: &str, links: Links) -> Self {
        Self { inner, label: label.to_owned(), links }
    }
}

#[async_trait]
impl Transport for FaultyTransport {
    async fn connect(&self, to: &Endpoint) -> io::Result<BoxStream> {
        let Some(peer) = self.links.state().labels.get(to).cloned() else {
            return self.inner.connect(to).await;
        };
        let out = (self.label.clone(), peer.clone());
        let back = (peer, self.label.clone());
        // A handshake needs both directions. The caller's deadline ends the wait.
        let links = &self.links;
        std::future::poll_fn(|cx| {
            let mut state = links.state();
            if state.cut.contains(&out) || state.cut.contains(&back) {
                park(&mut state, cx);
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        let born = self.links.state().resets.get(&out).copied().unwrap_or(0);
        let inner = self.inner.connect(to).await?;
        Ok(Box::new(GatedStream { inner, links: self.links.clone(), out, back, born }))
    }

    async fn bind(&self, at: &Endpoint) -> io::Result<Box<dyn Listener>> {
        let listener = self.inner.bind(at).await?;
        self.links.name(&listener.local(), &self.label);
        Ok(listener)
    }
}

fn park(state: &mut State, cx: &Context<'_>) {
    if !state.wakers.iter().any(|w| w.will_wake(cx.waker())) {
        state.wakers.push(cx.waker().clone());
    }
}

struct GatedStream {
    inner: BoxStream,
    links: Links,
    out: (String, String),
    back: (String, String),
    born: u64,
}

impl GatedStream {
    fn gate(&self, pair: &(String, String), cx: &Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.links.state();
        if state.resets.get(&self.out).copied().unwrap_or(0) != self.born {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        // Even an open gate parks its waker when it is idle, because a reset has to reach a reader that waits.
        park(&mut state, cx);
        if state.cut.contains(pair) { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

impl AsyncRead for GatedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.gate(&self.back, cx))?;
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for GatedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        std::task::ready!(self.gate(&self.out, cx))?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.gate(&self.out, cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;
    use crate::MemTransport;

    #[tokio::test]
    async fn a_cut_holds_one_direction_and_a_heal_delivers_it() {
        let (net, links) = (Arc::new(MemTransport::new()), Links::new());
        let a = FaultyTransport::new(net.clone(), "a", links.clone());
        let b = FaultyTransport::new(net, "b", links.clone());
        let mut listener = b.bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let at = listener.local();
        let mut ours = a.connect(&at).await.unwrap();
        let (mut theirs, _) = listener.accept().await.unwrap();

        links.cut("a", "b");
        let wait = Duration::from_millis(50);
        assert!(timeout(wait, ours.write_all(b"x")).await.is_err());
        assert!(timeout(wait, a.connect(&at)).await.is_err());
        theirs.write_all(b"y").await.unwrap();
        assert_eq!(ours.read_u8().await.unwrap(), b'y');

        links.heal("a", "b");
        ours.write_all(b"x").await.unwrap();
        assert_eq!(theirs.read_u8().await.unwrap(), b'x');

        let reader = tokio::spawn(async move { ours.read_u8().await });
        tokio::task::yield_now().await;
        links.reset("a", "b");
        assert_eq!(reader.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(a.connect(&at).await.is_ok());
    }
}
