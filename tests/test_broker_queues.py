# SPDX-License-Identifier: Apache-2.0
"""`ethtool -L` under a running broker: what is steered goes on being steered, on the new queues too, and no connection
is lost."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from afxdp_support import set_queues
from broker_support import RunningBroker, running
from click.testing import CliRunner
from preloaded import CLEAN, LIBRARY

from bypass import netns
from bypass.broker import afxdp
from bypass.broker.afxdp import AfxdpSite
from bypass.broker.shared import site_of
from bypass.broker.tools import ask
from bypass.cli.ps import ps
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.policy import parse_policy

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("lab", [{"queues": 8}], indirect=True)]

PORT = 8080
CONNECTIONS = 32
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
mode: MODE
backend: {{kind: afxdp, mode: copy, SIZES}}
flows:
  - name: echo
    match: {{proto: tcp, local: {SERVER_IP}, local_port: {PORT}}}
    action: steer
"""
ECHO = f"""
import asyncio
async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(echo, "0.0.0.0", {PORT}, backlog=128)
    print("serving", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


PREFORK = f"""
import os, socket, sys, threading
listener = socket.create_server(("0.0.0.0", {PORT}), backlog=128)
waits, wakes = os.pipe()
def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.close()
def serve():
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],)).start()
for _ in range(3):
    if os.fork() == 0:
        os.read(waits, 1)
        serve()
threading.Thread(target=serve).start()
print("serving", flush=True)
sys.stdin.readline()
os.write(wakes, bytes(3))
"""


@contextmanager
def broker_of(lab: Lab, mode: str, sizes: str = "ring_size: 256, frames: 8192") -> Iterator[RunningBroker]:
    """It begins with one queue. The test's thread is in the server's namespace."""
    set_queues(lab, 1)
    policy = POLICY.replace("MODE", mode).replace("SIZES", sizes)
    with (
        netns.entered(lab.server_ns),
        running(lambda: site_of(parse_policy(policy)), lab.server_ns) as it,
    ):
        yield it


@pytest.fixture(params=["shared", "direct"])
def broker(lab: Lab, request: pytest.FixtureRequest) -> Iterator[RunningBroker]:
    with broker_of(lab, request.param) as it:
        yield it


@contextmanager
def echo_server(broker: RunningBroker, text: str = ECHO) -> Iterator[subprocess.Popen[str]]:
    """An unmodified program, on the stack and on the kernel's port."""
    env = CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_SOCKET": broker.name}
    argv, pipe = [sys.executable, "-c", text], subprocess.PIPE
    with subprocess.Popen(
        argv, env=env, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as program:
        try:
            assert program.stdout
            assert program.stdout.readline() == "serving\n"
            yield program
        finally:
            os.killpg(program.pid, signal.SIGKILL)


@pytest.fixture
def connect(lab: Lab) -> Iterator[Callable[[], socket.socket]]:
    """Makes connections of the kernel's from the client."""
    with ExitStack() as stack:

        def one() -> socket.socket:
            with netns.entered(lab.client_ns):
                sock = stack.enter_context(socket.socket())
            sock.settimeout(20)
            sock.connect((SERVER_IP, PORT))
            return sock

        yield one


def echoes(socks: list[socket.socket], data: bytes) -> None:
    for sock in socks:
        sock.sendall(data)
    for sock in socks:
        assert sock.recv(len(data), socket.MSG_WAITALL) == data


def kernel_accepted() -> int:
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("PassiveOpens")])


def seen_by_xdp(queue: int) -> int:
    """Packets of a receive queue that the XDP program was run on."""
    told = subprocess.run(["ethtool", "-S", SERVER_IFNAME], check=True, capture_output=True, text=True).stdout
    found = re.search(rf"rx_queue_{queue}_xdp_packets: (\d+)", told)
    return int(found[1]) if found else 0


def steered(broker: RunningBroker) -> int:
    return int(broker.inside(lambda: broker.site.steering.reasons())["steered"].packets)


def test_queues_that_appear_are_served_and_no_connection_is_lost(
    broker: RunningBroker, lab: Lab, connect: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "bypass.broker")
    with echo_server(broker):
        early = [connect() for _ in range(CONNECTIONS)]
        echoes(early, b"before" * 100)
        set_queues(lab, 4)
        echoes(early, b"meanwhile" * 100)
        wait_for(lambda: broker.site.queues == (0, 1, 2, 3), 20, "the queues to be served")
        assert [r.message for r in caplog.records] == [
            f"{SERVER_IFNAME} has got queues, which are served from now on: [1, 2, 3]"
        ]
        accepted, before = kernel_accepted(), steered(broker)
        late = [connect() for _ in range(CONNECTIONS)]
        echoes(early + late, b"after" * 100)
        assert kernel_accepted() == accepted, "the kernel accepts nothing"
        assert steered(broker) > before + 2 * CONNECTIONS
        assert all(seen_by_xdp(queue) for queue in range(4)), "all queues are used"
        assert broker.site.trouble == ""


def test_a_change_is_noticed_at_once(
    broker: RunningBroker, lab: Lab, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By netlink, not only by counting."""
    with echo_server(broker):
        connect()
        monkeypatch.setattr(afxdp, "QUEUES_NS", 10**15)
        time.sleep(1.5)  # the last time that it counts
        set_queues(lab, 4)
        wait_for(lambda: len(broker.site.queues) == 4, 20, "the queues to be served")


def test_what_the_kernel_accepted_for_a_moment_stays_with_it(
    broker: RunningBroker,
    lab: Lab,
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A veth runs no XDP on new queues before the broker has attached it anew, here much too late."""
    reached, go_on = threading.Event(), threading.Event()
    serve = AfxdpSite._serve

    def slowly(self: AfxdpSite, queues: range) -> None:
        reached.set()
        assert go_on.wait(20)
        serve(self, queues)

    monkeypatch.setattr(AfxdpSite, "_serve", slowly)
    with echo_server(broker):
        echoes([connect()], b"the next hop is known")
        accepted = kernel_accepted()
        try:
            set_queues(lab, 4)
            assert reached.wait(20)
            between = [connect() for _ in range(CONNECTIONS)]
            echoes(between, b"half of them by the kernel")
            taken = kernel_accepted() - accepted
            assert 0 < taken < CONNECTIONS
        finally:
            go_on.set()
        wait_for(lambda: broker.site.queues == (0, 1, 2, 3), 20, "the queues to be served")
        assert broker.site.entries.draining == 1
        late = [connect() for _ in range(CONNECTIONS)]
        echoes(between + late, b"all go on")
        assert kernel_accepted() == accepted + taken, "and it has accepted no more"
        for sock in between:
            sock.close()
        wait_for(lambda: broker.site.entries.draining == 0, 20, "the kernel's connections to end")


def test_queues_with_sockets_are_not_taken_away(
    broker: RunningBroker, lab: Lab, connect: Callable[[], socket.socket]
) -> None:
    """The kernel refuses it (net/ethtool/channels.c), and all goes on; more and more can be had."""
    with echo_server(broker):
        socks = [connect() for _ in range(8)]
        for queues in (2, 4):
            set_queues(lab, queues)
            wait_for(lambda queues=queues: len(broker.site.queues) == queues, 20, "the queues to be served")
            echoes(socks, b"more")
            socks += [connect() for _ in range(8)]
            fewer = subprocess.run(
                ["ethtool", "-L", SERVER_IFNAME, "rx", "1", "tx", "1"], capture_output=True, text=True
            )
            assert fewer.returncode != 0
            assert "AF_XDP" in fewer.stderr
            echoes(socks, b"as before")


def test_relatives_that_wake_up_later_serve_the_new_queues_too(
    broker: RunningBroker, lab: Lab, connect: Callable[[], socket.socket]
) -> None:
    """Children of fork() that have touched no socket until then have not heard of the queues."""
    with echo_server(broker, PREFORK) as program:
        early = [connect() for _ in range(4)]
        set_queues(lab, 4)
        wait_for(lambda: len(broker.site.queues) == 4, 20, "the queues to be served")
        echoes(early + [connect() for _ in range(CONNECTIONS)], b"the first one alone")
        assert program.stdin
        print(file=program.stdin, flush=True)
        app = next(iter(broker.server.broker.apps.values()))
        accepted, late = kernel_accepted(), early
        for _ in range(4):
            late = late + [connect() for _ in range(CONNECTIONS)]
            echoes(late, b"with all of its children")
        wait_for(lambda: len(app.processes) > 1, 20, "a child to do something")
        assert kernel_accepted() == accepted


@pytest.mark.parametrize("mode", ["shared", "direct"])
def test_queues_that_cannot_be_served_are_told(
    lab: Lab, mode: str, connect: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "bypass.broker")
    with broker_of(lab, mode, "ring_size: 64, frames: 128") as broker, echo_server(broker):
        echoes([connect()], b"before")
        set_queues(lab, 8)
        wait_for(lambda: bool(broker.site.trouble), 20, "the trouble to be noticed")
        (told,) = ask(broker.name, {"do": "ps"})[:-1]
        assert told["trouble"] == broker.site.trouble
        assert "queue" in told["trouble"]
        shown = CliRunner().invoke(ps, ["--socket", broker.name])
        assert broker.site.trouble in shown.output.splitlines()
        time.sleep(2.5)  # it tries again every second
        assert [r.message for r in caplog.records] == [broker.site.trouble], "once"
