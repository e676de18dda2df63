//! Makes one sandbox ready and starts it: an instance's main part, or one of its init steps or sidecars.
//!
//! All of them are in the instance's network and see its shared folder and its identity. An init step or sidecar has an image,
//! secrets, resources and output of its own, and a sandbox whose id follows from the instance's and its name.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_compute::keep::LogFiles;
use nexus_compute::{PartOf, Runtime, Sandbox, SecretMounts, Shared as Folder, SharedMount};
use nexus_model::kind::{self, HealthChecks, Part, SharedFolder, Template};
use nexus_model::plan::{ImagePlan, InstancePlan};
use nexus_model::{Name, Uid};
use tokio::sync::Mutex;

use crate::identity::Identity;
use crate::networks::Networks;
use crate::worker::Shared;

const LOG_FILE_BYTES: u64 = 10 << 20;
const LOG_FILES: u32 = 3;

/// Starts what belongs to one instance.
pub(crate) struct Launcher {
    pub shared: Arc<Shared>,
    /// Held while the network is made: several sandboxes of one instance may be started at once.
    plugging: Mutex<()>,
}

/// Where an instance's output is, or that of one of its parts.
pub(crate) fn log_dir(dir: &Path, instance: Uid, part: Option<&Name>) -> PathBuf {
    let own = dir.join(instance.to_string());
    part.map_or(own.clone(), |part| own.join(format!("part-{part}")))
}

/// What an init step or a sidecar is to run, as a plan of its own under its own id.
pub(crate) fn part_plan(plan: &InstancePlan, part: &Part) -> Result<InstancePlan, String> {
    let image = part.image.as_ref();
    let digest = plan.digest_of(image);
    let digest = digest.ok_or_else(|| format!("the plan does not say what image {image:?} is"))?;
    let template = Template {
        image: image.unwrap_or(&plan.template.image).clone(),
        command: part.command.clone(),
        args: part.args.clone(),
        env: part.env.clone(),
        secrets: part.secrets.clone(),
        ports: Vec::new(),
        resources: part.resources,
        classes: kind::Classes::new(),
        health: HealthChecks::default(),
        init: Vec::new(),
        sidecars: Vec::new(),
        ..plan.template.clone()
    };
    let image = ImagePlan { format: plan.image.format, digest };
    Ok(InstancePlan { uid: plan.uid.part(part.name.as_str()), template, image, ..plan.clone() })
}

/// The folder that an instance's parts share, if there is one.
pub(crate) async fn folder(
    runtime: &dyn Runtime,
    plan: &InstancePlan,
) -> Result<Option<(Folder, SharedFolder)>, String> {
    let Some(wanted) = plan.template.parts().folder() else { return Ok(None) };
    let made = runtime.share(plan.uid, wanted.size, plan.template.storage_class.as_ref()).await;
    Ok(Some((made.map_err(|e| e.to_string())?, wanted)))
}

impl Launcher {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, plugging: Mutex::default() }
    }

    /// Begins to serve a container's identity, if it is not served yet.
    pub async fn identify(&self, plan: &InstancePlan, identity: &mut Option<Identity>) -> Result<(), String> {
        if identity.is_none()
            && plan.template.runtime == kind::Runtime::Container
            && let Some(identities) = &self.shared.identities
        {
            *identity = Some(identities.open(plan).await?);
        }
        Ok(())
    }

    /// Fetches, plugs in and starts an instance's main part.
    pub async fn main(&self, plan: &InstancePlan, identity: &mut Option<Identity>) -> Result<(), String> {
        // First, so that there is a certificate by the time that the program asks.
        self.identify(plan, identity).await?;
        self.start(plan, plan, None, identity.as_ref().map(|i| i.folder.clone())).await
    }

    /// The same of an init step or a sidecar.
    pub async fn part(&self, plan: &InstancePlan, part: &Part, identity: Option<PathBuf>) -> Result<(), String> {
        self.start(plan, &part_plan(plan, part)?, Some(&part.name), identity).await
    }

    /// `own` is what is started, of the instance that `plan` speaks of.
    async fn start(
        &self,
        plan: &InstancePlan,
        own: &InstancePlan,
        part: Option<&Name>,
        identity: Option<PathBuf>,
    ) -> Result<(), String> {
        let shared = &self.shared;
        let Some(runtime) = shared.engines.runtimes.get(&own.template.runtime) else {
            return Err(format!("this host has no runtime for {:?}", own.template.runtime));
        };
        let cpuset = shared.numa.set_of(&plan.numa_nodes)?;
        let secrets = match &shared.secrets {
            Some(secrets) => {
                secrets.prepare(plan.uid, own).await?;
                secrets.mounts(own)
            }
            None if own.template.secrets.is_empty() => SecretMounts::default(),
            None => return Err("this host keeps no secrets".to_owned()),
        };
        // Not under the permit: a slow download must not keep other instances from starting.
        shared.engines.images.ensure(&own.image).await.map_err(|e| e.to_string())?;
        let _permit = shared.starts.acquire().await.map_err(|e| e.to_string())?;
        let wakes = own.template.runtime == kind::Runtime::Function && !plan.nics.is_empty();
        let networks = shared.networks.as_ref().filter(|_| wakes);
        let _hold = networks.map(Networks::hold);
        let unpack = async {
            runtime.prepare(own.image.digest).await.map_err(|e| e.to_string())?;
            runtime.warm(&plan.project).await;
            Ok::<_, String>(())
        };
        // Beside it: NICs take as long as a small image does.
        let plug = async {
            let _plugging = self.plugging.lock().await;
            let plugged = shared.engines.net.plug(plan.uid, plan.address6, plan.address4).await;
            let netns = plugged.map_err(|e| e.to_string())?;
            match &shared.networks {
                // What it asks others for is what needs them, and waits for them: see `connect`.
                Some(_) if own.template.runtime == kind::Runtime::Function => {}
                Some(networks) => networks.ready(plan.uid, &plan.nics).await?,
                None if plan.nics.is_empty() => {}
                None => return Err("this host has no part in tenants' networks".to_owned()),
            }
            Ok(netns)
        };
        let guards = async {
            match &shared.fabric {
                Some(fabric) => fabric.guards(plan.uid).await,
                None => Ok(()),
            }
        };
        // Nothing is in the network yet that could send or answer.
        let (guarded, netns, unpacked, kept) = tokio::join!(guards, plug, unpack, shared.is_kept(plan));
        kept?;
        guarded?;
        unpacked?;
        let netns = netns?;
        let folder = folder(&**runtime, plan).await?;
        let sandbox = Sandbox {
            uid: own.uid,
            epoch: plan.epoch,
            name: plan.name.clone(),
            project: plan.project.clone(),
            app: plan.app.clone(),
            template: own.template.clone(),
            image: own.image.digest,
            netns,
            address6: plan.address6,
            address4: plan.address4,
            identity,
            secrets,
            cpuset,
            part: part.map(|name| PartOf { instance: plan.uid, name: name.clone() }),
            shared: folder.map(|(made, wanted)| SharedMount { source: made.path, destination: wanted.path }),
            logs: LogFiles {
                dir: log_dir(&shared.logs_dir, plan.uid, part),
                max_bytes: LOG_FILE_BYTES,
                keep: LOG_FILES,
            },
        };
        runtime.start(&sandbox).await.map_err(|e| e.to_string())?;
        if let Some(networks) = networks {
            networks.plug();
        }
        Ok(())
    }
}
