# SPDX-License-Identifier: Apache-2.0
"""Blocks of local ports: an unmodified program connects thousands of times and the broker is asked a few times; the
kernel takes no port of a block, and has all of them back afterwards, whoever dies."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import preloaded
import pytest
from backends import policy_for
from broker_support import STREAM, WAIT_S, RunningBroker, running
from c_programs import run as run_tool

from bypass import netns
from bypass.broker import blocks
from bypass.broker.apps import App
from bypass.broker.broker import Broker
from bypass.broker.leasing import LEASE_AHEAD, LEASE_ANOTHER, LEASE_BLOCK
from bypass.broker.protocol import Kind, Message
from bypass.broker.shared import site_of
from bypass.grants import Grants
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.policy import parse_policy
from bypass.rules import PortRange, Rule
from bypass.steering import BLOCK

pytestmark = [pytest.mark.netns, pytest.mark.backends(asked=True)]

AHEAD, WAITED = -1, -2
PORT = 7000
NOBODY = 65534
ADMINS = "30000-30010,45000"
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, remote: {CLIENT_IP}, remote_port: {PORT}}}
    action: steer
    allow: {{user: [{NOBODY}]}}
  - name: names
    match: {{proto: udp, local: {SERVER_IP}, remote: {CLIENT_IP}, remote_port: {PORT}}}
    action: steer
    allow: {{user: [{NOBODY}]}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("connects")
    for above in (folder, *folder.parents[:2]):
        above.chmod(0o755)  # an unprivileged user runs it
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    run_tool("gcc", *flags, "tests/c/preload_connects.c", "-o", folder / "connects")
    return folder / "connects"


class Stream(socketserver.BaseRequestHandler):
    served = 0
    one_more = threading.Condition()

    def handle(self) -> None:
        with suppress(ConnectionError):
            while data := self.request.recv(4096):
                self.request.sendall(data)
        with self.one_more:
            Stream.served += 1
            self.one_more.notify_all()


class Datagrams(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


class StreamServer(socketserver.TCPServer):
    request_queue_size = 128


@contextmanager
def kernel_echo(ns: str) -> Iterator[None]:
    """TCP and UDP, on the kernel of a network namespace."""
    with ExitStack() as stack:
        with netns.entered(ns):
            servers = [
                stack.enter_context(StreamServer((CLIENT_IP, PORT), Stream)),
                stack.enter_context(socketserver.UDPServer((CLIENT_IP, PORT), Datagrams)),
            ]
        for server in servers:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
        yield


def snmp(ns: str, protocol: str, name: str) -> int:
    with netns.entered(ns), open("/proc/thread-self/net/snmp") as f:
        names, values = (line.split() for line in f if line.startswith(f"{protocol}:"))
    return int(values[names.index(name)])


def reserved(ns: str) -> str:
    with netns.entered(ns):
        return blocks.RESERVED.read_text().strip()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[int]:
    """Requests that the broker gets, by type; AHEAD: for a block before it is needed, WAITED: without a port left."""
    counts: Counter[int] = Counter()
    handle = Broker.message

    def message(self: Broker, process: object, m: Message, fds: list[int]) -> None:
        counts[AHEAD if m.type == Kind.LEASE and m.flags & LEASE_AHEAD else m.type] += 1
        counts[WAITED] += m.type == Kind.LEASE and m.flags == LEASE_BLOCK | LEASE_ANOTHER
        handle(self, process, m, fds)  # type: ignore[arg-type]

    monkeypatch.setattr(Broker, "message", message)
    monkeypatch.setattr(blocks, "RECORDS", tmp_path / "ports")
    return counts


@pytest.fixture
def broker(lab: Lab, mode: str, asked: Counter[int], tmp_path: Path) -> Iterator[RunningBroker]:
    policy = parse_policy(policy_for(lab, POLICY + f"mode: {mode}\n"))
    with netns.entered(lab.server_ns):
        blocks.RESERVED.write_text(ADMINS)
    with kernel_echo(lab.client_ns):
        with running(lambda: site_of(policy), lab.server_ns) as it:
            yield it
        assert reserved(lab.server_ns) == ADMINS
        assert not list((tmp_path / "ports").glob("*"))


def connect(broker: RunningBroker, lab: Lab, program: Path, *args: int | str) -> list[int]:
    """Local ports, in order."""
    env = preloaded.CLEAN | {"LD_PRELOAD": str(preloaded.LIBRARY), "BYPASS_SOCKET": broker.name}
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*as_nobody, program, CLIENT_IP, str(PORT), *map(str, args)]
    with netns.entered(lab.server_ns):
        done = preloaded.run(command, env, 100)
    assert (done.status, done.err) == (0, ""), done
    return [int(line) for line in done.out.split()]


def live_blocks(broker: RunningBroker) -> set[int]:
    return {e.lport for e, _ in broker.site.steering.entries().values() if e.block}


@pytest.mark.parametrize("processes", [1, 4])
def test_two_thousand_connections_ask_the_broker_a_few_times(
    broker: RunningBroker, lab: Lab, program: Path, asked: Counter[int], processes: int
) -> None:
    before = snmp(lab.server_ns, "Tcp", "ActiveOpens")
    ports = connect(broker, lab, program, 2000, processes)
    assert len(ports) == 2001
    assert asked[Kind.LEASE] < 20, asked
    assert asked.total() < 40 + 10 * processes, asked
    assert snmp(lab.server_ns, "Tcp", "ActiveOpens") == before, "the kernel connected"
    used = {port - port % BLOCK for port in ports}
    assert len(set(ports)) > 1024, "so many are kept in TIME_WAIT, and their ports are not used again"
    assert len(used) < 8


@pytest.mark.parametrize("processes", [1, 4])
def test_nobody_waits_for_the_next_block(
    broker: RunningBroker,
    lab: Lab,
    program: Path,
    asked: Counter[int],
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
) -> None:
    """The broker does nothing until more connections have come and gone: the last block has ports for them. Or
    until the program asks something else: every ten seconds, by which address the peer is reached."""
    went_on: list[str] = []
    take = blocks.Blocks.lease
    begun = Stream.served

    def lease(self: blocks.Blocks, app: App, *args: object, another: bool) -> object:
        if another:
            given = BLOCK * sum(bool(lease.last_port) for lease in app.leases.values())
            enough = begun + min(given - 64, 1001)
            late = Stream.served >= enough  # the broker did not come to it: ports may run out
            with Stream.one_more:

                def how() -> str:
                    if Stream.served >= enough:
                        return "late" if late else "went on"
                    return "asks" if select.select([p.sock for p in app.processes], [], [], 0)[0] else ""

                until = time.monotonic() + WAIT_S
                while not (it := how()) and time.monotonic() < until:
                    Stream.one_more.wait(0.05)
                went_on.append(it)
        return take(self, app, *args, another=another)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks.Blocks, "lease", lease)
    assert len(connect(broker, lab, program, 1000, processes)) == 1001
    wait_for(
        lambda: asked[AHEAD] + asked[WAITED] == len(went_on), WAIT_S, "the last, asked for at the end too"
    )
    assert len(went_on) >= 3
    assert all(went_on)
    assert "went on" in went_on
    # Of several, the one that asked may not come to the answer for a second: then another one asks, and waits.
    assert processes > 1 or asked[WAITED] <= went_on.count("late")


def test_datagram_sockets_use_blocks_too(
    broker: RunningBroker, lab: Lab, program: Path, asked: Counter[int]
) -> None:
    before = snmp(lab.server_ns, "Udp", "InDatagrams")
    ports = connect(broker, lab, program, 1000, 1, "udp")
    assert asked[Kind.LEASE] < 5, asked
    assert len({port - port % BLOCK for port in ports}) == 1
    assert snmp(lab.server_ns, "Udp", "InDatagrams") == before, "the kernel received"


def test_the_kernel_takes_no_port_of_a_block_and_one_that_is_bound_by_name_is_passed_over(
    broker: RunningBroker, lab: Lab, program: Path
) -> None:
    with ExitStack() as stack, netns.entered(lab.server_ns):
        client = broker.client()
        client.hello()
        taken = stack.enter_context(socket.socket())
        wanted = Message(Kind.LEASE, kind=STREAM, remote=(CLIENT_IP, PORT), flags=1)
        block = client.good(wanted, (taken.fileno(),))
        first = block.local[1]
        assert (block.flags, block.local[0], block.last_port) == (1, SERVER_IP, first + BLOCK - 1)
        assert taken.getsockname() == ("0.0.0.0", 0), "it is not bound"
        again = client.good(wanted, (taken.fileno(),))
        assert (again.lease, again.local) == (block.lease, block.local)
        wanted.flags = 3
        other = client.good(wanted, (taken.fileno(),))
        assert other.lease != block.lease
        assert live_blocks(broker) == {first, other.local[1]}
        wanted.flags = 7
        third = client.good(wanted)
        assert live_blocks(broker) == {first, other.local[1], third.local[1]}
        client.good(Message(Kind.RELEASE, lease=third.lease))
        assert client.ask(wanted, (taken.fileno(),))[0].error == errno.EBADF
        ports = set()
        for _ in range(400):
            s = stack.enter_context(socket.socket())
            s.bind(("", 0))
            ports.add(s.getsockname()[1])
        assert not {first, other.local[1]} & {port - port % BLOCK for port in ports}
        client.good(Message(Kind.RELEASE, lease=other.lease))
        assert live_blocks(broker) == {first}
        assert f"{first}-{first + BLOCK - 1}" in reserved(lab.server_ns)
        assert str(other.local[1]) not in reserved(lab.server_ns)


def test_a_block_holds_no_port_of_a_socket(broker: RunningBroker, lab: Lab) -> None:
    """With one port of each block taken there is none: an ordinary lease then."""
    with ExitStack() as stack, netns.entered(lab.server_ns):
        client = broker.client()
        client.hello()
        for first in range(32768 - 32768 % BLOCK, 65536, BLOCK):
            s = stack.enter_context(socket.socket(socket.AF_INET6 if first % 1024 else socket.AF_INET))
            s.bind(("", first + 77))
        wanted = Message(Kind.LEASE, kind=STREAM, remote=(CLIENT_IP, PORT), flags=1)
        sock = stack.enter_context(socket.socket())
        lease = client.good(wanted, (sock.fileno(),))
        assert lease.flags == 0
        assert sock.getsockname() == lease.local
        wanted.flags = 7
        assert client.ask(wanted)[0].error == errno.EDQUOT
    assert reserved(lab.server_ns) == ADMINS


ONE_DATAGRAM = f"""
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect(("{CLIENT_IP}", {PORT}))
s.send(b"x")
print(s.recv(1), flush=True)
s.close()
sys.stdin.read()
"""


def test_a_block_that_nobody_uses_is_given_back(broker: RunningBroker, lab: Lab) -> None:
    env = preloaded.CLEAN | {"LD_PRELOAD": str(preloaded.LIBRARY), "BYPASS_SOCKET": broker.name}
    with (
        netns.entered(lab.server_ns),
        subprocess.Popen(
            ["/usr/bin/python3", "-c", ONE_DATAGRAM], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as program,
    ):
        assert program.stdout is not None
        assert program.stdout.readline() == b"b'x'\n"
        assert len(live_blocks(broker)) == 1
        wait_for(lambda: not live_blocks(broker), 20, "the block to be given back")
        wait_for(lambda: reserved(lab.server_ns) == ADMINS, 20, "the kernel to have its ports")
        assert program.poll() is None
        assert len(broker.server.broker.apps) == 1
        program.communicate(timeout=10)


def test_what_a_killed_broker_has_reserved_is_given_back(lab: Lab, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from bypass.broker.blocks import Reserved\n"
        "r = Reserved(Path(sys.argv[1])); r.add(40960); r.add(51200); r.remove(51200); print('added', flush=True)\n"
        "time.sleep(100)"
    )
    with netns.entered(lab.server_ns):
        blocks.RESERVED.write_text(ADMINS)
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as dies:
            assert dies.stdout is not None
            assert dies.stdout.readline() == b"added\n"
            both = "30000-30010,40960-41215,45000"
            assert reserved(lab.server_ns) == both
            living = blocks.Reserved(tmp_path)
            living.add(61440)
            assert reserved(lab.server_ns) == both + ",61440-61695", "it lives: its ports stay"
            os.kill(dies.pid, signal.SIGKILL)
        blocks.Reserved(tmp_path)
        assert reserved(lab.server_ns) == ADMINS + ",61440-61695"
        living.remove(61440)
        assert reserved(lab.server_ns) == ADMINS
        assert list(tmp_path.iterdir()) == []


class Only:
    """Permits one rule."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rule: Rule, port: int) -> bool:
        return rule.name == self.name

    def ports(self, rule: Rule) -> Iterable[PortRange | None]:
        return [None] if rule.name == self.name else []


def test_no_block_where_another_users_rule_would_bring_packets(lab: Lab, tmp_path: Path) -> None:
    flow = "  - {{name: {}, match: {{proto: tcp, local: {}, remote: {}}}, action: steer}}\n"
    head = f"version: 1\ninterface: {SERVER_IFNAME}\nbackend: {{kind: afxdp}}\nflows:\n"
    mine = head + flow.format("mine", SERVER_IP, CLIENT_IP)
    both = mine + flow.format("theirs", SERVER_IP, "198.51.100.1")
    range_of = head + flow.format("mine", f"{SERVER_IP}, local_port: 50000-50400", CLIENT_IP)
    with netns.entered(lab.server_ns):
        it = blocks.Blocks(tmp_path)
        for text, wanted in ((mine, True), (both, False), (range_of, False)):
            first = it.take(STREAM, SERVER_IP, Grants(parse_policy(text), Only("mine")), (CLIENT_IP, 80))
            assert (first is not None) == wanted, text
            if first is not None:
                it.give(first)
        assert reserved(lab.server_ns) == ""
