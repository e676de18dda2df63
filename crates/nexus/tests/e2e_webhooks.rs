//! Webhooks and callbacks with the real binary and a receiver that is a program of its own: nobody listens at first, the
//! leader is killed, what was given up is sent again. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use cloud::Cloud;
use serde_json::Value;

/// The example's receiver, until it is dropped.
struct Receiver {
    process: Child,
    events: Arc<Mutex<Vec<Value>>>,
}

fn example() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/webhooks/receiver.py")
}

impl Receiver {
    fn start(port: u16, key: &Path) -> Self {
        let mut python = Command::new("python3");
        python.arg(example()).arg(port.to_string()).arg(key).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = python.spawn().unwrap();
        let events = Arc::new(Mutex::new(Vec::new()));
        let (lines, told) = (BufReader::new(process.stdout.take().unwrap()).lines(), events.clone());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                told.lock().unwrap().push(serde_json::from_str::<Value>(&line).unwrap());
            }
        });
        Self { process, events }
    }

    fn types(&self) -> Vec<String> {
        let events = self.events.lock().unwrap();
        events.iter().map(|e| e["type"].as_str().unwrap_or_default().to_owned()).collect()
    }

    fn wait(&self, cloud: &Cloud, wanted: &str) -> Value {
        cloud.wait(&format!("the receiver to be told {wanted}"), || {
            let events = self.events.lock().unwrap();
            events.iter().find(|e| e["type"] == wanted).cloned().ok_or_else(|| format!("{events:#?}"))
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port at which nobody listens now.
fn quiet_port() -> u16 {
    cloud::ports::one()
}

/// What a receiver answers to somebody who has no key.
fn unsigned(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn deliveries(cloud: &Cloud, args: &[&str]) -> Vec<Value> {
    let all = [&["webhook"], args].concat();
    cloud.json(&all)["items"].as_array().cloned().unwrap_or_default()
}

#[test]
fn what_happens_is_told_signed_and_none_of_it_is_lost_with_a_server_or_while_nobody_listens() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::busybox(files.path());
    let cloud = Cloud::up(&["--hosts-per-zone", "1"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "web"]);

    // Nothing inside is told anything, whatever a tenant says.
    for inside in ["http://169.254.169.254/latest", "http://10.0.0.1/", "http://[::ffff:192.168.0.1]/"] {
        let (_, refused) = cloud.fails(&["webhook", "create", "bad", "--url", inside]);
        assert!(refused.contains("webhook_networks"), "{inside}: {refused}");
    }

    let port = quiet_port();
    let url = format!("http://127.0.0.1:{port}/in");
    let key = cloud.path("ci.key");
    std::fs::write(&key, cloud.ok(&["webhook", "create", "ci", "--url", &url, "--kind", "app"])).unwrap();
    let shown = cloud.ok(&["get", "webhooks,secrets,events,deliveries", "-o", "yaml"]);
    let secret = std::fs::read_to_string(&key).unwrap();
    assert!(secret.starts_with("whsec_") && !shown.contains(secret.trim()), "{shown}");

    // Nobody listens: what there is to tell waits, and so does the callback's end.
    let deploy = ["deploy", "web", "--no-wait", "--callback", &url];
    let (_, unsigned_callback) = cloud.fails(&deploy);
    assert!(unsigned_callback.contains("secret callbacks"), "{unsigned_callback}");
    cloud.ok(&["secret", "set", "callbacks", &format!("key={}", secret.trim())]);
    cloud.ok(&deploy);
    cloud.wait_ready("web", 1);
    let waiting = cloud.wait("deliveries that failed", || {
        let all = deliveries(&cloud, &["deliveries"]);
        let failed = all.iter().filter(|d| d["status"]["attempts"].as_u64() > Some(0)).count();
        let callback = all.iter().any(|d| d["spec"]["type"] == "cloudnexus.v1.App.Settled");
        if failed > 1 && callback { Ok(all) } else { Err(format!("{all:#?}")) }
    });
    let message = &waiting.iter().find(|d| d["status"]["attempts"] != 0).unwrap()["status"]["message"];
    assert_eq!(message, "it can't be reached");

    // The next leader goes on.
    let leader = cloud.leader();
    cloud.ok(&["local", "kill", &leader]);
    let receiver = Receiver::start(port, &key);
    let settled = receiver.wait(&cloud, "cloudnexus.v1.App.Settled");
    assert_eq!(settled["data"]["object"]["status"]["phase"], "Ready", "{settled}");
    assert_eq!(settled["subject"], "apps/web");
    receiver.wait(&cloud, "cloudnexus.v1.App.Ready");
    let types = receiver.types();
    let at = |kind: &str| types.iter().position(|t| t == kind).unwrap_or(usize::MAX);
    assert!(at("cloudnexus.v1.App.Created") < at("cloudnexus.v1.App.Ready"), "{types:?}");
    let answer = cloud.wait("an answer", || unsigned(port).map_err(|e| e.to_string()));
    assert!(answer.contains("401"), "{answer}");
    cloud.wait("all to be taken", || {
        let left = deliveries(&cloud, &["deliveries", "ci"]);
        let left: Vec<_> = left.iter().filter(|d| d["status"]["phase"] != "Delivered").collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
    });
    assert_eq!(cloud.json(&["get", "webhook", "ci"])["status"]["conditions"][0]["status"], "True");
    cloud.ok(&["local", "start", &leader]);

    what_is_given_up_is_sent_again(&cloud);

    cloud.ok(&["delete", "app", "web", "--callback", &url]);
    cloud.wait("the end of the delete to be told", || {
        // One may come twice, as the same event.
        let events = receiver.events.lock().unwrap();
        let ends = events.iter().filter(|e| e["type"] == "cloudnexus.v1.App.Settled").map(|e| e["id"].as_str());
        if ends.collect::<BTreeSet<_>>().len() == 2 { Ok(()) } else { Err(format!("{events:#?}")) }
    });
    cloud.ok(&["delete", "webhook", "ci"]);
    the_guide_is_followed(&cloud);
    drop(receiver);
    cloud.down();
}

fn what_is_given_up_is_sent_again(cloud: &Cloud) {
    let (port, key) = (quiet_port(), cloud.path("mute.key"));
    let url = format!("http://127.0.0.1:{port}/");
    let create = ["webhook", "create", "mute", "--url", &url, "--kind", "route", "--max-attempts", "2"];
    std::fs::write(&key, cloud.ok(&create)).unwrap();
    cloud.ok(&["webhook", "test", "mute"]);
    let dead = cloud.wait("a dead letter", || {
        let mut dead = deliveries(cloud, &["dead-letters", "mute"]);
        dead.pop().ok_or_else(|| format!("{:#?}", deliveries(cloud, &["deliveries", "mute"])))
    });
    assert_eq!(dead["status"]["attempts"], 2);
    assert!(cloud.ok(&["events"]).contains("DeliveryGivenUp"));
    let receiver = Receiver::start(port, &key);
    cloud.wait("the receiver to listen", || unsigned(port).map_err(|e| e.to_string()));
    cloud.ok(&["webhook", "resend", "--dead", "mute"]);
    let told = receiver.wait(cloud, "cloudnexus.v1.Webhook.Test");
    assert_eq!(told["id"], dead["metadata"]["uid"], "it is the same message");
    cloud.wait("no dead letter", || match deliveries(cloud, &["dead-letters", "mute"]) {
        none if none.is_empty() => Ok(()),
        some => Err(format!("{some:#?}")),
    });
    cloud.ok(&["delete", "webhook", "mute"]);
}

fn the_guide_is_followed(cloud: &Cloud) {
    cloud.ok(&["delete", "secret", "ci-webhook"]);
    guide::follow(&cloud.path(""), "webhooks.md", 3, &[], |_, _| {});
    // What the guide shows is what the receiver runs.
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/webhooks.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let shown = guide.split("```python\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert!(std::fs::read_to_string(example()).unwrap().contains(shown.trim()), "{shown}");
}
