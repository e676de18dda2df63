//! Writes a group from a backup into etcd, in place of what is there.
//!
//! First one transaction takes the group away and puts a mark in the journal's place, by which a server that starts
//! meanwhile sees that the group is not whole. Then come keys and leases, in as many transactions as they need, each
//! holding only while that mark is the one that this restore put. The journal comes last: with it, the group is there. A
//! restore that broke off is done again from the start. The backup may be of either engine.

use std::time::Duration;

use nexus_env::{Env, RngExt as _};
use tokio::time::{Instant, sleep};

use super::grpc::{Channel, GrpcError, code};
use super::layout::{Extra, Journal, Layout, Stored};
use super::proto::{
    Compare, Empty, LeaseGrantRequest, LeaseRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse,
};
use super::{Config, operations};
use crate::backup::{Backup, BackupError, Restore, Restored};
use crate::embedded::mvcc::State;
use crate::error::StoreError;

/// Keys and values of one transaction.
const BYTES: usize = 1 << 20;
/// How long one transaction may take, tries included. Deleting what was there takes its time.
const STEP: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// Writes the group that `what` names, at the revision and generation that it names; its node and members are those of
/// whoever starts. Refused while any server of the group runs.
pub async fn restore(backup: &Backup, what: &Restore<'_>, config: &Config, env: &Env) -> Result<Restored, BackupError> {
    let rolled = backup.rolled(what)?;
    let channel = config.channel(env);
    let layout = Layout::new(&config.prefix, &config.group);
    let max_ops = operations(config, &channel, &layout, Instant::now() + config.open_timeout).await?;
    let writer = Writer { config, channel, layout };
    writer.refuse_while_servers_run().await?;
    let mark = writer.take_away().await?;
    writer.fill(&rolled.state, mark, max_ops - 1).await?;
    let commit = Journal {
        id: u128::from_le_bytes(env.rng.bytes()),
        revision: rolled.state.counters.revision,
        timestamp_ms: rolled.state.counters.timestamp_ms,
        steps: Vec::new(),
        extra: Extra::Nothing,
    };
    writer.finish(mark, &commit, rolled.term).await?;
    writer.channel.close();
    Ok(what.done(rolled.at, &rolled.state))
}

struct Writer<'a> {
    config: &'a Config,
    channel: Channel,
    layout: Layout,
}

impl Writer<'_> {
    fn failed(&self, error: &GrpcError) -> BackupError {
        BackupError::Store(StoreError::Unavailable { reason: self.config.explain(error) })
    }

    /// Calls until there is an answer. Only for what may be done twice.
    async fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        path: &'static str,
        request: &Q,
    ) -> Result<A, GrpcError> {
        let until = Instant::now() + STEP;
        loop {
            match self.channel.call(path, request, until).await {
                Err(error) if error.is_passing() && Instant::now() + PAUSE < until => sleep(PAUSE).await,
                other => return other,
            }
        }
    }

    async fn txn(&self, compare: Vec<Compare>, success: Vec<RequestOp>) -> Result<Option<i64>, BackupError> {
        let request = TxnRequest { compare, success, failure: Vec::new() };
        let answer: TxnResponse =
            self.call("/etcdserverpb.KV/Txn", &request).await.map_err(|error| self.failed(&error))?;
        Ok(answer.succeeded.then(|| answer.header.map_or(0, |h| h.revision)))
    }

    async fn refuse_while_servers_run(&self) -> Result<(), BackupError> {
        let (key, range_end) = self.layout.all_present();
        let look = RangeRequest { key, range_end, ..RangeRequest::default() };
        let found: RangeResponse =
            self.call("/etcdserverpb.KV/Range", &look).await.map_err(|error| self.failed(&error))?;
        let running: Vec<String> = found.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()).collect();
        if running.is_empty() {
            return Ok(());
        }
        Err(BackupError::Refused(format!(
            "servers of group {} run, at {}: stop all of them first (one that was killed is noticed within seconds)",
            self.config.group,
            running.join(", ")
        )))
    }

    /// Deletes the group and marks that a restore is under way; answers the mark's revision. If its answer is lost and it
    /// is done twice, the later mark counts.
    async fn take_away(&self) -> Result<i64, BackupError> {
        let mut ops = vec![RequestOp::put(self.layout.journal(), Journal::restoring(), 0)];
        ops.extend(self.layout.contents().into_iter().map(RequestOp::delete_range));
        ops.push(RequestOp::delete(self.layout.leader()));
        let marked = self.txn(Vec::new(), ops).await?;
        Ok(marked.expect("a transaction without conditions holds"))
    }

    async fn fill(&self, state: &State, mark: i64, max_ops: usize) -> Result<(), BackupError> {
        let (mut ops, mut bytes) = (Vec::new(), 0);
        for (key, slot) in &state.keys {
            let newest = &slot.newest;
            let Some(value) = newest.value.clone() else { continue };
            let size = key.len() + value.len();
            if ops.len() >= max_ops || (bytes > 0 && bytes + size > BYTES) {
                self.put(mark, std::mem::take(&mut ops)).await?;
                bytes = 0;
            }
            bytes += size;
            let (created, modified, lease) = (newest.created, newest.modified, newest.lease);
            let stored = Stored { created, modified, lease, value };
            ops.push(RequestOp::put(self.layout.data(key), stored.encode(), 0));
        }
        self.put(mark, ops).await?;
        for (id, lease) in &state.leases {
            self.grant(*id, lease.ttl_ms).await?;
            let text = lease.ttl_ms.to_string().into();
            self.put(mark, vec![RequestOp::put(self.layout.lease(*id), text, *id as i64)]).await?;
        }
        Ok(())
    }

    async fn put(&self, mark: i64, ops: Vec<RequestOp>) -> Result<(), BackupError> {
        let held = self.txn(vec![Compare::modified(self.layout.journal(), mark)], ops).await?;
        held.map(drop).ok_or_else(|| self.overtaken())
    }

    fn overtaken(&self) -> BackupError {
        BackupError::Refused(format!(
            "somebody else changed group {} in etcd meanwhile: run the restore again, alone",
            self.config.group
        ))
    }

    /// Makes etcd's lease for one of the group's. One that is left from before would end at another time.
    async fn grant(&self, id: u64, ttl_ms: u64) -> Result<(), BackupError> {
        let old = LeaseRequest { id: id as i64 };
        match self.call::<_, Empty>("/etcdserverpb.Lease/LeaseRevoke", &old).await {
            Ok(_) | Err(GrpcError::Status { code: code::NOT_FOUND, .. }) => {}
            Err(error) => return Err(self.failed(&error)),
        }
        let grant = LeaseGrantRequest { ttl: ttl_ms.div_ceil(1_000) as i64, id: id as i64 };
        match self.call::<_, Empty>("/etcdserverpb.Lease/LeaseGrant", &grant).await {
            // It is there: the answer of an earlier try was lost.
            Ok(_) | Err(GrpcError::Status { code: code::FAILED_PRECONDITION, .. }) => Ok(()),
            Err(error) => Err(self.failed(&error)),
        }
    }

    async fn finish(&self, mark: i64, commit: &Journal, term: u64) -> Result<(), BackupError> {
        let journal = self.layout.journal();
        let ops = vec![
            RequestOp::put(self.layout.base(), term.to_string().into(), 0),
            RequestOp::put(journal.clone(), commit.encode(), 0),
        ];
        if self.txn(vec![Compare::modified(journal.clone(), mark)], ops).await?.is_some() {
            return Ok(());
        }
        // The answer of an earlier try may have been lost.
        let look = RangeRequest { key: journal, ..RangeRequest::default() };
        let found: RangeResponse =
            self.call("/etcdserverpb.KV/Range", &look).await.map_err(|error| self.failed(&error))?;
        let own = |value| Journal::decode(value).is_ok_and(|found| found == *commit);
        if found.kvs.first().is_some_and(|kv| own(&kv.value)) { Ok(()) } else { Err(self.overtaken()) }
    }
}
