# SPDX-License-Identifier: Apache-2.0
"""Hardware rules for DPDK: rte_flow's patterns and actions, as data and as testpmd's commands.

An item's bytes are those of the protocol's header. Each `struct rte_flow_item_*` of DPDK begins with that header (its
`hdr`), and what follows may be zero: whoever calls rte_flow_create() copies `spec` and `mask` to the head of a zeroed
struct. So the same data fits every version of DPDK.

Sources: DPDK Programmer's Guide, "Generic flow API (rte_flow)"; testpmd User Guide, "Flow rules management".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from bypass.hwflow.rules import HardwareRule, Translation
from bypass.rules import TCP, UDP, Network

__all__ = ["Action", "Field", "Item", "RteRule", "rte_rules"]

Kind = Literal["eth", "vlan", "ipv4", "ipv6", "tcp", "udp"]
HEADER_BYTES: dict[str, int] = {"eth": 14, "vlan": 4, "ipv4": 20, "ipv6": 40, "tcp": 20, "udp": 8}
PLACES: dict[tuple[str, str], tuple[int, int]] = {
    ("eth", "dst"): (0, 6),
    ("vlan", "vid"): (0, 2),  # of the tag control information, with a mask
    ("ipv4", "proto"): (9, 1),
    ("ipv4", "src"): (12, 4),
    ("ipv4", "dst"): (16, 4),
    ("ipv6", "proto"): (6, 1),
    ("ipv6", "src"): (8, 16),
    ("ipv6", "dst"): (24, 16),
    ("tcp", "src"): (0, 2),
    ("tcp", "dst"): (2, 2),
    ("udp", "src"): (0, 2),
    ("udp", "dst"): (2, 2),
}
"""Where a field lies in its header: offset and bytes. Names are testpmd's."""
VLAN_ID = 0x0FFF


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a header that is compared under a mask."""

    name: str
    spec: int
    mask: int


@dataclass(frozen=True, slots=True)
class Item:
    """A header of the pattern. Without fields: there has to be one."""

    kind: Kind
    fields: tuple[Field, ...] = ()

    @property
    def spec(self) -> bytes:
        return self._bytes("spec")

    @property
    def mask(self) -> bytes:
        return self._bytes("mask")

    def _bytes(self, which: str) -> bytes:
        data = bytearray(HEADER_BYTES[self.kind])
        for field in self.fields:
            at, length = PLACES[self.kind, field.name]
            data[at : at + length] = getattr(field, which).to_bytes(length, "big")
        return bytes(data)

    def text(self) -> str:
        """In testpmd's words."""
        return " ".join([self.kind, *(word for f in self.fields for word in self._words(f))])

    def _words(self, f: Field) -> Iterator[str]:
        length = PLACES[self.kind, f.name][1]
        whole = VLAN_ID if f.name == "vid" else (1 << 8 * length) - 1
        if f.mask == whole:
            yield from (f.name, "is", _value(f.spec, length))
        else:
            yield from (f.name, "spec", _value(f.spec, length), f.name, "mask", _value(f.mask, length))


def _value(value: int, length: int) -> str:
    raw = value.to_bytes(length, "big")
    if length == 6:
        return raw.hex(":")
    return str(ip_address(raw)) if length > 2 else str(value)


@dataclass(frozen=True, slots=True)
class Action:
    """`kind`: mark (number), queue (one), rss (queues), drop, vf (number)."""

    kind: Literal["mark", "queue", "rss", "drop", "vf"]
    values: tuple[int, ...] = ()

    def text(self) -> str:
        name = {"mark": "id", "queue": "index", "vf": "id"}
        if self.kind == "rss":
            return f"rss queues {' '.join(map(str, self.values))} end"
        return f"{self.kind} {name[self.kind]} {self.values[0]}" if self.values else self.kind


@dataclass(frozen=True, slots=True)
class RteRule:
    """What rte_flow_create() takes. `name`: of the policy's rule; `rule`: its number."""

    name: str
    rule: int
    group: int
    priority: int  # 0 first
    pattern: tuple[Item, ...]
    actions: tuple[Action, ...]

    def testpmd(self, port: int = 0) -> str:
        """The command that makes it."""
        pattern = " / ".join(item.text() for item in self.pattern)
        actions = " / ".join(action.text() for action in self.actions)
        group = f"group {self.group} " if self.group else ""
        priority = f"priority {self.priority} " if self.priority else ""
        return f"flow create {port} {group}{priority}ingress pattern {pattern} / end actions {actions} / end"


def rte_rules(
    translation: Translation,
    queues: Sequence[int],
    *,
    vf: int | None = None,
    kernel_queues: Sequence[int] = (),
    group: int = 0,
    mac: str = "",
    port_vlan: int | None = None,
    marks: bool = True,
) -> list[RteRule]:
    """Rules for a port.

    Args:
        queues: of the stack.
        vf: what is steered goes to this virtual function in place of `queues`: its program has it for itself.
        kernel_queues: where a `pass` rule sends; without them to `queues`, unmarked: software decides there.
        group: of rte_flow; a device may allow priorities in some groups only.
        mac: the port's own: only frames to it match. "": any.
        port_vlan: everything of the stack is in this VLAN (`backend.vlan`).
        marks: a steered packet carries the number of its rule + 1. translate(by_rule=True) then.
    """
    tags = any(r.vlan is not None for r in translation.rules)
    found: dict[tuple[Item, ...], RteRule] = {}
    for r in translation.rules:
        for pattern in _patterns(r, mac, port_vlan, tags):
            made = RteRule(
                r.rule.name,
                r.rule.index,
                group,
                r.level,
                pattern,
                _actions(r, queues, vf, kernel_queues, marks),
            )
            found.setdefault(pattern, made)  # the same again, with a later level, is never asked
    return list(found.values())


def _patterns(r: HardwareRule, mac: str, port_vlan: int | None, tags: bool) -> Iterator[tuple[Item, ...]]:
    """Several where a rule is about tagged and untagged frames: an item each for what the pattern must spell out."""
    address = int(mac.replace(":", ""), 16) if mac else 0
    eth = Item("eth", (Field("dst", address, (1 << 48) - 1),) if mac else ())
    rest = (_ip(r), *_transport(r))
    vid = port_vlan if port_vlan is not None else r.vlan
    if vid is not None:
        yield (eth, Item("vlan", (Field("vid", vid, VLAN_ID),)), *rest)
        return
    yield (eth, *rest)
    if tags and r.action != "steer":  # what is tagged is never steered
        yield (eth, Item("vlan"), *rest)


def _ip(r: HardwareRule) -> Item:
    fields = []
    if r.proto is not None and r.proto not in (TCP, UDP):
        fields.append(Field("proto", r.proto, 0xFF))
    fields += [_prefix(name, net) for name, net in (("src", r.remote), ("dst", r.local)) if net is not None]
    return Item("ipv4" if r.family == 4 else "ipv6", tuple(fields))


def _prefix(name: str, net: Network) -> Field:
    return Field(name, int(net.network_address), int(net.netmask))


def _transport(r: HardwareRule) -> tuple[Item, ...]:
    if r.proto not in (TCP, UDP):
        return ()
    ports = (("src", r.remote_port), ("dst", r.local_port))
    return (Item("tcp" if r.proto == TCP else "udp", tuple(Field(name, *p) for name, p in ports if p[1])),)


def _actions(
    r: HardwareRule, queues: Sequence[int], vf: int | None, kernel_queues: Sequence[int], marks: bool
) -> tuple[Action, ...]:
    if r.action == "drop":
        return (Action("drop"),)
    if r.action == "pass":
        return (_to(kernel_queues or queues),)
    to = Action("vf", (vf,)) if vf is not None else _to(queues)
    return (Action("mark", (r.rule.index + 1,)), to) if marks else (to,)


def _to(queues: Sequence[int]) -> Action:
    return Action("queue", (queues[0],)) if len(queues) == 1 else Action("rss", tuple(queues))
