//! `nexus login`, `logout`, `whoami` and `password`: who the command line is.

use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use nexus_iam::TokenSecret;
use nexus_model::Name;
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::federated;
use super::output::{self, Format};
use super::table::Printer;
use crate::client::{Client, ClientError, Parts};
use crate::context::{self, Context};
use crate::exit::Fail;
use crate::session::{self, Session};

/// The longest password that is read.
const MAX_PASSWORD: u64 = 4096;

/// Signs a user in; further commands act as that user
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus login --user acme/ada\n  \
    nexus login https://cloud.example.org --user acme/ada\n  \
    nexus login --user acme/ada --invitation cnx_…    # sets the password\n  \
    pass cloud | nexus login --user acme/ada --password-stdin\n  \
    nexus login --org acme --provider corp            # by the browser\n  \
    nexus login --org acme --provider ci --exchange-token id.jwt    # in a pipeline")]
pub struct LoginArgs {
    /// Where the cloud is [default: the context's]
    #[arg(value_name = "URL")]
    endpoint: Option<String>,
    /// The user, as ORGANIZATION/NAME
    #[arg(long, value_name = "ORG/NAME", value_parser = user_arg, required_unless_present = "provider")]
    user: Option<User>,
    /// Signs in by an identity provider of the organization: the browser does the rest
    #[arg(long, value_name = "NAME", value_parser = super::resource::new_name, conflicts_with_all = ["user", "invitation", "otp", "password_stdin"])]
    provider: Option<Name>,
    /// The organization that has the provider [default: the context's]
    #[arg(long, alias = "organization", value_name = "NAME", value_parser = super::resource::new_name, requires = "provider")]
    org: Option<Name>,
    /// Becomes a service account by a CI system's token, which is in this file or is standard input (`-`)
    #[arg(long, value_name = "FILE", requires = "provider")]
    exchange_token: Option<PathBuf>,
    /// Sets a new password by an invitation, which is good once
    #[arg(long, value_name = "TEXT", value_parser = invitation_arg)]
    invitation: Option<String>,
    /// The code of the second factor, or a recovery code [default: asked for where there is one]
    #[arg(long, value_name = "CODE")]
    otp: Option<String>,
    /// Reads the password from standard input instead of the terminal
    #[arg(long)]
    password_stdin: bool,
    /// The authority to trust, in PEM [default: the context's, or the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The region of further commands [default: the context's, or `local`]
    #[arg(long, value_name = "NAME", value_parser = super::resource::new_name)]
    region: Option<Name>,
    /// The project of further commands [default: the context's, or `default`]
    #[arg(short, long, value_name = "NAME", value_parser = super::resource::new_name)]
    project: Option<Name>,
}

/// Ends the session that `nexus login` began
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nexus logout")]
pub struct LogoutArgs {}

/// Shows who the cloud takes you for, and which roles you have
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nexus whoami\n  nexus whoami -o json")]
pub struct WhoAmIArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Changes your password, and ends your other sessions
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nexus password")]
pub struct PasswordArgs {
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Begins a second factor: one-time codes of an authenticator that are asked for beside the password
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nexus second-factor")]
pub struct SecondFactorArgs {
    #[command(flatten)]
    cloud: CloudArgs,
}

/// A user as the command line names it.
#[derive(Debug, Clone)]
pub struct User {
    organization: Name,
    name: Name,
}

fn user_arg(text: &str) -> Result<User, String> {
    let (organization, name) = text.split_once('/').ok_or("it is ORGANIZATION/NAME, such as acme/ada")?;
    let read = |part: &str| part.parse::<Name>().map_err(|e| e.to_string());
    Ok(User { organization: read(organization)?, name: read(name)? })
}

fn invitation_arg(text: &str) -> Result<String, String> {
    TokenSecret::parse(text).map(|s| s.reveal()).map_err(|e| e.to_string())
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.organization, self.name)
    }
}

/// Keeps what is typed from being shown until it is dropped.
struct Quiet(Termios);

impl Quiet {
    fn begin() -> Option<Self> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut quiet = before.clone();
        quiet.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(std::io::stdin(), SetArg::TCSAFLUSH, &quiet).ok()?;
        Some(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSAFLUSH, &self.0);
        eprintln!();
    }
}

/// Asks for what must not be shown.
pub(super) fn ask(prompt: &str) -> anyhow::Result<String> {
    if !std::io::stdin().is_terminal() {
        return Err(Fail::usage("a password is typed at a terminal; a script gives it with --password-stdin").into());
    }
    eprint!("{prompt}: ");
    let quiet = Quiet::begin();
    let mut line = String::new();
    std::io::stdin().lock().take(MAX_PASSWORD).read_line(&mut line).context("reading the password")?;
    drop(quiet);
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn from_stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin().lock().take(MAX_PASSWORD).read_to_string(&mut text).context("reading the password")?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn new_password(from: bool) -> anyhow::Result<String> {
    if from {
        return from_stdin();
    }
    let first = ask("New password")?;
    if ask("Once more")? != first {
        return Err(Fail::usage("the two are not the same").into());
    }
    Ok(first)
}

/// The context that further commands are to have, and one without credentials to sign in by.
fn contexts(args: &LoginArgs) -> anyhow::Result<(Context, context::Target)> {
    let held = context::read()?;
    let name = |text: &str| text.parse::<Name>().expect("a well-formed name");
    let fresh = args.endpoint.is_some();
    let mut context = match held {
        Some(held) => held,
        None if fresh => Context {
            endpoints: Vec::new(),
            ca: None,
            token_file: None,
            session_file: None,
            region: name("local"),
            project: name("default"),
            organization: None,
            data_dir: None,
        },
        None => {
            let why = "there is no context yet: say where the cloud is, as `nexus login https://… --user ORG/NAME`";
            return Err(Fail::not_found(why).into());
        }
    };
    if let Some(endpoint) = &args.endpoint {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        // Another cloud's authority and data folder say nothing of this one.
        if !context.endpoints.contains(&endpoint) {
            let endpoints = vec![endpoint];
            context = Context { endpoints, ca: None, token_file: None, data_dir: None, ..context };
        }
    }
    if let Some(ca) = &args.ca {
        context.ca = Some(std::path::absolute(ca).with_context(|| format!("the path {}", ca.display()))?);
    }
    if let Some(region) = &args.region {
        context.region = region.clone();
    }
    if let Some(project) = &args.project {
        context.project = project.clone();
    }
    let named = args.user.as_ref().map(|user| &user.organization).or(args.org.as_ref());
    let organization = named.or(context.organization.as_ref()).cloned();
    let organization = organization.ok_or_else(|| Fail::usage("which organization? say it with --org"))?;
    context.organization = Some(organization.clone());
    let ca =
        context.ca.as_ref().map(|ca| std::fs::read_to_string(ca).with_context(|| format!("reading {}", ca.display())));
    let target = context::Target {
        endpoints: context.endpoints.clone(),
        ca: ca.transpose()?,
        token: None,
        session: None,
        region: context.region.clone(),
        project: context.project.clone(),
        organization,
    };
    Ok((context, target))
}

pub async fn login(args: &LoginArgs) -> anyhow::Result<()> {
    let (mut context, target) = contexts(args)?;
    let client = Client::new(&target)?;
    let session = match (&args.provider, &args.exchange_token, &args.user) {
        (Some(provider), Some(file), _) => federated::by_token(&client, &target.organization, provider, file).await?,
        (Some(provider), None, _) => federated::by_browser(&client, &target.organization, provider).await?,
        (None, _, Some(user)) => by_password(args, &client, &user.to_string()).await?,
        (None, _, None) => return Err(Fail::usage("who signs in? say it with --user or --provider").into()),
    };
    let path = session::path_beside(&context::path()?);
    let _turn = session::lock(&path)?;
    session.write(&path)?;
    context.session_file = Some(path);
    context::write(&context)?;
    output::text(&format!("signed in as {}", session.user))
}

/// By a password, or by the invitation that sets it.
async fn by_password(args: &LoginArgs, client: &Client, user: &str) -> anyhow::Result<Session> {
    Ok(match &args.invitation {
        Some(invitation) => {
            let password = new_password(args.password_stdin)?;
            let form = [
                ("grant_type", "urn:cloudnexus:invitation"),
                ("username", user),
                ("invitation", invitation.as_str()),
                ("password", password.as_str()),
            ];
            client.sign_in(&form).await?
        }
        None => {
            let password = if args.password_stdin { from_stdin()? } else { ask(&format!("Password of {user}"))? };
            let mut form = vec![("grant_type", "password"), ("username", user), ("password", &password)];
            form.extend(args.otp.as_deref().map(|otp| ("otp", otp)));
            match client.sign_in(&form).await {
                Err(error) if wants_code(&error) && std::io::stdin().is_terminal() => {
                    let otp = ask("Code of the second factor")?;
                    form.push(("otp", otp.trim()));
                    client.sign_in(&form).await?
                }
                signed_in => signed_in?,
            }
        }
    })
}

fn wants_code(error: &ClientError) -> bool {
    let document = error.problem().and_then(|p| p.document.as_ref());
    document.is_some_and(|d| d["error"] == "mfa_required")
}

/// The path of the user who is signed in, for the verbs that only they themselves may use.
async fn own_path(cloud: &Cloud) -> anyhow::Result<String> {
    let me: Value = cloud.client.get("/v1/whoami").await?;
    if text(&me, "/kind") != "user" {
        return Err(Fail::usage(format!("{} has no password: only users have", text(&me, "/name"))).into());
    }
    let (organization, name) = text(&me, "/name").split_once('/').unwrap_or_default();
    Ok(format!("/v1/organizations/{organization}/users/{name}"))
}

pub async fn second_factor(args: &SecondFactorArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let path = own_path(&cloud).await?;
    let enrolled: Value = cloud.client.once(Method::POST, &format!("{path}:enroll-totp"), Parts::default()).await?;
    output::text(&format!("secret for the authenticator: {}", text(&enrolled, "/secret")))?;
    output::text(&format!("the same as a link:           {}", text(&enrolled, "/uri")))?;
    output::text("recovery codes, each good once, for when the authenticator is lost:")?;
    for code in enrolled["recoveryCodes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        output::text(&format!("  {code}"))?;
    }
    let code = ask("The code that the authenticator shows now")?;
    let body = json!({"code": code.trim()});
    let at = format!("{path}:confirm-totp");
    let _: Value = cloud.client.once(Method::POST, &at, Parts::json(&body)?).await?;
    output::text("from now on a code is asked for beside the password")
}

pub async fn logout(_: &LogoutArgs) -> anyhow::Result<()> {
    let Some(mut held) = context::read()? else { return output::text("there is no session") };
    let Some(path) = held.session_file.take() else { return output::text("there is no session") };
    if let Ok(session) = Session::read(&path) {
        let (target, _) = context::target_of(None)?;
        let client = Client::new(&target)?;
        let organization = session.user.split('/').next().unwrap_or_default();
        let at = format!("/v1/organizations/{organization}/sessions/{}", session.session);
        match client.json::<Value>(Method::DELETE, &at, Parts::default()).await {
            Ok(_) => {}
            // It has ended already.
            Err(ClientError::Refused(problem)) if matches!(problem.status.as_u16(), 400 | 401 | 404) => {}
            Err(error) => return Err(error.into()),
        }
        std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    context::write(&held)?;
    output::text("signed out")
}

pub async fn who_am_i(args: &WhoAmIArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let me: Value = cloud.client.get("/v1/whoami").await?;
    match args.output {
        Format::Json => return output::json(&me),
        Format::Yaml => return output::yaml(&me),
        _ => {}
    }
    let mut lines = format!("{} ({}), by {}\n", text(&me, "/name"), text(&me, "/kind"), text(&me, "/by"));
    for (title, field) in [("until", "/expires"), ("only project", "/project")] {
        let value = text(&me, field);
        if !value.is_empty() {
            lines.push_str(&format!("{title} {value}\n"));
        }
    }
    let groups: Vec<_> = me["groups"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !groups.is_empty() {
        lines.push_str(&format!("in {}\n", groups.join(", ")));
    }
    let roles = me["roles"].as_array().into_iter().flatten();
    let rows: Vec<_> = roles.map(|r| vec![text(r, "/role").to_owned(), text(r, "/over").to_owned()]).collect();
    if !rows.is_empty() {
        lines.push_str(&Printer::new(&["ROLE", "OVER"]).lines(rows));
    }
    output::text(lines.trim_end())
}

pub async fn password(args: &PasswordArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let path = own_path(&cloud).await?;
    let old = ask("Old password")?;
    let body = json!({"old": old, "new": new_password(false)?});
    let at = format!("{path}:set-password");
    let _: Value = cloud.client.once(Method::POST, &at, Parts::json(&body)?).await?;
    output::text("the password is changed; your other sessions have ended")
}
