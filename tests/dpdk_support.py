# SPDX-License-Identifier: Apache-2.0
"""What the DPDK tests share: a process for each test, since EAL starts once in a process and leaves threads; and a
stack on a port, driven by hand.

    @in_child
    def echoes() -> dict[str, Any]: ...      # runs in a fresh interpreter; what it returns travels as JSON

    assert echoes()["audit"] == CLEAN
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec

import pytest
from bypass._core import lib
from conftest import missing
from support import WAIT_S

from bypass.core import Config, CoreStack
from bypass.policy_backend import DpdkBackend, EalOptions

P = ParamSpec("P")
PLAIN = EalOptions(lcores=(0,), hugepages=False)
RING = 256
ETH_P_ALL = 3  # linux/if_ether.h: what is sent, too
SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def require_dpdk() -> None:
    """Goes on only where the plug-in was built."""
    from bypass.dpdk_backend.eal import load_plugin
    from bypass.errors import DeviceError

    try:
        load_plugin()
    except DeviceError as error:
        missing([str(error)])


needs_dpdk = pytest.fixture(autouse=True, scope="module", name="dpdk")(require_dpdk)
"""For `from dpdk_support import needs_dpdk` in a test module."""


def backend(device: str, **options: Any) -> DpdkBackend:
    """A policy's `backend` without hugepages, with small rings."""
    return DpdkBackend(device, **{"ring_size": RING, "eal": PLAIN, **options})


class Child:
    """A function of a test module, running in an interpreter of its own. Reads one JSON line when it ends."""

    def __init__(self, name: str, args: list[Any], netns: str | None) -> None:
        command = [sys.executable, __file__, name, json.dumps(args)]
        if netns is not None:
            command = ["ip", "netns", "exec", netns, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    def line(self) -> Any:
        """The next line that it says by `say()`."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"the child ended with {self.process.wait()}"
        return json.loads(text)

    def tell(self, what: Any) -> None:
        """A line for its `hear()`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        assert self.process.stdout is not None
        out = self.process.stdout.read()  # not communicate(): readline() may have read ahead
        assert self.process.wait(WAIT_S) == 0, f"the child ended with {self.process.returncode}"
        return json.loads(out.splitlines()[-1])

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class InChild:
    """See in_child."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def start(self, *args: Any, netns: str | None = None) -> Child:
        return Child(f"{self.function.__module__}:{self.function.__name__}", list(args), netns)

    def __call__(self, *args: Any, netns: str | None = None) -> Any:
        with self.start(*args, netns=netns) as child:
            return child.result()


def in_child(function: Callable[..., Any]) -> InChild:
    """The function runs in a fresh interpreter when it is called; arguments and result are JSON."""
    return InChild(function)


def say(what: Any) -> None:
    """From a child, for its parent's `line()`."""
    print(json.dumps(what), flush=True)


def hear() -> Any:
    """In a child: what its parent tells."""
    return json.loads(sys.stdin.readline())


# ---- A stack on a port ---------------------------------------------------------------------------------------------
class Node:
    """A stack that does ARP and ping itself, on a netdev, polled by hand.

    Args:
        device: has `netdev` and `audit()`.
        address: its IPv4 address, of a /24.
    """

    def __init__(self, device: Any, address: str, **config: Any) -> None:
        flags = lib.BYPASS_F_ARP | lib.BYPASS_F_PING | lib.BYPASS_F_RST
        self.device = device
        self.core = CoreStack(
            device.netdev,
            config=Config(conns=64, **config),
            flags=flags,
            now_ns=time.monotonic_ns(),
            owner=device,
        )
        self.core.addr_add(address, 24)
        self.trouble: set[int] = set()

    def poll(self) -> None:
        got = self.core.poll(time.monotonic_ns())
        if got < 0:
            self.trouble.add(-got)

    def listen(self, port: int) -> int:
        core = self.core
        sock = core.socket(lib.BYPASS_STREAM)
        core.bind(sock, ("", port))
        core.listen(sock, 16)
        return sock

    def close(self) -> None:
        self.core.close()

    def settled(self) -> dict[str, Any]:
        """Closes the stack; where all frames are afterwards."""
        self.core.close()
        return places(self.device)


def places(device: Any) -> dict[str, Any]:
    a = device.audit()
    return {"conserved": a.conserved, "bad": a.misplaced + a.bad_free, "stack": a.stack + a.stack_tx}


CLEAN = {"conserved": True, "bad": 0, "stack": 0}


def until(condition: Callable[[], Any], *nodes: Node, seconds: float = WAIT_S) -> Any:
    """Polls the nodes until the condition holds; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        for node in nodes:
            node.poll()
    return value


def serve_echo(node: Node, sock: int, size: int) -> None:
    """Accepts one connection and sends back `size` bytes."""
    conn = until(lambda: max(node.core.accept(sock), 0), node)
    done, pending = 0, b""
    while done < size:
        node.poll()
        if not pending:
            got = node.core.recv(conn, 1 << 16)
            pending = got if isinstance(got, bytes) else b""
        if pending and (n := node.core.send(conn, pending)) > 0:
            pending = pending[n:]
            done += n
    finish(node, conn)


def finish(node: Node, conn: int) -> None:
    """Closes a connection and drives the stack until it is over (or in TIME_WAIT)."""
    node.core.close_socket(conn)
    until(lambda: all(c.state in ("TIME_WAIT", "LISTEN") for c in node.core.conns()), node)


def ask_echo(node: Node, address: tuple[str, int], data: bytes) -> bytes:
    """Sends data over TCP and gives back what returns."""
    core = node.core
    sock = core.socket(lib.BYPASS_STREAM)
    core.connect(sock, address)
    sent, got = 0, b""

    def step() -> bool:
        nonlocal sent, got
        if sent < len(data) and (n := core.send(sock, data[sent : sent + 65536])) > 0:
            sent += n
        more = core.recv(sock, 1 << 16)
        if isinstance(more, bytes):
            got += more
        elif more not in (-errno.EAGAIN, -errno.ENOTCONN):
            raise OSError(-more, os.strerror(-more))
        return len(got) >= len(data)

    until(step, node)
    finish(node, sock)
    return got


@contextmanager
def affinity_kept() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    assert os.sched_getaffinity(0) == before


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    sys.path.insert(0, str(Path(__file__).parent))
    say(getattr(importlib.import_module(module), name).function(*json.loads(sys.argv[2])))


# ---- Sizes on a wire ---------------------------------------------------------------------------------------------
def every_frame(ifname: str) -> socket.socket:
    """Sees what comes and goes by an interface of the calling thread's namespace; for longest()."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    wire.bind((ifname, ETH_P_ALL))
    wire.setblocking(False)
    return wire


def longest(wire: socket.socket) -> tuple[int, int]:
    """Of the IP packets since the last call: bytes of the longest one that came, and that went."""
    found = {True: 0, False: 0}
    with suppress(BlockingIOError):
        while True:
            frame, where = wire.recvfrom(1 << 16)
            went = where[2] == socket.PACKET_OUTGOING
            found[went] = max(found[went], len(frame) - 14)
    return found[False], found[True]
