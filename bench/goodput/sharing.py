# SPDX-License-Identifier: Apache-2.0
"""Several flows on one bottleneck: fairness towards Linux, and DCTCP with marking.

Jain's index of rates x_1..x_n is (sum x)^2 / (n * sum x^2): 1 when all are equal, 1/n when one has everything (Jain,
Chiu, Hawe, DEC TR-301, 1984).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.figures import spread
from bench.goodput.conditions import Condition, Link
from bench.goodput.run import LINUX, OURS, Flow, Job, Journal, goodput, many

START_S = 4  # when the second flow begins
SETTLED_S = 14  # from when on they are judged
SHARED = Condition(
    name="shared",
    title="40 Mbit/s, 40 ms, queue 1 BDP, two flows",
    why="one bottleneck for both",
    fwd=Link(rate_mbit=40, delay_ms=20, queue_bytes=200_000),
    rev=Link(rate_mbit=40, delay_ms=20),
    warmup_s=SETTLED_S,
    seconds=26,
)
PAIRS = {
    "ours, then linux": (OURS, LINUX),
    "linux, then ours": (LINUX, OURS),
    "ours, then ours": (OURS, OURS),
    "linux, then linux": (LINUX, LINUX),
}
MARKED = Condition(
    name="marked",
    title="100 Mbit/s, 4 ms, queue of 20 ms, marks beyond 20 packets",
    why="what DCTCP is for: a queue that stays short on a link that stays full (RFC 8257)",
    fwd=Link(rate_mbit=100, delay_ms=2, queue_bytes=250_000, mark_bytes=30_000),
    rev=Link(rate_mbit=100, delay_ms=2),
    warmup_s=1,
    seconds=5,
)


def jain(rates: Sequence[float]) -> float:
    """1 for no traffic at all: nobody has more than another."""
    squares = sum(r * r for r in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 1.0


def over_time(result: dict[str, Any]) -> list[list[float]]:
    """Mbit/s of each flow in each second (sample_ms=1000)."""
    return [
        [(b - a) * 8 / 1e6 for a, b in zip([0, *f["series"]], f["series"], strict=False)]
        for f in result["flows"]
    ]


def fairness(
    cc: str,
    rounds: int,
    at_once: int,
    step: Callable[[str], None],
    seconds: float = SHARED.seconds,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """{pair: {"mbit": one spread a flow, "jain": of the settled time, "jain_each_s": the mean over its seconds,
    "over_time": rates in the middle run, ...}}; the receiver is Linux."""
    condition = Condition(**{**SHARED.__dict__, "seconds": seconds})
    plan = [
        (name, Job(condition, (Flow(a, LINUX, cc), Flow(b, LINUX, cc, START_S)), seed + 1, sample_ms=1000))
        for seed in range(rounds)
        for name, (a, b) in PAIRS.items()
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    results = many([job for _, job in plan], at_once, lambda job: step("fairness"), journal)
    for (name, _), result in zip(plan, results, strict=True):
        found.setdefault(name, []).append(result)
    return {"condition": condition.title, "cc": cc, "pairs": {n: _pair(rs) for n, rs in found.items()}}


def _pair(results: list[dict[str, Any]]) -> dict[str, Any]:
    results = sorted(results, key=lambda r: jain([f["mbit"] for f in r["flows"]]))
    each_s = [[jain(rates) for rates in zip(*over_time(r), strict=True)][SETTLED_S:] for r in results]
    middle = results[len(results) // 2]
    return {
        "mbit": [spread([r["flows"][i]["mbit"] for r in results]) for i in range(2)],
        "jain": spread([jain([f["mbit"] for f in r["flows"]]) for r in results]),
        "jain_each_s": spread([sum(js) / len(js) for js in each_s]),
        "queue_dropped": spread([r["fwd"]["queue_dropped"] for r in results]),
        "over_time": [[round(x, 2) for x in rates] for rates in over_time(middle)],
    }


def dctcp(ours: Sequence[str], rounds: int, at_once: int, step: Callable[[str], None]) -> dict[str, Any]:
    """This stack with itself in virtual time, one flow and four, by each of its algorithms:
    {cc: {flows: {"mbit", "queue_mean_ms", "queue_max_ms", "dropped", "marked", "jain"}}}."""
    plan = [
        (cc, n, Job(MARKED, (Flow(OURS, OURS, cc),) * n, seed + 1, virtual=True))
        for cc in ours
        for n in (1, 4)
        for seed in range(rounds)
    ]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    results = many([job for *_, job in plan], at_once, lambda job: step("marking, virtual time"))
    for (cc, n, _), result in zip(plan, results, strict=True):
        found.setdefault(cc, {}).setdefault(str(n), []).append(result)
    flows = {cc: {n: _marked(rs) for n, rs in by_n.items()} for cc, by_n in found.items()}
    return {"condition": MARKED.title, "algorithms": flows}


def _marked(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "mbit": spread([goodput(r) for r in results]),
        "queue_mean_ms": spread([r["fwd"]["queue_mean_ms"] for r in results]),
        "queue_max_ms": spread([r["fwd"]["queue_max_ms"] for r in results]),
        "dropped": spread([r["fwd"]["queue_dropped"] for r in results]),
        "marked": spread([r["fwd"]["marked"] for r in results]),
        "jain": spread([jain([f["mbit"] for f in r["flows"]]) for r in results]),
    }
