# SPDX-License-Identifier: Apache-2.0
"""Rules of a policy: their order, their conflicts, and their compiled form for the steering program.

What lives here: the rule itself, its rank (which rule wins for a packet), the refusal of rules that
contradict each other, and the compilation to masks and keys, one hash lookup a mask. What does not: reading
YAML (`policy.py`), and the layout of BPF maps (`steering.py`).

    rule  local_port 8000-8015, local 192.0.2.10   ->  mask (local /32, local port 0xfff0, protocol)
                                                       key  (192.0.2.10, 8000, tcp)
    packet  to 192.0.2.10:8007  --for each mask-->  packet fields & mask == key ?  highest rank wins

A field that a mask leaves out is zero in its keys and in the masked packet. Ports of rules start at 1, so a
packet without ports (a later fragment, ICMP) is looked up with ports 0 and meets no rule that names ports.
"""

from __future__ import annotations

import ipaddress
from array import array
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bypass.access import Allow
from bypass.errors import PolicyError, Problem

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Action = Literal["steer", "pass", "drop"]

MAX_MASKS = 16
"""Distinct masks of a policy: each costs the steering program one hash lookup per packet."""
MAX_ENTRIES = 1 << 22
"""Entries of the compiled form, all masks together: bounds the kernel memory of a policy."""
MAX_PROBLEMS = 1000
"""Problems that are listed one by one; what follows is only counted."""

PROTOCOLS: dict[str, int] = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132}
"""Names that `proto` takes, by IANA protocol number; any other protocol is written as its number."""
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58

_PORTS = 65536
_MAPPED_BITS = 96  # an IPv4 prefix inside ::ffff:0:0/96, RFC 4291 2.5.5.2
_MAPPED = 0xFFFF << 32


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports first..last, both included; 1 <= first <= last <= 65535."""

    first: int
    last: int

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def width(self) -> int:
        """Number of ports."""
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One flow of a policy. `None` in a match field: anything.

    "Local" is this host (destination of received packets), "remote" its peer. A rule that names a port
    matches only packets that carry ports.

    Attributes:
        index: place in the file, from 0; the rule number in verdicts and counters.
        name: unique in its policy.
        proto: IP protocol number.
        local, remote: a host is a prefix of full length. Both of one family.
        vlan: 802.1Q VLAN identifier, 1..4094, of the outermost tag; None: tagged or not.
        line, column: where the rule begins in the file, from 1; 0: not from a file.
        allow: who may use it, beside root and the user who runs the broker.
    """

    index: int
    name: str
    proto: int | None
    local: Network | None
    local_port: PortRange | None
    remote: Network | None
    remote_port: PortRange | None
    vlan: int | None
    action: Action
    line: int = 0
    column: int = 0
    allow: Allow | None = None

    @property
    def family(self) -> int:
        """4 or 6, by the addresses that the rule names; 0 when it names none and matches both."""
        if self.local is not None:
            return self.local.version
        return self.remote.version if self.remote is not None else 0

    @property
    def rank(self) -> int:
        """What decides between rules that match one packet: the larger wins.

        By local port width, local prefix, remote prefix, remote port width, VLAN, protocol, in this order;
        narrower first, an absent field is the widest. 50 bits.
        """
        rank = _PORTS - (self.local_port.width if self.local_port else _PORTS)
        rank = rank << 8 | (self.local.prefixlen + 1 if self.local is not None else 0)
        rank = rank << 8 | (self.remote.prefixlen + 1 if self.remote is not None else 0)
        rank = rank << 16 | _PORTS - (self.remote_port.width if self.remote_port else _PORTS)
        rank = rank << 1 | (self.vlan is not None)
        return rank << 1 | (self.proto is not None)

    def match_text(self) -> str:
        """The match part in words, as `proto tcp, local 192.0.2.10, local_port 80`."""
        fields = (
            ("proto", None if self.proto is None else protocol_name(self.proto)),
            ("local", None if self.local is None else network_text(self.local)),
            ("local_port", self.local_port),
            ("remote", None if self.remote is None else network_text(self.remote)),
            ("remote_port", self.remote_port),
            ("vlan", self.vlan),
        )
        return ", ".join(f"{name} {value}" for name, value in fields if value is not None)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which bits of a packet one lookup compares.

    Attributes:
        family: the key holds the IP version (the rules name an address).
        local_plen, remote_plen: leading bits of the address, of 32, or of 128 when the policy's keys hold
            IPv6 addresses (IPv4 is then ::ffff:a.b.c.d, and its prefixes count 96 bits more).
        local_port_mask, remote_port_mask: 0 (port not compared) .. 0xffff.
        proto, vlan: whether the protocol and the VLAN identifier are compared.
        max_rank: the highest `Entry.rank` under this mask: a lookup that already has more need not try it.
    """

    family: bool
    local_plen: int
    remote_plen: int
    local_port_mask: int
    remote_port_mask: int
    proto: bool
    vlan: bool
    max_rank: int


class Key(NamedTuple):
    """Masked packet fields as integers. Fields that the mask does not compare are 0."""

    family: int  # 0, 4, 6
    proto: int
    vlan: int
    local: int  # the address as a number of 32 or 128 bits, see Mask.local_plen
    remote: int
    local_port: int
    remote_port: int


class Entry(NamedTuple):
    """One key of one mask, and the rule that wins there."""

    mask: int  # index into CompiledRules.masks
    key: Key
    rule: int  # Rule.index
    rank: int  # 1..number of rules, unique to the rule: larger wins, no two rules tie
    action: Action


@dataclass(slots=True)
class CompiledRules:
    """Rules as masks and keys.

    Attributes:
        rules: the rules they were made from, in file order.
        masks: at most MAX_MASKS, by descending `max_rank`.
        uses_v6: some rule can act on an IPv6 packet, so IPv6 packets have to be parsed.
        key_v6: addresses in keys have 128 bits; else 32, and an IPv6 packet is looked up with addresses 0.
        vlan_depth: VLAN tags to look behind, 0 or 1. At 0 no rule can act on a tagged frame.
        ranks: by rule index: `Entry.rank`.
    """

    rules: Sequence[Rule]
    masks: list[Mask]
    uses_v6: bool
    key_v6: bool
    vlan_depth: int
    ranks: array[int]
    _tables: list[dict[Key, int]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        """Number of entries."""
        return sum(len(t) for t in self._tables)

    def entries(self) -> Iterator[Entry]:
        """All entries, mask by mask."""
        for mask, table in enumerate(self._tables):
            for key, rule in table.items():
                yield Entry(mask, key, rule, self.ranks[rule], self.rules[rule].action)

    def decide(
        self, proto: int, local: Address, local_port: int, remote: Address, remote_port: int, vlan: int = 0
    ) -> Rule | None:
        """The rule that decides for one packet, found as the steering program finds it: one lookup a mask.

        Args:
            proto: IP protocol number.
            local, remote: destination and source of the packet, of one family.
            local_port, remote_port: 0 for a packet without ports.
            vlan: of the outermost tag; 0: untagged.
        """
        best = 0
        found = None
        family = local.version
        hidden = family == 6 and not self.key_v6
        bits, mapped = (128, _MAPPED if family == 4 else 0) if self.key_v6 else (32, 0)
        ours, theirs = (0, 0) if hidden else (int(local) | mapped, int(remote) | mapped)
        for mask, table in zip(self.masks, self._tables, strict=True):
            if best > mask.max_rank:
                break
            local_shift, remote_shift = bits - mask.local_plen, bits - mask.remote_plen
            key = Key(
                family if mask.family else 0,
                proto if mask.proto else 0,
                vlan if mask.vlan else 0,
                ours >> local_shift << local_shift,
                theirs >> remote_shift << remote_shift,
                local_port & mask.local_port_mask,
                remote_port & mask.remote_port_mask,
            )
            rule = table.get(key)
            if rule is not None and self.ranks[rule] > best:
                best, found = self.ranks[rule], self.rules[rule]
        return found


def protocol_name(proto: int) -> str:
    """`tcp` for 6; the number as text when it has no name here."""
    return next((name for name, number in PROTOCOLS.items() if number == proto), str(proto))


def network_text(net: Network) -> str:
    """A prefix as written in a policy: a host without its length."""
    return str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)


def port_prefixes(ports: PortRange | None) -> list[tuple[int, int]]:
    """The (value, mask) pairs that together cover exactly `ports`; [(0, 0)] for None.

    At most 30 pairs; one for a single port or an aligned power of two.
    """
    if ports is None:
        return [(0, 0)]
    out = []
    first = ports.first
    while first <= ports.last:
        size = first & -first or _PORTS
        while first + size - 1 > ports.last:
            size >>= 1
        out.append((first, (_PORTS - 1) & ~(size - 1)))
        first += size
    return out


def check_conflicts(rules: Sequence[Rule]) -> list[Problem]:
    """Pairs of rules that match a common packet with equal rank and different actions.

    Each rule is named at most once for each other action, with the first line it contradicts. Takes
    O(n log n) for n rules.
    """
    groups: defaultdict[tuple[object, ...], list[Rule]] = defaultdict(list)
    for r in rules:
        # Equal rank means equal widths: overlapping addresses are then equal ones, ports may overlap in part.
        groups[
            r.local,
            r.remote,
            r.local_port.width if r.local_port else 0,
            r.remote_port.width if r.remote_port else 0,
            r.vlan,
            r.proto,
        ].append(r)
    problems = []
    for group in groups.values():
        first_action = group[0].action
        if any(r.action != first_action for r in group):
            problems += [_conflict(a, b) for a, b in _port_overlaps(group)]
    return sorted(problems, key=lambda p: (p.line, p.column))


def _conflict(a: Rule, b: Rule) -> Problem:
    a, b = sorted((a, b), key=lambda r: r.index)
    return Problem(
        f"flows[{b.index}]",
        b.line,
        b.column,
        f"'{b.name}' ({b.action}) contradicts '{a.name}' ({a.action}) of line {a.line}: "
        "some packets match both, with equal rank",
        b.name,
        "give one of them a narrower match, or both the same action",
    )


def _port_overlaps(group: Sequence[Rule]) -> Iterator[tuple[Rule, Rule]]:
    """Pairs of rules that overlap and differ in action, all with ports of equal width (a plane sweep)."""
    lwidth = group[0].local_port.width if group[0].local_port else _PORTS
    rwidth = group[0].remote_port.width if group[0].remote_port else _PORTS

    def corner(r: Rule) -> tuple[int, int]:
        return (r.local_port.first if r.local_port else 0, r.remote_port.first if r.remote_port else 0)

    order = sorted(((*corner(r), r.index, r) for r in group), key=lambda t: t[:3])
    # per action: the rules that the sweep still meets, sorted by their first remote port
    active: dict[Action, list[tuple[int, int, Rule]]] = {"steer": [], "pass": [], "drop": []}
    oldest = 0
    for local, remote, _, rule in order:
        while order[oldest][0] <= local - lwidth:
            _, old_remote, old_index, old = order[oldest]
            live = active[old.action]
            del live[bisect_right(live, (old_remote, old_index), key=lambda t: t[:2]) - 1]
            oldest += 1
        for action, live in active.items():
            at = bisect_right(live, remote - rwidth, key=lambda t: t[0])
            if action != rule.action and at < len(live) and live[at][0] < remote + rwidth:
                yield live[at][2], rule
        insort(active[rule.action], (remote, rule.index, rule), key=lambda t: t[:2])


def compile_rules(rules: Sequence[Rule], file: str = "policy") -> CompiledRules:
    """Turns rules into masks and keys.

    Where several rules have the same key under a mask only the one of highest rank is kept; of rules with
    equal rank (which then have equal actions) the first in the file.

    Args:
        rules: numbered by `index` from 0 in their order.
        file: the policy's name, for errors.

    Raises:
        PolicyError: more than MAX_MASKS distinct masks or MAX_ENTRIES entries.
    """
    key_v6 = any(r.family == 6 for r in rules)
    order = sorted(rules, key=lambda r: (-r.rank, r.index))
    ranks = array("I", [0]) * len(rules)
    tables: dict[tuple[object, ...], dict[Key, int]] = {}
    masks: list[Mask] = []
    total = 0
    for below, rule in enumerate(order):
        rank = ranks[rule.index] = len(order) - below
        for shape, key in _keys(rule, key_v6):
            table = tables.get(shape)
            if table is None:
                table = tables[shape] = {}
                masks.append(Mask(*shape, max_rank=rank))
            if len(masks) > MAX_MASKS:
                raise PolicyError([_too_many_masks(rules, key_v6)], file)
            if table.setdefault(key, rule.index) == rule.index:
                total += 1
        if total > MAX_ENTRIES:
            raise PolicyError([_too_many_entries(rules)], file)
    return CompiledRules(
        rules=rules,
        masks=masks,
        uses_v6=key_v6 or any(r.action == "drop" and r.family == 0 for r in rules),
        key_v6=key_v6,
        vlan_depth=int(any(r.vlan is not None or r.action == "drop" for r in rules)),
        ranks=ranks,
        _tables=list(tables.values()),
    )


_Shape = tuple[bool, int, int, int, int, bool, bool]


def _keys(rule: Rule, key_v6: bool) -> Iterator[tuple[_Shape, Key]]:
    """The rule's keys, each with its mask (the fields of Mask without max_rank)."""
    local_plen, local = _address_key(rule.local, key_v6)
    remote_plen, remote = _address_key(rule.remote, key_v6)
    family, proto, vlan = rule.family, rule.proto, rule.vlan
    for lport, lmask in port_prefixes(rule.local_port):
        for rport, rmask in port_prefixes(rule.remote_port):
            shape = (family != 0, local_plen, remote_plen, lmask, rmask, proto is not None, vlan is not None)
            yield shape, Key(family, proto or 0, vlan or 0, local, remote, lport, rport)


def _address_key(net: Network | None, key_v6: bool) -> tuple[int, int]:
    """(prefix length, address) in the key's terms."""
    if net is None:
        return 0, 0
    address = int(net.network_address)
    if not key_v6 or net.version == 6:
        return net.prefixlen, address
    return net.prefixlen + _MAPPED_BITS, address | _MAPPED


def _too_many_masks(rules: Sequence[Rule], key_v6: bool) -> Problem:
    """Names the rules that need most masks of their own."""
    by_rule = [(len({shape for shape, _ in _keys(r, key_v6)}), r) for r in rules]
    total = len({shape for r in rules for shape, _ in _keys(r, key_v6)})
    by_rule.sort(key=lambda t: (-t[0], t[1].index))
    listed = ", ".join(f"'{r.name}' (line {r.line}) {n}" for n, r in by_rule[:8])
    if len(by_rule) > 8:
        listed += f", {len(by_rule) - 8} more at most {by_rule[8][0]} each"
    worst = by_rule[0][1]
    return Problem(
        f"flows[{worst.index}].match",
        worst.line,
        worst.column,
        f"the rules need {total} different masks, at most {MAX_MASKS} are possible; masks by rule: {listed}",
        worst.name,
        "use port ranges that are aligned powers of two (such as 8000-8015), fewer ranges, or fewer "
        "different prefix lengths",
    )


def _too_many_entries(rules: Sequence[Rule]) -> Problem:
    worst = max(rules, key=lambda r: len(port_prefixes(r.local_port)) * len(port_prefixes(r.remote_port)))
    return Problem(
        "flows",
        worst.line,
        worst.column,
        f"the rules need more than {MAX_ENTRIES} entries; '{worst.name}' needs most",
        worst.name,
        "use port ranges that are aligned powers of two, or leave the ports out",
    )
