//! The key by which this server signs access tokens: its own, kept in its data folder, with the public half where all
//! servers find it. A server that loses its folder makes another, and what the old one signed is believed no longer.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nexus_control::intent::{Change, Intent, Provenance, Target, Writer};
use nexus_env::{Env, RngExt};
use nexus_iam::jwt::SigningKey;
use nexus_model::kind::{self, Kind};
use nexus_model::{Metadata, Name, Object, RequestId};
use tokio_util::sync::CancellationToken;

use crate::secret_file;

const RETRY: Duration = Duration::from_secs(1);

/// Reads the key, or makes it.
pub fn load(data_dir: &Path) -> anyhow::Result<SigningKey> {
    let path = data_dir.join("signing-key.pem");
    let pem = secret_file::read_or_make(&path, || Ok(SigningKey::generate()?.to_pem().as_bytes().to_vec()))?;
    SigningKey::from_pem(&String::from_utf8_lossy(&pem)).with_context(|| format!("the key {}", path.display()))
}

/// Publishes the public half, as soon as the group that all regions share takes it.
pub async fn publish(key: Arc<SigningKey>, server: Name, writer: Arc<dyn Writer>, env: Env, stop: CancellationToken) {
    let spec = kind::SigningKeySpec { key: hex::encode(key.public().as_bytes()), server: server.to_string() };
    let object = Object::<kind::SigningKey>::new(Metadata::new(server.clone(), None), spec).to_any();
    loop {
        let intent = Intent {
            request_id: RequestId::from_random(RngExt::bytes(&*env.rng)),
            actor: format!("server {server}"),
            by: Provenance { principal: format!("server:{server}"), ..Provenance::default() },
            target: Target {
                plural: kind::SigningKey::PLURAL.to_owned(),
                project: None,
                organization: None,
                name: server.clone(),
            },
            change: Change::Put { object: object.clone() },
            if_match: None,
            idempotency_key: None,
            dry_run: false,
        };
        match writer.submit(intent).await {
            Ok(_) => return,
            Err(error) => tracing::debug!(%error, "the key of access tokens can't be published yet"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::expose;
    use super::*;

    #[test]
    fn the_key_is_made_once_and_refused_when_others_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let made = load(dir.path()).unwrap();
        assert_eq!(load(dir.path()).unwrap().public().as_bytes(), made.public().as_bytes());
        expose(&dir.path().join("signing-key.pem"));
        let refused = load(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("chmod 600"), "{refused}");
    }
}
