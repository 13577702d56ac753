# SPDX-License-Identifier: Apache-2.0
"""`bypass conns` of users whose programs are not dumpable: the broker has their memory read, and tells nobody of
others."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from backends import policy_for
from broker_support import WAIT_S, RunningBroker, new_name, running
from preloaded import CLEAN, LIBRARY, ROOT

from bypass import netns
from bypass.broker import look, looks, protocol
from bypass.broker.server import listen
from bypass.broker.shared import site_of
from bypass.broker.tools import Asking, ask
from bypass.errors import BypassError
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

pytestmark = [pytest.mark.netns, pytest.mark.backends(asked=True)]

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
ALICE, BOB, CAROL = (64734 - 3 * WORKER - i for i in range(3))  # nobody else on this machine is one of them
PORTS = {ALICE: 8080, BOB: 9090}
OTHER = 7070
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
mode: shared
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - {{name: alice, match: {{proto: tcp, local_port: 8080}}, action: steer, allow: {{user: {ALICE}}}}}
  - {{name: bob, match: {{proto: tcp, local_port: 9090}}, action: steer, allow: {{user: {BOB}}}}}
"""
SERVER = """
import socket, sys
granted = socket.create_server((sys.argv[1], int(sys.argv[2])))
refused = socket.create_server((sys.argv[1], int(sys.argv[3])))
print(granted.fileno(), refused.fileno(), flush=True)
connection, _ = granted.accept()
print(connection.fileno(), flush=True)
sys.stdin.read()
"""


@dataclass
class Program:
    """Of a user: a listener on the stack, one on the kernel, a connection."""

    uid: int
    pid: int
    granted: int
    refused: int
    connection: int


@pytest.fixture
def broker(lab: Lab) -> Iterator[RunningBroker]:
    """The test's thread is in the server's namespace."""
    with (
        netns.entered(lab.server_ns),
        running(lambda: site_of(parse_policy(policy_for(lab, POLICY))), lab.server_ns) as it,
    ):
        yield it


@contextmanager
def program_of(broker: RunningBroker, lab: Lab, uid: int) -> Iterator[Program]:
    env = CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_SOCKET": broker.name, "BYPASS_PROCNAME": f"of-{uid}"}
    argv = [sys.executable, "-c", SERVER, SERVER_IP, str(PORTS[uid]), str(OTHER + uid % 100)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, env=env, stdin=pipe, stdout=pipe, text=True, user=uid, group=uid, extra_groups=[]
    ) as program:
        try:
            assert program.stdout
            granted, refused = map(int, program.stdout.readline().split())
            with netns.run(lab.client_ns, socket.create_connection, (SERVER_IP, PORTS[uid]), 20):
                connection = int(program.stdout.readline())
                yield Program(uid, program.pid, granted, refused, connection)
        finally:
            program.kill()


@pytest.fixture
def alice(broker: RunningBroker, lab: Lab) -> Iterator[Program]:
    with program_of(broker, lab, ALICE) as it:
        yield it


@pytest.fixture
def bob(broker: RunningBroker, lab: Lab) -> Iterator[Program]:
    with program_of(broker, lab, BOB) as it:
        yield it


def conns(broker: RunningBroker, uid: int, *args: str) -> subprocess.CompletedProcess[str]:
    """The command, as this user, who is in another network namespace."""
    return subprocess.run(
        [sys.executable, "-m", "bypass", "conns", "--all", *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=CLEAN | {"COLUMNS": "200", "BYPASS_SOCKET": broker.name},
        user=uid,
        group=uid,
        extra_groups=[],
    )


def told(broker: RunningBroker, uid: int, *args: str) -> list[dict[str, Any]]:
    done = conns(broker, uid, "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    return list(json.loads(done.stdout)["applications"])


def test_a_user_sees_what_root_sees_of_its_own_program(broker: RunningBroker, alice: Program) -> None:
    (mine,) = told(broker, ALICE)
    (roots,) = told(broker, 0, "--app", f"of-{ALICE}")
    assert mine["holders"] == [alice.pid]
    for same in ("uid", "summary", "sockets", "error"):
        assert mine[same] == roots[same]
    by_fd = {s["fd"]: s for s in mine["sockets"]}
    assert by_fd[alice.granted]["place"] == "both"
    assert by_fd[alice.connection]["state"] == "ESTAB"
    refused = by_fd[alice.refused]
    assert (refused["place"], refused["why"]) == ("kernel", "no rule of the policy grants it")
    assert refused["local"] == f"{SERVER_IP}:{OTHER + ALICE % 100}", "the kernel was asked"
    assert conns(broker, ALICE).stdout == conns(broker, 0, "--app", f"of-{ALICE}").stdout


def test_nobody_is_told_of_anothers_program(broker: RunningBroker, alice: Program, bob: Program) -> None:
    for program in (alice, bob):
        (only,) = told(broker, program.uid)
        assert (only["uid"], only["holders"]) == (program.uid, [program.pid])
    done = conns(broker, CAROL)
    assert done.returncode == 2
    assert "no program runs on bypass, or it is another user's" in done.stderr
    assert sorted(a["uid"] for a in told(broker, 0, "--socket", broker.name)) == [BOB, ALICE]
    (only,) = told(broker, BOB, "--socket", broker.name)
    assert only["uid"] == BOB
    assert conns(broker, 0, "--socket", "@nobody").returncode == 2


class Peer:
    """A tool of another user, whose process lives and whose socket says what we like."""

    def __init__(self, name: str, uid: int) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ours.close()
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.connect(protocol.socket_address(name))
                socket.send_fds(theirs, [b"x"], [sock.fileno()])
                sock.close()
                theirs.recv(1)
            finally:
                os._exit(0)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(self._ours, 1, 1)
        self.sock = socket.socket(fileno=fds[0])
        self.sock.settimeout(WAIT_S)

    def close(self) -> None:
        self.sock.close()
        self._ours.close()
        os.waitpid(self.pid, 0)

    def ask(self, question: object) -> tuple[dict[str, Any], list[int]]:
        self.sock.send(json.dumps(question).encode())
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 8)
        return json.loads(data), fds


@pytest.fixture
def peer(broker: RunningBroker) -> Iterator[Peer]:
    """Bob's. SO_PEERCRED tells who connected, whoever has the socket now."""
    it = Peer(broker.name, BOB)
    yield it
    it.close()


@pytest.mark.parametrize("more", [{"uid": ALICE}, {"app": 1}, {"fd": 0}])
def test_questions_that_name_somebody_are_refused(broker: RunningBroker, peer: Peer, more: Any) -> None:
    answer, fds = peer.ask({"do": "conns"} | more)
    assert (answer, fds) == ({"error": "`conns` takes nothing else"}, [])


def test_only_the_end_of_a_pipe_is_passed(broker: RunningBroker, alice: Program, bob: Program) -> None:
    """No memory: there stands the token, and who has it, has the application."""
    peer = Peer(broker.name, BOB)
    answer, fds = peer.ask({"do": "conns"})
    assert answer == {"end": True, "apps": 1}
    (pipe,) = fds
    assert stat.S_ISFIFO(os.fstat(pipe).st_mode)
    assert fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with os.fdopen(pipe, "rb") as f:
        said = f.read()
    (app,) = (a for a in broker.server.broker.apps.values() if a.user.uid == BOB)
    assert app.token.hex().encode() not in said
    assert str(alice.pid).encode() not in said
    assert said.endswith(b"}\n" + look.END.encode() + b"\n")
    peer.close()


def test_who_does_not_read_keeps_nobody_waiting(
    broker: RunningBroker, bob: Program, alice: Program, lab: Lab
) -> None:
    """Readers that do not end, as those whose pipes are full; at most so many of a user."""
    running_looks = broker.server._looks._running
    with ExitStack() as stack:
        for _ in range(looks.MAX_PER_USER):
            peer = Peer(broker.name, BOB)
            stack.callback(peer.close)
            answer, fds = peer.ask({"do": "conns"})
            stack.callback(os.close, fds[0])
            assert answer["apps"] == 1
            newest = list(running_looks.values())[-1][1]
            newest.send_signal(signal.SIGSTOP)
        answer, fds = peer.ask({"do": "conns"})
        assert (list(answer), fds) == (["error"], [])
        assert len(ask(broker.name, {"do": "ps"})) == 3, "the broker goes on"
        assert [a["uid"] for a in told(broker, ALICE)] == [ALICE], "for others as well"
    for _, program in list(running_looks.values()):
        program.send_signal(signal.SIGKILL)
    broker.wait(lambda: not running_looks, "the readers to be forgotten")
    assert [a["uid"] for a in told(broker, BOB)] == [BOB]


def test_who_leaves_early_leaves_nothing_behind(broker: RunningBroker, bob: Program) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        peer = Peer(broker.name, BOB)
        peer.sock.send(json.dumps({"do": "conns"}).encode())
        peer.close()
    broker.wait(lambda: not broker.server._looks._running, "the readers to end")
    broker.wait(lambda: len(os.listdir("/proc/self/fd")) == before, "descriptors to be closed")


def test_damaged_memory_is_told_as_that(broker: RunningBroker, alice: Program) -> None:
    client = broker.client()  # root's
    client.hello()
    header = client.header()
    noise = random.Random(4).randbytes(int(header.group_size))
    os.pwrite(client.fds[0], noise, int(header.group_off))
    asking = Asking(broker.name)
    found = {a.uid: a for a in asking.conns()}
    asking.close()
    assert found[0].error
    assert not found[ALICE].error


@pytest.mark.parametrize(
    ("answer", "pipe", "why"),
    [
        (b"[]", None, "nonsense"),
        (b'{"end": true, "apps": "1"}', None, "nonsense"),
        (b'{"end": true, "more": 1}', None, "nonsense"),
        (b'{"error": "no"}', None, "^no$"),
        (b'{"end": true, "apps": 1}', b"", "ended early"),
        (b'{"end": true, "apps": 1}', b"{}\n", "ended early"),
        (b'{"end": true, "apps": 1}', b'{}\n{"end": true}\n', "nonsense"),
        (
            b'{"end": true, "apps": 1}',
            b'{"holders": [], "uid": 0, "error": "\\u001b[2J"}\n{"end": true}\n',
            "not printable",
        ),
    ],
)
def test_a_broker_is_not_believed_either(answer: bytes, pipe: bytes | None, why: str) -> None:
    name = new_name()
    fds: list[int] = []
    if pipe is not None:
        reader, writer = os.pipe()
        os.write(writer, pipe)
        os.close(writer)
        fds.append(reader)

    def serve() -> None:
        sock, _ = server.accept()
        with sock:
            sock.recv(1000)
            socket.send_fds(sock, [answer], fds)

    with listen(name) as server:
        server.setblocking(True)
        thread = threading.Thread(target=serve)
        thread.start()
        asking = Asking(name)
        with pytest.raises(BypassError, match=why):
            asking.conns()
        asking.close()
        thread.join(WAIT_S)
    for fd in fds:
        os.close(fd)
