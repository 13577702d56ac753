# SPDX-License-Identifier: Apache-2.0
"""What a device was before its driver was taken from it: a file for each, below /run/bypass/nic, so that it can be
given back by another process than the one that took it, also when that was killed at the worst moment.

A record is written before anything is changed and removed after everything is as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from bypass.errors import DeviceError
from bypass.pci.machine import Machine
from bypass.pci.network import Saved
from bypass.records import write

VERSION = 1


@dataclass(frozen=True)
class Record:
    """Of one device.

    Attributes:
        address: of the device.
        driver: that it had; "" when none.
        override: its driver_override then.
        to: the driver that it was to get.
        noiommu: vfio's unsafe mode was switched on for it.
        holder: (process, when it began) that takes it for as long as it runs; None: taken by command, for good.
        interfaces: that it had.
    """

    address: str
    driver: str
    override: str
    to: str
    noiommu: bool = False
    holder: tuple[int, int] | None = None
    interfaces: tuple[Saved, ...] = field(default=())


def save(machine: Machine, record: Record) -> None:
    """Whole or not at all. DeviceError."""
    path = machine.records / f"{record.address}.json"
    try:
        write(path, json.dumps({"version": VERSION, **asdict(record)}, indent=1))
    except OSError as error:
        raise DeviceError(
            f"{path}: the record of {record.address} cannot be written: {error.strerror}"
        ) from error


def load(machine: Machine, address: str) -> Record | None:
    """None: there is none. DeviceError: it cannot be understood."""
    path = machine.records / f"{address}.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"{path}: cannot be read: {error}; remove it when the device is as it should be"
        ) from error
    try:
        if data.pop("version") != VERSION:
            raise DeviceError(f"{path}: written by another version of bypass: let that one unbind the device")
        data["interfaces"] = tuple(Saved.from_json(i) for i in data["interfaces"])
        data["holder"] = tuple(data["holder"]) if data["holder"] else None
        return Record(**data)
    except (KeyError, TypeError, AttributeError) as error:
        raise DeviceError(
            f"{path}: is no record: {error!r}; remove it when the device is as it should be"
        ) from error


def remove(machine: Machine, address: str) -> None:
    (machine.records / f"{address}.json").unlink(missing_ok=True)


def every(machine: Machine) -> Iterator[Record]:
    """All that can be understood."""
    for path in sorted(machine.records.glob("*.json")):
        try:
            found = load(machine, path.stem)
        except DeviceError:
            continue
        if found is not None:
            yield found


def is_held(machine: Machine, record: Record) -> bool:
    """Its holder is still there."""
    return record.holder is not None and machine.started(record.holder[0]) == record.holder[1]
