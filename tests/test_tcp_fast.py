# SPDX-License-Identifier: Apache-2.0
"""The short way of the usual segment (bypass/stack/tcp_fast.c) does what the long way does.

Each conversation is held twice. The second time the peer's packets carry IP options (no-operations, RFC 791 3.1), which
only the long way takes. What the stack sends and when, what the program reads, every counter and the connection's
state have to be the same.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from bypass._core import lib
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support import examples
from tcp_talk import Talk, stream

NOPS = b"\x01\x01\x01\x00"
SMALL = st.sampled_from([0, 0, 1, 64, 64, 100, 256, 257, 536, 1448])
AHEAD = st.sampled_from([0] * 12 + [-1448, -64, -1, 1, 64, 1448, 5000])

step = st.one_of(
    # (flags, distance from the next byte, bytes, how much of what is in flight is acknowledged in sixteenths, window)
    st.tuples(
        st.just("peer"),
        st.sampled_from([".", "P."] * 10 + ["F.", "U.", "E.", "P", "R.", "S."]),
        AHEAD,
        SMALL,
        st.sampled_from([0, 5, 8, 15, 16, 16, 16, 16, 17]),
        st.sampled_from([65535, 65535, 65535, 4000, 100, 0]),
    ),
    st.tuples(st.just("batch"), st.integers(2, 12), st.sampled_from([64, 1448])),
    st.tuples(st.just("write"), st.sampled_from([1, 64, 64, 1448, 20_000])),
    st.tuples(st.just("read"), st.sampled_from([1, 64, 100_000])),
    st.tuples(st.just("wait"), st.sampled_from([0.0005, 0.003, 0.05, 0.3])),
    st.tuples(st.just("stale")),  # a timestamp of the past (PAWS)
    st.tuples(st.just("mangle"), st.integers(0, 60)),  # a bit is wrong
)


class Held:
    """One of the two conversations."""

    def __init__(self, ip_options: bytes, ws: bool) -> None:
        self.t = Talk(frames=256, chunks=64)
        self.t.ip_options = ip_options
        self.heard: list[str] = []
        self.ws = ws

    def open(self) -> None:
        self.t.__enter__()
        self.t.established(opts="mss 1460, nop, nop, ts 1000 0" + (", nop, ws 3" if self.ws else ""), ts=True)

    def say(self, flags: str, ahead: int, n: int, sixteenths: int, win: int) -> None:
        t, info = self.t, self.t.info
        una, high = ((x - (t.iss or 0)) % 2**32 for x in (info.snd_una, info.snd_nxt))
        nxt = (info.rcv_nxt - t.peer_iss) % 2**32
        seq = max(nxt + ahead, 1)
        ack = f" ack {una + (high - una) * sixteenths // 16}" if "." in flags else ""
        t.peer(f"{flags} {seq}:{seq + n}{ack} win {win}")

    def step(self, what: str, *args: Any) -> None:
        t = self.t
        nxt = (t.info.rcv_nxt - t.peer_iss) % 2**32
        match what:
            case "peer":
                self.say(*args)
            case "batch":
                n, size = args
                t.peer(*(f". {nxt + i * size}:{nxt + (i + 1) * size}" for i in range(n)))
            case "write":
                took = t.stack.send(t.sock, stream(t.wrote, t.wrote + args[0]))
                t.wrote += max(took, 0)
                t.settle()
                self.heard.append(f"send {took}")
            case "read":
                self.heard.append(f"recv {t.read(args[0])!r}")
            case "wait":
                t.advance(args[0])
            case "stale":
                t.peer(f". {nxt}:{nxt + 10} <nop, nop, ts 1 {t.ts[1] if t.ts else 0}>")
            case "mangle":
                packet = bytearray(t.segment(f"P. {nxt}:{nxt + 20}"))
                packet[args[0] % len(packet)] ^= 0x10
                t.inject_ip(bytes(packet))

    def run(self, steps: list[tuple[Any, ...]]) -> None:
        for what, *args in steps:
            if not self.t.state():
                break
            self.step(what, *args)
            self.heard += [f"{s.at_ns} {s}" for s in self.t.out()]
            self.heard.append(f"events {self.t.taken(self.t.sock)}")

    def state(self) -> tuple[Any, Counter[str]]:
        counted = Counter(self.t.counted())
        for name in (
            "tcp_in_fast",
            "tcp_in_joined",
            "rx_bytes",
            "ip_in_bad_header",
            "ip_in_bad_checksum",
            "ip_in_truncated",
        ):
            counted.pop(name, None)  # those of the network layer depend on where the wrong bit lies
        return (str(self.t.info) if self.t.state() else "", +counted)


@given(steps=st.lists(step, min_size=1, max_size=50), ws=st.booleans())
@settings(max_examples=examples(150))
def test_both_ways_do_the_same(steps: list[tuple[Any, ...]], ws: bool) -> None:
    if any(what == "mangle" for what, *_ in steps):  # the wrong bit has to hit what both packets have
        steps = [(w, *a) if w != "mangle" else (w, 20 + a[0] % 20) for w, *a in steps]
    plain, careful = Held(b"", ws), Held(NOPS, ws)
    for held in (plain, careful):
        held.open()
    try:
        plain.run(steps)
        careful.run([(w, a[0] + len(NOPS)) if w == "mangle" else (w, *a) for w, *a in steps])
        taken = plain.t.stack.stats()["tcp_in_fast"]
        event("the short way was taken" if taken else "never the short way")
        assert careful.t.stack.stats()["tcp_in_fast"] == 0
        assert plain.heard == careful.heard
        assert plain.state() == careful.state()
    finally:
        for held in (plain, careful):
            held.t.close()


def test_requests_and_responses_take_the_short_way() -> None:
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        before = t.stack.stats()["tcp_in_fast"]
        for i in range(100):
            t.peer(f"P. {1 + 64 * i}:{65 + 64 * i}")
            assert len(t.read()) == 64
            t.write(64)
            t.out()
            t.advance(0.001)
        assert t.stack.stats()["tcp_in_fast"] == before + 100
        assert not t.stack.ready(t.sock) & lib.BYPASS_IN


def test_segments_of_a_batch_that_follow_each_other_are_taken_together() -> None:
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        for at in range(16):  # past the segments that are acknowledged one by one
            t.peer(f". {1 + 1448 * at}:{1 + 1448 * (at + 1)}")
        begin = 1 + 1448 * 16
        assert len(t.read(100_000)) == begin - 1
        t.advance(0.3)
        t.out()
        t.peer(*(f". {begin + 1448 * i}:{begin + 1448 * (i + 1)}" for i in range(6)))
        assert t.stack.stats()["tcp_in_joined"] == 5
        acks = t.out()
        assert [(s.end - s.seq, s.ack) for s in acks] == [(0, begin + 1448 * 6)], acks
        assert t.read(100_000) == stream(begin, begin + 1448 * 6)


def test_full_segments_that_may_go_share_a_header() -> None:
    """Each has its own number, checksum (which Talk verifies) and PSH; the last goes with what is left to write."""
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0, nop, ws 7", ts=True, TCP_NODELAY=1)
        t.write(9 * 1448 + 10)
        sent = t.out()
        assert t.stack.stats()["tcp_out_joined"] == 8  # all but the first and the last
        assert [(s.seq, s.end - s.seq) for s in sent] == [
            (1 + 1448 * i, 1448 if i < 9 else 10) for i in range(10)
        ]
        assert [s.flags for s in sent] == ["."] * 9 + ["P."]
        assert len({(s.ack, s.win, str(s.opts)) for s in sent}) == 1
