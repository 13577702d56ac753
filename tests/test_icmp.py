# SPDX-License-Identifier: Apache-2.0
"""ICMP: echo, errors that arrive, errors that leave."""

from __future__ import annotations

import errno
import struct

import pytest
from bypass._core import lib
from conversation import AWAY, BROADCAST, ETH_IPV4, PEER, PEER_MAC, US, Conversation, broadcast
from wire import DF, ICMP, TCP, UDP, echo, eth, icmp, ipv4, parse_ip, tcp, udp


def test_an_echo_request_is_answered_with_its_own_bytes() -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 77, 3, b"hello"), tos=0x10))
        [reply] = c.sent_ip()
        assert (reply.src, reply.dst, reply.proto, reply.tos) == (US, PEER, ICMP, 0x10)
        assert reply.payload == echo(0, 77, 3, b"hello")
        assert c.counted() == {"icmp_in_echo": 1, "icmp_out_echo_reply": 1}


def test_every_size_of_ping_that_fits_the_link_comes_back_whole() -> None:
    with Conversation() as c:
        for n in (0, 1, 2, 7, 8, 56, 255, 256, 1471, 1472):
            data = bytes(i % 251 for i in range(n))
            c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, n, data)))
            [reply] = c.sent_ip()
            assert reply.payload == echo(0, 1, n, data)


def test_a_ping_with_options_is_answered_without_them() -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, 1, b"x"), options=b"\x94\x04\0\0"))  # router alert
        [frame] = c.sent()
        assert frame[14] == 0x45
        assert parse_ip(frame[14:]).payload == echo(0, 1, 1, b"x")


def test_ping_is_silent_when_not_asked_for() -> None:
    with Conversation(flags=lib.BYPASS_F_ARP) as c:
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, 1, b"x")))
        c.nothing()


def test_a_broadcast_ping_is_not_answered() -> None:
    with Conversation() as c:
        for dst in ("255.255.255.255", "192.0.2.255"):
            c.inject(broadcast(ipv4(PEER, dst, ICMP, echo(8, 1, 1, b"x"))))
        c.nothing()
        assert c.counted() == {"ip_in_broadcast": 2}


@pytest.mark.parametrize("n", range(8))
def test_a_short_icmp_message_is_counted(n: int) -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, 1, b"")[:n]))
        c.nothing()
        assert c.counted() == {"icmp_in_short": 1}


def test_a_flipped_bit_is_caught_by_the_checksum() -> None:
    message = echo(8, 1, 1, b"hello")
    with Conversation() as c:
        for bit in range(len(message) * 8):
            bad = bytearray(message)
            bad[bit // 8] ^= 1 << bit % 8
            c.inject_ip(ipv4(PEER, US, ICMP, bytes(bad)))
        c.nothing()
        assert c.counted() == {"icmp_in_bad_checksum": len(message) * 8}


@pytest.mark.parametrize("kind", [0, 4, 5, 9, 10, 13, 15, 17, 42, 255])
def test_other_types_are_ignored(kind: int) -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(kind, 0, bytes(4), bytes(28))))
        c.nothing()
        assert c.counted() == {"icmp_in_ignored": 1}


# ---- Errors that arrive -------------------------------------------------------------------------------------------
HARD = {
    2: errno.ENOPROTOOPT,
    3: errno.ECONNREFUSED,
    6: errno.ENETUNREACH,
    7: errno.EHOSTDOWN,
    8: errno.ENONET,
}
HARD |= {9: errno.ENETUNREACH, 10: errno.EHOSTUNREACH} | dict.fromkeys((13, 14, 15), errno.EHOSTUNREACH)


def quoted(code: int, *, kind: int = 3, rest: bytes = bytes(4), peer: str = PEER, sport: int = 4000) -> bytes:
    packet = ipv4(US, peer, UDP, udp(US, peer, sport, 53, b"query"))
    return ipv4(PEER, US, ICMP, icmp(kind, code, rest, packet[:28]))


@pytest.mark.parametrize("code", range(16))
def test_hard_errors_reach_the_connected_socket_as_on_linux(code: int) -> None:
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(quoted(code, rest=struct.pack("!HH", 0, 1400)))
        if code in HARD:
            assert c.taken(sock) == lib.BYPASS_ERR
            assert c.stack.ready(sock) & lib.BYPASS_ERR
            assert c.stack.recv(sock, 100) == -HARD[code]
        assert not c.stack.ready(sock) & lib.BYPASS_ERR
        assert c.stack.recv(sock, 100) == -errno.EAGAIN


def test_a_parameter_problem_is_hard_and_time_exceeded_is_not() -> None:
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(quoted(0, kind=11))
        assert c.stack.error(sock) == 0
        c.inject_ip(quoted(0, kind=12))
        assert c.stack.error(sock) == errno.EPROTO


def test_errors_about_another_flow_are_not_ours() -> None:
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(quoted(3, sport=4001), quoted(3, peer="192.0.2.9"))
        alien = ipv4("192.0.2.77", PEER, UDP, udp("192.0.2.77", PEER, 4000, 53, b""))  # not sent by us
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 3, bytes(4), alien)))
        assert c.stack.error(sock) == 0
        assert c.counted() == {"icmp_in_error": 3, "icmp_in_error_bad": 1}


def test_an_unconnected_socket_is_not_told() -> None:
    with Conversation() as c:
        sock = c.udp(4000)
        c.inject_ip(quoted(3))
        assert c.stack.error(sock) == 0


@pytest.mark.parametrize("n", range(28))
def test_a_quote_too_short_to_name_a_flow_is_counted(n: int) -> None:
    packet = ipv4(US, PEER, UDP, udp(US, PEER, 4000, 53, b""))
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 3, bytes(4), packet[:n])))
        assert c.stack.error(sock) == 0
        assert c.counted() == {"icmp_in_error": 1, "icmp_in_error_bad": 1}


def test_a_quoted_later_fragment_names_no_ports() -> None:
    packet = ipv4(US, PEER, UDP, udp(US, PEER, 4000, 53, b""), frag=1)
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 3, bytes(4), packet)))
        assert c.stack.error(sock) == 0


def test_quoted_options_are_stepped_over() -> None:
    packet = ipv4(US, PEER, UDP, udp(US, PEER, 4000, 53, b""), options=b"\x94\x04\0\0")
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 3, bytes(4), packet)))
        assert c.stack.error(sock) == errno.ECONNREFUSED


def too_big(mtu: int, total: int = 1500) -> bytes:
    packet = ipv4(US, PEER, UDP, udp(US, PEER, 4000, 53, bytes(total - 28)))
    return ipv4(PEER, US, ICMP, icmp(3, 4, struct.pack("!HH", 0, mtu), packet[:28]))


@pytest.mark.parametrize(
    ("told", "largest"),
    [(1400, 1400), (576, 576), (300, 552), (68, 552), (67, 1500), (1, 1500), (9000, 1500), (0, 1492)],
)
def test_fragmentation_needed_lowers_what_is_sent_at_once(told: int, largest: int) -> None:
    """RFC 1191; below 552 nobody is believed, 0 means the next plateau (7.1)."""
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(too_big(told))
        c.stack.send(sock, bytes(1472))
        packets = c.sent_ip()
        assert max(len(p.payload) for p in packets) + 20 <= largest
        assert max(len(p.payload) for p in packets) + 20 > largest - 8
        assert [p.df for p in packets] == ([True] if largest == 1500 else [False] * len(packets))


def test_an_old_router_that_names_no_mtu_for_a_small_packet_means_the_smallest() -> None:
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(too_big(0, total=60))
        c.stack.send(sock, bytes(1472))
        assert max(len(p.payload) for p in c.sent_ip()) + 20 <= 552


def test_a_lowered_path_mtu_is_forgotten_after_ten_minutes() -> None:
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 53))
        c.inject_ip(too_big(1000))
        c.advance(599)
        c.stack.send(sock, bytes(1472))
        assert len(c.sent_ip()) == 2
        c.advance(2)
        c.stack.send(sock, bytes(1472))
        assert [len(p.payload) for p in c.sent_ip()] == [1480]


def test_fragmentation_needed_about_a_flow_that_is_not_there_changes_nothing() -> None:
    with Conversation() as c:
        sock = c.udp(4001, peer=(PEER, 53))
        c.inject_ip(too_big(1000))
        c.stack.send(sock, bytes(1472))
        assert len(c.sent_ip()) == 1


# ---- Errors that leave --------------------------------------------------------------------------------------------
def test_a_datagram_for_nobody_is_answered_with_port_unreachable() -> None:
    with Conversation() as c:
        packet = ipv4(PEER, US, UDP, udp(PEER, US, 9, 4242, b"anyone?"), ident=7)
        c.inject_ip(packet)
        [error] = c.sent_ip()
        assert (error.src, error.dst, error.proto, error.tos) == (US, PEER, ICMP, 0xC0)
        assert error.payload == icmp(3, 3, bytes(4), packet)
        assert c.counted() == {"udp_in_no_socket": 1, "icmp_out_unreachable": 1}


def test_the_quote_is_cut_at_576_bytes() -> None:
    with Conversation() as c:
        packet = ipv4(PEER, US, UDP, udp(PEER, US, 9, 4242, bytes(1400)))
        c.inject_ip(packet)
        [error] = c.sent_ip()
        assert error.payload == icmp(3, 3, bytes(4), packet[:548])


def test_no_answer_for_nobody_when_not_asked_for() -> None:
    with Conversation(flags=lib.BYPASS_F_ARP) as c:
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 4242, b"")), ipv4(PEER, US, 47, bytes(20)))
        c.nothing()
        assert c.counted() == {"udp_in_no_socket": 1, "ip_in_unknown_proto": 1}


def test_an_unknown_protocol_is_unreachable() -> None:
    with Conversation() as c:
        packet = ipv4(PEER, US, 47, bytes(20))
        c.inject_ip(packet)
        [error] = c.sent_ip()
        assert error.payload == icmp(3, 2, bytes(4), packet)


def test_an_error_that_finds_no_frame_is_not_sent() -> None:
    with Conversation() as c:
        c.starve()
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 4242, b"")))
        c.nothing()
        assert c.held() == 0


def test_broadcasts_draw_no_error() -> None:
    with Conversation() as c:
        c.inject(broadcast(ipv4(PEER, "192.0.2.255", UDP, udp(PEER, "192.0.2.255", 9, 4242, b""))))
        c.inject(eth(BROADCAST, PEER_MAC, ETH_IPV4, ipv4(PEER, US, UDP, udp(PEER, US, 9, 4242, b""))))
        c.nothing()
        assert c.counted() == {"udp_in_no_socket": 1, "ip_in_not_us": 1}


def test_errors_are_limited_to_a_burst_of_fifty_and_a_thousand_a_second() -> None:
    with Conversation() as c:
        packet = ipv4(PEER, US, UDP, udp(PEER, US, 9, 4242, b""))
        c.inject_ip(*[packet] * 60)
        assert len(c.sent_ip()) == 50
        c.advance(0.0051)
        c.inject_ip(*[packet] * 60)
        assert len(c.sent_ip()) == 5
        c.advance(10)
        c.inject_ip(*[packet] * 60)
        assert len(c.sent_ip()) == 50
        assert c.counted()["icmp_out_limited"] == 10 + 55 + 10


def test_a_tcp_error_goes_to_tcp() -> None:
    """What TCP makes of it is TCP's; here: it is a TCP flow's, and nothing else is touched."""
    segment = ipv4(US, AWAY, TCP, tcp(US, AWAY, 4000, 80, 1, 0, 2, 100), frag=DF)
    with Conversation() as c:
        sock = c.udp(4000, peer=(PEER, 80))
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 3, bytes(4), segment[:28])))
        assert c.stack.error(sock) == 0
        moved = c.counted()
        assert moved.pop("icmp_in_error") == 1
        assert not any(name.startswith("udp") for name in moved)
