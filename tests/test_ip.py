# SPDX-License-Identifier: Apache-2.0
"""Ethernet and IPv4: what is taken, what is refused and under which name; headers of what leaves."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from bypass._core import lib
from conversation import AWAY, BROADCAST, OTHER, OUR_MAC, PEER, PEER_MAC, US, Conversation, broadcast
from wire import DF, ETH_ARP, ETH_IPV4, ICMP, TCP, UDP, echo, eth, ipv4, tcp, udp

PING = echo(8, 1, 1, b"hello")
GOOD = ipv4(PEER, US, ICMP, PING)


def counted(c: Conversation, frame: bytes) -> dict[str, int]:
    c.counted()
    c.inject(frame)
    return c.counted()


# ---- Ethernet -----------------------------------------------------------------------------------------------------
def test_a_frame_for_another_station_is_refused() -> None:
    with Conversation() as c:
        for i in range(1, 6):
            other = bytearray(OUR_MAC)
            other[i] ^= 0x40
            assert counted(c, eth(bytes(other), PEER_MAC, ETH_IPV4, GOOD)) == {"eth_in_not_us": 1}
        c.nothing()


@pytest.mark.parametrize("kind", [0, 46, 0x0600, 0x8100, 0x86DD, 0x88CC, 0xFFFF])
def test_other_types_are_counted(kind: int) -> None:
    with Conversation() as c:
        assert counted(c, eth(OUR_MAC, PEER_MAC, kind, GOOD)) == {"eth_in_unknown_type": 1}


def test_padding_of_short_frames_is_not_data() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject(
            eth(OUR_MAC, PEER_MAC, ETH_IPV4, ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"ab"))) + b"\xee" * 16
        )
        assert c.read(sock)[0] == b"ab"
        c.inject(c.frame(GOOD) + b"\xee" * 9)
        [reply] = c.sent_ip()
        assert reply.payload == echo(0, 1, 1, b"hello")


# ---- IPv4 headers that lie ----------------------------------------------------------------------------------------
Lie = tuple[str, str, dict[str, Any], str]
LIES: dict[str, Lie] = {
    "version 6": (PEER, US, {"version": 6}, "ip_in_bad_version"),
    "version 0": (PEER, US, {"version": 0}, "ip_in_bad_version"),
    "header of 16 bytes": (PEER, US, {"ihl": 4}, "ip_in_bad_header"),
    "header of 0 bytes": (PEER, US, {"ihl": 0}, "ip_in_bad_header"),
    "header longer than the packet": (PEER, US, {"ihl": 15}, "ip_in_bad_header"),
    "total shorter than the header": (PEER, US, {"total": 19}, "ip_in_bad_header"),
    "total zero": (PEER, US, {"total": 0}, "ip_in_bad_header"),
    "total longer than the frame": (PEER, US, {"total": 41}, "ip_in_truncated"),
    "total of 65535": (PEER, US, {"total": 65535}, "ip_in_truncated"),
    "checksum zero": (PEER, US, {"csum": 0}, "ip_in_bad_checksum"),
    "option of length 0": (PEER, US, {"options": b"\x44\0\0\0"}, "ip_in_bad_header"),
    "option of length 1": (PEER, US, {"options": b"\x44\1\0\0"}, "ip_in_bad_header"),
    "option beyond the header": (PEER, US, {"options": b"\x44\5\0\0"}, "ip_in_bad_header"),
    "option without length": (PEER, US, {"options": b"\1\1\1\x44"}, "ip_in_bad_header"),
    "loose source route": (PEER, US, {"options": b"\x83\3\4\0"}, "ip_in_source_route"),
    "strict source route": (PEER, US, {"options": b"\1\x89\3\4"}, "ip_in_source_route"),
    "from 0.0.0.0": ("0.0.0.0", US, {}, "ip_in_bad_source"),
    "from 0.1.2.3": ("0.1.2.3", US, {}, "ip_in_bad_source"),
    "from loopback": ("127.0.0.1", US, {}, "ip_in_bad_source"),
    "from multicast": ("224.0.0.1", US, {}, "ip_in_bad_source"),
    "from the last group": ("239.255.255.255", US, {}, "ip_in_bad_source"),
    "from class E": ("250.0.0.1", US, {}, "ip_in_bad_source"),
    "from the limited broadcast": ("255.255.255.255", US, {}, "ip_in_bad_source"),
    "from the subnet's broadcast": ("192.0.2.255", US, {}, "ip_in_bad_source"),
    "from ourselves": (US, US, {}, "ip_in_bad_source"),
    "to somebody else": (PEER, OTHER, {}, "ip_in_not_us"),
    "to the world": (PEER, AWAY, {}, "ip_in_not_us"),
    "to a group": (PEER, "224.0.0.1", {}, "ip_in_not_us"),
    "to loopback": (PEER, "127.0.0.1", {}, "ip_in_not_us"),
}


def body(proto: int, src: str, dst: str) -> bytes:
    """20 bytes that are right, so that only the IPv4 header can be wrong."""
    if proto == ICMP:
        return echo(8, 1, 1, b"hello world!")
    if proto == UDP:
        return udp(src, dst, 9, 7, b"hello world!")
    return tcp(src, dst, 9, 7, 1, 0, 2, 100)


@pytest.mark.parametrize("addresses", [1, 2])
@pytest.mark.parametrize("proto", [ICMP, TCP, UDP])
@pytest.mark.parametrize("what", LIES)
def test_a_packet_that_lies_is_refused_under_its_name(what: str, proto: int, addresses: int) -> None:
    """For each protocol and with one address and several: the common case takes a shorter way through the code."""
    src, dst, lie, name = LIES[what]
    with Conversation() as c:
        if addresses == 2:
            c.stack.addr_add("203.0.113.1", 24)
            c.stack.nexthop_set(PEER, PEER_MAC)
        assert counted(c, c.frame(ipv4(src, dst, proto, body(proto, src, dst), **lie))) == {name: 1}
        c.nothing()


@pytest.mark.parametrize("src", ["1.0.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.254", PEER])
@pytest.mark.parametrize("proto", [ICMP, TCP, UDP])
def test_a_packet_from_any_host_is_taken(src: str, proto: int) -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(src, US, proto, body(proto, src, US)))
        assert not any(name.startswith("ip_in") for name in c.counted())


def test_the_header_may_have_every_length() -> None:
    with Conversation() as c:
        for n in range(0, 44, 4):
            c.inject_ip(ipv4(PEER, US, ICMP, PING, options=b"\1" * n))
            [reply] = c.sent_ip()
            assert reply.payload == echo(0, 1, 1, b"hello")


def test_options_behind_the_end_are_not_read() -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(PEER, US, ICMP, PING, options=b"\0\x83\xff\xff"))
        assert len(c.sent_ip()) == 1


@pytest.mark.parametrize("proto", [ICMP, TCP, UDP])
def test_every_flipped_bit_of_the_header_is_caught(proto: int) -> None:
    with Conversation() as c:
        for bit in range(160):
            bad = bytearray(ipv4(PEER, US, proto, body(proto, PEER, US)))
            bad[bit // 8] ^= 1 << bit % 8
            moved = counted(c, c.frame(bytes(bad)))
            assert sum(moved.values()) == 1
            [name] = moved
            assert name in ("ip_in_bad_checksum", "ip_in_bad_version", "ip_in_bad_header", "ip_in_truncated")
        c.nothing()


def test_a_frame_truncated_anywhere_is_counted_once_and_answered_never() -> None:
    frames = {
        "arp": eth(
            OUR_MAC, PEER_MAC, ETH_ARP, struct.pack("!HHBBH", 1, ETH_IPV4, 6, 4, 1) + PEER_MAC + bytes(14)
        ),
        "ping": eth(OUR_MAC, PEER_MAC, ETH_IPV4, GOOD),
        "udp": eth(OUR_MAC, PEER_MAC, ETH_IPV4, ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"hello"))),
        "tcp": eth(OUR_MAC, PEER_MAC, ETH_IPV4, ipv4(PEER, US, TCP, tcp(PEER, US, 9, 7, 1, 0, 2, 100))),
    }
    with Conversation() as c:
        sock = c.udp(7)
        for frame in frames.values():
            for n in range(14, len(frame)):
                assert sum(counted(c, frame[:n]).values()) == 1
        c.nothing()
        assert c.stack.recv(sock, 100) == -11


# ---- Broadcasts ---------------------------------------------------------------------------------------------------
def test_udp_takes_broadcasts_and_tcp_does_not() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        for dst in ("255.255.255.255", "192.0.2.255"):
            c.inject(broadcast(ipv4(PEER, dst, UDP, udp(PEER, dst, 9, 7, b"all"))))
            assert c.read(sock) == (b"all", (PEER, 9))
            assert counted(c, broadcast(ipv4(PEER, dst, TCP, tcp(PEER, dst, 9, 7, 1, 0, 2, 100)))) == {
                "ip_in_broadcast": 1
            }
        c.nothing()


@pytest.mark.parametrize("proto", [ICMP, TCP, UDP])
def test_a_packet_for_one_in_a_frame_for_all_is_nobodys(proto: int) -> None:
    """RFC 1122 3.3.6."""
    with Conversation() as c:
        c.udp(7)
        for group in (BROADCAST, bytes.fromhex("01005e000001")):
            packet = ipv4(PEER, US, proto, body(proto, PEER, US))
            assert counted(c, eth(group, PEER_MAC, ETH_IPV4, packet)) == {"ip_in_not_us": 1}


def test_a_point_to_point_prefix_has_no_broadcast() -> None:
    """RFC 3021: of a /31 both addresses are hosts."""
    with Conversation(neighbours=()) as c:
        c.stack.addr_add("203.0.113.0", 31)
        c.stack.nexthop_set("203.0.113.1", PEER_MAC)
        c.inject_ip(ipv4("203.0.113.1", "203.0.113.0", ICMP, PING))
        [reply] = c.sent_ip()
        assert (reply.src, reply.dst) == ("203.0.113.0", "203.0.113.1")


# ---- Addresses ----------------------------------------------------------------------------------------------------
def test_addresses_come_and_go() -> None:
    with Conversation() as c:
        second = "203.0.113.5"
        assert counted(c, c.frame(ipv4(PEER, second, ICMP, PING))) == {"ip_in_not_us": 1}
        c.stack.addr_add(second, 24)
        c.stack.nexthop_set(PEER, PEER_MAC)
        c.inject_ip(ipv4(PEER, second, ICMP, PING))
        assert [p.src for p in c.sent_ip()] == [second]
        c.stack.addr_del(second)
        assert counted(c, c.frame(ipv4(PEER, second, ICMP, PING))) == {"ip_in_not_us": 1}


def test_bad_addresses_are_refused() -> None:
    with Conversation() as c:
        for address, prefix, error in (
            (US, 24, FileExistsError),
            ("127.0.0.1", 8, OSError),
            ("224.0.0.1", 4, OSError),
            ("0.0.0.0", 0, OSError),
            ("203.0.113.1", 33, OSError),
            ("203.0.113.1", -1, OSError),
            ("2001:db8::1", 64, OSError),
        ):
            with pytest.raises(error):
                c.stack.addr_add(address, prefix)
        with pytest.raises(OSError, match="assign"):
            c.stack.addr_del("203.0.113.1")


def test_no_more_than_sixteen_addresses() -> None:
    with Conversation() as c:
        for i in range(15):
            c.stack.addr_add(f"203.0.113.{i + 1}", 24)
        with pytest.raises(OSError, match="No space"):
            c.stack.addr_add("203.0.113.99", 24)


def test_the_source_is_the_address_whose_subnet_holds_the_destination() -> None:
    with Conversation(neighbours=()) as c:
        c.stack.addr_add("203.0.113.5", 24)
        c.stack.gateway_set(PEER)
        for dst, src in ((PEER, US), ("203.0.113.9", "203.0.113.5"), (AWAY, US)):
            c.stack.nexthop_set(dst, PEER_MAC)
            sock = c.udp(0)
            c.stack.sendto(sock, b"x", (dst, 9))
            assert [p.src for p in c.sent_ip()] == [src]


# ---- Out ----------------------------------------------------------------------------------------------------------
def test_what_is_not_cut_carries_df_and_no_identification() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.stack.setopt(sock, lib.BYPASS_IP_TTL, 9)
        c.stack.setopt(sock, lib.BYPASS_IP_TOS, 0xB8)
        c.stack.sendto(sock, b"hello", (PEER, 9))
        assert c.sent() == [
            eth(
                PEER_MAC,
                OUR_MAC,
                ETH_IPV4,
                ipv4(US, PEER, UDP, udp(US, PEER, 7, 9, b"hello"), ttl=9, tos=0xB8, ident=0, frag=DF),
            )
        ]


def test_identifications_of_cut_datagrams_differ() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        seen = set()
        for _ in range(50):
            c.stack.sendto(sock, bytes(3000), (PEER, 9))
            idents = {p.ident for p in c.sent_ip()}
            assert len(idents) == 1
            seen |= idents
        assert len(seen) == 50
        assert 0 not in seen


def test_an_answer_larger_than_the_path_is_cut() -> None:
    """An echo reply may not have Don't Fragment: it is as large as the request that came another way."""
    with Conversation() as c:
        c.stack.nexthop_set(PEER, PEER_MAC, 600)
        data = bytes(i % 251 for i in range(1400))
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, 1, data)))
        packets = c.sent_ip()
        assert [len(p.payload) for p in packets] == [576, 576, 256]
        assert b"".join(p.payload for p in packets) == echo(0, 1, 1, data)
        assert [(p.offset, p.mf) for p in packets] == [(0, True), (576, True), (1152, False)]


def test_an_answer_that_finds_no_frames_for_its_pieces_is_dropped() -> None:
    with Conversation() as c:
        c.stack.nexthop_set(PEER, PEER_MAC, 600)
        c.starve()
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, 1, bytes(1400))))
        c.nothing()
        assert c.counted()["ip_out_too_big"] == 1
        assert c.held() == 0


def test_an_answer_to_an_unreachable_neighbour_is_dropped() -> None:
    with Conversation() as c:
        c.stack.nexthop_set(PEER, None)
        c.inject_ip(ipv4(PEER, US, ICMP, PING))
        c.nothing()
        assert c.counted()["ip_out_unreachable"] == 1
        assert c.held() == 0


def test_a_gateway_has_to_be_a_host() -> None:
    with Conversation() as c:
        for address in (US, "255.255.255.255", "224.0.0.1", "127.0.0.1", "2001:db8::1"):
            with pytest.raises(OSError, match=r"Invalid|not supported"):
                c.stack.gateway_set(address)
