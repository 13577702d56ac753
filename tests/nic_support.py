# SPDX-License-Identifier: Apache-2.0
"""An interface with rules in hardware, for processes that a test starts: its state is a file, which outlives them."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from pathlib import Path

import pytest

from bypass.lab import SERVER_IFNAME

ROOM, ENTRIES = 32, 8
DROPPED = (1 << 64) - 1


class NicState(ctypes.Structure):
    """struct nic of tests/c/ethtool_nic.c."""

    _fields_ = (
        ("rings", ctypes.c_uint32),
        ("room", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("changes", ctypes.c_uint32),
        ("refuses", ctypes.c_uint32),
        ("table", ctypes.c_uint32 * ENTRIES),
        ("used", ctypes.c_uint32 * ROOM),
        ("cookie", ctypes.c_uint64 * ROOM),
        ("port", ctypes.c_uint16 * ROOM),
    )


class FileNic:
    """The interface's tables, as they are now."""

    def __init__(self, path: Path, rings: int) -> None:
        path.write_bytes(bytes(ctypes.sizeof(NicState)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.state = NicState.from_buffer(self._map)
        self.state.rings, self.state.room = rings, ROOM
        self.state.table[:] = [i % rings for i in range(ENTRIES)]

    @property
    def rules(self) -> dict[int, int]:
        """Destination port -> queue; DROPPED."""
        s = self.state
        return {s.port[i]: s.cookie[i] for i in range(ROOM) if s.used[i]}

    @property
    def table(self) -> set[int]:
        return set(self.state.table)

    def refuse(self, change: int) -> None:
        """The how manieth change from now on; 0: none."""
        self.state.refuses = self.state.changes + change if change else 0

    def forget(self) -> None:
        """As some devices do when they are reset."""
        self.state.flags = 0
        self.state.used[:] = [0] * ROOM
        self.state.table[:] = [i % self.state.rings for i in range(ENTRIES)]

    def untouched(self) -> bool:
        """As at the beginning."""
        s = self.state
        return not self.rules and not s.flags and list(s.table) == [i % s.rings for i in range(ENTRIES)]


@pytest.fixture(scope="module")
def nic_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "nic.so"
    source = Path(__file__).parent / "c/ethtool_nic.c"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture
def hardware_nic(nic_shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileNic:
    """The lab's server's interface has rules in hardware, for children: two queues."""
    nic = FileNic(tmp_path / "nic", 2)
    monkeypatch.setenv("LD_PRELOAD", str(nic_shim))
    monkeypatch.setenv("BYPASS_NIC", str(tmp_path / "nic"))
    monkeypatch.setenv("BYPASS_NIC_IFNAME", SERVER_IFNAME)
    return nic
