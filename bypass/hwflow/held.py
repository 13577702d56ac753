# SPDX-License-Identifier: Apache-2.0
"""Rules on an interface for as long as a process runs, however that ends.

    Held(plan)       put on; a record below /run/bypass/hwflow says what was changed, before it is
    .exchange(plan)  other rules in their place
    .close()         all taken off, the record removed
    recover(ifname)  takes off what a killed process left: whoever uses the interface next calls it

Nothing takes rules off a NIC when a process is killed. Until the next one comes they stay, and do no harm: they choose
queues, and the kernel has the packets of all of them. A record names its network namespace and interface, and the
process with which it ends (a successor of a killed broker finds that one alive, and goes on).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bypass import netns
from bypass.errors import DeviceError
from bypass.hwflow.apply import Ask, Device, Put, Traces
from bypass.hwflow.ntuple import Plan
from bypass.records import HWFLOW, forget, is_alive, locked, started, write
from bypass.rss import ask, ask_by

__all__ = ["RECORDS", "Held", "Record", "found", "recover"]

RECORDS = HWFLOW
VERSION = 1
SIOCGIFNAME = 0x8910


@dataclass(frozen=True, slots=True)
class Record:
    """What is on an interface, and with which process it ends: its number, and when it began."""

    ifname: str
    keeper: tuple[int, int]
    traces: Traces

    @property
    def alive(self) -> bool:
        return is_alive(self.keeper)


class Held:
    """Rules of a plan on its interface, in the network namespace of the calling thread.

    What a process that is dead left there is taken off before.

    Args:
        keeper: the process with whose end they are nobody's; None: this one.
        exchange: whether rules that it has there already are exchanged; else they stay.
        asking: asks the kernel; records: the folder of the records.

    Raises:
        DeviceError: another process has rules there; the interface refuses a step, and everything before it is undone.
    """

    def __init__(
        self,
        plan: Plan,
        keeper: int | None = None,
        asking: Ask | None = None,
        records: Path | None = None,
        *,
        exchange: bool = True,
    ) -> None:
        self.ifname = plan.ifname
        pid = os.getpid() if keeper is None else keeper
        self._keeper = (pid, started(pid) or 0)
        self._plan = plan
        self._path = _path(plan.ifname, records)
        self._index = socket.if_nametoindex(plan.ifname)
        # Of the namespace and by its number: who closes may be elsewhere, and the interface may have another name.
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        asking = asking or partial(ask_by, self._sock)
        try:
            self._begin(plan, asking, exchange)
        except BaseException:
            self._sock.close()
            raise

    def _begin(self, plan: Plan, asking: Ask, exchange: bool) -> None:
        with _locked(self._path.parent):
            before = _load(self._path)
            if before is not None and before.alive and before.keeper != self._keeper:
                raise DeviceError(
                    f"{plan.ifname}: process {before.keeper[0]} has rules in its hardware: end it first"
                )
            if before is not None and not before.alive:
                _clean(before, self.ifname, self._path, asking)
                before = None
            traces = before.traces if before is not None else None
            self._device = Device(plan.ifname, asking, traces, self._keep)
            if before is None:
                self._put(plan)
            elif exchange:
                self._device.exchange(plan)

    def _put(self, plan: Plan) -> None:
        try:
            self._device.put(plan)
        except BaseException as error:
            try:
                self._device.undo()
                self._path.unlink(missing_ok=True)
            except DeviceError as more:
                raise DeviceError(f"{error}; {more}") from error
            raise

    def _keep(self, traces: Traces) -> None:
        _save(self._path, Record(self.ifname, self._keeper, traces))

    def exchange(self, plan: Plan) -> None:
        """The rules of another policy, for the same queues. DeviceError: refused, and those before are there."""
        with _locked(self._path.parent):
            self._find()
            self._device.exchange(plan)
            self._plan = plan

    def check(self) -> list[str]:
        """Puts on again what the device has forgotten; what that was. DeviceError: it is refused."""
        with _locked(self._path.parent):
            self._find()
            return self._device.restore(self._plan)

    def close(self) -> None:
        """DeviceError: what could not be undone, which recover() tries again."""
        with _locked(self._path.parent):
            self._find()
            self._device.undo()
            self._path.unlink(missing_ok=True)
        self._sock.close()

    def __del__(self) -> None:
        if hasattr(self, "_sock"):
            self._sock.close()

    def _find(self) -> None:
        """The interface's name, as it is now. One that is gone keeps the one it had."""
        request = struct.pack("16si20x", b"", self._index)
        with suppress(OSError):
            self._device.ifname = (
                fcntl.ioctl(self._sock, SIOCGIFNAME, request)[:16].partition(b"\0")[0].decode()
            )


def recover(ifname: str, asking: Ask | None = None, records: Path | None = None) -> bool:
    """Takes off what a process that is dead left on an interface; whether there was any. Records of network namespaces
    that are gone are removed by the way.

    Raises:
        DeviceError: it cannot be undone.
    """
    path = _path(ifname, records)
    forget(path.parent)
    if not os.access(path, os.F_OK):  # also where we may not look: only root puts rules on
        return False
    with _locked(path.parent):
        record = _load(path)
        if record is None or record.alive:
            return False
        _clean(record, ifname, path, asking or ask)
        return True


def found(ifname: str, records: Path | None = None) -> Record | None:
    """What is on an interface by us. None: nothing, or we may not know. DeviceError: it cannot be read."""
    path = _path(ifname, records)
    return _load(path) if os.access(path, os.R_OK) else None


def _clean(record: Record, ifname: str, path: Path, asking: Ask) -> None:
    def keep(traces: Traces) -> None:
        _save(path, replace(record, traces=traces))

    device = Device(ifname, asking, record.traces, keep)
    device.undo()
    path.unlink(missing_ok=True)


# ---- Records -------------------------------------------------------------------------------------------------------
def _path(ifname: str, records: Path | None) -> Path:
    """DeviceError: there is no such interface."""
    try:
        index = socket.if_nametoindex(ifname)
    except OSError as error:
        raise DeviceError(f"{ifname}: there is no such interface") from error
    return (RECORDS if records is None else records) / f"{netns.cookie()}-{index}.json"


def _locked(folder: Path) -> AbstractContextManager[None]:
    """One change at a time. DeviceError: the folder cannot be made or used."""
    return locked(folder, "rules in hardware need root")


def _save(path: Path, record: Record) -> None:
    """Whole or not at all."""
    t = record.traces
    rules = [[r.location, r.name, r.question.hex()] for r in t.rules]
    data = {
        "version": VERSION,
        "ifname": record.ifname,
        "keeper": record.keeper,
        "ntuple": t.ntuple,
        "context": t.context,
        "rules": rules,
        "table": t.table,
        "transformation": t.transformation,
    }
    try:
        write(path, json.dumps(data))
    except OSError as error:
        raise DeviceError(
            f"{path}: the record of {record.ifname} cannot be written: {error.strerror}"
        ) from error


def _load(path: Path) -> Record | None:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise DeviceError(
                f"{path}: written by another version of bypass: let that one take its rules off"
            )
        traces = Traces(
            data["ntuple"],
            data["context"],
            tuple(Put(at, name, bytes.fromhex(question)) for at, name, question in data["rules"]),
            None if data["table"] is None else tuple(data["table"]),
            data["transformation"],
        )
        return Record(data["ifname"], (data["keeper"][0], data["keeper"][1]), traces)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DeviceError(
            f"{path}: is no record: {error!r}; remove it when ethtool -n and -x show what they should"
        ) from error
