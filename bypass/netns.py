# SPDX-License-Identifier: Apache-2.0
"""Network namespaces by name, as `ip netns` keeps them: make, remove, enter, and who lives in them.

Source: network_namespaces(7), setns(2), ip-netns(8).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from bypass import procfs
from bypass.errors import LabError

RUN_DIR = Path("/run/netns")
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
ENDED = (FileNotFoundError, ProcessLookupError)  # while we looked

P = ParamSpec("P")
T = TypeVar("T")


def _setns(fd: int) -> None:
    """Moves the calling thread, and no other, into the network namespace that fd names (os.setns is 3.12's)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"setns: {os.strerror(err)}")


def cookie() -> str:
    """A name of the calling thread's network namespace that no other one ever has, until the next boot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return s.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)[::-1].hex()


def cookies() -> set[str]:
    """Those of all network namespaces in which a thread is, or which mounts (names) and descriptors keep of processes
    that we may look into. One that nothing but a socket or a device keeps is not found: nobody enters it any more.

    Raises:
        OSError: a thread is in one that this process may not enter.
    """
    nsfs = os.stat("/proc/self/ns/net").st_dev
    doors: dict[int, int] = {}  # open as long as we look: an inode's number is used again, a cookie is not
    strangers: set[int] = set()
    seen: set[str] = set()

    def keep(door: Path) -> None:
        about = door.stat()
        if about.st_dev == nsfs and about.st_ino not in doors:
            doors[about.st_ino] = os.open(door, os.O_RDONLY | os.O_CLOEXEC)

    try:
        for process in Path("/proc").glob("[0-9]*"):
            for thread in _threads(process):
                with suppress(*ENDED):
                    try:
                        keep(thread / "ns/net")
                    except PermissionError:
                        strangers.add((thread / "net/dev").stat().st_ino)
            for door in _kept(process, seen):
                with suppress(*procfs.GONE):
                    keep(door)
        found = dict(map(_within, doors.values()))
    finally:
        for fd in doors.values():
            os.close(fd)
    if not strangers <= set(found):
        raise PermissionError(
            errno.EACCES, "there are network namespaces that this process may not look into"
        )
    return set(found.values())


def _threads(process: Path) -> list[Path]:
    with suppress(*ENDED):
        return list((process / "task").iterdir())
    return []


def _kept(process: Path, seen: set[str]) -> Iterator[Path]:
    """Network namespaces that its descriptors and mounts keep. `seen`: mount namespaces."""
    found = procfs.descriptors(int(process.name))
    yield from (path for path, target in found if target.startswith("net:["))
    with suppress(*procfs.GONE):
        if (mounts := os.readlink(process / "ns/mnt")) in seen:
            return
        lines = (process / "mountinfo").read_text().splitlines()
        seen.add(mounts)
        for fields in map(str.split, lines):
            if fields[3].startswith("net:["):  # proc(5): the root of the mount, then where it is
                where = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
                yield process / "root" / where.lstrip("/")


def _within(fd: int) -> tuple[int, str]:
    """Of a namespace: the inode of a file that says nothing else and that everybody may ask for, and its cookie."""
    with entered_fd(fd):
        return os.stat("/proc/thread-self/net/dev").st_ino, cookie()


def names(prefix: str = "") -> list[str]:
    """The named namespaces of this machine that begin with prefix, sorted."""
    try:
        return sorted(p.name for p in RUN_DIR.iterdir() if p.name.startswith(prefix))
    except FileNotFoundError:
        return []


def name_of(inode: int) -> str:
    """What a namespace with this inode is called: its name, or as /proc/PID/ns/net has it."""
    for name in names():
        with suppress(*procfs.GONE):
            if (RUN_DIR / name).stat().st_ino == inode:
                return name
    return f"net:[{inode}]"


def exists(name: str) -> bool:
    return (RUN_DIR / name).exists()


def create(name: str) -> None:
    """Makes a namespace, with its loopback down. FileExistsError, PermissionError."""
    import pyroute2

    pyroute2.netns.create(name)


def remove(name: str) -> None:
    """Removes the name; the namespace ends with the last process or socket in it. FileNotFoundError."""
    import pyroute2

    pyroute2.netns.remove(name)


@contextmanager
def entered(name: str) -> Iterator[None]:
    """The calling thread is in namespace `name` until the end of the block; other threads stay where they are.

    Sockets made inside stay in that namespace after the block. Threads started inside begin in it too.

    Raises:
        LabError: there is no such namespace.
    """
    try:
        target = os.open(RUN_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LabError(f"no network namespace {name!r}; there are: {', '.join(names()) or 'none'}") from None
    try:
        with entered_fd(target):
            yield
    finally:
        os.close(target)


@contextmanager
def entered_fd(fd: int) -> Iterator[None]:
    """The same for a namespace by its descriptor. OSError: it is none, or this process may not."""
    home = _own()
    try:
        _setns(fd)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def unnamed() -> int:
    """A new namespace that has no name, with its loopback up: a descriptor. It ends with the last one, and the last
    socket and device in it. OSError: this process may not (CAP_SYS_ADMIN)."""
    home, libc = _own(), ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            err = ctypes.get_errno()
            raise OSError(err, f"unshare: {os.strerror(err)}")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
            return _own()
        finally:
            _setns(home)
    finally:
        os.close(home)


def _own() -> int:
    """Of the calling thread."""
    return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def run(name: str, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """func(*args, **kwargs) in namespace `name`. What it raises is raised here."""
    with entered(name):
        return func(*args, **kwargs)


def processes(name: str) -> dict[int, str]:
    """Processes whose main thread is in namespace `name`: pid -> command name."""
    try:
        want = (RUN_DIR / name).stat()
    except FileNotFoundError:
        return {}
    found = {}
    for pid in procfs.pids():
        with suppress(*procfs.GONE):
            have = (procfs.PROC / str(pid) / "ns/net").stat()
            if os.path.samestat(have, want) and (command := procfs.name_of(pid)) is not None:
                found[pid] = command
    return found
