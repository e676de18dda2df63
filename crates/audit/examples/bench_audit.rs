//! Records appended and verified a second on one core: `cargo run --release -p nexus-audit --example bench_audit [RECORDS]`.

use std::time::Instant;

use nexus_audit::export::EXPORT_VERSION;
use nexus_audit::{
    Actor, ActorKind, Answer, Change, Draft, ExportVerifier, Hash, Header, Line, Log, Mode, Options, Personal,
    Retention, Signer, SubjectKey, Target, Verifier, entry_line,
};
use nexus_env::RealRng;

fn main() {
    let count: u64 = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(200_000);
    let ann = SubjectKey::generate("u-1/1", &RealRng);
    let draft = |number: u64| {
        let request_id = format!("req-{number}").parse().unwrap();
        let personal = Personal {
            display_name: Some("Ann".to_owned()),
            source_address: Some("192.0.2.7".to_owned()),
            user_agent: Some("nexus/1.0".to_owned()),
        };
        Draft {
            time: 1_700_000_000_000 + number,
            actor: Actor {
                access_key: None,
                kind: ActorKind::User,
                name: "u-1".to_owned(),
                organization: Some("acme".to_owned()),
                session: Some("0123456789abcdef".to_owned()),
            },
            action: "apps:update".to_owned(),
            target: Some(Target {
                name: format!("app-{number}"),
                plural: "apps".to_owned(),
                project: Some("shop".to_owned()),
                uid: None,
            }),
            policies: vec!["role-editor".to_owned()],
            answer: Answer::Ok,
            revision: Some(number),
            personal: Some(ann.seal(&personal, &request_id, &RealRng)),
            request_id,
            change: Some(Change { after: Some(Hash::ZERO), before: Some(Hash::ZERO) }),
            retention: Retention::Change,
            anchor: None,
        }
    };
    let drafts: Vec<Draft> = (0..count).map(draft).collect();
    let start = Instant::now();
    let mut log = Log::new("eu");
    let rows: Vec<Vec<u8>> = drafts.into_iter().map(|d| log.append(d).unwrap().row).collect();
    let appended = start.elapsed().as_secs_f64();

    let signer = Signer::from_seed("home", "eu", &[1; 32]).unwrap();
    let keys = Verifier::new([signer.public_key()]);
    let head = signer.sign(log.size(), log.root(), 1);
    let (cluster, group) = ("home".to_owned(), "eu".to_owned());
    let header =
        Header { cluster, from: 0, group, mode: Mode::Whole, peaks: vec![], to: count, version: EXPORT_VERSION };
    let start = Instant::now();
    let mut verifier = ExportVerifier::new(&keys, &[], Options::default()).unwrap();
    verifier.line(&Line::Header(header).to_json());
    rows.iter().for_each(|row| verifier.line(&entry_line(row)));
    verifier.line(&Line::head(&head).to_json());
    let report = verifier.finish();
    let verified = start.elapsed().as_secs_f64();
    assert!(report.is_right(), "{report:?}");
    println!(
        "{count} records of {} bytes: appended {:.0}/s, verified {:.0}/s",
        rows[0].len(),
        count as f64 / appended,
        count as f64 / verified
    );
}
