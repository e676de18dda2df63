//! The master keys, by which secrets are sealed that stand in the metadata: a file that every server has and the metadata
//! never see. A server without it does everything but what needs a secret opened.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use nexus_iam::envelope::{Context, DataKey, EnvelopeError, FileKeys, KeyId, KeyProvider, WrappedKey};

/// Stands in where there is no file.
struct NoKeys;

impl NoKeys {
    fn missing() -> EnvelopeError {
        let why = "this server has no master keys: copy the file from another server and name it as `master_keys`";
        EnvelopeError::Provider(why.to_owned())
    }
}

impl KeyProvider for NoKeys {
    fn current(&self) -> KeyId {
        KeyId::new("none")
    }

    fn wrap(&self, _: &DataKey, _: &Context) -> Result<WrappedKey, EnvelopeError> {
        Err(Self::missing())
    }

    fn unwrap(&self, _: &WrappedKey, _: &Context) -> Result<DataKey, EnvelopeError> {
        Err(Self::missing())
    }
}

/// Reads the file. One that others can read is refused: whoever has it and a backup has every secret.
pub fn load(path: Option<&Path>) -> anyhow::Result<Arc<dyn KeyProvider>> {
    let Some(path) = path else {
        tracing::warn!("this server has no master keys: it can't check second factors and signed requests");
        return Ok(Arc::new(NoKeys));
    };
    let shown = path.display();
    let text = crate::secret_file::read_text(path)?;
    Ok(Arc::new(FileKeys::parse(&text).with_context(|| format!("the master keys {shown}"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_the_file_says_so_when_a_secret_is_to_be_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master-keys");
        crate::local::state::write_private(&path, FileKeys::generate().to_text().as_bytes()).unwrap();
        assert!(load(Some(&path)).unwrap().wrap(&DataKey::generate(), &Context::totp("x")).is_ok());
        let error = load(None).unwrap().wrap(&DataKey::generate(), &Context::totp("x")).unwrap_err().to_string();
        assert!(error.contains("master_keys"), "{error}");
    }
}
