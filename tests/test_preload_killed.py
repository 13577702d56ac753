# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of a program's processes at any moment, also in the middle of the stack: the others go on
(tests/c/preload_killed.c), on the stack's loopback and on a veth as an unprivileged user."""

from __future__ import annotations

import random
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import preloaded
import pytest
from backends import policy_for
from broker_support import running
from c_programs import run as run_tool

from bypass import netns
from bypass.broker.shared import site_of
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy

ROUNDS = 50
LIMIT_S = 200
PORT = 7000
NOBODY = 65534
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 256}}
flows:
  - name: clients
    match: {{proto: tcp, local: {SERVER_IP}, remote: {CLIENT_IP}, remote_port: {PORT}}}
    action: steer
    allow: {{user: [{NOBODY}]}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    folder.chmod(0o755)
    for above in folder.parents[:2]:
        above.chmod(0o755)  # an unprivileged user runs it
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    run_tool("gcc", *flags, "tests/c/preload_killed.c", "-o", folder / "killed")
    return folder / "killed"


@pytest.fixture(scope="module")
def group_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Optimised as the release is: the order of its instructions is what matters."""
    out = tmp_path_factory.mktemp("group") / "group_steps"
    flags = ["-std=c11", "-O3", "-g", "-Wall", "-Wextra", "-Werror", "-Ibypass/include", "-Ibypass"]
    run_tool("gcc", *flags, "tests/c/group_steps.c", "bypass/preload/group.c", "-o", out)
    return out


@pytest.mark.parametrize("seed", range(1, 4))
def test_what_relatives_share_is_repaired_after_any_instruction(group_steps: Path, seed: int) -> None:
    told = run_tool(group_steps, "200", str(seed))
    assert int(told.split()[-2]) > 1000, told


@pytest.mark.parametrize("turn", [1, 2])
def test_relatives_of_who_is_killed_go_on(program: Path, turn: int) -> None:
    seed = random.SystemRandom().getrandbits(16)
    done = preloaded.run([program, ROUNDS, seed], preloaded.environment("stack"), LIMIT_S)
    assert (done.status, done.out) == (0, f"{ROUNDS} of {ROUNDS}\n"), f"seed {seed}: {done}"


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(ConnectionError):
            while data := self.request.recv(4096):
                self.request.sendall(data)


@contextmanager
def kernel_echo(ns: str) -> Iterator[None]:
    """On the kernel of a network namespace."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with netns.entered(ns), Server((CLIENT_IP, PORT), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def active_opens(ns: str) -> int:
    with netns.entered(ns), open("/proc/thread-self/net/snmp") as f:
        names, values = (line.split() for line in f if line.startswith("Tcp:"))
    return int(values[names.index("ActiveOpens")])


@pytest.mark.netns
@pytest.mark.backends(asked=True)
def test_relatives_of_who_is_killed_go_on_on_an_interface(program: Path, lab: Lab, mode: str) -> None:
    policy = parse_policy(policy_for(lab, POLICY + f"mode: {mode}\n"))
    seed = random.SystemRandom().getrandbits(16)
    with (
        kernel_echo(lab.client_ns),
        running(lambda: site_of(policy), lab.server_ns) as broker,
        netns.entered(lab.server_ns),
    ):
        before = active_opens(lab.server_ns)
        env = preloaded.CLEAN | {"LD_PRELOAD": str(preloaded.LIBRARY), "BYPASS_SOCKET": broker.name}
        as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        command = [*as_nobody, program, str(ROUNDS), str(seed), CLIENT_IP, str(PORT)]
        done = preloaded.run(command, env, LIMIT_S)
        assert (done.status, done.out, done.err) == (0, f"{ROUNDS} of {ROUNDS}\n", ""), f"seed {seed}: {done}"
        assert active_opens(lab.server_ns) == before, "the kernel connected"
        apps = broker.server.broker.apps
        broker.wait(lambda: all(app.lingering for app in apps.values()), "the last process has ended")
