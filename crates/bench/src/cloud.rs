//! A local cloud to measure: the release binary, in a folder and on ports of its own, spoken to by its API and gateways.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nexus_model::API_VERSION;
use serde_json::{Value, json};

use crate::http::{Answer, Client};
use crate::process;

pub const PATIENCE: Duration = Duration::from_secs(60);
const PROJECT: &str = "/v1/regions/local/projects/default";

pub struct Cloud {
    program: PathBuf,
    dir: tempfile::TempDir,
    api_port: u16,
    pub gateway_port: u16,
    pub token: String,
    /// How long `nexus up` took.
    pub up: Duration,
}

/// The first of `n` consecutive ports that are free now.
fn free_ports(n: u16) -> anyhow::Result<u16> {
    for _ in 0..200 {
        let first = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port() / 100 * 100;
        if first > 10_000 && (first..first + n).all(|p| TcpListener::bind(("127.0.0.1", p)).is_ok()) {
            return Ok(first);
        }
    }
    bail!("no {n} consecutive ports are free")
}

impl Cloud {
    /// Starts a cloud of the default shape (three zones, six hosts) and waits until it is ready.
    pub fn up() -> anyhow::Result<Self> {
        Self::up_as(&[])
    }

    /// Starts a cloud of a shape of its own, as words for `nexus up`.
    pub fn up_as(shape: &[&str]) -> anyhow::Result<Self> {
        let program = process::nexus()?;
        let dir = tempfile::Builder::new().prefix("nexus-bench-").tempdir().context("making a folder")?;
        // Twenty for each of up to five regions, and ten for their gateways.
        let api_port = free_ports(100)?;
        let gateway_port = loop {
            let port = free_ports(50)?;
            if port.abs_diff(api_port) >= 300 && free_ports_at(port + 100, 50) {
                break port;
            }
        };
        let mut cloud = Self { program, dir, api_port, gateway_port, token: String::new(), up: Duration::ZERO };
        let (api, gateway) = (api_port.to_string(), gateway_port.to_string());
        let started = Instant::now();
        let ports = ["up", "--detach", "--api-port-base", &api, "--gateway-port-base", &gateway];
        process::run(&mut cloud.command(&[&ports[..], shape].concat()))?;
        cloud.up = started.elapsed();
        let token = std::fs::read_to_string(cloud.data_dir().join("token")).context("reading the token")?;
        token.trim().clone_into(&mut cloud.token);
        Ok(cloud)
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).arg("--data-dir").arg(self.data_dir());
        command.env("NEXUS_CONFIG", self.dir.path().join("context.json")).env("HOME", self.dir.path());
        command
    }

    /// Runs `nexus local VERB NAME`.
    pub fn local(&self, verb: &str, name: &str) -> anyhow::Result<()> {
        process::run(&mut self.command(&["local", verb, name])).map(drop)
    }

    /// The port on which a server answers the API in the clear; the servers of the nth region begin at 20 n.
    pub fn api_port(&self, server: u16) -> u16 {
        self.api_port + 10 + server
    }

    /// A connection to a server's API.
    pub fn api(&self, server: u16) -> anyhow::Result<Client> {
        Ok(Client::connect(self.api_port(server), "localhost", Some(&self.token))?)
    }

    /// The number of the leading server.
    pub fn leader(&self) -> anyhow::Result<u16> {
        process::wait("a leader", PATIENCE, Duration::from_millis(100), || {
            let status: Value = serde_json::from_slice(&self.api(0).ok()?.get("/v1/status").ok()?.body).ok()?;
            Some(u16::from(status["leader"].as_str()?.strip_prefix("server-")?.as_bytes().first()? - b'a'))
        })
    }

    /// Sends JSON, and wants a 2xx.
    pub fn send(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let answer = self.api(0)?.send(method, path, "application/json", body.to_string().as_bytes())?;
        expect_success(method, path, &answer)?;
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// Sends a merge patch, and wants a 2xx.
    pub fn patch(&self, path: &str, patch: &Value) -> anyhow::Result<Value> {
        let body = patch.to_string();
        let answer = self.api(0)?.send("PATCH", path, "application/merge-patch+json", body.as_bytes())?;
        expect_success("PATCH", path, &answer)?;
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// Imports an image from a file, as `nexus image import` does.
    pub fn import(&self, path: &Path, name: &str) -> anyhow::Result<()> {
        let image = nexus_compute::image::import(path)?;
        let mut api = self.api(0)?;
        for blob in &image.blobs {
            let mut content = Vec::new();
            blob.source.open()?.read_to_end(&mut content)?;
            let path = format!("{PROJECT}/blobs/{}", blob.digest);
            let answer = api.send("PUT", &path, "application/octet-stream", &content)?;
            expect_success("PUT", &path, &answer)?;
        }
        let blobs: Vec<Value> = image.blobs.iter().map(|b| json!({"digest": b.digest, "size": b.size})).collect();
        let spec = json!({"format": image.format, "digest": image.digest, "blobs": blobs});
        self.create("Image", "images", name, &spec)
    }

    /// Makes an object of the default project.
    pub fn create(&self, kind: &str, plural: &str, name: &str, spec: &Value) -> anyhow::Result<()> {
        let object = json!({"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec});
        self.send("POST", &format!("{PROJECT}/{plural}"), &object).map(drop)
    }

    pub fn delete_app(&self, name: &str) -> anyhow::Result<()> {
        let path = format!("{PROJECT}/apps/{name}");
        let answer = self.api(0)?.send("DELETE", &path, "", &[])?;
        expect_success("DELETE", &path, &answer)
    }

    /// An object of the default project.
    pub fn object(&self, plural: &str, name: &str) -> anyhow::Result<Value> {
        let answer = self.api(0)?.get(&format!("{PROJECT}/{plural}/{name}"))?;
        expect_success("GET", name, &answer)?;
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// All objects of a kind in the default project, up to 500.
    pub fn list(&self, plural: &str) -> anyhow::Result<Value> {
        let answer = self.api(0)?.get(&format!("{PROJECT}/{plural}?limit=500"))?;
        expect_success("GET", plural, &answer)?;
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// The instances of an app that are not on their way out.
    pub fn instances(&self, app: &str) -> anyhow::Result<Vec<Value>> {
        let answer = self.api(0)?.get(&format!("{PROJECT}/instances"))?;
        expect_success("GET", "instances", &answer)?;
        let list: Value = serde_json::from_slice(&answer.body)?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        Ok(items.into_iter().filter(|i| i["spec"]["app"] == app).collect())
    }

    /// Waits until an app has so many ready replicas.
    pub fn wait_ready(&self, app: &str, replicas: u64) -> anyhow::Result<()> {
        let path = format!("{PROJECT}/apps/{app}");
        process::wait(&format!("{app} to be ready"), PATIENCE, Duration::from_millis(50), || {
            let object: Value = serde_json::from_slice(&self.api(0).ok()?.get(&path).ok()?.body).ok()?;
            (object["status"]["readyReplicas"].as_u64()? >= replicas).then_some(())
        })
    }

    /// Waits until the first gateway answers an app's `path` with a 2xx, and returns the body.
    pub fn first_answer(&self, app: &str, path: &str) -> anyhow::Result<Vec<u8>> {
        let host = format!("{app}.localhost");
        let mut client = None;
        process::wait(&format!("an answer from {app}"), PATIENCE, Duration::from_millis(2), || {
            let mut open = client.take().or_else(|| Client::connect(self.gateway_port, &host, None).ok())?;
            let answer = open.get(path).ok()?;
            client = Some(open);
            (answer.status / 100 == 2).then_some(answer.body)
        })
    }

    /// All processes of the cloud.
    pub fn processes(&self) -> BTreeSet<u32> {
        process::family(&self.data_dir().display().to_string())
    }

    pub fn cpu_seconds(&self) -> f64 {
        process::cpu_seconds(&self.processes())
    }
}

fn free_ports_at(first: u16, n: u16) -> bool {
    (first..first + n).all(|p| TcpListener::bind(("127.0.0.1", p)).is_ok())
}

fn expect_success(method: &str, path: &str, answer: &Answer) -> anyhow::Result<()> {
    if answer.status / 100 == 2 {
        return Ok(());
    }
    bail!("{method} {path}: {} {}", answer.status, String::from_utf8_lossy(&answer.body))
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if let Err(error) = process::run(&mut self.command(&["down", "--purge"])) {
            eprintln!("warning: a cloud is left in {}: {error:#}", self.dir.path().display());
            self.dir.disable_cleanup(true);
        }
    }
}
