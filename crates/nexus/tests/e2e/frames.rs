//! Packets to try a network with, of every sort and partly broken, made from a seed: the same seed makes the same.

use std::net::Ipv4Addr;

/// In every frame that has room for it: by this it is known where it comes out.
pub const MARK: &[u8; 16] = b"nexus-fuzz-frame";

/// Whom frames are about.
pub struct Aims {
    /// Of who sends.
    pub mac: [u8; 6],
    pub own: Ipv4Addr,
    /// Whom they are for, and in whose name.
    pub macs: Vec<[u8; 6]>,
    pub addresses: Vec<Ipv4Addr>,
}

/// Of every subnet's gateway.
pub const GATEWAY: [u8; 6] = [0x02, 0x9c, 0x5f, 0, 0, 1];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

fn sum(bytes: &[u8], mut sum: u32) -> u16 {
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn four(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + payload.len() as u16).to_be_bytes());
    header.extend([0, 7]);
    header.extend(fragment.to_be_bytes());
    header.extend([64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let check = sum(&header, 0);
    header[10..12].copy_from_slice(&check.to_be_bytes());
    [&header, payload].concat()
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = from.to_be_bytes().to_vec();
    out.extend(to.to_be_bytes());
    out.extend((8 + payload.len() as u16).to_be_bytes());
    // Without a checksum.
    out.extend([0, 0]);
    [&out, payload].concat()
}

fn tcp(from: u16, to: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = from.to_be_bytes().to_vec();
    out.extend(to.to_be_bytes());
    out.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    [&out, payload].concat()
}

fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// A well-formed datagram from who the aims say sends.
pub fn datagram(aims: &Aims, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let packet = four(aims.own, to, 17, 0, &udp(4000, port, MARK));
    frame(GATEWAY, aims.mac, 0x0800, &packet)
}

/// Frames of many sorts: fragments, tunnels within, foreign hardware addresses, tags, strange protocols, and bits that are not
/// what they were.
pub fn fuzzed(seed: u64, count: usize, aims: &Aims) -> Vec<Vec<u8>> {
    let mut dice = Dice(seed);
    (0..count).map(|_| one(&mut dice, aims)).collect()
}

fn one(dice: &mut Dice, aims: &Aims) -> Vec<u8> {
    let from = if dice.one_in(3) { dice.of(&aims.addresses) } else { aims.own };
    let to = dice.of(&aims.addresses);
    let port = dice.of(&[0, 22, 53, 67, 80, 81, 4789, 5000, 7000, 7451, 65535]);
    let inner = |dice: &mut Dice| {
        let (a, b) = (dice.of(&aims.addresses), dice.of(&aims.addresses));
        four(a, b, 17, 0, &udp(4000, 5000, MARK))
    };
    let (protocol, payload) = match dice.below(8) {
        0 | 1 => (6, tcp(4000, port, dice.of(&[2, 16, 18, 4, 1, 0, 0x3f]), MARK)),
        2 => (1, [&[dice.of(&[0, 3, 5, 8, 13]), dice.of(&[0, 1, 3, 4]), 0, 0, 0, 1, 0, 1], &MARK[..]].concat()),
        // A tunnel's packet, for any network's number.
        3 => {
            let vni = dice.of(&[1, 2, 3, 0x12_3456, 0xff_ffff_u32]).to_be_bytes();
            let within = frame(dice.of(&aims.macs), GATEWAY, 0x0800, &inner(dice));
            let header = [8, 0, 0, 0, vni[1], vni[2], vni[3], 0];
            (17, udp(4000, 4789, &[&header[..], &within].concat()))
        }
        // A packet in a packet: IPv4, and GRE.
        4 => (4, inner(dice)),
        5 => (47, [&[0, 0, 8, 0][..], &inner(dice)].concat()),
        6 => (dice.next() as u8, MARK.to_vec()),
        _ => (17, udp(dice.next() as u16, port, MARK)),
    };
    let fragment = if dice.one_in(5) { dice.of(&[0x2000, 0x2001, 1, 185, 0x1fff]) } else { 0 };
    let mut packet = four(from, to, protocol, fragment, &payload);
    if dice.one_in(4) {
        for _ in 0..=dice.below(4) {
            let (at, bit) = (dice.below(packet.len()), dice.below(8));
            packet[at] ^= 1 << bit;
        }
    }
    if dice.one_in(10) {
        packet.truncate(1 + dice.below(packet.len()));
    }
    let target = match dice.below(4) {
        0 => dice.of(&aims.macs),
        1 => dice.of(&[[0xff; 6], [0x01, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]]),
        _ => GATEWAY,
    };
    let source = if dice.one_in(5) { dice.of(&aims.macs) } else { aims.mac };
    match dice.below(12) {
        // Tagged, once and twice.
        0 => {
            let tag = [&[0, dice.next() as u8][..], &0x0800_u16.to_be_bytes(), &packet].concat();
            frame(target, source, 0x8100, &tag)
        }
        1 => {
            let tags = [&[0, 1][..], &0x8100_u16.to_be_bytes(), &[0, 2], &0x0800_u16.to_be_bytes(), &packet].concat();
            frame(target, source, 0x88a8, &tags)
        }
        // In the name of others: who has that address?
        2 => {
            let operation = dice.of(&[1_u16, 2]).to_be_bytes();
            let ask = [
                &[0, 1, 8, 0, 6, 4][..],
                &operation,
                &dice.of(&aims.macs),
                &from.octets(),
                &[0; 6],
                &to.octets(),
                MARK,
            ];
            frame([0xff; 6], source, 0x0806, &ask.concat())
        }
        3 => frame(target, source, dice.next() as u16, &packet),
        // As IPv6, which it is not.
        4 => frame(target, source, 0x86dd, &packet),
        _ => frame(target, source, 0x0800, &packet),
    }
}
