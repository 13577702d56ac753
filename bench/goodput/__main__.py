# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.goodput`: goodput under impairment against Linux; writes build/goodput.json."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.command import save, start
from bench.goodput import matrix, run, sharing, tables
from bench.goodput.conditions import BY_NAME, QUICK
from bench.programs import ROOT

PARTS = ("matrix", "fairness", "dctcp")
MARKING_CCS = ("dctcp", "reno", "cubic")


class Ticker:
    """Progress: a bar on a terminal, a line every minute elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self.bar = Progress(
            BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)
        self.console = console
        self.total = total
        self.done = 0
        self.began = self.told = time.monotonic()

    def __call__(self, what: str) -> None:
        self.done += 1
        self.bar.update(self.task, description=what, advance=1)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.told >= 60:
            self.told = now
            self.console.print(f"{now - self.began:.0f} s: {self.done} of {self.total} runs")


def total(parts: tuple[str, ...], plan: list[Any], marking: list[str], rounds: int) -> int:
    each = {"matrix": len(plan), "fairness": rounds * len(sharing.PAIRS), "dctcp": 2 * rounds * len(marking)}
    return sum(each[p] for p in parts)


@click.command()
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Runs of each cell."
)
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}, and a shorter look at fairness.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Only this part.")
@click.option("--condition", type=click.Choice(list(BY_NAME)), multiple=True, help="Only this condition.")
@click.option("--cc", type=click.Choice(matrix.CCS), multiple=True, help="Only this congestion control.")
@click.option(
    "--jobs", type=click.IntRange(1, 256), default=160, show_default=True, help="Wires at once, at most."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a measurement that was cut off: what it has run is not run again.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROOT / "build" / "goodput.json",
    help="Where the figures go.",
)
def main(
    rounds: int,
    quick: bool,
    only: tuple[str, ...],
    condition: tuple[str, ...],
    cc: tuple[str, ...],
    jobs: int,
    resume: bool,
    output: Path,
) -> None:
    """Goodput of this stack and of Linux under twelve conditions, fairness between them, DCTCP with marking.

    Every figure is explained in docs/benchmark.md. Every run is kept beside the figures, in *.runs.jsonl. Without root
    and TAP devices only what needs no Linux is run: this stack with itself in virtual time.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    began = time.monotonic()
    lacking = run.missing_for_linux()
    conditions = [BY_NAME[n] for n in condition or (QUICK if quick else BY_NAME)]
    ccs = cc or matrix.CCS
    ours = [name for name in ccs if run.has(name)]
    linux = [] if lacking else [name for name in ccs if run.has(name, run.LINUX)]
    parts = tuple(
        p for p in only or PARTS if not (p == "fairness" and ("cubic" not in ours or "cubic" not in linux))
    )
    marking = [name for name in MARKING_CCS if run.has(name)] if "dctcp" in parts else []
    plan = matrix.jobs(conditions, ccs, ours, rounds, linux)
    result: dict[str, Any] = {
        "version": 1,
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "load_before": os.getloadavg()[0]},
        "rounds": rounds,
        "jobs": jobs,
        "conditions": {c.name: asdict(c) for c in conditions},
        "missing": [name for name in ccs if name not in ours],
        "missing_linux": [] if lacking else [name for name in ccs if name not in linux],
        "left_out": lacking,
    }
    ticker = Ticker(console, total(parts, plan, marking, rounds))
    with ticker.bar, run.Journal(output.with_suffix(".runs.jsonl"), resume=resume) as journal:
        if "matrix" in parts:
            result["matrix"] = matrix.run(conditions, ccs, ours, rounds, jobs, linux, ticker, journal)
        if "fairness" in parts:
            seconds = 10 if quick else sharing.SHARED.seconds
            result["fairness"] = sharing.fairness("cubic", rounds, jobs, ticker, seconds, journal)
        if "dctcp" in parts:
            result["dctcp"] = sharing.dctcp(marking, rounds, jobs, ticker)
    result["seconds"] = round(time.monotonic() - began, 1)
    save(result, output)
    tables.show(result, console)
    if lacking:
        console.print(
            f"[yellow]Left out: what needs Linux at an end of the wire. Missing: {'; '.join(lacking)}"
        )
    console.print(f"{result['seconds']:.0f} s; all figures: {output}")


if __name__ == "__main__":
    start(main)
