//! What is signed for hosts' instances, against stores of one member and a clock that moves when it is told to.

use nexus_env::ManualClock;
use nexus_iam::svid::SvidError;
use nexus_iam::tls::{ExpiryPolicy, Policy};
use nexus_iam::{Identity, RequestKey, Role};
use nexus_model::kind::{self, Instance, InstanceSpec, InstanceStatus};
use nexus_model::{Metadata, Object};
use nexus_store::Txn;
use nexus_store::embedded::EmbeddedStore;

use super::super::tests::{HOUR, START, config, expose, store};
use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// A region of two hosts, `h1` and `h2`, and a global group.
struct World {
    region: Arc<EmbeddedStore>,
    global: Arc<EmbeddedStore>,
    view: View,
    fleet: Fleet,
    clock: Arc<ManualClock>,
    config: ServerConfig,
    authority: Option<Arc<Authority>>,
    env: Env,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

impl World {
    async fn new() -> Self {
        let (config, dir) = config();
        let (region, global) = (store("local").await, store("global").await);
        let clock = Arc::new(ManualClock::at(START));
        let env = Env::real().with_clock(clock.clone());
        let (fleet, view, stop) = (Fleet::new(&config), View::new("localhost"), CancellationToken::new());
        let (follower, followed, end) = (view.clone(), region.clone() as Arc<dyn Store>, stop.clone());
        tokio::spawn(async move { follower.follow(followed, end).await });
        let authority = Authority::load(&config, &env).unwrap();
        Self { region, global, view, fleet, clock, config, authority, env, stop, dir }
    }

    fn workloads(&self) -> Arc<Workloads> {
        let (global, view, fleet) = (self.global.clone(), self.view.clone(), self.fleet.clone());
        let opened = Workloads::open(&self.config, &self.env, global, view, fleet, self.authority.clone());
        Arc::new(opened.unwrap())
    }

    fn run(&self, workloads: &Arc<Workloads>) {
        let (workloads, stop) = (workloads.clone(), self.stop.clone());
        tokio::spawn(async move { workloads.run(stop).await });
    }

    /// Writes an instance of `app` on `host` and waits until the server knows of it.
    async fn place(&self, uid: u8, app: &str, host: &str, change: impl FnOnce(&mut Object<Instance>)) -> Uid {
        let metadata = Metadata::new(format!("{app}-{uid}").parse().unwrap(), Some(name("shop")));
        let spec = InstanceSpec { app: name(app), ..InstanceSpec::default() };
        let mut object = Object::<Instance>::new(metadata, spec);
        object.metadata.uid = Uid::from_random([uid; 16]);
        object.status = InstanceStatus {
            host: Some(name(host)),
            phase: InstancePhase::Running,
            epoch: 1,
            ..InstanceStatus::default()
        };
        change(&mut object);
        let object = object.to_any();
        let at = key::of(kind::find("instances").unwrap(), &object);
        self.region.txn(Txn::put(at, serde_json::to_vec(&object).unwrap())).await.unwrap();
        let uid = object.metadata.uid;
        let known = || self.view.read(|w| w.instance(uid).is_some_and(|i| i.status.host.as_ref() == Some(&name(host))));
        until("the server knows of the instance", known).await;
        uid
    }

    async fn end(self) {
        self.stop.cancel();
        self.region.shutdown().await;
        self.global.shutdown().await;
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, met).await.unwrap_or_else(|_| panic!("waited for: {what}"));
}

fn id(path: &str) -> SpiffeId {
    format!("spiffe://home/{path}").parse().unwrap()
}

fn asks(host: &str, instance: Uid, key: &RequestKey, ids: &[SpiffeId]) -> WorkloadCertificateRequest {
    WorkloadCertificateRequest { host: name(host), instance, csr: key.request(ids).unwrap() }
}

fn asks_token(host: &str, instance: Uid, audience: &[&str]) -> WorkloadTokenRequest {
    WorkloadTokenRequest { host: name(host), instance, audience: audience.iter().map(|a| (*a).to_owned()).collect() }
}

#[tokio::test]
async fn a_host_gets_certificates_of_its_own_instances_for_an_hour() {
    let world = World::new().await;
    let workloads = world.workloads();
    let web = world.place(1, "web", "h1", |_| {}).await;
    let key = RequestKey::generate().unwrap();
    let own = id("project/shop/app/web");
    let signed = workloads.certificate(&asks("h1", web, &key, std::slice::from_ref(&own))).unwrap();
    let identity = Identity::from_pem(&signed.cert, &key.to_pem()).unwrap();
    assert_eq!((identity.id(), signed.id), (own.clone(), own.to_string()));
    assert_eq!(identity.not_after(), at_millis(START) + HOUR);
    // Inside the fleet it opens no door: it has no role.
    let all = [Role::Server, Role::Agent, Role::Gateway, Role::Operator];
    assert!(!Policy::roles("home", &all).expiry(ExpiryPolicy::Strict).allows(&own));
    world.end().await;
}

#[tokio::test]
async fn a_job_is_another_than_the_app_of_its_name_and_nothing_once_it_has_ended() {
    let world = World::new().await;
    let workloads = world.workloads();
    world.run(&workloads);
    let part = |i: &mut Object<Instance>| i.spec.job = Some(kind::InstanceJob::default());
    let job = world.place(1, "web", "h1", part).await;
    let key = RequestKey::generate().unwrap();
    let (own, app) = (id("project/shop/job/web"), id("project/shop/app/web"));
    let signed = workloads.certificate(&asks("h1", job, &key, std::slice::from_ref(&own))).unwrap();
    assert_eq!(signed.id, own.to_string());
    for wrong in [vec![app.clone()], vec![own.clone(), app.clone()]] {
        let refused = workloads.certificate(&asks("h1", job, &key, &wrong)).unwrap_err();
        assert_eq!(refused.code, code::FORBIDDEN, "{wrong:?}");
    }
    until("its key is known", || workloads.token(&asks_token("h1", job, &["db"])).is_ok()).await;
    let token = workloads.token(&asks_token("h1", job, &["db"])).unwrap().token;
    let bundle = JwtBundle::from_jwks(workloads.keys.borrow().jwks.as_bytes()).unwrap();
    assert_eq!(svid::verify(&token, &bundle, "home", "db", at_millis(START)).unwrap().0, own);
    // The app of that name is itself.
    let web = world.place(2, "web", "h1", |_| {}).await;
    assert!(workloads.certificate(&asks("h1", web, &key, std::slice::from_ref(&app))).is_ok());
    assert!(workloads.certificate(&asks("h1", web, &key, std::slice::from_ref(&own))).is_err());
    // One that has ended proves nothing any more.
    world
        .place(3, "web", "h1", |i| {
            part(i);
            i.status.finished = Some(Timestamp::from_millis(START));
        })
        .await;
    let ended = Uid::from_random([3; 16]);
    assert_eq!(workloads.token(&asks_token("h1", ended, &["db"])).unwrap_err().code, code::FORBIDDEN);
    world.end().await;
}

#[tokio::test]
async fn a_host_that_was_broken_into_gets_nothing_of_what_is_elsewhere() {
    let world = World::new().await;
    let workloads = world.workloads();
    world.run(&workloads);
    let web = world.place(1, "web", "h1", |_| {}).await;
    let db = world.place(2, "db", "h2", |_| {}).await;
    let key = RequestKey::generate().unwrap();
    let (web_id, db_id) = (id("project/shop/app/web"), id("project/shop/app/db"));
    let refused = |request: &WorkloadCertificateRequest| workloads.certificate(request).unwrap_err().code;

    // Another host's instance, by its own name; and its own instance by another's name, alone or beside its own.
    assert_eq!(refused(&asks("h1", db, &key, std::slice::from_ref(&db_id))), code::FORBIDDEN);
    assert_eq!(refused(&asks("h1", web, &key, std::slice::from_ref(&db_id))), code::FORBIDDEN);
    assert_eq!(refused(&asks("h1", web, &key, &[web_id.clone(), db_id.clone()])), code::FORBIDDEN);
    // Roles of the fleet, other projects, other trust domains, instances that are not.
    let away = "spiffe://away/project/shop/app/web".parse().unwrap();
    for other in [id("server/m1"), id("agent/h1"), id("api/m1"), id("project/other/app/web"), away] {
        assert_eq!(refused(&asks("h1", web, &key, &[other])), code::FORBIDDEN);
    }
    let unknown = Uid::from_random([9; 16]);
    assert_eq!(refused(&asks("h1", unknown, &key, std::slice::from_ref(&web_id))), code::FORBIDDEN);
    let garbage = WorkloadCertificateRequest { host: name("h1"), instance: web, csr: "garbage".into() };
    assert_eq!(refused(&garbage), code::BAD_REQUEST);

    // Tokens likewise. The instance alone is named: who it is, is not for the host to say.
    let ready = || workloads.token(&asks_token("h1", web, &["db"])).is_ok();
    until("this server's key is published", ready).await;
    assert_eq!(workloads.token(&asks_token("h1", db, &["web"])).unwrap_err().code, code::FORBIDDEN);
    assert_eq!(workloads.token(&asks_token("h2", web, &["web"])).unwrap_err().code, code::FORBIDDEN);
    assert_eq!(workloads.token(&asks_token("h1", web, &[])).unwrap_err().code, code::BAD_REQUEST);
    assert_eq!(workloads.token(&asks_token("h1", web, &["a"; 9])).unwrap_err().code, code::BAD_REQUEST);

    // Once it has moved, is deleted or was lost, its old host gets nothing more.
    world.place(1, "web", "h2", |_| {}).await;
    assert_eq!(refused(&asks("h1", web, &key, std::slice::from_ref(&web_id))), code::FORBIDDEN);
    assert!(workloads.certificate(&asks("h2", web, &key, std::slice::from_ref(&web_id))).is_ok());
    let lost = world.place(3, "web", "h1", |i| i.status.phase = InstancePhase::Lost).await;
    assert_eq!(refused(&asks("h1", lost, &key, std::slice::from_ref(&web_id))), code::FORBIDDEN);
    let deleted = Some(Timestamp::from_millis(START));
    let gone = world.place(4, "web", "h1", |i| i.metadata.deleting = deleted).await;
    assert_eq!(refused(&asks("h1", gone, &key, &[web_id])), code::FORBIDDEN);
    world.end().await;
}

#[tokio::test]
async fn who_speaks_for_a_host_is_that_hosts_agent() {
    use nexus_wire::Caller;
    let caller = |id: &str| Caller {
        id: Some(format!("spiffe://home/{id}").into()),
        remote: "tcp:10.0.0.9:1".parse().unwrap(),
        request_id: "r".into(),
        deadline: None,
    };
    assert!(is_host(&caller("agent/h1"), &name("h1")).is_ok());
    for other in ["agent/h2", "server/h1", "gateway/h1", "project/shop/app/web", "agent/h1/x"] {
        assert!(is_host(&caller(other), &name("h1")).is_err(), "{other}");
    }
}

#[tokio::test]
async fn tokens_are_believed_everywhere_once_their_key_is_published() {
    let world = World::new().await;
    let web = world.place(1, "web", "h1", |_| {}).await;
    let workloads = world.workloads();
    let early = workloads.token(&asks_token("h1", web, &["db"])).unwrap_err();
    assert_eq!(early.code, code::DRAINING, "nobody could check it yet");
    world.run(&workloads);
    until("the key is published", || workloads.token(&asks_token("h1", web, &["db"])).is_ok()).await;
    let made = workloads.token(&asks_token("h1", web, &["db"])).unwrap();
    assert_eq!(made.expires, Timestamp::from_millis(START + 300_000));

    // Another server, perhaps of another region, reads the key and has one of its own.
    std::fs::create_dir(world.dir.path().join("other")).unwrap();
    let config = ServerConfig { data_dir: world.dir.path().join("other"), ..world.config.clone() };
    let (view, fleet) = (world.view.clone(), world.fleet.clone());
    let other = Workloads::open(&config, &world.env, world.global.clone(), view, fleet, None).unwrap();
    let other = Arc::new(other);
    assert_ne!(other.key.public(), workloads.key.public());
    world.run(&other);
    let known = || JwtBundle::from_jwks(other.keys.borrow().jwks.as_bytes()).unwrap_or_default();
    until("both keys are known", || known().len() == 2).await;
    let now = at_millis(START);
    let (who, _) = svid::verify(&made.token, &known(), "home", "db", now).unwrap();
    assert_eq!(who, id("project/shop/app/web"));
    let late = now + Duration::from_secs(300);
    assert_eq!(svid::verify(&made.token, &known(), "home", "db", late).unwrap_err(), SvidError::Expired);
    // It holds no key of the authority, and says so.
    let key = RequestKey::generate().unwrap();
    let asked = asks("h1", web, &key, &[id("project/shop/app/web")]);
    assert_eq!(other.certificate(&asked).unwrap_err().code, code::DRAINING);
    world.end().await;
}

#[tokio::test]
async fn a_key_outlives_its_server_by_a_week_and_one_in_use_is_renewed() {
    let world = World::new().await;
    let gone = world.workloads();
    let known = BTreeMap::new();
    gone.publish_once(&known).await.unwrap();
    // The data folder is lost, and with it the key.
    std::fs::remove_file(world.dir.path().join(KEY_FILE)).unwrap();
    let workloads = world.workloads();
    assert_eq!(world.workloads().key.public(), workloads.key.public(), "a key stays over restarts");
    world.run(&workloads);
    let kids = || workloads.records.borrow().as_ref().clone().unwrap_or_default();
    until("both keys are known", || kids().len() == 2).await;

    let renewed = |at: i64| Timestamp::from_millis(at);
    let later = START + i64::try_from(RENEW.as_millis()).unwrap();
    world.clock.set_wall(later);
    workloads.publish_once(&kids()).await.unwrap();
    let own = workloads.key.public().kid().to_owned();
    until("the own key is renewed", || kids()[&own].value.renewed == renewed(later)).await;
    assert_eq!(kids().len(), 2);

    world.clock.set_wall(START + i64::try_from(FORGET.as_millis()).unwrap());
    workloads.publish_once(&kids()).await.unwrap();
    until("the key that nobody has is gone", || kids().len() == 1 && kids().contains_key(&own)).await;
    world.end().await;
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    own_key(dir.path()).unwrap();
    expose(&dir.path().join(KEY_FILE));
    assert!(own_key(dir.path()).unwrap_err().to_string().contains("chmod 600"));
}
