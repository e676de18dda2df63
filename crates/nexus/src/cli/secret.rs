//! `nexus secret`: sets the values of secrets, and reveals them to whoever may.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_model::kind::{self, KindDescriptor};
use nexus_model::secret::{MAX_BYTES, is_key};
use nexus_model::{Name, SecretData, SecretValue};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::cloud::{Cloud, CloudArgs, Guard, Listing, is_code, text};
use super::output::{self, Format};
use super::resource::{self, new_name};
use super::table::Printer;
use super::{login, table};
use crate::client::Parts;
use crate::exit::Fail;

/// Sets, shows and reveals secrets, which apps get as files or variables
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus secret set db password                              # asks, and shows nothing\n  \
    pass show db | nexus secret set db password               # from standard input\n  \
    nexus secret set db user=shop host=db.internal\n  \
    nexus secret set tls --from-file tls.crt=web.pem --from-file tls.key=web.key\n  \
    nexus secret set app --from-env-file .env --replace\n  \
    nexus secret get db\n  \
    nexus secret get db --reveal\n  \
    nexus secret versions db\n  \
    nexus deploy web --secret DB_PASSWORD=db/password --secret /run/secrets/tls=tls\n  \
    nexus delete secret db")]
pub struct SecretArgs {
    #[command(subcommand)]
    command: SecretCommand,
}

#[derive(Debug, Subcommand)]
enum SecretCommand {
    /// Sets values; other keys stay as they are. Others on this machine see what stands on a command line: give a KEY
    /// alone to type the value, or to read it from standard input
    Set {
        #[arg(value_parser = new_name)]
        name: Name,
        /// A value, or the key of one that is read
        #[arg(value_name = "KEY[=VALUE]")]
        values: Vec<String>,
        /// The content of a file; - is standard input
        #[arg(long, value_name = "KEY=PATH")]
        from_file: Vec<String>,
        /// Lines of KEY=VALUE; - is standard input
        #[arg(long, value_name = "FILE")]
        from_env_file: Vec<PathBuf>,
        /// Takes a key away
        #[arg(long, value_name = "KEY", conflicts_with = "replace")]
        remove: Vec<String>,
        /// Keeps no key that is not set here
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Shows the version and the keys; with --reveal the values, which leaves a record in the audit log
    Get {
        #[arg(value_parser = new_name)]
        name: Name,
        /// Shows the values, which needs the permission `secrets:reveal`
        #[arg(long)]
        reveal: bool,
        /// Only this key's value, as it is
        #[arg(long, value_name = "KEY", requires = "reveal")]
        key: Option<String>,
        /// An older version that is kept
        #[arg(long, requires = "reveal")]
        version: Option<u64>,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Lists the versions that are kept
    Versions {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

fn secrets() -> &'static KindDescriptor {
    kind::find("secrets").expect("a kind")
}

/// Reads standard input for one value at most.
struct Stdin {
    read: bool,
}

impl Stdin {
    fn take(&mut self, what: &str) -> anyhow::Result<Vec<u8>> {
        if std::mem::replace(&mut self.read, true) {
            return Err(Fail::usage(format!("{what}: standard input is read for one value only")).into());
        }
        let mut content = Vec::new();
        std::io::stdin().lock().take(MAX_BYTES as u64 + 2).read_to_end(&mut content).context("reading the value")?;
        Ok(content)
    }

    /// A value that is typed, or piped: without the line's end that `echo` adds.
    fn value(&mut self, key: &str) -> anyhow::Result<Vec<u8>> {
        if std::io::stdin().is_terminal() {
            return Ok(login::ask(key)?.into_bytes());
        }
        let mut content = self.take(key)?;
        if content.ends_with(b"\n") {
            content.pop();
        }
        Ok(content)
    }

    fn file(&mut self, path: &Path) -> anyhow::Result<Vec<u8>> {
        if path == Path::new("-") {
            return self.take("-");
        }
        let file = std::fs::File::open(path).with_context(|| format!("reading {}", path.display()))?;
        let mut content = Vec::new();
        file.take(MAX_BYTES as u64 + 2).read_to_end(&mut content).with_context(|| path.display().to_string())?;
        Ok(content)
    }
}

/// Lines of KEY=VALUE as `docker run --env-file` reads them: no quotes, no substitution; `#` begins a comment.
fn env_file(content: &[u8], shown: &str) -> Result<Vec<(String, String)>, Fail> {
    let text = std::str::from_utf8(content).map_err(|_| Fail::usage(format!("{shown}: no text")))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let pair = |(i, line): (usize, &str)| {
        let pair = line.split_once('=').map(|(key, value)| (key.trim().to_owned(), value.to_owned()));
        // The line is not repeated: it may be a value.
        pair.ok_or_else(|| Fail::usage(format!("{shown}: line {}: write KEY=VALUE", i + 1)))
    };
    lines.map(pair).collect()
}

fn brought(values: &[String], from_file: &[String], from_env_file: &[PathBuf]) -> anyhow::Result<SecretData> {
    let (mut data, mut stdin) = (BTreeMap::new(), Stdin { read: false });
    let mut add = |key: &str, value: Vec<u8>| -> anyhow::Result<()> {
        if !is_key(key) {
            let why = "a key has at most 128 letters, digits, '_', '.' and '-', and begins with a letter, digit or '_'";
            return Err(Fail::usage(format!("{:?}: {why}", key.chars().take(64).collect::<String>())).into());
        }
        if data.insert(key.to_owned(), SecretValue::new(value)).is_some() {
            return Err(Fail::usage(format!("{key} is set twice")).into());
        }
        Ok(())
    };
    for path in from_env_file {
        for (key, value) in env_file(&stdin.file(path)?, &path.display().to_string())? {
            add(&key, value.into_bytes())?;
        }
    }
    for asked in from_file {
        let (key, path) = asked.split_once('=').ok_or_else(|| Fail::usage("--from-file: write KEY=PATH"))?;
        add(key, stdin.file(Path::new(path))?)?;
    }
    for asked in values {
        match asked.split_once('=') {
            Some((key, value)) => add(key, value.as_bytes().to_vec())?,
            None => add(asked, stdin.value(asked)?)?,
        }
    }
    let data = SecretData(data);
    let errors = if data.0.is_empty() { Vec::new() } else { data.check() };
    match errors.first() {
        None => Ok(data),
        Some(error) => Err(Fail::usage(format!("{}: {}", error.field, error.message)).into()),
    }
}

/// The part of a body that holds values.
fn spec(data: &SecretData) -> Value {
    let (mut texts, mut binary) = (Map::new(), Map::new());
    for (key, value) in &data.0 {
        match value.text() {
            Some(text) => texts.insert(key.clone(), text.into()),
            None => binary.insert(key.clone(), value.to_base64().as_str().into()),
        };
    }
    let mut spec = json!({"data": texts});
    if !binary.is_empty() {
        spec["binary"] = binary.into();
    }
    spec
}

pub async fn run(args: &SecretArgs) -> anyhow::Result<()> {
    match &args.command {
        SecretCommand::Set { name, values, from_file, from_env_file, remove, replace, cloud } => {
            let data = brought(values, from_file, from_env_file)?;
            if data.0.is_empty() && remove.is_empty() {
                return Err(Fail::usage("name at least one KEY").into());
            }
            let cloud = Cloud::connect(cloud)?;
            let set = set(&cloud, name, &data, remove, *replace).await?;
            output::text(&format!("secret/{name} is at version {}", set["spec"]["version"]))
        }
        SecretCommand::Get { name, reveal: false, output: format, cloud, .. } => {
            let cloud = Cloud::connect(cloud)?;
            let secret = cloud.get(secrets(), name).await?;
            match format {
                Format::Json => output::json(&secret),
                Format::Yaml => output::yaml(&secret),
                Format::Name => output::text(&resource::title(secrets(), name.as_str())),
                _ => {
                    let keys: Vec<_> = secret["spec"]["keys"].as_array().into_iter().flatten().collect();
                    let keys: Vec<_> = keys.into_iter().filter_map(Value::as_str).collect();
                    output::text(&format!("version  {}\nkeys     {}", secret["spec"]["version"], keys.join(", ")))
                }
            }
        }
        SecretCommand::Get { name, key, version, output: format, cloud, .. } => {
            let cloud = Cloud::connect(cloud)?;
            let version = version.map_or_else(String::new, |v| format!("?version={v}"));
            let path = format!("{}:reveal{version}", cloud.object(secrets(), name));
            let revealed: Value = cloud.client.get(&path).await?;
            show(&revealed, name, key.as_deref(), *format)
        }
        SecretCommand::Versions { name, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            let secret = cloud.get(secrets(), name).await?;
            let versions = secret["status"]["versions"].as_array().into_iter().flatten().rev();
            let rows = versions.map(|v| vec![v["version"].to_string(), table::age_of(&v["created"], cloud.now())]);
            output::text(Printer::new(&["VERSION", "AGE"]).lines(rows.collect()).trim_end())
        }
    }
}

async fn set(cloud: &Cloud, name: &Name, data: &SecretData, remove: &[String], replace: bool) -> anyhow::Result<Value> {
    let path = cloud.object(secrets(), name);
    let mut spec = spec(data);
    let whole = json!({"metadata": {"name": name}, "spec": spec});
    if replace {
        return Ok(cloud.put(&path, &whole, Guard::None, false).await?.object);
    }
    for key in remove {
        spec["data"][key] = Value::Null;
    }
    match cloud.client.patch(&path, &json!({"spec": spec})).await {
        Ok(patched) => Ok(patched),
        // Perhaps the project is what is not there: then the create says so.
        Err(error) if is_code(&error, "not-found") && remove.is_empty() => {
            let collection = cloud.collection(secrets(), &Listing::default());
            Ok(cloud.client.json(Method::POST, &collection, Parts::json(&whole)?).await?)
        }
        Err(error) => Err(error.into()),
    }
}

fn show(revealed: &Value, name: &Name, key: Option<&str>, format: Format) -> anyhow::Result<()> {
    if let Some(key) = key {
        if let Some(text) = revealed["data"][key].as_str() {
            return output::bytes(text.as_bytes());
        }
        let value = revealed["binary"][key].as_str().and_then(SecretValue::from_base64);
        let missing =
            || Fail::not_found(format!("secret {name} has no key {key:?} in version {}", revealed["version"]));
        return output::bytes(value.ok_or_else(missing)?.expose());
    }
    match format {
        Format::Json => output::json(revealed),
        Format::Yaml => output::yaml(revealed),
        _ => {
            let mut rows = Vec::new();
            for (key, value) in revealed["data"].as_object().into_iter().flatten() {
                rows.push(vec![key.clone(), output::plain(value.as_str().unwrap_or_default())]);
            }
            for (key, value) in revealed["binary"].as_object().into_iter().flatten() {
                rows.push(vec![key.clone(), format!("{} (base64)", text(value, ""))]);
            }
            output::text(Printer::new(&["KEY", "VALUE"]).lines(rows).trim_end())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_the_line_from_files_and_from_env_files() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let env = write("env", b"# not this\nA=1\n\nB=x=y \n");
        let raw = write("raw", &[0, 255]);
        let data = brought(&["c=2".into()], &[format!("raw={}", raw.display())], &[env]).unwrap();
        assert_eq!(spec(&data), json!({"data": {"A": "1", "B": "x=y ", "c": "2"}, "binary": {"raw": "AP8="}}));
        assert!(brought(&["a=1".into(), "a=2".into()], &[], &[]).is_err(), "twice");
        assert!(brought(&["a/b=1".into()], &[], &[]).is_err());
        let torn = write("torn", b"hunter2\n");
        let error = brought(&[], &[], &[torn]).unwrap_err().to_string();
        assert!(error.contains("line 1") && !error.contains("hunter2"), "{error}");
        let large = write("large", &vec![b'x'; MAX_BYTES + 1]);
        assert!(brought(&[], &[format!("k={}", large.display())], &[]).is_err());
    }
}
