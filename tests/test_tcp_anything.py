# SPDX-License-Identifier: Apache-2.0
"""TCP against a peer that says anything near the truth: numbers around the edges, every flag, windows that jump.

Whatever it says, the stack sends the bytes that were written and no others (Talk.parse compares each
payload), never beyond a window that was offered; it acknowledges only forwards, never takes back what it offered, and
gives the program a beginning of the peer's stream. Uniformly random numbers would prove nothing: almost all of them
would be dropped at the door.
"""

from __future__ import annotations

import errno
from collections import Counter
from typing import Any

from bypass._core import lib
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support import examples
from tcp_talk import Segment, Talk, stream

FLAGS = ["."] * 12 + ["P.", "F.", "FP.", "R", "R.", "S", "S.", "P", "U.", "F"]
OPTS = ["mss 1460", "mss 536, nop, nop, ts 1000 0", "", "mss 1000, nop, ws 3"]
NEAR = st.one_of(
    st.sampled_from([-1460, -2, -1, 0, 0, 0, 0, 0, 1, 2, 536, 1460, 4096]), st.integers(-3000, 3000)
)
WINDOWS = st.one_of(st.sampled_from([0, 1, 100, 536, 1460, 5000, 65535]), st.integers(0, 65535))

step = st.one_of(
    # (flags, distance from what is expected, bytes, distance of the ack from the oldest unacknowledged, window)
    st.tuples(
        st.just("peer"),
        st.sampled_from(FLAGS),
        NEAR,
        st.sampled_from([0, 0, 1, 100, 536, 1460]),
        NEAR,
        WINDOWS,
    ),
    st.tuples(st.just("ack"), st.integers(0, 3000), WINDOWS),  # as a good peer does
    st.tuples(st.just("write"), st.sampled_from([1, 100, 1460, 5000])),
    st.tuples(st.just("read"), st.sampled_from([1, 100, 100_000])),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.05, 0.3, 2.0, 70.0])),
    st.tuples(
        st.just("option"), st.sampled_from(["TCP_NODELAY", "TCP_CORK", "TCP_QUICKACK"]), st.integers(0, 1)
    ),
    st.tuples(st.just("shutdown")),
    st.tuples(st.just("icmp"), st.integers(60, 1600)),
)


class Watch:
    """What must hold for every segment that leaves."""

    def __init__(self, t: Talk, scale: int) -> None:
        self.t = t
        self.scale = scale
        self.edge = 1 + 65535  # the largest right edge that the peer offered; its SYN's, to begin with
        self.acked = 1
        self.offered = 0
        self.sent = 1
        self.high = 1  # what the peer has claimed to have sent
        self.seen: Counter[str] = Counter()

    def look(self) -> None:
        for s in self.t.out():
            self.one(s)

    def one(self, s: Segment) -> None:
        self.seen[s.flags] += 1
        assert "S" not in s.flags
        if s.flags == "R":  # an answer to a number that was never ours
            return
        assert s.ack is not None
        assert s.ack >= self.acked, "an acknowledgment went backwards"
        self.acked = s.ack
        self.offered = max(self.offered, s.ack + s.win)
        assert s.ack + s.win >= self.offered, "the right edge moved left"
        if s.data:
            assert s.end <= self.edge, "sent beyond every window"
            assert s.seq <= self.sent, "a gap"
            assert len(s.data) <= 1460
            self.sent = max(self.sent, s.end)


def run(t: Talk, w: Watch, steps: list[tuple[Any, ...]]) -> bytes:
    got = b""
    base = t.peer_iss
    for what, *args in steps:
        if not t.state():
            break
        info = t.info
        una = (info.snd_una - (t.iss or 0)) % 2**32
        nxt = (info.rcv_nxt - base) % 2**32
        match what:
            case "peer":
                flags, at, n, ack, win = args
                seq = max(nxt + at, -3000)
                ack_field = f" ack {una + ack}" if "." in flags else ""
                n = n if seq >= 1 else 0
                w.edge = max(w.edge, una + ack + (win << w.scale))
                w.high = max(w.high, seq + n)
                t.peer(f"{flags} {seq}:{seq + n}{ack_field} win {win}")
            case "ack":
                more, win = args
                high = (info.snd_nxt - (t.iss or 0)) % 2**32
                ack = min(una + more, high)
                w.edge = max(w.edge, ack + (win << w.scale))
                t.peer(f". {nxt}:{nxt} ack {ack} win {win}")
            case "write":
                took = t.stack.send(t.sock, stream(t.wrote, t.wrote + args[0]))
                t.wrote += max(took, 0)
            case "read":
                data = t.read(args[0])
                got += data if isinstance(data, bytes) else b""
            case "wait":
                t.advance(args[0])
            case "option":
                t.option(*args)
            case "shutdown":
                try:
                    t.shutdown()
                except OSError as e:
                    assert e.errno == errno.ENOTCONN  # noqa: PT017 - it may also succeed
            case "icmp":
                t.icmp(3, 4, una, mtu=args[0])
        w.look()
    return got


@given(
    steps=st.lists(step, min_size=1, max_size=60),
    opts=st.sampled_from(OPTS),
    rcvbuf=st.sampled_from([4096, 20_000, 65535]),
    sndbuf=st.sampled_from([4096, 1 << 20]),
)
@settings(max_examples=examples(300))
def test_whatever_the_peer_says_the_stack_keeps_to_itself(
    steps: list[tuple[Any, ...]], opts: str, rcvbuf: int, sndbuf: int
) -> None:
    with Talk(rcvbuf=rcvbuf, sndbuf=sndbuf, chunks=64, frames=256) as t:
        # Urgent bytes stay in the stream.
        t.established(opts=opts, ts="ts" in opts, SO_OOBINLINE=1)
        w = Watch(t, 3 if "ws" in opts else 0)
        got = run(t, w, steps)
        if t.stack.ready(t.sock) & lib.BYPASS_IN:
            data = t.read()
            got += data if isinstance(data, bytes) else b""
        assert got == stream(1, 1 + len(got)), "bytes that the peer did not send there"
        w.look()
        event(f"ended {t.state() or 'closed'}")
        t.close_sock()
        t.advance(3600)
        t.sent()
        left = {k: v for k, v in t.stack.audit().items() if v and k not in ("listeners", "handles")}
        assert not left, f"what no program owns ends by itself: {left}"


@given(steps=st.lists(step, min_size=1, max_size=40))
@settings(max_examples=examples(60))
def test_after_anything_a_good_peer_still_gets_everything(steps: list[tuple[Any, ...]]) -> None:
    """As long as nobody ended it: what was written arrives, in order, when the peer becomes reasonable."""
    steps = [s for s in steps if not (s[0] == "peer" and set(s[1]) & set("RF"))]
    with Talk(frames=512) as t:
        t.established()
        w = Watch(t, 0)
        run(t, w, steps)
        if not t.state():
            return
        edge = 1
        info = t.info
        edge = (info.snd_una - (t.iss or 0)) % 2**32
        end = t.wrote
        held: dict[int, int] = {}
        t.option("TCP_CORK", 0)
        # A reasonable peer has really sent what lies before the numbers it used.
        for first in range((t.info.rcv_nxt - t.peer_iss) % 2**32, w.high, 1000):
            t.peer(f". {first}:{min(first + 1000, w.high)} ack {edge} win 0")
        w.look()
        for _ in range(400):
            nxt = (t.info.rcv_nxt - t.peer_iss) % 2**32
            t.peer(f". {nxt}:{nxt} ack {edge} win 65535")
            w.edge = max(w.edge, edge + 65535)
            for s in t.out():
                w.one(s)
                if s.data:
                    held[s.seq] = max(held.get(s.seq, 0), s.end)
            for seq in sorted(held):
                if seq <= edge:
                    edge = max(edge, held[seq])
            if edge >= end:
                break
            t.advance(0.5)
        assert edge >= end, f"{edge} of {end}"
        nxt = (t.info.rcv_nxt - t.peer_iss) % 2**32
        t.peer(f". {nxt}:{nxt} ack {edge} win 65535")
        t.sent()
        assert t.info.snd_queued == 0
