# SPDX-License-Identifier: Apache-2.0
"""Verdicts side by side: a line for each program, a column for each launcher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.apps.run import APPS, Verdict

__all__ = ["LEGEND", "columns", "figures", "programs", "rows"]

LEGEND = (
    "each column: problems (none: it works); rate; packets that the kernel's IP never saw; CPU of a core while nobody "
    "asked;\nconnections that the server's kernel made + took. Rates tell orders of magnitude: nothing is pinned, and "
    "clients count too"
)
WIDTHS = (2, 9, 8, 7, 8)
HEADS = ("!", "rate", "steered", "idle", "opens")


def figures(found: Mapping[str, Any]) -> str:
    """In a line."""
    return ", ".join(
        f"{name} ({figures(value)})" if isinstance(value, dict) else f"{name} {value}"
        for name, value in found.items()
    )


def _line(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def cell(verdict: Verdict) -> str:
    """What a column says of a run."""
    proof, rate = verdict.proof, verdict.rate
    return _line(
        (
            str(len(verdict.problems)),
            "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
            f"{proof['steered']:.1%}" if proof else "-",
            f"{proof['idle_cpu']:.1%}" if proof else "-",
            f"{proof['active_opens']}+{proof['passive_opens']}" if proof else "-",
        )
    )


def _launchers(verdicts: Sequence[Verdict]) -> list[str]:
    return list(dict.fromkeys(v.launcher for v in verdicts))


def columns(verdicts: Sequence[Verdict]) -> list[str]:
    return ["program", "rate of", *(f"{name}\n{_line(HEADS)}" for name in _launchers(verdicts))]


def rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A line for each program that ran, in the order of its first run."""
    by = {(v.app, v.launcher): v for v in verdicts}
    found = []
    for app in dict.fromkeys(v.app for v in verdicts):
        there = [by.get((app, launcher)) for launcher in _launchers(verdicts)]
        found.append([app, APPS[app].unit, *(cell(v) if v else "" for v in there)])
    return found


def programs(verdicts: Sequence[Verdict]) -> dict[str, Mapping[str, Any]]:
    """The same for a file: by program, then by launcher."""
    found: dict[str, dict[str, Any]] = {}
    for v in verdicts:
        about = found.setdefault(v.app, {"title": APPS[v.app].title, "unit": v.unit})
        names = ("steered", "idle_cpu", "active_opens", "passive_opens")
        about[v.launcher] = {"problems": len(v.problems), "rate": v.rate} | {
            name: v.proof.get(name) for name in names
        }
    return dict(found)
