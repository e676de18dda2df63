//! The invariant checker: recounts what is counted from the rows that it counts.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use nexus_model::kind::*;
use nexus_model::{Name, Object};

use super::Core;
use crate::numa;
use crate::rules::job;
use crate::rules::usage::{amounts, charge_app};
use crate::scheduler::Scheduler;
use crate::world::Part;

/// Calls of [`Core::check_on`] for one whole recount.
const SLICES: usize = 60;

impl Core {
    /// Recounts what must agree with the rows: quota use per project, reservations per host. Answers each difference.
    pub fn check_invariants(&mut self) -> Vec<String> {
        let mut differences = self.wrong_totals();
        differences.extend(self.world.hosts.live.values().flat_map(|host| self.wrong_on(host)));
        self.violations += differences.len() as u64;
        differences
    }

    /// The same in small parts, so that no call keeps the writer long: some hosts, and the rest when all have had their turn,
    /// every [`SLICES`] calls.
    pub fn check_on(&mut self) -> Vec<String> {
        let hosts = &self.world.hosts.live;
        let slice = hosts.len().div_ceil(SLICES).max(1);
        let after = match &self.checked {
            Some(name) => Bound::Excluded((None, name.clone())),
            None => Bound::Unbounded,
        };
        let some: Vec<_> = hosts.range((after, Bound::Unbounded)).map(|(_, host)| host).take(slice).collect();
        let mut differences: Vec<String> = some.iter().flat_map(|host| self.wrong_on(host)).collect();
        let last = some.last().map(|host| host.metadata.name.clone()).filter(|_| some.len() == slice);
        if last.is_none() {
            differences.extend(self.wrong_totals());
        }
        self.checked = last;
        self.violations += differences.len() as u64;
        differences
    }

    fn wrong_totals(&self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut uses: BTreeMap<&Name, [u64; 3]> = BTreeMap::new();
        let charged = self.world.part != Part::Global;
        let apps = self.world.apps.live.values().map(|a| (a.metadata.project.as_ref(), charge_app(a)));
        let jobs = self.world.jobs.live.values().map(|j| (j.metadata.project.as_ref(), job::charge(j)));
        for (project, charge) in apps.chain(jobs).filter(|_| charged) {
            let sum = uses.entry(project.expect("apps and jobs have a project")).or_default();
            for (total, part) in sum.iter_mut().zip(charge) {
                *total = total.saturating_add(part);
            }
        }
        let counted = self.world.usages.live.values().map(|u| (&u.metadata.name, amounts(&u.status.used)));
        let counted: BTreeMap<&Name, [u64; 3]> = counted.collect();
        for name in uses.keys().chain(counted.keys()).copied().collect::<BTreeSet<_>>() {
            let used = counted.get(name).copied().unwrap_or_default();
            let sum = uses.get(name).copied().unwrap_or_default();
            if used != sum {
                differences.push(format!("project {name}: {used:?} counted as used, {sum:?} in use"));
            }
        }
        let oversold = self.world.scheduler.as_ref().map_or(0, |s| s.oversold);
        if oversold > 0 {
            differences.push(format!("{oversold} reservations did not fit when they were made"));
        }
        differences.extend(crate::nets::differences(&self.world));
        differences
    }

    fn wrong_on(&self, host: &Object<Host>) -> Vec<String> {
        let mut differences = Vec::new();
        let name = &host.metadata.name;
        let sum = Scheduler::reserved(self.world.instances_on(name));
        if sum != host.status.reserved {
            differences.push(format!("host {name}: {:?} counted as reserved, {sum:?} reserved", host.status.reserved));
        }
        differences.extend(numa::differences(&self.world, host, &sum));
        let mut slots = BTreeSet::new();
        for i in self.world.instances_on(name).filter(|i| i.status.finished.is_none()) {
            if !slots.insert(i.status.slot) {
                differences.push(format!("host {name}: slot {:?} is given twice", i.status.slot));
            }
        }
        differences
    }
}
