//! Rules and names as a plan and the words of servers make them, and what is kept of those words.

use std::path::Path;

use nexus_env::{Disk, MemDisk, write_atomic};
use nexus_model::Digest;
use nexus_model::kind::{Egress, ImageFormat, Template};
use nexus_model::plan::{Desired, ImagePlan, InstancePlan, NamedInstance, NamedPort, PLAN_VERSION, ProjectNames};

use super::*;
use crate::told::{self, Cache};

fn instance(n: u8, project: &str) -> InstancePlan {
    InstancePlan {
        uid: Uid::from_random([n; 16]),
        name: format!("web-{n}").parse().unwrap(),
        project: project.parse().unwrap(),
        app: "web".parse().unwrap(),
        epoch: 1,
        desired: Desired::Running,
        once: false,
        kept: false,
        numa_nodes: Vec::new(),
        part_digests: Default::default(),
        template: Template::default(),
        image: ImagePlan { format: ImageFormat::Oci, digest: Digest::of(b"i") },
        address6: [0xfd00, 0, 0, 1, 0, 0, 0, n.into()].into(),
        address4: [10, 0, 1, n].into(),
        nics: Vec::new(),
        secrets: BTreeMap::new(),
        request_id: None,
    }
}

fn plan() -> HostPlan {
    HostPlan {
        version: PLAN_VERSION,
        host: "h1".parse().unwrap(),
        revision: 1,
        instances: vec![instance(1, "shop"), instance(2, "bank")],
        prepare: Vec::new(),
    }
}

fn told(revision: u64) -> HostNames {
    let far = NamedInstance {
        uid: None,
        app: "db".parse().unwrap(),
        address6: "fd00:0:0:2::9".parse().unwrap(),
        address4: [10, 0, 2, 9].into(),
        ready: true,
        only4: false,
        ports: vec![NamedPort { name: "pg".parse().unwrap(), port: 5432 }],
    };
    let egress = Egress { mode: EgressMode::Deny, networks: vec!["203.0.113.0/24".parse().unwrap()] };
    let shop = ProjectNames {
        project: "shop".parse().unwrap(),
        egress,
        apps: vec!["db".parse().unwrap(), "idle".parse().unwrap()],
        instances: vec![far],
    };
    // Of a project that has left this host a moment ago.
    let gone = ProjectNames {
        project: "gone".parse().unwrap(),
        egress: Egress { mode: EgressMode::Allow, networks: Vec::new() },
        apps: Vec::new(),
        instances: Vec::new(),
    };
    HostNames {
        version: PLAN_VERSION,
        revision,
        region: "eu".parse().unwrap(),
        instances: vec!["10.0.1.0/24".parse().unwrap()],
        infrastructure: vec!["10.0.0.1/32".parse().unwrap()],
        projects: vec![Arc::new(gone), Arc::new(shop)],
    }
}

#[test]
fn a_project_that_is_not_told_of_yet_is_closed_and_its_instances_know_each_other() {
    let rules = rules(&plan(), None);
    assert_eq!((rules.guests.len(), rules.tenants.len(), rules.infrastructure.len()), (2, 2, 0));
    let [one, two] = &rules.guests[..] else { panic!() };
    assert_ne!(one.tenant, two.tenant);
    for guest in [one, two] {
        let tenant = &rules.tenants[guest.tenant];
        let own = BTreeSet::from([guest.address.address6.into(), guest.address.address4.into()]);
        assert!(tenant.members == own && !tenant.everything && tenant.networks.is_empty());
    }
    let names = entries(&plan(), None, None);
    assert!(names.projects.is_empty() && names.askers.len() == 2);
}

#[test]
fn an_address_that_an_ended_job_had_is_whose_it_is_now() {
    let mut plan = plan();
    let ended = InstancePlan { once: true, kept: true, desired: Desired::Gone, ..instance(2, "shop") };
    plan.instances.push(InstancePlan { uid: Uid::from_random([9; 16]), ..ended });
    let rules = rules(&plan, None);
    assert_eq!(rules.guests.len(), 2);
    let shop = &rules.tenants[rules.guests[0].tenant];
    assert_eq!(shop.members.len(), 2, "nothing of the bank's: {:?}", shop.members);
    assert_eq!(entries(&plan, None, None).askers[&[10, 0, 1, 2].into()], "bank");
}

#[test]
fn members_elsewhere_and_egress_come_from_what_servers_tell() {
    let rules = rules(&plan(), Some(&told(1)));
    assert_eq!(rules.tenants.len(), 2, "nobody of the third project is here");
    let shop = &rules.tenants[rules.guests[0].tenant];
    assert_eq!(shop.members.len(), 4);
    assert_eq!((shop.everything, shop.networks.len()), (false, 1));
    let bank = &rules.tenants[rules.guests[1].tenant];
    assert!(bank.members.len() == 2 && bank.networks.is_empty());
    assert_eq!(rules.infrastructure, [("10.0.0.1".parse().unwrap(), 32)]);
    let names = entries(&plan(), Some(&told(1)), None);
    let shop = &names.projects["shop"];
    assert_eq!((shop.outside, shop.apps["db"].len(), shop.apps["idle"].len()), (true, 1, 0));
    assert_eq!(names.askers[&[10, 0, 1, 2].into()], "bank");
    assert!(!names.projects.contains_key("bank"), "nothing is told of it: its instances are to ask again");
}

#[tokio::test]
async fn what_was_told_last_is_kept_and_nothing_older_takes_its_place() {
    let disk: Arc<dyn Disk> = Arc::new(MemDisk::new(1));
    disk.create_dir_all(Path::new("/data")).unwrap();
    let cache = Cache::new(disk.clone(), "/data/names.json".into());
    let host: Name = "h1".parse().unwrap();
    assert_eq!(cache.load(&host).await, None);
    let names = watch::Sender::default();
    for revision in [5, 4, 7] {
        told::take(told(revision), &cache, &names).await;
    }
    told::take(HostNames { version: PLAN_VERSION + 1, ..told(9) }, &cache, &names).await;
    assert_eq!(names.borrow().as_ref().map(|n| n.revision), Some(7));
    assert_eq!(cache.load(&host).await, Some(told(7)));
    write_atomic(&*disk, &cache.path, b"{torn").unwrap();
    assert_eq!(cache.load(&host).await, None);
}
