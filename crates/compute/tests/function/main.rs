//! Functions as the agent drives them: real executors, the real example, requests over TCP.
//!
//! The test's program is the executor's too: it is re-executed as `… executor serve …`, as `nexus` is. Needs root, for an
//! executor gives its rights up and sockets are opened in network namespaces.

mod keep;
mod outgoing;
mod world;

use std::net::{Ipv4Addr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{LocalBoxFuture, join_all};
use http_body_util::BodyExt;
use nexus_compute::function::{FunctionRuntime, bench_in_process, executor_main};
use nexus_compute::{Runtime, RuntimeError, Sandbox, State};
use nexus_model::Bytes as Size;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use outgoing::*;
use world::{SOON, World, running, state, until};

type Test = for<'a> fn(&'a World) -> LocalBoxFuture<'a, ()>;

macro_rules! tests {
    ($($name:ident,)*) => { [$((stringify!($name), (|world| $name(world).boxed_local()) as Test)),*] };
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "executor") {
        return executor_main(&args[1..]);
    }
    let tests = tests![
        every_request_meets_a_fresh_instance,
        an_endless_loop_times_out_and_harms_nobody,
        eating_memory_fails_and_harms_nobody,
        requests_beyond_the_concurrency_wait_and_are_refused_in_the_end,
        bodies_stream_both_ways,
        output_and_failures_go_to_the_log,
        the_outside_is_closed_but_for_requests,
        a_function_asks_others_by_connections_of_the_agents,
        https_is_checked_against_the_hosts_authorities,
        a_request_that_is_refused_says_why_in_the_log,
        an_answer_goes_on_without_an_agent_and_the_next_request_waits_for_one,
        a_removed_instance_leaves_no_connection,
        what_can_not_be_served_is_refused_with_the_reason,
        an_instance_that_needs_more_memory_than_it_is_given_is_refused,
        what_can_not_be_served_takes_no_connection,
        a_component_is_compiled_once,
        a_stale_artefact_is_compiled_again,
        what_nothing_needs_goes_and_is_compiled_again,
        a_killed_executor_is_observed_and_its_instances_start_again,
        instances_live_on_without_the_agent,
        stopping_finishes_what_is_under_way,
        the_last_removal_ends_the_executor,
        one_executor_stands_by_and_is_replaced_when_it_is_taken_or_dies,
        two_projects_never_share_an_executor,
        the_next_agent_goes_on_with_the_executor_that_stands_by,
        no_executor_stands_by_where_no_function_can_come,
        a_later_epoch_replaces_an_earlier_one,
        an_executor_has_no_rights,
        the_socket_is_in_the_instances_namespace,
        clients_may_speak_http2,
        the_benchmarks_peer_answers_alike,
    ];
    let chosen = |name: &str| {
        let filters: Vec<_> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    };
    if args.iter().any(|arg| arg == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let component = world::component();
    let mut failed = 0;
    for (name, test) in tests.into_iter().filter(|(name, _)| chosen(name)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async {
                let world = World::new(&component);
                test(&world).await;
            });
        }));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        failed += u32::from(outcome.is_err());
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn every_request_meets_a_fresh_instance(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    for _ in 0..50 {
        assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
    }
    assert_eq!(world.get(&sandbox, "/").await, (200, "Hello from the test\n".into()));
    assert_eq!(world.get(&sandbox, "/env").await, (200, "NAME=the test\n".into()));
    assert_eq!(world.get(&sandbox, "/nowhere").await.0, 404);
    runtime.start(&sandbox).await.expect("starting what runs is harmless");
    assert!(running(&state(&runtime, sandbox.uid).await));
}

async fn an_endless_loop_times_out_and_harms_nobody(world: &World) {
    let (runtime, mut sandbox) = (world.runtime(), world.sandbox());
    sandbox.template.function.timeout_seconds = 2;
    runtime.start(&sandbox).await.unwrap();
    // More of them than the executor has threads.
    let spinning = join_all((0..4).map(|_| world.get(&sandbox, "/spin")));
    let others = async {
        for _ in 0..20 {
            assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
        }
    };
    let (spun, ()) = tokio::join!(spinning, others);
    for (status, body) in spun {
        assert_eq!(status, 504);
        assert!(body.contains("function_timeout") && body.contains("2 seconds"), "{body}");
    }
    assert!(world.log(&sandbox).contains("ended after 2 seconds"));
}

async fn eating_memory_fails_and_harms_nobody(world: &World) {
    let runtime = world.runtime();
    let (eater, other) = (world.sandbox(), world.sandbox());
    runtime.start(&eater).await.unwrap();
    runtime.start(&other).await.unwrap();
    let eating = join_all((0..3).map(|_| world.get(&eater, "/eat")));
    let others = async {
        for _ in 0..20 {
            assert_eq!(world.get(&other, "/counter").await, (200, "1\n".into()));
        }
    };
    let (eaten, ()) = tokio::join!(eating, others);
    for (status, body) in eaten {
        assert_eq!(status, 500);
        assert!(body.contains("function_failed") && !body.contains("wasm"), "no detail for strangers: {body}");
    }
    let log = world.log(&eater);
    assert!(log.contains("64 MiB are allowed") || log.contains("hold all of its memory"), "{log}");
    assert_eq!(world.get(&eater, "/counter").await, (200, "1\n".into()), "its memory is free again");
}

async fn requests_beyond_the_concurrency_wait_and_are_refused_in_the_end(world: &World) {
    let (runtime, mut sandbox) = (world.runtime(), world.sandbox());
    sandbox.template.function.concurrency = 1;
    sandbox.template.function.timeout_seconds = 3;
    runtime.start(&sandbox).await.unwrap();
    let waited = join_all((0..3).map(|_| world.get(&sandbox, "/sleep?50"))).await;
    assert!(waited.iter().all(|(status, _)| *status == 200), "{waited:?}");
    // Two that take longer together than one may wait.
    let answers = join_all((0..2).map(|_| world.get(&sandbox, "/spin"))).await;
    let mut statuses: Vec<_> = answers.iter().map(|(status, _)| *status).collect();
    statuses.sort_unstable();
    assert!(statuses == [503, 504] || statuses == [504, 504], "{answers:?}");
    let refused = answers.iter().all(|(status, body)| *status != 503 || body.contains("function_busy"));
    assert!(refused, "{answers:?}");
}

async fn bodies_stream_both_ways(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    let sent: Bytes = (0..10u32 << 18).flat_map(u32::to_le_bytes).collect();
    assert_eq!(sent.len(), 10 << 20);
    let response = world.request(&sandbox, "/echo", sent.clone()).await.unwrap();
    assert_eq!(response.status(), 200);
    let received = tokio::time::timeout(SOON, response.into_body().collect()).await.unwrap().unwrap().to_bytes();
    assert!(received == sent, "{} bytes came back", received.len());
}

async fn output_and_failures_go_to_the_log(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    assert_eq!(world.get(&sandbox, "/log").await.0, 200);
    assert_eq!(world.get(&sandbox, "/panic").await.0, 500);
    until("the log has every line", || async {
        let log = world.log(&sandbox);
        let has =
            |text: &str| log.lines().any(|line| line.split_once(' ').is_some_and(|(_, rest)| rest.contains(text)));
        has("stdout a line for standard output")
            && has("stderr a line for standard error")
            && has("asked to")
            && has("stderr cloudnexus: a request failed")
    })
    .await;
}

async fn the_outside_is_closed_but_for_requests(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    let (status, body) = world.get(&sandbox, "/closed").await;
    assert_eq!(status, 200);
    for (line, what) in body.lines().zip(["socket", "name", "file"]) {
        assert!(line.starts_with(&format!("{what}: Err(")), "{body}");
    }
}

async fn what_can_not_be_served_is_refused_with_the_reason(world: &World) {
    let runtime = world.runtime();
    for (bytes, reason) in [
        (&b"#!/bin/sh\n"[..], "not WebAssembly"),
        (b"\0asm\x01\0\0\0", "core module"),
        (b"\0asm\x0d\0\x01\0", "does not export wasi:http/incoming-handler"),
        (b"\0asm\x0d\0\x01\0garbage", "not valid"),
    ] {
        let image = world.blob(bytes);
        match runtime.prepare(image).await {
            Err(RuntimeError::Image { image: at_fault, message }) => {
                assert_eq!(at_fault, image);
                assert!(message.contains(reason), "{message:?} does not say {reason:?}");
            }
            other => panic!("{other:?} for {reason}"),
        }
        let sandbox = nexus_compute::Sandbox { image, ..world.sandbox() };
        assert!(matches!(runtime.start(&sandbox).await, Err(RuntimeError::Image { .. })));
    }
    assert_eq!(runtime.observe().await.unwrap(), []);
}

async fn an_instance_that_needs_more_memory_than_it_is_given_is_refused(world: &World) {
    let (runtime, mut sandbox) = (world.runtime(), world.sandbox());
    sandbox.template.resources.memory = Size(256 << 10);
    match runtime.start(&sandbox).await {
        Err(RuntimeError::Image { message, .. }) => assert!(message.contains("resources.memory"), "{message}"),
        other => panic!("{other:?}"),
    }
}

async fn what_can_not_be_served_takes_no_connection(world: &World) {
    let (runtime, mut sandbox) = (world.runtime(), world.sandbox());
    let memory = std::mem::replace(&mut sandbox.template.resources.memory, Size(256 << 10));
    runtime.prepare(sandbox.image).await.unwrap();
    let target: SocketAddr = (Ipv4Addr::LOCALHOST, sandbox.template.ports[0].port).into();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let mut taken = 0;
            while !over.load(Ordering::SeqCst) {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                // From another address, or it might meet itself.
                socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
                taken += u32::from(socket.connect(&target.into()).is_ok());
            }
            taken
        });
        let here = tokio::runtime::Handle::current();
        let refused = tokio::task::block_in_place(|| here.block_on(runtime.start(&sandbox)));
        over.store(true, Ordering::SeqCst);
        assert!(matches!(refused, Err(RuntimeError::Image { .. })), "{refused:?}");
        assert_eq!(connecting.join().unwrap(), 0, "whoever was let in has lost what it sent");
    });
    sandbox.template.resources.memory = memory;
    runtime.start(&sandbox).await.unwrap();
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
}

async fn a_component_is_compiled_once(world: &World) {
    world.runtime().prepare(world.hello).await.unwrap();
    let again = world.runtime();
    again.prepare(world.hello).await.unwrap();
    again.start(&world.sandbox()).await.unwrap();
    assert_eq!(world.keep.ran.load(Ordering::SeqCst), 1);
    again.prune(&[].into()).await.unwrap();
    again.prepare(world.hello).await.unwrap();
    assert_eq!(world.keep.ran.load(Ordering::SeqCst), 2);
}

async fn a_stale_artefact_is_compiled_again(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.prepare(world.hello).await.unwrap();
    let compiled = std::fs::read_dir(world.dir.path().join("functions/compiled")).unwrap().next().unwrap().unwrap();
    std::fs::write(compiled.path(), b"of another processor").unwrap();
    runtime.start(&sandbox).await.unwrap();
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
}

async fn what_nothing_needs_goes_and_is_compiled_again(world: &World) {
    let runtime = world.runtime();
    let sandbox = world.sandbox();
    runtime.start(&sandbox).await.unwrap();
    let compiled = || std::fs::read_dir(world.dir.path().join("functions/compiled")).unwrap().count();
    runtime.collect(vec![sandbox.image]).await.unwrap();
    assert_eq!(compiled(), 1, "what is kept is kept");
    runtime.collect(Vec::new()).await.unwrap();
    assert_eq!(compiled(), 0);
    assert_eq!(world.get(&sandbox, "/").await.0, 200, "who serves has it open");
    runtime.prepare(sandbox.image).await.unwrap();
    assert_eq!(compiled(), 1);
}

async fn a_killed_executor_is_observed_and_its_instances_start_again(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    kill(world.keep.pid("executor-").unwrap());
    until("the end is observed", || async { !running(&state(&runtime, sandbox.uid).await) }).await;
    let Some(State::Exited { code, message, .. }) = state(&runtime, sandbox.uid).await else { panic!() };
    assert_eq!(code, Some(128 + 9));
    assert!(message.contains("executor"), "{message}");
    let seen_by_the_next_agent = state(&world.runtime(), sandbox.uid).await;
    assert!(matches!(seen_by_the_next_agent, Some(State::Exited { .. })), "{seen_by_the_next_agent:?}");
    runtime.remove(sandbox.uid).await.unwrap();
    runtime.start(&sandbox).await.unwrap();
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
    assert!(running(&state(&runtime, sandbox.uid).await));
}

async fn instances_live_on_without_the_agent(world: &World) {
    let sandbox = world.sandbox();
    let first = world.runtime();
    first.start(&sandbox).await.unwrap();
    let before = first.observe().await.unwrap();
    drop(first);
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
    let second = world.runtime();
    assert_eq!(second.observe().await.unwrap(), before);
    // Even one whose record was lost is seen and can be removed.
    std::fs::remove_dir_all(world.dir.path().join("functions/instances")).unwrap();
    let third = world.runtime();
    assert_eq!(third.observe().await.unwrap(), before);
    third.remove(sandbox.uid).await.unwrap();
    assert_eq!(third.observe().await.unwrap(), []);
    assert!(world.request(&sandbox, "/counter", Bytes::new()).await.is_err());
}

async fn stopping_finishes_what_is_under_way(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    // What comes back of its body shows that a request is under way.
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, sandbox.template.ports[0].port)).await.unwrap();
    let start = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\nconnection: close\r\n\r\nfirst";
    stream.write_all(start.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"first\r\n") {
        answer.push(tokio::time::timeout(SOON, stream.read_u8()).await.unwrap().unwrap());
    }
    runtime.stop(sandbox.uid).await.unwrap();
    assert!(running(&state(&runtime, sandbox.uid).await), "a request is still under way");
    stream.write_all(b"later").await.unwrap();
    tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("later"), "{answer}");
    until("it has stopped", || async {
        matches!(state(&runtime, sandbox.uid).await, Some(State::Exited { code: Some(0), .. }))
    })
    .await;
    assert!(world.request(&sandbox, "/counter", Bytes::new()).await.is_err());
    runtime.remove(sandbox.uid).await.unwrap();
    assert_eq!(state(&runtime, sandbox.uid).await, None);
}

/// The processor time that a process has taken, in hundredths of a second.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may hold anything, is the third field (proc(5)).
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

async fn the_last_removal_ends_the_executor(world: &World) {
    let runtime = world.runtime();
    let (one, two) = (world.sandbox(), world.sandbox());
    runtime.start(&one).await.unwrap();
    runtime.start(&two).await.unwrap();
    runtime.remove(one.uid).await.unwrap();
    assert!(world.keep.pid("executor-").is_some());
    assert_eq!(world.get(&two, "/counter").await, (200, "1\n".into()));
    let spinning = world.request(&two, "/spin", Bytes::new());
    let remove = async {
        let pid = world.keep.pid("executor-").unwrap();
        let before = ticks(pid);
        until("it spins", || async { ticks(pid) > before + 20 }).await;
        runtime.remove(two.uid).await.unwrap();
    };
    let (answer, ()) = tokio::join!(spinning, remove);
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status() == 503));
    assert_eq!(world.keep.pid("executor-"), None);
    runtime.remove(two.uid).await.expect("removing nothing is harmless");
    runtime.start(&two).await.unwrap();
    assert_eq!(world.get(&two, "/counter").await, (200, "1\n".into()));
}

/// Keeps an executor ready as an agent does, until it is dropped.
struct Upkeep(tokio::task::JoinHandle<()>);

impl Upkeep {
    fn of(runtime: &Arc<FunctionRuntime>) -> Self {
        let runtime = runtime.clone();
        Self(tokio::spawn(async move { runtime.upkeep().await }))
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn kill(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::SIGKILL).unwrap();
}

/// The one executor that there is, but for those that are named.
async fn another(world: &World, but: &[u32]) -> u32 {
    let others = || world.keep.pids("executor-").into_iter().filter(|pid| !but.contains(pid)).collect::<Vec<_>>();
    until("there is another executor", || async { others().len() == 1 }).await;
    others()[0]
}

async fn one_executor_stands_by_and_is_replaced_when_it_is_taken_or_dies(world: &World) {
    let (runtime, sandbox) = (Arc::new(world.runtime()), world.sandbox());
    let _upkeep = Upkeep::of(&runtime);
    runtime.prepare(world.hello).await.unwrap();
    let first = another(world, &[]).await;
    kill(first);
    until("it is seen to be gone, and replaced", || async {
        runtime.observe().await.unwrap();
        world.keep.pids("executor-").iter().any(|pid| *pid != first)
    })
    .await;
    let stood_by = another(world, &[]).await;
    runtime.warm(&sandbox.project).await;
    assert_eq!(world.keep.pids("executor-"), [stood_by]);
    runtime.start(&sandbox).await.unwrap();
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
    let replaced = another(world, &[stood_by]).await;
    // What serves is left alone when the other one goes.
    kill(replaced);
    until("it is replaced again", || async {
        runtime.observe().await.unwrap();
        world.keep.pids("executor-").iter().any(|pid| ![stood_by, replaced].contains(pid))
    })
    .await;
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
    runtime.remove(sandbox.uid).await.unwrap();
    assert!(!world.keep.pids("executor-").contains(&stood_by), "it ends with its last instance");
}

async fn two_projects_never_share_an_executor(world: &World) {
    let runtime = Arc::new(world.runtime());
    let _upkeep = Upkeep::of(&runtime);
    runtime.prepare(world.hello).await.unwrap();
    another(world, &[]).await;
    // One stands by, and all come at once.
    let sandboxes: Vec<_> =
        (0..6).map(|n| Sandbox { project: format!("project-{}", n % 3).parse().unwrap(), ..world.sandbox() }).collect();
    for started in join_all(sandboxes.iter().map(|sandbox| runtime.start(sandbox))).await {
        started.unwrap();
    }
    let executors: Vec<String> = sandboxes.iter().map(|sandbox| world.executor_of(sandbox.uid)).collect();
    for (n, executor) in executors.iter().enumerate() {
        assert_eq!(world.get(&sandboxes[n], "/counter").await, (200, "1\n".into()));
        for (m, other) in executors.iter().enumerate() {
            assert_eq!(executor == other, n % 3 == m % 3, "{executors:?}");
        }
    }
    // The next agent knows them apart too.
    let next = world.runtime();
    let more = Sandbox { project: "project-1".parse().unwrap(), ..world.sandbox() };
    next.start(&more).await.unwrap();
    assert_eq!(world.executor_of(more.uid), executors[1]);
}

async fn the_next_agent_goes_on_with_the_executor_that_stands_by(world: &World) {
    let first = Arc::new(world.runtime());
    let upkeep = Upkeep::of(&first);
    first.prepare(world.hello).await.unwrap();
    let pid = another(world, &[]).await;
    // Once it has answered: one that can't be asked is passed over.
    first.warm(&world.sandbox().project).await;
    drop((upkeep, first));
    let (second, sandbox) = (Arc::new(world.runtime()), world.sandbox());
    let upkeep = Upkeep::of(&second);
    second.observe().await.unwrap();
    second.start(&sandbox).await.unwrap();
    assert_eq!(world.keep.pids("executor-").first(), Some(&pid), "it was taken");
    let other = another(world, &[pid]).await;
    // An agent that ends leaves what serves, and nothing else.
    drop(upkeep);
    second.close().await;
    assert_eq!(world.keep.pids("executor-"), [pid], "not {other}");
    assert_eq!(world.get(&sandbox, "/counter").await, (200, "1\n".into()));
    second.remove(sandbox.uid).await.unwrap();
    assert!(world.keep.pids("executor-").is_empty());
}

async fn no_executor_stands_by_where_no_function_can_come(world: &World) {
    let runtime = Arc::new(world.runtime());
    let _upkeep = Upkeep::of(&runtime);
    runtime.prepare(world.hello).await.unwrap();
    another(world, &[]).await;
    runtime.collect(Vec::new()).await.unwrap();
    until("it has ended", || async { world.keep.pids("executor-").is_empty() }).await;
    assert_eq!(runtime.observe().await.unwrap(), []);
}

async fn a_later_epoch_replaces_an_earlier_one(world: &World) {
    let (runtime, mut sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    sandbox.epoch = 2;
    sandbox.template.env.insert("NAME".into(), "epoch two".into());
    runtime.start(&sandbox).await.unwrap();
    let observed = runtime.observe().await.unwrap();
    assert_eq!(observed.iter().map(|o| o.epoch).collect::<Vec<_>>(), [2]);
    assert_eq!(world.get(&sandbox, "/").await, (200, "Hello from epoch two\n".into()));
}

async fn an_executor_has_no_rights(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    let pid = world.keep.pid("executor-").unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    for set in ["CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    assert!(field("Uid:").split_whitespace().all(|uid| uid.parse::<u32>().unwrap() >= 200_000));
    assert_eq!(field("Groups:"), "");
    let root = std::fs::read_link(format!("/proc/{pid}/root")).unwrap();
    assert_eq!(root, world.dir.path().join("functions/empty"));
    let links = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let links: Vec<_> = links.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::trim).collect();
    assert_eq!(links, ["lo"], "a network of its own, with nothing in it");
}

async fn the_socket_is_in_the_instances_namespace(world: &World) {
    let (runtime, mut sandbox) = (world.runtime(), world.sandbox());
    let (sender, names) = std::sync::mpsc::channel();
    let (ask, asked) = std::sync::mpsc::channel::<u16>();
    // A thread with a network namespace of its own, whose loopback is up: what a host makes for an instance.
    let inside = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let status = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(status.success());
        let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
        sender.send(path).unwrap();
        let port = asked.recv().unwrap();
        let mut answers = Vec::new();
        for address in ["127.0.0.1", "::1"] {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect((address, port)).unwrap();
            stream.write_all(b"GET /counter HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answers.push(answer);
        }
        answers
    });
    sandbox.netns = names.recv().unwrap().into();
    runtime.start(&sandbox).await.unwrap();
    ask.send(sandbox.template.ports[0].port).unwrap();
    let answers = tokio::task::spawn_blocking(|| inside.join().unwrap()).await.unwrap();
    assert!(answers.iter().all(|answer| answer.ends_with("\r\n\r\n1\n")), "{answers:?}");
    assert!(world.request(&sandbox, "/counter", Bytes::new()).await.is_err(), "not in the host's namespace");
}

async fn clients_may_speak_http2(world: &World) {
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.start(&sandbox).await.unwrap();
    let builder =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).http2_only(true).clone();
    let client = builder.build_http::<http_body_util::Empty<Bytes>>();
    let uri: http::Uri = format!("http://127.0.0.1:{}/counter", sandbox.template.ports[0].port).parse().unwrap();
    for response in join_all((0..20).map(|_| client.get(uri.clone()))).await {
        let response = response.unwrap();
        assert_eq!(response.version(), http::Version::HTTP_2);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "1\n");
    }
}

async fn the_benchmarks_peer_answers_alike(world: &World) {
    let bytes = std::fs::read(world.dir.path().join("blobs").join(world.hello.hex())).unwrap();
    let outcome = tokio::task::spawn_blocking(move || bench_in_process(&bytes, "/counter", 20)).await.unwrap().unwrap();
    assert_eq!((outcome.requests, outcome.body), (20, b"1\n".to_vec()));
}
