//! Users of a region: they create, scale, replace and delete apps, and whole projects with what is in them, through any
//! server and in any state. A request whose outcome is not known is sent again with its idempotency key until it is decided,
//! so each user knows exactly what must be there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_control::intent::{Accepted, Change, Intent, Provenance, Target, Writer};
use nexus_model::kind::*;
use nexus_model::{ApiError, Bytes, Code, Digest, Metadata, MilliCpu, Name, Object};
use nexus_store::PeerError;
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::region::name;
use crate::server::as_servers;
use crate::site::Group;
use crate::world::World;

/// A writer answers within 10 s; in a fleet it may wait for news of the global group, too, and then decide once more.
const PATIENCE: Duration = Duration::from_secs(30);
pub const PROJECT: &str = "default";

/// What users know to be there: replicas of each app of [`PROJECT`].
#[derive(Clone, Default)]
pub struct Known(Arc<Mutex<BTreeMap<Name, u32>>>);

impl Known {
    pub fn all(&self) -> BTreeMap<Name, u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, app: &Name, replicas: Option<u32>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match replicas {
            Some(replicas) => drop(known.insert(app.clone(), replicas)),
            None => drop(known.remove(app)),
        }
    }

    fn get(&self, app: &Name) -> Option<u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(app).copied()
    }
}

pub struct User {
    pub world: Arc<World>,
    pub id: u64,
    pub dice: Dice,
    pub known: Known,
    pub way: Way,
    pub stop: Arc<AtomicBool>,
}

pub fn intent(plural: &str, project: Option<Name>, object: Name, change: Change, key: String) -> Intent {
    Intent {
        request_id: "req-sim".parse().expect("a well-formed id"),
        actor: "user".into(),
        by: Provenance::default(),
        target: Target { plural: plural.into(), project, organization: None, name: object },
        change,
        if_match: None,
        idempotency_key: Some(key),
        dry_run: false,
    }
}

pub fn app(object: &Name, project: &Name, replicas: u32) -> Change {
    let resources = Resources { cpu: MilliCpu(100), memory: Bytes(64 << 20), ..Resources::default() };
    // Every other one keeps its instances to single nodes.
    let pinned = object.as_str().bytes().map(u32::from).sum::<u32>() % 2 == 0;
    let constraints = if pinned { Constraints(vec![Constraint::Numa(Numa::Single)]) } else { Constraints::default() };
    let spec = AppSpec { image: name("web"), replicas, resources, constraints, ..App::example() };
    Change::Create { object: Object::<App>::new(Metadata::new(object.clone(), Some(project.clone())), spec).to_any() }
}

/// The one image that all apps run. `way`: who takes it.
pub async fn import_image(world: &Arc<World>, dice: &Dice, project: &Name, way: &Way) {
    let digest = Digest::of(b"web");
    let spec = ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 3 }], source: None };
    let object = Object::<Image>::new(Metadata::new(name("web"), Some(project.clone())), spec).to_any();
    let change = Change::Put { object };
    let stop = AtomicBool::new(false);
    let wanted = intent("images", Some(project.clone()), name("web"), change, format!("image-{project}"));
    let _ = submit(world, dice, &wanted, way, &stop).await;
}

/// Which writer an intent is for, and the servers that users ask. In a fleet a server of another region passes it on.
#[derive(Debug, Clone)]
pub struct Way {
    pub group: Group,
    pub nodes: Vec<u64>,
}

impl Way {
    pub fn of_region(nodes: &[u64]) -> Self {
        Self { group: Group::Own, nodes: nodes.to_vec() }
    }

    pub fn of_global(world: &World) -> Self {
        Self { group: Group::Global, nodes: world.nodes.clone() }
    }
}

/// Sends an intent until it is decided. `None`: the run ended first.
pub async fn submit(
    world: &Arc<World>,
    dice: &Dice,
    intent: &Intent,
    way: &Way,
    stop: &AtomicBool,
) -> Option<Result<Accepted, ApiError>> {
    let mut tries = 0;
    loop {
        // In a fleet users ask any server of any region, which asks one of the region at issue.
        let at = *dice.pick(&world.nodes)?;
        let node = if way.nodes.contains(&at) { at } else { *dice.pick(&way.nodes)? };
        if let Some(server) = world.server(node)
            && world.server(at).is_some()
            && let Some(part) = &server.part
            && let Some(writer) = part.writer(way.group)
        {
            tries += 1;
            let answer = if at == node {
                timeout(PATIENCE, writer.submit(intent.clone())).await
            } else {
                timeout(PATIENCE, pass_on(world, at, node, intent)).await
            };
            if server.life.is_on() {
                match answer {
                    Ok(Err(error)) if error.code.is_retryable() => {
                        world.trace.count("intents tried again");
                        world.trace.note(format_args!("{:?}: {}", intent.target.name, error.detail));
                    }
                    Ok(decided) => {
                        world.trace.count("intents decided");
                        let text = match &decided {
                            Ok(a) if a.replayed => "replayed".to_owned(),
                            Ok(_) => "taken".to_owned(),
                            Err(e) => format!("{:?}: {}", e.code, e.detail),
                        };
                        world.trace.note(format_args!(
                            "{} {} by server {node}: {text}",
                            intent.target.plural, intent.target.name
                        ));
                        return Some(decided);
                    }
                    Err(_) => world.trace.violation("every request ends in time", "an intent did not"),
                }
            }
        }
        if stop.load(Ordering::SeqCst) && tries > 20 {
            return None;
        }
        sleep(dice.millis(50, 400)).await;
    }
}

/// A server passes a request on to one of the region that it is for.
async fn pass_on(world: &Arc<World>, from: u64, to: u64, intent: &Intent) -> Result<Accepted, ApiError> {
    world.trace.count("requests passed on to another region");
    let (weak, intent) = (Arc::downgrade(world), intent.clone());
    let handle = move || {
        let server = weak.upgrade()?.server(to)?;
        let (writer, intent) = (server.part.as_ref()?.region.clone(), intent.clone());
        as_servers(&server, async move { writer.submit(intent).await })
    };
    match world.net.exchange(from, to, "pass", false, handle).await {
        Ok(answer) => answer,
        Err(PeerError::Unreachable(why)) => Err(ApiError::new(Code::Unavailable, why)),
        Err(PeerError::Lost(why)) => Err(ApiError::new(Code::Timeout, why)),
    }
}

impl User {
    pub async fn run(self) {
        let default = name(PROJECT);
        let own = name(&format!("team-{}", self.id));
        let mut turn = 0;
        let mut project_is_there = false;
        while !self.stop.load(Ordering::SeqCst) {
            turn += 1;
            if self.dice.chance(150) {
                self.project_turn(&own, turn, &mut project_is_there).await;
            } else {
                let which = name(&format!("app-{}-{}", self.id, self.dice.below(3)));
                self.app_turn(&default, &which, turn).await;
            }
            sleep(self.dice.millis(100, 1_500)).await;
        }
        // What is left of the own project goes, so that nothing must be there at the end.
        if project_is_there {
            let key = format!("u{}-{turn}-last", self.id);
            let delete = intent("projects", None, own, Change::Delete, key);
            let _ = submit(&self.world, &self.dice, &delete, &self.way, &self.stop).await;
        }
    }

    /// A project comes or goes with all that is in it.
    async fn project_turn(&self, own: &Name, turn: u64, is_there: &mut bool) {
        let key = |what: &str| format!("u{}-{turn}-{what}", self.id);
        if *is_there {
            let delete = intent("projects", None, own.clone(), Change::Delete, key("delete"));
            if let Some(Ok(_)) = submit(&self.world, &self.dice, &delete, &self.way, &self.stop).await {
                self.world.trace.count("projects deleted");
                *is_there = false;
            }
            return;
        }
        let spec = ProjectSpec { organization: name("default"), ..ProjectSpec::default() };
        let object = Object::<Project>::new(Metadata::new(own.clone(), None), spec).to_any();
        let create = intent("projects", None, own.clone(), Change::Create { object }, key("create"));
        // The name is free again only when the last of its contents is torn down.
        if let Some(Ok(_)) = submit(&self.world, &self.dice, &create, &self.way, &self.stop).await {
            *is_there = true;
            import_image(&self.world, &self.dice, own, &self.way).await;
            let inner = name("inner");
            let change = app(&inner, own, self.dice.range(1, 3) as u32);
            let create = intent("apps", Some(own.clone()), inner, change, key("inner"));
            let _ = submit(&self.world, &self.dice, &create, &self.way, &self.stop).await;
        }
    }

    async fn app_turn(&self, project: &Name, which: &Name, turn: u64) {
        let was = self.known.get(which);
        let replicas = self.dice.range(1, 5) as u32;
        let (change, becomes) = match (was, self.dice.below(4)) {
            (None, _) => (app(which, project, replicas), Some(replicas)),
            (Some(_), 0) => (Change::Delete, None),
            (Some(_), _) => (Change::Patch { patch: json!({"spec": {"replicas": replicas}}) }, Some(replicas)),
        };
        let wanted = intent("apps", Some(project.clone()), which.clone(), change, format!("u{}-{turn}", self.id));
        let Some(decided) = submit(&self.world, &self.dice, &wanted, &self.way, &self.stop).await else {
            // Nobody knows: what is there at the end can't be judged.
            self.world.trace.violation("every request is decided in the end", format!("{which} was not"));
            return;
        };
        match decided {
            Ok(_) => self.known.set(which, becomes),
            Err(error) => match error.code {
                Code::QuotaExceeded => {}
                // Nobody else touches this app, so these mean that something was lost or done twice.
                Code::AlreadyExists | Code::NotFound | Code::Internal => {
                    let text = format!("{which}, known as {was:?}, was answered {:?}: {}", error.code, error.detail);
                    self.world.trace.violation("no acknowledged intent is lost or done twice", text);
                }
                _ => self.world.trace.note(format_args!("{which}: refused: {:?}: {}", error.code, error.detail)),
            },
        }
    }
}
