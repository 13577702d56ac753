# SPDX-License-Identifier: Apache-2.0
"""The language of scripts: packetdrill's, read into events. Nothing is executed here.

A file is a header of comments and one event a line: a time and then a system call, a segment that arrives (<), a
segment that has to leave (>), an ICMP error that arrives, or a block %{ ... }% of assertions. What is not understood
is a ScriptError that names file, line and column.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import NoReturn

SECOND = 1_000_000_000


class ScriptError(Exception):
    """Unknown syntax: file:line:column: what."""

    def __init__(self, where: str, line: int, column: int, what: str) -> None:
        super().__init__(f"{where}:{line}:{column}: {what}")
        self.line, self.column = line, column


# ---- What a script consists of ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Time:
    """lo..hi nanoseconds, counted from the start or (relative) from the event before; lo None: any time (`*`).

    end: when a call that blocks has to return, counted alike.
    """

    lo: int | None
    hi: int | None = None
    relative: bool = False
    end: int | None = None
    end_relative: bool = False


@dataclass(frozen=True)
class Name:
    """A constant, or several: `POLLIN|POLLOUT`."""

    text: str


ANY = Ellipsis


@dataclass(frozen=True)
class Call:
    """A system call. args: int, str, Name, list, dict or ANY (`...`); result None: not looked at."""

    name: str
    args: tuple[object, ...]
    result: int | Name | None
    errno: str | None = None


@dataclass(frozen=True)
class Option:
    """A TCP option. value: per kind; None where it has none, ANY for `*`."""

    kind: str
    value: object = None


@dataclass(frozen=True)
class Segment:
    """Sequence numbers count from the sender's SYN; options None: any (`<...>`)."""

    sent: bool  # by what is tested
    flags: str
    seq: int
    end: int
    ack: int | None
    win: int | None
    urg: int | None
    options: tuple[Option, ...] | None
    ecn: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Icmp:
    """An ICMP error about our segment seq..end."""

    kind: str
    code: str
    mtu: int | None
    seq: int
    end: int
    port: int | None = None


@dataclass(frozen=True)
class Check:
    """The code of a %{ }% block."""

    code: str


@dataclass(frozen=True)
class Event:
    line: int
    text: str
    time: Time
    what: Call | Segment | Icmp | Check


@dataclass(frozen=True)
class Script:
    path: Path
    events: tuple[Event, ...]
    promise: str
    directives: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """topic/name, without suffix."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def tolerance(self) -> int:
        """Nanoseconds that a segment may be early or late beyond what the backend needs itself."""
        text = self.last("tolerance", "0ms")
        m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|us)", text)
        if not m:
            raise ScriptError(str(self.path), 1, 1, f"tolerance: {text!r} is no time such as 10ms")
        return int(Decimal(m[1]) * {"us": 1000, "ms": 1_000_000, "s": SECOND}[m[2]])

    def last(self, directive: str, default: str = "") -> str:
        return self.directives.get(directive, [default])[-1]

    def number(self, directive: str, default: int) -> int:
        return int(self.last(directive, str(default)))


DIRECTIVES = ("tolerance", "kernel", "stack", "cc", "mtu", "peer_iss", "ignore")

# ---- Reading ------------------------------------------------------------------------------------------------------
LEADING = re.compile(r"\s*(?://|\#)(.*)")
DIRECTIVE = re.compile(r"\s*([a-z_]+):\s*(.+?)\s*$")
FLAGS = re.compile(r"(?=[SFRPUEW.])([SFRPUEWA]*\.?)(?=\s)")
CODES = {
    "unreachable": (
        "net_unreachable", "host_unreachable", "protocol_unreachable", "port_unreachable", "frag_needed",
        "source_route_failed", "net_unknown", "host_unknown", "host_isolated", "net_prohibited", "host_prohibited",
        "net_unreachable_for_tos", "host_unreachable_for_tos", "packet_filtered", "precedence_violation",
        "precedence_cutoff",
    ),
    "time_exceeded": ("exceeded_in_transit", "exceeded_reassembly"),
    "source_quench": ("",),
    "parameter_problem": ("",),
}  # fmt: skip
ECN = ("ect0", "ect1", "ce", "noecn")


class Reader:
    """One event's text, read from left to right."""

    def __init__(self, where: str, line: int, text: str) -> None:
        self.where, self.line, self.text, self.at = where, line, text, 0
        self.skip()

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        before = self.text[:at]
        line = self.line + before.count("\n")
        column = at - (before.rfind("\n") + 1) + 1
        raise ScriptError(self.where, line, column, what)

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def rest(self) -> str:
        return self.text[self.at :]

    def done(self) -> bool:
        return self.at >= len(self.text)

    def take(self, literal: str) -> bool:
        """The literal, if it comes next."""
        if not self.text.startswith(literal, self.at):
            return False
        if literal[-1].isalnum() and re.match(r"\w", self.text[self.at + len(literal) :]):
            return False
        self.at += len(literal)
        self.skip()
        return True

    def need(self, literal: str) -> None:
        if not self.take(literal):
            self.fail(f"{literal!r} expected{self.found()}")

    def found(self) -> str:
        m = re.match(r"\S+", self.rest())
        return f", not {m[0]!r}" if m else ", not the end of the line"

    def match(self, pattern: str, what: str) -> str:
        m = re.compile(pattern).match(self.text, self.at)
        if not m:
            self.fail(f"{what} expected{self.found()}")
        self.at = m.end()
        self.skip()
        return m[0]

    def integer(self, what: str = "a number") -> int:
        return int(self.match(r"-?(0x[0-9a-fA-F]+|\d+)", what), 0)

    # ---- times
    def seconds(self) -> int:
        return int(Decimal(self.match(r"\d+(\.\d+)?|\.\d+", "a time in seconds")) * SECOND)

    def time(self) -> Time:
        if self.take("*"):
            return Time(None)
        relative = self.take("+")
        lo = self.seconds()
        if self.take("~"):
            if self.take("+") and not relative:
                self.fail("a range is absolute or relative at both ends")
            hi = self.seconds()
            if hi < lo:
                self.fail("the range ends before it begins")
            return Time(lo, hi, relative)
        if self.take("..."):
            plus = self.take("+")
            return Time(lo, lo, relative, self.seconds(), plus or relative)
        return Time(lo, lo, relative)

    # ---- calls
    def value(self) -> object:
        if self.take("..."):
            return ANY
        if self.take("["):
            items: list[object] = []
            while not self.take("]"):
                if items:
                    self.need(",")
                items.append(self.value())
            return items
        if self.take("{"):
            fields: dict[str, object] = {}
            while not self.take("}"):
                if fields:
                    self.need(",")
                key = self.match(r"\w+", "a field's name")
                self.need("=")
                fields[key] = self.value()
            return fields
        if self.rest().startswith('"'):
            return self.match(r'"[^"\n]*"', "a string")[1:-1]
        if re.match(r"-?\d", self.rest()):
            return self.integer()
        return Name(self.match(r"[A-Z_][A-Z0-9_]*(\s*\|\s*[A-Z_][A-Z0-9_]*)*", "a value").replace(" ", ""))

    def call(self) -> Call:
        name = self.match(r"[a-z]\w*(?=\s*\()", "a system call, a segment or a block")
        self.need("(")
        args: list[object] = []
        while not self.take(")"):
            if args:
                self.need(",")
            args.append(self.value())
        self.need("=")
        if self.take("?"):
            return Call(name, tuple(args), None)
        if re.match(r"-?\d", self.rest()):
            result: int | Name = self.integer()
        else:
            result = Name(self.match(r"[A-Z_|]+", "a result"))
        errno = None
        if result == -1:
            errno = self.match(r"E[A-Z0-9]+", "the name of an error")
            if self.rest().startswith("("):
                self.match(r"\([^)]*\)", "what the error says")
        return Call(name, tuple(args), result, errno)

    # ---- packets
    def range(self) -> tuple[int, int]:
        at = self.at
        seq = self.integer("a sequence number")
        self.need(":")
        end = self.integer("a sequence number")
        self.need("(")
        length = self.integer("a length")
        self.need(")")
        if end - seq != length:
            self.fail(f"{seq}:{end} are {end - seq} bytes, not {length}", at)
        return seq, end

    def marks(self) -> tuple[str | None, int | None]:
        ecn = port = None
        while self.take("["):
            if self.take("port"):
                port = self.integer("a port")
            else:
                at = self.at
                ecn = self.match(r"\w+", "ect0, ect1, ce, noecn or port N")
                if ecn not in ECN:
                    self.fail(f"ect0, ect1, ce, noecn or port N expected, not {ecn!r}", at)
            self.need("]")
        return ecn, port

    def packet(self, sent: bool) -> Segment | Icmp:
        ecn, port = self.marks()
        if self.take("icmp"):
            if sent:
                self.fail("only ICMP errors that arrive are known: <", 0)
            return self.icmp(port)
        flags = self.match(FLAGS.pattern, "the flags of a segment (S F R P U E W and . for ACK)")
        seq, end = self.range()
        ack = self.integer() if self.take("ack") else None
        if ("." in flags) != (ack is not None):
            self.fail("the flag . and `ack N` belong together")
        win = self.integer() if self.take("win") else None
        urg = self.integer() if self.take("urg") else None
        options: tuple[Option, ...] | None = ()
        if self.take("<"):
            options = self.options(sent)
        return Segment(sent, flags, seq, end, ack, win, urg, options, ecn, port)

    def icmp(self, port: int | None) -> Icmp:
        at = self.at
        kind = self.match(r"\w+", "a kind of ICMP error")
        if kind not in CODES:
            self.fail(f"no ICMP error that is known here: {kind!r}", at)
        code = ""
        if CODES[kind] != ("",):
            at = self.at
            code = self.match(r"\w+", "a code")
            if code not in CODES[kind]:
                self.fail(f"no code of {kind}: {code!r}", at)
        mtu = self.integer() if self.take("mtu") else None
        self.need("[")
        seq, end = self.range()
        self.need("]")
        return Icmp(kind, code, mtu, seq, end, port)

    def options(self, sent: bool) -> tuple[Option, ...] | None:
        if self.take("..."):
            if not sent:
                self.fail("a segment that arrives needs its options written down")
            self.need(">")
            return None
        out: list[Option] = []
        while not self.take(">"):
            if out:
                self.need(",")
            out.append(self.option(sent))
        return tuple(out)

    def number_or_any(self, sent: bool) -> object:
        if sent and self.take("*"):
            return ANY
        return self.integer()

    def option(self, sent: bool) -> Option:
        at = self.at
        word = self.match(r"[A-Za-z]+", "an option")
        if word in ("nop", "eol", "sackOK"):
            return Option(word)
        if word in ("mss", "wscale"):
            return Option(word, self.number_or_any(sent))
        if word == "TS":
            self.need("val")
            val = self.number_or_any(sent)
            self.need("ecr")
            return Option("TS", (val, self.number_or_any(sent)))
        if word == "sack":
            blocks = []
            while re.match(r"-?\d", self.rest()):
                left = self.integer()
                self.need(":")
                blocks.append((left, self.integer()))
            return Option("sack", tuple(blocks))
        if word == "FO":
            if self.take("TFO_COOKIE") or (sent and self.take("*")):
                return Option("FO", ANY)
            if re.match(r"[,>]", self.rest()):
                return Option("FO", b"")
            return Option("FO", bytes.fromhex(self.match(r"([0-9a-f]{2})+", "a cookie in hexadecimal")))
        if word == "raw":
            return Option("raw", bytes.fromhex(self.match(r"([0-9a-f]{2})+", "bytes in hexadecimal")))
        return self.fail(f"no option that is known here: {word!r}", at)

    def event(self) -> Event:
        text = " ".join(self.text.split())
        time = self.time()
        what: Call | Segment | Icmp | Check
        if self.take("%{"):
            begin = self.text.index("%{") + 2
            end = self.text.index("}%")
            what = Check(self.text[begin:end].strip())
            self.at = end + 2
            self.skip()
        elif self.take("<"):
            what = self.packet(False)
        elif self.take(">"):
            what = self.packet(True)
        else:
            what = self.call()
        if not self.done():
            self.fail(f"the end of the line expected{self.found()}")
        sends = isinstance(what, Segment) and what.sent
        if (time.lo is None or time.hi != time.lo) and not sends:
            self.fail("a range or any time is for segments that leave: >", 0)
        if time.end is not None and not isinstance(what, Call):
            self.fail("only a call may take time", 0)
        return Event(self.line, text, time, what)


def _bare(line: str, inside: bool) -> tuple[str, bool]:
    """The line without comments (their place is filled with spaces). inside: a /* */ began before it."""
    out, i = "", 0
    while i < len(line):
        if inside:
            end = line.find("*/", i)
            stop = len(line) if end < 0 else end + 2
            out, i, inside = out + " " * (stop - i), stop, end < 0
        elif line[i] == '"':
            end = line.find('"', i + 1)
            stop = len(line) if end < 0 else end + 1
            out, i = out + line[i:stop], stop
        elif line.startswith("/*", i):
            inside = True
        elif line.startswith("//", i) or line[i] == "#":
            break
        else:
            out, i = out + line[i], i + 1
    return out.rstrip(), inside


def parse(text: str, path: Path | str = "script") -> Script:
    """Reads a script. ScriptError."""
    path = Path(path)
    where = str(path)
    lines = text.splitlines()
    directives: dict[str, list[str]] = {}
    promise: list[str] = []
    events: list[Event] = []
    inside, n = False, 0
    while n < len(lines):
        line, number = lines[n], n + 1
        n += 1
        comment = LEADING.match(line)
        if comment and not events:
            said = DIRECTIVE.match(comment[1])
            if said and said[1] in DIRECTIVES:
                directives.setdefault(said[1], []).append(said[2])
            elif "SPDX-" not in line:
                promise.append(comment[1].strip())
            continue
        bare, inside = _bare(line, inside)
        if not bare.strip():
            continue
        if "%{" in bare:
            bare = line  # a # inside the block is the block's
            while "}%" not in bare:
                if n == len(lines):
                    raise ScriptError(where, number, line.index("%{") + 1, "the block has no end: }%")
                bare += "\n" + lines[n]
                n += 1
            code_end = bare.index("}%") + 2
            bare = bare[:code_end] + _bare(bare[code_end:], False)[0]
        events.append(Reader(where, number, bare).event())
    if not events:
        raise ScriptError(where, 1, 1, "no event in it")
    return Script(path, tuple(events), "\n".join(promise).strip(), directives)


def load(path: Path) -> Script:
    return parse(path.read_text(), path)
