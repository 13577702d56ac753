# SPDX-License-Identifier: Apache-2.0
"""What a server that was killed may not leave: processes, BPF programs, maps and links, what is attached to the
interface, interfaces (a TAP), socket files, names of sockets, files of shared memory and of DPDK, frames of a port. (A
memfd ends with the last process that has it.)"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from bench.mixed.leftovers import still_there
from bypass import netns
from bypass.broker.tools import listening
from bypass.fwd import Forwarder
from bypass.lab import SERVER_IFNAME, Lab
from bypass.records import OF_NAMESPACES

__all__ = ["Residue", "Stay", "frames_of_port"]

FOLDERS = (Path("/run/bypass"), Path("/dev/shm"), Path("/sys/fs/bpf"))
DPDK_FOLDERS = (Path("/run/dpdk"), Path("/dev/hugepages"))


def _attached(lab: Lab) -> set[str]:
    """XDP and tc programs of the interface."""
    found = set()
    for argv in (
        ["ip", "-o", "link", "show", lab.server_ifname],
        ["tc", "filter", "show", "dev", lab.server_ifname, "egress"],
    ):
        done = subprocess.run(lab.command("server", argv), capture_output=True, text=True, check=True)
        found |= {
            f"attached: {line.strip()}" for line in done.stdout.splitlines() if "xdp" in line or "bpf" in line
        }
    return found


def _socket_names(lab: Lab) -> set[str]:
    """Unix sockets of the server's namespace whose name speaks of bypass."""

    def read() -> set[str]:
        lines = Path("/proc/thread-self/net/unix").read_text().splitlines()
        return {f"socket: {line.split()[-1]}" for line in lines if "bypass" in line}

    return netns.run(lab.server_ns, read)


def _files(lab: Lab) -> set[str]:
    """Those that speak of bypass; of ports that brokers took from the kernel and of a NIC's rules: this namespace's."""
    cookie = netns.run(lab.server_ns, netns.cookie)
    found = {
        path for folder in FOLDERS if folder.is_dir() for path in folder.rglob("*") if "bypass" in str(path)
    }
    others = {
        path
        for path in found
        if path in OF_NAMESPACES or (path.parent in OF_NAMESPACES and not path.name.startswith(cookie))
    }
    ours = {f"file: {path}" for path in found - others}
    dpdks = {
        path for folder in DPDK_FOLDERS if folder.is_dir() for path in folder.rglob("*") if path.is_file()
    }
    return ours | ({f"file: {path}" for path in dpdks} if lab.wire else set())


def _interfaces(lab: Lab) -> set[str]:
    return {f"interface: {name}" for _, name in netns.run(lab.server_ns, socket.if_nameindex)}


class Residue:
    """What is there before a world begins; check() is called when it has ended."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._before = self._now()

    def _now(self) -> set[str]:
        processes = {f"process: {name} ({pid})" for pid, name in netns.processes(self.lab.server_ns).items()}
        names = _socket_names(self.lab) | _interfaces(self.lab)
        return processes | _attached(self.lab) | names | _files(self.lab)

    def check(
        self, objects: set[tuple[str, int]], seconds: float = 3.0, objects_s: float = 10.0
    ) -> list[str]:
        """What is left after this time at most, and which of the BPF objects that the world had, after theirs (the
        kernel frees them a moment later)."""
        deadline = time.monotonic() + seconds
        while (left := self._now() - self._before) and time.monotonic() < deadline:
            time.sleep(0.05)
        return sorted(left) + [
            f"BPF {kind} {number}" for kind, number in sorted(still_there(objects, objects_s))
        ]


AT_REST = {"stack": 0, "stack_tx": 0, "misplaced": 0, "bad_free": 0}


def frames_of_port(lab: Lab, seconds: float = 3.0) -> list[str]:
    """Frames of the lab's DPDK port that are not free, nor with its driver, although nobody uses it any more."""

    def look() -> dict[str, int]:
        (name,) = (n for n in listening() if n.startswith(f"@bypass/fwd/{SERVER_IFNAME}/"))
        forwarder = Forwarder.connect(name, broker=False)
        try:
            found = forwarder.dpdk_audit()
        finally:
            forwarder.close()
        return {place: found[place] for place in AT_REST}

    deadline = time.monotonic() + seconds
    while (found := netns.run(lab.server_ns, look)) != AT_REST and time.monotonic() < deadline:
        time.sleep(0.02)
    return [] if found == AT_REST else [f"frames of the port: {found}"]


class Stay:
    """What processes that stay in the server's namespace are, and how many descriptors each has: memory, BPF objects
    and sockets of a killed one are descriptors in others. Other ones of a name may take the place of those that go."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.names, self.files = self._now()

    def _now(self) -> tuple[Counter[str], dict[int, int]]:
        there = netns.processes(self.lab.server_ns)
        files = {}
        for pid in there:
            with suppress(FileNotFoundError):
                files[pid] = len(os.listdir(f"/proc/{pid}/fd"))
        return Counter(there.values()), files

    def check(self, seconds: float = 3.0) -> list[str]:
        """What is more than then, after this time at most."""
        deadline = time.monotonic() + seconds
        while (more := self._more()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return more

    def _more(self) -> list[str]:
        names, files = self._now()
        found = [f"{n} processes {name}" for name, n in (names - self.names).items()]
        for pid, n in files.items():
            if n > self.files.get(pid, n):
                found.append(f"{n - self.files[pid]} descriptors of process {pid}")
        return found
