# SPDX-License-Identifier: Apache-2.0
"""What an application may send in shared mode, and whose a received frame is: everything but its own flows is refused
and counted by reason, and what the stack itself sends passes."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterator

import pytest
from afxdp_support import sum16
from c_library import Library
from fwd_support import (
    HOST,
    HOST2,
    ICMP,
    PEER,
    TCP,
    UDP,
    World,
    eth,
    ip,
    tcp,
    udp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples


@pytest.fixture
def world(fwd_library: Library) -> Iterator[World]:
    """Application 1 has UDP 5000 and TCP 80 of HOST; application 2 has UDP 6000 of any address."""
    w = World(*fwd_library)
    w.add(1)
    w.add(2)
    assert w.lease(1, UDP, HOST, 5000) == 0
    assert w.lease(1, TCP, HOST, 80) == 0
    assert w.lease(2, UDP, "", 6000) == 0
    yield w
    w.close()


def error(quote: bytes, kind: int = 3, code: int = 3) -> bytes:
    body = struct.pack(">BBHI", kind, code, 0, 0) + quote
    return body[:2] + (~sum16(body) & 0xFFFF).to_bytes(2, "big") + body[4:]


QUOTE = ip(udp(b"x" * 20, 53, 5000), src=PEER, dst=HOST)
GOOD = {
    "udp": eth(ip(udp(b"hello"))),
    "udp, empty": eth(ip(udp())),
    "tcp": eth(ip(tcp(b"x" * 1000), TCP)),
    "tcp with options": eth(ip(tcp(b"\1" * 12, offset=8), TCP)),
    "full": eth(ip(udp(b"x" * 1472))),
    "port unreachable": eth(ip(error(QUOTE), ICMP)),
    "time exceeded": eth(ip(error(QUOTE, 11, 1), ICMP)),
    "first fragment": eth(ip(udp(b"x" * 1472, size=3000), frag=0x2000, ident=7)),
}
BAD = {
    "runt": ("short", eth(b"x" * 19)),
    "another's MAC address": ("source_mac", eth(ip(udp()), src=bytes.fromhex("020000000003"))),
    "to all": ("group_mac", eth(ip(udp()), dst=b"\xff" * 6)),
    "to a group": ("group_mac", eth(ip(udp()), dst=bytes.fromhex("01005e000001"))),
    "tagged": ("vlan", eth(ip(udp()), tag=5)),
    "tagged, priority only": ("vlan", eth(ip(udp()), tag=0)),
    "tagged twice": ("not_ipv4", eth(ip(udp()), kind=0x88A8)),
    "arp": ("not_ipv4", eth(b"\0\1\x08\0\6\4\0\2" + b"x" * 20, kind=0x0806)),
    "ipv6": ("not_ipv4", eth(b"\x60" + b"\0" * 39, kind=0x86DD)),
    "lldp": ("not_ipv4", eth(b"x" * 40, kind=0x88CC)),
    "version 6 in 4": ("header", eth(ip(udp(), first=0x65))),
    "header too short": ("header", eth(ip(udp(), first=0x44))),
    "source route": ("options", eth(ip(udp(), options=b"\x83\x07\x04" + bytes(5)))),
    "longer than the frame": ("length", eth(ip(udp(), total=100))),
    "shorter than the frame": ("length", eth(ip(udp(b"xxxx"), total=28))),
    "padded": ("length", eth(ip(udp()) + bytes(18))),
    "beyond the MTU": ("mtu", eth(ip(udp(b"x" * 1473)))),
    "checksum": ("checksum", eth(ip(udp())[:8] + b"\1" + ip(udp())[9:])),
    "another host's address": ("source", eth(ip(udp(), src="192.0.2.99"))),
    "any address": ("source", eth(ip(udp(), src="0.0.0.0"))),
    "the broadcast address": ("source", eth(ip(udp(), src="192.0.2.255"))),
    "the peer's address": ("source", eth(ip(udp(), src=PEER))),
    "to a multicast address": ("destination", eth(ip(udp(), dst="224.0.0.251"))),
    "to all hosts": ("destination", eth(ip(udp(), dst="255.255.255.255"))),
    "to all of the subnet": ("destination", eth(ip(udp(), dst="192.0.2.255"))),
    "to this network": ("destination", eth(ip(udp(), dst="0.0.0.1"))),
    "to loopback": ("destination", eth(ip(udp(), dst="127.0.0.1"))),
    "igmp": ("protocol", eth(ip(b"x" * 8, 2))),
    "gre": ("protocol", eth(ip(b"x" * 8, 47))),
    "sctp": ("protocol", eth(ip(b"x" * 40, 132))),
    "tcp fragment": ("fragment", eth(ip(tcp(b"x" * 100), TCP, frag=0x2000))),
    "tcp, later fragment": ("fragment", eth(ip(b"x" * 100, TCP, frag=1))),
    "icmp fragment": ("fragment", eth(ip(error(QUOTE), ICMP, frag=0x2000))),
    "fragment of nothing": ("fragment", eth(ip(b"x" * 100, frag=2))),
    "udp, cut off": ("ports", eth(ip(udp()[:7]))),
    "udp, too long": ("ports", eth(ip(udp(b"x", size=10)))),
    "udp, too short": ("ports", eth(ip(udp(b"x" * 9, size=8)))),
    "udp fragment with a length below its header's": ("ports", eth(ip(udp(b"x" * 8, size=7), frag=0x2000))),
    "tcp, cut off": ("ports", eth(ip(tcp()[:19], TCP))),
    "tcp, header too short": ("ports", eth(ip(tcp(offset=4), TCP))),
    "tcp, header too long": ("ports", eth(ip(tcp(b"x" * 8, offset=8), TCP))),
    "a port that nobody has": ("lease", eth(ip(udp(sport=5001)))),
    "another's port": ("lease", eth(ip(udp(sport=6000)))),
    "the port of another protocol": ("lease", eth(ip(tcp(sport=5000), TCP))),
    "its port, another address of the host": ("lease", eth(ip(udp(), src=HOST2))),
    "port 0": ("lease", eth(ip(udp(sport=0)))),
    "first fragment from another's port": ("lease", eth(ip(udp(b"x" * 80, 6000, size=200), frag=0x2000))),
    "echo request": ("icmp", eth(ip(error(b"x" * 8, 8, 0), ICMP))),
    "echo reply": ("icmp", eth(ip(error(b"x" * 8, 0, 0), ICMP))),
    "redirect": ("icmp", eth(ip(error(QUOTE, 5, 1), ICMP))),
    "icmp, cut off": ("icmp", eth(ip(error(QUOTE)[:7], ICMP))),
    "error about another's packet": (
        "icmp",
        eth(ip(error(ip(udp(b"", 53, 6000), src=PEER, dst=HOST)), ICMP)),
    ),
    "error to who did not send": ("icmp", eth(ip(error(QUOTE), ICMP, dst="198.51.100.8"))),
    "error about a later fragment": (
        "icmp",
        eth(ip(error(ip(udp(b"", 53, 5000), src=PEER, dst=HOST, frag=8)), ICMP)),
    ),
    "error with half a quote": ("icmp", eth(ip(error(QUOTE[:27]), ICMP))),
    "error about icmp": ("icmp", eth(ip(error(ip(error(b""), ICMP, src=PEER, dst=HOST)), ICMP))),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_the_stack_sends_passes_as_it_is(world: World, name: str) -> None:
    assert world.pass_on(1, GOOD[name]) == [GOOD[name]]
    assert world.refusals(1) == {}
    assert world.stats(1).tx_sent == 1


@pytest.mark.parametrize("name", BAD)
def test_everything_else_is_refused_and_counted(world: World, name: str) -> None:
    why, frame = BAD[name]
    assert world.pass_on(1, frame, GOOD["udp"]) == [GOOD["udp"]]
    assert world.refusals(1) == {why: 1}
    assert world.refusals(2) == {}


def test_every_reason_is_tried_by_a_test(fwd_library: Library) -> None:
    ffi, _ = fwd_library
    names = {n.removeprefix("FWD_REFUSED_").lower() for n in ffi.typeof("enum fwd_refusal").elements.values()}
    assert names - {"fwd_ok", "fwd_refusals"} == {why for why, _ in BAD.values()} | {"offload"}


@pytest.mark.parametrize("name", GOOD)
def test_a_frame_cut_anywhere_is_refused(world: World, name: str) -> None:
    """Also by the sanitizers: nothing is read behind the end."""
    for n in range(14, len(GOOD[name])):
        assert world.pass_on(1, GOOD[name][:n]) == []


def test_later_fragments_follow_their_first(world: World) -> None:
    first = eth(ip(udp(b"x" * 1472, size=3008), frag=0x2000, ident=7))
    second, last = eth(ip(b"y" * 1480, frag=0x2000 | 185, ident=7)), eth(ip(b"z" * 48, frag=370, ident=7))
    assert world.pass_on(1, first, second, last) == [first, second, last]
    for other in (
        eth(ip(b"y" * 8, frag=185, ident=8)),
        eth(ip(b"y" * 8, frag=185, ident=7, dst="198.51.100.8")),
        eth(ip(b"y" * 8, frag=185, ident=7, src=HOST2)),
    ):
        assert world.pass_on(1, other) == []
    assert world.refusals(1) == {"fragment": 3}
    assert world.pass_on(2, last) == []  # another application's
    world.now += 2_000_000_000
    assert world.pass_on(1, last) == []


def test_a_refused_first_fragment_opens_nothing(world: World) -> None:
    first = eth(ip(udp(b"x" * 80, 6000, size=3000), frag=0x2000, ident=9))
    assert world.pass_on(1, first, eth(ip(b"y" * 8, frag=11, ident=9))) == []
    assert world.refusals(1) == {"lease": 1, "fragment": 1}


@pytest.mark.parametrize(
    ("allow", "frame"),
    [
        (1, eth(ip(udp()), tag=5)),
        (2, eth(ip(udp(), dst="224.0.0.251"), dst=bytes.fromhex("01005e0000fb"))),
        (2, eth(ip(udp(), dst="192.0.2.255"), dst=b"\xff" * 6)),
        (2, eth(ip(udp(), dst="255.255.255.255"), dst=b"\xff" * 6)),
        (4, eth(ip(error(b"x" * 8, 0, 0), ICMP))),
    ],
)
def test_what_the_policy_allows_beyond_passes(world: World, allow: int, frame: bytes) -> None:
    world.add(3, allow=allow)
    assert world.lease(1, UDP, HOST, 5000, add=False) == 0
    assert world.lease(3, UDP, HOST, 5000) == 0
    assert world.pass_on(3, frame) == [frame]
    world.add(4, allow=7 & ~allow)
    assert world.lease(3, UDP, HOST, 5000, add=False) == 0
    assert world.lease(4, UDP, HOST, 5000) == 0
    assert world.pass_on(4, frame) == []


@pytest.mark.parametrize(
    ("frame", "start", "at", "passes"),
    [
        (GOOD["tcp"], 34, 16, True),
        (GOOD["udp"], 34, 6, True),
        (GOOD["tcp"], 34, 6, False),
        (GOOD["udp"], 34, 16, False),
        (GOOD["udp"], 14, 10, False),
        (GOOD["udp"], 0, 6, False),
        (GOOD["udp"], 65535, 65535, False),
        (GOOD["first fragment"], 34, 6, False),
        (GOOD["port unreachable"], 34, 2, False),
    ],
)
def test_only_the_checksum_of_its_own_header_is_left_to_the_device(
    world: World, frame: bytes, start: int, at: int, passes: bool
) -> None:
    for caps in (2, 0):  # the device sums, and it does not
        world.lib.world_caps(world.world, caps)
        port = world.ports[1]
        [p] = port.alloc(1)
        port.write(p, frame)
        m = port.meta(p)
        m.flags, m.csum_start, m.csum_off = 16, start, at
        port.nd.caps = 2
        assert port.tx_burst([p]) == 1
        port.free([p])
        assert world.pass_on(1) == ([frame] if passes and caps else [])
    assert world.refusals(1) == {"offload": 1 if passes else 2}


# ---- Leases ------------------------------------------------------------------------------------------------------
def test_a_block_is_256_ports(world: World) -> None:
    assert world.lease(2, TCP, HOST, 0x8100, block=True) == 0
    assert world.lease(2, TCP, HOST, 0x8101, block=True) == -errno.EINVAL
    for port, passes in ((0x80FF, False), (0x8100, True), (0x81FF, True), (0x8200, False)):
        assert bool(world.pass_on(2, eth(ip(tcp(sport=port), TCP)))) == passes


def test_a_connected_lease_is_for_its_peer_and_comes_first(world: World) -> None:
    assert world.lease(2, TCP, HOST, 80, (PEER, 40000)) == 0
    frame, other = eth(ip(tcp(), TCP)), eth(ip(tcp(dport=40001), TCP))
    assert world.pass_on(2, frame, other) == [frame]
    assert world.pass_on(1, frame, other) == [other]  # whose answers they would not be


def test_leases_are_taken_once_and_given_back(world: World) -> None:
    assert world.lease(2, UDP, HOST, 5000) == -errno.EEXIST
    assert world.lease(2, UDP, HOST, 5000, add=False) == -errno.ENOENT
    assert world.lease(9, UDP, HOST, 5000) == -errno.ENOENT
    assert world.lease(1, UDP, HOST, 0) == -errno.EINVAL
    assert world.lease(1, ICMP, HOST, 5) == -errno.EINVAL
    assert world.lease(1, UDP, HOST, 7, (PEER, 0)) == -errno.EINVAL
    assert world.stats(1).leases == 2
    world.remove(1)
    assert world.lease(2, UDP, HOST, 5000) == 0
    assert world.pass_on(2, GOOD["udp"]) == [GOOD["udp"]]


@pytest.mark.parametrize("seed", range(5))
def test_the_table_of_leases_is_a_dictionary(world: World, seed: int) -> None:
    """Thousands of leases come and go; a Python dictionary says whose each is."""
    rng = random.Random(seed)
    held: dict[tuple[int, str, int], int] = {}
    for _ in range(6000):
        key = (rng.choice((TCP, UDP)), rng.choice((HOST, HOST2)), rng.randrange(10000, 12000))
        if key in held and rng.random() < 0.6:
            assert world.lease(held.pop(key), *key, add=False) == 0
        else:
            app = rng.choice((1, 2))
            assert world.lease(app, *key) == (-errno.EEXIST if key in held else 0)
            held.setdefault(key, app)
    leases, flow = world.ffi.addressof(world.f.check, "leases"), world.ffi.new("struct flow *")
    for proto in (TCP, UDP):
        for local in (HOST, HOST2):
            raw = int.from_bytes(bytes(map(int, local.split("."))), "little")
            for port in range(10000, 12000):
                flow[0] = {"local": raw, "remote": 5, "local_port": port, "remote_port": 9, "proto": proto}
                assert world.lib.leases_owner(leases, flow) == held.get((proto, local, port), 0)
    world.remove(1)
    assert leases.count == 1 + sum(app == 2 for app in held.values())


# ---- Receiving ---------------------------------------------------------------------------------------------------
def test_a_verdict_names_the_owner(world: World) -> None:
    assert world.lib.forward_entry(world.f, 77, 2) == 0
    assert world.lib.forward_entry(world.f, 65536, 2) == -errno.EINVAL
    assert world.lib.forward_entry(world.f, 78, 9) == -errno.ENOENT
    frame = eth(ip(udp(b"hello", 53, 5000), src=PEER, dst=HOST))
    for entry in (77, 78, 65535, 2**31 - 1):
        world.receive(frame, entry, queue=1)
    world.round()
    [got] = world.ports[2].rx_burst()
    m = world.ports[2].meta(got)
    assert (m.entry, m.rule, m.hash, m.queue, m.flags) == (77, 3, 4, 1, 2)
    assert world.ports[2].data(got) == frame
    world.ports[2].free([got])
    assert world.f.n.rx_nobody == 3
    assert world.lib.forward_entry(world.f, 77, 0) == 0
    world.receive(frame, 77)
    world.round()
    assert world.f.n.rx_nobody == 4


@pytest.mark.parametrize(
    ("packet", "owner"),
    [
        (ip(udp(b"x", 53, 5000), src=PEER, dst=HOST), 1),
        (ip(tcp(b"x", 40000, 80), TCP, src=PEER, dst=HOST), 1),
        (ip(udp(b"x", 53, 6000), src=PEER, dst=HOST2), 2),
        (ip(udp(b"x", 53, 6000), src=PEER, dst=HOST, options=b"\1" * 4), 2),
        (ip(udp(b"x", 53, 5000), src=PEER, dst=HOST2), 0),
        (ip(udp(b"x", 53, 7000), src=PEER, dst=HOST), 0),
        (ip(b"x" * 8, 47, src=PEER, dst=HOST), 0),
        (ip(b"x" * 80, UDP, src=PEER, dst=HOST, frag=10), 0),
        (ip(error(ip(udp(b"x"))), ICMP, src="203.0.113.1", dst=HOST), 1),
        (ip(error(ip(udp(b"x", 6000))), ICMP, src="203.0.113.1", dst=HOST), 2),
        (ip(error(ip(udp(b"x", 7000))), ICMP, src="203.0.113.1", dst=HOST), 0),
        (ip(error(b""), ICMP, src="203.0.113.1", dst=HOST), 0),
    ],
)
def test_without_a_verdict_the_headers_name_the_owner(world: World, packet: bytes, owner: int) -> None:
    frame = eth(packet)
    world.receive(frame)
    world.receive(eth(packet, tag=5))
    world.round()
    for app in (1, 2):
        got = world.ports[app].receive()
        assert got == ([frame, eth(packet, tag=5)] if app == owner else [])
    assert world.f.n.rx_nobody == (0 if owner else 2)


@given(data=st.binary(max_size=200), cut=st.sampled_from(sorted(GOOD)), at=st.integers(0, 60))
@settings(max_examples=examples(300))
def test_no_bytes_pass_with_a_foreign_source(fwd_library: Library, data: bytes, cut: str, at: int) -> None:
    """Mutations of good frames: what passes has the interface's address, a local address, and a leased port or an
    error's form."""
    w = World(*fwd_library)
    try:
        w.add(1)
        assert w.lease(1, UDP, HOST, 5000) == 0
        frame = (GOOD[cut][:at] + data + GOOD[cut][at + len(data) :])[:1700].ljust(14, b"\0")
        for out in w.pass_on(1, frame):
            assert out == frame
            assert frame[6:12] == bytes.fromhex("020000000001")
            assert frame[12:15] == b"\x08\0\x45"
            assert frame[26:30] == bytes(map(int, HOST.split(".")))
            assert frame[23] in (UDP, ICMP)
            assert frame[23] == ICMP or frame[34:36] == (5000).to_bytes(2, "big")
        w.receive(frame)
        w.round()
        w.ports[1].receive()
    finally:
        w.close()
