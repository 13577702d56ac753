# SPDX-License-Identifier: Apache-2.0
"""A broker is killed under load, and a new one goes on: programs, connections and ports are as they were, nobody sees a
reset, and the kernel sees no packet of theirs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import preloaded
import pytest
import yaml
from backends import finds, has_it, policy_for
from support import WAIT_S
from test_cli_broker import (
    BYPASS,
    bypass,
    folder,  # noqa: F401 (fixture)
    good,
    others,
    wait_until,
    with_socket,
)

from bypass import netns
from bypass.broker import blocks, takeover
from bypass.broker.tools import listening
from bypass.errors import BypassError
from bypass.fwd import Forwarder
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import load_policy

pytestmark = [pytest.mark.netns, pytest.mark.backends(asked=True), pytest.mark.timeout(180)]

NOBODY = 65534
PORT = 7000
PROGRAM = Path(__file__).parent / "takeover_program.py"
POLICY = f"""
version: 1
mode: MODE
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080-8089}}
    action: steer
    allow: {{user: {NOBODY}}}
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, remote: {CLIENT_IP}, remote_port: {PORT}}}
    action: steer
    allow: {{user: {NOBODY}}}
"""


@contextmanager
def at_the_server(lab: Lab, is_clear: Callable[[], bool]) -> Iterator[None]:
    """The test's thread is in the server's namespace, in which nothing is left afterwards.

    Args:
        is_clear: whether the interface has nothing of ours. The kernel closes what a process held after it has left
            the namespace.
    """
    with netns.entered(lab.server_ns):
        try:
            yield
            wait_until(lambda: not others(lab))
        finally:
            for pid in others(lab):
                os.kill(pid, signal.SIGKILL)
        wait_until(is_clear)
        assert blocks.RESERVED.read_text() == "\n"
        assert [name for name in listening() if "bypass" in name] == []


@pytest.fixture
def policy(lab: Lab, mode: str, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_for(lab, POLICY.replace("MODE", mode)))
    with at_the_server(lab, lambda: not has_it(lab)):
        yield path


class Program:
    """takeover_program.py on the stack, as a user without privileges."""

    def __init__(self, name: str, uid: int = NOBODY) -> None:
        env = preloaded.CLEAN | {"LD_PRELOAD": str(preloaded.LIBRARY), "BYPASS_SOCKET": name}
        as_user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        argv = [*as_user, "/usr/bin/python3", "-c", PROGRAM.read_text()]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def do(self, *what: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*what, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


class Load:
    """Connections from the client's namespace that echo all the time; `errors` is what went wrong."""

    def __init__(self, lab: Lab, connections: int) -> None:
        self.errors: list[str] = []
        self.echoed = 0
        self._over = threading.Event()
        with netns.entered(lab.client_ns):
            socks = [socket.create_connection((SERVER_IP, 8080), WAIT_S) for _ in range(connections)]
        self._threads = [threading.Thread(target=self._echo, args=(s,)) for s in socks]
        for thread in self._threads:
            thread.start()

    def _echo(self, sock: socket.socket) -> None:
        data = os.urandom(5000)
        with sock:
            while not self._over.is_set():
                try:
                    sock.sendall(data)
                    got = b""
                    while len(got) < len(data) and (part := sock.recv(len(data))):
                        got += part
                    if got != data:
                        self.errors.append(f"{len(got)} bytes came back, of {len(data)}")
                        return
                except OSError as e:
                    self.errors.append(str(e))
                    return
                self.echoed += 1

    def goes_on(self) -> None:
        """Every connection has some more of its echoes."""
        before = self.echoed
        wait_until(lambda: self.echoed > before + 5 * len(self._threads) or bool(self.errors))
        assert self.errors == []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(ConnectionError):
            while data := self.request.recv(4096):
                self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True


@contextmanager
def kernel_echo(lab: Lab) -> Iterator[None]:
    with netns.entered(lab.client_ns):
        server = _Server((CLIENT_IP, PORT), _Echo)
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def up(policy: Path, name: str) -> int:
    return int(good("up", "-c", str(policy), "--socket", name).split()[1])


def kill(pid: int, lab: Lab) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in others(lab))


def down(name: str) -> str:
    return good("down", "--socket", name)


def ps(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(good("ps", "--json", "--socket", name))
    return found


def rejoined(name: str, *programs: Program) -> None:
    """They have said hello to the new broker."""
    wanted = sorted(p.process.pid for p in programs)
    wait_until(lambda: sorted(pid for app in ps(name) for pid in app["pids"]) == wanted)


def to_the_kernel(lab: Lab) -> tuple[int, int]:
    """TCP segments that the kernel of the server has received, and resets that it has sent."""
    with netns.entered(lab.server_ns), open("/proc/thread-self/net/snmp") as f:
        names, values = (line.split() for line in f if line.startswith("Tcp:"))
    return int(values[names.index("InSegs")]), int(values[names.index("OutRsts")])


def echo_at(lab: Lab, port: int) -> None:
    with netns.entered(lab.client_ns):
        sock = socket.create_connection((SERVER_IP, port), WAIT_S)
    with sock:
        sock.sendall(b"hello")
        assert sock.recv(5, socket.MSG_WAITALL) == b"hello"


def leases(name: str) -> list[str]:
    return sorted(lease["local"] for app in ps(name) for lease in app["leases"])


def test_a_new_broker_goes_on_with_what_a_killed_one_left(
    policy: Path,
    folder: Path,  # noqa: F811
    lab: Lab,
    mode: str,
) -> None:
    name = str(folder / "broker.sock")
    shared = mode == "shared"
    broker = up(policy, name)
    with ExitStack() as stack:
        stack.enter_context(kernel_echo(lab))
        program = stack.enter_context(Program(name))
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        local = int(program.do("connect", CLIENT_IP, PORT))
        load = stack.enter_context(Load(lab, 6))
        load.goes_on()
        seen = to_the_kernel(lab)
        for round_ in range(1, 3):
            had = leases(name)
            kill(broker, lab)
            load.goes_on()
            assert program.do("again") == str(round_)
            broker = up(policy, name)
            load.goes_on()
            rejoined(name, program)
            assert leases(name) == had
            assert program.do("listen", SERVER_IP, 8080 + round_) == str(8080 + round_)
            echo_at(lab, 8080 + round_)
            assert f"{SERVER_IP}:{8080 + round_}" in leases(name)
            more = int(program.do("connect", CLIENT_IP, PORT))
            assert more // 256 == local // 256, "from the block that it has"
            assert program.do("again") == str(round_ + 1)
            load.goes_on()
        assert to_the_kernel(lab) == seen, "the kernel has seen packets of the stack's"
        flow = f"tcp {CLIENT_IP}:40000 > {SERVER_IP}:8080"
        explained = json.loads(good("explain", SERVER_IFNAME, flow, "--json", "--socket", name))
        assert explained["pids"] == [program.process.pid]
        with Program(name) as other:
            if shared:
                assert other.do("listen", SERVER_IP, 8089) == "8089"
                echo_at(lab, 8089)
                assert f"{SERVER_IP}:8089" in leases(name)
                assert to_the_kernel(lab) == seen
            else:
                assert other.do("listen", SERVER_IP, 8089) == "8089"
                assert f"{SERVER_IP}:8089" not in leases(name), "one application at a time"
        load.goes_on()
        said = re.fullmatch(
            r"the broker has ended; \d+ leases of 1 application died, with (\d+) connections\n", down(name)
        )
        assert said
        assert int(said[1]) >= 6 + 3, "from the client, and to it"
        assert not has_it(lab)
        wait_until(lambda: list(others(lab)) == [program.process.pid])


# ---- What cannot be taken over -----------------------------------------------------------------------------------
@pytest.fixture
def left(policy: Path, folder: Path, lab: Lab) -> Iterator[tuple[str, Program, Load]]:  # noqa: F811
    """A killed broker's socket, its program, and what is connected to that."""
    name = str(folder / "broker.sock")
    broker = up(policy, name)
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        with Load(lab, 2) as load:
            load.goes_on()
            kill(broker, lab)
            yield name, program, load


def refused(policy: Path, name: str) -> str:
    done = bypass("up", "-c", str(policy), "--socket", name)
    assert (done.returncode, done.stdout) == (2, ""), done
    return str(done.stderr)


def test_down_waits_for_connections_when_asked_to(policy: Path, folder: Path, lab: Lab) -> None:  # noqa: F811
    """And not for who listens, which has no end: new connections are the kernel's afterwards."""
    name = str(folder / "broker.sock")
    up(policy, name)
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        argv = [*BYPASS, "down", "--drain", "--socket", name]
        with Load(lab, 2) as load:
            load.goes_on()
            draining = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
            assert draining.stdout is not None
            assert draining.stdout.readline() == "waiting: 2 connections on the stack\n"
            assert program.do("listen", SERVER_IP, 8081) == "8081"
            assert leases(name) == [f"{SERVER_IP}:8080"], "nothing new is granted"
            load.goes_on()
        said = draining.communicate(timeout=60)[0].splitlines()[-1]
        end = "the broker has ended; 2 connections came to an end before; 1 lease of 1 application went to the kernel"
        assert said == end
        if not lab.wire:  # there the kernel's device of the port has ended
            seen = to_the_kernel(lab)
            echo_at(lab, 8080)
            assert to_the_kernel(lab) > seen


def test_what_cannot_be_taken_over_is_said_and_goes_on(
    policy: Path,
    left: tuple[str, Program, Load],
    lab: Lab,
    mode: str,
) -> None:
    name, program, load = left
    text = policy.read_text()
    pid = program.process.pid

    fewer = yaml.safe_load(text.replace("8080-8089", "8085-8089"))
    fewer["flows"].pop()
    policy.write_text(yaml.safe_dump(fewer))
    assert f"does not grant {SERVER_IP}:8080, which application 1 (python3, process {pid}) has" in refused(
        policy, name
    )
    policy.write_text(text.replace("ring_size: 256", "ring_size: 512").replace("memory: 64M", "memory: 65M"))
    assert "backend is not what it was" in refused(policy, name)
    if not lab.wire:
        policy.write_text(
            text.replace(f"mode: {mode}", "mode: direct" if mode == "shared" else "mode: shared")
        )
        assert "mode is not what it was" in refused(policy, name)
    policy.write_text(text)
    assert f"`bypass up --socket {name}` takes them over" in refused(policy, name + ".other")
    load.goes_on()

    up(policy, name)
    rejoined(name, program)
    load.goes_on()
    assert leases(name) == [f"{SERVER_IP}:8080"]
    down(name)


def test_another_version_leaves_it_alone(
    policy: Path, left: tuple[str, Program, Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, load = left
    monkeypatch.setattr(takeover, "VERSION", "2")
    with pytest.raises(
        BypassError, match="a broker of another version was killed, and its applications go on"
    ):
        takeover.find_left(load_policy(str(policy)), name)
    load.goes_on()


def test_who_listens_at_the_name_of_a_bypass_fwd_is_not_believed(policy: Path) -> None:
    code = (
        "import os, socket, sys, time; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"s.bind('\\0bypass/fwd/{SERVER_IFNAME}/1'); s.listen(0); print('listens', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as squats:
        assert squats.stdout is not None
        assert squats.stdout.readline() == "listens\n"
        assert takeover.find_left(load_policy(str(policy)), "@any") is None
        squats.kill()


# ---- While there is no broker ------------------------------------------------------------------------------------
def test_what_is_closed_and_opened_meanwhile_is_known_afterwards(
    policy: Path, left: tuple[str, Program, Load], lab: Lab
) -> None:
    name, program, load = left
    assert program.do("listen", SERVER_IP, 8081) == "8081"
    echo_at(lab, 8081)  # the kernel's: nothing is leased without a broker
    broker = up(policy, name)
    rejoined(name, program)
    assert program.do("listen", SERVER_IP, 8082) == "8082"
    assert leases(name) == [f"{SERVER_IP}:8080", f"{SERVER_IP}:8082"]
    kill(broker, lab)
    assert program.do("close", 8082) == "closed"
    up(policy, name)
    rejoined(name, program)
    wait_until(lambda: leases(name) == [f"{SERVER_IP}:8080"])
    load.goes_on()
    down(name)


def test_what_was_being_leased_is_dropped(policy: Path, left: tuple[str, Program, Load], lab: Lab) -> None:
    """As a broker leaves it that is killed between the first and the last step of a lease."""
    name, program, load = left
    (where,) = (n for n in listening() if n.startswith(f"@bypass/fwd/{SERVER_IFNAME}/"))
    fwd = Forwarder.connect(where)
    about = json.loads(fwd.get("app-1.1").blob)
    port = {"local": [SERVER_IP, 8083], "key": [about["key"][0], [SERVER_IP, 8083], None]}
    with socket.create_server((SERVER_IP, 8083)) as sock:
        fwd.put("app-1.7", json.dumps(about | port).encode(), [sock.fileno()])
    fwd.close()
    up(policy, name)
    rejoined(name, program)
    assert leases(name) == [f"{SERVER_IP}:8080"]
    with netns.entered(lab.client_ns), pytest.raises(ConnectionRefusedError):
        socket.create_connection((SERVER_IP, 8083), 10)
    load.goes_on()
    down(name)


def test_who_dies_meanwhile_leaves_nothing_that_listens(left: tuple[str, Program, Load], lab: Lab) -> None:
    """(Who only waits for the dead program's data hears nothing: there is nobody to ask.)"""
    _, program, _ = left
    program.process.kill()
    wait_until(lambda: not has_it(lab))
    if finds(lab, "fail-open"):
        with netns.entered(lab.client_ns), pytest.raises(ConnectionRefusedError):
            socket.create_connection((SERVER_IP, 8080), 10)


def test_without_bypass_fwd_a_new_broker_begins_anew(policy: Path, folder: Path, lab: Lab) -> None:  # noqa: F811
    name = str(folder / "broker.sock")
    broker = up(policy, name)
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        (fwd,) = (pid for pid, comm in others(lab).items() if comm == "bypass-fwd")
        os.kill(broker, signal.SIGSTOP)  # it must not see the end of bypass-fwd
        os.kill(fwd, signal.SIGKILL)
        kill(broker, lab)
        wait_until(lambda: not has_it(lab))
        if finds(lab, "fail-open"):
            seen = to_the_kernel(lab)
            echo_at(lab, 8080)
            assert to_the_kernel(lab) > seen, "its listener is the kernel's"
        up(policy, name)
        assert ps(name) == []
    with Program(name) as program:  # a new one: the old one has no application any more
        assert program.do("listen", SERVER_IP, 8081) == "8081"
        seen = to_the_kernel(lab)
        echo_at(lab, 8081)
        assert to_the_kernel(lab) == seen
        down(name)


# ---- By systemd, and by relatives --------------------------------------------------------------------------------
def test_a_broker_that_systemd_starts_again_goes_on(policy: Path, folder: Path, lab: Lab) -> None:  # noqa: F811
    """The socket is systemd's: between two brokers it takes connections that nobody answers."""
    name = str(folder / "passed.sock")
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.bind(name)
        sock.listen(8)
        os.chmod(name, 0o666)

        def start() -> subprocess.Popen[bytes]:
            argv = [*with_socket(sock), *BYPASS, "up", "--foreground", "-c", str(policy)]
            broker = stack.enter_context(
                subprocess.Popen(argv, pass_fds=(sock.fileno(),), stderr=subprocess.DEVNULL)
            )
            stack.callback(broker.kill)
            return broker

        broker = start()
        program = stack.enter_context(Program(name))
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        load = stack.enter_context(Load(lab, 2))
        load.goes_on()
        broker.kill()
        broker.wait()
        load.goes_on()
        assert program.do("listen", SERVER_IP, 8081) == "8081", "without waiting for the broker"
        load.goes_on()
        broker = start()
        rejoined(name, program)
        assert program.do("listen", SERVER_IP, 8082) == "8082"
        assert leases(name) == [f"{SERVER_IP}:8080", f"{SERVER_IP}:8082"]
        load.goes_on()
        assert "the broker has ended" in down(name)
        assert broker.wait(WAIT_S) == 0


def test_children_belong_to_it_still(policy: Path, folder: Path, lab: Lab) -> None:  # noqa: F811
    name = str(folder / "broker.sock")
    broker = up(policy, name)
    with Program(name) as program:
        assert program.do("listen", SERVER_IP, 8080) == "8080"
        child = int(program.do("fork"))
        kill(broker, lab)
        late = int(program.do("fork"))  # no broker hears of this one
        up(policy, name)
        rejoined(name, program)
        program.process.kill()
        program.process.wait()
        wait_until(lambda: ps(name) != [] and ps(name)[0]["pids"] == [])
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: child not in others(lab))
        assert leases(name) == [f"{SERVER_IP}:8080"], "one child is left"
        os.kill(late, signal.SIGKILL)
        wait_until(lambda: ps(name) == [])
        down(name)


def test_blocks_are_the_keepers(lab: Lab, tmp_path: Path) -> None:
    """What a killed broker has reserved stays reserved as long as its bypass-fwd lives."""
    with netns.entered(lab.server_ns), subprocess.Popen(["sleep", "100"]) as keeper:
        first = blocks.Reserved(tmp_path, keeper.pid)
        first.add(40960)
        first.add(51200)
        blocks.Reserved(tmp_path)
        assert blocks.RESERVED.read_text() == "40960-41215,51200-51455\n", "another broker takes nothing off"
        blocks.Reserved(tmp_path, keeper.pid, [40960])
        assert blocks.RESERVED.read_text() == "40960-41215\n", "the next one goes on with what it knows"
        keeper.kill()
        keeper.wait()
        blocks.Reserved(tmp_path)
        assert blocks.RESERVED.read_text() == "\n"
        assert list(tmp_path.iterdir()) == []
