//! Two tenants on one cloud: the commands of `docs/guide/tenants.md`, and what happens when a server is gone in between.

use std::process::{Command, Stdio};

use crate::cloud::Cloud;
use crate::guide;

#[test]
fn strangers_share_a_cloud_as_the_guide_says() {
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    let bin = cloud.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_nexus"), bin.join("nexus")).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let blocks = guide::sections("tenants.md", 8).into_iter().flat_map(|(_, blocks)| blocks);
    let script: String = blocks.map(|b| b.script).collect();
    let mut command = Command::new("timeout");
    command.args(["240", "sh", "-euxc", &script]).env("PATH", path).stdin(Stdio::null());
    command.env("OPERATOR", cloud.path("context.json")).env("HOME", cloud.path(""));
    command.env_remove("CNX_URL").env_remove("CNX_TOKEN").current_dir(cloud.path(""));
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("acme/ada") && out.contains("production-stays") && out.contains("lab"), "{out}\n{err}");
    cloud.down();
}

#[test]
fn the_first_start_invites_the_administrator_once() {
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    let invited = cloud.json(&["user", "invite", "admin"]);
    let invitation = invited["invitation"].as_str().unwrap();
    let login = |text: &str| {
        let mut command =
            cloud.command(&["login", "--user", "default/admin", "--invitation", text, "--password-stdin"]);
        command.env("NEXUS_CONFIG", cloud.path("admin.json")).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"a horse of another colour\n").unwrap();
        child.wait_with_output().unwrap()
    };
    std::fs::copy(cloud.path("context.json"), cloud.path("admin.json")).unwrap();
    let first = login(invitation);
    assert!(first.status.success(), "{first:?}");
    assert!(!login(invitation).status.success(), "an invitation is good once");
    let as_admin = |args: &[&str]| {
        let mut command = cloud.command(args);
        command.env("NEXUS_CONFIG", cloud.path("admin.json")).output().unwrap()
    };
    let me = as_admin(&["whoami"]);
    let text = String::from_utf8_lossy(&me.stdout).into_owned();
    assert!(text.contains("default/admin") && text.contains("owner") && text.contains("fleet-operator"), "{me:?}");
    assert!(as_admin(&["get", "hosts"]).status.success());

    // Sessions, keys and grants are the metadata's: every server's death leaves them as they are.
    let members = cloud.json(&["local", "list"]);
    for member in members.as_array().unwrap().iter().filter(|m| m["role"] == "server") {
        let name = member["name"].as_str().unwrap();
        cloud.ok(&["local", "kill", name]);
        cloud.ok(&["local", "start", name]);
    }
    cloud.wait("the session to be known again", || {
        let me = as_admin(&["whoami"]);
        if me.status.success() { Ok(()) } else { Err(format!("{me:?}")) }
    });
    assert!(as_admin(&["logout"]).status.success());
    cloud.down();
}
