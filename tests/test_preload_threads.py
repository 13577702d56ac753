# SPDX-License-Identifier: Apache-2.0
"""Who watches the interface in a program with a thread for each connection (tests/c/preload_threads.c): what comes for
one thread wakes that thread alone, and one that computes holds up nobody."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import preloaded
import pytest
from backends import policy_for
from broker_support import running
from c_programs import run as run_tool

from bypass import netns
from bypass.broker.shared import site_of
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

EXCHANGES = 2000
PORT = 7000
TIMEOUT_S = 30
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: echo
    match: {{proto: tcp, local: {SERVER_IP}, local_port: {PORT}}}
    action: steer
"""

pytestmark = [pytest.mark.netns, pytest.mark.backends]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("threads") / "threads"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    run_tool("gcc", *flags, "tests/c/preload_threads.c", "-o", out)
    return out


@contextmanager
def server(program: Path, lab: Lab, mode: str) -> Iterator[int]:
    """Its process."""
    policy = parse_policy(policy_for(lab, POLICY + f"mode: {mode}\n"))
    with running(lambda: site_of(policy), lab.server_ns) as broker:
        env = preloaded.CLEAN | {"LD_PRELOAD": str(preloaded.LIBRARY), "BYPASS_SOCKET": broker.name}
        argv = lab.command("server", [str(program), SERVER_IP, str(PORT)])
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "listens\n"
                yield next(pid for pid in netns.processes(lab.server_ns) if _name(pid) == program.name)
            finally:
                process.send_signal(signal.SIGKILL)


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def connect(lab: Lab) -> socket.socket:
    with netns.entered(lab.client_ns):
        sock = socket.create_connection((SERVER_IP, PORT), TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def exchange(sock: socket.socket, byte: bytes = b"x") -> None:
    sock.sendall(byte)
    assert sock.recv(1) == byte


def sleeps(pid: int, tid: int) -> int:
    """How often that thread has gone to sleep, ever."""
    told = Path(f"/proc/{pid}/task/{tid}/status").read_text()
    return int(told.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_who_accepts_is_not_woken_for_what_others_read(program: Path, lab: Lab, mode: str) -> None:
    with server(program, lab, mode) as pid, closing(connect(lab)) as sock:
        for _ in range(100):
            exchange(sock)
        before = {int(tid): sleeps(pid, int(tid)) for tid in os.listdir(f"/proc/{pid}/task")}
        for _ in range(EXCHANGES):
            exchange(sock)
        slept = {tid: sleeps(pid, tid) - n for tid, n in before.items()}
    assert slept[pid] < EXCHANGES / 10, slept
    assert sum(slept.values()) > EXCHANGES / 2, f"nobody slept for the requests: {slept}"


def test_a_thread_that_computes_holds_up_nobody(program: Path, lab: Lab, mode: str) -> None:
    """It watched the interface before, and did not tell anybody that it would not be back soon."""
    with server(program, lab, mode), closing(connect(lab)) as computes, closing(connect(lab)) as asks:
        exchange(asks)
        for _ in range(200):
            exchange(computes)
        computes.sendall(b"c")
        for _ in range(10):
            exchange(asks)
            assert not select.select([computes], [], [], 0)[0], "it was done before the other had an answer"
        assert computes.recv(1) == b"c"


LISTENS_AGAIN = f"""
import socket
for _ in range(300):
    s = socket.socket()
    s.bind(("{SERVER_IP}", {PORT}))
    s.listen()
    s.close()
print("as often as it likes")
"""


def test_a_port_can_be_listened_at_again_at_once(lab: Lab, mode: str) -> None:
    """Whoever keeps the kernel's socket beside the program has let go of it when close() returns."""
    policy = parse_policy(policy_for(lab, POLICY + f"mode: {mode}\n"))
    with running(lambda: site_of(policy), lab.server_ns) as broker:
        env = preloaded.CLEAN | {"LD_PRELOAD": str(preloaded.LIBRARY), "BYPASS_SOCKET": broker.name}
        argv = lab.command("server", ["/usr/bin/python3", "-c", LISTENS_AGAIN])
        done = preloaded.run(argv, env, TIMEOUT_S)
    assert (done.status, done.out, done.err) == (0, "as often as it likes\n", "")
