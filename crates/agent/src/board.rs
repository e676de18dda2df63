//! What is told of one instance: its main part's words and those of its init steps and sidecars, in one report. The worker and
//! those who keep its sidecars write here, each about its own.

use std::sync::{Mutex, MutexGuard, PoisonError};

use nexus_model::kind::{InstancePhase, PartRole, PartState, PartStatus};
use nexus_model::plan::InstanceReport;
use nexus_model::{Name, Uid};

use crate::AgentHandle;

pub(crate) struct Board {
    uid: Uid,
    handle: AgentHandle,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    /// The main part's; nothing is told before the first.
    main: Option<InstanceReport>,
    parts: Vec<PartStatus>,
}

/// The one report. An instance is ready when its main part and all of its sidecars are.
fn merged(main: &InstanceReport, parts: &[PartStatus]) -> InstanceReport {
    let mut report = InstanceReport { parts: parts.to_vec(), ..main.clone() };
    let unready = parts.iter().find(|p| p.role == PartRole::Sidecar && !p.ready);
    if let Some(part) = unready.filter(|_| report.ready && report.phase == InstancePhase::Running) {
        report.ready = false;
        let why = if part.message.is_empty() { "it does not run yet" } else { &part.message };
        report.message = format!("sidecar {}: {why}", part.name);
    }
    report
}

impl Board {
    pub fn new(uid: Uid, handle: AgentHandle) -> Self {
        Self { uid, handle, told: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock, so that what was said first is told first.
    fn publish(&self, told: &Told) {
        if let Some(main) = &told.main {
            self.handle.instance(self.uid, Some(merged(main, &told.parts)));
        }
    }

    /// What is true of the main part, and of the instance as a whole.
    pub fn main(&self, report: &InstanceReport) {
        let mut told = self.lock();
        told.main = Some(report.clone());
        self.publish(&told);
    }

    /// Says which parts there are, unless that was said.
    pub fn parts(&self, parts: impl Iterator<Item = (PartRole, Name)>) {
        let mut told = self.lock();
        if told.parts.is_empty() {
            told.parts = parts.map(|(role, name)| PartStatus::new(name, role)).collect();
        }
    }

    pub fn part(&self, name: &Name, change: impl FnOnce(&mut PartStatus)) {
        let mut told = self.lock();
        if let Some(part) = told.parts.iter_mut().find(|p| p.name == *name) {
            change(part);
            if part.state != PartState::Running {
                part.ready = false;
            }
            self.publish(&told);
        }
    }

    /// What an instance is when its parts have been taken away.
    pub fn parts_stopped(&self) {
        let mut told = self.lock();
        for part in &mut told.parts {
            part.ready = false;
            match (part.role, part.state) {
                (_, PartState::Done | PartState::Waiting) => {}
                (PartRole::Init, _) => part.state = PartState::Waiting,
                (PartRole::Sidecar, _) => part.state = PartState::Stopped,
            }
        }
        self.publish(&told);
    }

    /// Nothing is left to tell of.
    pub fn gone(&self) {
        self.lock().main = None;
        self.handle.instance(self.uid, None);
    }
}
