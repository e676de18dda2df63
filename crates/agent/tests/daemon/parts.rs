//! Init steps and sidecars as the daemon runs them: their order, their failures, and what a new life of the daemon repeats.

use nexus_model::kind::{Part, PartState};

use super::*;

fn part(text: &str) -> Part {
    serde_json::from_value(serde_json::json!({"name": text})).unwrap()
}

pub fn with_parts(n: u8, init: &[&str], sidecars: &[&str]) -> InstancePlan {
    let mut plan = instance(n, 1);
    plan.template.init = init.iter().map(|p| part(p)).collect();
    plan.template.sidecars = sidecars.iter().map(|p| part(p)).collect();
    plan
}

fn of(n: u8, part: &str) -> Uid {
    uid(n).part(part)
}

fn state(report: &InstanceReport, part: &str) -> (PartState, u32) {
    let found = report.parts.iter().find(|p| p.name == part).unwrap();
    (found.state, found.restarts)
}

#[tokio::test]
async fn parts_start_in_their_order_and_a_new_life_of_the_daemon_repeats_nothing() {
    let host = Host::new();
    let runtime = &host.runtime;
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [with_parts(1, &["a", "b"], &["c", "d"])]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    let report = plane.instance(uid(1), "waits for its step", |i| i.message == "init step a runs, 1 of 2").await;
    assert_eq!((report.phase, report.ready), (InstancePhase::Starting, false));
    assert_eq!((state(&report, "a"), state(&report, "b")), ((PartState::Running, 0), (PartState::Waiting, 0)));
    assert_eq!(runtime.starts.lock().unwrap().len(), 1);
    runtime.exit(of(1, "a"), 0);
    eventually("the second step to run", || runtime.runs(of(1, "b"))).await;
    // The first pause is too short to be told for certain.
    runtime.exit(of(1, "b"), 3);
    eventually("it to be tried again", || runtime.starts_of(of(1, "b")).len() == 2).await;
    eventually("it to run again", || runtime.runs(of(1, "b"))).await;
    runtime.exit(of(1, "b"), 3);
    let failed = plane.instance(uid(1), "its failure is told", |i| i.phase == InstancePhase::BackOff).await;
    assert!(failed.message.starts_with("init step b exited with 3; it is tried again"), "{failed:?}");
    eventually("it to be tried a third time", || runtime.starts_of(of(1, "b")).len() == 3).await;
    assert_eq!(runtime.starts_of(of(1, "c")).len(), 0);
    // The daemon's next life waits for the same run of the step.
    daemon.stop().await;
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.report.borrow_and_update();
    plane.instance(uid(1), "waits again", |i| i.message == "init step b runs, 2 of 2").await;
    runtime.exit(of(1, "b"), 0);
    let ready = plane.instance(uid(1), "is ready", |i| i.ready).await;
    assert_eq!(
        (state(&ready, "a").0, state(&ready, "b").0, state(&ready, "d").0),
        (PartState::Done, PartState::Done, PartState::Running)
    );
    let order: Vec<Uid> = runtime.starts.lock().unwrap().iter().map(|s| s.0).collect();
    assert_eq!(order, [of(1, "a"), of(1, "b"), of(1, "b"), of(1, "b"), of(1, "c"), of(1, "d"), uid(1)]);

    // A sidecar ends: it alone is started again. The main part ends: likewise.
    runtime.exit(of(1, "c"), 1);
    plane.instance(uid(1), "has a sidecar again", |i| i.ready && state(i, "c") == (PartState::Running, 1)).await;
    runtime.exit(uid(1), 1);
    plane.instance(uid(1), "runs again", |i| i.ready && i.restarts == 1).await;
    daemon.stop().await;
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.report.borrow_and_update();
    plane
        .instance(uid(1), "is known again", |i| i.ready && i.restarts == 0 && state(i, "c") == (PartState::Running, 0))
        .await;
    let count = |part: &str| runtime.starts_of(of(1, part)).len();
    assert_eq!((count("a"), count("b"), count("c"), count("d"), runtime.starts_of(uid(1)).len()), (1, 3, 2, 1, 2));

    // What the steps left is lost, as by the host's boot: all is done anew, and nothing is left that saw the folder of before.
    runtime.shares.lock().unwrap().clear();
    runtime.exit(uid(1), 1);
    eventually("the first step to run again", || runtime.runs(of(1, "a"))).await;
    assert!(!runtime.runs(of(1, "c")) && !runtime.runs(of(1, "d")));

    // Gone from the plan while its steps run.
    plane.plan.send_replace(plan(2, []));
    plane.report("it is gone", |r| r.applied == Some(2) && r.instances.is_empty()).await;
    assert!(runtime.rows.lock().unwrap().is_empty() && runtime.shares.lock().unwrap().is_empty());
    assert!(!host.dir.path().join("logs").join(uid(1).to_string()).exists());
    daemon.stop().await;
    plane.kill().await;
}

#[tokio::test]
async fn sidecars_are_stopped_after_the_main_part_and_half_made_parts_go_too() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    plane.plan.send_replace(plan(1, [with_parts(1, &[], &["c"]), with_parts(2, &["a"], &["c"])]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "is ready", |i| i.ready).await;
    eventually("a step to run", || host.runtime.runs(of(2, "a"))).await;
    daemon.stop().await;
    // A part of the second was cut off while it was made: nobody can tell whose it was.
    host.runtime.put(of(2, "c"), 0);
    host.runtime.exit(of(2, "c"), 1);
    // Left by an instance that no plan names any more.
    let stray = Observed {
        uid: of(9, "x"),
        epoch: 1,
        state: State::Running { since: Timestamp::from_millis(1) },
        part: Some(PartOf { instance: uid(9), name: name("x") }),
    };
    host.runtime.rows.lock().unwrap().insert(stray.uid, stray);
    host.runtime.shares.lock().unwrap().insert(uid(9), "old".into());
    let daemon = host.start(std::slice::from_ref(&plane.at));
    eventually("strays to be gone", || !host.runtime.shares.lock().unwrap().contains_key(&uid(9))).await;
    eventually("strays to be gone", || !host.runtime.rows.lock().unwrap().contains_key(&of(9, "x"))).await;
    plane.plan.send_replace(plan(2, []));
    plane.report("all gone", |r| r.applied == Some(2) && r.instances.is_empty()).await;
    assert!(host.runtime.rows.lock().unwrap().is_empty(), "{:?}", host.runtime.rows.lock().unwrap());
    let stops: Vec<Uid> = host.runtime.stops.lock().unwrap().clone();
    let at = |uid: Uid| stops.iter().position(|s| *s == uid).unwrap();
    assert!(at(uid(1)) < at(of(1, "c")), "{stops:?}");
    daemon.stop().await;
    plane.kill().await;
}

#[tokio::test]
async fn a_jobs_instance_ends_with_its_main_part_and_gives_up_a_step_that_fails() {
    let host = Host::new();
    let once = |plan: InstancePlan| InstancePlan { once: true, ..plan };
    host.runtime.refuse.lock().unwrap().extend([of(2, "a"), of(3, "c")]);
    let mut plane = plane(&host.pki, None).await;
    let (one, two, three) = (with_parts(1, &[], &["c"]), with_parts(2, &["a"], &[]), with_parts(3, &[], &["c"]));
    plane.plan.send_replace(plan(1, [once(one), once(two), once(three)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.ready).await;
    host.runtime.exit(uid(1), 0);
    let report = plane.instance(uid(1), "has ended", |i| i.phase == InstancePhase::Exited).await;
    assert_eq!((report.exit_code, state(&report, "c").0), (Some(0), PartState::Stopped));
    assert!(!host.runtime.runs(of(1, "c")) && !host.net.0.lock().unwrap().contains(&uid(1)));
    let report = plane.instance(uid(2), "is given up", |i| i.phase == InstancePhase::Exited).await;
    assert!(report.exit_code.is_none() && report.message.starts_with("init step a can't be started"), "{report:?}");
    assert_eq!(host.runtime.starts_of(of(2, "a")).len(), 5);
    let report = plane.instance(uid(3), "is given up too", |i| i.phase == InstancePhase::Exited).await;
    assert!(report.message.starts_with("sidecar c can't be started"), "{report:?}");
    assert!(host.runtime.starts_of(uid(3)).is_empty());
    daemon.stop().await;
    plane.kill().await;
}
