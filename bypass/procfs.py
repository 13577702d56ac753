# SPDX-License-Identifier: Apache-2.0
"""Processes, as proc(5) shows them while they come and go.

What has ended meanwhile, is closed meanwhile, or is another user's is left out. Between two looks a number may have
become another process' or another file's: a name says nothing about what the next call meets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["GONE", "PROC", "descriptors", "name_of", "pids", "stat_of"]

PROC = Path("/proc")
GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
"""How a process that has ended, or that is not ours to see, shows: EACCES stands for both (proc(5), /proc/PID/fd)."""


def pids(proc: Path = PROC) -> list[int]:
    """Of all processes, the oldest number first."""
    return sorted(int(name) for name in os.listdir(proc) if name.isdecimal())


def name_of(pid: int) -> str | None:
    """Its command name, printable, whatever bytes the process has put there; None: it has ended."""
    with suppress(*GONE):
        text = (PROC / str(pid) / "comm").read_bytes().decode("utf-8", "replace").strip()
        return "".join(c if c.isprintable() else "?" for c in text)
    return None


def stat_of(pid: int, proc: Path = PROC) -> list[str] | None:
    """Fields of /proc/PID/stat from the third one on, the state; None: it has ended."""
    with suppress(*GONE):
        # Behind the name, which may hold blanks, brackets, and bytes that are no text.
        return (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].decode().split()
    return None


def descriptors(pid: int, proc: Path = PROC) -> Iterator[tuple[Path, str]]:
    """A process' open files: the path below /proc, and what it leads to. One that is closed meanwhile ends nothing."""
    folder = proc / str(pid) / "fd"
    names: list[str] = []
    with suppress(*GONE):
        names = os.listdir(folder)
    for name in names:
        path = folder / name
        with suppress(*GONE):
            target = os.readlink(path)
            yield path, target
