//! What every runtime must do, whatever it runs.

use std::time::Duration;

use nexus_compute::{ExecIo, Observed, Runtime, RuntimeError, Sandbox, State};
use nexus_model::{Digest, Uid};

/// A runtime under test, and what it can run.
pub trait Subject {
    fn runtime(&self) -> &dyn Runtime;
    /// Another one over the same folder and keeper, as after a restart of the agent.
    fn reopened(&self) -> Box<dyn Runtime>;
    /// Something that runs until it is told to stop, with a uid of its own.
    fn lasting(&self) -> Sandbox;
    fn has_exec(&self) -> bool;
}

pub const PATIENCE: Duration = Duration::from_secs(60);

pub async fn state(runtime: &dyn Runtime, uid: Uid) -> Option<Observed> {
    runtime.observe().await.unwrap().into_iter().find(|o| o.uid == uid)
}

/// Waits until an instance has ended, and tells how.
pub async fn ended(runtime: &dyn Runtime, uid: Uid) -> (Option<i32>, String) {
    let wait = async {
        loop {
            match state(runtime, uid).await {
                Some(Observed { state: State::Exited { code, message, .. }, .. }) => return (code, message),
                Some(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                None => panic!("{uid} is gone"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it ends in time")
}

pub async fn a_started_instance_is_observed_and_starts_once(subject: &dyn Subject) {
    let (runtime, sandbox) = (subject.runtime(), subject.lasting());
    runtime.start(&sandbox).await.unwrap();
    let first = state(runtime, sandbox.uid).await.expect("it is there");
    assert_eq!(first.epoch, sandbox.epoch);
    assert!(matches!(first.state, State::Running { .. }), "{first:?}");
    runtime.start(&sandbox).await.unwrap();
    assert_eq!(state(runtime, sandbox.uid).await, Some(first));
    runtime.remove(sandbox.uid).await.unwrap();
}

pub async fn a_stopped_instance_ends_and_stays_until_removed(subject: &dyn Subject) {
    let (runtime, sandbox) = (subject.runtime(), subject.lasting());
    runtime.start(&sandbox).await.unwrap();
    // Asked again and again, because a program that has just begun may not heed signals yet.
    let asking = async {
        loop {
            runtime.stop(sandbox.uid).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        _ = ended(runtime, sandbox.uid) => {}
        () = asking => {}
    }
    runtime.stop(sandbox.uid).await.unwrap();
    // A late repetition of the start does not run it twice.
    runtime.start(&sandbox).await.unwrap();
    ended(runtime, sandbox.uid).await;
    runtime.remove(sandbox.uid).await.unwrap();
    assert_eq!(state(runtime, sandbox.uid).await, None);
}

pub async fn a_removed_instance_is_gone_and_removing_repeats(subject: &dyn Subject) {
    let (runtime, sandbox) = (subject.runtime(), subject.lasting());
    runtime.start(&sandbox).await.unwrap();
    for _ in 0..2 {
        runtime.remove(sandbox.uid).await.unwrap();
        assert_eq!(state(runtime, sandbox.uid).await, None);
    }
    runtime.stop(sandbox.uid).await.unwrap();
}

pub async fn a_restart_is_a_remove_and_a_start(subject: &dyn Subject) {
    let (runtime, mut sandbox) = (subject.runtime(), subject.lasting());
    for epoch in 1..=3 {
        sandbox.epoch = epoch;
        runtime.start(&sandbox).await.unwrap();
        let observed = state(runtime, sandbox.uid).await.expect("it is there");
        assert_eq!(observed.epoch, epoch);
        assert!(matches!(observed.state, State::Running { .. }), "{observed:?}");
        runtime.remove(sandbox.uid).await.unwrap();
    }
}

pub async fn a_restarted_agent_finds_what_runs(subject: &dyn Subject) {
    let (runtime, sandbox) = (subject.runtime(), subject.lasting());
    runtime.start(&sandbox).await.unwrap();
    let before = state(runtime, sandbox.uid).await;
    let reopened = subject.reopened();
    assert_eq!(state(&*reopened, sandbox.uid).await, before);
    reopened.start(&sandbox).await.unwrap();
    assert_eq!(state(&*reopened, sandbox.uid).await, before);
    reopened.remove(sandbox.uid).await.unwrap();
    assert_eq!(state(runtime, sandbox.uid).await, None);
}

pub async fn many_start_at_once(subject: &dyn Subject) {
    let runtime = subject.runtime();
    let sandboxes: Vec<Sandbox> = (0..6).map(|_| subject.lasting()).collect();
    let starts = sandboxes.iter().flat_map(|s| [runtime.start(s), runtime.start(s)]);
    for started in futures::future::join_all(starts).await {
        started.unwrap();
    }
    for sandbox in &sandboxes {
        let observed = state(runtime, sandbox.uid).await.expect("it is there");
        assert!(matches!(observed.state, State::Running { .. }), "{observed:?}");
    }
    let removes = sandboxes.iter().map(|s| runtime.remove(s.uid));
    for removed in futures::future::join_all(removes).await {
        removed.unwrap();
    }
    assert_eq!(runtime.observe().await.unwrap(), []);
}

pub async fn an_image_is_prepared_as_often_as_asked(subject: &dyn Subject) {
    let sandbox = subject.lasting();
    let runtime = subject.runtime();
    let (first, second) = tokio::join!(runtime.prepare(sandbox.image), runtime.prepare(sandbox.image));
    first.and(second).unwrap();
    let missing = Digest::of(b"an image that nobody has");
    let error = runtime.prepare(missing).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Image { image, .. } if image == missing), "{error}");
}

pub async fn exec_needs_a_running_instance(subject: &dyn Subject) {
    let null = || std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap().into();
    let io = ExecIo { stdin: null(), stdout: null(), stderr: null() };
    let uid = subject.lasting().uid;
    let error = subject.runtime().exec(uid, &["true".into()], io, PATIENCE).await.unwrap_err();
    match subject.has_exec() {
        true => assert!(matches!(error, RuntimeError::NotRunning(u) if u == uid), "{error}"),
        false => assert!(matches!(error, RuntimeError::Unsupported(_)), "{error}"),
    }
}

/// Runs all of the above.
pub async fn all(subject: &dyn Subject) {
    a_started_instance_is_observed_and_starts_once(subject).await;
    a_stopped_instance_ends_and_stays_until_removed(subject).await;
    a_removed_instance_is_gone_and_removing_repeats(subject).await;
    a_restart_is_a_remove_and_a_start(subject).await;
    a_restarted_agent_finds_what_runs(subject).await;
    many_start_at_once(subject).await;
    an_image_is_prepared_as_often_as_asked(subject).await;
    exec_needs_a_running_instance(subject).await;
}
