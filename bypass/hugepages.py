# SPDX-License-Identifier: Apache-2.0
"""Hugepages by sysfs: how many there are, reserving some so that a program finds them free, giving these back.

A reservation is remembered below /run/bypass, so that release() takes away what reserve() added and nothing else.
Nothing is mounted by either: DPDK's `--in-memory` needs no mount; mount() is for programs that do.

Source: Documentation/admin-guide/mm/hugetlbpage.rst of the kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bypass.errors import DeviceError
from bypass.pci.machine import Machine
from bypass.records import write

__all__ = [
    "Pool",
    "Release",
    "Reservation",
    "mount",
    "mounts",
    "parse_amount",
    "parse_size",
    "pools",
    "release",
    "reserve",
]

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
RECORD = "bypass/hugepages.json"


@dataclass(frozen=True, slots=True)
class Pool:
    """Pages of one size, of a node or (None) of the whole machine.

    Attributes:
        size: bytes of a page.
        total, free: how many there are; of the free ones, those that are promised to somebody are left out.
        surplus: of `total`, those beyond what was asked for.
    """

    size: int
    node: int | None
    total: int
    free: int
    surplus: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """What reserve() did: so many pages were wanted free, so many are, so many were added."""

    size: int
    node: int | None
    wanted: int
    free: int
    added: int


@dataclass(frozen=True, slots=True)
class Release:
    """What release() took away. `kept`: pages of the reservation that are in use and so stay."""

    size: int
    node: int | None
    removed: int
    kept: int


def parse_size(text: str) -> int:
    """Bytes of "2M", "1G", "65536". DeviceError."""
    matched = re.fullmatch(r"([1-9][0-9]{0,11})([KMG]?)B?", text.strip().upper())
    if matched is None:
        raise DeviceError(f"{text!r} is no size: write it as 2M or 1G")
    return int(matched[1]) * UNITS[matched[2]]


def parse_amount(text: str, size: int) -> int:
    """Pages of `size` bytes: "512" is a number of pages, "256M" so many bytes, rounded up. DeviceError."""
    if text.strip().isdecimal():
        return int(text)
    return -(-parse_size(text) // size)


def size_text(size: int) -> str:
    """ "2M" for 2097152."""
    for unit in ("G", "M", "K"):
        if size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit}"
    return str(size)


# ---- Pools ---------------------------------------------------------------------------------------------------------
def pools(machine: Machine | None = None) -> list[Pool]:
    """Those of the whole machine, then those of its nodes; the smallest pages first."""
    machine = machine or Machine()
    found = [_pool(machine, at, None) for at in (machine.sys / "kernel/mm/hugepages").glob("hugepages-*kB")]
    for folder in (machine.sys / "devices/system/node").glob("node[0-9]*"):
        node = int(folder.name[len("node") :])
        found += [_pool(machine, at, node) for at in (folder / "hugepages").glob("hugepages-*kB")]
    return sorted(found, key=lambda p: (-1 if p.node is None else p.node, p.size))


def _pool(machine: Machine, at: Path, node: int | None) -> Pool:
    def number(file: str) -> int:
        return int(machine.read(at / file) or "0")

    size = int(at.name[len("hugepages-") : -len("kB")]) << 10
    promised = number("resv_hugepages")  # only the whole machine's pool has it
    return Pool(
        size,
        node,
        number("nr_hugepages"),
        max(number("free_hugepages") - promised, 0),
        number("surplus_hugepages"),
    )


def _find(machine: Machine, size: int, node: int | None) -> tuple[Path, Pool]:
    """DeviceError: there are no such pages."""
    there = pools(machine)
    if not there:
        raise DeviceError("this kernel has no hugepages (CONFIG_HUGETLBFS)")
    nodes = sorted({p.node for p in there if p.node is not None})
    if node is not None and node not in nodes:
        raise DeviceError(f"there is no node {node}; there are: {', '.join(map(str, nodes)) or 'none'}")
    found = next((p for p in there if (p.size, p.node) == (size, node)), None)
    if found is None:
        sizes = ", ".join(size_text(s) for s in sorted({p.size for p in there}))
        raise DeviceError(f"there are no hugepages of {size_text(size)} here; sizes: {sizes}")
    folder = machine.sys / (
        "kernel/mm/hugepages" if node is None else f"devices/system/node/node{node}/hugepages"
    )
    return folder / f"hugepages-{size >> 10}kB", found


# ---- Reserving -----------------------------------------------------------------------------------------------------
def reserve(
    pages: int, size: int = 2 << 20, node: int | None = None, *, machine: Machine | None = None
) -> Reservation:
    """Sees to it that so many pages are free; what is free already counts. Fewer may be got: memory may be too
    fragmented, or too small; what was got stays.

    Raises:
        DeviceError: there are no such pages, or it may not be done.
    """
    machine = machine or Machine()
    with machine.locked():
        at, before = _find(machine, size, node)
        if before.free < pages:
            _set(machine, at, before.total + pages - before.free)
        _, after = _find(machine, size, node)
        added = max(after.total - before.total, 0)
        if added:
            _note(machine, size, node, added)
        return Reservation(size, node, pages, after.free, added)


def release(*, machine: Machine | None = None) -> list[Release]:
    """Takes away what reserve() added, as far as it is free. What is in use stays noted. DeviceError."""
    machine = machine or Machine()
    with machine.locked():
        done, noted = [], _noted(machine)
        for name, added in list(noted.items()):
            size, node = _unkey(name)
            at, before = _find(machine, size, node)
            removable = min(added, before.free)
            if removable:
                _set(machine, at, before.total - removable)
            _, after = _find(machine, size, node)
            removed = before.total - after.total
            noted[name] = added - removed
            _keep(machine, noted)
            done.append(Release(size, node, removed, added - removed))
        return done


def _set(machine: Machine, at: Path, number: int) -> None:
    try:
        machine.write(at / "nr_hugepages", str(number))
    except OSError as error:
        raise DeviceError(f"{at / 'nr_hugepages'}: {number} cannot be set: {error.strerror}") from error


def _key(size: int, node: int | None) -> str:
    return f"{size} {'all' if node is None else node}"


def _unkey(name: str) -> tuple[int, int | None]:
    size, _, node = name.partition(" ")
    return int(size), None if node == "all" else int(node)


def _noted(machine: Machine) -> dict[str, int]:
    """Pages that were added, by size and node. DeviceError."""
    path = machine.run / RECORD
    try:
        said = json.loads(path.read_text())
        return {_key(*_unkey(k)): int(v) for k, v in said.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise DeviceError(
            f"{path}: cannot be read: {error}; remove it, and release by sysctl vm.nr_hugepages"
        ) from error


def _note(machine: Machine, size: int, node: int | None, added: int) -> None:
    noted = _noted(machine)
    name = _key(size, node)
    _keep(machine, {**noted, name: noted.get(name, 0) + added})


def _keep(machine: Machine, noted: dict[str, int]) -> None:
    path = machine.run / RECORD
    left = {name: number for name, number in noted.items() if number > 0}
    if not left:
        path.unlink(missing_ok=True)
        return
    write(path, json.dumps(left))


# ---- Mounts --------------------------------------------------------------------------------------------------------
def mounts(machine: Machine | None = None) -> list[str]:
    """Where hugetlbfs is mounted."""
    machine = machine or Machine()
    lines = (line.split() for line in machine.read(machine.proc / "self/mounts").splitlines())
    return [words[1] for words in lines if len(words) > 2 and words[2] == "hugetlbfs"]


def mount(path: str, size: int, machine: Machine | None = None) -> bool:
    """Mounts hugetlbfs with pages of this size, unless it is mounted there. Whether it did. DeviceError."""
    if path in mounts(machine):
        return False
    command = [
        "mount",
        "-t",
        "hugetlbfs",
        "-o",
        f"pagesize={size_text(size)},mode=0700",
        "bypass",
        "--",
        path,
    ]
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DeviceError(f"{path}: cannot be made a mount point: {error.strerror}") from error
    if done.returncode != 0:
        raise DeviceError(f"{path}: {done.stderr.strip()}")
    return True
