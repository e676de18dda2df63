//! A function: a component of the world `wasi:http/proxy`, which answers one request with one fresh instance of itself.
//!
//! Besides greeting, it has a path for each thing that one wants to see a cloud do with a function: keep it fresh, stream
//! through it, pass it variables, let it ask others, collect its logs, and survive it when it misbehaves.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    Fields, IncomingRequest, IncomingResponse, OutgoingBody, OutgoingRequest, OutgoingResponse, ResponseOutparam,
    Scheme,
};
use wasip2::io::streams::StreamError;

static COUNTER: AtomicU32 = AtomicU32::new(0);

struct Hello;

wasip2::http::proxy::export!(Hello);

impl Guest for Hello {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_else(|| "/".into());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        match path {
            "/" => answer(out, 200, &format!("Hello from {}\n", env("NAME").unwrap_or("CloudNexus".into()))),
            // Every request meets a fresh instance, so this is 1 for ever.
            "/counter" => answer(out, 200, &format!("{}\n", COUNTER.fetch_add(1, Ordering::Relaxed) + 1)),
            "/echo" => echo(request, out),
            "/env" => {
                let mut variables: Vec<_> = std::env::vars().map(|(key, value)| format!("{key}={value}\n")).collect();
                variables.sort();
                answer(out, 200, &variables.concat());
            }
            "/log" => {
                println!("a line for standard output");
                eprintln!("a line for standard error");
                answer(out, 200, "logged\n");
            }
            "/sleep" => {
                std::thread::sleep(Duration::from_millis(query.parse().unwrap_or(100)));
                answer(out, 200, "slept\n");
            }
            "/spin" => loop {
                black_box(COUNTER.fetch_add(1, Ordering::Relaxed));
            },
            "/eat" => {
                let mut eaten = Vec::new();
                loop {
                    eaten.push(vec![1u8; 1 << 20]);
                    black_box(&eaten);
                }
            }
            "/panic" => panic!("asked to"),
            "/fetch" => fetch(query, out),
            "/closed" => closed(out),
            _ => answer(out, 404, "no such page\n"),
        }
    }
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn answer(out: ResponseOutparam, status: u16, text: &str) {
    let headers = Fields::new();
    headers.append("content-type", b"text/plain; charset=utf-8").expect("a legal header");
    let response = OutgoingResponse::new(headers);
    response.set_status_code(status).expect("a legal status");
    let body = response.body().expect("the body is taken once");
    ResponseOutparam::set(out, Ok(response));
    let stream = body.write().expect("the stream is taken once");
    // An error means that the client has gone away: there is nobody to tell.
    let _ = stream.blocking_write_and_flush(text.as_bytes());
    drop(stream);
    let _ = OutgoingBody::finish(body, None);
}

/// Sends the request's body back while it still arrives.
fn echo(request: IncomingRequest, out: ResponseOutparam) {
    let incoming = request.consume().expect("the body is taken once");
    let input = incoming.stream().expect("the stream is taken once");
    let response = OutgoingResponse::new(Fields::new());
    let body = response.body().expect("the body is taken once");
    ResponseOutparam::set(out, Ok(response));
    let output = body.write().expect("the stream is taken once");
    loop {
        match output.blocking_splice(&input, 64 << 10) {
            Ok(_) => {}
            Err(StreamError::Closed) => break,
            Err(StreamError::LastOperationFailed(e)) => panic!("echo: {}", e.to_debug_string()),
        }
    }
    drop(output);
    OutgoingBody::finish(body, None).expect("every byte was sent");
}

/// Asks somebody else, and passes the answer on while it arrives: an app of the project by its name, or whoever the project's egress
/// leads to.
fn fetch(url: &str, out: ResponseOutparam) {
    match get(url) {
        Ok(response) => {
            let incoming = response.consume().expect("the body is taken once");
            let input = incoming.stream().expect("the stream is taken once");
            let answer = OutgoingResponse::new(Fields::new());
            answer.set_status_code(response.status()).expect("a legal status");
            let body = answer.body().expect("the body is taken once");
            ResponseOutparam::set(out, Ok(answer));
            let output = body.write().expect("the stream is taken once");
            // An end that is none fails the guest, so that its client does not take a part for the whole.
            while match output.blocking_splice(&input, 64 << 10) {
                Ok(_) => true,
                Err(StreamError::Closed) => false,
                Err(StreamError::LastOperationFailed(e)) => panic!("fetch: {}", e.to_debug_string()),
            } {}
            drop(output);
            OutgoingBody::finish(body, None).expect("every byte was sent");
        }
        Err(why) => answer(out, 502, &format!("{why}\n")),
    }
}

fn get(url: &str) -> Result<IncomingResponse, String> {
    let (scheme, rest) = url.split_once("://").ok_or("say /fetch?http://HOST/PATH")?;
    let scheme = if scheme == "https" { Scheme::Https } else { Scheme::Http };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let request = OutgoingRequest::new(Fields::new());
    request.set_scheme(Some(&scheme)).map_err(|()| "no such scheme")?;
    request.set_authority(Some(authority)).map_err(|()| "no such host")?;
    request.set_path_with_query(Some(if path.is_empty() { "/" } else { path })).map_err(|()| "no such path")?;
    let answer = outgoing_handler::handle(request, None).map_err(|e| format!("{e:?}"))?;
    answer.subscribe().block();
    let answer = answer.get().expect("it is ready").expect("it is taken once");
    answer.map_err(|e| format!("{e:?}"))
}

/// Tries sockets and the file system, and tells that they are closed.
fn closed(out: ResponseOutparam) {
    let socket = std::net::TcpStream::connect("127.0.0.1:80").map(|_| ()).map_err(|e| e.kind());
    let name = std::net::ToSocketAddrs::to_socket_addrs("localhost:80").map(|_| ()).map_err(|e| e.kind());
    let file = std::fs::read_dir("/").map(|_| ()).map_err(|e| e.kind());
    answer(out, 200, &format!("socket: {socket:?}\nname: {name:?}\nfile: {file:?}\n"));
}
