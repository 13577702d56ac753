# SPDX-License-Identifier: Apache-2.0
"""Every condition with every congestion control: this stack and Linux in both roles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import significant, spread
from bench.goodput.conditions import Condition
from bench.goodput.run import LINUX, OURS, Flow, Job, Journal, fills, goodput, many


@dataclass(frozen=True)
class Variant:
    """A column: who sends, who receives."""

    name: str
    sender: str
    receiver: str
    virtual: bool = False


REFERENCE = Variant("linux-linux", LINUX, LINUX)
SENDING = Variant("ours-linux", OURS, LINUX)
RECEIVING = Variant("linux-ours", LINUX, OURS)
BOTH = Variant("ours-ours", OURS, OURS, virtual=True)  # costs no time, and repeats exactly
CCS = ("cubic", "reno", "bbr")
SEEDS_A_ROUND = 100
GOAL = 0.95  # of Linux' goodput


def variants(cc: str, ours: Sequence[str], linux: bool) -> list[Variant]:
    """ours: the algorithms this stack has. As a receiver it is measured with one: who receives has no part in it."""
    found = [REFERENCE] if linux else []
    if cc in ours:
        found += [SENDING, BOTH] if linux else [BOTH]
    if cc == CCS[0] and linux:
        found.append(RECEIVING)
    return found


def wires(condition: Condition, cc: str) -> int:
    """Runs of which a figure is the mean. Where the link is full in any case, chance decides little."""
    return 1 if condition.use < 1 and fills(cc) else condition.wires


def jobs(
    conditions: Sequence[Condition],
    ccs: Sequence[str],
    ours: Sequence[str],
    rounds: int,
    linux: Sequence[str],
) -> list[tuple[str, Variant, Job]]:
    """Interleaved: a round runs everything once, and starts with another variant each time. ours, linux: the algorithms
    that they have."""
    plan = []
    for number in range(rounds):
        for condition in conditions:
            for cc in ccs:
                columns = variants(cc, ours, cc in linux)
                turn = number % len(columns) if columns else 0
                for v in columns[turn:] + columns[:turn]:
                    flow = Flow(v.sender, v.receiver, cc)
                    for wire in range(wires(condition, cc)):
                        seed = number * SEEDS_A_ROUND + wire + 1
                        plan.append((cc, v, Job(condition, (flow,), seed, virtual=v.virtual)))
    return plan


def run(
    conditions: Sequence[Condition],
    ccs: Sequence[str],
    ours: Sequence[str],
    rounds: int,
    at_once: int,
    linux: Sequence[str],
    step: Callable[[str], None],
    journal: Journal | None = None,
) -> dict[str, Any]:
    """{cc: {condition: {"variants": {name: figures}, "ratios": {name: of Linux to Linux}, "noise": {name: its
    standard error}}}}."""
    plan = jobs(conditions, ccs, ours, rounds, linux)
    found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    results = many([job for _, _, job in plan], at_once, lambda job: step(job.condition.title), journal)
    for (cc, v, job), result in zip(plan, results, strict=True):
        found.setdefault(cc, {}).setdefault(job.condition.name, {}).setdefault(v.name, []).append(result)
    by_name = {c.name: c for c in conditions}
    return {
        cc: {name: _entry(columns, wires(by_name[name], cc)) for name, columns in by_condition.items()}
        for cc, by_condition in found.items()
    }


def _entry(columns: dict[str, list[dict[str, Any]]], wires: int) -> dict[str, Any]:
    figures = {name: _figures(results, wires) for name, results in columns.items()}
    ratios: dict[str, float | None] = {}
    noise: dict[str, float] = {}
    base = figures.get(REFERENCE.name)
    for name, f in figures.items():
        if base and f is not base:
            at = f["mbit"]["median"] / base["mbit"]["median"] if base["mbit"]["median"] else None
            ratios[name] = at if at is None else significant(at, 4)
            noise[name] = significant((at or 0) * math.hypot(base["error"], f["error"]), 2)
    return {"variants": figures, "ratios": ratios, "noise": noise}


def means(values: Sequence[float], of: int) -> list[float]:
    """Of each `of` values in a row: one figure a round."""
    return [statistics.fmean(values[i : i + of]) for i in range(0, len(values), of)]


def _figures(results: list[dict[str, Any]], wires: int) -> dict[str, Any]:
    transfers = [t for r in results for f in r["flows"] for t in f["transfers_ms"]]
    errors = sorted({f["error"] for r in results for f in r["flows"] if f["error"]})
    return {
        "mbit": spread(means([goodput(r) for r in results], wires)),
        "error": _error([goodput(r) for r in results]),
        "retransmits": spread([sum(f["retransmits"] for f in r["flows"]) for r in results]),
        "queue_dropped": spread([r["fwd"]["queue_dropped"] for r in results]),
        "queue_mean_ms": spread([r["fwd"]["queue_mean_ms"] for r in results]),
        "late_p99_us": spread([r["late_us"]["p99"] for r in results]),
        "late_max_us": spread([r["late_us"]["max"] for r in results]),
        "cpu_s": spread([r["cpu_s"] for r in results]),
        "disturbed": sum(r["disturbed"] for r in results),
        "errors": errors,
        **({"transfers_ms": _quantiles(transfers)} if transfers else {}),
    }


def _error(values: list[float]) -> float:
    """Standard error of the mean, relative to it."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not mean:
        return 0.0
    return significant(statistics.stdev(values) / math.sqrt(len(values)) / mean, 2)


def _quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"count": len(values), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values)}


def worst(matrix: dict[str, Any], how_many: int = 2) -> list[tuple[float, str, str, str]]:
    """The lowest ratios: (ratio, cc, condition, variant)."""
    found = [
        (ratio, cc, condition, name)
        for cc, by_condition in matrix.items()
        for condition, entry in by_condition.items()
        for name, ratio in entry["ratios"].items()
        if ratio is not None
    ]
    return sorted(found)[:how_many]
