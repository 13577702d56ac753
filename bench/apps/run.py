# SPDX-License-Identifier: Apache-2.0
"""One program, started by one launcher in a lab of its own, used, ended, and judged."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.apps.app import App
from bench.apps.curl import Curl
from bench.apps.iperf import IperfClient, IperfServer
from bench.apps.launch import Launcher
from bench.apps.memcached import Memcached
from bench.apps.nginx import Nginx, NginxShort
from bench.apps.place import place
from bench.apps.postgres import Postgres
from bench.apps.proof import Evidence, snapshot
from bench.apps.python_web import AsyncioServer, HttpServer
from bench.apps.redis import Redis, RedisMany
from bench.mixed.leftovers import bpf_objects, still_there
from bench.programs import BenchError
from bypass import netns
from bypass.errors import BypassError
from bypass.lab import Lab

__all__ = ["APPS", "Verdict", "run"]

FOLLOW_S = 3.0
IDLE_AFTER_S, IDLE_S = 0.5, 0.5

APPS: dict[str, type[App]] = {
    cls.name: cls
    for cls in (
        Redis, RedisMany, Nginx, NginxShort, Memcached, Postgres, HttpServer, AsyncioServer, IperfServer, IperfClient,
        Curl,
    )
}  # fmt: skip


@dataclass
class Verdict:
    """What came of a run. `problems`: of the program and of what it left; empty: it works. `elsewhere`: why bypass did
    not serve it; empty: it did. That is a problem only where it should have. `rate`, in `unit`: the figure that stands
    for all of them."""

    app: str
    launcher: str
    problems: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    rate: float | None = None
    unit: str = ""
    proof: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        return dict(vars(self))


def run(cls: type[App], launcher_of: type[Launcher], *, scale: float = 1.0, queues: int = 2) -> Verdict:
    """Starts `cls` by `launcher_of` and uses it.

    Args:
        scale: how much of a full run.
        queues: of the lab's interface.
    """
    verdict = Verdict(cls.name, launcher_of.name, unit=cls.unit)
    began = time.monotonic()
    lab = Lab(f"{os.getpid()}-apps", queues=queues, wire=launcher_of.wire)
    with lab, place(lab, scale) as here:
        problems: list[str] = []
        try:
            with launcher_of(here, cls.grants, stack=cls.stack) as launcher:
                app = cls(here, launcher)
                problems = app.problems
                objects = _use(app, lab, verdict)
            verdict.problems += [
                f"BPF {kind} {number} is left" for kind, number in sorted(still_there(objects))
            ]
        except (BypassError, OSError) as e:
            verdict.problems.append(str(e))
        verdict.problems += problems
        verdict.problems += _left(lab)
    verdict.seconds = round(time.monotonic() - began, 1)
    return verdict


def _use(app: App, lab: Lab, verdict: Verdict) -> set[tuple[str, int]]:
    """The BPF objects that there were meanwhile."""
    with app.session():
        before = snapshot(lab)
        verdict.figures = app.exercise()
        verdict.rate = app.rate(verdict.figures)
        evidence = Evidence(before, snapshot(lab))
        users = idle_users(lab)
        objects = _bpf(lab)
    idle = idle_cpu(users)
    verdict.proof = evidence.figures() | {"idle_cpu": idle, "idle_users": users}
    verdict.elsewhere = evidence.problems()
    if idle > app.launcher.idle_cpu:
        by = ", ".join(f"{name} {share:.1%}" for name, share in users.items())
        verdict.problems.append(f"used {idle:.1%} of a core while nobody asked: {by}")
    return objects


def idle_users(lab: Lab) -> dict[str, float]:
    """Processor time that the processes of the server's namespace use while nobody asks, of the time of one core, by
    their names; who uses most comes first."""
    time.sleep(IDLE_AFTER_S)
    before, began = _run_ns(lab), time.monotonic_ns()
    time.sleep(IDLE_S)
    used: Counter[str] = Counter()
    for (task, name), ns in _run_ns(lab).items():
        used[name] += ns - before.get((task, name), ns)
    passed = time.monotonic_ns() - began
    return {name: round(ns / passed, 4) for name, ns in used.most_common() if ns}


def idle_cpu(users: Mapping[str, float]) -> float:
    """Of all of them."""
    return round(sum(users.values()), 4)


def _run_ns(lab: Lab) -> dict[tuple[Path, str], int]:
    """Run time of every task (/proc/PID/task/TID/schedstat), with its process' name."""
    found = {}
    for pid, name in netns.processes(lab.server_ns).items():
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                found[task, name] = int((task / "schedstat").read_text().split()[0])
    return found


def _left(lab: Lab) -> list[str]:
    """Processes of the lab, a moment after the program's end: a broker of its own follows it."""
    deadline = time.monotonic() + FOLLOW_S
    while True:
        there = {(ns, pid): name for ns in lab.namespaces for pid, name in netns.processes(ns).items()}
        if not there or time.monotonic() > deadline:
            return [f"a process is left in {ns}: {name} ({pid})" for (ns, pid), name in there.items()]
        time.sleep(0.02)


def _bpf(lab: Lab) -> set[tuple[str, int]]:
    """BPF objects that processes of the server's namespace hold now."""
    found: set[tuple[str, int]] = set()
    for pid in netns.processes(lab.server_ns):
        if Path(f"/proc/{pid}/fdinfo").exists():
            found |= bpf_objects(pid)
    return found


def require(names: list[str]) -> None:
    """BenchError: not all of the programs are there."""
    lacking = [f"{name}: {what}" for name in names for what in APPS[name].missing()]
    if lacking:
        raise BenchError(f"missing: {'; '.join(lacking)}")
