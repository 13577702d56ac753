# SPDX-License-Identifier: Apache-2.0
"""Notes below /run/bypass: what a process changed that does not end with it, so that the next one can undo it.

What lives here: how such a note is written, who may write at a time, and whether its process is still there. What does
not: what notes say (`hwflow/held.py`, `pci/records.py`, `broker/blocks.py`, `hugepages.py`).

Source: proc(5) (stat), flock(2).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bypass import procfs
from bypass.errors import DeviceError

__all__ = ["locked", "started", "write"]


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
