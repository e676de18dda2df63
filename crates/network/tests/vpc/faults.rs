//! What breaks, and that it is whole again afterwards.

use super::*;

/// Two networks on two hosts, with everything that makes links and routes.
async fn full() -> (Cloud, Vec<NetnsRef>) {
    let mut cloud = Cloud::new(2, true).await;
    let mut plan = network(1);
    plan.route_tables[0].routes = vec![RoutePlan { to: cidr("0.0.0.0/0"), via: Via::Internet }];
    cloud.networks = vec![plan, network(2)];
    let mut at = Vec::new();
    for tenant in 0..2_u16 {
        for host in 0..2_u16 {
            let number = 10 + 2 * tenant + host;
            at.push(cloud.instance(host.into(), number).await);
            let nic = cloud.nic(tenant.into(), 5 + host, host.into(), number, 0);
            cloud.nic_mut(nic).rate = Some(1_000_000_000);
        }
    }
    let nic = cloud.networks[0].nics[0].uid;
    let address = "10.96.0.200".parse().unwrap();
    cloud.networks[0].floating = vec![FloatingPlan { uid: uid(7, 1), name: "door".parse().unwrap(), address, nic }];
    (cloud, at)
}

fn whole(at: &[NetnsRef]) {
    for tenant in 0..2 {
        assert!(meets(&at[2 * tenant], &at[2 * tenant + 1], 6, DEADLINE));
    }
}

#[test]
fn what_was_cut_off_at_any_step_is_completed() {
    isolated("vpc::faults::what_was_cut_off_at_any_step_is_completed", async || {
        let (cloud, at) = full().await;
        let all = cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap().changes as i64;
        cloud.apply().await;
        whole(&at);
        assert!(all > 40, "{all}");
        let world = &cloud.world;
        for steps in [0, 1, 2, 3, 4, 6, 9, 14, 20, 29, 40, all * 2 / 3, all - 1] {
            cloud.engines[0].remove().await.unwrap();
            let left = Arc::new(AtomicI64::new(steps));
            let dir = world._dir.path().join("vpc-0");
            let failing = Engine::failing(dir, world.nets[0].clone(), world.hosts[0].netns.clone(), left);
            // It says so, one way or the other.
            if let Ok(applied) = failing.apply(cloud.told(0), Vec::new()).await {
                assert!(!applied.networks.is_empty() || !applied.troubles.is_empty(), "after {steps} steps");
            }
            assert_ne!(cloud.differences(0).await, Vec::<String>::new(), "after {steps} steps");
            cloud.apply().await;
            whole(&at);
            cloud.all_right().await;
        }
    });
}

#[test]
fn a_change_that_fails_half_way_leaves_what_worked() {
    isolated("vpc::faults::a_change_that_fails_half_way_leaves_what_worked", async || {
        let (mut cloud, at) = full().await;
        cloud.apply().await;
        let mut open: Vec<Open> = [four(6), six(6)].map(|to| open(&at[0], &at[1], to)).into();
        cloud.instance(0, 20).await;
        let nic = cloud.nic(0, 9, 0, 20, 0);
        cloud.networks[0].floating.clear();
        cloud.networks[0].groups[0].rules[0].priority += 1;
        let world = &cloud.world;
        for steps in 0..12 {
            let left = Arc::new(AtomicI64::new(steps));
            let dir = world._dir.path().join("vpc-0");
            let failing = Engine::failing(dir, world.nets[0].clone(), world.hosts[0].netns.clone(), left);
            let _ = failing.apply(cloud.told(0), Vec::new()).await;
            open.iter_mut().for_each(Open::goes_on);
        }
        let applied = cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
        assert!(applied.plugged.contains(&(nic, instance_uid(20))), "{applied:?}");
        open.iter_mut().for_each(Open::goes_on);
        cloud.apply().await;
        cloud.all_right().await;
    });
}

#[test]
fn what_somebody_broke_is_found_and_mended() {
    isolated("vpc::faults::what_somebody_broke_is_found_and_mended", async || {
        let (cloud, at) = full().await;
        cloud.apply().await;
        let own = cloud.inside_network(0, 0);
        let host = cloud.world.hosts[0].netns.clone();
        let nic = cloud.networks[0].nics[0].uid;
        let link = nexus_network::vpc::links::nic(nic);
        let up = nexus_network::vpc::links::host(cloud.networks[0].uid);
        let breaks: Vec<(&NetnsRef, String)> = vec![
            (&own, "ip link del vx".into()),
            (&own, "ip link set vx down".into()),
            (&own, "ip link set vx mtu 1200".into()),
            (&own, format!("ip link del {link}")),
            (&own, "ip link del dev up".into()),
            (&host, format!("ip link set {up} down")),
            (&host, "nft delete table inet nexus-vpc".into()),
            (&own, "nft delete table inet nexus".into()),
            (&own, "nft delete table arp nexus".into()),
            (&own, "nft delete table netdev nexus".into()),
            (&own, "nft delete chain netdev nexus from_tunnel".into()),
            (&own, "ip route flush table main".into()),
            (&own, "ip -6 route flush table 998".into()),
            (&own, "ip route flush table 1000".into()),
            (&own, "ip neigh flush dev vx nud permanent".into()),
            (&own, "ip rule flush".into()),
            (&own, "ip addr flush dev lo".into()),
            (&host, "ip route del 10.96.0.200".into()),
            (&host, "ip neigh del proxy 10.96.0.200 dev uplink".into()),
            (&own, format!("tc qdisc del dev {link} root")),
            (&at[0], "ip link set nic0 address 06:00:00:00:00:99".into()),
            (&at[0], "ip addr flush dev nic0".into()),
            (&at[0], "ip route del default".into()),
            (&at[0], "ip -6 rule del pref 1010".into()),
            (&at[0], "ip link del nic0".into()),
        ];
        for (place, command) in breaks {
            run(place, &command);
            let differences = cloud.differences(0).await;
            assert!(!differences.is_empty(), "{command}: not seen");
            assert!(cloud.apply().await > 0, "{command}");
            assert_eq!(cloud.differences(0).await, Vec::<String>::new(), "{command}: {differences:?}");
            assert!(meets(&at[0], &at[1], 6, DEADLINE), "{command}");
        }
        // The file by which a namespace is found is lost: all is made anew beside what nobody finds.
        let NetnsRef::Path(path) = &own else { panic!() };
        nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        cloud.apply().await;
        whole(&at);
        cloud.all_right().await;
    });
}

#[test]
fn one_network_that_cannot_be_stops_no_other() {
    isolated("vpc::faults::one_network_that_cannot_be_stops_no_other", async || {
        let (cloud, at) = full().await;
        let host = cloud.world.hosts[0].netns.clone();
        // Somebody else's tunnel has the number of the first.
        let vni = cloud.networks[0].vni;
        run(&host, &format!("ip link add foreign type vxlan id {vni} dstport 4789 local {}", cloud.endpoint(0)));
        let applied = cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
        let trouble = &applied.networks[&cloud.networks[0].uid];
        assert!(trouble.contains(&vni.to_string()), "{trouble}");
        assert_eq!((applied.plugged.len(), applied.troubles.len()), (1, 1), "{applied:?}");
        cloud.engines[1].apply(cloud.told(1), Vec::new()).await.unwrap();
        assert!(meets(&at[2], &at[3], 6, DEADLINE));
        assert!(attempt(&host, "ip link show foreign").0);
        run(&host, "ip link del foreign");
        cloud.apply().await;
        whole(&at);
    });
}

#[test]
fn a_host_to_which_no_tunnel_can_lead_is_named() {
    isolated("vpc::faults::a_host_to_which_no_tunnel_can_lead_is_named", async || {
        let mut cloud = Cloud::new(2, true).await;
        cloud.networks = vec![network(1)];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        cloud.nic(0, 5, 0, 10, 0);
        cloud.six = false;
        let far = cloud.nic(0, 6, 1, 11, 0);
        let four = cloud.endpoint(1);
        cloud.six = true;
        cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
        let told = cloud.differences(0).await;
        assert!(told.len() == 1 && told[0].contains(&format!("no tunnel leads to {four}")), "{told:?}");
        let endpoint = cloud.endpoint(1);
        cloud.nic_mut(far).at.as_mut().unwrap().endpoint = endpoint;
        cloud.apply().await;
        cloud.all_right().await;
        assert!(meets(&a, &b, 6, DEADLINE));
    });
}

#[test]
fn a_host_that_was_cut_off_is_there_again_when_it_is_healed() {
    isolated("vpc::faults::a_host_that_was_cut_off_is_there_again_when_it_is_healed", async || {
        let (cloud, at) = full().await;
        cloud.apply().await;
        let mut open = open(&at[0], &at[1], four(6));
        let link = &cloud.world.hosts[1];
        cloud.world.wire.cut(&link.host).await.unwrap();
        assert!(!meets(&at[0], &at[1], 6, BRIEFLY));
        // While it is alone it works, and its agent goes on.
        cloud.apply().await;
        cloud.world.wire.heal(link).await.unwrap();
        whole(&at);
        open.goes_on();
        cloud.apply().await;
        cloud.all_right().await;
    });
}

#[test]
#[ignore = "a measurement: run it alone"]
fn a_thousand_nics_from_nothing() {
    isolated("vpc::faults::a_thousand_nics_from_nothing", async || {
        let mut cloud = Cloud::new(1, true).await;
        cloud.networks = vec![network(1)];
        for n in 0..1000 {
            let number = 2000 + n;
            cloud.world.nets[0]
                .create(&instance_uid(number).to_string(), instance(&cloud.world.hosts[0], (n % 250) as u8))
                .await
                .unwrap();
            cloud.nic(0, 16 + n, 0, number, 0);
        }
        let start = Instant::now();
        let applied = cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
        println!("1,000 NICs from nothing: {:?}, {} changes", start.elapsed(), applied.changes);
        assert_eq!(applied.plugged.len(), 1000);
        let start = Instant::now();
        assert_eq!(cloud.apply().await, 0);
        println!("looked at again: {:?}", start.elapsed());
        let start = Instant::now();
        cloud.networks[0].nics.pop();
        cloud.apply().await;
        println!("one less: {:?}", start.elapsed());
        let start = Instant::now();
        cloud.engines[0].remove().await.unwrap();
        println!("removed: {:?}", start.elapsed());
    });
}

/// What the kernel filters by, but for what it counted and when it was made.
fn filtered(own: &NetnsRef) -> (Vec<String>, String) {
    let all = run(own, "nft -s list ruleset");
    // What meters have seen comes and goes, and so do notes.
    let seen = |l: &&str| l.contains("expires") || l.contains("limit rate over") && !l.contains("update @");
    let kept = all.lines().map(str::trim).filter(|l| !seen(l));
    let mut lines: Vec<String> = kept.map(str::to_owned).collect();
    lines.sort();
    let tables = run(own, "nft -a -t list ruleset");
    (lines, tables.lines().filter(|l| l.starts_with("table ")).collect())
}

#[test]
fn a_nic_elsewhere_changes_what_is_about_it_and_nothing_else() {
    isolated("vpc::faults::a_nic_elsewhere_changes_what_is_about_it_and_nothing_else", async || {
        let mut cloud = Cloud::new(2, true).await;
        let mut plan = network(1);
        // Who may come in is a set of all members.
        plan.groups[0].rules[0].remotes = vec![nexus_model::plan::Remote::Group(0)];
        cloud.networks = vec![plan];
        let (a, b) = (cloud.instance(0, 10).await, cloud.instance(1, 11).await);
        cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(0, 6, 1, 11, 0);
        cloud.apply().await;
        let own = NetnsRef::Path(cloud.engines[0].namespace(cloud.networks[0].uid));
        let (_, mut tables) = filtered(&own);
        for step in 0..4 {
            match step {
                // More come, one goes, one leaves the group, one changes its address.
                0 => drop((7..40).map(|n| cloud.nic(0, n, 1, 100 + n, 0)).collect::<Vec<_>>()),
                1 => drop(cloud.networks[0].nics.pop()),
                2 => cloud.networks[0].nics[9].groups.clear(),
                _ => cloud.networks[0].nics[12].address4 = Some(Ipv4Addr::new(10, 0, 3, 3)),
            }
            cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
            let (lines, same) = filtered(&own);
            assert_eq!(same, tables, "step {step}: the tables are those that were there");
            assert_eq!(cloud.differences(0).await, Vec::<String>::new());
            // As it would be, made from nothing.
            let fresh = cloud.world._dir.path().join("vpc-0");
            let fresh = Engine::new(fresh, cloud.world.nets[0].clone(), cloud.world.hosts[0].netns.clone());
            let mut other = HostNetworks::clone(&cloud.told(0));
            let mut plan = NetworkPlan::clone(&other.networks[0]);
            plan.flow_logs = nexus_model::plan::FlowLogs::All;
            other.networks = vec![Arc::new(plan)];
            fresh.apply(Arc::new(other), Vec::new()).await.unwrap();
            assert_ne!(filtered(&own).0, lines);
            cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
            let (whole, anew) = filtered(&own);
            assert_ne!(anew, tables, "step {step}: somebody else was at it, so all of it is made anew");
            assert_eq!(whole, lines, "step {step}");
            tables = anew;
            assert!(meets(&a, &b, 6, DEADLINE));
        }
    });
}
