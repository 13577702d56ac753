# SPDX-License-Identifier: Apache-2.0
"""Rounds: in each, every variant serves every program once, in an order that turns; ratios are taken within a round."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from bench import costs
from bench.apps.app import ServerApp
from bench.apps.launch import BypassLauncher, KernelLauncher, Launcher, SharedLauncher
from bench.apps.place import Place, place
from bench.apps.proof import Evidence, snapshot
from bench.figures import ratios, spread
from bench.programs import CLIENT_CORE, SERVER_CORE, BenchError, program
from bench.versus import profile
from bench.versus.cores import pinned_reception, server_tasks
from bench.versus.servers import MEMCACHED, NGINX, RR, WORKLOADS, Workload, threaded
from bypass.lab import SERVER_IP, Lab

__all__ = ["OFFERED", "VARIANTS", "Plan", "compare", "scaling"]

OFFERED = 0.5  # of what the kernel does when it is asked as fast as it answers
QUIET_S = 0.3


@dataclass(frozen=True)
class Variant:
    """Who serves. Two of the kernel: their ratio is the noise."""

    name: str
    title: str
    launcher: type[Launcher]


VARIANTS = {
    v.name: v
    for v in (
        Variant("kernel", "kernel", KernelLauncher),
        Variant("again", "kernel, once more", KernelLauncher),
        Variant("bypass", "bypass", BypassLauncher),
        Variant("shared", "bypass, shared", SharedLauncher),
    )
}
RATIOS = (
    ("again:kernel", "again", "kernel"),
    ("bypass:kernel", "bypass", "kernel"),
    ("shared:kernel", "shared", "kernel"),
)
COMPARED = ("rate", "cpu_s", "p50_us", "p99_us")
LOADS = ("saturation", "offered")
KEYS = ("rate", "cpu_s", "cores_cpu_s", "p50_us", "p99_us", "served", "other_cpu_share")
PROFILE_MS = 1000
PROFILED = ("redis_get", "rr_1")
TWO = (MEMCACHED, NGINX, RR)  # those that have threads or workers


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    warmup_ms: int
    measure_ms: int
    variants: tuple[str, ...]
    workloads: tuple[Workload, ...] = WORKLOADS
    step: Callable[[str], None] = lambda what: None

    def steps(self) -> int:
        """How often compare() calls `step`."""
        return len(self.workloads) * (1 + self.rounds * len(self.variants))


class Serving:
    """A server that runs, and is asked."""

    def __init__(self, here: Place, app: ServerApp, receivers: set[int], core: int | None) -> None:
        self.here = here
        self.app = app
        self.receivers = receivers
        self.core = core

    def prepare(self, w: Workload) -> int:
        """Bytes of an answer to `w`."""
        with self.here.connect(w.port) as sock:
            if w.before:
                _answer(sock, w.before)
            return len(_answer(sock, w.request))

    def ask(self, w: Workload, plan: Plan, rate: int, answer: int) -> dict[str, Any]:
        """What bench/load.c found, and per million requests and second what comes of it."""
        pids = ",".join(map(str, server_tasks(self.here, self.receivers)))
        argv = [
            program("load"), SERVER_IP, str(w.port), str(w.parallel), str(rate), str(plan.warmup_ms),
            str(plan.measure_ms), pids, str(answer),
        ]  # fmt: skip
        try:
            raw: dict[str, Any] = json.loads(self.here.client(argv, core=self.core, stdin=w.request))
            return derived(raw)
        except BenchError as e:
            raise BenchError(f"{w.title}: {e}") from e


def derived(raw: dict[str, Any]) -> dict[str, Any]:
    """Adds: requests per second, CPU seconds per million of the server and of both cores, the share of what was due
    that was served, the share of both cores that others took."""
    ops, seconds = raw["ops"], raw["seconds"]
    if ops == 0:
        raise BenchError("no request was answered in the measured time")
    cores = raw["core_cpu_s"][SERVER_CORE] + raw["core_cpu_s"][CLIENT_CORE]
    return raw | {
        "rate": ops / seconds,
        "cpu_s": (raw["task_cpu_s"] - raw["client_cpu_s"]) / ops * 1e6,
        "cores_cpu_s": cores / ops * 1e6,
        "served": min(1.0, ops / raw["due"]) if raw["due"] else 0.0,
        "other_cpu_share": max(0.0, cores - raw["task_cpu_s"]) / (2 * seconds),
    }


def _answer(sock: socket.socket, request: str) -> bytes:
    """All that comes until nothing does for a while."""
    sock.sendall(request.encode())
    sock.settimeout(20)
    got = sock.recv(1 << 16)
    sock.settimeout(QUIET_S)
    try:
        while more := sock.recv(1 << 16):
            got += more
    except TimeoutError:
        return got
    raise BenchError(f"the server closed after {got[:60]!r}")


@contextmanager
def serving(
    lab: Lab, cls: type[ServerApp], variant: Variant, receivers: set[int], *, pin: bool = True
) -> Iterator[Serving]:
    """A program as `variant` serves it.

    Raises:
        BenchError: it did not start or end as it should, or bypass did not serve what it should have.
    """
    with ExitStack() as undo:
        here = undo.enter_context(place(lab))
        core = SERVER_CORE if pin else None
        launcher = undo.enter_context(variant.launcher(here, cls.grants, stack=cls.stack, core=core))
        app = cls(here, launcher)
        with app.session():
            before = snapshot(lab)
            yield Serving(here, app, receivers, CLIENT_CORE if pin else None)
            evidence = Evidence(before, snapshot(lab))
        elsewhere = evidence.problems() if launcher.on_bypass() else []
        if wrong := [*app.problems, *elsewhere]:
            raise BenchError(f"{cls.name} on {variant.name}: {'; '.join(wrong)}")


def _by_server(workloads: Sequence[Workload]) -> list[tuple[type[ServerApp], list[Workload]]]:
    return [(server, list(ws)) for server, ws in groupby(workloads, lambda w: w.server)]


# ---- Kernel against bypass -----------------------------------------------------------------------------------------
def compare(plan: Plan) -> dict[str, Any]:
    """All rounds on one queue and pinned cores. `workloads` of the result file."""
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    with Lab(f"{os.getpid()}-versus", queues=1) as lab, pinned_reception(lab) as receivers:
        offered = _calibrate(plan, lab, receivers)
        for number in range(plan.rounds):
            turn = number % len(plan.variants)
            for name in (*plan.variants[turn:], *plan.variants[:turn]):
                for server, workloads in _by_server(plan.workloads):
                    with serving(lab, server, VARIANTS[name], receivers) as it:
                        for w in workloads:
                            plan.step(f"round {number + 1}: {VARIANTS[name].title}: {w.title}")
                            answer = it.prepare(w)
                            for load in LOADS:
                                rate = offered[w.name] if load == "offered" else 0
                                found = it.ask(w, plan, rate, answer)
                                runs.setdefault((w.name, load, name), []).append(found)
    return {w.name: _summary(w, runs, plan.variants, offered[w.name]) for w in plan.workloads}


def _calibrate(plan: Plan, lab: Lab, receivers: set[int]) -> dict[str, int]:
    """Requests per second that are offered to everybody."""
    offered = {}
    for server, workloads in _by_server(plan.workloads):
        with serving(lab, server, VARIANTS["kernel"], receivers) as it:
            for w in workloads:
                plan.step(f"what the kernel can do: {w.title}")
                offered[w.name] = max(1, int(OFFERED * it.ask(w, plan, 0, it.prepare(w))["rate"]))
    return offered


def _summary(
    w: Workload, runs: dict[tuple[str, str, str], list[dict[str, Any]]], variants: Sequence[str], offered: int
) -> dict[str, Any]:
    about: dict[str, Any] = {"title": w.title, "parallel": w.parallel, "offered_per_s": offered}
    for load in LOADS:
        by = {v: runs[w.name, load, v] for v in variants}
        about[load] = {
            "variants": {v: {k: spread([r[k] for r in found]) for k in KEYS} for v, found in by.items()},
            "ratios": {
                title: {k: ratios([r[k] for r in by[a]], [r[k] for r in by[b]]) for k in COMPARED}
                for title, a, b in RATIOS
                if a in by and b in by
            },
        }  # fmt: skip
    return about


# ---- Profiles ------------------------------------------------------------------------------------------------------
def profiles(plan: Plan) -> dict[str, Any]:
    """`profiles` of the result file: workload -> variant -> what profile.groups_of() gives."""
    result: dict[str, Any] = {}
    owner = profile.owners()
    plan = replace(plan, measure_ms=max(plan.measure_ms, PROFILE_MS))
    with Lab(f"{os.getpid()}-versus", queues=1) as lab, pinned_reception(lab) as receivers:
        for variant, w in _profiled(plan):
            plan.step(f"profile: {VARIANTS[variant].title}: {w.title}")
            with serving(lab, w.server, VARIANTS[variant], receivers) as it:
                chains = _sampled(it, w, plan)
            result.setdefault(w.name, {})[variant] = profile.groups_of(chains, owner)
    return result


def _sampled(it: Serving, w: Workload, plan: Plan) -> list[list[costs.Frame]]:
    """At last none: on a busy machine perf may take longer to begin than is measured. Then for twice as long."""
    chains: list[list[costs.Frame]] = []
    for longer in (1, 2, 4, 8):
        chains = chains or _recorded(it, w, replace(plan, measure_ms=plan.measure_ms * longer))
    return chains


def _recorded(it: Serving, w: Workload, plan: Plan) -> list[list[costs.Frame]]:
    """Samples of the measured time, when a thread for a connection is there: perf may miss one that begins later."""
    answer = it.prepare(w)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(it.ask, w, plan, 0, answer)
        wait([asked], plan.warmup_ms / 1000)
        with profile.record(server_tasks(it.here, it.receivers)) as recording:
            asked.result()
            return list(costs.samples(recording.stop()))


def _profiled(plan: Plan) -> list[tuple[str, Workload]]:
    return [(v, w) for w in plan.workloads if w.name in PROFILED for v in plan.variants if v != "again"]


def profile_steps(plan: Plan) -> int:
    return len(_profiled(plan))


# ---- One against two queues and threads ----------------------------------------------------------------------------
def scaling(plan: Plan) -> dict[str, Any]:
    """Saturation with one queue and thread, and with two of each, nothing pinned: client and server share both cores.
    `threads` of the result file: rates, and their ratio within a round."""
    found: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as undo:
        labs = {}
        for n in (1, 2):
            lab = undo.enter_context(Lab(f"{os.getpid()}-versus{n}", queues=n))
            labs[n] = (lab, undo.enter_context(pinned_reception(lab, pin=False)))
        for number in range(plan.rounds):
            for variant in (v for v in plan.variants if v != "again"):
                for w in (w for w in plan.workloads if w.server in TWO and w.parallel > 1):
                    for n in (1, 2) if number % 2 == 0 else (2, 1):
                        plan.step(f"round {number + 1}: {variant}: {w.title}, {n} of each")
                        lab, receivers = labs[n]
                        with serving(
                            lab, threaded(w.server, n), VARIANTS[variant], receivers, pin=False
                        ) as it:
                            rate = it.ask(w, plan, 0, it.prepare(w))["rate"]
                        found.setdefault((w.name, variant, n), []).append(rate)
    result: dict[str, Any] = {}
    for (name, variant, n), rates in found.items():
        entry = result.setdefault(name, {}).setdefault(variant, {})
        entry[f"rate_{n}"] = spread(rates)
        if n == 2:
            entry["ratio"] = ratios(rates, found[name, variant, 1])
    return result


def scaling_steps(plan: Plan) -> int:
    count = Counter(w.server in TWO and w.parallel > 1 for w in plan.workloads)[True]
    return count * 2 * plan.rounds * len([v for v in plan.variants if v != "again"])
