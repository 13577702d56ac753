# SPDX-License-Identifier: Apache-2.0
"""When an acknowledgment leaves alone: never where data could carry it, and never so late that the peer waits for it.

RFC 1122 4.2.3.2 delays it in the hope of data, 4.2.3.4 makes the peer wait for it with each small piece. Which of the
two a connection is about is learned (tcp_rcv.c: who talks), whoever reads. Counts are exact, and time is virtual.
"""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from tcp_talk import Talk, stream
from test_app_loop import ME, Loop

FIRST, LATER = 0.005, 0.040  # how long it is put off: as long as nothing is known, and when data carries it

both_ways = pytest.mark.parametrize("ts", [True, False], ids=["short way", "long way"])


class Both(Loop):
    """A client and a server on one stack that talks to itself."""

    def __init__(self) -> None:
        super().__init__()
        core = self.core
        core.addr_add(ME, 8)
        listener = core.socket(lib.BYPASS_STREAM)
        core.bind(listener, (ME, 80))
        core.listen(listener, 8)
        self.client = core.socket(lib.BYPASS_STREAM)
        assert core.connect(self.client, (ME, 80)) == -errno.EINPROGRESS
        self.run(0.1)
        self.server = core.accept(listener)
        core.close_socket(listener)
        self._before = core.stats()

    def move(self, frm: int, to: int, data: bytes) -> None:
        """What one writes the other has read a moment later."""
        assert self.core.send(frm, data) == len(data)
        self.run(0.0001)
        assert self.core.recv(to, 100) == data

    def sent(self) -> tuple[int, int]:
        """Segments that left since the last call, and those among them that were acknowledgments only."""
        before, self._before = self._before, self.core.stats()
        out, acks = (self._before[key] - before[key] for key in ("tcp_out", "tcp_out_acks"))
        return out, acks


# ---- Who answers ---------------------------------------------------------------------------------------------------
@both_ways
def test_a_request_and_its_answer_are_two_segments_from_the_first_on(ts: bool) -> None:
    with Talk() as t:
        t.established(ts=ts)
        for i in range(100):
            t.peer(f"P. {1 + 10 * i}:{11 + 10 * i} ack {1 + 20 * i}")
            t.silence(0.003)
            assert t.read() == stream(1 + 10 * i, 11 + 10 * i)
            t.silence(0.001)
            t.write(20)
            t.hears(f"P. {1 + 20 * i}:{21 + 20 * i} ack {11 + 10 * i}")
        t.peer(f". 1001:1001 ack {1 + 20 * 100}")
        t.silence(1)


def test_both_sides_of_a_conversation_send_two_segments_a_request() -> None:
    both = Both()
    for _ in range(1000):
        both.move(both.client, both.server, b"request")
        both.move(both.server, both.client, b"answer")
    assert both.sent() == (2000, 0)
    both.run(1)
    assert both.sent() == (1, 1), "the last answer's, after the delay"
    both.core.close()


@both_ways
def test_an_answer_may_take_its_time_once_answers_have_come(ts: bool) -> None:
    with Talk() as t:
        t.established(ts=ts)
        t.peer("P. 1:11")
        t.read()
        t.write(10)
        t.hears("P. 1:11 ack 11")
        t.peer("P. 11:21 ack 11")
        t.read()
        t.silence(LATER - 0.001)
        t.write(10)
        t.hears("P. 11:21 ack 21")


@both_ways
def test_a_late_answer_costs_one_acknowledgment_and_the_next_request_none(ts: bool) -> None:
    with Talk() as t:
        t.established(ts=ts)
        for first in (1, 21):
            delay = FIRST if first == 1 else LATER
            t.peer(f"P. {first}:{first + 10} ack {first}")
            t.read()
            t.at(delay, f". {first}:{first} ack {first + 10}")
            t.advance(0.1)
            t.write(10)
            t.hears(f"P. {first}:{first + 10} ack {first + 10}")
            t.peer(f"P. {first + 10}:{first + 20} ack {first + 10}")
            t.read()
            t.silence(0.030)
            t.write(10)
            t.hears(f"P. {first + 10}:{first + 20} ack {first + 20}")


def test_an_answer_of_many_segments_carries_it_too() -> None:
    with Talk() as t:
        t.established(ts=True)
        t.peer("P. 1:11")
        t.read()
        t.write(10 * 1448)
        assert [s.ack for s in t.out()] == [11] * 10
        t.peer(f"P. 11:21 ack {1 + 10 * 1448}")
        t.read()
        t.silence(LATER - 0.001)
        t.write(1)
        t.hears(f"P. {1 + 10 * 1448}:{2 + 10 * 1448} ack 21")


# ---- Who listens ---------------------------------------------------------------------------------------------------
@both_ways
def test_what_a_listener_reads_is_acknowledged_when_it_is_read(ts: bool) -> None:
    with Talk() as t:
        t.established(ts=ts)
        t.peer("P. 1:2")
        t.read()
        t.at(FIRST, ". 1:1 ack 2")
        for i in range(2, 100):
            t.peer(f"P. {i}:{i + 1}")
            t.silence(0.01)
            assert t.read() == stream(i, i + 1)
            t.hears(f". 1:1 ack {i + 1}")
        t.silence(1)


def test_small_writes_in_one_direction_wait_once_and_briefly() -> None:
    """Nagle's algorithm on the other side: each waits for the acknowledgment of the one before."""
    both = Both()
    both.move(both.client, both.server, b"x")
    assert both.core.send(both.client, b"x") == 1
    both.run(FIRST - 0.001)
    assert both.core.recv(both.server, 10) == -errno.EAGAIN
    both.run(0.003)
    assert both.core.recv(both.server, 10) == b"x"
    for _ in range(198):
        both.move(both.client, both.server, b"x")
    both.run(0.0001)
    assert both.sent() == (400, 200)
    both.core.close()


def test_nothing_leaves_before_all_is_read() -> None:
    with Talk() as t:
        t.established()
        t.peer("P. 1:2")
        t.read()
        t.at(FIRST, ". 1:1 ack 2")
        t.peer("P. 2:12")
        assert t.read(4) == stream(2, 6)
        t.hears()
        assert t.read(6) == stream(6, 12)
        t.hears(". 1:1 ack 12")


def test_who_listened_and_answers_once_carries_it_again() -> None:
    with Talk() as t:
        t.established()
        t.peer("P. 1:2")
        t.read()
        t.at(FIRST, ". 1:1 ack 2")
        t.write(1)
        t.hears("P. 1:2 ack 2")
        t.peer("P. 2:3 ack 2")
        t.read()
        t.at(LATER, ". 2:2 ack 3")


def test_pieces_and_then_an_answer_do_not_wait_each_time() -> None:
    """Two small writes and a read: the second is held back until the first is acknowledged (RFC 896)."""
    both = Both()
    for i in range(100):
        assert both.core.send(both.client, b"head") == 4
        assert both.core.send(both.client, b"body") == 4
        both.run(0.0001)
        assert both.core.recv(both.server, 100) == b"head"
        both.run(0.0001 if i else 2 * FIRST)
        assert both.core.recv(both.server, 100) == b"body"
        both.move(both.server, both.client, b"answer")
        assert both.sent() == (5, 2)
    both.core.close()


# ---- Who says which ------------------------------------------------------------------------------------------------
def test_quickack_says_who_listens_and_who_answers() -> None:
    """As Linux takes it: out of its "pingpong" mode and into it, until the connection shows otherwise."""
    with Talk() as t:
        t.established(TCP_QUICKACK=0)
        t.peer("P. 1:2")
        t.read()
        t.silence(LATER - 0.001)
        t.option("TCP_QUICKACK", 1)
        t.hears(". 1:1 ack 2")
        t.peer("P. 2:3")
        t.silence()
        t.read()
        t.hears(". 1:1 ack 3")
        t.option("TCP_QUICKACK", 0)
        t.peer("P. 3:4")
        t.read()
        t.at(LATER, ". 1:1 ack 4")


def test_the_shortest_delay_holds_where_less_is_asked_for() -> None:
    with Talk(config={"delack_ms": 2}) as t:
        t.established()
        t.peer("P. 1:2")
        t.read()
        t.at(0.002, ". 1:1 ack 2")
