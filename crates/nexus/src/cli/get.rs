//! `nexus get`: objects as tables, JSON or YAML, once or as they change.
//!
//! A watch goes on from the last revision that it saw, on any server. When that revision is no longer kept, it lists
//! again; what went in between is then told from what the list no longer has.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;
use futures::StreamExt as _;
use nexus_model::Name;
use nexus_model::kind::{GLOBAL, Home, KindDescriptor, Scope};
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Listing, encode, is_code, selector, text};
use super::output::{self, Format};
use super::resource::{self, Asked};
use super::table::{Columns, KindTable};
use crate::client::ClientError;
use crate::exit::{Exit, Fail};

/// Shows objects, once or as they change
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus get apps\n  \
    nexus get app web -o yaml\n  \
    nexus get instances -l tier=front -o wide\n  \
    nexus get instances -A -w\n  \
    nexus get app/web host/zone-a-1\n  \
    nexus get apps --region all\n\n\
    With -w and -o json, each line is {\"event\": \"put\" or \"delete\", \"object\": {…}}.")]
pub struct GetArgs {
    /// KIND [NAME…], or KIND/NAME…; a kind in any case, whole, in plural or short
    #[arg(required = true, value_name = "KIND [NAME]")]
    what: Vec<String>,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Goes on and shows each change
    #[arg(short, long)]
    watch: bool,
    /// Labels that must hold, such as tier=front,!old
    #[arg(short = 'l', long, value_name = "SELECTOR", value_parser = selector)]
    selector: Option<String>,
    /// Over all projects
    #[arg(short = 'A', long)]
    all_projects: bool,
    /// Also what was deleted and is still being torn down
    #[arg(long, conflicts_with = "watch")]
    deleting: bool,
    /// At most so many; without it, all
    #[arg(long, value_name = "N", conflicts_with = "watch", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(args: &GetArgs) -> anyhow::Result<()> {
    let asked = resource::parse(&args.what)?;
    let cloud = Cloud::connect(&args.cloud)?;
    if all_regions(args) && (args.watch || args.limit.is_some() || args.output == Format::Name) {
        return Err(Fail::usage("--region all can't be combined with -w, --limit or -o name").into());
    }
    if args.watch {
        let [one] = asked.as_slice() else {
            return Err(Fail::usage("--watch takes one kind").into());
        };
        return watch(&cloud, args, one).await;
    }
    let named = asked.iter().any(|a| !a.names.is_empty());
    if named && (args.selector.is_some() || args.deleting || args.all_projects || args.limit.is_some()) {
        return Err(Fail::usage("names can't be combined with -l, -A, --deleting or --limit").into());
    }
    let table = matches!(args.output, Format::Table | Format::Wide);
    for (i, one) in asked.iter().enumerate() {
        if table && asked.len() > 1 && i > 0 {
            output::text("")?;
        }
        let kind = one.kind();
        match (all_regions(args) && kind.scope != Scope::Global, one.names.is_empty()) {
            (true, _) => everywhere(&cloud, args, one).await?,
            (false, true) => list(&cloud, args, kind).await?,
            (false, false) => named_ones(&cloud, args, one).await?,
        }
    }
    Ok(())
}

/// `nexus image list`.
pub async fn images(cloud: &CloudArgs, output: Format) -> anyhow::Result<()> {
    let args = GetArgs {
        what: vec!["images".into()],
        output,
        watch: false,
        selector: None,
        all_projects: false,
        deleting: false,
        limit: None,
        cloud: cloud.clone(),
    };
    run(&args).await
}

fn columns(args: &GetArgs) -> Columns {
    Columns {
        wide: args.output == Format::Wide,
        project: args.all_projects,
        deleting: args.deleting,
        region: all_regions(args),
    }
}

fn listing(args: &GetArgs) -> Listing {
    Listing {
        all_projects: args.all_projects,
        selector: args.selector.clone(),
        deleting: args.deleting,
        ..Listing::default()
    }
}

/// Stands for every region; none can have this name.
const ALL: &str = "all";

fn all_regions(args: &GetArgs) -> bool {
    args.cloud.region.as_ref().is_some_and(|r| *r == *ALL)
}

/// A kind's objects in every region, and in `global` where they can be there too. A region that can't be asked is named and
/// does not hide the others.
async fn everywhere(cloud: &Cloud, args: &GetArgs, asked: &Asked) -> anyhow::Result<()> {
    let kind = asked.kind();
    let global = GLOBAL.parse().expect("a well-formed name");
    let mut regions = if kind.home == Home::Global { Vec::new() } else { cloud.regions().await? };
    if kind.home != Home::Region {
        regions.insert(0, global);
    }
    let mut items = Vec::new();
    let mut unheard = None;
    for region in regions {
        let listing = Listing { region: Some(region.clone()), ..listing(args) };
        let wanted = |o: &Value| asked.names.is_empty() || asked.names.iter().any(|n| *n == text(o, "/metadata/name"));
        match cloud.list(kind, &listing, wanted).await {
            Ok((mut found, _)) => items.append(&mut found),
            Err(e) => {
                output::note(&format!("region {region}: {e}"));
                unheard = Some(e);
            }
        }
    }
    match args.output {
        Format::Json => output::json(&output::list_of(kind.kind, &items))?,
        Format::Yaml => output::yaml(&output::list_of(kind.kind, &items))?,
        _ if items.is_empty() => output::note(&format!("there are no {}", kind.plural)),
        _ => {
            let mut table = KindTable::new(kind, columns(args));
            output::text(&table.rows(items.iter().map(|o| (o, false)), cloud.now()))?;
        }
    }
    unheard.map_or(Ok(()), |e| Err(e.into()))
}

async fn named_ones(cloud: &Cloud, args: &GetArgs, asked: &Asked) -> anyhow::Result<()> {
    let kind = asked.kind();
    let mut items = Vec::new();
    for name in &asked.names {
        items.push(cloud.get(kind, name).await?);
    }
    match (args.output, items.as_slice()) {
        (Format::Json, [one]) => output::json(one),
        (Format::Yaml, [one]) => output::yaml(one),
        (Format::Json, many) => output::json(&output::list_of(kind.kind, many)),
        (Format::Yaml, many) => output::yaml(&output::list_of(kind.kind, many)),
        (Format::Name, many) => names(kind, many),
        (Format::Table | Format::Wide, many) => {
            let mut table = KindTable::new(kind, columns(args));
            output::text(&table.rows(many.iter().map(|o| (o, false)), cloud.now()))
        }
    }
}

fn names(kind: &KindDescriptor, items: &[Value]) -> anyhow::Result<()> {
    items.iter().try_for_each(|o| output::text(&resource::title(kind, text(o, "/metadata/name"))))
}

async fn list(cloud: &Cloud, args: &GetArgs, kind: &'static KindDescriptor) -> anyhow::Result<()> {
    let mut table = KindTable::new(kind, columns(args));
    let mut left = args.limit.map_or(usize::MAX, |n| n as usize);
    let mut whole = Vec::new();
    let (mut cursor, mut any) = (None::<String>, false);
    loop {
        let mut page = cloud.page(kind, &listing(args), left, cursor.as_deref()).await?;
        page.items.truncate(left);
        left -= page.items.len();
        any |= !page.items.is_empty();
        match args.output {
            Format::Json | Format::Yaml => whole.append(&mut page.items),
            Format::Name => names(kind, &page.items)?,
            Format::Table | Format::Wide if page.items.is_empty() => {}
            Format::Table | Format::Wide => {
                output::text(&table.rows(page.items.iter().map(|o| (o, false)), cloud.now()))?;
            }
        }
        cursor = page.metadata.cursor;
        if cursor.is_none() {
            break;
        }
        if left == 0 {
            output::note(&format!("there may be more {}: raise --limit", kind.plural));
            break;
        }
    }
    match args.output {
        Format::Json => output::json(&output::list_of(kind.kind, &whole)),
        Format::Yaml => output::yaml(&output::list_of(kind.kind, &whole)),
        Format::Table | Format::Wide if !any => {
            let project = &cloud.target.project;
            let place = if args.all_projects || kind.scope != Scope::Project {
                String::new()
            } else {
                format!(" in project {project}")
            };
            output::note(&format!("there are no {}{place}", kind.plural));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Identifies an object in a watch.
fn identity(object: &Value) -> (String, String) {
    (text(object, "/metadata/project").to_owned(), text(object, "/metadata/name").to_owned())
}

async fn watch(cloud: &Cloud, args: &GetArgs, asked: &Asked) -> anyhow::Result<()> {
    let kind = asked.kind();
    let mut table = KindTable::new(kind, columns(args));
    let wanted = |o: &Value| asked.names.is_empty() || asked.names.iter().any(|n| *n == text(o, "/metadata/name"));
    follow(cloud, kind, &listing(args), None, |change| {
        if !wanted(change.object) {
            return Ok(());
        }
        match args.output {
            Format::Table | Format::Wide => output::text(&table.rows([(change.object, change.deleted)], cloud.now())),
            Format::Json => {
                let event = if change.deleted { "delete" } else { "put" };
                output::text(&json!({"event": event, "object": change.object}).to_string())
            }
            Format::Yaml => output::text("---").and_then(|()| output::yaml(change.object)),
            Format::Name => names(kind, std::slice::from_ref(change.object)),
        }
    })
    .await
}

/// What a watch saw.
pub struct Change<'a> {
    pub object: &'a Value,
    pub deleted: bool,
}

const PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// So long nobody may answer before the watch gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// Tells every object of a list and then every change, until `tell` fails. With `from`, only what changed after that
/// revision.
pub async fn follow(
    cloud: &Cloud,
    kind: &'static KindDescriptor,
    listing: &Listing,
    from: Option<u64>,
    mut tell: impl FnMut(Change<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut at = from;
    let mut known: BTreeSet<(String, String)> = BTreeSet::new();
    let mut pause = PAUSE;
    let mut silent_since = tokio::time::Instant::now();
    loop {
        let answer = match at {
            None => relist(cloud, kind, listing, &mut known, &mut tell).await?.map(|revision| at = Some(revision)),
            Some(revision) => stream(cloud, kind, listing, revision, &mut at, &mut known, &mut tell).await?,
        };
        match answer {
            Ok(()) => {
                silent_since = tokio::time::Instant::now();
                pause = PAUSE;
            }
            Err(e) if is_code(&e, "compacted") => at = None,
            Err(e) if !matches!(e.exit(), Exit::Unavailable) && !matches!(e, ClientError::Unreadable { .. }) => {
                return Err(e.into());
            }
            // A server that stops or breaks off: another takes over.
            Err(e) if silent_since.elapsed() > PATIENCE => return Err(e.into()),
            Err(_) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

type Told = anyhow::Result<Result<(), ClientError>>;

async fn relist(
    cloud: &Cloud,
    kind: &'static KindDescriptor,
    listing: &Listing,
    known: &mut BTreeSet<(String, String)>,
    tell: &mut impl FnMut(Change<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Result<u64, ClientError>> {
    let (items, revision) = match cloud.list(kind, listing, |_| true).await {
        Ok(listed) => listed,
        Err(e) => return Ok(Err(e)),
    };
    let now: BTreeSet<_> = items.iter().map(identity).collect();
    for (project, name) in known.difference(&now) {
        // Only that it went is known, not its last state.
        let gone = json!({"kind": kind.kind, "metadata": {"name": name, "project": project}});
        tell(Change { object: &gone, deleted: true })?;
    }
    *known = now;
    items.iter().try_for_each(|object| tell(Change { object, deleted: false }))?;
    Ok(Ok(revision))
}

async fn stream(
    cloud: &Cloud,
    kind: &'static KindDescriptor,
    listing: &Listing,
    revision: u64,
    at: &mut Option<u64>,
    known: &mut BTreeSet<(String, String)>,
    tell: &mut impl FnMut(Change<'_>) -> anyhow::Result<()>,
) -> Told {
    let mut path = format!("{}?watch={revision}", cloud.collection(kind, listing));
    if let Some(selector) = &listing.selector {
        path.push_str(&format!("&labels={}", encode(selector)));
    }
    let mut events = match cloud.client.events(&path).await {
        Ok(events) => events,
        Err(e) => return Ok(Err(e)),
    };
    let mut heard = false;
    loop {
        // The server says something every few seconds, if only how far it is.
        let event = match tokio::time::timeout(Duration::from_secs(60), events.next()).await {
            Ok(Some(Ok(event))) => event,
            Ok(Some(Err(e))) if !heard => return Ok(Err(e)),
            // It was a good stream, and it ended.
            _ => return Ok(Ok(())),
        };
        heard = true;
        let object: Value = serde_json::from_str(&event.data).unwrap_or_default();
        let deleted = event.event == "delete";
        match event.event.as_str() {
            "put" | "delete" => {
                if deleted {
                    known.remove(&identity(&object));
                } else {
                    known.insert(identity(&object));
                }
                tell(Change { object: &object, deleted })?;
            }
            "error" => {
                let status = object["status"].as_u64().and_then(|s| u16::try_from(s).ok()).unwrap_or(503);
                let status = reqwest::StatusCode::from_u16(status).unwrap_or(reqwest::StatusCode::SERVICE_UNAVAILABLE);
                let problem = crate::client::Problem { status, document: Some(object), text: event.data };
                return Ok(Err(ClientError::Refused(Box::new(problem))));
            }
            _ => {}
        }
        if let Some(id) = event.id.and_then(|id| id.parse().ok()) {
            *at = Some(id);
        }
    }
}

/// The names of a kind's objects that a selector chooses.
pub async fn select(cloud: &Cloud, kind: &'static KindDescriptor, selector: &str) -> anyhow::Result<Vec<Name>> {
    let listing = Listing { selector: Some(selector.to_owned()), ..Listing::default() };
    let (items, _) = cloud.list(kind, &listing, |_| true).await?;
    items.iter().map(super::cloud::name_of).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use nexus_model::kind;

    use super::*;
    use crate::client::Client;
    use crate::context::Target;

    /// Answers each request with the next of `answers`, and tells what was asked.
    fn server(answers: &'static [&'static str]) -> (String, std::sync::mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).unwrap();
                asked
                    .send(String::from_utf8_lossy(&buffer[..n]).lines().next().unwrap_or_default().to_owned())
                    .unwrap();
                write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{answer}").unwrap();
            }
        });
        (url, heard)
    }

    #[tokio::test]
    async fn a_watch_goes_on_where_it_was_and_lists_again_when_that_is_gone() {
        let (url, heard) = server(&[
            r#"{"metadata":{"revision":5},"items":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"}}]}"#,
            "id: 7\nevent: put\ndata: {\"metadata\":{\"name\":\"c\"}}\n\n",
            "id: 7\nevent: error\ndata: {\"code\":\"compacted\",\"status\":410}\n\n",
            r#"{"metadata":{"revision":9},"items":[{"metadata":{"name":"a"}},{"metadata":{"name":"d"}}]}"#,
            "id: 10\nevent: delete\ndata: {\"metadata\":{\"name\":\"a\"}}\n\n",
        ]);
        let name = |n: &str| n.parse().unwrap();
        let target = Target {
            endpoints: vec![url],
            ca: None,
            token: None,
            session: None,
            region: name("local"),
            project: name("default"),
            organization: name("default"),
        };
        let cloud = Cloud::for_test(Client::new(&target).unwrap(), target);
        let mut seen = Vec::new();
        let ended = follow(&cloud, kind::find("app").unwrap(), &Listing::default(), None, |change| {
            let sign = if change.deleted { "-" } else { "+" };
            seen.push(format!("{sign}{}", text(change.object, "/metadata/name")));
            if seen.len() == 8 { Err(anyhow::anyhow!("enough")) } else { Ok(()) }
        })
        .await;
        assert_eq!(ended.unwrap_err().to_string(), "enough");
        assert_eq!(seen, ["+a", "+b", "+c", "-b", "-c", "+a", "+d", "-a"]);
        let asked: Vec<String> = heard.try_iter().collect();
        let watched: Vec<bool> = asked.iter().map(|a| a.contains("watch=")).collect();
        assert_eq!(watched, [false, true, true, false, true], "{asked:?}");
        assert!(asked[1].contains("watch=5") && asked[2].contains("watch=7") && asked[4].contains("watch=9"));
    }
}
