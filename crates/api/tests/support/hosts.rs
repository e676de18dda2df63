//! The hosts of the tests' regions.

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use nexus_api::{Frame, FrameStream, HostDoor};
use nexus_model::plan::{
    CaptureRequest, ExecRequest, FlowRecord, FlowsRequest, HostFlows, LogsRequest, NetworkCheck, Trace, TraceHop,
    TraceRequest, TraceVerdict, TracedPacket,
};
use nexus_model::{ApiError, Code, Name, Timestamp, Uid};
use tokio::sync::mpsc;

/// Logs are two lines; exec answers with the command, echoes its input in capitals, and exits with 7 when that ends.
pub struct EchoHost;

#[async_trait]
impl HostDoor for EchoHost {
    async fn logs(&self, host: &Name, request: LogsRequest) -> Result<FrameStream, ApiError> {
        let out = format!("from {host}, tail {:?}\n", request.tail);
        let frames = [(1, Bytes::from(out)), (2, Bytes::from_static(b"oops\n"))];
        let frames = futures::stream::iter(frames.map(|(channel, data)| Ok(Frame { channel, data })));
        Ok(if request.follow { frames.chain(futures::stream::pending()).boxed() } else { frames.boxed() })
    }

    async fn exec(&self, _: &Name, request: ExecRequest) -> Result<(mpsc::Sender<Frame>, FrameStream), ApiError> {
        if request.command == ["missing"] {
            return Err(ApiError::new(Code::Invalid, "there is no such program"));
        }
        let (sender, receiver) = mpsc::channel::<Frame>(1);
        let hello = Frame { channel: 2, data: request.command.join(" ").into() };
        let echo = futures::stream::unfold(Some(receiver), |receiver| async {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Some(frame) if !frame.data.is_empty() => {
                    Some((Ok(Frame { channel: 1, data: frame.data.to_ascii_uppercase().into() }), Some(receiver)))
                }
                _ => Some((Ok(Frame { channel: 3, data: Bytes::from_static(b"7") }), None)),
            }
        });
        Ok((sender, futures::stream::iter([Ok(hello)]).chain(echo).boxed()))
    }

    async fn trace(&self, host: &Name, request: TraceRequest) -> Result<Trace, ApiError> {
        let TracedPacket { to, protocol, port } = request.packet;
        let hop = TraceHop { host: host.clone(), at: "route".into(), what: format!("{to} {protocol:?} {port}") };
        let verdict = TraceVerdict::Delivered;
        Ok(Trace { hops: vec![hop], verdict, probed: request.probe.then_some(true) })
    }

    async fn check(&self, host: &Name) -> Result<NetworkCheck, ApiError> {
        let differences = vec![format!("{host} lacks a route")];
        Ok(NetworkCheck { revision: Some(7), networks: 1, nics: 2, differences, failing: Vec::new() })
    }

    fn hosts_of(&self, _: &Name, _: Uid) -> Vec<Name> {
        ["h-1", "h-2", "h-3"].map(|name| name.parse().unwrap()).into()
    }

    /// Two flows of each host but the last, which is away; nothing more for who has these.
    async fn flows(&self, host: &Name, request: FlowsRequest) -> Result<HostFlows, ApiError> {
        let number = match host.as_str() {
            "h-1" => 1,
            "h-2" => 2,
            _ => return Err(ApiError::new(Code::Unavailable, "it is away")),
        };
        let flow = |turn: i64| FlowRecord {
            time: Timestamp::from_millis(1_700_000_000_000 + turn * 10_000 + number * 1000),
            dropped: (turn == 1).then(|| "no_ingress_rule".to_owned()),
            protocol: "tcp".into(),
            source: [10, 0, 0, number as u8].into(),
            source_nic: request.nic.clone(),
            source_port: 4000,
            destination: [10, 0, 0, 9].into(),
            destination_nic: None,
            port: 80,
            bytes: 60,
        };
        let mut flows: Vec<FlowRecord> = if request.after == Some(2) { Vec::new() } else { [0, 1].map(flow).into() };
        flows.drain(..flows.len().saturating_sub(request.limit as usize));
        Ok(HostFlows { flows, last: 2, lost: 1 })
    }

    /// One packet, and what was asked for.
    async fn capture(&self, _: &Name, request: CaptureRequest) -> Result<FrameStream, ApiError> {
        if request.port == Some(1) {
            return Err(ApiError::new(Code::Conflict, "too many captures go on at this host already"));
        }
        let pieces = [Bytes::from_static(b"header "), Bytes::from(format!("{:?} {:?}", request.address, request.port))];
        Ok(futures::stream::iter(pieces.map(|data| Ok(Frame { channel: 1, data }))).boxed())
    }
}
