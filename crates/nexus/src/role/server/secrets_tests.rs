//! What hosts get of secrets, and what is put under a new master key, against stores of one member.

use std::time::Duration;

use nexus_control::intent::{Accepted, Intent, Writer};
use nexus_iam::envelope::{EnvelopeError, FileKeys};
use nexus_model::kind::{self, Instance, InstanceSpec, InstanceStatus, SecretRef, SecretSpec, SecretVersion};
use nexus_model::{ApiError, Metadata, Object, SecretData, SecretValue, Timestamp, Uid, key};
use nexus_store::Txn;
use nexus_store::embedded::EmbeddedStore;
use tokio_util::sync::CancellationToken;

use super::super::rewrap::{Rewrap, stores};
use super::super::tests::{config, store};
use super::*;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

struct World {
    region: Arc<EmbeddedStore>,
    global: Arc<EmbeddedStore>,
    secrets: Secrets,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(keys: FileKeys) -> Self {
        let (config, dir) = config();
        let (region, global) = (store("local").await, store("global").await);
        let (fleet, view, stop) = (Fleet::new(&config), View::new("localhost"), CancellationToken::new());
        let (follower, own, shared, end) = (view.clone(), region.clone(), global.clone(), stop.clone());
        tokio::spawn(async move {
            futures::join!(follower.follow(own, end.clone()), follower.follow_global(shared, end));
        });
        let env = Env::real();
        let (notes, _) = Notes::new(&env, dir.path().join("notes"), name("local"), name("m1"));
        let (keys, stores) = (Arc::new(keys), (region.clone(), global.clone()));
        let secrets = Secrets { view, fleet, region: stores.0, global: stores.1, keys, notes, env };
        Self { region, global, secrets, stop, _dir: dir }
    }

    /// Writes a version of a secret as the writer would.
    async fn set(&self, region: &str, secret: &str, version: u64, value: &str) {
        let store = if region == "global" { &self.global } else { &self.region };
        let mut object = Object::<Secret>::new(Metadata::new(name(secret), Some(name("shop"))), SecretSpec::default());
        object.metadata.region = Some(name(region));
        (object.spec.version, object.spec.keys) = (version, vec!["k".into()]);
        object.status.versions = vec![SecretVersion { version, created: Timestamp::default() }];
        let data = SecretData([("k".to_owned(), SecretValue::new(value.into()))].into());
        let id = VersionId::of(&object, version).unwrap();
        let sealed = id.seal(&*self.secrets.keys, &data).unwrap();
        store.txn(Txn::put(id.key(), sealed)).await.unwrap();
        let at = key::of(kind::find("secrets").unwrap(), &object.to_any());
        store.txn(Txn::put(at, object.to_vec())).await.unwrap();
        let known = |w: &nexus_control::world::World| {
            let world = if region == "global" { w.global.as_deref()? } else { w };
            world.secrets.get(Some(&name("shop")), &name(secret)).map(|s| s.spec.version == version)
        };
        self.until(|| self.secrets.view.read(known).unwrap_or(false)).await;
    }

    async fn place(&self, uid: u8, host: &str, secrets: serde_json::Value) -> Uid {
        let metadata = Metadata::new(name(&format!("web-{uid}")), Some(name("shop")));
        let mut object =
            Object::<Instance>::new(metadata, InstanceSpec { app: name("web"), ..InstanceSpec::default() });
        object.metadata.uid = Uid::from_random([uid; 16]);
        object.spec.template.secrets = serde_json::from_value::<Vec<SecretRef>>(secrets).unwrap();
        object.status = InstanceStatus { host: Some(name(host)), ..InstanceStatus::default() };
        let (uid, at) = (object.metadata.uid, key::of(kind::find("instances").unwrap(), &object.to_any()));
        self.region.txn(Txn::put(at, object.to_vec())).await.unwrap();
        self.until(|| self.secrets.view.read(|w| w.instance(uid).is_some())).await;
        uid
    }

    async fn ask(&self, host: &str, instance: Uid, secret: &str, version: Option<u64>) -> Result<String, String> {
        let request = WorkloadSecretRequest { host: name(host), instance, name: name(secret), version };
        let answer = self.secrets.secret(&request).await.map_err(|refusal| refusal.code.to_string())?;
        Ok(format!("{}:{}", answer.version, answer.data.0["k"].text().unwrap()))
    }

    async fn until(&self, mut holds: impl FnMut() -> bool) {
        let met = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), met).await.expect("in time");
    }

    async fn end(self) {
        self.stop.cancel();
        self.region.shutdown().await;
        self.global.shutdown().await;
    }
}

#[tokio::test]
async fn a_host_gets_the_secrets_that_its_own_instances_name_and_no_others() {
    let world = World::new(FileKeys::generate()).await;
    world.set("local", "db", 3, "region").await;
    world.set("global", "db", 1, "shadowed").await;
    world.set("global", "tls", 2, "shared").await;
    let refs = serde_json::json!([{"name": "db"}, {"name": "tls"}, {"name": "none"}]);
    let here = world.place(1, "h1", refs).await;
    let pinned = world.place(2, "h1", serde_json::json!([{"name": "db", "version": 3}])).await;
    let there = world.place(3, "h2", serde_json::json!([{"name": "db"}])).await;

    assert_eq!(world.ask("h1", here, "db", None).await.unwrap(), "3:region", "the region's own goes first");
    assert_eq!(world.ask("h1", here, "tls", None).await.unwrap(), "2:shared");
    assert_eq!(world.ask("h1", pinned, "db", Some(3)).await.unwrap(), "3:region");
    assert_eq!(world.ask("h1", here, "none", None).await.unwrap_err(), "not-found");
    // Another host's instance; a secret or a version that the app does not name; an instance that is not.
    for (instance, secret, version) in [
        (there, "db", None),
        (pinned, "tls", None),
        (pinned, "db", None),
        (here, "db", Some(3)),
        (Uid::from_random([9; 16]), "db", None),
    ] {
        assert_eq!(world.ask("h1", instance, secret, version).await.unwrap_err(), code::FORBIDDEN, "{secret}");
    }
    world.end().await;
}

/// Takes nothing: there are no objects to write here.
struct NoWriter;

#[async_trait::async_trait]
impl Writer for NoWriter {
    async fn submit(&self, _: Intent) -> Result<Accepted, ApiError> {
        Err(ApiError::new(Code::Unavailable, "nobody writes here"))
    }
}

#[tokio::test]
async fn everything_comes_under_the_current_key_and_what_is_damaged_is_named() {
    let mut keys = FileKeys::generate();
    let old = keys.current();
    let world = World::new(FileKeys::parse(&keys.to_text()).unwrap()).await;
    world.set("local", "db", 1, "one").await;
    world.set("global", "tls", 1, "two").await;
    let damaged = key::secret_version(&name("shop"), &name("bad"), 1);
    world.region.txn(Txn::put(damaged, "{}")).await.unwrap();

    let new = keys.rotate().unwrap();
    let rewrap = |keys: &FileKeys| Rewrap {
        region: name("local"),
        server: name("m1"),
        stores: stores(&name("local"), world.region.clone(), world.global.clone()),
        global_writer: Arc::new(NoWriter),
        keys: Arc::new(FileKeys::parse(&keys.to_text()).unwrap()),
        env: Env::real(),
    };
    let counted = rewrap(&keys).run(false).await.unwrap();
    assert_eq!((counted.secrets.seen, counted.secrets.rewrapped, counted.used[old.as_str()]), (3, 0, 2));
    let done = rewrap(&keys).run(true).await.unwrap();
    assert_eq!((done.secrets.rewrapped, done.secrets.failed), (2, 1));
    assert_eq!((done.used.get(old.as_str()), done.used[new.as_str()]), (None, 2));
    assert!(done.failures[0].contains("s/shop/bad/"), "{:?}", done.failures);
    assert_eq!(rewrap(&keys).run(true).await.unwrap().secrets.rewrapped, 0, "again, nothing is left to do");

    // The old key is of no use any more, and a server that has only that one says which is missing.
    keys.remove(&old).unwrap();
    let id = VersionId { region: name("local"), project: name("shop"), name: name("db"), version: 1 };
    let opened = id.open(&*world.region, &keys, Consistency::Linearizable).await.unwrap();
    assert_eq!(opened.0["k"].text(), Some("one"));
    let stale = id.open(&*world.region, &*world.secrets.keys, Consistency::Linearizable).await.unwrap_err();
    assert!(matches!(stale, OpenError::Sealed(_, 1, EnvelopeError::UnknownKey(id)) if id == new));
    world.end().await;
}
