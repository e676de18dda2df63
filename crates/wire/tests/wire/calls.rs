//! Every shape of call over real sockets, and how each is refused, cancelled and cut off.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{LONG, Pki, Running, blob, client_options, loopback, until};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use nexus_env::Env;
use nexus_wire::{Client, ClientOptions, Pool, Streaming, WireError};

struct World {
    server: Running,
    client: Client,
    _pki: Pki,
}

async fn world() -> World {
    world_with(client_options()).await
}

async fn world_with(options: ClientOptions) -> World {
    let (pki, env) = (Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    let client = Client::new(&env, server.endpoint.clone(), pki.client(), options);
    World { server, client, _pki: pki }
}

fn refused(error: &WireError) -> &str {
    match error {
        WireError::Refused { code, .. } => code,
        other => panic!("not refused but: {other}"),
    }
}

#[tokio::test]
async fn a_question_gets_its_answer() {
    let w = world().await;
    assert!(!w.client.is_connected());
    assert_eq!(w.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
    assert!(w.client.is_connected());
    let echoed = w.client.call_bytes("echo", Bytes::from_static(b"raw"), LONG).await.unwrap();
    assert_eq!(&echoed[..], b"raw");
    assert!(w.client.call_bytes("echo", Bytes::new(), LONG).await.unwrap().is_empty());
    type Me = (Option<String>, String, bool);
    let (id, request, deadline): Me = w.client.for_request("req-1").call("whoami", &(), LONG).await.unwrap();
    assert_eq!((id.as_deref(), &*request, deadline), (Some("somebody"), "req-1", true));
    let (_, request, _): Me = w.client.call("whoami", &(), LONG).await.unwrap();
    assert_eq!(request.len(), 16, "a fresh id");
}

#[tokio::test]
async fn many_calls_share_a_connection() {
    let w = world().await;
    let calls = (0..600u64).map(|i| {
        let client = w.client.clone();
        async move { client.call::<_, u64>("add", &(i, 1), LONG).await.unwrap() == i + 1 }
    });
    assert!(futures::future::join_all(calls).await.into_iter().all(|right| right));
}

#[tokio::test]
async fn refusals_arrive_as_they_were_meant() {
    let w = world().await;
    let ask = |method: &'static str| {
        let client = w.client.clone();
        async move { client.call::<_, ()>(method, &(), LONG).await.unwrap_err() }
    };
    assert_eq!(ask("follow").await, WireError::NotLeader { leader: Some("s2".into()) });
    assert_eq!(ask("full").await, WireError::Refused { code: "disk-full".into(), detail: "no room on h1".into() });
    assert_eq!(refused(&ask("no-such-method").await), "unknown-method");
    assert_eq!(refused(&ask("forbidden").await), "forbidden");
    assert_eq!(refused(&w.client.call::<_, u64>("add", "text", LONG).await.unwrap_err()), "bad-request");
    assert!(matches!(w.client.call::<_, String>("add", &(1, 2), LONG).await, Err(WireError::Protocol(_))));
    assert!(matches!(ask("a b").await, WireError::Local(_)));
    // A handler that panics fails its own call and no other.
    assert!(matches!(ask("panic").await, WireError::Unreachable { sent: true, .. }));
    assert_eq!(w.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
}

#[tokio::test]
async fn another_version_is_told_so() {
    let w = world_with(ClientOptions { version: 2, ..client_options() }).await;
    let error = w.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap_err();
    assert_eq!(error, WireError::VersionMismatch { ours: 2, theirs: "1".into() });
    let error = w.client.stream::<_, u64>("count", &3).await.err().unwrap();
    assert_eq!(error, WireError::VersionMismatch { ours: 2, theirs: "1".into() });
}

#[tokio::test]
async fn what_is_too_large_is_refused_on_either_side() {
    let w = world().await;
    let theirs = WireError::TooLarge { limit: 100_000 };
    let over = || Bytes::from(vec![0; 200_000]);
    assert_eq!(w.client.call_bytes("echo", over(), LONG).await.unwrap_err(), theirs);
    assert_eq!(w.client.call::<_, String>("big", &200_000, LONG).await.unwrap_err(), theirs);
    let small = ClientOptions { max_message: 1_000, ..client_options() };
    let small = Client::new(&Env::real(), w.server.endpoint.clone(), w._pki.client(), small);
    let ours = WireError::TooLarge { limit: 1_000 };
    assert_eq!(small.call_bytes("echo", over(), LONG).await.unwrap_err(), ours);
    assert_eq!(small.call::<_, String>("big", &2_000, LONG).await.unwrap_err(), ours);
    // Neither harms the connection.
    assert_eq!(small.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
    assert_eq!(w.client.call_bytes("echo", Bytes::from(vec![7; 99_000]), LONG).await.unwrap().len(), 99_000);
}

#[tokio::test]
async fn a_deadline_ends_the_wait_and_the_handler() {
    let w = world().await;
    // The first call makes the connection.
    assert_eq!(w.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
    let error = w.client.call::<_, ()>("hang", &(), Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, WireError::Deadline { .. }), "{error}");
    assert!(error.is_retryable() && error.may_have_run());
    until("the handler is dropped", || w.server.watched.dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_method_that_goes_unanswered_is_left_alone_and_others_are_not() {
    let world = world().await;
    assert_eq!(world.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
    let short = Duration::from_millis(20);
    let mut begun = 0;
    let refused = async {
        loop {
            match world.client.call::<_, ()>("hang", &(), short).await.unwrap_err() {
                WireError::Deadline { .. } => begun += 1,
                WireError::Unreachable { reason, sent: false, .. } => break reason,
                other => panic!("{other}"),
            }
        }
    };
    let reason = tokio::time::timeout(LONG, refused).await.unwrap();
    assert!(reason.contains("`hang`") && reason.contains("unanswered"), "{reason}");
    assert!(begun >= 5, "{begun}");
    assert_eq!(world.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
}

#[tokio::test]
async fn dropping_a_call_drops_its_handler() {
    let w = world().await;
    let (begun, dropped) = (&w.server.watched.begun, &w.server.watched.dropped);
    let client = w.client.clone();
    // A deadline far beyond the wait below, so that it is not what drops the handler.
    let call = tokio::spawn(async move { client.call::<_, ()>("hang", &(), LONG * 10).await });
    until("the handler runs", || begun.load(Ordering::SeqCst) == 1).await;
    call.abort();
    until("the handler is dropped", || dropped.load(Ordering::SeqCst) == 1).await;

    let mut quiet: Streaming<u64> = w.client.stream("quiet", &()).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().unwrap(), 1);
    drop(quiet);
    until("the stream is dropped", || dropped.load(Ordering::SeqCst) == 2).await;

    let duplex = w.client.duplex("wait", &()).await.unwrap();
    until("the duplex handler runs", || begun.load(Ordering::SeqCst) == 3).await;
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
    drop(duplex);
    until("the duplex handler is dropped", || dropped.load(Ordering::SeqCst) == 3).await;
    assert!(w.client.is_connected(), "one connection carried it all");
}

#[tokio::test]
async fn a_stream_gives_every_item_and_then_how_it_ended() {
    let w = world().await;
    // More than the window holds, so that the sender must wait for the reader.
    let mut items: Streaming<u64> = w.client.stream("count", &100_000).await.unwrap();
    for i in 0..100_000 {
        assert_eq!(items.next().await.unwrap().unwrap(), i);
    }
    assert!(items.next().await.is_none());
    assert!(items.next().await.is_none());

    assert_eq!(refused(&w.client.stream::<_, u64>("count", &0).await.err().unwrap()), "nothing-to-count");
    let items: Streaming<u64> = w.client.stream("count-then-fail", &3).await.unwrap();
    let items: Vec<_> = items.collect().await;
    assert_eq!(items.len(), 4);
    assert_eq!(refused(items[3].as_ref().unwrap_err()), "tired");
}

#[tokio::test]
async fn a_stream_outlives_the_client_that_opened_it() {
    let World { server, client, _pki } = world().await;
    let mut items: Streaming<u64> = client.stream("count", &50_000).await.unwrap();
    drop(client);
    let mut count = 0;
    while let Some(item) = items.next().await {
        assert_eq!(item.unwrap(), count);
        count += 1;
    }
    assert_eq!(count, 50_000);
    drop((items, server));
}

#[tokio::test]
async fn a_slow_reader_holds_up_nobody_else() {
    let w = world().await;
    let mut slow: Streaming<u64> = w.client.stream("count", &100_000).await.unwrap();
    assert_eq!(slow.next().await.unwrap().unwrap(), 0);
    for i in 0..100 {
        assert_eq!(w.client.call::<_, u64>("add", &(i, 1), LONG).await.unwrap(), i + 1);
    }
    assert_eq!(slow.count().await, 99_999);
}

#[tokio::test]
async fn blobs_arrive_whole_or_with_an_error() {
    let w = world().await;
    let length = 3_000_001;
    let pieces: Vec<Bytes> = w.client.bytes_stream("download", &length).await.unwrap().try_collect().await.unwrap();
    assert!(pieces.concat() == blob(length), "the blob is what was sent");
    assert!(w.client.bytes_stream("download", &0).await.unwrap().next().await.is_none());

    let mut broken = w.client.bytes_stream("broken-download", &()).await.unwrap();
    assert_eq!(&broken.next().await.unwrap().unwrap()[..], b"half");
    let error = broken.next().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("bad sector"), "{error}");
    assert!(broken.next().await.is_none());
}

#[tokio::test]
async fn an_upload_arrives_whole_or_not_at_all() {
    let w = world().await;
    let pieces = |length: usize| {
        let whole = blob(length);
        let pieces: Vec<_> = whole.chunks(70_000).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
        futures::stream::iter(pieces)
    };
    type Got = (String, usize, bool);
    let got: Got = w.client.upload("upload", "image", pieces(3_000_001)).await.unwrap();
    assert_eq!(got, ("image".to_owned(), 3_000_001, true));
    let got: Got = w.client.upload("upload", "empty", pieces(0)).await.unwrap();
    assert_eq!(got, ("empty".to_owned(), 0, true));

    let broken = pieces(140_000).chain(futures::stream::iter([Err(std::io::Error::other("bad sector"))]));
    let error = w.client.upload::<_, Got, _>("upload", "broken", broken).await.unwrap_err();
    assert_eq!(error, WireError::Local("bad sector".into()));

    // A refusal is heard although the body would go on for ever.
    let endless = futures::stream::repeat_with(|| Ok(Bytes::from(vec![0; 50_000])));
    let error = w.client.upload::<_, (), _>("refuse-upload", &(), endless).await.unwrap_err();
    assert_eq!(refused(&error), "disk-full");
    let error = w.client.upload::<_, (), _>("no-such-method", &(), pieces(1_000_000)).await.unwrap_err();
    assert_eq!(refused(&error), "unknown-method");
    assert_eq!(w.client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
}

#[tokio::test]
async fn a_duplex_call_talks_both_ways_until_the_handler_ends() {
    let w = world().await;
    let (mut sink, mut frames) = w.client.duplex("shout", "hello").await.unwrap();
    assert_eq!(frames.next().await.unwrap().unwrap(), (9, Bytes::from_static(b"hello")));
    for (channel, word) in [(1, "one"), (2, "two"), (255, "")] {
        sink.send(channel, word.into()).await.unwrap();
        assert_eq!(frames.next().await.unwrap().unwrap(), (channel, word.to_uppercase().into()));
    }
    let large = Bytes::from(vec![b'a'; 90_000]);
    sink.send(3, large).await.unwrap();
    assert_eq!(frames.next().await.unwrap().unwrap(), (3, vec![b'A'; 90_000].into()));
    drop(sink);
    let end = frames.next().await.unwrap().unwrap_err();
    assert_eq!(end, WireError::Refused { code: "exit".into(), detail: "7".into() });
    assert!(frames.next().await.is_none());
    assert_eq!(refused(&w.client.duplex("no-such-method", &()).await.err().unwrap()), "unknown-method");
}

#[tokio::test]
async fn a_pool_gives_each_peer_one_client() {
    let w = world().await;
    let pool = Pool::new(&Env::real(), w._pki.client(), client_options());
    let first = pool.get(&w.server.endpoint);
    assert_eq!(first.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
    assert!(pool.get(&w.server.endpoint).is_connected());
    pool.forget(&w.server.endpoint);
    assert!(!pool.get(&w.server.endpoint).is_connected());
    pool.retain(|_| false);
    assert_eq!(first.call::<_, u64>("add", &(2, 3), LONG).await.unwrap(), 5);
}

#[tokio::test]
async fn a_method_can_be_registered_only_once() {
    let pki = Pki::new();
    let builder = nexus_wire::Server::builder(&Env::real(), loopback(), pki.server());
    let watched = Arc::default();
    let twice = crate::common::methods(crate::common::methods(builder, &watched), &watched);
    assert_eq!(twice.bind().await.err().unwrap().kind(), std::io::ErrorKind::InvalidInput);
}
