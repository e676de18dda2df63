//! Byte streams between processes: connect to an [`Endpoint`], or bind one and accept.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::Endpoint;

/// A connected byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub type BoxStream = Box<dyn Stream>;

/// The network. Callers set their own deadlines: a connect to a silent host waits as long as the kernel does.
#[async_trait]
pub trait Transport: Send + Sync {
    async fn connect(&self, to: &Endpoint) -> io::Result<BoxStream>;
    /// Port 0 takes a free one; [`Listener::local`] says which.
    async fn bind(&self, at: &Endpoint) -> io::Result<Box<dyn Listener>>;
}

/// A bound endpoint.
#[async_trait]
pub trait Listener: Send {
    fn local(&self) -> Endpoint;
    /// The next connection and the endpoint that it comes from. Cancel safe.
    async fn accept(&mut self) -> io::Result<(BoxStream, Endpoint)>;
}

/// The machine's TCP and Unix sockets. TCP goes out at once (no Nagle), notices a dead peer (keep-alive), and asks to be sent
/// before what is not marked: it is what a cloud is run by.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealTransport;

/// A peer that vanished without a word is noticed after about 10 + 3 × 5 seconds.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// Class selector 6, network control (RFC 2474, RFC 4594), where it stands in a packet's traffic class.
const TRAFFIC_CLASS: u32 = 48 << 2;
/// `TC_PRIO_INTERACTIVE`: the first band of a plain queue, and the most that needs no privilege.
const PRIORITY: u32 = 6;

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    // A wish, not a condition; the last one, because a traffic class sets a priority too.
    let _ = (socket.set_tos_v4(TRAFFIC_CLASS), socket.set_tclass_v6(TRAFFIC_CLASS), socket.set_priority(PRIORITY));
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)
}

#[async_trait]
impl Transport for RealTransport {
    async fn connect(&self, to: &Endpoint) -> io::Result<BoxStream> {
        match to {
            Endpoint::Tcp(addr) => {
                let stream = TcpStream::connect(addr).await?;
                tune(&stream)?;
                Ok(Box::new(stream))
            }
            Endpoint::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
        }
    }

    async fn bind(&self, at: &Endpoint) -> io::Result<Box<dyn Listener>> {
        match at {
            // tokio sets SO_REUSEADDR, so that a restarted server gets its port back at once.
            Endpoint::Tcp(addr) => Ok(listener(TcpListener::bind(addr).await?)),
            Endpoint::Unix(path) => {
                // A socket file outlives the process that made it. It is removed only if nobody answers there, so
                // that a second server can't take the first one's place unseen.
                if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
                    if UnixStream::connect(path).await.is_ok() {
                        return Err(io::Error::new(
                            io::ErrorKind::AddrInUse,
                            format!("{} is in use by another process", path.display()),
                        ));
                    }
                    std::fs::remove_file(path)?;
                }
                Ok(Box::new(RealUnixListener { inner: UnixListener::bind(path)?, at: at.clone() }))
            }
        }
    }
}

/// A socket that listens already, as [`RealTransport`] would have bound it.
pub fn listener(inner: TcpListener) -> Box<dyn Listener> {
    Box::new(RealTcpListener { inner })
}

struct RealTcpListener {
    inner: TcpListener,
}

#[async_trait]
impl Listener for RealTcpListener {
    fn local(&self) -> Endpoint {
        Endpoint::Tcp(self.inner.local_addr().expect("a bound listener has an address"))
    }

    async fn accept(&mut self) -> io::Result<(BoxStream, Endpoint)> {
        loop {
            let (stream, peer) = self.inner.accept().await?;
            // A peer that is already gone again is no reason to stop accepting.
            if tune(&stream).is_ok() {
                return Ok((Box::new(stream), Endpoint::Tcp(peer)));
            }
        }
    }
}

struct RealUnixListener {
    inner: UnixListener,
    at: Endpoint,
}

#[async_trait]
impl Listener for RealUnixListener {
    fn local(&self) -> Endpoint {
        self.at.clone()
    }

    async fn accept(&mut self) -> io::Result<(BoxStream, Endpoint)> {
        let (stream, _) = self.inner.accept().await?;
        // Clients of a Unix socket have no address of their own; what they reached is the best name for them.
        Ok((Box::new(stream), self.at.clone()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn echoes(at: Endpoint) {
        let mut listener = RealTransport.bind(&at).await.unwrap();
        let to = listener.local();
        let client = tokio::spawn(async move {
            let mut stream = RealTransport.connect(&to).await.unwrap();
            stream.write_all(b"hello").await.unwrap();
            let mut back = [0; 5];
            stream.read_exact(&mut back).await.unwrap();
            back
        });
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut got = [0; 5];
        stream.read_exact(&mut got).await.unwrap();
        stream.write_all(&got).await.unwrap();
        assert_eq!(&client.await.unwrap(), b"hello");
    }

    #[tokio::test]
    async fn bytes_come_back_over_tcp_and_over_unix_sockets() {
        let dir = tempfile::tempdir().unwrap();
        echoes("127.0.0.1:0".parse().unwrap()).await;
        let at = Endpoint::Unix(dir.path().join("s"));
        echoes(at.clone()).await;
        // The file that the first listener left is no obstacle.
        echoes(at).await;
    }

    #[tokio::test]
    async fn a_socket_file_in_use_is_not_stolen() {
        let dir = tempfile::tempdir().unwrap();
        let at = Endpoint::Unix(dir.path().join("s"));
        let _first = RealTransport.bind(&at).await.unwrap();
        let second = RealTransport.bind(&at).await.err().unwrap();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
    }
}
