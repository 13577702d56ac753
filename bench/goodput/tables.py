# SPDX-License-Identifier: Apache-2.0
"""The tables of the goodput measurement; build/goodput.json holds the same and more."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.goodput import matrix
from bench.goodput.conditions import BY_NAME
from bench.goodput.run import LATE_MS


def show(result: dict[str, Any], console: Console) -> None:
    """Every part that was run."""
    for name in result["conditions"] if "matrix" in result else ():
        console.print(f"{name}: {BY_NAME[name].title}", highlight=False)
    for cc, by_condition in result.get("matrix", {}).items():
        console.print(_matrix(cc, by_condition))
    if "matrix" in result:
        _worst(result["matrix"], console)
        _transfers(result["matrix"], console)
    if "fairness" in result:
        console.print(_fairness(result["fairness"]))
    if "dctcp" in result:
        console.print(_dctcp(result["dctcp"]))
    for cc in result.get("missing", ()):
        console.print(f"[yellow]{cc}: this stack has not got it")
    for cc in result.get("missing_linux", ()):
        console.print(f"[yellow]{cc}: this kernel has not got it")


def _mbit(s: dict[str, float]) -> str:
    return f"{s['median']:.2f} ({s['min']:.2f} .. {s['max']:.2f})"


def _ratio(ratio: float | None, noise: float) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio:.2f} ± {noise:.2f}"
    return text if ratio >= matrix.GOAL else f"[red]{text}[/]"


def _matrix(cc: str, by_condition: dict[str, Any]) -> Table:
    table = Table(
        title=f"\n{cc}: Mbit/s of goodput, ratio to Linux", title_justify="left", title_style="bold"
    )
    names = list(dict.fromkeys(n for entry in by_condition.values() for n in entry["variants"]))
    table.add_column("condition")
    for name in names:
        virtual = " (virtual)" if name == matrix.BOTH.name else ""
        table.add_column(name.replace("-", " to ") + virtual, justify="right")
        if name != matrix.REFERENCE.name and matrix.REFERENCE.name in names:
            table.add_column("ratio", justify="right")
    for condition, entry in by_condition.items():
        row = [condition]
        for name in names:
            figures = entry["variants"].get(name)
            row.append(_mbit(figures["mbit"]) + (" !" if figures["errors"] else "") if figures else "")
            if name != matrix.REFERENCE.name and matrix.REFERENCE.name in names:
                row.append(_ratio(entry["ratios"].get(name), entry["noise"].get(name, 0)))
        table.add_row(*row)
    return table


def _worst(found: dict[str, Any], console: Console) -> None:
    for ratio, cc, condition, name in matrix.worst(found):
        console.print(f"lowest: {ratio:.2f}, {cc}, {condition}, {name.replace('-', ' to ')}")
    for cc, by_condition in found.items():
        for condition, entry in by_condition.items():
            for name, figures in entry["variants"].items():
                if figures["errors"]:
                    console.print(f"[red]! {cc}, {condition}, {name}: {', '.join(figures['errors'])}")
                if figures["late_p99_us"]["median"] > LATE_MS * 1000:
                    late = figures["late_p99_us"]["median"] / 1000
                    console.print(
                        f"[yellow]{cc}, {condition}, {name}: 1 % of frames came {late:.1f} ms late: "
                        "the machine was too busy"
                    )


def _transfers(found: dict[str, Any], console: Console) -> None:
    rows = [
        (cc, condition, name, figures["transfers_ms"])
        for cc, by_condition in found.items()
        for condition, entry in by_condition.items()
        for name, figures in entry["variants"].items()
        if "transfers_ms" in figures
    ]
    if not rows:
        return
    table = Table(title="\nTransfers of 100 kB, ms from connect() to the last byte", title_justify="left")
    for column in ("algorithm", "condition", "from, to"):
        table.add_column(column)
    for column in ("count", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    for cc, condition, name, q in rows:
        numbers = (f"{q[k]:,.0f}" for k in ("count", "p50", "p90", "p99", "max"))
        table.add_row(cc, condition, name.replace("-", " to "), *numbers)
    console.print(table)


def _fairness(found: dict[str, Any]) -> Table:
    table = Table(
        title=f"\nFairness, {found['cc']}: {found['condition']}; the second begins 4 s later",
        title_justify="left",
        title_style="bold",
    )
    for name in ("first, second", "first Mbit/s", "second Mbit/s", "Jain", "Jain, mean of seconds"):
        table.add_column(name, justify="left" if name == "first, second" else "right")
    for name, pair in found["pairs"].items():
        jains = [
            f"{s['median']:.3f} ({s['min']:.3f} .. {s['max']:.3f})"
            for s in (pair["jain"], pair["jain_each_s"])
        ]
        table.add_row(name, *(_mbit(s) for s in pair["mbit"]), *jains)
    return table


def _dctcp(found: dict[str, Any]) -> Table:
    table = Table(
        title=f"\nMarking, this stack with itself, virtual time: {found['condition']}",
        title_justify="left",
        title_style="bold",
    )
    for name in ("algorithm", "flows", "Mbit/s", "queue mean ms", "max ms", "dropped", "marked", "Jain"):
        table.add_column(name, justify="left" if name == "algorithm" else "right")
    for cc, by_n in found["algorithms"].items():
        for n, f in by_n.items():
            cells = (f"{f[k]['median']:.2f}" for k in ("mbit", "queue_mean_ms", "queue_max_ms"))
            counts = (f"{f[k]['median']:.0f}" for k in ("dropped", "marked"))
            table.add_row(cc, n, *cells, *counts, f"{f['jain']['median']:.3f}")
    return table
