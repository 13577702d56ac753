# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a DPDK port, for an embedded stack and for a broker's bypass-fwd alike: one sentence that says
what to do, or a recovery; and nothing is left either way.

Here: starts that cannot be, second starts, a pool without free frames. Elsewhere: a link that goes and comes back, a
port that is removed (tests/test_dpdk_embedded.py, tests/test_broker_dpdk.py, tests/test_sockets_embedded.py), and what
a port says of itself (tests/test_dpdk_port.py).
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from dpdk_support import WAIT_S, in_child, say
from preloaded import CLEAN, LIBRARY
from test_broker_dpdk import interfaces
from test_broker_takeover import Program, down, echo_at, up
from test_cli_broker import bypass, folder, others, wait_until  # noqa: F401 (fixture)
from test_dpdk_embedded import echo_server, frames_left, opened, refused, running, said

from bypass import netns
from bypass.broker.tools import listening
from bypass.fwd import Forwarder
from bypass.lab import SERVER_IFNAME, SERVER_IP, WIRE_IFNAME, Lab, dpdk_policy

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(60),
    pytest.mark.parametrize("lab", [{"wire": True, "queues": 1}], indirect=True),
]

PORT = 8080
RULES = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp}}
flows:
  - {{name: web, match: {{proto: tcp, local: {SERVER_IP}, local_port: {PORT}-8089}}, action: steer}}
"""
POLICY = dpdk_policy(RULES)
DEVICE = f"net_af_packet0,iface={WIRE_IFNAME}"


@pytest.fixture
def place(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """A folder; the test's thread is in the server's namespace, in which nothing is left afterwards."""
    with netns.entered(lab.server_ns):
        yield tmp_path
        nothing_left(lab)


def nothing_left(lab: Lab) -> None:
    wait_until(lambda: not others(lab))
    wait_until(lambda: interfaces() == {"lo", WIRE_IFNAME})
    assert [name for name in listening() if "bypass" in name] == []


# ---- Starts that cannot be ---------------------------------------------------------------------------------------
def embedded(lab: Lab, text: str, folder: Path) -> str:  # noqa: F811
    """What a program is told that opens a stack by this policy; empty: it could."""
    return str(refused(text, netns=lab.server_ns))


def brokers(lab: Lab, text: str, folder: Path) -> str:  # noqa: F811
    """What `bypass up` says."""
    policy, name = folder / "policy.yaml", str(folder / "broker.sock")
    policy.write_text(text)
    done = bypass("up", "-c", str(policy), "--socket", name)
    if done.returncode == 0:
        down(name)
        return ""
    assert (done.returncode, done.stdout) == (2, "")
    assert not os.path.exists(name)
    return str(done.stderr.strip())


STARTS: dict[str, Callable[[Lab, str, Path], str]] = {"embedded": embedded, "broker": brokers}
CANNOT_BE = {
    "no hugepages": (
        POLICY.replace("hugepages: false", "hugepages: true"),
        ["no hugepages are free", "bypass nic hugepages", "backend.eal.hugepages: false"],
    ),
    "no such driver": (
        POLICY.replace("net_af_packet0", "net_nonsense0"),
        ["no DPDK device", "net_nonsense0"],
    ),
    "no such interface": (POLICY.replace(WIRE_IFNAME, "nosuch0"), ["nosuch0", "No such device"]),
    "no such PCI device": (POLICY.replace(DEVICE, "0000:ff:1f.7"), ["no PCI device '0000:ff:1f.7' here"]),
    "too many queues": (
        POLICY.replace("kind: dpdk", "kind: dpdk\n  queues: 4"),
        ["4 queues: it has 1", "qpairs=4"],
    ),
    "more memory than there is": (
        POLICY.replace("kind: dpdk", "kind: dpdk\n  frames: 400000"),
        ["400000 frames", "backend.eal.memory"],
    ),
}


@pytest.mark.parametrize("fault", CANNOT_BE)
@pytest.mark.parametrize("start", STARTS)
def test_what_cannot_be_is_one_sentence_that_says_what_to_do(
    lab: Lab, place: Path, start: str, fault: str
) -> None:
    if fault == "no hugepages":
        free = Path("/sys/kernel/mm/hugepages").glob("*/free_hugepages")
        if any(int(page.read_text()) for page in free):
            pytest.skip("not here: this machine has free hugepages")
    text, words = CANNOT_BE[fault]
    told = STARTS[start](lab, text, place)
    assert all(word in told for word in words), told
    assert "\n" not in told
    nothing_left(lab)
    if fault == "no such interface":
        assert STARTS[start](lab, POLICY, place) == "", "the next one can"


# ---- A second start ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("second", STARTS)
@pytest.mark.parametrize("first", STARTS)
def test_a_second_owner_is_refused_and_the_first_one_serves(
    lab: Lab,
    place: Path,
    folder: Path,  # noqa: F811
    first: str,
    second: str,
) -> None:
    with ExitStack() as stack:
        if first == "embedded":
            child = stack.enter_context(running(lab, echo_server, POLICY))
        else:
            policy, name = place / "first.yaml", str(folder / "first.sock")
            policy.write_text(POLICY)
            up(policy, name)
            stack.callback(down, name)
            served = stack.enter_context(Program(name, 0))
            assert served.do("listen", SERVER_IP, PORT) == str(PORT)
        told = STARTS[second](lab, POLICY, place)
        assert f"{SERVER_IFNAME}: " in told
        assert "\n" not in told
        by_another_name = STARTS[second](
            lab, POLICY.replace(f"interface: {SERVER_IFNAME}", "interface: other0"), place
        )
        assert re.search(rf"{DEVICE}: process \d+ has this port already: end it first$", by_another_name)
        echo_at(lab, PORT)
        if first == "embedded":
            child.tell("end")
            assert child.result()["conserved"]


# ---- No frame is free --------------------------------------------------------------------------------------------
SMALL = POLICY.replace("kind: dpdk", "kind: dpdk\n  ring_size: 64\n  frames: 256")
CLIENTS, EACH = 4, 3 << 20


def hoard(server, clients, told):  # type: ignore[no-untyped-def]  # HOARD runs it without this module's imports
    """Takes connections, and reads nothing until it is told to."""
    kept = [server.accept()[0] for _ in range(clients)]
    told()
    for sock in kept:
        with sock:
            seen = hashlib.sha256()
            while data := sock.recv(65536):
                seen.update(data)
            sock.sendall(seen.digest())
    with server.accept()[0] as sock:
        sock.sendall(sock.recv(100))


HOARD = f"""
import hashlib, socket, sys
{inspect.getsource(hoard)}
with socket.create_server(("{SERVER_IP}", {PORT})) as server:
    print("up", flush=True)
    hoard(server, {CLIENTS}, sys.stdin.readline)
"""


@in_child
def hoards(text: str) -> dict[str, Any]:
    """The same, embedded."""
    with opened(text) as stack:
        with stack.create_server((SERVER_IP, PORT)) as server:
            say("up")
            hoard(server, CLIENTS, lambda: said(stack))
        stack.run(timeout=0.2)
        return {"scarce": stack.stats()["tcp_in_no_memory"], **frames_left(stack)}


class Sender:
    """A kernel connection that sends as much as it can, and is told the hash of it. Not by BBR, which takes drops for a
    policer: it goes on by a few packets in 100 ms for many seconds after they have ended.
    """

    def __init__(self, lab: Lab) -> None:
        self.data = os.urandom(EACH)
        self.digest = b""
        self.sent = 0
        self.sock = netns.run(lab.client_ns, lambda: socket.create_connection((SERVER_IP, PORT), WAIT_S))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        with self.sock:
            while self.sent < EACH:
                self.sent += self.sock.send(self.data[self.sent : self.sent + 65536])
            self.sock.shutdown(socket.SHUT_WR)
            self.digest = self.sock.recv(32, socket.MSG_WAITALL)

    def arrived(self) -> bool:
        self.thread.join(WAIT_S)
        return self.digest == hashlib.sha256(self.data).digest()


def stuck(senders: list[Sender]) -> None:
    """They begin, until none of them sends any more. (Connected before: without memory a stack answers no SYN.)"""
    for sender in senders:
        sender.thread.start()
    before = -1
    while (now := sum(s.sent for s in senders)) != before:
        before = now
        select.select([], [], [], 0.3)


def test_an_embedded_stack_without_a_free_frame_recovers(lab: Lab, place: Path) -> None:
    """What was not read holds all of them. The kernel sends again what was lost, and is heard when there is room."""
    with hoards.start(SMALL, netns=lab.server_ns) as child:
        assert child.line() == "up"
        senders = [Sender(lab) for _ in range(CLIENTS)]
        stuck(senders)
        assert not any(s.digest for s in senders)
        child.tell("read")
        assert [s.arrived() for s in senders] == [True] * CLIENTS
        echo_at(lab, PORT)
        result = child.result()
    assert (result["misplaced"], result["conserved"]) == (0, True)
    assert result["scarce"] > 0, "it never was without"


def test_a_program_that_reads_nothing_costs_its_neighbour_nothing(
    lab: Lab,
    place: Path,
    folder: Path,  # noqa: F811
) -> None:
    """Of a broker's port, with as few frames: what it does not read fills its own memory, and not the port's."""
    policy, name = place / "policy.yaml", str(folder / "broker.sock")
    policy.write_text(SMALL)
    up(policy, name)
    env = CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_SOCKET": name}
    with (
        Program(name, 0) as neighbour,
        subprocess.Popen(
            ["/usr/bin/python3", "-c", HOARD],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as program,
    ):
        assert program.stdout is not None
        assert program.stdout.readline() == "up\n"
        assert neighbour.do("listen", SERVER_IP, 8081) == "8081"
        senders = [Sender(lab) for _ in range(CLIENTS)]
        stuck(senders)
        assert not any(s.digest for s in senders)
        for _ in range(20):
            echo_at(lab, 8081)
        assert program.stdin is not None
        program.stdin.write("read\n")
        program.stdin.flush()
        assert [s.arrived() for s in senders] == [True] * CLIENTS
        echo_at(lab, PORT)
        assert program.wait(WAIT_S) == 0
        (where,) = (n for n in listening() if n.startswith(f"@bypass/fwd/{SERVER_IFNAME}/"))
        looks = Forwarder.connect(where, broker=False)

        def at_rest() -> bool:
            frames = looks.dpdk_audit()
            return frames["misplaced"] == frames["bad_free"] == frames["stack"] == frames["stack_tx"] == 0

        wait_until(at_rest)
        looks.close()
        down(name)
