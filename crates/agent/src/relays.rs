//! The relays of PROXY listeners on this host: one process for each network that has such listeners and clients here.
//!
//! They are the keeper's, so an agent that ends or is replaced ends no connection. Every second, and when networks have changed, each
//! is asked whether it lives and told what it does not know yet; one that is gone or in a namespace that is no more is started anew.

use std::collections::BTreeMap;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_compute::keep::{Entry, Keep, Kept, KeptState, Spawn};
use nexus_model::Uid;
use nexus_model::plan::HostNetworks;
use nexus_network::vpc::relay::{RelayPlan, told};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A new process is asked so often before it counts as one that does not answer.
const ASKED: u32 = 20;
const BETWEEN: Duration = Duration::from_millis(50);
/// Looks in a row at which a process that runs does not answer: then it is ended.
const PATIENCE: u32 = 5;
const PREFIX: &str = "relay-";

/// Keeps the relays.
#[derive(Clone)]
pub struct Relays {
    inner: Arc<Inner>,
}

struct Inner {
    keep: Arc<dyn Keep>,
    /// This program, which is also the relay's.
    program: PathBuf,
    dir: PathBuf,
    /// How each was found last.
    known: Mutex<BTreeMap<Uid, Found>>,
}

/// Whether a relay does as it is to; else why not, and at how many looks in a row.
type Found = Result<(), (String, u32)>;

impl Relays {
    /// `dir` is for their sockets, and for nothing else.
    pub fn new(keep: Arc<dyn Keep>, program: PathBuf, dir: PathBuf) -> Self {
        Self { inner: Arc::new(Inner { keep, program, dir, known: Mutex::default() }) }
    }

    /// Runs until it is dropped. `namespace` says where a network's is.
    pub(crate) async fn run(
        &self,
        mut by: watch::Receiver<Option<Arc<HostNetworks>>>,
        namespace: impl Fn(Uid) -> PathBuf,
    ) {
        let mut any = true;
        loop {
            let told = by.borrow_and_update().clone();
            // As long as nothing was told, what an agent before this one has started stays.
            if let Some(told) = told {
                let wanted: BTreeMap<Uid, RelayPlan> =
                    told.networks.iter().filter_map(|n| Some((n.uid, RelayPlan::of(&told, n)?))).collect();
                // Without any nothing is asked, but once, for those of a former agent.
                if any || !wanted.is_empty() {
                    match self.inner.look(&wanted, &namespace).await {
                        Ok(left) => any = left || !wanted.is_empty(),
                        Err(error) => {
                            tracing::warn!(error, "relays of PROXY listeners can't be looked after");
                            let mut known = self.inner.known.lock().unwrap_or_else(PoisonError::into_inner);
                            *known = wanted.keys().map(|uid| (*uid, Err((error.clone(), 1)))).collect();
                        }
                    }
                }
            }
            tokio::select! {
                biased;
                changed = by.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// What is not as it should be, each in a sentence.
    pub(crate) fn differences(&self, told: &HostNetworks) -> Vec<String> {
        let known = self.inner.known.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = told.networks.iter().filter(|n| RelayPlan::of(told, n).is_some());
        let why = wanted.filter_map(|n| match known.get(&n.uid) {
            Some(Ok(())) => None,
            Some(Err((why, _))) => Some((n, why.as_str())),
            None => Some((n, "it has not been started yet")),
        });
        why.map(|(n, why)| format!("network {}/{}: the relay of its PROXY listeners: {why}", n.project, n.name))
            .collect()
    }
}

impl Inner {
    fn socket(&self, network: Uid) -> PathBuf {
        self.dir.join(network.to_string())
    }

    /// One look at all. Whether any is left that is not to be.
    async fn look(
        self: &Arc<Self>,
        wanted: &BTreeMap<Uid, RelayPlan>,
        namespace: &impl Fn(Uid) -> PathBuf,
    ) -> Result<bool, String> {
        let all = self.keep.list().await.map_err(|e| e.to_string())?;
        let ours = all.into_iter().filter_map(|kept| Some((kept.id.strip_prefix(PREFIX)?.parse::<Uid>().ok()?, kept)));
        let ours: BTreeMap<Uid, Kept> = ours.collect();
        let mut left = false;
        for (uid, kept) in ours.iter().filter(|(uid, _)| !wanted.contains_key(uid)) {
            left = true;
            self.end(*uid, kept).await?;
        }
        let before = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|uid, _| wanted.contains_key(uid));
            known.clone()
        };
        let mut each = JoinSet::new();
        for (uid, plan) in wanted {
            let (inner, uid, plan, kept, netns) =
                (self.clone(), *uid, plan.clone(), ours.get(uid).cloned(), namespace(*uid));
            let silent = match before.get(&uid) {
                Some(Err((_, looks))) => *looks,
                _ => 0,
            };
            each.spawn(async move { (uid, inner.one(uid, &plan, kept, &netns, silent).await) });
        }
        while let Some(done) = each.join_next().await {
            let Ok((uid, outcome)) = done else { continue };
            let outcome = match (outcome, before.get(&uid)) {
                (Ok(()), before) => {
                    if matches!(before, Some(Err(_))) {
                        tracing::info!(network = %uid, "the relay of PROXY listeners answers again");
                    }
                    Ok(())
                }
                (Err(why), Some(Err((_, looks)))) => Err((why, looks + 1)),
                (Err(why), _) => {
                    tracing::warn!(network = %uid, why, "a relay of PROXY listeners does not do as it is to");
                    Err((why, 1))
                }
            };
            self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, outcome);
        }
        Ok(left)
    }

    async fn end(&self, uid: Uid, kept: &Kept) -> Result<(), String> {
        let done = match &kept.state {
            KeptState::Running { .. } => self.keep.signal(&kept.id, nix::libc::SIGKILL).await,
            KeptState::Exited { .. } => {
                // One that is not there is gone.
                let _ = tokio::fs::remove_file(self.socket(uid)).await;
                self.keep.forget(&kept.id).await
            }
        };
        done.map_err(|e| e.to_string())
    }

    /// Sees to one relay: the error says what is wrong with it.
    async fn one(
        &self,
        uid: Uid,
        plan: &RelayPlan,
        kept: Option<Kept>,
        netns: &Path,
        silent: u32,
    ) -> Result<(), String> {
        let socket = self.socket(uid);
        let pid = match &kept {
            Some(Kept { state: KeptState::Running { pid, .. }, .. }) => Some(*pid),
            _ => None,
        };
        if let Some(pid) = pid {
            let lost = !is_in(pid, netns);
            if !lost {
                match told(&socket, plan).await {
                    Ok(state) if state.plan == plan.number() => return Ok(()),
                    Ok(_) if silent < PATIENCE => return Err("it can't do what it is told".to_owned()),
                    Err(error) if silent < PATIENCE => return Err(format!("it does not answer: {error}")),
                    _ => {}
                }
            }
            let id = format!("{PREFIX}{uid}");
            self.keep.signal(&id, nix::libc::SIGKILL).await.map_err(|e| e.to_string())?;
            return Err(
                if lost { "its namespace was another" } else { "it did not answer and is started anew" }.to_owned()
            );
        }
        let root = self.dir.join("root");
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&root);
        made.map_err(|e| format!("making {}: {e}", root.display()))?;
        let word = |path: &Path| path.to_string_lossy().into_owned();
        let spawn = Spawn {
            id: format!("{PREFIX}{uid}"),
            entry: Entry::Process,
            argv: vec![word(&self.program), "relay".into(), word(&socket), word(&root)],
            env: Vec::new(),
            cwd: None,
            user: None,
            netns: Some(netns.to_owned()),
            cgroups: Vec::new(),
            logs: None,
        };
        self.keep.spawn(spawn).await.map_err(|e| e.to_string())?;
        let mut last = String::new();
        for _ in 0..ASKED {
            match told(&socket, plan).await {
                Ok(state) if state.plan == plan.number() => return Ok(()),
                Ok(_) => "it can't do what it is told".clone_into(&mut last),
                Err(error) => last = format!("it does not answer: {error}"),
            }
            tokio::time::sleep(BETWEEN).await;
        }
        Err(last)
    }
}

/// Whether a process is in the network namespace of a file.
fn is_in(pid: i32, netns: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let own = id(Path::new(&format!("/proc/{pid}/ns/net")));
    own.is_some() && own == id(netns)
}
