# SPDX-License-Identifier: Apache-2.0
"""Random sequences of the calls that the preload library has, in a process on the kernel and in one that is preloaded.

What both worlds are and how they are compared: tests/preload_machine.py. Every socket is non-blocking, so that no
call sleeps by chance; where a call is to sleep, a rule lets a thread do it and says what wakes it. What is known to
differ stands in tests/preload_differences.py.
"""

from __future__ import annotations

import errno
import fcntl
import select
import signal
import socket
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from c_programs import CFLAGS
from c_programs import run as build
from conftest import missing
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from preload_differences import DIFFERENCES
from preload_machine import ALONE, FDS, OTHER, PORTS, PROCESSES, Both, agent, both, normal
from preloaded import environment
from socket_machine import OPTIONS, TIMING
from support import examples

pytestmark = [pytest.mark.hypothesis, pytest.mark.timeout(1200)]

NONBLOCK, CLOEXEC = socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC
RDWR_NONBLOCK = 0o4002
LISTEN, ESTABLISHED = "10", "1"
ASLEEP_MS = 40  # how long a call that sleeps is watched
MOST_SENT = 60_000  # bytes of an example: less than any buffer, so that nothing depends on a buffer's size
ADD, DELETE, MOD = 1, 2, 3  # EPOLL_CTL_
SIOCATMARK = 0x8905

Fd = st.integers(0, 40)  # the how manieth descriptor; see Worlds.pick
Size = st.sampled_from([0, 1, 10, 100, 3000])
Seed = st.integers(0, 255)
Port = st.sampled_from([*PORTS, 0])
SEND_FLAGS = (
    0,
    0,
    socket.MSG_NOSIGNAL,
    socket.MSG_DONTWAIT,
    socket.MSG_MORE | socket.MSG_NOSIGNAL,
    socket.MSG_EOR,
)
SendFlags = st.sampled_from(SEND_FLAGS)
PEEK, TRUNC, WAITALL = socket.MSG_PEEK, socket.MSG_TRUNC, socket.MSG_WAITALL
RecvFlags = st.sampled_from(
    [0, 0, 0, PEEK, TRUNC, WAITALL, PEEK | TRUNC, PEEK | WAITALL, socket.MSG_DONTWAIT]
)
EPOLL = [
    select.EPOLLIN,
    select.EPOLLOUT,
    select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP,
    select.EPOLLPRI,
]
MODES = [0, 0, select.EPOLLET, select.EPOLLONESHOT, select.EPOLLET | select.EPOLLONESHOT]


WRONG_RECV = """
#include <dlfcn.h>
#include <sys/socket.h>

ssize_t recv(int fd, void *to, size_t len, int flags)
{
    ssize_t (*next)(int, void *, size_t, int) = (ssize_t (*)(int, void *, size_t, int))dlsym(RTLD_NEXT, "recv");
    ssize_t n = next(fd, to, len, flags);
    return n > 1 && fd < 900 ? n - 1 : n;
}
"""


class Worlds(RuleBasedStateMachine):
    program: ClassVar[Path]  # set by the test
    env: ClassVar[dict[str, str]] = {}  # of the other world

    def __init__(self) -> None:
        super().__init__()
        self.worlds: Both | None = None
        self.sent = 0

    @initialize(furniture=st.sampled_from(["none", "connections", "all", "all", "all"]))
    def start(self, furniture: str) -> None:
        """From the beginning there is something to call on, so that most calls mean something."""
        self.worlds = both(self.program, **self.env)
        self.rest()
        if furniture != "none":
            self.connected(0, PORTS[0], True)
            self.connected(0, 0, False)
        if furniture == "all":
            for what, number in (
                ("epoll_create", 0),
                ("unixpair", socket.SOCK_STREAM),
                ("pipe", 0),
                ("memfd", 5000),
            ):
                self.ask(0, what, number)
            for port in PORTS:
                fd = self.ask(0, "socket", socket.AF_INET, socket.SOCK_DGRAM | NONBLOCK, 0)
                self.ask(0, "bind", fd, 0, port)
            self.ask(0, "connect", fd, 0, PORTS[0])
        self.rest()

    @property
    def it(self) -> Both:
        assert self.worlds is not None
        return self.worlds

    def rest(self) -> None:
        self.it.rest()

    def teardown(self) -> None:
        if self.worlds is not None:
            self.worlds.close()

    # ---- Which process, which descriptor
    def process(self, k: int) -> int:
        alive = sorted(self.it.tables)
        return alive[k % len(alive)]

    def pick(self, n: int, k: int, wanted: Callable[[dict[str, str]], bool] = lambda _: True) -> int:
        """The k-th descriptor of process n that is as wanted; if none is, any; if there is none, one that is closed."""
        table = self.it.tables[n]
        numbers = [fd for fd, seen in table.items() if wanted(seen)] or list(table) or [FDS - 1]
        return numbers[k % len(numbers)]

    def ask(self, n: int, command: str, *numbers: int) -> int:
        """The call in both worlds; its value. -1 also of a call that is left out: it would show a known difference."""
        line = " ".join(map(str, (command, *numbers)))
        return int(self.it.ask(n, line).split()[0]) if self.may(n, line) else -1

    def may(self, n: int, line: str) -> bool:
        return not any(d.avoids(self.it, n, line.split()) for d in DIFFERENCES.values())

    def room(self, n: int, size: int) -> bool:
        """May so many bytes be sent still?"""
        self.sent += size
        return self.sent <= MOST_SENT and len(self.it.tables[n]) < 40

    # ---- Making
    @rule(
        k=Fd,
        kind=st.sampled_from([socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_DGRAM]),
        cloexec=st.booleans(),
    )
    def new_socket(self, k: int, kind: int, cloexec: bool) -> None:
        n = self.process(k)
        if len(self.it.tables[n]) < 30:
            self.ask(n, "socket", socket.AF_INET, kind | NONBLOCK | (CLOEXEC if cloexec else 0), 0)

    @rule(k=Fd, port=Port, keep=st.booleans())
    def connected(self, k: int, port: int, keep: bool) -> None:
        """The way to a connection that most programs take."""
        n = self.process(k)
        if len(self.it.tables[n]) > 24:
            return
        listener = self.ask(n, "socket", socket.AF_INET, socket.SOCK_STREAM | NONBLOCK, 0)
        self.ask(n, "setsockopt", listener, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        good = self.ask(n, "bind", listener, 0, port) == 0 and self.ask(n, "listen", listener, 5) == 0
        client = self.ask(n, "socket", socket.AF_INET, socket.SOCK_STREAM | NONBLOCK, 0)
        if good:
            self.it.ask(n, f"connect {client} 0 @{listener}")
            self.rest()
            self.ask(n, "accept4", listener, NONBLOCK)
            self.rest()
            self.nodelay(n)
        if not keep:
            self.ask(n, "close", listener)

    def nodelay(self, n: int) -> None:
        """What a Nagle algorithm holds back depends on the size of a segment."""
        for fd, seen in self.it.tables[n].items():
            if seen.get("type") == "1":
                self.ask(n, "setsockopt", fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @rule(k=Fd, fd=Fd, port=Port, any_address=st.booleans())
    def bind(self, k: int, fd: int, port: int, any_address: bool) -> None:
        n = self.process(k)
        self.ask(n, "bind", self.pick(n, fd, is_socket), int(any_address), port)

    @rule(k=Fd, fd=Fd, backlog=st.sampled_from([0, 1, 5]))
    def listen(self, k: int, fd: int, backlog: int) -> None:
        n = self.process(k)
        self.ask(n, "listen", self.pick(n, fd, is_socket), backlog)

    @rule(k=Fd, fd=Fd, port=st.sampled_from(PORTS), host=st.sampled_from([0, 0, 0, 2]))
    def connect(self, k: int, fd: int, port: int, host: int) -> None:
        n = self.process(k)
        number = self.pick(n, fd, is_socket)
        if host == 2 and self.it.tables[n].get(number, {}).get("type") != "2":
            return  # only datagrams: what a stream is after that is another socket's story
        self.ask(n, "connect", number, host, port)

    @rule(k=Fd, fd=Fd, how=st.sampled_from(["accept", "accept4"]), flags=st.sampled_from([0, CLOEXEC]))
    def accept(self, k: int, fd: int, how: str, flags: int) -> None:
        n = self.process(k)
        listener = self.pick(n, fd, lambda seen: seen.get("state") == LISTEN)
        if how == "accept4":
            self.ask(n, "accept4", listener, NONBLOCK | flags)
            return
        got = self.ask(n, "accept", listener)
        if got >= 0:
            self.ask(n, "fcntl", got, fcntl.F_SETFL, RDWR_NONBLOCK)

    # ---- Bytes
    @rule(
        k=Fd,
        fd=Fd,
        size=Size,
        seed=Seed,
        flags=SendFlags,
        how=st.sampled_from(["write", "writev", "send", "sendmsg"]),
    )
    def send(self, k: int, fd: int, size: int, seed: int, flags: int, how: str) -> None:
        n = self.process(k)
        number = self.pick(n, fd, is_socket)
        if not self.room(n, size) or (
            flags & socket.MSG_MORE and self.it.tables[n].get(number, {}).get("type") == "2"
        ):
            return  # socket_worlds.DIFFERENCES: datagrams of several calls
        if how in ("write", "writev"):
            self.ask(n, how, number, size, seed)
        else:
            self.ask(n, how, number, size, flags, seed)
        if flags & socket.MSG_MORE:  # what it holds back depends on time
            self.ask(n, "setsockopt", number, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @rule(k=Fd, fd=Fd, size=Size, seed=Seed, port=st.sampled_from(PORTS))
    def sendto(self, k: int, fd: int, size: int, seed: int, port: int) -> None:
        n = self.process(k)
        if self.room(n, size):
            self.ask(n, "sendto", self.pick(n, fd, is_socket), size, 0, seed, 0, port)

    @rule(k=Fd, fd=Fd, count=st.integers(0, 8), size=st.sampled_from([8, 80, 800]), seed=Seed)
    def sendmmsg(self, k: int, fd: int, count: int, size: int, seed: int) -> None:
        n = self.process(k)
        number = self.pick(n, fd, is_socket)
        gone = int(self.it.tables[n].get(number, {}).get("ready", "0"), 16) & select.POLLRDHUP
        if self.room(n, size) and not gone:  # the reset that one of them draws may come between two of them
            self.ask(n, "sendmmsg", number, count, size, 0, seed)

    @rule(k=Fd, fd=Fd, size=st.sampled_from([0, 1, 50, 100_000]), how=st.sampled_from(["read", "readv"]))
    def read(self, k: int, fd: int, size: int, how: str) -> None:
        n = self.process(k)
        self.ask(n, how, self.pick(n, fd), size)

    @rule(
        k=Fd,
        fd=Fd,
        size=st.sampled_from([0, 1, 50, 100_000]),
        flags=RecvFlags,
        how=st.sampled_from(["recv", "recvfrom", "recvmsg"]),
    )
    def recv(self, k: int, fd: int, size: int, flags: int, how: str) -> None:
        n = self.process(k)
        self.ask(n, how, self.pick(n, fd, is_socket), size, flags)

    @rule(
        k=Fd,
        fd=Fd,
        count=st.integers(1, 8),
        size=st.sampled_from([8, 800, 80_000]),
        flags=st.sampled_from([0, PEEK]),
    )
    def recvmmsg(self, k: int, fd: int, count: int, size: int, flags: int) -> None:
        n = self.process(k)
        self.ask(n, "recvmmsg", self.pick(n, fd, is_socket), count, size, flags)

    @rule(k=Fd, fd=Fd, size=st.sampled_from([1, 3]), seed=Seed, back=st.booleans())
    def urgent(self, k: int, fd: int, size: int, seed: int, back: bool) -> None:
        """An urgent byte there, and at once taken: between the two Linux counts it in FIONREAD and we do not."""
        n = self.process(k)
        pair = self.pair(n, fd)
        if pair is None or not self.room(n, size):
            return
        a, b = pair if back else pair[::-1]
        self.ask(n, "send", a, size, socket.MSG_OOB | socket.MSG_NOSIGNAL, seed)
        self.it.ask(n, f"poll {b} {select.POLLPRI} 1000")
        self.ask(n, "recv", b, 10, socket.MSG_OOB)
        self.ask(n, "recv", b, 100_000, 0)
        self.ask(n, "ioctl", b, SIOCATMARK, 0)
        self.ask(n, "recv", b, 100_000, 0)

    @rule(k=Fd, fd=Fd, seed=Seed)
    def flood_and_drain(self, k: int, fd: int, seed: int) -> None:
        """Until there is no room. How much that is, is a buffer's size; that all of it arrives, is not."""
        n = self.process(k)
        pair = self.pair(n, fd)
        if pair is None:
            return
        answers = self.it.ask_each(n, f"flood {pair[0]} {seed}")
        ends = [a.split()[:2] for a in answers]
        assert ends == [["-1", str(errno.EAGAIN)]] * 2, f"{answers}{self.it.before()}"
        waiting = int(self.it.tables[n][pair[1]]["queued"])
        sent = [int(a.rpartition("=")[2]) + waiting for a in answers]
        got = self.it.drain(n, pair[1], sent)
        assert got == sent, f"sent {sent}, received {got} (on Linux, here){self.it.before()}"

    def pair(self, n: int, k: int) -> tuple[int, int] | None:
        """Both ends of a connection, open both ways, in one process."""
        seen = {
            fd: s
            for fd, s in self.it.tables[n].items()
            if s.get("state") == ESTABLISHED and s["ready"] in "45"
        }
        named = {}
        for fd in seen:
            text = self.it.kernel.ask(n, f"getsockname {fd}"), self.it.kernel.ask(n, f"getpeername {fd}")
            named[fd] = tuple(t.rpartition("=")[2] for t in text)
        pairs = [(a, b) for a in seen for b in seen if named[a] == named[b][::-1]]
        return pairs[k % len(pairs)] if pairs else None

    # ---- Ends
    @rule(k=Fd, fd=Fd, how=st.integers(0, 2))
    def shutdown(self, k: int, fd: int, how: int) -> None:
        n = self.process(k)
        self.ask(n, "shutdown", self.pick(n, fd, is_socket), how)

    @rule(k=Fd, fd=Fd, hard=st.sampled_from([False, False, True]))
    def close(self, k: int, fd: int, hard: bool) -> None:
        n = self.process(k)
        number = self.pick(n, fd)
        if hard:
            self.ask(n, "linger", number, 1, 0)
        self.ask(n, "close", number)

    @rule(k=Fd, first=st.integers(3, 20), more=st.integers(0, 4), flags=st.sampled_from([0, 4]))
    def close_range(self, k: int, first: int, more: int, flags: int) -> None:
        self.ask(self.process(k), "close_range", first, first + more, flags)

    # ---- Numbers
    @rule(
        k=Fd,
        fd=Fd,
        to=st.integers(3, 50),
        how=st.sampled_from(["dup", "dup2", "dup3", "F_DUPFD", "F_DUPFD_CLOEXEC"]),
    )
    def duplicate(self, k: int, fd: int, to: int, how: str) -> None:
        n = self.process(k)
        number = self.pick(n, fd)
        if how == "dup":
            self.ask(n, "dup", number)
        elif how == "dup2":
            self.ask(n, "dup2", number, to)
        elif how == "dup3":
            self.ask(n, "dup3", number, to, CLOEXEC)
        else:
            self.ask(n, "fcntl", number, getattr(fcntl, how), to)

    @rule(k=Fd, fd=Fd, on=st.integers(0, 1))
    def mark(self, k: int, fd: int, on: int) -> None:
        n = self.process(k)
        self.ask(n, "fcntl", self.pick(n, fd), fcntl.F_SETFD, on)

    @rule(k=Fd, fd=Fd, what=st.sampled_from([termios.FIONREAD, termios.FIONBIO, SIOCATMARK]))
    def ioctl(self, k: int, fd: int, what: int) -> None:
        n = self.process(k)
        self.ask(n, "ioctl", self.pick(n, fd, is_socket), what, 1)

    @rule(
        k=Fd,
        fd=Fd,
        option=st.sampled_from(OPTIONS),
        value=st.none() | st.sampled_from([0, 1, 7, 100, -1, 40000]),
    )
    def option(self, k: int, fd: int, option: tuple[int, int], value: int | None) -> None:
        n = self.process(k)
        number = self.pick(n, fd, is_socket)
        if option in TIMING and value is not None:
            value = TIMING[option]
        if option == (socket.SOL_SOCKET, socket.SO_RCVLOWAT) and value == -1:
            value = 1  # the largest low-water mark: DIFFERENT in tests/test_socket_options_linux.py
        if value is not None:
            self.ask(n, "setsockopt", number, *option, value)
        self.ask(n, "getsockopt", number, *option)

    @rule(k=Fd, fd=Fd)
    def error(self, k: int, fd: int) -> None:
        n = self.process(k)
        self.ask(n, "getsockopt", self.pick(n, fd, is_socket), socket.SOL_SOCKET, socket.SO_ERROR)

    # ---- Other descriptors
    @rule(k=Fd, what=st.sampled_from(["pipe", "unixpair", "eventfd", "memfd", "epoll_create"]))
    def other(self, k: int, what: str) -> None:
        n = self.process(k)
        number = {"unixpair": socket.SOCK_STREAM, "memfd": 5000, "eventfd": 1}.get(what, 0)
        if len(self.it.tables[n]) < 30:
            self.ask(n, what, number)

    @rule(k=Fd, fd=Fd, file=Fd, at=st.sampled_from([-1, 0, 100, 10_000]), size=st.sampled_from([0, 1, 3000]))
    def sendfile(self, k: int, fd: int, file: int, at: int, size: int) -> None:
        n = self.process(k)
        if self.room(n, size):
            out, source = self.pick(n, fd, is_socket), self.pick(n, file, lambda seen: seen["kind"] == "f")
            self.ask(n, "sendfile", out, source, at, size)

    @rule(k=Fd, a=Fd, b=Fd, size=st.sampled_from([0, 1, 1000]), into=st.booleans())
    def splice(self, k: int, a: int, b: int, size: int, into: bool) -> None:
        n = self.process(k)
        s, p = self.pick(n, a, is_socket), self.pick(n, b, lambda seen: seen["kind"] == "p")
        if self.room(n, size):
            self.ask(n, "splice", *((s, p) if into else (p, s)), size)

    @rule(k=Fd, over=Fd, fd=Fd)
    def give(self, k: int, over: int, fd: int) -> None:
        n = self.process(k)
        unix = self.pick(n, over, is_unix)
        if not is_unix(self.it.tables[n].get(unix, {})):
            return  # on any other the byte goes, and a stream of the stack says EOPNOTSUPP or nothing of the rest
        number = self.pick(n, fd, lambda seen: not is_unix(seen))
        if not is_unix(
            self.it.tables[n].get(number, {})
        ):  # a socket in itself is collected by the kernel, some day
            self.ask(n, "sendfd", unix, number)

    @rule(k=Fd, over=Fd, cloexec=st.booleans())
    def take(self, k: int, over: int, cloexec: bool) -> None:
        n = self.process(k)
        if len(self.it.tables[n]) < 30:
            self.ask(n, "recvfd", self.pick(n, over, is_unix), socket.MSG_CMSG_CLOEXEC if cloexec else 0)

    # ---- Readiness
    @rule(k=Fd)
    def select_all(self, k: int) -> None:
        self.ask(self.process(k), "select", 0)

    @rule(
        k=Fd,
        ep=Fd,
        fd=Fd,
        op=st.sampled_from([ADD, ADD, ADD, MOD, DELETE]),
        events=st.sampled_from(EPOLL),
        mode=st.sampled_from(MODES),
    )
    def epoll_ctl(self, k: int, ep: int, fd: int, op: int, events: int, mode: int) -> None:
        n = self.process(k)
        self.ask(n, "epoll_ctl", self.pick(n, ep, is_epoll), op, self.pick(n, fd), events | mode)

    @rule(k=Fd, ep=Fd, how=st.sampled_from(["epoll_wait", "epoll_wait", "epoll_pwait2"]))
    def epoll_wait(self, k: int, ep: int, how: str) -> None:
        n = self.process(k)
        self.ask(n, how, self.pick(n, ep, is_epoll), 0)

    # ---- Processes
    @precondition(lambda self: self.it.kernel.pids.keys() != set(range(PROCESSES)))
    @rule(k=Fd)
    def fork(self, k: int) -> None:
        new = [n for n in range(PROCESSES) if n not in self.it.kernel.pids and n not in self.used]
        if new:
            n = self.process(k)
            if self.may(n, f"fork {new[0]}"):
                self.used.add(new[0])
                self.it.ask(n, f"fork {new[0]}")

    @property
    def used(self) -> set[int]:
        """Control sockets that were a process' once."""
        return self.__dict__.setdefault("_used", {0})  # type: ignore[no-any-return]

    @rule(k=Fd)
    def exec(self, k: int) -> None:
        n = self.process(k)
        if self.may(n, "exec"):
            self.it.ask(n, "exec")

    @rule(k=st.integers(0, 4), how=st.sampled_from(["exit", "kill"]))
    def end(self, k: int, how: str) -> None:
        children = [n for n in self.it.kernel.pids if n != 0]
        if not children:
            return
        n = children[k % len(children)]
        if how == "exit":
            self.it.ask(n, "exit")
        else:
            self.it.kill(n)

    # ---- Calls that sleep
    @rule(
        k=Fd,
        fd=Fd,
        call=st.sampled_from(
            ["recv {} 10 0", "read {} 10", "recvmsg {} 10 0", "recv {} 3 256", "poll {} 1 -1"]
        ),
        wake=st.sampled_from(["data", "end", "shutdown", "signal", "restart", "timeout", "reset"]),
        seed=Seed,
    )
    def sleep(self, k: int, fd: int, call: str, wake: str, seed: int) -> None:
        """A thread sleeps in a call until something happens."""
        n = self.process(k)
        pair = self.pair(n, fd)
        if pair is None or self.it.tables[n][pair[0]]["queued"] != "0":
            return
        a, b = pair
        if wake == "timeout" and call.startswith("poll"):
            return
        self.ask(n, "fcntl", a, fcntl.F_SETFL, 2)
        if wake == "timeout":
            self.ask(n, "timeout", a, ASLEEP_MS)
        self.it.ask(n, f"action {int(signal.SIGUSR1)} {0x10000000 if wake == 'restart' else 0}")
        self.it.ask(n, f"go 0 {call.format(a)}")
        if wake != "timeout":
            assert self.it.ask(n, f"end 0 {ASLEEP_MS}") == "asleep", self.it.before()
        self.wake(n, a, b, wake, seed, 10_000 if call.startswith("poll") else ASLEEP_MS)
        if self.it.ask(n, "end 0 10000") == "asleep":  # close() was not of the last descriptor
            self.ask(n, "shutdown", a, socket.SHUT_RDWR)
            self.it.ask(n, "end 0 10000")  # two that sleep would share one error, by chance
        if wake == "timeout":
            self.ask(n, "timeout", a, 0)
        if a in self.it.tables[n]:
            self.ask(n, "fcntl", a, fcntl.F_SETFL, RDWR_NONBLOCK)

    def wake(self, n: int, a: int, b: int, wake: str, seed: int, restarts_ms: int) -> None:
        if wake in ("signal", "restart"):
            self.it.ask(n, f"kick 0 {int(signal.SIGUSR1)}")
        if wake == "restart":  # poll() is never restarted, and has to end
            self.it.ask(n, f"end 0 {restarts_ms}")
        if wake in ("data", "restart"):
            self.ask(n, "send", b, 3, 0, seed)
        if wake == "end":
            self.ask(n, "shutdown", b, socket.SHUT_WR)
        if wake == "shutdown":
            self.ask(n, "shutdown", a, socket.SHUT_RD)
        if wake == "reset":
            self.ask(n, "linger", b, 1, 0)
            self.ask(n, "close", b)

    @rule(k=Fd, fd=Fd, wake=st.sampled_from(["connect", "shutdown", "signal"]))
    def sleep_in_accept(self, k: int, fd: int, wake: str) -> None:
        n = self.process(k)
        listeners = [
            x for x, s in self.it.tables[n].items() if s.get("state") == LISTEN and s["ready"] == "0"
        ]
        if not listeners or len(self.it.tables[n]) > 30:
            return
        a = listeners[fd % len(listeners)]
        client = self.ask(n, "socket", socket.AF_INET, socket.SOCK_STREAM | NONBLOCK, 0)
        self.ask(n, "fcntl", a, fcntl.F_SETFL, 2)
        self.it.ask(n, f"action {int(signal.SIGUSR1)} 0")
        self.it.ask(n, f"go 1 accept4 {a} {NONBLOCK}")
        assert self.it.ask(n, f"end 1 {ASLEEP_MS}") == "asleep", self.it.before()
        if wake == "connect":
            self.it.ask(n, f"connect {client} 0 @{a}")
        elif wake == "shutdown":
            self.ask(n, "shutdown", a, socket.SHUT_RDWR)
        else:
            self.it.ask(n, f"kick 1 {int(signal.SIGUSR1)}")
        if self.it.ask(n, "end 1 10000") == "asleep":  # the signal was faster than the call
            self.ask(n, "shutdown", a, socket.SHUT_RDWR)
            self.it.ask(n, "end 1 10000")
        self.ask(n, "fcntl", a, fcntl.F_SETFL, RDWR_NONBLOCK)
        self.rest()
        self.nodelay(n)

    @invariant()
    def all_is_alike(self) -> None:
        if self.worlds is not None:
            self.rest()


def is_socket(seen: dict[str, str]) -> bool:
    return "type" in seen


def is_unix(seen: dict[str, str]) -> bool:
    return seen.get("kind") == "s" and "type" not in seen


def is_epoll(seen: dict[str, str]) -> bool:
    return seen["kind"] == "e"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0:
        missing(["network namespaces: root, or user namespaces for everybody"])
    return agent(tmp_path_factory.mktemp("preload"))


def run_machine(machine: type[Worlds], **how: Any) -> None:
    case = machine.TestCase()
    case.settings = settings(**how)
    case.runTest()


def test_every_call_is_as_on_linux(program: Path) -> None:
    # A step takes milliseconds, and one that sleeps more: what is found is told as it is, and made smaller by hand
    # (`python tests/preload_machine.py FILE` replays a log). More examples: `make fuzz`.
    Worlds.program = program
    run_machine(Worlds, max_examples=examples(25), stateful_step_count=25, phases=[Phase.generate])


def test_a_wrong_recv_is_found(program: Path, tmp_path: Path) -> None:
    """The control: where recv() loses a byte, the machine says so."""
    source, library = tmp_path / "wrong.c", tmp_path / "wrong.so"
    source.write_text(WRONG_RECV)
    build("gcc", *CFLAGS, "-shared", "-fPIC", source, "-o", library)

    class Wrong(Worlds):
        env: ClassVar[dict[str, str]] = {
            "LD_PRELOAD": f"{library} {environment(OTHER).get('LD_PRELOAD', '')}"
        }

    Wrong.program = program
    with pytest.raises(AssertionError, match="on Linux"):
        run_machine(Wrong, max_examples=200, stateful_step_count=40, database=None, phases=[Phase.generate])


@pytest.mark.skipif(OTHER == "kernel", reason="there is no preload library")
@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_difference_is_one(program: Path, name: str) -> None:
    difference = DIFFERENCES[name]
    worlds = both(program)
    try:
        for command in difference.calls:
            n, call = (int(command[0]), command[2:]) if command[0].isdigit() else (0, command)
            answers = tuple(map(normal, worlds.ask_each(n, call)))
    finally:
        worlds.close()
    assert answers[0] == difference.linux, "Linux does something else now: mend what is written of it"
    assert answers[1] == difference.here, "the difference is another, or gone: mend or remove its entry"
