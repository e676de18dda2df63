//! The encoding of records is a promise to auditors: it never changes by accident.

use nexus_audit::{
    Actor, ActorKind, Anchor, Answer, Change, Entry, Hash, Record, RecordError, Retention, Target, chain_line,
};
use serde_json::{Value, json};

use crate::world::{World, draft, request};

const GOLDEN: &str = include_str!("../golden/records.txt");

/// One record with everything, in awkward texts; one with as little as there can be; one with an anchor.
fn records() -> Vec<Record> {
    let full = Record {
        action: "secrets:read".to_owned(),
        actor: Actor {
            access_key: Some("AK7".to_owned()),
            kind: ActorKind::ServiceAccount,
            name: "tab\t quote\" back\\slash /slash \u{1}\u{1f}\u{7f} é € 😀".to_owned(),
            organization: Some("acme".to_owned()),
            session: Some("s-9".to_owned()),
        },
        anchor: None,
        answer: Answer::Error("forbidden".to_owned()),
        change: Some(Change::of(Some(&json!({"b": 1, "a": [true, null, "x"]})), None)),
        group: "eu".to_owned(),
        index: 9_007_199_254_740_991,
        personal: Some(nexus_audit::PersonalRef { digest: Hash::of(b"ciphertext"), subject: "u-7/2".to_owned() }),
        policies: vec!["guard-rail-1".to_owned(), "role-viewer".to_owned()],
        previous: Hash::leaf(b"before"),
        request_id: request(7),
        retention: Retention::Security,
        revision: Some(0),
        target: Some(Target {
            name: "db".to_owned(),
            organization: None,
            plural: "secrets".to_owned(),
            project: Some("shop".to_owned()),
            uid: Some("0190a5f0-0000-8000-8000-00000000002a".parse().unwrap()),
        }),
        time: 1_700_000_000_123,
        version: 1,
    };
    let least = Record {
        action: String::new(),
        actor: Actor {
            access_key: None,
            kind: ActorKind::Anonymous,
            name: String::new(),
            organization: None,
            session: None,
        },
        answer: Answer::Ok,
        change: None,
        group: "global".to_owned(),
        index: 0,
        personal: None,
        policies: Vec::new(),
        previous: Hash::ZERO,
        retention: Retention::Access,
        revision: None,
        target: None,
        time: 0,
        ..full.clone()
    };
    let anchor = Anchor { from: 3, head: Hash::leaf(b"head"), server: "s1".to_owned(), to: 9 };
    let anchored = Record { anchor: Some(anchor), retention: Retention::Change, ..least.clone() };
    let owned = Target { organization: Some("acme".to_owned()), ..full.target.clone().unwrap() };
    let owned = Record { target: Some(owned), ..full.clone() };
    vec![full, least, anchored, owned]
}

#[test]
fn the_encoding_is_the_one_that_was_promised() {
    let lines: Vec<String> = records()
        .iter()
        .map(|r| format!("{} {}\n", r.hash().unwrap(), String::from_utf8(r.encode().unwrap()).unwrap()))
        .collect();
    assert_eq!(lines.concat(), GOLDEN, "stored records would not verify any more: make a new version instead");
}

#[test]
fn the_encoding_is_canonical_json() {
    for record in records() {
        let bytes = record.encode().unwrap();
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(
            String::from_utf8(serde_json_canonicalizer::to_vec(&value).unwrap()),
            String::from_utf8(bytes.clone())
        );
        assert_eq!(Record::decode(&bytes).unwrap(), record);
    }
}

#[test]
fn only_the_canonical_form_is_read() {
    let bytes = records()[1].encode().unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(Record::decode(text.as_bytes()).is_ok());
    for wrong in [
        format!(" {text}"),
        text.replacen("\"index\":0", "\"index\": 0", 1),
        text.replacen("\"action\":\"\"", "\"action\":\"\\u002f\"", 1),
        text.replacen("\"action\":\"\",", "", 1).replacen("\"v\":1", "\"v\":1,\"action\":\"\"", 1),
        text.replacen("\"time\":0", "\"target\":null,\"time\":0", 1),
    ] {
        assert_eq!(Record::decode(wrong.as_bytes()), Err(RecordError::NotCanonical), "{wrong}");
    }
    let newer = text.replacen("\"v\":1", "\"v\":2", 1);
    assert_eq!(Record::decode(newer.as_bytes()), Err(RecordError::Version(2)));
    for unreadable in [text.replacen("\"v\":1", "\"v\":1,\"w\":1", 1), text.replacen("\"time\":0", "\"time\":-1", 1)] {
        assert!(matches!(Record::decode(unreadable.as_bytes()), Err(RecordError::Unreadable(_))));
    }
    assert_eq!(Record::decode(&vec![b' '; 20_000]), Err(RecordError::TooLong(20_000)));
    let mut beyond = records().remove(0);
    beyond.index += 1;
    assert_eq!(beyond.encode(), Err(RecordError::Number("index")));
}

#[test]
fn a_digest_of_a_change_does_not_depend_on_how_the_spec_was_written() {
    let change = |text: &str| Change::of(None, Some(&serde_json::from_str(text).unwrap()));
    assert_eq!(change(r#"{"a":1,"b":{"c":[1.0,"x"]}}"#), change(r#"{ "b": {"c": [1, "\u0078"]}, "a": 1.0 }"#));
    assert_ne!(change(r#"{"a":1}"#), change(r#"{"a":2}"#));
    assert_eq!(change("{}").before, None);
}

#[test]
fn a_row_reads_back_as_it_was_written() {
    let world = World::new();
    for row in &world.rows {
        let entry = Entry::from_row(row).unwrap();
        assert_eq!(entry.to_row(), *row);
        assert!(entry.personal_fits());
    }
    let row = &world.chain_rows[&12][0];
    assert!(chain_line(row).starts_with(br#"{"chain":{"record":{"action":"sessions:create""#));
    assert!(Entry::from_row(b"{}").is_err());
    let size = world.rows[0].len();
    assert!(size < 1100, "a record's row is about a kilobyte at most, this one has {size} bytes");
    assert_eq!(draft(1).change.unwrap().after.unwrap().to_string().len(), 64);
}
