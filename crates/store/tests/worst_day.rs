//! Backups made under load, damage that is found and named, and the ways out when a disk or a quorum is lost.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Cluster, failure, seed, until};
use nexus_env::{Disk, MemDisk, RngExt, SeededRng};
use nexus_store::backup::{self, Backup, BackupError, Point, Restore, Writer};
use nexus_store::offline::{Folder, OfflineError, Severity, Survey, recover_survivor, salvage};
use nexus_store::{GroupId, KeyValue, Member, Op, RangeRequest, Revision, Store, Txn};

const DIR: &str = "/data/store";

fn group() -> GroupId {
    GroupId::new("test").unwrap()
}

fn door(disk: &MemDisk) -> Arc<dyn Disk> {
    Arc::new(disk.clone())
}

async fn all(store: &dyn Store, at: Option<Revision>) -> Vec<KeyValue> {
    let request = RangeRequest { at, ..RangeRequest::prefix("") };
    store.range(request).await.unwrap().kvs
}

/// A cluster whose disks hold what was restored.
async fn cluster_of(disks: BTreeMap<u64, MemDisk>) -> Cluster {
    let cluster = Cluster { disks, ..Cluster::start(0, 1).await };
    for node in cluster.ids() {
        cluster.boot(node).await.unwrap();
    }
    cluster
}

fn members(size: u64) -> BTreeMap<u64, Member> {
    (1..=size).map(|n| (n, Member { endpoint: format!("mem:{n}"), voter: true })).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_made_under_load_goes_back_to_any_revision_it_keeps() {
    let rng = SeededRng::new(seed());
    let cluster = Cluster::start(3, 7).await;
    let leader = cluster.leader().await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3)
        .map(|w| {
            let (store, stop) = (cluster.node(1 + w), stop.clone());
            tokio::spawn(async move {
                let mut i = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    let key = format!("w{w}/{}", i % 20);
                    let op = if i % 7 == 6 { Op::delete(key) } else { Op::put(key, format!("{i}")) };
                    store.txn(Txn::new(vec![], vec![op])).await.ok();
                    i += 1;
                }
            })
        })
        .collect();
    let store = cluster.node(leader);
    until("some history", async || (store.status().await.applied.0 > 100).then_some(())).await;
    let before = store.status().await.applied;
    let shelf = MemDisk::new(3);
    let mut writer = Writer::begin(door(&shelf), "/backups".into(), "one", "cnx-1", 5).await.unwrap();
    writer.add(&store, true).await.unwrap();
    let manifest = writer.finish().await.unwrap();
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    shelf.crash();

    let listed = backup::list(&shelf, Path::new("/backups")).unwrap();
    assert_eq!(listed[0].manifest.as_ref().unwrap(), &manifest, "a finished backup survives a power cut");
    let image = &manifest.groups[0];
    assert!(image.revision >= before && image.oldest < image.revision);
    let backup = Backup::open(&shelf, Path::new("/backups/one")).unwrap();

    let span = image.revision.0 - image.oldest.0;
    for at in [image.revision, image.oldest, Revision(image.oldest.0 + rng.below(span)), Revision(image.revision.0 / 2)]
    {
        let mut disks = BTreeMap::new();
        let members = members(3);
        for node in 1..=3 {
            let disk = MemDisk::new(100 + node);
            let what = Restore { group: &group(), node, members: &members, generation: 2, revision: at };
            let done = backup.restore(&door(&disk), &what, Path::new(DIR)).unwrap();
            assert!(done.revision > image.revision, "revisions go on behind everything that was");
            disks.insert(node, disk);
        }
        let restored = cluster_of(disks).await;
        restored.leader().await;
        let found = all(&*restored.node(2), None).await;
        assert_eq!(found, all(&*store, Some(at)).await, "revision {at}");
        assert_eq!(found, backup.keys_at(&group(), at).unwrap());
        // It is a store like any other.
        restored.node(3).txn(Txn::put("after", "x")).await.unwrap();
        restored.kill(1).await;
        restored.boot(1).await.unwrap();
        until("the write after a restart", async || {
            let found = restored.node(1).range(RangeRequest::get("after")).await.ok()?;
            (found.kvs.len() == 1).then_some(())
        })
        .await;
        restored.stop().await;
    }

    // A backup that was restored before is restored again after the cloud went on: its second life comes after the first.
    let (first, members) = (backup::next_generation(1, 1_900_000_000_000), members(1));
    let mut revisions = Vec::new();
    for (i, generation) in [first, backup::next_generation(1, 1_900_000_001_000)].into_iter().enumerate() {
        let what = Restore { group: &group(), node: 1, members: &members, generation, revision: image.revision };
        let dir = PathBuf::from(format!("/again/{i}"));
        revisions.push(backup.restore(&door(&shelf), &what, &dir).unwrap().revision);
    }
    assert!(revisions[1].0 >= revisions[0].0 + 1_000_000 && revisions[1].0 < 1 << 53);
    let what = Restore { group: &group(), node: 1, members: &members, generation: 1, revision: image.revision };
    assert!(backup.restore(&door(&shelf), &what, Path::new("/again/x")).is_err(), "no generation is lived twice");

    let time = backup.time_of(&group(), Revision(image.oldest.0 + 2)).unwrap().unwrap();
    assert_eq!(backup.resolve(&group(), Point::Time(time)).unwrap(), Revision(image.oldest.0 + 2));
    assert_eq!(backup.resolve(&group(), Point::Time(i64::MAX)).unwrap(), image.revision);
    assert!(backup.resolve(&group(), Point::Time(0)).is_err());
    assert!(backup.resolve(&group(), Point::Revision(image.revision.next())).is_err());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unfinished_or_damaged_backup_is_never_taken_for_good() {
    let cluster = Cluster::start(1, 7).await;
    cluster.leader().await;
    let (store, shelf, root) = (cluster.node(1), MemDisk::new(3), PathBuf::from("/backups"));
    for i in 0..50 {
        store.txn(Txn::put(format!("k{i}"), "v".repeat(100))).await.unwrap();
    }
    let begin = |name: &'static str, at| Writer::begin(door(&shelf), root.clone(), name, "cnx-1", at);
    let mut unfinished = begin("half", 1).await.unwrap();
    unfinished.add(&store, true).await.unwrap();
    drop(unfinished);
    assert!(backup::list(&shelf, &root).unwrap().is_empty());

    for (at, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let mut writer = begin(name, at as i64).await.unwrap();
        writer.add(&store, false).await.unwrap();
        writer.finish().await.unwrap();
    }
    assert!(matches!(begin("a", 9).await.err(), Some(BackupError::Exists(_))));
    for name in ["", ".hidden", "../up", "a/b"] {
        assert!(matches!(begin(name, 9).await.err(), Some(BackupError::Name(_))), "{name}");
    }
    assert_eq!(backup::prune(&shelf, &root, "cnx-2", 1).unwrap(), Vec::<String>::new(), "another cloud's backups stay");
    assert_eq!(backup::prune(&shelf, &root, "cnx-1", 2).unwrap(), ["a", "b"]);
    let names: Vec<String> = backup::list(&shelf, &root).unwrap().into_iter().map(|l| l.name).collect();
    assert_eq!(names, ["c", "d"]);

    let rng = SeededRng::new(seed());
    let dir = root.join("c");
    for file in ["manifest.json", "test.snap"] {
        let len = shelf.read(&dir.join(file)).unwrap().len() as u64;
        for _ in 0..20 {
            let offset = rng.below(len);
            shelf.flip_bit(&dir.join(file), offset).unwrap();
            // A flipped bit in a manifest's text may change a name and no more; nothing may panic.
            let opened = Backup::open(&shelf, &dir);
            assert!(file == "manifest.json" || matches!(opened, Err(BackupError::Damaged { .. })), "byte {offset}");
            shelf.flip_bit(&dir.join(file), offset).unwrap();
        }
    }
    shelf.remove_file(&dir.join("test.snap")).unwrap();
    assert!(matches!(Backup::open(&shelf, &dir), Err(BackupError::Damaged { .. })));
    cluster.stop().await;
}

/// A folder with a snapshot and a log behind it, and what it holds.
async fn folder() -> (MemDisk, Vec<KeyValue>) {
    let cluster = Cluster::start_with(1, 5, |config| {
        config.segment_bytes = 60_000;
        config.snapshot_after_bytes = 1_500_000;
    })
    .await;
    cluster.leader().await;
    let store = cluster.node(1);
    for i in 0..80 {
        let ops = (0..10).map(|k| Op::put(format!("k{:03}", (i * 10 + k) % 400), format!("{i:-<3000}"))).collect();
        store.txn(Txn::new(vec![], ops)).await.unwrap();
    }
    until("a snapshot", async || (store.status().await.snapshot_bytes > 0).then_some(())).await;
    for i in 0..40 {
        store.txn(Txn::put(format!("late{i:02}"), "x".repeat(300))).await.unwrap();
    }
    let kept = all(&*store, None).await;
    cluster.stop().await;
    let disk = cluster.disks[&1].clone();
    // As on a real disk, where the lock is a file.
    disk.create(&Path::new(DIR).join("LOCK")).unwrap();
    (disk, kept)
}

fn open(disk: &MemDisk) -> Result<Folder, OfflineError> {
    Folder::open(door(disk), Path::new(DIR), false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_is_read_offline_without_being_changed() {
    let (disk, kept) = folder().await;
    let names = disk.list(Path::new(DIR)).unwrap();
    let folder = open(&disk).unwrap();
    let report = folder.verify();
    assert!(report.is_sound() && report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!(folder.range(&RangeRequest::prefix(""), false).unwrap().kvs, kept);
    let history = folder.history(b"k007", false);
    assert_eq!(history.len(), 2);
    assert!(history.iter().all(|v| v.timestamp_ms.is_some()) && history[0].revision < history[1].revision);
    assert!(folder.history(b"nothing", false).is_empty());
    assert_eq!(disk.list(Path::new(DIR)).unwrap(), names);
    assert!(matches!(open(&disk), Err(OfflineError::Locked(_))), "one at a time");
    assert!(Folder::open(door(&disk), Path::new(DIR), true).is_ok());
    drop(folder);
    assert!(matches!(Folder::open(door(&disk), Path::new("/data"), false), Err(OfflineError::NotAStore { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flipped_bit_is_found_and_named() {
    let rng = SeededRng::new(seed());
    let (disk, _) = folder().await;
    let mut tried = 0;
    for entry in disk.list(Path::new(DIR)).unwrap() {
        let path = Path::new(DIR).join(&entry.name);
        if !entry.name.ends_with(".log") && !entry.name.ends_with(".snap") {
            continue;
        }
        for _ in 0..6 {
            let offset = rng.below(entry.len);
            disk.flip_bit(&path, offset).unwrap();
            let report = open(&disk).unwrap().verify();
            let place = path.display().to_string();
            let named = report.findings.iter().any(|f| f.file == place && f.offset.is_some_and(|at| at <= offset));
            assert!(named, "byte {offset} of {place}: {:?}", report.findings);
            // Only the last frame may be taken for one that a crash tore.
            let torn = report.findings.iter().all(|f| f.severity == Severity::Note);
            assert!(!torn || entry.name.ends_with(".log"), "{:?}", report.findings);
            disk.flip_bit(&path, offset).unwrap();
            tried += 1;
        }
    }
    assert!(tried > 20 && open(&disk).unwrap().verify().is_sound());
    // Garbage in place of any file is an error or a finding, too.
    for entry in disk.list(Path::new(DIR)).unwrap() {
        let path = Path::new(DIR).join(&entry.name);
        let whole = disk.read(&path).unwrap();
        for len in [0, whole.len() / 2, whole.len()] {
            let garbage: Vec<u8> = (0..len).map(|_| rng.u64() as u8).collect();
            nexus_env::write_atomic(&disk, &path, &garbage).unwrap();
            if let Ok(folder) = open(&disk) {
                folder.verify();
            }
        }
        nexus_env::write_atomic(&disk, &path, &whole).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn salvage_saves_all_but_the_damaged_part_and_says_which() {
    let (disk, kept) = folder().await;
    let names = disk.list(Path::new(DIR)).unwrap();
    let snap = names.iter().find(|e| e.name.ends_with(".snap")).unwrap();
    let path = Path::new(DIR).join(&snap.name);
    disk.flip_bit(&path, snap.len / 3).unwrap();
    let folder = open(&disk).unwrap();
    assert!(matches!(folder.require_sound(), Err(OfflineError::Damaged { .. })));
    let said = salvage(&door(&disk), &folder, Path::new("/saved/store")).unwrap();
    assert!(!said.lost_ranges.is_empty() && said.keys > 0 && said.history_lost, "{said:?}");
    let into = salvage(&door(&disk), &folder, Path::new("/saved/store")).err();
    assert!(matches!(into, Some(OfflineError::Occupied(_))));

    let mut shelf = Writer::begin(door(&disk), "/backups".into(), "saved", "cnx-1", 1).await.unwrap();
    assert_eq!(shelf.add_salvaged(&folder).await.unwrap().keys, said.keys);
    shelf.finish().await.unwrap();
    Backup::open(&disk, Path::new("/backups/saved")).unwrap();
    drop(folder);

    let saved = Folder::open(door(&disk), Path::new("/saved/store"), false).unwrap();
    assert!(saved.verify().findings.is_empty(), "{:?}", saved.verify().findings);
    let found = saved.range(&RangeRequest::prefix(""), false).unwrap().kvs;
    assert!(found.len() < kept.len() && found.iter().all(|kv| kept.contains(kv)), "nothing is made up");
    let in_lost = |key: &str| {
        said.lost_ranges.iter().any(|(from, to)| key >= from.as_str() && (to.is_empty() || key < to.as_str()))
    };
    for kv in &kept {
        let key = String::from_utf8(kv.key.to_vec()).unwrap();
        assert!(found.contains(kv) || in_lost(&key), "{key} is gone and nobody said so");
        assert!(!key.starts_with("late") || found.contains(kv), "what the log has is saved: {key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_in_the_log_ends_what_can_be_saved() {
    let (disk, _) = folder().await;
    let names = disk.list(Path::new(DIR)).unwrap();
    let logs: Vec<_> = names.iter().filter(|e| e.name.ends_with(".log")).collect();
    // The middle of what is written in the last segment: valid frames stand behind it.
    let last = Path::new(DIR).join(&logs.last().unwrap().name);
    let written = disk.read(&last).unwrap().iter().rposition(|b| *b != 0).unwrap();
    disk.flip_bit(&last, written as u64 / 2).unwrap();
    let folder = open(&disk).unwrap();
    assert!(!folder.verify().is_sound());
    let said = salvage(&door(&disk), &folder, Path::new("/saved")).unwrap();
    assert!(said.lost_entries > 0 && said.lost_ranges.is_empty(), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_survivor_goes_on_alone_and_the_others_are_fenced() {
    let cluster = Cluster::start(3, 5).await;
    let leader = cluster.leader().await;
    for i in 0..30 {
        cluster.node(leader).txn(Txn::put(format!("k{i}"), "v")).await.unwrap();
    }
    let kept = all(&*cluster.node(leader), None).await;
    let survivor = cluster.others(leader)[0];
    let newest = cluster.node(leader).status().await.applied;
    until("the survivor to have it all", async || {
        (cluster.node(survivor).status().await.applied >= newest).then_some(())
    })
    .await;
    for node in cluster.ids() {
        cluster.kill(node).await;
    }
    let disk = door(&cluster.disks[&survivor]);
    let survey = Survey::of(&Folder::open(disk.clone(), Path::new(DIR), false).unwrap());
    assert_eq!((survey.newest, survey.fenced.len(), survey.is_voter), (newest, 2, true));

    let done = recover_survivor(&disk, Path::new(DIR), None).unwrap();
    assert_eq!((done.generation, done.keys), (2, 30));
    let aside = Folder::open(disk.clone(), &done.set_aside, false).unwrap();
    assert_eq!(aside.range(&RangeRequest::prefix(""), true).unwrap().kvs, kept, "the folder as it was is kept");

    let alone = cluster.boot(survivor).await.unwrap();
    until("the survivor to lead", async || alone.leadership().borrow().is_self.then_some(())).await;
    assert_eq!(all(&*alone, None).await, kept);
    let after = alone.txn(Txn::put("alone", "x")).await.unwrap();
    assert!(after.revision() > done.revision && done.revision > newest);

    // The others are a majority of what was, and must not be one of what is.
    let back = cluster.others(survivor);
    for node in &back {
        cluster.boot(*node).await.unwrap();
    }
    for node in &back {
        let old = cluster.node(*node);
        let reason = failure(&*old).await;
        assert!(reason.contains("generation"), "{reason}");
        assert!(old.txn(Txn::put("ghost", "x")).await.is_err());
    }
    assert_eq!(alone.range(RangeRequest::get("alone")).await.unwrap().kvs.len(), 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_that_was_cut_off_can_be_done_again() {
    let cluster = Cluster::start(1, 5).await;
    cluster.leader().await;
    cluster.node(1).txn(Txn::put("k", "v")).await.unwrap();
    cluster.stop().await;
    let mem = &cluster.disks[&1];
    // The second struck rename leaves no folder at all under the old name.
    for path_part in [DIR.to_owned(), format!("{DIR}.recovering")] {
        let generation = Folder::open(door(mem), Path::new(DIR), false).unwrap().facts().generation;
        let (op, kind) = (nexus_env::DiskOp::Rename, std::io::ErrorKind::Other);
        mem.inject(nexus_env::Fault { op, path_part, kind, times: 1 });
        assert!(recover_survivor(&door(mem), Path::new(DIR), None).is_err());
        mem.clear_faults();
        let done = recover_survivor(&door(mem), Path::new(DIR), None).unwrap();
        assert_eq!(done.generation, generation + 1);
    }
    let store = cluster.boot(1).await.unwrap();
    until("a leader", async || store.leadership().borrow().is_self.then_some(())).await;
    assert_eq!(all(&*store, None).await.len(), 1);
    cluster.stop().await;
}
