# SPDX-License-Identifier: Apache-2.0
"""What a running process tells about itself, for `bypass flows` and `bypass stats`.

A process that steers flows of an interface listens on a Unix socket and answers questions with one JSON document
each. What lives here: that server (no thread: its owner calls poll() when its descriptor is readable), the client,
and what the documents hold. What does not: tables for people (`cli/flows.py`, `cli/stats.py`).

The socket's name is abstract, `@bypass/IFNAME/PID`: it belongs to the network namespace, as the interface does, and
ends with its process however that ends, so that nothing is ever left behind. An abstract name has no file mode;
instead each side asks the kernel who the other is: the server answers root and its own user, the client believes
nobody else.

    client: "flows 1000\\n"     server: {"interface": ...}, then end of stream

Source: unix(7).
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

from bypass.errors import BypassError
from bypass.rules import protocol_name
from bypass.steering_api import Steers

MAX_CLIENTS = 8
CLIENT_S = 5.0
"""How long a client may take to ask and to read."""
MAX_REQUEST_BYTES = 64
DEFAULT_LIMIT = 1000
"""Rules and entries of an answer, those with most packets first."""
COUNTED_CONNECTIONS = 10_000
PREFIX = "@bypass/"

Answer = Mapping[str, Any]


class Source(Protocol):
    """Who answers. Called in the thread that polls the server."""

    def flows(self, limit: int) -> Answer:
        """Rules and live entries, at most `limit` of each."""

    def stats(self, limit: int) -> Answer:
        """Counters."""


# ---- Server -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Client:
    sock: socket.socket
    since: float
    request: bytes = b""
    rest: memoryview = field(default_factory=lambda: memoryview(b""))  # of the answer


class StatusServer:
    """Answers questions about this process. Belongs to the network namespace of the calling thread.

    Args:
        ifname: the interface it is about.
        source: gives the answers.
    """

    def __init__(self, ifname: str, source: Source) -> None:
        self._source = source
        self._clients: dict[int, _Client] = {}
        self._epoll = select.epoll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listen(ifname)
        except BaseException:
            self.close()
            raise

    def _listen(self, ifname: str) -> None:
        """A process may serve one interface twice, once for each stack: the second gets a number."""
        for number in range(1, 100):
            name = f"{PREFIX}{ifname}/{os.getpid()}" + (f".{number}" if number > 1 else "")
            try:
                self._listener.bind("\0" + name[1:])
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        self._listener.listen(MAX_CLIENTS)
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when poll() has something to do."""
        return self._epoll.fileno()

    def close(self) -> None:
        for client in self._clients.values():
            client.sock.close()
        self._clients.clear()
        self._listener.close()
        self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def poll(self) -> None:
        """Accepts, reads and writes what can be done without waiting."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            else:
                self._serve(self._clients[fd])
        now = time.monotonic()
        for client in [c for c in self._clients.values() if now - c.since > CLIENT_S]:
            self._drop(client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if len(self._clients) >= MAX_CLIENTS or _peer_uid(sock) not in (0, os.geteuid()):
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(sock, time.monotonic())
        self._epoll.register(sock, select.EPOLLIN)

    def _serve(self, client: _Client) -> None:
        try:
            if not client.rest:
                self._read(client)
            else:
                client.rest = client.rest[client.sock.send(client.rest) :]
                if not client.rest:
                    self._drop(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)  # it went away: nobody waits for the answer

    def _read(self, client: _Client) -> None:
        got = client.sock.recv(MAX_REQUEST_BYTES)
        client.request += got
        if b"\n" in client.request:
            client.rest = memoryview(self._answer(client.request.partition(b"\n")[0]))
            self._epoll.modify(client.sock, select.EPOLLOUT)
        elif not got or len(client.request) >= MAX_REQUEST_BYTES:
            self._drop(client)

    def _answer(self, request: bytes) -> bytes:
        asked = re.fullmatch(rb"(flows|stats) ([0-9]{1,9})", request)
        if asked is None:
            return json.dumps({"error": "asks for neither flows nor stats"}).encode()
        give: Callable[[int], Answer] = self._source.flows if asked[1] == b"flows" else self._source.stats
        return json.dumps(give(int(asked[2]))).encode()

    def _drop(self, client: _Client) -> None:
        del self._clients[client.sock.fileno()]
        self._epoll.unregister(client.sock)
        client.sock.close()


def _peer_uid(sock: socket.socket) -> int:
    """Of the process at the other end, as the kernel knows it."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


# ---- Client -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Instance:
    """A process that serves flows of an interface. `name`: of its socket."""

    ifname: str
    pid: int
    name: str


def instances(ifname: str | None = None) -> list[Instance]:
    """The processes of this network namespace that can be asked; of one interface, or of all."""
    found = set()
    for line in Path("/proc/thread-self/net/unix").read_text().splitlines():
        name = line.rpartition(" ")[2]
        match = re.fullmatch(re.escape(PREFIX) + r"([^/]+)/([0-9]+)(\.[0-9]+)?", name)
        if match is not None and ifname in (None, match[1]):
            found.add(Instance(match[1], int(match[2]), name))
    return sorted(found, key=lambda i: (i.ifname, i.pid, i.name))


def ask(
    instance: Instance, what: str, limit: int = DEFAULT_LIMIT, timeout: float = CLIENT_S
) -> dict[str, Any]:
    """One answer of a process.

    Args:
        instance: whom to ask.
        what: `flows` or `stats`.
        limit: rules and entries at most.
        timeout: seconds.

    Raises:
        BypassError: it does not answer, or is not who it says.
    """
    deadline = time.monotonic() + timeout
    data = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect("\0" + instance.name[1:])
            if _peer_uid(sock) not in (0, os.geteuid()):
                raise BypassError(f"{instance.name} belongs to user {_peer_uid(sock)}: not believed")
            sock.sendall(f"{what} {limit}\n".encode())
            while part := sock.recv(1 << 16):
                data += part
                sock.settimeout(max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            raise BypassError(
                f"process {instance.pid} does not answer: it answers while it waits in a call of its stack, or runs "
                "its event loop"
            ) from None
        except OSError as error:
            raise BypassError(f"process {instance.pid} cannot be asked: {error.strerror}") from error
    if not data:
        raise BypassError(f"process {instance.pid} refuses: only root and its own user may ask")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise BypassError(f"process {instance.pid}: {answer['error']}")
    return answer


# ---- What is told -------------------------------------------------------------------------------------------------


class Snapshot:
    """The state of one steered interface, as plain data.

    Args:
        steering: who decides about its packets.
        device: `bypass.afxdp.AfxdpDevice`.
        core: `bypass.core.CoreStack`; None: frames are read raw.
        name: of the stack.
        more: further counters, by what they count.
    """

    def __init__(
        self,
        steering: Steers,
        device: Any,
        core: Any = None,
        name: str = "",
        more: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._steering = steering
        self._device = device
        self._core = core
        self._name = name
        self._more = more

    def _head(self) -> dict[str, Any]:
        policy = self._steering.policy
        hardware = getattr(self._device, "hardware", None)  # bypass.hwflow.inforce.InForce
        return {
            "interface": self._device.ifname,
            "pid": os.getpid(),
            "name": self._name,
            "policy": policy.path,
            "mode": self._device.mode,
            "mode_reason": self._device.mode_reason,
            "xdp_mode": getattr(self._device, "xdp_mode", ""),  # of DPDK's: there is no XDP
            "queues": list(self._device.queue_numbers),
            "hardware": None if hardware is None else {"rules": hardware.rules, "reason": hardware.reason},
        }

    def flows(self, limit: int) -> Answer:
        """`rules` and `entries` with packets and bytes; `rules_total` and `entries_total` are their whole numbers."""
        counts = self._steering.rules()
        rules = sorted(self._steering.policy.flows, key=lambda r: (-counts[r.name].packets, r.index))[:limit]
        live = self._steering.entries()
        entries = sorted(live.values(), key=lambda pair: (-pair[1].packets, pair[0].entry))[:limit]
        return {
            **self._head(),
            "rules": [
                {
                    "index": r.index,
                    "name": r.name,
                    "line": r.line,
                    "match": r.match_text(),
                    "action": r.action,
                    **counts[r.name]._asdict(),
                }
                for r in rules
            ],
            "rules_total": len(counts),
            "entries": [
                {
                    "entry": e.entry,
                    "proto": protocol_name(e.proto),
                    "local": None if e.laddr is None else str(e.laddr),
                    "local_port": e.lport,
                    "last_local_port": e.last_port,
                    "remote": None if e.raddr is None else str(e.raddr),
                    "remote_port": e.rport,
                    "drain": e.drain,
                    **count._asdict(),
                }
                for e, count in entries
            ],
            "entries_total": len(live),
        }

    def stats(self, limit: int) -> Answer:
        """Counters of the steering program, the guard, the rings and the stack. `limit` bounds nothing here;
        `connections` counts the states of the first COUNTED_CONNECTIONS."""
        counts = self._steering.reasons()
        answer = {
            **self._head(),
            "reasons": [
                {"name": r.name, "verdict": r.verdict, "text": r.text, **counts[r.name]._asdict()}
                for r in self._steering.reason_list
            ],
            "guard": {
                "active": self._steering.guard.active,
                "reason": self._steering.guard.reason,
                "counts": {name: c._asdict() for name, c in self._steering.guard_counts().items()},
            },
            "rings": {str(queue): counters for queue, counters in self._device.statistics().items()},
            "more": self._more(),
        }
        if self._core is not None:
            states: dict[str, int] = {}
            for conn in islice(self._core.conns(), COUNTED_CONNECTIONS):
                states[conn.state] = states.get(conn.state, 0) + 1
            answer |= {"stack": self._core.stats(), "connections": states, "in_use": self._core.audit()}
        return answer
