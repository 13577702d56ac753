# SPDX-License-Identifier: Apache-2.0
"""UDP sockets: names, receiving, sending, bounds, errors, readiness."""

from __future__ import annotations

import errno
import itertools

import pytest
from bypass._core import lib
from conversation import AWAY, KERNEL, OTHER, PEER, PEER_MAC, US, Conversation, broadcast
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples
from wire import ICMP, UDP, icmp, ipv4, join, parse_udp, udp

from bypass.core import FOREVER, Config

EAGAIN = -errno.EAGAIN


def datagram(data: bytes, sport: int = 9, dport: int = 7, src: str = PEER, dst: str = US) -> bytes:
    return ipv4(src, dst, UDP, udp(src, dst, sport, dport, data))


# ---- Receiving ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 471, 472, 473, 968, 1000, 1472])
def test_a_datagram_of_every_size_arrives_with_its_sender(n: int) -> None:
    """Sizes around every border: copied or not, one chunk or several, a full frame."""
    data = bytes(i % 251 for i in range(n))
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(datagram(data))
        assert c.taken(sock) == lib.BYPASS_IN
        assert c.read(sock) == (data, (PEER, 9))
        assert c.stack.recvfrom(sock, 100) == EAGAIN
        assert c.held() == 0
        assert c.stack.audit()["chunks"] == 0


def test_small_payloads_leave_their_frame_and_large_ones_stay() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(datagram(bytes(256)))
        assert (c.held(), c.stack.audit()["chunks"]) == (0, 1)
        c.inject_ip(datagram(bytes(257)))
        assert (c.held(), c.stack.audit()["chunks"]) == (1, 1)
        assert [len(c.read(sock)[0]) for _ in range(2)] == [256, 257]


def test_order_is_kept_between_frames_and_chunks() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        sizes = [10, 1000, 20, 30, 1100, 1200, 40]
        c.inject_ip(*(datagram(bytes(n)) for n in sizes))
        assert [len(c.read(sock)[0]) for _ in sizes] == sizes


def test_large_payloads_are_copied_when_frames_are_short() -> None:
    with Conversation(frames=64, config=Config(conns=16, chunks=4096)) as c:
        sock = c.udp(7)
        c.inject_ip(*(datagram(bytes([i]) * 1000) for i in range(60)))
        assert c.held() <= 48
        assert [c.read(sock)[0][0] for _ in range(60)] == list(range(60))


def test_the_queue_is_bounded_by_the_receive_buffer() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.stack.setopt(sock, lib.BYPASS_SO_RCVBUF, 8192)
        c.inject_ip(*(datagram(b"%d" % i) for i in range(30)))
        assert c.counted()["udp_in_full"] == 30 - 8192 // 512
        assert [c.read(sock)[0] for _ in range(16)] == [b"%d" % i for i in range(16)]
        assert c.stack.recv(sock, 100) == EAGAIN
        c.inject_ip(datagram(b"again"))
        assert c.read(sock)[0] == b"again"


def test_without_chunks_and_frames_datagrams_are_dropped_and_counted() -> None:
    with Conversation(frames=64, config=Config(conns=16, chunks=4)) as c:
        sock = c.udp(7)
        c.inject_ip(*(datagram(b"%d" % i) for i in range(60)))
        moved = c.counted()
        assert moved["udp_in_no_memory"] > 0
        assert moved["udp_in"] + moved["udp_in_no_memory"] == 60
        assert c.held() <= 48 + 1
        assert c.read(sock)[0] == b"0"


def test_peeking_leaves_it_and_truncation_tells() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        for data in (b"hello", bytes(1000)):
            c.inject_ip(datagram(data))
            assert c.stack.recvfrom(sock, 3, lib.BYPASS_PEEK) == (data[:3], (PEER, 9), 3)
            assert c.stack.recvfrom(sock, 3, lib.BYPASS_PEEK | lib.BYPASS_TRUNC) == (
                data[:3],
                (PEER, 9),
                len(data),
            )
            assert c.stack.recvfrom(sock, 3) == (data[:3], (PEER, 9), 3)
            assert c.stack.recv(sock, 3) == EAGAIN  # the rest of it is gone


def test_a_read_of_no_bytes_takes_the_datagram() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(datagram(b"hello"), datagram(b""), datagram(bytes(1000)))
        for size in (5, 0, 1000):
            assert c.stack.recvfrom(sock, 0, lib.BYPASS_TRUNC) == (b"", (PEER, 9), size)


def test_zero_checksum_means_none() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"hello", csum=0)))
        assert c.read(sock)[0] == b"hello"


def test_every_flipped_bit_is_caught() -> None:
    """But in the checksum itself, where all ones flipped to zero mean none: there is no such datagram here."""
    good = udp(PEER, US, 9, 7, b"hello")
    with Conversation() as c:
        sock = c.udp(7)
        for bit in range(len(good) * 8):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            c.inject_ip(ipv4(PEER, US, UDP, bytes(bad)))
        moved = c.counted()
        assert set(moved) == {"udp_in_bad_checksum", "udp_in_bad_length"}
        assert sum(moved.values()) == len(good) * 8
        assert c.stack.recv(sock, 100) == EAGAIN


def test_a_vouched_checksum_is_not_verified() -> None:
    with Conversation(caps=lib.BYPASS_CAP_RX_CSUM) as c:
        sock = c.udp(7)
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"hello", csum=0x1234)))
        assert c.read(sock)[0] == b"hello"


@pytest.mark.parametrize(
    ("size", "name"), [(0, "udp_in_bad_length"), (7, "udp_in_bad_length"), (14, "udp_in_bad_length")]
)
def test_a_length_that_lies_is_refused(size: int, name: str) -> None:
    with Conversation() as c:
        c.udp(7)
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"hello", size=size)))
        assert c.counted() == {name: 1}


@pytest.mark.parametrize("n", range(8))
def test_a_short_header_is_refused(n: int) -> None:
    with Conversation() as c:
        c.udp(7)
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"")[:n]))
        assert c.counted() == {"udp_in_short": 1}


def test_bytes_behind_the_length_are_not_data() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, b"hello") + b"junk"))
        assert c.read(sock)[0] == b"hello"


# ---- Which socket -------------------------------------------------------------------------------------------------
def test_the_most_specific_socket_gets_it() -> None:
    with Conversation() as c:
        c.stack.addr_add("192.0.2.5", 24)
        any_ = c.udp(7)
        with pytest.raises(OSError, match="in use"):
            c.udp(7, US)
        c.stack.close_socket(any_)
        socks = {}
        for name, address, peer in (
            ("any", "0.0.0.0", None),
            ("bound", US, None),
            ("connected", "0.0.0.0", (OTHER, 9)),
        ):
            sock = c.stack.socket(lib.BYPASS_DGRAM)
            c.stack.setopt(sock, lib.BYPASS_SO_REUSEADDR, 1)
            c.stack.bind(sock, (address, 7))
            if peer:
                c.stack.connect(sock, peer)
            socks[name] = sock
        c.inject_ip(datagram(b"to bound"), datagram(b"to any", dst="192.0.2.5"))
        c.inject_ip(datagram(b"to connected", src=OTHER), datagram(b"other port", src=OTHER, sport=10))
        assert c.read(socks["any"])[0] == b"to any"
        assert [c.read(socks["bound"])[0] for _ in range(2)] == [b"to bound", b"other port"]
        assert c.read(socks["connected"])[0] == b"to connected"
        assert all(c.stack.recv(s, 1) == EAGAIN for s in socks.values())


def test_a_port_that_is_shared_by_agreement_spreads_flows_and_each_stays_with_its_own() -> None:
    """SO_REUSEPORT, socket(7)."""
    with Conversation() as c:
        socks = []
        for _ in range(4):
            sock = c.stack.socket(lib.BYPASS_DGRAM)
            c.stack.setopt(sock, lib.BYPASS_SO_REUSEPORT, 1)
            c.stack.bind(sock, ("0.0.0.0", 7))
            socks.append(sock)
        with pytest.raises(OSError, match="in use"):
            c.udp(7)

        def owner(sport: int) -> int:
            c.inject_ip(datagram(b"x", sport=sport))
            [got] = [s for s in socks if c.stack.recv(s, 1) == b"x"]
            return got

        first = {sport: owner(sport) for sport in range(1000, 1200)}
        shares = [sum(o == s for o in first.values()) for s in socks]
        assert all(20 < n < 90 for n in shares), shares
        gone = socks.pop()
        c.stack.close_socket(gone)
        assert all(owner(sport) == s for sport, s in first.items() if s != gone), (
            "only the flows of the one move"
        )


def test_a_connected_socket_takes_nothing_from_others() -> None:
    with Conversation() as c:
        sock = c.udp(7, peer=(PEER, 9))
        c.inject_ip(datagram(b"1", sport=10), datagram(b"2", src=OTHER))
        assert c.stack.recv(sock, 1) == EAGAIN
        assert c.counted()["udp_in_no_socket"] == 2
        c.inject_ip(datagram(b"3"))
        assert c.stack.recv(sock, 1) == b"3"


def test_broadcasts_reach_every_socket_that_is_not_bound_to_an_address() -> None:
    with Conversation() as c:
        socks = []
        for address in ("0.0.0.0", "0.0.0.0", US):
            sock = c.stack.socket(lib.BYPASS_DGRAM)
            c.stack.setopt(sock, lib.BYPASS_SO_REUSEADDR, 1)
            c.stack.bind(sock, (address, 7))
            socks.append(sock)
        for data in (b"all", bytes(1000)):
            c.inject(broadcast(datagram(data, dst="192.0.2.255")))
            assert [c.stack.recv(s, 2000) for s in socks] == [data, data, EAGAIN]
        assert c.held() == 0


def test_closing_gives_everything_back_and_the_port_too() -> None:
    with Conversation() as c:
        socks = [c.udp(port) for port in (7, 71, 135)]  # one bucket of the table
        c.inject_ip(datagram(b"a", dport=71), datagram(bytes(1000), dport=71))
        c.stack.close_socket(socks[1])
        assert c.held() == 0
        assert c.stack.audit()["chunks"] == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            c.stack.bind(socks[1], ("0.0.0.0", 9))
        c.udp(71)
        c.inject_ip(datagram(b"b", dport=135))
        assert c.read(socks[2])[0] == b"b"


# ---- Names --------------------------------------------------------------------------------------------------------
def test_names_are_as_given_or_chosen() -> None:
    with Conversation() as c:
        sock = c.stack.socket(lib.BYPASS_DGRAM)
        c.stack.bind(sock, (US, 0))
        address, port = c.stack.local(sock)
        assert address == US
        assert 32768 <= port <= 60999
        with pytest.raises(OSError, match="not connected"):
            c.stack.peer(sock)
        assert c.stack.connect(sock, (PEER, 9)) == 0
        assert c.stack.peer(sock) == (PEER, 9)
        with pytest.raises(OSError, match="Invalid"):
            c.stack.bind(sock, (US, 8))


def test_an_unbound_socket_gets_a_port_when_it_sends() -> None:
    with Conversation() as c:
        sock = c.stack.socket(lib.BYPASS_DGRAM)
        c.stack.sendto(sock, b"x", (PEER, 9))
        [sent] = c.sent_udp()
        assert sent.src == (US, c.stack.local(sock)[1])
        c.inject_ip(datagram(b"answer", dport=sent.src[1]))
        assert c.read(sock)[0] == b"answer"


def test_ephemeral_ports_are_unpredictable_and_distinct() -> None:
    with Conversation(config=Config(conns=16, socks=300)) as c:
        ports = [c.stack.local(c.udp(0))[1] for _ in range(256)]
        assert len(set(ports)) == 256
        assert len({b - a for a, b in itertools.pairwise(ports)}) > 200


def test_when_every_port_is_taken_binding_says_so() -> None:
    with Conversation(config=Config(conns=16, socks=30000)) as c:
        for _ in range(32768, 61000):
            c.udp(0)
        with pytest.raises(OSError, match="in use"):
            c.udp(0)
        sock = c.stack.socket(lib.BYPASS_DGRAM)
        assert c.stack.connect(sock, (PEER, 9)) == -errno.EADDRINUSE
        assert c.stack.sendto(sock, b"x", (PEER, 9)) == -errno.EADDRINUSE


def test_connecting_chooses_the_address_and_can_be_undone() -> None:
    with Conversation() as c:
        sock = c.udp(7, peer=(PEER, 9))
        assert c.stack.local(sock) == (US, 7)
        assert c.stack.connect(sock, (OTHER, 10)) == 0
        assert c.stack.peer(sock) == (OTHER, 10)
        assert c.stack.connect(sock, ("0.0.0.0", 0)) == 0
        assert c.stack.local(sock) == ("0.0.0.0", 7)
        assert c.stack.send(sock, b"x") == -errno.EDESTADDRREQ


def test_what_cannot_be_bound_or_connected() -> None:
    with Conversation() as c:
        sock = c.stack.socket(lib.BYPASS_DGRAM)
        with pytest.raises(OSError, match="assign"):
            c.stack.bind(sock, (PEER, 7))
        assert c.stack.connect(sock, (PEER, 0)) == -errno.EINVAL
        assert c.stack.connect(sock, ("127.0.0.1", 7)) == -errno.EINVAL
        assert c.stack.connect(sock, ("255.255.255.255", 7)) == -errno.EACCES
        assert c.stack.connect(sock, ("2001:db8::1", 7)) == -errno.EAFNOSUPPORT
        c.stack.addr_del(US)
        assert c.stack.connect(sock, (PEER, 7)) == -errno.ENETUNREACH
        assert c.stack.sendto(sock, b"x", (PEER, 7)) == -errno.ENETUNREACH


def test_handles_run_out_with_an_error() -> None:
    with Conversation(config=Config(conns=16, socks=4)) as c:
        for _ in range(4):
            c.stack.socket(lib.BYPASS_DGRAM)
        with pytest.raises(OSError, match="Too many open files"):
            c.stack.socket(lib.BYPASS_DGRAM)


def test_who_uses_a_port() -> None:
    with Conversation() as c:
        c.stack.addr_add("192.0.2.5", 24)
        c.udp(7, US)
        c.udp(7, "192.0.2.5")
        c.udp(9)
        users = c.stack.port_users
        assert users(lib.BYPASS_DGRAM, None, 7) == 2
        assert users(lib.BYPASS_DGRAM, US, 7) == 1
        assert users(lib.BYPASS_DGRAM, US, 9) == 1
        assert users(lib.BYPASS_DGRAM, None, 8) == 0


# ---- Sending ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, 1, 2, 100, 1471, 1472])
def test_what_fits_the_path_is_one_packet(n: int) -> None:
    data = bytes(i % 251 for i in range(n))
    with Conversation() as c:
        sock = c.udp(7)
        assert c.stack.sendto(sock, data, (PEER, 9)) == n
        [packet] = c.sent_ip()
        assert packet.df
        assert parse_udp(packet) == parse_udp(packet).__class__((US, 7), (PEER, 9), data)


@pytest.mark.parametrize("n", [1473, 1480, 2952, 2953, 9000, 65506, 65507])
def test_what_does_not_is_cut(n: int) -> None:
    data = bytes(i % 251 for i in range(n))
    with Conversation(frames=1024) as c:
        sock = c.udp(7)
        assert c.stack.sendto(sock, data, (PEER, 9)) == n
        packets = c.sent_ip()
        assert len(packets) == -(-(n + 8) // 1480)
        assert parse_udp(join(packets)).data == data


@pytest.mark.parametrize(
    ("discover", "n", "df", "packets"),
    [
        (0, 100, False, 1),
        (0, 1473, False, 2),
        (1, 100, True, 1),
        (1, 1473, False, 2),
        (2, 1472, True, 1),
        (3, 1472, True, 1),
    ],
)
def test_whether_packets_may_be_cut_is_the_sockets_choice(
    discover: int, n: int, df: bool, packets: int
) -> None:
    """IP_MTU_DISCOVER, ip(7): DONT, WANT, DO, PROBE."""
    with Conversation() as c:
        sock = c.udp(7)
        c.stack.setopt(sock, lib.BYPASS_IP_MTU_DISCOVER, discover)
        assert c.stack.sendto(sock, bytes(n), (PEER, 9)) == n
        sent = c.sent_ip()
        assert [p.df for p in sent] == [df] * packets


@pytest.mark.parametrize("discover", [2, 3])
def test_what_must_not_be_cut_is_refused_when_it_does_not_fit(discover: int) -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.stack.setopt(sock, lib.BYPASS_IP_MTU_DISCOVER, discover)
        assert c.stack.sendto(sock, bytes(1473), (PEER, 9)) == -errno.EMSGSIZE
        assert c.sent_ip() == []


def test_a_path_that_has_become_narrow_counts_for_do_and_not_for_probe() -> None:
    with Conversation() as c:
        sock = c.udp(7, peer=(PEER, 9))
        c.stack.send(sock, bytes(1000))
        assert len(c.sent_ip()) == 1
        assert c.stack.getopt(sock, lib.BYPASS_IP_MTU) == 1500
        quote = ipv4(US, PEER, UDP, udp(US, PEER, 7, 9, bytes(1000)))
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 4, (1000).to_bytes(4, "big"), quote)))
        assert c.stack.error(sock) in (0, errno.EMSGSIZE)
        assert c.stack.getopt(sock, lib.BYPASS_IP_MTU) == 1000
        for discover, got in ((2, -errno.EMSGSIZE), (3, 1400)):
            c.stack.setopt(sock, lib.BYPASS_IP_MTU_DISCOVER, discover)
            assert c.stack.send(sock, bytes(1400)) == got
        [packet] = c.sent_ip()
        assert packet.df


def test_a_datagram_is_one_call() -> None:
    """MSG_MORE would make one of several: it is refused, not ignored."""
    with Conversation() as c:
        sock = c.udp(7, peer=(PEER, 9))
        assert c.stack.send(sock, b"a", lib.BYPASS_MORE) == -errno.EOPNOTSUPP
        assert c.sent_ip() == []


def test_what_is_cut_waits_for_the_next_hop_as_a_whole() -> None:
    with Conversation(neighbours=(), frames=96) as c:
        sock = c.udp(7)
        for i in range(5):
            c.stack.sendto(sock, bytes([i]) * 4000, (PEER, 9))
        c.sent()
        c.answer_arp(PEER)
        packets = c.sent_ip()
        assert len(packets) == 9
        for i in range(3):
            assert parse_udp(join(packets[3 * i : 3 * i + 3])).data == bytes([i + 2]) * 4000


def test_too_large_is_refused() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        assert c.stack.sendto(sock, bytes(65508), (PEER, 9)) == -errno.EMSGSIZE
    with Conversation(frames=32) as c:  # would need more frames than it may ever have
        sock = c.udp(7)
        assert c.stack.sendto(sock, bytes(65507), (PEER, 9)) == -errno.EMSGSIZE


def test_a_sum_of_zero_is_sent_as_all_ones() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        base = udp(US, PEER, 7, 9, b"\0\0")
        word = int.from_bytes(base[6:8], "big")  # adding it to the data makes the sum zero
        c.stack.sendto(sock, word.to_bytes(2, "big"), (PEER, 9))
        [packet] = c.sent_ip()
        assert packet.payload[6:8] == b"\xff\xff"


def test_where_nothing_can_be_sent() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        assert c.stack.send(sock, b"x") == -errno.EDESTADDRREQ
        assert c.stack.sendto(sock, b"x", (PEER, 0)) == -errno.EINVAL
        for nowhere in ("127.0.0.1", "0.0.0.0", "0.1.2.3", "240.0.0.1", "255.255.255.254"):
            assert c.stack.sendto(sock, b"x", (nowhere, 7)) == -errno.EINVAL
        assert c.stack.sendto(sock, b"x", ("2001:db8::1", 7)) == -errno.EAFNOSUPPORT
        assert c.stack.sendto(sock, b"x", (US, 7)) == -errno.EHOSTUNREACH
        c.nothing()
        assert c.held() == 0


def test_broadcast_needs_the_option() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        for dst in ("255.255.255.255", "192.0.2.255"):
            assert c.stack.sendto(sock, b"x", (dst, 9)) == -errno.EACCES
        c.stack.setopt(sock, lib.BYPASS_SO_BROADCAST, 1)
        for dst in ("255.255.255.255", "192.0.2.255"):
            assert c.stack.sendto(sock, b"x", (dst, 9)) == 1
        assert [f[:6] for f in c.sent()] == [b"\xff" * 6] * 2
        assert c.stack.sendto(sock, bytes(3000), (dst, 9)) == 3000
        c.stack.setopt(sock, lib.BYPASS_SO_BROADCAST, 0)
        assert c.stack.sendto(sock, b"x", (dst, 9)) == -errno.EACCES


def test_the_source_follows_the_addresses() -> None:
    """What the last datagram's source was is remembered, but not longer than it is right."""
    with Conversation(flags=KERNEL) as c:
        sock = c.udp(7)
        for add, remove, expected in (("192.0.2.5", US, "192.0.2.5"), (US, "192.0.2.5", US)):
            c.stack.sendto(sock, b"x", (PEER, 9))
            c.stack.sendto(sock, b"x", (PEER, 9))
            c.stack.addr_add(add, 24)
            c.stack.addr_del(remove)
            c.stack.nexthop_set(PEER, PEER_MAC)
            c.sent()
            c.stack.sendto(sock, b"x", (PEER, 9))
            assert [d.src[0] for d in c.sent_udp()] == [expected]


def test_a_port_of_zero_is_refused_however_well_the_peer_is_known() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        for port, result in ((9, 1), (0, -errno.EINVAL), (9, 1)):
            assert c.stack.sendto(sock, b"x", (PEER, port)) == result


def test_multicast_goes_to_the_groups_mac_and_not_beyond_the_link() -> None:
    with Conversation(flags=KERNEL) as c:
        sock = c.udp(7)
        assert c.stack.sendto(sock, b"x", ("239.129.2.3", 9)) == 1
        [frame] = c.sent()
        assert frame[:6] == bytes.fromhex("01005e010203")
        assert frame[14 + 8] == 1


def test_a_sender_in_a_loop_is_stopped_and_told_when_to_go_on() -> None:
    with Conversation(frames=64) as c:
        sock = c.udp(7)
        sent, free = 0, c.port.free_frames
        while (result := c.stack.sendto(sock, b"x", (PEER, 9))) == 1:
            sent += 1
        assert result == EAGAIN
        assert sent == free - 64 // 16  # the rest is for answers
        assert not c.stack.ready(sock) & lib.BYPASS_OUT
        assert c.taken(sock) == lib.BYPASS_OUT
        assert len(c.sent()) == sent
        assert c.stack.ready(sock) & lib.BYPASS_OUT
        assert c.stack.sendto(sock, b"x", (PEER, 9)) == 1


def test_a_blocked_sender_is_woken_when_the_device_has_sent_and_nobody_is_woken_without_one() -> None:
    with Conversation(frames=64) as c:
        sock = c.udp(7)
        c.settle()
        assert c.stack.deadline() == FOREVER
        c.device(complete_ns=5_000_000)
        while c.stack.sendto(sock, b"x", (PEER, 9)) == 1:
            pass
        assert c.taken(sock) == 0
        c.advance(0.004)
        assert c.taken(sock) == 0
        c.advance(0.003)
        assert c.taken(sock) == lib.BYPASS_OUT
        assert c.stack.deadline() == FOREVER


@pytest.mark.parametrize("closed", range(3))
def test_blocked_senders_get_one_event_each_also_after_one_closed(closed: int) -> None:
    with Conversation(frames=64) as c:
        socks = [c.udp(p) for p in (7, 8, 9)]
        while c.stack.sendto(socks[0], b"x", (PEER, 9)) == 1:
            pass
        assert [c.stack.sendto(s, b"x", (PEER, 9)) for s in socks] == [EAGAIN] * 3
        c.stack.close_socket(socks[closed])
        c.advance(0.01)
        left = [s for s in socks if s != socks[closed]]
        assert [c.taken(s) for s in left] == [lib.BYPASS_OUT] * 2
        c.advance(1)
        assert [c.taken(s) for s in left] == [0, 0]


@pytest.mark.parametrize("n", [10, 1472, 5000])
def test_without_a_frame_nothing_is_sent_and_nothing_is_lost(n: int) -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.starve()
        assert c.stack.sendto(sock, bytes(n), (PEER, 9)) == EAGAIN
        c.nothing()
        c.starve(starved=False)
        c.advance(0.01)
        assert c.taken(sock) == lib.BYPASS_OUT
        assert c.stack.sendto(sock, bytes(n), (PEER, 9)) == n


# ---- State --------------------------------------------------------------------------------------------------------
def test_events_come_with_each_datagram_and_once_between_looks() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(datagram(b"1"), datagram(b"2"))
        assert c.taken(sock) == lib.BYPASS_IN
        assert c.taken(sock) == 0
        assert c.stack.ready(sock) == lib.BYPASS_IN | lib.BYPASS_OUT
        c.inject_ip(datagram(b"3"))
        assert c.taken(sock) == lib.BYPASS_IN
        for _ in range(3):
            c.read(sock)
        assert c.stack.ready(sock) == lib.BYPASS_OUT


def test_shutdown_of_each_direction() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.stack.connect(sock, (PEER, 9))
        c.inject_ip(datagram(b"before"))
        c.stack.shutdown(sock, lib.BYPASS_SHUT_RD)
        assert c.taken(sock) & lib.BYPASS_IN
        c.inject_ip(datagram(b"after"))
        assert [c.stack.recv(sock, 100) for _ in range(3)] == [b"before", b"after", EAGAIN], "as on Linux"
        assert c.stack.ready(sock) & lib.BYPASS_RDHUP
        assert c.stack.send(sock, b"x") == 1
        c.stack.shutdown(sock, lib.BYPASS_SHUT_WR)
        assert c.stack.send(sock, b"x") == -errno.EPIPE
        assert c.stack.ready(sock) & lib.BYPASS_HUP


def test_shutdown_without_a_peer_fails_and_is_done_all_the_same() -> None:
    """As on Linux, where other threads that wait in poll() see it."""
    with Conversation() as c:
        sock = c.udp(7)
        with pytest.raises(OSError, match="not connected"):
            c.stack.shutdown(sock, lib.BYPASS_SHUT_RDWR)
        assert c.taken(sock) & lib.BYPASS_HUP
        assert c.stack.sendto(sock, b"x", (PEER, 9)) == -errno.EPIPE


def test_an_error_is_told_once_to_whoever_comes_first() -> None:
    with Conversation() as c:
        sock = c.udp(7, peer=(PEER, 9))
        for call in (
            lambda: c.stack.recv(sock, 1),
            lambda: c.stack.send(sock, b"x"),
            lambda: -c.stack.error(sock),
        ):
            quote = ipv4(US, PEER, UDP, udp(US, PEER, 7, 9, b""))
            c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 3, bytes(4), quote)))
            assert call() == -errno.ECONNREFUSED
            assert c.stack.error(sock) == 0


def test_options_keep_their_values_and_refuse_nonsense() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        for option, good, bad in (
            (lib.BYPASS_IP_TTL, (1, 255), (0, 256, -2)),
            (lib.BYPASS_IP_TOS, (0, 255), ()),
            (lib.BYPASS_SO_BROADCAST, (1, 0), ()),
            (lib.BYPASS_SO_REUSEADDR, (1, 0), ()),
            (lib.BYPASS_SO_REUSEPORT, (1, 0), ()),
            (lib.BYPASS_SO_LINGER, (-1, 0, 5), (-2,)),
            (lib.BYPASS_IP_MTU_DISCOVER, (0, 1, 2, 3), (-1, 4)),
            (lib.BYPASS_SO_RCVBUF, (4096, 1 << 20), ()),
            (lib.BYPASS_SO_SNDBUF, (4096, 1 << 20), ()),
        ):
            for value in good:
                c.stack.setopt(sock, option, value)
                assert c.stack.getopt(sock, option) == value
            for value in bad:
                with pytest.raises(OSError, match="Invalid"):
                    c.stack.setopt(sock, option, value)
        c.stack.setopt(sock, lib.BYPASS_SO_RCVBUF, 1)
        assert c.stack.getopt(sock, lib.BYPASS_SO_RCVBUF) == 4096
        for option in (lib.BYPASS_TCP_NODELAY, 99):
            with pytest.raises(OSError, match="not available"):
                c.stack.setopt(sock, option, 1)
            with pytest.raises(OSError, match="not available"):
                c.stack.getopt(sock, option)


# ---- Round trips --------------------------------------------------------------------------------------------------
@settings(max_examples=examples(150))
@given(st.binary(max_size=4000), st.integers(1, 65535), st.sampled_from([576, 1006, 1280, 1492, 1500]))
def test_what_is_sent_is_what_an_independent_parser_reads(data: bytes, port: int, mtu: int) -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        c.stack.nexthop_set(AWAY, PEER_MAC, mtu)
        sock = c.udp(7)
        assert c.stack.sendto(sock, data, (AWAY, port)) == len(data)
        packets = c.sent_ip()
        assert all(len(p.payload) + 20 <= mtu for p in packets)
        whole = join(packets) if len(packets) > 1 else packets[0]
        got = parse_udp(whole)
        assert (got.src, got.dst, got.data) == ((US, 7), (AWAY, port), data)


@settings(max_examples=examples(150))
@given(st.lists(st.binary(max_size=1472), min_size=1, max_size=20), st.data())
def test_datagrams_arrive_in_order_whole_and_once(sent: list[bytes], data: st.DataObject) -> None:
    with Conversation(frames=64) as c:
        sock = c.udp(7)
        expected = list(sent)
        queued: list[bytes] = []
        while expected or queued:
            if expected and (not queued or data.draw(st.booleans())):
                queued.append(expected.pop(0))
                c.inject_ip(datagram(queued[-1]))
            else:
                assert c.read(sock)[0] == queued.pop(0)
        assert c.stack.recv(sock, 1) == EAGAIN
        assert c.held() == 0
