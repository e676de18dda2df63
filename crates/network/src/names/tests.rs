//! What each kind of message is answered with, read by a reader that shares nothing with what wrote it.

use proptest::prelude::*;

use super::*;

const ASKER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 3);
const OPEN: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);
const LOST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);

fn named(n: u16) -> Named {
    let address4 = Ipv4Addr::new(10, 0, (n >> 8) as u8, n as u8);
    Named {
        address6: Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, n),
        address4,
        ready: true,
        only4: false,
        ports: Vec::new(),
    }
}

/// With two ports, one of which the third lacks.
fn serving(n: u16) -> Named {
    let ports = [("http", 8080), ("metrics", 9100)].into_iter().take(if n == 3 { 1 } else { 2 });
    Named { ports: ports.map(|(name, port)| (name.to_owned(), port)).collect(), ..named(n) }
}

/// `shop` has web (two ready, one not), old (ready on IPv4 alone), idle (nothing) and wide (700); `bank` has web.
fn directory() -> Directory {
    let shop = Project {
        apps: BTreeMap::from([
            ("web".into(), vec![named(1), named(2), Named { ready: false, ..named(3) }]),
            ("old".into(), vec![Named { only4: true, ..named(9) }]),
            ("idle".into(), Vec::new()),
            (
                "api".into(),
                vec![serving(21), Named { only4: true, ..serving(22) }, Named { ready: false, ..serving(23) }],
            ),
            ("many".into(), (2000..2700).map(serving).collect()),
            ("wide".into(), (1000..1700).map(named).collect()),
        ]),
        outside: false,
    };
    let bank = Project { apps: BTreeMap::from([("web".into(), vec![named(77)])]), outside: true };
    let askers = [(ASKER, "shop"), (OTHER, "bank"), (OPEN, "bank"), (LOST, "unheard")];
    Directory {
        region: "eu".into(),
        projects: BTreeMap::from([("shop".into(), shop), ("bank".into(), bank)]),
        askers: askers.map(|(a, p)| (a, p.to_owned())).into(),
        inside: HashMap::new(),
        instances: vec![("10.0.0.0".parse().unwrap(), 16), ("fd00:0:0:1::".parse().unwrap(), 64)],
    }
}

/// A question as RFC 1035 writes it.
fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut out = vec![0xbe, 0xef, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').filter(|l| !l.is_empty()) {
        out.push(label.len() as u8);
        out.extend(label.bytes());
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend([0, 1]);
    out
}

/// With an OPT record.
fn with_edns(mut question: Vec<u8>, payload: u16, version: u8) -> Vec<u8> {
    question[11] += 1;
    question.extend([0, 0, 41]);
    question.extend(payload.to_be_bytes());
    // The DO bit is set; an option of two bytes.
    question.extend([0, version, 0x80, 0, 0, 6, 0, 10, 0, 2, 1, 2]);
    question
}

fn decide(message: &[u8], asker: Ipv4Addr, carrier: Carrier) -> Verdict {
    directory().decide(message, asker, carrier, &mut |n| n - 1)
}

/// An answer, read apart from what wrote it.
#[derive(Debug)]
struct Told {
    code: u8,
    flags: u8,
    data: Vec<String>,
    /// Types and times to live of the authorities.
    authorities: Vec<(u16, u32)>,
    /// Payload and the upper bits of the code.
    edns: Option<(u16, u8)>,
    /// Names and addresses that were told beside.
    beside: Vec<(String, String)>,
}

fn name_at(bytes: &[u8], at: &mut usize) -> String {
    let (mut out, mut here, mut jumped) = (String::new(), *at, false);
    loop {
        let length = bytes[here];
        if length >= 192 {
            if !jumped {
                *at = here + 2;
            }
            jumped = true;
            here = usize::from(u16::from_be_bytes([length & 63, bytes[here + 1]]));
            continue;
        }
        here += 1;
        if length == 0 {
            if !jumped {
                *at = here;
            }
            return out;
        }
        out += &String::from_utf8_lossy(&bytes[here..here + usize::from(length)]);
        out.push('.');
        here += usize::from(length);
    }
}

fn address(kind: u16, data: &[u8]) -> String {
    match kind {
        1 => Ipv4Addr::from(<[u8; 4]>::try_from(data).unwrap()).to_string(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(data).unwrap()).to_string(),
    }
}

fn read(bytes: &[u8]) -> Told {
    let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let mut told =
        Told { code: bytes[3] & 15, flags: bytes[2], data: vec![], authorities: vec![], edns: None, beside: vec![] };
    assert!(bytes[2] & 0x80 != 0 && bytes[3] & 0x80 != 0, "an answer, by who recurses");
    let mut at = 12;
    let mut asked = String::new();
    for _ in 0..u16_at(4) {
        asked = name_at(bytes, &mut at);
        at += 4;
    }
    for (section, count) in [(0, u16_at(6)), (1, u16_at(8)), (2, u16_at(10))] {
        for _ in 0..count {
            let owner = name_at(bytes, &mut at);
            let (kind, class) = (u16_at(at), u16_at(at + 2));
            let ttl = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap());
            let length = usize::from(u16_at(at + 8));
            at += 10;
            let data = &bytes[at..at + length];
            match (section, kind) {
                (0, kind) => {
                    assert_eq!((owner.as_str(), class, ttl), (asked.as_str(), 1, TTL), "as it was asked");
                    told.data.push(match kind {
                        1 | 28 => address(kind, data),
                        33 => {
                            assert_eq!(data[..4], [0; 4], "one is as good as any other");
                            let mut target = at + 6;
                            let named = name_at(bytes, &mut target);
                            assert_eq!(target, at + length);
                            format!("{named}:{}", u16_at(at + 4))
                        }
                        12 => name_at(bytes, &mut at.clone()),
                        other => format!("type {other}"),
                    });
                }
                (1, kind) => {
                    assert!(asked.ends_with(&owner), "{owner} of {asked}");
                    let mut in_data = at;
                    assert_eq!(name_at(bytes, &mut in_data), "ns.internal.");
                    assert_eq!(name_at(bytes, &mut in_data), "hostmaster.internal.");
                    assert_eq!(in_data + 20, at + length);
                    told.authorities.push((kind, ttl));
                }
                (_, kind @ (1 | 28)) => told.beside.push((owner, address(kind, data))),
                (_, kind) => {
                    assert_eq!((kind, owner.as_str(), length), (41, "", 0));
                    told.edns = Some((class, (ttl >> 24) as u8));
                }
            }
            at += length;
        }
    }
    assert_eq!(at, bytes.len(), "nothing is left over");
    told
}

fn ask_by(message: &[u8], asker: Ipv4Addr, carrier: Carrier) -> Told {
    match decide(message, asker, carrier) {
        Verdict::Answer(bytes, _) => {
            assert_eq!(bytes[..2], message[..2]);
            read(&bytes)
        }
        other => panic!("{other:?}"),
    }
}

fn ask(name: &str, kind: u16) -> Told {
    let mut told = ask_by(&question(name, kind), ASKER, Carrier::Udp);
    told.data.sort();
    told
}

const A: u16 = 1;
const AAAA: u16 = 28;

#[test]
fn an_apps_ready_instances_are_named() {
    for name in ["web.shop.internal.", "WEB.Shop.INTERNAL.", "web.shop.eu.internal."] {
        let four = ask(name, A);
        assert_eq!((four.code, four.data), (0, vec!["10.0.0.1".into(), "10.0.0.2".into()]));
        assert_eq!(four.flags, 0x85, "authoritative, and the wish for recursion is the asker's");
        assert_eq!(ask(name, AAAA).data, ["fd00:0:0:1::1", "fd00:0:0:1::2"]);
    }
    assert_eq!(ask("old.shop.internal.", A).data, ["10.0.0.9"]);
}

#[test]
fn what_has_no_data_is_told_apart_from_what_is_not() {
    for (name, kind) in [
        ("idle.shop.internal.", A),
        ("old.shop.internal.", AAAA),
        ("web.shop.internal.", 15),
        ("shop.internal.", A),
        ("eu.internal.", A),
        ("shop.eu.internal.", A),
        ("internal.", 2),
    ] {
        let told = ask(name, kind);
        assert_eq!((told.code, told.data.len()), (0, 0), "{name}");
        assert_eq!(told.authorities, [(6, TTL)], "{name}");
    }
    for name in [
        "none.shop.internal.",
        "web.bank.internal.",
        "bank.internal.",
        "web.shop.us.internal.",
        "a.web.shop.eu.internal.",
        "web.bank.eu.internal.",
        "localhost.",
    ] {
        let told = ask(name, A);
        assert_eq!((told.code, told.authorities), (3, vec![(6, TTL)]), "{name}");
    }
    assert_eq!(ask_by(&question("web.bank.internal.", A), OTHER, Carrier::Udp).data, ["10.0.0.77"]);
    assert_eq!(ask("internal.", 6).data, ["type 6"]);
}

const SRV: u16 = 33;

#[test]
fn a_named_port_leads_to_the_ready_instances_with_their_addresses() {
    for zone in ["shop.internal.", "shop.eu.internal."] {
        let told = ask(&format!("_http._tcp.api.{zone}"), SRV);
        let [one, two] = [21, 22].map(|n| format!("10-0-0-{n}.api.{zone}"));
        assert_eq!((told.code, told.data), (0, vec![format!("{one}:8080"), format!("{two}:8080")]));
        let mut beside = told.beside;
        beside.sort();
        let wanted = [(&one, "10.0.0.21"), (&one, "fd00:0:0:1::15"), (&two, "10.0.0.22")];
        assert_eq!(beside, wanted.map(|(name, address)| (name.clone(), address.to_owned())));
        // What it leads to has a name of its own.
        assert_eq!(ask(&one, A).data, ["10.0.0.21"]);
        assert_eq!(ask(&one, AAAA).data, ["fd00:0:0:1::15"]);
        assert_eq!(ask(&two, AAAA).data.len(), 0);
    }
    assert_eq!(ask("_METRICS._TCP.Api.shop.internal.", SRV).data.len(), 2);
    for (empty, kind) in
        [("_http._tcp.api.shop.internal.", A), ("_tcp.api.shop.internal.", SRV), ("api.shop.internal.", SRV)]
    {
        let told = ask(empty, kind);
        assert_eq!((told.code, told.data.len(), told.beside.len()), (0, 0, 0), "{empty}");
    }
    for nothing in [
        "_grpc._tcp.api.shop.internal.",
        "_http._udp.api.shop.internal.",
        "http._tcp.api.shop.internal.",
        "_http._tcp.none.shop.internal.",
        "_http._tcp.api.bank.internal.",
        "x._http._tcp.api.shop.internal.",
        "_tcp.web.shop.internal.",
        // It is not ready; it is another app's; it is nobody's.
        "10-0-0-23.api.shop.internal.",
        "10-0-0-1.api.shop.internal.",
        "10-0-9-9.api.shop.internal.",
    ] {
        assert_eq!(ask(nothing, SRV).code, 3, "{nothing}");
    }
    assert_eq!(ask("10-0-0-1.web.shop.internal.", A).data, ["10.0.0.1"]);
}

#[test]
fn addresses_beside_an_answer_take_only_what_room_is_left() {
    let asked = with_edns(question("_http._tcp.many.shop.internal.", SRV), 4096, 0);
    let Verdict::Answer(bytes, _) = decide(&asked, ASKER, Carrier::Udp) else { panic!() };
    assert!(bytes.len() <= usize::from(MAX_UDP));
    let told = read(&bytes);
    assert!(told.flags & 2 != 0 && told.data.len() > 10 && told.beside.len() <= 1, "{told:?}");
    let whole = ask_by(&asked, ASKER, Carrier::Tcp);
    assert_eq!((whole.flags & 2, whole.data.len(), whole.edns), (0, MAX_ADDRESSES, Some((MAX_UDP, 0))));
    assert!(whole.beside.len() > MAX_ADDRESSES, "by TCP there is room for most: {}", whole.beside.len());
}

#[test]
fn addresses_have_names_within_their_project() {
    let six = |last: &str| format!("{last}.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.");
    assert_eq!(ask("2.0.0.10.in-addr.arpa.", 12).data, ["web.shop.internal."]);
    assert_eq!(ask(&six("9"), 12).data, ["old.shop.internal."]);
    assert_eq!(ask(&six("9"), A).code, 0);
    assert_eq!(ask("77.0.0.10.in-addr.arpa.", 12).code, 3, "another project's");
    assert_eq!(ask("9.9.9.9.in-addr.arpa.", 12).code, 5, "from outside");
}

#[test]
fn names_from_outside_are_passed_on_only_where_there_is_egress() {
    let outside = question("example.com.", A);
    assert_eq!(decide(&outside, OPEN, Carrier::Udp), Verdict::Forward);
    assert_eq!(ask_by(&outside, ASKER, Carrier::Udp).code, 5);
    let own = decide(&question("nothing.bank.internal.", A), OPEN, Carrier::Udp);
    assert!(matches!(own, Verdict::Answer(..)), "names of the inside never leave: {own:?}");
    let own = decide(&question("77.0.0.10.in-addr.arpa.", A), OPEN, Carrier::Udp);
    assert!(matches!(own, Verdict::Answer(..)), "nor do addresses: {own:?}");
}

#[test]
fn what_a_resolver_does_not_do_is_refused_with_its_code() {
    let web = || question("web.shop.internal.", A);
    let code = |message: &[u8]| ask_by(message, ASKER, Carrier::Udp).code;
    let changed = |at: usize, byte: u8| {
        let mut message = web();
        message[at] = byte;
        message
    };
    assert_eq!(code(&changed(2, 5 << 3)), 4, "an update");
    for (what, message) in [
        ("two questions", changed(5, 2)),
        ("no question", changed(5, 0)),
        ("an answer in a question", changed(7, 1)),
        ("an OPT that is not there", changed(11, 1)),
        ("a pointer", changed(12, 0xc0)),
        ("half of it", web()[..20].to_vec()),
        ("two OPT", with_edns(with_edns(web(), 512, 0), 512, 0)),
    ] {
        assert_eq!(code(&message), 1, "{what}");
    }
    let mut chaos = question("version.bind.", 16);
    *chaos.last_mut().unwrap() = 3;
    assert_eq!(code(&chaos), 5);
    assert_eq!(ask("internal.", 252).code, 5, "a transfer");
    let new = ask_by(&with_edns(web(), 1232, 1), ASKER, Carrier::Udp);
    assert_eq!((new.code, new.edns), (0, Some((MAX_UDP, 1))), "BADVERS is 16");
    assert_eq!(ask_by(&question("web.unheard.internal.", A), LOST, Carrier::Udp).code, 2);
    assert_eq!(read(&Directory::failed(&web(), Carrier::Udp).unwrap()).code, 2);
    // Answers, scraps and strangers get nothing.
    assert_eq!(decide(&changed(2, 0x81), ASKER, Carrier::Udp), Verdict::Ignore);
    assert_eq!(decide(&web()[..11], ASKER, Carrier::Udp), Verdict::Ignore);
    assert_eq!(decide(&web(), Ipv4Addr::new(192, 0, 2, 1), Carrier::Udp), Verdict::Ignore);
}

#[test]
fn names_are_as_long_as_they_may_be_and_no_longer() {
    let label = "x".repeat(63);
    let long = [label.as_str(); 3].join(".");
    // 3 × 64 + 62 + 1 is 255.
    assert_eq!(ask(&format!("{long}.{}", "y".repeat(61)), A).code, 5);
    assert_eq!(ask_by(&question(&format!("{long}.{}", "y".repeat(62)), A), ASKER, Carrier::Udp).code, 1);
    let mut strange = question("web.shop.internal.", A);
    strange[13] = 0xff;
    assert_eq!(ask_by(&strange, ASKER, Carrier::Udp).code, 3, "no text");
}

#[test]
fn long_answers_are_cut_for_udp_and_whole_by_tcp() {
    let plain = question("wide.shop.internal.", AAAA);
    let large = with_edns(plain.clone(), 4096, 0);
    for (message, limit) in [(&plain, 512), (&large, usize::from(MAX_UDP))] {
        let Verdict::Answer(bytes, _) = decide(message, ASKER, Carrier::Udp) else { panic!() };
        assert!(bytes.len() <= limit && bytes.len() > limit - 28, "{} of {limit}", bytes.len());
        let told = read(&bytes);
        assert!(told.flags & 2 != 0 && !told.data.is_empty());
    }
    let whole = ask_by(&large, ASKER, Carrier::Tcp);
    assert_eq!((whole.flags & 2, whole.data.len(), whole.edns), (0, MAX_ADDRESSES, Some((MAX_UDP, 0))));
}

#[test]
fn the_order_is_by_chance() {
    let message = question("web.shop.internal.", A);
    let first = |chance: usize| match directory().decide(&message, ASKER, Carrier::Udp, &mut |_| chance) {
        Verdict::Answer(bytes, _) => read(&bytes).data[0].clone(),
        other => panic!("{other:?}"),
    };
    assert_ne!(first(0), first(1));
}

#[test]
fn only_an_answer_to_the_question_is_one() {
    let asked = question("example.com.", A);
    let question_of = Question::read(&asked).unwrap();
    let answered = |change: fn(&mut Vec<u8>)| {
        let mut answer = asked.clone();
        answer[2] |= 0x80;
        change(&mut answer);
        question_of.is_answered_by(&answer)
    };
    assert!(answered(|_| {}) && answered(|a| a[13] = b'E'));
    assert!(!answered(|a| a[0] = 0) && !answered(|a| a[13] = b'f') && !answered(|a| a[2] = 1));
    assert!(!answered(|a| a.truncate(20)) && !answered(|a| a.clear()));
}

proptest! {
    #[test]
    fn no_message_is_too_strange(message in prop::collection::vec(any::<u8>(), 0..600), tcp: bool) {
        let carrier = if tcp { Carrier::Tcp } else { Carrier::Udp };
        if let Verdict::Answer(bytes, _) = decide(&message, ASKER, carrier) {
            prop_assert_eq!(&bytes[..2], &message[..2]);
            prop_assert!(tcp || bytes.len() <= usize::from(MAX_UDP));
            read(&bytes);
        }
        let _ = Directory::failed(&message, carrier);
    }

    #[test]
    fn no_change_of_a_question_is_too_strange(
        kind in 0..260u16, edns: bool, at in prop::collection::vec((2..64usize, any::<u8>()), 0..4), cut in 0..40usize,
    ) {
        let mut message = question("web.shop.internal.", kind);
        if edns {
            message = with_edns(message, 900, 0);
        }
        let length = message.len();
        for (at, byte) in at {
            message[at % length] = byte;
        }
        message.truncate(length.saturating_sub(cut.saturating_sub(20)));
        if let Verdict::Answer(bytes, _) = decide(&message, OPEN, Carrier::Udp) {
            prop_assert!(bytes.len() <= usize::from(MAX_UDP));
            prop_assert!(bytes[2] & 0x80 != 0);
        }
        let _ = Directory::failed(&message, Carrier::Udp);
    }
}

/// One with a NIC in `net`: an app of its own project with two NICs there, one of a peered project, a zone.
fn inside() -> Inside {
    let nic = |n: u8, ready| NamedNic {
        address4: Some(Ipv4Addr::new(10, 9, 0, n)),
        address6: (n == 1).then(|| "fd09::1".parse().unwrap()),
        ready,
    };
    let record = |name: &str, data| (name.to_owned(), 60, data);
    let corp = [
        record("", ZoneData::A(vec![Ipv4Addr::new(10, 9, 9, 9)])),
        record("db", ZoneData::Cname("web.shop.internal.".into())),
        record("loop", ZoneData::Cname("loop.corp.example".into())),
        record("a.b", ZoneData::Txt(vec!["x".repeat(300)])),
        record("*.wild", ZoneData::Aaaa(vec!["fd09::9".parse().unwrap()])),
    ];
    Inside {
        apps: BTreeMap::from([
            (("shop".into(), "web".into()), vec![nic(1, true), nic(2, true), nic(3, false)]),
            (("bank".into(), "api".into()), vec![nic(7, true)]),
        ]),
        zones: vec![Zone::new("Corp.Example", corp)],
        cidrs: vec![("10.9.0.0".parse().unwrap(), 16)],
    }
}

/// Records of an answer by owner, type and data; read apart from what wrote them.
fn records(name: &str, kind: u16) -> (u8, Vec<(String, u16, Vec<u8>)>) {
    let mut directory = directory();
    directory.inside.insert(ASKER, Arc::new(inside()));
    let asked = question(name, kind);
    let Verdict::Answer(bytes, _) = directory.decide(&asked, ASKER, Carrier::Tcp, &mut |n| n - 1) else {
        panic!("{name}")
    };
    let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let mut at = 12;
    name_at(&bytes, &mut at);
    at += 4;
    let mut out = Vec::new();
    for _ in 0..u16_at(6) {
        let owner = name_at(&bytes, &mut at);
        let (kind, length) = (u16_at(at), usize::from(u16_at(at + 8)));
        at += 10;
        let data = match kind {
            5 | 12 => name_at(&bytes, &mut at.clone()).into_bytes(),
            _ => bytes[at..at + length].to_vec(),
        };
        at += length;
        out.push((owner, kind, data));
    }
    if u16_at(8) == 1 {
        let owner = name_at(&bytes, &mut at);
        assert!(name.to_lowercase().ends_with(&owner), "{owner} of {name}");
        at += 10 + usize::from(u16_at(at + 8));
    }
    assert_eq!(at, bytes.len());
    out.sort();
    (bytes[3] & 15, out)
}

#[test]
fn who_has_a_nic_finds_apps_by_their_nics() {
    for name in ["web.shop.internal.", "web.shop.eu.internal."] {
        let (code, found) = records(name, A);
        let addresses: Vec<_> = found.iter().map(|r| r.2.clone()).collect();
        assert_eq!((code, addresses), (0, vec![vec![10, 9, 0, 1], vec![10, 9, 0, 2]]), "{name}: the ready ones");
        assert_eq!(records(name, AAAA).1.len(), 1);
    }
    assert_eq!(records("api.bank.internal.", A).1[0].2, [10, 9, 0, 7], "of a peered network");
    assert_eq!(records("old.shop.internal.", A).1[0].2, [10, 0, 0, 9], "without NICs: as ever");
    assert_eq!(records("none.bank.internal.", A).0, 3);
    // Others see nothing of it.
    assert_eq!(ask("api.bank.internal.", A).code, 3);
    assert_eq!(records("1.0.9.10.in-addr.arpa.", 12).1[0].2, b"web.shop.internal.");
    assert_eq!(records("200.0.9.10.in-addr.arpa.", 12).0, 3, "never asked for outside");
}

#[test]
fn a_private_zone_goes_before_everything_else() {
    assert_eq!(records("corp.example.", A).1[0].2, [10, 9, 9, 9]);
    assert_eq!(records("corp.example.", AAAA), (0, vec![]));
    assert_eq!(records("none.corp.example.", A).0, 3);
    assert_eq!(records("b.corp.example.", A), (0, vec![]), "there is something below it");
    assert_eq!(records("any.wild.corp.example.", AAAA).1.len(), 1);
    assert_eq!(records("wild.corp.example.", AAAA), (0, vec![]));
    let (_, text) = records("a.b.corp.example.", 16);
    assert_eq!((text[0].2.len(), text[0].2[0], text[0].2[256]), (302, 255, 45));
    let (code, chain) = records("DB.corp.example.", A);
    assert_eq!((code, chain.len()), (0, 3));
    assert!(chain.iter().any(|r| r.1 == 5 && r.2 == b"web.shop.internal."));
    assert!(chain.iter().any(|r| r.0 == "web.shop.internal." && r.2 == [10, 9, 0, 1]));
    assert!(records("loop.corp.example.", A).1.len() <= 8);
}
