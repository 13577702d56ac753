# SPDX-License-Identifier: Apache-2.0
"""Segments of a script to IPv4 packets and back, relative numbers to real ones.

Both sides' numbers count from their SYN, which is 0; the first byte is 1. A flow remembers what the relative numbers
stand for. Byte n of either direction has a value of its own (`stream`), so payloads are checked without being written
down.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from wire import ACK, FIN, ICMP, PSH, RST, SYN, TCP, URG, checksum, icmp, ipv4, parse_ip, pseudo, tcp

from .lang import ANY, CODES, Icmp, Option, Segment

WRAP = 1 << 32
US, PEER, ROUTER = "192.0.2.1", "192.0.2.2", "192.0.2.254"
PORT, PEER_PORT = 8080, 40000
ECE, CWR, AE = 64, 128, 256
LETTERS = {"S": SYN, "F": FIN, "R": RST, "P": PSH, "U": URG, "E": ECE, "W": CWR, "A": AE, ".": ACK}
ECN_BITS = {"noecn": 0, "ect1": 1, "ect0": 2, "ce": 3}
ECN_NAMES = {v: k for k, v in ECN_BITS.items()}
KINDS = {"unreachable": 3, "source_quench": 4, "time_exceeded": 11, "parameter_problem": 12}
# Byte i is i * 31 + (i >> 8) * 17 + (i >> 16), modulo 256; 256 bytes at a time.
SHIFTS = [bytes((byte + by) & 0xFF for byte in range(256)) for by in range(256)]
LINE = bytes(i * 31 & 0xFF for i in range(256))
PATTERN = b"".join(LINE.translate(SHIFTS[(i * 17 + (i >> 8)) & 0xFF]) for i in range(1 << 12))


def stream(first: int, end: int) -> bytes:
    """Bytes first..end-1 of either direction's stream, repeating after 1 MiB; the one behind the SYN is number 1."""
    n = len(PATTERN)
    out = b""
    while first < end:
        at = first % n
        piece = PATTERN[at : at + end - first]
        out, first = out + piece, first + len(piece)
    return out


def signed(value: int) -> int:
    """A difference of sequence numbers."""
    return (value + (1 << 31)) % WRAP - (1 << 31)


@dataclass
class Flow:
    """What relative numbers of one connection (by the peer's port) stand for."""

    peer_port: int
    peer_iss: int
    iss: int = 0
    ts_offset: int | None = None  # what the tested side's clock shows more than the script's
    ts_live: dict[int, int] = field(default_factory=dict)  # a TSval of the script: the real one
    cookie: bytes = b""
    first: int = 1  # number of the peer's first byte


@dataclass(frozen=True)
class Heard:
    """A segment that what is tested sent; numbers relative."""

    at_ns: int
    port: int
    flags: str
    seq: int
    data: bytes
    ack: int | None
    win: int
    urg: int | None
    options: tuple[Option, ...]
    ecn: str
    broken: str = ""  # what is wrong with it, whatever the script says

    @property
    def end(self) -> int:
        return self.seq + len(self.data)

    def __str__(self) -> str:
        ack = "" if self.ack is None else f" ack {self.ack}"
        urg = "" if self.urg is None else f" urg {self.urg}"
        options = f" <{show_options(self.options)}>" if self.options else ""
        mark = "" if self.ecn == "noecn" else f"[{self.ecn}] "
        port = "" if self.port == PEER_PORT else f"[port {self.port}] "
        return f"> {port}{mark}{self.flags} {self.seq}:{self.end}({len(self.data)}){ack} win {self.win}{urg}{options}"


def show_options(options: tuple[Option, ...]) -> str:
    words = []
    for o in options:
        match o.kind, o.value:
            case "TS", (val, ecr):
                words.append(f"TS val {val} ecr {ecr}")
            case "sack", tuple() as blocks:
                words.append("sack " + " ".join(f"{a}:{b}" for a, b in blocks))
            case kind, bytes() as raw:
                words.append(f"{kind} {raw.hex()}".strip())
            case kind, None:
                words.append(kind)
            case kind, value:
                words.append(f"{kind} {value}")
    return ",".join(words)


# ---- Out of the script --------------------------------------------------------------------------------------------
def _options(flow: Flow, options: tuple[Option, ...]) -> bytes:
    out = b""
    for o in options:
        match o.kind, o.value:
            case "nop", _:
                out += b"\x01"
            case "eol", _:
                out += b"\0"
            case "sackOK", _:
                out += b"\x04\x02"
            case "mss", int(n):
                out += struct.pack("!BBH", 2, 4, n)
            case "wscale", int(n):
                out += struct.pack("!BBB", 3, 3, n)
            case "TS", (int(val), int(ecr)):
                live = flow.ts_live.get(ecr, ecr + (flow.ts_offset or 0) if ecr else 0)
                out += struct.pack("!BBII", 8, 10, val % WRAP, live % WRAP)
            case "sack", tuple() as blocks:
                out += struct.pack("!BB", 5, 2 + 8 * len(blocks))
                for left, right in blocks:
                    out += struct.pack("!II", (flow.iss + left) % WRAP, (flow.iss + right) % WRAP)
            case "FO", bytes() as cookie:
                out += struct.pack("!BB", 34, 2 + len(cookie)) + cookie
            case "FO", _:
                out += struct.pack("!BB", 34, 2 + len(flow.cookie)) + flow.cookie
            case "raw", bytes() as raw:
                out += raw
            case _:
                raise AssertionError(o)
    return out


def build(flow: Flow, s: Segment) -> bytes:
    """The IPv4 packet of a segment that arrives."""
    flags = sum(LETTERS[letter] for letter in set(s.flags))
    if flags & SYN:
        flow.first = s.seq + 1
    begin = s.seq + bool(flags & SYN)
    data = stream(begin, begin + s.end - s.seq)
    ack = flow.iss + s.ack if s.ack is not None else 0
    segment = tcp(
        PEER, US, flow.peer_port, PORT, flow.peer_iss + s.seq, ack, flags, 65535 if s.win is None else s.win, data,
        options=_options(flow, s.options or ()), urgent=s.urg or 0,
    )  # fmt: skip
    return ipv4(PEER, US, TCP, segment, tos=ECN_BITS[s.ecn or "noecn"])


def build_icmp(flow: Flow, e: Icmp) -> bytes:
    """The packet of an ICMP error that quotes the IP header and eight bytes (RFC 792)."""
    segment = tcp(US, PEER, PORT, flow.peer_port, flow.iss + e.seq, 0, ACK, 0)
    quoted = ipv4(US, PEER, TCP, segment[:8], total=40 + e.end - e.seq)
    code = CODES[e.kind].index(e.code)
    return ipv4(ROUTER, US, ICMP, icmp(KINDS[e.kind], code, struct.pack("!HH", 0, e.mtu or 0), quoted))


# ---- Off the wire -------------------------------------------------------------------------------------------------
def parse_options(flow: Flow, raw: bytes) -> tuple[tuple[Option, ...], str]:
    """The options, without padding, and what is wrong with them."""
    found: list[Option] = []
    while raw and raw[0] != 0:
        if raw[0] == 1:
            raw = raw[1:]
            continue
        if len(raw) < 2 or not 2 <= raw[1] <= len(raw):
            return tuple(found), "an option's length is wrong"
        kind, value = raw[0], raw[2 : raw[1]]
        raw = raw[raw[1] :]
        match kind, len(value):
            case 2, 2:
                found.append(Option("mss", int.from_bytes(value, "big")))
            case 3, 1:
                found.append(Option("wscale", value[0]))
            case 4, 0:
                found.append(Option("sackOK"))
            case 5, n if n % 8 == 0 and n:
                edges = [
                    signed(int.from_bytes(value[i : i + 4], "big") - flow.peer_iss) for i in range(0, n, 4)
                ]
                found.append(Option("sack", tuple(zip(edges[::2], edges[1::2], strict=True))))
            case 8, 8:
                found.append(Option("TS", struct.unpack("!II", value)))
            case 34, _:
                found.append(Option("FO", value))
            case _:
                found.append(Option("raw", bytes([kind, len(value) + 2]) + value))
    return tuple(found), ""


def peer_port_of(packet: bytes) -> int | None:
    """The peer's port of a TCP packet from us to it; None: something else, which is nobody's concern here."""
    if packet[0] >> 4 != 4 or packet[9] != TCP:
        return None
    head = (packet[0] & 15) * 4
    sport, dport = struct.unpack("!HH", packet[head : head + 4])
    return int(dport) if sport == PORT else None


def parse(flow: Flow, at_ns: int, raw: bytes) -> Heard:
    """A packet to the peer; learns our first sequence number from a SYN."""
    packet = parse_ip(raw)
    body = packet.payload
    _, dport, seq, ack, word, win, _, urgent = struct.unpack("!HHIIHHHH", body[:20])
    head, flags = (word >> 12) * 4, word & 0x1FF
    if flags & SYN and seq != flow.iss:
        flow.iss = seq
        flow.ts_offset, flow.ts_live = None, {}
    options, broken = parse_options(flow, body[20:head])
    data = body[head:]
    rel = signed(seq - flow.iss)
    begin = rel + bool(flags & SYN)
    if checksum(pseudo(packet.src, packet.dst, TCP, len(body)) + body):
        broken = "the checksum is wrong"
    elif data and data != stream(begin, begin + len(data)):
        broken = "the payload is not what was written"
    return Heard(
        at_ns,
        dport,
        "".join(letter for letter, bit in LETTERS.items() if flags & bit),
        rel,
        data,
        signed(ack - flow.peer_iss) if flags & ACK else None,
        win,
        urgent if flags & URG else None,
        options,
        ECN_NAMES[packet.tos & 3],
        broken,
    )


def differs(flow: Flow, want: Segment, got: Heard, ts_slack: int, ignored: str = "") -> str:
    """Why `got` is not what the script says, as far as it says something; "": it is. Learns timestamps and cookies.

    ts_slack: milliseconds by which a timestamp may be off. ignored: flags that do not matter.
    """
    why = [got.broken] if got.broken else []
    if got.port != (want.port or PEER_PORT):
        why.append(f"to port {got.port}")
    if set(got.flags) - set(ignored) != set(want.flags) - set(ignored):
        why.append(f"flags {got.flags}")
    if (got.seq, got.end) != (want.seq, want.end):
        why.append(f"{got.seq}:{got.end}({len(got.data)})")
    if got.ack != want.ack:
        why.append("no ack" if got.ack is None else f"ack {got.ack}")
    if want.win is not None and got.win != want.win:
        why.append(f"win {got.win}")
    if want.urg is not None and got.urg != want.urg:
        why.append(f"urg {got.urg}")
    if want.ecn is not None and got.ecn != want.ecn:
        why.append(f"[{got.ecn}]")
    for o in got.options:
        if o.kind == "FO" and isinstance(o.value, bytes) and o.value:
            flow.cookie = o.value
    if want.options is not None and not _same_options(flow, want.options, got.options, ts_slack):
        why.append(f"<{show_options(got.options)}>")
    return ", ".join(why)


def _same_options(flow: Flow, want: tuple[Option, ...], got: tuple[Option, ...], ts_slack: int) -> bool:
    """Order and padding are the sender's choice."""
    want = tuple(o for o in want if o.kind not in ("nop", "eol"))
    if sorted(o.kind for o in want) != sorted(o.kind for o in got):
        return False
    by_kind = {o.kind: o.value for o in got}
    for o in want:
        have = by_kind[o.kind]
        if o.kind == "TS":
            assert isinstance(o.value, tuple)
            assert isinstance(have, tuple)
            (val, ecr), (live, have_ecr) = o.value, have
            if ecr is not ANY and ecr != have_ecr:
                return False
            if val is ANY:
                continue
            if flow.ts_offset is None:
                flow.ts_offset = live - val
            if abs(signed(live - flow.ts_offset - val)) > ts_slack:
                return False
            flow.ts_live[val] = live
        elif o.value is not ANY and o.value != have:
            return False
    return True
