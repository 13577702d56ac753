# SPDX-License-Identifier: Apache-2.0
"""What epoll_wait() of the preload library costs, the stack's turn included. What it does: tests/c/posix_epoll.c."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from c_programs import CFLAGS, run
from conftest import missing
from preloaded import environment
from preloaded import run as run_in

EVENTS = 2000


@pytest.fixture(scope="module")
def epoll_cost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("epoll") / "epoll_cost"
    run("gcc", *CFLAGS, "-O2", "tests/c/epoll_cost.c", "-o", out)
    return out


def cost(program: Path, idle: int, trigger: str) -> float:
    """Instructions an event."""
    counted = program.with_suffix(f".{idle}.{trigger}")
    argv = ["valgrind", "-q", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={counted}"]
    ended = run_in([*argv, program, str(idle), str(EVENTS), trigger], environment("stack"), 120)
    assert (ended.status, ended.out) == (0, f"{EVENTS}\n"), ended.err
    [totals] = [line for line in counted.read_text().splitlines() if line.startswith("totals:")]
    return int(totals.split()[1]) / EVENTS


@pytest.mark.parametrize("trigger", ["level", "edge"])
def test_idle_connections_cost_nothing(epoll_cost: Path, trigger: str) -> None:
    """Nothing walks over the members of a set. How often the kernel is asked depends on time, hence the margin."""
    if not shutil.which("valgrind"):
        missing(["valgrind"])
    few, many = cost(epoll_cost, 1, trigger), cost(epoll_cost, 400, trigger)
    print(f"{trigger}: {few:.0f} instructions an event, {many:.0f} with 400 idle connections")
    assert 100 < many <= 1.5 * few
