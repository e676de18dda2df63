//! A region's log with a server's chain, and what is exported of them.

use std::collections::BTreeMap;

use nexus_audit::export::EXPORT_VERSION;
use nexus_audit::tiles::{decode_tile, open_tiles, peaks_at};
use nexus_audit::{
    Actor, ActorKind, Answer, Appended, Chain, Change, Consistency, Draft, Entry, Hash, Header, Line, Log, Mode,
    Options, Personal, Report, Retention, SignedHead, Signer, SubjectKey, Target, TileId, Verifier, chain_line,
    consistency_proof, entry_line, inclusion_proof, verify,
};
use nexus_env::SeededRng;
use nexus_model::RequestId;
use serde_json::json;

pub const CLUSTER: &str = "home";
pub const GROUP: &str = "eu";

pub fn request(number: u64) -> RequestId {
    format!("req-{number}").parse().unwrap()
}

/// A change of an app by Ann.
pub fn draft(number: u64) -> Draft {
    Draft {
        time: 1_700_000_000_000 + number,
        actor: Actor {
            access_key: None,
            kind: ActorKind::User,
            name: "u-ann".to_owned(),
            organization: Some("acme".to_owned()),
            session: Some("s-1".to_owned()),
        },
        action: "apps:update".to_owned(),
        target: Some(Target {
            name: format!("app-{number}"),
            organization: Some("acme".to_owned()),
            plural: "apps".to_owned(),
            project: Some("shop".to_owned()),
            uid: None,
        }),
        policies: vec!["role-editor".to_owned()],
        answer: Answer::Ok,
        revision: Some(number + 40),
        request_id: request(number),
        change: Some(Change::of(Some(&json!({"replicas": number})), Some(&json!({"replicas": number + 1})))),
        retention: Retention::Change,
        anchor: None,
        personal: None,
    }
}

/// A refused login.
pub fn refusal(number: u64) -> Draft {
    Draft {
        action: "sessions:create".to_owned(),
        answer: Answer::Error("unauthenticated".to_owned()),
        revision: None,
        change: None,
        retention: Retention::Access,
        ..draft(number)
    }
}

/// Everything that is stored, and who signs.
pub struct World {
    pub rng: SeededRng,
    pub ann: SubjectKey,
    pub signer: Signer,
    pub log: Log,
    pub rows: Vec<Vec<u8>>,
    pub tiles: BTreeMap<TileId, Vec<Hash>>,
    pub chain: Chain,
    /// The rows of the chain, behind the record of the log that anchors them.
    pub chain_rows: BTreeMap<u64, Vec<Vec<u8>>>,
    pub waiting: Vec<Vec<u8>>,
    /// After as many records as each says.
    pub heads: Vec<SignedHead>,
}

impl World {
    pub fn empty() -> Self {
        let rng = SeededRng::new(7);
        Self {
            ann: SubjectKey::generate("u-ann/1", &rng),
            rng,
            signer: Signer::from_seed(CLUSTER, GROUP, &[5; 32]).unwrap(),
            log: Log::new(GROUP),
            rows: Vec::new(),
            tiles: BTreeMap::new(),
            chain: Chain::resume(GROUP, "s1", None),
            chain_rows: BTreeMap::new(),
            waiting: Vec::new(),
            heads: Vec::new(),
        }
    }

    /// 40 records: two anchors, with three and two refusals; heads after 10, 20, 30 and 40.
    pub fn new() -> Self {
        let mut world = Self::empty();
        for number in 0..40 {
            match number {
                12 | 25 => {
                    (0..if number == 12 { 3 } else { 2 }).for_each(|n| world.refuse(100 + number * 10 + n));
                    world.anchor(number);
                }
                _ => world.change(number),
            }
            if world.log.size().is_multiple_of(10) {
                world.sign();
            }
        }
        world
    }

    pub fn store(&mut self, appended: Appended) {
        assert_eq!(appended.index as usize, self.rows.len());
        self.rows.push(appended.row);
        for (id, bytes) in appended.tiles {
            self.tiles.insert(id, decode_tile(&bytes).unwrap());
        }
    }

    /// A change with a personal part.
    pub fn change(&mut self, number: u64) {
        let personal = Personal { source_address: Some("192.0.2.7".to_owned()), ..Personal::default() };
        let sealed = self.ann.seal(&personal, &request(number), &self.rng);
        let appended = self.log.append(Draft { personal: Some(sealed), ..draft(number) }).unwrap();
        self.store(appended);
    }

    pub fn refuse(&mut self, number: u64) {
        let row = self.chain.append(refusal(number)).unwrap().row;
        self.waiting.push(row);
    }

    pub fn anchor(&mut self, number: u64) {
        let anchor = self.chain.anchor().unwrap();
        let appended = self.log.append(anchor.clone().draft(1_700_000_000_000 + number, request(number))).unwrap();
        self.chain_rows.insert(appended.index, std::mem::take(&mut self.waiting));
        self.store(appended);
        self.chain.anchored(&anchor);
    }

    pub fn sign(&mut self) {
        self.heads.push(self.signer.sign(self.log.size(), self.log.root(), 1_700_000_009_999));
    }

    pub fn head_of(&self, size: u64) -> &SignedHead {
        self.heads.iter().find(|h| h.claimed().size == size).unwrap()
    }

    /// All tiles, those too that aren't stored.
    pub fn all_tiles(&self) -> BTreeMap<TileId, Vec<Hash>> {
        let mut tiles = self.tiles.clone();
        for (id, count) in open_tiles(self.log.size()).into_iter().filter(|(id, _)| id.level == 0) {
            let rows = &self.rows[id.first_record() as usize..][..count];
            let hashes = rows.iter().map(|r| Entry::from_row(r).unwrap().record.hash().unwrap()).collect();
            tiles.insert(id, hashes);
        }
        tiles
    }

    pub fn header(&self, mode: Mode, from: u64, to: u64) -> Vec<u8> {
        let peaks = peaks_at(&self.all_tiles(), from).unwrap();
        let (cluster, group) = (CLUSTER.to_owned(), GROUP.to_owned());
        Line::Header(Header { cluster, from, group, mode, peaks, to, version: EXPORT_VERSION }).to_json()
    }

    /// The records from `from` until before `to`, where a head must be.
    pub fn export(&self, from: u64, to: u64) -> Vec<Vec<u8>> {
        let mut lines = vec![self.header(Mode::Whole, from, to)];
        for index in from..to {
            lines.push(entry_line(&self.rows[index as usize]));
            lines.extend(self.chain_rows.get(&index).into_iter().flatten().map(|r| chain_line(r)));
            let heads = self.heads.iter().filter(|h| h.claimed().size == index + 1);
            lines.extend(heads.map(|h| Line::head(h).to_json()));
        }
        lines
    }

    pub fn whole(&self) -> Vec<Vec<u8>> {
        self.export(0, self.log.size())
    }

    pub fn consistency(&self, first: u64, second: u64) -> Vec<u8> {
        let path = consistency_proof(&self.all_tiles(), first, second).unwrap();
        Line::Consistency(Consistency { first, path, second }).to_json()
    }

    /// Some records with their proofs.
    pub fn selected(&self, indices: &[u64]) -> Vec<Vec<u8>> {
        let size = self.log.size();
        let mut lines = vec![self.header(Mode::Selected, 0, size), Line::head(self.head_of(size)).to_json()];
        for index in indices {
            let mut entry = Entry::from_row(&self.rows[*index as usize]).unwrap();
            entry.inclusion = Some(inclusion_proof(&self.all_tiles(), *index, size).unwrap());
            lines.push(Line::Entry(Box::new(entry)).to_json());
        }
        lines
    }

    pub fn verifier(&self) -> Verifier {
        // By its text: what a third party has been given.
        Verifier::new([self.signer.public_key().to_string().parse().unwrap()])
    }

    pub fn verify(&self, lines: &[Vec<u8>], earlier: &[SignedHead]) -> Report {
        verify(lines, &self.verifier(), earlier, Options::default()).unwrap()
    }
}
