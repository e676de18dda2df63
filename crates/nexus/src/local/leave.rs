//! What a region of the local cloud leaves behind when it leaves the fleet: its processes, its folders, its wire.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nexus_model::Name;

use super::plan::{Plan, RegionPlan};
use super::state::{DataDir, Mark};
use super::{cgroup, control, up};
use crate::exit::Fail;

const SETUP_PATIENCE: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(10);

/// A region of a local cloud that is to leave.
pub struct Leaving {
    dir: DataDir,
    plan: Plan,
    region: RegionPlan,
}

impl Leaving {
    /// The region, if it is one of the local cloud in this folder.
    pub fn find(data_dir: Option<&Path>, region: &Name) -> anyhow::Result<Option<Self>> {
        let Some(path) = data_dir else { return Ok(None) };
        let dir = DataDir::at(path)?;
        let Some(plan) = dir.plan()? else { return Ok(None) };
        let Some(region) = plan.region(region.as_str()).cloned() else { return Ok(None) };
        if plan.regions.len() == 1 {
            let message = format!("{} is the only region: `nexus down --purge` removes the cloud", region.name);
            return Err(Fail::conflict(message).into());
        }
        Ok(Some(Self { dir, plan, region }))
    }

    /// Stops all of it. `nexus local start REGION` takes that back.
    pub fn stop(&self) -> anyhow::Result<()> {
        control::retire(&self.dir, &self.plan, &self.region)
    }

    /// Takes it out of the plan and removes what it kept.
    pub fn forget(self) -> anyhow::Result<()> {
        let _setup = self.dir.setup_lock(SETUP_PATIENCE)?;
        let plan = self.plan.without(&self.region.name);
        self.dir.create(&plan)?;
        control::poke(&self.dir)?;
        self.dir.unmark(self.region.name.as_str(), Mark::Cut)?;
        for host in self.plan.hosts_of(&self.region) {
            cgroup::remove(&cgroup::of_host(&self.plan.cgroup(), host.name.as_str()), GRACE)?;
        }
        for name in self.plan.members_of(&self.region) {
            let name = name.as_str();
            self.dir.unmark(name, Mark::Stopped)?;
            self.dir.unmark(name, Mark::Cut)?;
            remove(&self.dir.data(name))?;
            remove(&self.dir.config(name))?;
            remove(&self.dir.config(name).with_extension(""))?;
            for certificate in [name.to_owned(), format!("{name}-api")] {
                remove(&self.dir.cert(&certificate))?;
                remove(&self.dir.key(&certificate))?;
            }
        }
        up::refresh_context(&self.dir, &plan)
    }
}

/// Removes a file or a folder. What is not there is no error.
fn remove(path: &Path) -> anyhow::Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| format!("removing {}", path.display())),
        _ => Ok(()),
    }
}
