//! Probes: whether an instance answers, and at which of its addresses.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nexus_compute::{ExecIo, Runtime};
use nexus_env::{Endpoint, Env};
use nexus_model::kind::Probe;
use nexus_model::plan::InstancePlan;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// An answer's first line is short; the rest is not read.
const MAX_HEAD: usize = 1024;

/// The addresses of an instance in the order in which they are tried: the one that answered last first.
fn addresses(plan: &InstancePlan, known: Option<SocketAddr>) -> [IpAddr; 2] {
    let (six, four) = (plan.address6.into(), plan.address4.into());
    if known.is_some_and(|k| k.ip() == four) { [four, six] } else { [six, four] }
}

/// Which of the instance's addresses accepts a connection on `port`.
pub(crate) async fn connects(
    env: &Env,
    plan: &InstancePlan,
    port: u16,
    known: Option<SocketAddr>,
    limit: Duration,
) -> Result<SocketAddr, String> {
    let mut why = String::new();
    for address in addresses(plan, known) {
        let at = SocketAddr::new(address, port);
        match timeout(limit, env.transport.connect(&Endpoint::Tcp(at))).await {
            Ok(Ok(_)) => return Ok(at),
            Ok(Err(e)) => why = format!("port {port} does not accept connections: {e}"),
            Err(_) => why = format!("port {port} does not answer within {} s", limit.as_secs()),
        }
    }
    Err(why)
}

/// One probe. The error says why it failed, in a clause.
pub(crate) async fn probe(
    env: &Env,
    runtime: &dyn Runtime,
    plan: &InstancePlan,
    probe: &Probe,
    known: Option<SocketAddr>,
    limit: Duration,
) -> Result<(), String> {
    match probe {
        Probe::Tcp { port } => connects(env, plan, *port, known, limit).await.map(drop),
        Probe::Http { port, path } => {
            let at = connects(env, plan, *port, known, limit).await?;
            match timeout(limit, get(env, at, path)).await {
                Ok(Ok(status)) if (200..400).contains(&status) => Ok(()),
                Ok(Ok(status)) => Err(format!("GET {path} on port {port} answers {status}")),
                Ok(Err(e)) => Err(format!("GET {path} on port {port} fails: {e}")),
                Err(_) => Err(format!("GET {path} on port {port} does not answer within {} s", limit.as_secs())),
            }
        }
        Probe::Exec { command } => {
            let null = || std::fs::File::options().read(true).write(true).open("/dev/null").map_err(|e| e.to_string());
            let io = ExecIo { stdin: null()?.into(), stdout: null()?.into(), stderr: null()?.into() };
            match runtime.exec(plan.uid, command, io, limit).await {
                Ok(0) => Ok(()),
                Ok(code) => Err(format!("the command of its check exits with {code}")),
                Err(e) => Err(format!("the command of its check can't be run: {e}")),
            }
        }
    }
}

/// The status of an HTTP/1.1 GET.
async fn get(env: &Env, at: SocketAddr, path: &str) -> std::io::Result<u16> {
    let mut stream = env.transport.connect(&Endpoint::Tcp(at)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nUser-Agent: nexus-health\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut head = Vec::new();
    let mut buffer = [0; 256];
    while !head.contains(&b'\n') && head.len() < MAX_HEAD {
        match stream.read(&mut buffer).await? {
            0 => break,
            n => head.extend_from_slice(&buffer[..n]),
        }
    }
    status_of(&head).ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "the answer is not HTTP"))
}

fn status_of(head: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(head.split(|b| *b == b'\n').next()?).ok()?;
    line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_from_the_first_line() {
        assert_eq!(status_of(b"HTTP/1.1 204 No Content\r\nA: b\r\n"), Some(204));
        assert_eq!(status_of(b"HTTP/1.0 500\r\n"), Some(500));
        assert_eq!(status_of(b"SSH-2.0-OpenSSH\r\n"), None);
    }
}
