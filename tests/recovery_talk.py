# SPDX-License-Identifier: Apache-2.0
"""Conversations about loss recovery, in whole segments: number 0 is bytes 1 to 1000 of our stream."""

from __future__ import annotations

from typing import Any

from tcp_talk import Talk

MSS = 1000
SACK = f"mss {MSS}, sackok"
PLAIN = f"mss {MSS}"
SACK_TS = f"mss {MSS + 12}, sackok, nop, nop, ts 1000 0"
PLAIN_TS = f"mss {MSS + 12}, nop, nop, ts 1000 0"
RTT = 0.1


def begin(
    t: Talk, segments: int = 30, *, opts: str = SACK, rtt: float = RTT, first: int = 10, **options: int
) -> None:
    """A connection whose handshake took `rtt`; `segments` are written, `first` left one round trip ago."""
    t.established(opts=opts, ts="ts" in opts, rtt=rtt, **options)
    t.write(segments * MSS)
    assert numbers(t) == list(range(min(first, segments)))
    t.advance(rtt)


def edge(n: int) -> int:
    """The first byte of segment n."""
    return 1 + n * MSS


def ack(n: int, *blocks: tuple[int, int], more: str = "") -> str:
    """The peer has the first n segments, and those of the blocks (first, behind the last)."""
    sack = " ".join(f"{edge(a)}:{edge(b)}" for a, b in blocks)
    words = [w for w in (more, f"sack {sack}" if sack else "") if w]
    return f". 1:1 ack {edge(n)}" + (f" <{', '.join(words)}>" if words else "")


def numbers(t: Talk) -> list[int]:
    """What left, as numbers of segments; all are whole."""
    got = t.out()
    assert all(len(s.data) == MSS for s in got), [str(s) for s in got]
    return [(s.seq - 1) // MSS for s in got]


def after(t: Talk, seconds: float, *specs: str) -> list[int]:
    """So much later these arrive; what has left since, and in answer."""
    t.advance(seconds)
    if specs:
        t.peer(*specs)
    return numbers(t)


def each(t: Talk, *specs: str) -> list[list[int]]:
    """What leaves in answer to each of these, which arrive one after the other."""
    said = []
    for spec in specs:
        t.peer(spec)
        said.append(numbers(t))
    return said


def window(t: Talk) -> tuple[float, float]:
    """cwnd and ssthresh, in segments."""
    info: Any = t.info
    return info.cwnd / MSS, info.ssthresh / MSS


def state(t: Talk) -> str:
    """Of recovery, as TCP_INFO tells it."""
    return ("open", "disorder", "cwr", "recovery", "loss")[t.stack.tcp_info_linux(t.sock, 2)[1]]
