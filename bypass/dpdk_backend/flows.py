# SPDX-License-Identifier: Apache-2.0
"""A policy's rules on a port of DPDK (rte_flow): which of them, and as the plug-in takes them (plugin.h).

The whole port is ours, and each packet is classified whatever hardware did with it. So hardware is given only what it
does better than a program:

    drop     what the classifier would drop for certain never costs a frame
    queues   with several: flows that are steered share queues 1 and up by their hash, all the rest is kept on queue 0,
             so that a flood for the kernel fills no ring of theirs
    one      nothing is to be chosen: `steer` and `pass` rules only keep a `drop` rule behind them off their packets

Nothing is marked: the classifier would have to look all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bypass._core import ffi, lib
from bypass.errors import DeviceError
from bypass.hwflow.inforce import InForce, wanted
from bypass.hwflow.rte import Item, RteRule, rte_rules
from bypass.hwflow.rules import HardwareRule, Translation, translate
from bypass.policy import Policy
from bypass.rules import Address

__all__ = ["REST", "Flows", "Put", "Refused", "flows_of", "pack", "put_flows"]

KINDS: dict[str, int] = {
    name: int(getattr(lib, f"DPDK_FLOW_{name.upper()}"))
    for name in ("eth", "vlan", "ipv4", "ipv6", "tcp", "udp")
}
REST = 0
"""The queue of what is not steered, where there are several."""


@dataclass(frozen=True, slots=True)
class Refused:
    """`at`: number of the rule that the port does not take; as many as there are: what keeps the rest on a queue."""

    at: int
    why: str


Put = Callable[[Any, int], Refused | None]
"""(struct dpdk_flow[], queue of the rest or -1) -> None: these are in force, and none of before. DeviceError."""


@dataclass(frozen=True, slots=True)
class Flows:
    """Rules of a port. `lines`: of the policy's rule that each comes from; `rest`: the queue of all else, -1: any."""

    rules: tuple[RteRule, ...]
    lines: tuple[int, ...]
    rest: int
    file: str

    def reason(self) -> str:
        drops = sum(r.actions[0].kind == "drop" for r in self.rules)
        shared = {a.values for r in self.rules for a in r.actions if a.kind in ("queue", "rss")} - {(REST,)}
        parts = [f"{drops} drop"] if drops else []
        if self.rest >= 0:
            queues = sorted({q for values in shared for q in values})
            parts.append(
                f"steered flows on queues {', '.join(map(str, queues)) or 'none'}, the rest on {self.rest}"
            )
        return "; ".join(parts) or "the policy has no rule that hardware does better"


def flows_of(policy: Policy, addresses: Collection[Address] | None) -> Flows:
    """The rules that a port needs for a policy.

    Args:
        addresses: of this host, as they are now: only what is sent to one of them is dropped.

    Raises:
        PolicyError: they are too many.
    """
    b = policy.dpdk
    found = translate(policy, addresses=addresses, limit=lib.DPDK_FLOWS)
    several = b.queues > 1
    if not several:
        found = replace(found, rules=tuple(_around_drops(found)))
    rules = rte_rules(
        found,
        range(1, b.queues) if several else (REST,),
        kernel_queues=(REST,),
        port_vlan=b.vlan,
        marks=False,
    )
    by_index = {r.index: r.line for r in policy.flows}
    return Flows(tuple(rules), tuple(by_index[r.rule] for r in rules), REST if several else -1, policy.path)


def _around_drops(found: Translation) -> Iterator[HardwareRule]:
    """Drops, and what is asked before one that it overlaps."""
    drops = [r for r in found.rules if r.action == "drop"]
    for rule in found.rules:
        if rule.action == "drop" or any(d.level > rule.level and d.overlaps(rule) for d in drops):
            yield rule


def pack(rules: Collection[RteRule]) -> Any:
    """`struct dpdk_flow[]`."""
    out = ffi.new("struct dpdk_flow[]", len(rules))
    for flow, rule in zip(out, rules, strict=False):
        (action,) = rule.actions
        flow.priority, flow.items = rule.priority, len(rule.pattern)
        for to, item in zip(flow.item, rule.pattern, strict=False):
            _pack_item(to, item)
        if action.kind != "drop":
            flow.queues = len(action.values)
            flow.queue[0 : len(action.values)] = list(action.values)
    return out


def _pack_item(to: Any, item: Item) -> None:
    to.kind = KINDS[item.kind]
    ffi.buffer(to.spec)[0 : len(item.spec)] = item.spec
    ffi.buffer(to.mask)[0 : len(item.mask)] = item.mask


def put_flows(policy: Policy, addresses: Collection[Address] | None, put: Put) -> InForce | None:
    """Has a port do what the policy wants of its hardware.

    Raises:
        DeviceError: it is required, and the port refuses; then no rule is in force.
    """

    def step() -> InForce:
        flows = flows_of(policy, addresses)
        refused = put(pack(flows.rules), flows.rest)
        if refused is not None:
            raise DeviceError(_why(policy, flows, refused))
        return InForce(len(flows.rules), flows.reason())

    return wanted(policy, step)


def _why(policy: Policy, flows: Flows, refused: Refused) -> str:
    device = policy.dpdk.device.partition(",")[0]
    if refused.at < len(flows.rules):
        at, rule = refused.at, flows.rules[refused.at]
        return f"{flows.file}:{flows.lines[at]}: the hardware of {device} does not take '{rule.name}': {refused.why}"
    return f"the hardware of {device} cannot keep what is not steered on queue {flows.rest}: {refused.why}"
