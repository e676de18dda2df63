//! Images from a real registry (Debian's docker-registry, filled by skopeo): pulled with and without credentials, pinned against a
//! tag that moves, fetched ahead of a rollout, and removed again from servers and hosts. And a function in Python. Needs root,
//! and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use cloud::{Cloud, PATIENCE, wait_for};
use serde_json::Value;

const PASSWORD: &str = "open-sesame-4711";
/// Of the password, for the registry's `htpasswd` file.
const HASH: &str = "$2b$05$abcdefghijklmnopqrstuud2L8crwTyOxFi9P3yYYIG5bIITxThTG";

fn run(command: &mut Command) -> String {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    assert!(output.status.success(), "{shown}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Debian's registry, until it is dropped.
struct Registry {
    process: Child,
    address: String,
    log: PathBuf,
}

impl Registry {
    fn start(dir: &Path, guarded: bool) -> Self {
        Self::at(dir, "127.0.0.1", guarded, None)
    }

    /// By TLS with a certificate and its key.
    fn at(dir: &Path, ip: &str, guarded: bool, tls: Option<(&Path, &Path)>) -> Self {
        let port = TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().port();
        let address = format!("{ip}:{port}");
        let home = dir.join(format!("registry-{port}"));
        std::fs::create_dir_all(home.join("blobs")).unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: \"{address}\"\n",
            home.join("blobs").display()
        );
        if let Some((certificate, key)) = tls {
            config += &format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display());
        }
        if guarded {
            let people = home.join("htpasswd");
            std::fs::write(&people, format!("alice:{HASH}\n")).unwrap();
            config += &format!("auth:\n  htpasswd: {{realm: test, path: {}}}\n", people.display());
        }
        let (file, log) = (home.join("config.yml"), home.join("log"));
        std::fs::write(&file, config).unwrap();
        let out = std::fs::File::create(&log).unwrap();
        let mut serve = Command::new("docker-registry");
        serve.arg("serve").arg(&file).stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
        let process = serve.spawn().expect("Debian's docker-registry is installed");
        let registry = Self { process, address, log };
        wait_for("the registry to listen", PATIENCE, || {
            TcpStream::connect(&registry.address).map_err(|e| e.to_string())
        });
        registry
    }

    /// Pushes an OCI layout, and answers the digest that it has there.
    fn push(&self, layout: &Path, to: &str, more: &[&str]) -> String {
        let place = format!("docker://{}/{to}", self.address);
        let who = ["--dest-creds", &format!("alice:{PASSWORD}")];
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
            .args(who)
            .args(more)
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(&place));
        let mut inspect = Command::new("skopeo");
        inspect.args(["inspect", "--tls-verify=false", "--format", "{{.Digest}}"]);
        inspect.args(["--creds", &format!("alice:{PASSWORD}")]);
        run(inspect.arg(&place)).trim().to_owned()
    }

    /// How often content was fetched.
    fn fetched(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap();
        log.lines().filter(|l| l.contains("\"GET /v2/") && l.contains("/blobs/sha256:")).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A busybox that serves a page, as an OCI layout.
fn site(dir: &Path, page: &str) -> PathBuf {
    let place = dir.join(page);
    std::fs::create_dir_all(&place).unwrap();
    let layout = images::busybox(&place);
    let (image, bundle) = (format!("{}:latest", layout.display()), place.join("again"));
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    std::fs::write(bundle.join("rootfs/srv/index.html"), page).unwrap();
    run(Command::new("umoci").args(["repack", "--image", &image]).arg(&bundle));
    layout
}

fn page(cloud: &Cloud, app: &str, path: &str) -> Result<String, String> {
    let host = format!("Host: {app}.localhost");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "20", "--header", &host]);
    let output = curl.arg(format!("{}{path}", cloud.gateway(0))).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn until_page(cloud: &Cloud, app: &str, path: &str, wanted: &str) {
    cloud.wait(&format!("{app}{path} to answer {wanted:?}"), || match page(cloud, app, path)? {
        said if said.contains(wanted) => Ok(()),
        said => Err(said),
    });
}

fn image(cloud: &Cloud, name: &str) -> Value {
    cloud.json(&["get", "image", name])["spec"].clone()
}

/// The roles of a kind, by the names of their data folders.
fn members(cloud: &Cloud, prefix: &str) -> Vec<String> {
    let all = std::fs::read_dir(cloud.data_dir().join("data")).unwrap().flatten();
    let names = all.map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    assert!(!names.is_empty(), "nobody is called {prefix}…");
    names
}

/// Whether a server or host keeps a blob.
fn keeps(cloud: &Cloud, member: &str, digest: &str) -> bool {
    let hex = digest.strip_prefix("sha256:").unwrap();
    cloud.data_dir().join("data").join(member).join("images/blobs/sha256").join(hex).is_file()
}

fn secret(cloud: &Cloud, name: &str, pairs: &[&str]) {
    let mut all = vec!["secret", "set", name];
    all.extend(pairs);
    cloud.ok(&all);
}

#[test]
fn images_come_from_registries_stay_what_they_were_and_go_when_nothing_names_them() {
    let files = tempfile::tempdir().unwrap();
    let (first, second) = (site(files.path(), "first"), site(files.path(), "second"));
    let (open, guarded) = (Registry::start(files.path(), false), Registry::start(files.path(), true));
    let old = open.push(&first, "shop/web:1", &[]);
    let docker = open.push(&first, "shop/web:docker", &["--format", "v2s2"]);
    let cloud = Cloud::up(&["--zones", "3", "--hosts-per-zone", "1"]);
    let reference = format!("{}/shop/web:1", open.address);

    // An app from a reference, in one command; its image has the app's name, and says where it is from.
    cloud.ok(&["deploy", "web", "--image", &reference]);
    until_page(&cloud, "web", "/", "first");
    let spec = image(&cloud, "web");
    assert_eq!((&spec["digest"], &spec["source"]["digest"]), (&Value::from(old.as_str()), &Value::from(old.as_str())));
    assert_eq!(spec["source"]["reference"], reference.as_str());

    // What is there is not fetched again.
    let before = open.fetched();
    let said = cloud.ok(&["image", "pull", &reference]);
    assert!(said.contains("image/web unchanged") && said.contains(&old), "{said}");
    assert_eq!(open.fetched(), before + 1, "its configuration alone");

    a_tag_that_moves_moves_nothing(&cloud, &open, &second, &old);
    credentials_are_asked_for_used_and_kept_to_themselves(&cloud, &guarded, &first);
    what_is_wrong_is_said(&cloud, &open, &docker);
    an_index_is_resolved(&cloud, &open, &old);
    the_guide_is_followed(&cloud, &open, &guarded);
    servers_collect(&cloud, &open, files.path());
    hosts_make_room(&cloud, &open, files.path());
    cloud.down();
}

/// The tag is resolved once, when it is pulled. A new pull is a rollout, and hosts have the image before it reaches them.
fn a_tag_that_moves_moves_nothing(cloud: &Cloud, registry: &Registry, second: &Path, old: &str) {
    let reference = format!("{}/shop/web:1", registry.address);
    let new = registry.push(second, "shop/web:1", &[]);
    assert_ne!(new, old);
    let instance = cloud.wait_ready("web", 1).remove(0);
    let host = instance["status"]["host"].as_str().unwrap();
    cloud.ok(&["local", "restart", &format!("agent@{host}")]);
    until_page(cloud, "web", "/", "first");
    assert_eq!(image(cloud, "web")["digest"], old);
    let pinned = format!("{}/shop/web@{old}", registry.address);
    cloud.ok(&["image", "pull", &pinned, "--name", "pinned"]);
    assert_eq!(image(cloud, "pinned")["digest"], old);

    let said = cloud.ok(&["image", "pull", &reference]);
    assert!(said.contains("image/web configured") && said.contains(&new), "{said}");
    until_page(cloud, "web", "/", "second");
    // One instance runs on one host; the others have the image all the same.
    for host in members(cloud, "zone-") {
        cloud.wait(&format!("{host} to have the image ahead"), || {
            if keeps(cloud, &host, &new) { Ok(()) } else { Err("not yet".into()) }
        });
    }
}

fn credentials_are_asked_for_used_and_kept_to_themselves(cloud: &Cloud, registry: &Registry, site: &Path) {
    let digest = registry.push(site, "private/web:1", &[]);
    let reference = format!("{}/private/web:1", registry.address);
    let pull =
        |secret: &str| -> Output { cloud.run(&["image", "pull", &reference, "--name", "private", "--secret", secret]) };
    let refused = |output: Output, why: &str| {
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(why), "{why}: {error}");
    };
    refused(cloud.run(&["image", "pull", &reference]), "without credentials");
    refused(pull("nobody"), "nobody");
    secret(cloud, "wrong", &["username=alice", "password=guessed"]);
    refused(pull("wrong"), "refuses these credentials");
    secret(cloud, "half", &["username=alice"]);
    refused(pull("half"), "`username` and `password`");
    secret(cloud, "elsewhere", &["username=alice", &format!("password={PASSWORD}"), "registry=registry.example"]);
    refused(pull("elsewhere"), "it is for the registry registry.example");

    secret(cloud, "right", &["username=alice", &format!("password={PASSWORD}")]);
    let said = cloud.ok(&["image", "pull", &reference, "--name", "private", "--secret", "right"]);
    assert!(said.contains(&digest), "{said}");
    // As `docker login` writes it.
    let pair = nexus_model::SecretValue::new(format!("alice:{PASSWORD}").into_bytes()).to_base64();
    let config = cloud.path("docker.json");
    std::fs::write(&config, serde_json::json!({"auths": {registry.address.as_str(): {"auth": *pair}}}).to_string())
        .unwrap();
    cloud.ok(&["secret", "set", "docker", "--from-file", &format!("config.json={}", config.display())]);
    std::fs::remove_file(&config).unwrap();
    cloud.ok(&["deploy", "private", "--image", &reference, "--image-secret", "docker"]);
    until_page(cloud, "private", "/", "first");

    // Neither is in a log, the metadata or any other file.
    for hidden in [PASSWORD, pair.trim_end_matches('=')] {
        let output = Command::new("grep").args(["-rlaF", hidden]).arg(cloud.data_dir()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    }
    let noted = cloud.ok(&["audit", "list", "-o", "json"]);
    assert!(!noted.contains(PASSWORD));
}

fn what_is_wrong_is_said(cloud: &Cloud, registry: &Registry, docker: &str) {
    let says = |reference: &str, why: &str| {
        let (_, error) = cloud.fails(&["image", "pull", reference, "--name", "x"]);
        assert!(error.contains(why), "{reference}: {error}");
    };
    says(&format!("{}/shop/web:none", registry.address), "has no");
    says("127.0.0.1:1/web:1", "can't be reached");
    says("10.255.255.1/web:1", "registry_networks");
    says("http://registry.example/web", "no reference");
    // Docker's own manifests are as good.
    let said = cloud.ok(&["image", "pull", &format!("{}/shop/web:docker", registry.address), "--name", "docker"]);
    assert!(said.contains(docker), "{said}");
}

/// The image for this machine, of several in an index; what the tag named is the index.
fn an_index_is_resolved(cloud: &Cloud, registry: &Registry, image_digest: &str) {
    let own = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let base = format!("http://{}/v2/shop/web/manifests", registry.address);
    let manifest = run(Command::new("curl")
        .args(["--silent", "--fail", "--header"])
        .args(["Accept: application/vnd.oci.image.manifest.v1+json", &format!("{base}/{image_digest}")]));
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let one = |architecture: &str| {
        serde_json::json!({"mediaType": kind, "digest": image_digest, "size": manifest.len(),
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let put = |tag: &str, manifests: Vec<Value>| {
        let kind = "application/vnd.oci.image.index.v1+json";
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests});
        let (header, place) = (format!("Content-Type: {kind}"), format!("{base}/{tag}"));
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--request", "PUT", "--header", &header]);
        run(curl.args(["--data-binary", &index.to_string(), &place]));
    };
    put("many", vec![one("s390x"), one(own)]);
    put("others", vec![one("s390x"), one("riscv64")]);
    cloud.ok(&["image", "pull", &format!("{}/shop/web:many", registry.address), "--name", "many"]);
    let spec = image(cloud, "many");
    assert_eq!(spec["digest"], image_digest);
    assert_ne!(spec["source"]["digest"], image_digest);
    let (_, error) = cloud.fails(&["image", "pull", &format!("{}/shop/web:others", registry.address)]);
    assert!(error.contains("linux/s390x, linux/riscv64"), "{error}");
}

fn the_guide_is_followed(cloud: &Cloud, open: &Registry, guarded: &Registry) {
    guide::follow(
        &cloud.path(""),
        "images.md",
        3,
        &[("REGISTRY", &open.address), ("PRIVATE", &guarded.address), ("PASSWORD", &PASSWORD)],
        |_, _| {},
    );
}

/// Servers part with what nothing names, and with nothing else.
fn servers_collect(cloud: &Cloud, registry: &Registry, dir: &Path) {
    let spare = registry.push(&site(dir, "spare"), "shop/spare:1", &[]);
    cloud.ok(&["image", "pull", &format!("{}/shop/spare:1", registry.address)]);
    let layers: Vec<String> = image(cloud, "spare")["blobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|b| b["digest"].as_str().unwrap().to_owned())
        .collect();
    let running = image(cloud, "web");
    let servers = members(cloud, "server-");
    cloud.wait("every server to have it", || {
        let lacks = |server: &&String| layers.iter().chain([&spare]).any(|digest| !keeps(cloud, server, digest));
        servers.iter().find(lacks).map_or(Ok(()), |server| Err(format!("{server} has not")))
    });
    // The app's image is gone, but its instance has a host that may need it again.
    cloud.ok(&["delete", "app", "private", "--wait"]);
    cloud.ok(&["image", "rm", "spare"]);
    let gc = |args: &[&str]| {
        let mut all = vec!["image", "gc"];
        all.extend(args);
        let done = cloud.json(&all);
        let of = |field: &str| {
            done["servers"].as_array().unwrap().iter().map(|s| s[field].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert!(done["servers"].as_array().unwrap().iter().all(|s| s["trouble"].is_null()), "{done}");
        assert_eq!(done["servers"].as_array().unwrap().len(), servers.len());
        (of("unnamedBlobs"), of("removedBlobs"))
    };
    let is_kept = || servers.iter().all(|server| keeps(cloud, server, &spare));
    // Of a day's grace nothing has passed.
    let (unnamed, removed) = gc(&[]);
    assert!(unnamed.iter().all(|n| *n == 0) && removed.iter().all(|n| *n == 0), "{unnamed:?} {removed:?}");
    let (_, removed) = gc(&["--dry-run", "--grace", "0"]);
    assert!(removed.iter().all(|n| *n >= 2) && is_kept(), "{removed:?}");
    let (_, removed) = gc(&["--grace", "0"]);
    assert!(removed.iter().all(|n| *n >= 2), "{removed:?}");
    for server in &servers {
        assert!(layers.iter().any(|layer| !keeps(cloud, server, layer)) && !keeps(cloud, server, &spare));
        for blob in running["blobs"].as_array().unwrap() {
            assert!(keeps(cloud, server, blob["digest"].as_str().unwrap()), "what runs is kept");
        }
    }
    let (_, removed) = gc(&["--grace", "0"]);
    assert!(removed.iter().all(|n| *n == 0), "{removed:?}");
    // What has gone is fetched again like anything new.
    cloud.ok(&["deploy", "spare", "--image", &format!("{}/shop/spare:1", registry.address)]);
    until_page(cloud, "spare", "/", "spare");
    let metrics = run(Command::new("curl")
        .args(["--silent", "--fail", "--insecure"])
        .arg(format!("https://127.0.0.1:{}/metrics", cloud.api_port)));
    assert!(
        metrics.contains("nexus_blobs_collected_total") && metrics.contains("nexus_images_pulled_total"),
        "{metrics}"
    );
}

/// A host whose disk is too full keeps what it runs, and what it is to have ready.
fn hosts_make_room(cloud: &Cloud, registry: &Registry, dir: &Path) {
    let spare = image(cloud, "spare")["digest"].as_str().unwrap().to_owned();
    let running = image(cloud, "web")["digest"].as_str().unwrap().to_owned();
    let instance = cloud.wait_ready("spare", 1).remove(0);
    let host = instance["status"]["host"].as_str().unwrap().to_owned();
    // Nothing goes while there is room: the limit is what makes the difference.
    let file = cloud.data_dir().join("config").join(&host).join("agent.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let limit = |percent: u8| {
        let line = |l: &str| {
            if l.starts_with("images_disk_percent") { format!("images_disk_percent = {percent}") } else { l.into() }
        };
        std::fs::write(&file, text.lines().map(line).collect::<Vec<_>>().join("\n")).unwrap();
        cloud.ok(&["local", "restart", &format!("agent@{host}")]);
    };
    limit(0);
    cloud.ok(&["delete", "app", "spare", "--wait"]);
    cloud.ok(&["image", "rm", "spare"]);
    cloud.wait("the host to part with what it does not need", || {
        if keeps(cloud, &host, &spare) { Err("the image is still there".into()) } else { Ok(()) }
    });
    assert!(keeps(cloud, &host, &running), "what an app names is kept");
    // It is fetched again when it is wanted again.
    let reference = format!("{}/shop/spare:2", registry.address);
    registry.push(&site(dir, "spare-again"), "shop/spare:2", &[]);
    cloud.ok(&["deploy", "spare", "--image", &reference]);
    until_page(cloud, "spare", "/", "spare-again");
    until_page(cloud, "web", "/", "second");
}

/// What builds Python functions, from where `cargo xtask test` puts it.
fn componentize_py() -> PathBuf {
    let given = std::env::var_os("NEXUS_TEST_PYTHON_BIN").map(PathBuf::from);
    if let Some(program) = given.map(|bin| bin.join("componentize-py")).filter(|p| p.is_file()) {
        return program;
    }
    let program = std::env::current_exe().unwrap();
    let venv = program.ancestors().nth(3).expect("cargo puts tests three folders deep").join("python");
    let program = venv.join("bin/componentize-py");
    if !program.is_file() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", "componentize-py==0.25.1"]));
    }
    program
}

#[test]
fn a_function_in_python_is_built_and_answers() {
    let files = tempfile::tempdir().unwrap();
    let component = files.path().join("app.wasm");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hello-python");
    run(Command::new(example.join("build.sh")).arg(&component).env("COMPONENTIZE_PY", componentize_py()));
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    let path = component.to_str().unwrap();
    let deploy =
        ["deploy", "hello-python", "--image", path, "--memory", "256Mi", "--env", "NAME=the test", "--timeout", "300"];
    cloud.ok(&deploy);
    until_page(&cloud, "hello-python", "/", "Hello from the test, in Python 3.");
    for _ in 0..3 {
        until_page(&cloud, "hello-python", "/counter", "1\n");
    }
    until_page(&cloud, "hello-python", "/sum?x=1&x=2.5", r#"{"sum": 3.5}"#);
    let big = "x".repeat(200_000);
    let body = files.path().join("body");
    std::fs::write(&body, &big).unwrap();
    let echoed = run(Command::new("curl")
        .args(["--silent", "--fail", "--header", "Host: hello-python.localhost", "--data-binary"])
        .arg(format!("@{}", body.display()))
        .arg(format!("{}/echo", cloud.gateway(0))));
    assert!(echoed == big, "{} bytes came back", echoed.len());
    let error = page(&cloud, "hello-python", "/raise").unwrap_err();
    assert!(error.contains("500"), "{error}");
    until_page(&cloud, "hello-python", "/log", "logged");
    cloud.wait("its lines in the log", || {
        let said = cloud.ok(&["logs", "hello-python"]);
        let all = ["a line for standard output", "a line for standard error", "RuntimeError: asked to"];
        if all.iter().all(|line| said.contains(line)) { Ok(()) } else { Err(said) }
    });
    cloud.down();
}

/// An address of this machine that is no loopback address, until it is dropped.
struct OwnAddress(String);

impl OwnAddress {
    fn new() -> Self {
        // Of the networks that are for benchmarks (RFC 2544): nobody's.
        let pid = std::process::id();
        let own = Self(format!("198.18.{}.{}", (pid >> 8) & 0xff, pid & 0xff));
        run(Command::new("ip").args(["address", "add", &format!("{}/32", own.0), "dev", "lo"]));
        own
    }
}

impl Drop for OwnAddress {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["address", "del", &format!("{}/32", self.0), "dev", "lo"]).status();
    }
}

/// An authority of our own, and a certificate of it for an address: files of the authority's certificate, the certificate, its key.
fn authority(dir: &Path, name: &str, address: &str) -> [PathBuf; 3] {
    let files = ["ca", "cert", "key"].map(|what| dir.join(format!("{name}-{what}.pem")));
    let (ca_key, own_key) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
    let mut of_ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    of_ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    of_ca.distinguished_name.push(rcgen::DnType::CommonName, name);
    let ca = of_ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(of_ca, ca_key);
    let own = rcgen::CertificateParams::new([address.to_owned()]).unwrap().signed_by(&own_key, &issuer).unwrap();
    for (file, text) in files.iter().zip([ca.pem(), own.pem(), own_key.serialize_pem()]) {
        std::fs::write(file, text).unwrap();
    }
    files
}

#[test]
fn a_registrys_certificate_is_believed_if_the_operator_names_its_authority() {
    let files = tempfile::tempdir().unwrap();
    let own = OwnAddress::new();
    let known = authority(files.path(), "known", &own.0);
    let strange = authority(files.path(), "strange", &own.0);
    let other = authority(files.path(), "other", "198.18.255.255");
    let start =
        |[_, certificate, key]: &[PathBuf; 3]| Registry::at(files.path(), &own.0, true, Some((certificate, key)));
    let (good, bad) = (start(&known), start(&strange));
    let layout = site(files.path(), "first");
    let digest = good.push(&layout, "shop/web:1", &[]);
    bad.push(&layout, "shop/web:1", &[]);
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    secret(&cloud, "registry", &["username=alice", &format!("password={PASSWORD}")]);

    // The operator names two of the authorities, in one file.
    let bundle = files.path().join("authorities.pem");
    let text = [&known[0], &other[0]].map(|file| std::fs::read_to_string(file).unwrap()).concat();
    std::fs::write(&bundle, text).unwrap();
    for server in members(&cloud, "server-") {
        let path = cloud.data_dir().join("config").join(format!("{server}.toml"));
        let mut config: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        config.insert("registry_ca_file".into(), bundle.to_str().unwrap().into());
        config.insert("registry_networks".into(), vec!["198.18.0.0/15".to_owned()].into());
        std::fs::write(&path, toml::to_string(&config).unwrap()).unwrap();
        cloud.ok(&["local", "restart", &server]);
    }
    let pull = |registry: &Registry, name: &str| {
        let reference = format!("{}/shop/web:1", registry.address);
        cloud.run(&["image", "pull", &reference, "--name", name, "--secret", "registry"])
    };
    cloud.wait("the pull", || {
        let pulled = pull(&good, "web");
        if pulled.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&pulled.stderr).into_owned()) }
    });
    assert_eq!(image(&cloud, "web")["digest"], digest.as_str());
    cloud.ok(&["deploy", "web", "--image", "web", "--port", "80"]);
    until_page(&cloud, "web", "/", "first");

    let refused = |registry: &Registry, wanted: &str| {
        let output = pull(registry, "none");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(wanted), "{said}");
        said
    };
    let said = refused(&bad, "an authority that is not trusted here");
    assert!(said.contains("registry_ca_file"), "it says what to do: {said}");
    // An authority that is known, and a certificate that is somebody else's.
    let misnamed = start(&other);
    refused(&misnamed, "its certificate is not valid");
    cloud.down();
}
