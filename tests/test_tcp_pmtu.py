# SPDX-License-Identifier: Apache-2.0
"""TCP: the path's MTU without ICMP: black holes and packetization-layer discovery (RFC 4821)."""

from __future__ import annotations

from typing import Any

import pytest
from tcp_talk import Segment, Talk, stream

OFF, BLACK_HOLE, ALWAYS = 0, 1, 2


def talk(mode: int, **kw: Any) -> Talk:
    return Talk(config={"mtu_probing": mode}, frames=2048, **kw)


def deliver(t: Talk, path_mtu: int, total: int, *, sack: bool = True, limit: int = 6000) -> list[Segment]:
    """The peer behind a path that swallows what is larger than path_mtu, without a word, until it has `total` bytes.
    All that was sent."""
    have: set[tuple[int, int]] = set()
    edge, sent = 1, []
    for _ in range(limit):
        t.advance(0.01)
        acks = []
        for s in t.out():
            sent.append(s)
            if not s.data or len(s.data) + 40 > path_mtu:
                continue
            have.add((s.seq, s.end))
            while grown := [e for f, e in have if f <= edge < e]:
                edge = max(grown)
            ahead = sorted((f, e) for f, e in have if f > edge)
            blocks: list[list[int]] = []
            for f, e in ahead:
                if blocks and f <= blocks[-1][1]:
                    blocks[-1][1] = max(e, blocks[-1][1])
                else:
                    blocks.append([f, e])
            opts = " ".join(f"{f}:{e}" for f, e in blocks[:4])
            acks.append(f". 1:1 ack {edge}" + (f" <nop, nop, sack {opts}>" if opts and sack else ""))
        if acks:
            t.peer(*acks)
        if edge == 1 + total:
            return sent
        room = total - (t.wrote - 1)
        if room > 0:
            n = t.stack.send(t.sock, bytes_of(t.wrote, min(room, 1 << 15)))
            t.wrote += max(n, 0)
            t.settle()
    raise AssertionError(f"{edge - 1} of {total} bytes came")


def bytes_of(first: int, n: int) -> bytes:
    return stream(first, first + n)


def sizes(segments: list[Segment]) -> list[int]:
    return [len(s.data) for s in segments if s.data]


def test_a_black_hole_is_found_after_four_timeouts_and_smaller_segments_pass() -> None:
    """RFC 4821 7.6.4, 7.2: 1024 bytes of payload."""
    with talk(BLACK_HOLE) as t:
        t.established(opts="mss 1460, sackok")
        sent = deliver(t, 1200, 20_000)
        big = [s for s in sent if len(s.data) == 1460]
        assert {s.seq for s in big if s.seq == 1} == {1}
        assert len([s for s in big if s.seq == 1]) >= 4
        assert 1024 in sizes(sent)
        assert t.counted()["tcp_mtu_black_holes"] == 1


def test_without_the_option_a_black_hole_stays_one() -> None:
    with talk(OFF) as t:
        t.established(opts="mss 1460, sackok")
        with pytest.raises(AssertionError, match="0 of 5000"):
            deliver(t, 1200, 5000, limit=3000)
        assert t.info.snd_mss == 1460


def test_a_deeper_black_hole_halves_what_is_tried() -> None:
    with talk(BLACK_HOLE) as t:
        t.established(opts="mss 1460, sackok")
        deliver(t, 600, 5000, limit=9000)
        assert 512 <= t.info.snd_mss <= 560
        assert t.counted()["tcp_mtu_black_holes"] >= 2


def test_timeouts_of_small_segments_are_no_black_hole() -> None:
    with talk(BLACK_HOLE) as t:
        t.established()
        t.write(500)
        t.advance(20)
        assert all(n == 500 for n in sizes(t.out()))
        assert "tcp_mtu_black_holes" not in t.counted()
        t.peer(". 1:1 ack 501")


@pytest.mark.parametrize("sack", [True, False])
def test_the_search_finds_the_paths_mtu_and_loses_no_window_to_it(sack: bool) -> None:
    with talk(ALWAYS) as t:
        t.established(opts="mss 1460, nop, ws 3" + (", sackok" if sack else ""), rtt=0.01)
        assert t.info.snd_mss == 1024
        sent = deliver(t, 1300, 1_000_000, sack=sack)
        counted = t.counted()
        assert 1300 - 40 - 16 <= t.info.snd_mss <= 1300 - 40
        assert counted["tcp_mtu_probes_acked"] >= 2
        assert 3 <= counted["tcp_mtu_probes_lost"] <= 20
        assert "tcp_timeouts" not in counted
        assert "tcp_fast_retransmits" not in counted, "a lost probe is no sign of congestion"
        assert max(sizes(sent)) > 1300 - 40


def test_the_search_reaches_the_links_own_mtu() -> None:
    with talk(ALWAYS) as t:
        t.established(opts="mss 1460, sackok, nop, ws 3", rtt=0.01)
        deliver(t, 1500, 700_000)
        assert t.info.snd_mss > 1460 - 8
        assert "tcp_mtu_probes_lost" not in t.counted()


def test_no_probe_is_larger_than_the_peers_mss() -> None:
    with talk(ALWAYS) as t:
        t.established(opts="mss 1200, sackok, nop, ws 3", rtt=0.01)
        sent = deliver(t, 1500, 700_000)
        assert 1024 < max(sizes(sent)) <= 1200


def test_after_ten_minutes_the_path_is_asked_again() -> None:
    """RFC 4821 7.3: it may have become wider."""
    with talk(ALWAYS) as t:
        t.established(opts="mss 1460, sackok, nop, ws 3", rtt=0.01)
        deliver(t, 1300, 950_000)
        narrow = t.info.snd_mss
        assert 1300 - 40 - 8 <= narrow <= 1300 - 40, "the search came to its end"
        t.counted()
        t.advance(300)
        more(t, 30_000, t.wrote - 1)
        assert "tcp_mtu_probes" not in t.counted()
        t.advance(301)
        more(t, 60_000, t.wrote - 1)
        assert t.counted()["tcp_mtu_probes"] > 0
        assert t.info.snd_mss > narrow


def more(t: Talk, n: int, base: int) -> None:
    """n further bytes over a path that takes everything."""
    while t.wrote - 1 < base + n:
        took = t.stack.send(t.sock, bytes_of(t.wrote, min(1 << 15, base + n - (t.wrote - 1))))
        t.wrote += max(took, 0)
        t.settle()
        t.advance(0.01)
        ends = [s.end for s in t.out() if s.data]
        if ends:
            t.peer(f". 1:1 ack {max(ends)}")
    for _ in range(1000):
        t.advance(0.01)
        ends = [s.end for s in t.out() if s.data]
        if ends:
            t.peer(f". 1:1 ack {max(ends)}")
        elif t.info.snd_queued == 0:
            return


def test_a_report_about_a_probe_ends_it_at_once() -> None:
    """The router is not silent after all."""
    with talk(ALWAYS) as t:
        t.established(opts="mss 1460, sackok, nop, ws 3", rtt=0.01)
        for _ in range(200):
            n = t.stack.send(t.sock, bytes_of(t.wrote, 1 << 15))
            t.wrote += max(n, 0)
            t.advance(0.01)
            out = [s for s in t.out() if s.data]
            probes = [s for s in out if len(s.data) > 1024]
            if probes:
                t.icmp(3, 4, probes[0].seq, mtu=1100)
                again = [s for s in t.out() if s.data]
                assert again[0].seq == probes[0].seq
                assert len(again[0].data) <= 1060
                t.advance(0.01)
                t.peer(f". 1:1 ack {max(s.end for s in out + again)}")
                t.out()
                assert t.info.snd_mss <= 1060
                return
            if out:
                t.peer(f". 1:1 ack {max(s.end for s in out)}")
        raise AssertionError("no probe")


@pytest.mark.parametrize("step", [128, 300, 512, 700, 1024, 1460])
def test_a_probe_smaller_than_what_was_cut_before_the_black_hole_counts_as_it_was_sent(step: int) -> None:
    """Frames of the old size wait behind a black hole's end; the first probe is smaller than they are."""
    with talk(BLACK_HOLE) as t:
        t.established(opts="mss 1460")
        t.write(90_000)
        edge = t.out()[-1].end
        while not t.counted().get("tcp_mtu_black_holes"):
            t.advance(0.5)
            t.out()
        t.peer(f". 1:1 ack {edge}")  # all of it came after all
        acked, lengths = edge, []
        while edge < 1 + 90_000:
            for s in t.out():
                assert s.seq <= edge, "nothing is left out"
                edge = max(edge, s.end)
                lengths.append(len(s.data))
            assert t.info.snd_nxt - t.info.snd_una == edge - acked, "what is in flight is what was sent"
            t.peer(*(f". 1:1 ack {end}" for end in range(acked + step, edge, step)), f". 1:1 ack {edge}")
            acked = edge
        assert t.counted()["tcp_mtu_probes"] > 0
        assert 1242 in lengths, "between 1064 and 1500 bytes of packet"
        assert t.info.snd_queued == 0
        t.silence(5)
