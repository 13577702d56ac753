# SPDX-License-Identifier: Apache-2.0
"""Who has AF_XDP sockets: for the message when a queue is busy.

Source: sock_diag(7), linux/xdp_diag.h (kernel 4.21, CONFIG_XDP_SOCKETS_DIAG), proc(5).
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from bypass import procfs

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP = 0x001, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
AF_XDP = 44
XDP_SHOW_INFO = 1
XDP_DIAG_INFO = 1
FILL_RING_OFFSET = 0x100000000  # XDP_UMEM_PGOFF_FILL_RING: how a fill ring shows in /proc/PID/maps


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, and whether it is known to be the one (`certain`) or only has AF_XDP rings of some queue."""

    pid: int
    name: str
    certain: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.pid})"


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Netlink messages: type and payload."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            return
        yield kind, data[16:length]
        data = data[(length + 3) & ~3 :]


def _attribute(data: bytes, wanted: int) -> bytes | None:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return None
        if kind == wanted:
            return data[4:length]
        data = data[(length + 3) & ~3 :]
    return None


def _inodes(ifindex: int, queue: int) -> set[int] | None:
    """Inodes of the AF_XDP sockets bound to a queue. None: this kernel does not tell."""
    show = struct.pack("=BBHIIII", AF_XDP, 0, 0, 0, XDP_SHOW_INFO, 0xFFFFFFFF, 0xFFFFFFFF)
    head = struct.pack("=IHHII", 16 + len(show), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    found: set[int] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as s:
        s.settimeout(1.0)
        s.send(head + show)
        while True:
            for kind, payload in _messages(s.recv(1 << 16)):
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    return None
                inode = struct.unpack_from("=I", payload, 4)[0]
                info = _attribute(payload[16:], XDP_DIAG_INFO)
                if info is not None and struct.unpack_from("=II", info) == (ifindex, queue):
                    found.add(inode)


def _owns(pid: int, inodes: set[int]) -> bool:
    names = {f"socket:[{inode}]" for inode in inodes}
    return any(target in names for _, target in procfs.descriptors(pid))


def _has_fill_ring(pid: int) -> bool:
    with suppress(*procfs.GONE):
        for line in (procfs.PROC / str(pid) / "maps").read_bytes().splitlines():
            match = re.match(rb"\S+ \S+ ([0-9a-f]+) .* socket:\[\d+\]$", line)
            if match and int(match.group(1), 16) == FILL_RING_OFFSET:
                return True
    return False


def queue_holders(ifindex: int, queue: int) -> list[Holder]:
    """The processes that hold an AF_XDP socket on a queue of this network namespace.

    On a kernel without CONFIG_XDP_SOCKETS_DIAG: every process that has AF_XDP rings mapped, `certain` false.
    Processes of other users are seen only with privilege. A socket whose process is gone has no holder.
    """
    try:
        inodes = _inodes(ifindex, queue)
    except OSError:
        inodes = None
    return [
        Holder(pid, name, inodes is not None)
        for pid in procfs.pids()
        if (_owns(pid, inodes) if inodes is not None else _has_fill_ring(pid))
        and (name := procfs.name_of(pid)) is not None
    ]
