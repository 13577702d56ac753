# SPDX-License-Identifier: Apache-2.0
"""`bypass lab up | exec | down`."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click

from bypass import netns
from bypass.errors import LabError
from bypass.lab import CLIENT_NET, MAX_QUEUES, Lab, Side, labs

NAME = click.option("--name", default="", metavar="NAME", help="Which lab, when there are several.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")


@click.group()
def lab() -> None:
    """Two network namespaces joined by a multi-queue veth, to try things in.

    \b
    bypass-server                     bypass-client
    bypass0 192.0.2.10/24 -- veth --  bypass1 192.0.2.20/24
                                      and 198.51.100.0/24, routed

    \b
    Examples:
      bypass lab up --queues 4
      bypass lab exec server -- python3 -m http.server 8081
      bypass lab exec client -- curl http://192.0.2.10:8081/
      bypass lab down
    """


@lab.command()
@NAME
@click.option(
    "--queues", default=2, show_default=True, type=click.IntRange(1, MAX_QUEUES), help="Of each side."
)
@click.option(
    "--mtu", default=1500, show_default=True, type=click.IntRange(68, 65535), help="Of both sides, bytes."
)
@click.option(
    "--dpdk", is_flag=True, help="The server's end is a port for DPDK: bypass0w, without addresses."
)
@AS_JSON
def up(name: str, queues: int, mtu: int, dpdk: bool, as_json: bool) -> None:
    """Make the lab. If it is up as asked for, say so and change nothing."""
    it = Lab(name, queues=queues, mtu=mtu, wire=dpdk)
    made = it.up()
    about = it.describe()
    if as_json:
        click.echo(json.dumps(about | {"made": made}, indent=2))
        return
    sides = it.sides()
    if sides is None:
        raise LabError("the lab went away while it was looked at")
    click.echo("The lab is up." if made else "The lab was up already.")
    _table(sides)
    click.echo(f"The client also answers for {CLIENT_NET}, which the server reaches through the client.")
    option = f" --name {name}" if name else ""
    if dpdk:
        click.echo(f"{sides[0].interface} is for DPDK: see config/dpdk.yaml.")
        return
    click.echo(f"Run something in it:  bypass lab exec{option} client -- ping -c 3 {sides[0].address}")


def _table(sides: tuple[Side, Side]) -> None:
    from bypass.cli.table import print_table

    print_table(
        ["namespace", "interface", "address", "MAC", "queues", "MTU"],
        [
            [
                s.namespace,
                s.interface,
                f"{s.address}/{s.prefix_len}" if s.address else "-",
                s.mac,
                str(s.queues),
                str(s.mtu),
            ]
            for s in sides
        ],
        right=["queues", "MTU"],
    )


@lab.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@NAME
@click.argument("side", type=click.Choice(["server", "client"]))
@click.argument("argv", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, side: str, argv: tuple[str, ...]) -> int:
    """Run COMMAND on one side; its exit code is the exit code."""
    if argv[0] == "--":
        argv = argv[1:]
    if not argv:
        raise click.UsageError("no COMMAND")
    return _wait(subprocess.Popen(Lab(name).command(side, argv)))


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue  # the terminal sent it to the command as well: its answer counts
        return code if code >= 0 else 128 - code


@lab.command()
@NAME
@click.option("--all", "every", is_flag=True, help="Every lab of this machine.")
@AS_JSON
def down(name: str, every: bool, as_json: bool) -> None:
    """Remove the lab, ending the processes that still run in it."""
    targets = labs() if every else [Lab(name)]
    ended: dict[int, str] = {}
    removed: list[str] = []
    for it in targets:
        removed += [ns for ns in it.namespaces if netns.exists(ns)]
        ended |= it.down()
    about: dict[str, Any] = {
        "removed": removed,
        "ended": [{"pid": p, "name": n} for p, n in sorted(ended.items())],
    }
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    for pid, comm in sorted(ended.items()):
        click.echo(f"ended {comm} ({pid})")
    click.echo(f"removed {', '.join(removed)}" if removed else "There was no such lab: nothing to remove.")
