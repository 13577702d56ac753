# SPDX-License-Identifier: Apache-2.0
"""Notes below /run/bypass: what a process changed that does not end with it, so that the next one can undo it.

What lives here: how such a note is written, who may write at a time, whether its process and its network namespace are
still there. What does not: what notes say (`hwflow/held.py`, `pci/records.py`, `broker/blocks.py`, `hugepages.py`).

Source: proc(5) (stat), flock(2).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bypass import netns, procfs
from bypass.errors import DeviceError

__all__ = [
    "HWFLOW",
    "OF_NAMESPACES",
    "PORTS",
    "forget",
    "is_alive",
    "left_over",
    "locked",
    "started",
    "write",
]

HWFLOW = Path("/run/bypass/hwflow")
PORTS = Path("/run/bypass/ports")
OF_NAMESPACES = (HWFLOW, PORTS)
"""Folders whose notes are about a network namespace. Their names begin with its cookie, and `keeper` is the process."""

log = logging.getLogger("bypass")


@contextmanager
def locked(folder: Path, why: str) -> Iterator[None]:
    """One change at a time of what the notes in `folder` are about. The folder is made where it is missing.

    Args:
        why: for the error: what needs root, as a sentence.

    Raises:
        DeviceError: the folder cannot be made or used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeviceError(f"{folder}: {error.strerror}: {why}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write(path: Path, text: str) -> None:
    """Whole or not at all, also when this process is killed meanwhile. OSError."""
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def started(pid: int, proc: Path = procfs.PROC) -> int | None:
    """When a process began, in the kernel's ticks (field 22): with the number it names one process until the next
    boot. None: it has ended."""
    fields = procfs.stat_of(pid, proc)
    if fields is None or fields[0] in "ZX":  # dead, and its parent has not looked yet
        return None
    return int(fields[19])


def is_alive(keeper: tuple[int, int]) -> bool:
    """A process is still there, named by its number and when it began."""
    return started(keeper[0]) == keeper[1]


# ---- Network namespaces that are gone ------------------------------------------------------------------------------
def left_over(folder: Path) -> dict[Path, dict[str, Any]]:
    """Notes of network namespaces that are gone, and what they say: nobody comes any more to undo what they are about,
    and it went with the namespace. As long as its process lives a note stays, and also one that cannot be read. Who may
    not look into other namespaces finds none."""
    own = netns.cookie()
    found = {}
    for path in folder.glob("*-*") if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else ():
        about = _read(path)
        if about is not None and not path.name.startswith(own):
            found[path] = about
    if not found:
        return {}
    try:
        there = netns.cookies()
    except OSError as error:
        log.debug("notes of network namespaces are kept: %s", error)
        return {}
    return {path: about for path, about in found.items() if path.name.partition("-")[0] not in there}


def forget(folder: Path) -> int:
    """Removes what left_over() finds, and logs it. How many.

    This takes no lock: nobody writes such a note any more.
    """
    found = left_over(folder)
    for path, about in found.items():
        path.unlink(missing_ok=True)
        log.warning("%s is removed, its network namespace is gone: %s", path, about)
    return len(found)


def _read(path: Path) -> dict[str, Any] | None:
    """What a note says whose process has ended. None: it lives, or nobody knows."""
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        pid, when = about["keeper"]
        return None if is_alive((pid, when)) else about
    except (OSError, ValueError, KeyError, TypeError):
        return None
