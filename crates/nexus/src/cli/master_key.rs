//! `nexus master-key`: the keys by which servers seal secrets. They stand in a file that the operator keeps; these commands
//! change that file, and have servers put what is sealed under its current key.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_api::operations::{MasterKeys, SealedCount};
use nexus_iam::envelope::{FileKeys, KeyId, KeyProvider as _};
use serde_json::json;

use super::cloud::{Cloud, CloudArgs};
use super::join;
use super::output::{self, Format};
use super::table::Printer;
use crate::exit::Fail;
use crate::local::state::{DataDir, write_private};
use crate::secret_file;

/// Makes, rotates and removes master keys, by which servers seal secrets
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus master-key list\n  \
    nexus master-key rotate                  # a file that all servers read\n  \
    nexus master-key rewrap\n  \
    nexus master-key remove mk-0123456789abcdef\n\n\
    With a copy of the file on each server, so that no server lacks a key by which another seals:\n  \
    nexus master-key add --file master-keys            # then copy it to every server\n  \
    nexus master-key promote mk-… --file master-keys   # then copy it again\n\n\
    Servers look at their file every other second. Keep a copy apart from the backups: one opens the other.")]
pub struct MasterKeyArgs {
    #[command(subcommand)]
    command: MasterKeyCommand,
}

#[derive(Debug, Args)]
struct Keys {
    /// The file of keys [default: that of the local cloud]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Subcommand)]
enum MasterKeyCommand {
    /// Makes a new file with one key
    Generate {
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Lists the keys of the file, the current one first
    List(Keys),
    /// Adds a new key that seals nothing yet
    Add(Keys),
    /// Makes a key the current one
    Promote {
        id: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Adds a new key and makes it the current one
    Rotate(Keys),
    /// Removes a key, unless something is sealed by it still
    Remove {
        id: String,
        /// Asks no server. What is sealed by the key can never be opened again
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        keys: Keys,
    },
    /// Counts what is sealed in the region and in what all regions share, by key
    Status {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Puts everything that is sealed under the current key; may be run again at any time
    Rewrap {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

impl Keys {
    fn path(&self) -> anyhow::Result<PathBuf> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let cloud = Cloud::connect(&self.cloud)?;
        let dir = cloud.data_dir().ok_or_else(|| Fail::usage("this is no local cloud: name its file with --file"))?;
        Ok(dir.join(DataDir::MASTER_KEYS))
    }
}

fn read(path: &Path) -> anyhow::Result<FileKeys> {
    FileKeys::parse(&secret_file::read_text(path)?).with_context(|| path.display().to_string())
}

fn write(path: &Path, keys: &FileKeys) -> anyhow::Result<()> {
    write_private(path, keys.to_text().as_bytes())
}

async fn ask(cloud: &Cloud, operation: &str) -> anyhow::Result<MasterKeys> {
    join::run(cloud, operation, &json!({})).await
}

fn show(found: &MasterKeys, format: Format) -> anyhow::Result<()> {
    match format {
        Format::Json => return output::json(found),
        Format::Yaml => return output::yaml(found),
        _ => {}
    }
    let row = |what: &str, c: &SealedCount| {
        vec![what.to_owned(), c.seen.to_string(), c.rewrapped.to_string(), c.failed.to_string()]
    };
    let rows = vec![
        row("secrets", &found.secrets),
        row("access keys", &found.access_keys),
        row("second factors", &found.second_factors),
        row("client secrets", &found.client_secrets),
    ];
    let mut text = Printer::new(&["SEALED", "SEEN", "REWRAPPED", "FAILED"]).lines(rows);
    let mut used = found.used.clone();
    used.entry(found.current.clone()).or_default();
    let key = |(id, n): (&String, &u64)| {
        vec![id.clone(), n.to_string(), if *id == found.current { "current" } else { "" }.to_owned()]
    };
    text.push('\n');
    text.push_str(&Printer::new(&["KEY", "VALUES", ""]).lines(used.iter().map(key).collect()));
    for failure in &found.failures {
        output::note(failure);
    }
    output::text(text.trim_end())
}

pub async fn run(args: &MasterKeyArgs) -> anyhow::Result<()> {
    match &args.command {
        MasterKeyCommand::Generate { file } => {
            if file.exists() {
                let why = format!("{} is there already: what is sealed by its keys needs it", file.display());
                return Err(Fail::conflict(why).into());
            }
            let keys = FileKeys::generate();
            write(file, &keys)?;
            output::text(keys.current().as_str())
        }
        MasterKeyCommand::List(keys) => {
            let keys = read(&keys.path()?)?;
            let mut state = std::iter::once("current").chain(std::iter::repeat("opens"));
            let rows = keys.ids().map(|id| vec![id.to_string(), state.next().unwrap_or_default().to_owned()]);
            output::text(Printer::new(&["KEY", "STATE"]).lines(rows.collect()).trim_end())
        }
        MasterKeyCommand::Add(keys) => change(keys, FileKeys::add),
        MasterKeyCommand::Rotate(keys) => change(keys, FileKeys::rotate),
        MasterKeyCommand::Promote { id, keys } => {
            let id = KeyId::new(id.clone());
            change(keys, |file| file.promote(&id).map(|()| id.clone()))
        }
        MasterKeyCommand::Remove { id, force, keys } => {
            let id = KeyId::new(id.clone());
            if !force {
                refuse_used(keys, &id).await?;
            }
            change(keys, |file| file.remove(&id).map(|()| id.clone()))
        }
        MasterKeyCommand::Status { output, cloud } => {
            show(&ask(&Cloud::connect(cloud)?, "master-key-status").await?, *output)
        }
        MasterKeyCommand::Rewrap { output, cloud } => {
            let done = ask(&Cloud::connect(cloud)?, "master-key-rewrap").await?;
            show(&done, *output)?;
            let failed = [&done.secrets, &done.access_keys, &done.second_factors, &done.client_secrets]
                .iter()
                .map(|c| c.failed)
                .sum::<u64>();
            if failed == 0 {
                return Ok(());
            }
            Err(Fail::conflict(format!("{failed} values stay as they are: keep every key that they need")).into())
        }
    }
}

fn change<E: std::error::Error + Send + Sync + 'static>(
    keys: &Keys,
    change: impl FnOnce(&mut FileKeys) -> Result<KeyId, E>,
) -> anyhow::Result<()> {
    let path = keys.path()?;
    let mut file = read(&path)?;
    let id = change(&mut file)?;
    write(&path, &file)?;
    output::text(id.as_str())
}

/// Asks the region whether anything needs a key.
async fn refuse_used(keys: &Keys, id: &KeyId) -> anyhow::Result<()> {
    let found = ask(&Cloud::connect(&keys.cloud)?, "master-key-status").await?;
    if let Some(n) = found.used.get(id.as_str()) {
        let why = format!("{n} values in region {} need {id}: run `nexus master-key rewrap` first", found.region);
        return Err(Fail::conflict(why).into());
    }
    output::note(&format!(
        "nothing in region {} and in what all regions share needs {id}; other regions and older backups may",
        found.region
    ));
    Ok(())
}
