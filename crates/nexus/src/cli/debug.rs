//! `nexus debug store`: looks into a stopped store's data folder, checks it, and saves what is left of a damaged one.

use std::path::PathBuf;

use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use nexus_store::backup::Writer;
use nexus_store::offline::{self, Folder, Salvaged, show};
use nexus_store::{GroupId, KeyValue, RangeRequest, Revision};
use serde_json::{Value, json};

use super::table::Printer;
use super::{output, stores};
use crate::exit::{Exit, Fail};

/// Looks into what servers have on disk, while they are stopped
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus debug store verify /var/lib/nexus-server/data\n  \
    nexus debug store history /var/lib/nexus-server/data/store/local o/apps/default/web\n  \
    nexus debug store salvage /var/lib/nexus-server/data/store/local --to /var/tmp/saved")]
pub struct DebugArgs {
    #[command(subcommand)]
    command: DebugCommand,
}

#[derive(Debug, Subcommand)]
enum DebugCommand {
    /// The metadata store
    Store(StoreArgs),
}

#[derive(Debug, Args)]
struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Shows one key
    Get {
        #[command(flatten)]
        place: Place,
        key: String,
        /// As it was at this revision
        #[arg(long, value_name = "REVISION")]
        at: Option<Revision>,
        #[command(flatten)]
        how: How,
    },
    /// Shows the keys that begin with a prefix
    Range {
        #[command(flatten)]
        place: Place,
        #[arg(default_value = "")]
        prefix: String,
        /// As they were at this revision
        #[arg(long, value_name = "REVISION")]
        at: Option<Revision>,
        /// At most so many keys
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: usize,
        /// With their values
        #[arg(long)]
        values: bool,
        #[command(flatten)]
        how: How,
    },
    /// Shows every version of a key that is kept
    History {
        #[command(flatten)]
        place: Place,
        key: String,
        #[command(flatten)]
        how: How,
    },
    /// Checks every sum and sequence and counts the state again; says what is damaged and where
    Verify {
        #[command(flatten)]
        place: Place,
        #[arg(short, long, value_enum, default_value_t = Form::Table)]
        output: Form,
    },
    /// Saves what can be read of a damaged folder in a new one, and says what is lost
    Salvage {
        #[command(flatten)]
        place: Place,
        /// The new folder
        #[arg(long, value_name = "FOLDER")]
        to: PathBuf,
        /// Writes a backup, for `nexus backup restore`, instead of a server's folder
        #[arg(long)]
        backup: bool,
        #[arg(short, long, value_enum, default_value_t = Form::Table)]
        output: Form,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// A store's folder, or the data folder of a server
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Of several groups, this one
    #[arg(long, value_name = "GROUP")]
    group: Option<GroupId>,
    /// Reads a folder that a running server has open: its newest changes may look torn
    #[arg(long)]
    force_read: bool,
}

#[derive(Debug, Args)]
struct How {
    /// Also what is in the log but not known to be committed
    #[arg(long)]
    uncommitted: bool,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    Table,
    Json,
}

impl Place {
    fn open(&self) -> anyhow::Result<Folder> {
        stores::open(&stores::one(&self.dir, self.group.as_ref())?, self.force_read)
    }
}

pub async fn run(args: &DebugArgs) -> anyhow::Result<()> {
    let DebugCommand::Store(StoreArgs { command }) = &args.command;
    match command {
        StoreCommand::Get { place, key, at, how } => {
            let request = RangeRequest { at: *at, ..RangeRequest::get(key.clone()) };
            let folder = place.open()?;
            warn(&folder);
            let found = folder.range(&request, how.uncommitted)?;
            let Some(kv) = found.kvs.first() else {
                return Err(Fail::not_found(format!("{key} is not there at revision {}", found.revision)).into());
            };
            match how.output {
                Form::Json => output::json(&shown(kv, true)),
                Form::Table => output::text(&pretty(&kv.value)),
            }
        }
        StoreCommand::Range { place, prefix, at, limit, values, how } => {
            let request = RangeRequest { at: *at, ..RangeRequest::prefix(prefix.clone()).limit(*limit) };
            let folder = place.open()?;
            warn(&folder);
            let found = folder.range(&request, how.uncommitted)?;
            if found.more {
                output::note(&format!("only the first {limit} keys; see --limit"));
            }
            range(&found.kvs, *values, how.output, found.revision)
        }
        StoreCommand::History { place, key, how } => {
            let folder = place.open()?;
            warn(&folder);
            history(&folder, key, how)
        }
        StoreCommand::Verify { place, output } => verify(place, *output),
        StoreCommand::Salvage { place, to, backup, output } => salvage(place, to, *backup, *output).await,
    }
}

/// Who reads a damaged folder must know that what is shown may not be all.
fn warn(folder: &Folder) {
    for finding in folder.findings() {
        output::note(&format!("warning: {finding}"));
    }
}

fn shown(kv: &KeyValue, value: bool) -> Value {
    let mut out = json!({
        "key": show(&kv.key), "createRevision": kv.create_revision, "modRevision": kv.mod_revision,
        "bytes": kv.value.len(),
    });
    if value {
        out["value"] = stores::value(&kv.value);
    }
    out
}

fn pretty(value: &Bytes) -> String {
    match serde_json::from_slice::<Value>(value) {
        Ok(json) => serde_json::to_string_pretty(&json).unwrap_or_else(|_| show(value)),
        Err(_) => show(value),
    }
}

fn range(kvs: &[KeyValue], values: bool, form: Form, revision: Revision) -> anyhow::Result<()> {
    if form == Form::Json {
        let items: Vec<Value> = kvs.iter().map(|kv| shown(kv, values)).collect();
        return output::json(&json!({"revision": revision, "items": items}));
    }
    let row = |kv: &KeyValue| {
        let last = if values { show(&kv.value) } else { output::size(kv.value.len() as u64) };
        vec![show(&kv.key), kv.create_revision.to_string(), kv.mod_revision.to_string(), last]
    };
    let header = ["KEY", "CREATED", "CHANGED", if values { "VALUE" } else { "SIZE" }];
    output::text(&Printer::new(&header).lines(kvs.iter().map(row).collect()))
}

fn history(folder: &Folder, key: &str, how: &How) -> anyhow::Result<()> {
    let versions = folder.history(key.as_bytes(), how.uncommitted);
    if versions.is_empty() {
        return Err(Fail::not_found(format!("{key} is not there, nor was it in the history that is kept")).into());
    }
    if how.output == Form::Json {
        let items: Vec<Value> = versions
            .iter()
            .map(|v| {
                json!({
                    "revision": v.revision, "created": v.created, "time": v.timestamp_ms.map(stores::time),
                    "deleted": v.value.is_none(), "value": v.value.as_ref().map(|b| stores::value(b)), "lease": v.lease,
                })
            })
            .collect();
        return output::json(&json!({"key": key, "versions": items}));
    }
    let rows = versions.iter().map(|v| {
        let value = v.value.as_ref().map_or_else(|| "(deleted)".to_owned(), |b| show(b));
        let short: String = value.chars().take(100).collect();
        vec![v.revision.to_string(), v.timestamp_ms.map_or_else(|| "-".to_owned(), stores::time), short]
    });
    output::text(&Printer::new(&["REVISION", "TIME", "VALUE"]).lines(rows.collect()))
}

fn verify(place: &Place, form: Form) -> anyhow::Result<()> {
    let folders = match &place.group {
        Some(_) => vec![stores::one(&place.dir, place.group.as_ref())?],
        None => stores::below(&place.dir)?,
    };
    let mut damaged = Vec::new();
    let mut reports = Vec::new();
    for path in folders {
        let report = stores::open(&path, place.force_read)?.verify();
        if !report.is_sound() {
            damaged.push(path.display().to_string());
        }
        if form == Form::Table {
            let f = &report.facts;
            let verdict = if report.is_sound() { "sound" } else { "DAMAGED" };
            output::text(&format!(
                "{}: {verdict}\n  group {} node {} generation {}: revision {} ({} to {} kept), {} keys, {} leases\n  \
                 log: {} segments, {} frames, {}; committed to entry {}, {} entries behind it",
                path.display(),
                f.group,
                f.node,
                f.generation,
                f.revision,
                f.oldest,
                f.revision,
                f.keys,
                f.leases,
                f.segments,
                f.frames,
                output::size(f.log_bytes),
                f.committed_index.map_or_else(|| "-".to_owned(), |i| i.to_string()),
                f.tail,
            ))?;
            for finding in &report.findings {
                output::text(&format!("  {finding}"))?;
            }
        }
        reports.push(json!({"folder": path, "sound": report.is_sound(), "report": report}));
    }
    if form == Form::Json {
        output::json(&reports)?;
    }
    if damaged.is_empty() {
        return Ok(());
    }
    let advice = "`nexus debug store salvage` saves what is left; a member of a healthy group is better replaced";
    Err(Fail::new(Exit::Failed, format!("damaged: {}; {advice}", damaged.join(", "))).into())
}

async fn salvage(place: &Place, to: &PathBuf, backup: bool, form: Form) -> anyhow::Result<()> {
    let folder = place.open()?;
    warn(&folder);
    let disk = stores::disk();
    let said: Salvaged = if backup {
        let to = std::path::absolute(to)?;
        let name = to.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let root = to.parent().unwrap_or(std::path::Path::new("/")).to_owned();
        let now = nexus_env::Env::real().now_millis();
        let mut writer = Writer::begin(disk, root, &name, "salvaged", now).await?;
        let said = writer.add_salvaged(&folder).await?;
        writer.finish().await?;
        said
    } else {
        offline::salvage(&disk, &folder, to)?
    };
    if form == Form::Json {
        return output::json(&said);
    }
    output::text(&format!("saved {} keys of revision {} in {}", said.keys, said.revision, to.display()))?;
    for (from, until) in &said.lost_ranges {
        let end = if until.is_empty() { "the end" } else { until };
        output::text(&format!("lost: keys from {from:?} to {end}, unless the log sets them"))?;
    }
    if said.lost_entries > 0 {
        output::text(&format!("lost: {} entries of the log behind a gap", said.lost_entries))?;
    }
    if said.history_lost {
        output::text("lost: the history; only the newest versions are saved")?;
    }
    Ok(())
}
