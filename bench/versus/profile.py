# SPDX-License-Identifier: Apache-2.0
"""Where a server's processor time goes, by perf: samples of its processes and of what receives for it, put into groups
by the innermost function, and for the kernel by whom it was called (as in bench/costs.py).

What of it is this project's is told by the object file that a function was compiled into.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import costs
from bench.programs import ROOT, BenchError
from bench.recording import Recording

__all__ = ["OURS", "groups_of", "missing", "owners", "record"]

LIBRARY = "libbypass-preload.so"
STACK = "the stack: protocol, checksums, copies"
SURFACE = "descriptors: the calls of the program (bypass/preload)"
RINGS = "rings of the device, on the program's side"
PROGRAM = "the program itself and its libraries"
OURS = (STACK, SURFACE, RINGS)
FOLDERS = {"stack": STACK, "preload": SURFACE, "afxdp": RINGS, "fwd": RINGS, "app": RINGS}
SERVER_RECEIVE = "reception: the kernel's TCP/IP, or XDP and AF_XDP, by the interface's thread"
KERNEL_SOCKETS = "the kernel's sockets: TCP in calls of the program"
SOCKET_CALLS = (
    "sock_write_iter",
    "sock_read_iter",
    "__sys_sendto",
    "__sys_recvfrom",
    "sock_sendmsg",
    "sock_recvmsg",
)
RECEIVERS = ("napi_threaded_poll", "napi_threaded_poll_loop", "net_rx_action", "__napi_poll", "veth_poll")
TOP = 15

missing = costs.missing


def owners(build: Path = ROOT / "build" / "release" / "bypass") -> dict[str, str]:
    """Function -> group, from the symbols of the object files."""
    found: dict[str, str] = {}
    for folder, group in FOLDERS.items():
        objects = sorted((build / folder).glob("*.o"))
        if not objects:
            continue
        done = subprocess.run(["nm", "--defined-only", *objects], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in "tT":
                found[words[2].partition(".")[0]] = group
    return found


def group_of(chain: list[costs.Frame], owner: dict[str, str]) -> str:
    function, dso = chain[0]
    if dso == LIBRARY:
        return owner.get(function.partition(".")[0], SURFACE)
    if not dso.startswith(("[kernel", "[unknown", "[guest", "bpf_prog_")):
        return PROGRAM
    if dso.startswith("bpf_prog_"):
        return costs.BPF
    functions = {name for name, _ in chain}
    if functions.intersection(RECEIVERS):
        return SERVER_RECEIVE
    if functions.intersection(SOCKET_CALLS) and not functions.intersection(costs.KERNEL_GROUPS[1][1]):
        return KERNEL_SOCKETS
    return next(
        (title for title, names in costs.KERNEL_GROUPS[1:] if functions.intersection(names)),
        costs.OTHER_KERNEL,
    )


def groups_of(chains: Iterable[list[costs.Frame]], owner: dict[str, str]) -> dict[str, Any]:
    """`groups`: share of each; `ours`: of all that is this project's and runs in the program; `functions`: the largest.

    Raises:
        BenchError: there are no samples.
    """
    groups: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for chain in chains:
        groups[group_of(chain, owner)] += 1
        functions[f"{chain[0][0]} ({chain[0][1]})"] += 1
    total = groups.total()
    if not total:
        raise BenchError("perf took no samples")
    return {
        "samples": total,
        "ours": sum(groups[name] for name in OURS) / total,
        "groups": {name: n / total for name, n in groups.most_common()},
        "functions": {name: n / total for name, n in functions.most_common(TOP)},
    }


def record(pids: Iterable[int]) -> Recording:
    """BenchError: perf is missing."""
    if missing():
        raise BenchError(f"missing: {missing()}")
    return Recording(pids)
