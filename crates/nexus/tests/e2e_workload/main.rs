//! Who workloads are, with the real binary and the public Python client (PyPI `spiffe`) inside of containers: what they
//! get, what they don't, and what goes on while every server is dead. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "../e2e/cloud.rs"]
mod cloud;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cloud::Cloud;
use serde_json::Value;

/// One release, so that a newer one is a change of ours and not a surprise.
const CLIENT: &str = "spiffe==0.3.2";
/// Debian 12's Python, which is what the image holds, whatever this machine has.
const PYTHON: &str = "3.11";

fn run(command: &mut Command) {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    assert!(output.status.success(), "{shown}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The client and what it needs, in the folder where `cargo xtask test` puts it, or put there now.
fn client() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let target = program.ancestors().nth(3).expect("cargo puts tests three folders deep");
    let (venv, library) = (target.join("python"), target.join("python-spiffe"));
    if !library.join("spiffe").is_dir() {
        if !venv.join("bin/pip").is_file() {
            run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        }
        let mut pip = Command::new(venv.join("bin/pip"));
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]);
        run(pip.args(["--python-version", PYTHON, CLIENT, "--target"]).arg(&library));
    }
    library
}

/// Debian's own Python with the client, for a user without any rights.
fn image(dir: &Path) -> PathBuf {
    let (layout, bundle, tree) = (dir.join("python"), dir.join("bundle"), dir.join("tree.tar"));
    let image = format!("{}:latest", layout.display());
    let mut debootstrap = Command::new("mmdebstrap");
    debootstrap.args([
        "--quiet",
        "--variant=extract",
        "--mode=root",
        "--include=python3,libstdc++6,base-files",
        "bookworm",
    ]);
    run(debootstrap.arg(&tree));
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    run(Command::new("umoci").args(["new", "--image", &image]));
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    let root = bundle.join("rootfs");
    // Device nodes belong to no image: the host makes its own.
    run(Command::new("tar").arg("-C").arg(&root).args(["--exclude=./dev/*", "-xf"]).arg(&tree));
    let library = root.join("opt/client");
    std::fs::create_dir_all(&library).unwrap();
    run(Command::new("cp").arg("-r").arg(client().join(".")).arg(&library));
    std::fs::create_dir_all(root.join("srv")).unwrap();
    let ask = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e_workload/ask.py");
    std::fs::copy(ask, root.join("srv/ask.py")).unwrap();
    run(Command::new("umoci").args(["repack", "--image", &image]).arg(&bundle));
    let mut config = Command::new("umoci");
    config.args(["config", "--image", &image, "--config.user", "65534:65534"]);
    config.args(["--config.env", "PYTHONPATH=/opt/client", "--config.env", "HOME=/tmp"]);
    for word in ["/usr/bin/python3", "-c", "import signal; signal.pause()"] {
        config.args(["--config.cmd", word]);
    }
    run(&mut config);
    layout
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_owned()
}

/// Runs the client in an instance of an app and answers what it says. An agent that was just restarted can't be reached
/// for a moment.
fn ask(cloud: &Cloud, app: &str, arguments: &[&str]) -> Result<Value, String> {
    let instances = cloud.instances(app);
    let name = text(&instances[0]["metadata"]["name"]);
    let mut command = vec!["exec", &name, "--", "/usr/bin/python3", "/srv/ask.py"];
    command.extend(arguments);
    let output = cloud.run(&command);
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(error.into_owned());
    }
    serde_json::from_str(said.trim()).map_err(|e| format!("{e}: {said} {error}"))
}

/// What must go well, sooner or later.
fn must(cloud: &Cloud, app: &str, arguments: &[&str]) -> Value {
    cloud.wait(&format!("{app}: {arguments:?}"), || {
        let said = ask(cloud, app, arguments)?;
        if said["error"].is_null() { Ok(said) } else { Err(said.to_string()) }
    })
}

/// What must fail; answers why.
fn must_not(cloud: &Cloud, app: &str, arguments: &[&str]) -> String {
    text(&ask(cloud, app, arguments).unwrap()["error"])
}

#[test]
fn containers_learn_who_they_are_by_the_public_client_and_nobody_gets_anothers_identity() {
    let files = tempfile::tempdir().unwrap();
    let layout = image(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "2"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "python"]);
    for app in ["web", "db"] {
        let path = files.path().join("app.yaml");
        let spec = "image: python\n  resources:\n    memory: 256Mi";
        let manifest = format!("apiVersion: cloudnexus/v1\nkind: App\nmetadata:\n  name: {app}\nspec:\n  {spec}\n");
        std::fs::write(&path, manifest).unwrap();
        cloud.ok(&["apply", "-f", path.to_str().unwrap()]);
        cloud.wait_ready(app, 1);
    }

    let web = must(&cloud, "web", &["everything"]);
    let id = text(&web["id"]);
    assert!(id.starts_with("spiffe://") && id.ends_with("/project/default/app/web"), "{web}");
    assert_eq!(web["socket"], "unix:///run/spiffe/workload.sock");
    assert_eq!(web["user"], 65534, "a user without any rights may ask");
    assert_eq!(web["life"], 3900.0, "an hour, and five minutes for slow clocks: {web}");
    assert!(web["roots"] == 1 && web["keys"].as_u64() >= Some(1), "{web}");
    let db = must(&cloud, "db", &["everything"]);
    assert_eq!(db["id"], id.replace("app/web", "app/db"));
    assert_ne!(db["serial"], web["serial"]);
    let peers = must(&cloud, "web", &["handshake"]);
    assert_eq!(peers["peers"], serde_json::json!([id, id]), "OpenSSL takes the certificates on both sides");

    // A token proves web to db, and to nobody else.
    let token = must(&cloud, "web", &["token", "db"]);
    assert_eq!(token["id"], id);
    let token = text(&token["token"]);
    let valid = must(&cloud, "db", &["validate", "db", &token]);
    assert_eq!((text(&valid["told"]), text(&valid["own"])), (id.clone(), id.clone()));
    let wrong = must_not(&cloud, "db", &["validate", "mail", &token]);
    assert!(wrong.contains("another audience"), "{wrong}");
    let forged = format!("{}{}", &token[..token.len() - 8], "AAAAAAAA");
    let wrong = must_not(&cloud, "db", &["validate", "db", &forged]);
    assert!(wrong.contains("signature"), "{wrong}");
    // Nobody gets a token in another's name.
    for other in [text(&db["id"]), id.replace("project/default/app/web", "server/server-a")] {
        let refused = must_not(&cloud, "web", &["token", "mail", &other]);
        assert!(refused.contains("gets tokens of no other"), "{refused}");
    }

    servers_are_killed(&cloud, &web);
    cloud.ok(&["delete", "app", "web", "--wait"]);
    cloud.down();
}

/// Nothing that runs depends on a server, or on the agent that serves its identity.
fn servers_are_killed(cloud: &Cloud, before: &Value) {
    let instance = cloud.wait_ready("web", 1).remove(0);
    let host = text(&instance["status"]["host"]);
    let servers = cloud.json(&["local", "list"]);
    let servers: Vec<String> = servers.as_array().unwrap().iter().map(|m| text(&m["name"])).collect();
    let servers: Vec<String> = servers.into_iter().filter(|name| name.starts_with("server-")).collect();
    // Commands reach a container through a server: what the agent did without one is seen afterwards.
    for server in &servers {
        cloud.ok(&["local", "kill", server]);
    }
    cloud.ok(&["local", "restart", &format!("agent@{host}")]);
    for server in &servers {
        cloud.ok(&["local", "start", server]);
    }
    let after = cloud.wait_ready("web", 1).remove(0);
    for field in ["started", "restarts"] {
        assert_eq!(after["status"][field], instance["status"][field], "the workload was restarted");
    }
    let again = must(cloud, "web", &["everything"]);
    assert_eq!(again["serial"], before["serial"], "the agent took up what the one before it had");
    must(cloud, "web", &["token", "cache"]);
}
