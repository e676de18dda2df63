//! `nexus down`: stops everything and leaves nothing behind, whatever state it finds.
//!
//! It does not ask the supervisor to do the work, since there may be none: it stops that first and then does the same
//! steps always. Members are found by their command lines, groups and links by their names.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nexus_network::Underlay;
use nix::sys::signal::Signal;

use super::plan::Plan;
use super::procs::{self, Found, SUPERVISE};
use super::state::{DataDir, Mark};
use super::{DownArgs, cgroup};
use crate::context;

/// How long members may take to stop by themselves, and then to be gone after being killed.
const GRACE: Duration = Duration::from_secs(10);
const SETUP_PATIENCE: Duration = Duration::from_secs(120);

pub fn run(args: &DownArgs) -> anyhow::Result<()> {
    let dir = super::resolve_data_dir(args.data_dir.as_deref())?;
    let Some(plan) = dir.plan()? else {
        eprintln!("{} holds no cloud: there is nothing to stop", dir.root().display());
        return Ok(());
    };
    stop(&dir, &plan)?;
    if args.purge {
        let _setup = dir.setup_lock(SETUP_PATIENCE)?;
        context::forget(dir.root())?;
        dir.purge()?;
        eprintln!("{} and its data are gone", plan.cluster_id);
    } else {
        eprintln!("{} is stopped; `nexus up` resumes it", plan.cluster_id);
    }
    Ok(())
}

/// Stops every process and removes every group and link.
pub fn stop(dir: &DataDir, plan: &Plan) -> anyhow::Result<()> {
    let _setup = dir.setup_lock(SETUP_PATIENCE)?;
    let root = dir.root();
    let is = |roles: &'static [&'static str]| move |f: &Found| roles.contains(&f.role.as_str());
    end(root, is(&[SUPERVISE]))?;
    // Agents and keepers end with their host. Servers go last, so that the others can still report.
    end(root, is(&["host-init", "gateway"]))?;
    end(root, |_| true)?;
    super::small_runtime()?.block_on(Underlay::destroy(&plan.link_prefix())).context("removing the underlay")?;
    cgroup::remove(Path::new(&plan.cgroup()), GRACE)?;
    for name in super::member_names(plan) {
        dir.unmark(&name, Mark::Stopped)?;
        dir.unmark(&name, Mark::Cut)?;
    }
    for region in &plan.regions {
        dir.unmark(region.name.as_str(), Mark::Cut)?;
    }
    Ok(())
}

/// Ends the processes that fit: asks, waits, then kills, until none is left.
fn end(root: &Path, fits: impl Fn(&Found) -> bool) -> anyhow::Result<()> {
    let find = || -> anyhow::Result<Vec<Found>> {
        let all = procs::find(root).context("looking for running members")?;
        Ok(all.into_iter().filter(&fits).collect())
    };
    let asked = Instant::now();
    let mut told = BTreeSet::new();
    loop {
        let found = find()?;
        let Some(first) = found.first() else { return Ok(()) };
        let late = asked.elapsed() > GRACE;
        if asked.elapsed() > GRACE * 2 {
            let names: Vec<String> = found.iter().map(|f| format!("{} (pid {})", f.role, f.process.pid())).collect();
            bail!("these processes can't be ended: {}", names.join(", "));
        }
        for one in &found {
            if late {
                one.process.signal(Signal::SIGKILL).context("killing a member")?;
            } else if told.insert(one.process.pid()) {
                one.process.signal(Signal::SIGTERM).context("stopping a member")?;
            }
        }
        first.process.wait(Duration::from_millis(200)).context("waiting for a member to end")?;
    }
}
