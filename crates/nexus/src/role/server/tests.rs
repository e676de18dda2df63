//! What tests of a server's parts stand on: a store of one member in memory, and a server's own config.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::{Env, MemDisk};
use nexus_iam::{CertificateAuthority, at_millis};
use nexus_store::embedded::{self, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, PeerError};
use tempfile::TempDir;

use crate::config::{Config as _, ServerConfig};
use crate::local::state::write_private;

/// When these tests begin, in milliseconds of Unix time.
pub const START: i64 = 1_800_000_000_000;
pub const HOUR: Duration = Duration::from_secs(3600);

struct Alone;

#[async_trait]
impl Peers for Alone {
    async fn call(&self, _: &PeerRef, _: &GroupId, _: Bytes) -> Result<Bytes, PeerError> {
        Err(PeerError::Unreachable("there is nobody else".into()))
    }
}

pub async fn store(group: &str) -> Arc<EmbeddedStore> {
    let members = BTreeMap::from([(1, "tcp:10.0.0.1:7440".to_owned())]);
    let config = embedded::Config::new(1, group.parse().unwrap(), "/store", members);
    let env = Env::real().with_disk(Arc::new(MemDisk::new(7).mount()));
    Arc::new(EmbeddedStore::open(config, env, Arc::new(Alone)).await.unwrap())
}

/// Lets others read a file that held a secret, and checks that they could not before.
pub fn expose(path: &Path) {
    let mode = std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o640)).unwrap();
}

/// The config of the server `m1` of the cluster `home`, with an authority whose key lies in the folder.
pub fn config() -> (ServerConfig, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::generate("home", at_millis(START), 9000 * HOUR).unwrap().to_pem();
    let write = |file: &str, text: &str| {
        let path = dir.path().join(file);
        write_private(&path, text.as_bytes()).unwrap();
        path.display().to_string()
    };
    let (cert, key) = (write("ca.pem", &ca.cert), write("ca.key", &ca.key));
    let text = format!(
        "name = 'm1'\nnode_id = 1\ncluster_id = 'home'\nregion = 'local'\nzone = 'zone-a'\ndata_dir = '.'\n\
         wire_listen = '10.0.0.1:7440'\napi_tls_listen = '10.0.0.1:8443'\ntoken_hash = 'hash'\nzones = ['zone-a']\n\
         [authority]\ncert = '{cert}'\nkey = '{key}'\n[tls]\nca = '{cert}'\ncert = 'c'\nkey = 'k'\n\
         [api_tls]\nca = '{cert}'\ncert = 'c'\nkey = 'k'\n\
         [members.1]\nname = 'm1'\nwire = 'tcp:10.0.0.1:7440'\napi = 'https://10.0.0.1:8443'\n",
    );
    let path = write("nexus.toml", &text);
    (ServerConfig::load(path.as_ref()).unwrap(), dir)
}
