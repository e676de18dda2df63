//! Jobs with the real binary and real containers: parts, retries, a cron job that fires, a host that dies under a job, agents
//! that restart, and the guide's own lines. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;

#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;

use std::time::Duration;

use cloud::Cloud;
use serde_json::{Value, json};

fn run_job(cloud: &Cloud, name: &str, flags: &[&str], script: &str) -> std::process::Output {
    let mut args = vec!["job", "run", name, "--image", "tools", "--memory", "32Mi", "--cpu", "20m"];
    args.extend(flags);
    args.extend(["--command", "/bin/busybox", "sh", "-c", script]);
    cloud.run(&args)
}

fn job(cloud: &Cloud, name: &str) -> Value {
    cloud.json(&["get", "job", name])
}

fn wait_phase(cloud: &Cloud, name: &str, phase: &str) -> Value {
    cloud.wait(&format!("job {name} to be {phase}"), || {
        let output = cloud.run(&["get", "job", name, "-o", "json"]);
        let job: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("{e}: {output:?}"))?;
        if job["status"]["phase"] == phase { Ok(job) } else { Err(job["status"].to_string()) }
    })
}

fn used(cloud: &Cloud) -> Value {
    cloud.json(&["get", "usage", "default"])["status"]["used"]["instances"].clone()
}

#[test]
fn jobs_run_to_their_end() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::busybox(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "3"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "tools"]);

    parts(&cloud);
    failures(&cloud);
    cancelled(&cloud);
    a_cron_job_fires(&cloud);
    an_agent_restarts_and_a_host_dies(&cloud);
    the_guide_is_followed(&cloud);
    cloud.down();
}

fn parts(cloud: &Cloud) {
    let flags = ["--completions", "5", "--parallelism", "2", "--indexed", "--wait"];
    let output = run_job(cloud, "parts", &flags, "echo part $NEXUS_JOB_INDEX of $NEXUS_JOB_COMPLETIONS");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("5 of 5 succeeded") && err.contains("of 5 succeeded"), "{out}\n{err}");
    let status = job(cloud, "parts")["status"].clone();
    assert_eq!((&status["completedIndexes"], &status["phase"]), (&json!("0-4"), &json!("Complete")), "{status}");
    assert_eq!(used(cloud), 0);
    let logs = cloud.ok(&["logs", "job/parts"]);
    for part in 0..5 {
        assert_eq!(logs.matches(&format!("part {part} of 5")).count(), 1, "{logs}");
    }
    // What has ended takes no room, and following its output ends.
    let hosts = cloud.list("hosts");
    assert!(hosts.iter().all(|h| h["status"]["reserved"]["instances"] == 0), "{hosts:#?}");
    assert!(cloud.ok(&["logs", "job/parts", "-f"]).contains("part 4 of 5"));
    assert!(cloud.ok(&["describe", "job", "parts"]).contains("exitCode: 0"));
    cloud.ok(&["delete", "job", "parts", "--wait"]);
    assert!(cloud.instances("parts").is_empty());
}

fn failures(cloud: &Cloud) {
    let output = run_job(cloud, "bad", &["--retries", "1", "--wait"], "echo trouble; exit 7");
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("BackoffLimitExceeded") && err.contains("exited with status 7"), "{err}");
    let status = job(cloud, "bad")["status"].clone();
    let codes: Vec<&Value> = status["ends"].as_array().unwrap().iter().map(|end| &end["exitCode"]).collect();
    assert_eq!(codes, [7, 7], "{status}");
    assert_eq!(cloud.ok(&["logs", "job/bad"]).matches("trouble").count(), 2);
    // A command that is not there is a failure too, not an endless try.
    cloud.ok(&["job", "run", "absent", "--image", "tools", "--retries", "0", "--command", "/no/such/program"]);
    let absent = wait_phase(cloud, "absent", "Failed");
    assert_eq!(absent["status"]["conditions"][0]["reason"], "BackoffLimitExceeded", "{absent}");
    let late = run_job(cloud, "late", &["--deadline", "3", "--wait"], "exec /bin/busybox sleep 600");
    let err = String::from_utf8_lossy(&late.stderr).into_owned();
    assert!(!late.status.success() && err.contains("DeadlineExceeded"), "{err}");
    cloud.ok(&["delete", "job", "bad", "absent", "late", "--wait"]);
}

fn cancelled(cloud: &Cloud) {
    assert!(
        run_job(cloud, "long", &["--parallelism", "2", "--completions", "2"], "exec /bin/busybox sleep 600")
            .status
            .success()
    );
    cloud.wait("two instances to run", || {
        let running = cloud.instances("long").iter().filter(|i| i["status"]["phase"] == "Running").count();
        if running == 2 { Ok(()) } else { Err(format!("{running}")) }
    });
    assert_eq!(used(cloud), 2);
    assert!(run_job(cloud, "long", &[], "true").status.code() == Some(4), "a name is taken once");
    cloud.ok(&["job", "cancel", "long"]);
    assert_eq!(job(cloud, "long")["status"]["conditions"][0]["reason"], "Cancelled");
    assert_eq!(used(cloud), 0);
    cloud.wait("what ran to be gone", || {
        let left = cloud.instances("long");
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    assert!(cloud.ok(&["job", "list"]).contains("long"));
    cloud.ok(&["delete", "job", "long"]);
}

fn a_cron_job_fires(cloud: &Cloud) {
    let (_, refused) = cloud.fails(&["cron", "create", "x", "--schedule", "* * * *", "--image", "tools"]);
    assert!(refused.contains("five fields"), "{refused}");
    let create = ["cron", "create", "often", "--schedule", "* * * * *", "--image", "tools", "--memory", "32Mi"];
    let command = ["--command", "/bin/busybox", "echo", "tick"];
    cloud.ok(&[&create[..], &command].concat());
    let cron = cloud::wait_for("a run by the clock", Duration::from_secs(240), || {
        let cron = cloud.json(&["get", "cron", "often"]);
        if cron["status"]["lastSuccess"].is_string() { Ok(cron) } else { Err(cron["status"].to_string()) }
    });
    assert_eq!(cron["status"]["missed"], 0, "{cron}");
    cloud.ok(&["cron", "suspend", "often"]);
    let cron = cloud.json(&["get", "cron", "often"]);
    assert!(cron["status"]["nextRun"].is_null() && cron["spec"]["suspend"] == true, "{cron}");
    let jobs = cloud.list("jobs");
    let run = jobs.iter().find(|j| j["metadata"]["owner"]["name"] == "often").unwrap();
    assert!(run["metadata"]["annotations"]["scheduled-at"].as_str().unwrap().ends_with(":00.000Z"), "{run}");
    let name = run["metadata"]["name"].as_str().unwrap();
    assert!(cloud.ok(&["logs", &format!("job/{name}")]).contains("tick"));
    assert!(cloud.ok(&["cron", "run", "often", "--wait"]).contains("Complete"));
    cloud.ok(&["delete", "cron", "often", "--wait"]);
    cloud.wait("the jobs by the clock to go with it", || {
        let left: Vec<_> = cloud.list("jobs").into_iter().filter(|j| j["metadata"]["owner"].is_object()).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

fn an_agent_restarts_and_a_host_dies(cloud: &Cloud) {
    // Each part writes a line when it begins; the first ends at once, the others go on until they are let.
    let script = "echo begun $NEXUS_JOB_INDEX; [ $NEXUS_JOB_INDEX = 0 ] || /bin/busybox sleep 25";
    let flags = ["--completions", "3", "--parallelism", "3", "--indexed", "--retries", "0"];
    assert!(run_job(cloud, "work", &flags, script).status.success());
    let on = |index: u64| {
        let of = |i: &&Value| i["spec"]["job"]["index"] == index;
        cloud.instances("work").iter().find(of).cloned().unwrap_or(Value::Null)
    };
    cloud.wait("the first part to be done and the second to run", || {
        let (first, second) = (on(0), on(1));
        let fits = first["status"]["phase"] == "Exited" && second["status"]["phase"] == "Running";
        if fits { Ok(()) } else { Err(format!("{} {}", first["status"], second["status"])) }
    });
    let ended = on(0);
    let host = ended["status"]["host"].as_str().unwrap().to_owned();
    cloud.ok(&["local", "restart", &format!("agent@{host}")]);
    let victim = on(1)["status"]["host"].as_str().unwrap().to_owned();
    let lost = on(1)["metadata"]["uid"].clone();
    cloud.ok(&["local", "kill", &victim]);
    let done = wait_phase(cloud, "work", "Complete");
    assert_eq!(done["status"]["failed"], 0, "a lost host is no failure: {done}");
    assert_eq!((&done["status"]["succeeded"], &done["status"]["completedIndexes"]), (&json!(3), &json!("0-2")));
    assert_ne!(on(1)["metadata"]["uid"], lost);
    if host != victim {
        assert_eq!(on(0)["metadata"]["uid"], ended["metadata"]["uid"], "what was done is not done again");
        let logs = cloud.ok(&["logs", &format!("instance/{}", ended["metadata"]["name"].as_str().unwrap())]);
        assert_eq!(logs.matches("begun 0").count(), 1, "{logs}");
    }
    assert_eq!(used(cloud), 0);
    cloud.ok(&["local", "start", &victim]);
    cloud.ok(&["delete", "job", "work"]);
    cloud.wait("the host to be back", || {
        let hosts = cloud.list("hosts");
        let ready = hosts.iter().filter(|h| h["status"]["state"] == "Ready" || h["status"]["state"] == "ready").count();
        if ready == 3 { Ok(()) } else { Err(format!("{hosts:#?}")) }
    });
}

fn the_guide_is_followed(cloud: &Cloud) {
    guide::follow(&cloud.path(""), "jobs.md", 4, &[], |_, _| {});
    assert!(cloud.list("cron-jobs").is_empty());
}
