# SPDX-License-Identifier: Apache-2.0
"""`bypass flows`."""

from __future__ import annotations

import json
from typing import Any

import click

from bypass.cli.ask import ask_all, xdp_text
from bypass.cli.table import print_table
from bypass.status import DEFAULT_LIMIT


@click.command()
@click.argument("interface", metavar="[IFACE]", default="")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--limit",
    default=DEFAULT_LIMIT,
    show_default=True,
    type=click.IntRange(1, 999_999_999),
    help="Rules and entries of a process, those with most packets.",
)
def flows(interface: str, as_json: bool, limit: int) -> None:
    """Rules and live entries of the processes that steer flows, of IFACE or of all interfaces.

    A rule's packets are those that it decided, whatever its action. An entry exists while a socket owns it; its
    packets are those that went to the stack. Interfaces are those of this network namespace.

    \b
    Examples:
      bypass flows
      bypass flows eth1 --json
      bypass lab exec server -- bypass flows
    """
    answers = ask_all("flows", interface, limit)
    if as_json:
        click.echo(json.dumps(merged(answers), indent=2))
        return
    for answer in answers:
        print_flows(answer)


def merged(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """`processes`, and the `rules` and `entries` of all of them, each with its interface and pid."""
    whole: dict[str, Any] = {"processes": [], "rules": [], "entries": []}
    for answer in answers:
        place = {"interface": answer["interface"], "pid": answer["pid"]}
        for kind in ("rules", "entries"):
            whole[kind] += [{**place, **item} for item in answer[kind]]
        whole["processes"].append({k: v for k, v in answer.items() if k not in ("rules", "entries")})
    return whole


def print_flows(answer: dict[str, Any]) -> None:
    """Tables for people."""
    click.echo(
        f"{answer['interface']}: process {answer['pid']}, policy {answer['policy']}, {answer['mode']} mode"
        f"{xdp_text(answer)}"
    )
    columns = ("RULE", "ACTION", "PACKETS", "BYTES", "MATCH")
    rows = [
        (r["name"], r["action"], f"{r['packets']:,}", f"{r['bytes']:,}", r["match"]) for r in answer["rules"]
    ]
    print_table(columns, rows, right=("PACKETS", "BYTES"))
    print_left_out(answer, "rules")
    if not answer["entries"]:
        click.echo("\nNo live entries: no socket is open, the kernel has every flow.\n")
        return
    click.echo()
    print_table(
        ("ENTRY", "PROTO", "LOCAL", "REMOTE", "STATE", "PACKETS", "BYTES"),
        [
            (
                str(e["entry"]),
                e["proto"],
                f"{e['local'] or '*'}:{_ports(e)}",
                f"{e['remote']}:{e['remote_port']}" if e["remote"] is not None else "*",
                "draining" if e["drain"] else "live",
                f"{e['packets']:,}",
                f"{e['bytes']:,}",
            )
            for e in answer["entries"]
        ],
        right=("ENTRY", "PACKETS", "BYTES"),
    )
    print_left_out(answer, "entries")
    click.echo()


def _ports(entry: dict[str, Any]) -> str:
    first, last = entry["local_port"], entry["last_local_port"]
    return f"{first}" if first == last else f"{first}-{last}"


def print_left_out(answer: dict[str, Any], kind: str) -> None:
    """How many a limit left out."""
    more = answer[f"{kind}_total"] - len(answer[kind])
    if more:
        click.echo(f"... and {more} more {kind}, with fewer packets (--limit)")
