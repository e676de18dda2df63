//! `nexus exec`: a command in an instance, over a WebSocket.
//!
//! Binary messages are one byte for the channel and then the data: 0 standard input (an empty one ends it), 1 standard
//! output, 2 standard error, 3 the exit code as decimal text, which comes last and becomes ours.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use futures::{SinkExt as _, StreamExt as _};
use nexus_env::Env;
use nexus_iam::tls::{Clock, public_client_config};
use nexus_model::plan::channel;
use nexus_model::{Name, kind};
use reqwest::Url;
use reqwest::header::AUTHORIZATION;
use rustls_pki_types::ServerName;
use rustls_platform_verifier::ConfigVerifierExt as _;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Bytes, Error as WsError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::cloud::{Cloud, CloudArgs, encode, name_of, text};
use super::logs::{Found, find};
use super::{output, settle};
use crate::client::{ClientError, Problem};
use crate::exit::{Exit, Fail};

const CONNECT: Duration = Duration::from_secs(5);
/// The server asks a host, and may wait for it.
const UPGRADE: Duration = Duration::from_secs(75);
/// The server pings more often than this.
const SILENCE: Duration = Duration::from_secs(90);

/// Runs a command in an instance; its exit code becomes ours
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus exec web-0a1b2c3d -- ls -l /\n  \
    nexus exec web -- cat /etc/hostname\n  \
    echo hello | nexus exec -i web-0a1b2c3d -- cat\n  \
    nexus exec web --part proxy -- cat /etc/hostname\n\n\
    Of an app, the first instance that is ready is taken.")]
pub struct ExecArgs {
    /// An instance, or an app
    #[arg(value_name = "INSTANCE")]
    what: String,
    /// Passes our standard input on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// In a sidecar, by its name, instead of the main part
    #[arg(long, value_name = "NAME")]
    part: Option<Name>,
    /// The command and its arguments, after --
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
    #[command(flatten)]
    cloud: CloudArgs,
}

trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

type Ws = WebSocketStream<Box<dyn Socket>>;

pub async fn run(args: &ExecArgs) -> anyhow::Result<i32> {
    let cloud = Cloud::connect(&args.cloud)?;
    let instance = match find(&cloud, &args.what, false).await? {
        Found::Instance(instance) => instance,
        Found::App(app) => {
            let instances = settle::instances_of(&cloud, &app).await?;
            let ready = instances.into_iter().find(|i| i["status"]["ready"] == true);
            let name = text(&app, "/metadata/name");
            let ready = ready.ok_or_else(|| Fail::conflict(format!("app/{name} has no instance that is ready")))?;
            output::note(&format!("in instance/{}", text(&ready, "/metadata/name")));
            ready
        }
    };
    let kind = kind::find("instance").expect("a kind");
    let mut path = format!("{}:exec?stdin={}", path_of(&cloud, kind, &instance)?, args.stdin);
    if let Some(part) = &args.part {
        path.push_str(&format!("&part={part}"));
    }
    for word in &args.command {
        path.push_str(&format!("&command={}", encode(word)));
    }
    let socket = open(&cloud, &path).await?;
    converse(socket, args.stdin, &mut tokio::io::stdin()).await
}

/// Where an instance is, in whichever region.
fn path_of(cloud: &Cloud, kind: &kind::KindDescriptor, instance: &serde_json::Value) -> anyhow::Result<String> {
    Ok(cloud.object_at(kind, &cloud.region_of(instance), &cloud.target.project, &name_of(instance)?))
}

/// Opens the socket on the first server that can be reached and does not say that it is unavailable.
async fn open(cloud: &Cloud, path: &str) -> anyhow::Result<Ws> {
    let mut last = String::new();
    for endpoint in cloud.client.endpoints() {
        let stream = match tokio::time::timeout(CONNECT, connect(cloud, endpoint)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) => {
                last = format!("{e:#}");
                continue;
            }
            Err(_) => {
                last = format!("{endpoint} does not answer");
                continue;
            }
        };
        let url = endpoint.replacen("http", "ws", 1) + path;
        let mut request = url.into_client_request().with_context(|| format!("the address {endpoint}"))?;
        if let Some(value) = cloud.client.authorization().await? {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        match tokio::time::timeout(UPGRADE, client_async(request, stream)).await {
            Ok(Ok((socket, _))) => return Ok(socket),
            Ok(Err(WsError::Http(response))) => {
                let status = response.status();
                let body = response.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
                let document: Option<Value> = serde_json::from_str(&body).ok().filter(Value::is_object);
                let refused = ClientError::Refused(Box::new(Problem { status, document, text: body }));
                if status.as_u16() != 503 {
                    return Err(refused.into());
                }
                last = refused.to_string();
            }
            Ok(Err(e)) => last = e.to_string(),
            Err(_) => last = format!("{endpoint} did not answer in {} seconds", UPGRADE.as_secs()),
        }
    }
    let tried = cloud.client.endpoints().collect::<Vec<_>>().join(", ");
    Err(ClientError::Unreachable { tried, last }.into())
}

async fn connect(cloud: &Cloud, endpoint: &str) -> anyhow::Result<Box<dyn Socket>> {
    let url = Url::parse(endpoint).with_context(|| format!("the address {endpoint}"))?;
    let host = url.host_str().with_context(|| format!("the address {endpoint} has no host"))?;
    let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = url.port_or_known_default().unwrap_or(443);
    let stream =
        TcpStream::connect((bare.as_str(), port)).await.with_context(|| format!("connecting to {endpoint}"))?;
    stream.set_nodelay(true).ok();
    if url.scheme() != "https" {
        return Ok(Box::new(stream));
    }
    let config = match &cloud.target.ca {
        Some(pem) => {
            let roots = nexus_iam::Roots::from_pem(pem).context("reading the context's authority")?;
            let clock = Env::real().clock;
            public_client_config(&roots, &[b"http/1.1"], Clock::millis(move || clock.now_millis()))?
        }
        None => {
            crate::install_crypto();
            Arc::new(rustls::ClientConfig::with_platform_verifier().context("finding the system's authorities")?)
        }
    };
    let name = ServerName::try_from(bare).with_context(|| format!("the address {endpoint}"))?;
    let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await;
    Ok(Box::new(stream.with_context(|| format!("TLS with {endpoint}"))?))
}

/// Carries frames both ways until the command ends; answers its exit code.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: WebSocketStream<S>,
    with_stdin: bool,
    stdin: &mut (impl AsyncRead + Unpin),
) -> anyhow::Result<i32> {
    let mut reading = with_stdin;
    let mut buffer = vec![0; 32 << 10];
    let broke = |why: String| Fail::unavailable(format!("the connection broke off before the command ended: {why}"));
    loop {
        tokio::select! {
            // Output first: it may tell that nobody reads our input any more.
            biased;
            message = tokio::time::timeout(SILENCE, socket.next()) => {
                let message = message.map_err(|_| broke("nothing was heard".into()))?;
                match message {
                    Some(Ok(Message::Binary(data))) => {
                        if let Some(code) = take(&data)? {
                            socket.close(None).await.ok();
                            return Ok(code);
                        }
                    }
                    Some(Ok(Message::Close(frame))) => {
                        let why = frame.map(|f| output::plain(&f.reason)).unwrap_or_default();
                        return Err(broke(if why.is_empty() { "it was closed".into() } else { why }).into());
                    }
                    Some(Ok(_)) => {}
                    Some(Err(e)) => return Err(broke(e.to_string()).into()),
                    None => return Err(broke("it was closed".into()).into()),
                }
            }
            read = stdin.read(&mut buffer), if reading => {
                let n = read.context("reading standard input")?;
                reading = n > 0;
                let mut frame = Vec::with_capacity(n + 1);
                frame.push(channel::STDIN);
                frame.extend_from_slice(&buffer[..n]);
                // The exit code is still to be read from a command that no longer listens.
                if socket.send(Message::Binary(Bytes::from(frame))).await.is_err() {
                    reading = false;
                }
            }
        }
    }
}

/// Handles one frame; answers the exit code if it is that.
fn take(frame: &[u8]) -> anyhow::Result<Option<i32>> {
    match frame.split_first() {
        Some((&channel::STDOUT, data)) => output::bytes(data)?,
        Some((&channel::STDERR, data)) => {
            let mut err = std::io::stderr().lock();
            // Nobody may be there to read it; the command goes on.
            err.write_all(data).and_then(|()| err.flush()).ok();
        }
        Some((&channel::EXIT, data)) => {
            let code = std::str::from_utf8(data).ok().and_then(|t| t.trim().parse().ok());
            let unreadable = || Fail::new(Exit::Failed, "the exit code can't be read");
            return Ok(Some(code.ok_or_else(unreadable)?));
        }
        // What a newer server may send.
        _ => {}
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    #[tokio::test]
    async fn input_is_passed_on_and_the_exit_code_comes_back() {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let server = tokio::spawn(async move {
            let mut socket = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
            let mut heard = Vec::new();
            while let Some(Ok(Message::Binary(frame))) = socket.next().await {
                heard.push(frame.to_vec());
                if frame.len() == 1 {
                    break;
                }
            }
            socket.send(Message::Binary(Bytes::from_static(b"\x02\n"))).await.unwrap();
            socket.send(Message::Binary(Bytes::from_static(b"\x0342"))).await.unwrap();
            socket.next().await;
            heard
        });
        let socket = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let code = converse(socket, true, &mut &b"hello"[..]).await.unwrap();
        assert_eq!(code, 42);
        assert_eq!(server.await.unwrap(), [b"\x00hello".to_vec(), b"\x00".to_vec()]);
    }

    #[tokio::test]
    async fn a_connection_that_ends_early_is_told() {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        drop(theirs);
        let socket = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let error = converse(socket, false, &mut tokio::io::empty()).await.unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::Unavailable as i32);
    }

    #[test]
    fn an_exit_code_must_be_a_number() {
        assert_eq!(take(b"\x030").unwrap(), Some(0));
        assert_eq!(take(b"\x09x").unwrap(), None);
        assert!(take(b"\x03x").is_err());
    }
}
