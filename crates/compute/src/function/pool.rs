//! The executors of a host: which of them is whose, and the one that stands by.
//!
//! An executor is started as nobody's: its process, engine, linker and the places of its guests are made before it is known whose
//! they will be. The first instance that it is given makes it its project's for good, and it refuses every other project itself.
//! One stands by, so that the next project that needs one waits for none of that; it is replaced once the start that took it is over.
//!
//! Which executors there are is the keeper's to say, and whose one is, its own: so an agent that was restarted goes on with what it
//! finds, the one that stands by included.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_model::{Name, Uid};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{Instant, sleep, timeout};

use super::agent::{GENERATION, blocking, host};
use super::client;
use super::control::{Reply, Request, Served};
use crate::RuntimeError;
use crate::keep::{Entry, Keep, Kept, KeptState, LogFiles, Spawn};

/// How long an executor may take until it answers for the first time.
const START: Duration = Duration::from_secs(10);

/// How long to wait before an executor that does not answer yet is asked again: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_millis(1);
const RETRY: Duration = Duration::from_millis(10);

/// How long one that runs may take to say whose it is; others wait meanwhile.
const WHOSE: Duration = Duration::from_secs(1);

/// How long one that was told to exit may take; its record is dropped later otherwise.
const EXIT: Duration = Duration::from_secs(2);

/// How long the start that took the one that stood by has the processors for itself.
const REST: Duration = Duration::from_millis(500);

/// The longest pause before another one is tried that is to stand by, when it can't be started.
const PAUSE: Duration = Duration::from_secs(60);

/// The first of executors' users: each that lives has one of its own, by its number.
const FIRST_USER: u32 = 200_000;

/// Who compiles.
pub(super) const COMPILE_USER: u32 = FIRST_USER - 1;

/// Executors at once, for their users' sake; the keeper keeps fewer.
const MOST: u32 = 65_536;

/// What an executor that this agent knows is for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    /// It stands by.
    Nobody,
    Project(Name),
}

pub(super) struct Pool {
    dir: PathBuf,
    exe: PathBuf,
    keep: Arc<dyn Keep>,
    /// By id, those of this generation.
    owners: Mutex<BTreeMap<String, Owner>>,
    /// Held while it is found out which executor a project gets, or one is started.
    choosing: AsyncMutex<()>,
    /// Somebody took the one that stood by, or saw that there is none.
    wanted: Notify,
}

impl Pool {
    pub fn new(dir: PathBuf, exe: PathBuf, keep: Arc<dyn Keep>) -> Self {
        Self { dir, exe, keep, owners: Mutex::default(), choosing: AsyncMutex::default(), wanted: Notify::new() }
    }

    fn owners(&self) -> MutexGuard<'_, BTreeMap<String, Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process that runs this program's `executor VERB`, and gives up its rights itself.
    pub fn command(&self, verb: &str, id: String, user: u32, more: &[&str]) -> Spawn {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut argv = vec![path(&self.exe), "executor".into(), verb.into(), "--user".into(), user.to_string()];
        argv.extend(["--root".into(), path(&self.dir.join("empty"))]);
        argv.extend(more.iter().map(|arg| (*arg).to_owned()));
        Spawn {
            id,
            entry: Entry::Process,
            argv,
            // Fewer arenas of the allocator: an idle executor is to be small.
            env: vec![("MALLOC_ARENA_MAX".into(), "2".into())],
            cwd: Some("/".into()),
            // It gives up its rights itself: see `confine`.
            user: None,
            netns: None,
            cgroups: Vec::new(),
            logs: None,
        }
    }

    pub async fn ask(&self, executor: &str, request: Request, fds: Vec<OwnedFd>) -> io::Result<Reply> {
        let (folder, name) = (self.dir.join("run"), executor.to_owned());
        blocking(move || client::ask(&folder, &name, &request, &fds)).await
    }

    pub async fn list(&self, executor: &str) -> io::Result<Vec<Served>> {
        match self.ask(executor, Request::List, Vec::new()).await? {
            Reply::Instances(list) => Ok(list),
            other => Err(unexpected(&other)),
        }
    }

    /// Every executor that the keeper knows, those of other generations too.
    pub async fn all(&self) -> Result<BTreeMap<String, Kept>, RuntimeError> {
        let kept = self.keep.list().await?;
        Ok(kept
            .into_iter()
            .filter(|kept| kept.id.starts_with("executor-"))
            .map(|kept| (kept.id.clone(), kept))
            .collect())
    }

    pub async fn runs(&self, id: &str) -> Result<bool, RuntimeError> {
        Ok(self.all().await?.get(id).is_some_and(is_running))
    }

    /// Whose an executor is; nobody's, if it stands by.
    pub async fn owner(&self, id: &str) -> io::Result<Option<Name>> {
        if let Some(project) = project_in(id) {
            return Ok(Some(project));
        }
        match self.owners().get(id) {
            Some(Owner::Nobody) => return Ok(None),
            Some(Owner::Project(project)) => return Ok(Some(project.clone())),
            None => {}
        }
        match self.ask(id, Request::Whose, Vec::new()).await? {
            Reply::Owner(owner) => Ok(owner),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether this agent knows that it serves nothing.
    pub fn stands_by(&self, id: &str) -> bool {
        self.owners().get(id) == Some(&Owner::Nobody)
    }

    fn has_idle(&self) -> bool {
        self.owners().values().any(|owner| *owner == Owner::Nobody)
    }

    fn of(&self, project: &Name) -> Option<String> {
        let wanted = Owner::Project(project.clone());
        self.owners().iter().find(|(_, owner)| **owner == wanted).map(|(id, _)| id.clone())
    }

    /// Makes the one that stands by a project's.
    fn take(&self, project: &Name) -> Option<String> {
        let mut owners = self.owners();
        let (id, owner) = owners.iter_mut().find(|(_, owner)| **owner == Owner::Nobody)?;
        *owner = Owner::Project(project.clone());
        Some(id.clone())
    }

    /// A project's executor, and what it serves. To be called for one project once at a time.
    pub async fn executor(&self, project: &Name) -> Result<(String, Vec<Served>), RuntimeError> {
        let deadline = Instant::now() + START;
        loop {
            let id = match self.of(project) {
                Some(id) => id,
                None => self.choose(project).await?,
            };
            let source = match self.list(&id).await {
                Ok(list) => return Ok((id, list)),
                Err(source) => source,
            };
            if !self.runs(&id).await? {
                tracing::warn!(executor = %id, error = %source, "an executor has ended");
                self.owners().remove(&id);
            } else if Instant::now() >= deadline {
                let attempt = format!("reaching the executor of project {project}");
                return Err(RuntimeError::Host { attempt, source });
            } else {
                sleep(RETRY).await;
            }
        }
    }

    /// The one that an earlier agent gave the project, the one that stands by, or a new one.
    async fn choose(&self, project: &Name) -> Result<String, RuntimeError> {
        let _alone = self.choosing.lock().await;
        if !self.has_idle() {
            self.adopt().await?;
        }
        if let Some(id) = self.of(project) {
            return Ok(id);
        }
        let taken = self.take(project);
        let id = match taken {
            Some(id) => id,
            None => self.begin(Owner::Project(project.clone())).await?,
        };
        self.wanted.notify_one();
        Ok(id)
    }

    /// Sees to it that the project has an executor, or that one stands by.
    pub async fn warm(&self, project: &Name) -> Result<(), RuntimeError> {
        if self.of(project).is_some() { Ok(()) } else { self.stand_by().await }
    }

    /// Sees to it that one stands by.
    pub async fn stand_by(&self) -> Result<(), RuntimeError> {
        let _alone = self.choosing.lock().await;
        self.adopt().await?;
        if !self.has_idle() {
            self.begin(Owner::Nobody).await?;
        }
        Ok(())
    }

    /// Forgets who has ended, and gets to know what an earlier agent, or a start that was cut off, has left. One that does not
    /// answer is looked at again. Only for who chooses.
    async fn adopt(&self) -> Result<(), RuntimeError> {
        let all = self.all().await?;
        self.owners().retain(|id, _| all.get(id).is_some_and(is_running));
        for (id, kept) in all {
            if !is_ours(&id) || !is_running(&kept) || self.owners().contains_key(&id) {
                continue;
            }
            match timeout(WHOSE, self.owner(&id)).await {
                Ok(Ok(None)) => drop(self.owners().insert(id, Owner::Nobody)),
                Ok(Ok(Some(project))) => drop(self.owners().insert(id, Owner::Project(project))),
                Ok(Err(error)) => tracing::debug!(executor = %id, %error, "whose an executor is can't be asked yet"),
                Err(_) => tracing::debug!(executor = %id, "an executor does not say whose it is"),
            }
        }
        Ok(())
    }

    /// Starts one, and waits until it answers. Whose it is is known from its first moment: the agent may end meanwhile.
    async fn begin(&self, owner: Owner) -> Result<String, RuntimeError> {
        let all = self.all().await?;
        let taken: Vec<u32> = all.keys().filter_map(|id| number_in(id)).collect();
        let number = (1..MOST).find(|n| !taken.contains(n)).ok_or_else(|| RuntimeError::Failed {
            attempt: "starting an executor".into(),
            message: "there are too many".into(),
        })?;
        let id = executor_id(number);
        let socket = self.dir.join("run").join(&id);
        let socket = socket.to_string_lossy().into_owned();
        let mut spawn = self.command("serve", id.clone(), FIRST_USER + number, &["--socket", &socket]);
        let dir = self.dir.join("logs").join(number.to_string());
        spawn.logs = Some(LogFiles { dir, max_bytes: 1 << 20, keep: 1 });
        self.owners().insert(id.clone(), owner);
        let begun = match self.keep.spawn(spawn).await {
            Ok(_) => self.answers(&id).await,
            Err(error) => Err(error.into()),
        };
        if begun.is_err() {
            self.owners().remove(&id);
        }
        begun.map(|()| id)
    }

    async fn answers(&self, id: &str) -> Result<(), RuntimeError> {
        let deadline = Instant::now() + START;
        let mut pause = RETRY_FIRST;
        loop {
            let Err(source) = self.list(id).await else { return Ok(()) };
            if pause == RETRY {
                let attempt = "starting an executor".to_owned();
                if Instant::now() >= deadline {
                    return Err(RuntimeError::Host { attempt, source });
                }
                if let Some(Kept { state: KeptState::Exited { code, message, .. }, .. }) = self.all().await?.get(id) {
                    let message = format!("it ended at once with status {code:?}: {message}");
                    self.keep.forget(id).await?;
                    return Err(RuntimeError::Failed { attempt, message });
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY);
        }
    }

    /// Ends an executor that has nothing left to serve, and forgets one that has ended.
    pub async fn retire(&self, id: &str) -> Result<(), RuntimeError> {
        let deadline = Instant::now() + EXIT;
        loop {
            match self.ask(id, Request::ExitIfIdle, Vec::new()).await {
                Ok(Reply::Done) => break,
                // One that is being started can't be asked yet.
                Err(_) if Instant::now() < deadline && self.runs(id).await? => sleep(RETRY).await,
                // It serves, it has ended, or it will be asked again by the next removal.
                _ => return Ok(()),
            }
        }
        self.owners().remove(id);
        while Instant::now() < deadline {
            match self.all().await?.get(id).map(|kept| &kept.state) {
                Some(KeptState::Running { .. }) => sleep(RETRY).await,
                Some(KeptState::Exited { .. }) => {
                    let forgotten = self.keep.forget(id).await;
                    let socket = self.dir.join("run").join(id);
                    // It would only be replaced by the next executor.
                    let _ = blocking(move || fs::remove_file(socket)).await;
                    return Ok(forgotten?);
                }
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Drops the keeper's records of executors that have ended, but for those that are needed.
    pub async fn forget_ended(&self, needed: impl Fn(&str) -> bool) -> Result<(), RuntimeError> {
        // Meanwhile nobody takes an id for another that is forgotten here.
        let _alone = self.choosing.lock().await;
        for (id, kept) in self.all().await? {
            if !is_running(&kept) {
                self.owners().remove(&id);
                if !needed(&id) {
                    self.keep.forget(&id).await?;
                }
            }
        }
        Ok(())
    }

    /// Asks for one to stand by, unless one does.
    pub fn ready_for_more(&self) {
        if !self.has_idle() {
            self.wanted.notify_one();
        }
    }

    /// Something has changed that [`Pool::upkeep`] goes by.
    pub fn poke(&self) {
        self.wanted.notify_one();
    }

    /// Asks for one to stand by, if none of those that run does.
    pub fn look(&self, all: &BTreeMap<String, Kept>) {
        let stands = |(id, owner): (&String, &Owner)| *owner == Owner::Nobody && all.get(id).is_some_and(is_running);
        if !self.owners().iter().any(stands) {
            self.wanted.notify_one();
        }
    }

    /// Whenever that may be needed, does what `tend` does. Runs until it is dropped.
    pub async fn upkeep<F: Future<Output = Result<(), RuntimeError>>>(&self, tend: impl Fn() -> F) {
        let mut pause = REST;
        loop {
            self.wanted.notified().await;
            sleep(pause).await;
            pause = match tend().await {
                Ok(()) => REST,
                Err(error) => {
                    tracing::warn!(%error, "no executor can stand by for functions");
                    self.wanted.notify_one();
                    (pause * 2).min(PAUSE)
                }
            };
        }
    }

    /// Ends those that stand by, but for so many.
    pub async fn dismiss(&self, but: usize) -> Result<(), RuntimeError> {
        let _alone = self.choosing.lock().await;
        self.adopt().await?;
        let idle: Vec<String> = {
            let owners = self.owners();
            owners.iter().filter(|(_, owner)| **owner == Owner::Nobody).map(|(id, _)| id.clone()).skip(but).collect()
        };
        for id in idle {
            self.retire(&id).await?;
        }
        Ok(())
    }
}

/// The user of an executor, who may write its instances' logs.
pub(super) fn user(executor: &str) -> u32 {
    FIRST_USER + number_in(executor).unwrap_or(0)
}

pub(super) fn is_running(kept: &Kept) -> bool {
    matches!(kept.state, KeptState::Running { .. })
}

/// No project's name has a `_`: see [`project_in`].
fn executor_id(number: u32) -> String {
    format!("executor-_{number}.{GENERATION}")
}

fn is_ours(id: &str) -> bool {
    number_in(id).is_some_and(|number| executor_id(number) == id)
}

fn number_in(id: &str) -> Option<u32> {
    id.strip_prefix("executor-_")?.split_once('.')?.0.parse().ok()
}

/// Earlier releases named an executor after its project.
fn project_in(id: &str) -> Option<Name> {
    id.strip_prefix("executor-")?.split_once('.')?.0.parse().ok()
}

fn unexpected(reply: &Reply) -> io::Error {
    io::Error::other(format!("an unexpected answer: {reply:?}"))
}

/// Asks an executor to do what has one right answer.
pub(super) fn expect_done(reply: io::Result<Reply>, uid: Uid) -> Result<(), RuntimeError> {
    match reply.map_err(host(format!("asking the executor of {uid}")))? {
        Reply::Done => Ok(()),
        Reply::Failed(message) => Err(RuntimeError::Failed { attempt: format!("removing {uid}"), message }),
        other => {
            let message = format!("an unexpected answer: {other:?}");
            Err(RuntimeError::Failed { attempt: format!("asking the executor of {uid}"), message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executors_of_earlier_releases_are_told_by_their_ids() {
        assert_eq!(project_in("executor-some-project.w48-1"), Some("some-project".parse().unwrap()));
        assert_eq!(project_in("executor-7.w48-1"), Some("7".parse().unwrap()));
        assert_eq!(project_in(&executor_id(7)), None);
        assert_eq!(number_in(&executor_id(7)), Some(7));
        assert_eq!(number_in("executor-7.w48-1"), None);
        assert!(is_ours(&executor_id(7)) && !is_ours("executor-_7.w47-1"));
        assert_eq!(user(&executor_id(7)), 200_007);
    }
}
