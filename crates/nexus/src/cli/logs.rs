//! `nexus logs`: what an instance says, or all of an app's, each line under its instance's name.
//!
//! With `-f`, instances that come later are followed too, and a stream that breaks off is taken up again at its end:
//! what was said in between may be missing, and standard error says so. A global app is followed in all of its regions.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use nexus_model::Name;
use nexus_model::kind::{self, KindDescriptor};
use reqwest::Method;
use serde_json::Value;

use super::cloud::{Cloud, CloudArgs, name_of, text};
use super::{output, resource, settle};
use crate::client::{ClientError, Parts};
use crate::exit::{Exit, Fail};

/// More instances than this are not followed at once.
const MAX_FOLLOWED: usize = 100;
/// How often an app is asked for new instances.
const LOOK: Duration = Duration::from_secs(2);
/// A line that is longer is passed on in pieces.
const MAX_LINE: usize = 1 << 20;

/// Shows what an instance, or all of an app's or a job's, wrote
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus logs web\n  \
    nexus logs app/web -f --tail 10\n  \
    nexus logs instance/web-0a1b2c3d\n  \
    nexus logs job/report -f    # until it has finished\n  \
    nexus logs web --part migrate")]
pub struct LogsArgs {
    /// An app, an instance or a job: NAME, app/NAME, instance/NAME or job/NAME
    #[arg(value_name = "APP|INSTANCE")]
    what: String,
    /// Goes on with what is written from now on
    #[arg(short, long)]
    follow: bool,
    /// The last so many lines of each instance; without it, all that is kept
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    tail: Option<u32>,
    /// What an init step or a sidecar wrote, by its name, instead of the main part
    #[arg(long, value_name = "NAME")]
    part: Option<Name>,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Which lines of an instance are wanted.
#[derive(Debug, Clone, Copy)]
struct Wanted<'a> {
    tail: Option<u32>,
    part: Option<&'a Name>,
}

/// What a word that may name an app or an instance does name.
pub enum Found {
    App(Value),
    Instance(Value),
}

fn kinds() -> (&'static KindDescriptor, &'static KindDescriptor) {
    (kind::find("app").expect("a kind"), kind::find("instance").expect("a kind"))
}

/// Finds an app or an instance, in the order of `apps_first`.
pub async fn find(cloud: &Cloud, word: &str, apps_first: bool) -> anyhow::Result<Found> {
    let (apps, instances) = kinds();
    if let Some((kind, name)) = word.split_once('/') {
        let kind = resource::find_kind(kind)?;
        let name = resource::find_name(kind, name)?;
        return match kind.kind {
            "App" | "Job" => Ok(Found::App(cloud.get(kind, &name).await?)),
            "Instance" => Ok(Found::Instance(cloud.get(kind, &name).await?)),
            _ => Err(Fail::usage(format!("{} don't run: name an app, a job or an instance", kind.plural)).into()),
        };
    }
    let name = resource::find_name(if apps_first { apps } else { instances }, word)?;
    for is_app in [apps_first, !apps_first] {
        let kind = if is_app { apps } else { instances };
        if let Some(object) = cloud.find(&cloud.object(kind, &name)).await? {
            return Ok(if is_app { Found::App(object) } else { Found::Instance(object) });
        }
    }
    let project = &cloud.target.project;
    Err(Fail::not_found(format!("there is no app and no instance {word:?} in project {project}")).into())
}

pub async fn run(args: &LogsArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let wanted = Wanted { tail: args.tail, part: args.part.as_ref() };
    match find(&cloud, &args.what, true).await? {
        Found::Instance(instance) => {
            let name = name_of(&instance)?;
            let mut lines = open(&cloud, &cloud.region_of(&instance), &name, args.follow, wanted).await?;
            while let Some(piece) = lines.next().await {
                output::bytes(&piece?)?;
            }
            Ok(())
        }
        Found::App(app) if args.follow => follow(&cloud, app, wanted).await,
        Found::App(app) => {
            let instances = settle::instances_of(&cloud, &app).await?;
            if instances.is_empty() {
                let kind = text(&app, "/kind").to_lowercase();
                output::note(&format!("{kind}/{} has no instances", text(&app, "/metadata/name")));
            }
            for instance in &instances {
                once(&cloud, &cloud.region_of(instance), &name_of(instance)?, wanted).await?;
            }
            Ok(())
        }
    }
}

async fn open(
    cloud: &Cloud,
    region: &Name,
    name: &Name,
    follow: bool,
    wanted: Wanted<'_>,
) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Unpin + use<>, ClientError> {
    let mut path = format!("{}:logs?follow={follow}", cloud.object_at(kinds().1, region, &cloud.target.project, name));
    if let Some(tail) = wanted.tail {
        path.push_str(&format!("&tail={tail}"));
    }
    if let Some(part) = wanted.part {
        path.push_str(&format!("&part={part}"));
    }
    cloud.client.stream(Method::GET, &path, Parts::default()).await
}

/// Puts an instance's name before each of its lines. Streams are cut anywhere, and lines of different instances must not
/// run into one another.
struct Prefixer {
    prefix: Vec<u8>,
    rest: Vec<u8>,
}

impl Prefixer {
    fn new(name: &Name) -> Self {
        Self { prefix: format!("{name}  ").into_bytes(), rest: Vec::new() }
    }

    /// The whole lines so far.
    fn feed(&mut self, piece: &[u8]) -> Vec<u8> {
        self.rest.extend_from_slice(piece);
        let mut out = Vec::new();
        let mut start = 0;
        while let Some(length) = self.rest[start..].iter().position(|b| *b == b'\n') {
            out.extend_from_slice(&self.prefix);
            out.extend_from_slice(&self.rest[start..=start + length]);
            start += length + 1;
        }
        self.rest.drain(..start);
        if self.rest.len() > MAX_LINE {
            out.append(&mut self.end());
        }
        out
    }

    /// What is left, as a line.
    fn end(&mut self) -> Vec<u8> {
        if self.rest.is_empty() {
            return Vec::new();
        }
        let mut out = self.prefix.clone();
        out.append(&mut self.rest);
        out.push(b'\n');
        out
    }
}

/// Prints what one of several instances has said. One that can't be read must not keep the others.
async fn once(cloud: &Cloud, region: &Name, name: &Name, wanted: Wanted<'_>) -> anyhow::Result<()> {
    let mut lines = match open(cloud, region, name, false, wanted).await {
        Ok(lines) => lines,
        Err(e) => {
            output::note(&format!("instance/{name}: {e}"));
            return Ok(());
        }
    };
    let mut prefixer = Prefixer::new(name);
    while let Some(piece) = lines.next().await {
        match piece {
            Ok(piece) => output::bytes(&prefixer.feed(&piece))?,
            Err(e) => output::note(&format!("instance/{name}: {e}")),
        }
    }
    output::bytes(&prefixer.end())
}

/// An instance's region and name: those of a global app may have the same name in two regions.
type At = (Name, Name);

/// Follows one instance until its stream ends.
async fn tail_one(cloud: &Cloud, at: At, wanted: Wanted<'_>) -> (At, anyhow::Result<Result<(), ClientError>>) {
    let told = async {
        let (region, name) = &at;
        let mut lines = match open(cloud, region, name, true, wanted).await {
            Ok(lines) => lines,
            Err(e) => return Ok(Err(e)),
        };
        let mut prefixer = Prefixer::new(name);
        while let Some(piece) = lines.next().await {
            match piece {
                Ok(piece) => output::bytes(&prefixer.feed(&piece))?,
                Err(e) => {
                    output::bytes(&prefixer.end())?;
                    return Ok(Err(e));
                }
            }
        }
        output::bytes(&prefixer.end())?;
        Ok(Ok(()))
    };
    let told = told.await;
    (at, told)
}

/// The instances of an app, and the regions that can't be asked for theirs. Where a global app runs may change.
async fn look_around(cloud: &Cloud, app: &mut Value) -> Result<(Vec<Value>, Vec<(Name, String)>), ClientError> {
    if text(app, "/kind") == "Job" {
        let (project, name) = (text(app, "/metadata/project"), text(app, "/metadata/name"));
        let path = format!("/v1/regions/{}/projects/{project}/jobs/{name}", cloud.region_of(app));
        if let Some(newer) = cloud.find(&path).await? {
            *app = newer;
        }
        return Ok((settle::instances_of(cloud, app).await?, Vec::new()));
    }
    if cloud.region_of(app) != *kind::GLOBAL {
        return Ok((settle::instances_of(cloud, app).await?, Vec::new()));
    }
    let (project, name) = (text(app, "/metadata/project"), text(app, "/metadata/name"));
    let path = format!("/v1/regions/{}/projects/{project}/apps/{name}", kind::GLOBAL);
    if let Some(newer) = cloud.find(&path).await? {
        *app = newer;
    }
    Ok(settle::shares_of(cloud, app).await)
}

async fn follow(cloud: &Cloud, mut app: Value, wanted: Wanted<'_>) -> anyhow::Result<()> {
    let mut unheard: BTreeSet<Name> = BTreeSet::new();
    let mut streams = FuturesUnordered::new();
    let mut followed: BTreeSet<At> = BTreeSet::new();
    // Instances whose stream was once open: they go on at their end instead of saying all again.
    let mut heard: BTreeSet<At> = BTreeSet::new();
    let mut complained: BTreeSet<At> = BTreeSet::new();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            _ = look.tick() => {
                let (instances, silent) = match look_around(cloud, &mut app).await {
                    Ok(found) => found,
                    // What is followed goes on meanwhile.
                    Err(e) if e.exit() == Exit::Unavailable => continue,
                    Err(e) => return Err(e.into()),
                };
                for (region, why) in &silent {
                    if !unheard.contains(region) {
                        output::note(&format!("region {region}: {why}"));
                    }
                }
                unheard = silent.into_iter().map(|(region, _)| region).collect();
                let at = |i: &Value| name_of(i).map(|name| (cloud.region_of(i), name));
                let there: BTreeSet<At> = instances.iter().map(at).collect::<Result<_, _>>()?;
                let gone = |at: &At| !there.contains(at) && !unheard.contains(&at.0);
                // What a job's instance wrote is all told once its stream has ended.
                let over: BTreeSet<At> = instances
                    .iter()
                    .filter(|i| i["status"]["phase"] == "Exited")
                    .map(at)
                    .collect::<Result<_, _>>()?;
                let told = |at: &At| over.contains(at) && (heard.contains(at) || complained.contains(at));
                let told: BTreeSet<At> = there.iter().filter(|at| told(at)).cloned().collect();
                let rest = there.iter().any(|at| !told.contains(at));
                if !rest && text(&app, "/kind") == "Job" && !text(&app, "/status/finished").is_empty() {
                    return Ok(());
                }
                heard.retain(|at| !gone(at));
                complained.retain(|at| !gone(at));
                for at in there {
                    if followed.contains(&at) || told.contains(&at) {
                        continue;
                    }
                    if followed.len() >= MAX_FOLLOWED {
                        if complained.insert(at.clone()) {
                            output::note(&format!("instance/{}: not followed, {MAX_FOLLOWED} are already", at.1));
                        }
                        continue;
                    }
                    followed.insert(at.clone());
                    let tail = if heard.contains(&at) { Some(0) } else { wanted.tail };
                    streams.push(Box::pin(tail_one(cloud, at, Wanted { tail, ..wanted })));
                }
            }
            Some((at, told)) = streams.next(), if !streams.is_empty() => {
                match told? {
                    Ok(()) => drop(heard.insert(at.clone())),
                    Err(e) => {
                        if !matches!(e, ClientError::Refused(_)) {
                            heard.insert(at.clone());
                        }
                        if complained.insert(at.clone()) {
                            output::note(&format!("instance/{}: {e}", at.1));
                        }
                    }
                }
                // Taken up again at the next look, if it is still there.
                followed.remove(&at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prefixed_however_they_are_cut() {
        let text = b"one\ntwo\n\nlast";
        for size in 1..text.len() {
            let mut prefixer = Prefixer::new(&"w".parse().unwrap());
            let mut out: Vec<u8> = text.chunks(size).flat_map(|c| prefixer.feed(c)).collect();
            out.extend(prefixer.end());
            assert_eq!(String::from_utf8(out).unwrap(), "w  one\nw  two\nw  \nw  last\n", "in pieces of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_passed_on() {
        let mut prefixer = Prefixer::new(&"w".parse().unwrap());
        assert!(prefixer.feed(&vec![b'x'; MAX_LINE]).is_empty());
        assert_eq!(prefixer.feed(b"y").len(), MAX_LINE + 1 + 4);
    }
}
