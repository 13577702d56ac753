# SPDX-License-Identifier: Apache-2.0
"""`python -m bench`: runs the benchmark and writes build/bench.json."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import costs, defence, drop, instructions, network, report, simulated
from bench.command import save, start
from bench.programs import ROOT, require_two_cores
from bypass import __version__, probe
from bypass.lab import Lab

PARTS = ("instructions", "simulated", "copies", "churn", "flood", "network", "drop", "costs")
LONG = ("hostile",)  # only where they are asked for
PRIVILEGED = ("network", "drop", "costs")


def machine() -> dict[str, Any]:
    """What the figures are of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "device": "veth pair, 1 queue, MTU 1500, transmit checksum offload off, AF_XDP in copy mode",
    }


def steps(parts: tuple[str, ...], rounds: int) -> int:
    """How many times `step` is going to be called."""
    runs = sum(network.applies(v, t) for v in network.VARIANTS for t in network.TESTS)
    ways = len(drop.WAYS) - len(drop.missing())
    each = {
        "instructions": 2,
        "simulated": 1,
        "copies": 1,
        "churn": 1,
        "hostile": 1,
        "flood": 0 if instructions.missing() else 4,
        "network": rounds * runs,
        "drop": rounds * ways * len(drop.SENDERS),
        "costs": len(costs.TESTS),
    }
    return sum(each[p] for p in parts)


def without_network(parts: tuple[str, ...], quick: bool, step: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "instructions" in parts:
        operations = 200 if quick else 10_000
        if instructions.missing():
            found["instructions"] = {"missing": instructions.missing()}
        else:
            step("instructions of a request, one connection")
            one = instructions.count(operations, 1)
            step("instructions of a request, 64 connections")
            batch = instructions.count(operations, 64)
            found["instructions"] = {"budget": instructions.BUDGET, "one": one, "batch": batch}
    if "simulated" in parts:
        step("bulk over the simulated wire")
        found["sim_bulk"] = simulated.bulk(1 if quick else 5, 20 if quick else 1000)
        found["idle_connection"] = simulated.idle_connection(20_000 if quick else 100_000)
    if "copies" in parts:
        step("copies of a payload byte")
        found["copies"] = simulated.copies(1 if quick else 5, 20 if quick else 150)
    if "hostile" in parts:
        step("a transfer over a hostile wire, six minutes" if not quick else "a transfer over a hostile wire")
        found["hostile"] = simulated.hostile(20 if quick else 10_000)
    if "churn" in parts:
        found["churn"] = defence.churn(60_000 if quick else 1_000_000, step=step)
    if "flood" in parts:
        if instructions.missing():
            found["flood"] = {"missing": instructions.missing()}
        else:
            found["flood"] = defence.flood(200 if quick else 10_000, 20 if quick else 100, step=step)
    return found


def with_network(
    parts: tuple[str, ...], quick: bool, rounds: int, step: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    warmup_ms, measure_ms = (20, 100) if quick else (100, 600)
    with Lab(f"{os.getpid()}-bench", queues=1) as lab:
        if "network" in parts:
            found |= network.run(lab, rounds=rounds, warmup_ms=warmup_ms, measure_ms=measure_ms, step=step)
        if "drop" in parts:
            found["drop"] = drop.run(
                lab, rounds=rounds, warmup_ms=warmup_ms, measure_ms=measure_ms, step=step
            )
        if "costs" in parts:
            found["costs"] = costs.run(lab, seconds=0.6 if quick else 2, step=step)
    return found


@click.command()
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Rounds of each test."
)
@click.option("--quick", is_flag=True, help="One short round: does everything run? The figures mean nothing.")
@click.option(
    "--only",
    type=click.Choice(PARTS + LONG),
    multiple=True,
    help=f"Only this part; may be given several times. Not without it: {', '.join(LONG)}.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROOT / "build" / "bench.json",
    help="Where the figures go.",
)
def main(rounds: int, quick: bool, only: tuple[str, ...], output: Path) -> None:
    """Rates, latency and CPU of the bypass stack against a bare ring-to-ring echo and the kernel.

    Every figure is explained in docs/benchmark.md. Parts that need root or XDP are left out where they are missing,
    and the closing lines say so.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    parts = only or PARTS
    lacking = [p for p in parts if p in PRIVILEGED] and probe.missing_for_xdp()
    if lacking:
        parts = tuple(p for p in parts if p not in PRIVILEGED)
    rounds = 1 if quick else rounds
    began = time.monotonic()
    result: dict[str, Any] = {"version": 1, "bypass": __version__, "machine": machine(), "rounds": rounds}
    with Progress(
        BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=steps(parts, rounds))

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        result |= without_network(parts, quick, step)
        if set(parts) & set(PRIVILEGED):
            require_two_cores()
            result |= with_network(parts, quick, rounds, step)
    if lacking:
        result["left_out"] = {"parts": [p for p in (only or PARTS) if p in PRIVILEGED], "missing": lacking}
    result["seconds"] = round(time.monotonic() - began, 1)
    save(result, output)
    report.show(result, console)
    if lacking:
        console.print(f"[yellow]Left out: what needs a network. Missing: {'; '.join(lacking)}")
    console.print(f"{result['seconds']:.0f} s; all figures: {output}")


if __name__ == "__main__":
    start(main)
