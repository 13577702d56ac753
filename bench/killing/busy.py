# SPDX-License-Identifier: Apache-2.0
"""Was the machine too busy for what a trial measures? Time that others had of all cores, and the longest that a task of
the lab waited for one (/proc/PID/task/TID/schedstat; proc(5), Documentation/scheduler/sched-stats.rst)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bypass import netns
from bypass.lab import Lab

__all__ = ["Busy", "Spent"]

TICKS = os.sysconf("SC_CLK_TCK")
OTHERS, WAITED_MS = 0.15, 20.0


@dataclass(frozen=True)
class Spent:
    """`others`: share of all cores that programs outside of the lab had, and the hypervisor; `waited_ms`: how long the
    task of the lab that waited most for a core did so, in sum."""

    others: float
    waited_ms: float

    def too_busy(self) -> bool:
        return self.others > OTHERS or self.waited_ms > WAITED_MS


class Busy:
    """From now until spent()."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._tasks = self._look()
        self._all, self._at = _all_cores(), time.monotonic()

    def spent(self) -> Spent:
        seconds = (time.monotonic() - self._at) * (os.cpu_count() or 1)
        everybody = _all_cores() - self._all
        mine, waited = 0, 0
        for task, (ran, stood) in self._look().items():
            ran_before, stood_before = self._tasks.get(task, (0, 0))
            mine += ran - ran_before
            waited = max(waited, stood - stood_before)
        return Spent(round(max(0.0, everybody - mine / 1e9) / seconds, 3), round(waited / 1e6, 1))

    def _look(self) -> dict[Path, tuple[int, int]]:
        """By task: nanoseconds that it ran, and that it waited for a core."""
        found = {}
        for pid in [pid for ns in self.lab.namespaces for pid in netns.processes(ns)]:
            for task in Path(f"/proc/{pid}/task").glob("*"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    ran, waited, _ = (task / "schedstat").read_text().split()
                    found[task] = (int(ran), int(waited))
        return found


def _all_cores() -> float:
    """Seconds that all cores together were not idle since the machine began, those that the hypervisor took too."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    numbers = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    spent = dict(zip(names, map(int, numbers), strict=False))
    return sum(n for name, n in spent.items() if name not in ("idle", "iowait")) / TICKS
