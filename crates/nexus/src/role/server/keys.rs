//! The master keys, by which secrets are sealed that stand in the metadata: a file that every server has and the metadata
//! never see. A server without it does everything but what needs a secret opened.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
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
    let mode = std::fs::metadata(path).with_context(|| format!("the master keys {shown}"))?.permissions().mode();
    if mode & 0o077 != 0 {
        bail!("others than its owner may use {shown} (mode {:o}): `chmod 600 {shown}`", mode & 0o777);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {shown}"))?;
    Ok(Arc::new(FileKeys::parse(&text).with_context(|| format!("the master keys {shown}"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master-keys");
        crate::local::state::write_private(&path, FileKeys::generate().to_text().as_bytes()).unwrap();
        assert!(load(Some(&path)).is_ok());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = load(Some(&path)).err().unwrap().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        assert!(load(None).unwrap().wrap(&DataKey::generate(), &Context::totp("x")).is_err());
    }
}
