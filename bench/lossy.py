# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.lossy`: a large file each way over a veth that loses packets at random in both directions, to and
from the bypass stack and, beside it, to and from Linux; writes build/lossy.json.

The client is Linux in every run, the server is the same Python program on one stack or the other (bench.lossy_ends).
What arrived is compared by SHA-256.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.command import save, start
from bench.figures import ratios, spread
from bench.loss import loss
from bench.programs import CLIENT_CORE, ROOT, BenchError, Server, pinned, require_two_cores, run_json
from bypass import netns, probe
from bypass.demo import make_body
from bypass.lab import CLIENT_IFNAME, Lab

SERVERS = ("bypass", "kernel")
WAYS = {"up": "client to server", "down": "server to client"}
RETRANSMITS = {"bypass": "tcp_out_retransmits", "kernel": "RetransSegs"}
TIMEOUTS = {"bypass": "tcp_timeouts", "kernel": "TCPTimeouts"}


def segments_one_by_one() -> None:
    """In this namespace: frames are lost, not what the kernel cuts into frames behind the program that loses them."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        ip.link("set", ifname=CLIENT_IFNAME, gso_max_segs=1)


def ends(*args: str) -> list[str]:
    return [sys.executable, "-m", "bench.lossy_ends", *args]


def since(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Counters of a namespace outlive a transfer."""
    return {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name, 0)}


def transfer(lab: Lab, server: str, way: str, path: Path, cc: str, per_million: int) -> dict[str, Any]:
    """One file over one connection. Adds what the sender counted and what the wire lost."""
    argv = lab.command("server", ends("serve", server, str(path), cc))
    before = _counters(lab)
    with Server(lab, argv, inside=False) as serving, loss(lab, per_million) as lost:
        argv = lab.command("client", ends(way, str(path), cc))
        result = run_json(pinned(CLIENT_CORE, argv), timeout=1200)
    after = _counters(lab)
    by_server = serving.report["counters"] if server == "bypass" else since(before["server"], after["server"])
    by_client = since(before["client"], after["client"])
    sender, kind = (by_client, "kernel") if way == "up" else (by_server, server)
    return result | {
        "lost": {"to_server": lost["to_bypass"], "to_client": lost["from_bypass"]},
        "retransmits": sender.get(RETRANSMITS[kind], 0),
        "timeouts": sender.get(TIMEOUTS[kind], 0),
        "waited_s": {"server": serving.report["waited_s"], "client": result["waited_s"]},
        "server": by_server,
        "client": by_client,
    }


def _counters(lab: Lab) -> dict[str, dict[str, int]]:
    from bench.lossy_ends import kernel_counters

    sides = {"server": lab.server_ns, "client": lab.client_ns}
    return {side: netns.run(ns, kernel_counters) for side, ns in sides.items()}


def run(
    size: int, per_million: int, rounds: int, cc: str, step: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """All rounds. Every round makes each transfer once.

    Raises:
        BenchError: a byte is not as it was, or the machine lacks something.
    """
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {w: {s: [] for s in SERVERS} for w in WAYS}
    with tempfile.TemporaryDirectory() as folder, Lab(f"{os.getpid()}-lossy", queues=1) as lab:
        path = Path(folder) / "body.bin"
        digest = make_body(path, size)
        netns.run(lab.client_ns, segments_one_by_one)
        for number in range(rounds):
            for way in WAYS:
                for server in SERVERS if number % 2 == 0 else reversed(SERVERS):
                    step(f"round {number + 1}: {server}: {WAYS[way]}")
                    result = transfer(lab, server, way, path, cc, per_million)
                    if result.pop("sha256") != digest:
                        raise BenchError(f"{server}, {WAYS[way]}: what arrived is not what was sent")
                    runs[way][server].append(result)
    ways = {}
    for way, by_server in runs.items():
        seconds = {server: [r["seconds"] for r in results] for server, results in by_server.items()}
        ways[way] = {
            "runs": by_server,
            "seconds": {server: spread(values) for server, values in seconds.items()},
            "speed": ratios(seconds["kernel"], seconds["bypass"]),
        }
    return {"sha256": digest, "ways": ways}


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{result['bytes'] / 1e6:g} MB, {result['loss']:.1%} of packets lost each way, {result['cc']}"
    )
    for name in (
        "",
        "server",
        "seconds",
        "Mbit/s",
        "retransmitted",
        "timeouts",
        "waited s",
        "Linux' time / ours",
    ):
        table.add_column(name, justify="left" if name in ("", "server") else "right")
    for way, found in result["ways"].items():
        for server in SERVERS:
            runs = found["runs"][server]
            seconds = found["seconds"][server]["median"]
            table.add_row(
                WAYS[way] if server == SERVERS[0] else "",
                server,
                f"{seconds:.2f}",
                f"{result['bytes'] * 8e-6 / seconds:.0f}",
                " ".join(str(r["retransmits"]) for r in runs),
                " ".join(str(r["timeouts"]) for r in runs),
                " ".join(f"{r['waited_s']['server']:.1f}" for r in runs),
                f"{found['speed']['median']:.2f}" if server == SERVERS[0] else "",
            )
    console.print(table)


@click.command()
@click.option("--bytes", "size", type=click.IntRange(1, 1 << 34), default=10**9, show_default=True)
@click.option(
    "--loss", "share", type=click.FloatRange(0, 0.5), default=0.02, show_default=True, help="Each way."
)
@click.option("--rounds", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option("--cc", type=click.Choice(("cubic", "reno", "bbr")), default="cubic", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures, not the table.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROOT / "build" / "lossy.json",
    help="Where the figures go.",
)
def main(size: int, share: float, rounds: int, cc: str, as_json: bool, output: Path) -> None:
    """A file each way through random loss: the bypass stack beside Linux, with the same peer on the same veth."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    require_two_cores()
    if lacking := probe.missing_for_xdp():
        raise BenchError(f"missing: {'; '.join(lacking)}")
    result: dict[str, Any] = {
        "version": 1,
        "machine": {
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "load_before": os.getloadavg()[0],
        },
        "bytes": size,
        "loss": share,
        "cc": cc,
        "rounds": rounds,
    }
    quiet = as_json or not console.is_terminal
    result |= run(
        size,
        round(share * 1e6),
        rounds,
        cc,
        (lambda what: None) if quiet else lambda what: console.print(what),
    )
    save(result, output)
    if as_json:
        click.echo(output.read_text(), nl=False)
    else:
        show(result, console)
        console.print(f"all figures: {output}")


if __name__ == "__main__":
    start(main)
