# SPDX-License-Identifier: Apache-2.0
"""What the steering program costs a packet: by number of rules, by number of masks, by verdict.

`python -m bench.steering_scale` runs the program in the kernel on a frame that never was on a wire
(BPF_PROG_TEST_RUN, which gives the mean of many repetitions) and writes build/steering-scale.json. Needs root.

    rules     a hot flow, and flows drawn at random, under 1 to 1,000,000 rules of one mask. Random ones are run once
              each, so the program itself is cold too: an upper bound.
    masks     a flow that matches under the last of 1 to 16 masks
    verdicts  the same flow: for another host, passed, dropped, steered, drained
    classifier  the first table's hot flow in the C classifier of the DPDK backend, in bursts

The first table's `load s` is what it takes to load such a policy once it is checked and compiled to masks and keys.

Keys: ns are nanoseconds of one packet, without driver and redirect; `ratio` is to the first row of the table.
"""

from __future__ import annotations

import ipaddress
import json
import random
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bypass.dpdk_backend.steering import SoftSteering
from bypass.policy import AfxdpBackend, Policy
from bypass.rules import Action, PortRange, Rule
from bypass.steering import Steering

OUT = Path(__file__).parent.parent / "build" / "steering-scale.json"
HOST = ipaddress.IPv4Address("192.0.2.10")
PEERS = int(ipaddress.IPv4Address("10.0.0.0"))  # the n-th peer is PEERS + n
PORT, TCP, AF_XDP = 8080, 6, 44
Row = dict[str, Any]


def frame(peer: int, host: ipaddress.IPv4Address = HOST, port: int = PORT) -> bytes:
    """A TCP segment to us by the loopback, whose MAC address is zero."""
    tcp = struct.pack("!HHIIBBHHH", 40000, port, 1, 2, 0x50, 0x10, 1024, 0, 0)
    ip = struct.pack("!BBHHHBBHI4s", 0x45, 0, 40, 0, 0x4000, 64, TCP, 0, PEERS + peer, host.packed)
    return bytes(12) + b"\x08\x00" + ip + tcp


def rule(
    index: int, action: Action = "steer", *, port: int = PORT, plen: int | None = None, peer: int = 0
) -> Rule:
    """Rule for one port, and one peer or prefix of peers."""
    remote = None if plen is None else ipaddress.ip_network((PEERS + peer, plen), strict=False)
    return Rule(index, f"r{index}", TCP, None, PortRange(port, port), remote, None, None, action)


def policy_of(rules: list[Rule]) -> Policy:
    """A policy, its masks and keys computed."""
    policy = Policy(1, "lo", AfxdpBackend(), tuple(rules), "bench")
    assert policy.compiled
    return policy


@contextmanager
def loaded(policy: Policy, *, endpoint: bool = True, drain: bool = False) -> Iterator[Steering]:
    """The program of a policy, with an endpoint for the flow and an AF_XDP socket."""
    with Steering(policy, "lo", queues=1, attach=False) as s, socket.socket(AF_XDP, socket.SOCK_RAW) as xsk:
        s.set_locals([HOST])
        s.set_socket(0, 0, xsk.fileno())
        if endpoint:
            s.add_endpoint(TCP, HOST, PORT, drain=drain)
        yield s


def interleaved(cases: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[int]]:
    """Every case once a round, so that what else the machine does meets all of them."""
    found: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            found[name].append(run())
    return found


def rows(found: dict[str, list[int]]) -> list[Row]:
    """Median, best and worst of the rounds, and the median's ratio to the first row's."""
    first = statistics.median(next(iter(found.values())))
    return [
        {
            "case": name,
            "ns": statistics.median(ns),
            "min_ns": min(ns),
            "max_ns": max(ns),
            "ratio": round(statistics.median(ns) / first, 2),
        }
        for name, ns in found.items()
    ]


def hot(s: Steering | SoftSteering, data: bytes, repeat: int) -> Callable[[], int]:
    return lambda: s.test_run(data, repeat=repeat).duration_ns


def by_rules(counts: list[int], rounds: int, repeat: int) -> list[Row]:
    """One mask, one rule a peer; the hot flow is the peer in the middle."""
    with ExitStack() as stack:
        cases, extra = {}, []
        for count in counts:
            policy = policy_of([rule(i, plen=32, peer=i) for i in range(count)])
            begin = time.monotonic()
            s = stack.enter_context(loaded(policy))
            seconds = time.monotonic() - begin
            rng = random.Random(count)
            cold = [s.test_run(frame(rng.randrange(count))).duration_ns for _ in range(2000)]
            extra.append({"random_ns": statistics.median(cold), "load_s": round(seconds, 2)})
            cases[f"{count:,}"] = hot(s, frame(count // 2), repeat)
        return [row | more for row, more in zip(rows(interleaved(cases, rounds)), extra, strict=True)]


def by_rules_in_c(counts: list[int], rounds: int, repeat: int) -> list[Row]:
    """The same hot flows, classified without XDP."""
    with ExitStack() as stack:
        cases = {}
        for count in counts:
            policy = policy_of([rule(i, plen=32, peer=i) for i in range(count)])
            s = stack.enter_context(SoftSteering(policy, "lo"))
            s.set_locals([HOST])
            s.add_endpoint(TCP, HOST, PORT)
            assert s.test_run(frame(count // 2)).reason == "steered"
            cases[f"{count:,}"] = hot(s, frame(count // 2), repeat)
        return rows(interleaved(cases, rounds))


def by_masks(rounds: int, repeat: int) -> list[Row]:
    """Prefixes of other peers, and last the rule that matches."""
    with ExitStack() as stack:
        cases = {}
        for count in (1, 2, 4, 8, 16):
            others = [rule(i, "pass", plen=32 - i, peer=1 << 23) for i in range(count - 1)]
            s = stack.enter_context(loaded(policy_of([*others, rule(count - 1)])))
            assert len(s.policy.compiled.masks) == count
            cases[str(count)] = hot(s, frame(1), repeat)
        return rows(interleaved(cases, rounds))


def by_verdict(rounds: int, repeat: int) -> list[Row]:
    """One rule; the flow's packet and others."""
    elsewhere = frame(1, ipaddress.IPv4Address("192.0.2.99"))
    with ExitStack() as stack:
        drop = stack.enter_context(loaded(policy_of([rule(0, "drop")]), endpoint=False))
        steer = stack.enter_context(loaded(policy_of([rule(0)])))
        closed = stack.enter_context(loaded(policy_of([rule(0)]), endpoint=False))
        drain = stack.enter_context(loaded(policy_of([rule(0)]), drain=True))
        cases = {
            "not local": hot(steer, elsewhere, repeat),
            "no rule": hot(steer, frame(1, port=22), repeat),
            "drop": hot(drop, frame(1), repeat),
            "no endpoint": hot(closed, frame(1), repeat),
            "steered": hot(steer, frame(1), repeat),
            "steered, drains": hot(drain, frame(1), repeat),
        }
        return rows(interleaved(cases, rounds))


def show(console: Console, title: str, what: str, table_rows: list[Row]) -> None:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    table.add_column(what)
    names = [k for k in table_rows[0] if k != "case"]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in table_rows:
        table.add_row(row["case"], *(f"{row[name]:g}" for name in names))
    console.print(table)


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Measurements of each case, interleaved.")
@click.option("--repeat", default=300_000, show_default=True, help="Packets of one measurement.")
@click.option("--most", default=1_000_000, show_default=True, help="Rules of the largest policy.")
def main(rounds: int, repeat: int, most: int) -> None:
    """Nanoseconds that the steering program takes for a packet."""
    counts = [n for n in (1, 1000, 100_000, 1_000_000) if n <= most]
    result = {
        "rules": by_rules(counts, rounds, repeat),
        "classifier": by_rules_in_c(counts, rounds, repeat),
        "masks": by_masks(rounds, repeat),
        "verdicts": by_verdict(rounds, repeat),
    }
    console = Console(width=100)
    show(console, "Rules of one mask: a hot flow; random flows, program cold", "rules", result["rules"])
    show(console, "The same hot flow in the classifier of the DPDK backend", "rules", result["classifier"])
    show(console, "Masks: a flow that only the last one matches", "masks", result["masks"])
    show(console, "Verdicts: one rule", "verdict", result["verdicts"])
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"\nwritten: {OUT}")


if __name__ == "__main__":
    main()
