# SPDX-License-Identifier: Apache-2.0
"""Where programs are and run: Debian's binaries, a lab, and a folder that an unprivileged user may use."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.programs import ROOT, BenchError
from bypass import netns
from bypass.lab import SERVER_IP, Lab, wait_for

__all__ = ["USER", "Place", "environment", "find", "lacking", "place", "where"]

USER = "nobody"
UNPACKED = ROOT / ".venv" / "debian"  # by scripts/programs
SYSTEM = Path("/")
FOLDERS = ("usr/sbin", "usr/bin", "usr/lib/postgresql/15/bin")
LIBRARIES = UNPACKED / "usr/lib" / f"{os.uname().machine}-linux-gnu"


def find(name: str) -> Path | None:
    """Debian's program of this name: as installed, or as scripts/programs unpacked it. Never one in /usr/local."""
    for root in (SYSTEM, UNPACKED):
        for folder in FOLDERS:
            path = root / folder / name
            if path.is_file() and os.access(path, os.X_OK):
                return path
    return None


def where(name: str) -> str:
    """As find().

    Raises:
        BenchError: it is not there.
    """
    path = find(name)
    if path is None:
        raise BenchError(f"{name} is missing: run scripts/programs (it says why when it cannot unpack it)")
    return str(path)


def lacking(names: Sequence[str]) -> list[str]:
    """Those that are missing, or that an unprivileged user cannot reach."""
    found = []
    for name in names:
        path = find(name)
        if path is None:
            found.append(f"{name} (scripts/programs)")
        elif not _reachable(path):
            found.append(f"{name}: {path} lies below a folder that user {USER} may not enter")
    return found


def _reachable(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


def environment(folder: Path) -> dict[str, str]:
    """Of a program: nothing of the caller's but what it takes to be found and to find its libraries."""
    env = {"PATH": ":".join(f"/{f}" for f in FOLDERS), "HOME": str(folder), "LANG": "C.UTF-8"}
    if LIBRARIES.is_dir():
        env["LD_LIBRARY_PATH"] = str(LIBRARIES)
    return env


@dataclass(frozen=True)
class Place:
    """A lab and a folder. `scale`: how much of a full run is asked for; 1 is all of it."""

    lab: Lab
    folder: Path
    scale: float = 1.0

    def count(self, full: int, least: int = 1) -> int:
        return max(least, int(full * self.scale))

    def client(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 120,
        core: int | None = None,
        check: bool = True,
        stdin: str = "",
    ) -> str:
        """Runs a program of the kernel's side, as root, to its end; what it printed.

        Raises:
            BenchError: its exit code is not 0 and `check`; with what it said.
        """
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        with netns.entered(self.lab.client_ns):
            done = subprocess.run(
                [*pinned, *argv],
                input=stdin, capture_output=True, text=True, timeout=timeout, check=False, env=environment(self.folder),
            )  # fmt: skip
        if check and done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-500:]
            raise BenchError(f"{Path(argv[0]).name}: exit code {done.returncode}: {said}")
        return done.stdout

    def server(self, argv: Sequence[str], *, timeout: float = 120) -> str:
        """Runs a program of the server's side, as USER, to its end, on the kernel; what it printed.

        Raises:
            BenchError: its exit code is not 0; with what it said.
        """
        user = pwd.getpwnam(USER)
        with netns.entered(self.lab.server_ns):
            done = subprocess.run(
                list(argv), capture_output=True, text=True, timeout=timeout, check=False, cwd=self.folder,
                env=environment(self.folder), user=user.pw_uid, group=user.pw_gid, extra_groups=[],
            )  # fmt: skip
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-500:]
            raise BenchError(f"{Path(argv[0]).name}: exit code {done.returncode}: {said}")
        return done.stdout

    def background(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """The same, without waiting."""
        with netns.entered(self.lab.client_ns):
            return subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(self.folder)
            )  # fmt: skip

    def connect(self, port: int, host: str = SERVER_IP, timeout: float = 20) -> socket.socket:
        """A connection of the client's namespace."""
        with netns.entered(self.lab.client_ns):
            return socket.create_connection((host, port), timeout)

    def wait_open(self, port: int, alive: Callable[[], bool], seconds: float = 20) -> None:
        """Until the server's port takes connections.

        Raises:
            BenchError: the server ended, or does not listen in time.
        """

        def is_open() -> bool:
            if not alive():
                raise BenchError(f"the server at port {port} ended before it listened")
            try:
                self.connect(port, timeout=1).close()
            except OSError:
                return False
            return True

        wait_for(is_open, seconds, f"port {port} to be open")


@contextmanager
def place(lab: Lab, scale: float = 1.0) -> Iterator[Place]:
    """A place in `lab` with a folder of USER's, which is removed afterwards."""
    user = pwd.getpwnam(USER)
    folder = Path(tempfile.mkdtemp(prefix="bypass-apps-"))
    try:
        os.chown(folder, user.pw_uid, user.pw_gid)
        yield Place(lab, folder, scale)
    finally:
        shutil.rmtree(folder)
