//! `nexus server recover --survivor`: after a quorum is lost for good, one server goes on alone.

use std::io::{BufRead as _, IsTerminal as _};
use std::path::PathBuf;

use clap::Args;
use nexus_store::GroupId;
use nexus_store::offline::{self, Survey};
use serde_json::json;

use super::debug::Form;
use super::{output, stores};
use crate::exit::Fail;

/// What is shown of the tail before it is only counted.
const TAIL_SHOWN: usize = 5;

#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// Confirms that the other members are gone for good, or will be wiped
    #[arg(long, required = true)]
    survivor: bool,
    /// The survivor's data folder; its server must be stopped
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Only this group [default: all that the folder holds]
    #[arg(long, value_name = "GROUP")]
    group: Option<GroupId>,
    /// Does not ask
    #[arg(long)]
    yes: bool,
    /// Shows what would be lost and changes nothing
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

pub fn run(args: &RecoverArgs) -> anyhow::Result<()> {
    let folders = match &args.group {
        Some(group) => vec![stores::one(&args.data_dir, Some(group))?],
        None => stores::below(&args.data_dir)?,
    };
    if stores::is_cloud(&args.data_dir) {
        return Err(Fail::usage("name the data folder of one server, the survivor").into());
    }
    let mut surveys = Vec::new();
    for path in &folders {
        let folder = stores::open(path, false)?;
        folder.require_sound()?;
        surveys.push(Survey::of(&folder));
    }
    if args.output == Form::Table {
        surveys.iter().try_for_each(show)?;
    }
    if args.dry_run {
        return if args.output == Form::Json { output::json(&surveys) } else { Ok(()) };
    }
    if !args.yes {
        confirm()?;
    }
    let disk = stores::disk();
    let mut done = Vec::new();
    for (path, survey) in folders.iter().zip(&surveys) {
        let recovered = offline::recover_survivor(&disk, path, None)?;
        if args.output == Form::Table {
            output::text(&format!(
                "group {}: generation {}, goes on at revision {} with {} keys; as it was: {}",
                survey.facts.group,
                recovered.generation,
                recovered.revision,
                recovered.keys,
                recovered.set_aside.display()
            ))?;
        }
        done.push(json!({"folder": path, "survey": survey, "recovered": recovered}));
    }
    if args.output == Form::Json {
        return output::json(&done);
    }
    output::note(
        "Next:\n  start this server: it leads alone\n  never start the others as they are: they are fenced and would \
         stop. Wipe their data folders and let them join again (`nexus server token`, `nexus server join`)",
    );
    Ok(())
}

fn show(survey: &Survey) -> anyhow::Result<()> {
    let f = &survey.facts;
    output::text(&format!(
        "group {} on node {} (generation {}): revision {}, {} keys; last change {}",
        f.group,
        f.node,
        f.generation,
        survey.newest,
        f.keys,
        stores::time(survey.last_change_ms)
    ))?;
    if !survey.is_voter {
        output::text("  it had no vote, so it may be further behind than a voter: prefer one of those if any is left")?;
    }
    output::text("  what others acknowledged after that time and this server never received is lost")?;
    if survey.tail.is_empty() {
        output::text("  everything in its log is known to be committed")?;
    } else {
        output::text(&format!(
            "  {} entries of its log are not known to be committed; they are kept:",
            survey.tail.len()
        ))?;
        for entry in survey.tail.iter().rev().take(TAIL_SHOWN) {
            let keys: Vec<&str> = entry.keys.iter().take(4).map(String::as_str).collect();
            output::text(&format!("    entry {} of term {}: {}", entry.index, entry.term, keys.join(", ")))?;
        }
    }
    for (node, member) in &survey.fenced {
        output::text(&format!("  will be fenced: node {node} at {}", member.endpoint))?;
    }
    Ok(())
}

fn confirm() -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Fail::usage("nobody is there to confirm: add --yes").into());
    }
    output::note("The others will never be members again as they are. Go on? Type yes:");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.trim() == "yes" { Ok(()) } else { Err(Fail::conflict("nothing was changed").into()) }
}
