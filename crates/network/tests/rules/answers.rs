//! DHCP and router discovery, asked for by a real client.

use nexus_network::vpc::answer;
use socket2::{Domain, Socket, Type};
use tokio::sync::watch;

use super::plans::*;
use super::*;

#[test]
fn a_client_is_told_its_address_its_routes_and_its_router() {
    isolated("rules::answers::a_client_is_told_its_address_its_routes_and_its_router", async || {
        let mut plan = network(1);
        plan.groups = vec![group(1, 0, Vec::new())];
        plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 0, &[0])];
        let mut site = Site::new(1).await;
        site.apply(vec![plan]).await;
        let (_told, heard) = watch::channel(site.told(0));
        let engine = site.engines[0].clone();
        let server = tokio::spawn(answer::run(heard, move |network| NetnsRef::Path(engine.namespace(network))));
        // Another asks without end: it is not even heard.
        inside(&site.nic(1), || {
            let socket = UdpSocket::bind((address4(1, 3), 68)).unwrap();
            socket.set_broadcast(true).unwrap();
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::BindToDevice, &"nic0".into()).unwrap();
            (0..300).for_each(|_| drop(socket.send_to(&[1; 300], "255.255.255.255:67")));
        });
        assert!(site.dropped(0, "flood") > 200);
        let own = site.nic(0);
        // As a machine that has just started: it knows its link and nothing else.
        firewall::run(&own, "ip addr flush dev nic0 scope global");
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("told");
        let told = dir.path().join("env");
        let text =
            format!("#!/bin/sh\n[ \"$1\" = bound ] && env > {0}.new && mv {0}.new {0}\nexit 0\n", told.display());
        std::fs::write(&script, text).unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let client = {
            let (own, script) = (own.clone(), script.clone());
            tokio::task::spawn_blocking(move || {
                inside(&own, move || {
                    let mut command = Command::new("busybox");
                    command.args([
                        "udhcpc",
                        "-i",
                        "nic0",
                        "-f",
                        "-q",
                        "-n",
                        "-t",
                        "10",
                        "-T",
                        "1",
                        "-O",
                        "staticroutes",
                        "-O",
                        "mtu",
                    ]);
                    command.arg("-s").arg(script);
                    command.output().unwrap()
                })
            })
        };
        let output = client.await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = std::fs::read_to_string(told).unwrap();
        for line in [
            "ip=10.1.0.2",
            "mask=24",
            "router=10.1.0.1",
            "serverid=10.1.0.1",
            "mtu=1400",
            "dns=169.254.1.1",
            "staticroutes=10.1.0.1/32 0.0.0.0 0.0.0.0/0 10.1.0.1",
        ] {
            assert!(told.lines().any(|l| l == line), "{line}: {told}");
        }

        let six = {
            let own = own.clone();
            tokio::task::spawn_blocking(move || inside(&own, given6)).await.unwrap()
        };
        assert_eq!(six, Some(address6(1, 2)), "and of IPv6");

        // Router discovery: the kernel of the client is the client.
        inside(&own, || {
            for (key, value) in [("accept_ra", "2"), ("router_solicitations", "-1"), ("addr_gen_mode", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/nic0/{key}"), value).unwrap();
            }
        });
        firewall::run(&own, "ip link set nic0 down");
        firewall::run(&own, "ip link set nic0 up");
        let end = Instant::now() + DEADLINE;
        let router = || firewall::run(&own, "ip -6 route show default");
        while !router().contains("via fe80::1 dev nic0 proto ra") {
            assert!(Instant::now() < end, "{}", router());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server.abort();
    });
}

/// The address that a DHCPv6 server on the link gives to who solicits and requests one (RFC 8415, 18.2).
fn given6() -> Option<Ipv6Addr> {
    let option =
        |code: u16, value: &[u8]| [&code.to_be_bytes()[..], &(value.len() as u16).to_be_bytes(), value].concat();
    let client = option(1, &[0, 3, 0, 1, 6, 0, 0, 0, 1, 2]);
    let association = option(3, &[[0, 0, 0, 7], [0; 4], [0; 4]].concat());
    let index = nix::net::if_::if_nametoindex("nic0").unwrap();
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
    socket.set_only_v6(true).unwrap();
    socket.bind_device(Some(b"nic0")).unwrap();
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 546).into()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let socket = UdpSocket::from(socket);
    let servers = std::net::SocketAddrV6::new("ff02::1:2".parse().unwrap(), 547, 0, index);
    // Asks until it is answered, and finds an option among those of the answer.
    let ask = |kind: u8, more: &[u8]| {
        let question = [&[kind, 7, 7, 7][..], &client, &association, more].concat();
        let end = Instant::now() + DEADLINE;
        let mut buffer = [0; 1500];
        loop {
            assert!(Instant::now() < end, "nobody answers to {kind}");
            socket.send_to(&question, servers).unwrap();
            if let Ok(length) = socket.recv(&mut buffer) {
                return buffer[..length].to_vec();
            }
        }
    };
    let find = |mut options: &[u8], code: u16| {
        while options.len() >= 4 {
            let length = usize::from(u16::from_be_bytes([options[2], options[3]]));
            let value = options[4..4 + length].to_vec();
            if options[..2] == code.to_be_bytes() {
                return Some(value);
            }
            options = &options[4 + length..];
        }
        None
    };
    let offer = ask(1, &[]);
    let server = option(2, &find(&offer[4..], 2)?);
    let reply = ask(3, &server);
    assert_eq!((offer[0], reply[0]), (2, 7), "an advertisement, and a reply");
    let address = find(&find(&reply[4..], 3)?[12..], 5)?;
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(&address[..16]).ok()?))
}
