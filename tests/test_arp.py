# SPDX-License-Identifier: Apache-2.0
"""ARP and the next-hop cache: who is asked, when, how often, and what is believed."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from conversation import (
    AWAY,
    BROADCAST,
    ETH_ARP,
    KERNEL,
    OTHER,
    OUR_MAC,
    PEER,
    PEER_MAC,
    SECOND,
    US,
    Conversation,
)
from wire import ICMP, TCP, UDP, arp, echo, eth, icmp, ipv4, parse_ip, parse_udp, udp

from bypass.core import Config

NEW_MAC = bytes.fromhex("020000000003")
NOBODY = bytes(6)
GATEWAY = "192.0.2.254"


def question(address: str, to: bytes = BROADCAST) -> bytes:
    return eth(to, OUR_MAC, ETH_ARP, arp(1, OUR_MAC, US, NOBODY, address))


def data_of(frame: bytes) -> bytes:
    return parse_udp(parse_ip(frame[14:])).data


# ---- Answering ----------------------------------------------------------------------------------------------------
def test_a_request_for_our_address_is_answered() -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, PEER_MAC, ETH_ARP, arp(1, PEER_MAC, PEER, NOBODY, US) + bytes(18)))
        assert c.sent() == [eth(PEER_MAC, OUR_MAC, ETH_ARP, arp(2, OUR_MAC, US, PEER_MAC, PEER))]
        assert c.counted() == {"arp_in_request": 1, "arp_out_reply": 1}


def test_a_request_for_another_address_is_not() -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, PEER_MAC, ETH_ARP, arp(1, PEER_MAC, PEER, NOBODY, OTHER)))
        c.nothing()


def test_a_probe_is_answered_though_its_sender_has_no_address() -> None:
    """RFC 5227 2.1.1: whoever wants our address has to hear that it is taken."""
    with Conversation() as c:
        c.inject(eth(BROADCAST, NEW_MAC, ETH_ARP, arp(1, NEW_MAC, "0.0.0.0", NOBODY, US)))
        assert c.sent() == [eth(NEW_MAC, OUR_MAC, ETH_ARP, arp(2, OUR_MAC, US, NEW_MAC, "0.0.0.0"))]


def test_without_arp_the_kernel_answers() -> None:
    with Conversation(flags=KERNEL) as c:
        c.inject(eth(BROADCAST, PEER_MAC, ETH_ARP, arp(1, PEER_MAC, PEER, NOBODY, US)))
        c.nothing()
        assert c.counted() == {"arp_in_ignored": 1}


GOOD = arp(1, PEER_MAC, PEER, NOBODY, US)
BAD_ARP = {
    "hardware type": b"\0\x06" + GOOD[2:],
    "protocol type": GOOD[:2] + b"\x86\xdd" + GOOD[4:],
    "hardware length": GOOD[:4] + b"\x08" + GOOD[5:],
    "protocol length": GOOD[:5] + b"\x10" + GOOD[6:],
    "sender is a group": arp(1, BROADCAST, PEER, NOBODY, US),
    "sender is zero": arp(1, NOBODY, PEER, NOBODY, US),
    "sender's address is multicast": arp(1, PEER_MAC, "224.0.0.1", NOBODY, US),
    "sender's address is loopback": arp(1, PEER_MAC, "127.0.0.1", NOBODY, US),
    "sender's address is broadcast": arp(1, PEER_MAC, "192.0.2.255", NOBODY, US),
}


@pytest.mark.parametrize("what", BAD_ARP)
def test_nonsense_is_counted_and_not_answered(what: str) -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, PEER_MAC, ETH_ARP, BAD_ARP[what]))
        c.nothing()
        assert c.counted() == {"arp_in_bad": 1}


@pytest.mark.parametrize("n", range(28))
def test_a_truncated_packet_is_counted(n: int) -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, PEER_MAC, ETH_ARP, GOOD[:n]))
        c.nothing()
        assert c.counted() == {"arp_in_bad": 1}


@pytest.mark.parametrize("op", [0, 3, 4, 256])
def test_other_operations_are_ignored(op: int) -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, PEER_MAC, ETH_ARP, arp(op, PEER_MAC, PEER, NOBODY, US)))
        c.nothing()
        assert c.counted() == {"arp_in_ignored": 1}


def test_somebody_with_our_address_is_counted_and_teaches_nothing() -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, NEW_MAC, ETH_ARP, arp(1, NEW_MAC, US, NOBODY, US)))
        c.inject(eth(OUR_MAC, NEW_MAC, ETH_ARP, arp(2, NEW_MAC, US, OUR_MAC, US)))
        c.nothing()
        assert c.counted() == {"arp_in_conflict": 2}


def test_our_own_announcement_come_back_is_no_conflict() -> None:
    with Conversation() as c:
        c.inject(eth(BROADCAST, OUR_MAC, ETH_ARP, arp(1, OUR_MAC, US, NOBODY, US)))
        c.nothing()
        assert c.counted() == {"arp_in_ignored": 1}


# ---- Asking -------------------------------------------------------------------------------------------------------
def test_the_answer_is_in_the_packet_not_in_the_frame() -> None:
    """A bridge or proxy may have sent the frame: RFC 826 reads ar$sha."""
    with Conversation(neighbours=()) as c:
        c.stack.sendto(c.udp(), b"x", (PEER, 9))
        c.sent()
        c.inject(eth(OUR_MAC, PEER_MAC, ETH_ARP, arp(2, NEW_MAC, PEER, OUR_MAC, US)))
        [frame] = c.sent()
        assert frame[:6] == NEW_MAC


def test_a_datagram_waits_for_the_answer() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp(peer=(PEER, 9))
        assert c.stack.send(sock, b"hello") == 5
        assert c.sent() == [question(PEER)]
        c.advance(0.4)
        c.answer_arp(PEER)
        [frame] = c.sent()
        assert frame[:6] == PEER_MAC
        assert data_of(frame) == b"hello"
        assert c.held() == 0


def test_a_burst_waits_and_the_oldest_makes_room() -> None:
    """As many as Linux keeps (unres_qlen: 101)."""
    with Conversation(neighbours=(), frames=2048) as c:
        sock = c.udp(peer=(PEER, 9))
        for i in range(110):
            assert c.stack.send(sock, b"%03d" % i) == 3
        assert c.sent() == [question(PEER)]
        c.answer_arp(PEER)
        assert [d.data for d in c.sent_udp()] == [b"%03d" % i for i in range(9, 110)]
        assert c.counted()["dst_wait_dropped"] == 9


def test_silent_neighbours_leave_room_for_what_others_wait_for() -> None:
    """An eighth of the frames is for all who wait; half of that is for those with three or fewer."""
    with Conversation(neighbours=(), frames=1024) as c:
        sock = c.udp()
        for host in range(10, 20):
            for _ in range(50):
                assert c.stack.sendto(sock, b"lost", (f"192.0.2.{host}", 9)) == 4
        c.sent()
        assert 64 <= c.held() <= 64 + 10 * 3
        for i in range(3):
            assert c.stack.sendto(sock, b"%d" % i, (PEER, 9)) == 1
        assert c.sent() == [question(PEER)]
        c.answer_arp(PEER)
        assert [d.data for d in c.sent_udp()] == [b"0", b"1", b"2"]


def test_the_question_is_repeated_each_second_and_given_up_after_three() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp(peer=(PEER, 9))
        c.stack.send(sock, b"lost")
        start = c.now
        c.advance(10)
        times = [(t - start, f) for t, f in c.sent_at()]
        assert times == [(i * SECOND, question(PEER)) for i in range(3)]
        assert c.held() == 0
        assert c.counted()["dst_failed"] == 1


def test_an_unreachable_neighbour_fails_at_once_and_is_asked_again_later() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp(peer=(PEER, 9))
        c.stack.send(sock, b"lost")
        c.advance(3)
        c.sent()
        assert c.stack.send(sock, b"x") == -errno.EHOSTUNREACH
        c.nothing()
        c.advance(2.1)
        assert c.stack.send(sock, b"y") == 1
        assert c.sent() == [question(PEER)]
        c.answer_arp(PEER)
        assert [d.data for d in c.sent_udp()] == [b"y"]


def test_a_neighbour_is_asked_by_unicast_after_thirty_seconds_of_silence() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp(peer=(PEER, 9))
        c.stack.send(sock, b"1")
        c.answer_arp(PEER)
        c.sent()
        c.advance(29)
        c.stack.send(sock, b"2")
        assert len(c.sent()) == 1
        c.advance(2)
        c.stack.send(sock, b"3")
        frames = c.sent()
        assert frames[0] == question(PEER, to=PEER_MAC)
        assert data_of(frames[1]) == b"3"  # it is used meanwhile
        c.answer_arp(PEER)
        c.advance(29)
        c.nothing()


def test_a_neighbour_that_moved_is_found_by_broadcast() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp(peer=(PEER, 9))
        c.stack.send(sock, b"1")
        c.answer_arp(PEER)
        c.sent()
        c.advance(31)
        c.stack.send(sock, b"2")
        c.sent()
        c.advance(3)
        assert c.sent() == [question(PEER, to=PEER_MAC)] * 2 + [question(PEER)]
        c.stack.send(sock, b"3")
        c.nothing()  # it waits again
        c.answer_arp(PEER, NEW_MAC)
        [frame] = c.sent()
        assert frame[:6] == NEW_MAC
        assert data_of(frame) == b"3"


def test_a_neighbour_that_vanished_is_asked_for_six_times() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp(peer=(PEER, 9))
        c.stack.send(sock, b"1")
        c.answer_arp(PEER)
        c.advance(31)
        c.sent()
        c.stack.send(sock, b"2")
        assert c.stack.send(sock, b"3") == 1
        start = c.now
        c.advance(10)
        asked = [(t - start, f) for t, f in c.sent_at() if f[12:14] == ETH_ARP.to_bytes(2, "big")]
        assert asked == [
            (i * SECOND, question(PEER, to=PEER_MAC) if i < 3 else question(PEER)) for i in range(6)
        ]
        assert c.counted()["dst_failed"] == 1


def test_a_connection_that_waits_asks_anew_when_addresses_change() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.stack.socket(lib.BYPASS_STREAM)
        assert c.stack.connect(sock, (PEER, 80)) == -errno.EINPROGRESS
        assert c.sent() == [question(PEER)]
        c.stack.addr_add("203.0.113.1", 24)
        c.advance(0.1)
        assert c.sent() == [question(PEER)]
        c.answer_arp(PEER)
        assert [p.proto for p in c.sent_ip()] == [TCP]


def test_a_gratuitous_announcement_moves_a_known_neighbour_only() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"x", (PEER, 9))
        c.answer_arp(PEER)
        c.sent()
        c.advance(1)
        for address in (PEER, OTHER):
            c.inject(eth(BROADCAST, NEW_MAC, ETH_ARP, arp(1, NEW_MAC, address, NOBODY, address)))
        c.stack.sendto(sock, b"x", (PEER, 9))
        [frame] = c.sent()
        assert frame[:6] == NEW_MAC
        c.stack.sendto(sock, b"x", (OTHER, 9))
        assert c.sent() == [question(OTHER)]


# ---- Gateway ------------------------------------------------------------------------------------------------------
def test_destinations_beyond_the_link_share_the_gateway() -> None:
    with Conversation(neighbours=(), gateway=GATEWAY) as c:
        sock = c.udp()
        for i in range(3):
            c.stack.sendto(sock, b"%d" % i, (f"198.51.100.{i}", 9))
        assert c.sent() == [question(GATEWAY)]
        c.answer_arp(GATEWAY, NEW_MAC)
        frames = c.sent()
        assert [f[:6] for f in frames] == [NEW_MAC] * 3
        assert sorted(data_of(f) for f in frames) == [b"0", b"1", b"2"]
        c.stack.sendto(sock, b"3", ("198.51.100.77", 9))
        [frame] = c.sent()
        assert frame[:6] == NEW_MAC


def test_a_gateway_that_fails_takes_those_behind_it_along() -> None:
    with Conversation(neighbours=(), gateway=GATEWAY) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"lost", (AWAY, 9))
        c.advance(3)
        c.sent()
        assert c.stack.sendto(sock, b"x", (AWAY, 9)) == -errno.EHOSTUNREACH
        assert c.stack.sendto(sock, b"x", ("203.0.113.1", 9)) == -errno.EHOSTUNREACH
        assert c.held() == 0
        c.advance(2.1)
        c.stack.sendto(sock, b"y", (AWAY, 9))
        assert c.sent() == [question(GATEWAY)]


def test_a_gateway_in_use_is_revalidated() -> None:
    with Conversation(neighbours=(), gateway=GATEWAY) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"1", (AWAY, 9))
        c.answer_arp(GATEWAY)
        c.sent()
        c.advance(31)
        c.stack.sendto(sock, b"2", (AWAY, 9))
        frames = c.sent()
        assert frames[0] == question(GATEWAY, to=PEER_MAC)
        assert data_of(frames[1]) == b"2"
        c.answer_arp(GATEWAY, NEW_MAC)
        c.stack.sendto(sock, b"3", (AWAY, 9))
        [frame] = c.sent()
        assert frame[:6] == NEW_MAC


def test_without_a_gateway_the_world_is_unreachable_until_there_is_one() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp()
        assert c.stack.sendto(sock, b"x", (AWAY, 9)) == -errno.EHOSTUNREACH
        c.stack.gateway_set(GATEWAY)
        assert c.stack.sendto(sock, b"x", (AWAY, 9)) == 1
        assert c.sent() == [question(GATEWAY)]


def test_a_forgotten_gateway_is_asked_for_again() -> None:
    with Conversation(neighbours=(), gateway=GATEWAY) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"x", (AWAY, 9))
        c.answer_arp(GATEWAY)
        c.sent()
        c.stack.nexthop_forget(GATEWAY)
        c.stack.sendto(sock, b"y", (AWAY, 9))
        assert c.sent() == [question(GATEWAY)]
        c.answer_arp(GATEWAY, NEW_MAC)
        [frame] = c.sent()
        assert frame[:6] == NEW_MAC


# ---- Bounds -------------------------------------------------------------------------------------------------------
def test_two_who_fight_over_an_address_move_it_once_a_second() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"x", (PEER, 9))
        c.answer_arp(PEER)
        c.sent()
        for after, mac in ((0.5, PEER_MAC), (0.5, NEW_MAC), (0.9, NEW_MAC), (0.1, NEW_MAC)):
            c.advance(after)
            other = PEER_MAC if mac == NEW_MAC and after == 0.9 else NEW_MAC
            c.inject(eth(BROADCAST, other, ETH_ARP, arp(1, other, PEER, NOBODY, PEER)))
            c.stack.sendto(sock, b"x", (PEER, 9))
            [frame] = c.sent()
            assert frame[:6] == mac


def test_what_the_embedder_said_is_not_changed_by_arp() -> None:
    with Conversation(neighbours=(PEER,)) as c:
        sock = c.udp()
        c.inject(eth(BROADCAST, NEW_MAC, ETH_ARP, arp(1, NEW_MAC, PEER, NOBODY, PEER)))
        c.advance(100)
        c.stack.sendto(sock, b"x", (PEER, 9))
        [frame] = c.sent()
        assert frame[:6] == PEER_MAC


def test_the_cache_is_bounded_and_forgets_the_longest_unused() -> None:
    with Conversation(neighbours=(), config=Config(conns=64, dsts=16)) as c:
        sock = c.udp()
        for i in range(100, 116):
            c.stack.nexthop_set(f"192.0.2.{i}", PEER_MAC)
            c.advance(0.001)
        for i in range(101, 116):
            c.stack.sendto(sock, b"x", (f"192.0.2.{i}", 9))
        c.sent()
        c.stack.sendto(sock, b"x", ("192.0.2.50", 9))
        assert c.sent() == [question("192.0.2.50")]
        c.counted()
        c.stack.sendto(sock, b"x", ("192.0.2.101", 9))
        assert len(c.sent_udp()) == 1  # still there
        c.stack.sendto(sock, b"x", ("192.0.2.100", 9))
        assert c.sent() == [question("192.0.2.100")]


def test_waiting_packets_hold_an_eighth_of_the_frames_at_most() -> None:
    with Conversation(neighbours=(), frames=256) as c:
        sock = c.udp()
        for i in range(10, 200):
            assert c.stack.sendto(sock, bytes(1000), (f"192.0.2.{i}", 9)) == 1000
            c.sent()
        assert c.held() <= 32
        assert c.counted()["dst_wait_dropped"] >= 190 - 32


def test_replies_that_nobody_waits_for_do_not_fill_the_cache() -> None:
    with Conversation(neighbours=()) as c:
        for i in range(2, 255):
            c.answer_arp(f"192.0.2.{i}")
        assert "dst_miss" not in c.counted()


def test_many_spoofed_senders_leave_the_gateway_in_the_cache() -> None:
    with Conversation(neighbours=(), gateway=GATEWAY, config=Config(conns=64, dsts=8)) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"x", (AWAY, 9))
        c.answer_arp(GATEWAY)
        c.sent()
        for i in range(200):
            src = f"203.0.113.{i}"
            c.inject_ip(ipv4(src, US, ICMP, echo(8, 1, i, b"x")))
            [frame] = c.sent()
            assert frame[:6] == PEER_MAC


def test_a_question_that_finds_no_frame_is_asked_a_second_later() -> None:
    with Conversation(neighbours=()) as c:
        sock = c.udp()
        c.stack.sendto(sock, b"x", (PEER, 9))
        c.sent()
        c.starve()
        c.advance(1)
        c.nothing()
        c.starve(starved=False)
        c.advance(1)
        assert c.sent() == [question(PEER)]


def test_a_cache_that_only_holds_the_gateway_says_so() -> None:
    with Conversation(neighbours=(), gateway=GATEWAY, config=Config(conns=16, dsts=1)) as c:
        sock = c.udp()
        assert c.stack.sendto(sock, b"x", (AWAY, 9)) == -errno.ENOBUFS
        assert c.counted()["dst_table_full"] == 1
        with pytest.raises(OSError, match="No space"):
            c.stack.nexthop_set(AWAY, PEER_MAC)


# ---- The embedder answers -----------------------------------------------------------------------------------------
def test_the_embedder_is_asked_once_and_again_after_a_second() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp(peer=(AWAY, 9))
        c.stack.send(sock, b"hello")
        c.nothing()
        assert c.stack.nexthop_wanted() == [AWAY]
        assert c.stack.nexthop_wanted() == []
        c.advance(0.9)
        assert c.stack.nexthop_wanted() == []
        c.advance(0.2)
        assert c.stack.nexthop_wanted() == [AWAY]
        c.stack.nexthop_set(AWAY, PEER_MAC)
        assert [d.data for d in c.sent_udp()] == [b"hello"]
        c.advance(100)
        assert c.stack.nexthop_wanted() == []


def test_an_unreachable_answer_drops_what_waits() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp(peer=(AWAY, 9))
        c.stack.send(sock, b"hello")
        c.stack.nexthop_set(AWAY, None)
        assert c.held() == 0
        assert c.stack.send(sock, b"x") == -errno.EHOSTUNREACH
        c.advance(2.1)
        assert c.stack.send(sock, b"x") == 1
        assert c.stack.nexthop_wanted() == [AWAY]


def test_an_embedder_that_never_answers_is_asked_three_times() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp(peer=(AWAY, 9))
        c.stack.send(sock, b"lost")
        asked = 0
        for _ in range(100):
            asked += len(c.stack.nexthop_wanted())
            c.advance(0.1)
        assert asked == 3
        assert c.held() == 0


def test_a_path_mtu_from_the_embedder_is_kept_to() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp(peer=(AWAY, 9))
        c.stack.nexthop_set(AWAY, PEER_MAC, 1000)
        c.stack.send(sock, bytes(972))
        assert [len(p.payload) for p in c.sent_ip()] == [980]
        c.stack.send(sock, bytes(973))
        assert [len(p.payload) for p in c.sent_ip()] == [976, 5]


def test_what_the_path_reported_survives_the_embedders_refresh() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp(4000, peer=(AWAY, 9))
        c.stack.nexthop_set(AWAY, PEER_MAC)
        quote = ipv4(US, AWAY, UDP, udp(US, AWAY, 4000, 9, bytes(1472)))[:28]
        c.inject_ip(ipv4(PEER, US, ICMP, icmp(3, 4, b"\0\0\x05\0", quote)))
        c.stack.nexthop_set(AWAY, PEER_MAC)
        c.stack.send(sock, bytes(1472))
        assert len(c.sent_ip()) == 2
        c.stack.nexthop_set(AWAY, PEER_MAC, 1000)
        c.stack.send(sock, bytes(1472))
        assert max(len(p.payload) for p in c.sent_ip()) == 976


def test_a_datagram_made_for_a_larger_path_is_dropped_when_the_path_is_known() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp(peer=(AWAY, 9))
        c.stack.send(sock, bytes(1472))
        c.stack.nexthop_set(AWAY, PEER_MAC, 1000)
        c.nothing()
        assert c.held() == 0
        assert c.counted()["ip_out_too_big"] == 1


def test_where_broadcasts_go_is_not_the_embedders_to_say() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp()
        c.stack.setopt(sock, lib.BYPASS_SO_BROADCAST, 1)
        c.stack.nexthop_set("192.0.2.255", PEER_MAC)
        c.stack.sendto(sock, b"x", ("192.0.2.255", 9))
        [frame] = c.sent()
        assert frame[:6] == BROADCAST


def test_questions_are_withdrawn_in_any_order() -> None:
    with Conversation(flags=KERNEL, neighbours=()) as c:
        sock = c.udp()
        hosts = [f"198.51.100.{i}" for i in range(1, 6)]
        for host in hosts:
            c.stack.sendto(sock, b"x", (host, 9))
        for i in (2, 0, 4):
            c.stack.nexthop_set(hosts[i], PEER_MAC)
        assert len(c.sent_udp()) == 3
        assert c.stack.nexthop_wanted() == [hosts[1], hosts[3]]
        c.stack.nexthop_set(hosts[3], PEER_MAC)
        c.advance(1.1)
        assert c.stack.nexthop_wanted() == [hosts[1]]


def test_forgetting_asks_again_at_the_next_use() -> None:
    with Conversation(flags=KERNEL, neighbours=(AWAY, PEER)) as c:
        sock = c.udp()
        c.stack.nexthop_forget(AWAY)
        c.stack.sendto(sock, b"1", (PEER, 9))
        c.stack.sendto(sock, b"2", (AWAY, 9))
        assert [d.data for d in c.sent_udp()] == [b"1"]
        assert c.stack.nexthop_wanted() == [AWAY]
        c.stack.nexthop_forget()  # what waits is not lost by it
        c.stack.sendto(sock, b"3", (PEER, 9))
        assert sorted(c.stack.nexthop_wanted()) == sorted([AWAY, PEER])
        c.stack.nexthop_set(AWAY, PEER_MAC)
        c.stack.nexthop_set(PEER, PEER_MAC)
        assert sorted(d.data for d in c.sent_udp()) == [b"2", b"3"]


def test_a_new_address_asks_everything_anew() -> None:
    with Conversation(neighbours=(PEER,)) as c:
        sock = c.udp()
        c.stack.addr_add("203.0.113.1", 24)
        c.stack.sendto(sock, b"x", ("203.0.113.9", 9))
        c.stack.sendto(sock, b"x", (PEER, 9))
        asked = [f[14 + 24 : 14 + 28] for f in c.sent()]
        assert asked == [bytes([203, 0, 113, 9]), bytes([192, 0, 2, 2])]
