//! Secrets with the real binary and a real container: what it reads, how it follows a new version, what goes on while servers
//! are dead, and that no value is on any disk or in any log. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;

#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/process.rs"]
mod process;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use cloud::Cloud;
use process::web_server;
use serde_json::Value;

const FIRST: &str = "canary-first-5f1c";
const SECOND: &str = "canary-second-9e77";
const VARIABLE: &str = "canary-variable-31aa";

/// Sets a value that is on no command line.
fn set(cloud: &Cloud, secret: &str, key: &str, value: &str) {
    let mut command = cloud.command(&["secret", "set", secret, key]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "{value}").unwrap();
    assert!(child.wait_with_output().unwrap().status.success());
}

/// What a command in the app's only instance says.
fn inside(cloud: &Cloud, app: &str, script: &str) -> Result<String, String> {
    let instances = cloud.instances(app);
    let name = instances.first().and_then(|i| i["metadata"]["name"].as_str()).ok_or("no instance")?;
    let output = cloud.run(&["exec", name, "--", "/bin/busybox", "sh", "-c", script]);
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() { Ok(said) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn until_inside(cloud: &Cloud, app: &str, script: &str, wanted: &str) {
    cloud.wait(&format!("{script} to say {wanted}"), || match inside(cloud, app, script)? {
        said if said == wanted => Ok(()),
        said => Err(said),
    });
}

/// Every file below a folder that holds a text, also in base64.
fn holders(dir: &Path, text: &str) -> Vec<String> {
    let base64 = nexus_model::SecretValue::new(text.into()).to_base64();
    let mut grep = Command::new("grep");
    // Without the last group, which depends on what follows.
    let encoded = &base64.trim_end_matches('=')[..base64.len() - 4];
    grep.args(["-rlaF", "-e", text, "-e", encoded]).arg(dir);
    let output = grep.output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

fn message(cloud: &Cloud, app: &str) -> String {
    let app = cloud.json(&["get", "app", app]);
    let conditions = app["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.first().map(|c| format!("{}: {}", c["reason"], c["message"])).unwrap_or_default()
}

#[test]
fn a_container_gets_its_secrets_as_files_and_variables_and_no_disk_holds_them() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::busybox(files.path());
    let image = format!("{}:latest", layout.display());
    let user = Command::new("umoci").args(["config", "--image", &image, "--config.user", "65534:65534"]).status();
    assert!(user.unwrap().success());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "web"]);

    // An app that names what is not there waits, and says for what.
    let secrets = ["--secret", "TOKEN=api/token", "--secret", "/run/secrets/tls=tls"];
    let deploy: Vec<&str> = ["deploy", "web", "--no-wait"].into_iter().chain(secrets).collect();
    cloud.ok(&deploy);
    cloud.wait("the app to say what it lacks", || match message(&cloud, "web") {
        said if said.contains("SecretNotFound") && said.contains("nexus secret set api") => Ok(()),
        said => Err(said),
    });
    assert!(cloud.instances("web").is_empty());
    set(&cloud, "api", "token", VARIABLE);
    set(&cloud, "tls", "tls.key", FIRST);
    let first = cloud.wait_ready("web", 1).remove(0);

    until_inside(&cloud, "web", "echo $TOKEN", VARIABLE);
    until_inside(&cloud, "web", "cat /run/secrets/tls/tls.key", FIRST);
    // The first process has it too, and the file is its user's alone.
    until_inside(&cloud, "web", "tr '\\0' '\\n' </proc/1/environ | grep ^TOKEN=", &format!("TOKEN={VARIABLE}"));
    let mode = inside(&cloud, "web", "stat -L -c '%a %u' /run/secrets/tls/tls.key").unwrap();
    assert_eq!(mode, "400 65534");
    assert!(inside(&cloud, "web", "echo x > /run/secrets/tls/other").is_err(), "read-only");
    let (_, refused) = cloud.fails(&["delete", "secret", "tls"]);
    assert!(refused.contains("named by apps (web)"), "{refused}");

    // Files follow in place; variables make new instances.
    set(&cloud, "tls", "tls.key", SECOND);
    until_inside(&cloud, "web", "cat /run/secrets/tls/tls.key", SECOND);
    let same = cloud.wait_ready("web", 1).remove(0);
    assert_eq!(same["metadata"]["uid"], first["metadata"]["uid"], "a file's new version restarts nothing");
    assert_eq!(same["status"]["restarts"], 0);
    no_disk_holds(&cloud);
    servers_are_killed(&cloud, &same);

    set(&cloud, "api", "token", SECOND);
    until_inside(&cloud, "web", "echo $TOKEN", SECOND);
    let next = cloud.wait_ready("web", 1).remove(0);
    assert_ne!(next["metadata"]["uid"], first["metadata"]["uid"]);

    the_guide_is_followed(&cloud);
    keys_rotate(&cloud);
    no_disk_holds(&cloud);
    assert_eq!(cloud.ok(&["secret", "get", "tls", "--reveal", "--key", "tls.key", "--version", "1"]), FIRST);
    cloud.ok(&["delete", "app", "web", "--wait"]);
    cloud.ok(&["delete", "secret", "tls"]);
    cloud.down();
}

/// Values are in memory alone: in no file of the servers, the host, their logs or a backup.
fn no_disk_holds(cloud: &Cloud) {
    cloud.ok(&["backup", "create"]);
    for value in [FIRST, SECOND, VARIABLE] {
        assert_eq!(holders(&cloud.data_dir(), value), Vec::<String>::new(), "{value}");
    }
    for listed in
        [&["get", "secrets", "-o", "yaml"][..], &["events"], &["audit", "list"], &["get", "instances", "-o", "yaml"]]
    {
        let said = cloud.ok(listed);
        assert!(!said.contains("canary"), "{listed:?}: {said}");
    }
    // The store holds them sealed: what is looked for is what is there.
    assert!(!holders(&cloud.data_dir(), "s/default/tls/").is_empty());
}

/// What runs goes on, and an instance that ends while no server answers starts again with what its host has.
fn servers_are_killed(cloud: &Cloud, before: &Value) {
    let host = before["status"]["host"].as_str().unwrap();
    let members = cloud.json(&["local", "list"]);
    let names = members.as_array().unwrap().iter().filter_map(|m| m["name"].as_str());
    let servers: Vec<&str> = names.filter(|name| name.starts_with("server-")).collect();
    for server in &servers {
        cloud.ok(&["local", "kill", server]);
    }
    cloud.ok(&["local", "restart", &format!("agent@{host}")]);
    let first = web_server(&format!("TOKEN={VARIABLE}")).expect("the container runs on");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL).unwrap();
    cloud.wait("the instance to start again without any server", || match web_server(&format!("TOKEN={VARIABLE}")) {
        Some(next) if next != first => Ok(()),
        other => Err(format!("{other:?}")),
    });
    for server in &servers {
        cloud.ok(&["local", "start", server]);
    }
    let after = cloud.wait_ready("web", 1).remove(0);
    assert_eq!(after["metadata"]["uid"], before["metadata"]["uid"]);
    until_inside(cloud, "web", "cat /run/secrets/tls/tls.key", SECOND);
    until_inside(cloud, "web", "echo $TOKEN", VARIABLE);
}

fn the_guide_is_followed(cloud: &Cloud) {
    guide::follow(&cloud.path(""), "secrets.md", 3, &[], |_, _| {});
    cloud.ok(&["delete", "secret", "db"]);
}

fn keys_rotate(cloud: &Cloud) {
    let old = cloud.json(&["master-key", "status"])["current"].as_str().unwrap().to_owned();
    let new = cloud.ok(&["master-key", "rotate"]).trim().to_owned();
    cloud.wait("the servers to read the new key", || {
        let status = cloud.json(&["master-key", "status"]);
        if status["current"] == new.as_str() { Ok(()) } else { Err(status.to_string()) }
    });
    let (_, refused) = cloud.fails(&["master-key", "remove", &old]);
    assert!(refused.contains("rewrap"), "{refused}");
    let done = cloud.json(&["master-key", "rewrap"]);
    assert_eq!(done["secrets"], serde_json::json!({"seen": 4, "rewrapped": 4, "failed": 0}), "{done}");
    let again = cloud.json(&["master-key", "rewrap"]);
    assert_eq!((&again["secrets"]["rewrapped"], &again["used"][&new]), (&Value::from(0), &Value::from(4)), "{again}");
    cloud.ok(&["master-key", "remove", &old]);
    cloud.wait("everything to open without the old key", || {
        let output = cloud.run(&["secret", "get", "api", "--reveal", "--key", "token"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if said == SECOND { Ok(()) } else { Err(format!("{output:?}")) }
    });
}
