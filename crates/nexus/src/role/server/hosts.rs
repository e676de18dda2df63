//! The way from a user's request to the host that runs an instance: output and commands, and what its networks do.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use nexus_api::{Frame, FrameStream, HostDoor};
use nexus_control::view::View;
use nexus_env::Endpoint;
use nexus_model::kind::Nic;
use nexus_model::plan::{
    CaptureRequest, ExecRequest, FlowsRequest, HostFlows, LogsRequest, NetworkCheck, Trace, TraceRequest, channel,
    method,
};
use nexus_model::{ApiError, Code, Name, Object, Uid};
use nexus_wire::{Client, FrameSink, Pool, WireError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::southbound::unreachable;

/// Frames of standard input that wait for a slow host.
const INPUT_QUEUE: usize = 16;

/// A host looks at all that its kernel has, or waits for what a packet is answered with.
const ANSWER: Duration = Duration::from_secs(20);

pub struct Hosts {
    view: View,
    pool: Arc<Pool>,
}

impl Hosts {
    pub fn new(view: View, pool: Arc<Pool>) -> Self {
        Self { view, pool }
    }

    fn client(&self, host: &Name) -> Result<Client, ApiError> {
        let address = self.view.read(|world| world.host(host).map(|h| h.spec.address));
        let gone = || ApiError::new(Code::Unavailable, format!("host {host} is not part of the region any more"));
        Ok(self.pool.get(&Endpoint::Tcp(address.ok_or_else(gone)?)))
    }

    /// One question, one answer.
    async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        host: &Name,
        method: &str,
        request: &Q,
    ) -> Result<A, ApiError> {
        let answer = self.client(host)?.call(method, request, ANSWER).await;
        answer.map_err(|e| refused(host, &e))
    }

    /// What a host says until it ends, or the stream is dropped.
    async fn listen<Q: Serialize>(&self, host: &Name, method: &str, request: &Q) -> Result<FrameStream, ApiError> {
        let opened = self.client(host)?.duplex(method, request).await;
        let (sink, from) = opened.map_err(|e| refused(host, &e))?;
        // The sending half stays with the stream: dropping it early would say that the reader has gone.
        let kept = stream::unfold((frames(host, from), sink), |(mut from, sink)| async move {
            let frame = from.next().await?;
            Some((frame, (from, sink)))
        });
        Ok(kept.boxed())
    }
}

/// What a host says to a question that does not fit what it has is the caller's to hear.
fn refused(host: &Name, error: &WireError) -> ApiError {
    match error {
        WireError::Refused { code, detail } if code == nexus_wire::code::BAD_REQUEST => {
            ApiError::new(Code::Conflict, detail.clone())
        }
        other => unreachable(&format!("host {host}"), other),
    }
}

fn frames(host: &Name, from: nexus_wire::FrameStream) -> FrameStream {
    let host = host.clone();
    from.map(move |frame| match frame {
        Ok((channel, data)) => Ok(Frame { channel, data }),
        Err(error) => Err(refused(&host, &error)),
    })
    .boxed()
}

#[async_trait]
impl HostDoor for Hosts {
    async fn logs(&self, host: &Name, request: LogsRequest) -> Result<FrameStream, ApiError> {
        self.listen(host, method::LOGS, &request).await
    }

    async fn exec(&self, host: &Name, request: ExecRequest) -> Result<(mpsc::Sender<Frame>, FrameStream), ApiError> {
        let client = self.client(host)?;
        let opened = client.duplex(method::EXEC, &request).await;
        let (sink, from) = opened.map_err(|e| unreachable(&format!("host {host}"), &e))?;
        let (sender, queue) = mpsc::channel(INPUT_QUEUE);
        let pump = tokio::spawn(pump(queue, sink));
        let guard = AbortOnDrop(pump);
        let kept = stream::unfold((frames(host, from), guard), |(mut from, guard)| async move {
            let frame = from.next().await?;
            Some((frame, (from, guard)))
        });
        Ok((sender, kept.boxed()))
    }

    async fn trace(&self, host: &Name, request: TraceRequest) -> Result<Trace, ApiError> {
        self.ask(host, method::TRACE, &request).await
    }

    async fn check(&self, host: &Name) -> Result<NetworkCheck, ApiError> {
        self.ask(host, method::NETWORK_CHECK, &()).await
    }

    fn hosts_of(&self, project: &Name, network: Uid) -> Vec<Name> {
        let hosts: BTreeSet<Name> = self.view.read(|world| {
            let mine = |nic: &&Object<Nic>| nic.status.network.as_ref().is_some_and(|of| of.uid == network);
            world.nics.within(project).filter(mine).filter_map(|nic| nic.status.host.clone()).collect()
        });
        hosts.into_iter().collect()
    }

    async fn flows(&self, host: &Name, request: FlowsRequest) -> Result<HostFlows, ApiError> {
        self.ask(host, method::FLOWS, &request).await
    }

    async fn capture(&self, host: &Name, request: CaptureRequest) -> Result<FrameStream, ApiError> {
        self.listen(host, method::CAPTURE, &request).await
    }
}

/// The task that carries input lives as long as the output is read.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn pump(mut queue: mpsc::Receiver<Frame>, mut sink: FrameSink) {
    while let Some(frame) = queue.recv().await {
        if frame.channel == channel::STDIN && sink.send(channel::STDIN, frame.data).await.is_err() {
            return;
        }
    }
}
