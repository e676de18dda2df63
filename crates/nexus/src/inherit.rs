//! Listeners that a process finds open at its birth.
//!
//! The supervisor of a local cloud with several regions starts servers and gateways in their region's network namespace,
//! where nobody reaches them on the machine's 127.0.0.1. It opens those listeners itself, in the machine's namespace, and
//! hands them over as open descriptors, named in a variable: `ADDRESS=DESCRIPTOR`, separated by spaces. Systemd does the
//! same for units with a socket, in a way of its own (`LISTEN_FDS`, sd_listen_fds(3)), which is understood too: there the
//! descriptors begin at 3, and each tells its address itself.
//!
//! A listener that outlives the process which serves it turns nobody away while one process ends and the next begins.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use nexus_env::{BoxStream, Endpoint, Listener, RealTransport, Transport};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::net::TcpListener;

/// The variable that names them.
pub const VARIABLE: &str = "NEXUS_LISTENERS";

/// The descriptors that systemd has opened for this very process.
fn from_systemd() -> std::ops::Range<i32> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let mine = number("LISTEN_PID").is_some_and(|pid| u32::try_from(pid) == Ok(std::process::id()));
    let count = number("LISTEN_FDS").filter(|n| mine && (1..=64).contains(n)).unwrap_or(0);
    3..3 + count
}

/// The listeners that were handed over and are not in use yet. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Inherited(Arc<Mutex<BTreeMap<SocketAddr, std::net::TcpListener>>>);

impl Inherited {
    /// Takes what the process was given. To be called once, before anything else opens descriptors in other ways.
    pub fn take() -> anyhow::Result<Self> {
        let mut found = BTreeMap::new();
        for descriptor in from_systemd() {
            // SAFETY: systemd opened this descriptor for this process alone, which has not touched it yet; what it is, is
            // checked right below.
            let listener: std::net::TcpListener = unsafe { OwnedFd::from_raw_fd(descriptor) }.into();
            let address =
                listener.local_addr().map_err(|e| anyhow::anyhow!("descriptor {descriptor} of systemd: {e}"))?;
            fcntl(&listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            listener.set_nonblocking(true)?;
            found.insert(address, listener);
        }
        let text = std::env::var_os(VARIABLE).unwrap_or_default();
        let text = text.to_string_lossy();
        for part in text.split_whitespace() {
            let bad = || anyhow::anyhow!("{VARIABLE}: `{part}` is not ADDRESS=DESCRIPTOR of an open listener");
            let (address, descriptor) = part.rsplit_once('=').ok_or_else(bad)?;
            let (address, descriptor): (SocketAddr, i32) =
                (address.parse().map_err(|_| bad())?, descriptor.parse().map_err(|_| bad())?);
            if descriptor <= 2 {
                return Err(bad());
            }
            // SAFETY: the parent opened this descriptor for this process alone, which has not touched it yet; that it is
            // open and what it says it is, is checked right below.
            let listener: std::net::TcpListener = unsafe { OwnedFd::from_raw_fd(descriptor) }.into();
            if listener.local_addr().map_err(|_| bad())? != address {
                return Err(bad());
            }
            fcntl(&listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|_| bad())?;
            listener.set_nonblocking(true)?;
            found.insert(address, listener);
        }
        Ok(Self(Arc::new(Mutex::new(found))))
    }

    /// The listener at an address, if one was handed over.
    pub fn at(&self, address: SocketAddr) -> Option<io::Result<TcpListener>> {
        let listener = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&address)?;
        Some(TcpListener::from_std(listener))
    }
}

/// The machine's network, with the listeners that were handed over in place of new ones.
pub struct InheritingTransport(pub Inherited);

#[async_trait]
impl Transport for InheritingTransport {
    async fn connect(&self, to: &Endpoint) -> io::Result<BoxStream> {
        RealTransport.connect(to).await
    }

    async fn bind(&self, at: &Endpoint) -> io::Result<Box<dyn Listener>> {
        match at.tcp().and_then(|address| self.0.at(address)) {
            Some(listener) => Ok(nexus_env::listener(listener?)),
            None => RealTransport.bind(at).await,
        }
    }
}
