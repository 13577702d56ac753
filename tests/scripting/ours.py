# SPDX-License-Identifier: Apache-2.0
"""Backend: our stack, alone on a simulated wire, on virtual time. Exact but for the timer wheel's tick.

Calls that would block are generators: they yield where they wait, and are asked again whenever something happened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from collections import deque
from collections.abc import Generator, Mapping
from typing import Any

from bypass._core import ffi, lib
from conversation import SECOND, Conversation
from tcp_talk import OUR_ISS, TICK, start_for

from bypass.core import Config

from .infos import CodeError
from .lang import Script
from .packets import PEER, PEER_PORT, PORT, US
from .play import CONSTANTS

Op = Generator[None, None, Any]
READY = {
    lib.BYPASS_IN: select.POLLIN,
    lib.BYPASS_OUT: select.POLLOUT,
    lib.BYPASS_ERR: select.POLLERR,
    lib.BYPASS_HUP: select.POLLHUP,
    lib.BYPASS_RDHUP: select.POLLRDHUP,
}
if hasattr(lib, "BYPASS_PRI"):
    READY[lib.BYPASS_PRI] = select.POLLPRI
SEND_FLAGS = {
    socket.MSG_MORE: "MORE",
    socket.MSG_OOB: "OOB",
    socket.MSG_NOSIGNAL: "",
    socket.MSG_DONTWAIT: "",
}
RECV_FLAGS = {
    socket.MSG_PEEK: "PEEK",
    socket.MSG_TRUNC: "TRUNC",
    socket.MSG_OOB: "OOB",
    socket.MSG_DONTWAIT: "",
}


def fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def translate(flags: int, known: Mapping[Any, str]) -> int:
    """MSG_* as bypass.h has them; OSError where the stack lacks one."""
    out = 0
    for bit, name in known.items():
        if flags & bit and name:
            if not hasattr(lib, f"BYPASS_{name}"):
                raise CodeError(f"the stack has no BYPASS_{name}")
            out |= int(getattr(lib, f"BYPASS_{name}"))
        flags &= ~bit
    if flags:
        raise CodeError(f"flags of send() or recv() that the stack does not know: {flags:#x}")
    return out


class Job:
    def __init__(self, op: Op) -> None:
        self.op, self.done, self.at_ns = op, False, 0
        self.result: Any = None

    def advance(self, now_ns: int) -> bool:
        """Asks it again. True: it ended."""
        if self.done:
            return False
        try:
            next(self.op)
        except StopIteration as e:
            self.result = e.value
        except OSError as e:
            self.result = e
        else:
            return False
        self.done, self.at_ns = True, now_ns
        return True


class World(Conversation):
    """The simulated wire; `after` runs whenever the stack has."""

    backend: OurStack | None = None

    def _drain(self) -> None:
        super()._drain()
        if self.backend is not None:
            self.backend.ran()


class OurStack:
    """Runs one script. `# stack: NAME=VALUE` sets a field of the stack's configuration, `cc` its congestion control."""

    early_ns = 1
    late_ns = round(TICK * SECOND)
    late_share = 0.0
    flaky = False

    def __init__(self, script: Script) -> None:
        words = dict(w.split("=", 1) for said in script.directives.get("stack", []) for w in said.split())
        self.cc = words.pop("cc", script.last("cc", "reno"))
        self.mtu = int(words.pop("mtu", script.last("mtu", "1500")))
        self.flags = lib.BYPASS_F_PING | lib.BYPASS_F_RST
        for name in words.pop("flags", "").split("|"):
            if name:
                self.flags |= self.constant(f"F_{name}")
        self.words = {k: int(v) for k, v in words.items()}
        start = start_for(OUR_ISS, PORT, PEER_PORT, PEER, 1)
        self.world = World(
            flags=self.flags,
            start_ns=start,
            config=self.config(),
            neighbours=(PEER,),
            mtu=self.mtu,
            frames=1024,
        )
        self.stack = self.world.stack
        self.start = start
        self.queue: deque[tuple[int, bytes]] = deque()
        self.jobs: list[Job] = []
        self.nonblocking: set[int] = set()
        self.bound: set[int] = set()
        self.progress = False
        self.world.backend = self

    def constant(self, name: str) -> int:
        if not hasattr(lib, f"BYPASS_{name}"):
            raise CodeError(f"the stack has no BYPASS_{name}")
        return int(getattr(lib, f"BYPASS_{name}"))

    def config(self) -> Config:
        words = self.words

        class Filled(Config):
            def fill(self, flags: int) -> Any:
                cfg = super().fill(flags)
                known = {name for name, _ in ffi.typeof("struct bypass_config").fields}
                for name, value in words.items():
                    if name not in known:
                        raise CodeError(f"the stack has no option {name!r}")
                    setattr(cfg, name, value)
                return cfg

        return Filled(conns=64)

    # ---- the clock and the wire
    def now(self) -> int:
        return self.world.now - self.start

    def ran(self) -> None:
        now = self.now()
        for job in self.jobs:
            if job.advance(now):
                self.progress = True
        self.jobs = [j for j in self.jobs if not j.done]

    def run(self, until: int) -> None:
        """To this time of the world's, and everything that happens then."""
        self.world._run(until)
        while self.progress:
            self.progress = False
            self.world._run(until)
        for at, frame in self.world.sent_at():
            self.queue.append((at - self.start, frame[14:]))

    def wait(self, until_ns: int) -> None:
        self.run(max(self.world.now, self.start + until_ns))

    def inject(self, packet: bytes) -> int:
        self.world.inject(self.world.frame(packet))
        self.run(self.world.now)
        return self.now()

    def step(self, until_ns: int) -> bool:
        """To the next time at which something happens; False: not before until_ns, which it is now."""
        now, until = self.world.now, self.start + until_ns
        if now >= until:
            return False
        nxt = int(lib.sim_next(self.world.sim))
        if nxt <= now:
            nxt = now + round(TICK * SECOND)
        self.run(min(nxt, until))
        return True

    def heard(self, until_ns: int) -> tuple[int, bytes] | None:
        self.run(self.world.now)
        while not self.queue and self.step(until_ns):
            pass
        return self.queue.popleft() if self.queue else None

    def unread(self, packet: tuple[int, bytes]) -> None:
        self.queue.appendleft(packet)

    # ---- calls
    def begin(self, op: str, args: list[Any], blocks: bool) -> Job:
        job = Job(getattr(self, f"do_{op}")(*args))
        self.run(self.world.now)
        if not job.advance(self.now()):
            self.jobs.append(job)
        self.run(self.world.now)
        return job

    def finish(self, job: Job, until_ns: int) -> bool:
        while not job.done and self.step(until_ns):
            pass
        return job.done

    def wait_for(self, fd: int, mask: int) -> Op:
        """Until the socket is ready; an error at once where the socket does not block."""
        while not self.stack.ready(fd) & mask:
            if fd in self.nonblocking:
                raise fail(errno.EAGAIN)
            yield

    def do_socket(self, kind: int) -> Op:
        yield from ()
        fd = self.stack.socket(lib.BYPASS_STREAM)
        if kind & socket.SOCK_NONBLOCK:
            self.nonblocking.add(fd)
        self.stack.cc_set(fd, self.cc)
        return fd

    def do_bind(self, fd: int) -> Op:
        yield from ()
        self.stack.bind(fd, ("0.0.0.0", PORT))
        self.bound.add(fd)
        return 0

    def do_listen(self, fd: int, backlog: int) -> Op:
        yield from ()
        self.stack.listen(fd, backlog)
        return 0

    def do_accept(self, fd: int) -> Op:
        while (got := self.stack.accept(fd)) == -errno.EAGAIN:
            if fd in self.nonblocking:
                raise fail(errno.EAGAIN)
            yield
        if got < 0:
            raise fail(-got)
        return got

    def do_connect(self, fd: int) -> Op:
        if fd not in self.bound:
            self.stack.bind(fd, (US, PORT))
            self.bound.add(fd)
        result = self.stack.connect(fd, (PEER, PEER_PORT))
        if result == -errno.EINPROGRESS and fd not in self.nonblocking:
            while not self.stack.ready(fd) & (lib.BYPASS_OUT | lib.BYPASS_ERR | lib.BYPASS_HUP):
                yield
            result = -self.stack.error(fd)
        if result < 0:
            raise fail(-result)
        return 0

    def do_send(self, fd: int, data: bytes, flags: int) -> Op:
        known = translate(flags, SEND_FLAGS)
        sent = 0
        while True:
            got = self.stack.send(fd, data[sent:], known)
            if got < 0 and got != -errno.EAGAIN:
                if sent:
                    return sent
                raise fail(-got)
            sent += max(got, 0)
            if sent == len(data):
                return sent
            if fd in self.nonblocking or flags & socket.MSG_DONTWAIT:
                if sent:
                    return sent
                raise fail(errno.EAGAIN)
            yield

    def do_sendto(self, fd: int, data: bytes, flags: int) -> Op:
        """sendto() with MSG_FASTOPEN: opens and sends (RFC 7413)."""
        yield from ()
        if fd not in self.bound:
            self.stack.bind(fd, (US, PORT))
            self.bound.add(fd)
        known = translate(flags & ~CONSTANTS["MSG_FASTOPEN"], SEND_FLAGS)
        got = self.stack.sendto(fd, data, (PEER, PEER_PORT), known | lib.BYPASS_FASTOPEN)
        if got < 0:
            raise fail(-got)
        return got

    def do_recv(self, fd: int, n: int, flags: int) -> Op:
        """Waits as bypass.sockets does: until the socket is readable, and with MSG_WAITALL for all of it."""
        known = translate(flags & ~socket.MSG_WAITALL, RECV_FLAGS)
        waits = fd not in self.nonblocking and not flags & (socket.MSG_DONTWAIT | socket.MSG_OOB)
        end = lib.BYPASS_IN | lib.BYPASS_ERR | lib.BYPASS_HUP | lib.BYPASS_RDHUP
        have = b""
        while True:
            got = (
                -errno.EAGAIN
                if waits and not self.stack.ready(fd) & end
                else self.stack.recv(fd, n - len(have), known)
            )
            if isinstance(got, bytes):
                have += got
                if not flags & socket.MSG_WAITALL or not got or len(have) == n:
                    return have
                continue
            if got != -errno.EAGAIN:
                raise fail(-got)
            if not waits:
                raise fail(errno.EAGAIN)
            yield

    def do_shutdown(self, fd: int, how: int) -> Op:
        yield from ()
        self.stack.shutdown(fd, how)
        return 0

    def do_close(self, fd: int) -> Op:
        yield from ()
        self.stack.close_socket(fd)
        return 0

    def do_fcntl(self, fd: int, what: int, value: int) -> Op:
        yield from ()
        if what == fcntl.F_GETFL:
            return os.O_RDWR | (os.O_NONBLOCK if fd in self.nonblocking else 0)
        (self.nonblocking.add if value & os.O_NONBLOCK else self.nonblocking.discard)(fd)
        return 0

    def do_poll(self, fds: list[tuple[int, int]], timeout_ms: int) -> Op:
        end = self.now() + timeout_ms * 1_000_000
        while True:
            found = []
            for fd, events in fds:
                ready = self.stack.ready(fd)
                mask = sum(poll for ours, poll in READY.items() if ready & ours)
                found.append(mask & (events | select.POLLERR | select.POLLHUP))
            if any(found) or (timeout_ms >= 0 and self.now() >= end):
                return sum(map(bool, found)), found
            yield

    def do_ioctl(self, fd: int, what: int) -> Op:
        yield from ()
        info = self.stack.tcp_info(fd)
        if what == CONSTANTS["SIOCINQ"]:
            return 0, info.rcv_queued
        if what == CONSTANTS["SIOCOUTQ"]:
            return 0, info.snd_queued
        if what == CONSTANTS["SIOCATMARK"]:
            return 0, int(self.stack.at_mark(fd))
        raise CodeError("the stack has no such ioctl()")

    # ---- options
    def option(self, name: str) -> int:
        if not hasattr(lib, f"BYPASS_{name}"):
            raise fail(errno.ENOPROTOOPT)
        return int(getattr(lib, f"BYPASS_{name}"))

    def do_setsockopt(self, fd: int, level: int, name: str, value: Any) -> Op:
        yield from ()
        if name == "TCP_CONGESTION":
            self.stack.cc_set(fd, value)
            return 0
        if name == "SO_LINGER":
            value = value["linger"] if value["onoff"] else -1
        self.stack.setopt(fd, self.option(name), value)
        return 0

    def do_getsockopt(self, fd: int, level: int, name: str, shape: Any) -> Op:
        yield from ()
        if name == "SO_ERROR":
            return 0, self.stack.error(fd)
        value = self.stack.getopt(fd, self.option(name))
        if name == "SO_LINGER":
            return 0, {"onoff": int(value >= 0), "linger": max(value, 0)}
        return 0, value

    # ---- TCP_INFO
    def info(self, fd: int, name: str) -> int:
        raw = ffi.new("struct bypass_tcp_info *")
        code = lib.bypass_tcp_info(self.stack.c, fd, raw)
        if code:
            raise CodeError(f"no TCP_INFO: {errno.errorcode[-code]}")
        word = name.removeprefix("tcpi_")
        mss = max(1, raw.snd_mss)
        match word:
            case "snd_cwnd":
                return int(raw.cwnd // mss)
            case "snd_ssthresh":
                return int(raw.ssthresh // mss)
            case "rto" | "rtt" | "rttvar":
                return int(getattr(raw, {"rto": "rto_us", "rtt": "srtt_us", "rttvar": "rttvar_us"}[word]))
            case "unacked":
                return int(-(-((raw.snd_nxt - raw.snd_una) % (1 << 32)) // mss))
            case "total_retrans":
                return int(raw.retransmits)
        if not hasattr(raw, word):
            raise CodeError(f"the stack does not tell {name}")
        return int(getattr(raw, word))

    def close(self, check: bool = True) -> str:
        """check: says what the stack did not give back."""
        try:
            self.world.close(check=check)
        except AssertionError as e:
            return str(e)
        return ""
