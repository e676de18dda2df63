//! `nexus login --provider`: signing in by another identity provider.
//!
//! A person's browser goes to the provider and comes back to a port of this machine (RFC 8252) with a code. What proves that
//! the code is this sign-in's stays here until then: `state` for what comes back, the verifier (PKCE) for the provider, the
//! nonce for the server, which trades the code.
//!
//! A pipeline has a token of its CI system instead, and exchanges it (RFC 8693).

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nexus_iam::federation::{
    Discovery, GRANT_TOKEN_EXCHANGE, IssuerUrl, MAX_DISCOVERY, Pkce, Plaintext, authorization_url, random_state,
};
use nexus_model::Name;
use reqwest::Url;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::cloud::encode;
use crate::client::Client;
use crate::exit::Fail;
use crate::session::Session;

/// How long the browser may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long one connection of the browser may take, and the most that it says.
const ONE: Duration = Duration::from_secs(10);
const MAX_REQUEST: usize = 16 << 10;
/// The longest token of a CI system that is read.
const MAX_TOKEN: u64 = 32 << 10;
const PATH: &str = "/callback";

#[derive(Debug, Deserialize)]
struct Offers {
    providers: Vec<Offered>,
}

/// What the cloud says of a provider.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Offered {
    name: String,
    issuer: String,
    client_id: String,
    scopes: Vec<String>,
}

/// Signs a person in by a browser.
pub async fn by_browser(client: &Client, organization: &Name, provider: &Name) -> anyhow::Result<Session> {
    let offers: Offers =
        client.get(&format!("/oauth2/providers?organization={}", encode(organization.as_str()))).await?;
    let names: Vec<&str> = offers.providers.iter().map(|p| p.name.as_str()).collect();
    let Some(offered) = offers.providers.iter().find(|p| p.name == provider.as_str()) else {
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let why = format!("organization {organization} has no provider {provider} to sign in by; it has: {known}");
        return Err(Fail::not_found(why).into());
    };
    let discovery = discover(&offered.issuer).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await.context("listening for the browser")?;
    let redirect = format!("http://{}{PATH}", listener.local_addr()?);
    let (pkce, state, nonce) = (Pkce::generate(), random_state(), random_state());
    let scopes: Vec<&str> = offered.scopes.iter().map(String::as_str).collect();
    let url = authorization_url(&discovery, &offered.client_id, &redirect, &scopes, &state, &nonce, &pkce)?;
    eprintln!("open this address in a browser on this machine:\n\n  {url}\n");
    let expected = Expected { state, issuer: discovery.issuer };
    let code = tokio::time::timeout(PATIENCE, come_back(listener, expected))
        .await
        .map_err(|_| Fail::usage("nobody came back from the provider within five minutes: sign in again"))??;
    let form = [
        ("grant_type", "urn:cloudnexus:oidc-code"),
        ("organization", organization.as_str()),
        ("provider", provider.as_str()),
        ("code", &code),
        ("code_verifier", pkce.verifier()),
        ("redirect_uri", &redirect),
        ("nonce", &nonce),
    ];
    Ok(client.sign_in(&form).await?)
}

/// Signs a program in by the token of its CI system, which is in a file, or is standard input (`-`).
pub async fn by_token(client: &Client, organization: &Name, provider: &Name, file: &Path) -> anyhow::Result<Session> {
    let mut token = String::new();
    let reading = || format!("reading the token from {}", file.display());
    if file == Path::new("-") {
        std::io::stdin().lock().take(MAX_TOKEN).read_to_string(&mut token).with_context(reading)?;
    } else {
        let file = std::fs::File::open(file).with_context(reading)?;
        file.take(MAX_TOKEN).read_to_string(&mut token).with_context(reading)?;
    }
    let form = [
        ("grant_type", GRANT_TOKEN_EXCHANGE),
        ("subject_token_type", "urn:ietf:params:oauth:token-type:id_token"),
        ("subject_token", token.trim()),
        ("organization", organization.as_str()),
        ("provider", provider.as_str()),
    ];
    Ok(client.sign_in(&form).await?)
}

/// Where the provider's doors are.
async fn discover(issuer: &str) -> anyhow::Result<Discovery> {
    let url = IssuerUrl::parse(issuer, Plaintext::Loopback)?;
    crate::install_crypto();
    let http = reqwest::Client::builder()
        .user_agent(concat!("nexus/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .timeout(ONE)
        .build()?;
    let asking = || format!("asking the identity provider {issuer} what it is");
    let mut answer = http.get(url.discovery_url()).send().await.with_context(asking)?;
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await.with_context(asking)?
        && body.len() <= MAX_DISCOVERY
    {
        body.extend_from_slice(&piece);
    }
    Discovery::parse(&body, &url).with_context(asking)
}

/// What must come back with the code.
#[derive(Debug, Clone)]
struct Expected {
    state: String,
    issuer: String,
}

/// Waits for the browser. It may open connections that it does not use, and ask for other things.
async fn come_back(listener: TcpListener, expected: Expected) -> anyhow::Result<String> {
    let (sender, mut receiver) = mpsc::channel(1);
    let accepting = async {
        loop {
            let (stream, _) = listener.accept().await?;
            let (sender, expected) = (sender.clone(), expected.clone());
            tokio::spawn(async move {
                if let Ok(Ok(Some(outcome))) = tokio::time::timeout(ONE, serve(stream, &expected)).await {
                    let _ = sender.send(outcome).await;
                }
            });
        }
    };
    tokio::select! {
        outcome = receiver.recv() => Ok(outcome.expect("a sender is held")?),
        error = accepting => error,
    }
}

/// Answers one request of the browser. `None` if it was not the one that is waited for.
async fn serve(mut stream: TcpStream, expected: &Expected) -> std::io::Result<Option<Result<String, Fail>>> {
    let mut request = Vec::new();
    let mut piece = [0; 2048];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < MAX_REQUEST {
        match stream.read(&mut piece).await? {
            0 => return Ok(None),
            n => request.extend_from_slice(&piece[..n]),
        }
    }
    let text = String::from_utf8_lossy(&request);
    let target = text.strip_prefix("GET ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let outcome = code_of(target, expected);
    let (status, said) = match &outcome {
        Some(Ok(_)) => ("200 OK", "Done: this window can be closed."),
        Some(Err(_)) => ("400 Bad Request", "This did not work: the terminal says why."),
        None => ("404 Not Found", "Nothing is here."),
    };
    let page = format!("<!doctype html><meta charset=\"utf-8\"><title>CloudNexus</title><p>{said}</p>\n");
    let length = page.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/html\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(format!("{head}{page}").as_bytes()).await?;
    stream.shutdown().await?;
    Ok(outcome)
}

/// The code that the provider sent, or why it sent none. Whatever is not of this sign-in is passed over: any page that the
/// browser shows may have it ask here.
fn code_of(target: &str, expected: &Expected) -> Option<Result<String, Fail>> {
    let url = Url::parse("http://127.0.0.1").and_then(|base| base.join(target)).ok().filter(|u| u.path() == PATH)?;
    let get = |name: &str| url.query_pairs().find(|(k, _)| k == name).map(|(_, v)| v.into_owned());
    get("state").filter(|s| *s == expected.state)?;
    // RFC 9207.
    if get("iss").is_some_and(|issuer| issuer != expected.issuer) {
        return Some(Err(Fail::usage("another provider answered than was asked: sign in again")));
    }
    match (get("code"), get("error")) {
        (Some(code), None) => Some(Ok(code)),
        (_, error) => {
            let why = get("error_description").or(error).unwrap_or_else(|| "it sent no code".to_owned());
            let why: String = why.chars().filter(|c| !c.is_control()).take(200).collect();
            Some(Err(Fail::usage(format!("the provider refused: {why}"))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_belongs_to_this_sign_in_is_taken() {
        let expected = || Expected { state: "s-1".into(), issuer: "https://login.example".into() };
        for other in [
            "/",
            "/favicon.ico",
            "/callback",
            "/callback?code=x",
            "/callback?code=x&state=s-2",
            "//evil/callback?state=s-1",
        ] {
            assert!(code_of(other, &expected()).is_none() || other.starts_with("//"), "{other}");
        }
        let code = |target: &str| code_of(target, &expected()).unwrap().map_err(|e| e.to_string());
        assert_eq!(code("/callback?code=a%2Fb&state=s-1&iss=https%3A%2F%2Flogin.example").unwrap(), "a/b");
        assert!(
            code("/callback?code=x&state=s-1&iss=https%3A%2F%2Fevil.example").unwrap_err().contains("another provider")
        );
        let denied = code("/callback?error=access_denied&error_description=no%0Athanks&state=s-1").unwrap_err();
        assert!(denied.contains("nothanks"), "{denied}");

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let waiting = tokio::spawn(come_back(listener, expected()));
        let _idle = TcpStream::connect(address).await.unwrap();
        let ask = async |target: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        assert!(ask("/callback?code=forged&state=guessed").await.starts_with("HTTP/1.1 404"));
        assert!(ask("/callback?code=real&state=s-1").await.contains("can be closed"));
        assert_eq!(waiting.await.unwrap().unwrap(), "real");
    }
}
