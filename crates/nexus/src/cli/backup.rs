//! `nexus backup`: makes and lists backups through the API, and restores one offline.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_env::{Disk, DiskLock};
use nexus_model::Timestamp;
use nexus_store::backup::{self, Backup, BackupError, Point, Restore, Restored};
use nexus_store::offline::generation_of;
use nexus_store::{GroupId, Member, Revision};
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::debug::Form;
use super::table::Printer;
use super::{join, output, stores};
use crate::config::{Config as _, ServerConfig};
use crate::exit::Fail;
use crate::role::server::engine;

/// Backs the cloud's metadata up, and brings it back
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus backup create\n  \
    nexus backup create before-upgrade --keep 7\n  \
    nexus backup list\n  \
    nexus backup restore --from /srv/backups/before-upgrade --data-dir /var/lib/nexus --time 2026-03-01T12:00:00Z")]
pub struct BackupArgs {
    #[command(subcommand)]
    command: BackupCommand,
}

#[derive(Debug, Subcommand)]
enum BackupCommand {
    /// Writes a backup on the server that answers, while everything runs
    Create(CreateArgs),
    /// Shows the backups of the server that answers, or of a folder
    List(ListArgs),
    /// Reads a backup whole and says whether it is sound and what it holds
    Verify {
        /// The backup's folder
        #[arg(value_name = "FOLDER")]
        from: PathBuf,
        #[arg(short, long, value_enum, default_value_t = Form::Table)]
        output: Form,
    },
    /// Writes fresh stores from a backup, for servers that are stopped; into their etcd, if that keeps the metadata
    Restore(RestoreArgs),
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Its name [default: the time]
    name: Option<String>,
    /// Keeps only the newest so many backups
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
    /// Backs up what this server knows, even without a majority
    #[arg(long)]
    stale: bool,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Looks into this folder of backups instead of asking a server
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// The backup's folder
    #[arg(long, value_name = "FOLDER")]
    from: PathBuf,
    /// The folder of a stopped local cloud: all its servers are restored
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    data_dir: Option<PathBuf>,
    /// The configuration of one stopped server; do the same on the machines of the others, unless etcd keeps the metadata
    #[arg(long, value_name = "FILE", conflicts_with = "data_dir")]
    config: Option<PathBuf>,
    /// Goes back to this revision; of --group, if the backup holds several
    #[arg(long, value_name = "REVISION", conflicts_with = "time")]
    revision: Option<Revision>,
    /// The group that --revision is of: the others go back to the same moment
    #[arg(long, value_name = "GROUP", requires = "revision")]
    group: Option<GroupId>,
    /// Goes back to this moment, such as 2026-03-01T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = moment)]
    time: Option<Timestamp>,
    /// The generation of what is restored: the same on all servers, and higher than any before [default: the time in
    /// seconds]
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
    /// Restores into a cloud with another id than the one that was backed up
    #[arg(long)]
    other_cloud: bool,
    /// Shows what would be restored and writes nothing
    #[arg(long)]
    dry_run: bool,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

fn moment(text: &str) -> Result<Timestamp, String> {
    serde_json::from_value(Value::String(text.to_owned()))
        .map_err(|_| format!("{text:?} is no moment such as 2026-03-01T12:00:00Z"))
}

pub async fn run(args: &BackupArgs) -> anyhow::Result<()> {
    match &args.command {
        BackupCommand::Create(args) => create(args).await,
        BackupCommand::List(args) => list(args).await,
        BackupCommand::Verify { from, output } => verify(from, *output),
        BackupCommand::Restore(args) => restore(args).await,
    }
}

async fn create(args: &CreateArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let mut body = json!({"stale": args.stale});
    if let Some(name) = &args.name {
        body["name"] = name.clone().into();
    }
    if let Some(keep) = args.keep {
        body["keep"] = keep.into();
    }
    let made: Value = join::run(&cloud, "backup-create", &body).await?;
    if args.output == Form::Json {
        return output::json(&made);
    }
    output::text(&format!("{} is made on {}", text(&made, "/folder"), text(&made, "/server")))?;
    for group in made["groups"].as_array().into_iter().flatten() {
        output::text(&format!(
            "  group {}: revision {}, {} keys",
            text(group, "/group"),
            group["revision"],
            group["keys"]
        ))?;
    }
    for name in made["removed"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        output::note(&format!("removed the old backup {}", output::plain(name)));
    }
    Ok(())
}

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let answer: Value = match &args.dir {
        Some(dir) => crate::role::server::backups::listing(&backup::list(&*stores::disk(), dir)?),
        None => join::run(&Cloud::connect(&args.cloud)?, "backup-list", &json!({})).await?,
    };
    if args.output == Form::Json {
        return output::json(&answer);
    }
    let items = answer["items"].as_array().cloned().unwrap_or_default();
    let rows = items.iter().map(|i| {
        let groups = i["groups"].as_array().cloned().unwrap_or_default();
        let groups: Vec<String> = groups.iter().map(|g| format!("{}@{}", text(g, "/group"), g["revision"])).collect();
        let state = if i["problem"].is_string() { text(i, "/problem").to_owned() } else { groups.join(" ") };
        vec![
            text(i, "/name").to_owned(),
            text(i, "/created").to_owned(),
            i["bytes"].as_u64().map_or_else(|| "-".to_owned(), output::size),
            state,
        ]
    });
    output::text(&Printer::new(&["NAME", "CREATED", "SIZE", "GROUPS"]).lines(rows.collect()))
}

fn verify(from: &Path, form: Form) -> anyhow::Result<()> {
    let backup = Backup::open(&*stores::disk(), from)?;
    if form == Form::Json {
        return output::json(&backup.manifest);
    }
    describe(&backup)
}

fn describe(backup: &Backup) -> anyhow::Result<()> {
    let m = &backup.manifest;
    output::text(&format!("backup {} of {}, made {}, is sound", m.name, m.cluster_id, stores::time(m.created_ms)))?;
    for g in &m.groups {
        let since = backup.time_of(&g.group, Revision(g.oldest.0 + 1))?.map_or_else(|| "-".to_owned(), stores::time);
        output::text(&format!(
            "  group {}: revision {} of {}, {} keys; goes back to revision {} ({since})",
            g.group,
            g.revision,
            stores::time(g.timestamp_ms),
            g.keys,
            g.oldest
        ))?;
    }
    Ok(())
}

/// One store to be written.
struct Target {
    server: String,
    node: u64,
    group: GroupId,
    dir: PathBuf,
}

impl Target {
    fn restore<'a>(
        &'a self,
        members: &'a Members,
        points: &BTreeMap<GroupId, Revision>,
        generation: u64,
    ) -> Restore<'a> {
        Restore {
            group: &self.group,
            node: self.node,
            members: &members[&self.group],
            generation,
            revision: points[&self.group],
        }
    }
}

/// The members of a group of a cloud. A server that the backup knows, where it is, goes back into the membership that was:
/// servers that joined one after another know different ones from their configurations, and a group must have one. Else
/// they are from the server's configuration; votes as in the backup, where it knows the node.
fn members_of(config: &ServerConfig, group: &GroupId, backed: &BTreeMap<u64, Member>) -> BTreeMap<u64, Member> {
    let own = config.members.get(&config.node_id).map(|m| m.wire.to_string());
    if own.is_some() && backed.get(&config.node_id).map(|m| &m.endpoint) == own.as_ref() {
        return backed.clone();
    }
    let of = if group.as_str() == "global" { config.global_members() } else { &config.members };
    let known = |node: &u64| backed.get(node).is_none_or(|m| m.voter);
    let mut members: BTreeMap<u64, Member> =
        of.iter().map(|(node, m)| (*node, Member { endpoint: m.wire.to_string(), voter: known(node) })).collect();
    if !members.values().any(|m| m.voter) {
        members.values_mut().for_each(|m| m.voter = true);
    }
    members
}

async fn restore(args: &RestoreArgs) -> anyhow::Result<()> {
    let disk = stores::disk();
    output::note(&format!("reading {}", args.from.display()));
    let backup = Backup::open(&*disk, &args.from)?;
    let servers = match (&args.config, &args.data_dir) {
        (Some(file), _) => vec![ServerConfig::load(file)?],
        (None, Some(dir)) if stores::is_cloud(dir) => stores::servers_of(dir)?,
        (None, other) => {
            let shown = other.as_deref().unwrap_or(Path::new("")).display();
            let advice = "for a real server, name its configuration with --config";
            return Err(Fail::usage(format!("{shown} is not the folder of a local cloud; {advice}")).into());
        }
    };
    if let Some(other) = servers.iter().find(|s| s.cluster_id != backup.manifest.cluster_id && !args.other_cloud) {
        return Err(Fail::conflict(format!(
            "the backup is of {}, but server {} is of {}: add --other-cloud if that is meant",
            backup.manifest.cluster_id, other.name, other.cluster_id
        ))
        .into());
    }
    let points = points(args, &backup)?;
    let (targets, members) = targets(&servers, &backup)?;
    if args.output == Form::Table {
        describe(&backup)?;
        for (group, revision) in &points {
            let keys = backup.keys_at(group, *revision)?;
            output::text(&format!("group {group} goes back to revision {revision}: {}", kinds(&keys)))?;
        }
    }
    let mut generation = backup.manifest.groups.iter().map(|g| g.generation).max().unwrap_or(1);
    for target in targets.iter().filter(|t| t.dir.join("FORMAT").exists()) {
        generation = generation.max(generation_of(&*disk, &target.dir)?);
    }
    let now = nexus_env::Env::real().now_millis();
    let generation = args.generation.unwrap_or_else(|| backup::next_generation(generation, now));
    if args.dry_run {
        return Ok(());
    }
    let etcd = servers.iter().any(|s| s.store.is_some());
    let done = if etcd {
        write_to_etcd(&disk, &backup, &targets, &servers, &members, &points, generation).await?
    } else {
        write(&disk, &backup, &targets, &members, &points, generation)?
    };
    for server in servers.iter().filter(|_| !etcd) {
        engine::leave_etcd(&server.data_dir)?;
    }
    if args.output == Form::Json {
        return output::json(&json!({"generation": generation, "restored": done}));
    }
    let place = |restored: &Restored| {
        let own = targets.iter().find(|t| t.node == restored.node && t.group == restored.group);
        if etcd { "in etcd".to_owned() } else { format!("on {}", own.map_or("", |t| &*t.server)) }
    };
    for restored in &done {
        output::text(&format!(
            "restored {} {}: {} keys, goes on at revision {}",
            restored.group,
            place(restored),
            restored.keys,
            restored.revision
        ))?;
    }
    let others = if args.config.is_some() && !etcd {
        format!("\n  restore the other servers from the same backup with --generation {generation}")
    } else {
        String::new()
    };
    output::note(&format!("Next:{others}\n  start the servers (a local cloud: `nexus up`)"));
    Ok(())
}

/// Where each group goes back to.
fn points(args: &RestoreArgs, backup: &Backup) -> anyhow::Result<BTreeMap<GroupId, Revision>> {
    let groups: Vec<GroupId> = backup.manifest.groups.iter().map(|g| g.group.clone()).collect();
    let mut time = args.time.map(Timestamp::as_millis);
    let mut exact = None;
    if let Some(revision) = args.revision {
        let group = match (&args.group, &groups[..]) {
            (Some(group), _) => group.clone(),
            (None, [one]) => one.clone(),
            (None, several) => {
                let names: Vec<&str> = several.iter().map(GroupId::as_str).collect();
                return Err(Fail::usage(format!("--revision is of which --group: {}?", names.join(", "))).into());
            }
        };
        backup.resolve(&group, Point::Revision(revision))?;
        if groups.len() > 1 {
            time = Some(backup.time_of(&group, revision)?.context("the time of that revision is not known any more")?);
        }
        exact = Some((group, revision));
    }
    let mut points = BTreeMap::new();
    for group in groups {
        let revision = match (&exact, time) {
            (Some((of, revision)), _) if *of == group => *revision,
            (_, Some(ms)) => backup.resolve(&group, Point::Time(ms))?,
            (_, None) => backup.resolve(&group, Point::Newest)?,
        };
        points.insert(group, revision);
    }
    Ok(points)
}

type Members = BTreeMap<GroupId, BTreeMap<u64, Member>>;

/// Every store to be written, and who are the members of each group.
fn targets(servers: &[ServerConfig], backup: &Backup) -> anyhow::Result<(Vec<Target>, Members)> {
    let mut targets = Vec::new();
    let mut members = Members::new();
    for image in &backup.manifest.groups {
        for server in servers {
            let regional = server.region.as_str() == image.group.as_str();
            if !regional && image.group.as_str() != "global" {
                continue;
            }
            let group =
                members.entry(image.group.clone()).or_insert_with(|| members_of(server, &image.group, &image.members));
            // Servers of other regions read the global group along.
            group.entry(server.node_id).or_insert_with(|| Member {
                endpoint: server.members.get(&server.node_id).map_or_else(String::new, |m| m.wire.to_string()),
                voter: false,
            });
            targets.push(Target {
                server: server.name.to_string(),
                node: server.node_id,
                group: image.group.clone(),
                dir: stores::folder_of(&server.data_dir, &image.group),
            });
        }
    }
    if targets.is_empty() {
        let held: Vec<&str> = backup.manifest.groups.iter().map(|g| g.group.as_str()).collect();
        let regions: BTreeSet<&str> = servers.iter().map(|s| s.region.as_str()).collect();
        return Err(Fail::conflict(format!(
            "the backup holds the groups {}, but these servers are of {}",
            held.join(", "),
            regions.into_iter().collect::<Vec<_>>().join(", ")
        ))
        .into());
    }
    Ok((targets, members))
}

fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}

/// Writes all stores beside their places, and only then puts them there; what was there is set aside.
fn write(
    disk: &Arc<dyn Disk>,
    backup: &Backup,
    targets: &[Target],
    members: &Members,
    points: &BTreeMap<GroupId, Revision>,
    generation: u64,
) -> anyhow::Result<Vec<Restored>> {
    let mut locks: Vec<Box<dyn DiskLock>> = Vec::new();
    for target in targets.iter().filter(|t| t.dir.join("LOCK").exists()) {
        let lock = disk.lock(&target.dir.join("LOCK")).map_err(|e| {
            Fail::conflict(format!("server {} runs: stop it first (a local cloud: `nexus down`): {e}", target.server))
        })?;
        locks.push(lock);
    }
    let mut done = Vec::new();
    for (i, target) in targets.iter().enumerate() {
        output::note(&format!("writing {} of {}: {}", i + 1, targets.len(), target.dir.display()));
        let fresh = sibling(&target.dir, ".restoring");
        disk.remove_dir_all(&fresh)?;
        let what = target.restore(members, points, generation);
        done.push(backup.restore(disk, &what, &fresh)?);
    }
    for target in targets {
        let parent = target.dir.parent().unwrap_or(Path::new("/"));
        if disk.exists(&target.dir)? {
            set_aside(disk, &target.dir, generation)?;
        }
        disk.rename(&sibling(&target.dir, ".restoring"), &target.dir)?;
        disk.sync_dir(parent)?;
    }
    drop(locks);
    Ok(done)
}

/// Writes each group into etcd once. Stores that the servers have in their own folders are set aside then.
async fn write_to_etcd(
    disk: &Arc<dyn Disk>,
    backup: &Backup,
    targets: &[Target],
    servers: &[ServerConfig],
    members: &Members,
    points: &BTreeMap<GroupId, Revision>,
    generation: u64,
) -> anyhow::Result<Vec<Restored>> {
    let mut done: Vec<Restored> = Vec::new();
    for target in targets {
        if done.iter().any(|d| d.group == target.group) {
            continue;
        }
        let server = servers.iter().find(|s| s.node_id == target.node).context("a target is of one of the servers")?;
        let what = target.restore(members, points, generation);
        output::note(&format!("writing group {} to etcd", target.group));
        done.push(engine::restore(server, backup, &what).await.map_err(|e| match e.downcast_ref() {
            Some(BackupError::Refused(why)) => Fail::conflict(why).into(),
            _ => e,
        })?);
    }
    for target in targets.iter().filter(|t| t.dir.join("FORMAT").exists()) {
        set_aside(disk, &target.dir, generation)?;
    }
    Ok(done)
}

fn set_aside(disk: &Arc<dyn Disk>, dir: &Path, generation: u64) -> anyhow::Result<()> {
    let aside = sibling(dir, &format!(".before-generation-{generation}"));
    disk.remove_dir_all(&aside)?;
    disk.rename(dir, &aside)?;
    output::note(&format!("the store as it was: {}", aside.display()));
    Ok(())
}

/// How many objects of which kind, such as `3 apps, 12 instances`.
fn kinds(keys: &[nexus_store::KeyValue]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for kv in keys {
        let text = String::from_utf8_lossy(&kv.key);
        let mut parts = text.split('/');
        if parts.next() == Some("o") {
            *counts.entry(parts.next().unwrap_or_default().to_owned()).or_default() += 1;
        }
    }
    if counts.is_empty() {
        return format!("{} keys", keys.len());
    }
    counts.iter().map(|(kind, n)| format!("{n} {kind}")).collect::<Vec<_>>().join(", ")
}
