//! A stored value that nobody can read stops neither a writer that takes over nor a view that starts.

mod common;

use std::sync::Arc;

use common::net::{End, LONG, Running, env, submit};
use common::{create, name, web};
use nexus_control::core::Bootstrap;
use nexus_control::region::{Config, Region};
use nexus_control::view::View;
use nexus_model::Code;
use nexus_model::kind::*;
use nexus_store::{Op, RangeRequest, Store, Txn};

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_value_stops_neither_the_writer_nor_the_view() {
    let (env, end) = (env(1), End::alone());
    let store = end.open(&env, "local", &[1]).await;
    let poison = "o/apps/default/shop";
    let deadline = tokio::time::Instant::now() + LONG;
    loop {
        let ops = vec![Op::put(poison, "\u{1}\u{2}"), Op::put("t/instances/nonsense", "{}")];
        match store.txn(Txn::new(Vec::new(), ops)).await {
            Ok(_) => break,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
    }
    let bootstrap =
        Bootstrap { region: name("local"), domain: "localhost".into(), zones: vec![name("zone-a")], cells: Vec::new() };
    let config = Config { node: 1, server: "server-1".into(), bootstrap, fleet: None };
    let region = Arc::new(Region::new(config, env, store.clone(), end));
    let mut running = Running::new(View::new("localhost"));
    running.writer(&region);
    running.follow(store.clone());

    let app = |app: &str| create::<App>(Some("default"), app, web(1));
    submit(&region, app("blog")).await.expect("other objects can be made");
    let refused = submit(&region, app("shop")).await.unwrap_err();
    assert_eq!(refused.code, Code::Conflict);
    assert!(refused.detail.contains(&format!("nexus debug store get {poison}")), "{}", refused.detail);
    running.shows("what can be read", |w| w.apps.live.len() == 1).await;
    let view = running.view.clone();
    assert_eq!(view.read(|w| w.unreadable.keys().cloned().collect::<Vec<_>>()), [poison, "t/instances/nonsense"]);

    // A value that breaks while a view follows: what it was before goes on being shown, and is named.
    let blog = "o/apps/default/blog";
    store.txn(Txn::new(Vec::new(), vec![Op::put(blog, "{")])).await.unwrap();
    running.shows("its name", |w| w.unreadable.len() == 3).await;
    assert_eq!(view.read(|w| w.apps.live.len()), 1);
    let kept = store.range(RangeRequest::get(poison)).await.unwrap();
    assert_eq!(&kept.kvs[0].value[..], b"\x01\x02", "nothing was written over it");
    running.end().await;
    store.shutdown().await;
}
