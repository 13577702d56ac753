# SPDX-License-Identifier: Apache-2.0
"""Applications and their sockets, seen from outside: found in /proc, read from their memory without their help.

An application's memory (bypass/app/app.h) is an open file of each of its processes, so who may look into these, root
and the same user, can read it. What stands in it is the application's to write: a forked child without privileges
reads it (bypass/app/inspect.c) and tells what it found in a few lines of JSON, which are checked. A child that crashes,
or takes too long, is an application whose memory is damaged.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import math
import mmap
import os
import resource
import select
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bypass import procfs
from bypass._core import ffi, lib
from bypass.core import address_text

__all__ = ["Application", "Memory", "Socket", "look", "memories", "namespace_of", "which"]

NOBODY = 65534
TIME_S = 10.0  # for reading one application: 19,000 connections take a quarter of a second
TRIES = 3  # to open what processes move about
OUTPUT = 64 << 20  # bytes that the child may tell
MAGIC: int = lib.APP_MAGIC
PLACES = ("undecided", "stack", "kernel", "both")  # enum place of preload/group.h
STATES = {
    lib.BYPASS_ESTABLISHED: "ESTAB",
    lib.BYPASS_SYN_SENT: "SYN-SENT",
    lib.BYPASS_SYN_RECEIVED: "SYN-RECV",
    lib.BYPASS_FIN_WAIT_1: "FIN-WAIT-1",
    lib.BYPASS_FIN_WAIT_2: "FIN-WAIT-2",
    lib.BYPASS_TIME_WAIT: "TIME-WAIT",
    lib.BYPASS_CLOSED: "UNCONN",
    lib.BYPASS_CLOSE_WAIT: "CLOSE-WAIT",
    lib.BYPASS_LAST_ACK: "LAST-ACK",
    lib.BYPASS_LISTEN: "LISTEN",
    lib.BYPASS_CLOSING: "CLOSING",
}  # as ss(8) names them
DEVICES = {lib.APP_DEV_LOOP: "loopback", lib.APP_DEV_AFXDP: "direct", lib.APP_DEV_PORT: "shared"}
Place = Literal["undecided", "stack", "kernel", "both"]


class Model(BaseModel):
    """Read by people, on terminals: whoever tells it, text is printable."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="after")
    def _printable(self) -> Self:
        for name, value in self:
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{name} is not printable")
        return self


class Socket(Model):
    """One socket of the program, or a connection of the stack that no program holds (pid and fd are None).

    Attributes:
        place: whose it is; both: what is steered comes by the stack, the rest by the kernel.
        why: for the kernel's: the reason; else a note, or empty.
        state: as ss(8) names it; UNCONN for datagrams without a peer.
        local, peer: "address:port"; empty: none, or not known.
        recv_queue, send_queue: bytes; of a listener: connections that wait, and how many may.
        rtt_us, cwnd, retransmits, congestion: of a connection of the stack; cwnd in segments. None elsewhere.
        error: what is wrong with the memory where it should be; empty: nothing.
    """

    pid: int | None
    fd: int | None
    descriptors: int
    proto: Literal["tcp", "udp", "other"]
    place: Place
    why: str
    state: str = ""
    local: str = ""
    peer: str = ""
    recv_queue: int = 0
    send_queue: int = 0
    rtt_us: int | None = None
    cwnd: int | None = None
    retransmits: int | None = None
    congestion: str = ""
    error: str = ""


class Summary(Model):
    """What the memory says of the application as a whole."""

    app: int
    name: str
    device: str
    interface: str
    dead: bool
    processes: int
    pids: list[int]
    tcp_stack: int
    tcp_kernel: int
    udp_stack: int
    udp_kernel: int


class Application(Model):
    """One application.

    Attributes:
        netns: its network namespace's inode, as /proc/PID/ns/net has it; None: not known.
        error: its memory could not be read, or not to its end; the rest is what could.
    """

    holders: list[int]
    uid: int
    netns: int | None = None
    summary: Summary | None = None
    sockets: list[Socket] = []
    error: str = ""


# ---- Finding ---------------------------------------------------------------------------------------------------
File = tuple[int, int]
"""st_dev and st_ino: a file's identity, as long as somebody has it open."""


@dataclass
class Memory:
    """An application's memory file. path: below /proc, where it was; holders: processes that have it open."""

    path: Path
    file: File
    uid: int
    holders: list[int] = field(default_factory=list)


def which(info: os.stat_result) -> File:
    return info.st_dev, info.st_ino


@contextmanager
def _held(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """What is there now, and stays what it is while it is held, without being opened: the process may have put a
    socket, a pipe or a device in a file's place. One of procfs.GONE: nothing is, or it is not ours to see."""
    held = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield held, os.fstat(held)
    finally:
        os.close(held)


def _opened(held: int, info: os.stat_result) -> int | None:
    """For reading, what begins as an application's memory. None: it does not."""
    if not stat.S_ISREG(info.st_mode) or info.st_size < lib.APP_HEADER_SIZE:
        return None
    fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
    if int.from_bytes(os.pread(fd, 4, 0), "little") == MAGIC:
        return fd
    os.close(fd)
    return None


def memories() -> list[Memory]:
    """Those of the processes that this one may look into."""
    found: dict[File, Memory | None] = {}
    for pid in procfs.pids():
        for path, target in procfs.descriptors(pid):
            if target.startswith("/memfd:"):
                with suppress(*procfs.GONE):
                    _note(pid, path, found)
    return [m for m in found.values() if m]


def _note(pid: int, path: Path, found: dict[File, Memory | None]) -> None:
    with _held(path) as (held, info):
        file = which(info)
        if file not in found:
            fd = _opened(held, info)
            found[file] = None if fd is None else Memory(path, file, info.st_uid)
            if fd is not None:
                os.close(fd)
    memory = found[file]
    if memory and pid not in memory.holders:
        memory.holders.append(pid)


def _open(memory: Memory) -> int:
    """Opens what was found, and nothing else that may have come in its place. Where it is there no more it is looked
    for again: a process may move it, or end and leave it to a child.

    Raises:
        ProcessLookupError: no process has it open.
    """
    for _ in range(TRIES):
        with suppress(*procfs.GONE), _held(memory.path) as (held, info):
            if which(info) == memory.file and (fd := _opened(held, info)) is not None:
                return fd
        again = next((m for m in memories() if m.file == memory.file), None)
        if again is None:
            break
        memory.path, memory.holders = again.path, again.holders
    raise ProcessLookupError(errno.ESRCH, "no process has this memory any more", str(memory.path))


# ---- Reading: the child ------------------------------------------------------------------------------------------
def _text(raw: Any) -> str:
    """Printable, whatever stands there: it goes to a terminal."""
    text = bytes(ffi.string(raw)).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def _endpoint(e: Any) -> str:
    address = address_text(bytes(e.addr.b))
    if not e.port and address in ("0.0.0.0", "::"):
        return ""
    return f"[{address}]:{e.port}" if ":" in address else f"{address}:{e.port}"


def _of_stack(told: Any) -> dict[str, Any]:
    """What the stack knows of one."""
    info, stream = told.info, told.type == lib.BYPASS_STREAM
    state = STATES.get(info.state, "?")
    row: dict[str, Any] = {
        "state": state,
        "local": _endpoint(info.local),
        "peer": _endpoint(info.peer),
        "recv_queue": info.rcv_queued,
        "send_queue": info.snd_queued,
    }
    if stream and state not in ("LISTEN", "UNCONN"):
        row |= {
            "rtt_us": info.srtt_us,
            "cwnd": info.cwnd // max(info.snd_mss, 1),
            "retransmits": info.retransmits,
        }
    if stream:
        row["congestion"] = _text(told.congestion)
    return row


def _socket(s: Any) -> dict[str, Any]:
    place = PLACES[s.place]
    more = _text(s.why)
    reason = _text(lib.app_reason(s.reason)) if place == "kernel" else ""
    row: dict[str, Any] = {
        "pid": s.pid,
        "fd": s.fd,
        "descriptors": s.refs,
        "proto": {lib.BYPASS_STREAM: "tcp", lib.BYPASS_DGRAM: "udp"}.get(s.type, "other"),
        "place": place,
        "why": ": ".join(part for part in (reason, more) if part),
    }
    if s.told == 1 and place != "undecided":
        row |= _of_stack(s.stack)
    elif s.told < 0:
        row["error"] = "its place on the stack is damaged"
    return row


def _summary(s: Any) -> dict[str, Any]:
    return {
        "app": s.app,
        "name": _text(s.name),
        "device": DEVICES.get(s.device, "?"),
        "interface": _text(s.ifname),
        "dead": bool(s.dead),
        "processes": s.processes,
        "pids": list(s.pids)[: s.processes],
        "tcp_stack": s.tcp_stack,
        "tcp_kernel": s.tcp_kernel,
        "udp_stack": s.udp_stack,
        "udp_kernel": s.udp_kernel,
    }


def _rows(mem: Any, size: int) -> Iterator[tuple[str, Any]]:
    summary, socket, orphan = (
        ffi.new("struct app_summary *"),
        ffi.new("struct app_socket *"),
        ffi.new("struct bypass_inspect *"),
    )
    error = lib.app_summary(mem, size, summary)
    if error == -errno.EAGAIN:
        return  # its stack is being made: it has no socket yet
    if error:
        yield "error", "it is damaged"
        return
    yield "summary", _summary(summary[0])
    cursor = ffi.new("uint32_t *")
    while (got := lib.app_socket_next(mem, size, cursor, socket)) == 1:
        yield "socket", _socket(socket[0])
    if got == 0:
        cursor[0] = 0
        while (got := lib.app_orphan_next(mem, size, cursor, orphan)) == 1:
            nobody = {"pid": None, "fd": None, "descriptors": 0, "proto": "tcp", "place": "stack", "why": ""}
            yield "socket", nobody | _of_stack(orphan[0])
    if got < 0:
        yield "error", "it is damaged"


def _give_up_privileges() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = math.ceil(TIME_S)  # 0 would be over at once
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _child(fd: int, size: int, out: int) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        low, high = sorted((fd, out))
        for first, last in (
            (3, low),
            (low + 1, high),
            (high + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        ):
            os.closerange(first, last)
        _give_up_privileges()
        with os.fdopen(out, "w", closefd=False) as pipe:
            shared = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            memory = ffi.from_buffer("uint8_t[]", shared)
            for kind, what in _rows(memory, size):
                pipe.write(json.dumps([kind, what]) + "\n")
        code = 0
    except BrokenPipeError:
        code = 2  # who asked has had enough
    finally:
        os._exit(code)


# ---- Reading: who asks -------------------------------------------------------------------------------------------
def _collect(pipe: int, until: float) -> tuple[bytes, str]:
    """What the child told, and why not all of it."""
    data = bytearray()
    while len(data) <= OUTPUT:
        left = until - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return bytes(data), f"reading it took more than {TIME_S:.0f} s"
        if not (part := os.read(pipe, 1 << 20)):
            return bytes(data), ""
        data += part
    return bytes(data), "it tells of more than any application holds"


def _ended(pid: int, until: float) -> int:
    """The child's exit code, negative for a signal; one that does not end is killed."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], max(until - time.monotonic(), 0))[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _read(memory: Memory) -> tuple[bytes, str]:
    """What a child without privileges read, and what went wrong."""
    fd = _open(memory)
    until = time.monotonic() + TIME_S
    try:
        size = os.fstat(fd).st_size
        ours, theirs = os.pipe()
        if (pid := os.fork()) == 0:
            _child(fd, size, theirs)
        os.close(theirs)
    finally:
        os.close(fd)
    try:
        data, error = _collect(ours, until)
    finally:
        os.close(ours)  # a child that goes on telling ends
        code = _ended(pid, until)
    if code < 0 and not error:
        error = f"it is damaged: reading it ended with {signal.Signals(-code).name}"
    return data, error or ("reading it failed" if code else "")


def _user_of(pid: int) -> int:
    """Its effective user; /proc/PID itself is root's where it is not dumpable. OSError: it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[2]) for line in lines if line.startswith("Uid:"))


def namespace_of(pids: list[int]) -> int | None:
    """The network namespace of the first of these processes that we may look into, by its inode."""
    for pid in pids:
        with suppress(*procfs.GONE):
            return (procfs.PROC / str(pid) / "ns/net").stat().st_ino
    return None


def look(memory: Memory) -> Application:
    """Reads one application. ProcessLookupError: its processes have ended."""
    data, error = _read(memory)
    told = Application(holders=memory.holders, uid=memory.uid, error=error)
    try:
        for line in data.decode().splitlines():
            kind, what = json.loads(line)
            if kind == "summary":
                told.summary = Summary(**what)
            elif kind == "socket":
                told.sockets.append(Socket(**what))
            elif kind == "error" and not error:
                told.error = str(what)
    except (ValueError, TypeError, ValidationError):
        if not told.error:
            raise
    pids = [pid for pid in (told.summary.pids if told.summary else []) if pid in memory.holders]
    with suppress(OSError, IndexError):
        told.uid = _user_of((pids or memory.holders)[0])
    told.netns = namespace_of(pids or memory.holders)
    tables: dict[str, dict[str, list[str]]] = {}
    for socket in told.sockets:
        if socket.pid in pids and socket.place in ("kernel", "undecided"):
            _of_kernel(socket, socket.pid, tables)
    return told


# ---- The kernel's sockets --------------------------------------------------------------------------------------
_KERNEL_STATES = {0x0A: "LISTEN", 0x07: "UNCONN", **{k: v for k, v in STATES.items() if k not in (7, 10)}}


def _kernel_endpoint(text: str) -> str:
    """As /proc/net/tcp writes it: words of the address in this machine's order."""
    raw, port = text.split(":")
    words = bytes.fromhex(raw)
    turned = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    address = ipaddress.ip_address(turned)
    mapped = getattr(address, "ipv4_mapped", None)
    shown = str(mapped or address)
    if not int(port, 16) and not int(address):
        return ""
    return f"[{shown}]:{int(port, 16)}" if ":" in shown else f"{shown}:{int(port, 16)}"


def _kernel_table(pid: int) -> dict[str, list[str]]:
    """Lines of /proc/PID/net by inode, in words: the kernel's sockets of that process' network namespace."""
    lines = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                lines[words[9]] = words
    return lines


def _of_kernel(socket: Socket, pid: int, tables: dict[str, dict[str, list[str]]]) -> None:
    """What the kernel knows of one. tables: of what was looked at before, by network namespace."""
    with suppress(OSError):
        link = os.readlink(f"/proc/{pid}/fd/{socket.fd}")
        namespace = os.readlink(f"/proc/{pid}/ns/net")
        if namespace not in tables:
            tables[namespace] = _kernel_table(pid)
        words = tables[namespace].get(link.removeprefix("socket:[").removesuffix("]"))
        if words:
            socket.local, socket.peer = _kernel_endpoint(words[1]), _kernel_endpoint(words[2])
            socket.state = _KERNEL_STATES.get(int(words[3], 16), "?")
            socket.send_queue, socket.recv_queue = (int(n, 16) for n in words[4].split(":"))
