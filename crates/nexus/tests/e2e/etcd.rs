//! The cloud with its metadata in an etcd that wants TLS, a certificate and a user: the same test as with the servers' own
//! engine, and what is special about it: etcd itself dies, is told of in the status, and is restored into.

#[path = "../../../store/tests/common/etcd.rs"]
mod cluster;

use cluster::{Etcd, Shape};
use serde_json::Value;

use super::cloud::Cloud;
use super::{everything_is_killed, text};

#[test]
fn an_app_stays_up_while_everything_under_it_is_killed_with_its_metadata_in_etcd() {
    let etcd = Etcd::start(Shape::ONE_SECURE);
    everything_is_killed(&["--store", &etcd.url()], |cloud| {
        // The majority that counts is etcd's: the last server leads and takes writes.
        cloud.wait("the last server to take a write", || apply(cloud, cloud.manifest("alone")));
    });
}

fn apply(cloud: &Cloud, manifest: std::path::PathBuf) -> Result<(), String> {
    let output = cloud.run(&["apply", "-f", manifest.to_str().unwrap()]);
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn project(cloud: &Cloud, name: &str) -> std::path::PathBuf {
    let path = cloud.path(&format!("{name}.yaml"));
    let manifest = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: {name}}}\nspec: {{}}\n");
    std::fs::write(&path, manifest).unwrap();
    path
}

fn projects(cloud: &Cloud) -> Vec<String> {
    cloud.list("projects").iter().map(|p| text(&p["metadata"]["name"])).collect()
}

fn healthy(cloud: &Cloud) -> Value {
    cloud.wait("the cloud to be healthy", || {
        let output = cloud.run(&["status", "-o", "json"]);
        let status: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
        if status["status"] == "healthy" { Ok(status) } else { Err(status.to_string()) }
    })
}

#[test]
fn the_death_of_etcd_is_told_and_passes_and_a_backup_goes_back_into_it() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let etcd = Etcd::start(Shape::ONE_SECURE);
    let url = etcd.url();
    let args = ["--zones", "1", "--hosts-per-zone", "1", "--store", &url];
    let cloud = Cloud::up(&args);

    // What is shown is up to three seconds old.
    let status = cloud.wait("every server of both groups to be seen", || {
        let status = healthy(&cloud);
        let groups = status["groups"].as_array().unwrap();
        let members = groups.iter().map(|g| g["members"].as_array().map_or(&[][..], Vec::as_slice));
        let seen = |m: &[Value]| !m.is_empty() && m.iter().all(|m| m["reachable"] == true);
        if members.clone().count() == 2 && members.clone().all(seen) { Ok(status) } else { Err(status.to_string()) }
    });
    let endpoint = &status["etcd"]["endpoints"][0];
    assert!(endpoint["reachable"] == true && endpoint["leader"] == true && endpoint["member"] == "m0", "{status}");
    assert!(text(&endpoint["version"]).starts_with("3."), "{status}");
    let table = cloud.ok(&["status"]);
    assert!(table.contains("1 of 1 endpoints answer") && table.contains("servers answer"), "{table}");

    // etcd dies: that is said, and nothing is written. It comes back: nobody has to do anything.
    apply(&cloud, project(&cloud, "before")).unwrap();
    etcd.kill(0);
    let (code, error) = cloud.fails(&["apply", "-f", project(&cloud, "refused").to_str().unwrap()]);
    assert!(code == 5 && (error.contains("etcd") || error.contains("leader")), "{code}: {error}");
    cloud.wait("the outage to be told", || {
        let table = cloud.ok(&["status"]);
        let told = table.contains("0 of 1 endpoints answer") && table.contains("etcd does not take writes");
        if told { Ok(()) } else { Err(table) }
    });
    etcd.boot(0);
    cloud.wait("writes to be taken again", || apply(&cloud, project(&cloud, "after")));
    healthy(&cloud);

    // A backup, made while all runs, goes back into etcd while nothing does.
    let made = cloud.json(&["backup", "create", "good-day"]);
    assert_eq!(made["groups"].as_array().map(Vec::len), Some(2), "{made}");
    assert!(cloud.ok(&["backup", "list"]).contains("good-day"));
    let (folder, data) = (text(&made["folder"]), cloud.data_dir());
    let data = data.to_str().unwrap();
    apply(&cloud, project(&cloud, "late")).unwrap();
    let restore = ["backup", "restore", "--from", &folder, "--data-dir", data];
    let (code, error) = cloud.fails(&restore);
    assert!(code == 4 && error.contains("stop all of them first"), "{code}: {error}");
    cloud.ok(&["down"]);
    // What is the embedded engine's alone says whose business it is here.
    let (code, error) = cloud.fails(&["debug", "store", "verify", data]);
    assert!(code == 4 && error.contains("etcdctl"), "{code}: {error}");
    let (_, error) = cloud.fails(&["server", "recover", "--survivor", "--yes", "--data-dir", data]);
    assert!(error.contains("etcdctl snapshot restore"), "{error}");
    cloud.ok(&restore);
    cloud.start(&args);
    cloud.wait("the cloud of the backup", || {
        let found = projects(&cloud);
        let has = |name: &str| found.iter().any(|p| p == name);
        if has("before") && has("after") && !has("late") { Ok(()) } else { Err(format!("{found:?}")) }
    });
    cloud.wait("writes to be taken", || apply(&cloud, project(&cloud, "again")));
    cloud.down();
}
