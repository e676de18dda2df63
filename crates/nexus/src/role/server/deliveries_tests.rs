//! Against receivers of this machine, and a writer that only remembers what it is told.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Mutex;

use async_trait::async_trait;
use nexus_iam::envelope::FileKeys;
use nexus_model::kind::{DeliverySpec, SecretSpec, SecretVersion, WebhookSpec};
use nexus_model::{Metadata, OwnerRef, SecretData, SecretValue};
use nexus_store::embedded::EmbeddedStore;
use nexus_store::{Op, Txn};

use super::super::tests::store;
use super::*;

const KEY: &[u8] = b"a key of at least sixteen bytes";

#[derive(Default)]
struct Heard(Mutex<Vec<Attempt>>);

#[async_trait]
impl Writer for Heard {
    async fn submit(&self, intent: Intent) -> Result<Accepted, ApiError> {
        let Change::Tell { deed: Telling::Attempted(attempt) } = intent.change else { panic!("no attempt") };
        self.0.lock().unwrap().push(attempt);
        Err(ApiError::not_found(Delivery::KIND, intent.target.name.as_str()))
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

struct Lab {
    sender: Sender,
    heard: Arc<Heard>,
    store: Arc<EmbeddedStore>,
}

impl Lab {
    async fn new(networks: &[&str]) -> Self {
        let (store, heard) = (store("local").await, Arc::new(Heard::default()));
        let networks: Vec<String> = networks.iter().map(|n| (*n).to_owned()).collect();
        let keys = Arc::new(FileKeys::generate());
        let id = VersionId { region: name("local"), project: name("shop"), name: name("hooks"), version: 1 };
        let data = SecretData([("key".to_owned(), SecretValue::new(KEY.to_vec()))].into());
        let sealed = id.seal(&*keys, &data).unwrap();
        let mut secret = object::<Secret>("hooks", SecretSpec { version: 1, ..SecretSpec::default() });
        secret.status.versions.push(SecretVersion { version: 1, created: Timestamp::default() });
        let rows = vec![Op::put("o/secrets/shop/hooks", secret.to_vec()), Op::put(id.key(), sealed)];
        store.txn(Txn::new(vec![], rows)).await.unwrap();
        let sender = Sender {
            server: name("server-a"),
            env: Env::real(),
            store: store.clone(),
            writer: heard.clone(),
            secrets: vec![store.clone()],
            keys,
            door: door(&networks).unwrap(),
            group: "local".to_owned(),
            figures: Figures::default(),
        };
        Self { sender, heard, store }
    }

    async fn tried(&self, url: &str) -> Attempt {
        self.sender.attempt(&callback(url)).await
    }
}

fn object<K: Kind>(named: &str, spec: K::Spec) -> Object<K> {
    let metadata = Metadata { region: Some(name("local")), ..Metadata::new(name(named), Some(name("shop"))) };
    Object::new(metadata, spec)
}

fn callback(url: &str) -> Object<Delivery> {
    let secret = Some(SigningSecret::named(name("hooks")));
    let spec = DeliverySpec { url: Some(url.to_owned()), secret, ..Delivery::example() };
    object("1", DeliverySpec { webhook: None, ..spec })
}

/// Takes one request and answers it; gives what was asked.
fn receiver(answer: &'static str) -> (String, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", listener.local_addr().unwrap());
    let asked = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut asked = Vec::new();
        while !String::from_utf8_lossy(&asked).contains("\"specversion\"") {
            let mut piece = [0; 4096];
            match stream.read(&mut piece).unwrap() {
                0 => break,
                n => asked.extend(&piece[..n]),
            }
        }
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8(asked).unwrap()
    });
    (url, asked)
}

#[tokio::test]
async fn nothing_inside_is_told_anything_unless_the_operator_allows_it() {
    let strict = Lab::new(&[]).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    // By address, mapped into IPv6, and by a name that leads there.
    for inside in ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "169.254.169.254", "10.0.0.1", "[fd00::1]"]
    {
        let url = format!("http://{inside}:{port}/");
        let attempt = strict.tried(&url).await;
        assert!(attempt.fatal && !attempt.taken && attempt.message.contains(SETTING), "{inside}: {attempt:?}");
        let refused = Judge(strict.sender.door.clone()).refuses(&url);
        assert_eq!(refused.is_some(), inside != "localhost", "{inside}: a name is judged when it is used");
    }
    assert!(listener.accept().is_err(), "nobody came");
    assert!(Judge(strict.sender.door.clone()).refuses("https://8.8.8.8/").is_none());

    let open = Lab::new(&["127.0.0.0/8"]).await;
    let (url, asked) = receiver("HTTP/1.1 204 x\r\ncontent-length: 0\r\n\r\n");
    let attempt = open.tried(&url).await;
    assert!(attempt.taken, "{attempt:?}");
    let asked = asked.join().unwrap();
    let (head, body) = asked.split_once("\r\n\r\n").unwrap();
    let header = |name: &str| {
        let lines = head.lines().filter_map(|l| l.split_once(": "));
        lines.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).unwrap().1.to_owned()
    };
    let time: u64 = header(TIME_HEADER).parse().unwrap();
    let key = SigningKey::parse(KEY).unwrap();
    assert!(key.check(&header(ID_HEADER), time, body.as_bytes(), &header(SIGNATURE_HEADER)));
    assert_eq!(header("content-type"), CLOUD_EVENT);
    let event: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!((event["specversion"].as_str(), event["id"].as_str()), (Some("1.0"), Some(&*header(ID_HEADER))));
    strict.store.shutdown().await;
    open.store.shutdown().await;
}

#[tokio::test]
async fn redirects_are_not_followed_and_whoever_is_gone_is_asked_no_more() {
    let lab = Lab::new(&["127.0.0.0/8"]).await;
    let inside = TcpListener::bind("127.0.0.1:0").unwrap();
    inside.set_nonblocking(true).unwrap();
    let moved =
        format!("HTTP/1.1 307 x\r\nlocation: http://{}/\r\ncontent-length: 0\r\n\r\n", inside.local_addr().unwrap());
    let (url, asked) = receiver(moved.leak());
    let attempt = lab.tried(&url).await;
    assert!(!attempt.taken && !attempt.fatal && attempt.message.contains("redirects"), "{attempt:?}");
    asked.join().unwrap();
    assert!(inside.accept().is_err());
    for (answer, fatal) in
        [("HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n", false), ("HTTP/1.1 410 x\r\ncontent-length: 0\r\n\r\n", true)]
    {
        let (url, asked) = receiver(answer);
        let attempt = lab.tried(&url).await;
        assert_eq!((attempt.taken, attempt.fatal), (false, fatal), "{attempt:?}");
        asked.join().unwrap();
    }
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let attempt = lab.tried(&format!("http://{closed}/")).await;
    assert!(!attempt.fatal && attempt.message.contains("reached"), "{attempt:?}");
    let mut unsigned = callback("http://127.0.0.1:1/");
    unsigned.spec.secret = Some(SigningSecret::named(name("nothing")));
    assert!(lab.sender.attempt(&unsigned).await.message.contains("no secret nothing"));
    lab.store.shutdown().await;
}

#[tokio::test]
async fn a_webhook_that_is_gone_or_disabled_is_told_nothing() {
    let lab = Lab::new(&["127.0.0.0/8"]).await;
    let hook = |enabled| object::<Webhook>("ci", WebhookSpec { enabled, ..Webhook::example() });
    let owner = OwnerRef { uid: Uid::from_random([1; 16]), ..hook(true).owner_ref() };
    let mut delivery = object::<Delivery>("1", Delivery::example());
    delivery.spec.webhook = Some(name("ci"));
    delivery.metadata.owner = Some(owner.clone());
    delivery.status = kind::DeliveryStatus { phase: DeliveryPhase::Pending, ..Default::default() };
    assert!(lab.sender.attempt(&delivery).await.obsolete);
    let put = async |hook: Object<Webhook>| {
        lab.store.txn(Txn::put("o/webhooks/shop/ci", hook.to_vec())).await.unwrap();
    };
    put(hook(true)).await;
    assert!(lab.sender.attempt(&delivery).await.obsolete, "another has its name");
    let mut off = hook(false);
    off.metadata.uid = owner.uid;
    put(off).await;
    let attempt = lab.sender.attempt(&delivery).await;
    assert!(attempt.fatal && attempt.message.contains("disabled"), "{attempt:?}");

    // The leader finds it by itself, and brings what came of it.
    lab.store.txn(Txn::put("o/deliveries/shop/1", delivery.to_vec())).await.unwrap();
    let (stop, heard) = (CancellationToken::new(), lab.heard.clone());
    let figures = Mutex::new(prometheus_client::registry::Registry::default());
    lab.sender.figures.register(&figures);
    let running = tokio::spawn(Arc::new(lab.sender).run(stop.clone()));
    let started = std::time::Instant::now();
    while heard.0.lock().unwrap().is_empty() {
        assert!(started.elapsed() < Duration::from_secs(60), "nobody brought anything");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(heard.0.lock().unwrap()[0].number, 1);
    // Whoever looks at the server's figures sees it.
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &figures.lock().unwrap()).unwrap();
    let of = |what: &str| {
        let line = format!(r#"nexus_webhook_deliveries_{what}{{group="local",project="shop",webhook="ci"}} "#);
        text.lines()
            .find_map(|l| l.strip_prefix(&line)?.parse::<u64>().ok())
            .unwrap_or_else(|| panic!("{line}: {text}"))
    };
    // This writer takes nothing down, so that it is tried on and on.
    assert!(of("waiting") == 1 && of("failed_total") >= 1 && of("delivered_total") == 0, "{text}");
    stop.cancel();
    running.await.unwrap();
    lab.store.shutdown().await;
}

#[test]
fn of_one_object_only_the_oldest_is_on_its_way_and_no_project_takes_all_the_room() {
    let mut queue = Queue::default();
    let now = Timestamp::from_millis(10_000);
    let put = |queue: &mut Queue, n: usize, project: &str, object_of: u8, next: i64| {
        let mut delivery = object::<Delivery>(&format!("{n:04}"), Delivery::example());
        delivery.metadata.project = Some(name(project));
        delivery.metadata.owner = Some(OwnerRef { uid: Uid::from_random([9; 16]), ..delivery.owner_ref() });
        delivery.spec.regarding.uid = Uid::from_random([object_of; 16]);
        delivery.status.phase = DeliveryPhase::Pending;
        delivery.status.next = Some(Timestamp::from_millis(next));
        queue.put(format!("o/deliveries/{project}/{n:04}"), 1, delivery);
    };
    // The first of the object waits for its next try: the second waits behind it.
    put(&mut queue, 1, "shop", 1, 12_000);
    put(&mut queue, 2, "shop", 1, 0);
    put(&mut queue, 3, "shop", 2, 0);
    let (found, wait) = queue.due(now);
    let keys: Vec<_> = found.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!((keys.as_slice(), wait), (&["o/deliveries/shop/0003"][..], Duration::from_secs(2)));
    assert!(queue.due(now).0.is_empty(), "it is on its way");
    assert_eq!(queue.due(Timestamp::from_millis(12_000)).0[0].0, "o/deliveries/shop/0001");
    // It was taken: what stands behind it goes.
    let mut taken = queue.rows["o/deliveries/shop/0001"].delivery.clone();
    taken.status.phase = DeliveryPhase::Delivered;
    queue.busy.remove("o/deliveries/shop/0001");
    queue.put("o/deliveries/shop/0001".into(), 2, taken);
    assert_eq!(queue.due(now).0[0].0, "o/deliveries/shop/0002");

    for n in 10..40 {
        put(&mut queue, n, "flood", u8::try_from(n).unwrap(), 0);
        put(&mut queue, n, "quiet", 100, 0);
    }
    let (found, _) = queue.due(now);
    let of = |project: &str| found.iter().filter(|(key, _)| key.contains(project)).count();
    assert_eq!((of("flood"), of("quiet")), (OF_ONE_PROJECT, 1));
}
