//! The flags of `nexus deploy` that say how the older instances are replaced.

use clap::{ArgGroup, Args};
use nexus_model::kind::{Amount, CanaryStep, HeaderMatch};
use serde_json::{Map, Value, json};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Rollout")]
#[command(group(ArgGroup::new("strategy").args(["rolling", "canary", "blue_green"])))]
pub struct RolloutArgs {
    /// Replaces old instances a few at a time (the default)
    #[arg(long)]
    rolling: bool,
    /// Sends a share of the requests to new instances first. A step with a time goes on by itself; one without waits for
    /// `nexus rollout resume` or `promote`
    #[arg(long, value_name = "PERCENT[:TIME],…", value_delimiter = ',', value_parser = step)]
    canary: Vec<CanaryStep>,
    /// Makes a whole new set ready, then sends all requests there at once
    #[arg(long)]
    blue_green: bool,
    /// Requests with this header go to new instances in any case
    #[arg(long, alias = "preview-header", value_name = "NAME[=VALUE]", value_parser = header)]
    canary_header: Option<HeaderMatch>,
    /// Of blue/green: sends no requests to the new set before `nexus rollout promote`
    #[arg(long, requires = "blue_green")]
    no_auto_promote: bool,
    /// Of blue/green: how many seconds the old set is kept [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=86_400))]
    keep_old: Option<u32>,
    /// Instances beyond those wanted while others are replaced [default: 25%]
    #[arg(long, value_name = "N|PERCENT%")]
    max_surge: Option<Amount>,
    /// Instances that may be missing meanwhile [default: 0]
    #[arg(long, value_name = "N|PERCENT%")]
    max_unavailable: Option<Amount>,
    /// A rollout of which no further instance becomes ready for so long has failed [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    progress_deadline: Option<u32>,
    /// A rollout has failed too when more of the requests to new instances end in an error
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
    max_error_percent: Option<u8>,
    /// Leaves a rollout that has failed as it is
    #[arg(long, overrides_with = "rollback")]
    no_rollback: bool,
    /// Takes a rollout that has failed back (the default)
    #[arg(long, overrides_with = "no_rollback")]
    rollback: bool,
    /// Older revisions that are kept to go back to [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=50))]
    history: Option<u32>,
}

impl RolloutArgs {
    /// The fields of `spec.rollout` that the flags set. Null takes one away.
    pub fn wanted(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(key.to_owned(), value);
            }
        };
        if self.rolling {
            set("strategy", Some("rolling".into()));
        }
        if self.blue_green {
            set("strategy", Some("blue-green".into()));
            set("autoPromote", Some((!self.no_auto_promote).into()));
        }
        if !self.canary.is_empty() {
            set("strategy", Some("canary".into()));
            set("steps", Some(json!(self.canary)));
        }
        // Another strategy does not inherit whom the last one let in.
        let chosen = self.rolling || self.blue_green || !self.canary.is_empty();
        set("header", self.canary_header.as_ref().map(|h| json!(h)).or(chosen.then_some(Value::Null)));
        set("keepOldSeconds", self.keep_old.map(Value::from));
        set("maxSurge", self.max_surge.map(|a| json!(a)));
        set("maxUnavailable", self.max_unavailable.map(|a| json!(a)));
        set("progressDeadlineSeconds", self.progress_deadline.map(Value::from));
        set("maxErrorPercent", self.max_error_percent.map(Value::from));
        set("autoRollback", (self.rollback || self.no_rollback).then_some(self.rollback.into()));
        set("history", self.history.map(Value::from));
        map
    }
}

/// `10`, `10:300`, `10:30s`, `10:5m` or `10:1h`.
fn step(text: &str) -> Result<CanaryStep, String> {
    let (percent, time) = match text.split_once(':') {
        Some((percent, time)) => (percent, Some(time)),
        None => (text, None),
    };
    let percent = percent.trim_end_matches('%').parse::<u8>().ok().filter(|p| *p <= 99);
    let percent = percent.ok_or_else(|| format!("{text:?}: a step is a share between 0 and 99, as 10 or 10:5m"))?;
    let seconds = |time: &str| {
        let (digits, unit) = match time.find(|c: char| !c.is_ascii_digit()) {
            Some(at) => time.split_at(at),
            None => (time, "s"),
        };
        let unit = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        digits.parse::<u32>().ok()?.checked_mul(unit).filter(|s| (1..=604_800).contains(s))
    };
    let wrong = || format!("{text:?}: a time is 30s, 5m or 1h, a week at most");
    Ok(CanaryStep { percent, seconds: time.map(|t| seconds(t).ok_or_else(wrong)).transpose()? })
}

/// `NAME` or `NAME=VALUE`.
fn header(text: &str) -> Result<HeaderMatch, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    Ok(HeaderMatch { name: name.to_owned(), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_headers_are_read() {
        let step = |text: &str| super::step(text).map(|s| (s.percent, s.seconds));
        assert_eq!(step("10").unwrap(), (10, None));
        assert_eq!(step("50%:5m").unwrap(), (50, Some(300)));
        assert_eq!(step("0:90").unwrap(), (0, Some(90)));
        for wrong in ["", "100", "10:", "10:5d", "10:0s", "x"] {
            assert!(step(wrong).is_err(), "{wrong}");
        }
        let h = header("x-canary=yes").unwrap();
        assert_eq!((h.name.as_str(), h.value.as_deref()), ("x-canary", Some("yes")));
        assert_eq!(header("x-canary").unwrap().value, None);
    }

    #[test]
    fn flags_of_a_strategy_replace_those_of_another() {
        use clap::Parser as _;
        let wanted = |flags: &[&str]| {
            let words = ["nexus", "deploy", "web"].iter().chain(flags);
            let cli = crate::cli::Cli::try_parse_from(words)?;
            let crate::cli::Command::User(command) = cli.command else { panic!("a user's command") };
            let crate::cli::UserCommand::Deploy(args) = *command else { panic!("deploy") };
            Ok::<_, clap::Error>(Value::from(args.rollout.wanted()))
        };
        let canary = json!({"strategy": "canary", "steps": [{"percent": 10, "seconds": 30}, {"percent": 50}],
            "header": {"name": "x-canary"}, "maxSurge": 2});
        let flags = ["--canary", "10:30s,50", "--canary-header", "x-canary", "--max-surge", "2"];
        assert_eq!(wanted(&flags).unwrap(), canary);
        let blue = json!({"strategy": "blue-green", "autoPromote": false, "header": null, "autoRollback": false});
        assert_eq!(wanted(&["--blue-green", "--no-auto-promote", "--no-rollback"]).unwrap(), blue);
        assert_eq!(wanted(&[]).unwrap(), json!({}));
        assert!(wanted(&["--blue-green", "--canary", "10"]).is_err());
        assert!(wanted(&["--max-surge", "101%"]).is_err());
    }
}
