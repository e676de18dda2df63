//! `nexus delete`. The name and the quota are free at once; with `--wait`, the command also waits until nothing is left
//! of the object.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nexus_model::Name;
use nexus_model::kind::KindDescriptor;

use super::cascade::{self, Manner};
use super::cloud::{Cloud, CloudArgs, absent, selector};
use super::progress::Progress;
use super::webhook::CallbackArgs;
use super::{apply, get, manifest, output, report, resource};
use crate::exit::{Exit, Fail};

/// What the API waits for at most.
const LONGEST_WAIT: u64 = 300;

/// Deletes objects
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus delete app web\n  \
    nexus delete app/web route/shop --wait\n  \
    nexus delete apps -l tier=test\n  \
    nexus delete -f web.yaml --ignore-not-found\n  \
    nexus delete network shop --cascade\n  \
    nexus delete network/shop app/web --cascade --yes\n\n\
    The name and the quota are free at once. The teardown goes on by itself: \
    `nexus get instances --deleting` shows it, and --wait waits for it.")]
pub struct DeleteArgs {
    /// KIND NAME…, or KIND/NAME…
    #[arg(required_unless_present = "files", conflicts_with = "files", value_name = "KIND NAME")]
    what: Vec<String>,
    /// Deletes the objects that manifests name, the last first
    #[arg(short, long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Deletes what has these labels, in place of names
    #[arg(short = 'l', long, value_name = "SELECTOR", value_parser = selector, conflicts_with = "files")]
    selector: Option<String>,
    /// Waits until nothing is left of it
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Returns when the delete is committed (the default)
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
    /// How many seconds to wait for each object, at most 300
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=LONGEST_WAIT))]
    timeout: u64,
    /// An object that does not exist is no error
    #[arg(long)]
    ignore_not_found: bool,
    /// Deletes or changes what uses a network, or a part of one, too: shows all of it, and asks. Apps and jobs in it go only if
    /// they are named beside it
    #[arg(long, conflicts_with = "files")]
    cascade: bool,
    /// Does so without a question
    #[arg(short, long, requires = "cascade")]
    yes: bool,
    #[command(flatten)]
    callback: CallbackArgs,
    #[command(flatten)]
    cloud: CloudArgs,
}

struct Doomed {
    kind: &'static KindDescriptor,
    title: String,
    path: String,
}

async fn find(cloud: &Cloud, args: &DeleteArgs) -> anyhow::Result<Vec<Doomed>> {
    let mut doomed = Vec::new();
    if !args.files.is_empty() {
        for manifest in manifest::read(&args.files)?.iter().rev() {
            let owner = apply::owner_of(cloud, &args.cloud, manifest)?;
            let region = apply::region_of(cloud, args.cloud.region.as_ref(), manifest)?;
            doomed.push(Doomed {
                kind: manifest.kind,
                title: resource::title(manifest.kind, manifest.name.as_str()),
                path: cloud.object_at(manifest.kind, &region, &owner, &manifest.name),
            });
        }
        return Ok(doomed);
    }
    doomed.extend(named(cloud, args).await?.iter().map(|(kind, name)| Doomed {
        kind,
        title: resource::title(kind, name.as_str()),
        path: cloud.object(kind, name),
    }));
    Ok(doomed)
}

/// What the words of the command name.
async fn named(cloud: &Cloud, args: &DeleteArgs) -> anyhow::Result<Vec<(&'static KindDescriptor, Name)>> {
    let mut all = Vec::new();
    for asked in resource::parse(&args.what)? {
        let kind = asked.kind();
        let names = match (&args.selector, asked.names.is_empty()) {
            (Some(selector), true) => get::select(cloud, kind, selector).await?,
            (None, false) => asked.names,
            (Some(_), false) => return Err(Fail::usage("give names or a selector, not both").into()),
            (None, true) => {
                return Err(Fail::usage(format!("name the {} to delete, or choose with -l", kind.plural)).into());
            }
        };
        all.extend(names.into_iter().map(|name| (kind, name)));
    }
    Ok(all)
}

/// `nexus image rm`.
pub async fn images(cloud: &CloudArgs, names: &[String]) -> anyhow::Result<()> {
    let what = std::iter::once("images".to_owned()).chain(names.iter().cloned()).collect();
    let args = DeleteArgs {
        what,
        files: Vec::new(),
        selector: None,
        wait: false,
        no_wait: true,
        timeout: 60,
        ignore_not_found: false,
        cascade: false,
        yes: false,
        callback: CallbackArgs::default(),
        cloud: cloud.clone(),
    };
    run(&args).await
}

pub async fn run(args: &DeleteArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?.calling_back(&args.callback);
    if args.cascade {
        let patience = Duration::from_secs(args.timeout);
        let manner = Manner {
            yes: args.yes,
            wait: args.wait.then_some(patience),
            patience,
            ignore_not_found: args.ignore_not_found,
        };
        return cascade::run(&cloud, named(&cloud, args).await?, &manner).await;
    }
    let doomed = find(&cloud, args).await?;
    if doomed.is_empty() {
        output::note("nothing to delete");
    }
    let mut last: Option<anyhow::Error> = None;
    for one in &doomed {
        if let Err(e) = delete(&cloud, args, one).await {
            // One that fails must not keep the others; the last failure ends the command.
            if let Some(former) = last.replace(e.context(one.title.clone())) {
                report::print(&former);
            }
        }
    }
    last.map_or(Ok(()), Err)
}

async fn delete(cloud: &Cloud, args: &DeleteArgs, one: &Doomed) -> anyhow::Result<()> {
    if !one.kind.verbs.delete {
        return Err(Fail::usage(format!("{} can't be deleted: the cloud keeps them itself", one.kind.plural)).into());
    }
    let wait = args.wait.then(|| Duration::from_secs(args.timeout));
    let mut progress = Progress::new();
    if args.wait {
        progress.say(&format!("{}: being torn down", one.title));
    }
    let answer = tokio::select! {
        biased;
        answer = cloud.delete(&one.path, wait) => answer,
        _ = tokio::signal::ctrl_c(), if args.wait => {
            let message = "interrupted: the delete goes on if it was committed";
            return Err(Fail::new(Exit::Failed, message).into());
        }
    };
    drop(progress);
    let settled = if args.ignore_not_found { absent(answer)? } else { Some(answer?) };
    match settled {
        None => output::text(&format!("{} not found", one.title)),
        Some(false) if args.wait => {
            let message = format!(
                "deleted, but after {} seconds its teardown still goes on: `nexus get {} --deleting` shows it",
                args.timeout, one.kind.plural
            );
            Err(Fail::unavailable(message).into())
        }
        Some(_) => output::text(&format!("{} deleted", one.title)),
    }
}
