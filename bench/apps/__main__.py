# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.apps`: do Debian's programs work? A table, and build/programs.json. Exit code 1: one does not."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.apps.launch import LAUNCHERS
from bench.apps.run import APPS, Verdict, require, run
from bench.command import save, start
from bench.programs import ROOT, BenchError
from bypass import __version__, probe


def short(figures: dict[str, object]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name} {value}" for name, value in figures.items() if not isinstance(value, dict))


def table(verdicts: list[Verdict]) -> Table:
    shown = Table(title="\nPrograms from Debian, unmodified", title_justify="left", title_style="bold")
    shown.add_column("program")
    shown.add_column("on")
    shown.add_column("works")
    for name in ("steered", "opens", "idle", "s"):
        shown.add_column(name, justify="right")
    shown.add_column("figures", overflow="fold")
    for v in verdicts:
        proof = v.proof
        opens = f"{proof['active_opens']}+{proof['passive_opens']}" if proof else "-"
        steered = f"{proof['steered']:.2%}" if proof else "-"
        idle = f"{proof['idle_cpu']:.1%}" if proof else "-"
        good = "yes" if not v.problems else f"[red]no: {len(v.problems)}"
        shown.add_row(
            APPS[v.app].title, v.launcher, good, steered, opens, idle, f"{v.seconds:.0f}", short(v.figures)
        )
    shown.caption = (
        "opens: connections that the server's kernel made and took; idle: CPU of a core while nobody asked"
    )
    shown.caption_justify = "left"
    return shown


@click.command()
@click.option("--only", type=click.Choice(sorted(APPS)), multiple=True, help="Only this one; several times.")
@click.option(
    "--on", "launchers", type=click.Choice(sorted(LAUNCHERS)), multiple=True, default=("kernel", "bypass", "shared"),
    show_default=True, help="What serves it; several times.",
)  # fmt: skip
@click.option("--scale", type=click.FloatRange(0.001, 100), default=1.0, show_default=True,
              help="How much of a full run.")  # fmt: skip
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "programs.json",
    help="Where the figures go.",
)  # fmt: skip
def main(only: tuple[str, ...], launchers: tuple[str, ...], scale: float, output: Path) -> None:
    """Runs Debian's programs as an unprivileged user, against kernel clients over a veth, and says what went wrong.

    On bypass, a program that the kernel served counts as one that does not work.
    """
    names = list(only or APPS)
    if lacking := probe.missing_for_xdp():
        raise BenchError(f"missing: {'; '.join(lacking)}")
    require(names)
    console = Console(width=None if sys.stdout.isatty() else 140)
    verdicts = []
    for name in names:
        for launcher in launchers:
            verdict = run(APPS[name], LAUNCHERS[launcher], scale=scale)
            if launcher != "kernel":
                verdict.problems += verdict.elsewhere
            verdicts.append(verdict)
            console.print(f"{name} on {launcher}: {verdict.seconds} s, {len(verdict.problems)} problems")
            for problem in verdict.problems[:10]:
                console.print(f"  wrong: {problem}", markup=False)
    save(
        {"version": 1, "bypass": __version__, "scale": scale, "runs": [v.document() for v in verdicts]},
        output,
    )
    console.print(table(verdicts))
    console.print(f"all figures: {output}")
    if any(v.problems for v in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    start(main, "programs")
