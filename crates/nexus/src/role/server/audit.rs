//! This server's part in the audit logs: the key that it signs heads with, and its own chain of refusals.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use nexus_api::Audit;
use nexus_control::audit::{Heads, Notes, NotesKeeper};
use nexus_env::{Env, RngExt as _};
use nexus_model::kind::GLOBAL;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::groups::Groups;
use crate::config::ServerConfig;
use crate::secret_file;

/// Opens what is under `<data_dir>/audit`, and makes it if it is not there.
pub fn open(config: &ServerConfig, env: &Env, groups: &Groups) -> anyhow::Result<(Arc<Audit>, NotesKeeper)> {
    let dir = config.data_dir.join("audit");
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let secret = secret(env, &dir.join("signing.key"))?;
    let (cluster, server) = (config.cluster_id.as_str(), config.name.as_str());
    let region = Heads::new(cluster, config.region.as_str(), server, &secret, env, groups.region.clone())?;
    let global = Heads::new(cluster, GLOBAL, server, &secret, env, groups.global.clone())?;
    let (notes, keeper) = Notes::new(env, dir.join("chain"), config.region.clone(), config.name.clone());
    Ok((Arc::new(Audit { region, global, notes }), keeper))
}

/// What the server's chain could not take, when metrics are asked for.
struct Lost(Notes);

impl std::fmt::Debug for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lost")
    }
}

impl Collector for Lost {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let lost = ConstGauge::new(i64::try_from(self.0.lost()).unwrap_or(i64::MAX));
        let about = "Refusals that found no room in this server's chain since it started";
        lost.encode(encoder.encode_descriptor("nexus_audit_refusals_lost", about, None, lost.metric_type())?)
    }
}

/// Shows the chain's losses among the server's metrics.
pub fn register(notes: &Notes, registry: &Mutex<Registry>) {
    registry.lock().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(Lost(notes.clone())));
}

/// The secret half of the key: 32 bytes in a file that only its owner may read.
fn secret(env: &Env, path: &Path) -> anyhow::Result<[u8; 32]> {
    let key = secret_file::read_or_make(path, || Ok(env.rng.bytes::<32>().to_vec()))?;
    let wrong =
        |_| anyhow::anyhow!("{} is no key of 32 bytes: restore it, or move it away for a new one", path.display());
    key.try_into().map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::super::tests::expose;
    use super::*;

    #[test]
    fn a_key_is_made_once_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("signing.key");
        let env = Env::real();
        let made = secret(&env, &path).unwrap();
        assert_eq!(secret(&env, &path).unwrap(), made);
        expose(&path);
        assert!(secret(&env, &path).unwrap_err().to_string().contains("others may read"));
        fs::remove_file(&path).unwrap();
        secret(&env, &path).unwrap();
        fs::write(&path, b"short").unwrap();
        assert!(secret(&env, &path).unwrap_err().to_string().contains("32 bytes"));
    }
}
