# SPDX-License-Identifier: Apache-2.0
"""Whose processor time is whose.

On a veth the sender's core runs the receiver's softirq: the client would pay for what the server's kernel does with its
packets. So both interfaces are received by threads of the kernel (NAPI, /sys/class/net/IFACE/threaded), each pinned to
its own side's core, as the interrupt of a NIC would be. What the server costs is then the run time of its processes,
of this thread, and of its core's ksoftirqd (/proc/PID/task/TID/schedstat).

Source: kernel Documentation/networking/napi.rst; proc(5).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.apps.place import Place
from bench.programs import CLIENT_CORE, SERVER_CORE, BenchError
from bypass import netns
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, Lab

__all__ = ["pinned_reception", "server_tasks"]


def _kernel_threads(prefix: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().startswith(prefix):
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _in(lab: Lab, side: str, *argv: str) -> None:
    done = subprocess.run(lab.command(side, argv), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(argv)}: {done.stderr.strip()}")


def _receive_by_threads(lab: Lab, side: str, ifname: str) -> set[int]:
    """Switches it on; the threads. (A veth has NAPI without XDP only where GRO is on.)"""
    before = _kernel_threads("napi/")
    _in(lab, side, "ethtool", "-K", ifname, "gro", "on")
    _in(lab, side, "sh", "-c", f"echo 1 > /sys/class/net/{ifname}/threaded")
    return _kernel_threads("napi/") - before


@contextmanager
def pinned_reception(lab: Lab, *, pin: bool = True) -> Iterator[set[int]]:
    """Both ends of a fresh lab are received by threads; those of the server, inside. They end with the lab.

    Raises:
        BenchError: the kernel has no such threads.
    """
    server = _receive_by_threads(lab, "server", SERVER_IFNAME)
    client = _receive_by_threads(lab, "client", CLIENT_IFNAME)
    if len(server) != lab.queues or len(client) != lab.queues:
        raise BenchError(f"{len(server)} and {len(client)} threads receive {lab.queues} queues")
    for core, threads in ((SERVER_CORE, server), (CLIENT_CORE, client)):
        for pid in threads if pin else ():
            os.sched_setaffinity(pid, {core})
    yield server


def server_tasks(place: Place, receivers: set[int]) -> list[int]:
    """The processes of the server's namespace, and what receives for it."""
    own = set(netns.processes(place.lab.server_ns)) - {os.getpid()}
    return sorted(own | receivers | _kernel_threads(f"ksoftirqd/{SERVER_CORE}"))
