//! Secrets as the writer sees them: versions, what apps get of them, and who keeps them from being deleted.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Object, Timestamp};
use serde_json::json;

struct Lab {
    core: Core,
    rng: SeededRng,
    committed: BTreeMap<String, Vec<u8>>,
    revision: u64,
}

impl Lab {
    fn new() -> Self {
        let (zones, cells) = (vec![name("zone-a")], vec![name("cell-a")]);
        let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells };
        let core = Core::new(World::default(), bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut lab = Self { core, rng: SeededRng::new(7), committed: BTreeMap::new(), revision: 0 };
        lab.with(|core, at| core.bootstrap(at));
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let at = Moment { now: Timestamp::from_millis(1_000_000), monotonic: Duration::ZERO, rng: &self.rng };
        let answer = f(&mut self.core, at);
        while self.core.reconcile(at) {}
        for pack in self.core.take_packs() {
            assert!(pack.ops.len() <= 126);
            self.revision += 1;
            for (key, value) in &pack.ops {
                match value {
                    Some(value) => self.committed.insert(key.clone(), value.to_vec()),
                    None => self.committed.remove(key),
                };
            }
            self.core.committed(&pack, self.revision);
        }
        answer
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    /// What a server sends of a secret: sealed already.
    fn set(&mut self, secret: &str, version: u64, keys: &[&str]) -> Result<Accepted, ApiError> {
        self.submit(&sealed(secret, version, keys, "one"))
    }

    fn app(&self) -> &Object<App> {
        self.core.world.apps.get(Some(&name("default")), &name("shop")).unwrap()
    }

    fn ready(&self) -> (String, String) {
        let ready = &self.app().status.conditions[0];
        (ready.reason.clone(), ready.message.clone())
    }

    fn templates(&self) -> Vec<Option<u64>> {
        let instances = self.core.world.instances_of(self.app().metadata.uid);
        instances.map(|i| i.spec.template.secrets[0].version).collect()
    }

    fn rows(&self) -> Vec<&str> {
        self.committed.keys().filter(|k| k.starts_with("s/")).map(String::as_str).collect()
    }
}

fn sealed(secret: &str, version: u64, keys: &[&str], text: &str) -> Intent {
    let keys = keys.iter().map(|k| (*k).to_owned()).collect();
    let spec = SecretSpec { version, keys, sealed: Some(format!("sealed {text} {version}")), ..SecretSpec::default() };
    let Change::Create { object } = create::<Secret>(Some("default"), secret, spec).change else { unreachable!() };
    intent("secrets", Some("default"), secret, Change::Put { object })
}

fn uses(secrets: serde_json::Value) -> AppSpec {
    AppSpec { secrets: serde_json::from_value(secrets).unwrap(), ..web(1) }
}

#[test]
fn ten_versions_are_kept_in_rows_of_their_own_and_none_is_in_the_object() {
    let mut lab = Lab::new();
    for version in 1..=12 {
        lab.set("db", version, &["password"]).unwrap();
    }
    let rows: Vec<String> = (3..=12).map(|v| format!("s/default/db/{v:020}")).collect();
    assert_eq!(lab.rows(), rows);
    assert_eq!(lab.committed[&rows[9]], b"sealed one 12");
    let secret = lab.core.world.secrets.get(Some(&name("default")), &name("db")).unwrap();
    assert_eq!((secret.spec.version, secret.status.versions.len(), secret.metadata.generation), (12, 10, 12));
    assert!(secret.spec.sealed.is_none());
    for (key, value) in lab.committed.iter().filter(|(key, _)| !key.starts_with("s/")) {
        assert!(!String::from_utf8_lossy(value).contains("sealed one"), "{key}");
    }
    // What was sealed for another version than comes next is refused, and values that were not sealed too.
    assert_eq!(lab.set("db", 12, &["password"]).unwrap_err().code, Code::PreconditionFailed);
    assert_eq!(lab.set("new", 2, &["password"]).unwrap_err().code, Code::PreconditionFailed);
    let clear = create::<Secret>(Some("default"), "clear", Secret::example());
    assert_eq!(lab.submit(&clear).unwrap_err().code, Code::Internal);
    lab.submit(&intent("secrets", Some("default"), "db", Change::Delete)).unwrap();
    assert!(lab.rows().is_empty());
}

#[test]
fn a_retry_that_was_sealed_again_gets_the_first_answer() {
    let mut lab = Lab::new();
    let once = |text: &str| Intent { idempotency_key: Some("k".into()), ..sealed("db", 1, &["password"], text) };
    assert!(!lab.submit(&once("one")).unwrap().replayed);
    let again = lab.submit(&once("other bytes")).unwrap();
    assert!(again.replayed);
    assert!(!serde_json::to_string(&again).unwrap().contains("sealed "));
    let kept: Vec<_> = lab.committed.iter().filter(|(k, _)| k.starts_with("i/")).collect();
    assert!(kept.len() == 1 && !String::from_utf8_lossy(kept[0].1).contains("sealed "));
}

#[test]
fn an_app_waits_for_what_it_names_and_says_so() {
    let mut lab = Lab::new();
    lab.submit(&create::<Image>(Some("default"), "web", image("web"))).unwrap();
    let spec = uses(json!([{"name": "db", "env": {"PASSWORD": "password"}}]));
    lab.submit(&create::<App>(Some("default"), "shop", spec)).unwrap();
    let (reason, message) = lab.ready();
    assert!(reason == "SecretNotFound" && message.contains("`nexus secret set db KEY`"), "{reason}: {message}");
    lab.set("db", 1, &["user"]).unwrap();
    assert_eq!(lab.ready().0, "SecretKeyNotFound");
    assert!(lab.templates().is_empty());
    lab.set("db", 2, &["password", "user"]).unwrap();
    assert_eq!(lab.templates(), [Some(2)], "a variable's version is settled when its instance is made");

    // A new version of what a variable holds makes new instances. It is in use, so it can't be deleted.
    lab.set("db", 3, &["password"]).unwrap();
    assert!(lab.templates().contains(&Some(3)), "{:?}", lab.templates());
    let delete = intent("secrets", Some("default"), "db", Change::Delete);
    let refused = lab.submit(&delete).unwrap_err();
    assert!(refused.code == Code::Conflict && refused.detail.contains("(shop)"), "{}", refused.detail);

    // Files follow without a new instance; a version that is gone is missed.
    let patch = |secrets: serde_json::Value| Change::Patch { patch: json!({"spec": {"secrets": secrets}}) };
    lab.submit(&intent("apps", Some("default"), "shop", patch(json!([{"name": "db"}])))).unwrap();
    let before = lab.templates();
    lab.set("db", 4, &["password"]).unwrap();
    assert_eq!(lab.templates(), before);
    lab.submit(&intent("apps", Some("default"), "shop", patch(json!([{"name": "db", "version": 9}])))).unwrap();
    assert_eq!(lab.ready().0, "SecretVersionNotFound");
    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    lab.submit(&delete).unwrap();
}
