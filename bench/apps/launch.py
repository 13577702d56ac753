# SPDX-License-Identifier: Apache-2.0
"""How a program is started in the server's namespace: on the kernel, or on bypass. Always as an unprivileged user."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from bench.apps.place import USER, Place, environment
from bench.apps.proof import snapshot
from bench.mixed.leftovers import descendants
from bench.programs import ROOT, BenchError
from bypass import netns
from bypass.broker.tools import ask
from bypass.errors import BypassError
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, dpdk_policy, wait_for

__all__ = [
    "LAUNCHERS",
    "BypassLauncher",
    "DpdkLauncher",
    "Grant",
    "KernelLauncher",
    "Launcher",
    "Running",
    "SharedLauncher",
    "UpLauncher",
]

END_S = 20.0
SERVED_S = 5.0
UP_S = 20.0
ALONE_S = 20.0
BYPASS = (sys.executable, "-m", "bypass")


@dataclass(frozen=True)
class Grant:
    """Flows that a program may take. `remote`: it connects to this port of the client; else it listens there."""

    port: int
    proto: str = "tcp"
    remote: bool = False

    def match(self) -> str:
        """Of a policy's rule."""
        if self.remote:
            return f"{{proto: {self.proto}, remote: {CLIENT_IP}, remote_port: {self.port}}}"
        return f"{{proto: {self.proto}, local: {SERVER_IP}, local_port: {self.port}}}"


class Running:
    """A program that was started; a context manager that ends it in order and looks whether all of it has gone.

    Attributes:
        process: what was started; the program itself, or what drives it.
        log: the file of its output.
        problems: what was wrong with its end.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.problems: list[str] = []
        self._seen: dict[int, str] = {}

    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> dict[int, str]:
        """The process and all below it: pid -> name."""
        found = descendants(self.process.pid)
        self._seen |= found
        return found

    def pids(self, name: str) -> list[int]:
        """Those of the family with this name, in order."""
        return sorted(pid for pid, comm in self.family().items() if comm == name[:15])

    def said(self, last: int = 800) -> str:
        return self.log.read_text(errors="replace")[-last:].strip()

    def end(self, number: signal.Signals = signal.SIGTERM, codes: Sequence[int] = (0,)) -> None:
        """Asks it to end and waits. What is left of its family after that is killed, and a problem.

        Args:
            codes: exit codes that are good, besides the one of a program that leaves the signal alone.
        """
        self.family()
        if self.alive():
            self.process.send_signal(number)
        try:
            code = self.process.wait(END_S)
            if code not in (*codes, -number, 128 + number):
                self.problems.append(f"exit code {code}: {self.said()}")
        except subprocess.TimeoutExpired:
            self.problems.append(f"did not end within {END_S:g} s of {number.name}")
            self.process.kill()
            self.process.wait()
        self._bury()

    def _bury(self) -> None:
        """Its descendants have a second to follow it."""
        deadline = time.monotonic() + 1
        left = self._left()
        while left and time.monotonic() < deadline:
            time.sleep(0.01)
            left = self._left()
        for pid, name in left.items():
            self.problems.append(f"a process is left: {name} ({pid})")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> dict[int, str]:
        found = {}
        for pid, name in self._seen.items():
            with suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{pid}/stat").read_text()
                if f"({name})" in status and status.rpartition(")")[2].split()[0] != "Z":
                    found[pid] = name
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class Launcher(ABC):
    """Starts programs at a place.

    Args:
        place: where.
        grants: the flows that programs started by this launcher may take.
        stack: sizes of the stack, as in a policy.
        core: the processor that they are pinned to; None: to none.

    Attributes:
        wire: it takes a lab whose server's end is a port for DPDK.
        idle_cpu: of a core that may be used while nobody asks: a program has timers of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    wire: ClassVar[bool] = False
    idle_cpu: ClassVar[float] = 0.05

    def __init__(
        self,
        place: Place,
        grants: Sequence[Grant],
        *,
        stack: Mapping[str, int] | None = None,
        core: int | None = None,
    ) -> None:
        self.place = place
        self.grants = tuple(grants)
        self.stack = dict(stack or {})
        self.core = core
        self._started = 0

    @abstractmethod
    def start(
        self, argv: Sequence[str], *, more_env: Mapping[str, str] | None = None, files: int = 0
    ) -> Running:
        """argv in the server's namespace, as USER, in the place's folder, output into a file there.

        Args:
            argv: the program, by its whole path, and its arguments.
            more_env: environment besides environment().
            files: how many descriptors it may have open; 0: as many as ever.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027
        """Ends what start() needs, after the programs."""

    def on_bypass(self) -> bool:
        """The programs' connections have to be the stack's."""
        return True

    @abstractmethod
    def wait_served(self, port: int) -> None:
        """Until new connections to a port that is open are served by what this launcher stands for."""

    def _prefix(self, files: int) -> list[str]:
        limit = ["prlimit", f"--nofile={files}:{files}", "--"] if files else []
        return limit + ([] if self.core is None else ["taskset", "-c", str(self.core)])

    def _popen(self, argv: Sequence[str], env: Mapping[str, str], user: str | None) -> Running:
        self._started += 1
        log = self.place.folder / f"{self.name}.{self._started}.log"
        ids = pwd.getpwnam(user) if user else None
        with log.open("wb") as out, netns.entered(self.place.lab.server_ns):
            process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(env),
                cwd=self.place.folder, start_new_session=True,
                user=ids.pw_uid if ids else None, group=ids.pw_gid if ids else None,
                extra_groups=[] if ids else None,
            )  # fmt: skip
        return Running(process, log)


class KernelLauncher(Launcher):
    """The program alone."""

    name = "kernel"
    title = "kernel"

    def start(
        self, argv: Sequence[str], *, more_env: Mapping[str, str] | None = None, files: int = 0
    ) -> Running:
        env = environment(self.place.folder) | dict(more_env or {})
        return self._popen([*self._prefix(files), *argv], env, USER)

    def on_bypass(self) -> bool:
        return False

    def wait_served(self, port: int) -> None:
        return


class BypassLauncher(Launcher):
    """`bypass run`, with a broker of the run's own."""

    name = "bypass"
    title = "bypass"
    mode: ClassVar[str] = "direct"

    def policy(self) -> Path:
        """The policy that grants what is asked for, to USER."""
        path = self.place.folder / "policy.yaml"
        rules = "".join(
            f"  - {{name: grant-{i}, match: {grant.match()}, action: steer, allow: {{user: {USER}}}}}\n"
            for i, grant in enumerate(self.grants)
        )
        sizes = ", ".join(f"{name}: {n}" for name, n in self.stack.items())
        head = f"version: 1\ninterface: {SERVER_IFNAME}\nmode: {self.mode}\nbackend: {{kind: afxdp, mode: auto}}\n"
        path.write_text(head + (f"stack: {{{sizes}}}\n" if sizes else "") + f"flows:\n{rules}")
        return path

    def wait_served(self, port: int) -> None:
        """The kernel's listener takes connections until the broker has made the port's flows live."""

        def by_us() -> bool:
            before = snapshot(self.place.lab).passive_opens
            self.place.connect(port).close()
            return snapshot(self.place.lab).passive_opens == before

        wait_for(by_us, SERVED_S, f"bypass to serve port {port}")

    def start(
        self, argv: Sequence[str], *, more_env: Mapping[str, str] | None = None, files: int = 0
    ) -> Running:
        options = self._broker()
        run = [*BYPASS, "run", *options, "--user", USER, "--"]
        return self._popen([*self._prefix(files), *run, *argv], self._environ() | dict(more_env or {}), None)

    def _environ(self) -> dict[str, str]:
        return environment(self.place.folder) | {"PYTHONPATH": str(ROOT)}

    def _broker(self) -> list[str]:
        """Options of `bypass run`. The broker of a program before has the interface until it has followed that."""
        wait_for(lambda: not netns.processes(self.place.lab.server_ns), ALONE_S, "the broker before to end")
        return ["-c", str(self.policy())]


class SharedLauncher(BypassLauncher):
    """`bypass run` by a broker that runs already (`bypass up`), which shares the interface by bypass-fwd."""

    name = "shared"
    title = "bypass, shared"
    mode = "shared"
    _up: Running | None = None

    def up(self) -> str:
        """The broker runs; the name of its socket."""
        name = f"@bypass-apps-{os.getpid()}"
        if self._up is None:
            up = [*BYPASS, "up", "--foreground", "-c", str(self.policy()), "--socket", name]
            self._up = self._popen([*self._prefix(0), *up], self._environ(), None)
            wait_for(lambda: self._answers(name), UP_S, "the broker")
        return name

    def up_again(self) -> None:
        """Another broker takes over from the one that was killed."""
        if self._up is not None:
            self._up.process.wait(END_S)
        self._up = None
        self.up()

    def _broker(self) -> list[str]:
        return ["--socket", self.up()]

    def _answers(self, name: str) -> bool:
        """It listens before it can serve."""
        if self._up is None or not self._up.alive():
            raise BenchError(f"bypass up: {self._up.said() if self._up else 'it was not started'}")
        try:
            netns.run(self.place.lab.server_ns, lambda: list(ask(name, {"do": "ps"})))
        except BypassError:
            return False
        return True

    def close(self) -> None:
        """BenchError: the broker did not end as it should."""
        if self._up is not None:
            self._up.end()
            if self._up.problems:
                raise BenchError(f"bypass up: {'; '.join(self._up.problems)}")


class DpdkLauncher(SharedLauncher):
    """The same on a port of DPDK, net_af_packet's."""

    name = "dpdk"
    title = "bypass, DPDK"
    wire = True

    def policy(self) -> Path:
        path = super().policy()
        path.write_text(dpdk_policy(path.read_text()))
        return path


class UpLauncher(SharedLauncher):
    """The same for one application at a time."""

    name = "up"
    title = "bypass up"
    mode = "direct"


LAUNCHERS: dict[str, type[Launcher]] = {
    cls.name: cls for cls in (KernelLauncher, BypassLauncher, SharedLauncher, DpdkLauncher, UpLauncher)
}
