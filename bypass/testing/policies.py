# SPDX-License-Identifier: Apache-2.0
"""Rules and policy files, as docs/policy.md describes them.

Addresses and ports come from small pools that overlap in all the ways that matter (hosts in prefixes, prefixes in
prefixes, ranges that share ports), so that rules compete for the same packets. Frames derived from rules: flows.py.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import yaml
from hypothesis import strategies as st

from bypass.policy_fields import CONGESTION
from bypass.rules import (
    ICMP,
    ICMPV6,
    MAX_MASKS,
    TCP,
    UDP,
    Action,
    Network,
    PortRange,
    Rule,
    check_conflicts,
    compile_rules,
    network_text,
    protocol_name,
)

LOCAL_HOSTS_V4 = ["192.0.2.10", "192.0.2.11", "192.0.2.130", "10.1.0.1"]
LOCAL_HOSTS_V6 = ["2001:db8::10", "2001:db8::11", "2001:db8:1::1"]
REMOTE_HOSTS_V4 = ["198.51.100.7", "198.51.100.200", "203.0.113.5", "10.9.8.7"]
REMOTE_HOSTS_V6 = ["2001:db8:ffff::7", "2001:db8:ffff::8", "fd00::1"]
PORTS = [1, 53, 80, 443, 1023, 1024, 5000, 8000, 8007, 8008, 8015, 8080, 40000, 65535]
VLANS = [1, 100, 4094]


def _nets(hosts: list[str], lengths: tuple[int, ...]) -> list[Network]:
    return sorted({ipaddress.ip_network(f"{h}/{n}", strict=False) for h in hosts for n in lengths}, key=str)


LOCAL_V4 = _nets(LOCAL_HOSTS_V4, (32, 25, 24, 8, 0))
LOCAL_V6 = _nets(LOCAL_HOSTS_V6, (128, 64, 32, 0))
REMOTE_V4 = _nets(REMOTE_HOSTS_V4, (32, 25, 24, 8, 0))
REMOTE_V6 = _nets(REMOTE_HOSTS_V6, (128, 64, 16, 0))

RANGES = [
    PortRange(8000, 8015),
    PortRange(8000, 8007),
    PortRange(8, 15),
    PortRange(32768, 65535),
    PortRange(80, 81),
]
ODD_RANGES = [PortRange(8001, 8006), PortRange(79, 81), PortRange(5, 6)]


def port_ranges(odd: bool = True) -> st.SearchStrategy[PortRange]:
    """Single ports, aligned ranges, and (`odd`) ranges that need several prefixes."""
    single = st.sampled_from(PORTS).map(lambda p: PortRange(p, p))
    return st.one_of(single, single, st.sampled_from(RANGES + (ODD_RANGES if odd else [])))


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


@st.composite
def matches(draw: st.DrawFn, *, v6: bool = True, vlan: bool = True) -> dict[str, Any]:
    """Match fields of a valid rule, at least one of them not None."""
    family = draw(st.sampled_from([4, 4, 6] if v6 else [4]))
    locals_, remotes = (LOCAL_V4, REMOTE_V4) if family == 4 else (LOCAL_V6, REMOTE_V6)
    local, remote = draw(_maybe(st.sampled_from(locals_))), draw(_maybe(st.sampled_from(remotes)))
    protos = [TCP, TCP, TCP, UDP, UDP, None, 47]
    if family == 4 or (local is None and remote is None):
        protos.append(ICMP)
    if family == 6 or (local is None and remote is None):
        protos.append(ICMPV6)
    proto = draw(st.sampled_from(protos))
    has_ports = proto in (TCP, UDP)
    match = {
        "proto": proto,
        "local": local,
        "local_port": draw(_maybe(port_ranges())) if has_ports else None,
        "remote": remote,
        "remote_port": draw(st.one_of(st.none(), st.none(), port_ranges())) if has_ports else None,
        "vlan": draw(st.one_of(*[st.none()] * 4, st.sampled_from(VLANS))) if vlan else None,
    }
    if all(value is None for value in match.values()):
        match["proto"] = UDP
    return match


def is_steerable(match: dict[str, Any]) -> bool:
    nets = [n for n in (match["local"], match["remote"]) if n is not None]
    return match["proto"] in (None, TCP, UDP) and match["vlan"] is None and all(n.version == 4 for n in nets)


@st.composite
def rule_lists(
    draw: st.DrawFn, *, min_size: int = 1, max_size: int = 12, v6: bool = True, vlan: bool = True
) -> list[Rule]:
    """Rules that one policy may hold: no two contradict each other, and they need at most MAX_MASKS masks."""
    rules: list[Rule] = []
    for match in draw(st.lists(matches(v6=v6, vlan=vlan), min_size=min_size, max_size=max_size)):
        wanted: list[Action] = ["pass", "drop"]
        if is_steerable(match):
            wanted += ["steer"] * 3
        wanted = draw(st.permutations(wanted))
        index = len(rules)
        for action in dict.fromkeys(wanted):
            rule = Rule(index, f"r{index}", **match, action=action, line=index + 1, column=1)
            if not check_conflicts([*rules, rule]) and masks_needed([*rules, rule]) <= MAX_MASKS:
                rules.append(rule)
                break
    return rules


def masks_needed(rules: list[Rule]) -> int:
    """Number of distinct masks; more than MAX_MASKS is told as MAX_MASKS + 1."""
    from bypass.errors import PolicyError

    try:
        return len(compile_rules(rules).masks)
    except PolicyError:
        return MAX_MASKS + 1


def match_document(rule: Rule) -> dict[str, Any]:
    """The rule's match as a policy file holds it."""
    fields = {
        "proto": None if rule.proto is None else proto_document(rule.proto),
        "local": None if rule.local is None else network_text(rule.local),
        "local_port": port_document(rule.local_port),
        "remote": None if rule.remote is None else network_text(rule.remote),
        "remote_port": port_document(rule.remote_port),
        "vlan": rule.vlan,
    }
    return {name: value for name, value in fields.items() if value is not None}


def proto_document(proto: int) -> str | int:
    name = protocol_name(proto)
    return proto if name.isdigit() else name


def port_document(ports: PortRange | None) -> int | str | None:
    if ports is None:
        return None
    return ports.first if ports.width == 1 else str(ports)


def backends() -> st.SearchStrategy[dict[str, Any]]:
    """Valid `backend` mappings."""
    optional = {
        "mode": st.sampled_from(["auto", "zerocopy", "copy", "skb"]),
        "queues": st.one_of(
            st.just("all"), st.lists(st.integers(0, 255), min_size=1, max_size=4, unique=True)
        ),
        "ring_size": st.sampled_from([64, 1024, 2048, 32768]),
        "frames": st.integers(8 * 32768, 1 << 22),
        "frame_size": st.sampled_from([2048, 4096]),
    }
    return st.fixed_dictionaries({"kind": st.just("afxdp")}, optional=optional)


def tunings() -> st.SearchStrategy[dict[str, Any]]:
    """Valid `profile`, `stack` and `congestion` keys, each there or not."""
    sizes = {
        "conns": st.integers(1, 1 << 24),
        "chunks": st.integers(1, 1 << 24),
        "sndbuf": st.integers(4096, 1 << 18),
        "rcvbuf": st.integers(4096, 1 << 18),
        "sndbuf_max": st.integers(1 << 20, 1 << 30),
        "rcvbuf_max": st.integers(1 << 20, 1 << 30),
        "delack_ms": st.integers(1, 500),
        "spin_us": st.integers(0, 1_000_000),
        "batch": st.integers(1, 4096),
    }
    return st.fixed_dictionaries(
        {},
        optional={
            "profile": st.sampled_from(["latency", "throughput", "connections"]),
            "stack": st.fixed_dictionaries({}, optional=sizes),
            "congestion": st.sampled_from(CONGESTION),
        },
    )


ACCOUNTS = st.one_of(st.sampled_from(["redis", "www-data", "_x", "host$"]), st.integers(0, 70000))


def quotas() -> st.SearchStrategy[dict[str, Any]]:
    """Valid `quota` mappings."""
    sizes = st.one_of(st.integers(4096, 1 << 40), st.sampled_from(["4K", "100M", "1024G"]))
    return st.fixed_dictionaries(
        {},
        optional={
            "conns": st.integers(1, 1 << 24),
            "memory": sizes,
            "frames": st.integers(128, 1 << 22),
            "rate": sizes,
            "apps": st.integers(1, 256),
        },
    )


def allows() -> st.SearchStrategy[dict[str, Any]]:
    """Valid `allow` mappings of rules that name no local port."""
    who = st.one_of(ACCOUNTS, st.lists(ACCOUNTS, min_size=1, max_size=3))
    ports = st.sampled_from([6379, "8000-8010", [80, "443-444"]])
    rest = {"ports": ports, "quota": quotas()}
    return st.one_of(
        st.fixed_dictionaries({"user": who}, optional=rest | {"group": who}),
        st.fixed_dictionaries({"group": who}, optional=rest),
    )


def sharing() -> st.SearchStrategy[dict[str, Any]]:
    """Valid `mode`, `quota`, `cpus` and `numa` keys, each there or not."""
    return st.fixed_dictionaries(
        {},
        optional={
            "mode": st.sampled_from(["direct", "shared"]),
            "quota": quotas(),
            "cpus": st.lists(st.integers(0, 8191), min_size=1, max_size=4, unique=True),
            "numa": st.integers(0, 1023),
        },
    )


def document(
    rules: list[Rule], interface: str = "eth1", backend: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A policy as plain data."""
    flows = [{"name": r.name, "match": match_document(r), "action": r.action} for r in rules]
    return {"version": 1, "interface": interface, "backend": backend or {"kind": "afxdp"}, "flows": flows}


def policy_text(rules: list[Rule], interface: str = "eth1") -> str:
    """A policy file that holds the rules."""
    return yaml.safe_dump(document(rules, interface), sort_keys=False)


@st.composite
def dpdk_ports(draw: st.DrawFn) -> dict[str, Any]:
    """`backend`, `addresses` and `routes` of a whole port."""
    queues, ring = draw(st.integers(1, 16)), draw(st.sampled_from([64, 1024]))
    keys: dict[str, st.SearchStrategy[Any]] = {
        "frames": st.integers(3 * ring * queues, 1 << 20),
        "frame_size": st.sampled_from([2048, 4096, 8192, 16384]),
        "mtu": st.integers(576, 9702),
        "offloads": st.sampled_from(["auto", "none"]),
        "idle_us": st.integers(1, 1_000_000),
        "rx_interrupts": st.sampled_from(["auto", "required", "none"]),
        "link_poll_ms": st.integers(10, 60_000),
        "exception_rate": st.integers(1, 10_000_000),
        "eal": st.fixed_dictionaries(
            {},
            optional={
                "lcores": st.lists(st.integers(0, 8191), min_size=1, unique=True),
                "memory": st.sampled_from([1 << 26, "64M", "1G"]),
                "hugepages": st.booleans(),
                "drivers": st.just("/opt/pmds"),
                "vfio_intr": st.sampled_from(["msix", "msi", "legacy"]),
                "devices": st.just(["0000:03:00.0", "net_null7,size=64"]),
            },
        ),
    }
    chosen = draw(st.fixed_dictionaries({}, optional=keys))
    device = draw(st.sampled_from(["0000:03:00.0", "net_af_packet0,iface=eth1", "net_null0"]))
    port = {"kind": "dpdk", "device": device, "queues": queues, "ring_size": ring, **chosen}
    whole: dict[str, Any] = {"backend": port}
    if draw(st.booleans()):
        whole["addresses"] = ["192.0.2.10/24", "198.51.100.1/31", "2001:db8::1/64"]
        whole["routes"] = [{"to": "0.0.0.0/0", "via": "192.0.2.1"}, {"to": "::/0", "via": "2001:db8::2"}]
    if draw(st.booleans()):
        whole |= {"addresses": ["192.0.2.10/24"], "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}]}
        port["exception"] = draw(st.sampled_from(["tap", "none"]))
    return whole


@st.composite
def policy_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Valid policies as plain data: what `yaml.safe_load` reads of a policy file. `yaml.safe_dump` writes one."""
    interface = draw(st.from_regex(r"[a-z][a-z0-9.@_-]{0,14}", fullmatch=True))
    rules = draw(rule_lists().filter(bool))
    whole = document(rules, interface, draw(backends())) | draw(tunings()) | draw(sharing())
    if draw(st.integers(0, 3)) == 0:
        whole |= draw(dpdk_ports())
        whole.pop("mode", None)
    for flow in whole["flows"]:
        if flow["action"] == "steer" and "local_port" not in flow["match"] and draw(st.booleans()):
            flow["allow"] = draw(allows())
    return whole
