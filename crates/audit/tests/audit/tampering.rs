//! Every kind of tampering is found, and the report says which record first breaks.

use nexus_audit::{Consistency, Draft, Entry, Fault, Hash, HeadError, Header, Line, Log, Report, SignedHead, Signer};

use crate::world::{CLUSTER, GROUP, World, draft};

type Lines = Vec<Vec<u8>>;

/// Where the record stands among the lines.
fn line_of(lines: &Lines, index: u64, of_chain: bool) -> usize {
    let is_it = |line: &Vec<u8>| match serde_json::from_slice(line).unwrap() {
        Line::Entry(entry) => !of_chain && entry.record.index == index,
        Line::Chain(entry) => of_chain && entry.record.index == index,
        _ => false,
    };
    lines.iter().position(is_it).unwrap()
}

fn edit(lines: &mut Lines, at: usize, change: impl FnOnce(&mut Entry)) {
    let mut line: Line = serde_json::from_slice(&lines[at]).unwrap();
    match &mut line {
        Line::Entry(entry) | Line::Chain(entry) => change(entry),
        other => panic!("no record: {other:?}"),
    }
    lines[at] = line.to_json();
}

/// What is found, where, and that it is found without any earlier head too.
#[track_caller]
fn found(world: &World, lines: &Lines) -> (String, Option<(u64, u64)>, Fault) {
    let broken = world.verify(lines, &[]).broken.expect("it is found");
    assert!(!broken.to_string().is_empty());
    assert!(!world.verify(lines, &world.heads).is_right());
    (broken.log, broken.records, broken.fault)
}

const LOG: &str = "eu";
const CHAIN: &str = "eu/s1";

fn at(log: &str, record: u64, fault: Fault) -> (String, Option<(u64, u64)>, Fault) {
    (log.to_owned(), Some((record, record)), fault)
}

#[test]
fn a_removed_record_is_named() {
    let world = World::new();
    for (log, of_chain, index) in
        [(LOG, false, 0), (LOG, false, 5), (LOG, false, 39), (CHAIN, true, 0), (CHAIN, true, 1)]
    {
        let mut lines = world.whole();
        lines.remove(line_of(&lines, index, of_chain));
        assert_eq!(found(&world, &lines), at(log, index, Fault::Removed));
    }
    let mut lines = world.whole();
    lines.remove(line_of(&lines, 2, true));
    assert_eq!(found(&world, &lines), at(CHAIN, 2, Fault::Truncated { ends: 2, promised: 3 }));
}

#[test]
fn a_changed_record_is_named_whatever_was_changed() {
    let world = World::new();
    let changes: [fn(&mut Entry); 8] = [
        |e| e.record.actor.name = "u-bob".to_owned(),
        |e| e.record.action = "apps:get".to_owned(),
        |e| e.record.time += 1,
        |e| e.record.policies.clear(),
        |e| e.record.answer = nexus_audit::Answer::Error("forbidden".to_owned()),
        |e| e.record.change = None,
        |e| e.record.target = None,
        |e| e.record.retention = nexus_audit::Retention::Access,
    ];
    for change in changes {
        for index in [0, 5, 22] {
            let mut lines = world.whole();
            let place = line_of(&lines, index, false);
            edit(&mut lines, place, change);
            assert_eq!(found(&world, &lines), at(LOG, index, Fault::Changed));
        }
        // Behind the last record no link shows it, but a root does.
        let mut lines = world.whole();
        let place = line_of(&lines, 39, false);
        edit(&mut lines, place, change);
        assert_eq!(found(&world, &lines), (LOG.to_owned(), Some((30, 39)), Fault::ChangedWithin { size: 40 }));
    }
    for index in 0..5 {
        let mut lines = world.whole();
        let place = line_of(&lines, index, true);
        edit(&mut lines, place, |e| e.record.actor.name = "u-bob".to_owned());
        assert_eq!(found(&world, &lines), at(CHAIN, index, Fault::Changed));
    }
}

#[test]
fn reordered_and_repeated_records_are_named() {
    let world = World::new();
    let mut lines = world.whole();
    let (a, b) = (line_of(&lines, 4, false), line_of(&lines, 7, false));
    lines.swap(a, b);
    assert_eq!(found(&world, &lines), at(LOG, 4, Fault::Reordered));

    let mut lines = world.whole();
    lines.insert(b, lines[a].clone());
    assert_eq!(found(&world, &lines), at(LOG, 4, Fault::Reordered));

    let mut lines = world.whole();
    let (a, b) = (line_of(&lines, 0, true), line_of(&lines, 1, true));
    lines.swap(a, b);
    assert_eq!(found(&world, &lines), at(CHAIN, 0, Fault::Reordered));

    // Renumbered, so that only the links tell.
    let mut lines = world.whole();
    let (a, b) = (line_of(&lines, 4, false), line_of(&lines, 5, false));
    lines.swap(a, b);
    edit(&mut lines, a, |e| e.record.index = 4);
    edit(&mut lines, b, |e| e.record.index = 5);
    assert_eq!(found(&world, &lines), at(LOG, 3, Fault::Changed));
}

#[test]
fn a_forged_record_is_named() {
    let world = World::new();
    let mut log = Log::new(GROUP);
    let forged = log.append(draft(77)).unwrap().row;
    let forged = String::from_utf8(nexus_audit::entry_line(&forged)).unwrap();

    let mut lines = world.whole();
    let place = line_of(&lines, 0, false);
    lines[place] = forged.clone().into_bytes();
    assert_eq!(found(&world, &lines), at(LOG, 0, Fault::Changed));

    let mut lines = world.whole();
    let place = line_of(&lines, 39, false);
    edit(&mut lines, place, |e| e.record.target.as_mut().unwrap().name = "other".to_owned());
    assert_eq!(found(&world, &lines).2, Fault::ChangedWithin { size: 40 });

    let mut lines = world.selected(&[7]);
    edit(&mut lines, 2, |e| e.record.actor.name = "u-bob".to_owned());
    assert_eq!(world.verify(&lines, &[]).broken.unwrap().fault, Fault::NotIncluded { size: 40 });
    let mut lines = world.selected(&[7]);
    edit(&mut lines, 2, |e| e.inclusion = None);
    assert_eq!(world.verify(&lines, &[]).broken.unwrap().fault, Fault::NotIncluded { size: 40 });
    assert_eq!(world.verify(&world.selected(&[7, 7]), &[]).broken.unwrap().fault, Fault::Reordered);
}

#[test]
fn a_moved_or_changed_personal_part_is_named() {
    let world = World::new();
    let mut lines = world.whole();
    let other = Entry::from_row(&world.rows[6]).unwrap().personal;
    let place = line_of(&lines, 5, false);
    edit(&mut lines, place, |e| e.personal = other);
    assert_eq!(found(&world, &lines), at(LOG, 5, Fault::Personal));
}

/// Another history: all links and roots are those of its own records.
fn rewritten(signer_seed: [u8; 32], heads_at: &[u64]) -> World {
    let mut world = World::empty();
    world.signer = Signer::from_seed(CLUSTER, GROUP, &signer_seed).unwrap();
    for number in 0..40 {
        let wrong = Draft { action: if number == 14 { "apps:get" } else { "apps:update" }.to_owned(), ..draft(number) };
        let appended = world.log.append(wrong).unwrap();
        world.store(appended);
        if heads_at.contains(&world.log.size()) {
            world.sign();
        }
    }
    world
}

fn history() -> World {
    let mut world = World::empty();
    for number in 0..40 {
        let appended = world.log.append(draft(number)).unwrap();
        world.store(appended);
        if world.log.size().is_multiple_of(10) {
            world.sign();
        }
    }
    world
}

#[test]
fn a_log_that_was_rewritten_with_all_its_links_breaks_between_two_roots() {
    let world = history();
    // Whoever lacks the key can only use the true heads.
    let mut forger = rewritten([5; 32], &[]);
    forger.heads.clone_from(&world.heads);
    let report = world.verify(&forger.whole(), &[]);
    let broken = report.broken.unwrap();
    assert_eq!((broken.records, broken.fault), (Some((10, 19)), Fault::ChangedWithin { size: 20 }));

    let forger = rewritten([6; 32], &[40]);
    let broken = world.verify(&forger.whole(), &[]).broken.unwrap();
    assert!(matches!(broken.fault, Fault::Head(HeadError::UnknownKey(_))));
}

#[test]
fn a_log_that_was_rewritten_and_signed_anew_is_a_fork_to_whoever_holds_an_earlier_head() {
    let world = history();
    let forger = rewritten([5; 32], &[40]);
    assert!(world.verify(&forger.whole(), &[]).is_right(), "without an earlier head nobody can tell");
    for size in [20, 30, 40] {
        let broken = world.verify(&forger.whole(), &[world.head_of(size).clone()]).broken.unwrap();
        assert_eq!((broken.records, broken.fault), (Some((0, size - 1)), Fault::Fork { size }));
    }
    let earlier = [world.head_of(10).clone(), world.head_of(20).clone(), world.head_of(30).clone()];
    let broken = world.verify(&forger.whole(), &earlier).broken.unwrap();
    assert_eq!((broken.records, broken.fault), (Some((10, 19)), Fault::Fork { size: 20 }));

    // Nor does a proof help the forger.
    let mut lines = forger.export(30, 40);
    let unproven = world.verify(&lines, &[world.head_of(20).clone()]).broken.unwrap().fault;
    assert_eq!(unproven, Fault::Unproven { size: 20 });
    lines.push(forger.consistency(20, 40));
    let broken = world.verify(&lines, &[world.head_of(20).clone()]).broken.unwrap();
    assert_eq!(broken.fault, Fault::Inconsistent { size: 20 });
    let mut selected = forger.selected(&[14]);
    assert!(world.verify(&selected, &[]).is_right());
    let broken = world.verify(&selected, &[world.head_of(40).clone()]).broken.unwrap();
    assert_eq!(broken.fault, Fault::Fork { size: 40 });
    selected.push(Line::Consistency(Consistency { first: 10, path: vec![Hash::ZERO; 3], second: 40 }).to_json());
    assert!(!world.verify(&selected, &[world.head_of(10).clone()]).is_right());
}

#[test]
fn a_truncated_export_is_found() {
    let world = World::new();
    let lines = world.whole();
    for cut in 0..lines.len() {
        let report: Report = world.verify(&lines[..cut], &[]);
        assert!(!report.is_right(), "the first {cut} lines");
    }
    let end = line_of(&lines, 33, false);
    assert_eq!(found(&world, &lines[..end].to_vec()), at(LOG, 33, Fault::Truncated { ends: 33, promised: 40 }));
    assert_eq!(found(&world, &lines[..lines.len() - 1].to_vec()), at(LOG, 30, Fault::Unsigned(30)));

    // With another header too, an earlier head tells that records are missing.
    let short = world.export(0, 30);
    assert!(world.verify(&short, &[]).is_right());
    let broken = world.verify(&short, &[world.head_of(40).clone()]).broken.unwrap();
    assert_eq!((broken.records, broken.fault), (Some((30, 30)), Fault::Truncated { ends: 30, promised: 40 }));
}

#[test]
fn a_forged_or_moved_head_is_found() {
    let world = World::new();
    let is_head = |line: &Vec<u8>| matches!(serde_json::from_slice(line), Ok(Line::Head(_)));
    let place = world.whole().iter().position(is_head).unwrap();

    let mut lines = world.whole();
    let note = world.head_of(10).to_string().replace("time 17", "time 18");
    lines[place] = Line::Head(note).to_json();
    assert!(matches!(found(&world, &lines).2, Fault::Head(HeadError::Signature(_))));

    let mut lines = world.whole();
    lines[place] = Line::head(world.head_of(20)).to_json();
    assert_eq!(found(&world, &lines), at(LOG, 10, Fault::Reordered), "it covers ten records that come later");

    let mut lines = world.whole();
    let head = lines.remove(place);
    lines.insert(place + 1, head);
    assert!(matches!(found(&world, &lines).2, Fault::Malformed(_)));

    let other: SignedHead = Signer::from_seed(CLUSTER, "us", &[5; 32]).unwrap().sign(10, Hash::ZERO, 1);
    let mut lines = world.whole();
    lines[place] = Line::head(&other).to_json();
    assert!(matches!(found(&world, &lines).2, Fault::Head(HeadError::UnknownKey(_))));
}

#[test]
fn a_chain_with_another_anchor_is_found() {
    let world = World::new();
    // The anchor's record says less than was anchored.
    let mut lines = world.whole();
    let place = line_of(&lines, 12, false);
    edit(&mut lines, place, |e| e.record.anchor.as_mut().unwrap().to = 1);
    lines.remove(line_of(&lines, 2, true));
    assert!(!world.verify(&lines, &[]).is_right());

    // A whole stretch of the chain is left out: its anchor was never written, the next one gives it away.
    let mut gap = World::empty();
    gap.refuse(1);
    gap.anchor(0);
    gap.refuse(2);
    gap.chain.anchored(&gap.chain.anchor().unwrap());
    gap.waiting.clear();
    gap.refuse(3);
    gap.anchor(1);
    gap.sign();
    assert_eq!(found(&gap, &gap.whole()), at(CHAIN, 1, Fault::Removed));

    let mut lines = world.whole();
    let stray = lines[line_of(&lines, 0, true)].clone();
    lines.insert(2, stray);
    assert!(matches!(found(&world, &lines).2, Fault::Malformed(_)));

    let mut lines = world.whole();
    let place = line_of(&lines, 1, true);
    edit(&mut lines, place, |e| e.record.group = "eu/s2".to_owned());
    assert_eq!(found(&world, &lines), at(CHAIN, 1, Fault::WrongLog("eu/s2".to_owned())));
}

#[test]
fn bad_input_is_refused_where_it_stands() {
    let world = World::new();
    let whole = world.whole();
    let header: Line = serde_json::from_slice(&whole[0]).unwrap();
    let Line::Header(header) = header else { panic!("the header comes first") };
    let with = |header: Header| [&[Line::Header(header).to_json()], &whole[1..]].concat();
    let fault = |lines: &Lines| world.verify(lines, &[]).broken.unwrap().fault;
    let is_malformed = |lines: &Lines| matches!(fault(lines), Fault::Malformed(_));

    assert!(is_malformed(&Vec::new()));
    assert!(is_malformed(&whole[1..].to_vec()), "no header");
    assert!(is_malformed(&[&whole[..1], &whole[..]].concat()), "two headers");
    assert_eq!(fault(&with(Header { version: 2, ..header.clone() })), Fault::Version(2));
    assert!(is_malformed(&with(Header { from: 3, ..header.clone() })), "peaks that don't fit");
    assert!(is_malformed(&with(Header { to: 39, ..header.clone() })), "more records than named");
    assert!(matches!(fault(&with(Header { group: "us".to_owned(), ..header.clone() })), Fault::WrongLog(_)));
    let forged = Header { from: 1, peaks: vec![Hash::ZERO], ..header };
    let mut lines = with(forged);
    lines.remove(1);
    let broken = world.verify(&lines, &[]).broken.unwrap();
    assert_eq!((broken.records, broken.fault), (Some((1, 9)), Fault::ChangedWithin { size: 10 }));

    let replaced = |line: &[u8]| {
        let mut lines = whole.clone();
        lines[3] = line.to_vec();
        lines
    };
    let text = String::from_utf8(whole[3].clone()).unwrap();
    for line in [
        "",
        "[]",
        "{}",
        "{\"entry\":{}}",
        "{\"other\":{}}",
        "{\"pruned\":{\"hash\":\"00\",\"index\":2}}",
        "{\"dropped\":{\"from\":0,\"server\":\"s1\",\"to\":2}}",
        "{\"head\":\"\"}",
        &text.replacen("\"v\":1", "\"v\":2", 1),
        &text.replacen("\"v\":1", "\"v\":1,\"x\":1", 1),
        &text.replacen("\"index\":2", "\"index\":2,\"index\":2", 1),
        &text.replacen("\"index\":2", "\"index\":2.0", 1),
        &"[".repeat(200_000),
        &format!("{text}{}", " ".repeat(300_000)),
    ] {
        let fault = fault(&replaced(line.as_bytes()));
        assert!(matches!(fault, Fault::Malformed(_) | Fault::Head(_)), "{fault:?}");
    }
    assert!(is_malformed(&replaced(&[0xff, 0xfe])));
}
