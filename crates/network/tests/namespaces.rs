//! The kernel as it is: every test makes its own namespaces and links, sends TCP through them, and removes them.
//!
//! The "machine" of a test is a network namespace too, so that nothing of the real one is touched: `Underlay` works on
//! the namespace of its thread, hence the tests that need it re-run themselves in a new one.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nexus_network::{
    Backbone, HostLink, HostNet, InstanceAddress, InstanceNet, NetnsRef, RegionLink, Underlay, UnderlayAddress, enter,
    new_namespace,
};
use nix::sched::{CloneFlags, unshare};

#[path = "firewall/mod.rs"]
mod firewall;
#[path = "rules/mod.rs"]
mod rules;
#[path = "vpc/mod.rs"]
mod vpc;

const DEADLINE: Duration = Duration::from_secs(20);

/// Runs a test in a process-wide fresh network and mount namespace: a child of this test binary.
fn isolated(test: &str, body: impl AsyncFnOnce()) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    if std::env::var("NEXUS_NETWORK_CHILD").is_ok_and(|name| name == test) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(body());
        return;
    }
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env("NEXUS_NETWORK_CHILD", test);
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
            Ok(())
        });
    }
    assert!(command.status().unwrap().success(), "{test} failed in its own namespaces");
}

/// A bare network namespace, held open by a file.
fn bare(dir: &Path, name: &str) -> NetnsRef {
    let path = dir.join(name);
    let target = path.clone();
    std::thread::spawn(move || {
        std::fs::File::create(&target).unwrap();
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, bind, None::<&str>).unwrap();
    })
    .join()
    .unwrap();
    NetnsRef::Path(path)
}

/// Runs something on a thread inside a namespace.
fn inside<T: Send + 'static>(netns: &NetnsRef, work: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = netns.clone();
    std::thread::spawn(move || {
        match &netns {
            NetnsRef::Own => {}
            NetnsRef::Path(path) => enter(&std::fs::File::open(path).unwrap()).unwrap(),
            NetnsRef::Pid(_) => unreachable!(),
        }
        work()
    })
    .join()
    .unwrap()
}

/// Whether `from` reaches a listener on `address` in `to`, within `patience`.
fn reaches(from: &NetnsRef, to: &NetnsRef, address: IpAddr, patience: Duration) -> bool {
    let listener = inside(to, move || TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let asker = from.clone();
    let asker = std::thread::spawn(move || {
        inside(&asker, move || {
            let end = Instant::now() + patience;
            while Instant::now() < end {
                let Ok(mut stream) = TcpStream::connect_timeout(&at, Duration::from_millis(500)) else { continue };
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut word = [0; 5];
                return stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut word)).is_ok();
            }
            false
        })
    });
    while !asker.is_finished() {
        if let Ok((mut stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            let mut word = [0; 5];
            let _ = stream.read_exact(&mut word).and_then(|()| stream.write_all(&word));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    asker.join().unwrap()
}

fn links() -> Vec<String> {
    // The thread's own view: /sys shows the namespace in which it was mounted.
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    table.lines().skip(2).filter_map(|l| Some(l.split(':').next()?.trim().to_owned())).collect()
}

const ADDRESS: UnderlayAddress = UnderlayAddress {
    address6: Ipv6Addr::new(0xfd00, 0xff, 0, 0, 0, 0, 0, 1),
    length6: 64,
    address4: Ipv4Addr::new(10, 96, 0, 1),
    length4: 24,
};

fn host(n: u8, netns: NetnsRef) -> HostLink {
    HostLink {
        host: format!("zone-a-host-{n}"),
        netns,
        address6: Ipv6Addr::new(0xfd00, 0xff, 0, 0, 0, 0, 1, n.into()),
        address4: Ipv4Addr::new(10, 96, 0, 10 + n),
        instances6: Ipv6Addr::new(0xfd00, 0xff, 1, n.into(), 0, 0, 0, 0),
        instances4: Ipv4Addr::new(10, 97, n, 0),
    }
}

fn instance(of: &HostLink, slot: u8) -> InstanceAddress {
    let mut segments = of.instances6.segments();
    segments[7] = slot.into();
    let [a, b, c, _] = of.instances4.octets();
    InstanceAddress { address6: segments.into(), address4: Ipv4Addr::new(a, b, c, slot) }
}

struct World {
    _dir: tempfile::TempDir,
    wire: Underlay,
    hosts: Vec<HostLink>,
    nets: Vec<InstanceNet>,
}

async fn world(hosts: u8) -> World {
    let dir = tempfile::tempdir().unwrap();
    let wire = Underlay::new("nxt", ADDRESS).unwrap();
    HostNet::prepare().await.unwrap();
    wire.create().await.unwrap();
    let mut world = World { wire, hosts: Vec::new(), nets: Vec::new(), _dir: dir };
    for n in 1..=hosts {
        let netns = bare(world._dir.path(), &format!("host-{n}"));
        let link = host(n, netns.clone());
        HostNet::prepare_in(netns.clone()).await.unwrap();
        world.wire.attach(&link).await.unwrap();
        world.hosts.push(link);
        world.nets.push(InstanceNet::on_host(world._dir.path().join(format!("netns-{n}")), netns));
    }
    world
}

#[test]
fn instances_hosts_and_the_machine_reach_one_another_on_both_families() {
    isolated("instances_hosts_and_the_machine_reach_one_another_on_both_families", async || {
        let w = world(2).await;
        let mut instances = Vec::new();
        for (i, link) in w.hosts.iter().enumerate() {
            let address = instance(link, 2);
            let path = w.nets[i].create("one", address).await.unwrap();
            instances.push((NetnsRef::Path(path), address));
        }
        let (a, b) = (&instances[0], &instances[1]);
        let (host_a, host_b) = (&w.hosts[0], &w.hosts[1]);
        for (what, from, to, addresses) in [
            ("host from machine", &NetnsRef::Own, &host_a.netns, [host_a.address6.into(), host_a.address4.into()]),
            ("instance from machine", &NetnsRef::Own, &a.0, [a.1.address6.into(), a.1.address4.into()]),
            ("instance from its host", &host_a.netns, &a.0, [a.1.address6.into(), a.1.address4.into()]),
            ("instance from another host", &host_b.netns, &a.0, [a.1.address6.into(), a.1.address4.into()]),
            ("instance from an instance", &b.0, &a.0, [a.1.address6.into(), a.1.address4.into()]),
            ("an instance from itself", &a.0, &a.0, [a.1.address6.into(), a.1.address4.into()]),
        ] {
            for address in addresses {
                let address: IpAddr = address;
                assert!(reaches(from, to, address, DEADLINE), "{what}: {address}");
            }
        }
    });
}

#[test]
fn creating_twice_is_harmless_and_deleting_leaves_nothing() {
    isolated("creating_twice_is_harmless_and_deleting_leaves_nothing", async || {
        let w = world(1).await;
        let (net, link) = (&w.nets[0], &w.hosts[0]);
        let before = inside(&link.netns, links);
        let address = instance(link, 7);
        let path = net.create("seven", address).await.unwrap();
        assert_eq!(net.create("seven", address).await.unwrap(), path);
        w.wire.create().await.unwrap();
        w.wire.attach(link).await.unwrap();
        assert!(reaches(&link.netns, &NetnsRef::Path(path.clone()), address.address6.into(), DEADLINE));
        assert_eq!(net.list().await.unwrap(), ["seven"]);
        assert_eq!(inside(&link.netns, links).len(), before.len() + 1);

        net.delete("seven").await.unwrap();
        net.delete("seven").await.unwrap();
        assert_eq!(inside(&link.netns, links), before);
        assert!(net.list().await.unwrap().is_empty());
        assert!(!std::fs::read_to_string("/proc/self/mounts").unwrap().contains(path.to_str().unwrap()));
        assert!(net.delete("../escape").await.is_err());
    });
}

#[test]
fn what_a_crash_left_half_made_is_completed() {
    isolated("what_a_crash_left_half_made_is_completed", async || {
        let w = world(1).await;
        let (net, link) = (&w.nets[0], &w.hosts[0]);
        let address = instance(link, 3);
        let path: PathBuf = net.path("half");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(net.list().await.unwrap(), ["half"]);
        net.create("half", address).await.unwrap();
        assert!(reaches(&link.netns, &NetnsRef::Path(path.clone()), address.address4.into(), DEADLINE));
        // The namespace's name is lost, as at a reboot without its links; the old link must not get in the way.
        nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        net.create("half", address).await.unwrap();
        assert!(reaches(&link.netns, &NetnsRef::Path(path), address.address6.into(), DEADLINE));
        net.delete("half").await.unwrap();
    });
}

#[test]
fn a_cut_host_is_alone_until_it_is_healed() {
    isolated("a_cut_host_is_alone_until_it_is_healed", async || {
        let w = world(2).await;
        let link = &w.hosts[0];
        let address = instance(link, 2);
        let inner = NetnsRef::Path(w.nets[0].create("one", address).await.unwrap());
        assert!(reaches(&NetnsRef::Own, &inner, address.address6.into(), DEADLINE));
        w.wire.cut(&link.host).await.unwrap();
        let short = Duration::from_millis(1_500);
        assert!(!reaches(&NetnsRef::Own, &link.netns, link.address6.into(), short));
        assert!(!reaches(&NetnsRef::Own, &inner, address.address4.into(), short));
        // What is on the host goes on.
        assert!(reaches(&link.netns, &inner, address.address6.into(), DEADLINE));
        w.wire.heal(link).await.unwrap();
        for to in [IpAddr::from(address.address6), address.address4.into()] {
            assert!(reaches(&NetnsRef::Own, &inner, to, DEADLINE), "{to}");
            assert!(reaches(&w.hosts[1].netns, &inner, to, DEADLINE), "{to}");
        }
        assert!(reaches(&inner, &NetnsRef::Own, "fd00:ff::1".parse().unwrap(), DEADLINE));
    });
}

/// Two regions, number 1 with a host.
#[test]
fn a_region_that_is_cut_off_goes_on_by_itself_until_it_is_healed() {
    isolated("a_region_that_is_cut_off_goes_on_by_itself_until_it_is_healed", async || {
        use std::os::fd::AsRawFd as _;
        let dir = tempfile::tempdir().unwrap();
        let backbone = Backbone::new("nxt").unwrap();
        backbone.create().await.unwrap();
        let files = [new_namespace().unwrap(), new_namespace().unwrap()];
        let netns = |r: usize| NetnsRef::Path(format!("/proc/self/fd/{}", files[r].as_raw_fd()).into());
        let prefix = |r: u16, last| Ipv6Addr::new(0xfd00, 0xff, 0, r << 12, 0, 0, 0, last);
        let wire = |r: u16| Ipv6Addr::new(0xfd00, 0xff, 0, 0xf000, 0, 0, 0, r + 1);
        let hosts_wire = |r: u16| {
            let address = UnderlayAddress { address6: prefix(r, 1), ..ADDRESS };
            Underlay::new("nxt", address).unwrap().inside(netns(r.into()))
        };
        for r in 0..2 {
            hosts_wire(r).create().await.unwrap();
            let others = vec![(prefix(1 - r, 0), 52, wire(1 - r))];
            let region = format!("region-{r}");
            let link = RegionLink { region, netns: netns(r.into()), address6: wire(r), others };
            backbone.attach(&link).await.unwrap();
            // Twice is harmless.
            backbone.attach(&link).await.unwrap();
        }
        let mut host = host(1, bare(dir.path(), "host"));
        host.address6 = prefix(1, 0x101);
        host.instances6 = prefix(1, 0);
        hosts_wire(1).attach(&host).await.unwrap();
        let within = || {
            assert!(reaches(&netns(1), &host.netns, host.address6.into(), DEADLINE));
            assert!(reaches(&host.netns, &netns(1), prefix(1, 1).into(), DEADLINE));
        };
        let across = |patience| {
            [(0, 1), (1, 0)].map(|(from, to)| reaches(&netns(from), &netns(to), prefix(to as u16, 1).into(), patience))
        };
        within();
        assert_eq!(across(DEADLINE), [true, true]);
        backbone.cut("region-1").await.unwrap();
        within();
        assert_eq!(across(Duration::from_millis(1_500)), [false, false]);
        backbone.heal("region-1").await.unwrap();
        assert_eq!(across(DEADLINE), [true, true]);
        within();
        backbone.detach("region-1").await.unwrap();
        Underlay::destroy("nxt").await.unwrap();
        assert_eq!(links().iter().filter(|l| l.starts_with("nxt")).count(), 0);
    });
}

#[test]
fn destroying_removes_all_of_ours_and_nothing_else() {
    isolated("destroying_removes_all_of_ours_and_nothing_else", async || {
        let before = links();
        let (address6, address4) = ("fd00:aa::1".parse().unwrap(), Ipv4Addr::new(10, 95, 0, 1));
        let address = UnderlayAddress { address6, address4, ..ADDRESS };
        let foreign = Underlay::new("fo", address).unwrap();
        foreign.create().await.unwrap();
        let w = world(2).await;
        assert_eq!(links().len(), before.len() + 4);
        w.wire.detach(&w.hosts[1]).await.unwrap();
        assert_eq!(links().len(), before.len() + 3);
        Underlay::destroy("nxt").await.unwrap();
        Underlay::destroy("nxt").await.unwrap();
        let after = links();
        assert!(after.contains(&"fobr0".to_owned()), "{after:?}");
        assert_eq!(after.len(), before.len() + 1, "{after:?}");
        assert!(Underlay::destroy("").await.is_err());
    });
}
