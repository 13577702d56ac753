# SPDX-License-Identifier: Apache-2.0
"""Who asks: users as the kernel knows them at the other end of a socket, and which rules they may use."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass

SO_PEERGROUPS = 59  # asm-generic/socket.h
SO_PEERPIDFD = 77
MAX_GROUPS = 65536


@dataclass(frozen=True, slots=True)
class User:
    """A user and its groups.

    Attributes:
        trusted: root, the user who runs the broker, or the one whose private broker it is: may use every rule.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    trusted: bool


def peer_of(sock: socket.socket, trusted: Collection[int]) -> tuple[int, User]:
    """The process at the other end (0: of another pid namespace) and its user, as they were when it connected."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = array.array("I")
    groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024))
    return pid, User(uid, gid, frozenset((gid, *groups)), uid in trusted)


def pidfd_of(sock: socket.socket, pid: int) -> int:
    """A descriptor that becomes readable when that process ends; -1: it has ended, or cannot be seen."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return int(struct.unpack("i", raw)[0])
    except OSError:
        pass  # before Linux 6.5, or it was reaped already
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1
