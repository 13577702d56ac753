# SPDX-License-Identifier: Apache-2.0
"""Processes of an application that has a broker: children, programs that follow, the last one's end.

tests/test_posix.py tries the same programs without a broker. Here each case is an application of its own of one broker,
and a few programs serve kernel clients over a veth.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from backends import policy_for
from broker_support import RunningBroker, running
from preloaded import CLEAN, LIBRARY, SURFACES, run
from support import WAIT_S
from test_posix import CASES, LIMIT_S, built

from bypass import netns
from bypass.broker.shared import site_of
from bypass.broker.site import LoopSite
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

PROGRAMS = ("posix_processes", "posix_relatives", "posix_rights")
PORT = 8080
POLICY = f"""
version: 1
mode: %s
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: {PORT}}}
    action: steer
"""
SIZE = 4 << 20

pytestmark = pytest.mark.skipif("stack" not in SURFACES, reason="the preload library lacks calls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("posix")


@pytest.fixture(scope="module")
def loop_broker() -> Iterator[RunningBroker]:
    with running(LoopSite) as broker:
        yield broker


def preloaded(broker: RunningBroker) -> dict[str, str]:
    return CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_SOCKET": broker.name}


@pytest.mark.parametrize(
    ("program", "case"),
    [c for c in CASES if c[0] in PROGRAMS],
    ids=[f"{p}-{c}" for p, c in CASES if p in PROGRAMS],
)
def test_processes_of_an_application_with_a_broker(
    loop_broker: RunningBroker, program: str, case: str, folder: Path
) -> None:
    ended = run([built(program, folder), case], preloaded(loop_broker), LIMIT_S)
    told = f"status {ended.status}, stdout {ended.out!r}, stderr:\n{ended.err}"
    assert (ended.status, ended.out, ended.err) == (0, f"ok {case}\n", ""), told
    loop_broker.wait(lambda: not loop_broker.server.broker.apps)


# ---- Over a veth, with the kernel as the peer --------------------------------------------------------------------
LISTEN = f"""
import os, socket, sys, time
s = socket.create_server(("{SERVER_IP}", {PORT}))
print("ready", flush=True)
"""
SENDS_AND_ENDS = LISTEN + "c, _ = s.accept()\nc.sendall(bytes(range(256)) * ({size} // 256))\n"
SENDS_AND_FOLLOWS = SENDS_AND_ENDS + "os.execv('/bin/true', ['true'])\n"
INETD = (
    LISTEN
    + """
while True:
    c, _ = s.accept()
    if os.fork() == 0:
        os.dup2(c.fileno(), 0)
        os.dup2(c.fileno(), 1)
        os.closerange(3, 64)
        os.execv(sys.argv[1], sys.argv[1:])
    c.close()
    os.waitpid(-1, os.WNOHANG)
"""
)
FOLLOWS = (
    LISTEN
    + """
s.set_inheritable(True)
os.execv(sys.executable, [sys.executable, "-c", '''
import socket
s = socket.socket(fileno=%d)
for _ in range(3):
    c, _ = s.accept()
    c.sendall(b"the next program: " + c.recv(100))
    c.close()
''' % s.fileno()])
"""
)
PREFORK = (
    LISTEN
    + """
for _ in range(3):
    if os.fork() == 0:
        while True:
            c, _ = s.accept()
            c.sendall(b"%d" % os.getpid() + c.recv(100))
            c.close()
print(*(p for p in open("/proc/self/task/%d/children" % os.getpid()).read().split()), flush=True)
os.waitpid(-1, 0)
time.sleep(100)
"""
)


@pytest.fixture
def broker(lab: Lab, mode: str) -> Iterator[RunningBroker]:
    policy = parse_policy(policy_for(lab, POLICY % mode))
    with running(lambda: site_of(policy), lab.server_ns) as it:
        yield it


@contextmanager
def program(lab: Lab, broker: RunningBroker, source: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A program in the server's namespace, which listens; killed at the end, with its children."""
    argv = ["/usr/bin/python3", "-c", source, *args]
    with (
        netns.entered(lab.server_ns),
        subprocess.Popen(argv, env=preloaded(broker), stdout=subprocess.PIPE, text=True) as it,
    ):
        try:
            assert it.stdout is not None
            line = it.stdout.readline()
            assert line == "ready\n", (line, it.wait())
            yield it
        finally:
            it.kill()
            for pid in netns.processes(lab.server_ns):
                if pid != it.pid and is_relative(pid, broker):
                    subprocess.run(["kill", "-KILL", str(pid)], check=False)


def is_relative(pid: int, broker: RunningBroker) -> bool:
    try:
        return broker.name.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def peer(lab: Lab) -> socket.socket:
    with netns.entered(lab.client_ns):
        return socket.create_connection((SERVER_IP, PORT), WAIT_S)


def accepted_by_kernel(lab: Lab) -> int:
    with netns.entered(lab.server_ns):
        lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("PassiveOpens")])


def until_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


@pytest.mark.netns
@pytest.mark.backends(asked=True)
@pytest.mark.parametrize("size", [1024, SIZE])
@pytest.mark.parametrize("source", [SENDS_AND_ENDS, SENDS_AND_FOLLOWS], ids=["exit", "exec"])
def test_what_the_last_process_wrote_arrives_after_its_end(
    lab: Lab, broker: RunningBroker, source: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bypass.broker")  # a failure tells how the application ended
    before = accepted_by_kernel(lab)
    with program(lab, broker, source.replace("{size}", str(size))) as server:
        with peer(lab) as client:
            got = bytearray()
            while server.poll() is None:  # reads no more than the program needs to be through
                got += client.recv(65536)
            assert server.wait() == 0
            got += until_end(client)
            assert got == bytes(range(256)) * (size // 256)
            assert accepted_by_kernel(lab) == before
            [app] = broker.server.broker.apps.values()
            broker.wait(lambda: bool(app.processes))  # the reaper has said hello: the peer has not closed
            assert app.lingering
        broker.wait(lambda: not broker.server.broker.apps)  # TIME_WAIT lasts a minute, the reaper does not


@pytest.mark.netns
@pytest.mark.backends
def test_a_program_is_started_for_each_connection_and_the_parent_closes_at_once(
    lab: Lab, broker: RunningBroker
) -> None:
    before = accepted_by_kernel(lab)
    with program(lab, broker, INETD, "/bin/cat"):
        for n in range(5):
            with peer(lab) as client:
                data = bytes([n]) * 3000
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert until_end(client) == data
    assert accepted_by_kernel(lab) == before


@pytest.mark.netns
@pytest.mark.backends
def test_a_listener_survives_exec(lab: Lab, broker: RunningBroker) -> None:
    before = accepted_by_kernel(lab)
    with program(lab, broker, FOLLOWS):
        for _ in range(3):
            with peer(lab) as client:
                client.sendall(b"hello")
                assert until_end(client) == b"the next program: hello"
    assert accepted_by_kernel(lab) == before


@pytest.mark.netns
@pytest.mark.backends
def test_workers_go_on_when_one_of_them_is_killed(lab: Lab, broker: RunningBroker) -> None:
    before = accepted_by_kernel(lab)
    with program(lab, broker, PREFORK) as server:
        assert server.stdout is not None
        workers = server.stdout.readline().split()
        assert len(workers) == 3
        subprocess.run(["kill", "-KILL", workers[0]], check=True)
        for _ in range(6):
            with peer(lab) as client:
                client.sendall(b"!")
                assert until_end(client).decode().rstrip("!") in workers[1:]
    assert accepted_by_kernel(lab) == before


FORKING = (
    LISTEN
    + """
import select
while True:
    c, _ = s.accept()
    if os.fork() == 0:
        e = select.epoll()
        e.register(c, select.EPOLLIN)
        c.sendall(b"%d" % os.getpid())
        while sys.argv[1] != "epoll" or e.poll():
            data = c.recv(100)
            if not data:
                os._exit(0)
            c.sendall(data)
    c.close()
"""
)


def wakes(pid: int) -> int:
    """How often its first thread has slept."""
    text = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def asks(sock: socket.socket, times: int) -> None:
    for _ in range(times):
        sock.sendall(b"?")
        assert sock.recv(1) == b"?"


@pytest.mark.netns
@pytest.mark.backends
@pytest.mark.parametrize("call", ["recv", "epoll"])
def test_children_for_which_nothing_comes_are_not_woken_by_what_comes_for_another(
    lab: Lab, broker: RunningBroker, call: str
) -> None:
    with program(lab, broker, FORKING, call), ExitStack() as stack:
        *idle, busy = [stack.enter_context(peer(lab)) for _ in range(4)]
        *sleepers, worker = [int(sock.recv(20)) for sock in (*idle, busy)]
        asks(busy, 200)
        before, began = [wakes(pid) for pid in sleepers], time.monotonic()
        asks(busy, 1000)
        looks = 100 + 60 * (time.monotonic() - began)  # one each 32 ms, and what it takes to find out
        assert all(wakes(pid) - was < looks for pid, was in zip(sleepers, before, strict=True))
        for sock in idle:
            asks(sock, 1)
        asks(busy, 200)
        os.kill(worker, signal.SIGSTOP)  # the only one that watched
        for sock in idle:
            asks(sock, 1)
        os.kill(worker, signal.SIGCONT)
        asks(busy, 1)
