# SPDX-License-Identifier: Apache-2.0
"""Ethernet and IPv4: what is taken, what is refused and under which name; headers of what leaves."""

from __future__ import annotations

import struct

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
LIES = {
    "version 6": (ipv4(PEER, US, ICMP, PING, version=6), "ip_in_bad_version"),
    "version 0": (ipv4(PEER, US, ICMP, PING, version=0), "ip_in_bad_version"),
    "header of 16 bytes": (ipv4(PEER, US, ICMP, PING, ihl=4), "ip_in_bad_header"),
    "header of 0 bytes": (ipv4(PEER, US, ICMP, PING, ihl=0), "ip_in_bad_header"),
    "header longer than the packet": (ipv4(PEER, US, ICMP, PING, ihl=15), "ip_in_bad_header"),
    "total shorter than the header": (ipv4(PEER, US, ICMP, PING, total=19), "ip_in_bad_header"),
    "total zero": (ipv4(PEER, US, ICMP, PING, total=0), "ip_in_bad_header"),
    "total longer than the frame": (ipv4(PEER, US, ICMP, PING, total=34), "ip_in_truncated"),
    "total of 65535": (ipv4(PEER, US, ICMP, PING, total=65535), "ip_in_truncated"),
    "checksum zero": (ipv4(PEER, US, ICMP, PING, csum=0), "ip_in_bad_checksum"),
    "option of length 0": (ipv4(PEER, US, ICMP, PING, options=b"\x44\0\0\0"), "ip_in_bad_header"),
    "option of length 1": (ipv4(PEER, US, ICMP, PING, options=b"\x44\1\0\0"), "ip_in_bad_header"),
    "option beyond the header": (ipv4(PEER, US, ICMP, PING, options=b"\x44\5\0\0"), "ip_in_bad_header"),
    "option without length": (ipv4(PEER, US, ICMP, PING, options=b"\1\1\1\x44"), "ip_in_bad_header"),
    "loose source route": (ipv4(PEER, US, ICMP, PING, options=b"\x83\3\4\0"), "ip_in_source_route"),
    "strict source route": (ipv4(PEER, US, ICMP, PING, options=b"\1\x89\3\4"), "ip_in_source_route"),
    "from 0.0.0.0": (ipv4("0.0.0.0", US, ICMP, PING), "ip_in_bad_source"),
    "from 0.1.2.3": (ipv4("0.1.2.3", US, ICMP, PING), "ip_in_bad_source"),
    "from loopback": (ipv4("127.0.0.1", US, ICMP, PING), "ip_in_bad_source"),
    "from multicast": (ipv4("224.0.0.1", US, ICMP, PING), "ip_in_bad_source"),
    "from class E": (ipv4("250.0.0.1", US, ICMP, PING), "ip_in_bad_source"),
    "from the limited broadcast": (ipv4("255.255.255.255", US, ICMP, PING), "ip_in_bad_source"),
    "from the subnet's broadcast": (ipv4("192.0.2.255", US, ICMP, PING), "ip_in_bad_source"),
    "from ourselves": (ipv4(US, US, ICMP, PING), "ip_in_bad_source"),
    "to somebody else": (ipv4(PEER, OTHER, ICMP, PING), "ip_in_not_us"),
    "to the world": (ipv4(PEER, AWAY, ICMP, PING), "ip_in_not_us"),
    "to a group": (ipv4(PEER, "224.0.0.1", ICMP, PING), "ip_in_not_us"),
    "to loopback": (ipv4(PEER, "127.0.0.1", ICMP, PING), "ip_in_not_us"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_packet_that_lies_is_refused_under_its_name(what: str) -> None:
    packet, name = LIES[what]
    with Conversation() as c:
        assert counted(c, c.frame(packet)) == {name: 1}
        c.nothing()


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


def test_every_flipped_bit_of_the_header_is_caught() -> None:
    with Conversation() as c:
        for bit in range(160):
            bad = bytearray(GOOD)
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


def test_a_packet_for_one_in_a_frame_for_all_is_nobodys() -> None:
    """RFC 1122 3.3.6."""
    with Conversation() as c:
        c.udp(7)
        for group in (BROADCAST, bytes.fromhex("01005e000001")):
            packet = ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"x"))
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
