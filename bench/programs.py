# SPDX-License-Identifier: Apache-2.0
"""The benchmark's C programs (build/bench, made by bench/build.mk) and how they are run: pinned, in a namespace,
their one JSON object read back.

Core 0 is the server's, core 1 the client's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bypass.errors import BypassError
from bypass.lab import Lab

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
SERVER_CORE = 0
CLIENT_CORE = 1


class BenchError(BypassError):
    """A benchmark that could not be run; the message says what is missing."""


def program(name: str) -> str:
    """Path of a built program.

    Raises:
        BenchError: it was not built.
    """
    path = BUILD / name
    if not path.exists():
        raise BenchError(f"{path.relative_to(ROOT)} is missing: run `make bench`, or make -f bench/build.mk")
    return str(path)


def require_two_cores() -> None:
    if len(os.sched_getaffinity(0)) < 2 or (os.cpu_count() or 1) < 2:
        raise BenchError("two cores are needed: one for the server, one for the client")


def pinned(core: int, argv: Sequence[str]) -> list[str]:
    return ["taskset", "-c", str(core), *argv]


def run_json(argv: Sequence[str], timeout: float = 120) -> dict[str, Any]:
    """Runs a program that prints one JSON object.

    Raises:
        BenchError: it failed; with what it said.
    """
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ksoftirqd_pids() -> list[int]:
    """The kernel threads that run softirqs when there are too many; their CPU time belongs to the traffic."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().startswith("ksoftirqd/"):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Server:
    """A server process in the lab's server namespace, on core 0; it prints "ready" and ends with its input.

    Args:
        argv: its command line.
        inside: run it inside the namespace; False: it goes there by itself.
    """

    def __init__(self, lab: Lab, argv: Sequence[str], *, inside: bool) -> None:
        self.argv = pinned(SERVER_CORE, argv)
        if inside:
            self.argv = ["ip", "netns", "exec", lab.server_ns, *self.argv]
        self._process: subprocess.Popen[str] | None = None
        self.report: dict[str, Any] = {}

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            self.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            _, err = self._process.communicate()
            raise BenchError(f"{' '.join(self.argv)} did not start: {err.strip()}")
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        try:
            out, err = self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            raise BenchError(f"{' '.join(self.argv)} did not end") from None
        if self._process.returncode != 0 and exc[0] is None:
            raise BenchError(f"{' '.join(self.argv)}: exit code {self._process.returncode}: {err.strip()}")
        lines = out.strip().splitlines()
        self.report = json.loads(lines[-1]) if lines else {}


def python_server(lab: Lab, variant: str) -> Server:
    """bench.serve as a server: it needs the main mount namespace and enters the network namespace itself."""
    return Server(lab, [sys.executable, "-m", "bench.serve", variant, lab.name], inside=False)
