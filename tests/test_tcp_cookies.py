# SPDX-License-Identifier: Apache-2.0
"""TCP: SYN cookies (RFC 4987 3.6): what a SYN that is not remembered still becomes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conversation import KERNEL, PEER, PEER_MAC, US
from tcp_talk import Segment, Talk, stream
from wire import RST, SYN, TCP, ipv4, parse_ip, tcp

PERIOD = 2**36 / 1e9  # seconds that a secret is the newest one
ALWAYS = {"syn_cookies": 2}


def cookie_talk(**kw: Any) -> Talk:
    kw.setdefault("config", ALWAYS)
    return Talk(iss=None, **kw)


def asked(t: Talk, opts: str = "mss 1460") -> Segment:
    """The SYN-ACK that a SYN draws while nothing is kept."""
    t.iss = None
    t.peer(f"S 0:0 <{opts}>")
    [syn_ack] = t.out()
    assert (syn_ack.flags, syn_ack.ack) == ("S.", 1)
    assert t.state() == ""
    assert t.stack.audit()["conns"] == 0
    return syn_ack


def test_a_syn_that_is_not_remembered_becomes_a_connection() -> None:
    with cookie_talk() as t:
        t.server()
        asked(t)
        t.peer(". 1:1 ack 1")
        t.silence()
        assert t.state() == "ESTABLISHED"
        t.accept()
        t.peer("P. 1:11 ack 1")
        assert t.read() == stream(1, 11)
        t.advance(0.1)
        t.out()
        t.write(3000)
        assert [(s.seq, s.end) for s in t.out()] == [(1, 1461), (1461, 2921)], "Nagle keeps the rest"
        t.peer(". 11:11 ack 2921")
        t.hears("P. 2921:3001")
        counted = t.counted()
        assert (counted["tcp_cookies_sent"], counted["tcp_cookies_good"]) == (1, 1)


def test_data_with_the_ack_that_brings_the_cookie_is_taken() -> None:
    with cookie_talk() as t:
        t.server()
        asked(t)
        t.peer("P. 1:101 ack 1")
        t.accept()
        assert t.read() == stream(1, 101)
        t.at(0.005, ". 1:1 ack 101")


def test_a_lost_ack_of_the_handshake_is_made_good_by_the_first_data() -> None:
    """The SYN-ACK is not repeated: nobody remembers that it was sent."""
    with cookie_talk() as t:
        t.server()
        asked(t)
        t.silence(5)
        t.peer("P. 1:101 ack 1")
        t.accept()
        assert t.read() == stream(1, 101)


@pytest.mark.parametrize(
    ("mss", "kept"),
    [
        (None, 536),
        (100, 216),
        (536, 536),
        (1023, 536),
        (1400, 1400),
        (1459, 1440),
        (1460, 1460),
        (9000, 1460),
    ],
)
def test_the_mss_comes_back_rounded_down_to_a_common_one(mss: int | None, kept: int) -> None:
    with cookie_talk() as t:
        t.server()
        asked(t, f"mss {mss}" if mss else "")
        t.peer(". 1:1 ack 1")
        t.accept()
        assert t.info.snd_mss == kept


@pytest.mark.parametrize("scale", [None, 0, 7, 14])
@pytest.mark.parametrize("sack", [False, True])
def test_window_scale_and_sack_come_back_through_the_timestamp(scale: int | None, sack: bool) -> None:
    opts = (
        "mss 1460, ts 700 0"
        + (", sackok" if sack else "")
        + (f", nop, ws {scale}" if scale is not None else "")
    )
    with cookie_talk(rcvbuf=1 << 20) as t:
        t.server()
        syn_ack = asked(t, opts)
        assert syn_ack.opts["ts"][1] == 700
        assert ("sackok" in syn_ack.opts) == sack
        assert syn_ack.opts.get("ws") == (5 if scale is not None else None)
        t.peer(f". 1:1 ack 1 win 1000 <nop, nop, ts 701 {syn_ack.opts['ts'][0]}>")
        t.accept()
        assert t.info.timestamps
        assert t.info.window_scaling == (scale is not None)
        assert t.info.snd_wnd == 1000 << (scale or 0)
        t.write(10)
        [data] = t.out()
        assert data.opts["ts"][1] == 701
        assert data.opts["ts"][0] - syn_ack.opts["ts"][0] < 1 << 31, "our timestamps never go back"


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("ts", [False, True])
def test_ecn_comes_back_through_the_timestamp(asks: bool, ts: bool) -> None:
    """RFC 3168 6.1.1: agreed to only where it can be remembered."""
    with cookie_talk() as t:
        t.server()
        t.iss = None
        t.peer(f"S{'EW' if asks else ''} 0:0 <mss 1460{', nop, nop, ts 700 0' if ts else ''}>")
        [syn_ack] = t.out()
        agreed = asks and ts
        assert syn_ack.flags == ("S.E" if agreed else "S.")
        t.peer(". 1:1 ack 1" + (f" <nop, nop, ts 701 {syn_ack.opts['ts'][0]}>" if ts else ""))
        t.accept()
        t.write(100)
        [data] = t.out()
        assert data.ip is not None
        assert data.ip.tos & 3 == (2 if agreed else 0)


def test_without_timestamps_only_the_mss_comes_back() -> None:
    """As on Linux: there is no room for more in the sequence number."""
    with cookie_talk() as t:
        t.server()
        syn_ack = asked(t, "mss 1400, sackok, nop, ws 7")
        assert set(syn_ack.opts) == {"mss", "raw_seq"}
        t.peer(". 1:1 ack 1 win 1000")
        t.accept()
        assert (t.info.snd_mss, t.info.snd_wnd, t.info.window_scaling) == (1400, 1000, False)


def test_our_timestamp_is_never_ahead_of_the_clock() -> None:
    """RFC 7323 5.2: else the connection's would go back, and its peer take them for old ones (PAWS)."""
    with cookie_talk() as t:
        t.server()
        last = None
        for ms in range(130):
            got = asked(t, f"mss 1460, ts {ms} 0, sackok, nop, ws {ms % 15}").opts["ts"][0]
            t.peer("R 1:1")
            t.out()
            if ms == 0:
                first = got
            assert (got - first) % (1 << 32) <= ms + 64 or (first - got) % (1 << 32) <= 64
            last = got
            t.advance(0.001)
        assert last is not None
        assert 64 <= (last - first) % (1 << 32) <= 194


@pytest.mark.parametrize(
    "forged",
    [".:ack+1", ".:ack-1", ".:seq+1", ".:port", ".:bit31", ".:bit30", ".:bit28", ".:bit27", ".:bit0"],
)
def test_what_is_not_exactly_a_cookie_draws_a_reset_and_leaves_nothing(forged: str) -> None:
    with cookie_talk() as t:
        t.server()
        asked(t)
        ack, seq = 1, 1
        match forged[2:]:
            case "ack+1":
                ack = 2
            case "ack-1":
                ack = 0
            case "seq+1":
                seq = 2
            case "port":
                t.peer_port += 1
            case bit:
                ack = 1 + (1 << int(bit[3:]))
        t.peer(f". {seq}:{seq} ack {ack}")
        [rst] = t.out()
        assert rst.flags == "R"
        assert t.stack.audit()["conns"] == 0
        assert t.counted()["tcp_cookies_bad"] == 1


def test_random_acks_make_no_connection() -> None:
    rng = random.Random(5)
    with cookie_talk() as t:
        t.server()
        asked(t)
        for _ in range(2000):
            t.peer(f". 1:1 ack {rng.randrange(-(1 << 31) + 2, 1 << 31)}")
        answers = t.sent()
        assert len(answers) == 2000, "a reset of 40 bytes for each ACK of 40: no amplification"
        assert all(len(parse_ip(a[14:]).payload) == 20 for a in answers)
        assert t.stack.audit()["conns"] == 0


def test_a_cookie_lives_for_one_period_of_the_secrets_and_not_for_three() -> None:
    with cookie_talk() as t:
        t.server()
        asked(t)
        t.advance(PERIOD)
        t.peer(". 1:1 ack 1")
        assert t.state() == "ESTABLISHED"
        t.accept()
    for later in (2.0, 2.5, 3.0, 4.0, 6.0):
        with cookie_talk() as t:
            t.server()
            asked(t)
            for _ in range(round(later * 2)):  # the listener goes on giving out cookies meanwhile
                t.advance(PERIOD / 2)
                other, t.peer_port = t.peer_port, 50000
                iss = t.iss
                asked(t)
                t.peer_port, t.iss = other, iss
            t.peer(". 1:1 ack 1")
            assert t.state() == "", f"after {later} periods"
            t.out()


def test_a_listener_that_gave_out_no_cookies_believes_none() -> None:
    """An ACK from nowhere is refused before anything is computed for it."""
    with Talk(iss=None) as t:
        t.server()
        t.iss = 0
        t.peer(". 1:1 ack 1")
        [rst] = t.out()
        assert rst.flags == "R"
        assert "tcp_cookies_bad" not in t.counted()


def test_cookies_begin_when_the_queue_of_half_open_connections_is_full_and_end_with_it() -> None:
    with Talk(iss=None, conns=300, config={"syn_backlog": 128}) as t:
        t.server()
        for port in range(1, 129):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
        assert "tcp_cookies_sent" not in t.counted()
        t.peer_port = 200
        asked_ack = t.peer_port
        t.iss = None
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1")
        counted = t.counted()
        assert (counted["tcp_cookies_sent"], counted["tcp_syn_overflow"]) == (1, 1)
        t.peer(". 1:1 ack 1")
        assert t.state() == "ESTABLISHED"
        assert asked_ack == t.peer_port
        t.accept()
        t.peer_port, t.iss = 1, next(i for i in t.stack.conns() if i.peer[1] == 1).snd_una
        t.peer("R 1:1")
        t.peer_port, t.iss = 201, None
        t.peer("S 0:0")
        t.out()
        assert t.state() == "SYN_RECEIVED", "one place is free: no cookie"


def test_without_cookies_a_full_queue_drops() -> None:
    with Talk(iss=None, conns=300, config={"syn_cookies": 0}) as t:
        t.server()
        for port in range(1, 129):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
        t.peer_port, t.iss = 200, None
        t.peer("S 0:0")
        t.silence()
        assert t.counted()["tcp_syn_overflow"] == 1


def test_a_cookie_for_a_full_accept_queue_waits_for_the_peers_data() -> None:
    with cookie_talk() as t:
        listener = t.server(backlog=0)
        cookies = []
        for port in (40001, 40002):
            t.peer_port = port
            asked(t)
            cookies.append(t.iss)
        t.peer(". 1:1 ack 1")
        t.peer_port, t.iss = 40001, cookies[0]
        t.peer("P. 1:11 ack 1")
        t.silence()
        assert t.state() == ""
        assert t.counted()["tcp_listen_overflow"] == 1
        t.stack.accept(listener)
        t.peer("P. 1:11 ack 1")
        assert t.stack.recv(t.stack.accept(listener), 100) == stream(1, 11)


def test_a_flood_from_forged_addresses_makes_nobody_ask_for_their_next_hops() -> None:
    """An answer without memory goes back by the link address that the SYN came from."""
    with Talk(iss=None, flags=KERNEL, config={"syn_backlog": 128, **ALWAYS}) as t:
        t.server()
        for n in range(300):
            source = f"198.51.{100 + n // 250}.{1 + n % 250}"
            t.inject_ip(ipv4(source, US, TCP, tcp(source, US, 4000, 80, n, 0, SYN, 1000)))
        frames = t.sent()
        assert len(frames) == 300
        assert {f[:6] for f in frames} == {PEER_MAC}
        assert t.stack.nexthop_wanted() == []
        assert "dst_miss" not in t.counted()


def test_a_known_next_hop_is_used_for_cookies_too() -> None:
    other = bytes.fromhex("0200000000aa")
    with cookie_talk() as t:
        t.server()
        t.stack.nexthop_set(PEER, other)
        t.peer("S 0:0")
        assert [f[:6] for f in t.sent()] == [other]


def test_a_cookies_connection_takes_no_round_trip_from_the_handshake() -> None:
    """Nobody remembers when the SYN-ACK left; and no SYN was lost, so the first window is a full one."""
    with cookie_talk() as t:
        t.server()
        asked(t)
        t.advance(0.5)
        t.peer(". 1:1 ack 1")
        t.accept()
        assert (t.info.srtt_us, t.info.cwnd) == (0, 10 * 1460)


def test_a_new_secret_comes_each_period() -> None:
    """Two cookies of one flow for one SYN differ by period, and not within one."""
    seen = []
    with cookie_talk() as t:
        t.server()
        for _ in range(6):
            seen.append(asked(t).opts["raw_seq"])
            t.advance(PERIOD / 2)
    assert len(set(seen)) in (3, 4)
    assert seen == sorted(seen, key=seen.index), "grouped by period"


def test_a_fin_or_syn_brings_no_cookie_back() -> None:
    for flags in ("F.", "S."):
        with cookie_talk() as t:
            t.server()
            asked(t)
            t.peer(f"{flags} 1:1 ack 1")
            assert t.state() == ""
            t.out()


def test_half_open_connections_make_nobody_ask_for_next_hops_either() -> None:
    with Talk(iss=None, flags=KERNEL, config={"syn_cookies": 0}) as t:
        t.server()
        for n in range(100):
            source = f"198.51.100.{1 + n}"
            t.inject_ip(ipv4(source, US, TCP, tcp(source, US, 4000, 80, n, 0, SYN, 1000)))
        assert [f[:6] for f in t.sent()] == [PEER_MAC] * 100
        t.advance(1.1)
        assert [f[:6] for f in t.sent()] == [PEER_MAC] * 100, "again, and still by the way they came"
        assert t.stack.nexthop_wanted() == []
        assert "dst_miss" not in t.counted()
        source = "198.51.100.9"
        t.inject_ip(ipv4(source, US, TCP, tcp(source, US, 4000, 80, 9, 0, RST, 1000)))
        t.advance(70)
        t.sent()
