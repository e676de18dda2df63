//! One run of a server's process, from its start to its end, and the traps that end it at a chosen step.
//!
//! A fault schedule that only kills at random moments hardly ever hits the instant between a sync and its answer. So a
//! crash can be armed for a [`Step`]: whatever server takes it next loses its power right there, in the middle of the call.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nexus_env::MemDisk;

use crate::mutant::Mutant;
use crate::trace::Trace;

/// A place in a protocol where a crash hurts in its own way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The log is written but not durable.
    BeforeSync,
    /// The log is durable and nobody knows.
    AfterSync,
    /// A candidate has asked for votes.
    Election,
    /// A snapshot is complete under its temporary name.
    SnapshotSave,
    /// A snapshot from the leader has arrived and is being made durable.
    SnapshotInstall,
    /// The leader has been handed another member's changes.
    Forward,
    /// A new writer claims its right.
    Claim,
    /// The claim is committed; the writer does not know.
    Claimed,
    /// The writer has committed decisions; those who asked do not know.
    Decided,
    /// The same three of the writer of the group that all regions share.
    GlobalClaim,
    GlobalClaimed,
    GlobalDecided,
    /// The global writer has been told what a region has; the region does not know.
    Heard,
    /// The leader sends the entry that raises the feature level.
    Raise,
}

impl Step {
    pub const STORE: &'static [Self] =
        &[Self::BeforeSync, Self::AfterSync, Self::Election, Self::SnapshotSave, Self::SnapshotInstall, Self::Forward];
    pub const REGION: &'static [Self] = &[Self::Claim, Self::Claimed, Self::Decided];
    pub const FLEET: &'static [Self] = &[Self::GlobalClaim, Self::GlobalClaimed, Self::GlobalDecided, Self::Heard];
    pub const RELEASE: &'static [Self] = &[Self::Raise];

    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeSync => "before a sync",
            Self::AfterSync => "after a sync, before its answer",
            Self::Election => "during an election",
            Self::SnapshotSave => "while saving a snapshot",
            Self::SnapshotInstall => "while installing a snapshot",
            Self::Forward => "on the way of a forwarded change",
            Self::Claim => "before a writer's claim",
            Self::Claimed => "after a writer's claim, before it knows",
            Self::Decided => "after a decision, before its answer",
            Self::GlobalClaim => "before the global writer's claim",
            Self::GlobalClaimed => "after the global writer's claim, before it knows",
            Self::GlobalDecided => "after a global decision, before its answer",
            Self::Heard => "after a region was heard, before it knows",
            Self::Raise => "while the feature level rises",
        }
    }

    pub fn counter(self) -> String {
        format!("crash {}", self.name())
    }
}

struct Trap {
    step: Step,
    /// Steps that pass before it springs.
    skip: u64,
}

/// What all servers of a world share.
pub struct Stage {
    pub trace: Trace,
    pub mutant: Option<Mutant>,
    /// Servers change their release: messages are searched for the entry that raises the feature level.
    pub releases: AtomicBool,
    traps: Mutex<Vec<Trap>>,
}

impl Stage {
    pub fn new(trace: Trace, mutant: Option<Mutant>) -> Self {
        Self { trace, mutant, releases: AtomicBool::new(false), traps: Mutex::new(Vec::new()) }
    }

    /// The next server that takes this step, after `skip` times, crashes in it.
    pub fn arm(&self, step: Step, skip: u64) {
        self.trace.note(format_args!("armed: crash {} (after {skip})", step.name()));
        self.traps.lock().unwrap_or_else(PoisonError::into_inner).push(Trap { step, skip });
    }

    pub fn disarm(&self) {
        self.traps.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn springs(&self, step: Step) -> bool {
        let mut traps = self.traps.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = traps.iter().position(|t| t.step == step) else { return false };
        if traps[at].skip > 0 {
            traps[at].skip -= 1;
            return false;
        }
        traps.remove(at);
        true
    }
}

/// A server's process.
pub struct Life {
    pub node: u64,
    pub number: u64,
    pub stage: Arc<Stage>,
    disk: MemDisk,
    on: AtomicBool,
}

impl Life {
    pub fn new(node: u64, number: u64, stage: Arc<Stage>, disk: MemDisk) -> Self {
        Self { node, number, stage, disk, on: AtomicBool::new(true) }
    }

    /// Whether it still runs. What a process that does not says, no one hears.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    /// Cuts the power: the disk keeps what was synced and some of the rest.
    pub fn power_off(&self) {
        if self.on.swap(false, Ordering::SeqCst) {
            self.disk.crash();
        }
    }

    /// Ends the process alone: the kernel still has what it wrote.
    pub fn kill(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// The server takes a step; true if that was its end.
    pub fn step(&self, step: Step) -> bool {
        self.stage.trace.count(&format!("step: {}", step.name()));
        if !self.is_on() {
            return true;
        }
        if self.stage.springs(step) {
            self.stage.trace.fault(&step.counter(), format_args!("server {}", self.node));
            self.power_off();
            return true;
        }
        false
    }
}

/// Whether a path is of the replicated log.
pub fn is_log(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("wal-"))
}
