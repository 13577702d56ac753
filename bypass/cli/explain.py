# SPDX-License-Identifier: Apache-2.0
"""`bypass explain`."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from bypass.broker.tools import ask, brokers
from bypass.cli.broker import SOCKET
from bypass.errors import BypassError

FLOW = re.compile(
    r"(?P<proto>tcp|udp) +(?P<remote>[0-9.]+):(?P<remote_port>[0-9]{1,5}) *> *"
    r"(?P<local>[0-9.]+):(?P<local_port>[0-9]{1,5})"
)


@click.command()
@click.argument("interface", metavar="IFACE")
@click.argument("flow", metavar="FLOW", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@SOCKET
def explain(interface: str, flow: tuple[str, ...], as_json: bool, name: str | None) -> None:
    """Say what happens to received packets of FLOW on IFACE: which rule, which application, which queue.

    FLOW is `PROTO REMOTE:PORT > LOCAL:PORT`, as the packets go: from the peer to this host.

    \b
    Examples:
      bypass explain eth1 'tcp 198.51.100.7:40000 > 192.0.2.10:6379'
      bypass explain eth1 --json 'udp 198.51.100.7:53 > 192.0.2.10:5353'
    """
    question = {"do": "explain", **parsed(" ".join(flow))}
    there = brokers(name)
    for broker in there:
        try:
            (answer,) = ask(broker, question)
        except BypassError:
            if len(there) == 1:
                raise
            continue
        if answer["interface"] == interface:
            click.echo(json.dumps(answer, indent=2) if as_json else words(answer, " ".join(flow)))
            return
    raise BypassError(
        f"no broker serves {interface} in this network namespace: the kernel has all of its flows"
    )


def parsed(flow: str) -> dict[str, Any]:
    """BypassError: it is no flow."""
    found = FLOW.fullmatch(flow.strip())
    if found is None:
        raise BypassError(f"{flow!r} is no flow: write it as 'tcp 198.51.100.7:40000 > 192.0.2.10:80'")
    said: dict[str, Any] = found.groupdict()
    for port in ("remote_port", "local_port"):
        said[port] = int(said[port])
    return said


def words(answer: dict[str, Any], flow: str) -> str:
    """For people."""
    lines = [flow]
    if answer["rule"] is None:
        lines.append("  rule         none: the kernel has it")
    else:
        lines.append(
            f"  rule         {answer['rule']} ({answer['policy']}:{answer['line']}), {answer['action']}"
        )
    if answer["action"] == "steer":
        if "app" in answer:
            pids = " ".join(map(str, answer["pids"]))
            lines.append(f"  live         {answer['live']}")
            lines.append(
                f"  application  {answer['app']} ({answer['name']}), user {answer['user']}, process {pids}"
            )
        else:
            lines.append("  application  none has a socket for it: the kernel has it")
    queues = answer["queues"]
    if len(queues) == 1:
        lines.append(f"  queue        {queues[0]}, the only one")
    elif queues:
        shown = " ".join(map(str, queues))
        lines.append(f"  queue        one of {shown}: the interface's hash decides (`ethtool -x`)")
    return "\n".join(lines)
