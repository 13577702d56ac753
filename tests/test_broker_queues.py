# SPDX-License-Identifier: Apache-2.0
"""`ethtool -L` under a running broker: what is steered goes on being steered, on the new queues too, and no connection
is lost."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from afxdp_support import set_queues
from broker_support import RunningBroker, running
from preloaded import CLEAN, LIBRARY

from bypass import netns
from bypass.broker.interface import InterfaceSite
from bypass.broker.shared import site_of
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.policy import parse_policy

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)]

PORT = 8080
CONNECTIONS = 32
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
mode: MODE
backend: {{kind: afxdp, mode: copy, ring_size: 256, frames: 8192}}
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


@pytest.fixture(params=["shared"])
def broker(lab: Lab, request: pytest.FixtureRequest) -> Iterator[RunningBroker]:
    """It begins with one queue. The test's thread is in the server's namespace."""
    set_queues(lab, 1)
    policy = POLICY.replace("MODE", request.param)
    with (
        netns.entered(lab.server_ns),
        running(lambda: site_of(parse_policy(policy)), lab.server_ns) as it,
    ):
        yield it


@contextmanager
def echo_server(broker: RunningBroker) -> Iterator[subprocess.Popen[str]]:
    """An unmodified program, on the stack and on the kernel's port."""
    env = CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_SOCKET": broker.name}
    with subprocess.Popen(
        [sys.executable, "-c", ECHO], env=env, stdout=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stdout
            assert program.stdout.readline() == "serving\n"
            yield program
        finally:
            program.kill()


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


def test_what_the_kernel_accepted_for_a_moment_stays_with_it(
    broker: RunningBroker,
    lab: Lab,
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A veth runs no XDP on new queues before the broker has attached it anew, here much too late."""
    reached, go_on = threading.Event(), threading.Event()
    serve = InterfaceSite._serve

    def slowly(self: InterfaceSite, queues: range) -> None:
        reached.set()
        assert go_on.wait(20)
        serve(self, queues)

    monkeypatch.setattr(InterfaceSite, "_serve", slowly)
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
