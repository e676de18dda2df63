//! Init steps and sidecars with the real binary and real containers: what one leaves for another, failures, a sidecar that is killed,
//! an agent that is, a job that has some, and the guide's own lines. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;

#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;

use std::path::{Path, PathBuf};

use cloud::Cloud;
use serde_json::{Value, json};

const HOST: &str = "zone-a-1";
const SERVE: &str = "/bin/busybox httpd -f -p [::]:80 -h /run/shared & p=$!; trap 'kill $p; exit 0' TERM; wait $p";
const BESIDE: &str = "trap 'exit 0' TERM; echo begun; while :; do /bin/busybox sleep 1 & wait $!; done";

fn small() -> Value {
    json!({"cpu": "20m", "memory": "32Mi", "scratch": "4Mi"})
}

fn part(name: &str, script: &str) -> Value {
    json!({"name": name, "command": ["/bin/busybox", "sh", "-c", script], "resources": small()})
}

fn apply(cloud: &Cloud, kind: &str, name: &str, spec: Value) {
    let file = cloud.path(&format!("{name}.json"));
    let object = json!({"apiVersion": "cloudnexus/v1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    std::fs::write(&file, object.to_string()).unwrap();
    cloud.ok(&["apply", "-f", file.to_str().unwrap()]);
}

fn app(script: &str, init: Value, sidecars: Value) -> Value {
    json!({
        "image": "tools", "command": ["/bin/busybox", "sh", "-c", script], "resources": small(),
        "init": init, "sidecars": sidecars, "shared": {"size": "4Mi"}, "stopGraceSeconds": 3,
    })
}

fn only(cloud: &Cloud, app: &str) -> Value {
    let mut all = cloud.instances(app);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

fn of<'a>(instance: &'a Value, part: &str) -> &'a Value {
    let parts = instance["status"]["parts"].as_array().map(Vec::as_slice).unwrap_or_default();
    parts.iter().find(|p| p["name"] == part).unwrap_or(&Value::Null)
}

/// What there is of the host's containers: folders of sandboxes and of what they share, cgroups, and mounts that its processes see.
fn left(cloud: &Cloud) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![cloud.data_dir()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir()
                && ["instances", "shared"].iter().any(|name| path.ends_with(Path::new("containers").join(name)))
            {
                found.extend(std::fs::read_dir(&path).unwrap().flatten().map(|e| e.path().display().to_string()));
            } else if entry.file_type().is_ok_and(|t| t.is_dir()) && !path.ends_with("layers") {
                folders.push(path);
            }
        }
    }
    for pid in processes(cloud, "agent") {
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        found.extend(mounts.lines().filter(|m| m.contains("/shared/")).map(str::to_owned));
    }
    found
}

/// Processes of the cloud that have this word among their arguments.
fn processes(cloud: &Cloud, word: &str) -> Vec<i32> {
    let dir = cloud.data_dir().display().to_string();
    let fits = |pid: &i32| {
        let line = std::fs::read(PathBuf::from(format!("/proc/{pid}/cmdline"))).unwrap_or_default();
        let words: Vec<String> = String::from_utf8_lossy(&line).split('\0').map(str::to_owned).collect();
        words.iter().any(|w| w == word) && words.iter().any(|w| w.contains(&dir))
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(fits).collect()
}

#[test]
fn parts_of_an_instance_live_and_end_together() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::busybox(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "tools"]);

    what_an_init_step_leaves_is_served(&cloud);
    a_sidecar_and_an_agent_are_killed(&cloud);
    a_failing_init_step_is_named_and_tried_again(&cloud);
    a_job_ends_with_its_main_part(&cloud);
    a_part_has_secrets_of_its_own(&cloud);
    the_guide_is_followed(&cloud);
    nothing_is_left(&cloud);
    cloud.down();
}

fn what_an_init_step_leaves_is_served(cloud: &Cloud) {
    let init = json!([
        part(
            "fetch",
            "echo fetching; echo '<p>made before</p>' > /run/shared/index.html; /bin/busybox hostname > /run/shared/name"
        ),
        part("check", "/bin/busybox grep made /run/shared/index.html && echo twice >> /run/shared/checked"),
    ]);
    let mut spec = app(SERVE, init, json!([part("beside", BESIDE)]));
    spec["ports"] = json!([{"port": 80}]);
    spec["sidecars"][0]["readiness"] =
        json!({"probe": {"exec": {"command": ["/bin/busybox", "test", "-e", "/run/shared/checked"]}}});
    apply(cloud, "App", "web", spec);
    cloud.wait_ready("web", 1);
    let instance = only(cloud, "web");
    for step in ["fetch", "check"] {
        assert_eq!((&of(&instance, step)["state"], &of(&instance, step)["exitCode"]), (&json!("Done"), &json!(0)));
    }
    assert_eq!(
        (&of(&instance, "beside")["state"], &of(&instance, "beside")["ready"]),
        (&json!("Running"), &json!(true))
    );
    // Main and sidecar are of one network and one folder; each has files of its own beside that.
    let name = instance["metadata"]["name"].as_str().unwrap();
    let page = ["/bin/busybox", "wget", "-qO-", "http://localhost/index.html"];
    assert!(cloud.ok(&[&["exec", "web", "--part", "beside", "--"][..], &page].concat()).contains("made before"));
    assert!(cloud.ok(&["exec", name, "--", "/bin/busybox", "cat", "/run/shared/name"]).contains(name));
    cloud.ok(&["exec", name, "--", "/bin/busybox", "touch", "/srv/mine"]);
    let there = cloud.ok(&["exec", name, "--part", "beside", "--", "/bin/busybox", "ls", "/srv"]);
    assert!(!there.contains("mine"), "{there}");
    // The folder is bounded.
    let fill = ["/bin/busybox", "dd", "if=/dev/zero", "of=/run/shared/big", "bs=1M", "count=64"];
    let (_, full) = cloud.fails(&[&["exec", name, "--part", "beside", "--"][..], &fill].concat());
    assert!(full.contains("No space left"), "{full}");
    cloud.ok(&["exec", name, "--", "/bin/busybox", "rm", "/run/shared/big"]);

    assert!(cloud.ok(&["logs", "web", "--part", "fetch"]).contains("fetching"));
    assert!(cloud.ok(&["logs", &format!("instance/{name}"), "--part", "beside"]).contains("begun"));
    let (_, none) = cloud.fails(&["exec", name, "--part", "nobody", "--", "true"]);
    assert!(none.contains("it has: fetch, check, beside"), "{none}");
    let told = cloud.ok(&["describe", "instance", name]);
    let row = |part: &str| told.lines().find(|l| l.contains(&format!(" {part} "))).unwrap_or_default().to_owned();
    assert!(row("check").contains("Init") && row("check").contains("Done"), "{told}");
    assert!(row("beside").contains("Sidecar") && row("beside").contains("Running"), "{told}");

    // Main and one sidecar; 4 Mi of scratch each, and the folder's 4 Mi.
    let reserved = cloud.json(&["get", "host", HOST])["status"]["reserved"].clone();
    assert_eq!(
        (&reserved["cpu"], &reserved["memory"], &reserved["scratch"]),
        (&json!("40m"), &json!("64Mi"), &json!("12Mi"))
    );
    assert_eq!(cloud.json(&["get", "usage", "default"])["status"]["used"]["memory"], "64Mi");
}

fn a_sidecar_and_an_agent_are_killed(cloud: &Cloud) {
    let before = only(cloud, "web");
    let name = before["metadata"]["name"].as_str().unwrap();
    let inside = |args: &[&str]| cloud.ok(&[&["exec", name, "--"][..], args].concat());
    inside(&["/bin/busybox", "touch", "/tmp/here-since"]);
    // The command may end with what it ends: its status says nothing.
    cloud.run(&["exec", name, "--part", "beside", "--", "/bin/busybox", "kill", "-TERM", "1"]);
    cloud.wait("the sidecar to be started again", || {
        let now = only(cloud, "web");
        let fits = of(&now, "beside")["restarts"] == 1 && now["status"]["ready"] == true;
        if fits { Ok(()) } else { Err(now["status"].to_string()) }
    });
    let after = only(cloud, "web");
    let same = |a: &Value, b: &Value| {
        for field in ["started", "restarts", "host", "epoch"] {
            assert_eq!(a["status"][field], b["status"][field], "{field}");
        }
        assert_eq!(a["metadata"]["uid"], b["metadata"]["uid"]);
    };
    same(&before, &after);
    assert_eq!(cloud.ok(&["logs", name, "--part", "beside"]).matches("begun").count(), 2);

    cloud.ok(&["local", "kill", &format!("agent@{HOST}")]);
    cloud.wait("the agent to be back with everything as it was", || {
        let now = only(cloud, "web");
        let fits = of(&now, "beside")["restarts"] == 0 && now["status"]["ready"] == true;
        if fits { Ok(()) } else { Err(now["status"].to_string()) }
    });
    let now = only(cloud, "web");
    same(&after, &now);
    assert_eq!(of(&now, "beside")["started"], of(&after, "beside")["started"], "it was taken over");
    inside(&["/bin/busybox", "test", "-e", "/tmp/here-since"]);
    assert_eq!(inside(&["/bin/busybox", "cat", "/run/shared/checked"]).lines().count(), 1);
    assert_eq!(cloud.ok(&["logs", name, "--part", "beside"]).matches("begun").count(), 2);
    // A main part that is started again finds what was left for it, and its sidecar as it was.
    cloud.run(&["exec", name, "--", "/bin/busybox", "kill", "-TERM", "1"]);
    cloud.wait("the main part to be started again", || {
        let now = only(cloud, "web");
        let fits = now["status"]["restarts"] == 1 && now["status"]["ready"] == true;
        if fits { Ok(()) } else { Err(now["status"].to_string()) }
    });
    assert_eq!(cloud.ok(&["logs", name, "--part", "fetch"]).matches("fetching").count(), 1);
    assert_eq!(of(&only(cloud, "web"), "beside")["started"], of(&after, "beside")["started"]);
    cloud.ok(&["delete", "app", "web", "--wait"]);
}

fn a_failing_init_step_is_named_and_tried_again(cloud: &Cloud) {
    // Succeeds at its fifth try, before which there is a pause of seconds: what it leaves outlives it.
    let script = "echo try >> /run/shared/tries; [ $(/bin/busybox wc -l < /run/shared/tries) -ge 5 ] || exit 3";
    apply(cloud, "App", "late", app("exec /bin/busybox sleep 600", json!([part("migrate", script)]), json!([])));
    cloud.wait("its failure to be told", || {
        let Some(instance) = cloud.instances("late").pop() else { return Err("none".into()) };
        let told = instance["status"]["message"].as_str().unwrap_or_default().to_owned();
        let part = of(&instance, "migrate");
        let fits = told.contains("init step migrate exited with 3") && part["exitCode"] == 3;
        if fits { Ok(()) } else { Err(instance["status"].to_string()) }
    });
    cloud.wait_ready("late", 1);
    let instance = only(cloud, "late");
    assert_eq!(
        (&of(&instance, "migrate")["restarts"], &of(&instance, "migrate")["state"]),
        (&json!(4), &json!("Done"))
    );
    // An agent that is killed while a step runs doesn't begin it again.
    let long = "echo begun; /bin/busybox sleep 8; echo over";
    apply(cloud, "App", "long", app("exec /bin/busybox sleep 600", json!([part("slow", long)]), json!([])));
    cloud.wait("the step to run", || {
        let Some(instance) = cloud.instances("long").pop() else { return Err("none".into()) };
        if of(&instance, "slow")["state"] == "Running" { Ok(()) } else { Err(instance["status"].to_string()) }
    });
    cloud.ok(&["local", "kill", &format!("agent@{HOST}")]);
    cloud.wait_ready("long", 1);
    let logs = cloud.ok(&["logs", "long", "--part", "slow"]);
    assert_eq!((logs.matches("begun").count(), logs.matches("over").count()), (1, 1), "{logs}");
    cloud.ok(&["delete", "app", "late", "long", "--wait"]);
}

fn a_job_ends_with_its_main_part(cloud: &Cloud) {
    let mut template = app("/bin/busybox cat /run/shared/part", json!([]), json!([part("beside", BESIDE)]));
    template["init"] = json!([part("prepare", "echo for $NEXUS_JOB_NAME > /run/shared/part")]);
    apply(cloud, "Job", "work", json!({"template": template, "backoffLimit": 0}));
    let phase = |name: &str, phase: &str| {
        cloud.wait(&format!("job {name} to be {phase}"), || {
            let job = cloud.json(&["get", "job", name]);
            if job["status"]["phase"] == phase { Ok(job) } else { Err(job["status"].to_string()) }
        })
    };
    phase("work", "Complete");
    assert!(cloud.ok(&["logs", "job/work"]).contains("for work"));
    assert!(cloud.ok(&["logs", "job/work", "--part", "beside"]).contains("begun"));
    template["init"] = json!([part("prepare", "exit 4")]);
    apply(cloud, "Job", "bad", json!({"template": template, "backoffLimit": 0}));
    let bad = phase("bad", "Failed");
    assert!(
        bad["status"]["conditions"][0]["message"].as_str().unwrap().contains("init step prepare exited with 4"),
        "{bad}"
    );
    cloud.ok(&["delete", "job", "work", "bad", "--wait"]);
}

fn a_part_has_secrets_of_its_own(cloud: &Cloud) {
    cloud.ok(&["secret", "set", "db", "user=alice"]);
    let mut init = part("fetch", "echo user $DB_USER");
    init["secrets"] = json!([{"name": "db", "env": {"DB_USER": "user"}}]);
    let mut beside = part("beside", BESIDE);
    beside["secrets"] = json!([{"name": "db", "path": "/run/secrets/db"}]);
    apply(cloud, "App", "private", app("exec /bin/busybox sleep 600", json!([init]), json!([beside])));
    cloud.wait_ready("private", 1);
    assert!(cloud.ok(&["logs", "private", "--part", "fetch"]).contains("user alice"));
    let read = ["/bin/busybox", "cat", "/run/secrets/db/user"];
    assert_eq!(cloud.ok(&[&["exec", "private", "--part", "beside", "--"][..], &read].concat()).trim(), "alice");
    cloud.fails(&[&["exec", "private", "--"][..], &read].concat());
    let (_, refused) = cloud.fails(&["delete", "secret", "db"]);
    assert!(refused.contains("private"), "{refused}");
    cloud.ok(&["delete", "app", "private", "--wait"]);
    cloud.ok(&["delete", "secret", "db"]);
}

fn the_guide_is_followed(cloud: &Cloud) {
    guide::follow(&cloud.path(""), "parts.md", 3, &[], |_, _| {});
}

fn nothing_is_left(cloud: &Cloud) {
    // Killed in the middle of a removal, or of a start, an agent's next life goes on with it.
    let init = json!([part("a", "true")]);
    apply(cloud, "App", "brief", app(BESIDE, init, json!([part("b", BESIDE), part("c", BESIDE)])));
    cloud.wait("some of it to be there", || if left(cloud).is_empty() { Err("nothing".into()) } else { Ok(()) });
    cloud.ok(&["local", "kill", &format!("agent@{HOST}")]);
    cloud.wait_ready("brief", 1);
    cloud.ok(&["delete", "app", "brief"]);
    cloud.ok(&["local", "kill", &format!("agent@{HOST}")]);
    cloud.wait("nothing to be left", || {
        let left = left(cloud);
        if left.is_empty() && cloud.instances("brief").is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
    });
}
