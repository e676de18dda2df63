//! Instances' networks by `nexus-network`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use async_trait::async_trait;
use nexus_model::Uid;
use nexus_network::{InstanceAddress, InstanceNet};

use crate::config::{InstancePlug, PlugError};

#[async_trait]
impl InstancePlug for InstanceNet {
    async fn plug(&self, uid: Uid, address6: Ipv6Addr, address4: Ipv4Addr) -> Result<PathBuf, PlugError> {
        let address = InstanceAddress { address6, address4 };
        self.create(&uid.to_string(), address).await.map_err(|e| PlugError(e.to_string()))
    }

    async fn unplug(&self, uid: Uid) -> Result<(), PlugError> {
        self.delete(&uid.to_string()).await.map_err(|e| PlugError(e.to_string()))
    }

    async fn plugged(&self) -> Result<Vec<Uid>, PlugError> {
        let names = self.list().await.map_err(|e| PlugError(e.to_string()))?;
        Ok(names.iter().filter_map(|n| n.parse().ok()).collect())
    }
}
