//! What `nexus server join`, `nexus host join` and `nexus gateway join` have in common: trust, a key, a question.
//!
//! Before anything secret is sent, the newcomer learns the cluster's authority and checks it against the pin that came
//! with the token; from then on it speaks to that authority's servers alone. The key is made once and kept, so that a join
//! whose answer was lost can be done again and gets the same answer.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nexus_api::operations::{JoinRole, TokenGrant, TokenRequest, Trust};
use nexus_env::{Endpoint, Env};
use nexus_iam::{RequestKey, SpiffeId, pin_of};
use nexus_model::Name;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs};
use super::deploy::class;
use super::output::{self, Format};
use super::resource::new_name;
use crate::client::{Client, Parts};
use crate::context::Target;
use crate::exit::Fail;
use crate::local::state::{make_private_dir, write_private};

const PATIENCE: Duration = Duration::from_secs(75);

/// How long something is good: a number with s, m, h or d.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time such as 90s, 30m, 1h or 7d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

/// `nexus server|host|gateway token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// How long it can be used: up to 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    ttl: Duration,
    /// Binds it to a zone
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    zone: Option<Name>,
    /// Binds a host's token to a cell
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    cell: Option<Name>,
    /// Binds a host's token to so many of a compute class, such as gpu-v100=2: it may declare no others
    #[arg(long = "class", value_name = "NAME[=N]", value_parser = class)]
    classes: Vec<(Name, u32)>,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn token(role: JoinRole, args: &TokenArgs) -> anyhow::Result<()> {
    let request = TokenRequest {
        ttl_seconds: args.ttl.as_secs(),
        zone: args.zone.clone(),
        cell: args.cell.clone(),
        classes: (!args.classes.is_empty()).then(|| args.classes.iter().cloned().collect()),
    };
    let grant: TokenGrant = run(&Cloud::connect(&args.cloud)?, &format!("{role}-token"), &request).await?;
    match args.output {
        Format::Json => return output::json(&grant),
        Format::Yaml => return output::yaml(&grant),
        _ => {}
    }
    let more = match role {
        JoinRole::Server => " \\\n    --name NAME --wire IP:7440 --api-listen IP:8443 --data-dir /var/lib/nexus-server",
        JoinRole::Host => " \\\n    --name NAME --wire IP:7450 --data-dir /var/lib/nexus-host",
        JoinRole::Gateway => " \\\n    --name NAME --listen IP:80 --data-dir /var/lib/nexus-gateway",
    };
    let api = grant.endpoints.first().map_or("https://SERVER:8443", String::as_str);
    output::note(&format!("One {role} may join by this token until {}. On its machine:", grant.expires));
    output::text(&format!("nexus {role} join --token {} --api {api} --ca-pin {}{more}", grant.token, grant.ca_pin))
}

/// Runs an operation of the cloud that the context names.
pub async fn run<T: DeserializeOwned>(cloud: &Cloud, name: &str, body: &impl Serialize) -> anyhow::Result<T> {
    ask(&cloud.client, name, body).await
}

async fn ask<T: DeserializeOwned>(client: &Client, name: &str, body: &impl Serialize) -> anyhow::Result<T> {
    let parts = Parts::json(body)?.timeout(PATIENCE);
    Ok(client.json(Method::POST, &format!("/v1/operations/{name}"), parts).await?)
}

/// Where to join, and how to know that it is the right place.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The join token, as `nexus server|host|gateway token` gave it
    #[arg(long, env = "NEXUS_JOIN_TOKEN", hide_env_values = true)]
    pub token: String,
    /// A server's API, such as https://10.0.0.1:8443
    #[arg(long, value_name = "URL")]
    pub api: String,
    /// What identifies the cluster's authority, as it was given with the token
    #[arg(long, value_name = "sha256:…")]
    pub ca_pin: Option<String>,
    /// This machine's name in the cluster [default: its host name]
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    pub name: Option<Name>,
    /// Where configuration, keys and data are kept
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// The zone [default: the token's]
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    pub zone: Option<Name>,
}

impl JoinArgs {
    pub fn name(&self) -> anyhow::Result<Name> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let text = nix::unistd::gethostname().context("asking for this machine's name")?;
        let text = text.to_string_lossy().to_lowercase();
        let short = text.split('.').next().unwrap_or_default();
        short
            .parse()
            .map_err(|e| Fail::usage(format!("this machine's name {short:?} can't be used ({e}): give --name")).into())
    }
}

/// The cluster that is joined, after its authority was checked.
pub struct Door {
    pub trust: Trust,
    client: Client,
}

impl Door {
    /// Learns the authority and checks it.
    pub async fn open(args: &JoinArgs) -> anyhow::Result<Self> {
        let url = args.api.trim_end_matches('/');
        let plain = url.strip_prefix("http://");
        if let Some(rest) = plain {
            let host: Option<SocketAddr> = rest.parse().ok();
            if !host.is_some_and(|h| h.ip().is_loopback()) {
                return Err(Fail::usage("--api over plain http is for this machine alone: use https").into());
            }
        } else if !url.starts_with("https://") {
            return Err(Fail::usage(format!("--api {url:?} is not a URL such as https://10.0.0.1:8443")).into());
        }
        let trust: Trust = match &args.ca_pin {
            Some(pin) => {
                // Anybody may answer this question: the answer is believed only if it fits the pin.
                let trust: Trust = unverified(url).await?;
                let found = pin_of(&trust.ca).context("the authority that the server shows")?;
                if found != pin.trim() {
                    let detail = format!(
                        "{url} is not the cluster that the token is of: its authority is {found}, not {pin}. Nothing was \
                         sent to it"
                    );
                    return Err(Fail::conflict(detail).into());
                }
                trust
            }
            None => {
                let client = client(url, None)?;
                ask(&client, "trust", &json!({})).await.with_context(|| {
                    format!("without --ca-pin, {url} must have a certificate that this machine trusts already")
                })?
            }
        };
        let ca = args.ca_pin.as_ref().map(|_| trust.ca.clone());
        Ok(Self { client: client(url, ca)?, trust })
    }

    /// The trust domain's id for a role's name.
    pub fn id(&self, segments: &[&str]) -> anyhow::Result<SpiffeId> {
        SpiffeId::new(&self.trust.cluster_id, segments).context("the id to ask for")
    }

    pub async fn join<T: DeserializeOwned>(&self, role: JoinRole, body: &impl Serialize) -> anyhow::Result<T> {
        ask(&self.client, &format!("{role}-join"), body).await
    }
}

fn client(url: &str, ca: Option<String>) -> anyhow::Result<Client> {
    let any: Name = "default".parse().expect("a well-formed name");
    let target = Target {
        endpoints: vec![url.to_owned()],
        ca,
        token: None,
        session: None,
        region: any.clone(),
        project: any.clone(),
        organization: any,
    };
    Ok(Client::new(&target)?)
}

/// Asks for the authority without believing in any.
async fn unverified(url: &str) -> anyhow::Result<Trust> {
    crate::install_crypto();
    let http = reqwest::Client::builder().danger_accept_invalid_certs(true).no_proxy().timeout(PATIENCE).build()?;
    let request = http.post(format!("{url}/v1/operations/trust")).json(&json!({}));
    let unreachable = |e: &dyn std::fmt::Display| Fail::unavailable(format!("no server answers at {url}: {e}"));
    let response = request.send().await.map_err(|e| unreachable(&e))?;
    let status = response.status();
    let body: Value = response.json().await.map_err(|e| unreachable(&e))?;
    if !status.is_success() {
        let detail = body["detail"].as_str().unwrap_or("it is no server of a cluster").to_owned();
        return Err(unreachable(&format!("{status}: {detail}")).into());
    }
    serde_json::from_value(body).with_context(|| format!("what {url} answers"))
}

/// The folder of a machine that joins, with its key.
pub struct Home {
    dir: PathBuf,
    pub key: RequestKey,
}

impl Home {
    /// Makes the folder, and the key unless an earlier try made it. `config` must not be there yet.
    pub fn make(dir: &Path, config: &str) -> anyhow::Result<Self> {
        let dir = std::path::absolute(dir).with_context(|| format!("the folder {}", dir.display()))?;
        let existing = dir.join(config);
        if existing.exists() {
            let detail = format!("{} is there already: this folder's machine has joined before", existing.display());
            return Err(Fail::conflict(detail).into());
        }
        make_private_dir(&dir)?;
        make_private_dir(&dir.join("tls"))?;
        let path = dir.join("tls/key.pem");
        let key = if path.exists() {
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            RequestKey::from_pem(&text).with_context(|| format!("the key {}", path.display()))?
        } else {
            let key = RequestKey::generate()?;
            write_private(&path, key.to_pem().as_bytes())?;
            key
        };
        Ok(Self { dir, key })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        write_private(&path, text.as_bytes())?;
        Ok(path)
    }

    /// Makes a folder of data.
    pub fn folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        make_private_dir(&path)?;
        Ok(path)
    }

    /// Writes a role's configuration. The last file to be written: with it, the machine has joined.
    pub fn configure(&self, name: &str, config: &impl Serialize) -> anyhow::Result<PathBuf> {
        let text = toml::to_string(config).with_context(|| format!("writing {name}"))?;
        self.write(name, &format!("# Written when this machine joined. See docs/guide/real-machines.md.\n{text}"))
    }
}

pub fn endpoints(texts: &[String]) -> anyhow::Result<Vec<Endpoint>> {
    texts.iter().map(|t| t.parse::<Endpoint>().with_context(|| format!("the server {t}"))).collect()
}

pub fn now() -> std::time::SystemTime {
    nexus_iam::at_millis(Env::real().clock.now_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("90s").unwrap().as_secs(), 90);
        assert_eq!(duration("7d").unwrap().as_secs(), 604_800);
        for bad in ["", "1", "h", "1.5h", "-1h", "1w", "99999999999999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_is_made_once_and_a_machine_joins_once() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("server");
        let first = Home::make(&dir, "nexus.toml").unwrap().key.to_pem();
        let again = Home::make(&dir, "nexus.toml").unwrap();
        assert_eq!(again.key.to_pem(), first, "a second try has the key of the first");
        again.configure("nexus.toml", &json!({"name": "s4"})).unwrap();
        let error = Home::make(&dir, "nexus.toml").err().unwrap();
        assert_eq!(crate::exit::code_of(&error), 4, "{error}");
    }
}
