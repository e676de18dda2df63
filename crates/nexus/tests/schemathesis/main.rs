//! The API keeps what its own description promises: schemathesis (PyPI) reads `/v1/openapi.json` of a running cloud and
//! sends requests made from it, valid and invalid, with all of its checks. None may fail, and every operation must have
//! succeeded at least once. Needs root, and what `cargo xtask test` installs.
//!
//! `schemathesis.toml` says how it runs and which statuses a schema can't foresee; `hooks.py` gives the requests real names.

#[expect(dead_code, reason = "the end-to-end tests need more of it")]
#[path = "../e2e/cloud.rs"]
mod cloud;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cloud::{Cloud, wait_for};
use serde_json::{Value, json};

/// One release, so that a newer one with more checks is a change of ours and not a surprise.
const SCHEMATHESIS: &str = "schemathesis==4.32.5";
/// Far more than the run takes: what ends a run that hangs.
const PATIENCE: Duration = Duration::from_secs(3_600);
/// The host that is dead during the run, so that it may be deleted.
const DEAD_HOST: &str = "zone-a-2";

fn run(command: &mut Command) {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    assert!(output.status.success(), "{shown}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The folder that cargo builds into, from where this program is: `TARGET/PROFILE/deps/PROGRAM`.
fn target_dir() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.ancestors().nth(3).expect("cargo puts tests three folders deep").to_owned()
}

/// The program, installed where `cargo xtask test` keeps Python's tools if it is not there yet.
fn schemathesis() -> PathBuf {
    let venv = target_dir().join("python");
    let (program, pip) = (venv.join("bin/schemathesis"), venv.join("bin/pip"));
    if !pip.is_file() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
    }
    // Asks no registry when that very release is there.
    run(Command::new(pip).args(["install", "--quiet", "--disable-pip-version-check", SCHEMATHESIS]));
    program
}

/// An image with nothing in it but busybox.
fn busybox(dir: &Path) -> PathBuf {
    let (layout, bundle) = (dir.join("busybox"), dir.join("bundle"));
    let image = format!("{}:latest", layout.display());
    let umoci = || Command::new("umoci");
    run(umoci().args(["init", "--layout"]).arg(&layout));
    run(umoci().args(["new", "--image", &image]));
    run(umoci().args(["unpack", "--image", &image]).arg(&bundle));
    let bin = bundle.join("rootfs/bin");
    std::fs::create_dir_all(&bin).unwrap();
    std::fs::copy("/usr/bin/busybox", bin.join("busybox")).unwrap();
    run(umoci().args(["repack", "--image", &image]).arg(&bundle));
    run(umoci().args(["config", "--image", &image, "--config.cmd", "/bin/busybox"]));
    layout
}

/// An app that speaks once a second.
fn ticker(name: &str) -> Value {
    json!({
        "apiVersion": "cloudnexus/v1", "kind": "App", "metadata": {"name": name},
        "spec": {
            "image": "busybox", "resources": {"cpu": "10m", "memory": "16Mi"}, "stopSignal": "KILL",
            "command": ["/bin/busybox", "sh", "-c", "while :; do echo tick; /bin/busybox sleep 1; done"],
        },
    })
}

/// Runs it to its end; answers whether it succeeded. Its output goes to this test's.
fn finish(command: &mut Command) -> bool {
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("schemathesis took longer than {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The description that the running cloud gives of itself.
fn description(api: &str) -> Value {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let text = runtime.block_on(async {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        client.get(format!("{api}/v1/openapi.json")).send().await.unwrap().text().await.unwrap()
    });
    serde_json::from_str(&text).unwrap()
}

/// What needs a machine that joins, or takes one away: see `schemathesis.toml`.
const OF_MACHINES: [&str; 9] = [
    "server-join",
    "host-join",
    "gateway-join",
    "server-remove",
    "server-replace",
    "host-leave",
    "rebalance",
    "token-revoke",
    "region-remove",
];

/// What takes the cloud's own words, or a password; or goes on for ever.
const OF_WORDS: [&str; 9] = [
    "/oauth2/token",
    "/v1/can",
    ":set-password",
    ":enroll-totp",
    ":confirm-totp",
    "/blobs:pull",
    ":trace",
    ":capture",
    ":flows",
];

/// `GET /v1/regions` and so on, as schemathesis labels them. All but `:exec`, whose success is a WebSocket, what is done
/// to machines, and what takes the cloud's own words.
fn operations(document: &Value) -> BTreeSet<String> {
    let paths = document["paths"].as_object().unwrap().iter().filter(|(path, _)| {
        let of_machines = |name: &&str| path.strip_prefix("/v1/operations/") == Some(*name);
        let of_words = OF_WORDS.iter().any(|end| path.ends_with(end));
        !path.ends_with(":exec") && !of_words && !OF_MACHINES.iter().any(of_machines)
    });
    let all = paths.flat_map(|(path, methods)| {
        methods.as_object().unwrap().keys().map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    all.collect()
}

/// A fleet's only region is never let go; the end-to-end test of regions deletes one.
const LAST_REGION: &str = "DELETE /v1/regions/{name}";
/// Nobody's data are in the log of a run whose user is the operator.
const FORGET: &str = "POST /v1/regions/{region}/audit/forget";

#[test]
fn the_api_keeps_what_its_description_promises() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let program = schemathesis();
    let files = tempfile::tempdir().unwrap();
    let layout = busybox(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "2"]);
    cloud.ok(&["local", "kill", DEAD_HOST]);
    cloud.wait("the killed host to be missed", || {
        let hosts = cloud.list("hosts");
        let dead = hosts.iter().find(|h| h["metadata"]["name"] == DEAD_HOST).ok_or("it never joined")?;
        let missed = matches!(dead["status"]["state"].as_str(), Some("suspect" | "dead"));
        if missed { Ok(()) } else { Err(dead["status"].to_string()) }
    });
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "busybox"]);
    for app in ["st-app", "st-victim"] {
        let path = cloud.path(&format!("{app}.json"));
        std::fs::write(&path, ticker(app).to_string()).unwrap();
        cloud.ok(&["apply", "-f", path.to_str().unwrap()]);
    }
    cloud.wait_ready("st-app", 1);
    cloud.wait_ready("st-victim", 1);

    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemathesis");
    let report = cloud.path("statuses.json");
    let api = format!("http://127.0.0.1:{}", cloud.api_port + 10);
    let token = std::fs::read_to_string(cloud.data_dir().join("token")).unwrap().trim().to_owned();
    let document = description(&api);
    // From a file: schemathesis leaves out the operation that it has the description from.
    let described = cloud.path("openapi.json");
    std::fs::write(&described, document.to_string()).unwrap();
    let mut command = Command::new(program);
    command.arg("--config-file").arg(here.join("schemathesis.toml"));
    command.arg("run").arg(&described).args(["--url", &api, "--checks", "all"]);
    command.args(["--header", &format!("Authorization: Bearer {token}")]);
    command.env("SCHEMATHESIS_HOOKS", here.join("hooks.py")).current_dir(files.path());
    command.env("NEXUS_ST_API", &api).env("NEXUS_ST_TOKEN", &token).env("NEXUS_ST_REPORT", &report);
    command.env("NEXUS_ST_APP", "st-app").env("NEXUS_ST_DEAD_HOST", DEAD_HOST);
    let passed = finish(&mut command);

    let counts = wait_for("the counts of statuses", Duration::from_secs(5), || {
        std::fs::read(&report).map_err(|e| e.to_string())
    });
    let counts: BTreeMap<String, BTreeMap<u16, u64>> = serde_json::from_slice(&counts).unwrap();
    let succeeded = |operation: &String| {
        counts.get(operation).is_some_and(|statuses| statuses.keys().any(|status| (200..300).contains(status)))
    };
    let all = operations(&document);
    let possible = |operation: &&String| ![LAST_REGION, FORGET].contains(&operation.as_str());
    let never: Vec<_> = all.iter().filter(possible).filter(|o| !succeeded(o)).map(|o| (o, counts.get(o))).collect();
    assert!(never.is_empty(), "{} of {} operations never succeeded: {never:#?}", never.len(), all.len());
    assert!(passed, "schemathesis found faults; its own words are above");
    cloud.down();
}
