# SPDX-License-Identifier: Apache-2.0
"""Plays a script against a backend and judges: the first line that differs ends it.

Times: a relative time counts from when the event before really happened. What arrives and what the program calls happen
at their time; a segment has to leave within its time's range, widened by what the backend and the script tolerate. A
segment that no line expects is a difference as soon as time has passed over it, and so is one that is left at the end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import infos
from .lang import ANY, SECOND, Call, Check, Event, Icmp, Name, Script, Segment
from .packets import PEER_PORT, Flow, Heard, build, build_icmp, differs, parse, peer_port_of, stream

PEER_ISS = (1 << 32) - 1500  # so that each conversation crosses the wrap
EVER = 400 * SECOND  # how long `*` waits

CONSTANTS: dict[str, int] = {
    name: int(getattr(module, name))
    for module in (socket, select, fcntl, os)
    for name in dir(module)
    if name.isupper() and isinstance(getattr(module, name), int)
}
CONSTANTS |= {
    "SOL_TCP": 6, "SOL_IP": 0, "TCP_FASTOPEN_CONNECT": 30, "TCP_FASTOPEN": 23, "TCP_INQ": 36, "TCP_CM_INQ": 36,
    "TCP_SAVE_SYN": 27, "TCP_THIN_LINEAR_TIMEOUTS": 16, "SIOCINQ": 0x541B, "FIONREAD": 0x541B, "SIOCOUTQ": 0x5411,
    "SIOCATMARK": 0x8905, "SIOCOUTQNSD": 0x894B, "MSG_FASTOPEN": 0x20000000, "SO_MAX_PACING_RATE": 47,
}  # fmt: skip
CONSTANTS |= infos.NAMES | {name: code for code, name in errno.errorcode.items()}


class Differs(Exception):
    """What happened is not what the line says."""


class Stuck(Exception):
    """A call blocks where the script does not expect it."""


class Job(Protocol):
    """A call that was begun. result: the call's, or the OSError it ended with."""

    done: bool
    result: Any
    at_ns: int


class Backend(Protocol):
    """What is tested, with its clock (nanoseconds since the script began) and its end of the wire."""

    early_ns: int  # by how much its timers may be early or late
    late_ns: int
    late_share: float  # ... and so much of the time waited
    flaky: bool  # the clock is real: lateness of ours widens what we expect

    def now(self) -> int: ...
    def wait(self, until_ns: int) -> None: ...
    def inject(self, packet: bytes) -> int:
        """Returns when it arrived."""

    def heard(self, until_ns: int) -> tuple[int, bytes] | None:
        """The next IPv4 packet it sent, with its time; waits for it until then."""

    def unread(self, packet: tuple[int, bytes]) -> None:
        """Puts a packet back."""

    def begin(self, op: str, args: list[Any], blocks: bool) -> Job:
        """Begins a call: socket, bind, listen, accept, connect, send, recv, ...; blocks: it may take its time."""

    def finish(self, job: Any, until_ns: int) -> bool:
        """Waits until the call has returned; False: it has not until then."""

    def info(self, fd: int, name: str) -> int: ...
    def close(self) -> object: ...


@dataclass
class Socket:
    """A script's descriptor: what the backend calls it, and how far its streams are."""

    live: int
    wrote: int = 1
    read: int = 1
    inline: bool = False


@dataclass
class Verdict:
    ok: bool
    line: int = 0
    text: str = ""
    why: str = ""
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.ok:
            return "ok"
        shown = "\n".join(f"    {t}" for t in self.trace[-24:])
        return f"line {self.line}: {self.text}\n  {self.why}\n{shown}"


@dataclass
class Pending:
    event: Event
    job: Job
    end_ns: int
    call: Call
    data: int | None
    began_ns: int
    lateness: int  # of all before it


class Player:
    def __init__(self, script: Script, backend: Backend) -> None:
        self.script, self.backend = script, backend
        self.flows: dict[int, Flow] = {}
        self.sockets: dict[int, Socket] = {}
        self.last_fd = -1
        self.time = 0  # of the event before
        self.slack = 0  # how late our own events were since the last segment
        self.lateness = 0  # how late everything was, summed up
        self.pending: list[Pending] = []
        self.trace: list[str] = []
        self.own: dict[str, Any] = {}
        self.urgent: set[int] = set()
        self.peer_iss = script.number("peer_iss", PEER_ISS)
        self.tolerance = script.tolerance
        self.ignored = "P" if script.last("ignore") == "psh" else ""

    # ---- the whole
    def play(self) -> Verdict:
        event = self.script.events[0]
        try:
            for event in self.script.events:
                self.event(event)
            event = self.script.events[-1]
            for p in list(self.pending):
                event = p.event
                self.collect(p)
            event = self.script.events[-1]
            if self.backend.flaky:  # what is on its way comes
                self.backend.wait(self.backend.now() + self.backend.late_ns)
            self.nothing_waits(self.backend.now() + self.backend.late_ns + 1)
        except (Differs, Stuck, infos.CodeError) as e:
            return Verdict(False, event.line, event.text, str(e), self.trace)
        return Verdict(True, trace=self.trace)

    def note(self, at_ns: int, what: str) -> None:
        self.trace.append(f"{at_ns / SECOND:10.6f} {what}")

    def flow(self, port: int | None) -> Flow:
        port = port or PEER_PORT
        if port not in self.flows:
            self.flows[port] = Flow(port, self.peer_iss)
        return self.flows[port]

    def event(self, event: Event) -> None:
        base = self.time if event.time.relative else 0
        if isinstance(event.what, Segment) and event.what.sent:
            if event.time.lo is None or event.time.hi is None:
                self.expect(event.what, 0, max(self.time, self.backend.now()) + EVER)
            else:
                self.expect(event.what, base + event.time.lo, base + event.time.hi)
            return
        assert event.time.lo is not None
        at = base + event.time.lo
        # A call that ends at this very time may need this segment for it; but a call comes after it.
        calls = isinstance(event.what, Call | Check)
        for p in list(self.pending):
            late = self.lateness - p.lateness
            if p.end_ns + late + (0 if calls else self.backend.late_ns) > at:
                continue
            self.collect(p)
        self.backend.wait(at)
        self.nothing_waits(at)
        happened = at
        match event.what:
            case Segment() as s:
                flow = self.flow(s.port)
                packet = build(flow, s)
                if s.urg is not None and "U" in s.flags:
                    self.urgent.add(s.seq + s.urg - 1)
                happened = self.backend.inject(packet)
                self.note(happened, event.text.split(" ", 1)[1])
            case Icmp() as e:
                happened = self.backend.inject(build_icmp(self.flow(e.port), e))
                self.note(happened, event.text.split(" ", 1)[1])
            case Check(code):
                why = infos.run(code, self.info, self.own)
                if why:
                    raise Differs(why)
            case Call() as call:
                happened = self.call(event, call, at)
        if self.backend.flaky:
            self.slack += max(0, happened - at)
            self.lateness += max(0, happened - at)
            self.time = max(at, happened)
        else:
            self.time = at

    # ---- segments that leave
    def next_heard(self, until_ns: int) -> Heard | None:
        while (got := self.backend.heard(until_ns)) is not None:
            port = peer_port_of(got[1])
            if port is not None:
                heard = parse(self.flow(port), *got)
                self.note(heard.at_ns, str(heard))
                return heard
        return None

    def expect(self, want: Segment, lo: int, hi: int) -> None:
        first = lo - self.slack - self.backend.early_ns - self.tolerance
        late = self.backend.late_ns + round(self.backend.late_share * max(0, hi - self.time))
        last = hi + self.slack + late + self.tolerance
        got = self.next_heard(last + self.backend.late_ns)
        if got is None:
            raise Differs(f"nothing left until {last / SECOND:.6f}")
        ts_slack = (late + self.slack + self.tolerance) // 1_000_000 + 1
        why = differs(self.flow(got.port), want, got, ts_slack, self.ignored)
        if not why and not first <= got.at_ns <= last:
            shown = f"{lo / SECOND:.6f}" if lo == hi else f"{lo / SECOND:.6f}~{hi / SECOND:.6f}"
            why = f"it left at {got.at_ns / SECOND:.6f}, not at {shown}"
        if why:
            raise Differs(f"what left: {why}")
        self.time = max(got.at_ns, lo - self.backend.early_ns) if lo else got.at_ns
        self.slack = 0
        self.lateness += max(0, got.at_ns - hi)

    def nothing_waits(self, at_ns: int) -> None:
        """No segment left before this time that no line has asked for."""
        got = self.backend.heard(0)
        while got is not None and peer_port_of(got[1]) is None:
            got = self.backend.heard(0)
        if got is None:
            return
        if got[0] > at_ns - self.backend.late_ns and self.backend.flaky:
            self.backend.unread(got)
            return
        if got[0] >= at_ns:
            self.backend.unread(got)
            return
        port = peer_port_of(got[1])
        assert port is not None
        raise Differs(f"a segment left that was not expected: {parse(self.flow(port), *got)}")

    def info(self, name: str) -> int:
        return self.backend.info(self.socket(self.last_fd).live, name)

    # ---- calls
    def socket(self, fd: object) -> Socket:
        if not isinstance(fd, int) or fd not in self.sockets:
            raise Differs(f"no such descriptor: {fd}")
        self.last_fd = fd
        return self.sockets[fd]

    def call(self, event: Event, call: Call, at: int) -> int:
        op, args, data = self.prepare(call)
        job = self.backend.begin(op, args, event.time.end is not None)
        if event.time.end is not None:
            end = event.time.end + (at - (event.time.lo or 0) if event.time.end_relative else 0)
            self.pending.append(Pending(event, job, end, call, data, at, self.lateness))
            return self.backend.now()
        if not self.backend.finish(job, self.backend.now()):
            raise Stuck("the call blocks")
        self.note(self.backend.now(), event.text.split(" ", 1)[1])
        self.judge(call, job, data)
        return self.backend.now() if self.backend.flaky else at

    def collect(self, p: Pending) -> None:
        """A blocking call has to have returned about now."""
        self.pending.remove(p)
        b = self.backend
        share = round(b.late_share * (p.end_ns - p.began_ns))
        late = p.end_ns + b.late_ns + share + self.lateness - p.lateness + self.tolerance
        if not b.finish(p.job, late):
            raise Differs(f"the call of line {p.event.line} has not returned until {p.end_ns / SECOND:.6f}")
        self.note(p.job.at_ns, p.event.text.split(" ", 1)[1])
        if not p.end_ns - b.early_ns - self.tolerance <= p.job.at_ns <= late:
            raise Differs(
                f"the call of line {p.event.line} returned at {p.job.at_ns / SECOND:.6f}, not {p.end_ns / SECOND:.6f}"
            )
        self.judge(p.call, p.job, p.data)

    def prepare(self, call: Call) -> tuple[str, list[Any], int | None]:
        """The backend's operation, its arguments, and the count of bytes that a write moves."""
        a = call.args
        try:
            return self._prepare(call.name, a)
        except (IndexError, TypeError, ValueError) as e:
            raise infos.CodeError(f"{call.name}() with such arguments is not known here: {e}") from None

    def _prepare(self, name: str, a: tuple[Any, ...]) -> tuple[str, list[Any], int | None]:
        if name == "socket":
            return "socket", [number(a[1]) if a[1] is not ANY else socket.SOCK_STREAM], None
        if name == "poll":
            fds = [(self.socket(d["fd"]).live, number(d["events"])) for d in a[0]]
            return "poll", [fds, a[2]], None
        s = self.socket(a[0])
        match name:
            case "bind" | "accept" | "connect" | "close" | "fileno":
                return name, [s.live], None
            case "listen":
                return name, [s.live, a[1]], None
            case "shutdown":
                return name, [s.live, number(a[1])], None
            case "write":
                return "send", [s.live, stream(s.wrote, s.wrote + a[2]), 0], a[2]
            case "send":
                return "send", [s.live, stream(s.wrote, s.wrote + a[2]), number(a[3])], a[2]
            case "sendto":
                return "sendto", [s.live, stream(s.wrote, s.wrote + a[2]), number(a[3])], a[2]
            case "read":
                return "recv", [s.live, a[2], 0], None
            case "recv":
                return "recv", [s.live, a[2], number(a[3])], None
            case "fcntl":
                return "fcntl", [s.live, number(a[1]), number(a[2]) if len(a) > 2 else 0], None
            case "ioctl":
                return "ioctl", [s.live, number(a[1])], None
            case "setsockopt":
                return "setsockopt", [s.live, number(a[1]), str_name(a[2]), optval(a[3])], None
            case "getsockopt":
                shape = a[3] if isinstance(a[3], str | dict) else "int"
                return "getsockopt", [s.live, number(a[1]), str_name(a[2]), shape], None
        raise infos.CodeError(f"no such call is known here: {name}()")

    def judge(self, call: Call, job: Job, count: int | None) -> None:
        """Compares the result; moves the socket's streams."""
        result = job.result
        if isinstance(result, OSError):
            name = errno.errorcode.get(result.errno or 0, str(result.errno))
            if call.result is None:
                return
            if call.result != -1 or call.errno != name:
                raise Differs(f"{call.name}() = -1 {name}")
            return
        extra = None
        if call.name in ("read", "recv"):
            extra, result = result, len(result)
        elif call.name in ("getsockopt", "poll", "ioctl"):
            extra, result = result[1], result[0]
        if call.name in ("socket", "accept"):
            if not isinstance(call.result, int) or call.result < 0:
                raise Differs(f"{call.name}() succeeds")
            self.sockets[call.result] = Socket(result, read=self.flow(None).first)
            self.last_fd = call.result
            return
        if call.result is not None and number(call.result) != result:
            raise Differs(f"{call.name}() = {result}")
        self._after(call, result, extra)

    def _after(self, call: Call, result: int, extra: Any) -> None:
        a = call.args
        if call.name in ("write", "send", "sendto"):
            self.sockets[a[0]].wrote += result  # type: ignore[index]
        elif call.name in ("read", "recv"):
            self.check_bytes(call, extra)
        elif call.name == "setsockopt" and str_name(a[2]) == "SO_OOBINLINE":
            self.socket(a[0]).inline = bool(optval(a[3]))
        elif call.name == "getsockopt":
            want = optval(a[3])
            if want is not ANY and extra != want:
                raise Differs(f"getsockopt() gives {extra!r}")
        elif (
            call.name == "ioctl"
            and isinstance(a[2], list)
            and a[2][0] is not ANY
            and number(a[2][0]) != extra
        ):
            raise Differs(f"ioctl() gives {extra}")
        elif call.name == "poll":
            for want, have in zip(a[0], extra, strict=True):  # type: ignore[call-overload]
                if number(want.get("revents", 0)) != have:
                    raise Differs(f"poll() gives {show_poll(have)}")
        elif call.name == "close":
            del self.sockets[a[0]]  # type: ignore[arg-type]

    def check_bytes(self, call: Call, data: bytes) -> None:
        """What was read is what the peer sent, at its place; urgent bytes are not among it unless inline."""
        s = self.socket(call.args[0])
        flags = number(call.args[3]) if call.name == "recv" else 0
        if flags & socket.MSG_OOB:
            if len(data) == 1 and not any(stream(u, u + 1) == data for u in self.urgent):
                raise Differs("the urgent byte is not what was sent")
            return
        if flags & socket.MSG_TRUNC:
            s.read += len(data)
            return
        at, want = s.read, b""
        while len(want) < len(data):
            if at not in self.urgent or s.inline:
                want += stream(at, at + 1)
            at += 1
        if data != want:
            raise Differs(f"the {len(data)} bytes read are not those the peer sent at {s.read}")
        if not flags & socket.MSG_PEEK:
            s.read = at


def number(value: object) -> int:
    """A value of the script as the kernel's number."""
    if isinstance(value, int):
        return value
    if isinstance(value, Name):
        total = 0
        for word in value.text.split("|"):
            if word not in CONSTANTS:
                raise infos.CodeError(f"no such constant is known here: {word}")
            total |= CONSTANTS[word]
        return total
    raise infos.CodeError(f"a number expected, not {value!r}")


def str_name(value: object) -> str:
    if not isinstance(value, Name):
        raise infos.CodeError(f"an option's name expected, not {value!r}")
    return value.text


def optval(value: object) -> Any:
    """[n] -> n; a string and a {} as they are, with numbers."""
    match value:
        case [single] if single is ANY:
            return ANY
        case [single]:
            return number(single)
        case dict():
            return {k: number(v) for k, v in value.items()}
        case str():
            return value
        case _ if value is ANY:
            return ANY
    raise infos.CodeError(f"no value of an option: {value!r}")


def show_poll(mask: int) -> str:
    names = [
        n for n in ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLRDHUP") if mask & CONSTANTS[n]
    ]
    return "|".join(names) or "0"
