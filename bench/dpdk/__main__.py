# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.dpdk`: the DPDK backend, measured; writes build/dpdk.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import instructions
from bench.command import save, start
from bench.dpdk import memory, veth
from bench.programs import ROOT, require_two_cores
from bypass import __version__, probe


def show_veth(tests: dict[str, Any], console: Console) -> None:
    table = Table(title="Over a veth, the client is the kernel's")
    for name in ("test", "server", "rate", "CPU s", "p50 us", "p99 us"):
        table.add_column(name, justify="left" if name in ("test", "server") else "right")
    for test in tests.values():
        for variant, about in test["variants"].items():
            table.add_row(
                test["title"],
                veth.VARIANTS[variant],
                f"{about['rate']['median']:,.5g} {test['unit']}",
                f"{about['cpu_s']['median']:g}",
                *(f"{about[key]['median']:g}" if key in about else "" for key in ("p50_us", "p99_us")),
            )
        for name, ratio in test["ratios"].items():
            table.add_row(
                "", f"  {name}", f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})", "", "", ""
            )
        table.add_section()
    console.print(table)


def show(result: dict[str, Any], console: Console) -> None:
    if "veth" in result:
        show_veth(result["veth"], console)
    table = Table(title="In memory (memif), both ends spin")
    for name in ("test", "answers", "rate", "p50 us", "p99 us", "stack/bare"):
        table.add_column(name, justify="left" if name in ("test", "answers") else "right")
    for test in result["memory"].values():
        for server, about in test["variants"].items():
            ratio = test.get("ratio") if server == "stack" else None
            table.add_row(
                test["title"],
                server,
                f"{about['rate']['median']:,.{1 if test['unit'] == 'Gbit/s' else 0}f} {test['unit']}",
                *(f"{about[key]['median']:g}" if key in about else "" for key in ("p50_us", "p99_us")),
                f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})" if ratio else "",
            )
    console.print(table)
    for found in result.get("instructions", []):
        console.print(
            f"Instructions of a request and response, {found['connections']} in a batch: {found['per_request']:,.0f}; "
            f"stack {found['stack']:,.0f}, device {found['netdev']:,.0f}, DPDK {found['driver']:,.0f}"
        )


@click.command()
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Rounds of each test."
)
@click.option("--quick", is_flag=True, help="One short round: does everything run? The figures mean nothing.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROOT / "build" / "dpdk.json",
    help="Where the figures go.",
)
def main(rounds: int, quick: bool, output: Path) -> None:
    """The stack on DPDK ports, against the least that can answer there."""
    require_two_cores()
    console = Console(width=None if sys.stdout.isatty() else 120)
    rounds = 1 if quick else rounds
    lacking = "; ".join(filter(None, [*probe.missing_for_xdp(), veth.missing()]))
    warmup_ms, measure_ms = (20, 100) if quick else (100, 600)
    result: dict[str, Any] = {"version": 1, "bypass": __version__, "rounds": rounds}
    with Progress(
        BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=rounds * (memory.RUNS + (0 if lacking else veth.runs())) + 2)

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        if not lacking:
            result["veth"] = veth.run(rounds, warmup_ms, measure_ms, step)
        result["memory"] = memory.run(rounds, warmup_ms, measure_ms, step)
        if not instructions.missing():
            result["instructions"] = []
            for connections in (1, 32):
                step("instructions of a request")
                result["instructions"].append(memory.count(200 if quick else 10_000, connections))
    show(result, console)
    if lacking:
        console.print(f"[yellow]Over a veth: not measured, missing: {lacking}")
    save(result, output)
    console.print(f"all figures: {output}")


if __name__ == "__main__":
    start(main, "bench.dpdk")
