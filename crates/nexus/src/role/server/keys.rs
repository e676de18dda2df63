//! The master keys, by which secrets are sealed that stand in the metadata: a file that every server has and the metadata
//! never see. A server without it does everything but what needs a secret opened.
//!
//! The file is looked at every other second, so that new keys need no restart. One that can't be read, or that others may
//! read, is not taken over: what was read before stays in use, and the log says why.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use nexus_iam::envelope::{Context, DataKey, EnvelopeError, FileKeys, KeyId, KeyProvider, WrappedKey};
use tokio_util::sync::CancellationToken;

const LOOK: Duration = Duration::from_secs(2);

/// By which a changed file is told from the one that was read.
type Stamp = (SystemTime, u64, u32);

/// The keys of a server's file.
pub struct Keys {
    path: Option<PathBuf>,
    held: RwLock<Option<FileKeys>>,
    read: RwLock<Option<Stamp>>,
}

fn missing() -> EnvelopeError {
    let why = "this server has no master keys: copy the file from another server and name it as `master_keys`";
    EnvelopeError::Provider(why.to_owned())
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.ino(), found.mode()))
}

/// Reads the file. One that others can read is refused: whoever has it and a backup has every secret.
fn load(path: &Path) -> anyhow::Result<FileKeys> {
    let text = crate::secret_file::read_text(path)?;
    FileKeys::parse(&text).with_context(|| format!("the master keys {}", path.display()))
}

impl Keys {
    pub fn open(path: Option<&Path>) -> anyhow::Result<Arc<Self>> {
        let read = RwLock::new(path.and_then(stamp));
        let held = path.map(load).transpose()?;
        if held.is_none() {
            tracing::warn!("this server has no master keys: it can't open secrets, second factors and signed requests");
        }
        Ok(Arc::new(Self { path: path.map(Path::to_owned), held: RwLock::new(held), read }))
    }

    /// Takes over what is written to the file, until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        if self.path.is_none() {
            return;
        }
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let keys = self.clone();
            // Its own panic is its own: the keys that are held stay.
            let _ = tokio::task::spawn_blocking(move || keys.look()).await;
        }
    }

    fn look(&self) {
        let Some(path) = &self.path else { return };
        let now = stamp(path);
        {
            let mut read = self.read.write().unwrap_or_else(PoisonError::into_inner);
            if *read == now {
                return;
            }
            *read = now;
        }
        match load(path) {
            Ok(keys) => {
                let current = keys.current();
                *self.held.write().unwrap_or_else(PoisonError::into_inner) = Some(keys);
                tracing::info!(%current, "the file of master keys was read again");
            }
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "the changed file of master keys is not used; those that were read before are"
            ),
        }
    }

    fn held(&self) -> RwLockReadGuard<'_, Option<FileKeys>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyProvider for Keys {
    fn current(&self) -> KeyId {
        self.held().as_ref().map_or_else(|| KeyId::new("none"), FileKeys::current)
    }

    fn wrap(&self, key: &DataKey, context: &Context) -> Result<WrappedKey, EnvelopeError> {
        self.held().as_ref().ok_or_else(missing)?.wrap(key, context)
    }

    fn unwrap(&self, wrapped: &WrappedKey, context: &Context) -> Result<DataKey, EnvelopeError> {
        self.held().as_ref().ok_or_else(missing)?.unwrap(wrapped, context)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::local::state::write_private;

    fn write(path: &Path, keys: &FileKeys) {
        write_private(path, keys.to_text().as_bytes()).unwrap();
    }

    #[test]
    fn a_server_without_the_file_says_so_when_a_secret_is_to_be_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master-keys");
        write(&path, &FileKeys::generate());
        assert!(Keys::open(Some(&path)).unwrap().wrap(&DataKey::generate(), &Context::totp("x")).is_ok());
        let none = Keys::open(None).unwrap();
        let error = none.wrap(&DataKey::generate(), &Context::totp("x")).unwrap_err().to_string();
        assert!(error.contains("master_keys"), "{error}");
    }

    #[test]
    fn a_changed_file_is_taken_over_and_one_that_others_may_read_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master-keys");
        let mut keys = FileKeys::generate();
        write(&path, &keys);
        let held = Keys::open(Some(&path)).unwrap();
        let first = held.current();
        let wrapped = held.wrap(&DataKey::generate(), &Context::totp("x")).unwrap();

        let second = keys.rotate().unwrap();
        write(&path, &keys);
        held.look();
        assert_eq!(held.current(), second);
        assert!(held.unwrap(&wrapped, &Context::totp("x")).is_ok(), "what was sealed before still opens");

        let third = keys.rotate().unwrap();
        write(&path, &keys);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        held.look();
        assert_eq!(held.current(), second, "others may read it");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        held.look();
        assert_eq!(held.current(), third);
        std::fs::remove_file(&path).unwrap();
        held.look();
        assert_eq!(held.current(), third, "a file that is gone takes no key away");
        assert_ne!(first, third);
    }
}
