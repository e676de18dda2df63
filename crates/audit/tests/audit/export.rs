//! Exports that are right: whole, from the middle, selected, pruned, shredded; and logs that go on after a restart.

use nexus_audit::{
    Appended, Chain, Dropped, Entry, Fault, Hash, HeadError, Line, Log, LogState, Mode, Options, Pruned, ResumeError,
    SignedHead, Signer, Verifier, verify,
};

use crate::world::{CLUSTER, GROUP, World, draft, refusal, request};

const LENIENT: Options = Options { allow_pruned: true, allow_dropped: true };

#[test]
fn a_whole_export_is_right_for_whoever_holds_any_earlier_head() {
    let world = World::new();
    let report = world.verify(&world.whole(), &world.heads);
    assert_eq!(report.broken, None);
    assert!(report.is_right() && report.whole);
    assert_eq!((report.from, report.to, report.records), (0, 40, 40));
    assert_eq!((report.anchors, report.chain_records), (2, 5));
    assert_eq!((report.heads, report.earlier), (4, 4));
    assert_eq!(report.last_head.as_ref(), Some(world.head_of(40).claimed()));
}

#[test]
fn a_stretch_of_the_log_goes_with_heads_before_and_after_it() {
    let world = World::new();
    for (from, to) in [(0, 10), (10, 30), (13, 40), (20, 20), (25, 30)] {
        let mut lines = world.export(from, to);
        if from == to {
            lines.push(Line::head(world.head_of(to)).to_json());
        }
        let report = world.verify(&lines, &[]);
        assert_eq!((report.broken, report.records), (None, to - from), "{from} to {to}");
        // A head of another size in the stretch needs no proof, one outside does.
        for size in [10, 20, 30, 40] {
            let head = world.head_of(size).clone();
            let report = world.verify(&lines, std::slice::from_ref(&head));
            if (from..=to).contains(&size) {
                assert_eq!((report.broken, report.earlier), (None, 1), "{from} to {to}, head {size}");
                continue;
            }
            let fault = report.broken.unwrap().fault;
            let expected =
                if size > to { Fault::Truncated { ends: to, promised: size } } else { Fault::Unproven { size } };
            assert_eq!(fault, expected);
            let mut proven = lines.clone();
            proven.push(world.consistency(size.min(to), size.max(to)));
            let report = world.verify(&proven, &[head]);
            assert_eq!((report.broken, report.earlier), (None, 1), "{from} to {to}, proof for {size}");
        }
    }
}

#[test]
fn selected_records_are_shown_to_be_in_the_tree() {
    let world = World::new();
    let report = world.verify(&world.selected(&[0, 7, 39]), &[world.head_of(40).clone()]);
    assert_eq!((report.broken, report.records, report.whole, report.earlier), (None, 3, false, 1));

    let mut lines = world.selected(&[5]);
    lines.push(world.consistency(10, 40));
    assert_eq!(world.verify(&lines, &[world.head_of(10).clone()]).earlier, 1);
}

#[test]
fn what_was_pruned_leaves_the_rest_provable_and_is_counted() {
    let world = World::new();
    let mut lines = Vec::new();
    for line in world.whole() {
        lines.push(match serde_json::from_slice(&line).unwrap() {
            Line::Entry(entry) if entry.record.index < 9 => {
                Line::Pruned(Pruned { hash: entry.record.hash().unwrap(), index: entry.record.index }).to_json()
            }
            Line::Chain(entry) if entry.record.index == 0 => {
                Line::Dropped(Dropped { from: 0, server: "s1".to_owned(), to: 2 }).to_json()
            }
            Line::Chain(entry) if entry.record.index < 3 => continue,
            _ => line,
        });
    }
    let report = verify(&lines, &world.verifier(), &world.heads, LENIENT).unwrap();
    assert_eq!(report.broken, None);
    assert_eq!((report.pruned, report.records), (9, 31));
    assert_eq!((report.chain_dropped, report.chain_records, report.earlier), (3, 2, 4));

    let broken = world.verify(&lines, &[]).broken.unwrap();
    assert_eq!((broken.records, broken.fault), (Some((0, 0)), Fault::Pruned), "only who allows it puts up with it");
}

#[test]
fn a_shredded_personal_part_is_unreadable_and_everything_stays_provable() {
    let world = World::new();
    let entry = Entry::from_row(&world.rows[3]).unwrap();
    let sealed = entry.sealed().unwrap();
    let opened = world.ann.open(&sealed, &request(3)).unwrap();
    assert_eq!(opened.source_address.as_deref(), Some("192.0.2.7"));
    assert!(!String::from_utf8_lossy(&world.whole().concat()).contains("192.0.2.7"));

    // The key is gone: a new one for the subject opens nothing. Nothing that is stored or exported has changed.
    let World { rng, .. } = &world;
    let next = nexus_audit::SubjectKey::generate("u-ann/1", rng);
    assert!(next.open(&sealed, &request(3)).is_err());
    assert!(world.verify(&world.whole(), &world.heads).is_right());

    // The ciphertext may be deleted as well.
    let lines: Vec<Vec<u8>> = world
        .whole()
        .into_iter()
        .map(|line| match serde_json::from_slice(&line).unwrap() {
            Line::Entry(mut entry) => {
                entry.personal = None;
                Line::Entry(entry).to_json()
            }
            _ => line,
        })
        .collect();
    assert!(world.verify(&lines, &world.heads).is_right());
}

#[test]
fn a_writer_resumes_from_one_small_row_and_the_unfinished_tiles() {
    let mut straight = World::empty();
    let mut resumed = World::empty();
    // Beyond the second full tile; the sizes at which a writer ends are on and beside the bounds of tiles.
    for number in 0..530 {
        straight.change(number);
        if [0, 1, 2, 100, 255, 256, 257, 300, 511, 512, 513].contains(&number) {
            let bytes = resumed.log.state().to_bytes();
            assert!(bytes.len() <= 41 + 32 * 10);
            let state = LogState::from_bytes(&bytes).unwrap();
            resumed.log = Log::resume(GROUP, state, &resumed.all_tiles()).unwrap();
        }
        resumed.change(number);
    }
    assert_eq!(resumed.log.state(), straight.log.state());
    assert_eq!(resumed.rows, straight.rows);
    assert_eq!(resumed.tiles, straight.tiles);
    let sizes: Vec<(u8, u64, usize)> = resumed.tiles.iter().map(|(t, h)| (t.level, t.number, h.len())).collect();
    assert_eq!(sizes, [(0, 0, 256), (0, 1, 256), (1, 0, 2)]);

    let mut tiles = resumed.all_tiles();
    let state = resumed.log.state();
    for (id, at) in [(nexus_audit::TileId { level: 0, number: 2 }, 3), (nexus_audit::TileId { level: 1, number: 0 }, 1)]
    {
        let right = tiles.clone();
        tiles.get_mut(&id).unwrap()[at].0[0] ^= 1;
        assert_eq!(Log::resume(GROUP, state.clone(), &tiles).unwrap_err(), ResumeError::Differs);
        tiles.get_mut(&id).unwrap().truncate(at);
        assert!(matches!(Log::resume(GROUP, state.clone(), &tiles), Err(ResumeError::Incomplete { .. })));
        tiles = right;
    }
    let bytes = state.to_bytes();
    for wrong in
        [&bytes[..bytes.len() - 1], &bytes[..bytes.len() - 32], &bytes[..20], &[][..], &[&[9], &bytes[1..]].concat()]
    {
        assert!(LogState::from_bytes(wrong).is_err());
    }
}

#[test]
fn an_append_writes_tiles_only_when_one_is_full() {
    let mut log = Log::new(GROUP);
    let mut writes = Vec::new();
    for number in 0..66_000 {
        let Appended { index, tiles, .. } = log.append(draft(number)).unwrap();
        if !tiles.is_empty() {
            let shapes = tiles.iter().map(|(id, bytes)| (id.level, id.number, bytes.len() / Hash::LENGTH)).collect();
            writes.push((index, shapes));
        }
    }
    let shapes = |at: usize| -> (u64, Vec<(u8, u64, usize)>) { writes[at].clone() };
    assert_eq!(writes.len(), 257);
    assert_eq!(shapes(0), (255, vec![(0, 0, 256), (1, 0, 1)]));
    assert_eq!(shapes(9), (2559, vec![(0, 9, 256), (1, 0, 10)]));
    assert_eq!(shapes(255), (65_535, vec![(0, 255, 256), (1, 0, 256), (2, 0, 1)]));
    assert_eq!(shapes(256), (65_791, vec![(0, 256, 256), (1, 1, 1)]));
}

#[test]
fn a_failed_append_changes_nothing() {
    let mut world = World::new();
    let (state, waiting) = (world.log.state(), world.chain.waiting());
    let long = nexus_audit::Draft { action: "x".repeat(20_000), ..draft(1) };
    assert!(world.log.append(long.clone()).is_err());
    assert!(world.chain.append(long).is_err());
    assert!(world.log.append(nexus_audit::Draft { revision: Some(1 << 53), ..draft(1) }).is_err());
    assert_eq!((world.log.state(), world.chain.waiting()), (state, waiting));
}

#[test]
fn a_server_goes_on_with_its_chain_after_a_restart() {
    let mut world = World::new();
    let last = Entry::from_row(&world.rows[25]).unwrap().record.anchor.unwrap();
    assert_eq!((last.from, last.to), (3, 4));
    // Two records after the last anchor; one of them is still there after the restart, the other is lost.
    world.refuse(900);
    world.refuse(901);
    let kept = Entry::from_row(&world.waiting[0]).unwrap();
    let lost = Entry::from_row(&world.waiting.pop().unwrap()).unwrap();
    let mut chain = Chain::resume(GROUP, "s1", Some(&last));
    assert_eq!((chain.waiting(), chain.anchor()), (0, None));
    assert!(chain.replay(&lost).is_err(), "a chain goes on without gaps");
    chain.replay(&kept).unwrap();
    world.chain = chain;
    world.refuse(902);
    let anchor = world.chain.anchor().unwrap();
    assert!(anchor.follows(Some(&last)) && !anchor.follows(None));
    world.anchor(40);
    world.sign();
    assert_eq!(world.chain.waiting(), 0);
    let report = world.verify(&world.whole(), &world.heads);
    assert_eq!((report.broken, report.anchors, report.chain_records), (None, 3, 7));

    // What came while the anchor was on its way waits for the next.
    world.refuse(903);
    let anchor = world.chain.anchor().unwrap();
    world.refuse(904);
    world.chain.anchored(&anchor);
    world.chain.anchored(&anchor);
    assert_eq!((world.chain.waiting(), world.chain.anchor().unwrap().from), (1, anchor.to + 1));
    assert!(world.chain.append(refusal(1)).is_ok());
}

#[test]
fn a_head_reads_back_from_a_file_and_from_a_line() {
    let world = World::new();
    let head = world.head_of(40);
    let note = head.to_string();
    assert!(note.starts_with("home/audit/eu\n40\n") && note.contains("=\ntime 1700000009999\n\n— home/audit/eu "));
    assert_eq!(note.parse::<SignedHead>().unwrap(), *head);
    assert_eq!(head.to_line().lines().count(), 1);
    assert_eq!(head.to_line().parse::<SignedHead>().unwrap(), *head);
    assert_eq!(world.verifier().verify(head).unwrap().size, 40);

    // Witnesses may add signatures; those of unknown keys are passed over.
    let witnessed: SignedHead = format!("{note}— witness.example/w {}\n", "AAAA".repeat(20)).parse().unwrap();
    assert!(world.verifier().verify(&witnessed).is_ok());
    for wrong in [
        note.replace("\n40\n", "\n040\n"),
        note.replace("home/audit/eu\n40", "home\n40"),
        note.replace("time ", "moment "),
        note.replace("— ", "- "),
        note.trim_end().to_owned(),
        note.replace("\n\n", "\n"),
        String::new(),
        "\"\\\"\\\"\"".to_owned(),
    ] {
        assert!(matches!(wrong.parse::<SignedHead>(), Err(HeadError::Malformed(_))), "{wrong}");
    }
}

#[test]
fn heads_are_believed_by_the_logs_own_key_only() {
    let world = World::new();
    let head = world.head_of(40).clone();
    let note = head.to_string();
    let forged: SignedHead = note.replace("\n40\n", "\n41\n").parse().unwrap();
    assert!(matches!(world.verifier().verify(&forged), Err(HeadError::Signature(_))));
    assert!(matches!(Verifier::default().verify(&head), Err(HeadError::UnknownKey(_))));

    // The key of another log of the same cluster, also if it is the same secret.
    let other = Signer::from_seed(CLUSTER, "us", &[5; 32]).unwrap();
    let keys = Verifier::new([other.public_key()]);
    assert!(matches!(keys.verify(&head), Err(HeadError::UnknownKey(_))));
    // A line for its own name over another log's head.
    let theirs = other.sign(40, Hash::ZERO, 1).to_string();
    let moved: SignedHead = theirs.replacen("home/audit/us", "home/audit/eu", 1).parse().unwrap();
    let both = Verifier::new([other.public_key(), world.signer.public_key()]);
    assert!(matches!(both.verify(&moved), Err(HeadError::UnknownKey(_))));

    let key = world.signer.public_key();
    assert!(key.to_string().starts_with(&format!("home/audit/eu+{}+", key.id())));
    for wrong in ["", "home/audit/eu", "home/audit/eu+00000000+AAAA", &key.to_string().replace("/eu", "/us")] {
        assert!(wrong.parse::<nexus_audit::PublicKey>().is_err(), "{wrong}");
    }
    assert!(Signer::from_seed("a b", GROUP, &[5; 32]).is_err() && Signer::from_seed("a", "b\n", &[5; 32]).is_err());
    assert!(verify(world.whole(), &world.verifier(), &[forged], Options::default()).is_err());
}

#[test]
fn an_export_without_records_is_right_if_a_head_says_so() {
    let mut world = World::empty();
    world.sign();
    let lines = [world.header(Mode::Whole, 0, 0), Line::head(&world.heads[0]).to_json()];
    assert_eq!(world.verify(&lines, &world.heads).earlier, 1);
    assert!(world.verify(&lines, &world.heads).is_right());
    assert!(!world.verify(&lines[..1], &[]).is_right());
}
