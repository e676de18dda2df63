//! The audit log of a whole cloud: changes are made, exported and verified offline; whatever is done to the export is found; the
//! leader changes in between. Needs root.

#[allow(dead_code)] // Other test programs use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[path = "e2e/guide.rs"]
mod guide;

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use cloud::Cloud;
use serde_json::Value;

/// One cloud at a time is enough for a small machine.
static TURN: Mutex<()> = Mutex::new(());

fn verify(cloud: &Cloud, lines: &[String], heads: &[&str]) -> Result<Value, String> {
    let file = cloud.path("tampered.ndjson");
    std::fs::write(&file, lines.iter().map(|l| format!("{l}\n")).collect::<String>()).unwrap();
    let mut args = vec!["audit", "verify", file.to_str().unwrap(), "-o", "json"];
    let keys = cloud.path("keys").to_str().unwrap().to_owned();
    args.extend(["--key", &keys]);
    let heads: Vec<String> = heads.iter().map(|h| cloud.path(h).to_str().unwrap().to_owned()).collect();
    heads.iter().for_each(|head| args.extend(["--head", head.as_str()]));
    let mut command = cloud.command(&args);
    // It asks nobody: there is nobody to ask.
    let output = command.env("NEXUS_CONFIG", "/nonexistent").output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn export(cloud: &Cloud, args: &[&str]) -> Vec<String> {
    let all = [&["audit", "export", "--region", "global"], args].concat();
    cloud.ok(&all).lines().map(str::to_owned).collect()
}

fn project(cloud: &Cloud, name: &str) {
    let file = cloud.path("project.yaml");
    let text = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: {name}}}\nspec: {{}}\n");
    std::fs::write(&file, text).unwrap();
    cloud.ok(&["apply", "-f", file.to_str().unwrap()]);
}

#[test]
fn whatever_is_done_to_an_export_is_found_with_a_public_key_and_an_old_head() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let cloud = Cloud::up(&["--hosts-per-zone", "1"]);
    for n in 0..5 {
        project(&cloud, &format!("shop-{n}"));
    }
    cloud.wait("every server's key", || {
        let keys = cloud.ok(&["audit", "keys", "--region", "global"]);
        std::fs::write(cloud.path("keys"), &keys).unwrap();
        if keys.lines().count() == 3 { Ok(()) } else { Err(keys) }
    });
    std::fs::write(cloud.path("early"), cloud.ok(&["audit", "head", "--region", "global"])).unwrap();

    // The log goes on behind another leader.
    let status = cloud.json(&["status"]);
    let global = status["groups"].as_array().unwrap().iter().find(|g| g["group"] == "global").unwrap();
    let leader = ["server-a", "server-b", "server-c"][global["leader"].as_u64().unwrap() as usize - 1];
    cloud.ok(&["local", "kill", leader]);
    for n in 5..10 {
        cloud.wait("a change behind another leader", || {
            let name = format!("shop-{n}");
            let file = cloud.path("late.yaml");
            let text = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: {name}}}\nspec: {{}}\n");
            std::fs::write(&file, text).unwrap();
            let output = cloud.run(&["apply", "-f", file.to_str().unwrap()]);
            if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
        });
    }
    cloud.ok(&["local", "start", leader]);
    let (code, _) = cloud.fails(&["delete", "project", "system"]);
    assert_eq!(code, 4);
    cloud.ok(&["delete", "project", "shop-3", "--wait"]);

    let listed = cloud.json(&["audit", "list", "--region", "global", "--kind", "projects", "--limit", "3"]);
    let said: Vec<_> = listed["items"].as_array().unwrap().iter().map(|i| i["action"].as_str().unwrap()).collect();
    assert_eq!(said, ["projects:delete", "projects:create", "projects:create"]);

    let early = cloud.path("early").to_str().unwrap().to_owned();
    let lines = export(&cloud, &["--head", &early]);
    let report = verify(&cloud, &lines, &["early"]).unwrap();
    assert_eq!((&report["right"], &report["earlierHeads"]), (&true.into(), &1.into()), "{report}");
    // Ten projects made, one deleted, and what the servers and the first invitation wrote.
    let records = report["records"].as_u64().unwrap();
    assert!(records >= 11, "{report}");
    let from = export(&cloud, &["--from", "7", "--head", &early]);
    assert_eq!(verify(&cloud, &from, &["early"]).unwrap()["records"], records - 7);

    // Line 0 is the header, and each record one line.
    let at = lines.iter().position(|l| l.contains("shop-3")).unwrap();
    let record = format!("record {}", at - 1);
    let tampered = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = lines.clone();
        change(&mut lines);
        verify(&cloud, &lines, &["early"]).unwrap_err()
    };
    let removed = tampered(&|lines| drop(lines.remove(at)));
    assert!(removed.contains(&record) && removed.contains("missing"), "{removed}");
    let changed = tampered(&|lines| lines[at] = lines[at].replace("shop-3", "shop-9"));
    assert!(changed.contains(&record) && changed.contains("changed"), "{changed}");
    let moved = tampered(&|lines| lines.swap(at, at + 1));
    assert!(moved.contains("out of its place"), "{moved}");
    let forged = tampered(&|lines| {
        let last = lines.iter().rposition(|l| l.starts_with("{\"entry\"")).unwrap();
        let forged = lines[last].replace("projects:delete", "projects:update");
        lines[last] = forged;
    });
    assert!(forged.contains("changed") || forged.contains("forged"), "{forged}");
    let cut = tampered(&|lines| lines.truncate(8));
    assert!(cut.contains("missing"), "{cut}");
    let unsigned = tampered(&|lines| {
        lines.retain(|l| !l.starts_with("{\"head\"") && !l.starts_with("{\"consistency\""));
    });
    assert!(unsigned.contains("no signed tree head"), "{unsigned}");
    let longer = tampered(&|lines| lines.insert(1, "x".repeat(1 << 20)));
    assert!(longer.contains("line 2"), "{longer}");

    // A change of an app is in the log of its region, with the refusals of its servers behind their anchor.
    let (code, _) = cloud.fails(&["delete", "host", "zone-a-1"]);
    assert_eq!(code, 4);
    std::fs::write(cloud.path("keys"), cloud.ok(&["audit", "keys"])).unwrap();
    let settled = cloud.wait("the refusals to be anchored", || {
        let lines: Vec<String> = cloud.ok(&["audit", "export"]).lines().map(str::to_owned).collect();
        let settled = lines.iter().any(|l| l.starts_with("{\"chain\"") || l.starts_with("{\"dropped\""));
        if settled { Ok(lines) } else { Err(format!("{lines:#?}")) }
    });
    let report = verify(&cloud, &settled, &[]).unwrap();
    assert!(report["anchors"].as_u64() > Some(0), "{report}");
    cloud.down();
}

#[test]
fn the_guide_holds() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let cloud = Cloud::up(&["--hosts-per-zone", "1"]);
    let folder = cloud.path("reader");
    std::fs::create_dir(&folder).unwrap();
    let bin = cloud.path("bin");
    std::fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_nexus"), bin.join("nexus")).unwrap();
    for (heading, blocks) in guide::sections("audit.md", 5) {
        for block in blocks {
            assert_eq!(block.place, None, "this test has one machine");
            let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
            let mut command = Command::new("bash");
            command.args(["-euo", "pipefail", "-c", &block.script]).current_dir(&folder);
            command.env("PATH", path).env("NEXUS_CONFIG", cloud.path("context.json")).env("HOME", &folder);
            let output = command.output().unwrap();
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{heading}:\n{}\n{out}\n{err}", block.script);
        }
    }
    cloud.down();
}
