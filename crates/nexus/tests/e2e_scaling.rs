//! Autoscaling with the real binary: load brings instances and its end takes them away, a container and a function sleep and wake
//! for a request that is held until they are there, and the guide's commands. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;
#[allow(dead_code)]
#[path = "e2e/load.rs"]
mod load;

use std::ffi::OsStr;

use std::time::Duration;

use cloud::Cloud;
use load::Load;
use serde_json::Value;

fn app(cloud: &Cloud, name: &str) -> Value {
    cloud.json(&["get", "app", name])
}

fn reasons(cloud: &Cloud, name: &str) -> Vec<String> {
    let of = cloud.json(&["events", "--for", &format!("app/{name}")]);
    let items = of["items"].as_array().cloned().unwrap_or_default();
    items.iter().filter_map(|e| e["spec"]["reason"].as_str().map(str::to_owned)).collect()
}

/// One GET by a gateway, with as much patience as a user who knows that the app sleeps.
fn get(gateway: &str, host: &str) -> (u16, String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(90)).build().unwrap();
        let answer = client.get(gateway).header("host", host).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap_or_default())
    })
}

fn sleeps(cloud: &Cloud, name: &str) {
    cloud.wait(&format!("{name} to sleep"), || {
        let app = app(cloud, name);
        let left = cloud.instances(name).len();
        if app["status"]["phase"] == "Stopped" && left == 0 {
            Ok(())
        } else {
            Err(format!("{left}: {}", app["status"]))
        }
    });
}

#[test]
fn load_brings_instances_idleness_takes_them_away_and_a_request_wakes_what_sleeps() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::busybox(files.path());
    let component = images::hello_function(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "2"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "web"]);

    rustls::crypto::ring::default_provider().install_default().ok();

    // Out under load, in without it; no request is lost on the way.
    cloud.ok(&["deploy", "web", "--replicas", "auto"]);
    let deployed = app(&cloud, "web");
    assert_eq!(deployed["spec"]["autoscale"]["strategy"], "predictive");
    let target = ["autoscale", "set", "web", "--strategy", "target", "--max", "3", "--requests", "20"];
    cloud.ok(&[&target[..], &["--stabilization", "5"]].concat());
    cloud.wait("the app to be reached", || match get(&cloud.gateway(0), "web.localhost") {
        (200, _) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    // Fifty requests a second.
    let load = Load::start([cloud.gateway(0)], "web.localhost");
    cloud.wait_ready("web", 3);
    load.check("scaled out");
    let (_, refused) = cloud.fails(&["scale", "web", "--replicas", "1"]);
    assert!(refused.contains("nexus autoscale set web"), "{refused}");
    load.finish();
    cloud.wait_ready("web", 1);
    let told = reasons(&cloud, "web");
    assert!(told.iter().any(|r| r == "ScaledOut") && told.iter().any(|r| r == "ScaledIn"), "{told:?}");
    let status = cloud.ok(&["autoscale", "status", "web"]);
    assert!(status.contains("1 wanted") && status.contains("requests a second"), "{status}");
    assert_eq!(app(&cloud, "web")["spec"]["replicas"], 1, "the spec is the user's");

    // To nothing, and back for the first who asks.
    cloud.ok(&["autoscale", "set", "web", "--min", "0", "--idle", "3"]);
    sleeps(&cloud, "web");
    assert_eq!(get(&cloud.gateway(0), "web.localhost"), (200, images::PAGE.to_owned()));
    assert!(reasons(&cloud, "web").iter().any(|r| r == "Woken"));

    cloud.ok(&["image", "import", component.to_str().unwrap(), "--name", "hello"]);
    cloud.ok(&["deploy", "hello", "--no-wait"]);
    cloud.ok(&["autoscale", "set", "hello", "--min", "0", "--max", "2", "--idle", "3"]);
    sleeps(&cloud, "hello");
    let waiters: Vec<_> = (0..5)
        .map(|_| {
            let gateway = cloud.gateway(0);
            std::thread::spawn(move || get(&gateway, "hello.localhost").0)
        })
        .collect();
    let answers: Vec<u16> = waiters.into_iter().map(|w| w.join().unwrap()).collect();
    assert_eq!(answers, [200; 5]);

    by_processor_time(&cloud);
    the_guide_is_followed(&cloud);
    cloud.down();
}

/// What hosts measure of their containers' processor time decides too.
fn by_processor_time(cloud: &Cloud) {
    let busy = ["--command", "/bin/busybox", "sh", "-c", "/bin/busybox httpd -p [::]:80 -h /srv; while :; do :; done"];
    cloud.ok(&[&["deploy", "busy", "--image", "web", "--cpu", "100m"][..], &busy].concat());
    cloud.ok(&["autoscale", "set", "busy", "--strategy", "target", "--max", "2", "--cpu", "50"]);
    cloud.wait_ready("busy", 2);
    let why = app(cloud, "busy")["status"]["autoscale"]["reason"].to_string();
    assert!(why.contains("processors in use"), "{why}");
    cloud.ok(&["delete", "app", "busy", "--wait"]);
}

fn the_guide_is_followed(cloud: &Cloud) {
    let rows: Vec<String> = (0..2016).map(|i| format!("{:.2}", 40.0 + 30.0 * (f64::from(i) / 45.8).sin())).collect();
    std::fs::write(cloud.path("load.csv"), format!("cpu\n{}\n", rows.join("\n"))).unwrap();
    let context: Value = serde_json::from_slice(&std::fs::read(cloud.path("context.json")).unwrap()).unwrap();
    let of = |key: &str| context[key].as_str().unwrap().to_owned();
    let (api, token) = (context["endpoints"][0].as_str().unwrap(), std::fs::read_to_string(of("tokenFile")).unwrap());
    let variables: [(&str, &dyn AsRef<OsStr>); 3] = [("API", &api), ("CA", &of("ca")), ("CNX_TOKEN", &token.trim())];
    guide::follow(&cloud.path(""), "scaling.md", 5, &variables, |_, _| {});
    let scaled = app(cloud, "web");
    assert_eq!(scaled["spec"]["autoscale"]["strategy"], "predictive", "by the API's POST");
    assert_eq!(scaled["spec"]["autoscale"]["maxReplicas"], 50);
    assert_eq!(scaled["spec"]["autoscale"]["target"]["cpuPercent"], 65);
}
