//! `nexus agent`, and what a host has: the classes that it declares and what is behind them.

use std::path::PathBuf;

use clap::Args;
use nexus_model::kind::{Classes, validate_classes};
use nexus_model::{Bytes, Name};

use super::deploy::class;
use crate::config::{AgentConfig, Config as _, StorageFolder};
use crate::exit::Fail;

/// Runs a host's agent
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus agent --config /var/lib/nexus-host/agent.toml\n  \
    nexus agent --config agent.toml --class gpu-v100=2:/dev/nvidia0,/dev/nvidia1\n  \
    nexus agent --config agent.toml --storage-class high-iops=/srv/nvme:200Gi")]
pub struct AgentArgs {
    /// The agent's configuration, in TOML
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    #[command(flatten)]
    has: HasArgs,
}

impl AgentArgs {
    pub fn apply(&self, config: AgentConfig) -> anyhow::Result<AgentConfig> {
        self.has.apply(config)
    }
}

/// The classes of a host, beside those of its configuration.
#[derive(Debug, Args)]
pub struct HasArgs {
    /// So many of a compute class, and the device nodes behind it, as many for each, such as gpu-v100=2 or
    /// gpu-v100=2:/dev/nvidia0,/dev/nvidia1
    #[arg(long = "class", value_name = "NAME[=N[:DEVICE,…]]", value_parser = compute)]
    classes: Vec<Compute>,
    /// A storage class, the folder behind it, and how much of that instances may reserve, such as high-iops=/srv/nvme:200Gi
    /// [default size: nine tenths of what is free]
    #[arg(long = "storage-class", value_name = "NAME=DIR[:SIZE]", value_parser = storage)]
    storage: Vec<(Name, StorageFolder)>,
    /// What the link to other hosts sends, in bits a second, such as 10G: the cloud's own traffic then goes before tenants' on it
    #[arg(long, value_name = "RATE", value_parser = rate)]
    uplink_rate: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
struct Compute {
    class: Name,
    units: u32,
    nodes: Vec<PathBuf>,
}

fn compute(text: &str) -> Result<Compute, String> {
    let (counted, nodes) = match text.split_once(':') {
        Some((counted, nodes)) => (counted, nodes.split(',').map(PathBuf::from).collect()),
        None => (text, Vec::new()),
    };
    let (name, units) = class(counted)?;
    Ok(Compute { class: name, units, nodes })
}

fn rate(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.char_indices().last() {
        Some((at, 'k')) => (&text[..at], 1_000),
        Some((at, 'M')) => (&text[..at], 1_000_000),
        Some((at, 'G')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let bits = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
    bits.ok_or_else(|| format!("{text:?}: write bits a second, such as 10G or 500M"))
}

fn storage(text: &str) -> Result<(Name, StorageFolder), String> {
    let (name, rest) = text.split_once('=').ok_or_else(|| format!("{text:?}: write NAME=DIR or NAME=DIR:SIZE"))?;
    let class = name.parse().map_err(|e| format!("{name:?}: {e}"))?;
    let sized = rest.rsplit_once(':').and_then(|(dir, size)| Some((dir, size.parse::<Bytes>().ok()?)));
    let (dir, size) = sized.map_or((rest, None), |(dir, size)| (dir, Some(size)));
    let path = std::path::absolute(dir).map_err(|e| format!("{dir:?}: {e}"))?;
    Ok((class, StorageFolder { path, size }))
}

impl HasArgs {
    pub fn classes(&self) -> Classes {
        self.classes.iter().map(|c| (c.class.clone(), c.units)).collect()
    }

    /// The configuration with what the flags say of it.
    pub fn apply(&self, mut config: AgentConfig) -> anyhow::Result<AgentConfig> {
        for Compute { class, units, nodes } in &self.classes {
            config.classes.insert(class.clone(), *units);
            config.devices.remove(class);
            if !nodes.is_empty() {
                config.devices.insert(class.clone(), nodes.clone());
            }
        }
        config.storage.extend(self.storage.iter().cloned());
        config.uplink_rate = self.uplink_rate.or(config.uplink_rate);
        if let Some(wrong) = validate_classes("--class", &config.classes).first() {
            return Err(Fail::usage(format!("{}: {}", wrong.field, wrong.message)).into());
        }
        config.check().map_err(|(field, message)| Fail::usage(format!("{field}: {message}")))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_counts_and_what_is_behind_them() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let nodes = |text: &[&str]| text.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(compute("gpu").unwrap(), Compute { class: name("gpu"), units: 1, nodes: Vec::new() });
        let two = compute("gpu-v100=2:/dev/x,/dev/y").unwrap();
        assert_eq!(two, Compute { class: name("gpu-v100"), units: 2, nodes: nodes(&["/dev/x", "/dev/y"]) });
        assert!(compute("gpu=0").is_err() && compute("GPU=1").is_err());
        let (class, folder) = storage("high-iops=/srv/a:b:200Gi").unwrap();
        assert_eq!((class, folder.size), (name("high-iops"), Some(Bytes(200 << 30))));
        assert_eq!(folder.path, PathBuf::from("/srv/a:b"));
        assert_eq!(storage("fast=/srv/nvme").unwrap().1.size, None);
        assert!(storage("fast").is_err());
        assert_eq!((rate("10G"), rate("500M"), rate("64000")), (Ok(10_000_000_000), Ok(500_000_000), Ok(64_000)));
        assert!(rate("fast").is_err() && rate("G").is_err() && rate("").is_err());
    }
}
