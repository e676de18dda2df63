//! A network inside one process: endpoints are names in a shared table, streams are in-memory pipes.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{BoxStream, Endpoint, Listener, Transport};

/// Bytes in flight on one direction of a stream before the writer waits.
const PIPE_BYTES: usize = 256 * 1024;
/// Connections that wait to be accepted before a connect waits too.
const BACKLOG: usize = 128;

type Table = Arc<Mutex<BTreeMap<Endpoint, mpsc::Sender<(BoxStream, Endpoint)>>>>;

/// Clones share one network. TCP port 0 takes a free port, as in the kernel.
#[derive(Clone, Default)]
pub struct MemTransport {
    table: Table,
    next_port: Arc<AtomicU16>,
}

impl MemTransport {
    pub fn new() -> Self {
        Self::default()
    }

    fn free_port(&self) -> u16 {
        20_000 + self.next_port.fetch_add(1, Ordering::Relaxed) % 40_000
    }
}

#[async_trait]
impl Transport for MemTransport {
    async fn connect(&self, to: &Endpoint) -> io::Result<BoxStream> {
        let door = self.table.lock().unwrap_or_else(PoisonError::into_inner).get(to).cloned();
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, format!("nobody listens at {to}"));
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        let from = Endpoint::Tcp(([127, 0, 0, 1], self.free_port()).into());
        door.ok_or_else(refused)?.send((Box::new(theirs), from)).await.map_err(|_| refused())?;
        Ok(Box::new(ours))
    }

    async fn bind(&self, at: &Endpoint) -> io::Result<Box<dyn Listener>> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = at.clone();
        if let Endpoint::Tcp(addr) = &mut at
            && addr.port() == 0
        {
            loop {
                addr.set_port(self.free_port());
                if !table.contains_key(&Endpoint::Tcp(*addr)) {
                    break;
                }
            }
        }
        if table.get(&at).is_some_and(|door| !door.is_closed()) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{at} is in use")));
        }
        let (door, incoming) = mpsc::channel(BACKLOG);
        table.insert(at.clone(), door);
        Ok(Box::new(MemListener { at, incoming }))
    }
}

struct MemListener {
    at: Endpoint,
    incoming: mpsc::Receiver<(BoxStream, Endpoint)>,
}

#[async_trait]
impl Listener for MemListener {
    fn local(&self) -> Endpoint {
        self.at.clone()
    }

    async fn accept(&mut self) -> io::Result<(BoxStream, Endpoint)> {
        self.incoming.recv().await.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn streams_connect_by_endpoint_and_end_with_their_listener() {
        let net = MemTransport::new();
        let mut listener = net.bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let at = listener.local();
        assert!(net.bind(&at).await.is_err());
        let mut out = net.connect(&at).await.unwrap();
        let (mut inside, _) = listener.accept().await.unwrap();
        out.write_all(b"x").await.unwrap();
        assert_eq!(inside.read_u8().await.unwrap(), b'x');
        drop(listener);
        assert!(net.connect(&at).await.is_err());
        assert!(net.bind(&at).await.is_ok());
    }
}
