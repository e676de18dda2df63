//! An instance's init steps and sidecars.
//!
//! ```text
//! init steps, one after another, each to its end
//!   → sidecars in their order, each as soon as the one before it was started
//!     → the main part
//! ```
//!
//! What has succeeded is noted beside the instance's output, with the epoch and the shared folder that it was done in: a main part
//! that is started again, or an agent that is, does none of it twice. If that folder was lost, as by the host's boot, what stood in
//! it was too, and all is done anew. Each sidecar has a task of its own ([`Keeper`]), which starts it again when it ends, whatever
//! the main part does meanwhile. Sandboxes are found again by what the runtime says of them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_compute::{Observed, Runtime, State};
use nexus_env::{Disk, write_atomic};
use nexus_model::kind::{self, Part, PartState};
use nexus_model::plan::InstancePlan;
use nexus_model::{Name, Timestamp, Uid};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::board::Board;
use crate::health;
use crate::launch::{Launcher, folder, log_dir, part_plan};
use crate::observer::View;
use crate::secrets::Follower;
use crate::step::{Memory, Seen, Step, WELL_AFTER, Want, backoff, next_step};
use crate::worker::{FIRST_PROBE, Order, START_TRIES, Shared, again, ended};

/// What has been done of an instance on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Notes {
    epoch: u64,
    /// The shared folder's id.
    folder: String,
    /// Init steps that have succeeded.
    done: Vec<Name>,
}

fn notes_file(dir: &Path) -> PathBuf {
    dir.join("parts.json")
}

/// Blocks. Notes that can't be read are none: all is done anew.
fn load(disk: &dyn Disk, dir: &Path) -> io::Result<Notes> {
    let path = notes_file(dir);
    if !disk.exists(&path)? {
        return Ok(Notes::default());
    }
    Ok(serde_json::from_slice(&disk.read(&path)?).unwrap_or_default())
}

/// How far a sidecar has come, for those who wait for its start.
#[derive(Debug, Clone, Default)]
struct Progress {
    started: bool,
    /// Failed tries to start it.
    failures: u32,
    why: String,
}

/// What is to be done before the main part may start.
pub(crate) enum Next {
    /// Nothing: start it.
    Main,
    /// Look again: something was begun or cleared away.
    Again,
    /// Look again: an init step has succeeded.
    StepDone,
    /// Nothing until something changes; what is waited for.
    Wait(String),
    /// A try failed; the words say what.
    Failed(String),
    /// Likewise, and there were enough of them.
    GivenUp(String),
}

/// One instance's.
pub(crate) struct Parts {
    uid: Uid,
    launcher: Arc<Launcher>,
    board: Arc<Board>,
    orders: watch::Receiver<Order>,
    views: watch::Receiver<View>,
    notes: Option<Notes>,
    /// Those who keep the sidecars.
    keepers: JoinSet<()>,
    progress: BTreeMap<Name, watch::Receiver<Progress>>,
}

/// The state of a part in a view.
fn seen(view: &View, instance: Uid, part: &Name) -> Option<Observed> {
    view.parts.get(&instance)?.get(part).cloned()
}

/// How a part ended, as a clause that follows its name.
fn end_of(code: Option<i32>, message: String) -> String {
    match code {
        Some(code) if message.is_empty() || message == format!("exited with status {code}") => {
            format!("exited with {code}")
        }
        _ => ended(code, message),
    }
}

impl Parts {
    pub fn new(
        uid: Uid,
        launcher: Arc<Launcher>,
        board: Arc<Board>,
        orders: watch::Receiver<Order>,
        views: watch::Receiver<View>,
    ) -> Self {
        let (notes, keepers, progress) = (None, JoinSet::new(), BTreeMap::new());
        Self { uid, launcher, board, orders, views, notes, keepers, progress }
    }

    fn shared(&self) -> &Shared {
        &self.launcher.shared
    }

    fn runtime(&self) -> Option<Arc<dyn Runtime>> {
        self.shared().engines.runtimes.get(&kind::Runtime::Container).cloned()
    }

    fn log_dir(&self) -> PathBuf {
        log_dir(&self.shared().logs_dir, self.uid, None)
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.shared().env.now_millis())
    }

    /// Says what parts there are.
    pub fn announce(&self, plan: &InstancePlan) {
        self.board.parts(plan.template.parts().all().map(|(role, part)| (role, part.name.clone())));
    }

    /// Resolves when something changes that [`Parts::advance`] waits for.
    pub async fn changed(&mut self) {
        let waited = self.progress.values_mut().filter(|p| p.has_changed().is_ok() && !p.borrow().started);
        let waited: Vec<_> = waited.map(|p| Box::pin(p.changed())).collect();
        if waited.is_empty() {
            return std::future::pending().await;
        }
        let _ = futures::future::select_all(waited).await;
    }

    /// The next thing to do before the main part, which does not run. Can be cut off at any await.
    pub async fn advance(&mut self, plan: &Arc<InstancePlan>, identity: Option<PathBuf>) -> Next {
        if plan.template.parts().is_empty() {
            return Next::Main;
        }
        match self.try_advance(plan, identity).await {
            Ok(next) => next,
            Err(why) => Next::Failed(why),
        }
    }

    async fn try_advance(&mut self, plan: &Arc<InstancePlan>, identity: Option<PathBuf>) -> Result<Next, String> {
        let Some(runtime) = self.runtime() else { return Err("this host has no runtime for containers".into()) };
        let known = self.notes(plan, &*runtime).await?;
        for (i, step) in plan.template.init.iter().enumerate() {
            let is_done = known.done.contains(&step.name);
            let found = seen(&self.views.borrow_and_update(), self.uid, &step.name);
            match found {
                None if is_done => self.board.part(&step.name, |p| p.state = PartState::Done),
                None => {
                    self.board.part(&step.name, |p| p.state = PartState::Starting);
                    let begun = self.launcher.part(plan, step, identity).await;
                    let now = self.now();
                    match begun {
                        Ok(()) => self.board.part(&step.name, |p| {
                            (p.state, p.started, p.message) = (PartState::Running, Some(now), String::new());
                        }),
                        Err(why) => return Err(self.step_failed(step, None, &format!("can't be started: {why}"))),
                    }
                    self.shared().observer.look().await;
                    return Ok(Next::Again);
                }
                Some(Observed { state: State::Running { since }, .. }) => {
                    self.board.part(&step.name, |p| {
                        (p.state, p.started, p.message) = (PartState::Running, Some(since), String::new());
                    });
                    let of = plan.template.init.len();
                    return Ok(Next::Wait(format!("init step {} runs, {} of {of}", step.name, i + 1)));
                }
                Some(Observed { uid, state: State::Exited { code, message, .. }, .. }) => {
                    if code == Some(0) && !is_done {
                        // Before it is removed: what was done is not done again.
                        let mut notes = known.clone();
                        notes.done.push(step.name.clone());
                        self.save(notes).await?;
                    }
                    self.remove(&*runtime, [uid]).await?;
                    self.shared().observer.look().await;
                    if code == Some(0) || is_done {
                        self.board.part(&step.name, |p| {
                            (p.state, p.exit_code, p.message) = (PartState::Done, Some(0), String::new());
                        });
                        return Ok(Next::StepDone);
                    }
                    return Err(self.step_failed(step, code, &end_of(code, message)));
                }
            }
        }
        for part in &plan.template.sidecars {
            self.ensure(plan, part, &identity);
            let progress = self.progress[&part.name].borrow().clone();
            match progress {
                Progress { started: true, .. } => {}
                Progress { failures, why, .. } if plan.once && failures >= START_TRIES => {
                    return Ok(Next::GivenUp(format!("sidecar {} {why}", part.name)));
                }
                Progress { why, .. } if why.is_empty() => {
                    return Ok(Next::Wait(format!("sidecar {} is being started", part.name)));
                }
                Progress { why, .. } => {
                    return Ok(Next::Wait(format!("sidecar {} {why}; it is tried again", part.name)));
                }
            }
        }
        Ok(Next::Main)
    }

    /// Tells of an init step that failed, and answers the instance's own words for it.
    fn step_failed(&self, step: &Part, code: Option<i32>, why: &str) -> String {
        self.board.part(&step.name, |p| {
            (p.state, p.message) = (PartState::BackOff, why.to_owned());
            p.exit_code = code.or(p.exit_code);
            p.restarts = p.restarts.saturating_add(1);
        });
        format!("init step {} {why}", step.name)
    }

    /// What was done in the folder that is here now. If that is another than before, or the instance was placed anew, what is here
    /// of its parts goes first.
    async fn notes(&mut self, plan: &InstancePlan, runtime: &dyn Runtime) -> Result<Notes, String> {
        let known = match self.notes.clone() {
            Some(notes) => notes,
            None => {
                let (disk, dir) = (self.shared().env.disk.clone(), self.log_dir());
                let loaded = tokio::task::spawn_blocking(move || load(&*disk, &dir)).await;
                let loaded = loaded.map_err(io::Error::other).flatten();
                loaded.map_err(|e| format!("what was done of it can't be read: {e}"))?
            }
        };
        let made = folder(runtime, plan).await?;
        let id =
            |made: &Option<(nexus_compute::Shared, _)>| made.as_ref().map(|(f, _)| f.id.clone()).unwrap_or_default();
        if known.epoch == plan.epoch && known.folder == id(&made) {
            self.notes = Some(known.clone());
            return Ok(known);
        }
        self.clear(Some(plan), Duration::from_secs(plan.template.stop_grace_seconds.into())).await?;
        plan.template.parts().all().for_each(|(_, part)| self.board.part(&part.name, |p| p.state = PartState::Waiting));
        let fresh = Notes { epoch: plan.epoch, folder: id(&folder(runtime, plan).await?), done: Vec::new() };
        self.save(fresh.clone()).await?;
        Ok(fresh)
    }

    async fn save(&mut self, notes: Notes) -> Result<(), String> {
        let (disk, dir, kept) = (self.shared().env.disk.clone(), self.log_dir(), notes.clone());
        let saved = tokio::task::spawn_blocking(move || {
            disk.create_dir_all(&dir)?;
            write_atomic(&*disk, &notes_file(&dir), &serde_json::to_vec(&kept)?)
        });
        let saved = saved.await.map_err(io::Error::other).flatten();
        saved.map_err(|e| format!("what was done of it can't be noted: {e}"))?;
        self.notes = Some(notes);
        Ok(())
    }

    /// Sees to it that every sidecar is kept: the main part runs.
    pub fn keep_all(&mut self, plan: &Arc<InstancePlan>, identity: &Option<PathBuf>) {
        for step in &plan.template.init {
            self.board.part(&step.name, |p| p.state = PartState::Done);
        }
        plan.template.sidecars.iter().for_each(|part| self.ensure(plan, part, identity));
    }

    fn ensure(&mut self, plan: &Arc<InstancePlan>, part: &Part, identity: &Option<PathBuf>) {
        if self.progress.contains_key(&part.name) {
            return;
        }
        let (told, progress) = watch::channel(Progress::default());
        self.progress.insert(part.name.clone(), progress);
        let keeper = Keeper {
            launcher: self.launcher.clone(),
            board: self.board.clone(),
            orders: self.orders.clone(),
            views: self.views.clone(),
            plan: plan.clone(),
            part: part.clone(),
            identity: identity.clone(),
            memory: Memory::default(),
            running: None,
            told,
        };
        self.keepers.spawn(keeper.run());
    }

    /// Whether anything of parts may be here.
    fn is_concerned(&self, plan: Option<&InstancePlan>) -> bool {
        plan.is_none_or(|p| p.template.parts().folder().is_some()) || self.views.borrow().parts.contains_key(&self.uid)
    }

    /// Stops and removes all parts, after the main one, and their folder. Harmless when there are none.
    pub async fn clear(&mut self, plan: Option<&InstancePlan>, grace: Duration) -> Result<(), String> {
        if !self.is_concerned(plan) {
            return Ok(());
        }
        let Some(runtime) = self.runtime() else { return Ok(()) };
        self.keepers.shutdown().await;
        self.progress.clear();
        self.notes = None;
        // Also what a keeper was about to start when it was cut off.
        self.shared().observer.look().await;
        let running = |view: &View| -> Vec<(Name, Uid)> {
            let parts = view.parts.get(&self.uid).into_iter().flatten();
            let running = parts.filter(|(_, o)| matches!(o.state, State::Running { .. }));
            running.map(|(name, o)| (name.clone(), o.uid)).collect()
        };
        let mut views = self.views.clone();
        let alive = running(&views.borrow_and_update());
        for (name, uid) in &alive {
            self.board.part(name, |p| p.state = PartState::Stopping);
            if let Err(error) = runtime.stop(*uid).await {
                tracing::warn!(uid = %self.uid, part = %name, %error, "a part can't be asked to stop; it is killed");
            }
        }
        if !alive.is_empty() {
            // Whoever is left after the grace is killed by the removal.
            let _ = tokio::time::timeout(grace, views.wait_for(|view| running(view).is_empty())).await;
        }
        let mut all: Vec<Uid> = plan.iter().flat_map(|p| parts_of(p)).collect();
        all.extend(views.borrow_and_update().parts.get(&self.uid).into_iter().flatten().map(|(_, o)| o.uid));
        all.sort_unstable();
        all.dedup();
        self.remove(&*runtime, all).await?;
        runtime.unshare(self.uid).await.map_err(|e| e.to_string())?;
        self.board.parts_stopped();
        Ok(())
    }

    async fn remove(&self, runtime: &dyn Runtime, uids: impl IntoIterator<Item = Uid>) -> Result<(), String> {
        for uid in uids {
            runtime.remove(uid).await.map_err(|e| format!("a part can't be removed: {e}"))?;
            if let Some(secrets) = &self.shared().secrets {
                secrets.remove(uid).await?;
            }
        }
        Ok(())
    }
}

/// The ids of an instance's parts.
pub(crate) fn parts_of(plan: &InstancePlan) -> impl Iterator<Item = Uid> {
    plan.template.parts().all().map(|(_, part)| plan.uid.part(part.name.as_str()))
}

/// Keeps one sidecar running until it is dropped.
struct Keeper {
    launcher: Arc<Launcher>,
    board: Arc<Board>,
    orders: watch::Receiver<Order>,
    views: watch::Receiver<View>,
    plan: Arc<InstancePlan>,
    part: Part,
    identity: Option<PathBuf>,
    memory: Memory,
    /// Since when it was seen to run.
    running: Option<Duration>,
    told: watch::Sender<Progress>,
}

impl Keeper {
    fn shared(&self) -> &Shared {
        &self.launcher.shared
    }

    async fn run(mut self) {
        let Some(runtime) = self.shared().engines.runtimes.get(&kind::Runtime::Container).cloned() else { return };
        let uid = self.plan.uid.part(self.part.name.as_str());
        self.memory.grace = Duration::from_secs(self.plan.template.stop_grace_seconds.into());
        loop {
            let found = seen(&self.views.borrow_and_update(), self.plan.uid, &self.part.name);
            let (seen, state) = match found {
                None => (Seen::Nothing, None),
                Some(Observed { epoch, state, .. }) => match &state {
                    State::Running { .. } => (Seen::Running { epoch }, Some(state)),
                    State::Exited { .. } => (Seen::Exited { epoch }, Some(state)),
                },
            };
            let now = self.shared().env.monotonic();
            match next_step(Want::Running { epoch: self.plan.epoch }, seen, &self.memory, now) {
                Step::Start => self.start().await,
                Step::Watch => {
                    let since = match state {
                        Some(State::Running { since }) => Some(since),
                        _ => None,
                    };
                    self.watch(&*runtime, since).await;
                }
                Step::Wait(until) => self.wait(until.saturating_sub(now)).await,
                Step::Ask => {
                    self.memory.asked = Some(now);
                    let _ = runtime.stop(uid).await;
                }
                Step::Reset => {
                    let end = match state {
                        Some(State::Exited { code, message, .. }) => Some((code, message)),
                        _ => None,
                    };
                    self.reset(&*runtime, uid, end).await;
                }
                // Of what is wanted to run there is nothing else to do.
                Step::Settle | Step::Rest | Step::Clear | Step::Done => self.wait(Duration::from_secs(1)).await,
            }
        }
    }

    async fn wait(&mut self, pause: Duration) {
        tokio::select! {
            biased;
            _ = self.views.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    fn failed(&mut self, code: Option<i32>, why: &str) {
        self.memory.failures += 1;
        let pause = backoff(self.memory.failures);
        self.memory.not_before = self.shared().env.monotonic() + pause;
        let message = format!("{why}; it is tried again {}", again(pause));
        let failures = self.memory.failures;
        self.told.send_modify(|p| {
            if !p.started {
                (p.failures, p.why) = (failures, why.to_owned());
            }
        });
        self.board.part(&self.part.name, |p| {
            (p.state, p.message) = (PartState::BackOff, message);
            p.exit_code = code.or(p.exit_code);
        });
    }

    async fn start(&mut self) {
        self.board.part(&self.part.name, |p| p.state = PartState::Starting);
        match self.launcher.part(&self.plan, &self.part, self.identity.clone()).await {
            Ok(()) => {
                let now = Timestamp::from_millis(self.shared().env.now_millis());
                self.board.part(&self.part.name, |p| p.started = Some(now));
                tracing::info!(uid = %self.plan.uid, part = %self.part.name, "a sidecar was started");
            }
            Err(why) => {
                tracing::warn!(uid = %self.plan.uid, part = %self.part.name, reason = why, "a sidecar can't be started");
                self.failed(None, &format!("can't be started: {why}"));
            }
        }
        self.shared().observer.look().await;
    }

    async fn reset(&mut self, runtime: &dyn Runtime, uid: Uid, state: Option<(Option<i32>, String)>) {
        let ran = self.running.take().map(|since| self.shared().env.monotonic().saturating_sub(since));
        if ran.is_some_and(|ran| ran >= WELL_AFTER) {
            self.memory.failures = 0;
        }
        let (code, why) = match state {
            Some((code, message)) => (code, end_of(code, message)),
            None => (None, "was killed".to_owned()),
        };
        if let Err(error) = runtime.remove(uid).await {
            let message = format!("can't be removed: {error}");
            self.board.part(&self.part.name, |p| (p.state, p.message) = (PartState::Stopping, message));
            return tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.memory.asked = None;
        tracing::info!(uid = %self.plan.uid, part = %self.part.name, ?code, reason = why, "a sidecar has ended");
        self.board.part(&self.part.name, |p| p.restarts = p.restarts.saturating_add(1));
        self.failed(code, &why);
        self.shared().observer.look().await;
    }

    /// Keeps the files of its secrets at the versions of the newest plan.
    fn follow(&mut self) -> Option<Follower> {
        let newest = self.orders.borrow_and_update().plan.clone();
        let own = part_plan(newest.as_ref().unwrap_or(&self.plan), &self.part).ok()?;
        self.shared().secrets.as_ref()?.follow(self.plan.uid, &Arc::new(own))
    }

    /// Watches a running sidecar until it runs no more.
    async fn watch(&mut self, runtime: &dyn Runtime, since: Option<Timestamp>) {
        let begun = self.shared().env.monotonic();
        self.running.get_or_insert(begun);
        self.memory.asked = None;
        self.told.send_if_modified(|p| !std::mem::replace(&mut p.started, true));
        let check = self.part.readiness.clone();
        let mut ready = check.is_none();
        self.board.part(&self.part.name, |p| {
            (p.state, p.ready, p.started) = (PartState::Running, ready, since.or(p.started));
            p.message = if ready { String::new() } else { "is not ready yet".into() };
        });
        let Ok(own) = part_plan(&self.plan, &self.part) else { return self.wait(Duration::from_secs(1)).await };
        let mut _follower = self.follow();
        let (mut next, mut eager, mut failed) = (begun, FIRST_PROBE, 0);
        loop {
            let now = self.shared().env.monotonic();
            let pause = if check.is_some() { next.saturating_sub(now) } else { Duration::from_secs(3600) };
            let pause = if self.memory.failures > 0 { pause.min(WELL_AFTER) } else { pause };
            tokio::select! {
                biased;
                Ok(()) = self.orders.changed() => {
                    _follower = self.follow();
                    continue;
                }
                _ = self.views.changed() => {
                    let found = seen(&self.views.borrow_and_update(), self.plan.uid, &self.part.name);
                    if !found.is_some_and(|o| matches!(o.state, State::Running { .. })) {
                        return;
                    }
                    continue;
                }
                () = tokio::time::sleep(pause) => {}
            }
            let now = self.shared().env.monotonic();
            if now.saturating_sub(begun) >= WELL_AFTER {
                self.memory.failures = 0;
            }
            let Some(check) = check.as_ref().filter(|_| now >= next) else { continue };
            let limit = Duration::from_secs(check.timeout_seconds.into());
            match health::probe(&self.shared().env, runtime, &own, &check.probe, None, limit).await {
                Ok(()) => {
                    (ready, failed) = (true, 0);
                    self.board.part(&self.part.name, |p| (p.ready, p.message) = (true, String::new()));
                }
                Err(why) => {
                    failed += 1;
                    if !ready || failed >= check.failures {
                        ready = false;
                        let message = format!("is not ready: {why}");
                        self.board.part(&self.part.name, |p| (p.ready, p.message) = (false, message));
                    }
                }
            }
            let every = Duration::from_secs(check.interval_seconds.max(1).into());
            next = self.shared().env.monotonic() + if ready { every } else { eager.min(every) };
            eager = (eager * 2).min(Duration::from_secs(3600));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_in_few_words() {
        assert_eq!(end_of(Some(3), "exited with status 3".into()), "exited with 3");
        assert_eq!(end_of(Some(3), String::new()), "exited with 3");
        assert_eq!(end_of(Some(137), "killed: out of memory (limit 8Mi)".into()), "killed: out of memory (limit 8Mi)");
    }
}
