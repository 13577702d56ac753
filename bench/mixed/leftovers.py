# SPDX-License-Identifier: Apache-2.0
"""What a run may not leave behind: memory that grows, BPF programs, maps and links, processes, namespaces."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["Memory", "bpf_objects", "descendants", "still_there"]

STEADY_FROM_S = 120.0  # until then buffers, pools and the interpreter find their size
GROWTH_BYTES, GROWTH_SHARE = 4 << 20, 0.03  # the larger of both is within what comes and goes


class Memory:
    """Resident memory of a process over time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.began = time.monotonic()
        self.samples: list[tuple[float, int]] = []  # seconds, bytes

    def look(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", text)
        now = int(match[1]) * 1024 if match else 0
        self.samples.append((time.monotonic() - self.began, now))
        return now

    def judge(self, from_s: float = STEADY_FROM_S) -> dict[str, Any]:
        """Medians of the first, the middle and the last fifth of the time from `from_s` on, and whether it grew; None:
        too short. Pools keep the most that was ever needed, so a step may come late; what leaks goes on growing."""
        steady = [n for at, n in self.samples if at >= from_s]
        about: dict[str, Any] = {"peak": max((n for _, n in self.samples), default=0), "from_s": from_s}
        fifth = len(steady) // 5
        if fifth < 10:
            return about | {"grew": None}
        first, middle, last = (int(statistics.median(steady[i * fifth : (i + 1) * fifth])) for i in (0, 2, 4))
        bound = max(GROWTH_BYTES, GROWTH_SHARE * first)
        grew = last - first > bound and last - middle > bound / 2
        return about | {"first": first, "middle": middle, "last": last, "growth": last - first, "grew": grew}


def descendants(pid: int) -> dict[int, str]:
    """The process and all below it: pid -> name."""
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        now = waiting.pop()
        try:
            found[now] = Path(f"/proc/{now}/comm").read_text().strip()
            for task in Path(f"/proc/{now}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def bpf_objects(pid: int) -> set[tuple[str, int]]:
    """("prog" | "map" | "link", number) of what the descriptors of a process hold, and of the programs behind links."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = info.read_text()
        except FileNotFoundError:
            continue
        found |= {
            (kind, int(n)) for kind, n in re.findall(r"^(prog|map|link)_id:\s*(\d+)", text, re.MULTILINE)
        }
    return found


def still_there(objects: set[tuple[str, int]], seconds: float = 10) -> set[tuple[str, int]]:
    """Those that the kernel still has. It frees them a moment after their last user, and numbers them upwards."""
    deadline = time.monotonic() + seconds
    left = objects
    while left:
        listed = _listed()
        if listed is not None:
            left = objects & listed
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def _listed() -> set[tuple[str, int]] | None:
    """All BPF objects of the machine. None: one went while they were listed (bpftool fails then)."""
    have = set()
    for kind in ("prog", "map", "link"):
        done = subprocess.run(["bpftool", "-j", kind, "show"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None
        have |= {(kind, int(entry["id"])) for entry in json.loads(done.stdout or "[]")}
    return have
