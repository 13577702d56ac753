# SPDX-License-Identifier: Apache-2.0
"""`bypass stats`."""

from __future__ import annotations

import json
from typing import Any

import click

from bypass.cli.ask import ask_all, xdp_text
from bypass.cli.table import print_table


@click.command()
@click.argument("interface", metavar="[IFACE]", default="")
@click.option("--json", "as_json", is_flag=True, help="For programs, with the counters that are 0.")
@click.option("--all", "show_all", is_flag=True, help="Also the counters that are 0.")
def stats(interface: str, as_json: bool, show_all: bool) -> None:
    """Counters of the steering program, the guard, the device's rings and the stack, of IFACE or of all interfaces.

    \b
    steering  every packet of the interface, by the reason of its verdict
    guard     TCP resets of the kernel on their way out
    rings     per queue: what the device took and gave, and the kernel's drops
    filter, exception, port
              of a DPDK port: what became of received frames; frames to and from the kernel; the driver's own counters
    stack     the TCP/IP stack

    \b
    Examples:
      bypass stats
      bypass stats eth1 --json
      bypass lab exec server -- bypass stats --all
    """
    answers = ask_all("stats", interface, 1)
    if as_json:
        click.echo(json.dumps({"processes": answers}, indent=2))
        return
    for answer in answers:
        print_stats(answer, show_all)


def print_stats(answer: dict[str, Any], show_all: bool) -> None:
    """Tables for people."""
    click.echo(
        f"{answer['interface']}: process {answer['pid']}, {answer['mode']} mode ({answer['mode_reason']})"
        f"{xdp_text(answer)}\n"
    )
    hardware = answer.get("hardware")
    if hardware is not None:
        click.echo(f"hardware rules: {hardware['rules'] or 'none'} ({hardware['reason']})\n")
    reasons = [r for r in answer["reasons"] if show_all or r["packets"]]
    print_table(
        ("STEERING", "VERDICT", "PACKETS", "BYTES", "MEANING"),
        [(r["name"], r["verdict"], f"{r['packets']:,}", f"{r['bytes']:,}", r["text"]) for r in reasons],
        right=("PACKETS", "BYTES"),
    )
    guard = answer["guard"]
    click.echo(f"\nguard: {'active' if guard['active'] else 'not active'} ({guard['reason']})")
    counted = {name: c["packets"] for name, c in guard["counts"].items()}
    print_counters("GUARD", counted, show_all)
    print_rings(answer["rings"], show_all)
    for title, counters in answer.get("more", {}).items():
        print_counters(title.upper(), counters, show_all)
    if "stack" in answer:
        print_counters("STACK", answer["stack"], show_all)
        print_counters("CONNECTIONS", answer["connections"], show_all)
        print_counters("IN USE", answer["in_use"], show_all)


def print_counters(title: str, counters: dict[str, int], show_all: bool) -> None:
    """Name and value, without those that are 0."""
    rows = [(name, f"{value:,}") for name, value in counters.items() if show_all or value]
    if rows:
        click.echo()
        print_table((title, "COUNT"), rows, right=("COUNT",))


def print_rings(rings: dict[str, dict[str, int]], show_all: bool) -> None:
    """A column for each queue."""
    names = [n for n in next(iter(rings.values()), {}) if show_all or any(ring[n] for ring in rings.values())]
    columns = [f"QUEUE {queue}" for queue in rings]
    if names:
        click.echo()
        rows = [(name, *(f"{ring[name]:,}" for ring in rings.values())) for name in names]
        print_table(("RINGS", *columns), rows, right=columns)
