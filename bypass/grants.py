# SPDX-License-Identifier: Apache-2.0
"""Live endpoints, and the rule that grants one.

A policy's rule says which flows may be taken from the kernel; an endpoint is what a socket takes at a moment. What
lives here: the endpoint, and whether a policy grants it. What does not: rules (`rules.py`) and maps (`steering.py`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from bypass.rules import Network, Rule, protocol_name


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A live entry: flows that a socket owns at this moment.

    Attributes:
        entry: its number, as verdicts carry it. Numbers are used again, latest possible.
        proto: 6 (TCP) or 17 (UDP).
        laddr: None: any local address.
        raddr, rport: both None: any peer.
        owner: whose AF_XDP sockets get it.
        drain: connections that the kernel still holds stay with the kernel.
    """

    entry: int
    proto: int
    laddr: ipaddress.IPv4Address | None
    lport: int
    raddr: ipaddress.IPv4Address | None
    rport: int | None
    owner: int
    drain: bool

    def __str__(self) -> str:
        peer = "" if self.raddr is None else f" from {self.raddr}:{self.rport}"
        return f"{protocol_name(self.proto)} {self.laddr or '*'}:{self.lport}{peer}"


def grant(rules: Iterable[Rule], endpoint: Endpoint) -> Rule | None:
    """The first steer rule that gives the endpoint any of its flows; None: there is none.

    A rule gives what it matches, less what a rule of higher rank with another action takes away. Only a single
    such rule that takes away everything is noticed; several that do so together are not.
    """
    touching = [r for r in rules if r.vlan is None and r.family in (0, 4) and _touches(r, endpoint)]
    for rule in touching:
        others = (r for r in touching if r.action != "steer" and r.rank > rule.rank)
        if rule.action == "steer" and not any(_covers(r, rule, endpoint) for r in others):
            return rule
    return None


def _touches(rule: Rule, e: Endpoint) -> bool:
    """Does some packet belong to both?"""
    return (
        rule.proto in (None, e.proto)
        and (rule.local is None or e.laddr is None or e.laddr in rule.local)
        and (rule.local_port is None or e.lport in rule.local_port)
        and (rule.remote is None or e.raddr is None or e.raddr in rule.remote)
        and (rule.remote_port is None or e.rport is None or e.rport in rule.remote_port)
    )


def _covers(over: Rule, rule: Rule, e: Endpoint) -> bool:
    """Does `over`, which touches the endpoint, match every packet of it that `rule` matches?"""

    ports = over.remote_port is None or e.rport is not None
    if not ports and rule.remote_port is not None and over.remote_port is not None:
        ports = (
            over.remote_port.first <= rule.remote_port.first
            and rule.remote_port.last <= over.remote_port.last
        )
    return (
        ports
        and _within(over.local, rule.local, e.laddr is not None)
        and _within(over.remote, rule.remote, e.raddr is not None)
    )


def _within(outer: Network | None, inner: Network | None, decided: bool) -> bool:
    """Is every address of `inner` in `outer`? None is all addresses. `decided`: the endpoint names one in both."""
    if outer is None or decided:
        return True
    if isinstance(outer, ipaddress.IPv4Network) and isinstance(inner, ipaddress.IPv4Network):
        return outer.supernet_of(inner)
    return False
