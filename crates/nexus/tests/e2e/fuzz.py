"""Sends frames of every sort, made by scapy with fields that are anything, out of a link of the network namespace that it runs in.

Standard input says from whom and about whom, as JSON; what it prints is how many it has sent. The same seed makes the same frames, but for
the time of day in timestamps of ICMP.
"""

import json
import logging
import random
import sys

logging.getLogger("scapy").setLevel(logging.ERROR)

from scapy.all import (  # noqa: E402  The level must be set before.
    ARP, BOOTP, DHCP, GRE, ICMP, IP, SCTP, TCP, UDP, VXLAN, Dot1AD, Dot1Q, Ether, ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS,
    ICMPv6ND_RA, ICMPv6ND_Redirect, IPOption_LSRR, IPOption_RR, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting, LLC, PPPoE, Raw, SCTPChunkData, SNAP, STP, conf, fragment, fuzz,
)
from scapy.contrib.mpls import MPLS  # noqa: E402

aims = json.load(sys.stdin)
random.seed(aims["seed"])
pick = random.choice
mark = Raw(aims["mark"].encode())
ports = [0, 22, 53, 67, 80, 81, 547, 4789, 5000, 7000, 7451, 65535]


def four():
    """A header from oneself or in the name of another, now and then with options that say where it is to go."""
    options = pick([[], [], [], [IPOption_LSRR(routers=[pick(aims["four"])])], [IPOption_RR(routers=[pick(aims["four"])])]])
    source = pick([aims["own4"]] * 2 + [pick(aims["four"])])
    return IP(src=source, dst=pick(aims["four"]), ttl=pick([0, 1, 2, 64, 255]), tos=random.getrandbits(8), options=options)


def six():
    """The same of IPv6, with headers between."""
    source = pick([aims["own6"]] * 2 + [pick(aims["six"]), "fe80::1", "::"])
    header = IPv6(src=source, dst=pick(aims["six"] + ["ff02::1", "ff02::2", "fe80::1"]), hlim=pick([0, 1, 64, 255]))
    between = [
        lambda: IPv6ExtHdrHopByHop(),
        lambda: IPv6ExtHdrDestOpt(),
        lambda: IPv6ExtHdrRouting(addresses=[pick(aims["six"])]),
        lambda: IPv6ExtHdrFragment(offset=pick([0, 1, 8191]), m=pick([0, 1]), id=random.getrandbits(32)),
    ]
    for make in random.sample(between, pick([0, 0, 0, 1, 2])):
        header = header / make()
    return header


def transport():
    port = {"sport": pick([4000, pick(ports)]), "dport": pick(ports)}
    return pick([
        lambda: fuzz(TCP(**port)) / mark,
        lambda: TCP(flags=pick(["S", "A", "R", "F", "SA", "FPU", ""]), **port) / mark,
        lambda: fuzz(UDP(**port)) / mark,
        lambda: UDP(**port) / mark,
        lambda: SCTP(**port) / SCTPChunkData(data=aims["mark"].encode()),
        lambda: fuzz(GRE()) / pick([four, six])() / UDP(dport=5000) / mark,
        lambda: pick([four, six])() / UDP(dport=5000) / mark,
        lambda: UDP(sport=4000, dport=4789) / VXLAN(vni=pick([1, 2, 3, random.getrandbits(24)]))
        / Ether(src=pick(aims["macs"]), dst=pick(aims["macs"])) / pick([four, six])() / UDP(dport=5000) / mark,
    ])()


def neighbours():
    """What speaks for others on a link: ARP, neighbour discovery, routers and address servers."""
    target = pick(aims["six"])
    return pick([
        lambda: fuzz(ARP(pdst=pick(aims["four"]))) / mark,
        lambda: ARP(op=2, hwsrc=pick(aims["macs"]), psrc=pick(aims["four"]), pdst=pick(aims["four"])) / mark,
        lambda: six() / fuzz(ICMPv6ND_NS(tgt=target)) / mark,
        lambda: six() / fuzz(ICMPv6ND_NA(tgt=target)) / mark,
        lambda: six() / fuzz(ICMPv6ND_RA()) / mark,
        lambda: six() / ICMPv6ND_Redirect(tgt=target, dst=pick(aims["six"])) / mark,
        lambda: IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / fuzz(BOOTP()) / DHCP(options=["end"]) / mark,
        lambda: IP(dst=pick(aims["four"])) / UDP(sport=67, dport=68) / BOOTP(op=2, yiaddr=pick(aims["four"])) / mark,
    ])()


def below():
    """What is no packet of either family."""
    return pick([
        lambda: LLC() / STP() / mark,
        lambda: LLC() / SNAP() / four() / mark,
        lambda: MPLS(label=random.getrandbits(20)) / four() / UDP(dport=5000) / mark,
        lambda: PPPoE() / mark,
        lambda: mark,
    ])()


def inner():
    return pick([
        lambda: four() / transport(), lambda: four() / transport(), lambda: four() / fuzz(ICMP()) / mark,
        lambda: six() / transport(), lambda: six() / transport(), lambda: six() / fuzz(ICMPv6EchoRequest()) / mark,
        lambda: fuzz(IP(src=aims["own4"], dst=pick(aims["four"]))) / mark,
        lambda: fuzz(IPv6(src=aims["own6"], dst=pick(aims["six"]))) / mark,
        neighbours, below,
    ])()


def frames():
    source = pick([aims["mac"]] * 4 + [pick(aims["macs"])])
    target = pick([aims["gateway"]] * 2 + [pick(aims["macs"]), "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"])
    ether = Ether(src=source, dst=target)
    for tag in pick([[]] * 8 + [[Dot1Q], [Dot1AD, Dot1Q]]):
        ether = ether / tag(vlan=random.getrandbits(12))
    packet = inner()
    # In pieces, in no order and one of them twice.
    if isinstance(packet, IP) and not packet.options and random.random() < 0.2:
        pieces = fragment(packet / Raw(bytes(random.randrange(600))), fragsize=pick([8, 64, 256]))
        return [ether / piece for piece in random.sample(pieces + pieces[:1], len(pieces) + 1)]
    return [ether / packet]


socket, sent = conf.L2socket(iface=aims["link"]), 0
for _ in range(aims["count"]):
    for frame in frames():
        try:
            # Its bytes once: fields that are anything would be others at the next look.
            socket.outs.send(bytes(frame))
            sent += 1
        except OSError:
            # Larger than the link takes.
            pass
print(sent)
