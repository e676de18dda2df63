//! Asks other identity providers. Their URLs are tenants': see [`outbound`](super::outbound). Time and size are bounded.

use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use nexus_api::{ProviderDoor, ProviderRequest};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{StatusCode, Url};

use super::outbound::{Outbound, told};

/// How long one question may take, its answer read to the end.
const PATIENCE: Duration = Duration::from_secs(10);

/// The way to other identity providers.
pub struct Providers(Outbound);

impl Providers {
    pub fn new(networks: &[String]) -> anyhow::Result<Self> {
        Self::patient(networks, PATIENCE)
    }

    fn patient(networks: &[String], patience: Duration) -> anyhow::Result<Self> {
        Ok(Self(Outbound::new(networks, "provider_networks", patience)?))
    }

    async fn asked(&self, request: ProviderRequest) -> Result<Bytes, String> {
        let url: Url = request.url.parse().map_err(|_| "its URL can't be read".to_owned())?;
        let http = self.0.to(&url).map_err(|e| e.to_string())?;
        let posts = request.form.is_some();
        let mut question = match request.form {
            Some(form) => {
                http.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.as_bytes().to_vec())
            }
            None => http.get(url),
        };
        question = question.header(ACCEPT, "application/json");
        if let Some(authorization) = request.authorization {
            let value = HeaderValue::try_from(authorization.as_str()).map(|mut value| {
                value.set_sensitive(true);
                value
            });
            question = question.header(AUTHORIZATION, value.map_err(|_| "its client can't be named".to_owned())?);
        }
        let answer = question.send().await.map_err(|e| told(&e))?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED if posts => {}
            status => return Err(format!("it answered {status}")),
        }
        let mut body = BytesMut::new();
        let mut pieces = answer.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| told(&e))?;
            if body.len() + piece.len() > request.max {
                return Err(format!("its answer has more than {} bytes", request.max));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }
}

#[async_trait]
impl ProviderDoor for Providers {
    async fn ask(&self, request: ProviderRequest) -> Result<Bytes, String> {
        let url = request.url.clone();
        self.asked(request).await.inspect_err(|why| tracing::info!(url, why, "an identity provider gave no answer"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use zeroize::Zeroizing;

    use super::*;

    /// Answers every connection with the same text, after reading some of what it is asked.
    fn provider(answer: Vec<u8>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let answer = answer.clone();
                std::thread::spawn(move || {
                    let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
                    let _ = TcpStream::write_all(&mut stream, &answer);
                });
            }
        });
        url
    }

    fn get(url: String) -> ProviderRequest {
        ProviderRequest { url, form: None, authorization: None, max: 100 }
    }

    #[tokio::test]
    async fn nothing_inside_is_asked_unless_the_operator_allows_it() {
        let url = provider(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello".to_vec());
        let by_name = url.replace("127.0.0.1", "localhost");
        let strict = Providers::new(&[]).unwrap();
        for inside in [url.clone(), by_name.clone(), url.replace("127.0.0.1", "[::ffff:127.0.0.1]")] {
            let why = strict.ask(get(inside.clone())).await.unwrap_err();
            assert!(why.contains("provider_networks"), "{inside}: {why}");
        }
        let local = Providers::new(&["127.0.0.0/8".into(), "::1/128".into()]).unwrap();
        for inside in [url, by_name] {
            assert_eq!(local.ask(get(inside)).await.unwrap(), "hello");
        }
    }

    #[tokio::test]
    async fn a_provider_that_does_not_end_its_answer_is_left() {
        let hasty = Providers::patient(&["127.0.0.0/8".into()], Duration::from_millis(300)).unwrap();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        assert_eq!(hasty.ask(get(url)).await.unwrap_err(), "it takes too long");
        // It says how much will come, and stops.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let held = std::thread::spawn(move || {
            let mut stream = silent.accept().unwrap().0;
            let asked = std::io::Read::read(&mut stream, &mut [0; 4096]).unwrap();
            assert!(asked > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhalf").unwrap();
            stream
        });
        assert_eq!(hasty.ask(get(url)).await.unwrap_err(), "it takes too long");
        drop(held.join());
    }

    #[tokio::test]
    async fn redirects_floods_and_other_answers_are_refused() {
        let local = Providers::new(&["127.0.0.0/8".into()]).unwrap();
        let ask = async |answer: &str, form: bool| {
            let form = form.then(|| Zeroizing::new("code=x".to_owned()));
            local.ask(ProviderRequest { form, ..get(provider(answer.as_bytes().to_vec())) }).await
        };
        let moved = "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n";
        assert!(ask(moved, false).await.unwrap_err().contains("302"));
        let flood = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "x".repeat(1 << 20));
        assert!(ask(&flood, false).await.unwrap_err().contains("more than 100 bytes"));
        let refused = "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(ask(refused, true).await.unwrap(), "{}");
        assert!(ask(refused, false).await.unwrap_err().contains("400"));
        assert_eq!(ask("nonsense", false).await.unwrap_err(), "the connection broke");
    }
}
