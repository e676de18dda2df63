//! `nexus can` and `nexus policy`: who may do what, and why.

use clap::{Args, Subcommand};
use nexus_model::Name;
use nexus_model::selector::Labels;
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::output::{self, Format};
use super::resource::new_name;
use super::table::Printer;
use crate::client::Parts;
use crate::exit::Exit;

/// What is asked about.
#[derive(Debug, Args)]
struct Question {
    /// `list`, `get`, `create`, `update`, `delete`, or a verb of its own such as `exec`
    verb: String,
    /// A kind, such as `apps`, or another collection, such as `blobs`
    kind: String,
    #[arg(value_parser = new_name)]
    name: Option<Name>,
    /// Of another user, as ORGANIZATION/NAME
    #[arg(long, value_name = "ORG/NAME")]
    user: Option<String>,
    /// A label that the object has; may be given more than once
    #[arg(short = 'l', long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Asks about the organization itself instead of the context's project
    #[arg(long)]
    no_project: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

fn label(text: &str) -> Result<(String, String), String> {
    text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).ok_or_else(|| "it is KEY=VALUE".to_owned())
}

/// Says whether you may do something: `yes` and 0, or `no` and 1
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus can create apps\n  \
    nexus can exec instances web-1\n  \
    nexus can create users --org acme --no-project\n  \
    nexus can delete apps web --user acme/ada")]
pub struct CanArgs {
    #[command(flatten)]
    question: Question,
}

/// Explains decisions, and shows the words that policies are written in
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus policy explain delete apps web --user acme/ada\n  \
    nexus policy schema")]
pub struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Shows every statement that was looked at, and which decided
    Explain(Box<Question>),
    /// Shows the Cedar schema
    Schema {
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

async fn ask(question: &Question, explain: bool) -> anyhow::Result<Value> {
    let cloud = Cloud::connect(&question.cloud)?;
    let labels: Labels = question.labels.iter().cloned().collect();
    let project = Some(&cloud.target.project).filter(|_| !question.no_project);
    let mut body = json!({
        "verb": question.verb, "kind": question.kind, "organization": cloud.target.organization,
        "labels": labels, "explain": explain,
    });
    // A region's name is known only where it is one: `global` is none.
    for (field, value) in
        [("name", question.name.as_ref()), ("project", project), ("region", Some(&cloud.target.region))]
    {
        if let Some(value) = value {
            body[field] = json!(value);
        }
    }
    if let Some(user) = &question.user {
        body["user"] = json!(user);
    }
    Ok(cloud.client.once(Method::POST, "/v1/can", Parts::json(&body)?).await?)
}

fn reasons(answer: &Value) -> Vec<&str> {
    answer["by"].as_array().into_iter().flatten().map(|r| text(r, "/description")).collect()
}

/// The exit code says it too.
pub async fn can(args: &CanArgs) -> anyhow::Result<i32> {
    let answer = ask(&args.question, false).await?;
    let allowed = answer["allowed"].as_bool().unwrap_or(false);
    match args.question.output {
        Format::Json => output::json(&answer)?,
        Format::Yaml => output::yaml(&answer)?,
        _ => {
            output::text(if allowed { "yes" } else { "no" })?;
            for reason in reasons(&answer) {
                eprintln!("{reason}");
            }
            if !allowed && reasons(&answer).is_empty() {
                eprintln!("nothing permits `{}`", text(&answer, "/missingAction"));
            }
        }
    }
    Ok(if allowed { 0 } else { Exit::Failed as i32 })
}

pub async fn policy(args: &PolicyArgs) -> anyhow::Result<()> {
    let question = match &args.command {
        PolicyCommand::Explain(question) => question,
        PolicyCommand::Schema { cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let response = cloud.client.send(Method::GET, "/v1/policy-schema", Parts::default()).await?;
            return output::text(response.text().await?.trim_end());
        }
    };
    let answer = ask(question, true).await?;
    match question.output {
        Format::Json => return output::json(&answer),
        Format::Yaml => return output::yaml(&answer),
        _ => {}
    }
    let listed = |field: &str| {
        let words: Vec<_> = answer[field].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if words.is_empty() { "none".to_owned() } else { words.join(", ") }
    };
    let mut lines = String::new();
    lines.push_str(if answer["allowed"] == true { "allowed" } else { "not allowed" });
    for reason in reasons(&answer) {
        lines.push_str(&format!("\n  by {reason}"));
    }
    lines.push_str(&format!("\nroles here: {}", listed("roles")));
    lines.push_str(&format!("\nroles that would permit it: {}", listed("rolesThatWould")));
    let considered = answer["considered"].as_array().into_iter().flatten();
    let row = |c: &Value| {
        let effect = if c.pointer("/reason/permits") == Some(&Value::Bool(true)) { "permits" } else { "forbids" };
        let holds = if c["holds"] == true { "yes" } else { "no" };
        vec![effect.to_owned(), holds.to_owned(), text(c, "/reason/description").to_owned()]
    };
    let rows: Vec<_> = considered.map(row).collect();
    if !rows.is_empty() {
        lines.push_str(&format!("\n\n{}", Printer::new(&["EFFECT", "HOLDS", "STATEMENT"]).lines(rows)));
    }
    output::text(lines.trim_end())
}
