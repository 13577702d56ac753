# SPDX-License-Identifier: Apache-2.0
"""Sockets of the kernel and of this stack side by side, and what differs between them on purpose.

The kernel's are in a network namespace of the test's own, on its loopback with an Ethernet's MTU; ours on a simulated
wire. Linux is what the tests compare with; DIFFERENCES is all that is excused, each entry proved to be still one by
tests/test_socket_differences.py.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bypass import netns
from bypass.sim import Network
from bypass.sockets import Socket

STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
POLL = select.POLLIN | select.POLLPRI | select.POLLOUT | select.POLLRDHUP  # POLLERR and POLLHUP come anyway
MS = 1_000_000

DIFFERENCES = {
    "shutdown of a stream before there is a connection": "fails with ENOTCONN as on Linux, but leaves no "
    "mark on the socket",
    "bind after the connection has ended": "EINVAL always; Linux allows it when the port was not chosen by bind()",
    "the port after a connection attempt failed": "getsockname() tells 0 for a port that is free again; Linux tells "
    "the old number, which is not reserved any more",
    "the port of a socket whose connection has ended": "is free for others at once; Linux keeps a port that was chosen "
    "by bind() until the socket is closed",
    "connect to 0.0.0.0": "ECONNREFUSED at once; Linux means the host itself",
    "connect to port 0": "ECONNREFUSED at once, UDP EINVAL; Linux sends to it",
    "unknown flags": "EOPNOTSUPP for a flag that the call does not have; Linux ignores most that it does not know",
    "the port of a datagram socket that could not send": "is chosen by the first datagram that leaves; Linux chooses "
    "it at the first attempt",
    "datagrams of several calls": "EOPNOTSUPP for MSG_MORE on UDP; Linux collects one datagram",
}


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gave: its value, or the name of its errno."""
    try:
        return call()
    except OSError as e:
        return errno.errorcode[e.errno or 0]


def readiness(x: Any) -> int:
    if isinstance(x, Socket):
        return x.readiness()
    poll = select.poll()
    poll.register(x, POLL)
    return sum(mask for _, mask in poll.poll(0))


@contextmanager
def namespace() -> Iterator[str]:
    """A network namespace in which only the loopback is up."""
    name = f"bypass-{os.getpid()}-sockets"
    netns.create(name)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up", "mtu", "1500"], check=True)
        yield name
    finally:
        netns.remove(name)


class Kernel:
    """Two hosts that are one: 127.0.0.1 and 127.0.0.2."""

    ours = False

    def __init__(self, name: str) -> None:
        self._name = name

    def address(self, host: int, port: int) -> tuple[str, int]:
        return f"127.0.0.{host + 1}", port

    def socket(self, host: int, kind: int = STREAM) -> Any:
        with netns.entered(self._name):
            x = socket.socket(type=kind)
        x.settimeout(0)
        return x

    def rest(self) -> None:
        """Linux delivers on its loopback before the call returns."""

    def close(self) -> None:
        pass


class Ours:
    """Two hosts on a wire, whose virtual time passes at least as fast as the kernel's."""

    ours = True

    def __init__(self) -> None:
        self.net = Network(seed=1)
        self.net.wire()
        self._rested = time.monotonic_ns()
        self.stacks = [self.net.stack(f"10.0.0.{n}/24") for n in (1, 2)]

    def address(self, host: int, port: int) -> tuple[str, int]:
        return f"10.0.0.{host + 1}", port

    def socket(self, host: int, kind: int = STREAM) -> Any:
        x = Socket(self.stacks[host], kind)
        x.settimeout(0)
        return x

    def rest(self) -> None:
        now = time.monotonic_ns()
        self.net.run(duration_ns=max(MS, now - self._rested))
        self._rested = now

    def close(self) -> None:
        self.net.close()


World = Kernel | Ours
