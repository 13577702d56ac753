# SPDX-License-Identifier: Apache-2.0
"""A TCP peer that says exactly what a test writes down, and hears exactly what the stack answers.

    with Talk() as t:
        t.server()
        t.peer("S 0:0 win 65535 <mss 1460>")
        t.hears("S. 0:0 ack 1 <mss 1460>")
        t.peer(". 1:1 ack 1")
        conn = t.accept()
        t.peer("P. 1:101 ack 1")
        t.at(0.005, ". 1:1 ack 101")

A segment is its flags (S F R P and . for ACK), `first:next` in its sender's numbering, and, where they matter, `ack`,
`win` (as on the wire) and options. Numbers are relative: 0 is the SYN, 1 the first byte. Both sides' first sequence
numbers are chosen close below 2^32, so that every conversation crosses it. Byte n of either stream has a value of its
own (`stream`), so that payloads are checked without being written down.
"""

from __future__ import annotations

import errno
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from bypass._core import ffi, lib
from conversation import PEER, SECOND, US, Conversation
from wire import ACK, FIN, ICMP, PSH, RST, SYN, TCP, URG, Ip, checksum, icmp, ipv4, parse_ip, pseudo, tcp

from bypass.core import Config, check

WRAP = 1 << 32
PORT, PEER_PORT = 80, 40000
ROUTER = "192.0.2.254"
OUR_ISS = WRAP - 2000
PEER_ISS = WRAP - 1500
TICK = 0.0011  # seconds: timers run at most a tick of the wheel (2^20 ns) late
LETTERS = {"S": SYN, "F": FIN, "R": RST, "P": PSH, ".": ACK, "U": URG, "E": 0x40, "W": 0x80}
# Byte i is i * 31 + (i >> 8) * 17 + (i >> 16), modulo 256; 256 bytes at a time.
SHIFTS = [bytes((byte + by) & 0xFF for byte in range(256)) for by in range(256)]
LINE = bytes(i * 31 & 0xFF for i in range(256))
PATTERN = b"".join(LINE.translate(SHIFTS[(i * 17 + (i >> 8)) & 0xFF]) for i in range(1 << 12))
SPEC = re.compile(
    r"(?P<flags>[SFRPUEW.]+) (?P<seq>-?\d+):(?P<end>-?\d+)"
    r"( ack (?P<ack>-?\d+))?( win (?P<win>\d+))?( <(?P<opts>[^>]*)>)?"
)


def stream(first: int, end: int) -> bytes:
    """Bytes first..end-1 of either direction's stream; the first byte behind the SYN is number 1."""
    return PATTERN[first:end]


def fmt(flags: int) -> str:
    return "".join(letter for letter, bit in LETTERS.items() if flags & bit)


@dataclass(frozen=True)
class Segment:
    """Numbers relative to the first sequence numbers; ack None: the flag is not set."""

    flags: str
    seq: int
    data: bytes
    ack: int | None
    win: int
    opts: dict[str, Any] = field(default_factory=dict)
    at_ns: int = 0
    ip: Ip | None = None

    @property
    def end(self) -> int:
        return self.seq + len(self.data)

    def __str__(self) -> str:
        ack = "" if self.ack is None else f" ack {self.ack}"
        opts = ", ".join(f"{k} {v}" for k, v in self.opts.items())
        return f"{self.flags} {self.seq}:{self.end}{ack} win {self.win}" + (f" <{opts}>" if opts else "")


def options_bytes(text: str, iss: int = 0) -> bytes:
    """`mss 1460, ws 7, ts 1 0, sackok, sack 101:201 301:401, fo 0123, nop, eol, hex 0504...`; blocks from `iss`."""
    out = b""
    for word in (w.split() for w in text.split(",") if w.strip()):
        match word:
            case ["mss", n]:
                out += struct.pack("!BBH", 2, 4, int(n))
            case ["ws", n]:
                out += struct.pack("!BBB", 3, 3, int(n))
            case ["ts", val, ecr]:
                out += struct.pack("!BBII", 8, 10, int(val) % WRAP, int(ecr) % WRAP)
            case ["sackok"]:
                out += b"\x04\x02"
            case ["sack", *blocks]:
                edges = [(iss + int(edge)) % WRAP for block in blocks for edge in block.split(":")]
                out += struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)
            case ["fo"]:
                out += b"\x22\x02"
            case ["fo", cookie]:
                out += bytes([34, 2 + len(cookie) // 2]) + bytes.fromhex(cookie)
            case ["urg", _]:
                pass  # the header's, not an option
            case ["nop"]:
                out += b"\x01"
            case ["eol"]:
                out += b"\0"
            case ["hex", raw]:
                out += bytes.fromhex(raw)
            case _:
                raise ValueError(word)
    return out


def options_dict(raw: bytes, iss: int = 0) -> dict[str, Any]:
    """What a header's options say; asserts that they are well-formed. SACK blocks ("first:end") count from `iss`."""
    found: dict[str, Any] = {}
    while raw:
        kind = raw[0]
        if kind == 0:
            break
        if kind == 1:
            raw = raw[1:]
            continue
        size = raw[1]
        assert 2 <= size <= len(raw), "option length"
        value = raw[2:size]
        name = {2: "mss", 3: "ws", 4: "sackok", 5: "sack", 8: "ts", 34: "fo"}[kind]
        assert name not in found, f"{name} twice"
        if kind == 5:
            edges = [(e - iss) % WRAP for e in struct.unpack(f"!{len(value) // 4}I", value)]
            found[name] = tuple(f"{a}:{b}" for a, b in zip(edges[::2], edges[1::2], strict=True))
        elif kind == 8:
            found[name] = struct.unpack("!II", value)
        elif kind in (4, 34):
            found[name] = value.hex()
        else:
            found[name] = int.from_bytes(value, "big")
        raw = raw[size:]
    return found


@lru_cache
def start_for(iss: int, our_port: int, peer_port: int, address: str, seed: int) -> int:
    """The time at which this flow's initial sequence number is `iss`: it grows by one in 64 ns (RFC 6528)."""
    with Talk(start_ns=SECOND, our_port=our_port, peer_port=peer_port, address=address, seed=seed) as t:
        t.server()
        t.peer("S 0:0")
        first = t.out()[0].opts["raw_seq"]
    return SECOND + (iss - first) % WRAP * 64


class Talk(Conversation):
    """A conversation about one connection: `address`:peer_port with 192.0.2.1:our_port.

    Args:
        iss: our first sequence number, arranged by the time at which the conversation begins.
        peer_iss: the peer's.
        conns, sndbuf, rcvbuf: of the stack. config: the rest of its configuration.
    """

    def __init__(
        self,
        *,
        iss: int | None = OUR_ISS,
        peer_iss: int = PEER_ISS,
        our_port: int = PORT,
        peer_port: int = PEER_PORT,
        address: str = PEER,
        start_ns: int | None = None,
        conns: int = 64,
        sndbuf: int | None = None,
        rcvbuf: int | None = None,
        chunks: int | None = None,
        config: dict[str, Any] | None = None,
        flags: int = lib.BYPASS_F_PING | lib.BYPASS_F_RST,
        neighbours: tuple[str, ...] | None = None,
        cc: str = "reno",
        **kw: Any,
    ) -> None:
        if start_ns is None:
            start_ns = (
                SECOND if iss is None else start_for(iss, our_port, peer_port, address, kw.get("seed", 1))
            )
        super().__init__(
            flags=flags,
            start_ns=start_ns,
            config=Config(conns=conns, sndbuf=sndbuf, rcvbuf=rcvbuf, chunks=chunks, **(config or {})),
            neighbours=(address,) if neighbours is None else neighbours,
            **kw,
        )
        self.stack.cc_default(cc)
        self.our_port, self.peer_port, self.address = our_port, peer_port, address
        self.peer_iss = peer_iss
        self.iss: int | None = None
        self.listener = self.sock = -1
        self.ip_options = b""  # of the peer's packets
        self.nxt = 0  # what the peer sends next
        self.heard = 0  # what the peer acknowledges unless told otherwise
        self.win = 65535
        self.wrote = 1
        self.ts: tuple[int, int] | None = (
            None  # (our ms clock's value, last TSval of the stack): put in by peer()
        )
        self.ts_base = 1000  # the peer's first timestamp
        self._mark = self.now

    # ---- the program
    def server(self, backlog: int = 16, **options: int) -> int:
        self.listener = self.stack.socket(lib.BYPASS_STREAM)
        for name, value in options.items():
            self.stack.setopt(self.listener, getattr(lib, f"BYPASS_{name}"), value)
        self.stack.bind(self.listener, ("0.0.0.0", self.our_port))
        self.stack.listen(self.listener, backlog)
        return self.listener

    def accept(self) -> int:
        """The next connection of the listener; OSError when there is none."""
        self.sock = check(self.stack.accept(self.listener))
        return self.sock

    def client(self, **options: int) -> int:
        """Begins an active open from our_port."""
        self.sock = self.stack.socket(lib.BYPASS_STREAM)
        for name, value in options.items():
            self.stack.setopt(self.sock, getattr(lib, f"BYPASS_{name}"), value)
        self.stack.bind(self.sock, (US, self.our_port))
        assert self.stack.connect(self.sock, (self.address, self.peer_port)) == -errno.EINPROGRESS
        return self.sock

    def write(self, n: int, flags: int = 0) -> int:
        """The next n bytes of our stream; asserts that they were taken."""
        took = self.stack.send(self.sock, stream(self.wrote, self.wrote + n), flags)
        assert took == n, f"send: {took} of {n}"
        self.wrote += n
        self.settle()
        return took

    def read(self, n: int = 1 << 18, flags: int = 0) -> Any:  # type: ignore[override]
        """bytes, or -errno as an int."""
        got = self.stack.recv(self.sock, n, flags)
        self.settle()
        return got

    def option(self, name: str, value: int) -> None:
        self.stack.setopt(self.sock, getattr(lib, f"BYPASS_{name}"), value)
        self.settle()

    def shutdown(self, how: int = lib.BYPASS_SHUT_WR) -> None:
        self.stack.shutdown(self.sock, how)
        self.settle()

    def close_sock(self) -> None:
        self.stack.close_socket(self.sock)
        self.settle()

    def state(self) -> str:
        """Of this conversation's connection, also when no handle owns it any more; "" when it is gone."""
        for info in self.stack.conns():
            if (info.local[1], info.peer) == (self.our_port, (self.address, self.peer_port)):
                return info.state
        return ""

    @property
    def info(self) -> Any:
        for info in self.stack.conns():
            if (info.local[1], info.peer) == (self.our_port, (self.address, self.peer_port)):
                return info
        raise AssertionError("no connection")

    # ---- the peer
    def segment(self, spec: str, *, data: bytes | None = None, csum: int | None = None) -> bytes:
        """An IPv4 packet from the peer."""
        m = SPEC.fullmatch(spec)
        assert m, f"not a segment: {spec!r}"
        seq, end = int(m["seq"]), int(m["end"])
        if data is None:
            data = stream(seq + ("S" in m["flags"]), end + ("S" in m["flags"])) if end > seq else b""
        flags = 0
        for letter in m["flags"]:
            flags |= LETTERS[letter]
        opts = m["opts"] or ""
        if self.ts is not None and "ts" not in opts and "nots" not in opts:
            ms = (self.now - self.ts[0]) // 1_000_000
            opts = f"nop, nop, ts {self.ts_base + ms} {self.ts[1]}" + (", " + opts if opts else "")
        ack = int(m["ack"]) + (self.iss or 0) if m["ack"] is not None else 0
        if flags & ACK and m["ack"] is None:
            ack = self.heard + (self.iss or 0)
        win = self.win if m["win"] is None else int(m["win"])
        segment = tcp(
            self.address,
            US,
            self.peer_port,
            self.our_port,
            self.peer_iss + seq,
            ack,
            flags,
            win,
            data,
            options=options_bytes(opts.replace("nots", ""), self.iss or 0),
            urgent=int(pointer[1]) if (pointer := re.search(r"urg (\d+)", opts)) else 0,
            csum=csum,
        )
        return ipv4(self.address, US, TCP, segment, options=self.ip_options)

    def peer(self, *specs: str) -> None:
        """These segments arrive now, in one batch."""
        self.inject_ip(*(self.segment(s) for s in specs))
        for spec in specs:
            m = SPEC.fullmatch(spec)
            assert m
            self.nxt = max(self.nxt, int(m["end"]) + ("S" in m["flags"]) + ("F" in m["flags"]))

    def icmp(self, kind: int, code: int, seq: int, *, mtu: int = 0, port: int | None = None) -> None:
        """An ICMP error arrives that quotes eight bytes of our segment at this (relative) number."""
        quoted = tcp(
            US, self.address, port or self.our_port, self.peer_port, (self.iss or 0) + seq, 0, ACK, 0
        )
        packet = ipv4(US, self.address, TCP, quoted[:8], total=1500)
        self.inject_ip(ipv4(ROUTER, US, ICMP, icmp(kind, code, struct.pack("!HH", 0, mtu), packet)))

    # ---- what the stack sends
    def out(self) -> list[Segment]:
        """What the stack has sent to this peer since the last call; asserts that each segment is well-formed."""
        return [self.parse(frame, at) for at, frame in self.sent_at()]

    def parse(self, frame: bytes, at_ns: int = 0) -> Segment:
        packet = parse_ip(frame[14:])
        assert packet.proto == TCP
        assert packet.df
        assert not packet.mf
        raw = packet.payload
        assert checksum(pseudo(packet.src, packet.dst, TCP, len(raw)) + raw) == 0, "TCP checksum"
        sport, dport, seq, ack, offset, win, _, urgent = struct.unpack("!HHIIHHHH", raw[:20])
        assert (sport, dport) == (self.our_port, self.peer_port)
        assert offset & 0x0F00 == 0, "reserved bits"
        head = (offset >> 12) * 4
        flags = offset & 0xFF
        assert (urgent != 0) == bool(flags & URG)
        if self.iss is None or (flags & SYN and seq != self.iss):
            self.iss, self.heard = seq, 0
        opts = options_dict(raw[20:head], self.peer_iss)
        if urgent:
            opts["urg"] = urgent
        if self.ts is not None and "ts" in opts:
            self.ts = (self.ts[0], opts["ts"][0])
        if flags & SYN:
            opts["raw_seq"] = seq
        rel = (seq - self.iss + (1 << 31)) % WRAP - (1 << 31)
        rel_ack = (ack - self.peer_iss + (1 << 31)) % WRAP - (1 << 31) if flags & ACK else None
        data = raw[head:]
        if data:
            first = rel + bool(flags & SYN)
            assert data == stream(first, first + len(data)), f"payload of {rel}:{rel + len(data)}"
        if not flags & RST:
            self.heard = max(self.heard, rel + len(data) + bool(flags & SYN) + bool(flags & FIN))
        return Segment(fmt(flags), rel, data, rel_ack, win, opts, at_ns, packet)

    @staticmethod
    def differs(spec: str, got: Segment) -> str:
        """Why `got` is not what the spec says, as far as it says something; "": it is."""
        m = SPEC.fullmatch(spec)
        assert m, f"not a segment: {spec!r}"
        flags = "".join(x for x in LETTERS if x in m["flags"])
        why = []
        if got.flags != flags:
            why.append(f"flags {got.flags}")
        if (got.seq, got.end) != (int(m["seq"]), int(m["end"])):
            why.append(f"range {got.seq}:{got.end}")
        if m["ack"] is not None and got.ack != int(m["ack"]):
            why.append(f"ack {got.ack}")
        if m["win"] is not None and got.win != int(m["win"]):
            why.append(f"win {got.win}")
        if m["opts"] is not None:
            want = dict([*w.split(maxsplit=1), ""][:2] for w in m["opts"].split(", ") if w)
            have = {k: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in got.opts.items()}
            have.pop("raw_seq", None)
            if have != want:
                why.append(f"options {have}")
        return ", ".join(why)

    def match(self, got: list[Segment], specs: tuple[str, ...]) -> None:
        shown = "\n".join(f"  {(g.at_ns - self._mark) / SECOND:9.6f} {g}" for g in got)
        assert len(got) == len(specs), f"{len(got)} segments in place of {len(specs)}:\n{shown}"
        for spec, segment in zip(specs, got, strict=True):
            why = self.differs(spec, segment)
            assert not why, f"{spec!r} was to come, but {why}; all:\n{shown}"

    def hears(self, *specs: str) -> list[Segment]:
        """Exactly these segments left since the last time; returns them."""
        got = self.out()
        self.match(got, specs)
        self.mark()
        return got

    def silence(self, seconds: float = 0) -> None:
        """Nothing leaves from now for so long."""
        self.mark()
        if seconds:
            self.advance(seconds)
        self.hears()

    def mark(self) -> None:
        """Times of at() count from here."""
        self._mark = self.now

    def at(self, *timed: float | str) -> list[Segment]:
        """at(0.2, "...", 0.6, "..."): exactly these leave at these times (seconds since the last mark), and nothing
        else until then. A timer may be late by a tick of the wheel. Marks anew, at the last."""
        times = [float(t) for t in timed[::2]]
        specs = tuple(str(s) for s in timed[1::2])
        mark = self._mark
        self.advance(times[-1] + TICK * len(times) - (self.now - mark) / SECOND)
        got = self.out()
        self.match(got, specs)
        for i, (t, segment) in enumerate(zip(times, got, strict=True)):
            elapsed = (segment.at_ns - mark) / SECOND  # each may be late, and the next counts from it
            assert t - 1e-9 <= elapsed <= t + TICK * (i + 1), f"{segment} left after {elapsed} s, not {t} s"
        self._mark = got[-1].at_ns
        return got

    # ---- beginnings
    def established(
        self, *, passive: bool = True, opts: str = "mss 1460", ts: bool = False, rtt: float = 0, **o: int
    ) -> int:
        """A connection, from a passive or active open; `o`: socket options. opts: of the peer's SYN."""
        if ts:
            self.ts = (self.now, 0)
        if passive:
            self.server(**o)
            self.peer(f"S 0:0 <{opts}>")
            self.out()
            self.advance(rtt)
            self.peer(". 1:1")
            self.accept()
        else:
            self.client(**o)
            self.out()
            self.advance(rtt)
            self.peer(f"S. 0:0 <{opts}>")
            self.hears(". 1:1 ack 1")
        self.settle()
        assert self.state() == "ESTABLISHED"
        self.hears()
        self.taken(self.sock)
        self.counted()
        return self.sock

    def faults(self, **bad: int) -> None:
        """Of the device: alloc_fail_ppm, tx_short_ppm, kick_again_ppm, down, complete_ns."""
        f = ffi.new("struct sim_device_faults *", bad)
        lib.sim_port_device_faults(self.port, f)
