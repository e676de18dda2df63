//! Sealing and opening the values of secrets, for servers: the writer never does.

use nexus_iam::envelope::{self, Context, EnvelopeError, KeyProvider, Sealed};
use nexus_model::kind::Secret;
use nexus_model::{Name, Object, SecretData, key};
use nexus_store::{Consistency, RangeRequest, Store, StoreError};

/// Names one version of one secret in the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionId {
    /// Whose group keeps it: a region, or `global`.
    pub region: Name,
    pub project: Name,
    pub name: Name,
    pub version: u64,
}

/// Why there are no values.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("secret {0} has no version {1} any more")]
    Missing(Name, u64),
    #[error("version {1} of secret {0} can't be opened: {2}")]
    Sealed(Name, u64, EnvelopeError),
}

impl VersionId {
    /// A version of a stored secret.
    pub fn of(secret: &Object<Secret>, version: u64) -> Option<Self> {
        let m = &secret.metadata;
        Some(Self { region: m.region.clone()?, project: m.project.clone()?, name: m.name.clone(), version })
    }

    /// From the key of its row.
    pub fn of_key(region: &Name, key: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(key).ok()?.strip_prefix(key::SECRETS)?.split('/');
        let (project, name) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(Self { region: region.clone(), project, name, version: parts.next()?.parse().ok()? })
    }

    pub fn context(&self) -> Context {
        Context::secret(self.region.as_str(), self.project.as_str(), self.name.as_str(), self.version)
    }

    pub fn key(&self) -> String {
        key::secret_version(&self.project, &self.name, self.version)
    }

    /// The row's content.
    pub fn seal(&self, keys: &dyn KeyProvider, data: &SecretData) -> Result<String, EnvelopeError> {
        let sealed = envelope::seal(keys, &self.context(), &data.to_bytes())?;
        Ok(serde_json::to_string(&sealed).expect("a sealed value is plain data"))
    }

    /// Reads and opens it. `store` is that of its region's group.
    pub async fn open(
        &self,
        store: &dyn Store,
        keys: &dyn KeyProvider,
        consistency: Consistency,
    ) -> Result<SecretData, OpenError> {
        let mut request = RangeRequest::get(self.key());
        request.consistency = consistency;
        let row = store.range(request).await?.kvs.pop();
        let row = row.ok_or_else(|| OpenError::Missing(self.name.clone(), self.version))?;
        let failed = |e: EnvelopeError| OpenError::Sealed(self.name.clone(), self.version, e);
        let sealed: Sealed = serde_json::from_slice(&row.value).map_err(|_| failed(EnvelopeError::Damaged))?;
        let bytes = envelope::open(keys, &self.context(), &sealed).map_err(failed)?;
        SecretData::from_bytes(&bytes).ok_or_else(|| failed(EnvelopeError::Damaged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_versions_key_says_which_it_is() {
        let name = |n: &str| -> Name { n.parse().unwrap() };
        let id = VersionId { region: name("eu"), project: name("shop"), name: name("db"), version: 12 };
        assert_eq!(VersionId::of_key(&name("eu"), id.key().as_bytes()), Some(id));
        assert_eq!(VersionId::of_key(&name("eu"), b"s/shop/db"), None);
    }
}
