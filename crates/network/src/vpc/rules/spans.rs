//! Spans of numbers, as sets of the kernel want them: sorted, none touching another.

use nexus_model::Cidr;
use nexus_model::plan::RoutePlan;

use super::table::{Family, number};

/// The first and the last of it.
pub type Span = (u128, u128);

/// A network's addresses.
pub fn of(net: &Cidr) -> Span {
    let family = Family::of(net.address);
    let bits = if family == Family::V6 { 128 } else { 32 };
    let rest = u32::from(bits - net.length.min(bits));
    let first = number(net.first());
    let width = if rest == 128 { u128::MAX } else { (1 << rest) - 1 };
    (first, first | width)
}

/// Those that touch or overlap become one.
pub fn union(all: impl IntoIterator<Item = Span>) -> Vec<Span> {
    let mut all: Vec<Span> = all.into_iter().collect();
    all.sort_unstable();
    let mut out: Vec<Span> = Vec::new();
    for (first, last) in all {
        match out.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => out.push((first, last)),
        }
    }
    out
}

/// The networks of one family as spans.
pub fn nets<'a>(all: impl IntoIterator<Item = &'a Cidr>, family: Family) -> Vec<Span> {
    union(all.into_iter().filter(|c| Family::of(c.address) == family).map(of))
}

/// Cuts the numbers where any of the spans begins or ends, and says for each piece which of the spans cover it, by index.
/// Pieces that none covers are left out.
pub fn pieces(spans: &[Vec<Span>]) -> Vec<(Span, Vec<usize>)> {
    // At each cut: who begins there and who ended just before.
    let mut events: Vec<(u128, bool, usize)> = Vec::new();
    for (n, of_one) in spans.iter().enumerate() {
        for &(first, last) in of_one {
            events.push((first, true, n));
            if let Some(after) = last.checked_add(1) {
                events.push((after, false, n));
            }
        }
    }
    events.sort_unstable();
    let mut cover = vec![0_u32; spans.len()];
    let mut active: std::collections::BTreeSet<usize> = std::collections::BTreeSet::new();
    let mut out: Vec<(Span, Vec<usize>)> = Vec::new();
    let mut at = 0;
    while at < events.len() {
        let from = events[at].0;
        while at < events.len() && events[at].0 == from {
            let (_, begins, n) = events[at];
            if begins {
                cover[n] += 1;
                active.insert(n);
            } else {
                cover[n] -= 1;
                if cover[n] == 0 {
                    active.remove(&n);
                }
            }
            at += 1;
        }
        if !active.is_empty() {
            let last = events.get(at).map_or(u128::MAX, |next| next.0 - 1);
            out.push(((from, last), active.iter().copied().collect()));
        }
    }
    out
}

/// Which route each address takes: the longest prefix wins, and of two alike the first.
pub fn routes(routes: &[RoutePlan], family: Family) -> Vec<(Span, &RoutePlan)> {
    let own: Vec<&RoutePlan> = routes.iter().filter(|r| Family::of(r.to.address) == family).collect();
    let spans: Vec<Vec<Span>> = own.iter().map(|r| vec![of(&r.to)]).collect();
    let mut out: Vec<(Span, &RoutePlan)> = Vec::new();
    for ((first, last), over) in pieces(&spans) {
        let Some(best) = over.into_iter().min_by_key(|n| (std::cmp::Reverse(own[*n].to.length), *n)) else { continue };
        // Those of IPv4 end where their family ends.
        let last = last.min(family.last());
        match out.last_mut() {
            Some((before, route)) if before.1.checked_add(1) == Some(first) && route.via == own[best].via => {
                before.1 = last
            }
            _ => out.push(((first, last), own[best])),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::Via;

    use super::*;

    #[test]
    fn networks_become_spans_that_do_not_touch() {
        let net = |t: &str| t.parse::<Cidr>().unwrap();
        let all = [net("10.0.0.0/25"), net("10.0.0.128/25"), net("10.0.2.0/24"), net("10.0.2.9/32"), net("::/0")];
        let ten = 10 << 24;
        assert_eq!(nets(&all, Family::V4), [(ten, ten + 255), (ten + 512, ten + 767)]);
        assert_eq!(nets(&all, Family::V6), [(0, u128::MAX)]);
    }

    #[test]
    fn pieces_say_who_covers_them() {
        let spans = [vec![(0, 9)], vec![(5, 14), (20, u128::MAX)]];
        let found = pieces(&spans);
        assert_eq!(found, [((0, 4), vec![0]), ((5, 9), vec![0, 1]), ((10, 14), vec![1]), ((20, u128::MAX), vec![1])]);
    }

    #[test]
    fn the_longest_prefix_wins() {
        let route = |to: &str, via| RoutePlan { to: to.parse().unwrap(), via };
        let all =
            [route("0.0.0.0/0", Via::Internet), route("9.0.0.0/8", Via::Blackhole), route("9.9.0.0/16", Via::Nat(0))];
        let found: Vec<(Span, Via)> = routes(&all, Family::V4).into_iter().map(|(s, r)| (s, r.via)).collect();
        let (nine, inner) = (9 << 24, (9 << 24) + (9 << 16));
        assert_eq!(
            found,
            [
                ((0, nine - 1), Via::Internet),
                ((nine, inner - 1), Via::Blackhole),
                ((inner, inner + 65535), Via::Nat(0)),
                ((inner + 65536, nine + (1 << 24) - 1), Via::Blackhole),
                ((nine + (1 << 24), u32::MAX.into()), Via::Internet),
            ]
        );
    }
}
