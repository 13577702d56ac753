# SPDX-License-Identifier: Apache-2.0
"""Puts the rules of a plan on an interface by ethtool's ioctls, and takes them off again.

    ntuple filters on -> RSS context -> rules, one by one -> hash table without the stack's queues
                      <-              <-                  <-                 (undone in this order)

What the device refuses is an error that names the policy's rule, and everything before it is undone. What is there
already (rules of others, the rest of the table) stays. What was done is data (`Traces`), told before each step, so
that another process can undo it (held.py).

Sources: linux/ethtool.h; net/ethtool/ioctl.c of the kernel; ethtool(8).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from bypass.errors import DeviceError
from bypass.hwflow.ntuple import SPEC_BYTES, NtupleRule, Plan
from bypass.rss import ask

__all__ = ["Applied", "Ask", "Device", "Put", "Room", "Traces", "applied", "room_of"]

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
class Put:
    """A rule that is on an interface. name: of the policy's; question: what put it there."""

    location: int
    name: str
    question: bytes


@dataclass(frozen=True, slots=True)
class Traces:
    """What is on an interface because of us.

    Attributes:
        ntuple: the filters were switched on.
        context: the new RSS context.
        rules: ours, in the order in which they were put.
        table: the hash table as it was before. transformation: that it was read with.
    """

    ntuple: bool = False
    context: int | None = None
    rules: tuple[Put, ...] = ()
    table: tuple[int, ...] | None = None
    transformation: int = 0


@dataclass(frozen=True, slots=True)
class Applied:
    """What was put on the interface. locations: of the plan's rules; context: the new RSS context, if one was made."""

    locations: tuple[int, ...]
    context: int | None


@dataclass(frozen=True, slots=True)
class Room:
    """What an interface offers. rules: how many it holds, None: its driver has not said; free: of these."""

    rules: int | None
    free: int | None
    entries: int


def _keep(traces: Traces) -> None:
    return


@contextmanager
def applied(plan: Plan, asking: Ask = ask) -> Iterator[Applied]:
    """The plan is in force within the block.

    Raises:
        DeviceError: the interface has no such rules, or too few, or not these queues; or it refuses a step, and
            everything before it is undone. At the end: what could not be undone.
    """
    device = Device(plan.ifname, asking)
    try:
        device.put(plan)
        yield Applied(tuple(r.location for r in device.traces.rules), device.traces.context)
    finally:
        device.undo()


def room_of(ifname: str, asking: Ask = ask) -> Room:
    """DeviceError: it cannot filter, or has no hash table to keep queues out of; says which."""
    return Device(ifname, asking).room()


class Device:
    """An interface, and what of it is ours.

    Args:
        traces: what is on it by us already.
        keep: is told what will be there, before each step, and what is there after it.
    """

    def __init__(
        self,
        ifname: str,
        asking: Ask = ask,
        traces: Traces | None = None,
        keep: Callable[[Traces], None] = _keep,
    ) -> None:
        self.ifname, self._asking, self._keep = ifname, asking, keep
        self.traces = traces or Traces()

    def put(self, plan: Plan) -> None:
        """All of a plan. DeviceError: a step is refused; what was done before it is for undo()."""
        self._require_queues(plan)
        self._filters_on()
        if plan.stack and len(plan.stack) > 1:  # also where no rule of this plan spreads: the next may
            self._make_context(plan.stack)
        self.insert(plan)
        if plan.stack:
            self._keep_off(plan.kernel)

    def insert(self, plan: Plan) -> None:
        """A plan's rules, where there is room. DeviceError."""
        for rule, at in zip(plan.rules, self._locations(len(plan.rules)), strict=True):
            self._insert(plan, rule, at)

    def restore(self, plan: Plan) -> list[str]:
        """Puts on again what the device has forgotten of a plan that was put: when it was down, say.

        Returns:
            What that was. DeviceError: it is refused.
        """
        found: list[str] = []
        flags = self._flags()
        if not flags & FLAG_NTUPLE:
            self._do("its filters cannot be switched on again", _VALUE.pack(SFLAGS, flags | FLAG_NTUPLE))
            found.append("ntuple filters")
        taken = self._rules()[1]
        missing = [r for r in self.traces.rules if r.location not in taken]
        self.traces = replace(self.traces, rules=tuple(r for r in self.traces.rules if r not in missing))
        for i, rule in enumerate(missing):
            try:
                self._put(rule, f"'{rule.name}', which was in force, is refused")
            except DeviceError:  # the next time these are missing again, wherever they are then
                nowhere = tuple(replace(r, location=LOCATION_LAST) for r in missing[i:])
                self._now(replace(self.traces, rules=(*self.traces.rules, *nowhere)))
                raise
            found.append(f"'{rule.name}'")
        table, transformation = self._table()
        if plan.stack and set(table) & set(plan.stack):
            entries = [plan.kernel[i % len(plan.kernel)] for i in range(len(table))]
            self._do("its hash table cannot be set again", self._set_table(0, entries, transformation))
            found.append("hash table")
        return found

    def undo(self) -> None:
        """Takes everything off, in the other order. DeviceError: what could not be; `traces` has it still."""
        left: list[str] = []
        with suppress(DeviceError):  # else each is tried
            self.only_present()
        self._undo_table(left)
        left += self.remove_rules()
        self._undo_context(left)
        self._undo_filters(left)
        if left:
            raise DeviceError(
                f"{self.ifname}: not undone: {'; '.join(left)}: ethtool -n and -x show what is there"
            )

    # ---- Steps -------------------------------------------------------------------------------------------------------
    def _now(self, traces: Traces) -> None:
        self._keep(traces)
        self.traces = traces

    def _filters_on(self) -> None:
        """ethtool -K IFACE ntuple on."""
        flags = self._flags()
        if flags & FLAG_NTUPLE:
            return
        self._now(replace(self.traces, ntuple=True))
        self._do("cannot filter (ethtool -K ntuple on)", _VALUE.pack(SFLAGS, flags | FLAG_NTUPLE))
        if not self._flags() & FLAG_NTUPLE:
            raise DeviceError(f"{self.ifname} cannot filter: its driver has no ntuple filters")

    def _undo_filters(self, left: list[str]) -> None:
        def step() -> None:
            flags = self._get("its features", _VALUE, GFLAGS, 0)[1]
            if flags & FLAG_NTUPLE:
                self._asking(self.ifname, _VALUE.pack(SFLAGS, flags & ~FLAG_NTUPLE))

        if self.traces.ntuple and self._undone("ntuple filters stay on", step, left):
            self._now(replace(self.traces, ntuple=False))

    def _flags(self) -> int:
        return self._get("its features", _VALUE, GFLAGS, 0)[1]

    def _make_context(self, queues: tuple[int, ...]) -> None:
        """ethtool -X IFACE context new ..."""
        table, _ = self._table()
        entries = [queues[i % len(queues)] for i in range(len(table))]
        told = self._do(
            "has no RSS contexts: give the stack one queue", self._set_table(CONTEXT_NEW, entries)
        )
        self._now(replace(self.traces, context=int(_RXFH.unpack_from(told)[1])))

    def _undo_context(self, left: list[str]) -> None:
        context = self.traces.context
        if context is None:
            return
        question = _RXFH.pack(SRSSH, context, 0, 0, 0, 0, 0)
        if self._undone(f"RSS context {context}", lambda: self._asking(self.ifname, question), left):
            self._now(replace(self.traces, context=None))

    def _insert(self, plan: Plan, rule: NtupleRule, location: int) -> None:
        """ethtool -N IFACE flow-type ..."""
        ours = self.traces.context or 0
        which = 0 if rule.target is None or not rule.target.queues else ours
        question = _RXNFC.pack(SRXCLSRLINS, 0, 0, rule.pack(location), which if rule.spreads() else 0)
        policy = rule.hardware.rule
        self._put(
            Put(location, policy.name, question), f"{plan.file}:{policy.line}: '{policy.name}' is refused"
        )

    def _put(self, rule: Put, refusal: str) -> None:
        before = self.traces
        if rule.location != LOCATION_LAST:
            self._now(replace(before, rules=(*before.rules, rule)))
        try:
            told = self._do(refusal, rule.question)
        except DeviceError:
            self._now(before)
            raise
        at = int(struct.unpack_from("=I", _RXNFC.unpack_from(told)[3], _LOCATION)[0])
        self._now(replace(before, rules=(*before.rules, replace(rule, location=at))))

    def exchange(self, plan: Plan) -> None:
        """The rules of this plan in place of ours; queues, context and hash table stay. DeviceError: a rule is refused,
        and ours are there again, or it is said that they are not."""
        before = self.traces.rules
        left = self.remove_rules()
        if left:
            raise DeviceError(f"{self.ifname}: not undone: {'; '.join(left)}")
        try:
            self.insert(plan)
        except DeviceError:
            self.remove_rules()
            for rule in before:
                self._put(rule, f"'{rule.name}', which was in force, is refused")
            raise

    def remove_rules(self) -> list[str]:
        """All of ours. What could not be."""
        left: list[str] = []
        stay = []
        for rule in reversed(self.traces.rules):
            spec = bytes(_LOCATION) + struct.pack("=II", rule.location, 0)
            question = _RXNFC.pack(SRXCLSRLDEL, 0, 0, spec, 0)

            def step(question: bytes = question) -> None:
                self._asking(self.ifname, question)

            if not self._undone(f"rule {rule.location} ('{rule.name}')", step, left):
                stay.append(rule)
        if self.traces.rules:
            self._now(replace(self.traces, rules=tuple(reversed(stay))))
        return left

    def _keep_off(self, kernel: tuple[int, ...]) -> None:
        """ethtool -X IFACE weight ...: what no rule names goes to the kernel's queues only."""
        before, transformation = self._table()
        entries = [kernel[i % len(kernel)] for i in range(len(before))]
        self._now(replace(self.traces, table=tuple(before), transformation=transformation))
        self._do("its hash table cannot be set", self._set_table(0, entries, transformation))

    def _undo_table(self, left: list[str]) -> None:
        t = self.traces
        if t.table is None:
            return
        question = self._set_table(0, list(t.table), t.transformation)
        if self._undone("hash table", lambda: self._asking(self.ifname, question), left):
            self._now(replace(t, table=None))

    # ---- What there is -----------------------------------------------------------------------------------------------
    def room(self) -> Room:
        flags = self._flags()
        try:
            size, taken = self._rules()
        except DeviceError as error:
            if not flags & FLAG_NTUPLE:
                raise DeviceError(
                    f"{self.ifname}: its driver has no ntuple filters, or they are off (ethtool -K)"
                ) from error
            raise
        entries = len(self._table()[0])
        return Room(size, None if size is None else size - len(taken), entries)

    def only_present(self) -> None:
        """Forgets rules of ours that are not there: the device has forgotten them, or who was killed had not yet put
        the last one. DeviceError: it cannot be asked."""
        if self.traces.rules:
            taken = self._rules()[1]
            self.traces = replace(
                self.traces, rules=tuple(r for r in self.traces.rules if r.location in taken)
            )

    def _require_queues(self, plan: Plan) -> None:
        rings = self._get("its queues", _RXNFC, GRXRINGS, 0, 0, b"", 0)[2]
        missing = [q for q in (*plan.stack, *plan.kernel) if q >= rings]
        if missing:
            raise DeviceError(f"{self.ifname} has {rings} receive queues: there is no queue {missing[0]}")

    def _rules(self) -> tuple[int | None, set[int]]:
        """How many fit, None: the driver chooses their places; and the locations that are taken."""
        _, _, most, _, used = self._get("its rules", _RXNFC, GRXCLSRLCNT, 0, 0, b"", 0)
        asked = _RXNFC.pack(GRXCLSRLALL, 0, 0, b"", used) + bytes(4 * used)
        told = self._do("its rules cannot be listed", asked)
        taken = set(struct.unpack_from(f"={used}I", told, _RXNFC.size - 4))
        if most & LOCATION_SPECIAL:
            return None, taken
        return max(most, _RXNFC.unpack_from(told)[2]), taken  # drivers tell it in one of the two, or in both

    def _locations(self, wanted: int) -> list[int]:
        """Where rules may go, in their order: free ones, or the driver's choice, always behind those before."""
        size, taken = self._rules()
        if size is None:
            return [LOCATION_LAST] * wanted
        free = [at for at in range(size) if at not in taken]
        if len(free) < wanted:
            raise DeviceError(
                f"{self.ifname} has room for {len(free)} rules, {wanted} are needed: use aligned port ranges, "
                "or prefixes in place of hosts"
            )
        return free[:wanted]

    def _table(self) -> tuple[list[int], int]:
        """Entries of the hash table, and its transformation."""
        sizes = self._get("its hash table", _RXFH, GRSSH, 0, 0, 0, 0, 0, 0)
        entries, key = sizes[2:4]
        if not entries:
            raise DeviceError(
                f"{self.ifname} has no hash table (ethtool -x): queues cannot be kept for the stack"
            )
        asked = _RXFH.pack(GRSSH, 0, entries, key, 0, 0, 0) + bytes(4 * entries + key)
        told = self._do("its hash table cannot be read", asked)
        transformation = int(_RXFH.unpack_from(told)[5])
        return list(struct.unpack_from(f"={entries}I", told, _RXFH.size)), transformation

    def _set_table(self, context: int, entries: list[int], transformation: int = 0) -> bytes:
        """Function and key stay: 0 says so. So does the transformation, as it was read."""
        head = _RXFH.pack(SRSSH, context, len(entries), 0, 0, transformation, 0)
        return head + struct.pack(f"={len(entries)}I", *entries)

    # ---- Asking ------------------------------------------------------------------------------------------------------
    def _get(self, what: str, kind: struct.Struct, *fields: int | bytes) -> tuple[int, ...]:
        return kind.unpack_from(self._do(f"{what} cannot be read", kind.pack(*fields)))

    def _do(self, what: str, question: bytes) -> bytes:
        try:
            return self._asking(self.ifname, question)
        except OSError as error:
            code = error.errno or 0
            why = {
                errno.EOPNOTSUPP: "the driver has no such thing",
                errno.ENODEV: "there is no such interface",
            }
            raise DeviceError(f"{self.ifname}: {what}: {why.get(code, os.strerror(code))}") from error

    def _undone(self, what: str, step: Callable[[], object], left: list[str]) -> bool:
        """Whether it is; what fails is told when all the rest is done."""
        try:
            step()
        except (OSError, DeviceError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            code = cause.errno or 0 if isinstance(cause, OSError) else 0
            if code != errno.ENODEV:  # the interface is gone, and all of this with it
                left.append(f"{what}: {os.strerror(code)}")
                return False
        return True
