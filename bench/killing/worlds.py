# SPDX-License-Identifier: Apache-2.0
"""Who serves, and whom one can kill: an embedded stack, a program on the kernel, programs by `bypass run`."""

from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from bench.apps.app import ServerApp
from bench.apps.launch import (
    BypassLauncher,
    DpdkLauncher,
    KernelLauncher,
    Launcher,
    SharedLauncher,
    UpLauncher,
)
from bench.apps.nginx import PORT as NGINX_PORT
from bench.apps.nginx import Nginx
from bench.apps.place import Place
from bench.apps.redis import PORT as REDIS_PORT
from bench.apps.redis import Redis
from bench.killing.judge import GONE, Outcome
from bench.killing.residue import Stay, frames_of_port
from bench.mixed.leftovers import descendants
from bench.programs import ROOT, BenchError
from bench.versus.servers import BLOCKING, RR_PORT
from bypass import netns
from bypass.lab import SERVER_IFNAME, SERVER_IP, dpdk_policy, wait_for

__all__ = ["WORLDS", "Alive", "World"]

GET = b"GET /500.bin HTTP/1.1\r\nHost: test\r\n\r\n"
HTTP_OK = b"HTTP/1.1 200"
START_S = 20.0


class Alive(ABC):
    """A world that runs."""

    @abstractmethod
    def victim(self, role: str) -> int:
        """The process of this role. BenchError: there is none."""

    @abstractmethod
    def family(self) -> dict[int, str]:
        """All its processes: pid -> name."""

    def mended(self, role: str) -> list[str] | None:
        """After the kill of a role: the same world serves again without a new start of all of it.

        Returns:
            What the killed process left in those that stay; None: it has to be started anew.
        """
        return None


class World(ABC):
    """What serves at `port`, and who may be killed in it."""

    name: ClassVar[str]
    title: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    port: ClassVar[int]
    wire: ClassVar[bool] = False  # the server's end of the lab is a DPDK port
    outcomes: ClassVar[Mapping[str, Outcome]] = {}  # by role, where it is another than usual
    request: ClassVar[bytes]
    answer: ClassVar[bytes]

    def on_bypass(self) -> bool:
        """Its connections have to be the stack's."""
        return True

    @abstractmethod
    def running(self, here: Place) -> AbstractContextManager[Alive]:
        """It serves inside; what is left of it afterwards is its fault."""


class Embedded(World):
    """bypass.webserver: one privileged process that does everything."""

    name = "embedded"
    title = "web server with an embedded stack"
    roles = ("application",)
    port = 8080
    request = GET
    answer = HTTP_OK

    class Server(Alive):
        def __init__(self, process: subprocess.Popen[bytes]) -> None:
            self.process = process

        def victim(self, role: str) -> int:
            return self.process.pid

        def family(self) -> dict[int, str]:
            return descendants(self.process.pid)

    @contextmanager
    def running(self, here: Place) -> Iterator[Alive]:
        (here.folder / "500.bin").write_bytes(bytes(500))
        policy = here.folder / "policy.yaml"
        text = (
            f"version: 1\ninterface: {SERVER_IFNAME}\nbackend: {{kind: afxdp, mode: auto}}\nflows:\n"
            f"  - {{name: web, match: {{proto: tcp, local: {SERVER_IP}, local_port: {self.port}}}, action: steer}}\n"
        )
        policy.write_text(dpdk_policy(text) if self.wire else text)
        argv = [
            sys.executable, "-m", "bypass.webserver", "--policy", str(policy), "--directory", str(here.folder),
            f"{SERVER_IP}:{self.port}",
        ]  # fmt: skip
        process = subprocess.Popen(here.lab.command("server", argv), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            here.wait_open(self.port, lambda: process.poll() is None)
            yield self.Server(process)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(20)


class DpdkEmbedded(Embedded):
    name = "dpdk-embedded"
    title = "web server with an embedded stack, on a DPDK port"
    wire = True
    outcomes: ClassVar[Mapping[str, Outcome]] = {"application": GONE}


class _Program(World):
    """A program of bench.apps by one of its launchers."""

    app: ClassVar[type[ServerApp]]
    comm: ClassVar[str]  # the name of its processes
    launcher: ClassVar[type[Launcher]]

    def on_bypass(self) -> bool:
        return self.launcher is not KernelLauncher

    class Server(Alive):
        def __init__(self, app: ServerApp, comm: str) -> None:
            self.app = app
            self.comm = comm
            self.started = False

        def start(self) -> None:
            app = self.app
            app.server = app.launcher.start(app.argv(), files=app.files)
            self.started = True
            app.place.wait_open(app.grants[0].port, app.server.alive)

        def end(self) -> None:
            if self.started:
                self.app.server.end(self.app.end_by, (*self.app.end_codes, -9, 137))

        def family(self) -> dict[int, str]:
            everyone = netns.processes(self.app.place.lab.server_ns)  # a broker of its own is no descendant
            return self.app.server.family() | everyone

        def victim(self, role: str) -> int:
            found = [pid for pid, name in self.family().items() if _plays(role, pid, name, self.comm)]
            if not found:
                raise BenchError(f"no {role} among {self.family()}")
            return max(found)

    @contextmanager
    def running(self, here: Place) -> Iterator[Alive]:
        launcher = self.launcher(here, self.app.grants, stack=self.app.stack)
        server = self.Server(self.app(here, launcher), self.comm)
        try:
            server.start()
            yield server
        finally:
            server.end()
            with suppress(BenchError):  # the broker is among those who are killed
                launcher.close()


def _plays(role: str, pid: int, name: str, comm: str) -> bool:
    """By names and command lines."""
    if role == "fwd":
        return name == "bypass-fwd"
    if role == "application":
        return name == comm
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except FileNotFoundError:
        return False
    if role == "worker":
        return name == comm and "worker process" in command
    return role == "broker" and name not in (comm, "bypass-fwd") and "bypass" in command


class KernelNginx(_Program):
    name = "kernel-nginx"
    title = "nginx with two workers, on the kernel"
    roles: ClassVar[tuple[str, ...]] = ("worker",)
    needs = ("nginx",)
    port = NGINX_PORT
    request = GET
    answer = HTTP_OK
    app = Nginx
    comm = "nginx"
    launcher: ClassVar[type[Launcher]] = KernelLauncher


class KernelRedis(_Program):
    name = "kernel-redis"
    title = "redis-server, on the kernel"
    roles: ClassVar[tuple[str, ...]] = ("application",)
    needs = ("redis-server",)
    port = REDIS_PORT
    request = b"PING\r\n"
    answer = b"+PONG"
    app = Redis
    comm = "redis-server"
    launcher: ClassVar[type[Launcher]] = KernelLauncher


class BypassEcho(_Program):
    name = "echo"
    title = "a thread for each connection, by bypass run"
    roles = ("application",)
    port = RR_PORT
    request = b"PING"
    answer = b"PING"
    app = BLOCKING
    comm = "rr"
    launcher = BypassLauncher


class BypassNginx(KernelNginx):
    name = "nginx"
    title = "nginx with two workers, by bypass run"
    roles = ("worker",)
    launcher = BypassLauncher


class BypassRedis(KernelRedis):
    name = "redis"
    title = "redis-server, by bypass run"
    roles = ("application",)
    launcher = BypassLauncher


class _Up(_Program):
    """A program by `bypass up`, which stays when the program is killed; a new broker takes over from a killed one."""

    class Server(_Program.Server):
        _before: Stay | None = None  # without the program
        _steady: Stay | None = None  # with it

        def start(self) -> None:
            launcher = self.app.launcher
            assert isinstance(launcher, SharedLauncher)
            launcher.up()
            if self._before is None:
                self._before = Stay(self.app.place.lab)
            super().start()
            if self.comm == "nginx":
                self._wait_workers()

        def _wait_workers(self) -> None:
            assert isinstance(self.app, Nginx)
            wanted = self.app.worker_processes
            wait_for(lambda: len(self.app.server.pids("nginx")) == 1 + wanted, START_S, f"{wanted} workers")

        def mended(self, role: str) -> list[str] | None:
            if role == "application":
                self.end()
                left = self._before.check() if self._before else []
                if self.app.place.lab.wire:
                    left += frames_of_port(self.app.place.lab)
                self.start()
                return left
            if role == "worker":
                self._wait_workers()
                if self._steady is None:
                    self._steady = Stay(
                        self.app.place.lab
                    )  # the first that are new have what all others will have
                return self._steady.check()
            if role == "broker":
                launcher = self.app.launcher
                assert isinstance(launcher, SharedLauncher)
                launcher.up_again()
                self._before = self._steady = None
                return [] if self.app.server.alive() else ["nothing: the program has ended"]
            return None


class DirectRedis(KernelRedis, _Up):
    name = "direct"
    title = "redis-server, by bypass up"
    roles = ("application", "broker", "fwd")
    launcher: ClassVar[type[Launcher]] = UpLauncher
    Server = _Up.Server


class DirectNginx(KernelNginx, _Up):
    name = "direct-nginx"
    title = "nginx with two workers, by bypass up"
    launcher: ClassVar[type[Launcher]] = UpLauncher
    Server = _Up.Server


class SharedRedis(DirectRedis):
    name = "shared"
    title = "redis-server, by bypass up in shared mode"
    launcher = SharedLauncher


class SharedNginx(DirectNginx):
    name = "shared-nginx"
    title = "nginx with two workers, by bypass up in shared mode"
    launcher = SharedLauncher


class DpdkRedis(DirectRedis):
    name = "dpdk"
    title = "redis-server, by bypass up on a DPDK port"
    launcher = DpdkLauncher
    wire = True
    outcomes: ClassVar[Mapping[str, Outcome]] = {"fwd": GONE}


class DpdkNginx(DirectNginx):
    name = "dpdk-nginx"
    title = "nginx with two workers, by bypass up on a DPDK port"
    launcher = DpdkLauncher
    wire = True


WORLDS: dict[str, type[World]] = {
    cls.name: cls
    for cls in (
        Embedded, KernelNginx, KernelRedis, BypassEcho, BypassNginx, BypassRedis, DirectRedis, DirectNginx, SharedRedis,
        SharedNginx, DpdkEmbedded, DpdkRedis, DpdkNginx,
    )
}  # fmt: skip
