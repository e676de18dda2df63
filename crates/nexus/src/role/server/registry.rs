//! Images from registries, by the OCI distribution specification 1.1 (`/v2/…`), which Docker's registries speak too.
//!
//! A reference is a tenant's words, as an identity provider's URL is, so that a registry is reached by the same rules: public
//! addresses and the networks that the operator names (`registry_networks`), judged where they are connected to. Redirects
//! (registries keep their blobs elsewhere) are followed here, a few, each judged again; never from TLS to none, and credentials
//! don't go along to another origin. Plain HTTP is spoken only with registries of this machine (`localhost`, loopback addresses),
//! as Docker does.
//!
//! ```text
//! GET /v2/NAME/manifests/TAG ── 401, WWW-Authenticate: Bearer realm=…,service=…,scope=… ── GET realm?service&scope [Basic]
//!     └─ or Basic: the name and password themselves              the token, for whatever is asked next ─┘
//! an index ── the manifest for this machine ── its configuration ── its layers
//! ```
//!
//! Nothing is believed but digests: each document and blob is hashed, and everything is bounded: size, time, layers, redirects.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use nexus_compute::image::registry::{Document, MANIFEST_TYPES, check_config};
use nexus_compute::image::{Descriptor, ImageError, MAX_CONFIG, MAX_MANIFEST, Manifest};
use nexus_model::{ApiError, Code, Digest, FieldError, SecretData, SecretValue};
use oci_spec::distribution::Reference;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Certificate, Response, StatusCode, Url};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::outbound::{Outbound, is_a_strangers, told};

/// How long a question may take whose answer is small, read to its end.
const PATIENCE: Duration = Duration::from_secs(30);
/// A registry that sends nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(30);
const REDIRECTS: usize = 5;
/// Indexes within indexes.
const NESTING: usize = 4;
const MAX_TOKEN_ANSWER: usize = 64 << 10;
const MAX_ERROR: usize = 4 << 10;
/// What one image may hold, in bytes.
pub const MAX_IMAGE: u64 = 64 << 30;

/// The way to registries.
pub struct Registries(Outbound);

/// Who asks a registry. Never shown, never stored in the clear.
#[derive(Clone)]
pub struct Credentials {
    user: String,
    password: SecretValue,
}

/// An image that a registry has, read as far as its layers.
pub struct Found {
    /// What the reference named.
    pub source: Digest,
    pub digest: Digest,
    pub document: Bytes,
    pub manifest: Manifest,
    pub config: Bytes,
}

/// What was asked for, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// With its registry and tag: what people know it by.
    pub reference: String,
    /// As credentials are kept for it: `docker.io`, `registry.example:5000`.
    pub registry: String,
    base: Url,
    repository: String,
    /// A tag or a digest.
    at: String,
    digest: Option<Digest>,
}

fn wrong(message: impl Into<String>) -> ApiError {
    ApiError::invalid(vec![FieldError::new("reference", message)])
}

fn wrong_secret(message: impl Into<String>) -> ApiError {
    ApiError::invalid(vec![FieldError::new("secret", message)])
}

fn of_image(error: &ImageError) -> ApiError {
    wrong(error.to_string())
}

impl Wanted {
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let why = |e: &dyn std::fmt::Display| {
            wrong(format!("{text:?} is no reference to an image, such as registry.example/web:1.4: {e}"))
        };
        let reference: Reference = text.parse().map_err(|e| why(&e))?;
        let registry = reference.registry().to_owned();
        // Docker's own registry answers under another name than the one in references.
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { &registry };
        let scheme = if is_own_machine(host) { "http" } else { "https" };
        let base: Url = format!("{scheme}://{host}/v2/").parse().map_err(|_| why(&"its registry is no host"))?;
        let digest: Option<Digest> = match reference.digest() {
            Some(digest) => Some(digest.parse().map_err(|_| why(&"only sha256 digests are known"))?),
            None => None,
        };
        let at = reference.digest().or(reference.tag()).unwrap_or("latest").to_owned();
        let repository = reference.repository().to_owned();
        Ok(Self { reference: reference.whole(), registry, base, repository, at, digest })
    }

    fn url(&self, kind: &str, what: &str) -> Result<Url, ApiError> {
        self.base.join(&format!("{}/{kind}/{what}", self.repository)).map_err(|e| wrong(e.to_string()))
    }
}

/// Whether a host, as a reference writes it, is this machine.
fn is_own_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback())
}

/// A text of JSON that must not be left behind in memory.
#[derive(Default)]
struct Hidden(Zeroizing<String>);

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(|text| Self(Zeroizing::new(text)))
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DockerAuth {
    auth: Option<Hidden>,
    username: Option<String>,
    password: Option<Hidden>,
    identitytoken: Option<Hidden>,
}

/// Keys under which a secret may hold what `docker login` writes.
const DOCKER_CONFIG: [&str; 3] = ["config.json", "dockerconfigjson", "docker-config.json"];

/// The host of an entry of Docker's configuration: with or without scheme and path, and Docker's own under its old names.
fn entry_host(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    match rest.split('/').next().unwrap_or_default() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

impl Credentials {
    /// What a secret holds for a registry: `username` and `password` (and the `registry` that they are for), or what
    /// `docker login` writes.
    pub fn of(data: &SecretData, registry: &str) -> Result<Self, ApiError> {
        let value = |key: &str| data.0.get(key);
        let text = |key: &str| value(key).and_then(SecretValue::text).map(str::trim_end);
        if let Some(json) = DOCKER_CONFIG.iter().find_map(|key| value(key)) {
            let config: DockerConfig = serde_json::from_slice(json.expose())
                // The error would name a piece of the text.
                .map_err(|_| wrong_secret("its Docker configuration can't be read: is it JSON with \"auths\"?"))?;
            let entry = config.auths.into_iter().find(|(key, _)| entry_host(key) == registry).map(|(_, entry)| entry);
            let entry =
                entry.ok_or_else(|| wrong_secret(format!("its Docker configuration has no entry for {registry}")))?;
            return Self::of_docker(entry, registry);
        }
        if let Some(only) = text("registry")
            && entry_host(only) != registry
        {
            return Err(wrong_secret(format!("it is for the registry {only}, not for {registry}")));
        }
        match (text("username"), value("password")) {
            (Some(user), Some(password)) => {
                let password = password.expose();
                // Files and pipes often end with a newline that is not the password's.
                let password = password.strip_suffix(b"\n").unwrap_or(password);
                Ok(Self { user: user.to_owned(), password: SecretValue::new(password.to_vec()) })
            }
            _ => Err(wrong_secret(
                "it needs the keys `username` and `password`, or `config.json` as `docker login` writes it",
            )),
        }
    }

    fn of_docker(entry: DockerAuth, registry: &str) -> Result<Self, ApiError> {
        if let (Some(user), Some(password)) = (entry.username, entry.password) {
            return Ok(Self { user, password: SecretValue::new(password.0.as_bytes().to_vec()) });
        }
        if entry.identitytoken.is_some_and(|token| !token.0.is_empty()) {
            let message = format!("its entry for {registry} is an identity token: give a user's name and password");
            return Err(wrong_secret(message));
        }
        let decoded = entry.auth.and_then(|auth| SecretValue::from_base64(auth.0.trim()));
        let pair = decoded.as_ref().and_then(SecretValue::text).and_then(|text| text.split_once(':'));
        let (user, password) =
            pair.ok_or_else(|| wrong_secret(format!("its entry for {registry} has no name and password")))?;
        Ok(Self { user: user.to_owned(), password: SecretValue::new(password.as_bytes().to_vec()) })
    }

    fn basic(&self) -> Result<HeaderValue, ApiError> {
        let mut pair = Zeroizing::new(Vec::with_capacity(self.user.len() + self.password.expose().len() + 1));
        pair.extend_from_slice(self.user.as_bytes());
        pair.push(b':');
        pair.extend_from_slice(self.password.expose());
        let pair = SecretValue::new(pair.to_vec());
        header("Basic", &pair.to_base64())
    }
}

fn header(scheme: &str, value: &str) -> Result<HeaderValue, ApiError> {
    let text = Zeroizing::new(format!("{scheme} {value}"));
    let mut value = HeaderValue::try_from(text.as_str()).map_err(|_| wrong("its token can't be sent"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// How a registry wants to be asked (RFC 7235), of what it says the first that is understood.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    fn read(headers: &HeaderMap) -> Option<Self> {
        headers.get_all(WWW_AUTHENTICATE).iter().take(8).find_map(|value| {
            let text = value.to_str().ok()?;
            let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
            if scheme.eq_ignore_ascii_case("basic") {
                return Some(Self::Basic);
            }
            if !scheme.eq_ignore_ascii_case("bearer") {
                return None;
            }
            let parameters = parameters(rest);
            let find = |key: &str| parameters.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| v.clone());
            Some(Self::Bearer { realm: find("realm")?, service: find("service"), scope: find("scope") })
        })
    }
}

/// `key="value", key=value, …`; quoted values hold commas, and backslashes before what they mean.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text.trim_start_matches([' ', ',']);
    while let Some((key, after)) = rest.split_once('=') {
        let mut value = String::new();
        let mut chars = after.char_indices();
        let quoted = after.starts_with('"');
        if quoted {
            chars.next();
        }
        let mut end = after.len();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' if quoted => {
                    end = at + 1;
                    break;
                }
                '\\' if quoted => value.extend(chars.next().map(|(_, c)| c)),
                ',' | ' ' if !quoted => {
                    end = at;
                    break;
                }
                c => value.push(c),
            }
        }
        found.push((key.trim().to_owned(), value));
        rest = after[end..].trim_start_matches([' ', ',']);
    }
    found
}

/// One image's conversation with its registry.
pub struct Session {
    registries: Arc<Registries>,
    wanted: Wanted,
    credentials: Option<Credentials>,
    /// What the registry is shown with each question, once it has asked for it.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Registries {
    /// `authorities`: a file with the certificates of those that count beside the machine's own.
    pub fn new(networks: &[String], authorities: Option<&Path>) -> anyhow::Result<Self> {
        let read = |path| {
            authorities_in(path).with_context(|| format!("`registry_ca_file` of the configuration, {}", path.display()))
        };
        let authorities = authorities.map(read).transpose()?.unwrap_or_default();
        Ok(Self(Outbound::streaming(networks, "registry_networks", SILENCE, authorities)?))
    }

    pub fn session(self: &Arc<Self>, wanted: Wanted, credentials: Option<Credentials>) -> Session {
        Session { registries: Arc::clone(self), wanted, credentials, authorization: Mutex::default() }
    }

    /// One question, without following where it leads.
    async fn ask(&self, url: &Url, headers: HeaderMap) -> Result<Response, ApiError> {
        let at = || url.host_str().unwrap_or_default().to_owned();
        let http = self.0.to(url).map_err(|e| wrong(format!("{}: {e}", at())))?;
        let asked = http.get(url.clone()).headers(headers).send();
        let answer = tokio::time::timeout(PATIENCE, asked).await;
        let answer = answer.map_err(|_| wrong(format!("{}: it takes too long", at())))?;
        answer.map_err(|e| {
            let advice = if is_a_strangers(&e) {
                "; the operator can name that authority's certificate in `registry_ca_file` of the servers' configuration"
            } else {
                ""
            };
            wrong(format!("{}: {}{advice}", at(), told(&e)))
        })
    }
}

fn authorities_in(path: &Path) -> anyhow::Result<Vec<Certificate>> {
    let found = Certificate::from_pem_bundle(&std::fs::read(path)?)?;
    anyhow::ensure!(!found.is_empty(), "it has no certificate (`-----BEGIN CERTIFICATE-----`)");
    Ok(found)
}

fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default()
}

/// A small answer, whole.
async fn body(answer: Response, max: usize) -> Result<Bytes, String> {
    let mut body = BytesMut::new();
    let mut pieces = answer.bytes_stream();
    let read = async {
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| told(&e))?;
            if body.len() + piece.len() > max {
                return Err(format!("its answer has more than {max} bytes"));
            }
            body.extend_from_slice(&piece);
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, read).await.map_err(|_| "it takes too long".to_owned())??;
    Ok(body.freeze())
}

/// What a registry says of a refusal (`{"errors": [{"code", "message"}]}`), in few and plain words.
async fn said(answer: Response) -> String {
    let text = body(answer, MAX_ERROR).await.unwrap_or_default();
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let first = &value["errors"][0];
    let words = first["message"].as_str().or(first["code"].as_str()).unwrap_or_default();
    let plain: String = words.chars().filter(|c| !c.is_control()).take(200).collect();
    if plain.is_empty() { plain } else { format!(": {plain}") }
}

impl Session {
    fn name(&self) -> String {
        format!("{}/{}", self.wanted.registry, self.wanted.repository)
    }

    fn authorization(&self) -> MutexGuard<'_, Option<HeaderValue>> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, shows who asks when that is wanted, and follows redirects.
    async fn get(&self, url: Url, accept: Option<&'static str>) -> Result<Response, ApiError> {
        let mut shown = false;
        let (mut at, mut redirects) = (url, 0);
        loop {
            let own = same_origin(&at, &self.wanted.base);
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(ACCEPT, HeaderValue::from_static(accept));
            }
            if own {
                headers.extend(self.authorization().clone().map(|value| (AUTHORIZATION, value)));
            }
            let answer = self.registries.ask(&at, headers).await?;
            let status = answer.status();
            if status.is_redirection() {
                redirects += 1;
                at = self.next(&at, &answer, redirects)?;
                continue;
            }
            match status {
                StatusCode::OK => return Ok(answer),
                StatusCode::UNAUTHORIZED if own && !shown => {
                    shown = true;
                    let challenge = Challenge::read(answer.headers());
                    let value = self.authorized(challenge).await?;
                    *self.authorization() = Some(value);
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.refused(&said(answer).await)),
                StatusCode::NOT_FOUND => {
                    let detail = format!("the registry has no {}{}", self.wanted.reference, said(answer).await);
                    return Err(ApiError::new(Code::NotFound, detail));
                }
                StatusCode::TOO_MANY_REQUESTS => {
                    let why =
                        format!("{}: it takes no more requests from here now; try again later", self.wanted.registry);
                    return Err(wrong(why + &said(answer).await));
                }
                _ => {
                    let why = format!("{}: it answered {status}", self.wanted.registry);
                    return Err(wrong(why + &said(answer).await));
                }
            }
        }
    }

    fn refused(&self, said: &str) -> ApiError {
        match self.credentials {
            Some(_) => {
                wrong_secret(format!("{} refuses these credentials for {}{said}", self.wanted.registry, self.name()))
            }
            None => {
                let hint = "name a secret with a user's name and password";
                wrong_secret(format!(
                    "{} lets nobody pull {} without credentials: {hint}{said}",
                    self.wanted.registry,
                    self.name()
                ))
            }
        }
    }

    /// Where a redirect leads, if it is one to follow.
    fn next(&self, from: &Url, answer: &Response, redirects: usize) -> Result<Url, ApiError> {
        let why = |what: &str| wrong(format!("{}: {what}", self.wanted.registry));
        if redirects > REDIRECTS {
            return Err(why("it redirects in circles"));
        }
        let location = answer.headers().get(LOCATION).and_then(|l| l.to_str().ok());
        let next = location.and_then(|l| from.join(l).ok()).ok_or_else(|| why("it redirects to nowhere"))?;
        self.fits(&next).map_err(|what| why(&what))?;
        Ok(next)
    }

    /// Whether a URL that the registry names is one to ask: TLS, unless the registry itself has none.
    fn fits(&self, url: &Url) -> Result<(), String> {
        match url.scheme() {
            "https" => Ok(()),
            "http" if self.wanted.base.scheme() == "http" => Ok(()),
            "http" => Err("it leads away from TLS, and is not followed".to_owned()),
            _ => Err("it leads to what is no registry, and is not followed".to_owned()),
        }
    }

    /// What to show after a challenge.
    async fn authorized(&self, challenge: Option<Challenge>) -> Result<HeaderValue, ApiError> {
        let why = |what: &str| wrong(format!("{}: {what}", self.wanted.registry));
        let (realm, service, scope) = match challenge {
            None => return Err(why("it asks for credentials in a way that is not known")),
            Some(Challenge::Basic) => {
                return self.credentials.as_ref().ok_or_else(|| self.refused(""))?.basic();
            }
            Some(Challenge::Bearer { realm, service, scope }) => (realm, service, scope),
        };
        let mut url: Url = realm.parse().map_err(|_| why("the place of its tokens can't be read"))?;
        self.fits(&url).map_err(|what| why(&what))?;
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &service {
                query.append_pair("service", service);
            }
            let own = format!("repository:{}:pull", self.wanted.repository);
            query.append_pair("scope", scope.as_deref().unwrap_or(&own));
        }
        let mut headers = HeaderMap::new();
        if let Some(credentials) = &self.credentials {
            headers.insert(AUTHORIZATION, credentials.basic()?);
        }
        let answer = self.registries.ask(&url, headers).await?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.refused(&said(answer).await)),
            status => return Err(why(&format!("where it has its tokens made, {status} is answered"))),
        }
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            token: Hidden,
            #[serde(default)]
            access_token: Hidden,
        }
        let text = body(answer, MAX_TOKEN_ANSWER).await.map_err(|e| why(&e))?;
        let answer: Answer = serde_json::from_slice(&text).map_err(|_| why("its token can't be read"))?;
        let token = if answer.token.0.is_empty() { answer.access_token.0 } else { answer.token.0 };
        if token.is_empty() {
            return Err(why("it gives no token"));
        }
        header("Bearer", &token)
    }

    /// A document, by a tag or by the digest that it must have.
    async fn document(&self, at: &str, expected: Option<Digest>) -> Result<(Digest, Bytes), ApiError> {
        let answer = self.get(self.wanted.url("manifests", at)?, Some(MANIFEST_TYPES)).await?;
        let max = usize::try_from(MAX_MANIFEST).unwrap_or(usize::MAX);
        let bytes = body(answer, max).await.map_err(|e| wrong(format!("{}: {e}", self.wanted.registry)))?;
        let found = Digest::of(&bytes);
        match expected {
            Some(expected) if expected != found => Err(of_image(&ImageError::WrongDigest { expected, found })),
            _ => Ok((found, bytes)),
        }
    }

    /// Finds the image: what the reference names, resolved to this machine, and checked as far as its configuration.
    pub async fn find(&self) -> Result<Found, ApiError> {
        let (source, mut document) = self.document(&self.wanted.at, self.wanted.digest).await?;
        let mut digest = source;
        for _ in 0..NESTING {
            match Document::read(digest, &document).map_err(|e| of_image(&e))? {
                Document::Index(chosen) => {
                    (digest, document) = self.document(&chosen.digest.to_string(), Some(chosen.digest)).await?;
                }
                Document::Image(manifest) => {
                    let size = manifest.layers.iter().chain([&manifest.config]).map(|d| d.size);
                    let size = size.fold(0u64, u64::saturating_add);
                    if size > MAX_IMAGE {
                        return Err(wrong(format!("it has {size} bytes; at most {MAX_IMAGE} are supported")));
                    }
                    let config = self.config(&manifest.config).await?;
                    check_config(&manifest, &config).map_err(|e| of_image(&e))?;
                    return Ok(Found { source, digest, document, manifest, config });
                }
            }
        }
        Err(wrong("it has indexes within indexes, too deep"))
    }

    async fn config(&self, config: &Descriptor) -> Result<Bytes, ApiError> {
        if config.size > MAX_CONFIG {
            return Err(of_image(&ImageError::TooLong { blob: config.digest, limit: MAX_CONFIG }));
        }
        let answer = self.get(self.wanted.url("blobs", &config.digest.to_string())?, None).await?;
        let max = usize::try_from(config.size).unwrap_or(usize::MAX);
        let bytes = body(answer, max).await.map_err(|e| wrong(format!("{}: {e}", self.wanted.registry)))?;
        let found = Digest::of(&bytes);
        if found != config.digest {
            return Err(of_image(&ImageError::WrongDigest { expected: config.digest, found }));
        }
        Ok(bytes)
    }

    /// A blob's content as it comes, of at most so many bytes as its descriptor says. Its digest is for whoever stores it.
    pub async fn blob(&self, blob: &Descriptor) -> Result<BoxStream<'static, std::io::Result<Bytes>>, ApiError> {
        let answer = self.get(self.wanted.url("blobs", &blob.digest.to_string())?, None).await?;
        let expected = blob.size;
        if let Some(found) = answer.content_length()
            && found != expected
        {
            return Err(of_image(&ImageError::WrongSize { blob: blob.digest, expected, found }));
        }
        let mut total = 0u64;
        let pieces = answer.bytes_stream().map(move |piece| {
            let piece = piece.map_err(|e| std::io::Error::other(told(&e)))?;
            total += piece.len() as u64;
            if total > expected {
                return Err(std::io::Error::other(format!("it sends more than the {expected} bytes that it promised")));
            }
            Ok(piece)
        });
        Ok(pieces.boxed())
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
