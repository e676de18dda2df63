//! Worlds about what looks after apps and jobs for long: *apps* (rollouts, drains and rebalances under budgets), *scaling* (apps
//! under load that comes and goes) and *work* (jobs, and jobs by the clock). Each is a region as in [`run`](crate::run), under
//! the same faults, with users who want more of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nexus_model::Name;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::care_judge;
use crate::care_users::{Hand, Operator, Promises, Scaled, Team, Worker, begin_crons};
use crate::chance::Dice;
use crate::judge::{self, Ground};
use crate::mutant::Mutant;
use crate::nemesis::{FAULTS_LAST, Nemesis};
use crate::region::{self, name};
use crate::run::{end, end_load, record, serves_again, settle, start};
use crate::site::{Group, Site};
use crate::trace::Trace;
use crate::users::{self, Way};
use crate::world::{Plan, World};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Care {
    Apps,
    Scaling,
    Work,
}

impl Care {
    /// How long faults last. Runs by the clock are due once a minute.
    fn faults(self) -> Duration {
        match self {
            Self::Apps => 2 * FAULTS_LAST,
            Self::Scaling => 2 * FAULTS_LAST,
            Self::Work => 4 * FAULTS_LAST,
        }
    }

    /// Milliseconds between two faults.
    fn pace(self) -> (u64, u64) {
        match self {
            Self::Apps | Self::Scaling => (300, 4_000),
            Self::Work => (800, 8_000),
        }
    }
}

/// What users say when all is over may take them so long.
const LAST_WORDS: Duration = Duration::from_secs(400);

pub async fn world(seed: u64, care: Care, mutant: Option<Mutant>, trace: &Trace) {
    let dice = Dice::new(seed, "run");
    let plan = Plan {
        seed,
        sites: Site::alone(3),
        spares: 0,
        with_region: true,
        snapshot_after: dice.range(100_000, 400_000),
        skew_ms: if dice.chance(500) { dice.range(1, 5_000) } else { 0 },
        mutant,
    };
    let world = World::new(&plan, trace.clone());
    let mut standing = start(&world);
    let recorder = record(&world, seed, &mut standing);
    let ground = Ground::lay(&world, &world.sites[0], &mut standing);
    let (promises, stop) = (Promises::default(), Arc::new(AtomicBool::new(false)));
    let way = Way::of_region(&world.nodes);
    users::import_image(&world, &dice, &region::name(users::PROJECT), &way).await;
    let mut load = JoinSet::new();
    let hand = |who: &str| Hand::new(&world, who, &stop);
    for id in 0..3 {
        match care {
            Care::Apps => {
                let (hand, app) = (hand(&format!("team-{id}")), name(&format!("shop-{id}")));
                load.spawn(Team { hand, app, promises: promises.clone() }.run());
            }
            Care::Scaling => {
                let (hand, app) = (hand(&format!("owner-{id}")), name(&format!("auto-{id}")));
                let demand = world.demand.clone();
                load.spawn(Scaled { hand, app, promises: promises.clone(), demand }.run());
            }
            Care::Work => drop(load.spawn(Worker { hand: hand(&format!("worker-{id}")) }.run())),
        }
    }
    let mut operating = JoinSet::new();
    match care {
        Care::Apps => drop(operating.spawn(Operator { hand: hand("operator"), hosts: ground.hosts.clone() }.run())),
        Care::Scaling => {}
        Care::Work => drop(load.spawn(begin_crons(hand("clock")))),
    }
    let nemesis = Nemesis {
        world: world.clone(),
        dice: Dice::new(seed, "nemesis"),
        pace: care.pace(),
        hosts: ground.hosts.clone(),
        gateways: ground.gateways.clone(),
    };
    nemesis.run(Instant::now() + care.faults()).await;
    serves_again(&world, Group::Own, "probe").await;
    end_load(&stop, load, LAST_WORDS, trace).await;
    end_load(&stop, operating, LAST_WORDS, trace).await;
    let wanted: BTreeMap<Name, u32> =
        promises.all().into_iter().map(|(app, promise)| (app, promise.replicas)).collect();
    judge::converges(&world, || judge::difference(&world, &ground, &wanted)).await;
    settle(&world, &recorder).await;
    let log = recorder.log();
    judge::history(&log, trace);
    judge::tables(&log, &ground.gateways, trace);
    match care {
        Care::Apps => care_judge::apps(&log, &promises.all(), trace),
        Care::Scaling => care_judge::scaling(&log, &promises.all(), trace),
        Care::Work => {
            care_judge::jobs(&log, &world.ends, trace);
            care_judge::crons(&log, trace);
        }
    }
    for server in world.servers() {
        world.take_recount(&server);
    }
    trace.add("revisions", recorder.newest());
    end(&world, standing).await;
}
