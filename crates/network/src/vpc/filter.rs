//! From one packet filter to the next by what differs: a NIC elsewhere that comes or goes is an element of a set or two, and
//! putting all others in their places again would cost every host of its network what the whole network does.
//!
//! Both are texts as [`super::text`] writes them. Elements of sets are added and removed; chains whose rules differ are written
//! again; all in one transaction, as a whole replacement is. Whatever else differs is not for this: then the tables are replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// One table of a text.
#[derive(Default)]
struct Part<'a> {
    /// `inet nexus`.
    name: &'a str,
    /// Counters, and sets as far as they are declared, in order.
    declared: Vec<&'a str>,
    /// By `set NAME` or `map NAME`.
    elements: BTreeMap<&'a str, BTreeSet<&'a str>>,
    /// With their rules, in order.
    chains: Vec<(&'a str, Vec<&'a str>)>,
}

struct Text<'a> {
    define: Option<&'a str>,
    parts: Vec<Part<'a>>,
}

/// Nothing, of a text in another form.
fn read(text: &str) -> Option<Text<'_>> {
    let mut read = Text { define: None, parts: Vec::new() };
    let mut now: Option<Part<'_>> = None;
    let mut chain: Option<(&str, Vec<&str>)> = None;
    for line in text.lines() {
        match (&mut now, &mut chain) {
            (None, _) if line.starts_with("define ") => read.define = Some(line),
            (None, _) => match line.strip_prefix("table ").and_then(|l| l.strip_suffix(" {")) {
                Some(name) => now = Some(Part { name, ..Part::default() }),
                None if line.starts_with("table ") || line.starts_with("delete table ") => {}
                None => return None,
            },
            (Some(part), Some(_)) if line == " }" => part.chains.extend(chain.take()),
            (Some(_), Some((_, rules))) => rules.push(line.strip_prefix("  ")?),
            (Some(_), None) if line == "}" => read.parts.extend(now.take()),
            (Some(part), None) => {
                let line = line.strip_prefix(' ')?;
                if let Some(name) = line.strip_prefix("chain ").and_then(|l| l.strip_suffix(" {")) {
                    chain = Some((name, Vec::new()));
                } else if line.starts_with("set ") || line.starts_with("map ") {
                    let (declared, elements) = match line.split_once(" elements = { ") {
                        Some((declared, rest)) => (declared, rest.strip_suffix(" }; }")?.split(", ").collect()),
                        None => (line.strip_suffix(" }")?, BTreeSet::new()),
                    };
                    part.declared.push(declared);
                    part.elements.insert(line.split_once(" {")?.0, elements);
                } else {
                    part.declared.push(line);
                }
            }
        }
    }
    (now.is_none() && chain.is_none()).then_some(read)
}

/// What makes the second text of the first, if it is only of elements and rules that they differ.
pub(super) fn difference(old: &str, new: &str) -> Option<String> {
    let (old, new) = (read(old)?, read(new)?);
    if old.parts.len() != new.parts.len() || old.define.is_some() != new.define.is_some() {
        return None;
    }
    let defined_anew = old.define != new.define;
    let (mut first, mut then) = (String::new(), String::new());
    for (old, new) in old.parts.iter().zip(&new.parts) {
        let names = |part: &Part<'_>| part.chains.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
        if (old.name, &old.declared) != (new.name, &new.declared) || names(old) != names(new) {
            return None;
        }
        for ((what, before), after) in old.elements.iter().zip(new.elements.values()) {
            let name = what.split_once(' ')?.1;
            let gone: Vec<&str> =
                before.difference(after).map(|e| e.split_once(" : ").map_or(*e, |(key, _)| key)).collect();
            let come: Vec<&str> = after.difference(before).copied().collect();
            // Spans that touch each other are not for small steps.
            let spans =
                || new.declared.iter().any(|d| d.starts_with(&format!("{what} {{")) && d.contains("flags interval"));
            if !(gone.is_empty() && come.is_empty()) && spans() {
                return None;
            }
            if !gone.is_empty() {
                let _ = writeln!(first, "delete element {} {name} {{ {} }}", new.name, gone.join(", "));
            }
            if !come.is_empty() {
                let _ = writeln!(then, "add element {} {name} {{ {} }}", new.name, come.join(", "));
            }
        }
        let generation = |rules: &[&str]| defined_anew && rules.iter().any(|r| r.contains("$generation"));
        let others = old.chains.iter().zip(&new.chains).filter(|(a, b)| a.1 != b.1 || generation(&b.1));
        let others: Vec<_> = others.map(|(_, new)| new).collect();
        if others.is_empty() {
            continue;
        }
        for (chain, _) in &others {
            // Before elements that its rules name go.
            first.insert_str(0, &format!("flush chain {} {chain}\n", new.name));
        }
        let _ = writeln!(then, "table {} {{", new.name);
        for (chain, rules) in others {
            let _ = writeln!(then, " chain {chain} {{");
            for rule in rules {
                let _ = writeln!(then, "  {rule}");
            }
            then.push_str(" }\n");
        }
        then.push_str("}\n");
    }
    let define = new.define.map(|d| format!("{d}\n")).unwrap_or_default();
    Some(define + &first + &then)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "define generation = 0x1
table inet nexus
delete table inet nexus
table inet nexus {
 counter drop_a { }
 set members { type ipv4_addr; elements = { 10.0.0.2, 10.0.0.3 }; }
 set none { type ipv4_addr; }
 set nets { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }
 map sent { type ifname : verdict; elements = { \"a\" : jump one, \"b\" : jump one }; }
 chain one {
  ip saddr @members accept
 }
 chain two {
  type filter hook forward priority filter; policy accept;
  ct mark $generation accept
 }
}
table arp nexus
delete table arp nexus
table arp nexus {
 set own { type ifname; }
}
";

    #[test]
    fn elements_and_rules_change_by_themselves() {
        assert_eq!(difference(OLD, OLD).as_deref(), Some("define generation = 0x1\n"));
        let new = OLD.replace("10.0.0.3 }", "10.0.0.4 }").replace("\"b\" : jump one", "\"b\" : jump two");
        let new = new.replace("set own { type ifname; }", "set own { type ifname; elements = { \"c\" }; }");
        let new = new.replace("0x1\n", "0x2\n");
        let expected = "define generation = 0x2
flush chain inet nexus two
delete element inet nexus sent { \"b\" }
delete element inet nexus members { 10.0.0.3 }
add element inet nexus sent { \"b\" : jump two }
add element inet nexus members { 10.0.0.4 }
table inet nexus {
 chain two {
  type filter hook forward priority filter; policy accept;
  ct mark $generation accept
 }
}
add element arp nexus own { \"c\" }
";
        assert_eq!(difference(OLD, &new).as_deref(), Some(expected));
    }

    #[test]
    fn what_else_differs_is_replaced_whole() {
        for (from, to) in [
            (" counter drop_a { }\n", ""),
            ("set none { type ipv4_addr; }", "set none { type ipv6_addr; }"),
            ("10.0.0.0/8", "10.0.0.0/9"),
            ("chain one", "chain three"),
            (" set none { type ipv4_addr; }\n", ""),
            ("table arp nexus {\n set own { type ifname; }\n}\n", ""),
            ("  type filter", "type filter"),
            ("}\n", ""),
        ] {
            let new = OLD.replace(from, to);
            assert!(new != OLD && difference(OLD, &new).is_none(), "{from}");
        }
    }
}
