//! Looking names up on an instance's behalf: what its own resolver would have found, without a socket in between.
//!
//! Names are completed as `/etc/resolv.conf` of a container says: see [`search`]. What comes from resolvers outside is read from front
//! to back with bounds; a name in it may point backwards only, as all writers do (RFC 1035, section 4.1.4).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::message::{HEADER, IN, kind};
use super::serve::Resolver;
use super::{Carrier, Verdict, ZONE};

/// The longest chain of `CNAME`s that is followed over several answers.
const MAX_CHAIN: usize = 4;
/// Addresses that are told of one name.
const MAX_ADDRESSES: usize = 16;
/// Records of one answer that are looked at.
const MAX_RECORDS: usize = 256;
/// Pointers that one name may follow.
const MAX_POINTERS: usize = 16;
/// Bytes of a name without a final dot (RFC 1035).
const MAX_NAME: usize = 253;

/// Why a name leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("there is no such name")]
    NoName,
    #[error("the name is there, and nothing that is ready has it")]
    NoAddress,
    #[error("names of the world outside are not answered, because the project's egress leads to nothing there")]
    Refused,
    #[error("no resolver has answered")]
    Unanswered,
}

/// The names to ask for, in order, as resolvers do with `search PROJECT.internal internal` and `ndots:2`.
pub fn search(name: &str, project: &str) -> Vec<String> {
    if let Some(whole) = name.strip_suffix('.') {
        return vec![whole.to_owned()];
    }
    let completed = [format!("{name}.{project}.{ZONE}"), format!("{name}.{ZONE}")];
    let own = [name.to_owned()];
    let all =
        if name.matches('.').count() >= 2 { [&own[..], &completed].concat() } else { [&completed[..], &own].concat() };
    all.into_iter().filter(|n| n.len() <= MAX_NAME).collect()
}

impl Resolver {
    /// The addresses that a name leads an instance of `project` to that asks from `asker`: at most 16, of both families.
    pub async fn addresses(&self, asker: Ipv4Addr, project: &str, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        let mut worst = LookupError::NoName;
        for candidate in search(name, project) {
            let (six, four) =
                tokio::join!(self.of_kind(asker, &candidate, kind::AAAA), self.of_kind(asker, &candidate, kind::A));
            let mut found = Vec::new();
            for part in [six, four] {
                match part {
                    Ok(addresses) => found.extend(addresses.into_iter().take(MAX_ADDRESSES / 2)),
                    // What is known of a name that is there goes before what another is not.
                    Err(LookupError::NoName) => {}
                    Err(error) => worst = error,
                }
            }
            if !found.is_empty() {
                return Ok(found);
            }
            if worst == LookupError::NoAddress {
                break;
            }
        }
        // A word alone is hardly a name of the world outside.
        Err(if worst == LookupError::Refused && !name.contains('.') { LookupError::NoName } else { worst })
    }

    async fn of_kind(&self, asker: Ipv4Addr, name: &str, kind: u16) -> Result<Vec<IpAddr>, LookupError> {
        let mut name = name.to_owned();
        for _ in 0..MAX_CHAIN {
            let question = question(&name, kind).ok_or(LookupError::NoName)?;
            let answer = self.answer(asker, &question).await.ok_or(LookupError::Unanswered)?;
            match read(&answer, kind).ok_or(LookupError::Unanswered)? {
                Read::Addresses(found) => return Ok(found),
                Read::Alias(to) => name = to,
                Read::Nothing(error) => return Err(error),
            }
        }
        Err(LookupError::Unanswered)
    }

    /// What an instance would be answered that asks this.
    async fn answer(&self, asker: Ipv4Addr, question: &[u8]) -> Option<Vec<u8>> {
        match self.decide(question, asker, Carrier::Tcp) {
            Verdict::Answer(answer, _) => Some(answer),
            Verdict::Ignore => None,
            Verdict::Forward => {
                if !self.may_ask(asker) {
                    return None;
                }
                let _permits = self.permits(asker)?;
                let answer = self.pass_on(question, Carrier::Udp).await?;
                let is_cut = answer.get(2).is_some_and(|flags| flags & 2 != 0);
                if is_cut { self.pass_on(question, Carrier::Tcp).await } else { Some(answer) }
            }
        }
    }
}

/// A question; its number is nobody's matter, for whoever passes it on gives it another.
fn question(name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut out = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    if name.is_empty() || name.len() > MAX_NAME {
        return None;
    }
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        out.push(label.len() as u8);
        out.extend(label.bytes());
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend(IN.to_be_bytes());
    Some(out)
}

#[derive(Debug, PartialEq, Eq)]
enum Read {
    Addresses(Vec<IpAddr>),
    /// Another name is to be asked for.
    Alias(String),
    Nothing(LookupError),
}

/// What an answer says; `None` if it can't be read.
fn read(message: &[u8], wanted: u16) -> Option<Read> {
    let count = |at: usize| Some(usize::from(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?])));
    match message.get(3)? & 15 {
        0 => {}
        3 => return Some(Read::Nothing(LookupError::NoName)),
        5 => return Some(Read::Nothing(LookupError::Refused)),
        _ => return Some(Read::Nothing(LookupError::Unanswered)),
    }
    let (questions, answers) = (count(4)?, count(6)?);
    let mut at = HEADER;
    for _ in 0..questions.min(MAX_RECORDS) {
        at = name_at(message, at)?.1.checked_add(4)?;
    }
    let (mut found, mut alias) = (Vec::new(), None);
    for _ in 0..answers.min(MAX_RECORDS) {
        at = name_at(message, at)?.1;
        let (of, length) = (count(at)? as u16, count(at + 8)?);
        let start = at + 10;
        let data = message.get(start..start + length)?;
        match of {
            kind::A if of == wanted => found.push(IpAddr::from(<[u8; 4]>::try_from(data).ok()?)),
            kind::AAAA if of == wanted => found.push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            // The last of a chain is what it leads to.
            kind::CNAME => alias = Some(name_at(message, start)?.0),
            _ => {}
        }
        at = start + length;
    }
    Some(match alias {
        _ if !found.is_empty() => Read::Addresses(found),
        Some(to) => Read::Alias(to),
        None => Read::Nothing(LookupError::NoAddress),
    })
}

/// The name at a place of a message, and where what follows it begins.
fn name_at(message: &[u8], start: usize) -> Option<(String, usize)> {
    let (mut at, mut end, mut name) = (start, None, String::new());
    let mut pointers = 0;
    loop {
        match *message.get(at)? {
            0 => return Some((name, end.unwrap_or(at + 1))),
            length @ 1..=63 => {
                let label = message.get(at + 1..at + 1 + usize::from(length))?;
                if !name.is_empty() {
                    name.push('.');
                }
                name.push_str(&String::from_utf8_lossy(label));
                if name.len() > MAX_NAME {
                    return None;
                }
                at += 1 + usize::from(length);
            }
            high @ 192.. => {
                let to = usize::from(u16::from_be_bytes([high & 63, *message.get(at + 1)?]));
                end = end.or(Some(at + 2));
                pointers += 1;
                if to >= at || pointers > MAX_POINTERS {
                    return None;
                }
                at = to;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::sync::Arc;

    use tokio::sync::watch;

    use super::super::{Directory, Named, Project};
    use super::*;
    use crate::netns::NetnsRef;

    const ASKER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);

    fn resolver(outside: bool) -> Resolver {
        let web = Named {
            address6: "fd00::5".parse().unwrap(),
            address4: Ipv4Addr::new(10, 0, 0, 5),
            ready: true,
            only4: false,
            ports: Vec::new(),
        };
        let apps = BTreeMap::from([("web".to_owned(), vec![web]), ("idle".to_owned(), Vec::new())]);
        let directory = Directory {
            region: "local".into(),
            projects: BTreeMap::from([("shop".to_owned(), Project { apps, outside })]),
            askers: HashMap::from([(ASKER, "shop".to_owned())]),
            ..Directory::default()
        };
        let (_, told) = watch::channel(Arc::new(directory));
        Resolver::new(NetnsRef::Own, "/nonexistent", told, Arc::new(|_| 0))
    }

    #[test]
    fn names_are_completed_as_in_a_container() {
        assert_eq!(search("web", "shop"), ["web.shop.internal", "web.internal", "web"]);
        assert_eq!(search("web.shop", "shop")[1], "web.shop.internal");
        assert_eq!(search("web.shop.internal", "shop")[0], "web.shop.internal");
        assert_eq!(search("web.", "shop"), ["web"]);
        assert_eq!(search(&"x".repeat(250), "shop").len(), 1, "what would be too long is left out");
    }

    #[tokio::test]
    async fn an_app_is_found_by_all_of_its_names_and_by_those_of_its_project_alone() {
        let both: Vec<IpAddr> = vec!["fd00::5".parse().unwrap(), "10.0.0.5".parse().unwrap()];
        let resolver = resolver(false);
        for name in ["web", "web.shop", "web.shop.internal", "WEB.shop.local.internal", "web.shop.internal."] {
            assert_eq!(resolver.addresses(ASKER, "shop", name).await.as_ref(), Ok(&both), "{name}");
        }
        assert_eq!(resolver.addresses(ASKER, "shop", "idle").await, Err(LookupError::NoAddress));
        assert_eq!(resolver.addresses(ASKER, "shop", "web.bank.internal").await, Err(LookupError::NoName));
        assert_eq!(resolver.addresses(ASKER, "shop", "wbe").await, Err(LookupError::NoName));
        assert_eq!(resolver.addresses(ASKER, "shop", "example.com").await, Err(LookupError::Refused));
        let stranger = Ipv4Addr::new(10, 0, 0, 10);
        assert_eq!(resolver.addresses(stranger, "shop", "web").await, Err(LookupError::Unanswered));
    }

    #[tokio::test]
    async fn a_name_that_no_resolver_can_be_asked_for_is_no_missing_one() {
        assert_eq!(resolver(true).addresses(ASKER, "shop", "example.com").await, Err(LookupError::Unanswered));
    }

    #[test]
    fn answers_of_resolvers_are_read_with_their_chains_and_never_beyond_their_ends() {
        let asked = question("www.example.com", kind::A).unwrap();
        let mut answer = asked.clone();
        answer[2] |= 0x80;
        answer[7] = 2;
        // www.example.com is host.example.com; that has an address.
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 7, 4]);
        answer.extend(b"host");
        answer.extend([0xc0, 16]);
        let whole = {
            let mut whole = answer.clone();
            whole.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
            whole
        };
        assert_eq!(read(&whole, kind::A), Some(Read::Addresses(vec!["192.0.2.1".parse().unwrap()])));
        answer[7] = 1;
        assert_eq!(read(&answer, kind::A), Some(Read::Alias("host.example.com".into())));
        for cut in 0..whole.len() {
            assert_eq!(read(&whole[..cut], kind::A), None, "{cut}");
        }
        let mut endless = answer.clone();
        let at = endless.len() - 2;
        endless[at..].copy_from_slice(&(0xc000 | at as u16).to_be_bytes());
        assert_eq!(read(&endless, kind::A), None);
        answer[3] = 0x83;
        assert_eq!(read(&answer, kind::A), Some(Read::Nothing(LookupError::NoName)));
    }
}
