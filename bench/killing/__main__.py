# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.killing`: kills at seeded moments, judges each, and writes build/killing.json. Exit code 1: one
was not as it has to be."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.apps.place import Place, lacking, place
from bench.apps.proof import Evidence, snapshot
from bench.command import save, start
from bench.killing.busy import Busy, Spent
from bench.killing.judge import OUTCOMES, Outcome, Seen, judge
from bench.killing.residue import Residue
from bench.killing.worlds import WORLDS, Alive, World
from bench.mixed.leftovers import bpf_objects
from bench.programs import ROOT, BenchError
from bypass import __version__, netns, probe
from bypass.dpdk_backend.eal import load_plugin
from bypass.errors import BypassError
from bypass.lab import SERVER_IP, Lab

KEPT = 4
UNTIL_S = 0.5  # a kill comes at a moment up to this long after the load began
PROVEN_S = 0.05  # of load before that, at least: who serves?
WATCH_S = 0.35  # the load goes on for so long after it
AGAIN = 2  # times that a kill is tried once more, when it was late and the machine busy
SAID_EVERY = 25
NOTHING_SPENT = Spent(0, 0)
USUAL = ("direct", "shared", "direct-nginx", "shared-nginx", "dpdk", "dpdk-nginx")


def outcome_of(world: World, role: str) -> Outcome:
    """The kernel closes what a killed program of its own had: an end may then be a FIN as well."""
    outcome = world.outcomes.get(role, OUTCOMES[role])
    return outcome if world.on_bypass() else replace(outcome, how=("reset", "eof"))


class Peers:
    """bench/killing/client.py in the client's namespace."""

    def __init__(self, here: Place, world: World) -> None:
        argv = [
            sys.executable, str(ROOT / "bench" / "killing" / "client.py"), SERVER_IP, str(world.port), str(KEPT),
            world.request.hex(), world.answer.hex(),
        ]  # fmt: skip
        with netns.entered(here.lab.client_ns):
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Peers:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            self.process.kill()
            self.process.communicate()
            raise BenchError("the peers were not answered")
        return self

    def stop(self) -> dict[str, Any]:
        out, _ = self.process.communicate("\n", timeout=30)
        found: dict[str, Any] = json.loads(out)
        return found

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@dataclass
class Trial:
    """A kill, and what came of it. `tries`: those before this one, which were late on a busy machine."""

    role: str
    after_s: float
    tries: int
    seen: Seen = field(default_factory=Seen)
    probes: dict[str, int] = field(default_factory=dict)
    spent: Spent = NOTHING_SPENT
    objects: set[tuple[str, int]] = field(default_factory=set)

    def excused(self) -> bool:
        """Nothing but lateness, while others had the processors: it is tried again."""
        return bool(self.seen.late) and not self.seen.wrong and self.spent.too_busy() and self.tries < AGAIN

    def document(self) -> dict[str, Any]:
        return {
            "role": self.role, "after_s": round(self.after_s, 4), "new_ms": self.seen.new_ms,
            "kept_ms": self.seen.kept_ms, "probes": self.probes, "others": self.spent.others,
            "waited_ms": self.spent.waited_ms, "tries": self.tries, "excused": self.excused(),
            "wrong": self.seen.wrong, "late": self.seen.late,
        }  # fmt: skip


def kill(lab: Lab, world: World, here: Place, alive: Alive, it: Trial, within_s: float) -> None:
    """One kill in a world that serves; `it` says what came of it."""
    with Peers(here, world) as peers:
        before = snapshot(lab)
        time.sleep(it.after_s + PROVEN_S)
        evidence = Evidence(before, snapshot(lab))
        for pid in alive.family():
            it.objects |= bpf_objects(pid)
        victim = alive.victim(it.role)
        busy = Busy(lab)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        time.sleep(WATCH_S)
        it.spent, after = busy.spent(), snapshot(lab)
        found = peers.stop()
    outcome = outcome_of(world, it.role)
    it.seen = judge(found, killed, outcome, within_s)
    it.probes = dict(Counter(result for _, _, result in found["probes"]))
    if world.on_bypass():
        it.seen.wrong += [f"before the kill: {text}" for text in evidence.problems()]
        if outcome.kept == "go on" and (opens := after.passive_opens - before.passive_opens):
            it.seen.wrong.append(f"the kernel took {opens} connections")


class Series:
    """Kills at moments, one after the other; the world is started anew where it has to be. tell() of each."""

    def __init__(self, lab: Lab, world: World, within_s: float, tell: Callable[[Trial], None]) -> None:
        self.lab = lab
        self.world = world
        self.within_s = within_s
        self.tell = tell
        self.stop = Event()
        self._it: Trial | None = None  # not told yet

    def run(self, moments: Sequence[tuple[str, float]]) -> None:
        waiting = deque(Trial(role, after_s, 0) for role, after_s in moments)
        while waiting and not self.stop.is_set():
            residue = Residue(self.lab)
            try:
                self._life(waiting)
            except (BypassError, OSError, subprocess.TimeoutExpired) as e:
                self._it = self._it or waiting.popleft()
                self._it.seen.wrong.append(str(e))
            if self._it is not None:
                self._it.seen.wrong += [f"left: {what}" for what in residue.check(self._it.objects)]
            self._done(waiting)

    def _life(self, waiting: deque[Trial]) -> None:
        """From one start of the world to its end, which is that of the last kill too."""
        with place(self.lab) as here, self.world.running(here) as alive:
            while waiting:
                self._it = waiting.popleft()
                kill(self.lab, self.world, here, alive, self._it, self.within_s)
                if not waiting or self.stop.is_set() or (left := alive.mended(self._it.role)) is None:
                    return
                self._it.seen.wrong += [f"left: {what}" for what in left]
                self._done(waiting)

    def _done(self, waiting: deque[Trial]) -> None:
        if self._it is not None:
            if self._it.excused():
                waiting.appendleft(Trial(self._it.role, self._it.after_s, self._it.tries + 1))
            self.tell(self._it)
            self._it = None


def table(trials: list[dict[str, Any]], within: float) -> Table:
    shown = Table(title="\nSIGKILL under load", title_justify="left", title_style="bold")
    for name in ("server", "killed"):
        shown.add_column(name)
    for name in ("times", "good", "late", "wrong", "new ms", "kept ms", "again"):
        shown.add_column(name, justify="right")
    for world, role in dict.fromkeys((t["world"], t["role"]) for t in trials):
        every = [t for t in trials if (t["world"], t["role"]) == (world, role)]
        these = [t for t in every if not t["excused"]]
        worst = [max((t[k] for t in these if t[k] is not None), default=None) for k in ("new_ms", "kept_ms")]
        wrong = sum(bool(t["wrong"]) for t in these)
        good = sum(not t["wrong"] and not t["late"] for t in these)
        numbers = (len(these), good, len(these) - good - wrong, wrong)
        shown.add_row(
            WORLDS[world].title,
            role,
            *map(str, numbers),
            *("-" if w is None else f"{w:g}" for w in worst),
            str(len(every) - len(these)),
        )
    shown.caption = (
        "ms from the kill, the longest: until new connections had their answer, until kept ones ended.\n"
        f"late: as it has to be, but after more than {within:g} ms; again: late while other programs had the "
        "processors, and tried once more"
    )
    shown.caption_justify = "left"
    return shown


class Course:
    """Takes what became of each kill, from several threads, and says how far it is."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.trials: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._lock = Lock()

    def tell(self, name: str, it: Trial) -> None:
        with self._lock:
            self.trials.append({"world": name} | it.document())
            for problem in it.seen.problems:
                self.console.print(
                    f"{name}, {it.role} after {it.after_s:.4f} s: {problem} (others had {it.spent.others:.0%}, "
                    f"a task waited {it.spent.waited_ms:g} ms{', tried again' if it.excused() else ''})",
                    markup=False,
                )
            done = sum(not t["excused"] for t in self.trials)
            if not it.excused() and (done % SAID_EVERY == 0 or done == self.total):
                self.console.print(f"{done} of {self.total} kills, {time.monotonic() - self._began:.0f} s")

    def complete(self) -> bool:
        return sum(not t["excused"] for t in self.trials) == self.total

    def bad(self) -> int:
        return sum(bool(t["wrong"] or t["late"]) for t in self.trials if not t["excused"])


def moments_of(seed: int, roles: Sequence[str], times: int) -> list[tuple[str, float]]:
    rng = random.Random(seed)
    return [(role, rng.uniform(0, UNTIL_S)) for _ in range(times) for role in roles]


def _all_of(every: Sequence[tuple[Series, Sequence[tuple[str, float]]]], jobs: int) -> None:
    """Runs series, so many at a time. Interrupted, each ends in order after the kill that it is at."""

    def stop(*_: object) -> None:
        for series, _moments in every:
            series.stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(series.run, moments) for series, moments in every]
        for each in running:
            each.result()


@click.command()
@click.option(
    "--times", type=click.IntRange(1, 10_000), default=100, show_default=True,
    help="Kills of each role of each server.",
)  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments.")
@click.option("--within", type=click.FloatRange(1, 60_000), default=100, show_default=True,
              help="Milliseconds until the kernel has to have answered.")  # fmt: skip
@click.option("--only", type=click.Choice(sorted(WORLDS)), multiple=True, default=USUAL,
              show_default=True, help="This server; several times.")  # fmt: skip
@click.option(
    "--role", "roles", type=click.Choice(sorted(OUTCOMES)), multiple=True, help="Only this one is killed."
)
@click.option("--jobs", type=click.IntRange(1, 16), default=2, show_default=True, help="Servers at a time.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "killing.json",
              help="Where the figures go.")  # fmt: skip
def main(
    times: int,
    seed: int,
    within: float,
    only: tuple[str, ...],
    roles: tuple[str, ...],
    jobs: int,
    output: Path,
) -> None:
    """Kills a server's processes at seeded random moments under load; each role in turn.

    A kill whose outcome was right and late, while other programs had the processors, is tried again, twice at most.
    """
    lack = probe.missing_for_xdp() or lacking(sorted({tool for name in only for tool in WORLDS[name].needs}))
    if lack:
        raise BenchError(f"missing: {'; '.join(lack)}")
    if any(WORLDS[name].wire for name in only):
        load_plugin()
    asked = {name: [role for role in WORLDS[name].roles if not roles or role in roles] for name in only}
    if not any(asked.values()):
        raise BenchError(f"{', '.join(only)} has no role {', '.join(roles)}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    course = Course(console, times * sum(map(len, asked.values())))
    try:
        with ExitStack() as labs:
            every = []
            for name, mine in asked.items():
                lab = labs.enter_context(Lab(f"{os.getpid()}-{name}", wire=WORLDS[name].wire))
                series = Series(lab, WORLDS[name](), within / 1e3, partial(course.tell, name))
                every.append((series, moments_of(seed, mine, times)))
            _all_of(every, jobs)
    finally:
        save(
            {"version": 2, "bypass": __version__, "seed": seed, "within_ms": within, "trials": course.trials},
            output,
        )
    console.print(table(course.trials, within))
    console.print(f"all figures: {output}")
    sys.exit(1 if course.bad() or not course.complete() else 0)


if __name__ == "__main__":
    start(main, "killing")
