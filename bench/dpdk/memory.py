# SPDX-License-Identifier: Apache-2.0
"""In memory: two processes on two cores, joined by memif. Both spin; the client is the stack in each case.

What answers is the stack, or a loop that swaps addresses and ports of each frame (the least that can answer; UDP only).
The difference is what the stack adds to driver and device. And instructions of a request and response, the driver
included, counted by callgrind.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import instructions
from bench.figures import ratios, spread
from bench.network import Test
from bench.programs import (
    CLIENT_CORE,
    ROOT,
    SERVER_CORE,
    BenchError,
    pinned,
    program,
    run_json,
)

SERVER_MAC, CLIENT_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"


TESTS = (
    Test("memory_udp_1", "UDP echo, 1 in flight", "udp", 1),
    Test("memory_udp_32", "UDP echo, 32 in flight", "udp", 32),
    Test("memory_tcp_1", "TCP request/response, 1 connection", "tcp", 1),
    Test("memory_tcp_32", "TCP request/response, 32 connections", "tcp", 32),
    Test("memory_tcp_256", "TCP request/response, 256 connections", "tcp", 256),
    Test("memory_to_server", "bulk, client to server", "up", 1),
    Test("memory_to_client", "bulk, server to client", "down", 1),
)
SERVERS = ("stack", "bare")
RUNS = sum(2 if t.mode == "udp" else 1 for t in TESTS)  # of a round


VHOST_MAC = "56:48:4f:53:54:00"  # of net_vhost0, which takes no other


def memif(role: str, folder: Path, mac: str) -> str:
    return f"net_memif0,role={role},socket={folder}/memif.sock,socket-abstract=no,mac={mac}"


def once(server: str, test: Test, warmup_ms: int, measure_ms: int, *, vhost: bool = False) -> dict[str, Any]:
    """One run of the client against a server of its own. vhost: joined by a vhost-user socket in place of memif."""
    with tempfile.TemporaryDirectory(prefix="bypass-bench-") as name:
        folder = Path(name)
        if vhost:
            mac, ends = VHOST_MAC, [f"net_vhost0,iface={folder}/vhost.sock"]
            ends.append(f"net_virtio_user0,path={folder}/vhost.sock,mac={CLIENT_MAC}")
        else:
            mac = SERVER_MAC
            ends = [memif("server", folder, mac), memif("client", folder, CLIENT_MAC)]
        argv = [program("dpdk_answer"), server, ends[0], CLIENT_MAC]
        with subprocess.Popen(
            pinned(SERVER_CORE, argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as answering:
            assert answering.stdout is not None
            if answering.stdout.readline().strip() != "ready":
                raise BenchError(f"{' '.join(argv)} did not start")
            ask = [program("dpdk_ask"), test.mode, ends[1], mac, str(test.parallel)]
            raw = run_json(
                pinned(CLIENT_CORE, [*ask, str(warmup_ms), str(measure_ms), str(answering.pid)]),
                timeout=60 + (warmup_ms + measure_ms) / 1000,
            )
            answering.communicate(timeout=20)
    done = raw["bytes"] * 8 / 1e9 if test.bulk else raw["ops"]
    return raw | {"rate": done / raw["seconds"]}


def run(
    rounds: int, warmup_ms: int, measure_ms: int, step: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """By test: rates and latencies of each server, and the stack's rate in those of the bare loop."""
    found = {}
    for test in TESTS:
        servers = [s for s in SERVERS if s == "stack" or test.mode == "udp"]
        runs: dict[str, list[dict[str, Any]]] = {s: [] for s in servers}
        for number in range(rounds):
            for server in servers if number % 2 == 0 else servers[::-1]:
                step(f"round {number + 1}: in memory, {server}: {test.title}")
                runs[server].append(once(server, test, warmup_ms, measure_ms))
        about: dict[str, Any] = {"title": test.title, "parallel": test.parallel}
        about["unit"] = "Gbit/s" if test.bulk else "operations/s"
        about["variants"] = {
            server: {
                key: spread([r[key] for r in results])
                for key in ("rate", "p50_us", "p99_us")
                if key in results[0]
            }
            for server, results in runs.items()
        }
        if "bare" in runs:
            about["ratio"] = ratios([r["rate"] for r in runs["stack"]], [r["rate"] for r in runs["bare"]])
        found[test.name] = about
    return found


def count(operations: int, connections: int) -> dict[str, Any]:
    """Instructions of a request and response on the server's side; both ends of the memif are in one process."""
    with tempfile.TemporaryDirectory(prefix="bypass-bench-") as name:
        ends = [
            memif("server", Path(name), SERVER_MAC),
            memif("client", Path(name), CLIENT_MAC).replace("0,", "1,", 1),
        ]
        answered, functions, files = instructions.counted(
            "dpdk_count", [str(operations), str(connections), *ends]
        )
    stack = sum(n for file, n in files.items() if (ROOT / "bypass" / "stack" / file).exists())
    netdev = sum(n for file, n in files.items() if (ROOT / "bypass" / "dpdk_backend" / "eth" / file).exists())
    total = sum(functions.values())
    return {
        "operations": answered,
        "connections": connections,
        "per_request": total / answered,
        "stack": stack / answered,
        "netdev": netdev / answered,
        "driver": (total - stack - netdev - files["rr_counted.h"]) / answered,
        "functions": {name: n / answered for name, n in functions.most_common(instructions.TOP)},
    }
