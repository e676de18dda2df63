//! `nexus net rule`: one rule of a security group, by its id; the others stay as they are, whoever changes them meanwhile.
//!
//! The group is read, changed and written back at the revision that was read, again when another change came in between.

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use nexus_model::kind::{self, KindDescriptor, PortRange, RuleRemote};
use nexus_model::{Cidr, Name};
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Guard, is_code, text};
use super::manifest::users_part;
use super::output;
use super::resource::{find_name, new_name};
use super::table::Printer;
use crate::exit::Fail;

/// How often a change is tried that others come in between of.
const TRIES: usize = 5;

/// Shows and changes single rules of a security group
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net rule list web\n  \
    nexus net rule set web http --direction ingress --protocol tcp --port 80 --remote group:client\n  \
    nexus net rule set web http --port 80 --port 8000-8010    # of a rule that is there, only this changes\n  \
    nexus net rule delete web http")]
pub struct RuleArgs {
    #[command(subcommand)]
    command: RuleCommand,
}

#[derive(Debug, Subcommand)]
enum RuleCommand {
    List(ListArgs),
    Set(Box<SetArgs>),
    Delete(RemoveArgs),
}

/// Shows a group's rules, the first that count first
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nexus net rule list web\n  nexus net rule list web --project bank")]
struct ListArgs {
    /// The security group
    #[arg(value_name = "GROUP")]
    group: String,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Adds a rule, or changes what is said of one that is there
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net rule set web http --direction ingress --protocol tcp --port 80\n  \
    nexus net rule set web http --remote 10.0.0.0/8 --remote group:client --remote list:offices\n  \
    nexus net rule set web http --remote any    # from anybody again\n  \
    nexus net rule set web bad --direction ingress --action deny --priority 10 --remote 192.0.2.7")]
struct SetArgs {
    /// The security group
    #[arg(value_name = "GROUP")]
    group: String,
    /// The rule's, within its group
    #[arg(value_name = "ID", value_parser = new_name)]
    id: Name,
    /// Of the packets that it is for, as the NIC sees them; a new rule needs it
    #[arg(long, value_enum)]
    direction: Option<Way>,
    /// The lowest counts first [default: 1000]
    #[arg(long, value_name = "NUMBER")]
    priority: Option<u16>,
    /// [default: allow]
    #[arg(long, value_enum)]
    action: Option<Action>,
    /// [default: any]
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// A destination port or a range such as 8000-8010, or `any`; may be repeated
    #[arg(long = "port", value_name = "PORTS", value_parser = ports)]
    ports: Vec<Option<PortRange>>,
    /// The other side: a CIDR or address, group:NAME, list:NAME (a prefix list), or `any`; may be repeated
    #[arg(long = "remote", value_name = "REMOTE", value_parser = remote)]
    remotes: Vec<Option<RuleRemote>>,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Takes a rule away
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  nexus net rule delete web http\n  nexus net rule delete web http --ignore-not-found"
)]
struct RemoveArgs {
    /// The security group
    #[arg(value_name = "GROUP")]
    group: String,
    #[arg(value_name = "ID", value_parser = new_name)]
    id: Name,
    /// One that is not there is no error
    #[arg(long)]
    ignore_not_found: bool,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Way {
    Ingress,
    Egress,
}

#[derive(Debug, Clone, Copy, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Allow,
    Deny,
}

#[derive(Debug, Clone, Copy, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    Any,
    Tcp,
    Udp,
    Icmp,
}

fn ports(text: &str) -> Result<Option<PortRange>, String> {
    if text == "any" { Ok(None) } else { text.parse().map(Some).map_err(|e| format!("{e}, or `any`")) }
}

fn remote(text: &str) -> Result<Option<RuleRemote>, String> {
    let name = |text: &str| text.parse::<Name>().map_err(|e| e.to_string());
    if text == "any" {
        return Ok(None);
    }
    if let Some(group) = text.strip_prefix("group:") {
        return name(group).map(RuleRemote::Group).map(Some);
    }
    if let Some(list) = text.strip_prefix("list:") {
        return name(list).map(RuleRemote::PrefixList).map(Some);
    }
    let whole = match text.parse::<std::net::IpAddr>() {
        Ok(address) if address.is_ipv4() => format!("{text}/32"),
        Ok(_) => format!("{text}/128"),
        Err(_) => text.to_owned(),
    };
    let wrong = |_| "it is a CIDR such as 10.0.0.0/8, group:NAME, list:NAME, or `any`".to_owned();
    whole.parse::<Cidr>().map(RuleRemote::Cidr).map(Some).map_err(wrong)
}

pub async fn run(args: &RuleArgs) -> anyhow::Result<()> {
    match &args.command {
        RuleCommand::List(args) => list(args).await,
        RuleCommand::Set(args) => {
            let change = |rules: &mut Vec<Value>| set(rules, args);
            let done = changed(&args.cloud, &args.group, change).await?;
            output::text(&format!("rule {} of securitygroup/{} {}", args.id, args.group, done))
        }
        RuleCommand::Delete(args) => {
            let change = |rules: &mut Vec<Value>| remove(rules, args);
            let done = changed(&args.cloud, &args.group, change).await?;
            output::text(&format!("rule {} of securitygroup/{} {}", args.id, args.group, done))
        }
    }
}

fn groups() -> &'static KindDescriptor {
    kind::find("security-groups").expect("a kind")
}

/// The rules of a group as they stand in it.
fn rules_of(group: &Value) -> Vec<Value> {
    group["spec"]["rules"].as_array().cloned().unwrap_or_default()
}

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let group = cloud.get(groups(), &find_name(groups(), &args.group)?).await?;
    let mut rules = rules_of(&group);
    rules.sort_by_key(order);
    let mut printer = Printer::new(&["ID", "DIRECTION", "PRIORITY", "ACTION", "PROTOCOL", "PORTS", "REMOTES"]);
    output::text(&printer.lines(rules.iter().map(row).collect()))
}

/// The order in which rules count: each direction's by priority, refusals before permissions.
fn order(rule: &Value) -> (String, u64, bool) {
    let direction = text(rule, "/direction").to_owned();
    (direction, rule["priority"].as_u64().unwrap_or(0), text(rule, "/action") != "deny")
}

fn row(rule: &Value) -> Vec<String> {
    let word = |name: &str| match &rule[name] {
        Value::String(text) => output::plain(text),
        other => output::plain(&other.to_string()),
    };
    let all = |name: &str, show: &dyn Fn(&Value) -> String| {
        let shown: Vec<String> = rule[name].as_array().into_iter().flatten().map(show).collect();
        if shown.is_empty() { "any".to_owned() } else { output::plain(&shown.join(",")) }
    };
    let port = |port: &Value| port.as_str().map_or_else(|| port.to_string(), str::to_owned);
    let remote = |remote: &Value| {
        let of = |name: &str, before: &str| Some(format!("{before}{}", remote[name].as_str()?));
        let known = of("cidr", "").or_else(|| of("group", "group:")).or_else(|| of("prefixList", "list:"));
        known.unwrap_or_else(|| remote.to_string())
    };
    let words = ["id", "direction", "priority", "action", "protocol"].map(word);
    words.into_iter().chain([all("ports", &port), all("remotes", &remote)]).collect()
}

/// Changes a group's rules by `change`, and says in a word what that came to.
async fn changed(
    args: &CloudArgs,
    group: &str,
    change: impl Fn(&mut Vec<Value>) -> Result<&'static str, Fail>,
) -> anyhow::Result<&'static str> {
    let cloud = Cloud::connect(args)?;
    let name = find_name(groups(), group)?;
    let path = cloud.object(groups(), &name);
    let mut tries = 0;
    loop {
        tries += 1;
        let before = cloud.get(groups(), &name).await?;
        let mut rules = rules_of(&before);
        let done = change(&mut rules)?;
        if rules == rules_of(&before) {
            return Ok(done);
        }
        let mut after = users_part(&before);
        after["spec"]["rules"] = Value::Array(rules);
        let guard = Guard::Revision(before["metadata"]["revision"].as_u64().unwrap_or(0));
        match cloud.put(&path, &after, guard, false).await {
            Ok(_) => return Ok(done),
            Err(e) if tries < TRIES && is_code(&e, "precondition-failed") => {}
            Err(e) => return Err(anyhow::Error::from(e)).with_context(|| format!("securitygroup/{name}")),
        }
    }
}

/// Says a rule's fields that were given, and leaves the others.
fn set(rules: &mut Vec<Value>, args: &SetArgs) -> Result<&'static str, Fail> {
    let at = rules.iter().position(|rule| rule["id"] == args.id.as_str());
    let mut rule = match (at, args.direction) {
        (Some(at), _) => rules[at].clone(),
        (None, Some(_)) => json!({"id": args.id}),
        (None, None) => {
            let why = format!("there is no rule {} yet: say --direction ingress or --direction egress", args.id);
            return Err(Fail::usage(why));
        }
    };
    let mut say = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            rule[name] = value;
        }
    };
    say("direction", args.direction.map(|v| json!(v)));
    say("priority", args.priority.map(|v| json!(v)));
    say("action", args.action.map(|v| json!(v)));
    say("protocol", args.protocol.map(|v| json!(v)));
    say("ports", (!args.ports.is_empty()).then(|| json!(args.ports.iter().flatten().collect::<Vec<_>>())));
    say("remotes", (!args.remotes.is_empty()).then(|| json!(args.remotes.iter().flatten().collect::<Vec<_>>())));
    match at {
        None => {
            rules.push(rule);
            Ok("added")
        }
        Some(at) if rules[at] == rule => Ok("unchanged"),
        Some(at) => {
            rules[at] = rule;
            Ok("changed")
        }
    }
}

fn remove(rules: &mut Vec<Value>, args: &RemoveArgs) -> Result<&'static str, Fail> {
    let had = rules.len();
    rules.retain(|rule| rule["id"] != args.id.as_str());
    match rules.len() < had {
        true => Ok("deleted"),
        false if args.ignore_not_found => Ok("not found"),
        false => Err(Fail::not_found(format!("securitygroup/{} has no rule {}", args.group, args.id))),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: SetArgs,
    }

    fn said(rules: &mut Vec<Value>, words: &str) -> Result<&'static str, String> {
        let line =
            Line::try_parse_from(["set", "web"].into_iter().chain(words.split(' '))).map_err(|e| e.to_string())?;
        set(rules, &line.args).map_err(|e| e.to_string())
    }

    #[test]
    fn a_rule_is_added_and_then_changed_where_it_stands() {
        let other = json!({"id": "ping", "direction": "ingress", "protocol": "icmp", "newer": true});
        let mut rules = vec![other.clone()];
        let error = said(&mut rules, "http --port 80").unwrap_err();
        assert!(error.contains("--direction"), "{error}");
        let words = "http --direction ingress --protocol tcp --port 80 --port 8000-8010 --remote group:client";
        assert_eq!(said(&mut rules, words), Ok("added"));
        assert_eq!(said(&mut rules, words), Ok("unchanged"));
        let http = json!({
            "id": "http", "direction": "ingress", "protocol": "tcp", "ports": [80, "8000-8010"],
            "remotes": [{"group": "client"}],
        });
        assert_eq!(rules, [other.clone(), http]);
        let words = "http --remote 10.0.0.5 --remote fd00::/64 --remote list:offices --port any --priority 5";
        assert_eq!(said(&mut rules, words), Ok("changed"));
        let http = json!({
            "id": "http", "direction": "ingress", "protocol": "tcp", "ports": [], "priority": 5,
            "remotes": [{"cidr": "10.0.0.5/32"}, {"cidr": "fd00::/64"}, {"prefixList": "offices"}],
        });
        assert_eq!(rules, [other.clone(), http]);
        assert_eq!(said(&mut rules, "ping --action deny"), Ok("changed"));
        assert_eq!(rules[0]["newer"], true, "what this release does not know stays");
    }

    #[test]
    fn what_is_no_rule_is_refused_with_advice() {
        for (words, why) in [
            ("http --direction in", "ingress"),
            ("http --port 90-80", "a port such as 80"),
            ("http --remote web", "group:NAME"),
            ("http --remote group:", "group:"),
            ("http --remote 10.0.0.0/33", "a CIDR such as"),
        ] {
            let error = said(&mut Vec::new(), words).unwrap_err();
            assert!(error.contains(why), "{words}: {error}");
        }
    }

    #[test]
    fn rules_are_shown_in_the_order_in_which_they_count() {
        let rule = |id: &str, direction: &str, priority: u16, action: &str| json!({"id": id, "direction": direction, "priority": priority, "action": action, "protocol": "tcp"});
        let mut rules = [
            rule("d", "ingress", 1000, "allow"),
            rule("c", "ingress", 1000, "deny"),
            rule("b", "ingress", 5, "allow"),
            rule("a", "egress", 2000, "allow"),
        ];
        rules.sort_by_key(order);
        assert_eq!(rules.iter().map(|r| text(r, "/id")).collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        let mut shown = rule("x", "ingress", 1, "allow");
        shown["ports"] = json!([80, "8000-8010"]);
        shown["remotes"] = json!([{"cidr": "10.0.0.0/8"}, {"group": "web"}, {"prefixList": "o"}]);
        let words = ["x", "ingress", "1", "allow", "tcp", "80,8000-8010", "10.0.0.0/8,group:web,list:o"];
        assert_eq!(row(&shown), words);
    }
}
