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

SOCKETS = {
    "direct": "the application's own",
    "shared": "bypass-fwd's, which passes it on to the application,",
}


@click.command()
@click.argument("interface", metavar="IFACE")
@click.argument("flow", metavar="FLOW", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@SOCKET
def explain(interface: str, flow: tuple[str, ...], as_json: bool, name: str | None) -> None:
    """Say what happens to received packets of FLOW on IFACE: which rule, which application, which queue.

    FLOW is `PROTO REMOTE:PORT > LOCAL:PORT`, as the packets go: from the peer to this host. The queue is computed where
    the device tells how it hashes (`ethtool -x`); else it is said what is known.

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
    lines += queue_lines(answer)
    return "\n".join(lines)


def queue_lines(answer: dict[str, Any]) -> list[str]:
    """On which queue it arrives, as far as the device tells, and whose socket is there."""
    queue, served = answer["queue"], answer["queues"]
    if queue is not None:
        lines = [f"  queue        {queue}: {answer['queue_why']}"]
    elif served:
        lines = [f"  queue        one of {' '.join(map(str, served))}: {answer['queue_why']}"]
    else:
        return [f"  queue        not known: {answer['queue_why']}"]
    if "app" not in answer or answer["action"] != "steer":
        return lines
    if queue is not None and queue not in served:
        return [*lines, "  socket       none on that queue: TCP is dropped, the rest is the kernel's"]
    whose = SOCKETS.get(answer["mode"])
    which = "on that queue" if queue is not None else "on each of them, all steered alike"
    return [*lines, f"  socket       {whose} {which}"] if whose else lines
