# SPDX-License-Identifier: Apache-2.0
"""What needs no network: bulk over the simulated wire, and the memory of an idle connection."""

from __future__ import annotations

from typing import Any

from bypass._core import ffi, lib

from bench.figures import spread
from bench.programs import SERVER_CORE, pinned, program, run_json

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


def idle_connection() -> dict[str, Any]:
    """Bytes of arena that one more connection takes, between one and two million of them: both halves of its
    state, its place in the flow table, its handle; the timer is part of the state."""

    def arena(conns: int) -> int:
        cfg = ffi.new("struct bypass_config *")
        lib.bypass_config_default(cfg, conns)
        return int(lib.bypass_arena_size(cfg))

    million = 1_000_000
    return {
        "bytes": (arena(2 * million) - arena(million)) / million,
        "budget": IDLE_BUDGET_BYTES,
        "arena_bytes_1m": arena(million),
    }
