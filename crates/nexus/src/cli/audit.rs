//! `nexus audit`: what was done, listed, taken home, and proven with nothing but a public key.

use std::io::{BufRead, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use futures::StreamExt as _;
use nexus_audit::export::MAX_LINE;
use nexus_audit::{ExportVerifier, Options, PublicKey, Report, SignedHead, Verifier};
use nexus_model::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, encode, text};
use super::debug::Form;
use super::output;
use super::table::Printer;
use crate::client::Parts;
use crate::exit::{Exit, Fail};

/// Shows who did what, and proves it
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus audit list --project default --limit 20\n  \
    nexus audit keys > audit.keys\n  \
    nexus audit head > monday.head\n  \
    nexus audit export --file audit.ndjson --head monday.head\n  \
    nexus audit verify audit.ndjson --key audit.keys --head monday.head\n\n\
    Keep the keys and a head outside the cloud: whoever holds them finds a record that was removed, changed, moved or forged.")]
pub struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    List(ListArgs),
    Export(ExportArgs),
    Verify(VerifyArgs),
    /// Prints the signed head of what is committed now
    #[command(after_help = "Examples:\n  \
        nexus audit head > monday.head\n  \
        nexus audit head --region global > monday-global.head")]
    Head(HereArgs),
    /// Prints the public keys that heads are signed with, one a line
    #[command(after_help = "Examples:\n  \
        nexus audit keys > audit.keys\n  \
        nexus audit keys --region global >> audit.keys")]
    Keys(HereArgs),
    Forget(ForgetArgs),
}

/// Shows records, the newest first
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus audit list\n  \
    nexus audit list --actor user:default/ada --since 2026-03-01T00:00:00Z\n  \
    nexus audit list --kind apps --name web --project default -o json\n  \
    nexus audit list --region global --action projects:delete\n  \
    nexus audit list --organization acme")]
struct ListArgs {
    /// Who did it: a name, or user:ORG/NAME, service-account:ORG/NAME, operator:NAME
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// What was done, such as apps:create
    #[arg(long, value_name = "KIND:VERB")]
    action: Option<String>,
    /// The plural of what it was done to, such as apps
    #[arg(long, value_name = "PLURAL")]
    kind: Option<String>,
    /// The name of what it was done to; ORG/NAME for what belongs to an organization
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Not before this moment, such as 2026-03-01T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,
    /// Before this moment
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,
    /// The most records to show
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Writes records so that they can be verified offline
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus audit export --file audit.ndjson\n  \
    nexus audit export --from 1200 --head monday.head > since-monday.ndjson\n  \
    nexus audit export --region global --file global.ndjson\n  \
    nexus audit export --organization acme --file acme.ndjson")]
struct ExportArgs {
    /// The first record
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    from: u64,
    /// Also proves that the log has only grown since this head
    #[arg(long = "head", value_name = "FILE")]
    heads: Vec<PathBuf>,
    /// Where it is written [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Verifies an export without asking anyone
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus audit verify audit.ndjson --key audit.keys\n  \
    nexus audit verify audit.ndjson --key audit.keys --head monday.head -o json\n  \
    zstd -dc audit.ndjson.zst | nexus audit verify - --key audit.keys")]
struct VerifyArgs {
    /// The export, or `-` for standard input
    #[arg(value_name = "FILE")]
    export: PathBuf,
    /// A public key of the log, or a file with one a line
    #[arg(long = "key", value_name = "KEY|FILE", required = true)]
    keys: Vec<String>,
    /// A head that you kept: the export must be of the same history
    #[arg(long = "head", value_name = "FILE")]
    heads: Vec<PathBuf>,
    /// Fails if refusals that an anchor settles are not in the export, as when it was made by another server
    #[arg(long)]
    strict: bool,
    /// Puts up with records whose time was over, of which only the hash is left. They are counted
    #[arg(long, conflicts_with = "strict")]
    allow_pruned: bool,
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

#[derive(Debug, Args)]
struct HereArgs {
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Shreds the personal data of a principal in all records; the records and their proofs stay
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus audit forget user:default/ada\n  \
    nexus audit forget user:default/ada --region global")]
struct ForgetArgs {
    /// Whose: user:ORG/NAME, service-account:ORG/NAME, operator:NAME
    principal: String,
    #[command(flatten)]
    cloud: CloudArgs,
}

fn moment(text: &str) -> Result<Timestamp, String> {
    serde_json::from_value(Value::String(text.to_owned()))
        .map_err(|_| format!("{text:?} is no moment such as 2026-03-01T12:00:00Z"))
}

pub async fn run(args: &AuditArgs) -> anyhow::Result<()> {
    match &args.command {
        AuditCommand::List(args) => list(args).await,
        AuditCommand::Export(args) => export(args).await,
        AuditCommand::Verify(args) => verify(args),
        AuditCommand::Head(args) => head(args).await,
        AuditCommand::Keys(args) => keys(args).await,
        AuditCommand::Forget(args) => forget(args).await,
    }
}

/// The path of the whole log, or with `--organization` of what is about that one.
fn path(cloud: &Cloud, args: &CloudArgs, what: &str) -> String {
    let of = args.organization.as_ref().map_or_else(String::new, |o| format!("/organizations/{o}"));
    format!("/v1/regions/{}{of}/audit/{what}", cloud.target.region)
}

/// The most records that the API gives in one page.
const PAGE: usize = 500;

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let mut asked = String::new();
    let project = args.cloud.project.as_ref().map(ToString::to_string);
    let filters = [
        ("actor", &args.actor),
        ("action", &args.action),
        ("kind", &args.kind),
        ("name", &args.name),
        ("project", &project),
    ];
    for (name, value) in filters {
        if let Some(value) = value {
            asked.push_str(&format!("&{name}={}", encode(value)));
        }
    }
    for (name, value) in [("since", args.since), ("until", args.until)] {
        if let Some(value) = value {
            asked.push_str(&format!("&{name}={}", value.as_millis().max(0)));
        }
    }
    let (mut items, mut cursor) = (Vec::new(), String::new());
    while items.len() < args.limit {
        let limit = (args.limit - items.len()).clamp(1, PAGE);
        let page: Value =
            cloud.client.get(&path(&cloud, &args.cloud, &format!("records?limit={limit}{asked}{cursor}"))).await?;
        items.extend(page["items"].as_array().into_iter().flatten().cloned());
        match page["metadata"]["cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={}", encode(next)),
            None => break,
        }
    }
    match args.output {
        Form::Json => output::json(&output::list_of("AuditRecord", &items)),
        Form::Table if items.is_empty() => {
            output::note("there are no such records");
            Ok(())
        }
        Form::Table => {
            let mut printer =
                Printer::new(&["INDEX", "TIME", "ACTOR", "ACTION", "TARGET", "FROM", "ANSWER", "REQUEST"]);
            output::text(&printer.lines(items.iter().map(row).collect()))
        }
    }
}

fn row(record: &Value) -> Vec<String> {
    let word = |pointer: &str| output::plain(text(record, pointer));
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let time = Timestamp::from_millis(record["time"].as_i64().unwrap_or(0)).to_string();
    let organization = word("/actor/organization");
    let actor =
        if organization.is_empty() { word("/actor/name") } else { format!("{organization}/{}", word("/actor/name")) };
    let project = word("/target/project");
    let target = match project.is_empty() {
        true => word("/target/name"),
        false => format!("{project}/{}", word("/target/name")),
    };
    vec![
        record["index"].to_string(),
        time,
        actor,
        word("/action"),
        or_dash(target),
        or_dash(word("/sourceAddress")),
        word("/answer"),
        word("/requestId"),
    ]
}

async fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let mut asked = format!("export?from={}", args.from);
    for file in &args.heads {
        asked.push_str(&format!("&prove={}", head_in(file)?.claimed().size));
    }
    let cloud = Cloud::connect(&args.cloud)?;
    let mut content = cloud.client.stream(Method::GET, &path(&cloud, &args.cloud, &asked), Parts::default()).await?;
    let Some(to) = &args.file else {
        while let Some(piece) = content.next().await {
            output::bytes(&piece?)?;
        }
        return Ok(());
    };
    let writing = || format!("writing {}", to.display());
    let mut file = std::fs::File::create(to).with_context(writing)?;
    let mut lines = 0;
    while let Some(piece) = content.next().await {
        let piece = piece?;
        lines += piece.iter().filter(|b| **b == b'\n').count();
        file.write_all(&piece).with_context(writing)?;
    }
    file.sync_all().with_context(writing)?;
    output::note(&format!("{} has {lines} lines; `nexus audit verify` says whether they are right", to.display()));
    Ok(())
}

/// The most bytes of a file with keys or a head.
const MAX_SMALL: u64 = 1 << 20;

fn small_file(path: &Path) -> anyhow::Result<String> {
    let reading = || format!("reading {}", path.display());
    let mut text = String::new();
    std::fs::File::open(path).with_context(reading)?.take(MAX_SMALL).read_to_string(&mut text).with_context(reading)?;
    Ok(text)
}

fn head_in(file: &Path) -> anyhow::Result<SignedHead> {
    small_file(file)?.parse().with_context(|| format!("the head in {}", file.display()))
}

/// A key, or the keys in a file.
fn keys_of(word: &str) -> anyhow::Result<Vec<PublicKey>> {
    if let Ok(key) = word.parse() {
        return Ok(vec![key]);
    }
    let text = small_file(Path::new(word)).with_context(|| format!("{word:?} is no public key either"))?;
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|line| line.parse().with_context(|| format!("the keys in {word}"))).collect()
}

fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let mut keys = Vec::new();
    for word in &args.keys {
        keys.extend(keys_of(word)?);
    }
    let keys = Verifier::new(keys);
    let heads = args.heads.iter().map(|file| head_in(file)).collect::<anyhow::Result<Vec<_>>>()?;
    let options = Options { allow_dropped: !args.strict, allow_pruned: args.allow_pruned };
    let verifier = ExportVerifier::new(&keys, &heads, options).context("a head that you kept")?;
    let reading = || format!("reading {}", args.export.display());
    let report = match args.export.to_str() {
        Some("-") => read_lines(std::io::stdin().lock(), verifier),
        _ => read_lines(BufReader::new(std::fs::File::open(&args.export).with_context(reading)?), verifier),
    };
    let report = report.with_context(reading)?;
    if args.output == Form::Json {
        output::json(&described(&report))?;
    } else if report.is_right() {
        output::text(&said(&report))?;
    }
    match &report.broken {
        None => Ok(()),
        Some(broken) => {
            let what = format!("{} is not what was written: {broken}", args.export.display());
            Err(Fail::new(Exit::Failed, what).into())
        }
    }
}

/// A line at a time, however long the file is; a line that is too long is cut, which the verifier finds.
fn read_lines(mut from: impl BufRead, mut verifier: ExportVerifier<'_>) -> std::io::Result<Report> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if from.by_ref().take(MAX_LINE as u64 + 2).read_until(b'\n', &mut line)? == 0 {
            return Ok(verifier.finish());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        verifier.line(&line);
    }
}

fn said(report: &Report) -> String {
    let Report { group, records, from, to, .. } = report;
    let mut said = format!("{records} records of {group}, {from} to before {to}, are as they were written and signed");
    if let Some(head) = &report.last_head {
        let time = Timestamp::from_millis(i64::try_from(head.time).unwrap_or(i64::MAX));
        said.push_str(&format!("\nthe last head was signed at {time}"));
    }
    if report.earlier > 0 {
        said.push_str(&format!("\nand of one history with {} heads that you kept", report.earlier));
    }
    if report.chain_records > 0 {
        said.push_str(&format!("\n{} refusals and logins are among what servers noted", report.chain_records));
    }
    if report.chain_dropped > 0 {
        said.push_str(&format!(
            "\n{} that servers noted are not in this export: other servers have them, or their time was over",
            report.chain_dropped
        ));
    }
    said
}

fn described(report: &Report) -> Value {
    json!({
        "right": report.is_right(), "cluster": report.cluster, "group": report.group, "from": report.from, "to": report.to,
        "whole": report.whole, "records": report.records, "pruned": report.pruned, "anchors": report.anchors,
        "chainRecords": report.chain_records, "chainDropped": report.chain_dropped, "heads": report.heads,
        "earlierHeads": report.earlier, "broken": report.broken.as_ref().map(ToString::to_string),
    })
}

async fn head(args: &HereArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let head: Value = cloud.client.get(&path(&cloud, &args.cloud, "head")).await?;
    output::bytes(text(&head, "/note").as_bytes())
}

async fn keys(args: &HereArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let keys: Value = cloud.client.get(&path(&cloud, &args.cloud, "keys")).await?;
    for key in keys["items"].as_array().into_iter().flatten() {
        output::text(&output::plain(text(key, "/key")))?;
    }
    Ok(())
}

async fn forget(args: &ForgetArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let parts = Parts::json(&json!({"principal": args.principal}))?;
    let path = format!("/v1/regions/{}/audit/forget", cloud.target.region);
    let _: Value = cloud.client.json(Method::POST, &path, parts).await?;
    output::text(&format!(
        "the personal data of {} in the audit log of {} is shredded",
        args.principal, cloud.target.region
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_who_did_what_to_what() {
        let record = json!({
            "index": 7, "time": 1_700_000_000_000_i64, "actor": {"name": "ada", "organization": "acme"},
            "action": "apps:create", "target": {"name": "web", "project": "shop"}, "answer": "ok", "requestId": "req-1",
        });
        let said = ["7", "2023-11-14T22:13:20.000Z", "acme/ada", "apps:create", "shop/web", "-", "ok", "req-1"];
        assert_eq!(row(&record), said);
    }

    #[test]
    fn a_key_is_given_as_it_is_or_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        let signer = nexus_audit::Signer::from_seed("home", "eu", &[1; 32]).unwrap();
        let key = signer.public_key();
        std::fs::write(&file, format!("# of the cluster home\n{key}\n\n{key}\n")).unwrap();
        assert_eq!(keys_of(&key.to_string()).unwrap(), std::slice::from_ref(&key));
        assert_eq!(keys_of(file.to_str().unwrap()).unwrap(), [key.clone(), key]);
        assert!(keys_of("nothing").unwrap_err().to_string().contains("no public key"));
    }
}
