//! What stands on a server's store in worlds that have a control loop: the region's writer and the view that plans and
//! tables are read from.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Intent};
use nexus_control::region::{Config, Forward, ForwardError, Region};
use nexus_control::view::View;
use nexus_env::Env;
use nexus_model::Name;
use nexus_store::{PeerError, Store};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::life::Life;
use crate::mutant::Door;
use crate::net::Net;
use crate::server::as_servers;
use crate::world::World;

pub const ZONES: &[&str] = &["a", "b", "c"];

/// A name that the simulator made up.
pub fn name(text: &str) -> Name {
    text.parse().expect("the simulator's names are well formed")
}

pub struct Part {
    pub region: Arc<Region>,
    pub view: View,
}

/// The way to another server's writer.
struct Wire {
    world: Weak<World>,
    net: Arc<Net>,
    life: Arc<Life>,
}

#[async_trait]
impl Forward for Wire {
    async fn forward(&self, node: u64, intent: &Intent, deadline: Duration) -> Result<Accepted, ForwardError> {
        let (world, intent) = (self.world.clone(), intent.clone());
        let handle = move || {
            let server = world.upgrade()?.server(node)?;
            let region = server.part.as_ref()?.region.clone();
            let intent = intent.clone();
            as_servers(&server, async move { region.submit_here(intent).await })
        };
        let exchange = self.net.exchange(self.life.node, node, "submit", false, handle);
        match tokio::time::timeout(deadline, exchange).await {
            Err(_) => Err(ForwardError::Unknown("no answer in time".into())),
            Ok(Err(PeerError::Unreachable(why))) => Err(ForwardError::NotTaken(why)),
            Ok(Err(PeerError::Lost(why))) => Err(ForwardError::Unknown(why)),
            Ok(Ok(None)) => Err(ForwardError::NotTaken("it does not lead".into())),
            Ok(Ok(Some(Ok(accepted)))) => Ok(accepted),
            Ok(Ok(Some(Err(error)))) => Err(ForwardError::Answered(error)),
        }
    }
}

impl Part {
    pub fn start(world: &Arc<World>, life: &Arc<Life>, env: Env, door: Arc<Door>, tasks: &mut JoinSet<()>) -> Self {
        let config = Config {
            node: life.node,
            server: format!("server-{}", life.node),
            bootstrap: Bootstrap {
                region: name("local"),
                domain: "localhost".into(),
                zones: ZONES.iter().map(|z| name(&format!("zone-{z}"))).collect(),
                cells: ZONES.iter().map(|z| name(&format!("cell-{z}"))).collect(),
            },
            fleet: None,
        };
        let wire = Arc::new(Wire { world: Arc::downgrade(world), net: world.net.clone(), life: life.clone() });
        let region = Arc::new(Region::new(config, env, door.clone(), wire));
        let view = View::new("localhost");
        // Tasks end with the process, so nothing is ever asked to stop.
        let stop = CancellationToken::new();
        let (runs, stopped) = (region.clone(), stop.clone());
        tasks.spawn(async move { runs.run(stopped).await });
        let (follows, store) = (view.clone(), door as Arc<dyn Store>);
        tasks.spawn(async move { follows.follow(store, stop).await });
        Self { region, view }
    }

    /// Differences that the writer's own recount found.
    pub fn violations(&self) -> u64 {
        self.region.counters.violations.load(Ordering::Relaxed)
    }
}
