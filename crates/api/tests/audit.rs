//! The audit log as the API answers it: lists, an export that verifies, heads and proofs.

mod support;

use std::sync::Arc;
use std::time::Duration;

use nexus_audit::{
    Actor, ActorKind, Answer, Change, Draft, Hash, Log, Options, PublicKey, Report, Retention, SignedHead, Target,
    TreeHead, Verifier, verify, verify_consistency, verify_inclusion,
};
use nexus_control::audit::retention::{Keep, Pruner};
use nexus_env::{Env, ManualClock};
use nexus_model::key;
use serde_json::{Value, json};
use support::World;
use support::cloud::Cloud;

const AUDIT: &str = "/v1/regions/local/audit";

fn draft(n: u64) -> Draft {
    Draft {
        time: 1_700_000_000_000 + n * 1_000,
        actor: Actor {
            access_key: None,
            kind: ActorKind::User,
            name: if n.is_multiple_of(2) { "ada" } else { "bob" }.into(),
            organization: Some("globex".into()),
            session: None,
        },
        action: if n.is_multiple_of(3) { "apps:create" } else { "apps:update" }.into(),
        target: Some(Target {
            name: format!("app-{n}"),
            organization: Some(if n % 5 == 4 { "acme" } else { "globex" }.into()),
            plural: "apps".into(),
            project: Some("shop".into()),
            uid: None,
        }),
        policies: Vec::new(),
        answer: Answer::Ok,
        revision: Some(n),
        request_id: format!("req-{n}").parse().unwrap(),
        change: Some(Change { after: Some(Hash::of(b"x")), before: None }),
        retention: Retention::Change,
        anchor: None,
        personal: None,
    }
}

/// Appends records as the writer would.
async fn grow(world: &World, log: &mut Log, by: u64) {
    for _ in 0..by {
        let appended = log.append(draft(log.size())).unwrap();
        world.store_row(key::audit_record(appended.index), appended.row).await;
        for (id, tile) in appended.tiles {
            world.store_row(format!("{}{id}", key::AUDIT_TILES), tile).await;
        }
    }
    world.store_row(key::AUDIT_STATE.into(), log.state().to_bytes()).await;
}

async fn keys(world: &World) -> Verifier {
    let keys = world.get(&format!("{AUDIT}/keys")).await.json();
    let keys = keys["items"].as_array().unwrap().iter().map(|k| k["key"].as_str().unwrap().parse().unwrap());
    Verifier::new(keys.collect::<Vec<PublicKey>>())
}

async fn head(world: &World) -> SignedHead {
    world.get(&format!("{AUDIT}/head")).await.json()["note"].as_str().unwrap().parse().unwrap()
}

async fn check(world: &World, query: &str, earlier: &[SignedHead]) -> Report {
    let export = world.get(&format!("{AUDIT}/export{query}")).await;
    assert_eq!((export.status.as_u16(), export.header("content-type")), (200, "application/x-ndjson"));
    let lines: Vec<&[u8]> = export.body.split(|b| *b == b'\n').filter(|l| !l.is_empty()).collect();
    verify(lines, &keys(world).await, earlier, Options::default()).unwrap()
}

#[tokio::test]
async fn an_export_verifies_from_any_record_on_and_against_earlier_heads() {
    let (world, mut log) = (World::new(), Log::new("local"));
    let report = check(&world, "", &[]).await;
    assert!(report.is_right() && report.records == 0, "{report:?}");
    grow(&world, &mut log, 300).await;
    let early = head(&world).await;
    grow(&world, &mut log, 400).await;
    let report = check(&world, "", std::slice::from_ref(&early)).await;
    assert!(report.is_right(), "{report:?}");
    assert_eq!((report.records, report.earlier, report.whole), (700, 1, true));
    let report = check(&world, "?from=513&prove=300", std::slice::from_ref(&early)).await;
    assert!(report.is_right(), "{report:?}");
    assert_eq!((report.records, report.earlier), (187, 1));
    world.get(&format!("{AUDIT}/export?from=701")).await.problem("not-found");

    // A log that was rewritten since, and signed anew.
    let mut other = Log::new("local");
    for n in 0..700 {
        let draft = Draft { time: 1, ..draft(n) };
        let appended = other.append(draft).unwrap();
        world.store_row(key::audit_record(appended.index), appended.row).await;
        for (id, tile) in appended.tiles {
            world.store_row(format!("{}{id}", key::AUDIT_TILES), tile).await;
        }
    }
    world.store_row(key::AUDIT_STATE.into(), other.state().to_bytes()).await;
    assert!(check(&world, "", &[]).await.is_right(), "by itself it is a log like any other");
    assert!(!check(&world, "", std::slice::from_ref(&early)).await.is_right(), "an earlier head shows it");
}

#[tokio::test]
async fn records_whose_time_is_over_leave_their_hashes_and_every_proof_holds() {
    let (world, mut log) = (World::new(), Log::new("local"));
    grow(&world, &mut log, 300).await;
    let early = head(&world).await;
    grow(&world, &mut log, 500).await;
    // The clock stands at the time of record 700; changes are kept for 100 seconds, that is 100 records.
    let clock = ManualClock::at(1_700_000_700_000);
    let keep = |change: u64| Keep {
        security: Duration::from_secs(9_000),
        change: Duration::from_secs(change),
        access: Duration::from_secs(1),
    };
    let env = Env::real().with_clock(Arc::new(clock));
    let row = format!("{}hook", key::AUDIT_WEBHOOKS);
    let pruner = |change: u64, after: Option<&String>| Pruner {
        env: env.clone(),
        store: world.store.clone(),
        keep: keep(change),
        after: after.cloned(),
    };
    let all = async |pruner: Pruner| {
        for class in [Retention::Security, Retention::Change, Retention::Access] {
            while pruner.prune_one(class).await.unwrap() {}
        }
    };
    all(pruner(9_000, None)).await;
    assert_eq!(check(&world, "", &[]).await.records, 800, "all are young");
    all(pruner(100, Some(&row))).await;
    assert_eq!(check(&world, "", &[]).await.records, 800, "the webhook has not got any");
    world.store_row(row.clone(), br#"{"next":300}"#.to_vec()).await;
    all(pruner(100, Some(&row))).await;
    let left =
        async || world.get(&format!("{AUDIT}/records?limit=500")).await.json()["items"].as_array().unwrap().len();
    assert_eq!(left().await, 500);
    all(pruner(100, None)).await;
    assert_eq!(left().await, 199, "as old as that are the first 601");

    let lines = world.get(&format!("{AUDIT}/export")).await.body;
    let lines = || lines.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let keys = keys(&world).await;
    let strict = verify(lines(), &keys, std::slice::from_ref(&early), Options::default()).unwrap();
    assert!(!strict.is_right(), "what is gone is told");
    let allowed = Options { allow_pruned: true, ..Options::default() };
    let report = verify(lines(), &keys, &[early], allowed).unwrap();
    assert!(report.is_right(), "{report:?}");
    assert_eq!((report.records, report.pruned, report.earlier), (199, 601, 1));
    let now = head(&world).await;
    let now = keys.verify(&now).unwrap();
    for index in [0, 299, 600, 601] {
        let proof = world.get(&format!("{AUDIT}/inclusion?index={index}")).await.json();
        let hash = serde_json::from_value(proof["hash"].clone()).unwrap();
        let path: Vec<Hash> = serde_json::from_value(proof["path"].clone()).unwrap();
        assert!(verify_inclusion(hash, index, now.size, now.root, &path), "{index}");
    }
}

#[tokio::test]
async fn proofs_hold_against_signed_heads() {
    let (world, mut log) = (World::new(), Log::new("local"));
    grow(&world, &mut log, 270).await;
    let (keys, early) = (keys(&world).await, head(&world).await);
    grow(&world, &mut log, 600).await;
    let now = head(&world).await;
    let early: &TreeHead = keys.verify(&early).unwrap();
    let now: &TreeHead = keys.verify(&now).unwrap();
    assert_eq!((early.size, now.size), (270, 870));
    let path = |value: &Value| serde_json::from_value::<Vec<Hash>>(value["path"].clone()).unwrap();
    for index in [0, 255, 256, 511, 869] {
        let proof = world.get(&format!("{AUDIT}/inclusion?index={index}")).await.json();
        let hash = serde_json::from_value(proof["hash"].clone()).unwrap();
        assert!(verify_inclusion(hash, index, now.size, now.root, &path(&proof)), "{index}");
    }
    let proof = world.get(&format!("{AUDIT}/consistency?first=270&second=870")).await.json();
    assert!(verify_consistency(270, early.root, 870, now.root, &path(&proof)));
    for wrong in ["inclusion?index=870", "consistency?first=2&second=871", "consistency?first=9&second=8"] {
        world.get(&format!("{AUDIT}/{wrong}")).await.problem("not-found");
    }
    for wrong in ["inclusion", "inclusion?index=x", "consistency?first=1", "records?since=now", "head?x=1"] {
        world.get(&format!("{AUDIT}/{wrong}")).await.problem("bad-request");
    }
    world.get(&format!("{AUDIT}/record")).await.problem("not-found");
    world.call("POST", &format!("{AUDIT}/records"), &[], json!({})).await.problem("method-not-allowed");
}

#[tokio::test]
async fn records_are_listed_newest_first_and_by_what_is_asked() {
    let (world, mut log) = (World::new(), Log::new("local"));
    grow(&world, &mut log, 600).await;
    let indices = |page: &Value| -> Vec<u64> {
        page["items"].as_array().unwrap().iter().map(|i| i["index"].as_u64().unwrap()).collect()
    };
    let page = world.get(&format!("{AUDIT}/records?limit=5")).await.json();
    assert_eq!(indices(&page), [599, 598, 597, 596, 595]);
    assert_eq!(page["items"][0]["actor"]["name"], "bob");
    let next = page["metadata"]["cursor"].as_str().unwrap();
    let page = world.get(&format!("{AUDIT}/records?limit=3&cursor={next}")).await.json();
    assert_eq!(indices(&page), [594, 593, 592]);

    let all = async |filter: &str| {
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = world.get(&format!("{AUDIT}/records?limit=100&{filter}{cursor}")).await.json();
            found.extend(indices(&page));
            match page["metadata"]["cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return found,
            }
        }
    };
    assert_eq!(all("").await, (0..600).rev().collect::<Vec<_>>());
    assert_eq!(all("actor=ada").await.len(), 300);
    assert_eq!(all("actor=user%3Aglobex/ada&action=apps%3Acreate").await.len(), 100);
    assert_eq!(all("name=app-7&kind=apps&project=shop").await, [7]);
    assert_eq!(all("name=app-7&project=other").await, [0_u64; 0]);
    assert_eq!(all("since=1700000010000&until=1700000012000").await, [11, 10]);
}

#[tokio::test]
async fn an_organizations_auditor_reads_what_is_about_it_and_proves_it() {
    let (cloud, mut log) = (Cloud::new().await, Log::new("local"));
    grow(&cloud.world, &mut log, 300).await;
    let own = "/v1/regions/local/organizations/acme/audit";
    let get = async |who: &str, path: &str| cloud.call(who, "GET", path, None).await;
    let indexes = async |who: &str, path: &str| {
        let records = get(who, &format!("{path}/records?limit=500")).await.json();
        let items = records["items"].as_array().unwrap().clone();
        items.iter().map(|r| r["index"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    // Another organization's people did all of it, a fifth of it to what is acme's.
    let theirs: Vec<u64> = (0..300).rev().filter(|n| n % 5 == 4).collect();
    assert_eq!(indexes("auditor", own).await, theirs);
    assert_eq!(indexes("operator", AUDIT).await.len(), 300);
    assert_eq!(indexes("other-tenant", "/v1/regions/local/organizations/globex/audit").await.len(), 300);

    let export = get("auditor", &format!("{own}/export?from=100&prove=200")).await;
    let lines: Vec<&[u8]> = export.body.split(|b| *b == b'\n').filter(|l| !l.is_empty()).collect();
    assert!(!String::from_utf8_lossy(&export.body).contains("app-101"), "it is another's");
    let keys = keys(&cloud.world).await;
    let report = verify(lines.clone(), &keys, &[], Options::default()).unwrap();
    assert!(report.is_right() && !report.whole, "{report:?}");
    assert_eq!(report.records, 40);
    let forged = String::from_utf8_lossy(lines[3]).replace("apps:", "appz:");
    let forged = [&lines[..3], &[forged.as_bytes()], &lines[4..]].concat();
    assert!(!verify(forged, &keys, &[], Options::default()).unwrap().is_right());

    for word in ["head", "heads", "keys", "inclusion?index=3", "consistency?first=4&second=9"] {
        assert_eq!(get("auditor", &format!("{own}/{word}")).await.status, 200, "{word}");
    }
    get("auditor", &format!("{AUDIT}/records")).await.problem("forbidden");
    get("viewer", &format!("{own}/records")).await.problem("forbidden");
    get("other-tenant", &format!("{own}/records")).await.problem("not-found");
    get("auditor", "/v1/regions/local/organizations/nobodys/audit/records").await.problem("not-found");
    get("auditor", &format!("{own}/forget")).await.problem("not-found");
}
