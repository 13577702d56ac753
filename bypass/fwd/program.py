# SPDX-License-Identifier: Apache-2.0
"""The program bypass-fwd: where it is, starting it, and finding one that runs."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from bypass.app import forwarder_program
from bypass.fwd.records import ForwarderError


def binary() -> Path:
    """The program: of the build that this process uses, else where it is installed.

    Raises:
        BypassError: it is nowhere.
    """
    build = os.environ.get("BYPASS_BUILD")  # .../build/VARIANT/py of a build other than the release
    return Path(build).parent / "bypass-fwd" if build else forwarder_program()


def start(
    listen: str | None, *, hold: bool, spin_us: int | None, cpu: int | None, program: Path | None
) -> tuple[socket.socket, int]:
    """A process of it, with its arguments as of `Forwarder.start()`: the connection to it, and its number."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = str(program or binary())
    args = [path]
    for name, value in (("listen", listen), ("spin", spin_us), ("cpu", cpu)):
        args += [f"--{name}", str(value)] if value is not None else []
    args += ["--hold"] if hold else []
    with its:
        onto_3 = [(os.POSIX_SPAWN_DUP2, its.fileno(), 3)]
        child = os.posix_spawn(path, args, os.environ, file_actions=onto_3, setsid=True)
    return ours, child


def connect(name: str) -> socket.socket:
    """A connection to one that listens there: an absolute path, or @name.

    Raises:
        ForwarderError: nobody does, or somebody else.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"\0{name[1:]}" if name.startswith("@") else name)
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        sock.setblocking(True)
    except OSError as e:
        sock.close()
        raise ForwarderError(f"no bypass-fwd at {name}: {e.strerror}") from None
    if uid != os.geteuid():  # anybody may listen at an abstract name
        sock.close()
        raise ForwarderError(f"{name} is user {uid}'s")
    return sock
