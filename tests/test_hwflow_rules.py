# SPDX-License-Identifier: Apache-2.0
"""A policy's rules in hardware: tables of what becomes of which rule, and the promise behind them, on random policies
and packets: what is live reaches the stack, and nothing is dropped that the program would not drop."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bypass.errors import PolicyError
from bypass.hwflow import HardwareRule, Translation, rte_rules, translate
from bypass.hwflow.rte import Item
from bypass.policy import Policy, parse_policy
from bypass.rules import MAX_MASKS, Address, PortRange, Rule, check_conflicts
from bypass.steer_maps import Endpoint

HEAD = "version: 1\ninterface: eth1\nbackend: {kind: afxdp}\nflows:\n"


def policy(*flows: str) -> Policy:
    """Flows as `name: match -> action`."""
    text = HEAD
    for flow in flows:
        name, _, rest = flow.partition(": ")
        match, _, action = rest.rpartition(" -> ")
        text += f"  - {{name: {name}, match: {{{match}}}, action: {action}}}\n"
    return parse_policy(text, "p.yaml")


def said(r: HardwareRule) -> str:
    """A rule in words, for tables."""
    words = [f"{r.level} {r.action} v{r.family}"]
    ports = (("local", r.local, r.local_port), ("remote", r.remote, r.remote_port))
    if r.proto is not None:
        words.append(f"proto {r.proto}")
    for side, net, (value, mask) in ports:
        if net is not None:
            words.append(f"{side} {net}")
        if mask:
            words.append(f"{side} port {value}" + (f"/{mask:#x}" if mask != 0xFFFF else ""))
    if r.vlan is not None:
        words.append(f"vlan {r.vlan}")
    return " ".join(words)


WEB = "web: proto: tcp, local: 192.0.2.10, local_port: 80 -> steer"


@pytest.mark.parametrize(
    ("flows", "rules"),
    [
        ([WEB], ["0 steer v4 proto 6 local 192.0.2.10/32 local port 80"]),
        (
            ["all: local: 192.0.2.10 -> steer"],
            ["0 steer v4 proto 6 local 192.0.2.10/32", "0 steer v4 proto 17 local 192.0.2.10/32"],
        ),
        (
            ["range: proto: udp, local_port: 8000-8018, remote: 198.51.100.0/24 -> steer"],
            [
                "0 steer v4 proto 17 local port 8000/0xfff0 remote 198.51.100.0/24",
                "0 steer v4 proto 17 local port 8016/0xfffe remote 198.51.100.0/24",
                "0 steer v4 proto 17 local port 8018 remote 198.51.100.0/24",
            ],
        ),
        # What no rule matches is the kernel's: a pass rule is needed only where it takes something away.
        (
            [WEB, "ssh: proto: tcp, local_port: 22 -> pass"],
            ["0 steer v4 proto 6 local 192.0.2.10/32 local port 80"],
        ),
        (
            ["most: proto: tcp, local: 192.0.2.10 -> steer", "ssh: proto: tcp, local_port: 22 -> pass"],
            ["0 pass v4 proto 6 local port 22", "1 steer v4 proto 6 local 192.0.2.10/32"],
        ),
        (
            ["net: proto: tcp, local: 192.0.2.0/24 -> steer", "not: proto: tcp, local: 192.0.2.10 -> pass"],
            ["0 pass v4 proto 6 local 192.0.2.10/32", "1 steer v4 proto 6 local 192.0.2.0/24"],
        ),
        # A steer rule that wins and does not take (IPv6) saves from a drop behind it.
        (
            ["web: proto: tcp, local_port: 80 -> steer", "bad: proto: tcp, local: '2001:db8::1' -> drop"],
            [
                "0 steer v4 proto 6 local port 80",
                "0 pass v6 proto 6 local port 80",
                "1 drop v6 proto 6 local 2001:db8::1/128",
            ],
        ),
        (
            ["bad: proto: sctp, local: 192.0.2.10, vlan: 7 -> drop"],
            ["0 drop v4 proto 132 local 192.0.2.10/32 vlan 7"],
        ),
        # ICMP errors may belong to a live flow: TCP and UDP only.
        (
            ["bad: remote: 203.0.113.0/24, local: 192.0.2.10 -> drop"],
            [
                "0 drop v4 proto 6 local 192.0.2.10/32 remote 203.0.113.0/24",
                "0 drop v4 proto 17 local 192.0.2.10/32 remote 203.0.113.0/24",
            ],
        ),
        (["ping: proto: icmp, local: 192.0.2.10 -> drop"], []),
    ],
)
def test_a_rule_becomes_these(flows: list[str], rules: list[str]) -> None:
    assert sorted(said(r) for r in translate(policy(*flows)).rules) == sorted(rules)


def test_a_drop_needs_an_address_of_this_host_and_says_where() -> None:
    p = policy(WEB, "bad: proto: udp, remote: 203.0.113.0/24 -> drop", "any: remote: 203.0.113.9 -> drop")
    found = translate(p)
    assert [said(r)[:7] for r in found.rules] == ["0 steer"]
    assert [x.text("p.yaml") for x in found.left] == [
        "p.yaml:6:5: flows[1].match.local: 'bad': it is dropped by the program, for hardware would also drop what is "
        "routed through this host: name one address of this host, or tell the addresses",
        "p.yaml:7:5: flows[2].match.proto: 'any': ICMP is dropped by the program, for an error may quote a live flow",
        "p.yaml:7:5: flows[2].match.local: 'any': it is dropped by the program, for hardware would also drop what is "
        "routed through this host: name one address of this host, or tell the addresses",
    ]
    ours = [ipaddress.ip_address(a) for a in ("192.0.2.11", "192.0.2.10", "2001:db8::1")]
    rules = [said(r) for r in translate(p, addresses=ours).rules if r.rule.name == "bad"]
    assert rules == [f"0 drop v4 proto 17 local 192.0.2.{n}/32 remote 203.0.113.0/24" for n in (10, 11)]


def endpoint(
    lport: int, laddr: str | None = None, raddr: str | None = None, rport: int | None = None, **more: Any
) -> Endpoint:
    ends = [None if a is None else ipaddress.IPv4Address(a) for a in (laddr, raddr)]
    return Endpoint(1, more.pop("proto", 6), ends[0], lport, ends[1], rport, 0, False, **more)


@pytest.mark.parametrize(
    ("live", "rules"),
    [
        ([], []),
        ([endpoint(80)], ["0 steer v4 proto 6 local 192.0.2.0/24 local port 80 remote 198.51.100.0/24"]),
        (
            [endpoint(80, "192.0.2.10")],
            ["0 steer v4 proto 6 local 192.0.2.10/32 local port 80 remote 198.51.100.0/24"],
        ),
        ([endpoint(80, "203.0.113.1")], []),
        ([endpoint(80, proto=17)], []),
        ([endpoint(9)], []),
        (
            [
                endpoint(80, "192.0.2.10", "198.51.100.7", 5000),
                endpoint(80, "192.0.2.10", "203.0.113.7", 5000),
            ],
            ["0 steer v4 proto 6 local 192.0.2.10/32 local port 80 remote 198.51.100.7/32 remote port 5000"],
        ),
        (
            [endpoint(256, block=True)],
            ["0 steer v4 proto 6 local 192.0.2.0/24 local port 256/0xff00 remote 198.51.100.0/24"],
        ),
        (
            [endpoint(80), endpoint(80)],
            ["0 steer v4 proto 6 local 192.0.2.0/24 local port 80 remote 198.51.100.0/24"],
        ),
    ],
)
def test_only_what_is_both_granted_and_live_is_steered(live: list[Endpoint], rules: list[str]) -> None:
    p = policy("net: proto: tcp, local: 192.0.2.0/24, local_port: 16-8000, remote: 198.51.100.0/24 -> steer")
    assert [said(r) for r in translate(p, live=live).rules] == rules


def test_more_rules_than_the_table_holds_are_refused_at_the_rule_that_does_not_fit() -> None:
    p = policy(WEB, "range: proto: tcp, local_port: 1-32767 -> steer")
    assert len(translate(p, limit=16).rules) == 16
    with pytest.raises(
        PolicyError, match=r"p.yaml:6:5: flows\[1\]: 'range' and .* need more than the 15 rules"
    ):
        translate(p, limit=15)


def test_levels_are_few_unless_each_rule_is_to_be_known() -> None:
    p = policy(WEB, "net: proto: tcp, local: 192.0.2.0/24 -> steer", "rest: proto: tcp -> steer")
    assert [r.level for r in translate(p).rules] == [0, 0, 0]
    known = [(r.level, r.rule.name) for r in translate(p, by_rule=True).rules]
    assert known == [(0, "web"), (1, "net"), (2, "rest")]


# ---- The promise ---------------------------------------------------------------------------------------------------
class Packet(NamedTuple):
    proto: int
    local: Address
    local_port: int
    remote: Address
    remote_port: int
    vlan: int


def addresses(*texts: str) -> list[Address]:
    return [ipaddress.ip_address(t) for t in texts]


OURS = addresses("192.0.2.10", "192.0.2.11", "2001:db8::1")
LOCAL4, REMOTE4 = (
    addresses("192.0.2.10", "192.0.2.11", "192.0.2.99"),
    addresses("198.51.100.7", "198.51.100.8", "203.0.113.1"),
)
LOCAL6, REMOTE6 = addresses("2001:db8::1", "2001:db8::2"), addresses("2001:db8:1::1", "2001:db8:2::1")
PORTS = [1, 22, 80, 81, 8000, 8001, 65535]


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, ...]:
    """Of a policy that would be accepted."""
    found = []
    for index in range(draw(st.integers(1, 6))):
        action = draw(st.sampled_from(["steer", "pass", "drop"]))
        family = 4 if action == "steer" else draw(st.sampled_from([4, 4, 6]))
        proto = draw(
            st.sampled_from(
                [None, 6, 6, 17] if action == "steer" else [None, 6, 17, 132, 1 if family == 4 else 58]
            )
        )

        def net(pool: list[Address], whole: int = 32 if family == 4 else 128) -> Any:
            length = draw(st.sampled_from([None, whole, whole, whole - 1, whole - 8]))
            return (
                None
                if length is None
                else ipaddress.ip_network((draw(st.sampled_from(pool)), length), strict=False)
            )

        def ports(carried: bool = proto in (6, 17)) -> PortRange | None:
            if not carried or not draw(st.booleans()):
                return None
            first, last = sorted(draw(st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS))))
            return PortRange(first, last)

        found.append(
            Rule(
                index,
                f"r{index}",
                proto,
                net(LOCAL4 if family == 4 else LOCAL6),
                ports(),
                net(REMOTE4 if family == 4 else REMOTE6),
                ports(),
                None if action == "steer" else draw(st.sampled_from([None, None, None, 7])),
                action,
                index + 5,
                5,
            )
        )
    return tuple(found)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    v6 = draw(st.integers(0, 3)) == 0
    proto = draw(st.sampled_from([6, 6, 17, 132, 58 if v6 else 1]))
    carried = proto in (6, 17)
    return Packet(
        proto,
        draw(st.sampled_from(LOCAL6 if v6 else LOCAL4)),
        draw(st.sampled_from(PORTS)) if carried else 0,
        draw(st.sampled_from(REMOTE6 if v6 else REMOTE4)),
        draw(st.sampled_from(PORTS)) if carried else 0,
        draw(st.sampled_from([0, 0, 0, 7, 8])),
    )


ENDPOINTS = st.one_of(
    st.none(),
    st.lists(
        st.builds(
            lambda proto, a, port, peer: endpoint(port, a, *peer, proto=proto),
            st.sampled_from([6, 17]),
            st.sampled_from([None, "192.0.2.10", "192.0.2.11"]),
            st.sampled_from(PORTS),
            st.sampled_from([(None, None), ("198.51.100.7", 80), ("203.0.113.1", 8000)]),
        ),
        max_size=4,
    ),
)


def software(p: Policy, live: list[Endpoint] | None, packet: Packet) -> str:
    """What the steering program does with it: the order of bpf/xdp_steer.c, on the policy's own compiled form."""
    if packet.local not in OURS or (packet.vlan and not p.compiled.vlan_depth):
        return "pass"
    rule = p.compiled.decide(*packet)
    if rule is None or rule.action != "steer":
        return "pass" if rule is None else rule.action
    steered = packet.local.version == 4 and packet.proto in (6, 17) and not packet.vlan
    return "steer" if steered and (live is None or any(owns(e, packet) for e in live)) else "pass"


def owns(e: Endpoint, packet: Packet) -> bool:
    return (
        e.proto == packet.proto
        and e.laddr in (None, packet.local)
        and e.lport <= packet.local_port <= e.last_port
        and (e.raddr is None or (e.raddr, e.rport) == (packet.remote, packet.remote_port))
    )


def matches(r: HardwareRule, packet: Packet) -> bool:
    return (
        r.family == packet.local.version
        and r.proto in (None, packet.proto)
        and r.vlan in (None, packet.vlan)
        and (r.local is None or packet.local in r.local)
        and (r.remote is None or packet.remote in r.remote)
        and (packet.local_port ^ r.local_port[0]) & r.local_port[1] == 0
        and (packet.remote_port ^ r.remote_port[0]) & r.remote_port[1] == 0
    )


def keeps_the_promise(p: Policy, live: list[Endpoint] | None, packet: Packet, first: set[str]) -> None:
    """first: what the rules decide that are asked first; nothing: the kernel's."""
    assert len(first) <= 1, "rules of one level decide differently"
    hardware = first.pop() if first else "kernel"
    wanted = software(p, live, packet)
    if wanted == "steer":
        assert hardware == "steer"
    if hardware == "drop":
        assert wanted == "drop"
    decided = p.compiled.decide(*packet)
    if decided is not None and decided.action == "pass" and not packet.vlan:
        assert hardware in ("pass", "kernel")
    if packet.proto in (1, 58):
        assert hardware != "drop"


def made(flows: tuple[Rule, ...]) -> Policy:
    assume(not check_conflicts(flows))
    p = replace(policy(WEB), flows=flows)
    try:
        assert len(p.compiled.masks) <= MAX_MASKS
    except PolicyError:
        assume(False)  # more masks than a policy may have
    return p


def asked_first(rules: Iterable[tuple[int, str]]) -> set[str]:
    found = list(rules)
    return {action for level, action in found if level == min(lv for lv, _ in found)}


@given(rules(), ENDPOINTS, st.lists(packets(), min_size=20, max_size=20))
def test_live_flows_reach_the_stack_and_nothing_else_is_lost(
    flows: tuple[Rule, ...], live: list[Endpoint] | None, seen: list[Packet]
) -> None:
    p = made(flows)
    found = translate(p, live=live, addresses=OURS)
    for packet in seen:
        if packet.vlan and not p.compiled.vlan_depth:
            continue  # ethtool's rules cannot tell tagged frames: docs/hardware.md
        keeps_the_promise(
            p, live, packet, asked_first((r.level, r.action) for r in found.rules if matches(r, packet))
        )


@given(rules(), ENDPOINTS, st.lists(packets(), min_size=20, max_size=20))
def test_so_do_the_patterns_of_rte_flow_byte_by_byte(
    flows: tuple[Rule, ...], live: list[Endpoint] | None, seen: list[Packet]
) -> None:
    p = made(flows)
    found = translate(p, live=live, addresses=OURS, by_rule=True)
    queues = {"drop": "drop", "mark": "steer", "queue": "pass"}
    table = rte_rules(found, (0,), mac="02:00:00:00:00:01")
    for packet in seen:
        frame = headers(packet)
        first = asked_first(
            (r.priority, queues[r.actions[0].kind]) for r in table if pattern_matches(r.pattern, frame)
        )
        keeps_the_promise(p, live, packet, first)
        marks = {
            r.actions[0].values
            for r in table
            if pattern_matches(r.pattern, frame) and r.actions[0].kind == "mark"
        }
        if software(p, live, packet) == "steer":
            decided = p.compiled.decide(*packet)
            assert decided is not None
            assert (decided.index + 1,) in marks


def headers(packet: Packet) -> list[tuple[str, bytes]]:
    """A packet as its headers, outermost first."""
    v4 = packet.local.version == 4
    ethertype = (0x0800 if v4 else 0x86DD).to_bytes(2, "big")
    tag = (0x6000 | packet.vlan).to_bytes(2, "big")
    found = [
        ("eth", bytes.fromhex("020000000001 0200000000ff") + (b"\x81\x00" if packet.vlan else ethertype))
    ]
    if packet.vlan:
        found.append(("vlan", tag + ethertype))
    ends = packet.remote.packed + packet.local.packed
    if v4:
        found.append(("ipv4", bytes([0x45, 0, 0, 40, 1, 2, 0, 0, 64, packet.proto, 3, 4]) + ends))
    else:
        found.append(("ipv6", bytes([0x60, 0, 0, 0, 0, 20, packet.proto, 64]) + ends))
    ports = packet.remote_port.to_bytes(2, "big") + packet.local_port.to_bytes(2, "big")
    if packet.proto in (6, 17):
        found.append(("tcp", ports + bytes(16)) if packet.proto == 6 else ("udp", ports + bytes(4)))
    return found


def pattern_matches(pattern: tuple[Item, ...], frame: list[tuple[str, bytes]]) -> bool:
    """As rte_flow says: the items are the outermost headers, compared where the mask is."""
    if len(pattern) > len(frame):
        return False
    for item, (kind, data) in zip(pattern, frame, strict=False):
        spec, mask = int.from_bytes(item.spec, "big"), int.from_bytes(item.mask, "big")
        if item.kind != kind or (int.from_bytes(data, "big") ^ spec) & mask:
            return False
    return True


def test_translations_are_data() -> None:
    found = translate(policy(WEB))
    assert isinstance(found, Translation)
    assert hash(found.rules) == hash(translate(policy(WEB)).rules)
