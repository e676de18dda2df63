//! Rollouts of a slow, a broken and of good images while users go on: every request is answered 2xx. Also the lines of
//! docs/guide/rollouts.md. Needs root.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;
#[path = "e2e/load.rs"]
mod load;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cloud::Cloud;
use load::Load;
use serde_json::Value;

/// Serves a page that names the image. As its container's first process a server would not die of a signal.
const SERVE: &str = "/bin/busybox httpd -f -p [::]:80 -h /srv & p=$!; trap 'kill $p; exit 0' TERM; wait $p";

/// The image of busybox that runs a script.
fn image(files: &Path, base: &Path, name: &str, script: &str) -> PathBuf {
    let layout = files.join(name);
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(Command::new("cp").arg("-a").arg(base).arg(&layout));
    let mut config = Command::new("umoci");
    config.args(["config", "--image", &format!("{}:latest", layout.display()), "--clear", "config.cmd"]);
    for word in ["/bin/busybox", "sh", "-c", script] {
        config.args(["--config.cmd", word]);
    }
    run(&mut config);
    layout
}

fn page(name: &str) -> String {
    format!("echo {name} > /srv/index.html; {SERVE}")
}

/// What a gateway answers; `more` are further lines of the request's head.
fn get(cloud: &Cloud, more: &str) -> Result<String, String> {
    let text = |e: std::io::Error| e.to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", cloud.gateway_port)).map_err(text)?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(text)?;
    write!(stream, "GET / HTTP/1.1\r\nhost: web.localhost\r\nconnection: close\r\n{more}\r\n").map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    if head.starts_with("HTTP/1.1 200 ") { Ok(body.trim().to_owned()) } else { Err(head.to_owned()) }
}

/// The pages of so many requests, each once.
fn pages(cloud: &Cloud, requests: usize) -> Vec<String> {
    let mut all: Vec<String> = (0..requests).map(|_| get(cloud, "").unwrap()).collect();
    all.sort();
    all.dedup();
    all
}

/// One that is to go serves for a moment still.
fn until_pages(cloud: &Cloud, wanted: &str) {
    cloud.wait(wanted, || match pages(cloud, 20).as_slice() {
        [one] if one == wanted => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

fn rollout(cloud: &Cloud) -> Value {
    cloud.json(&["rollout", "status", "web"])
}

#[test]
fn good_slow_and_broken_images_are_rolled_out_and_no_request_is_lost() {
    // The load speaks plain HTTP, but its client wants to be able to do more.
    rustls::crypto::ring::default_provider().install_default().ok();
    let files = tempfile::tempdir().unwrap();
    let base = images::busybox(files.path());
    let made = |name: &str, script: &str| image(files.path(), &base, name, script).to_str().unwrap().to_owned();
    let first = made("first", &page("first"));
    let slow = made("slow", &format!("sleep 4; {}", page("slow")));
    let broken = made("broken", "sleep 100000");
    let canary = made("canary", &page("canary"));
    let green = made("green", &page("green"));

    let cloud = Cloud::up(&["--zones", "3", "--hosts-per-zone", "1"]);
    cloud.ok(&["deploy", "web", "--image", &first, "--replicas", "3", "--port", "80", "--timeout", "90"]);
    cloud.wait("the app to be reached", || get(&cloud, ""));
    let gateways: Vec<String> = (0..2).map(|n| format!("{}/", cloud.gateway(n))).collect();
    let load = Load::start(gateways, "web.localhost");

    // Slow: it takes its time, and goes through.
    cloud.ok(&["deploy", "web", "--image", &slow, "--timeout", "120"]);
    cloud.wait_ready("web", 3);
    until_pages(&cloud, "slow");
    load.check("after a slow image");

    // Broken: never ready, taken back, and said so.
    let deploy = ["deploy", "web", "--image", &broken, "--progress-deadline", "10", "--timeout", "120"];
    let (code, error) = cloud.fails(&deploy);
    assert!(code == 1 && error.contains("revision 3 has failed"), "{code}: {error}");
    cloud.wait_ready("web", 3);
    assert_eq!(rollout(&cloud)["phase"], "RolledBack");
    until_pages(&cloud, "slow");
    let history = cloud.ok(&["rollout", "history", "web"]);
    assert!(history.contains("failed") && history.contains("serves") && history.contains("content"), "{history}");
    load.check("after a broken image");

    // A canary: some requests, and all that ask for it; then everything.
    cloud.ok(&[
        "deploy",
        "web",
        "--image",
        &canary,
        "--canary",
        "50",
        "--canary-header",
        "x-canary",
        "--progress-deadline",
        "600",
        "--timeout",
        "90",
    ]);
    assert_eq!(rollout(&cloud)["phase"], "Waiting");
    cloud.wait("both to answer", || match pages(&cloud, 60).as_slice() {
        [a, b] if a == "canary" && b == "slow" => Ok(()),
        other => Err(format!("{other:?}")),
    });
    for _ in 0..20 {
        assert_eq!(get(&cloud, "x-canary: yes\r\n").unwrap(), "canary");
    }
    cloud.ok(&["rollout", "promote", "web", "--wait"]);
    cloud.wait_ready("web", 3);
    until_pages(&cloud, "canary");
    load.check("after a canary");

    // Back, although the image's name stands for other content by now.
    let before = cloud.json(&["rollout", "history", "web"]);
    let number = |digest: &str| {
        let all = before["items"].as_array().unwrap();
        all.iter().find(|r| r["spec"]["imageDigest"] == digest).unwrap()["spec"]["revision"].to_string()
    };
    let (_, error) = cloud.fails(&["rollout", "undo", "web", "--to-revision", "77"]);
    assert!(error.contains("app web has no revision 77"), "{error}");
    let old = before["items"][1]["spec"]["imageDigest"].as_str().unwrap();
    cloud.ok(&["rollout", "undo", "web", "--to-revision", &number(old), "--wait"]);
    cloud.wait_ready("web", 3);
    until_pages(&cloud, "slow");
    assert_eq!(cloud.json(&["get", "app", "web"])["spec"]["imageDigest"], old);
    load.check("after an undo");

    // Blue/green: all at once.
    cloud.ok(&["deploy", "web", "--image", &green, "--blue-green", "--keep-old", "3", "--timeout", "90"]);
    cloud.wait("all requests to change over", || match pages(&cloud, 20).as_slice() {
        [one] if one == "green" => Ok(()),
        other => Err(format!("{other:?}")),
    });
    cloud.wait_ready("web", 3);
    assert_eq!(cloud.json(&["get", "app", "web"])["spec"].get("imageDigest"), None);
    load.check("after blue/green");

    // A pause holds the next one up.
    cloud.ok(&["rollout", "pause", "web"]);
    cloud.ok(&["deploy", "web", "--env", "A=1", "--rolling", "--timeout", "90"]);
    assert_eq!(rollout(&cloud)["phase"], "Paused");
    cloud.ok(&["rollout", "resume", "web", "--wait"]);
    assert_eq!(rollout(&cloud)["phase"], "Complete");

    // More, fewer, and a host that is emptied.
    cloud.ok(&["scale", "web", "--replicas", "6", "--wait"]);
    cloud.ok(&["scale", "web", "--replicas", "2", "--wait"]);
    let instances = cloud.wait_ready("web", 2);
    let host = instances[0]["status"]["host"].as_str().unwrap();
    let manifest = cloud.path("host.json");
    let mut drained = cloud.json(&["get", "host", host]);
    drained["spec"]["cordoned"] = true.into();
    drained["spec"]["draining"] = true.into();
    let metadata = serde_json::json!({"name": host});
    let whole = serde_json::json!({"apiVersion": "cloudnexus/v1", "kind": "Host", "metadata": metadata, "spec": drained["spec"]});
    std::fs::write(&manifest, whole.to_string()).unwrap();
    cloud.ok(&["apply", "-f", manifest.to_str().unwrap()]);
    cloud.wait("the host to be empty", || {
        let left: Vec<_> = cloud.instances("web").into_iter().filter(|i| i["status"]["host"] == host).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
    });
    cloud.wait_ready("web", 2);
    load.check("after a drain");
    load.finish();
    cloud.down();
}

#[test]
fn the_lines_of_the_guide_run() {
    let files = tempfile::tempdir().unwrap();
    let image = images::busybox(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "2"]);
    guide::follow(&cloud.path(""), "rollouts.md", 5, &[("IMAGE", &image)], |heading, _| match heading {
        "Canary" | "Holding it up and going back" => assert_eq!(rollout(&cloud)["phase"], "Complete", "{heading}"),
        "Blue/green" => assert_eq!(rollout(&cloud)["trafficPercent"], 100, "{heading}"),
        _ => {}
    });
    cloud.down();
}
