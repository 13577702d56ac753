# SPDX-License-Identifier: Apache-2.0
"""Whole frames: Ethernet with ARP, IPv4, ICMP, UDP, TCP; right ones, ones with a lie in them, torn ones.

Uniformly random bytes prove nothing: almost all of them are dropped at the first check. What is drawn here is right but
for what was chosen to be wrong, with values at the edges, from small pools that meet the addresses and ports that a
test uses. Every strategy takes those pools as arguments.

    frames(dst="192.0.2.1")            right frames to a stack at that address
    mutated_frames(dst="192.0.2.1")    the same, one to three things changed, checksums mostly made right again

Segments that belong to a live connection: tcp.py. Frames that a steering policy is about: flows.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from hypothesis import strategies as st

from bypass.testing.wire import (
    BROADCAST,
    ETH_ARP,
    ETH_IPV4,
    ICMP,
    MF,
    TCP,
    UDP,
    arp,
    eth,
    icmp,
    ipv4,
    tcp,
    udp,
    with_checksums,
)

__all__ = [
    "addresses",
    "arp_frames",
    "frames",
    "icmp_packets",
    "ipv4_packets",
    "mutated",
    "mutated_frames",
    "odd_ipv4_packets",
    "payloads",
    "ports",
    "tcp_packets",
    "udp_packets",
]

OUR_MAC = bytes.fromhex("020000000001")
PEER_MAC = bytes.fromhex("020000000002")
DST = "192.0.2.1"

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
MAX_FRAME = 1514


def _peer(dst: str) -> str:
    """An address beside dst."""
    return str(ipaddress.ip_address(dst) + 1)


def addresses(dst: str = DST) -> st.SearchStrategy[str]:
    """IPv4 addresses as text: a peer's beside `dst`, dst itself, a stranger's, and those that are nobody's source
    (unspecified, loopback, multicast, both broadcasts of a /24; RFC 1122 3.2.1.3)."""
    net = ipaddress.ip_network(f"{dst}/24", strict=False)
    peer = _peer(dst)
    odd = ["0.0.0.0", "127.0.0.1", "224.0.0.1", str(net.broadcast_address), "255.255.255.255"]
    return st.sampled_from([*[peer] * 24, dst, str(net[3]), "198.51.100.7", *odd])


def ports() -> st.SearchStrategy[int]:
    """Ports, 0..65535: a few often, so that they meet sockets, and any."""
    return st.sampled_from([7, 9, 80, 4000]) | U16


def payloads() -> st.SearchStrategy[bytes]:
    """0 to 1400 bytes: random ones, or zeroes of any length."""
    return st.binary(max_size=200) | st.integers(0, 1400).map(bytes)


@st.composite
def udp_packets(draw: st.DrawFn, dst: str = DST, *, lies: bool = True) -> bytes:
    """IPv4 packets with UDP (RFC 768). lies: length and checksum are sometimes wrong."""
    src, data = draw(addresses(dst)), draw(payloads())
    size = draw(st.none() | U16) if lies else None
    csum = draw(st.none() | st.sampled_from([0, 1, 0xFFFF])) if lies else draw(st.sampled_from([None, 0]))
    return ipv4(src, dst, UDP, udp(src, dst, draw(ports()), draw(ports()), data, size=size, csum=csum))


@st.composite
def tcp_packets(draw: st.DrawFn, dst: str = DST) -> bytes:
    """IPv4 packets with TCP (RFC 9293 3.1), of no connection in particular: any numbers, flags and option bytes."""
    src, seq, ack = draw(addresses(dst)), draw(U32), draw(U32)
    options = draw(st.binary(max_size=40) | st.just(b"\2\4\5\xb4\1\3\3\7"))
    flags, window, data = draw(st.integers(0, 255)), draw(U16), draw(payloads())
    sport, dport = draw(ports()), draw(ports())
    return ipv4(src, dst, TCP, tcp(src, dst, sport, dport, seq, ack, flags, window, data, options=options))


@st.composite
def icmp_packets(draw: st.DrawFn, dst: str = DST) -> bytes:
    """IPv4 packets with ICMP (RFC 792): pings, and errors about a datagram that `dst` may have sent, or about none."""
    peer = _peer(dst)
    sent = ipv4(dst, peer, UDP, udp(dst, peer, 7, 9, b""))
    quote = draw(st.just(sent) | st.just(sent) | payloads())
    usual = st.sampled_from([8, 8, 8, 3, 3, 3, 0, 4, 5, 11, 11, 12])
    kind = draw(usual | usual | st.integers(0, 255))
    code = 0 if kind == 8 and draw(st.integers(0, 3)) else draw(st.integers(0, 20))
    rest = draw(st.binary(min_size=4, max_size=4))
    return ipv4(draw(addresses(dst)), dst, ICMP, icmp(kind, code, rest, quote))


@st.composite
def odd_ipv4_packets(draw: st.DrawFn, dst: str = DST) -> bytes:
    """IPv4 packets (RFC 791) that lie about their lengths, are fragments, carry options, or go elsewhere."""
    frag = draw(U16 | st.sampled_from([0, MF, 1, MF | 1]))
    options = draw(st.integers(0, 10).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n)))
    seldom = st.none() | st.none() | st.none()
    total, ihl = draw(seldom | U16), draw(seldom | st.integers(0, 15))
    proto = draw(st.sampled_from([ICMP, TCP, UDP]) | st.integers(0, 255))
    to, data = draw(st.just(dst) | st.just(dst) | addresses(dst)), draw(payloads())
    return ipv4(draw(addresses(dst)), to, proto, data, frag=frag, options=options, total=total, ihl=ihl)


def ipv4_packets(dst: str = DST, *, lies: bool = True) -> st.SearchStrategy[bytes]:
    """IPv4 packets of every kind above. lies=False: only what a host may send."""
    right = udp_packets(dst, lies=lies) | tcp_packets(dst) | icmp_packets(dst)
    return right | odd_ipv4_packets(dst) if lies else right


def arp_frames(dst: str = DST, *, mac: bytes = OUR_MAC) -> st.SearchStrategy[bytes]:
    """Frames with ARP (RFC 826), from requests and answers to messages that are neither. mac: the receiver's."""
    hardware = st.sampled_from([PEER_MAC, mac, BROADCAST])
    message = st.builds(
        arp, st.integers(0, 3), hardware, addresses(dst), st.just(bytes(6)), addresses(dst) | st.just(dst)
    )
    return st.builds(eth, _receivers(mac), st.just(PEER_MAC), st.just(ETH_ARP), message)


def _receivers(mac: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from([mac] * 6 + [BROADCAST, PEER_MAC])


def frames(dst: str = DST, *, mac: bytes = OUR_MAC, lies: bool = True) -> st.SearchStrategy[bytes]:
    """Frames of every kind: mostly IPv4 packets to `dst` in frames to `mac`, some ARP; without FCS, at most 1514
    bytes.

    Args:
        dst: the receiver's IPv4 address, in a /24.
        mac: its MAC address, 6 bytes.
        lies: also such whose lengths, checksums or addresses are wrong.
    """
    packet = st.builds(
        eth, _receivers(mac), st.just(PEER_MAC), st.just(ETH_IPV4), ipv4_packets(dst, lies=lies)
    )
    return (packet | packet | arp_frames(dst, mac=mac)).filter(lambda f: len(f) <= MAX_FRAME)


# ---- Mutations ----------------------------------------------------------------------------------------------------


def _flip_bit(draw: st.DrawFn, frame: bytearray) -> None:
    bit = draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8


def _set_byte(draw: st.DrawFn, frame: bytearray) -> None:
    frame[draw(st.integers(12, len(frame) - 1))] = draw(st.sampled_from([0, 1, 2, 8, 127, 128, 255]))


def _set_length(draw: st.DrawFn, frame: bytearray) -> None:
    """The IPv4 total length, near the truth."""
    value = max(0, len(frame) - 14 + draw(st.sampled_from([-21, -20, -8, -4, -1, 1, 4, 1480])))
    frame[16:18] = (value & 0xFFFF).to_bytes(2, "big")


def _set_fragment(draw: st.DrawFn, frame: bytearray) -> None:
    frame[20:22] = draw(st.sampled_from([MF, MF | 1, 1, 0x1FFF, MF | 0x1FFF, 0x8000])).to_bytes(2, "big")


def _set_header_length(draw: st.DrawFn, frame: bytearray) -> None:
    """Of the IPv4 header, or of a TCP header behind one without options, in 32-bit words."""
    words = draw(st.integers(0, 15))
    if draw(st.booleans()) or len(frame) < 47:
        frame[14] = frame[14] & 0xF0 | words
    else:
        frame[46] = frame[46] & 0x0F | words << 4


def _cut(draw: st.DrawFn, frame: bytearray) -> None:
    del frame[draw(st.integers(14, len(frame))) :]


def _extend(draw: st.DrawFn, frame: bytearray) -> None:
    frame += draw(st.binary(max_size=min(30, MAX_FRAME - len(frame))))


_MUTATIONS: list[
    tuple[Callable[[st.DrawFn, bytearray], None], int]
] = [  # and the shortest frame that it works on
    (_flip_bit, 14),
    (_set_byte, 14),
    (_set_length, 34),
    (_set_fragment, 34),
    (_set_header_length, 34),
    (_cut, 14),
    (_extend, 14),
]


@st.composite
def mutated(draw: st.DrawFn, base: st.SearchStrategy[bytes], *, most: int = 3) -> bytes:
    """Frames of `base` with up to `most` things changed: bits, bytes, lengths, fragment fields, cut short, extended.

    Three times in four the checksums are made right afterwards, so that what was changed is looked at and not dropped
    for its checksum. At least 14 bytes.
    """
    frame = bytearray(draw(base))
    for mutate, least in draw(st.lists(st.sampled_from(_MUTATIONS), max_size=most)):
        if len(frame) >= least:
            mutate(draw, frame)
    return bytes(frame) if draw(st.integers(0, 3)) == 0 else with_checksums(bytes(frame))


def mutated_frames(dst: str = DST, *, mac: bytes = OUR_MAC, most: int = 3) -> st.SearchStrategy[bytes]:
    """frames(), up to `most` things changed in each: see mutated()."""
    return mutated(frames(dst, mac=mac), most=most)
