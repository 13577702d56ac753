# SPDX-License-Identifier: Apache-2.0
"""TCP segments relative to a live connection, and TCP options; right, near the truth, and malformed.

A segment with random numbers is dropped at the door. What is drawn here is a distance: from what the receiver expects
next, from the right edge of its window, from the oldest byte that it has not seen acknowledged, from the newest that it
has sent. The numbers themselves are put in when the segment is sent, from the connection as it is then:

    @given(st.lists(segments(), max_size=20))
    def test_my_stack(story):
        ...
        for segment in story:
            inject(segment.packet(Near.of(stack.core.tcp_info(handle))))

Sequence numbers are modulo 2^32, windows as on the wire, times in milliseconds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from hypothesis import strategies as st

from bypass.testing.wire import ACK, CWR, ECE, FIN, PSH, RST, SYN, TCP, URG, ipv4, tcp

if TYPE_CHECKING:
    from bypass.core import ConnInfo

__all__ = ["Near", "Option", "Segment", "near", "option_bytes", "options", "segments", "windows"]

WRAP = 1 << 32


@dataclass(frozen=True, slots=True)
class Near:
    """A connection as the side knows it that is to receive segments; what segments are relative to.

    Attributes:
        src, dst: (address, port) of the sender and of the receiver.
        rcv_nxt, rcv_wnd: what the receiver expects next, and the window that it offers, bytes.
        snd_una, snd_nxt: the receiver's own oldest unacknowledged and next sequence number.
        ts_val: the sender's last timestamp; ts_ecr: the receiver's last, which is echoed. None: not agreed.
    """

    src: tuple[str, int]
    dst: tuple[str, int]
    rcv_nxt: int
    rcv_wnd: int
    snd_una: int
    snd_nxt: int
    ts_val: int | None = None
    ts_ecr: int = 0

    @classmethod
    def of(cls, info: ConnInfo, ts_val: int | None = None, ts_ecr: int = 0) -> Near:
        """From what the stack tells of its connection (`CoreStack.tcp_info`, `CoreStack.conns`)."""
        return cls(
            info.peer, info.local, info.rcv_nxt, info.rcv_wnd, info.snd_una, info.snd_nxt, ts_val, ts_ecr
        )


# ---- Options ------------------------------------------------------------------------------------------------------

Option = tuple[Literal["mss", "ws", "sack_ok", "ts", "sack", "nop", "eol", "raw"], tuple[int, ...] | bytes]
"""(kind, values). ts: distances of the value and of the echo from those of the connection. sack: edges, in pairs, as
distances from snd_una. raw: bytes as they are."""


def option_bytes(items: tuple[Option, ...], to: Near) -> bytes:
    """Options as they stand in a header, at most 40 bytes: those that do not fit are left out (RFC 9293 3.2)."""
    out = b""
    for kind, values in items:
        one = _option(kind, values, to)
        if len(out) + len(one) <= 40:
            out += one
    return out


def _option(kind: str, values: tuple[int, ...] | bytes, to: Near) -> bytes:
    if isinstance(values, bytes):
        return values
    match kind:
        case "mss":
            return struct.pack("!BBH", 2, 4, values[0])
        case "ws":
            return struct.pack("!BBB", 3, 3, values[0])
        case "sack_ok":
            return b"\4\2"
        case "ts":
            val, ecr = (to.ts_val or 0) + values[0], to.ts_ecr + values[1]
            return struct.pack("!BBII", 8, 10, val % WRAP, ecr % WRAP)
        case "sack":
            edges = [(to.snd_una + v) % WRAP for v in values]
            return struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)
        case "nop":
            return b"\1"
    return b"\0"


def near(*edges: int, spread: int = 3000) -> st.SearchStrategy[int]:
    """Distances, bytes: 0 most often, the given edges with their neighbours, and up to `spread` on both sides."""
    around = sorted({e + d for e in edges for d in (-1, 0, 1)})
    return st.one_of(st.just(0), st.sampled_from([*around, -1, 1]), st.integers(-spread, spread))


def windows() -> st.SearchStrategy[int]:
    """Window fields, 0..65535: closed, silly, a segment, the largest, and any."""
    return st.sampled_from([65535, 0, 1, 100, 536, 1460, 5000]) | st.integers(0, 65535)


def _sack_blocks() -> st.SearchStrategy[tuple[int, ...]]:
    """1 to 4 blocks as distances from snd_una: right ones, touching, overlapping, backwards, empty, D-SACKs below it
    (RFC 2883), and such that lie beyond all that was sent."""
    left = st.sampled_from([0, 1, 536, 1448, 1460, 2896, 2920, -1460, -1, 1 << 20, 1 << 31]) | st.integers(
        -3000, 9000
    )
    length = st.sampled_from([1460, 1448, 2920, 1, 0, -1, -1460, 1 << 30]) | st.integers(1, 6000)
    block = st.tuples(left, length).map(lambda b: (b[0], b[0] + b[1]))
    return st.lists(block, min_size=1, max_size=4).map(lambda blocks: tuple(e for b in blocks for e in b))


def _malformed() -> st.SearchStrategy[Option]:
    """Options whose length lies (RFC 9293 3.2: such a segment must not crash anything), and unknown ones."""
    lies = [
        *("0202", "0203ff", "020605b40000", "0200", "0201", "02ff05b4", "02"),
        *("0302", "03040707", "0301", "03030f", "0303ff"),
        *("0802", "0809000000000000", "080b00000000000000000000"),
        *("0502", "050600000000", "0507000000000000", "05220000000000000001", "050a0000000000000001"),
        *("0403", "0400", "fd0401", "fe02", "1312", "ff00", "00", "000101"),
    ]
    known = st.sampled_from([bytes.fromhex(lie) for lie in lies])
    unknown = st.builds(
        lambda kind, body: bytes([kind, 2 + len(body)]) + body, st.integers(6, 255), st.binary(max_size=10)
    )
    return st.tuples(st.just("raw"), known | unknown | st.binary(min_size=1, max_size=40))


def options(*, syn: bool = False, malformed: bool = True) -> st.SearchStrategy[tuple[Option, ...]]:
    """Options of a segment: timestamps and SACK blocks near the connection's, those of a SYN, padding anywhere.

    Args:
        syn: mostly those that a SYN carries (MSS, window scale, SACK permitted).
        malformed: also such whose lengths lie, or that are unknown.
    """
    numbers = st.sampled_from([1460, 536, 0, 1, 48, 65535])
    of_syn: st.SearchStrategy[Option] = st.one_of(
        st.tuples(st.just("mss"), st.tuples(numbers)),
        st.tuples(st.just("ws"), st.tuples(st.sampled_from([7, 0, 14, 15, 255]))),
        st.tuples(st.just("sack_ok"), st.just(())),
    )
    stamp = near(1, 1000, spread=5000) | st.sampled_from([1 << 31, -(1 << 31), (1 << 31) - 1])
    of_data: st.SearchStrategy[Option] = st.one_of(
        st.tuples(st.just("ts"), st.tuples(stamp, stamp)),
        st.tuples(st.just("sack"), _sack_blocks()),
    )
    padding: st.SearchStrategy[Option] = st.tuples(st.sampled_from(["nop", "nop", "nop", "eol"]), st.just(()))
    kinds = [of_data, padding] + ([of_syn] * 3 if syn else [of_syn]) + ([_malformed()] if malformed else [])
    return st.lists(st.one_of(kinds), max_size=4).map(tuple)


# ---- Segments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment as distances from a connection.

    Attributes:
        flags: FIN, SYN, ... of bypass.testing.wire.
        seq_from: `next`: rcv_nxt; `edge`: the right edge of the receiver's window; `far`: 2^31 from rcv_nxt.
        seq: distance of the sequence number from there, bytes.
        size: payload, bytes.
        ack_from: `una` or `nxt`: the receiver's snd_una or snd_nxt; `far`: 2^31 from snd_una.
        ack: distance of the acknowledgment from there.
        window: as on the wire.
        options: see Option.
        urgent: the urgent pointer.
        offset: the data offset in 32-bit words, a lie; None: right.
        stamped: whether timestamps are added when they are agreed and `options` has none.
    """

    flags: int = ACK
    seq_from: Literal["next", "edge", "far"] = "next"
    seq: int = 0
    size: int = 0
    ack_from: Literal["una", "nxt", "far"] = "nxt"
    ack: int = 0
    window: int = 65535
    options: tuple[Option, ...] = ()
    urgent: int = 0
    offset: int | None = None
    stamped: bool = True

    def seq_of(self, to: Near) -> int:
        """The sequence number, 0..2^32-1."""
        base = {"next": to.rcv_nxt, "edge": to.rcv_nxt + to.rcv_wnd, "far": to.rcv_nxt + (1 << 31)}
        return (base[self.seq_from] + self.seq) % WRAP

    def ack_of(self, to: Near) -> int:
        """The acknowledgment number, 0..2^32-1, whether or not the ACK flag is set."""
        base = {"una": to.snd_una, "nxt": to.snd_nxt, "far": to.snd_una + (1 << 31)}
        return (base[self.ack_from] + self.ack) % WRAP

    def packet(self, to: Near, payload: Callable[[int, int], bytes] | None = None) -> bytes:
        """The IPv4 packet.

        Args:
            payload: called with the first sequence number and the length, gives the bytes that belong there; None:
                zeroes.
        """
        seq = self.seq_of(to)
        data = payload(seq, self.size) if payload is not None else bytes(self.size)
        items = self.options
        if self.stamped and to.ts_val is not None and all(kind != "ts" for kind, _ in items):
            items = (("nop", ()), ("nop", ()), ("ts", (0, 0)), *items)
        (src, sport), (dst, dport) = to.src, to.dst
        body = tcp(
            src,
            dst,
            sport,
            dport,
            seq,
            self.ack_of(to),
            self.flags,
            self.window,
            data,
            options=option_bytes(items, to),
            urgent=self.urgent,
        )
        if self.offset is not None:
            body = tcp_with_offset(body, self.offset, src, dst)
        return ipv4(src, dst, TCP, body)


def tcp_with_offset(segment: bytes, words: int, src: str, dst: str) -> bytes:
    """A segment whose data offset says `words`, its checksum right all the same."""
    from bypass.testing.wire import checksum, pseudo

    bad = bytearray(segment)
    bad[12] = bad[12] & 0x0F | (words & 15) << 4
    bad[16:18] = b"\0\0"
    bad[16:18] = checksum(pseudo(src, dst, TCP, len(bad)) + bytes(bad)).to_bytes(2, "big")
    return bytes(bad)


_FLAGS = [
    *[ACK] * 8,
    *(PSH | ACK, FIN | ACK, FIN | PSH | ACK, RST, RST | ACK, SYN, SYN | ACK),
    *(PSH, URG | ACK, FIN, 0, SYN | FIN, SYN | RST, ACK | ECE, ACK | CWR, SYN | ECE | CWR, 0xFF),
]


def _changes(malformed: bool) -> dict[str, st.SearchStrategy[Any]]:
    """What may be unusual about a segment: a field of it, and its values."""
    seqs = st.tuples(
        st.sampled_from(["next", "next", "next", "edge", "far"]), near(536, 1448, 1460, 4096, 65535)
    )
    acks = st.tuples(st.sampled_from(["una", "una", "nxt", "nxt", "far"]), near(536, 1448, 1460, 2920))
    odd: dict[str, st.SearchStrategy[Any]] = {
        "seq": seqs,
        "ack": acks,
        "window": windows(),
        "options": options(malformed=malformed),
        "stamped": st.just(False),
        "urgent": st.sampled_from([0, 1, 1460, 65535]),
    }
    return odd | ({"offset": st.sampled_from([0, 4, 5, 6, 15])} if malformed else {})


@st.composite
def segments(
    draw: st.DrawFn,
    *,
    flags: st.SearchStrategy[int] | None = None,
    sizes: st.SearchStrategy[int] | None = None,
    malformed: bool = True,
) -> Segment:
    """Segments near a connection: what it expects, but for up to three things, which are at an edge or wrong.

    Args:
        flags: None: mostly ACK, every sensible and some senseless combinations.
        sizes: payload bytes; None: none, one, and about a segment.
        malformed: also options and data offsets that lie.
    """
    bits = draw(flags if flags is not None else st.just(ACK) | st.sampled_from(_FLAGS))
    size = draw(sizes if sizes is not None else st.sampled_from([0, 0, 1, 100, 536, 1448, 1460]))
    s = Segment(flags=bits, size=size, options=draw(options(syn=True, malformed=False)) if bits & SYN else ())
    odd = _changes(malformed)
    for name in draw(st.lists(st.sampled_from(sorted(odd)), max_size=3, unique=True)):
        value = draw(odd[name])
        if name in ("seq", "ack"):
            s = replace(s, **{f"{name}_from": value[0], name: value[1]})
        else:
            s = replace(s, **{name: value})
    return s
