# SPDX-License-Identifier: Apache-2.0
"""Rules: ranks, conflicts, and that masks and keys decide as the rules themselves do."""

from __future__ import annotations

import ipaddress
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import Flow, breadth, matches
from support import examples

from bypass.errors import PolicyError
from bypass.rules import (
    MAX_MASKS,
    TCP,
    Action,
    CompiledRules,
    Key,
    PortRange,
    Rule,
    check_conflicts,
    compile_rules,
    port_prefixes,
)
from bypass.testing import policies as strategies


def rule(index: int, action: Action, **match: Any) -> Rule:
    def net(text: str | None) -> Any:
        return None if text is None else ipaddress.ip_network(text)

    def ports(value: tuple[int, int] | int | None) -> PortRange | None:
        if value is None:
            return None
        return PortRange(value, value) if isinstance(value, int) else PortRange(*value)

    return Rule(
        index,
        f"r{index}",
        match.get("proto"),
        net(match.get("local")),
        ports(match.get("lport")),
        net(match.get("remote")),
        ports(match.get("rport")),
        match.get("vlan"),
        action,
        line=10 + index,
        column=5,
    )


def look_up(compiled: CompiledRules, tables: list[dict[Key, Any]], flow: Flow, vlan: int) -> int | None:
    """The rule that the masks find, as the steering program does: stops when no mask can hold a higher rank."""
    best = None
    for mask, table in zip(compiled.masks, tables, strict=True):
        if best is not None and best.rank > mask.max_rank:
            break
        family = flow.local.version
        if compiled.key_v6:
            bits, shift = 128, (0xFFFF << 32) if family == 4 else 0
        else:
            bits, shift = 32, 0
        hidden = family == 6 and not compiled.key_v6
        addresses = [0 if hidden else int(a) | shift for a in (flow.local, flow.remote)]

        def prefix(address: int, length: int, bits: int = bits) -> int:
            return address >> (bits - length) << (bits - length)

        key = Key(
            family if mask.family else 0,
            flow.proto if mask.proto else 0,
            vlan if mask.vlan else 0,
            prefix(addresses[0], mask.local_plen),
            prefix(addresses[1], mask.remote_plen),
            flow.local_port & mask.local_port_mask,
            flow.remote_port & mask.remote_port_mask,
        )
        entry = table.get(key)
        if entry is not None and (best is None or entry.rank > best.rank):
            best = entry
    return None if best is None else best.rule


def tables_of(compiled: CompiledRules) -> list[dict[Key, Any]]:
    tables: list[dict[Key, Any]] = [{} for _ in compiled.masks]
    for entry in compiled.entries():
        assert entry.key not in tables[entry.mask]
        tables[entry.mask][entry.key] = entry
    return tables


def addresses_near(rules: list[Rule], side: str, family: int) -> list[Any]:
    hosts = {
        ("local", 4): strategies.LOCAL_HOSTS_V4,
        ("local", 6): strategies.LOCAL_HOSTS_V6,
        ("remote", 4): strategies.REMOTE_HOSTS_V4,
        ("remote", 6): strategies.REMOTE_HOSTS_V6,
    }[side, family]
    found = {ipaddress.ip_address(h) for h in hosts}
    for r in rules:
        net = getattr(r, side)
        if net is not None and net.version == family:
            found |= {net.network_address, net.broadcast_address}
            if net.prefixlen:
                found |= {net.network_address - 1 if int(net.network_address) else net.network_address}
    return sorted(found, key=int)


@st.composite
def flows_near(draw: st.DrawFn, rules: list[Rule]) -> tuple[Flow, int]:
    family = draw(st.sampled_from([4, 4, 6]))
    edges = {
        p
        for r in rules
        for q in (r.local_port, r.remote_port)
        if q
        for p in (q.first - 1, q.first, q.last, q.last + 1)
    }
    ports = sorted({p for p in edges if 0 < p < 65536} | {80})
    proto = draw(st.sampled_from([r.proto for r in rules if r.proto is not None] + [6, 17]))
    has_ports = proto in (6, 17) and draw(st.integers(0, 4)) > 0
    flow = Flow(
        proto,
        draw(st.sampled_from(addresses_near(rules, "local", family))),
        draw(st.sampled_from(ports)) if has_ports else 0,
        draw(st.sampled_from(addresses_near(rules, "remote", family))),
        draw(st.sampled_from(ports)) if has_ports else 0,
    )
    return flow, draw(st.sampled_from([0, 0, 0, *strategies.VLANS, 2]))


@settings(max_examples=examples(150))
@given(st.data())
def test_masks_decide_as_the_rules_themselves(data: st.DataObject) -> None:
    rules = data.draw(strategies.rule_lists().filter(bool))
    compiled = compile_rules(rules)
    tables = tables_of(compiled)
    for _ in range(10):
        flow, vlan = data.draw(flows_near(rules))
        matching = [r for r in rules if matches(r, flow, vlan or None)]
        expected = min(matching, key=lambda r: (breadth(r), r.index)).index if matching else None
        assert look_up(compiled, tables, flow, vlan) == expected
        found = compiled.decide(*flow, vlan)
        assert (None if found is None else found.index) == expected


@given(strategies.rule_lists().filter(bool))
def test_masks_come_by_descending_rank_and_ranks_are_unique(rules: list[Rule]) -> None:
    compiled = compile_rules(rules)
    entries = list(compiled.entries())
    assert len(entries) == len(compiled)
    assert sorted(compiled.ranks) == list(range(1, len(rules) + 1))
    highest = [max(e.rank for e in entries if e.mask == m) for m in range(len(compiled.masks))]
    assert [m.max_rank for m in compiled.masks] == highest == sorted(highest, reverse=True)
    assert (
        len(
            {
                (
                    m.local_plen,
                    m.remote_plen,
                    m.local_port_mask,
                    m.remote_port_mask,
                    m.proto,
                    m.vlan,
                    m.family,
                )
                for m in compiled.masks
            }
        )
        == len(compiled.masks)
        <= MAX_MASKS
    )


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_port_prefixes_cover_exactly_the_range(a: int, b: int) -> None:
    ports = PortRange(min(a, b), max(a, b))
    pairs = port_prefixes(ports)
    assert len(pairs) <= 30
    covered: list[int] = []
    for value, mask in pairs:
        assert value & ~mask == 0
        covered += range(value, value + (0xFFFF & ~mask) + 1)
    assert covered == list(range(ports.first, ports.last + 1))


def test_rank_follows_the_order_of_fields() -> None:
    ordered = [
        rule(0, "pass", lport=80, proto=TCP),
        rule(0, "pass", lport=(80, 81), local="192.0.2.1", remote="10.0.0.1", rport=1, vlan=1, proto=TCP),
        rule(0, "pass", local="192.0.2.1"),
        rule(0, "pass", local="192.0.2.0/31", remote="10.0.0.1"),
        rule(0, "pass", local="0.0.0.0/0"),
        rule(0, "pass", remote="10.0.0.1"),
        rule(0, "pass", remote="10.0.0.0/8", rport=5, proto=TCP),
        rule(0, "pass", remote="0.0.0.0/0", rport=(1, 2), proto=TCP),
        rule(0, "pass", rport=5, vlan=2),
        rule(0, "pass", rport=5, proto=TCP),
        rule(0, "pass", rport=(5, 6), proto=TCP),
        rule(0, "pass", vlan=2, proto=TCP),
        rule(0, "pass", vlan=2),
        rule(0, "pass", proto=TCP),
    ]
    ranks = [r.rank for r in ordered]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) == len(ranks)
    assert max(ranks) < 1 << 50


def overlaps(a: Rule, b: Rule) -> bool:
    """Some packet matches both, told field by field."""

    def ports(x: PortRange | None, y: PortRange | None) -> bool:
        return x is None or y is None or (x.first <= y.last and y.first <= x.last)

    def nets(x: Any, y: Any) -> bool:
        return x is None or y is None or (x.version == y.version and x.overlaps(y))

    def same(x: Any, y: Any) -> bool:
        return x is None or y is None or x == y

    families = {f for f in (a.family, b.family) if f}
    return (
        len(families) < 2
        and same(a.proto, b.proto)
        and same(a.vlan, b.vlan)
        and nets(a.local, b.local)
        and nets(a.remote, b.remote)
        and ports(a.local_port, b.local_port)
        and ports(a.remote_port, b.remote_port)
    )


@settings(max_examples=examples(150))
@given(st.lists(st.tuples(strategies.matches(), st.sampled_from(["pass", "drop"])), min_size=2, max_size=12))
def test_conflicts_are_found_exactly_where_pairs_contradict(
    drawn: list[tuple[dict[str, Any], Action]],
) -> None:
    rules = [Rule(i, f"r{i}", **m, action=a, line=i + 1) for i, (m, a) in enumerate(drawn)]
    expected = any(
        breadth(a) == breadth(b) and overlaps(a, b) and a.action != b.action
        for a, b in itertools.combinations(rules, 2)
    )
    assert bool(check_conflicts(rules)) == expected


def test_ranges_of_equal_width_that_overlap_in_part_conflict() -> None:
    rng = random.Random(1)
    for _ in range(200):
        rules = [
            rule(
                i,
                rng.choice(["pass", "drop", "steer"]),
                proto=TCP,
                lport=(p := rng.randrange(1, 400), p + 9),
                rport=(q := rng.randrange(1, 400), q + 19),
            )
            for i in range(40)
        ]
        pairs = {
            b.index for a, b in itertools.permutations(rules, 2) if a.action != b.action and overlaps(a, b)
        }
        found = check_conflicts(rules)
        named = {p.line - 10 for p in found} | {int(p.message.split("'r")[2].split("'")[0]) for p in found}
        assert named <= pairs
        assert bool(named) == bool(pairs)


def test_a_conflict_names_both_lines_and_both_actions() -> None:
    rules = [rule(0, "steer", proto=TCP, lport=(8000, 8009)), rule(1, "drop", proto=TCP, lport=(8005, 8014))]
    (problem,) = check_conflicts(rules)
    assert (problem.line, problem.column, problem.path) == (11, 5, "flows[1]")
    assert "'r1' (drop) contradicts 'r0' (steer) of line 10" in problem.message


def test_equal_matches_with_equal_actions_give_way_to_the_first() -> None:
    rules = [rule(0, "steer", proto=TCP, lport=80), rule(1, "steer", proto=TCP, lport=80)]
    assert check_conflicts(rules) == []
    assert [e.rule for e in compile_rules(rules).entries()] == [0]


def test_seventeen_masks_are_refused_and_their_owners_named() -> None:
    rules = [rule(0, "drop", local="192.0.2.1"), rule(1, "steer", proto=TCP, lport=(1, 65535))]
    with pytest.raises(PolicyError) as caught:
        compile_rules(rules, "p.yaml")
    (problem,) = caught.value.problems
    assert problem.line == 11
    assert "17 different masks, at most 16" in problem.message
    assert "'r1' (line 11) 16, 'r0' (line 10) 1" in problem.message
    assert str(caught.value).startswith("p.yaml:11:5: flows[1].match: ")


def test_what_a_policy_does_not_use_is_not_compiled_in() -> None:
    steer = rule(0, "steer", proto=TCP, local="192.0.2.10", lport=80)
    only = compile_rules([steer])
    assert (only.uses_v6, only.key_v6, only.vlan_depth) == (False, False, 0)
    v6 = compile_rules([steer, rule(1, "pass", local="2001:db8::1")])
    assert (v6.uses_v6, v6.key_v6, v6.vlan_depth) == (True, True, 0)
    drop = compile_rules([steer, rule(1, "drop", proto=17)])
    assert (drop.uses_v6, drop.key_v6, drop.vlan_depth) == (True, False, 1)
    drop_v4 = compile_rules([steer, rule(1, "drop", remote="10.0.0.0/8")])
    assert (drop_v4.uses_v6, drop_v4.key_v6, drop_v4.vlan_depth) == (False, False, 1)
    assert compile_rules([rule(0, "pass", vlan=5)]).vlan_depth == 1


def test_ipv4_and_ipv6_share_the_masks_of_hosts() -> None:
    compiled = compile_rules([rule(0, "drop", local="192.0.2.10"), rule(1, "drop", local="2001:db8::1")])
    (mask,) = compiled.masks
    assert mask.local_plen == 128
    assert {hex(e.key.local) for e in compiled.entries()} == {
        "0xffffc000020a",
        hex(int(ipaddress.ip_address("2001:db8::1"))),
    }
