# SPDX-License-Identifier: Apache-2.0
"""Rates, latency and CPU over one veth pair: bare ring-to-ring echo, the stack, the kernel, by the same client.

Each round starts every server variant once, in an order that turns from round to round, and runs all tests against
it. Ratios are taken within a round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.figures import Spread, ratios, spread
from bench.programs import (
    CLIENT_CORE,
    SERVER_CORE,
    Server,
    ksoftirqd_pids,
    pinned,
    program,
    python_server,
    run_json,
)
from bypass import netns
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab

REQUEST_BYTES = 64


@dataclass(frozen=True)
class Test:
    """One thing that the client does. `mode` and `parallel` are the client's arguments (bench/client.c)."""

    name: str
    title: str
    mode: str
    parallel: int

    @property
    def bulk(self) -> bool:
        return self.mode in ("up", "down")


TESTS = (
    Test("udp_echo_1", "UDP echo, 1 in flight", "udp", 1),
    Test("udp_echo_32", "UDP echo, 32 in flight", "udp", 32),
    Test("tcp_rr_1", "TCP request/response, 1 connection", "tcp", 1),
    Test("tcp_rr_32", "TCP request/response, 32 connections", "tcp", 32),
    Test("tcp_rr_256", "TCP request/response, 256 connections", "tcp", 256),
    Test("bulk_to_server", "bulk, client to server", "up", 1),
    Test("bulk_to_client", "bulk, server to client", "down", 1),
)

# The letter is the role in the ratios: (a) bare echo, (b) this stack, (c) the kernel, (d) for information.
VARIANTS: dict[str, tuple[str, str]] = {
    "bare-spin": ("a", "ring to ring, spinning"),
    "bare-sleep": ("a", "ring to ring, sleeping"),
    "bypass-spin": ("b", "bypass, spinning"),
    "bypass-sleep": ("b", "bypass, sleeping"),
    "bypass-csum": ("b", "bypass, sleeping, checksums left to the device"),
    "kernel": ("c", "kernel sockets, epoll"),
    "kernel-offload": ("c", "kernel, with checksum and segmentation offload"),
    "python": ("d", "bypass, asyncio echo in Python"),
}
RATIOS = (
    ("b/a spin", "bypass-spin", "bare-spin"),
    ("b/a sleep", "bypass-sleep", "bare-sleep"),
    ("b/c spin", "bypass-spin", "kernel"),
    ("b/c sleep", "bypass-sleep", "kernel"),
    ("b/c offload", "bypass-sleep", "kernel-offload"),
    ("b csum/b", "bypass-csum", "bypass-sleep"),
)


def applies(variant: str, test: Test) -> bool:
    """Not every variant can do every test: a bare echo moves no streams, offloads change only bulk."""
    if variant.startswith("bare"):
        return not test.bulk
    if variant == "kernel-offload":
        return test.bulk
    if variant == "bypass-csum":
        return test.mode == "down"
    if variant == "python":
        return test.mode == "tcp"
    return True


def start(lab: Lab, variant: str) -> Server:
    if variant.startswith("kernel"):
        return Server(lab, [program("server_kernel")], inside=True)
    return python_server(lab, variant)


def measure(lab: Lab, server: Server, test: Test, warmup_ms: int, measure_ms: int) -> dict[str, Any]:
    """One run of the client: what it printed, and rates per second and CPU per million operations from it."""
    pids = ",".join(str(p) for p in (server.pid, *ksoftirqd_pids()))
    client = [program("client"), test.mode, SERVER_IP, str(test.parallel), str(REQUEST_BYTES)]
    raw = run_json(
        [
            "ip", "netns", "exec", lab.client_ns,
            *pinned(CLIENT_CORE, [*client, str(warmup_ms), str(measure_ms), pids]),
        ],
        timeout=60 + (warmup_ms + measure_ms) / 1000,
    )  # fmt: skip
    return derived(raw, test.bulk)


def derived(raw: dict[str, Any], bulk: bool) -> dict[str, Any]:
    """Adds what is computed: rate, CPU per million operations or per gigabyte, CPU that others used."""
    seconds = raw["seconds"]
    done = raw["bytes"] / 1e9 if bulk else raw["ops"] / 1e6
    cores = raw["core_cpu_s"][SERVER_CORE] + raw["core_cpu_s"][CLIENT_CORE]
    rate = raw["bytes"] * 8 / 1e9 / seconds if bulk else raw["ops"] / seconds
    return raw | {
        "rate": rate,
        "cpu_s": raw["task_cpu_s"] / done if done else float("inf"),
        "cores_cpu_s": cores / done if done else float("inf"),
        "other_cpu_share": max(0.0, cores - raw["task_cpu_s"]) / (2 * seconds),
    }


def set_offloads(lab: Lab, on: bool, *, client: bool = True) -> None:
    """Transmit checksum offload on both ends (or the server's alone); segmentation offload follows it. A lab begins
    without. The kernel's client never leaves sums to a veth whose other end is AF_XDP: nobody would complete them."""
    netns.run(lab.server_ns, _set_offload, SERVER_IFNAME, on)
    if client:
        netns.run(lab.client_ns, _set_offload, CLIENT_IFNAME, on)


def _set_offload(ifname: str, on: bool) -> None:
    from pyroute2.ethtool.ioctl import IoctlEthtool

    ethtool = IoctlEthtool(ifname)
    try:
        features = ethtool.get_features()
        features["tx-checksum-ip-generic"] = on
        ethtool.set_features(features)
    finally:
        ethtool.close()


@contextmanager
def _offloads(lab: Lab, variant: str) -> Iterator[None]:
    """With the offloads that the variant has inside the block."""
    wanted = variant in ("kernel-offload", "bypass-csum")
    if wanted:
        set_offloads(lab, True, client=variant == "kernel-offload")
    try:
        yield
    finally:
        if wanted:
            set_offloads(lab, False)


def run(
    lab: Lab,
    *,
    rounds: int,
    warmup_ms: int,
    measure_ms: int,
    variants: Iterable[str] = tuple(VARIANTS),
    step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """All rounds. `step` is told what is about to run. The result is `tests` and `counters` of bench.json."""
    names = list(variants)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {t.name: {} for t in TESTS}
    counters: dict[str, Counter[str]] = {}
    for number in range(rounds):
        turn = number % len(names)
        for variant in names[turn:] + names[:turn]:
            with _offloads(lab, variant), start(lab, variant) as server:
                for test in TESTS:
                    if applies(variant, test):
                        step(f"round {number + 1}: {VARIANTS[variant][1]}: {test.title}")
                        result = measure(lab, server, test, warmup_ms, measure_ms)
                        runs[test.name].setdefault(variant, []).append(result)
            for part, counts in server.report.items():
                counters.setdefault(f"{variant} {part}", Counter()).update(counts)
    tests = {t.name: summary(t, runs[t.name]) for t in TESTS}
    return {"tests": tests, "counters": {name: dict(c) for name, c in counters.items()}}


def summary(test: Test, by_variant: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    variants = {}
    for variant, results in by_variant.items():
        about: dict[str, Any] = {"role": VARIANTS[variant][0], "title": VARIANTS[variant][1]}
        for key in ("rate", "cpu_s", "cores_cpu_s", "other_cpu_share"):
            about[key] = spread([r[key] for r in results])
        for key in () if test.bulk else ("p50_us", "p99_us"):
            about[key] = spread([r[key] for r in results])
        about["lost"] = sum(r["lost"] for r in results)
        variants[variant] = about
    rates: dict[str, Spread] = {}
    cpu: dict[str, Spread] = {}
    for name, b, other in RATIOS:
        if b in by_variant and other in by_variant:
            rates[name] = ratios([r["rate"] for r in by_variant[b]], [r["rate"] for r in by_variant[other]])
            if "spin" not in b + other:  # who spins uses a core whatever he does
                cpu[name] = ratios(
                    [r["cpu_s"] for r in by_variant[b]], [r["cpu_s"] for r in by_variant[other]]
                )
    return {
        "title": test.title,
        "unit": "Gbit/s" if test.bulk else "operations/s",
        "cpu_unit": "CPU seconds per gigabyte" if test.bulk else "CPU seconds per million operations",
        "parallel": test.parallel,
        "variants": variants,
        "ratios": rates,
        "cpu_ratios": cpu,
    }
