//! NUMA nodes as the daemon brings them about: an instance and its parts are kept to the node that they were placed on.

use nexus_agent::numa::Numa;
use nexus_compute::CpuSet;

use super::*;

/// A host with one node, number 3.
pub fn one_node() -> Numa {
    let set = CpuSet { cpus: "0-1,8".into(), mems: Some("3".into()) };
    Numa { sets: [(3, set)].into(), ..Numa::default() }
}

#[tokio::test]
async fn an_instance_and_its_parts_are_kept_to_their_node_and_to_no_other() {
    let host = Host::new();
    let mut plane = plane(&host.pki, None).await;
    let kept = |n: u8, node| InstancePlan { numa_nodes: vec![node], ..parts::with_parts(n, &[], &["c"]) };
    plane.plan.send_replace(plan(1, [kept(1, 3), kept(2, 7), instance(3, 1)]));
    let daemon = host.start(std::slice::from_ref(&plane.at));
    plane.instance(uid(1), "runs", |i| i.ready).await;
    plane.instance(uid(3), "runs", |i| i.ready).await;
    let cpuset = |uid: Uid| host.runtime.cpusets.lock().unwrap().get(&uid).cloned().flatten();
    let set = one_node().sets.remove(&3);
    assert_eq!((cpuset(uid(1)), cpuset(uid(1).part("c"))), (set.clone(), set));
    assert_eq!(cpuset(uid(3)), None);
    // A node that the host doesn't have any more, since it was placed here.
    let report = plane.instance(uid(2), "says what is wrong", |i| i.message.contains("NUMA node 7")).await;
    assert!(!report.ready && host.runtime.starts_of(uid(2)).is_empty(), "{report:?}");
    daemon.stop().await;
    plane.kill().await;
}
