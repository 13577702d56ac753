# SPDX-License-Identifier: Apache-2.0
"""TCP: segments with something unusual about them (`bypass.testing.segments`: numbers at the edges, flags, options,
SACK blocks, urgent pointers, lengths that lie), a few in a row, against every state that a connection can be in, and
what there is within ESTABLISHED: a window closed by either side, a hole, a recovery, urgent data.

Whatever comes, the state moves only along the arrows of RFC 9293 figure 5, the program reads what the peer's stream has
there, every answer is well-formed, and when the program has let go everything ends by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from bypass._core import lib
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support import examples
from tcp_talk import PATTERN, Talk, stream

from bypass.core import ConnInfo
from bypass.testing import Near, Segment, segments
from bypass.testing.wire import SYN

ALL = "mss 1460, sackok, ts 1000 0, nop, ws 3"
GONE = ""

# From one state, by any number of events, to these. A program that closes moves a state only in begin().
MOVES: dict[str, set[str]] = {
    "SYN_SENT": {"SYN_RECEIVED", "ESTABLISHED", "CLOSE_WAIT"},
    "SYN_RECEIVED": {"ESTABLISHED", "CLOSE_WAIT"},
    "ESTABLISHED": {"CLOSE_WAIT"},
    "CLOSE_WAIT": set(),
    "FIN_WAIT_1": {"FIN_WAIT_2", "CLOSING", "TIME_WAIT"},
    "FIN_WAIT_2": {"TIME_WAIT"},
    "CLOSING": {"TIME_WAIT"},
    "LAST_ACK": set(),
    "TIME_WAIT": set(),
    GONE: set(),
}


def connected(t: Talk, full: bool) -> None:
    """full: with every option."""
    t.established(opts=ALL if full else "mss 1460", ts=full, SO_OOBINLINE=1)
    t.stack.close_socket(t.listener)
    t.listener = -1


def syn_sent(t: Talk, full: bool) -> None:
    t.client(SO_OOBINLINE=1)
    t.out()


def syn_received(t: Talk, full: bool) -> None:
    """Crossed SYNs: a state of a connection, not of a listener's queue."""
    t.client(SO_OOBINLINE=1)
    t.out()
    t.peer(f"S 0:0 <{ALL if full else 'mss 1460'}>")
    t.out()


def established(t: Talk, full: bool) -> None:
    connected(t, full)


def data_in_flight(t: Talk, full: bool) -> None:
    connected(t, full)
    t.write(8000)


def recovering(t: Talk, full: bool) -> None:
    connected(t, full)
    t.write(8000)
    t.out()
    t.advance(3)


def hole_in_what_came(t: Talk, full: bool) -> None:
    connected(t, full)
    t.peer("P. 501:1001 ack 1", "P. 2001:2501 ack 1")


def own_window_closed(t: Talk, full: bool) -> None:
    connected(t, full)
    for first in range(1, 4001, 1000):
        t.peer(f"P. {first}:{first + 1000} ack 1")
        t.out()


def peers_window_closed(t: Talk, full: bool) -> None:
    connected(t, full)
    t.peer(". 1:1 ack 1 win 0")
    t.write(3000)
    t.advance(1)


def urgent_data(t: Talk, full: bool) -> None:
    connected(t, full)
    t.write(10, lib.BYPASS_OOB)
    t.peer("P. 1:101 ack 1")


def fin_wait_1(t: Talk, full: bool) -> None:
    connected(t, full)
    t.write(2000)
    t.shutdown()


def fin_wait_2(t: Talk, full: bool) -> None:
    connected(t, full)
    t.shutdown()
    t.peer(". 1:1 ack 2")


def close_wait(t: Talk, full: bool) -> None:
    connected(t, full)
    t.peer("F. 1:1 ack 1")
    t.write(2000)


def closing(t: Talk, full: bool) -> None:
    connected(t, full)
    t.shutdown()
    t.peer("F. 1:1 ack 1")


def last_ack(t: Talk, full: bool) -> None:
    connected(t, full)
    t.peer("F. 1:1 ack 1")
    t.shutdown()


def time_wait(t: Talk, full: bool) -> None:
    connected(t, full)
    t.shutdown()
    t.peer("F. 1:1 ack 2")


BEGINNINGS: dict[Callable[[Talk, bool], None], str] = {
    syn_sent: "SYN_SENT", syn_received: "SYN_RECEIVED", established: "ESTABLISHED", data_in_flight: "ESTABLISHED",
    recovering: "ESTABLISHED", hole_in_what_came: "ESTABLISHED", own_window_closed: "ESTABLISHED",
    peers_window_closed: "ESTABLISHED", urgent_data: "ESTABLISHED", fin_wait_1: "FIN_WAIT_1",
    fin_wait_2: "FIN_WAIT_2", close_wait: "CLOSE_WAIT", closing: "CLOSING", last_ack: "LAST_ACK",
    time_wait: "TIME_WAIT",
}  # fmt: skip


def test_every_state_of_a_connection_has_a_beginning() -> None:
    assert set(BEGINNINGS.values()) == set(MOVES) - {GONE}
    for begin, state in BEGINNINGS.items():
        for full in (False, True):
            with Talk(rcvbuf=4096 if begin is own_window_closed else None) as t:
                begin(t, full)
                assert t.state() == state, begin.__name__
                t.out()


class Peer:
    """Sends segments at distances from the connection, with the bytes that the peer's stream has there."""

    def __init__(self, t: Talk, full: bool) -> None:
        self.t = t
        self.full = full
        self.last: ConnInfo | None = None

    def bytes_at(self, first: int, n: int) -> bytes:
        """n bytes of the peer's stream. What is before it, or far behind, is zeroes: nobody may read it."""
        before = min(n, 2**32 - first) if first >= 2**31 else 0
        first = (first + before) % 2**32
        inside = max(0, min(n - before, len(PATTERN) - first))
        return bytes(before) + stream(first, first + inside) + bytes(n - before - inside)

    def send(self, segment: Segment) -> None:
        t = self.t
        before = t.state()
        self.last = t.info if before else self.last
        assert self.last is not None
        stamp = t.ts_base + (t.now // 1_000_000) if self.full else None
        to = Near.of(self.last, stamp, t.ts[1] if t.ts else 0)
        begins = before == "SYN_SENT" and segment.flags & SYN  # its number is where the peer's stream begins
        iss = segment.seq_of(to) if begins else t.peer_iss
        syn = 1 if segment.flags & SYN else 0  # data is behind it
        t.inject_ip(segment.packet(to, lambda seq, n: self.bytes_at((seq + syn - iss) % 2**32, n)))
        if begins and t.state() != before:
            t.peer_iss = iss


def state_of(t: Talk) -> str:
    state = t.state()
    return GONE if state == "CLOSED" else state


def moves_are_legal(states: list[str]) -> None:
    for a, b in pairwise(states):
        assert a == b or b == GONE or b in MOVES[a], f"{a} became {b}"


@pytest.mark.parametrize("begin", BEGINNINGS, ids=lambda begin: begin.__name__)
@given(
    story=st.lists(st.tuples(segments(), st.sampled_from([0, 0, 0, 0.05, 1, 70])), min_size=1, max_size=10),
    full=st.booleans(),
    reads=st.booleans(),
)
@settings(max_examples=examples(60))
def test_no_segment_moves_a_connection_but_along_the_arrows(
    begin: Callable[[Talk, bool], None], story: list[tuple[Segment, float]], full: bool, reads: bool
) -> None:
    """RFC 9293 3.3.2 figure 5, 3.10.7."""
    with Talk(rcvbuf=4096 if begin is own_window_closed else None, frames=256, chunks=64) as t:
        begin(t, full)
        peer, states, got = Peer(t, full), [state_of(t)], b""
        for segment, seconds in story:
            peer.send(segment)
            states.append(state_of(t))
            t.advance(seconds)
            states.append(state_of(t))
            if reads and isinstance(piece := t.read(), bytes):
                got += piece
        moves_are_legal(states)
        event(f"{begin.__name__}: ended {states[-1] or 'gone'}")
        t.out()  # every answer is read: lengths, checksums, options
        if isinstance(piece := t.read(), bytes):
            got += piece
        if all(segment.offset is None for segment, _ in story):  # else options are data, or data options
            assert got == stream(1, 1 + len(got)), "bytes that the peer did not send there"
        t.close_sock()
        t.advance(24 * 3600)
        t.out()
        left = {k: v for k, v in t.stack.audit().items() if v}
        assert not left, f"what no program owns ends by itself: {left}"
