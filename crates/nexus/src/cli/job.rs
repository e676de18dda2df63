//! `nexus job`: runs work to its end, and says how it goes.

use std::time::Duration;

use clap::{Args, Subcommand};
use indexmap::IndexMap;
use nexus_model::kind::{self, KindDescriptor, MAX_BACKOFF, MAX_COMPLETIONS, MAX_DEADLINE, MAX_PARALLELISM, MAX_TTL};
use nexus_model::kind::{Classes, ImageFormat, JobSpec, Resources, SecretRef, Template};
use nexus_model::{API_VERSION, Bytes, MilliCpu, Name};
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Guard, Listing, is_code, text};
use super::deploy::{ImageArg, image_arg};
use super::output::{self, plain};
use super::resource::{self, new_name};
use super::table::{Columns, KindTable};
use super::{deploy, image, pull, settle};
use crate::exit::{Exit, Fail};

/// Runs work that comes to an end: once, often, in parts
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus job run report --image tools --command /bin/report --yesterday\n  \
    nexus job run resize --image tools --completions 100 --parallelism 10 --indexed --wait\n  \
    nexus job run import --image tools --retries 5 --deadline 600 --wait\n  \
    nexus job list\n  \
    nexus job cancel resize\n  \
    nexus logs job/resize\n  \
    nexus describe job resize\n  \
    nexus delete job resize\n\n\
    An instance of an indexed job finds its number, from 0, in NEXUS_JOB_INDEX. What was running on a host that is lost runs \
    again: let work be such that doing it twice does no harm.")]
pub struct JobArgs {
    #[command(subcommand)]
    command: JobCommand,
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    /// Makes a job
    Run(Box<RunArgs>),
    /// Lists the jobs
    List {
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Stops a job: what runs of it is ended, what it wrote is kept
    Cancel {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

/// What each instance runs, and how often.
#[derive(Debug, Args)]
pub struct WorkArgs {
    /// An image of this project; a path: OCI layout, OCI or Docker archive; or a reference to an image in a registry:
    /// REGISTRY/REPOSITORY:TAG [default: the name]
    #[arg(long, value_name = "IMAGE|PATH|REFERENCE")]
    image: Option<String>,
    /// Of an image in a registry: the secret by which it is pulled
    #[arg(long, value_name = "NAME", value_parser = resource::new_name)]
    image_secret: Option<Name>,
    /// Successes that are wanted
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_COMPLETIONS)))]
    completions: u32,
    /// Instances at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PARALLELISM)))]
    parallelism: u32,
    /// Numbers the parts of the work, from 0, in NEXUS_JOB_INDEX
    #[arg(long)]
    indexed: bool,
    /// Failed instances that are replaced, after ever longer pauses, before the job is given up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_BACKOFF)))]
    retries: u32,
    /// The job has failed if it has not finished after so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_DEADLINE)))]
    deadline: Option<u32>,
    /// The job is deleted so many seconds after it finished
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_TTL)))]
    ttl: u32,
    /// Sets a variable
    #[arg(long, value_name = "KEY=VALUE", value_parser = deploy::variable)]
    env: Vec<(String, String)>,
    /// Gives a secret to each instance: a variable from a key, or a folder of files
    #[arg(long = "secret", value_name = "VARIABLE=NAME/KEY[@VERSION]|[PATH=]NAME[@VERSION]", value_parser = deploy::secret)]
    secrets: Vec<SecretRef>,
    /// Processor for each instance, as 250m, 2 or 1.5
    #[arg(long, value_name = "AMOUNT")]
    cpu: Option<MilliCpu>,
    /// Memory for each instance, as 128Mi or 2Gi
    #[arg(long, value_name = "BYTES")]
    memory: Option<Bytes>,
    /// The writable layer over the image, as 64Mi
    #[arg(long, value_name = "BYTES")]
    scratch: Option<Bytes>,
    /// A compute class that each instance takes
    #[arg(long = "compute-class", value_name = "NAME[=N]", value_parser = deploy::class)]
    classes: Vec<(Name, u32)>,
    /// In place of the image's entry point; takes the rest of the line
    #[arg(long, value_name = "WORD", num_args = 1.., allow_hyphen_values = true)]
    command: Vec<String>,
    /// In place of the image's arguments
    #[arg(last = true, value_name = "ARG")]
    args: Vec<String>,
}

/// Whether a job's end is waited for.
#[derive(Debug, Args)]
pub struct PatienceArgs {
    /// Waits until it has finished; fails if it fails
    #[arg(long)]
    wait: bool,
    /// How many seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 3_600)]
    timeout: u64,
}

impl PatienceArgs {
    pub fn patience(&self) -> Option<Duration> {
        self.wait.then(|| Duration::from_secs(self.timeout))
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    patience: PatienceArgs,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub fn jobs() -> &'static KindDescriptor {
    kind::find("jobs").expect("a kind")
}

impl WorkArgs {
    /// The job that the flags ask for. An image that is a file is imported under `name`.
    pub async fn spec(&self, cloud: &Cloud, name: &Name) -> anyhow::Result<JobSpec> {
        let image = self.image.as_deref().map(image_arg).transpose()?;
        if self.image_secret.is_some() && !matches!(image, Some(ImageArg::Reference(_))) {
            let why = "--image-secret is for an image in a registry: --image REGISTRY/REPOSITORY:TAG";
            return Err(Fail::usage(why).into());
        }
        let image = match image {
            None => name.clone(),
            Some(ImageArg::Name(name)) => name,
            Some(ImageArg::File(path)) => {
                let content = image::read(&path).await?;
                if content.format != ImageFormat::Oci {
                    return Err(Fail::usage("a function does not run to an end: use a container's image").into());
                }
                image::upload(cloud, name, &content).await?;
                name.clone()
            }
            Some(ImageArg::Reference(reference)) => {
                pull::pull(cloud, name, &reference, self.image_secret.as_ref()).await?;
                name.clone()
            }
        };
        let usual = Resources::default();
        let template = Template {
            image,
            command: self.command.clone(),
            args: self.args.clone(),
            env: self.env.iter().cloned().collect::<IndexMap<_, _>>(),
            secrets: self.secrets.clone(),
            resources: Resources {
                cpu: self.cpu.unwrap_or(usual.cpu),
                memory: self.memory.unwrap_or(usual.memory),
                scratch: self.scratch.unwrap_or(usual.scratch),
                ..usual
            },
            classes: self.classes.iter().cloned().collect::<Classes>(),
            ..Template::default()
        };
        Ok(JobSpec {
            template,
            completions: self.completions,
            parallelism: self.parallelism,
            indexed: self.indexed,
            backoff_limit: self.retries,
            active_deadline_seconds: self.deadline,
            ttl_seconds_after_finished: self.ttl,
            cancelled: false,
        })
    }
}

/// A new object of a kind, as it is sent.
pub fn object<K: kind::Kind>(name: &Name, spec: &K::Spec) -> Value {
    json!({"apiVersion": API_VERSION, "kind": K::KIND, "metadata": {"name": name}, "spec": spec})
}

/// Makes a new object, or says that its name is taken.
pub async fn make(cloud: &Cloud, kind: &'static KindDescriptor, name: &Name, object: &Value) -> anyhow::Result<Value> {
    match cloud.put(&cloud.object(kind, name), object, Guard::New, false).await {
        Ok(put) => Ok(put.object),
        Err(e) if is_code(&e, "precondition-failed") || is_code(&e, "already-exists") => {
            let title = resource::title(kind, name.as_str());
            Err(Fail::conflict(format!("{title} exists already: choose another name, or `nexus delete {title}` first"))
                .into())
        }
        Err(e) => Err(e.into()),
    }
}

pub async fn run(args: &JobArgs) -> anyhow::Result<()> {
    match &args.command {
        JobCommand::Run(args) => {
            let cloud = Cloud::connect(&args.cloud)?;
            let spec = args.work.spec(&cloud, &args.name).await?;
            let made = make(&cloud, jobs(), &args.name, &object::<kind::Job>(&args.name, &spec)).await?;
            output::text(&format!("{} created", resource::title(jobs(), args.name.as_str())))?;
            match args.patience.patience() {
                Some(patience) => wait(&cloud, made, patience).await,
                None => Ok(()),
            }
        }
        JobCommand::List { cloud } => list(&Cloud::connect(cloud)?, jobs()).await,
        JobCommand::Cancel { name, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let path = cloud.object(jobs(), name);
            let job: Value = cloud.client.patch(&path, &json!({"spec": {"cancelled": true}})).await?;
            let word = if text(&job, "/status/finished").is_empty() { "cancelled" } else { "had finished" };
            output::text(&format!("{} {word}", resource::title(jobs(), name.as_str())))
        }
    }
}

/// Lists the objects of a kind as a table.
pub async fn list(cloud: &Cloud, kind: &'static KindDescriptor) -> anyhow::Result<()> {
    let (found, _) = cloud.list(kind, &Listing::default(), |_| true).await?;
    if found.is_empty() {
        output::note(&format!("there are no {} in project {}", kind.plural, cloud.target.project));
        return Ok(());
    }
    let rows = found.iter().map(|object| (object, false));
    output::text(&KindTable::new(kind, Columns::default()).rows(rows, cloud.now()))
}

/// Waits until a job has finished; its failure is this command's.
pub async fn wait(cloud: &Cloud, made: Value, timeout: Duration) -> anyhow::Result<()> {
    let name = super::cloud::name_of(&made)?;
    let (path, title) = (cloud.object(jobs(), &name), resource::title(jobs(), name.as_str()));
    let advice = format!("{title} goes on; `nexus job cancel {name}` stops it");
    let ended = settle::follow(cloud, &path, &title, &made, timeout, &advice, async |job, progress| {
        progress.say(&format!("{title}: {}", settle::state(job)));
        Ok((!text(job, "/status/finished").is_empty()).then(|| job.clone()))
    });
    let Some(job) = ended.await? else {
        let message = format!("{title} has not finished after {} seconds; it goes on", timeout.as_secs());
        return Err(Fail::unavailable(message).into());
    };
    if text(&job, "/status/phase") == "Complete" {
        return output::text(&format!("{title} is {}", settle::state(&job)));
    }
    let conditions = job["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let why = conditions.iter().find(|c| c["type"] == "Complete");
    let why = why.map(|c| format!("{}: {}", text(c, "/reason"), text(c, "/message"))).unwrap_or_default();
    let message = format!("{title} has failed: {}\n  `nexus logs {title}` shows what it wrote", plain(&why));
    Err(Fail::new(Exit::Failed, message).into())
}
