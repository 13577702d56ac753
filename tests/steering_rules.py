# SPDX-License-Identifier: Apache-2.0
"""Rules for the comparison of the steering program with its model, by seed: each kind exercises other parts of the
program. Frames about them: bypass.testing.flows.
"""

from __future__ import annotations

import ipaddress
import random
from dataclasses import replace

from bypass.errors import PolicyError
from bypass.policy import AfxdpBackend, Policy
from bypass.rules import Action, Network, PortRange, Rule, check_conflicts, compile_rules
from bypass.testing.flows import ICMP, ICMPV6, PORTS, TCP, UDP

BACKEND = AfxdpBackend("afxdp", "auto", None, 2048, None, 2048)


def policy_of(rules: list[Rule], interface: str = "lo") -> Policy:
    """A policy of these rules, without YAML."""
    return Policy(1, interface, BACKEND, tuple(rules), "test")


# ---- Rules -------------------------------------------------------------------------------------------------------
_LOCAL4 = ("192.0.2.10/32", "192.0.2.11/32", "192.0.2.0/26", "192.0.2.0/24", "239.1.2.3/32")
_REMOTE4 = ("198.51.100.1/32", "198.51.100.2/32", "198.51.100.0/30", "198.51.100.0/24", "0.0.0.0/0")
_LOCAL6 = ("2001:db8::10/128", "2001:db8::/64")
_REMOTE6 = ("2001:db8:1::1/128", "2001:db8:1::/48", "::/0")
# Of one mask here some rules rank higher and some lower than those of another: the order in which masks are tried does
# not say which rule wins.
_NESTED = (
    PortRange(990, 1103),
    PortRange(1090, 2100),
    PortRange(2032, 2047),
    PortRange(2000, 2023),
    PortRange(3002, 3999),
    PortRange(3000, 3003),
    PortRange(8000, 8001),
)
_RANGES = (PortRange(8000, 8015), PortRange(1000, 1999), PortRange(8000, 8007), PortRange(1, 65535))


def draw_rules(rng: random.Random, kind: str) -> list[Rule]:
    """Rules without conflicts that fit 16 masks. `kind`: `steer` only steers, `ip4` adds pass and drop, `all` IPv6 and
    VLANs as well, `ranges` has port ranges that overlap each other, and nothing else."""
    draw = _draw_nested if kind == "ranges" else _draw_rule
    rules = [
        draw(rng, i, kind) for i in range(rng.choice((2, 5, 9, 14, 20)) if kind != "ranges" else len(_NESTED))
    ]
    while True:
        conflicts = {int(p.path[6:-1]) for p in check_conflicts(rules)}
        rules = [replace(r, index=i) for i, r in enumerate(r for r in rules if r.index not in conflicts)]
        if conflicts:
            continue
        try:
            compile_rules(rules)
            return rules
        except PolicyError:  # too many masks
            rules = rules[:-1]


def _draw_rule(rng: random.Random, index: int, kind: str) -> Rule:
    action: Action = (
        "steer" if kind == "steer" else rng.choice(("steer", "steer", "steer", "pass", "pass", "drop"))
    )
    v6 = kind == "all" and rng.random() < 0.3
    if v6 and action == "steer":
        action = rng.choice(("pass", "drop"))
    # A drop rule that matches a lot leaves nothing to look at.
    narrow = action == "drop" and not v6
    proto = rng.choice((TCP, TCP, TCP, UDP, UDP, None, ICMPV6 if v6 else ICMP, 47))
    ports = proto in (TCP, UDP, None)
    lport = _draw_ports(rng, 0.8 if narrow else 0.7) if ports else None
    return Rule(
        index,
        f"r{index}",
        proto,
        _draw_net(rng, _LOCAL6 if v6 else _LOCAL4, 0.5),
        lport,
        _draw_net(rng, _REMOTE6 if v6 else _REMOTE4, 0.8 if narrow else 0.3),
        _draw_ports(rng, 0.15) if ports else None,
        rng.choice((5, 6)) if kind == "all" and rng.random() < 0.15 else None,
        action,
    )


def _draw_nested(rng: random.Random, index: int, kind: str) -> Rule:
    action: Action = rng.choice(("steer", "steer", "pass"))
    return Rule(index, f"r{index}", TCP, None, _NESTED[index], None, None, None, action)


def _draw_net(rng: random.Random, pool: tuple[str, ...], probability: float) -> Network | None:
    return ipaddress.ip_network(rng.choice(pool)) if rng.random() < probability else None


def _draw_ports(rng: random.Random, probability: float) -> PortRange | None:
    if rng.random() >= probability:
        return None
    if rng.random() < 0.3:
        return rng.choice(_RANGES)
    port = rng.choice(PORTS)
    return PortRange(port, port)
