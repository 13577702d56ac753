# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.killing`: kills at seeded moments, judges each, and writes build/killing.json. Exit code 1: one
was not as it has to be."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.apps.place import Place, lacking, place
from bench.apps.proof import Evidence, snapshot
from bench.command import save, start
from bench.killing.judge import OUTCOMES, Outcome, judge
from bench.killing.residue import Residue
from bench.killing.worlds import WORLDS, World
from bench.mixed.leftovers import bpf_objects
from bench.programs import ROOT, BenchError
from bypass import __version__, netns, probe
from bypass.lab import SERVER_IP, Lab

KEPT = 4
UNTIL_S = 0.6  # a kill comes at a moment up to this long after the load began
PROVEN_S = 0.05  # of load before that, at least: who serves?
WATCH_S = 0.4  # the load goes on for so long after it


def outcome_of(world: World, role: str) -> Outcome:
    """The kernel closes what a killed program of its own had: an end may then be a FIN as well."""
    outcome = OUTCOMES[role]
    return outcome if world.on_bypass() else replace(outcome, how=("reset", "eof"))


class Peers:
    """bench/killing/client.py in the client's namespace."""

    def __init__(self, here: Place, world: World) -> None:
        argv = [
            sys.executable, str(ROOT / "bench" / "killing" / "client.py"), SERVER_IP, str(world.port), str(KEPT),
            world.request.hex(), world.answer.hex(),
        ]  # fmt: skip
        with netns.entered(here.lab.client_ns):
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Peers:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            self.process.kill()
            self.process.communicate()
            raise BenchError("the peers were not answered")
        return self

    def stop(self) -> dict[str, Any]:
        out, _ = self.process.communicate("\n", timeout=30)
        found: dict[str, Any] = json.loads(out)
        return found

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def trial(lab: Lab, cls: type[World], role: str, after_s: float, within_s: float) -> dict[str, Any]:
    """One kill. `problems` of the result: empty is good."""
    residue = Residue(lab)
    objects: set[tuple[str, int]] = set()
    world = cls()
    with place(lab) as here:
        with world.running(here) as alive, Peers(here, world) as peers:
            before = snapshot(lab)
            time.sleep(after_s + PROVEN_S)
            evidence = Evidence(before, snapshot(lab))
            for pid in alive.family():
                objects |= bpf_objects(pid)
            victim = alive.victim(role)
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            time.sleep(WATCH_S)
            found = peers.stop()
        seen = judge(found, killed, outcome_of(world, role), within_s)
        if world.on_bypass():
            seen.problems += [f"before the kill: {text}" for text in evidence.problems()]
        left = [f"left: {what}" for what in residue.check(objects)]
    return {
        "role": role, "after_s": round(after_s, 4), "new_ms": seen.new_ms, "kept_ms": seen.kept_ms,
        "probes": dict(Counter(result for _, _, result in found["probes"])), "problems": seen.problems + left,
    }  # fmt: skip


def table(trials: list[dict[str, Any]]) -> Table:
    shown = Table(title="\nSIGKILL under load", title_justify="left", title_style="bold")
    for name in ("server", "killed"):
        shown.add_column(name)
    for name in ("times", "as it has to be", "new ms", "kept ms"):
        shown.add_column(name, justify="right")
    for world, role in dict.fromkeys((t["world"], t["role"]) for t in trials):
        these = [t for t in trials if (t["world"], t["role"]) == (world, role)]
        worst = [max((t[k] for t in these if t[k] is not None), default=None) for k in ("new_ms", "kept_ms")]
        good = sum(not t["problems"] for t in these)
        shown.add_row(
            WORLDS[world].title,
            role,
            str(len(these)),
            str(good),
            *("-" if w is None else f"{w:g}" for w in worst),
        )
    shown.caption = (
        "ms from the kill, the longest: until new connections had their answer, until kept ones ended"
    )
    shown.caption_justify = "left"
    return shown


@click.command()
@click.option(
    "--times", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Kills of each server."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments.")
@click.option("--within", type=click.FloatRange(1, 60_000), default=100, show_default=True,
              help="Milliseconds until the kernel has to have answered.")  # fmt: skip
@click.option("--only", type=click.Choice(sorted(WORLDS)), multiple=True, default=("nginx", "shared"),
              show_default=True, help="This server; several times.")  # fmt: skip
@click.option(
    "--role", "roles", type=click.Choice(sorted(OUTCOMES)), multiple=True, help="Only this one is killed."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "killing.json",
              help="Where the figures go.")  # fmt: skip
def main(
    times: int, seed: int, within: float, only: tuple[str, ...], roles: tuple[str, ...], output: Path
) -> None:
    """Kills a server's processes at seeded random moments under load; each role in turn."""
    lack = probe.missing_for_xdp() or lacking(sorted({tool for name in only for tool in WORLDS[name].needs}))
    if lack:
        raise BenchError(f"missing: {'; '.join(lack)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    trials: list[dict[str, Any]] = []
    with Lab(f"{os.getpid()}-killing") as lab:
        for name in only:
            mine = [role for role in WORLDS[name].roles if not roles or role in roles]
            rng = random.Random(seed)
            for number in range(times if mine else 0):
                role = mine[number % len(mine)]
                result: dict[str, Any] = {"world": name, "number": number}
                result |= trial(lab, WORLDS[name], role, rng.uniform(0, UNTIL_S), within / 1e3)
                trials.append(result)
                for problem in result["problems"]:
                    console.print(
                        f"{name} {number}, {role} after {result['after_s']} s: {problem}", markup=False
                    )
    if not trials:
        raise BenchError(f"{', '.join(only)} has no role {', '.join(roles)}")
    bad = sum(bool(t["problems"]) for t in trials)
    save({"version": 1, "bypass": __version__, "seed": seed, "within_ms": within, "trials": trials}, output)
    console.print(table(trials))
    console.print(f"all figures: {output}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    start(main, "killing")
