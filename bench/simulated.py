# SPDX-License-Identifier: Apache-2.0
"""What needs no network: bulk over the simulated wire, copies of payload, the memory of an idle connection."""

from __future__ import annotations

from typing import Any

from bypass._core import ffi, lib

from bench.figures import ratios, spread
from bench.programs import SERVER_CORE, BenchError, pinned, program, run_json

BULK_BUDGET_GBIT = 20.0
IDLE_BUDGET_BYTES = 512


def bulk(rounds: int, megabytes: int = 1000, delay_us: int = 10) -> dict[str, Any]:
    """Both ends and the wire on one core; Gbit/s of payload by CPU time, so that other programs do not count."""
    runs = [
        run_json(pinned(SERVER_CORE, [program("sim_bulk"), str(megabytes), str(delay_us)]))
        for _ in range(rounds)
    ]
    return {
        "gbit_per_cpu_s": spread([r["bytes"] * 8 / r["cpu_ns"] for r in runs]),
        "budget": BULK_BUDGET_GBIT,
        "bytes": runs[0]["bytes"],
        "mss": runs[0]["mss"],
        "frames": runs[0]["frames"],
        "retransmits": sum(r["retransmits"] for r in runs),
    }


def copies(rounds: int, megabytes: int = 150) -> dict[str, Any]:
    """Payload bytes that the stack copies per byte delivered, with plain calls and with those that do not copy, one
    transfer each way; and what that is worth: CPU time of the one by that of the other, of the same round."""
    runs = [
        {
            mode: run_json(pinned(SERVER_CORE, [program("sim_copies"), str(megabytes), mode]))
            for mode in ("plain", "zc")
        }
        for _ in range(rounds)
    ]
    found: dict[str, Any] = {"bytes": runs[0]["plain"]["bytes"]}
    for name, mode in (("plain", "plain"), ("zero_copy", "zc")):
        last = runs[-1][mode]
        found[name] = {
            "sent": [last[f"{way}sender_copied"] / last["bytes"] for way in ("", "back_")],
            "received": [last[f"{way}receiver_copied"] / last["bytes"] for way in ("", "back_")],
            "gbit_per_cpu_s": spread([2 * r[mode]["bytes"] * 8 / r[mode]["cpu_ns"] for r in runs]),
        }
    found["cpu_ratio"] = ratios([r["zc"]["cpu_ns"] for r in runs], [r["plain"]["cpu_ns"] for r in runs])
    return found


def idle_connection(conns: int = 100_000) -> dict[str, Any]:
    """Resident bytes of an arena with so many idle connections, for each of them: both halves of its state, its
    place in the flow table, its handle, and its share of what every stack has. The timer is part of the state."""
    found = run_json([program("idle"), str(conns)])
    cfg = ffi.new("struct bypass_config *")
    lib.bypass_config_default(cfg, 1_000_000)
    return {
        "bytes": found["resident_bytes"] / found["conns"],
        "budget": IDLE_BUDGET_BYTES,
        "conns": found["conns"],
        "arena_bytes_1m": int(lib.bypass_arena_size(cfg)),
    }


def hostile(megabytes: int = 10_000, seed: int = 1) -> dict[str, Any]:
    """A transfer over a wire that loses 5 % of all frames, both ways, reorders 5 %, duplicates 1 % and corrupts 0.1 %.
    Every byte is compared. What bench/hostile.c prints.

    Raises:
        BenchError: bytes or hashes differ, the connection broke, or something was left.
    """
    chances = ("50000", "50000", "10000", "1000")  # parts per million
    found = run_json([program("hostile"), str(megabytes), *chances, str(seed)], timeout=3600)
    if found["sent_hash"] != found["received_hash"] or found["bytes"] != megabytes * 1_000_000:
        raise BenchError(f"what came is not what was sent: {found}")
    return found
