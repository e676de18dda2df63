//! `nexus user invite`: brings somebody into an organization.

use clap::{Args, Subcommand};
use nexus_iam::policy::Role;
use nexus_model::Name;
use nexus_model::kind;
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, Listing, text};
use super::output::{self, Format};
use super::resource::new_name;
use crate::client::{ClientError, Parts};

/// Brings people into an organization
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus user invite ada --org acme --role editor --over shop\n  \
    nexus user invite ada --org acme        # a new password for one who forgot theirs")]
pub struct UserArgs {
    #[command(subcommand)]
    command: UserVerb,
}

#[derive(Debug, Subcommand)]
enum UserVerb {
    /// Makes a user if there is none of that name, and an invitation by which they set their password
    Invite {
        #[arg(value_parser = new_name)]
        name: Name,
        /// Also gives them a role: owner, admin, editor, viewer, auditor or billing
        #[arg(long)]
        role: Option<Role>,
        /// Gives the role over this project only
        #[arg(long, value_name = "PROJECT", value_parser = new_name, requires = "role")]
        over: Option<Name>,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

/// Makes an object unless there is one of its name.
async fn make(cloud: &Cloud, word: &str, body: &Value) -> anyhow::Result<()> {
    let collection = cloud.collection(kind::find(word).expect("a kind"), &Listing::default());
    match cloud.client.json::<Value>(Method::POST, &collection, Parts::json(body)?).await {
        Ok(_) => Ok(()),
        Err(ClientError::Refused(problem)) if problem.status.as_u16() == 409 => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub async fn run(args: &UserArgs) -> anyhow::Result<()> {
    let UserVerb::Invite { name, role, over, output: format, cloud } = &args.command;
    let cloud = Cloud::connect(cloud)?;
    make(&cloud, "users", &json!({"metadata": {"name": name}, "spec": {}})).await?;
    if let Some(role) = role {
        let over_what = over.as_ref().map_or_else(String::new, |p| format!("-{p}"));
        let binding = format!("{name}-{role}{over_what}");
        let mut spec = json!({"role": role, "subjects": [{"kind": "User", "name": name}]});
        if let Some(project) = over {
            spec["project"] = json!(project);
        }
        make(&cloud, "role-bindings", &json!({"metadata": {"name": binding}, "spec": spec})).await?;
    }
    let at = format!("{}:invite", cloud.object(kind::find("users").expect("a kind"), name));
    let invited: Value = cloud.client.once(Method::POST, &at, Parts::default()).await?;
    match format {
        Format::Json => output::json(&invited),
        Format::Yaml => output::yaml(&invited),
        _ => {
            eprintln!("good once, until {}; {name} signs in with:", text(&invited, "/expires"));
            let endpoint = cloud.client.endpoints().next().unwrap_or_default();
            let (user, invitation) = (text(&invited, "/user"), text(&invited, "/invitation"));
            output::text(&format!("nexus login {endpoint} --user {user} --invitation {invitation}"))
        }
    }
}
