# SPDX-License-Identifier: Apache-2.0
"""Over a veth: one client of the kernel's against testpmd, the stack on DPDK, the stack on AF_XDP, and the kernel.

DPDK reads and writes the server's end whole (net_af_packet); what the stack does not take goes to a TAP. testpmd swaps
the addresses and ports of each frame (5tswap), which answers UDP: the least that DPDK can do there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench import network
from bench.figures import ratios, spread
from bench.network import TESTS, Test
from bench.programs import BenchError, Server, python_server
from bypass import netns
from bypass.lab import CLIENT_IFNAME, SERVER_IP, WIRE_IFNAME, Lab

TESTPMD = "dpdk-testpmd"
VARIANTS: dict[str, str] = {
    "testpmd": "testpmd, swapping",
    "dpdk-spin": "bypass on DPDK, spinning",
    "dpdk-sleep": "bypass on DPDK, sleeping",
    "bypass-sleep": "bypass on AF_XDP, sleeping",
    "kernel": "kernel sockets, epoll",
}
WIRED = ("testpmd", "dpdk-spin", "dpdk-sleep")
RATIOS = (
    ("dpdk/testpmd", "dpdk-spin", "testpmd"),
    ("dpdk/kernel", "dpdk-sleep", "kernel"),
    ("dpdk/afxdp", "dpdk-sleep", "bypass-sleep"),
)
READY_S = 20


def applies(variant: str, test: Test) -> bool:
    return test.mode == "udp" if variant == "testpmd" else network.applies(variant, test)


def runs() -> int:
    """Of a round."""
    return sum(applies(v, t) for v in VARIANTS for t in TESTS)


@contextmanager
def _testpmd(lab: Lab) -> Iterator[Server]:
    """Both of its threads on the server's core. It answers no ARP, so the client is told."""
    eal = ["--lcores", "0@0,1@0", "--no-huge", "--no-shconf", "--no-telemetry", "--no-pci", "-m", "256"]
    options = [
        "--vdev",
        f"net_af_packet0,iface={WIRE_IFNAME}",
        "--",
        "--forward-mode=5tswap",
        "--auto-start",
        "--total-num-mbufs=16384",
    ]
    command = ["sh", "-c", 'echo ready; exec "$@" > /dev/null 2>&1', "sh", TESTPMD, *eal, *options]
    sides = lab.sides()
    assert sides is not None
    netns.run(lab.client_ns, _neighbour, sides[0].mac)
    with Server(lab, command, inside=True) as server:
        deadline = time.monotonic() + READY_S
        while not netns.run(lab.client_ns, _answered):
            if time.monotonic() > deadline:
                raise BenchError(f"{TESTPMD} answers nothing after {READY_S} s")
        yield server


def _neighbour(mac: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        index = ip.link_lookup(ifname=CLIENT_IFNAME)[0]
        ip.neigh("replace", dst=SERVER_IP, lladdr=mac, ifindex=index, state="permanent")


def _answered() -> bool:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(0.2)
        s.sendto(b"there?", (SERVER_IP, 7))
        try:
            return s.recv(100) == b"there?"
        except TimeoutError:
            return False


@contextmanager
def _started(lab: Lab, variant: str) -> Iterator[Server]:
    if variant == "testpmd":
        with _testpmd(lab) as server:
            yield server
        return
    with network.start(lab, variant) if variant not in WIRED else python_server(lab, variant) as server:
        yield server


def missing() -> str:
    return "" if shutil.which(TESTPMD) else f"{TESTPMD} (apt-get install dpdk-dev)"


def run(
    rounds: int, warmup_ms: int, measure_ms: int, step: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """By test: what each variant did, and ratios of rates within rounds."""
    if missing():
        raise BenchError(f"missing: {missing()}")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {t.name: {} for t in TESTS}
    names = list(VARIANTS)
    with (
        Lab(f"{os.getpid()}-wire", queues=1, wire=True) as wire,
        Lab(f"{os.getpid()}-bench", queues=1) as plain,
    ):
        for number in range(rounds):
            turn = number % len(names)
            for variant in names[turn:] + names[:turn]:
                lab = wire if variant in WIRED else plain
                with _started(lab, variant) as server:
                    for test in TESTS:
                        if applies(variant, test):
                            step(f"round {number + 1}: {VARIANTS[variant]}: {test.title}")
                            result = network.measure(lab, server, test, warmup_ms, measure_ms)
                            found[test.name].setdefault(variant, []).append(result)
    return {t.name: _summary(t, found[t.name]) for t in TESTS}


def _summary(test: Test, by_variant: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    keys = ("rate", "cpu_s") if test.bulk else ("rate", "cpu_s", "p50_us", "p99_us")
    return {
        "title": test.title,
        "unit": "Gbit/s" if test.bulk else "operations/s",
        "variants": {
            variant: {key: spread([r[key] for r in results]) for key in keys}
            for variant, results in by_variant.items()
        },
        "ratios": {
            name: ratios([r["rate"] for r in by_variant[a]], [r["rate"] for r in by_variant[b]])
            for name, a, b in RATIOS
            if a in by_variant and b in by_variant
        },
    }
