//! `nexus deploy` and `nexus scale`: from an image to a running app in one command.

mod rollout;
mod spec;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use nexus_model::kind::{
    self, Constraints, Disruption, ImageFormat, Port, Runtime, SecretRef, Spread, TemplateNetwork, TemplateNic,
};
use nexus_model::{Bytes, Digest, MilliCpu, Name};
use serde_json::{Value, json};

use super::apply::{Outcome, diff};
use super::cloud::{Cloud, CloudArgs, Guard, is_code, text};
use super::output::{self, Format};
use super::webhook::CallbackArgs;
use super::{image, pull, resource, settle};
use crate::exit::Fail;
use spec::{Replicas, Wanted};
pub use spec::{class, secret, variable};

/// An update that others get in the way of is tried so often.
const TRIES: usize = 5;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RuntimeArg {
    Container,
    Function,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SpreadArg {
    Zone,
    FaultDomain,
    Rack,
    Host,
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NetworkArg {
    Default,
    None,
}

impl NetworkArg {
    fn wanted(self) -> TemplateNetwork {
        match self {
            Self::Default => TemplateNetwork::Default,
            Self::None => TemplateNetwork::None,
        }
    }
}

/// Runs an image as an app, or changes an app that runs
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus deploy hello --image ./hello.wasm\n  \
    nexus deploy web --image nginx.tar --replicas 3 --port 80\n  \
    nexus deploy web --image registry.example/shop/web:4 --image-secret registry\n  \
    nexus deploy web --env MODE=fast --memory 256Mi\n  \
    nexus deploy web --image nginx.tar --replicas auto\n  \
    nexus deploy web --secret DB_PASSWORD=db/password --secret /run/secrets/tls=tls\n  \
    nexus deploy web --nic front:web --nic back\n  \
    nexus deploy db --image postgres --port 5432/tcp --scratch 2Gi --spread host\n  \
    nexus deploy model --compute-class gpu-v100 --storage-class high-iops --constraints \"latency<20ms, not-with=batch\"\n  \
    nexus deploy shop --image shop.tar --region global --replicas 6\n  \
    nexus deploy web --image web-2.tar --canary 10:60s,50 --canary-header x-canary\n  \
    nexus deploy web --image web-3.tar --blue-green --progress-deadline 120\n  \
    nexus deploy web --replicas 5 --disruption min-available=4\n  \
    nexus deploy web --replicas 5 --no-wait --callback https://ci.example.com/done\n  \
    nexus deploy job --image tools --command sh -c 'sleep 1000'\n\n\
    Of an app that exists, only what is named changes. A path is imported first, as `nexus image import` does, and a \
    reference pulled, as `nexus image pull` does; the image gets the app's name.")]
pub struct DeployArgs {
    /// The app's name
    #[arg(value_parser = resource::new_name)]
    name: Name,
    /// An image of this project; a path: OCI layout, OCI or Docker archive, WebAssembly component; or a reference to an
    /// image in a registry: REGISTRY/REPOSITORY:TAG [default: the app's name]
    #[arg(long, value_name = "IMAGE|PATH|REFERENCE")]
    image: Option<String>,
    /// Of an image in a registry: the secret by which it is pulled
    #[arg(long, value_name = "NAME", value_parser = resource::new_name)]
    image_secret: Option<Name>,
    /// How many instances; `auto` leaves that to the cloud, between 1 and 10 at first: see `nexus autoscale` [default: 1]
    #[arg(long, value_name = "N|auto", value_parser = spec::replicas)]
    replicas: Option<Replicas>,
    /// A port that the app serves, as 80, 80/h2c or 5432/tcp; several times for several [default of a container: 80]
    #[arg(long = "port", value_name = "PORT[/PROTOCOL]", value_parser = spec::port)]
    ports: Vec<Port>,
    /// Sets a variable
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::variable)]
    env: Vec<(String, String)>,
    /// Gives a secret to each instance: a variable from a key, or a folder of files
    #[arg(long = "secret", value_name = "VARIABLE=NAME/KEY[@VERSION]|[PATH=]NAME[@VERSION]", value_parser = spec::secret)]
    secrets: Vec<SecretRef>,
    /// Gives each instance a NIC in a subnet, with security groups; several times for several, the first is the default route's
    #[arg(long = "nic", value_name = "SUBNET[:GROUP,…]", value_parser = spec::nic)]
    nics: Vec<TemplateNic>,
    /// Whether each instance gets a NIC in the project's default network [default: as the project says]
    #[arg(long, value_enum, conflicts_with = "nics")]
    network: Option<NetworkArg>,
    /// Sets a label of the app
    #[arg(long, value_name = "KEY=VALUE", value_parser = spec::label)]
    label: Vec<(String, String)>,
    /// Processor for each instance, as 250m, 2 or 1.5
    #[arg(long, value_name = "AMOUNT")]
    cpu: Option<MilliCpu>,
    /// Memory for each instance, as 128Mi or 2Gi
    #[arg(long, value_name = "BYTES")]
    memory: Option<Bytes>,
    /// The writable layer over the image, as 64Mi
    #[arg(long, value_name = "BYTES")]
    scratch: Option<Bytes>,
    /// Processes and threads of each instance
    #[arg(long, value_name = "N")]
    pids: Option<u32>,
    /// How it is run [default: as the image's format asks]
    #[arg(long, value_enum)]
    runtime: Option<RuntimeArg>,
    /// Across what instances are spread [default: zone]
    #[arg(long, value_enum)]
    spread: Option<SpreadArg>,
    /// A compute class that each instance takes
    #[arg(long = "compute-class", value_name = "NAME[=N]", value_parser = class)]
    classes: Vec<(Name, u32)>,
    /// The storage class of the disk that the writable layer is on
    #[arg(long, value_name = "NAME", value_parser = resource::new_name)]
    storage_class: Option<Name>,
    /// What hosts must be like, with commas between: latency<20ms, zone in (a,b), label.KEY=VALUE, spread=zone|fault-domain|rack|host,
    /// with=APP, not-with=APP, numa=single; none with an empty text
    #[arg(long, value_name = "CONSTRAINTS")]
    constraints: Option<Constraints>,
    /// An instance is ready when a GET of this path on its first port succeeds
    #[arg(long, value_name = "PATH")]
    health_path: Option<String>,
    /// Of an app of the region `global`: the regions that run it [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = resource::new_name)]
    regions: Vec<Name>,
    #[command(flatten)]
    rollout: rollout::RolloutArgs,
    /// How many instances draining a host or a rebalance may take away: max-unavailable=N|PERCENT% or
    /// min-available=N|PERCENT% [default: max-unavailable=25%]
    #[arg(long, value_name = "BUDGET", help_heading = "Rollout")]
    disruption: Option<Disruption>,
    /// In place of the image's entry point; takes the rest of the line
    #[arg(long, value_name = "WORD", num_args = 1.., allow_hyphen_values = true)]
    command: Vec<String>,
    /// In place of the image's arguments
    #[arg(last = true, value_name = "ARG")]
    args: Vec<String>,
    /// Waits until every instance is ready (the default)
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Returns when the change is committed
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
    /// How many seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// Shows what would change, and changes nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    callback: CallbackArgs,
    /// What is shown of the app in the end
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

impl DeployArgs {
    fn wanted(&self) -> Wanted {
        Wanted {
            image: None,
            runtime: self.runtime.map(|r| match r {
                RuntimeArg::Container => Runtime::Container,
                RuntimeArg::Function => Runtime::Function,
            }),
            replicas: self.replicas,
            ports: self.ports.clone(),
            env: self.env.clone(),
            labels: self.label.clone(),
            secrets: self.secrets.clone(),
            nics: self.nics.clone(),
            network: self.network.map(NetworkArg::wanted),
            cpu: self.cpu,
            memory: self.memory,
            scratch: self.scratch,
            pids: self.pids,
            command: self.command.clone(),
            args: self.args.clone(),
            spread: self.spread.map(|s| match s {
                SpreadArg::Zone => Spread::Zone,
                SpreadArg::FaultDomain => Spread::FaultDomain,
                SpreadArg::Rack => Spread::Rack,
                SpreadArg::Host => Spread::Host,
                SpreadArg::None => Spread::None,
            }),
            classes: self.classes.clone(),
            storage_class: self.storage_class.clone(),
            constraints: self.constraints.clone(),
            health_path: self.health_path.clone(),
            regions: self.regions.clone(),
            rollout: self.rollout.wanted(),
            disruption: self.disruption,
        }
    }
}

/// What `--image` means.
#[derive(Debug, PartialEq, Eq)]
pub enum ImageArg {
    File(PathBuf),
    Name(Name),
    /// In a registry.
    Reference(String),
}

/// An existing path is a file to import, except a folder that is no image but has a name that an image could have.
pub fn image_arg(text: &str) -> Result<ImageArg, Fail> {
    let path = Path::new(text);
    let name = text.parse::<Name>();
    if path.exists() {
        let other_folder = path.is_dir() && !path.join("index.json").exists();
        return Ok(match name {
            Ok(name) if other_folder => ImageArg::Name(name),
            _ => ImageArg::File(path.to_owned()),
        });
    }
    if name.is_err() && pull::is_reference(text) {
        return Ok(ImageArg::Reference(text.to_owned()));
    }
    name.map(ImageArg::Name).map_err(|e| {
        if text.contains(['/', '.']) {
            Fail::not_found(format!("--image {text}: there is no such file"))
        } else {
            Fail::usage(format!("--image {text}: {e}"))
        }
    })
}

pub async fn deploy(args: &DeployArgs) -> anyhow::Result<()> {
    let image_arg = args.image.as_deref().map(image_arg).transpose()?;
    if args.image_secret.is_some() && !matches!(image_arg, Some(ImageArg::Reference(_))) {
        return Err(Fail::usage("--image-secret is for an image in a registry: --image REGISTRY/REPOSITORY:TAG").into());
    }
    let cloud = Cloud::connect(&args.cloud)?;
    let kind = kind::find("app").expect("a kind");
    let mut wanted = args.wanted();
    let mut imported = None;
    match image_arg {
        Some(ImageArg::Name(name)) => wanted.image = Some(name),
        Some(ImageArg::File(path)) => {
            wanted.image = Some(args.name.clone());
            let content = image::read(&path).await?;
            if !args.dry_run {
                say_how(&cloud, &args.name, &wanted).await?;
                image::upload(&cloud, &args.name, &content).await?;
            }
            imported = Some((content.format, content.digest));
        }
        Some(ImageArg::Reference(reference)) => {
            wanted.image = Some(args.name.clone());
            // A dry run fetches nothing: registries have containers' images.
            let mut format = ImageFormat::Oci;
            let mut digest = Digest::of(b"");
            if !args.dry_run {
                let (_, spec) = pull::pull(&cloud, &args.name, &reference, args.image_secret.as_ref()).await?;
                (format, digest) = (spec.format, spec.digest);
            }
            imported = Some((format, digest));
        }
        None => {}
    }
    // The image is not what is waited for.
    let cloud = cloud.calling_back(&args.callback);
    let path = cloud.object(kind, &args.name);
    let title = resource::title(kind, args.name.as_str());
    let (before, object) = send(&cloud, args, &wanted, imported.map(|(format, _)| format), &path).await?;
    let outcome = Outcome::of(before.as_ref(), &object);
    if args.dry_run {
        output::bytes(diff(&title, before.as_ref(), &object)?.as_bytes())?;
        return output::text(&format!("{title} {} (dry run)", outcome.word()));
    }
    let shown = matches!(args.output, Format::Table | Format::Wide);
    if shown {
        output::text(&format!("{title} {}", outcome.word()))?;
    }
    let object = if args.no_wait {
        object
    } else {
        // New content under the same name does not change the app's spec, but its instances.
        let digest = imported.map(|(_, digest)| digest.to_string());
        let timeout = Duration::from_secs(args.timeout);
        let ready = settle::wait(&cloud, kind, &path, &object, digest.as_deref(), timeout).await?;
        if shown {
            output::text(&format!("{title} is {}", settle::state(&ready)))?;
        }
        ready
    };
    match args.output {
        Format::Json => output::json(&object),
        Format::Yaml => output::yaml(&object),
        Format::Name => output::text(&title),
        // The first name is the shortest.
        Format::Table | Format::Wide => cloud.urls(&object).first().map_or(Ok(()), |url| output::text(url)),
    }
}

/// New content under the image's name begins a rollout by itself: how it is to go has to be said before.
async fn say_how(cloud: &Cloud, name: &Name, wanted: &Wanted) -> anyhow::Result<()> {
    let path = cloud.object(kind::find("app").expect("a kind"), name);
    if !wanted.rollout.is_empty() && cloud.find(&path).await?.is_some() {
        cloud.client.patch::<_, Value>(&path, &json!({"spec": {"rollout": wanted.rollout}})).await?;
    }
    Ok(())
}

/// Creates or changes the app, again when another change came in between. Answers it as it was and as it is.
async fn send(
    cloud: &Cloud,
    args: &DeployArgs,
    wanted: &Wanted,
    imported: Option<ImageFormat>,
    path: &str,
) -> anyhow::Result<(Option<Value>, Value)> {
    let mut tries = 0;
    loop {
        tries += 1;
        let before = cloud.find(path).await?;
        let format = match imported {
            Some(format) => Some(format),
            None if wanted.image.is_some() || before.is_none() => Some(format_of(cloud, args, wanted).await?),
            None => None,
        };
        let object = spec::app(&args.name, before.as_ref(), wanted, format);
        let guard = match &before {
            Some(before) => Guard::Revision(before["metadata"]["revision"].as_u64().unwrap_or(0)),
            None => Guard::New,
        };
        match cloud.put(path, &object, guard, args.dry_run).await {
            Ok(put) => return Ok((before, put.object)),
            Err(e) if tries < TRIES && (is_code(&e, "precondition-failed") || is_code(&e, "already-exists")) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The format of the image that the app is to have.
async fn format_of(cloud: &Cloud, args: &DeployArgs, wanted: &Wanted) -> anyhow::Result<ImageFormat> {
    let name = wanted.image.as_ref().unwrap_or(&args.name);
    let images = kind::find("image").expect("a kind");
    let Some(image) = cloud.find(&cloud.object(images, name)).await? else {
        return Err(Fail::not_found(format!(
            "there is no image {:?} in project {}: import it with `nexus image import PATH --name {name}`, pull it with \
             `nexus image pull REFERENCE --name {name}`, or give its file or reference with --image",
            name.as_str(),
            cloud.target.project
        ))
        .into());
    };
    serde_json::from_value(image["spec"]["format"].clone())
        .with_context(|| format!("image/{name} has the unknown format {}", image["spec"]["format"]))
}

/// Changes how many instances an app has
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus scale web --replicas 5\n  \
    nexus scale app/web --replicas 0 --wait")]
pub struct ScaleArgs {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=10_000))]
    replicas: u32,
    /// Waits until every instance is ready
    #[arg(long)]
    wait: bool,
    /// How many seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn scale(args: &ScaleArgs) -> anyhow::Result<()> {
    let kind = kind::find("app").expect("a kind");
    let text_of_name = match args.app.split_once('/') {
        Some((word, name)) if kind.answers_to(word) => name,
        Some((word, _)) => return Err(Fail::usage(format!("{word:?}: only apps are scaled")).into()),
        None => &args.app,
    };
    let name = resource::find_name(kind, text_of_name)?;
    let cloud = Cloud::connect(&args.cloud)?;
    let path = cloud.object(kind, &name);
    let before = cloud.get(kind, &name).await?;
    if before["spec"].get("autoscale").is_some_and(Value::is_object) {
        let why = format!(
            "{} is scaled by the cloud: change its bounds with `nexus autoscale set {name} --min N --max N`, or end that \
             with `nexus autoscale set {name} --off`",
            resource::title(kind, name.as_str())
        );
        return Err(Fail::usage(why).into());
    }
    let object: Value = cloud.client.patch(&path, &json!({"spec": {"replicas": args.replicas}})).await?;
    output::text(&format!("{} scaled to {}", resource::title(kind, text(&object, "/metadata/name")), args.replicas))?;
    if args.wait {
        let timeout = Duration::from_secs(args.timeout);
        settle::wait_for(&cloud, kind, &path, &object, (settle::Asked::Replicas, None), timeout).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_file_if_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.wasm");
        std::fs::write(&file, b"x").unwrap();
        assert_eq!(image_arg(file.to_str().unwrap()).unwrap(), ImageArg::File(file));
        assert_eq!(image_arg("nginx-no-such-file").unwrap(), ImageArg::Name("nginx-no-such-file".parse().unwrap()));
        let gone = image_arg("./no/such/file.tar").unwrap_err();
        assert_eq!(gone.exit, crate::exit::Exit::NotFound);
        let reference = "registry.example/shop/web:4";
        assert_eq!(image_arg(reference).unwrap(), ImageArg::Reference(reference.into()));
        assert_eq!(image_arg("No_Name").unwrap_err().exit, crate::exit::Exit::Usage);
    }

    #[test]
    fn a_command_takes_the_rest_of_the_line() {
        use clap::Parser as _;
        let words = ["nexus", "deploy", "job", "--replicas", "2", "--command", "sh", "-c", "--port"];
        let cli = crate::cli::Cli::parse_from(words);
        let crate::cli::Command::User(command) = cli.command else { panic!("a user's command") };
        let crate::cli::UserCommand::Deploy(args) = *command else { panic!("deploy") };
        assert_eq!(args.command, ["sh", "-c", "--port"]);
        assert_eq!(args.replicas, Some(Replicas::Count(2)));
    }
}
