# SPDX-License-Identifier: Apache-2.0
"""Applications, their processes and their leases, as data.
What is done with them: arrivals.py, leasing.py, departures.py.

App 1 --- n Process (one connection each)
 | 1 --- n Lease    (an address that is live, and the kernel socket that holds its port)
 `-----  memory file, device descriptors
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from bypass.broker import protocol
from bypass.broker.memory import AppMemory
from bypass.broker.protocol import Message
from bypass.broker.shadow import Shadow
from bypass.broker.users import User
from bypass.core import Address
from bypass.grants import Key
from bypass.profiles import StackOptions

BATCH = 256
MAX_WAITING = 4096
"""Messages that wait for a process to read them. Of more it gets none, and later all there is to know anew."""
PAUSE_WAITING = 64
"""With so many waiting nothing more is read from a process: who asks has to read the answers."""


@dataclass(slots=True)
class Lease:
    """An address of an application whose flows are live. `local` is as granted, `key` that of the live entry.

    shadow None: a block of ports from local[1] to `last_port`.
    """

    number: int
    kind: int
    local: Address
    remote: Address | None
    key: Key
    shadow: Shadow | None
    last_port: int = 0


class Process:
    """A connection: one process.

    Attributes:
        pidfd: -1 when the process cannot be watched.
        app: None before hello.
        exec: it is going to be another program.
        lagging: messages were left out; it has to be told everything anew.
    """

    def __init__(self, sock: socket.socket, pid: int, user: User, pidfd: int) -> None:
        self.sock = sock
        self.pid = pid
        self.user = user
        self.pidfd = pidfd
        self.app: App | None = None
        self.exec = False
        self.lagging = False
        self.closed = False
        self._out: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._ours: set[int] = set()  # descriptors to close when they are sent

    def __repr__(self) -> str:
        return f"<process {self.pid}>"

    @property
    def waiting(self) -> int:
        return len(self._out)

    @property
    def paused(self) -> bool:
        return len(self._out) > PAUSE_WAITING

    def answer(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Queues an answer. There are never more than it has asked for: see `paused`."""
        self._out.append((message.pack(), fds))

    def say(self, data: bytes, fd: int = -1) -> None:
        """Queues an answer to a tool; fd: goes with it, and is closed then."""
        self._out.append((data, (fd,) if fd >= 0 else ()))
        if fd >= 0:
            self._ours.add(fd)

    def tell(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Queues what it has not asked for."""
        if len(self._out) >= MAX_WAITING:
            self.lagging = True
        elif not self.lagging:
            self._out.append((message.pack(), fds))

    def flush(self) -> bool:
        """Sends what can be sent. Whether nothing waits. OSError: the peer is gone."""
        while self._out:
            data, fds = self._out[0]
            if not protocol.send(self.sock, data, fds):
                return False
            self._out.popleft()
            self._sent(fds)
        return True

    def _sent(self, fds: Iterable[int]) -> None:
        for fd in self._ours.intersection(fds):
            self._ours.discard(fd)
            os.close(fd)

    def close(self) -> None:
        self.closed = True
        self._out.clear()
        self._sent(set(self._ours))
        self.sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


@dataclass(eq=False)
class App:
    """An application. `user` is who it was started as: the grants of all its processes.

    Attributes:
        limit: leases at most.
        ends_ns, pidfd: while its only process becomes another program: when it ends if none says hello until then, and
            that process; 0, -1.
        children: processes that belong to it and have not said hello yet, with what tells their end.
        lingering: its processes have ended, and a reaper drives its stack until all is done.
        asked: destinations whose next hop it uses, latest last.
        restored: it was taken over from a killed broker, and none of its processes has said hello since.
    """

    number: int
    token: bytes
    user: User
    name: str
    memory: AppMemory
    limit: int
    fds: list[int] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    leases: dict[int, Lease] = field(default_factory=dict)
    children: dict[int, int] = field(default_factory=dict)
    asked: OrderedDict[str, None] = field(default_factory=OrderedDict)
    last_lease: int = 0
    ends_ns: int = 0
    pidfd: int = -1
    lingering: bool = False
    restored: bool = False

    def ask(self, destination: str, limit: int) -> None:
        """Notes that it wants to hear of a next hop."""
        self.asked[destination] = None
        self.asked.move_to_end(destination)
        while len(self.asked) > limit:
            self.asked.popitem(last=False)

    def tune(self, options: StackOptions) -> None:
        """What its processes look at whenever they use it: may be said at any time."""
        self.memory.set("spin_us", options.spin_us or 0)
        self.memory.set("batch", options.batch or BATCH)

    def who(self) -> str:
        pids = ", ".join(map(str, [p.pid for p in self.processes] or self.children))
        return f"application {self.number} ({self.name or 'unnamed'}{', process ' + pids if pids else ''})"
