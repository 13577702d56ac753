# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.versus`: tables, and build/versus.json."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.apps.place import lacking
from bench.command import save, start
from bench.programs import ROOT, BenchError, require_two_cores
from bench.report import QUIET_SHARE
from bench.versus.profile import missing as missing_perf
from bench.versus.rounds import (
    LOADS,
    VARIANTS,
    Plan,
    compare,
    profile_steps,
    profiles,
    scaling,
    scaling_steps,
)
from bench.versus.servers import WORKLOADS
from bypass import __version__, probe

SERVED = 0.98  # of what is offered
TITLES = {"saturation": "as fast as it answers", "offered": "at one rate for all"}


def number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def spread_text(s: dict[str, float]) -> str:
    return f"{number(s['median'])} ({number(s['min'])} .. {number(s['max'])})"


def table(about: dict[str, Any], load: str) -> Table:
    rate = f": {about['offered_per_s']:,}/s" if load == "offered" else ""
    shown = Table(title=f"\n{about['title']}, {TITLES[load]}{rate}", title_justify="left", title_style="bold")
    shown.add_column("server on")
    for name in ("requests/s", "CPU s/M requests", "p50 µs", "p99 µs"):
        shown.add_column(name, justify="right")
    for name, v in about[load]["variants"].items():
        shown.add_row(
            VARIANTS[name].title, spread_text(v["rate"]), spread_text(v["cpu_s"]),
            number(v["p50_us"]["median"]), number(v["p99_us"]["median"]),
        )  # fmt: skip
    shown.caption = "\n".join(
        f"{title}: " + "   ".join(f"{name} {spread_text(r)}" for name, r in found.items())
        for title, found in about[load]["ratios"].items()
    )
    shown.caption_justify = "left"
    return shown


def scaling_table(found: dict[str, Any]) -> Table:
    shown = Table(
        title="\nOne and two queues and threads, nothing pinned", title_justify="left", title_style="bold"
    )
    shown.add_column("request")
    shown.add_column("server on")
    for name in ("one, requests/s", "two, requests/s", "two/one"):
        shown.add_column(name, justify="right")
    titles = {w.name: w.title for w in WORKLOADS}
    for name, variants in found.items():
        for variant, v in variants.items():
            shown.add_row(titles[name], variant, *(spread_text(v[k]) for k in ("rate_1", "rate_2", "ratio")))
    return shown


def profile_table(found: dict[str, Any]) -> Table:
    titles = {w.name: w.title for w in WORKLOADS}
    columns = [(name, variant) for name, variants in found.items() for variant in variants]
    shown = Table(title="\nWhere the time of the server goes", title_justify="left", title_style="bold")
    shown.add_column("samples of it, of its helpers and of what receives for it")
    for name, variant in columns:
        shown.add_column(f"{titles[name].split(',')[0]}\n{variant}", justify="right")
    groups = dict.fromkeys(g for name, variant in columns for g in found[name][variant]["groups"])
    for group in groups:
        shares = [found[name][variant]["groups"].get(group, 0.0) for name, variant in columns]
        shown.add_row(group, *(f"{share:.1%}" for share in shares))
    shown.add_row(
        "[bold]of this project, in the program", *(f"{found[n][v]['ours']:.1%}" for n, v in columns)
    )
    return shown


def warn(workloads: dict[str, Any], console: Console) -> None:
    """The machine was not quiet, or a server did not keep up with what was offered."""
    runs = [v for w in workloads.values() for load in LOADS for v in w[load]["variants"].values()]
    busy = max(v["other_cpu_share"]["median"] for v in runs)
    if busy > QUIET_SHARE:
        console.print(
            f"[yellow]The machine was not quiet: other programs took up to {busy:.0%} of both cores. Rates and "
            "latencies say little then."
        )
    behind = [name for name, w in workloads.items() for v in w["offered"]["variants"].values()
              if v["served"]["median"] < SERVED]  # fmt: skip
    if behind:
        console.print(f"[yellow]Not all that was offered was served: {', '.join(sorted(set(behind)))}")


def missing() -> list[str]:
    tools = {
        tool for w in WORKLOADS for tool in w.server.needs if tool in ("redis-server", "memcached", "nginx")
    }
    return probe.missing_for_xdp() or lacking(sorted(tools))


def measure(plan: Plan, with_scaling: bool, with_profiles: bool, console: Console) -> dict[str, Any]:
    with Progress(
        BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, transient=True,
    ) as progress:  # fmt: skip
        total = plan.steps() + with_scaling * scaling_steps(plan) + with_profiles * profile_steps(plan)
        task = progress.add_task("", total=total)

        def step(what: str) -> None:
            progress.update(task, description=what, advance=1)

        told = Plan(plan.rounds, plan.warmup_ms, plan.measure_ms, plan.variants, plan.workloads, step)
        result: dict[str, Any] = {"workloads": compare(told)}
        if with_scaling:
            result["threads"] = scaling(told)
        if with_profiles:
            result["profiles"] = profiles(told)
    return result


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Rounds.")
@click.option("--quick", is_flag=True, help="One short round: does everything run? The figures mean nothing.")
@click.option("--only", type=click.Choice([w.name for w in WORKLOADS]), multiple=True,
              help="Only this request; several times.")  # fmt: skip
@click.option(
    "--on", "variants", type=click.Choice(list(VARIANTS)), multiple=True, default=("kernel", "again", "bypass"),
    show_default=True, help="Who serves; several times. `kernel` is what the others are compared with.",
)  # fmt: skip
@click.option("--scaling/--no-scaling", default=True, show_default=True,
              help="One against two queues and threads.")  # fmt: skip
@click.option("--profile/--no-profile", default=True, show_default=True, help="Where the time goes, by perf.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "versus.json",
    help="Where the figures go.",
)  # fmt: skip
def main(
    rounds: int,
    quick: bool,
    only: tuple[str, ...],
    variants: tuple[str, ...],
    scaling: bool,
    profile: bool,
    output: Path,
) -> None:
    """Debian's programs on the kernel and on bypass, in turn on the same two cores: requests per second, latency, CPU.

    Every figure is explained in docs/benchmark.md.
    """
    if lack := missing():
        raise BenchError(f"missing: {'; '.join(lack)}")
    require_two_cores()
    console = Console(width=None if sys.stdout.isatty() else 120)
    plan = Plan(
        rounds=1 if quick else rounds,
        warmup_ms=50 if quick else 300,
        measure_ms=150 if quick else 1500,
        variants=tuple(dict.fromkeys(("kernel", *variants))),
        workloads=tuple(w for w in WORKLOADS if not only or w.name in only),
    )
    with_profiles = profile and not missing_perf()
    if profile and not with_profiles:
        console.print(f"[yellow]No profile, missing: {missing_perf()}")
    began = time.monotonic()
    result: dict[str, Any] = {
        "version": 1, "bypass": __version__, "rounds": plan.rounds,
        "machine": {"kernel": platform.release(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
    } | measure(plan, scaling, with_profiles, console)  # fmt: skip
    result["seconds"] = round(time.monotonic() - began, 1)
    save(result, output)
    for about in result["workloads"].values():
        for load in LOADS:
            console.print(table(about, load))
    if with_profiles and result["profiles"]:
        console.print(profile_table(result["profiles"]))
    if result.get("threads"):
        console.print(scaling_table(result["threads"]))
    warn(result["workloads"], console)
    console.print(f"{result['seconds']:.0f} s; all figures: {output}")


if __name__ == "__main__":
    start(main, "versus")
