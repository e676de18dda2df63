//! The audit log that the writer keeps: one record for each accepted change, in the change's own transaction, whoever leads.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use common::net::{End, Net, Running, env, submit};
use common::{create, intent, name};
use nexus_audit::{
    ActorKind, Anchor, Answer, Entry, Hash, Header, Line, LogState, Mode, Options, Signer, Verifier, chain_line,
    entry_line, verify,
};
use nexus_control::audit::{Notes, place_of, principal_of, read_subject};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Deed, Intent, Provenance, Writer as _};
use nexus_control::region::{Config, Region};
use nexus_control::view::View;
use nexus_control::world::World;
use nexus_env::{MemDisk, SeededRng};
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Timestamp, key};
use nexus_store::embedded::EmbeddedStore;
use nexus_store::{RangeRequest, Store, Txn};
use serde_json::json;
use tokio_util::sync::CancellationToken;

fn bootstrap() -> Bootstrap {
    let (zones, cells) = (vec![name("zone-a")], vec![name("cell-a")]);
    Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells }
}

/// A writer's core and what it committed, a transaction after the other.
struct Lab {
    core: Core,
    rng: SeededRng,
    packs: Vec<BTreeMap<String, Option<Vec<u8>>>>,
}

impl Lab {
    fn new() -> Self {
        let core = Core::new(World::default(), bootstrap(), Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut lab = Self { core, rng: SeededRng::new(7), packs: Vec::new() };
        lab.with(|core, at| core.bootstrap(at));
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(1_700_000_000_000 + self.packs.len() as i64);
        let at = Moment { now, monotonic: Duration::ZERO, rng: &self.rng };
        let answer = f(&mut self.core, at);
        while self.core.reconcile(at) {}
        for pack in self.core.take_packs() {
            self.packs.push(pack.ops.iter().map(|(k, v)| (k.clone(), v.as_ref().map(|v| v.to_vec()))).collect());
            self.core.committed(&pack, self.packs.len() as u64);
        }
        answer
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn rows(&self) -> BTreeMap<String, Vec<u8>> {
        let mut rows = BTreeMap::new();
        for (key, value) in self.packs.iter().flatten() {
            match value {
                Some(value) => drop(rows.insert(key.clone(), value.clone())),
                None => drop(rows.remove(key)),
            }
        }
        rows
    }

    fn entries(&self) -> Vec<Entry> {
        records(&self.rows())
    }
}

fn records(rows: &BTreeMap<String, Vec<u8>>) -> Vec<Entry> {
    let records = rows.iter().filter(|(key, _)| key.starts_with(key::AUDIT_RECORDS));
    records.map(|(_, row)| Entry::from_row(row).unwrap()).collect()
}

/// Exports everything, signs it, and has it verified.
fn verified(rows: &BTreeMap<String, Vec<u8>>, group: &str) -> u64 {
    let state = LogState::from_bytes(&rows[key::AUDIT_STATE]).unwrap();
    let signer = Signer::from_seed("home", group, &[7; 32]).unwrap();
    let (size, root) = (state.frontier.size(), state.frontier.root());
    let (cluster, group) = ("home".to_owned(), group.to_owned());
    let header = Header { cluster, from: 0, group, mode: Mode::Whole, peaks: Vec::new(), to: size, version: 1 };
    let mut lines = vec![Line::Header(header).to_json()];
    let records = rows.iter().filter(|(key, _)| key.starts_with(key::AUDIT_RECORDS));
    lines.extend(records.map(|(_, row)| entry_line(row)));
    lines.push(Line::head(&signer.sign(size, root, 1)).to_json());
    let report = verify(&lines, &Verifier::new([signer.public_key()]), &[], Options::default()).unwrap();
    assert!(report.is_right(), "{report:?}");
    size
}

fn project(project: &str) -> Intent {
    create::<Project>(None, project, ProjectSpec { organization: name("default"), ..ProjectSpec::default() })
}

#[test]
fn each_accepted_change_leaves_one_record_in_its_own_transaction_and_nothing_else_does() {
    let mut lab = Lab::new();
    assert_eq!(lab.entries().len(), 0, "what the cloud makes for itself is no user's change");
    let by = Provenance {
        principal: "user:acme/ada".into(),
        policies: vec!["role:owner".into()],
        session: Some("s-1".into()),
        ..Provenance::default()
    };
    let made = lab.submit(&Intent { by, ..project("shop") }).unwrap();
    let pack = lab.packs.last().unwrap();
    assert!(pack.contains_key("o/projects/-/shop") && pack.contains_key(&key::audit_record(0)));

    // No-ops, replays, dry runs and refusals leave none.
    lab.submit(&Intent { change: Change::Patch { patch: json!({"spec": {}}) }, ..project("shop") }).unwrap();
    let keyed = Intent { idempotency_key: Some("once".into()), ..project("keyed") };
    assert!(!lab.submit(&keyed).unwrap().replayed);
    assert!(lab.submit(&keyed).unwrap().replayed);
    lab.submit(&Intent { dry_run: true, ..project("rehearsed") }).unwrap();
    assert_eq!(lab.submit(&project("shop")).unwrap_err().code, Code::AlreadyExists);
    let quota = json!({"spec": {"quota": {"instances": 3}}});
    lab.submit(&intent("projects", None, "shop", Change::Patch { patch: quota })).unwrap();
    lab.submit(&intent("projects", None, "shop", Change::Delete)).unwrap();
    assert_eq!(lab.submit(&intent("projects", None, "system", Change::Delete)).unwrap_err().code, Code::Conflict);

    let entries = lab.entries();
    let said: Vec<_> = entries
        .iter()
        .map(|e| (e.record.index, e.record.action.as_str(), e.record.target.as_ref().unwrap().name.as_str()))
        .collect();
    let all = [
        (0, "projects:create", "shop"),
        (1, "projects:create", "keyed"),
        (2, "projects:update", "shop"),
        (3, "projects:delete", "shop"),
    ];
    assert_eq!(said, all);
    let organization = made.object.spec["organization"].as_str();
    let of = |e: &Entry| e.record.target.as_ref().unwrap().organization.clone();
    assert!(organization.is_some() && entries.iter().all(|e| of(e).as_deref() == organization), "whose each was");
    let first = &entries[0].record;
    assert_eq!((first.actor.kind, first.actor.name.as_str()), (ActorKind::User, "ada"));
    assert_eq!((first.actor.organization.as_deref(), first.actor.session.as_deref()), (Some("acme"), Some("s-1")));
    assert_eq!(principal_of(&first.actor), "user:acme/ada");
    assert_eq!((first.policies.as_slice(), &first.answer), (&["role:owner".to_owned()][..], &Answer::Ok));
    assert_eq!(first.target.as_ref().unwrap().uid, Some(made.object.metadata.uid));
    assert_eq!(first.request_id.as_str(), "req-1");
    let hashes = |at: usize| entries[at].record.change.clone().unwrap();
    assert_eq!(
        (hashes(0).before, hashes(0).after),
        (None, hashes(2).before),
        "an update begins where the create ended"
    );
    assert_eq!((hashes(3).before, hashes(3).after), (hashes(2).after, None));
    assert_eq!((entries[1].record.actor.kind, entries[1].record.actor.name.as_str()), (ActorKind::Operator, "admin"));
    assert_eq!(verified(&lab.rows(), "local"), 4);
}

#[test]
fn a_change_that_is_taken_back_leaves_the_log_as_it_was() {
    let mut lab = Lab::new();
    // Past the end of a tile, with refusals before and behind it.
    for n in 0..300 {
        lab.submit(&project(&format!("p-{n}"))).unwrap();
        lab.submit(&project(&format!("p-{n}"))).unwrap_err();
        let dry = Intent { dry_run: true, ..intent("projects", None, &format!("p-{n}"), Change::Delete) };
        lab.submit(&dry).unwrap();
        let wrong = Anchor { from: 9, to: 9, head: Hash::ZERO, server: "server-a".into() };
        let change = Change::Audit { deed: Deed::Anchor(wrong) };
        assert_eq!(lab.submit(&intent("servers", None, "server-a", change)).unwrap_err().code, Code::Conflict);
        // Recorded, and then taken back with its rehearsal.
        let anchor = Anchor { from: 0, to: 4, head: Hash::ZERO, server: "server-b".into() };
        let change = Change::Audit { deed: Deed::Anchor(anchor) };
        lab.submit(&Intent { dry_run: true, ..intent("servers", None, "server-b", change) }).unwrap();
    }
    assert_eq!(verified(&lab.rows(), "local"), 300);
}

#[test]
fn a_servers_chain_is_settled_in_order_and_an_anchor_that_comes_twice_counts_once() {
    let mut lab = Lab::new();
    let mut settle = |from, to| {
        let anchor = Anchor { from, to, head: Hash::of(&[to as u8]), server: "server-a".into() };
        let change = Change::Audit { deed: Deed::Anchor(anchor) };
        lab.submit(&intent("servers", None, "server-a", change)).map_err(|e| e.code)
    };
    settle(0, 4).unwrap();
    settle(0, 4).unwrap();
    settle(5, 5).unwrap();
    for (from, to) in [(0, 4), (4, 6), (7, 8), (6, 5)] {
        assert_eq!(settle(from, to).unwrap_err(), Code::Conflict, "{from} to {to}");
    }
    let anchors: Vec<_> = lab.entries().into_iter().map(|e| e.record.anchor.unwrap().to).collect();
    assert_eq!(anchors, [4, 5]);
}

#[test]
fn where_a_request_came_from_can_be_read_until_it_is_shredded() {
    let mut lab = Lab::new();
    let by = |principal: &str| Provenance {
        principal: principal.into(),
        address: Some([192, 0, 2, 7].into()),
        ..Provenance::default()
    };
    lab.submit(&Intent { by: by("user:acme/ada"), ..project("one") }).unwrap();
    lab.submit(&Intent { by: by("user:acme/bob"), ..project("two") }).unwrap();
    let read = |lab: &Lab, principal: &str, at: usize| {
        let key = read_subject(lab.rows().get(&place_of(principal))?)?;
        let entry = &lab.entries()[at];
        key.open(&entry.sealed()?, &entry.record.request_id).ok()?.source_address
    };
    assert_eq!(read(&lab, "user:acme/ada", 0).as_deref(), Some("192.0.2.7"));
    assert_eq!(read(&lab, "user:acme/bob", 0), None);
    let clear = |lab: &Lab| lab.rows().values().any(|row| String::from_utf8_lossy(row).contains("192.0.2.7"));
    assert!(!clear(&lab), "an address stands in the clear");

    let shred = Change::Audit { deed: Deed::Forget { principal: "user:acme/ada".into() } };
    lab.submit(&intent("principals", None, "audit", shred.clone())).unwrap();
    assert_eq!(lab.submit(&intent("principals", None, "audit", shred)).unwrap_err().code, Code::NotFound);
    assert_eq!(read(&lab, "user:acme/ada", 0), None);
    assert_eq!(read(&lab, "user:acme/bob", 1).as_deref(), Some("192.0.2.7"));
    // Who comes again has another key, which opens nothing old.
    lab.submit(&Intent { by: by("user:acme/ada"), ..project("three") }).unwrap();
    assert_eq!(read(&lab, "user:acme/ada", 0), None);
    assert_eq!(read(&lab, "user:acme/ada", 3).as_deref(), Some("192.0.2.7"));
    assert_eq!(verified(&lab.rows(), "local"), 4);
}

#[test]
fn names_from_outside_never_make_a_record_too_long() {
    let mut lab = Lab::new();
    let long = "\u{1}\"é".repeat(4_000);
    let by = Provenance {
        principal: format!("user:{long}/{long}"),
        policies: vec![long.clone(); 500],
        session: Some(long),
        ..Provenance::default()
    };
    lab.submit(&Intent { by, ..project("shop") }).unwrap();
    assert_eq!(verified(&lab.rows(), "local"), 1);
}

struct Server {
    store: Arc<EmbeddedStore>,
    region: Arc<Region>,
    running: Running,
}

async fn start(node: u64, net: &Arc<Net>) -> Server {
    let (env, end) = (env(node), End::new(node, net));
    let store = end.open(&env, "local", &[1, 2, 3]).await;
    net.stores.lock().unwrap().insert(node, Arc::downgrade(&store));
    let config = Config { node, server: format!("server-{node}"), bootstrap: bootstrap(), fleet: None };
    let region = Arc::new(Region::new(config, env, store.clone(), end));
    net.writers.lock().unwrap().insert(node, Arc::downgrade(&region));
    let mut running = Running::new(View::new("localhost"));
    running.writer(&region);
    running.follow(store.clone());
    Server { store, region, running }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_goes_on_when_the_leader_dies_and_has_each_change_once() {
    let net = Arc::new(Net::default());
    let mut servers = BTreeMap::new();
    for node in 1..=3 {
        servers.insert(node, start(node, &net).await);
    }
    let burst = async |servers: &BTreeMap<u64, Server>, which: std::ops::Range<u32>| {
        let mut all = tokio::task::JoinSet::new();
        for n in which {
            let region = servers.values().nth(n as usize % servers.len()).unwrap().region.clone();
            let key = Some(format!("key-{n}"));
            all.spawn(
                async move { submit(&region, Intent { idempotency_key: key, ..project(&format!("p-{n}")) }).await },
            );
        }
        while let Some(done) = all.join_next().await {
            done.unwrap().unwrap();
        }
    };
    // More than a tile, so that the next writer has a tile to read.
    burst(&servers, 0..270).await;
    let leader = servers[&1].store.status().await.leader.unwrap();
    servers.remove(&leader).unwrap().running.kill().await;
    burst(&servers, 260..300).await;

    let survivor = &servers.values().next().unwrap().store;
    let mut rows = BTreeMap::new();
    for kv in survivor.range(RangeRequest::prefix("a/")).await.unwrap().kvs {
        rows.insert(String::from_utf8(kv.key.to_vec()).unwrap(), (kv.value.to_vec(), kv.mod_revision));
    }
    let plain: BTreeMap<_, _> = rows.iter().map(|(k, (v, _))| (k.clone(), v.clone())).collect();
    assert_eq!(verified(&plain, "local"), 300);
    let names: BTreeSet<_> = records(&plain).into_iter().map(|e| e.record.target.unwrap().name).collect();
    assert_eq!(names.len(), 300);
    // Each was committed by one transaction with its change: at the same revision.
    for kv in survivor.range(RangeRequest::prefix("o/projects/")).await.unwrap().kvs {
        let object: nexus_model::AnyObject = serde_json::from_slice(&kv.value).unwrap();
        let of = records(&plain)
            .into_iter()
            .find(|e| e.record.target.as_ref().unwrap().name == object.metadata.name.as_str());
        if let Some(entry) = of {
            let (_, at) = rows[&key::audit_record(entry.record.index)];
            assert!(at <= kv.mod_revision, "{} was recorded after it was made", object.metadata.name);
        }
    }
    for server in servers.into_values() {
        server.running.end().await;
    }
}

/// A server's chain over a region of one server.
struct Noting {
    env: nexus_env::Env,
    net: Arc<Net>,
    server: Server,
}

impl Noting {
    async fn start() -> Self {
        let net = Arc::new(Net::default());
        let (env, end) = (env(1), End::new(1, &net));
        let store = end.open(&env, "local", &[1]).await;
        net.stores.lock().unwrap().insert(1, Arc::downgrade(&store));
        let config = Config { node: 1, server: "server-1".into(), bootstrap: bootstrap(), fleet: None };
        let region = Arc::new(Region::new(config, env.clone(), store.clone(), end));
        net.writers.lock().unwrap().insert(1, Arc::downgrade(&region));
        let mut running = Running::new(View::new("localhost"));
        running.writer(&region);
        Self { env, net, server: Server { store, region, running } }
    }

    /// A keeper that runs until the token is cancelled.
    fn keep(&self) -> (Notes, CancellationToken, tokio::task::JoinHandle<()>) {
        let (notes, mut keeper) = Notes::new(&self.env, "/chain".into(), name("local"), name("server-1"));
        keeper.every = Duration::from_millis(300);
        let stop = CancellationToken::new();
        let running = keeper.run(self.server.store.clone(), self.server.region.clone(), stop.clone());
        (notes, stop, tokio::spawn(running))
    }

    async fn anchors(&self) -> Vec<Anchor> {
        let rows = self.server.store.range(RangeRequest::prefix(key::AUDIT_RECORDS)).await.unwrap();
        rows.kvs.iter().filter_map(|kv| Entry::from_row(&kv.value).unwrap().record.anchor).collect()
    }

    /// Waits until so many records are anchored.
    async fn settled(&self, records: u64) {
        let deadline = tokio::time::Instant::now() + common::net::LONG;
        while self.anchors().await.last().map_or(0, |a| a.to + 1) < records {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", self.anchors().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn files(&self) -> Vec<String> {
        let disk = &self.env.disk;
        disk.list(std::path::Path::new("/")).unwrap().into_iter().map(|e| e.name).collect()
    }
}

fn refuse(notes: &Notes, n: u64) {
    let id = format!("req-{n}").parse().unwrap();
    notes.answered(None, "requests:authenticate".into(), None, Err(Code::Unauthenticated), &id);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_refuses_is_in_its_chain_and_anchored_also_after_a_restart() {
    let lab = Noting::start().await;
    let (notes, stop, running) = lab.keep();
    (0..5).for_each(|n| refuse(&notes, n));
    lab.settled(5).await;
    (5..8).for_each(|n| refuse(&notes, n));
    stop.cancel();
    running.await.unwrap();

    // A crash has left half a record; the next keeper cuts it off and goes on.
    let file = std::path::Path::new("/chain/00000000000000000000.ndjson");
    lab.env.disk.open(file).unwrap().append(b"{\"record\":{\"action\"").unwrap();
    let (notes, stop, running) = lab.keep();
    refuse(&notes, 8);
    lab.settled(9).await;
    stop.cancel();
    running.await.unwrap();

    // The export has the records behind their anchors, and each is verified.
    let anchors = lab.anchors().await;
    assert_eq!(anchors.iter().map(|a| a.from).collect::<Vec<_>>()[0], 0);
    let signer = Signer::from_seed("home", "local", &[7; 32]).unwrap();
    let rows = lab.server.store.range(RangeRequest::prefix("a/")).await.unwrap().kvs;
    let state = rows.iter().find(|kv| kv.key == key::AUDIT_STATE).unwrap();
    let state = LogState::from_bytes(&state.value).unwrap();
    let (cluster, group) = ("home".to_owned(), "local".to_owned());
    let to = state.frontier.size();
    let header = Header { cluster, from: 0, group, mode: Mode::Whole, peaks: Vec::new(), to, version: 1 };
    let mut lines = vec![Line::Header(header).to_json()];
    for kv in rows.iter().filter(|kv| kv.key.starts_with(key::AUDIT_RECORDS.as_bytes())) {
        lines.push(entry_line(&kv.value));
        if let Some(anchor) = Entry::from_row(&kv.value).unwrap().record.anchor {
            lines.extend(notes.rows(&anchor).await.unwrap().iter().map(|row| chain_line(row)));
        }
    }
    lines.push(Line::head(&signer.sign(to, state.frontier.root(), 1)).to_json());
    let report = verify(&lines, &Verifier::new([signer.public_key()]), &[], Options::default()).unwrap();
    assert!(report.is_right(), "{report:?}");
    assert_eq!(report.chain_records, 9);
    lab.server.running.end().await;
    drop(lab.net);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_no_chain_are_moved_aside_and_the_chain_goes_on_behind_its_anchor() {
    let lab = Noting::start().await;
    let (notes, stop, running) = lab.keep();
    (0..3).for_each(|n| refuse(&notes, n));
    lab.settled(3).await;
    stop.cancel();
    running.await.unwrap();
    let file = std::path::Path::new("/chain/00000000000000000000.ndjson");
    let content = String::from_utf8(lab.env.disk.read(file).unwrap()).unwrap();
    nexus_env::write_atomic(&*lab.env.disk, file, content.replace("req-1", "req-9").as_bytes()).unwrap();

    let (notes, stop, running) = lab.keep();
    refuse(&notes, 3);
    lab.settled(4).await;
    let aside = lab.files().into_iter().filter(|name| name.starts_with("chain.unusable-")).count();
    assert_eq!(aside, 1);
    refuse(&notes, 4);
    lab.settled(5).await;
    stop.cancel();
    running.await.unwrap();

    // A line in the middle that can't be read is not cut off with what is behind it.
    let file = std::path::Path::new("/chain/00000000000000000003.ndjson");
    let content = String::from_utf8(lab.env.disk.read(file).unwrap()).unwrap();
    nexus_env::write_atomic(&*lab.env.disk, file, content.replacen('{', "[", 1).as_bytes()).unwrap();
    let (notes, stop, running) = lab.keep();
    refuse(&notes, 5);
    lab.settled(6).await;
    assert!(lab.files().iter().filter(|name| name.starts_with("chain.unusable-")).count() == 2, "{:?}", lab.files());
    assert_eq!(notes.rows(&lab.anchors().await.pop().unwrap()).await.unwrap().len(), 1);
    stop.cancel();
    running.await.unwrap();
    lab.server.running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_refusals_is_counted_and_told() {
    let lab = Noting::start().await;
    let (notes, stop, running) = lab.keep();
    (0..6_000).for_each(|n| refuse(&notes, n));
    assert!(notes.lost() > 0);
    lab.settled(2).await;
    stop.cancel();
    running.await.unwrap();
    let content = lab.env.disk.read(std::path::Path::new("/chain/00000000000000000000.ndjson")).unwrap();
    let content = String::from_utf8(content).unwrap();
    let told = content.lines().filter(|l| l.contains("audit:overflow"));
    let told = told.map(|l| Entry::from_row(l.as_bytes()).unwrap().record.target.unwrap().name.parse::<u64>().unwrap());
    assert_eq!(told.sum::<u64>(), notes.lost());
    lab.server.running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_with_its_record_costs_as_many_syncs_as_a_plain_write() {
    const CHANGES: u64 = 300;
    let disk = Arc::new(MemDisk::new(1));
    let env = nexus_env::Env::real().with_disk(disk.clone());
    let (net, end) = (Arc::new(Net::default()), End::alone());
    let store = end.open(&env, "local", &[1]).await;
    net.stores.lock().unwrap().insert(1, Arc::downgrade(&store));
    let config = Config { node: 1, server: "server-1".into(), bootstrap: bootstrap(), fleet: None };
    let region = Arc::new(Region::new(config, env, store.clone(), end));
    let mut running = Running::new(View::new("localhost"));
    running.writer(&region);
    submit(&region, project("first")).await.unwrap();

    let before = disk.syncs();
    for n in 0..CHANGES {
        submit(&region, project(&format!("p-{n}"))).await.unwrap();
    }
    let audited = disk.syncs() - before;
    running.end().await;
    let before = disk.syncs();
    for n in 0..CHANGES {
        store.txn(Txn::put(format!("plain/{n}"), vec![b'x'; 600])).await.unwrap();
    }
    let plain = disk.syncs() - before;
    let per = |syncs: u64| syncs as f64 / CHANGES as f64;
    println!("fsyncs per operation: {:.3} with its record, {:.3} plain", per(audited), per(plain));
    assert!(
        audited <= plain + CHANGES / 10,
        "{audited} syncs for {CHANGES} recorded changes, {plain} for plain writes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_go_on_stops_users_changes_and_nothing_else() {
    let (net, end) = (Arc::new(Net::default()), End::alone());
    let env = env(1);
    let store = end.open(&env, "local", &[1]).await;
    net.stores.lock().unwrap().insert(1, Arc::downgrade(&store));
    let start = |store: &Arc<EmbeddedStore>| {
        let config = Config { node: 1, server: "server-1".into(), bootstrap: bootstrap(), fleet: None };
        let region = Arc::new(Region::new(config, env.clone(), store.clone(), end.clone()));
        let mut running = Running::new(View::new("localhost"));
        running.writer(&region);
        (region, running)
    };
    let (region, running) = start(&store);
    for n in 0..3 {
        submit(&region, project(&format!("p-{n}"))).await.unwrap();
    }
    running.end().await;
    let good = store.range(RangeRequest::get(key::audit_record(2))).await.unwrap().kvs.pop().unwrap().value;
    let changed = String::from_utf8(good.to_vec()).unwrap().replace("p-2", "p-9");
    store.txn(Txn::put(key::audit_record(2), changed)).await.unwrap();

    let (region, running) = start(&store);
    let patience = tokio::time::Instant::now() + common::net::LONG;
    let refused = loop {
        let error = region.submit(project("later")).await.unwrap_err();
        if error.detail.contains("audit log") {
            break error;
        }
        assert!(tokio::time::Instant::now() < patience, "{error:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(refused.code, Code::Unavailable);
    let capacity = Capacity { instances: 10, ..Capacity::default() };
    let spec = common::host("zone-a", "cell-a", 1, capacity);
    let report = common::report(&name("host-1"), spec, 0, []);
    region.report(report).await.expect("hosts are heard all the same");
    assert_eq!(region.counters.audit_broken.load(std::sync::atomic::Ordering::Relaxed), 1);
    running.end().await;

    // What was there is put back: the log goes on.
    store.txn(Txn::put(key::audit_record(2), good)).await.unwrap();
    let (region, running) = start(&store);
    submit(&region, project("later")).await.unwrap();
    let rows = store.range(RangeRequest::prefix("a/")).await.unwrap().kvs;
    let rows = rows.iter().map(|kv| (String::from_utf8_lossy(&kv.key).into_owned(), kv.value.to_vec())).collect();
    assert_eq!(verified(&rows, "local"), 4);
    running.end().await;
}
