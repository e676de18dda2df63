//! Three regions under load: a region loses its instance, then the region that leads the global group is cut off from
//! the others and comes back, a fourth region joins and leaves, and last another joins and takes the place of one that
//! leaves for good. On the way the commands of `docs/guide/regions.md` are run, each where the cloud is as the guide has it,
//! and the logs of an app of all regions are followed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cloud::Cloud;
use crate::load::Load;
use crate::process::Process;
use crate::{get, guide, images};

const REGIONS: [&str; 3] = ["region-a", "region-b", "region-c"];
const FOURTH: &str = "region-d";
/// A name is not given twice.
const FIFTH: &str = "region-e";
/// The section of the guide whose commands run when a region joins.
const COMES_AND_GOES: &str = "Regions come and go";
/// An election and what follows it, on a machine that is busy with everything else in this test.
const PATIENCE: Duration = Duration::from_secs(60);

/// The number of a region.
fn number(region: &str) -> u16 {
    let position = REGIONS.iter().chain([&FOURTH, &FIFTH]).position(|r| *r == region);
    position.unwrap_or_else(|| panic!("{region} is no region")) as u16
}

impl Cloud {
    /// A region's gateway.
    fn region_gateway(&self, region: &str, n: u16) -> String {
        self.gateway(10 * number(region) + n)
    }

    /// What a gateway counts.
    fn gateway_metrics(&self, region: &str, n: u16) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.gateway_port + 100 + 10 * number(region) + n);
        get(&url, "localhost").map(|(_, text)| text).unwrap_or_default()
    }

    /// Runs a command by way of one region's server alone.
    fn run_at(&self, region: &str, args: &[&str]) -> Result<String, String> {
        let mut command = self.command(args);
        command.env("CNX_URL", format!("https://127.0.0.1:{}", self.api_port + 20 * number(region)));
        let output = command.output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{}\n{out}\n{err}", output.status)) }
    }

    fn json_at(&self, region: &str, args: &[&str]) -> Result<Value, String> {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        let text = self.run_at(region, &all)?;
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }

    /// Applies a manifest by way of one region's server.
    fn apply_at(&self, region: &str, name: &str, manifest: &str, args: &[&str]) -> Result<(), String> {
        let path = self.path(&format!("{name}.yaml"));
        std::fs::write(&path, manifest).unwrap();
        let mut all = vec!["apply", "-f", path.to_str().unwrap()];
        all.extend(args);
        self.run_at(region, &all).map(drop)
    }

    /// How many ready instances of an app a region has, as its own server says.
    fn ready_in(&self, region: &str, app: &str) -> Result<usize, String> {
        let list = self.json_at(region, &["get", "instances", "--region", region])?;
        let all = list["items"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().filter(|i| i["spec"]["app"] == app && i["status"]["ready"] == true).count())
    }

    fn wait_ready_in(&self, region: &str, app: &str, replicas: usize) {
        self.wait(&format!("{app} to have {replicas} ready instances in {region}"), || {
            match self.ready_in(region, app) {
                Ok(ready) if ready == replicas => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    /// Runs a block of the guide, on this cloud's ports instead of those of one that has the machine to itself.
    fn guided(&self, script: &str) {
        let mut script = script.to_owned();
        for port in [8000, 8001, 8010, 8011, 8020, 8021, 8100] {
            let own = format!("127.0.0.1:{}", self.gateway_port + port - 8000);
            script = script.replace(&format!("127.0.0.1:{port}"), &own);
        }
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("timeout");
        command.args(["240", "sh", "-euc", &script]).env("PATH", path).stdin(Stdio::null());
        command.env("NEXUS_CONFIG", self.path("context.json")).env("HOME", self.path(""));
        command.env_remove("CNX_URL").env_remove("CNX_TOKEN").current_dir(self.path(""));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{script}\n{output:?}");
    }

    /// The global group, as a region's server sees it.
    fn global_group(&self, region: &str) -> Result<Value, String> {
        let status = self.json_at(region, &["status"])?;
        let groups = status["groups"].as_array().cloned().unwrap_or_default();
        groups.into_iter().find(|g| g["group"] == "global").ok_or_else(|| status.to_string())
    }

    /// Waits until exactly these regions vote in the global group, and these read along.
    fn wait_votes(&self, voters: &[&str], learners: &[&str]) {
        let nodes = |regions: &[&str]| regions.iter().map(|r| 100 * u64::from(number(r)) + 1).collect::<Vec<_>>();
        self.wait(&format!("{voters:?} to vote and {learners:?} to read along"), || {
            let group = self.global_group(REGIONS[0])?;
            let members = group["members"].as_array().cloned().unwrap_or_default();
            let of = |voter: bool| {
                members.iter().filter(|m| m["voter"] == voter).filter_map(|m| m["node"].as_u64()).collect::<Vec<_>>()
            };
            if (of(true), of(false)) == (nodes(voters), nodes(learners)) { Ok(()) } else { Err(group.to_string()) }
        });
    }

    /// The region that leads the global group.
    fn global_leader(&self) -> &'static str {
        self.wait("a leader of the global group", || {
            let global = self.global_group(REGIONS[0])?;
            // Node ids tell the region.
            let leader = global["leader"].as_u64().ok_or_else(|| global.to_string())?;
            Ok(REGIONS[usize::try_from(leader / 100).unwrap()])
        })
    }
}

fn project(name: &str) -> String {
    format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata:\n  name: {name}\nspec:\n  organization: default\n")
}

fn route(name: &str) -> String {
    let spec = format!("spec:\n  host: {name}.example.com\n  app: hello\n");
    format!("apiVersion: cloudnexus/v1\nkind: Route\nmetadata:\n  name: {name}\n{spec}")
}

#[test]
fn a_lost_region_stops_nobody_and_comes_back() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let files = tempfile::tempdir().unwrap();
    let component = images::hello_function(files.path());
    let cloud = Cloud::up(&["--regions", "3", "--hosts-per-zone", "1", "--timeout", "120"]);

    // One app for all regions, by way of any of them.
    let component = component.to_str().unwrap();
    let deploy = ["deploy", "hello", "--image", component, "--region", "global", "--replicas", "3", "--timeout", "90"];
    cloud.run_at("region-b", &deploy).unwrap();
    for region in REGIONS {
        cloud.wait_ready_in(region, "hello", 1);
        for n in 0..2 {
            let url = cloud.region_gateway(region, n);
            cloud.wait(&format!("{url} to serve"), || match get(&url, "hello.localhost") {
                Ok((200, body)) if body.starts_with("Hello") => Ok(()),
                other => Err(format!("{other:?}")),
            });
        }
    }
    let gateways: Vec<String> = REGIONS.iter().flat_map(|r| (0..2).map(|n| cloud.region_gateway(r, n))).collect();
    gateways_know_each_other(&cloud);
    the_guide_does_what_it_says(&cloud);
    let load = Load::start(gateways, "hello.localhost");
    a_region_without_instances_is_served_by_the_nearest(&cloud, &load);
    the_leading_region_is_cut_off(&cloud, &load);
    a_region_joins_and_leaves(&cloud, &load);
    load.finish();
    a_region_takes_the_place_of_one_that_leaves_for_good(&cloud);
    cloud.down();
}

fn gateways_know_each_other(cloud: &Cloud) {
    for region in REGIONS {
        for n in 0..2 {
            cloud.wait(&format!("gateway {n} of {region} to hear the others"), || {
                let text = cloud.gateway_metrics(region, n);
                let heard =
                    text.lines().filter(|l| l.starts_with("nexus_gateway_region_gateways{") && l.ends_with(" 2"));
                if heard.count() == 2 { Ok(()) } else { Err(text) }
            });
        }
    }
}

/// Runs the guide's commands up to where it loses a region; that one comes back. Its first one finds the cloud as it is.
fn the_guide_does_what_it_says(cloud: &Cloud) {
    // The guide's cloud is the machine's own; here, `nexus` means this one, whatever it is told.
    let (bin, real, data) = (cloud.path("bin"), env!("CARGO_BIN_EXE_nexus"), cloud.data_dir());
    std::fs::create_dir(&bin).unwrap();
    let own = format!("case $1 in up|down|local) set -- \"$@\" --data-dir '{}' ;; esac", data.display());
    std::fs::write(bin.join("nexus"), format!("#!/bin/sh -eu\n{own}\nexec {real} \"$@\"\n")).unwrap();
    std::fs::set_permissions(bin.join("nexus"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let page = images::busybox(&cloud.path(""));
    std::fs::write(cloud.path("project.yaml"), project("during-the-guide")).unwrap();
    let mut logs = None;
    for (heading, blocks) in guide::sections("regions.md", 5) {
        for guide::Block { place, script } in blocks.iter().filter(|_| heading != COMES_AND_GOES) {
            assert_eq!(*place, None, "this test has one machine");
            println!("{heading}: {script}");
            cloud.guided(&script.replace("./nginx.tar", page.to_str().unwrap()));
        }
        match heading.as_str() {
            "An app in all of them" => logs = Some(an_app_is_followed_in_all_regions(cloud)),
            "Losing a region" => {
                for region in REGIONS {
                    cloud.wait(&format!("{region} to know what was done without region-c"), || {
                        cloud.json_at(region, &["get", "project", "during-the-guide"]).map(drop)
                    });
                }
            }
            _ => {}
        }
    }
    let (mut logs, said) = logs.expect("the guide deploys an app");
    new_instances_are_followed(cloud, &said);
    assert!(logs.0.try_wait().unwrap().is_none(), "it follows until it is told to stop");
    cloud.ok(&["delete", "app", "web", "--region", "global"]);
    for region in REGIONS {
        cloud.wait_ready_in(region, "web", 0);
    }
}

/// The names of an app's instances in a region.
fn instances_in(cloud: &Cloud, region: &str, app: &str) -> Result<Vec<String>, String> {
    let list = cloud.json_at(region, &["get", "instances", "--region", region])?;
    let all = list["items"].as_array().cloned().unwrap_or_default();
    let mine = all.iter().filter(|i| i["spec"]["app"] == app);
    Ok(mine.filter_map(|i| Some(i["metadata"]["name"].as_str()?.to_owned())).collect())
}

/// Each request makes the instance that answers write a line, which must arrive under its name, from every region. Answers
/// what goes on following, and where it writes.
fn an_app_is_followed_in_all_regions(cloud: &Cloud) -> (Process, PathBuf) {
    let path = cloud.path("followed.log");
    let logs = Process::start(cloud.command(&["logs", "web", "-f", "--tail", "0", "--region", "global"]), path.clone());
    for region in REGIONS {
        cloud.wait_ready_in(region, "web", 2);
        everybody_is_heard(cloud, region, 2, &path);
    }
    (logs, path)
}

fn everybody_is_heard(cloud: &Cloud, region: &str, replicas: usize, said: &Path) {
    cloud.wait(&format!("the lines of {replicas} instances of {region}"), || {
        get(&cloud.region_gateway(region, 0), "web.localhost")?;
        let names = instances_in(cloud, region, "web")?;
        let text = std::fs::read_to_string(said).map_err(|e| e.to_string())?;
        let heard =
            |name: &String| text.lines().any(|l| l.starts_with(&format!("{name}  ")) && l.contains("response:200"));
        if names.len() == replicas && names.iter().all(heard) { Ok(()) } else { Err(format!("{names:?}: {text}")) }
    });
}

/// Instances that come later are followed too, also in a region that was away meanwhile.
fn new_instances_are_followed(cloud: &Cloud, said: &Path) {
    cloud.ok(&["scale", "web", "--region", "global", "--replicas", "9", "--timeout", "90"]);
    for region in REGIONS {
        everybody_is_heard(cloud, region, 3, said);
    }
}

fn a_region_without_instances_is_served_by_the_nearest(cloud: &Cloud, load: &Load) {
    cloud.ok(&["local", "kill", "region-b-zone-a-1"]);
    let passed_on = |n| {
        let text = cloud.gateway_metrics("region-b", n);
        let lines = text.lines().filter(|l| l.starts_with("nexus_gateway_region_requests") && l.contains("answered"));
        lines.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    for n in 0..2 {
        cloud.wait("requests to leave the region", || match passed_on(n) {
            0 => Err("none was passed on".to_owned()),
            _ => Ok(()),
        });
    }
    load.check("a region's only host was killed");
    cloud.ok(&["local", "start", "region-b-zone-a-1"]);
    cloud.wait_ready_in("region-b", "hello", 1);
    load.check("the host came back");
}

/// Sends global writes twice a second, each whatever becomes of those before, until one is taken; answers its name, and how long
/// after `started` that was.
fn first_write(cloud: &Cloud, region: &str, started: Instant) -> (String, Duration) {
    let (told, taken) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for n in 0.. {
            let (name, told) = (format!("during-{n}"), told.clone());
            scope.spawn(move || {
                let outcome = cloud.apply_at(region, &name, &project(&name), &[]);
                // Nobody listens any more once another was taken.
                told.send(outcome.map(|()| name)).ok();
            });
            let end = Instant::now() + Duration::from_millis(500);
            while let Ok(outcome) = taken.recv_timeout(end.saturating_duration_since(Instant::now())) {
                match outcome {
                    Ok(name) => return (name, started.elapsed()),
                    Err(why) => assert!(started.elapsed() < PATIENCE, "no global write without the lost region: {why}"),
                }
            }
            assert!(started.elapsed() < PATIENCE, "global writes hang without the lost region");
        }
        unreachable!("the loop ends by returning")
    })
}

fn the_leading_region_is_cut_off(cloud: &Cloud, load: &Load) {
    let lost = cloud.global_leader();
    let [here, there] = [1, 2].map(|k| REGIONS[(usize::from(number(lost)) + k) % 3]);
    cloud.ok(&["local", "cut", lost]);
    let cut = Instant::now();
    let (during, after) = first_write(cloud, here, cut);
    eprintln!("region lost -> global writes again: {after:?}");
    cloud.apply_at(there, "regional", &route("regional"), &["--region", there]).unwrap();
    cloud.run_at(there, &["scale", "hello", "--region", "global", "--replicas", "6", "--timeout", "1"]).ok();

    // The lost region takes writes of its own, answers from its copy of what all share, and says that it can't change it.
    cloud.apply_at(lost, "alone", &route("alone"), &["--region", lost]).unwrap();
    let refused = cloud.apply_at(lost, "refused", &project("refused"), &[]).unwrap_err();
    assert!(refused.contains("leader") || refused.contains("majority"), "{refused}");
    let url = cloud.region_gateway(lost, 0);
    assert_eq!(get(&url, "hello.localhost").map(|(status, _)| status), Ok(200));
    for region in [here, there] {
        cloud.wait_ready_in(region, "hello", 2);
    }
    assert_eq!(cloud.ready_in(lost, "hello"), Ok(1), "nobody could have told it");
    load.check("the leading region was cut off");

    cloud.ok(&["local", "heal", lost]);
    let healed = Instant::now();
    cloud.wait_ready_in(lost, "hello", 2);
    cloud.wait("the project to be known in the region that was lost", || {
        cloud.json_at(lost, &["get", "project", &during]).map(drop)
    });
    eprintln!("healed -> what was changed meanwhile is there: {:?}", healed.elapsed());
    cloud.apply_at(lost, "after", &project("after"), &[]).unwrap();
    cloud.wait("its own changes to be known elsewhere", || {
        cloud.json_at(here, &["get", "route", "alone", "--region", lost]).map(drop)
    });
    cloud.wait("the returned region to be counted again", || {
        let app = cloud.json_at(there, &["get", "app", "hello", "--region", "global"])?;
        if app["status"]["phase"] == "Ready" { Ok(()) } else { Err(app["status"].to_string()) }
    });
    load.check("the region came back");
}

fn a_region_joins_and_leaves(cloud: &Cloud, load: &Load) {
    cloud.start(&["--regions", "4", "--tier", "region-d=edge", "--timeout", "120"]);
    cloud.wait_ready_in(FOURTH, "hello", 1);
    cloud.wait_votes(&REGIONS, &[FOURTH]);
    the_copy_says_how_old_it_is(cloud, FOURTH);
    let deploy = ["deploy", "solo", "--image", "hello", "--region", FOURTH, "--timeout", "60"];
    cloud.run_at("region-a", &deploy).unwrap();
    let (code, refused) = cloud.fails(&["region", "remove", FOURTH]);
    assert!(code == 4 && refused.contains("default/solo"), "{code}: {refused}");
    cloud.ok(&["region", "remove", FOURTH, "--force"]);
    cloud.wait("three regions to run the app again", || {
        let app = cloud.json_at("region-a", &["get", "app", "hello", "--region", "global"])?;
        let regions = app["status"]["regions"].as_array().map_or(0, Vec::len);
        if regions == 3 && app["status"]["phase"] == "Ready" { Ok(()) } else { Err(app["status"].to_string()) }
    });
    let regions = cloud.list("regions");
    assert_eq!(regions.len(), 3, "{regions:#?}");
    assert!(!cloud.ok(&["local", "list"]).contains(FOURTH));
    load.check("a region joined and left");
}

fn the_copy_says_how_old_it_is(cloud: &Cloud, region: &str) {
    let token = std::fs::read_to_string(cloud.data_dir().join("token")).unwrap();
    let url = format!("http://127.0.0.1:{}/v1/projects?consistency=stale", cloud.api_port + 10 + 20 * number(region));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(reqwest::Client::new().get(url).bearer_auth(token.trim()).send()).unwrap();
    let age = answer.headers().get("x-cnx-stale-ms").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    assert!(age.is_some_and(|ms| ms < 60_000), "{answer:?}");
    assert!(cloud.global_group(region).unwrap()["stale_ms"].is_u64());
}

fn a_region_takes_the_place_of_one_that_leaves_for_good(cloud: &Cloud) {
    let [first, second, third] = REGIONS;
    let guide = guide::sections("regions.md", 5);
    let block = &guide.iter().find(|(heading, _)| heading == COMES_AND_GOES).expect("the guide's section").1[0];
    let Some((join, leave)) = block.script.split_once('\n') else { panic!("{}", block.script) };
    cloud.guided(&join.replace("--regions 4", "--regions 4 --timeout 120"));
    cloud.wait_ready_in(FIFTH, "hello", 1);
    // A fourth vote would help nobody.
    cloud.wait_votes(&REGIONS, &[FIFTH]);
    // The guide lets the newcomer go, this test another.
    assert!(leave.contains(FOURTH), "{leave}");
    cloud.guided(&leave.replace(FOURTH, third));
    cloud.wait_votes(&[first, second, FIFTH], &[]);
    cloud.wait("a global write by way of the newcomer", || cloud.apply_at(FIFTH, "five", &project("five"), &[]));
    let regions: Vec<String> =
        cloud.list("regions").iter().map(|r| r["metadata"]["name"].as_str().unwrap_or_default().to_owned()).collect();
    assert_eq!(regions, [first, second, FIFTH]);
}
