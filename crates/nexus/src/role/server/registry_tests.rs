//! A registry that misbehaves in one way each time: what a real one does is shown end to end.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use serde_json::json;

use super::*;

/// Answers by path, as written; what it is asked it remembers.
struct Fake {
    address: String,
    asked: Arc<std::sync::Mutex<Vec<String>>>,
}

type Answers = BTreeMap<String, Vec<u8>>;

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n").into_bytes();
    out.extend_from_slice(body);
    out
}

fn ok(body: &[u8]) -> Vec<u8> {
    http("200 OK", &format!("content-length: {}\r\n", body.len()), body)
}

impl Fake {
    /// `answers` is given the address, and answers what is asked at each path; with `Authorization`, at `PATH!`.
    fn start(answers: impl FnOnce(&str) -> Answers) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answers = Arc::new(answers(&address));
        let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
        let heard = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (answers, heard) = (Arc::clone(&answers), Arc::clone(&heard));
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 16 << 10];
                    let n = stream.read(&mut buffer).unwrap_or(0);
                    let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
                    let path =
                        text.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default().to_owned();
                    heard.lock().unwrap().push(text.clone());
                    let shown = text.to_lowercase().contains("\r\nauthorization: ");
                    let with = answers.get(&format!("{path}!")).filter(|_| shown);
                    let answer = with.or_else(|| answers.get(&path)).cloned();
                    let _ = stream
                        .write_all(&answer.unwrap_or_else(|| http("404 Not Found", "content-length: 0\r\n", b"")));
                });
            }
        });
        Self { address, asked }
    }

    fn wanted(&self) -> Wanted {
        Wanted::parse(&format!("{}/web:1", self.address)).unwrap()
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    async fn find(&self, credentials: Option<Credentials>) -> Result<Found, String> {
        local().session(self.wanted(), credentials).find().await.map_err(|e| e.detail)
    }
}

fn local() -> Arc<Registries> {
    Arc::new(Registries::new(&["127.0.0.0/8".into(), "::1/128".into()], None).unwrap())
}

/// A whole image of one layer, by its paths below `/v2/web/`.
fn image(layer: &[u8]) -> (Answers, Descriptor) {
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"diff")]}});
    let config = config.to_string().into_bytes();
    let of = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "config": of("application/vnd.oci.image.config.v1+json", &config),
        "layers": [of("application/vnd.oci.image.layer.v1.tar", layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut answers = Answers::new();
    answers.insert("/v2/web/manifests/1".into(), ok(&manifest));
    answers.insert(format!("/v2/web/manifests/{}", Digest::of(&manifest)), ok(&manifest));
    answers.insert(format!("/v2/web/blobs/{}", Digest::of(&config)), ok(&config));
    answers.insert(blob_path(layer), ok(layer));
    let descriptor: Descriptor = serde_json::from_value(of("", layer)).unwrap();
    (answers, descriptor)
}

fn blob_path(content: &[u8]) -> String {
    format!("/v2/web/blobs/{}", Digest::of(content))
}

/// All of a blob, or why not.
async fn blob(fake: &Fake, layer: &Descriptor) -> Result<Vec<u8>, String> {
    let session = local().session(fake.wanted(), None);
    let mut content = session.blob(layer).await.map_err(|e| e.detail)?;
    let mut all = Vec::new();
    while let Some(piece) = content.next().await {
        all.extend_from_slice(&piece.map_err(|e| e.to_string())?);
    }
    Ok(all)
}

fn data(pairs: &[(&str, &str)]) -> SecretData {
    SecretData(pairs.iter().map(|(k, v)| ((*k).to_owned(), SecretValue::new(v.as_bytes().to_vec()))).collect())
}

#[tokio::test]
async fn an_image_is_found_and_its_layer_read() {
    let (answers, layer) = image(b"a layer");
    let fake = Fake::start(|_| answers);
    let found = fake.find(None).await.unwrap();
    assert_eq!(found.source, found.digest);
    assert_eq!(found.manifest.layers[0].digest, layer.digest);
    assert_eq!(blob(&fake, &layer).await.unwrap(), b"a layer");
    assert!(fake.asked()[0].contains("application/vnd.oci.image.index.v1+json"));
}

#[tokio::test]
async fn content_with_another_digest_or_length_is_refused() {
    let (mut answers, layer) = image(b"a layer");
    answers.insert(blob_path(b"a layer"), ok(b"a longer layer"));
    let config = answers.keys().find(|k| k.contains("blobs") && **k != blob_path(b"a layer")).unwrap().clone();
    let short = Descriptor { size: 7, ..layer.clone() };
    let fake = Fake::start(|_| answers.clone());
    assert!(blob(&fake, &short).await.unwrap_err().contains("has 14 bytes where its image says 7"));
    // The configuration is checked at once: nothing is fetched of an image that is not what it says.
    answers.insert(config, ok(b"{}"));
    let why = Fake::start(|_| answers.clone()).find(None).await.err().unwrap();
    assert!(why.contains("corrupt"), "{why}");
    // By digest, the document itself is.
    let digest = Digest::of(b"what was asked for");
    answers.insert(format!("/v2/web/manifests/{digest}"), ok(b"{}"));
    let fake = Fake::start(|_| answers);
    let wanted = Wanted::parse(&format!("{}/web@{digest}", fake.address)).unwrap();
    assert!(local().session(wanted, None).find().await.err().unwrap().detail.contains("corrupt"));
}

#[tokio::test]
async fn a_truncated_blob_and_an_endless_one_end() {
    let (mut answers, layer) = image(&[7; 5000]);
    answers.insert(blob_path(&[7; 5000]), http("200 OK", "content-length: 5000\r\n", &[7; 2000]));
    let why = blob(&Fake::start(|_| answers.clone()), &layer).await.unwrap_err();
    assert_eq!(why, "the connection broke");
    // Without a length it sends for ever: no more is read than was promised.
    answers.insert(blob_path(&[7; 5000]), http("200 OK", "", &[7; 1 << 20]));
    let why = blob(&Fake::start(|_| answers.clone()), &layer).await.unwrap_err();
    assert!(why.contains("more than the 5000 bytes"), "{why}");
    // The same of a document.
    answers.insert("/v2/web/manifests/1".into(), http("200 OK", "", &vec![b' '; 5 << 20]));
    let why = Fake::start(|_| answers).find(None).await.err().unwrap();
    assert!(why.contains("more than 4194304 bytes"), "{why}");
}

#[tokio::test]
async fn redirects_are_followed_and_judged_and_carry_no_credentials() {
    let (answers, layer) = image(b"a layer");
    let store = Fake::start(|_| Answers::from([("/cdn/layer".to_owned(), ok(b"a layer"))]));
    let to =
        |location: &str| http("307 Temporary Redirect", &format!("location: {location}\r\ncontent-length: 0\r\n"), b"");
    let with = |location: &str| {
        let mut answers = answers.clone();
        answers.insert(blob_path(b"a layer"), to(location));
        Fake::start(|_| answers)
    };
    let fake = with(&format!("http://{}/cdn/layer", store.address));
    let session = local().session(fake.wanted(), None);
    *session.authorization.lock().unwrap() = Some(HeaderValue::from_static("Bearer hush"));
    assert!(session.blob(&layer).await.is_ok());
    assert!(fake.asked()[0].contains("hush"), "the registry is shown it");
    assert!(!store.asked().concat().contains("hush"), "the other origin is not");

    for (location, expected) in [
        ("http://10.255.0.1/secret", "registry_networks"),
        ("http://169.254.169.254/latest/meta-data", "registry_networks"),
        ("http://[::ffff:192.168.0.1]/x", "registry_networks"),
        ("ftp://127.0.0.1/x", "no registry"),
        ("//", "nowhere"),
    ] {
        let why = blob(&with(location), &layer).await.unwrap_err();
        assert!(why.contains(expected), "{location}: {why}");
    }
    let circle = Fake::start(|address| {
        let mut answers = answers.clone();
        answers.insert(blob_path(b"a layer"), to(&format!("http://{address}{}", blob_path(b"a layer"))));
        answers
    });
    assert!(blob(&circle, &layer).await.unwrap_err().contains("circles"));
    assert_eq!(circle.asked().len(), REDIRECTS + 1);
}

#[tokio::test]
async fn from_tls_nothing_leads_to_none() {
    let wanted = Wanted::parse("registry.example/web:1").unwrap();
    let session = local().session(wanted, None);
    assert!(session.fits(&"http://127.0.0.1/x".parse().unwrap()).unwrap_err().contains("TLS"));
    assert!(session.fits(&"https://cdn.example/x".parse().unwrap()).is_ok());
}

#[tokio::test]
async fn a_registry_inside_is_not_asked_unless_the_operator_allows_it() {
    let (answers, _) = image(b"a layer");
    let fake = Fake::start(|_| answers);
    let strict = Arc::new(Registries::new(&[], None).unwrap());
    for reference in
        [format!("{}/web:1", fake.address), format!("{}/web:1", fake.address.replace("127.0.0.1", "localhost"))]
    {
        let wanted = Wanted::parse(&reference).unwrap();
        let why = strict.session(wanted, None).find().await.err().unwrap().detail;
        assert!(why.contains("registry_networks"), "{why}");
    }
    assert!(fake.asked().is_empty());
}

/// A registry that has tokens made at `/token` for whoever shows `Basic`.
fn with_tokens(token: &'static str) -> Fake {
    let (answers, _) = image(b"a layer");
    Fake::start(|address| {
        let challenge = format!(
            "www-authenticate: Bearer realm=\"http://{address}/token\",service=\"the, registry\",scope=\"repository:web:pull\"\r\n\
             content-length: 0\r\n"
        );
        let mut guarded = Answers::new();
        for (path, answer) in answers {
            guarded.insert(format!("{path}!"), answer);
            guarded.insert(path, http("401 Unauthorized", &challenge, b""));
        }
        guarded.insert("/token!".into(), ok(token.as_bytes()));
        guarded.insert("/token".into(), http("401 Unauthorized", "content-length: 0\r\n", b""));
        guarded
    })
}

#[tokio::test]
async fn tokens_are_asked_for_once_with_the_secrets_words() {
    let fake = with_tokens(r#"{"token": "t0ken", "expires_in": 60}"#);
    let credentials =
        Credentials::of(&data(&[("username", "alice"), ("password", "wonder\n")]), &fake.wanted().registry);
    let found = fake.find(Some(credentials.unwrap())).await;
    assert!(found.is_ok(), "{:?}", found.err());
    let asked = fake.asked();
    let tokens: Vec<&String> = asked.iter().filter(|a| a.starts_with("GET /token")).collect();
    assert_eq!(tokens.len(), 1);
    assert!(tokens[0].contains("service=the%2C+registry&scope=repository%3Aweb%3Apull"), "{}", tokens[0]);
    // alice:wonder
    assert!(tokens[0].to_lowercase().contains("authorization: basic ywxpy2u6d29uzgvy"), "{}", tokens[0]);
    assert!(asked.last().unwrap().contains("Bearer t0ken"));

    let why = fake.find(None).await.err().unwrap();
    assert!(why.contains("without credentials") && why.contains("name a secret"), "{why}");
    let why = with_tokens("{}").find(Some(Credentials { user: "a".into(), password: SecretValue::default() })).await;
    assert!(why.err().unwrap().contains("gives no token"));
}

#[tokio::test]
async fn a_registry_that_refuses_is_not_asked_for_ever() {
    let refused = http("401 Unauthorized", "www-authenticate: Basic realm=\"x\"\r\ncontent-length: 0\r\n", b"");
    let fake = Fake::start(|_| Answers::from([("/v2/web/manifests/1".to_owned(), refused)]));
    let credentials = Credentials { user: "alice".into(), password: SecretValue::new(b"wrong".to_vec()) };
    let why = fake.find(Some(credentials)).await.err().unwrap();
    assert!(why.contains("refuses these credentials") && !why.contains("wrong"), "{why}");
    assert_eq!(fake.asked().len(), 2);
}

#[test]
fn references_are_taken_apart() {
    let of = |text: &str| Wanted::parse(text).unwrap();
    let docker = of("nginx");
    assert_eq!(docker.reference, "docker.io/library/nginx:latest");
    assert_eq!(
        docker.url("manifests", &docker.at).unwrap().as_str(),
        "https://registry-1.docker.io/v2/library/nginx/manifests/latest"
    );
    assert_eq!(of("registry.example:5000/a/b:1").base.as_str(), "https://registry.example:5000/v2/");
    for own in ["localhost:5000/web:1", "127.0.0.1:5000/web:1", "localhost/web"] {
        assert_eq!(of(own).base.scheme(), "http", "{own}");
    }
    for other in ["127.0.0.1.example/web:1", "10.0.0.1:5000/web:1", "localhost.example/web"] {
        assert_eq!(of(other).base.scheme(), "https", "{other}");
    }
    let digest = Digest::of(b"x");
    assert_eq!(of(&format!("registry.example/web@{digest}")).digest, Some(digest));
    for wrong in
        ["", "Web", "registry.example/web:", "a b", "http://registry.example/web", "registry.example/web@sha256:12"]
    {
        assert!(Wanted::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn credentials_are_for_their_registry() {
    let of = |pairs: &[(&str, &str)], registry: &str| Credentials::of(&data(pairs), registry).map_err(|e| e.detail);
    let plain = [("username", "alice\n"), ("password", "p"), ("registry", "https://registry.example/")];
    let found = of(&plain, "registry.example").unwrap();
    assert_eq!((found.user.as_str(), found.password.expose()), ("alice", &b"p"[..]));
    assert!(of(&plain, "evil.example").err().unwrap().contains("for the registry"));
    assert!(of(&[("password", "p")], "registry.example").err().unwrap().contains("`username` and `password`"));
    // bob:b:c
    let json = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "Ym9iOmI6Yw=="}, "registry.example:5000": {"username": "u", "password": "p"},
        "azure.example": {"auth": "eDp5", "identitytoken": "t"}}}"#;
    let docker = of(&[("config.json", json)], "docker.io").unwrap();
    assert_eq!((docker.user.as_str(), docker.password.expose()), ("bob", &b"b:c"[..]));
    assert_eq!(of(&[("dockerconfigjson", json)], "registry.example:5000").unwrap().user, "u");
    assert!(of(&[("config.json", json)], "registry.example").err().unwrap().contains("no entry"));
    assert!(of(&[("config.json", json)], "azure.example").err().unwrap().contains("identity token"));
    let broken = of(&[("config.json", "{\"auths\": hunter2")], "docker.io").err().unwrap();
    assert!(!broken.contains("hunter2"), "{broken}");
}

#[test]
fn challenges_are_read_as_they_are_written() {
    let read = |text: &'static str| {
        let mut headers = HeaderMap::new();
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(text));
        Challenge::read(&headers)
    };
    let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
        let owned = |t: Option<&str>| t.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.into(), service: owned(service), scope: owned(scope) })
    };
    assert_eq!(
        read(r#"Bearer realm="https://auth.example/token",service="r",scope="repository:a/b:pull,push""#),
        bearer("https://auth.example/token", Some("r"), Some("repository:a/b:pull,push"))
    );
    assert_eq!(read(r#"bearer Realm="a\"b", service=plain, x=y"#), bearer("a\"b", Some("plain"), None));
    assert_eq!(read("Basic realm=\"x\""), Some(Challenge::Basic));
    assert_eq!(read("Bearer service=\"no realm\""), None);
    assert_eq!(read("Negotiate"), None);
    for odd in ["Bearer realm", "Bearer realm=\"", "Bearer =,=,=", "Bearer realm=\"\\"] {
        // None of these may make it go on for ever.
        let _ = read(odd);
    }
}
