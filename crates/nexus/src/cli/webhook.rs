//! `nexus webhook`: has a server of one's own told what happens in a project, and looks after what could not be told.

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_iam::webhook::SigningKey;
use nexus_model::Name;
use nexus_model::kind::{self, KindDescriptor, MAX_ATTEMPTS, SIGNING_KEY, SigningSecret, is_url};
use reqwest::Method;
use reqwest::header::HeaderName;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Guard, Listing, name_of, text};
use super::output::{self, Format};
use super::resource::{self, find_kind, new_name};
use super::table::{Columns, KindTable};
use crate::client::{ClientError, Parts};
use crate::exit::Fail;

/// Has a server told what happens in a project, as signed CloudEvents
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus webhook create ci --url https://ci.example.com/cloud --kind app --reason Ready\n  \
    nexus webhook create chat --url https://chat.example.com/in --secret hooks/key\n  \
    nexus webhook list\n  \
    nexus webhook test ci\n  \
    nexus webhook deliveries ci\n  \
    nexus webhook dead-letters\n  \
    nexus webhook resend 0001934f1c2d0000\n  \
    nexus webhook resend --dead ci\n  \
    nexus webhook disable ci\n  \
    nexus delete webhook ci")]
pub struct WebhookArgs {
    #[command(subcommand)]
    command: WebhookCommand,
}

#[derive(Debug, Subcommand)]
enum WebhookCommand {
    /// Makes one; without --secret also a key that signs, which is shown once and kept as the secret NAME-webhook
    Create {
        #[arg(value_parser = new_name)]
        name: Name,
        /// Where events are POSTed to
        #[arg(long, value_parser = url)]
        url: String,
        /// The secret whose value signs
        #[arg(long, value_name = "NAME[/KEY]", value_parser = SigningSecret::parse)]
        secret: Option<SigningSecret>,
        /// Events about objects of this kind only; several times for several
        #[arg(long = "kind", value_name = "KIND")]
        kinds: Vec<String>,
        /// Events with this reason only, such as Ready; several times for several
        #[arg(long = "reason", value_name = "WORD")]
        reasons: Vec<String>,
        /// How often a delivery is tried before it is given up
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_ATTEMPTS)))]
        max_attempts: Option<u32>,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Lists them, and whether what they are told is taken
    List {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Sends one something; `nexus webhook deliveries` shows what came of it
    Test {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Sends new events again
    Enable {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Tells nothing more, and gives up what waits
    Disable {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Lists what is on its way, was taken lately, or was given up
    Deliveries(DeliveriesArgs),
    /// Lists what was given up
    DeadLetters(DeliveriesArgs),
    /// Sends deliveries again
    Resend {
        #[arg(value_parser = new_name, required_unless_present_any = ["dead", "all_dead"])]
        deliveries: Vec<Name>,
        /// All dead letters of this webhook
        #[arg(long, value_name = "WEBHOOK", value_parser = new_name)]
        dead: Option<Name>,
        /// All dead letters of the project
        #[arg(long, conflicts_with = "dead")]
        all_dead: bool,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

#[derive(Debug, Args)]
struct DeliveriesArgs {
    /// Of this webhook
    #[arg(value_parser = new_name)]
    webhook: Option<Name>,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

impl DeliveriesArgs {
    async fn list(&self, which: fn(&Value) -> bool) -> anyhow::Result<()> {
        let cloud = Cloud::connect(&self.cloud)?;
        let found = find(&cloud, self.webhook.as_ref(), which).await?;
        show(&cloud, deliveries(), &found, self.output)
    }
}

/// Who is told when a change has come to its end.
#[derive(Debug, Clone, Default, Args)]
pub struct CallbackArgs {
    /// Tells a URL, as a signed CloudEvent, when the change has come to its end
    #[arg(long, value_name = "URL", value_parser = url)]
    callback: Option<String>,
    /// The secret that signs it [default: callbacks/key]
    #[arg(long, value_name = "NAME[/KEY]", requires = "callback", value_parser = SigningSecret::parse)]
    callback_secret: Option<SigningSecret>,
}

impl CallbackArgs {
    /// Adds it to a change.
    pub fn apply(&self, mut parts: Parts) -> Result<Parts, ClientError> {
        if let Some(url) = &self.callback {
            parts = parts.header(HeaderName::from_static("callback"), url)?;
        }
        if let Some(SigningSecret { name, key }) = &self.callback_secret {
            parts = parts.header(HeaderName::from_static("callback-secret"), &format!("{name}/{key}"))?;
        }
        Ok(parts)
    }
}

fn url(text: &str) -> Result<String, String> {
    let wrong = "an http:// or https:// URL with a lower-case host, without user or #";
    if is_url(text) { Ok(text.to_owned()) } else { Err(wrong.to_owned()) }
}

fn webhooks() -> &'static KindDescriptor {
    kind::find("webhooks").expect("a kind")
}

fn deliveries() -> &'static KindDescriptor {
    kind::find("deliveries").expect("a kind")
}

pub async fn run(args: &WebhookArgs) -> anyhow::Result<()> {
    match &args.command {
        WebhookCommand::Create { name, url, secret, kinds, reasons, max_attempts, cloud } => {
            let kinds: Result<Vec<&str>, Fail> = kinds.iter().map(|word| Ok(find_kind(word)?.kind)).collect();
            let mut spec = json!({"url": url, "kinds": kinds?, "reasons": reasons});
            if let Some(most) = max_attempts {
                spec["maxAttempts"] = (*most).into();
            }
            create(&Cloud::connect(cloud)?, name, secret.clone(), spec).await
        }
        WebhookCommand::List { output, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let (found, _) = cloud.list(webhooks(), &Listing::default(), |_| true).await?;
            show(&cloud, webhooks(), &found, *output)
        }
        WebhookCommand::Test { name, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let path = format!("{}:test", cloud.object(webhooks(), name));
            let sent: Value = cloud.client.json(Method::POST, &path, Parts::default()).await?;
            output::text(&format!("{} is on its way", title(&sent)))
        }
        WebhookCommand::Enable { name, cloud } => switch(cloud, name, true).await,
        WebhookCommand::Disable { name, cloud } => switch(cloud, name, false).await,
        WebhookCommand::Deliveries(args) => args.list(|_| true).await,
        WebhookCommand::DeadLetters(args) => args.list(is_dead).await,
        WebhookCommand::Resend { deliveries: names, dead, all_dead, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let mut names = names.clone();
            if *all_dead || dead.is_some() {
                let found = find(&cloud, dead.as_ref(), is_dead).await?;
                names.extend(found.iter().map(name_of).collect::<anyhow::Result<Vec<_>>>()?);
            }
            if names.is_empty() {
                output::note("there are no dead letters");
            }
            for name in &names {
                let path = format!("{}:resend", cloud.object(deliveries(), name));
                let sent: Value = cloud.client.json(Method::POST, &path, Parts::default()).await?;
                output::text(&format!("{} is on its way", title(&sent)))?;
            }
            Ok(())
        }
    }
}

fn title(delivery: &Value) -> String {
    resource::title(deliveries(), &output::plain(text(delivery, "/metadata/name")))
}

fn is_dead(delivery: &Value) -> bool {
    text(delivery, "/status/phase") == "Dead"
}

async fn find(cloud: &Cloud, webhook: Option<&Name>, keep: fn(&Value) -> bool) -> anyhow::Result<Vec<Value>> {
    let of = |d: &Value| webhook.is_none_or(|name| text(d, "/spec/webhook") == name.as_str());
    let (found, _) = cloud.list(deliveries(), &Listing::default(), |d| of(d) && keep(d)).await?;
    Ok(found)
}

fn show(cloud: &Cloud, kind: &'static KindDescriptor, found: &[Value], format: Format) -> anyhow::Result<()> {
    match format {
        Format::Json => output::json(&output::list_of(kind.kind, found)),
        Format::Yaml => output::yaml(&output::list_of(kind.kind, found)),
        Format::Name => {
            let names = found.iter().map(|o| resource::title(kind, text(o, "/metadata/name")));
            names.into_iter().try_for_each(|name| output::text(&name))
        }
        Format::Table | Format::Wide if found.is_empty() => {
            output::note(&format!("there are no such {}", kind.plural));
            Ok(())
        }
        Format::Table | Format::Wide => {
            let columns = Columns { wide: format == Format::Wide, ..Columns::default() };
            let rows = KindTable::new(kind, columns).rows(found.iter().map(|o| (o, false)), cloud.now());
            output::text(rows.trim_end())
        }
    }
}

async fn switch(cloud: &CloudArgs, name: &Name, enabled: bool) -> anyhow::Result<()> {
    let cloud = Cloud::connect(cloud)?;
    let _: Value = cloud.client.patch(&cloud.object(webhooks(), name), &json!({"spec": {"enabled": enabled}})).await?;
    output::text(&format!("webhook/{name} {}", if enabled { "enabled" } else { "disabled" }))
}

async fn create(cloud: &Cloud, name: &Name, secret: Option<SigningSecret>, mut spec: Value) -> anyhow::Result<()> {
    let path = cloud.object(webhooks(), name);
    // Before its key is replaced.
    if cloud.find(&path).await?.is_some() {
        let why = format!("webhook {name} exists already: change it with `nexus apply`, or delete it");
        return Err(Fail::new(crate::exit::Exit::Conflict, why).into());
    }
    let mut made = None;
    let secret = match secret {
        Some(secret) => secret,
        None => {
            let holder: Name = format!("{name}-webhook")
                .parse()
                .map_err(|e| Fail::usage(format!("{name}: the name of its secret would not do ({e}): use --secret")))?;
            let key = SigningKey::generate();
            let secrets = kind::find("secrets").expect("a kind");
            let object = json!({"metadata": {"name": holder}, "spec": {"data": {SIGNING_KEY: key.as_str()}}});
            let set = cloud.put(&cloud.object(secrets, &holder), &object, Guard::None, false).await;
            set.with_context(|| format!("setting the secret {holder}"))?;
            made = Some(key);
            SigningSecret::named(holder)
        }
    };
    spec["secret"] = serde_json::to_value(&secret).context("writing the request")?;
    cloud.put(&path, &json!({"metadata": {"name": name}, "spec": spec}), Guard::New, false).await?;
    output::note(&format!("webhook/{name} created; it is signed with secret {}, key {}", secret.name, secret.key));
    match made {
        None => Ok(()),
        Some(key) => {
            output::note("its signing key, for the receiver:");
            output::text(&key)
        }
    }
}
