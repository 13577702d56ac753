# SPDX-License-Identifier: Apache-2.0
"""Puts the rules of a plan on an interface by ethtool's ioctls, for as long as a block runs.

    ntuple filters on -> RSS context -> rules, one by one -> hash table without the stack's queues
                      <-              <-                  <-                 (undone in this order)

What the device refuses is an error that names the policy's rule, and everything before it is undone. What is there
already (rules of others, the rest of the table) stays. A process that is killed leaves the rules: they only choose
queues, and `bypass nic rules --undo` prints the commands that take them off.

Sources: linux/ethtool.h; net/ethtool/ioctl.c of the kernel; ethtool(8).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bypass.errors import DeviceError
from bypass.hwflow.ntuple import SPEC_BYTES, NtupleRule, Plan
from bypass.rss import ask

__all__ = ["Applied", "Ask", "applied"]

Ask = Callable[[str, bytes], bytes]
"""(interface, a struct of ethtool) -> the struct as the kernel left it. OSError."""

# linux/ethtool.h
GFLAGS, SFLAGS, GRXRINGS, GRXCLSRLCNT, GRXCLSRLALL = 0x25, 0x26, 0x2D, 0x2E, 0x30
SRXCLSRLDEL, SRXCLSRLINS, GRSSH, SRSSH = 0x31, 0x32, 0x46, 0x47
FLAG_NTUPLE = 1 << 27
LOCATION_SPECIAL, LOCATION_LAST = 0x80000000, 0xFFFFFFFD
CONTEXT_NEW = 0xFFFFFFFF
_VALUE = struct.Struct("=II")  # struct ethtool_value
_RXNFC = struct.Struct(f"=2IQ{SPEC_BYTES}sI4x")  # cmd, flow type, data, fs, rule_cnt or rss_context
_RXFH = struct.Struct("=4I2B2xI")  # cmd, context, sizes of table and key, function, transformation
_LOCATION = 160  # in struct ethtool_rx_flow_spec


@dataclass(frozen=True, slots=True)
class Applied:
    """What was put on the interface. locations: of the plan's rules; context: the new RSS context, if one was made."""

    locations: tuple[int, ...]
    context: int | None


@contextmanager
def applied(plan: Plan, asking: Ask = ask) -> Iterator[Applied]:
    """The plan is in force within the block.

    Raises:
        DeviceError: the interface has no such rules, or too few, or not these queues; or it refuses a step, and
            everything before it is undone. At the end: what could not be undone.
    """
    left: list[str] = []
    with ExitStack() as undo:
        # Entered first, so that it speaks last, when all the others have been undone.
        undo.callback(_complain, plan, left)
        device = _Device(plan, asking, undo, left)
        device.filters_on()
        locations = device.locations()
        context = device.make_context(plan.context) if plan.context else None
        put = tuple(device.insert(r, at, context) for r, at in zip(plan.rules, locations, strict=True))
        if plan.stack:
            device.keep_off()
        yield Applied(put, context)


def _complain(plan: Plan, left: list[str]) -> None:
    if left:
        raise DeviceError(
            f"{plan.ifname}: not undone: {'; '.join(left)}: ethtool -n and -x show what is there"
        )


class _Device:
    """The interface, with its steps; each leaves behind what undoes it."""

    def __init__(self, plan: Plan, asking: Ask, undo: ExitStack, left: list[str]) -> None:
        self._plan, self._asking, self._undo, self._left = plan, asking, undo, left
        self._transformation = 0

    def filters_on(self) -> None:
        """ethtool -K IFACE ntuple on."""
        flags = self._get("its features", _VALUE, GFLAGS, 0)[1]
        if flags & FLAG_NTUPLE:
            return
        self._do("cannot filter (ethtool -K ntuple on)", _VALUE.pack(SFLAGS, flags | FLAG_NTUPLE))
        if not self._get("its features", _VALUE, GFLAGS, 0)[1] & FLAG_NTUPLE:
            raise DeviceError(f"{self._plan.ifname} cannot filter: its driver has no ntuple filters")
        self._later("ntuple filters stay on", lambda: _VALUE.pack(SFLAGS, flags))

    def locations(self) -> list[int]:
        """Where the rules may go, in their order: free ones, or the driver's choice, always behind those before."""
        wanted = len(self._plan.rules)
        _, _, most, _, used = self._get("its rules", _RXNFC, GRXCLSRLCNT, 0, 0, b"", 0)
        if most & LOCATION_SPECIAL:
            return [LOCATION_LAST] * wanted
        asked = _RXNFC.pack(GRXCLSRLALL, 0, 0, b"", used) + bytes(4 * used)
        told = self._do("its rules cannot be listed", asked)
        taken = set(struct.unpack_from(f"={used}I", told, _RXNFC.size - 4))
        size = max(most, _RXNFC.unpack_from(told)[2])  # drivers tell it in one of the two, or in both
        free = [at for at in range(size) if at not in taken]
        if len(free) < wanted:
            raise DeviceError(
                f"{self._plan.ifname} has room for {len(free)} rules, {wanted} are needed: use aligned port ranges, "
                "or prefixes in place of hosts"
            )
        return free[:wanted]

    def make_context(self, queues: tuple[int, ...]) -> int:
        """ethtool -X IFACE context new ..."""
        _, size = self._table()
        entries = [queues[i % len(queues)] for i in range(size)]
        told = self._do(
            "has no RSS contexts: give the stack one queue", self._set_table(CONTEXT_NEW, entries)
        )
        context = int(_RXFH.unpack_from(told)[1])
        self._later(f"RSS context {context}", lambda: _RXFH.pack(SRSSH, context, 0, 0, 0, 0, 0))
        return context

    def insert(self, rule: NtupleRule, location: int, context: int | None) -> int:
        """ethtool -N IFACE flow-type ...; its location."""
        which = 0 if context is None or rule.target is None or not rule.target.queues else context
        question = _RXNFC.pack(SRXCLSRLINS, 0, 0, rule.pack(location), which if rule.spreads() else 0)
        policy = rule.hardware.rule
        told = self._do(f"{self._plan.file}:{policy.line}: '{policy.name}' is refused", question)
        at = int(struct.unpack_from("=I", _RXNFC.unpack_from(told)[3], _LOCATION)[0])
        spec = bytes(_LOCATION) + struct.pack("=II", at, 0)
        self._later(f"rule {at} ('{policy.name}')", lambda: _RXNFC.pack(SRXCLSRLDEL, 0, 0, spec, 0))
        return at

    def keep_off(self) -> None:
        """ethtool -X IFACE weight ...: what no rule names goes to the kernel's queues only."""
        before, size = self._table()
        rings = self._get("its queues", _RXNFC, GRXRINGS, 0, 0, b"", 0)[2]
        missing = [q for q in (*self._plan.stack, *self._plan.kernel) if q >= rings]
        if missing:
            raise DeviceError(
                f"{self._plan.ifname} has {rings} receive queues: there is no queue {missing[0]}"
            )
        kernel = self._plan.kernel
        entries = [kernel[i % len(kernel)] for i in range(size)]
        self._do("its hash table cannot be set", self._set_table(0, entries))
        self._later("hash table", lambda: self._set_table(0, before))

    # ---- The hash table ----------------------------------------------------------------------------------------------
    def _table(self) -> tuple[list[int], int]:
        """Its entries, and how many there are."""
        sizes = self._get("its hash table", _RXFH, GRSSH, 0, 0, 0, 0, 0, 0)
        entries, key = sizes[2:4]
        if not entries:
            raise DeviceError(
                f"{self._plan.ifname} has no hash table (ethtool -x): queues cannot be kept for the stack"
            )
        asked = _RXFH.pack(GRSSH, 0, entries, key, 0, 0, 0) + bytes(4 * entries + key)
        told = self._do("its hash table cannot be read", asked)
        self._transformation = _RXFH.unpack_from(told)[5]
        return list(struct.unpack_from(f"={entries}I", told, _RXFH.size)), entries

    def _set_table(self, context: int, entries: list[int]) -> bytes:
        """Function and key stay: 0 says so. So does the transformation, as it was read."""
        head = _RXFH.pack(SRSSH, context, len(entries), 0, 0, self._transformation, 0)
        return head + struct.pack(f"={len(entries)}I", *entries)

    # ---- Asking ------------------------------------------------------------------------------------------------------
    def _get(self, what: str, kind: struct.Struct, *fields: int | bytes) -> tuple[int, ...]:
        return kind.unpack_from(self._do(f"{what} cannot be read", kind.pack(*fields)))

    def _do(self, what: str, question: bytes) -> bytes:
        try:
            return self._asking(self._plan.ifname, question)
        except OSError as error:
            code = error.errno or 0
            why = {
                errno.EOPNOTSUPP: "the driver has no such thing",
                errno.ENODEV: "there is no such interface",
            }
            raise DeviceError(f"{self._plan.ifname}: {what}: {why.get(code, os.strerror(code))}") from error

    def _later(self, what: str, question: Callable[[], bytes]) -> None:
        """To be undone; what fails is told when all the rest is done."""

        def step() -> None:
            try:
                self._asking(self._plan.ifname, question())
            except OSError as error:
                if error.errno != errno.ENODEV:  # the interface is gone, and all of this with it
                    self._left.append(f"{what}: {os.strerror(error.errno or 0)}")

        self._undo.callback(step)
