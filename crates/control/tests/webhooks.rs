//! What the writer has told to others' servers: deliveries stand in the transaction of the change or behind a mark that does,
//! are tried again ever more seldom, and are bounded.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Attempt, Callback, Change, Intent, Provenance, Telling};
use nexus_control::rules::delivery::{DELIVERED, KEEP, PATIENCE, PER_PROJECT};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Object, Timestamp};
use nexus_store::{KeyValue, Revision};
use serde_json::json;

const DEFAULT: Option<&str> = Some("default");

struct Lab {
    core: Core,
    rng: SeededRng,
    now: i64,
    rows: BTreeMap<String, Vec<u8>>,
    packs: Vec<Vec<String>>,
    revision: u64,
}

fn core(world: World) -> Core {
    let (zones, cells) = (vec![name("zone-a")], vec![name("cell-a")]);
    let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells };
    Core::new(world, bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1))
}

impl Lab {
    fn new() -> Self {
        let mut lab = Self {
            core: core(World::default()),
            rng: SeededRng::new(7),
            now: 1_000_000,
            rows: BTreeMap::new(),
            packs: Vec::new(),
            revision: 0,
        };
        lab.with(|core, at| core.bootstrap(at));
        let spec =
            SecretSpec { version: 1, keys: vec!["key".into()], sealed: Some("sealed".into()), ..SecretSpec::default() };
        for secret in ["hooks", "callbacks"] {
            let Change::Create { object } = create::<Secret>(DEFAULT, secret, spec.clone()).change else { panic!() };
            lab.submit(&intent("secrets", DEFAULT, secret, Change::Put { object })).unwrap();
        }
        lab
    }

    fn at(now: i64, rng: &SeededRng) -> Moment<'_> {
        Moment { now: Timestamp::from_millis(now), monotonic: Duration::ZERO, rng }
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let answer = f(&mut self.core, Self::at(self.now, &self.rng));
        self.settle(usize::MAX);
        answer
    }

    /// Lets the reconcilers follow, and commits so many packs: the others are lost with their leader.
    fn settle(&mut self, most: usize) {
        while self.core.reconcile(Self::at(self.now, &self.rng)) {}
        for pack in self.core.take_packs().into_iter().take(most) {
            assert!(pack.ops.len() <= 126, "{}", pack.ops.len());
            self.revision += 1;
            self.packs.push(pack.ops.keys().cloned().collect());
            for (key, value) in &pack.ops {
                match value {
                    Some(value) => self.rows.insert(key.clone(), value.to_vec()),
                    None => self.rows.remove(key),
                };
            }
            self.core.committed(&pack, self.revision);
        }
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    /// Another server leads: it knows what is committed.
    fn succeed(&mut self) {
        let mut world = World::default();
        for (key, value) in &self.rows {
            let (mod_revision, create_revision) = (Revision(1), Revision(1));
            let kv = KeyValue { key: key.clone().into(), value: value.clone().into(), create_revision, mod_revision };
            world.take_in(&kv).unwrap();
        }
        self.core = core(world);
        self.with(|core, at| core.bootstrap(at));
    }

    fn deliveries(&self) -> Vec<Object<Delivery>> {
        self.core.world.deliveries.within(&name("default")).cloned().collect()
    }

    fn types(&self) -> Vec<String> {
        self.deliveries().into_iter().map(|d| d.spec.kind).collect()
    }

    fn hook(&self) -> &Object<Webhook> {
        self.core.world.webhooks.get(Some(&name("default")), &name("ci")).unwrap()
    }

    fn reasons(&self) -> Vec<String> {
        let project = name("default");
        let events = self.core.world.events.within(&project);
        events.map(|e| e.spec.reason.clone()).collect()
    }

    fn attempt(&mut self, delivery: &Object<Delivery>, attempt: Attempt) -> Object<Delivery> {
        let deed = Telling::Attempted(Attempt { number: delivery.status.attempts + 1, ..attempt });
        let told = intent("deliveries", DEFAULT, delivery.metadata.name.as_str(), Change::Tell { deed });
        Object::from_any(&self.submit(&told).unwrap().object).unwrap()
    }
}

fn failed() -> Attempt {
    Attempt { message: "it answered 500".into(), ..Attempt::default() }
}

fn taken() -> Attempt {
    Attempt { taken: true, message: "it answered 204".into(), ..Attempt::default() }
}

fn hook(kinds: &[&str], reasons: &[&str]) -> Intent {
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
    let spec = WebhookSpec { kinds: words(kinds), reasons: words(reasons), max_attempts: 3, ..Webhook::example() };
    create::<Webhook>(DEFAULT, "ci", spec)
}

fn route(n: usize) -> Intent {
    create::<Route>(DEFAULT, &format!("r-{n}"), RouteSpec { host: format!("r{n}.example.com"), ..Route::example() })
}

fn calling(intent: Intent) -> Intent {
    let callback = Callback { url: "https://ci.example.com/".into(), secret: SigningSecret::named(name("callbacks")) };
    Intent { by: Provenance { callback: Some(callback), ..Provenance::default() }, ..intent }
}

#[test]
fn a_webhook_is_told_what_it_asked_for_in_the_order_in_which_it_happened() {
    let mut lab = Lab::new();
    lab.submit(&hook(&["Route"], &[])).unwrap();
    for n in 0..3 {
        lab.submit(&route(n)).unwrap();
    }
    lab.submit(&create::<Image>(DEFAULT, "web", image("web"))).unwrap();
    lab.submit(&intent("routes", DEFAULT, "r-1", Change::Delete)).unwrap();
    let deliveries = lab.deliveries();
    let said: Vec<_> = deliveries.iter().map(|d| (d.spec.kind.as_str(), d.spec.subject.as_str())).collect();
    let created = "cloudnexus.v1.Route.Created";
    let expected = [(created, "r-0"), (created, "r-1"), (created, "r-2"), ("cloudnexus.v1.Route.Deleted", "r-1")];
    let expected = expected.map(|(kind, route)| (kind, format!("routes/{route}")));
    assert_eq!(said, expected.iter().map(|(kind, route)| (*kind, route.as_str())).collect::<Vec<_>>());
    let first = &deliveries[0];
    assert_eq!(first.status.phase, DeliveryPhase::Pending);
    assert_eq!((&first.spec.data["project"], &first.spec.data["reason"]), (&json!("default"), &json!("Created")));
    assert_eq!(first.metadata.owner.as_ref().unwrap().uid, lab.hook().metadata.uid);
    assert!(lab.core.world.untold.is_empty());

    // Of what is disabled nothing is told; what a webhook hears of itself would have no end.
    let off = Change::Patch { patch: json!({"spec": {"enabled": false}}) };
    lab.submit(&intent("webhooks", DEFAULT, "ci", off)).unwrap();
    lab.submit(&route(9)).unwrap();
    assert_eq!(lab.deliveries().len(), 4);
    assert_eq!(lab.submit(&intent("secrets", DEFAULT, "hooks", Change::Delete)).unwrap_err().code, Code::Conflict);
    lab.submit(&intent("webhooks", DEFAULT, "ci", Change::Delete)).unwrap();
    lab.submit(&intent("secrets", DEFAULT, "hooks", Change::Delete)).unwrap();
    assert_eq!(lab.submit(&hook(&[], &[])).unwrap_err().errors[0].field, "spec.secret.name");
}

#[test]
fn a_leader_that_ends_between_an_event_and_its_delivery_loses_neither() {
    let mut lab = Lab::new();
    lab.submit(&hook(&["Route"], &["Created"])).unwrap();
    // The first pack has the change and its marked event; no step behind it was committed.
    let before = lab.packs.len();
    lab.core.intent(&route(0), Lab::at(lab.now, &lab.rng)).unwrap();
    let packs = lab.core.take_packs();
    assert_eq!(packs.len(), 1);
    assert!(packs[0].ops.keys().any(|k| k.starts_with("o/routes/")), "the change");
    assert!(packs[0].ops.keys().any(|k| k.starts_with("o/events/")), "and the event, in one transaction");
    for (key, value) in packs[0].ops.iter().filter_map(|(k, v)| Some((k, v.as_ref()?))) {
        lab.rows.insert(key.clone(), value.to_vec());
    }
    assert!(lab.deliveries().is_empty() && lab.packs.len() == before);
    lab.succeed();
    assert_eq!(lab.types(), ["cloudnexus.v1.Route.Created"]);
    let id = lab.deliveries()[0].metadata.uid;
    // One more leader changes nothing, and goes on behind the names that were given.
    lab.succeed();
    assert_eq!(lab.deliveries()[0].metadata.uid, id);
    lab.now -= 500_000;
    lab.submit(&route(1)).unwrap();
    let deliveries = lab.deliveries();
    assert_eq!((deliveries.len(), deliveries[0].metadata.uid), (2, id), "a clock that is late changes no order");
}

#[test]
fn what_fails_is_tried_again_ever_more_seldom_then_given_up_and_sent_again_when_asked() {
    let mut lab = Lab::new();
    lab.submit(&hook(&["Route"], &[])).unwrap();
    lab.submit(&route(0)).unwrap();
    let mut delivery = lab.deliveries().remove(0);
    let id = delivery.metadata.uid;
    let mut waits = Vec::new();
    for attempts in 1..=2 {
        delivery = lab.attempt(&delivery, failed());
        assert_eq!((delivery.status.phase, delivery.status.attempts), (DeliveryPhase::Pending, attempts));
        waits.push(delivery.status.next.unwrap().since(Timestamp::from_millis(lab.now)));
    }
    assert!(waits[0] >= Duration::from_secs(1) && waits[1] >= waits[0], "{waits:?}");
    assert_eq!(lab.hook().status.conditions[0].reason, "Failing");
    // A report that comes twice counts once.
    let stale = Telling::Attempted(Attempt { number: 2, ..failed() });
    let again = intent("deliveries", DEFAULT, delivery.metadata.name.as_str(), Change::Tell { deed: stale });
    assert_eq!(lab.submit(&again).unwrap().object.status["attempts"], 2);

    delivery = lab.attempt(&delivery, failed());
    assert_eq!((delivery.status.phase, delivery.status.next), (DeliveryPhase::Dead, None));
    assert_eq!(delivery.status.message, "it answered 500");
    assert!(lab.reasons().contains(&"DeliveryGivenUp".to_owned()));
    let resend = intent("deliveries", DEFAULT, delivery.metadata.name.as_str(), Change::Tell { deed: Telling::Resend });
    let records = lab.rows.keys().filter(|k| k.starts_with("a/r/")).count();
    lab.submit(&resend).unwrap();
    assert_eq!(lab.rows.keys().filter(|k| k.starts_with("a/r/")).count(), records + 1, "whoever did it is on record");
    let mut delivery = lab.deliveries().remove(0);
    assert_eq!(
        (delivery.status.phase, delivery.status.attempts, delivery.metadata.uid),
        (DeliveryPhase::Pending, 0, id)
    );
    delivery = lab.attempt(&delivery, taken());
    assert_eq!(delivery.status.phase, DeliveryPhase::Delivered);
    assert_eq!(lab.hook().status.conditions[0].reason, "Taken");

    // What would never be taken is given up at once; what is for nobody goes.
    lab.submit(&route(1)).unwrap();
    let second = lab.deliveries().remove(1);
    let fatal = Attempt { fatal: true, ..failed() };
    assert_eq!(lab.attempt(&second, fatal).status.phase, DeliveryPhase::Dead);
    lab.submit(&route(2)).unwrap();
    let third = lab.deliveries().remove(2);
    lab.attempt(&third, Attempt { obsolete: true, ..failed() });
    assert_eq!(lab.deliveries().len(), 2);
    lab.now += i64::try_from(KEEP.as_millis()).unwrap() + 1;
    lab.with(|core, at| core.forget_old(at));
    assert!(lab.deliveries().is_empty());
}

#[test]
fn a_project_has_so_many_deliveries_and_the_oldest_go_visibly() {
    let mut lab = Lab::new();
    lab.submit(&hook(&["Route"], &["Created"])).unwrap();
    for n in 0..PER_PROJECT + 5 {
        lab.submit(&route(n)).unwrap();
    }
    let left = lab.deliveries();
    assert_eq!((left.len(), left[0].spec.subject.as_str()), (PER_PROJECT, "routes/r-5"));
    assert_eq!(lab.hook().status.dropped, 5);
    assert!(lab.reasons().contains(&"DeliveryDropped".to_owned()));
    // Those that were taken make room first, and few of them are kept.
    for delivery in &left[..DELIVERED + 3] {
        lab.attempt(delivery, taken());
    }
    let kept = lab.deliveries();
    assert_eq!(kept.len(), PER_PROJECT - 3);
    for n in 0..4 {
        lab.submit(&route(PER_PROJECT + 10 + n)).unwrap();
    }
    assert_eq!((lab.deliveries().len(), lab.hook().status.dropped), (PER_PROJECT, 5));
}

#[test]
fn a_callback_waits_until_what_was_asked_for_has_come_about() {
    let mut lab = Lab::new();
    // Without a phase there is nothing to wait for.
    lab.submit(&calling(route(0))).unwrap();
    let told = lab.deliveries().remove(0);
    assert_eq!((told.spec.kind.as_str(), told.status.phase), ("cloudnexus.v1.Route.Settled", DeliveryPhase::Pending));
    assert_eq!(told.spec.data["object"]["name"], "r-0");
    assert!(told.spec.data["object"].get("spec").is_none());

    lab.submit(&create::<Image>(DEFAULT, "web", image("web"))).unwrap();
    lab.submit(&calling(create::<App>(DEFAULT, "shop", web(1)))).unwrap();
    let phase = |lab: &Lab, at: usize| lab.deliveries()[at].status.phase;
    assert_eq!(phase(&lab, 1), DeliveryPhase::Waiting, "there is no host");
    let waiting = &lab.packs.iter().find(|p| p.iter().any(|k| k.starts_with("o/apps/"))).unwrap();
    assert!(waiting.iter().any(|k| k.starts_with("o/deliveries/")), "with the change itself");
    // It scales to nothing: settled, as whoever leads then sees.
    lab.succeed();
    assert_eq!(phase(&lab, 1), DeliveryPhase::Waiting);
    let none = Change::Patch { patch: json!({"spec": {"replicas": 0}}) };
    lab.submit(&intent("apps", DEFAULT, "shop", none)).unwrap();
    lab.succeed();
    let told = lab.deliveries().remove(1);
    assert_eq!((told.spec.kind.as_str(), told.status.phase), ("cloudnexus.v1.App.Settled", DeliveryPhase::Pending));
    assert_eq!(told.spec.data["object"]["status"]["phase"], "Stopped");

    lab.submit(&calling(intent("apps", DEFAULT, "shop", Change::Delete))).unwrap();
    assert_eq!(lab.types()[2], "cloudnexus.v1.App.Settled");
    assert_eq!(phase(&lab, 2), DeliveryPhase::Pending, "nothing is left of it");

    // What never comes about is told of as well.
    lab.submit(&calling(create::<App>(DEFAULT, "never", web(1)))).unwrap();
    lab.submit(&calling(create::<App>(DEFAULT, "short", web(1)))).unwrap();
    lab.submit(&intent("apps", DEFAULT, "short", Change::Delete)).unwrap();
    assert_eq!((lab.types()[4].as_str(), phase(&lab, 4)), ("cloudnexus.v1.App.Gone", DeliveryPhase::Pending));
    lab.now += i64::try_from(PATIENCE.as_millis()).unwrap() + 1;
    lab.with(|core, at| core.forget_old(at));
    assert_eq!((lab.types()[3].as_str(), phase(&lab, 3)), ("cloudnexus.v1.App.Unsettled", DeliveryPhase::Pending));
}

#[test]
fn a_callback_is_made_once_and_never_by_what_was_refused() {
    let mut lab = Lab::new();
    let once = Intent { idempotency_key: Some("k".into()), ..calling(route(0)) };
    lab.submit(&once).unwrap();
    assert!(lab.submit(&once).unwrap().replayed);
    assert_eq!(lab.deliveries().len(), 1);
    lab.submit(&Intent { dry_run: true, ..calling(route(1)) }).unwrap();
    assert_eq!(lab.submit(&calling(route(0))).unwrap_err().code, Code::AlreadyExists);
    let mut unsigned = calling(route(2));
    unsigned.by.callback.as_mut().unwrap().secret = SigningSecret::named(name("nothing"));
    assert_eq!(lab.submit(&unsigned).unwrap_err().errors[0].field, "Callback-Secret");
    assert!(lab.core.world.routes.get(Some(&name("default")), &name("r-2")).is_none(), "all or nothing");
    assert_eq!(lab.deliveries().len(), 1);
    let project = create::<Project>(None, "p", ProjectSpec { organization: name("default"), ..ProjectSpec::default() });
    assert_eq!(lab.submit(&calling(project)).unwrap_err().code, Code::BadRequest);
}
