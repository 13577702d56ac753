# SPDX-License-Identifier: Apache-2.0
"""Rules of a policy as what network hardware can match: fields with masks, and an order between those that overlap.

What lives here: the translation that both kinds of hardware rules begin with, and its refusals. It is pure: no device
is asked. What does not: how a rule is written for DPDK (`rte.py`) or ethtool (`ntuple.py`).

Hardware chooses a queue, or drops; the steering program, or the classifier, still decides about each packet that
arrives. So hardware may send too much to the queues of the stack, and never too little of what is live. What it drops
is gone, so it drops only what the program would drop for certain; the rest of a `drop` rule is left to the program, and
the reason is told at the rule's place:

- A policy is about what is addressed to this host: without its addresses a `drop` rule has to name one.
- ICMP errors belong to the flow that they quote, which hardware does not look at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from bypass.errors import PolicyError, Problem
from bypass.policy import Policy
from bypass.rules import ICMP, ICMPV6, TCP, UDP, Address, Network, PortRange, Rule, port_prefixes
from bypass.steer_maps import Endpoint

__all__ = ["LIMIT", "HardwareAction", "HardwareRule", "Translation", "translate"]

HardwareAction = Literal["steer", "pass", "drop"]

LIMIT = 4096
"""Rules that are made at most, unless the caller knows the size of the device's table."""
WHOLE_PORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class HardwareRule:
    """One rule of a device.

    Attributes:
        rule: of the policy.
        action: the rule's; or `pass` for what a `steer` rule decides and does not take (IPv6, what is not live).
        family: 4 or 6.
        proto: IP protocol; None: any.
        local, remote: prefixes; None: any.
        local_port, remote_port: value and mask; (0, 0): any, and packets without ports too.
        vlan: of the outermost tag; None: tagged or not.
        level: 0 is asked first. Only rules that overlap and differ in what they decide have different levels.
    """

    rule: Rule
    action: HardwareAction
    family: int
    proto: int | None
    local: Network | None
    remote: Network | None
    local_port: tuple[int, int]
    remote_port: tuple[int, int]
    vlan: int | None
    level: int = 0

    @property
    def match(self) -> tuple[object, ...]:
        """What it compares."""
        return (
            self.family,
            self.proto,
            self.local,
            self.remote,
            self.local_port,
            self.remote_port,
            self.vlan,
        )

    def overlaps(self, other: HardwareRule) -> bool:
        """Some packet matches both."""
        return (
            self.family == other.family
            and (self.proto is None or other.proto is None or self.proto == other.proto)
            and (self.vlan is None or other.vlan is None or self.vlan == other.vlan)
            and _ports_meet(self.local_port, other.local_port)
            and _ports_meet(self.remote_port, other.remote_port)
            and _nets_meet(self.local, other.local)
            and _nets_meet(self.remote, other.remote)
        )


@dataclass(frozen=True, slots=True)
class Translation:
    """`rules`: those that are asked first at the beginning. `left`: what the program does in their place, and why."""

    rules: tuple[HardwareRule, ...]
    left: tuple[Problem, ...]
    file: str


def translate(
    policy: Policy,
    *,
    live: Iterable[Endpoint] | None = None,
    addresses: Collection[Address] | None = None,
    limit: int = LIMIT,
    by_rule: bool = False,
) -> Translation:
    """The rules that hardware needs.

    A `pass` rule is among them only where it takes something away from a rule of lower rank: what no rule matches is
    the kernel's anyhow.

    Args:
        policy: `steer` rules become rules for TCP and UDP over IPv4, as the stack speaks.
        live: entries of sockets: only what they own is steered. None: whatever the rules grant.
        addresses: of this host. None: not known, and then a `drop` rule has to name one.
        limit: rules that the device has room for.
        by_rule: which rule matches is to be known, not only what it decides.

    Raises:
        PolicyError: at the rule for which there is no room.
    """
    endpoints = None if live is None else list(live)
    left: list[Problem] = []
    found: list[HardwareRule] = []
    ranks = policy.compiled.ranks
    certain = 0
    for rule in sorted(policy.flows, key=lambda r: -ranks[r.index]):
        made = list(_of_rule(rule, endpoints, addresses, left))
        found += made
        certain += sum(r.action != "pass" for r in made)  # which of the others are needed is known at the end
        if certain > limit:
            raise PolicyError([_too_many(rule, limit)], policy.path)
    needed = _without_idle(found)
    if len(needed) > limit:
        raise PolicyError([_too_many(needed[limit].rule, limit)], policy.path)
    placed = sorted(_levels(needed, by_rule), key=lambda r: r.level)
    return Translation(tuple(placed), tuple(sorted(left, key=lambda p: (p.line, p.column))), policy.path)


# ---- One rule ------------------------------------------------------------------------------------------------------
def _of_rule(
    rule: Rule, live: list[Endpoint] | None, addresses: Collection[Address] | None, left: list[Problem]
) -> Iterator[HardwareRule]:
    if rule.action == "steer":
        protos = (TCP, UDP) if rule.proto is None else (rule.proto,)
        for shared in _shared(rule, protos, live):
            yield from _cut(rule, "steer", 4, shared)
        for family in _families(rule):
            yield from _cut(rule, "pass", family, rule)
    elif rule.action == "pass":
        for family in _families(rule):
            yield from _cut(rule, "pass", family, rule)
    else:
        yield from _of_drop(rule, addresses, left)


def _shared(rule: Rule, protos: Iterable[int], live: list[Endpoint] | None) -> list[Rule]:
    """What a rule steers of each protocol: all that it grants, or what both it and an entry match, each only once."""
    each = [replace(rule, proto=p) for p in protos]
    if live is None:
        return each
    found = (_intersection(r, e) for r in each for e in live)
    return list(dict.fromkeys(r for r in found if r is not None))


def _of_drop(
    rule: Rule, addresses: Collection[Address] | None, left: list[Problem]
) -> Iterator[HardwareRule]:
    if rule.proto in (None, ICMP, ICMPV6):
        what = "ICMP" if rule.proto is None else "it"
        left.append(
            _left(rule, "proto", f"{what} is dropped by the program, for an error may quote a live flow")
        )
    protos = (TCP, UDP) if rule.proto is None else () if rule.proto in (ICMP, ICMPV6) else (rule.proto,)
    if addresses is None and not _is_host(rule.local):
        if protos:
            why = (
                "it is dropped by the program, for hardware would also drop what is routed through this host"
            )
            left.append(_left(rule, "local", why, "name one address of this host, or tell the addresses"))
        return
    assert rule.local is not None or addresses is not None
    hosts = [rule.local] if addresses is None else [_host(a) for a in _sorted(addresses)]
    for host in hosts:
        assert host is not None
        if host.version in _families(rule) and (rule.local is None or host.subnet_of(rule.local)):  # type: ignore[arg-type]
            for proto in protos:
                yield from _cut(rule, "drop", host.version, replace(rule, local=host, proto=proto))


def _sorted(addresses: Collection[Address]) -> list[Address]:
    return sorted(addresses, key=lambda a: (a.version, a.packed))


def _intersection(rule: Rule, e: Endpoint) -> Rule | None:
    local_port = _ports_shared(rule.local_port, PortRange(e.lport, e.last_port))
    remote_port = _ports_shared(
        rule.remote_port, PortRange(e.rport, e.rport) if e.rport is not None else None
    )
    if rule.proto != e.proto or local_port is None or remote_port is None:
        return None
    for address, net in ((e.laddr, rule.local), (e.raddr, rule.remote)):
        if address is not None and net is not None and address not in net:
            return None
    return replace(
        rule,
        local=_host(e.laddr) if e.laddr is not None else rule.local,
        remote=_host(e.raddr) if e.raddr is not None else rule.remote,
        local_port=local_port,
        remote_port=remote_port if remote_port.width < WHOLE_PORT else None,
    )


def _ports_shared(a: PortRange | None, b: PortRange | None) -> PortRange | None:
    """None: no port is in both."""
    ranges = [r for r in (a, b) if r is not None] or [PortRange(1, WHOLE_PORT)]
    first, last = max(r.first for r in ranges), min(r.last for r in ranges)
    return PortRange(first, last) if first <= last else None


def _cut(rule: Rule, action: HardwareAction, family: int, what: Rule) -> Iterator[HardwareRule]:
    """A rule for each pair of port prefixes of `what`."""
    for local_port in port_prefixes(what.local_port):
        for remote_port in port_prefixes(what.remote_port):
            yield HardwareRule(
                rule, action, family, what.proto, what.local, what.remote, local_port, remote_port, what.vlan
            )


def _families(rule: Rule) -> tuple[int, ...]:
    if rule.family:
        return (rule.family,)
    return {ICMP: (4,), ICMPV6: (6,)}.get(rule.proto or 0, (4, 6))


def _host(address: Address) -> Network:
    import ipaddress

    return ipaddress.ip_network(address)


def _is_host(net: Network | None) -> bool:
    return net is not None and net.prefixlen == net.max_prefixlen


# ---- Between rules -------------------------------------------------------------------------------------------------
def _ports_meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return (a[0] ^ b[0]) & a[1] & b[1] == 0


def _nets_meet(a: Network | None, b: Network | None) -> bool:
    return a is None or b is None or a.overlaps(b)  # families were compared


class _Index:
    """Rules by their local port, to look only at those that may overlap."""

    def __init__(self) -> None:
        self._all: list[HardwareRule] = []
        self._wide: list[HardwareRule] = []
        self._port: defaultdict[int, list[HardwareRule]] = defaultdict(list)

    def add(self, rule: HardwareRule) -> None:
        self._all.append(rule)
        value, mask = rule.local_port
        (self._port[value] if mask == WHOLE_PORT else self._wide).append(rule)

    def overlapping(self, rule: HardwareRule) -> Iterator[HardwareRule]:
        value, mask = rule.local_port
        near = (self._port[value], self._wide) if mask == WHOLE_PORT else (self._all,)
        return (other for group in near for other in group if other.overlaps(rule))


def _without_idle(rules: list[HardwareRule]) -> list[HardwareRule]:
    """Without `pass` rules that take nothing from a rule behind them. What a `steer` rule does not take could only be
    dropped there: what is live and matches both is in its own rules. `rules`: the highest rank first."""
    kept, drops, steers = [], _Index(), _Index()
    for rule in reversed(rules):
        if rule.action == "pass":
            behind = (drops,) if rule.rule.action == "steer" else (drops, steers)
            if not any(True for index in behind for _ in index.overlapping(rule)):
                continue
        kept.append(rule)
        if rule.action != "pass":
            (drops if rule.action == "drop" else steers).add(rule)
    return kept[::-1]


def _levels(rules: list[HardwareRule], by_rule: bool) -> Iterator[HardwareRule]:
    """Each behind those of higher rank that overlap it and decide otherwise."""
    above = {"steer": _Index(), "pass": _Index(), "drop": _Index()}
    for rule in rules:
        level = 0
        for action, index in above.items():
            if action == rule.action and not (by_rule and action == "steer"):
                continue
            for other in index.overlapping(rule):
                if other.action != rule.action or other.rule.index != rule.rule.index:
                    level = max(level, other.level + 1)
        placed = replace(rule, level=level)
        above[rule.action].add(placed)
        yield placed


# ---- What is told --------------------------------------------------------------------------------------------------
def _left(rule: Rule, field: str, why: str, hint: str = "") -> Problem:
    return Problem(
        f"flows[{rule.index}].match.{field}", rule.line, rule.column, f"'{rule.name}': {why}", rule.name, hint
    )


def _too_many(rule: Rule, limit: int) -> Problem:
    return Problem(
        f"flows[{rule.index}]",
        rule.line,
        rule.column,
        f"'{rule.name}' and the rules of higher rank need more than the {limit} rules that there is room for",
        rule.name,
        "use port ranges that are aligned powers of two (such as 8000-8015), or prefixes in place of hosts",
    )
