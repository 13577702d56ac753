# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.apps`: do Debian's programs work? A table, and build/programs.json. Exit code 1: one does not."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.apps import show
from bench.apps.launch import LAUNCHERS
from bench.apps.run import APPS, Verdict, require, run
from bench.command import save, start
from bench.programs import ROOT, BenchError
from bypass import __version__, probe
from bypass.cli.table import print_table
from bypass.dpdk_backend.eal import load_plugin
from bypass.errors import DeviceError

USUAL = ("kernel", "bypass", "shared", "dpdk")


def chosen(asked: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """What serves, and what is left out of the usual, with what it lacks.

    Raises:
        BenchError: what was asked for by name cannot be.
    """
    launchers = list(dict.fromkeys(asked or USUAL))
    lacking = dict[str, str]()
    if "dpdk" in launchers:
        try:
            load_plugin()
        except DeviceError as e:
            lacking["dpdk"] = str(e)
            if asked:
                raise BenchError(f"dpdk: {e}") from e
    return [name for name in launchers if name not in lacking], lacking


def say(verdict: Verdict) -> None:
    """As soon as it is known."""
    click.echo(f"{verdict.app} on {verdict.launcher}: {verdict.seconds} s, {len(verdict.problems)} problems")
    for problem in verdict.problems[:10]:
        click.echo(f"  wrong: {problem}")
    if verdict.figures:
        click.echo(f"  {show.figures(verdict.figures)}")


@click.command()
@click.option("--only", type=click.Choice(sorted(APPS)), multiple=True, help="Only this one; several times.")
@click.option(
    "--on", "asked", type=click.Choice(sorted(LAUNCHERS)), multiple=True,
    help=f"What serves it; several times. Usually: {', '.join(USUAL)}.",
)  # fmt: skip
@click.option("--scale", type=click.FloatRange(0.001, 100), default=1.0, show_default=True,
              help="How much of a full run.")  # fmt: skip
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "programs.json",
    help="Where the figures go.",
)  # fmt: skip
def main(only: tuple[str, ...], asked: tuple[str, ...], scale: float, output: Path) -> None:
    """Runs Debian's programs as an unprivileged user, against kernel clients over a veth, and says what went wrong.

    On bypass, a program that the kernel served counts as one that does not work.
    """
    names = list(dict.fromkeys(only or APPS))
    if lacking := probe.missing_for_xdp():
        raise BenchError(f"missing: {'; '.join(lacking)}")
    launchers, left_out = chosen(asked)
    require(names)
    verdicts: list[Verdict] = []
    for name in names:
        for launcher in launchers:
            verdict = run(APPS[name], LAUNCHERS[launcher], scale=scale)
            if launcher != "kernel":
                verdict.problems += verdict.elsewhere
            verdicts.append(verdict)
            say(verdict)
    found = {"programs": show.programs(verdicts), "runs": [v.document() for v in verdicts]}
    save({"version": 2, "bypass": __version__, "scale": scale, "left_out": left_out} | found, output)
    click.echo("\nPrograms from Debian, unmodified\n")
    print_table(show.columns(verdicts), show.rows(verdicts))
    click.echo(f"\n{show.LEGEND}")
    for name, why in left_out.items():
        click.echo(f"left out: {name}: {why}")
    click.echo(f"all figures: {output}")
    if any(v.problems for v in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    start(main, "programs")
