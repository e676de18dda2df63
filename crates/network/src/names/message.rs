//! DNS messages (RFC 1035, RFC 6891) as far as a resolver of one zone needs them: one question is read, and six kinds of
//! record are written.
//!
//! A message is from a stranger. It is read from front to back, and no name of it is followed anywhere else: in a question
//! there is nothing before it that a pointer could name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) const HEADER: usize = 12;
/// Of a name, with its lengths.
const MAX_NAME: usize = 255;
/// Records of a question that are passed over, such as an OPT.
const MAX_ADDITIONAL: u16 = 8;
/// A question without an OPT takes so much.
const PLAIN_UDP: u16 = 512;

/// Types of records.
pub(super) mod kind {
    pub const A: u16 = 1;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const IXFR: u16 = 251;
    pub const AXFR: u16 = 252;
}

/// The class of the Internet.
pub(super) const IN: u16 = 1;

/// How a question ended (RFC 1035, RFC 6891).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question<'a> {
    header: [u8; 4],
    /// Name, type and class as they came.
    section: &'a [u8],
    /// In lower case, the outermost last.
    pub labels: Vec<String>,
    pub kind: u16,
    pub class: u16,
    pub edns: Option<Edns>,
}

/// What an OPT record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edns {
    pub payload: u16,
    pub version: u8,
}

/// Why a message is no question that can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Too short, or an answer: whoever answers those may do so for ever.
    NoQuestion,
    /// To be answered with this.
    Bad(Code),
}

/// Reads the message from front to back.
struct Reader<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let bytes = self.message.get(self.at..self.at.checked_add(n)?)?;
        self.at += n;
        Some(bytes)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    fn labels(&mut self) -> Option<Vec<String>> {
        let (start, mut labels) = (self.at, Vec::new());
        loop {
            match self.u8()? {
                0 => return Some(labels),
                length @ 1..=63 => {
                    let label = self.take(length.into())?;
                    labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
                }
                _ => return None,
            }
            // With the zero that is still to come.
            if self.at - start >= MAX_NAME {
                return None;
            }
        }
    }

    /// A record; what it says, if it is an OPT.
    fn record(&mut self) -> Option<Option<Edns>> {
        let start = self.at;
        loop {
            match self.u8()? {
                0 => break,
                length @ 1..=63 => drop(self.take(length.into())?),
                192.. => {
                    self.u8()?;
                    break;
                }
                _ => return None,
            }
        }
        let bare = self.at == start + 1 && self.message[start] == 0;
        let (kind, payload) = (self.u16()?, self.u16()?);
        let ttl = self.take(4)?;
        let length = self.u16()?;
        self.take(length.into())?;
        match kind {
            kind::OPT if !bare => None,
            kind::OPT => Some(Some(Edns { payload, version: ttl[1] })),
            _ => Some(None),
        }
    }
}

fn is_digit(label: &str) -> bool {
    label.len() == 1 && label.bytes().all(|b| b.is_ascii_hexdigit())
}

impl<'a> Question<'a> {
    pub fn read(message: &'a [u8]) -> Result<Self, Unreadable> {
        if message.len() < HEADER || message[2] & 0x80 != 0 {
            return Err(Unreadable::NoQuestion);
        }
        if message[2] & 0x78 != 0 {
            return Err(Unreadable::Bad(Code::NotImp));
        }
        Self::read_standard(message).ok_or(Unreadable::Bad(Code::FormErr))
    }

    fn read_standard(message: &'a [u8]) -> Option<Self> {
        let count = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
        if (count(4), count(6), count(8)) != (1, 0, 0) || count(10) > MAX_ADDITIONAL {
            return None;
        }
        let mut reader = Reader { message, at: HEADER };
        let labels = reader.labels()?;
        let (kind, class) = (reader.u16()?, reader.u16()?);
        let section = &message[HEADER..reader.at];
        let mut edns = None;
        for _ in 0..count(10) {
            if let Some(found) = reader.record()?
                && edns.replace(found).is_some()
            {
                return None;
            }
        }
        let header = [message[0], message[1], message[2], message[3]];
        Some(Self { header, section, labels, kind, class, edns })
    }

    /// Bytes that the asker takes by UDP.
    pub fn payload(&self) -> u16 {
        self.edns.map_or(PLAIN_UDP, |e| e.payload).max(PLAIN_UDP)
    }

    /// The address that a reverse name asks for.
    pub fn reversed(&self) -> Option<IpAddr> {
        let words: Vec<&str> = self.labels.iter().rev().map(String::as_str).collect();
        match words.as_slice() {
            ["arpa", "in-addr", octets @ ..] if octets.len() == 4 => {
                octets.join(".").parse::<Ipv4Addr>().ok().map(IpAddr::from)
            }
            ["arpa", "ip6", digits @ ..] if digits.len() == 32 && digits.iter().all(|d| is_digit(d)) => {
                u128::from_str_radix(&digits.concat(), 16).ok().map(|bits| Ipv6Addr::from_bits(bits).into())
            }
            _ => None,
        }
    }

    /// Whether a resolver's answer is one to this question.
    pub fn is_answered_by(&self, answer: &[u8]) -> bool {
        let end = HEADER + self.section.len();
        answer.len() >= end
            && answer[..2] == self.header[..2]
            && answer[2] & 0x80 != 0
            && answer[4..6] == [0, 1]
            && answer[HEADER..end].eq_ignore_ascii_case(self.section)
    }
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    /// Labels.
    Ptr(Vec<String>),
    /// Labels.
    Cname(Vec<String>),
    Txt(Vec<String>),
    /// A port, and the labels of the name where it is (RFC 2782); one is as good as any other.
    Srv {
        port: u16,
        target: Vec<String>,
    },
    Soa,
}

/// One record of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Labels; the name that was asked for, without it.
    pub owner: Option<Vec<String>>,
    /// Seconds.
    pub ttl: u32,
    pub data: Data,
}

/// An answer in the making.
pub(super) struct Answer<'a> {
    pub question: &'a Question<'a>,
    pub code: Code,
    pub authoritative: bool,
    pub answers: Vec<Record>,
    /// Of other names, that whoever asks will ask for next: what finds no room is left out, and nobody is told.
    pub more: Vec<(Vec<String>, Data)>,
    /// Says for how long it may be believed that there is nothing: who answers for so many of the name's last labels.
    pub negative: Option<usize>,
    pub ttl: u32,
    /// What this resolver takes by UDP.
    pub payload: u16,
}

/// An answer to what could not be read: a header alone.
pub(super) fn bare(message: &[u8], code: Code) -> Vec<u8> {
    let low = code as u8 & 15;
    vec![message[0], message[1], 0x80 | (message[2] & 0x79), 0x80 | low, 0, 0, 0, 0, 0, 0, 0, 0]
}

fn name<L: AsRef<str>>(out: &mut Vec<u8>, labels: &[L]) {
    for label in labels.iter().map(AsRef::as_ref) {
        // Names of this cloud: 63 bytes at most.
        out.push(label.len().min(63) as u8);
        out.extend(label.bytes().take(63));
    }
    out.push(0);
}

impl Answer<'_> {
    /// The message, with as much of the answers as `limit` bytes take.
    pub fn write(&self, limit: usize) -> Vec<u8> {
        let q = self.question;
        let mut tail = Vec::new();
        let mut authorities = 0;
        if let Some(count) = self.negative.filter(|n| (1..=q.labels.len()).contains(n)) {
            authorities = 1;
            let last: usize = q.labels[q.labels.len() - count..].iter().map(|l| 1 + l.len()).sum();
            // Those labels, where they stand in the question: before the root's zero, the type and the class.
            let offset = HEADER + q.section.len() - 4 - 1 - last;
            tail.extend((0xc000 | offset as u16).to_be_bytes());
            self.data(&mut tail, &Data::Soa, self.ttl);
        }
        if q.edns.is_some() {
            tail.push(0);
            tail.extend(kind::OPT.to_be_bytes());
            tail.extend(self.payload.to_be_bytes());
            tail.extend([(self.code as u16 >> 4) as u8, 0, 0, 0, 0, 0]);
        }
        let mut body = Vec::new();
        let mut answers: u16 = 0;
        let room = limit.saturating_sub(HEADER + q.section.len() + tail.len());
        for answer in &self.answers {
            let before = body.len();
            match &answer.owner {
                // The question's name.
                None => body.extend([0xc0, HEADER as u8]),
                Some(labels) => name(&mut body, labels),
            }
            self.data(&mut body, &answer.data, answer.ttl);
            if body.len() > room {
                body.truncate(before);
                break;
            }
            answers += 1;
        }
        let mut additional = u16::from(q.edns.is_some());
        let mut beside = Vec::new();
        for (owner, data) in &self.more {
            let before = beside.len();
            name(&mut beside, &owner.iter().map(String::as_str).collect::<Vec<_>>());
            self.data(&mut beside, data, self.ttl);
            if body.len() + beside.len() > room {
                beside.truncate(before);
                break;
            }
            additional += 1;
        }
        let cut = usize::from(answers) < self.answers.len();
        let flags = 0x80 | (q.header[2] & 0x01) | if self.authoritative { 4 } else { 0 } | if cut { 2 } else { 0 };
        let mut out = Vec::with_capacity(limit.min(1500));
        out.extend([q.header[0], q.header[1], flags, 0x80 | (q.header[3] & 0x10) | (self.code as u8 & 15)]);
        for count in [1, answers, authorities, additional] {
            out.extend(count.to_be_bytes());
        }
        out.extend(q.section);
        out.extend(body);
        out.extend(tail);
        out.extend(beside);
        out
    }

    /// Type, class, time to live and data of a record.
    fn data(&self, out: &mut Vec<u8>, data: &Data, ttl: u32) {
        let (kind, bytes) = match data {
            Data::A(address) => (kind::A, address.octets().to_vec()),
            Data::Aaaa(address) => (kind::AAAA, address.octets().to_vec()),
            Data::Ptr(labels) | Data::Cname(labels) => {
                let mut bytes = Vec::new();
                name(&mut bytes, labels);
                (if matches!(data, Data::Ptr(_)) { kind::PTR } else { kind::CNAME }, bytes)
            }
            Data::Txt(texts) => {
                // Each piece has its length in front.
                let mut bytes = Vec::new();
                for piece in texts.iter().flat_map(|t| t.as_bytes().chunks(255)) {
                    bytes.push(piece.len() as u8);
                    bytes.extend(piece);
                }
                if bytes.is_empty() {
                    bytes.push(0);
                }
                (kind::TXT, bytes)
            }
            Data::Srv { port, target } => {
                // Priority and weight; names in these records are not compressed.
                let mut bytes = vec![0, 0, 0, 0];
                bytes.extend(port.to_be_bytes());
                name(&mut bytes, &target.iter().map(String::as_str).collect::<Vec<_>>());
                (kind::SRV, bytes)
            }
            Data::Soa => {
                let mut bytes = Vec::new();
                name(&mut bytes, &["ns", super::ZONE]);
                name(&mut bytes, &["hostmaster", super::ZONE]);
                // Nobody copies this zone: only the last number counts, for how long an absence is believed (RFC 2308).
                for number in [1, 3600, 600, 86_400, self.ttl] {
                    bytes.extend(number.to_be_bytes());
                }
                (kind::SOA, bytes)
            }
        };
        out.extend(kind.to_be_bytes());
        out.extend(IN.to_be_bytes());
        out.extend(ttl.to_be_bytes());
        out.extend((bytes.len() as u16).to_be_bytes());
        out.extend(bytes);
    }
}
