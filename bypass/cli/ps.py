# SPDX-License-Identifier: Apache-2.0
"""`bypass ps`."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import click

from bypass import procfs
from bypass.broker.tools import ask, brokers
from bypass.cli.broker import SOCKET
from bypass.cli.table import print_table
from bypass.errors import BypassError

SAMPLE_S = 0.2


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@SOCKET
def ps(as_json: bool, name: str | None) -> None:
    """Applications of the brokers of this network namespace: yours, or as root everybody's.

    CPU is the share of one processor that their processes use now, measured for 0.2 seconds.

    \b
    Examples:
      bypass ps
      bypass ps --json
    """
    found: list[dict[str, Any]] = []
    there = brokers(name)
    for broker in there:
        try:
            found += [{"socket": broker, **r} for r in ask(broker, {"do": "ps"}) if not r.get("end")]
        except BypassError as e:
            if name is not None:
                raise
            click.echo(f"bypass: {e}", err=True)
    shares = cpu_shares([pid for app in found for pid in app["pids"]])
    for app in found:
        app["cpu"] = round(sum(shares.get(pid, 0.0) for pid in app["pids"]), 3)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo("No application" + ("" if there else ": no broker runs in this network namespace"))
        return
    print_table(
        ("APP", "NAME", "USER", "PIDS", "MODE", "INTERFACE", "QUEUES", "LEASES", "MEMORY", "CPU"),
        [
            (
                str(a["app"]),
                a["name"] + (" (ending)" if a["lingering"] else ""),
                a["user"],
                " ".join(map(str, a["pids"])),
                a["mode"],
                a["interface"] or "-",
                " ".join(map(str, a["queues"])) or "-",
                leases_text(a),
                f"{a['memory'] >> 20} MiB",
                f"{a['cpu']:.0%}",
            )
            for a in found
        ],
        right=("APP", "MEMORY", "CPU"),
    )
    for trouble in dict.fromkeys(a["trouble"] for a in found if a["trouble"]):
        click.echo(trouble)


def leases_text(app: dict[str, Any], most: int = 4) -> str:
    """The first ones, and how many more."""
    shown = [
        f"{lease['proto']} {lease['local']}" + (f" > {lease['remote']}" if lease["remote"] else "")
        for lease in app["leases"][:most]
    ]
    more = app["leases_total"] - len(shown)
    return ", ".join(shown + ([f"{more} more"] if more else [])) or "-"


def cpu_shares(pids: list[int]) -> dict[int, float]:
    """Of processes that are there during the whole measurement: seconds of processor a second."""
    before, begin = {pid: cpu_seconds(pid) for pid in pids}, time.monotonic()
    if not pids:
        return {}
    time.sleep(SAMPLE_S)
    took = time.monotonic() - begin
    after = {pid: cpu_seconds(pid) for pid in pids}
    return {
        pid: (now - was) / took
        for pid in pids
        if (was := before[pid]) is not None and (now := after[pid]) is not None
    }


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process; None: it has ended."""
    fields = procfs.stat_of(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else None
