//! `nexus token`: bearer tokens of users and service accounts.

use std::time::Duration;

use clap::{Args, Subcommand};
use nexus_model::kind::{self, MAX_TOKEN_DAYS};
use nexus_model::{Name, Timestamp};
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::join::duration;
use super::output::{self, Format};
use super::resource::new_name;
use crate::client::Parts;

/// Makes and revokes tokens, by which programs act for a user or service account
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus token create pipeline --service-account deployer --for-project shop --ttl 90d\n  \
    nexus get tokens\n  \
    nexus token revoke pipeline")]
pub struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Makes one and prints its text, once
    Create {
        #[arg(value_parser = new_name)]
        name: Name,
        /// Of this service account [default: your own]
        #[arg(long, value_name = "NAME", value_parser = new_name, conflicts_with = "user")]
        service_account: Option<Name>,
        /// Of this user of the organization
        #[arg(long, value_name = "NAME", value_parser = new_name)]
        user: Option<Name>,
        /// Opens nothing but this project
        #[arg(long, value_name = "NAME", value_parser = new_name)]
        for_project: Option<Name>,
        /// How long it is good, at most 366 days
        #[arg(long, value_name = "TIME", default_value = "30d", value_parser = duration)]
        ttl: Duration,
        /// What it is for
        #[arg(long, default_value = "")]
        description: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Takes one back: it is refused at once
    Revoke {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

pub async fn run(args: &TokenArgs) -> anyhow::Result<()> {
    let tokens = kind::find("tokens").expect("a kind");
    match &args.command {
        TokenCommand::Revoke { name, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let _: Value = cloud.client.json(Method::DELETE, &cloud.object(tokens, name), Parts::default()).await?;
            output::text(&format!("token {name} opens nothing any more"))
        }
        TokenCommand::Create { name, service_account, user, for_project, ttl, description, output: format, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let most = Duration::from_secs(MAX_TOKEN_DAYS * 86_400);
            let expires: Timestamp = cloud.now().plus((*ttl).min(most));
            let holder = match (service_account, user) {
                (Some(name), _) => Some(json!({"kind": "ServiceAccount", "name": name})),
                (None, Some(name)) => Some(json!({"kind": "User", "name": name})),
                (None, None) => None,
            };
            let spec = json!({
                "holder": holder, "project": for_project, "expires": expires, "description": description,
            });
            let body = json!({"metadata": {"name": name}, "spec": spec});
            let collection = cloud.collection(tokens, &super::cloud::Listing::default());
            let made: Value = cloud.client.once(Method::POST, &collection, Parts::json(&body)?).await?;
            match format {
                Format::Json => output::json(&made),
                Format::Yaml => output::yaml(&made),
                _ => {
                    eprintln!("it is shown this once; it is good until {}", text(&made, "/spec/expires"));
                    output::text(text(&made, "/status/token"))
                }
            }
        }
    }
}
