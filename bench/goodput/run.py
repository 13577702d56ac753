# SPDX-License-Identifier: Apache-2.0
"""Runs of the program build/bench/goodput: one, or many beside each other as far as they do not disturb one another."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.goodput.conditions import Condition
from bench.programs import BenchError, program

LINUX, OURS = "linux", "ours"
CAPACITY_MBIT = 200  # of all wires together: each 100 Mbit/s take 0.4 of a core
LATE_MS = 2.0  # one frame in a hundred so much too late: the machine was too busy, the run is not used
RETRIES = 2
LOOK_AHEAD = 60  # jobs


@dataclass(frozen=True)
class Flow:
    """Who sends to whom. cc: of the sender."""

    sender: str
    receiver: str
    cc: str
    start_s: float = 0

    def argument(self, condition: Condition) -> str:
        fields = (
            self.sender, self.receiver, self.cc, round(self.start_s * 1000), condition.transfer_bytes,
        )  # fmt: skip
        return "flow=" + ",".join(str(f) for f in fields)


def fills(cc: str) -> bool:
    """Whether it uses the rate whatever is lost."""
    return cc == "bbr"


@dataclass(frozen=True)
class Job:
    """One run. Equal jobs with equal seeds meet equal fates as far as they send equal frames."""

    condition: Condition
    flows: tuple[Flow, ...]
    seed: int
    virtual: bool = False
    sample_ms: int = 0

    @property
    def weight_mbit(self) -> float:
        """What it is likely to send: how much of the machine it takes."""
        share = 1 if any(fills(f.cc) for f in self.flows) else self.condition.use
        return 0 if self.virtual else self.condition.fwd.rate_mbit * share

    def argv(self) -> list[str]:
        return [
            program("goodput"),
            f"clock={'virtual' if self.virtual else 'real'}",
            f"seed={self.seed}",
            *([f"sample_ms={self.sample_ms}"] if self.sample_ms else []),
            *self.condition.arguments(),
            *(f.argument(self.condition) for f in self.flows for _ in range(self.condition.parallel)),
        ]


def once(job: Job) -> dict[str, Any]:
    """What the program printed.

    Raises:
        BenchError: it failed; with its command line and what it said.
    """
    argv = job.argv()
    limit = 60 + 2 * (job.condition.warmup_s + job.condition.seconds)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def steady(job: Job) -> dict[str, Any]:
    """A run in which the wire was on time; `disturbed` says how many were thrown away for it. The last
    try is taken as it is, with `late_us` in it."""
    disturbed = 0
    result = once(job)
    while result["late_us"]["p99"] > LATE_MS * 1000 and disturbed < RETRIES:
        disturbed += 1
        result = once(job)
    return result | {"disturbed": disturbed}


def goodput(result: dict[str, Any]) -> float:
    """Mbit/s of bytes that the receiving programs got, all flows."""
    return float(sum(f["mbit"] for f in result["flows"]))


class Journal:
    """Every run as it ends, a line each, so that a measurement that was cut off is not lost: `resume` takes what the
    same program has measured before. Lines of another version of the program are passed over.

    Attributes:
        known: results by job.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.program = hashlib.sha256(Path(program("goodput")).read_bytes()).hexdigest()[:16]
        self.known: dict[str, dict[str, Any]] = {}
        if resume and path.exists():
            for line in path.read_text().splitlines():
                self._read(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if resume else "w")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return  # the machine stopped in the middle of it
        if entry["program"] == self.program:
            self.known[entry["job"]] = entry["result"]

    @staticmethod
    def key(job: Job) -> str:
        return " ".join(job.argv()[1:])

    def find(self, job: Job) -> dict[str, Any] | None:
        return self.known.get(self.key(job))

    def add(self, job: Job, result: dict[str, Any]) -> None:
        entry = {"program": self.program, "job": self.key(job), "result": result}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()


class _Crew:
    """Jobs beside each other: the first of those next in line that the machine still carries is begun."""

    def __init__(
        self, jobs: Sequence[Job], at_once: int, done: Callable[[Job], None], journal: Journal | None
    ) -> None:
        self.jobs = jobs
        self.at_once = at_once
        self.done = done
        self.journal = journal
        self.results: dict[int, dict[str, Any]] = {}
        for i, job in enumerate(jobs):
            if journal and (result := journal.find(job)) is not None:
                self.results[i] = result
                done(job)
        self.waiting = [i for i in range(len(jobs)) if i not in self.results]
        self.running: set[int] = set()
        self.failed: list[BaseException] = []
        self.cond = threading.Condition()

    def _next(self) -> int | None:
        """A heavy job is overtaken by light ones, but not for ever: only so many in line are looked at."""
        used = sum(self.jobs[i].weight_mbit for i in self.running)
        for i in self.waiting[:LOOK_AHEAD] if len(self.running) < self.at_once else ():
            if not self.running or used + self.jobs[i].weight_mbit <= CAPACITY_MBIT:
                return i
        return None

    def _work(self, i: int) -> None:
        try:
            result = steady(self.jobs[i])
            with self.cond:
                self.results[i] = result
                if self.journal:
                    self.journal.add(self.jobs[i], result)
                self.done(self.jobs[i])
        except BaseException as e:  # noqa: BLE001 - run() raises it again
            with self.cond:
                self.failed.append(e)
        finally:
            with self.cond:
                self.running.remove(i)
                self.cond.notify_all()

    def run(self) -> None:
        with self.cond:
            while self.running or (self.waiting and not self.failed):
                i = None if self.failed else self._next()
                if i is None:
                    self.cond.wait()
                    continue
                self.waiting.remove(i)
                self.running.add(i)
                threading.Thread(target=self._work, args=(i,)).start()
        if self.failed:
            raise self.failed[0]


def many(
    jobs: Sequence[Job],
    at_once: int,
    done: Callable[[Job], None] = lambda job: None,
    journal: Journal | None = None,
) -> list[dict[str, Any]]:
    """Results in the order of the jobs; `done` is called, by another thread, when one has ended. Several run at once,
    as far as their rates together stay below CAPACITY_MBIT. What the journal has is not run again.

    Raises:
        BenchError: of the first that failed, when those that were running have ended.
    """
    crew = _Crew(jobs, at_once, done, journal)
    crew.run()
    return [crew.results[i] for i in range(len(jobs))]


def has(cc: str, who: str = OURS) -> bool:
    """Whether this stack, or Linux, has that congestion control. Loads the kernel's module, if it is one."""
    clock = "virtual" if who == OURS else "real"
    argv = [program("goodput"), f"clock={clock}", "ms=1", "warmup_ms=0", "both.delay_ns=1000000"]
    argv.append(f"flow={who},{who},{cc}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0 and cc not in done.stderr:
        raise BenchError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.returncode == 0


def missing_for_linux() -> list[str]:
    """What the machine lacks for Linux as an end of the wire; nothing when it is all there."""
    argv = [program("goodput"), "ms=1", "warmup_ms=0", "both.delay_ns=1000000", f"flow={LINUX},{LINUX},reno"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    return [done.stderr.strip().removeprefix("goodput: ")] if done.returncode else []
