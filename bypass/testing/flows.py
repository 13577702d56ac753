# SPDX-License-Identifier: Apache-2.0
"""Frames that the rules of a policy are about, or just not about: derived from rules, live endpoints and kernel
connections, then damaged.

Packets drawn uniformly at random match no rule and test nothing. Here a packet begins as one that a rule, a live
endpoint or a kernel connection is about, with values at the edges of ranges and prefixes, and then one or two things
happen to it: another MAC, tags, fragments, options, extension headers, truncation, an ICMP error around it.

`policy_frames()` is the strategy. Underneath everything draws from a `random.Random`, so that a plain loop over seeds
can draw millions: a seed repeats a frame.
"""

from __future__ import annotations

import ipaddress
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from bypass.rules import Address, Network, PortRange, Rule

__all__ = ["Flow", "World", "draw_flow", "draw_frame", "flow_of_rule", "meets", "policy_frames"]

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
LOCALS = tuple(
    ipaddress.ip_address(a)
    for a in ("192.0.2.10", "192.0.2.11", "192.0.2.77", "239.1.2.3", "2001:db8::10", "2001:db8::11")
)
GROUP_MACS = (bytes.fromhex("01005e010203"), bytes.fromhex("0180c2000001"))
PORTS = (22, 80, 443, 8000, 8007, 8015, 8016, 1000, 1999, 5353, 65535)


# ---- Flows -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flow:
    """Seen from this host. Ports matter for TCP and UDP only."""

    proto: int
    local: Address
    local_port: int
    remote: Address
    remote_port: int
    vlan: int | None = None


EndpointKey = tuple[int, Address | None, int, Address | None, int | None]


@dataclass
class World:
    """What packets are derived from.

    Attributes:
        rules: of the policy.
        mac: the interface's MAC address, 6 bytes.
        endpoints: sockets: (protocol, local address or None, local port, remote address or None, remote port or None).
        kernel: connections of the kernel: (local address, local port, remote address, remote port).
    """

    rules: list[Rule]
    mac: bytes
    endpoints: list[EndpointKey] = field(default_factory=list)
    kernel: list[tuple[Address, int, Address, int]] = field(default_factory=list)


def _inside(rng: random.Random, net: Network | None, pool: list[Address]) -> Address:
    """An address of the prefix: one that exists, or one of its edges."""
    known = [a for a in pool if net is None or a in net]
    if known and (net is None or rng.random() < 0.8):
        return rng.choice(known)
    return rng.choice((net[0], net[-1], net[net.num_addresses // 2])) if net is not None else rng.choice(pool)


def _port(rng: random.Random, ports: PortRange | None) -> int:
    if ports is None:
        return rng.choice((*PORTS, rng.randrange(1, 65536)))
    if rng.random() < 0.15:
        return rng.choice((max(1, ports.first - 1), min(65535, ports.last + 1)))
    return rng.choice((ports.first, ports.last, rng.randint(ports.first, ports.last)))


def _peers(v6: bool) -> list[Address]:
    if v6:
        return [ipaddress.ip_address(t) for t in ("2001:db8:1::1", "2001:db8:2::1")]
    return [ipaddress.ip_address(t) for t in ("198.51.100.1", "198.51.100.2", "198.51.100.9", "203.0.113.5")]


def flow_of_rule(rng: random.Random, rule: Rule) -> Flow:
    """A flow that the rule matches, or just misses."""
    v6 = rule.family == 6 or (rule.family == 0 and rng.random() < 0.1)
    locals_ = [a for a in LOCALS if a.version == (6 if v6 else 4)]
    proto = rule.proto if rule.proto is not None else rng.choice((TCP, UDP, ICMPV6 if v6 else ICMP, 47))
    local, remote = _inside(rng, rule.local, locals_), _inside(rng, rule.remote, _peers(v6))
    return Flow(proto, local, _port(rng, rule.local_port), remote, _port(rng, rule.remote_port), rule.vlan)


def _flow6(rng: random.Random) -> Flow:
    locals_ = [a for a in LOCALS if a.version == 6]
    proto = rng.choice((TCP, TCP, UDP, ICMPV6, 59))
    return Flow(proto, rng.choice(locals_), rng.choice(PORTS), rng.choice(_peers(True)), rng.choice(PORTS))


def meets(rule: Rule, proto: int, local: Address | None, port: int) -> bool:
    """The rule matches these packets from some peer."""
    return (
        rule.proto in (None, proto)
        and (rule.local is None or local is None or local in rule.local)
        and (rule.local_port is None or port in rule.local_port)
    )


def draw_flow(rng: random.Random, world: World) -> Flow:
    """A flow of an endpoint, of a kernel connection, or of a rule; sometimes one field is another's."""
    if rng.random() < (0.3 if any(r.family == 6 for r in world.rules) else 0.07):
        return _flow6(rng)
    choice = rng.random()
    if choice < 0.6 and world.endpoints:
        proto, local, lport, remote, rport = rng.choice(world.endpoints)
        near = [r for r in world.rules if r.action == "steer" and meets(r, proto, local, lport)]
        rule = rng.choice(near or world.rules)
        base = flow_of_rule(rng, rule)
        v4 = base.local.version == 4
        ours = [a for a in LOCALS if a.version == 4 and (not v4 or rule.local is None or a in rule.local)]
        flow = Flow(
            proto,
            local or rng.choice(ours or list(LOCALS[:3])),
            lport,
            remote or (base.remote if v4 else _peers(False)[0]),
            rport or base.remote_port,
            base.vlan,
        )
    elif choice < 0.75 and world.kernel:
        flow = Flow(TCP, *rng.choice(world.kernel))
    else:
        flow = flow_of_rule(rng, rng.choice(world.rules))
    if rng.random() < 0.08:
        other = flow_of_rule(rng, rng.choice(world.rules))
        name = rng.choice(("proto", "local_port", "remote_port", "vlan"))
        flow = replace(flow, **{name: getattr(other, name)})
    return flow


def policy_frames(
    rules: Sequence[Rule], mac: bytes, endpoints: Sequence[EndpointKey] = ()
) -> st.SearchStrategy[bytes]:
    """Frames that a policy's rules are about or just miss, damaged in one or two ways (or not at all).

    Args:
        rules: `Policy.flows`.
        mac: the interface's MAC address, 6 bytes.
        endpoints: as in World: most frames are for them.
    """
    world = World(list(rules), mac, list(endpoints))
    return st.randoms(use_true_random=False).map(lambda rng: draw_frame(rng, world))


# ---- Packets -----------------------------------------------------------------------------------------------------
@dataclass
class Packet:
    """A frame in parts, to be damaged before it becomes bytes."""

    flow: Flow
    dst_mac: bytes
    tags: list[tuple[int, int]] = field(
        default_factory=list
    )  # (ethertype, VLAN identifier with priority bits)
    ethertype: int | None = None  # in place of the right one
    version_ihl: int | None = None
    options: bytes = b""
    total_delta: int = 0  # added to the IP length field
    fragment: int = 0  # IPv4 flags and offset, or the IPv6 fragment header's
    extensions: list[tuple[int, bytes]] = field(default_factory=list)  # (type, header with next header 0)
    l4: bytes = b""
    padding: int = 0
    cut: int | None = None  # bytes that are left of the frame
    flips: list[tuple[float, int]] = field(default_factory=list)  # (position 0..1, xor)

    def build(self) -> bytes:
        """The frame; at least the 14 bytes of an Ethernet header, which a test run needs."""
        frame = self.dst_mac + b"\2\0\0\0\0\1"
        for ethertype, tci in self.tags:
            frame += struct.pack("!HH", ethertype, tci)
        v6 = self.flow.local.version == 6
        right = 0x86DD if v6 else 0x0800
        frame += struct.pack("!H", self.ethertype if self.ethertype is not None else right)
        frame += (self._ipv6() if v6 else self._ipv4()) + bytes(self.padding)
        if self.cut is not None:
            frame = frame[: max(14, self.cut)]
        damaged = bytearray(frame)
        for where, bits in self.flips:
            damaged[12 + int(where * (len(frame) - 12))] ^= bits
        return bytes(damaged)

    def _ipv4(self) -> bytes:
        header = 20 + len(self.options)
        first = self.version_ihl if self.version_ihl is not None else 0x40 | header // 4
        total = (header + len(self.l4) + self.total_delta) & 0xFFFF
        fields = (first, 0, total, 7, self.fragment, 64, self.flow.proto, 0)
        addresses = self.flow.remote.packed + self.flow.local.packed
        return struct.pack("!BBHHHBBH", *fields) + addresses + self.options + self.l4

    def _ipv6(self) -> bytes:
        chain = b""
        types = [t for t, _ in self.extensions] + [self.flow.proto]
        for (_, header), following in zip(self.extensions, types[1:], strict=True):
            chain += bytes((following,)) + header[1:]
        first = self.version_ihl if self.version_ihl is not None else 0x60
        length = (len(chain) + len(self.l4) + self.total_delta) & 0xFFFF
        addresses = self.flow.remote.packed + self.flow.local.packed
        return struct.pack("!BBHHBB", first, 0, 0, length, types[0], 64) + addresses + chain + self.l4


def transport(rng: random.Random, flow: Flow) -> bytes:
    """The flow's transport header and some bytes behind it."""
    data = bytes(rng.choice((0, 1, 18, 64)))
    if flow.proto == TCP:
        flags = rng.choice((0x02, 0x12, 0x10, 0x18, 0x11, 0x04))
        options = bytes(rng.choice((0, 0, 12, 40)))
        offset = (20 + len(options)) // 4 << 4
        ports = struct.pack("!HH", flow.remote_port, flow.local_port)
        return ports + struct.pack("!IIBBHHH", 1, 2, offset, flags, 1024, 0, 0) + options + data
    if flow.proto == UDP:
        return struct.pack("!HHHH", flow.remote_port, flow.local_port, 8 + len(data), 0) + data
    if flow.proto in (ICMP, ICMPV6):
        return struct.pack("!BBHHH", rng.choice((0, 8, 3, 128, 13)), 0, 0, 1, 1) + data
    return data


def draw_frame(rng: random.Random, world: World) -> bytes:
    """One frame for the world's policy."""
    flow = draw_flow(rng, world)
    tags = [] if flow.vlan is None else [(0x8100, flow.vlan)]
    p = Packet(flow, world.mac, tags=tags, l4=transport(rng, flow))
    harms = _HARMS6 if flow.local.version == 6 else _HARMS4
    names, weights = list(harms), list(harms.values())
    for _ in range(1 if rng.random() < 0.85 else 2):
        rng.choices(names, weights)[0](rng, p, world)
    return p.build()


# ---- What may happen to a packet. Functions of the generator, the packet and the world, which change the packet.
Harm = Callable[[random.Random, Packet, World], None]


def nothing(rng: random.Random, p: Packet, world: World) -> None:
    """It arrives as it was sent, perhaps padded to the Ethernet minimum."""
    p.padding = rng.choice((0, 0, 6))


def other_mac(rng: random.Random, p: Packet, world: World) -> None:
    at = rng.randrange(6)
    mac = bytearray(world.mac)
    mac[at] ^= 1 << rng.randrange(1, 8)
    p.dst_mac = bytes(mac)


def group_mac(rng: random.Random, p: Packet, world: World) -> None:
    p.dst_mac = rng.choice((*GROUP_MACS, *GROUP_MACS, bytes(b"\xff" * 6), bytes.fromhex("01005e010204")))


def tagged(rng: random.Random, p: Packet, world: World) -> None:
    count = rng.choice((1, 1, 2))
    types, tcis = (0x8100, 0x88A8), (5, 6, 0, 4095, 0xE005, 0xF006)
    p.tags = [(rng.choice(types), rng.choice(tcis)) for _ in range(count)]
    if rng.random() < 0.2:
        p.cut = 14 + rng.randrange(8)


def not_ip(rng: random.Random, p: Packet, world: World) -> None:
    p.ethertype = rng.choice((0x0806, 0x88CC, 0x0801, 0x86DC, 0x0600, 0x8847))


def truncated(rng: random.Random, p: Packet, world: World) -> None:
    p.cut = rng.randrange(14, max(15, len(p.build())))


def bad_length(rng: random.Random, p: Packet, world: World) -> None:
    p.total_delta = rng.choice((1, -1, 4, -4, -8, -12, -len(p.l4), -len(p.l4) - 1, 1000))
    p.padding = rng.choice((0, 0, 4))


def bad_header(rng: random.Random, p: Packet, world: World) -> None:
    v6 = p.flow.local.version == 6
    p.version_ihl = (
        rng.choice((0x65, 0x45, 0x05, 0x50)) if v6 else rng.choice((0x44, 0x40, 0x4F, 0x46, 0x55, 0x65))
    )


def options(rng: random.Random, p: Packet, world: World) -> None:
    p.options = bytes(rng.choice((4, 8, 40)))


def bad_tcp_offset(rng: random.Random, p: Packet, world: World) -> None:
    if p.flow.proto == TCP:
        p.l4 = p.l4[:12] + bytes((rng.choice((0, 0x40, 0xF0, 0x50, 0x60)),)) + p.l4[13:]


def not_local(rng: random.Random, p: Packet, world: World) -> None:
    texts = (
        ("2001:db8::12", "2001:db9::10")
        if p.flow.local.version == 6
        else ("192.0.2.12", "10.0.0.1", "192.0.2.255")
    )
    p.flow = replace(p.flow, local=ipaddress.ip_address(rng.choice(texts)))


def first_fragment(rng: random.Random, p: Packet, world: World) -> None:
    p.fragment = 0x2000
    p.l4 = p.l4[: rng.choice((8, 8, 16, 24, len(p.l4), len(p.l4), 7))]


def later_fragment(rng: random.Random, p: Packet, world: World) -> None:
    p.fragment = rng.choice((1, 0x1FFF, 0x2001, 0x0100))


def dont_fragment(rng: random.Random, p: Packet, world: World) -> None:
    p.fragment = rng.choice((0x4000, 0x8000))


def flipped(rng: random.Random, p: Packet, world: World) -> None:
    p.flips = [(rng.random(), 1 << rng.randrange(8)) for _ in range(rng.choice((1, 1, 2, 3)))]


def icmp_error(rng: random.Random, p: Packet, world: World) -> None:
    """An ICMP error about the flow, from the peer or a router on the way. Sometimes the quote is no good."""
    flow = p.flow
    if rng.random() < 0.15:
        flow = replace(flow, local=rng.choice(LOCALS[:3]))
    quoted_l4 = struct.pack("!HHI", flow.local_port, flow.remote_port, 1) + bytes(rng.choice((0, 0, 12)))
    head = rng.choice((0x45,) * 14 + (0x46, 0x46, 0x44, 0x55))
    fragment = rng.choice((0, 0, 0, 0, 0, 0, 0x4000, 0x2000, 0x2000, 1))
    source = flow.local if rng.random() < 0.95 else LOCALS[2]
    quote = struct.pack("!BBHHHBBH", head, 0, 1500, 9, fragment, 64, flow.proto, 0)
    quote += (
        source.packed + flow.remote.packed + bytes((head & 15) * 4 - 20 if head & 15 > 5 else 0) + quoted_l4
    )
    if rng.random() < 0.06:
        quote = quote[: rng.randrange(len(quote))]
    kind = rng.choice((3, 3, 3, 3, 4, 4, 11, 11, 12, 12, 5, 0))
    router = flow.remote if rng.random() < 0.5 else ipaddress.ip_address("203.0.113.5")
    p.flow = Flow(ICMP, flow.local, 0, router, 0, flow.vlan)
    p.l4 = struct.pack("!BBHI", kind, 1, 0, 0) + quote
    if rng.random() < 0.05:
        p.fragment = 0x2000


def extension(rng: random.Random, kind: int) -> tuple[int, bytes]:
    """An IPv6 extension header of a type."""
    if kind == 44:
        return kind, struct.pack("!BBHI", 0, 0, rng.choice((0, 0, 1, 8, 9, 0xFFF8)), 1)
    units = rng.choice((0, 0, 1, 3))
    size = (units + 2) * 4 if kind == 51 else (units + 1) * 8
    return kind, bytes((0, units)) + bytes(max(size, 8) - 2)


def extended(rng: random.Random, p: Packet, world: World) -> None:
    kinds = rng.choices((0, 43, 44, 51, 60), (3, 2, 2, 2, 3), k=rng.choice((1, 1, 2, 3, 5, 6)))
    p.extensions = [extension(rng, k) for k in kinds]


def over_extended(rng: random.Random, p: Packet, world: World) -> None:
    p.extensions = [extension(rng, rng.choice((0, 43, 60, 51))) for _ in range(rng.choice((6, 7, 7, 8, 9)))]


_BOTH: dict[Harm, float] = {
    nothing: 30,
    other_mac: 3.5,
    group_mac: 6,
    tagged: 5,
    not_ip: 3.5,
    truncated: 3,
    bad_length: 2,
    bad_header: 1.5,
    bad_tcp_offset: 2,
    not_local: 4,
    flipped: 3,
}
_HARMS4: dict[Harm, float] = _BOTH | {
    options: 3,
    first_fragment: 22,
    later_fragment: 3,
    dont_fragment: 2,
    icmp_error: 44,
}
_HARMS6: dict[Harm, float] = _BOTH | {extended: 30, over_extended: 85}
