//! What operators do to the fleet: the API's `Operations` door, over the region's store, its groups and its writer.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nexus_api::Operations;
use nexus_api::operations::{
    GatewayJoin, HostJoin, HostLeave, HostLeft, ImageGc, JoinRole, Named, Nothing, Rebalance, Rebalanced, RegionRemove,
    Replace, ServerJoin, TokenId, TokenRequest, read,
};
use nexus_control::intent::{Change, Intent, Provenance, Target, Writer};
use nexus_env::RngExt as _;
use nexus_model::kind::InstancePhase;
use nexus_model::{ApiError, Code, Name, RequestId};
use nexus_store::StoreError;
use serde_json::{Value, json};

use super::fleet::{self, HostMembership, HostRecord, ServerRecord, ServerState, Stored, VERSION};
use super::image_gc::Collector;
use super::join::Joins;
use super::membership::Membership;
use super::rewrap::Rewrap;

/// How long a server that has joined may take until it is a full member.
const TAKE_IN: Duration = Duration::from_secs(50);
/// How long a host that left may seem alive: until its silence is noticed, with time to spare.
const SILENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(200);
/// So many of the instances that a host takes with it are named.
const LOST: usize = 100;

/// The two operations on backups, which have a room of their own.
#[async_trait]
pub trait Backups: Send + Sync {
    async fn create(&self, body: Value) -> Result<Value, ApiError>;
    async fn list(&self, body: Value) -> Result<Value, ApiError>;
}

pub struct ServerOperations {
    pub joins: Joins,
    pub membership: Arc<Membership>,
    pub writer: Arc<dyn Writer>,
    pub backups: Option<Arc<dyn Backups>>,
    pub rewrap: Rewrap,
    pub collector: Arc<Collector>,
}

/// A store's error as an operator reads it.
pub fn from_store(error: StoreError) -> ApiError {
    match error {
        // What is wrong with the wish, not with the store.
        StoreError::Invalid(_) | StoreError::Membership(_) => ApiError::new(Code::Conflict, error.to_string()),
        other => nexus_api::from_store(other),
    }
}

fn answer<T: serde::Serialize>(value: &T) -> Value {
    serde_json::to_value(value).expect("an answer is plain data")
}

#[async_trait]
impl Operations for ServerOperations {
    async fn run(&self, name: &str, body: Value) -> Result<Value, ApiError> {
        let joins = &self.joins;
        match name {
            "trust" => {
                read::<Nothing>(body)?;
                joins.trust()
            }
            "server-token" => Ok(answer(&joins.token(JoinRole::Server, read::<TokenRequest>(body)?).await?)),
            "host-token" => Ok(answer(&joins.token(JoinRole::Host, read::<TokenRequest>(body)?).await?)),
            "gateway-token" => Ok(answer(&joins.token(JoinRole::Gateway, read::<TokenRequest>(body)?).await?)),
            "token-list" => {
                read::<Nothing>(body)?;
                joins.list_tokens().await
            }
            "token-revoke" => joins.revoke_token(&read::<TokenId>(body)?.id).await,
            "server-join" => joins.server(read::<ServerJoin>(body)?).await,
            "host-join" => joins.host(read::<HostJoin>(body)?).await,
            "gateway-join" => joins.gateway(read::<GatewayJoin>(body)?).await,
            "server-list" => {
                read::<Nothing>(body)?;
                Ok(json!({"items": self.membership.list().await?}))
            }
            "server-remove" => self.remove(&read::<Named>(body)?.name).await,
            "server-replace" => self.replace(read::<Replace>(body)?).await,
            "region-remove" => {
                let asked = read::<RegionRemove>(body)?;
                self.membership.let_region_go(&asked.name, &asked.nodes).await?;
                Ok(json!({"removed": asked.name}))
            }
            "master-key-status" | "master-key-rewrap" => {
                read::<Nothing>(body)?;
                Ok(answer(&self.rewrap.run(name == "master-key-rewrap").await?))
            }
            "image-gc" => Ok(answer(&self.collector.operate(read::<ImageGc>(body)?).await?)),
            "rebalance" => self.rebalance(read::<Rebalance>(body)?).await,
            "host-leave" => self.leave(read::<HostLeave>(body)?).await,
            "backup-create" | "backup-list" => {
                let Some(backups) = &self.backups else {
                    return Err(ApiError::new(Code::Unavailable, "this server keeps no backups"));
                };
                if name == "backup-create" { backups.create(body).await } else { backups.list(body).await }
            }
            other => Err(ApiError::new(Code::NotFound, format!("there is no operation {other:?}"))),
        }
    }
}

impl ServerOperations {
    async fn server(&self, name: &Name) -> Result<Stored<ServerRecord>, ApiError> {
        let found = fleet::get(&*self.joins.store, &fleet::server_key(name.as_str())).await.map_err(from_store)?;
        found.ok_or_else(|| ApiError::not_found("server", name.as_str()))
    }

    /// Takes a server out of every group, and then out of the records. May be done again after it broke off.
    async fn remove(&self, name: &Name) -> Result<Value, ApiError> {
        let record = self.server(name).await?;
        self.take_out(&record).await?;
        Ok(json!({"removed": name, "node": record.value.entry.node}))
    }

    async fn take_out(&self, record: &Stored<ServerRecord>) -> Result<(), ApiError> {
        let entry = &record.value.entry;
        let servers = self.joins.fleet.servers();
        if servers.len() == 1 && servers.contains_key(&entry.node) {
            let detail = format!("server {} is the region's only one: nothing would be left", entry.name);
            return Err(ApiError::new(Code::Conflict, detail));
        }
        self.membership.remove(entry.node).await?;
        let key = fleet::server_key(entry.name.as_str());
        fleet::delete_if(&*self.joins.store, &key, record.revision).await.map_err(from_store)?;
        Ok(())
    }

    async fn replace(&self, asked: Replace) -> Result<Value, ApiError> {
        if asked.old == asked.new {
            let detail = "a server can't replace itself: let a new one join under another name";
            return Err(ApiError::new(Code::Conflict, detail));
        }
        let old = self.server(&asked.old).await?;
        self.server(&asked.new).await?;
        let deadline = tokio::time::Instant::now() + TAKE_IN;
        loop {
            let new = self.server(&asked.new).await?.value;
            if new.state == ServerState::Member {
                break;
            }
            if tokio::time::Instant::now() >= deadline {
                let detail = format!(
                    "server {} has not been taken in yet: {}. Nothing was changed",
                    asked.new,
                    self.membership.trouble(new.entry.node).unwrap_or_else(|| "does it run?".to_owned())
                );
                return Err(ApiError::new(Code::Conflict, detail));
            }
            tokio::time::sleep(LOOK).await;
        }
        self.take_out(&old).await?;
        Ok(json!({"removed": asked.old, "member": asked.new}))
    }

    /// Takes a host out: refuses its reports from now on, waits until its silence has been noticed, and deletes it.
    async fn leave(&self, asked: HostLeave) -> Result<Value, ApiError> {
        let HostLeave { name, force } = asked;
        let key = fleet::host_key(name.as_str());
        let found: Option<Stored<HostRecord>> = fleet::get(&*self.joins.store, &key).await.map_err(from_store)?;
        let object = self.joins.view.read(|world| world.host(&name).cloned());
        let left = found.as_ref().is_some_and(|f| f.value.state == HostMembership::Left);
        if object.is_none() && (found.is_none() || left) {
            return Err(ApiError::not_found("host", name.as_str()));
        }
        let running: Vec<String> = self.joins.view.read(|world| {
            let lives = |i: &&nexus_model::Object<nexus_model::kind::Instance>| {
                i.metadata.deleting.is_none() && i.status.phase != InstancePhase::Stopping
            };
            let project = |i: &nexus_model::Object<nexus_model::kind::Instance>| i.metadata.project.clone();
            let named = |i: &nexus_model::Object<nexus_model::kind::Instance>| match project(i) {
                Some(project) => format!("{project}/{}", i.metadata.name),
                None => i.metadata.name.to_string(),
            };
            world.instances_on(&name).filter(lives).map(named).collect()
        });
        if !running.is_empty() && !force {
            let some = running.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            let detail = format!(
                "{} instances run on host {name} ({some}): drain it (`spec.draining`) until it is empty, as `nexus host \
                 leave` does, or force it, and they are started on other hosts",
                running.len()
            );
            return Err(ApiError::new(Code::Conflict, detail));
        }
        if !left {
            let record = match (&found, &object) {
                (Some(found), _) => HostRecord { state: HostMembership::Left, ..found.value.clone() },
                (None, Some(host)) => HostRecord {
                    version: VERSION,
                    zone: host.spec.zone.clone(),
                    cell: host.spec.cell.clone(),
                    address: host.spec.address.to_string(),
                    prefix6: host.spec.prefix6,
                    prefix4: host.spec.prefix4,
                    classes: None,
                    state: HostMembership::Left,
                },
                (None, None) => return Err(ApiError::not_found("host", name.as_str())),
            };
            let was = found.map(|f| f.revision);
            if !fleet::put_if(&*self.joins.store, &key, was, &record).await.map_err(from_store)? {
                return Err(ApiError::new(Code::Conflict, format!("host {name} changed at this moment: try again")));
            }
        }
        if object.is_some() {
            self.delete_host(&name).await?;
        }
        let (instances, lost) = (running.len(), running.into_iter().take(LOST).collect());
        Ok(answer(&HostLeft { left: name, instances, lost }))
    }

    /// Has the region's writer work out a plan, and carry it out unless that is not wanted.
    async fn rebalance(&self, asked: Rebalance) -> Result<Value, ApiError> {
        let region = self.joins.config.region.clone();
        if let Some(other) = asked.region.filter(|other| *other != region) {
            let detail =
                format!("this server is of region {region}: ask one of region {other}, with a context of its own");
            return Err(ApiError::new(Code::Conflict, detail));
        }
        if !(1..=50).contains(&asked.max) {
            return Err(ApiError::new(Code::Invalid, "the operation's body: max: between 1 and 50"));
        }
        let intent = Intent {
            request_id: RequestId::from_random(self.joins.env.rng.bytes()),
            actor: "operator".to_owned(),
            by: Provenance::default(),
            target: Target { plural: "instances".to_owned(), project: None, organization: None, name: region.clone() },
            change: Change::Rebalance { most: asked.max },
            if_match: None,
            idempotency_key: None,
            dry_run: asked.dry_run,
        };
        let mut planned = self.writer.submit(intent).await?.object.status;
        let moves = serde_json::from_value(planned["moves"].take())
            .map_err(|e| ApiError::new(Code::Internal, format!("the writer's plan can't be read: {e}")))?;
        Ok(answer(&Rebalanced { region, moves, begun: !asked.dry_run }))
    }

    async fn delete_host(&self, name: &Name) -> Result<(), ApiError> {
        let deadline = tokio::time::Instant::now() + SILENCE;
        loop {
            let intent = Intent {
                request_id: RequestId::from_random(self.joins.env.rng.bytes()),
                actor: "operator".to_owned(),
                by: Provenance::default(),
                target: Target { plural: "hosts".to_owned(), project: None, organization: None, name: name.clone() },
                change: Change::Delete,
                if_match: None,
                idempotency_key: None,
                dry_run: false,
            };
            match self.writer.submit(intent).await {
                Ok(_) => return Ok(()),
                Err(error) if error.code == Code::NotFound => return Ok(()),
                // Its agent was heard a moment ago: from now on it is not.
                Err(error) if error.code == Code::Conflict && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(LOOK).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}
