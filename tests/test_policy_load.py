# SPDX-License-Identifier: Apache-2.0
"""A good policy becomes exactly the rules that it names; which sockets they grant; the `policy` command."""

from __future__ import annotations

import ipaddress
import itertools
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from model import Flow, breadth, matches
from support import examples

from bypass.access import Allow, Quota
from bypass.cli import cli
from bypass.policy import AfxdpBackend, Policy, parse_policy
from bypass.rules import TCP, UDP, Address, PortRange, Rule
from bypass.testing.policies import document, policy_text, rule_lists

HEAD = "version: 1\ninterface: eth1\nbackend: {kind: afxdp}\nflows:\n"


def test_the_example_of_the_documentation() -> None:
    text = """\
version: 1
interface: eth1
backend: {kind: afxdp, mode: auto, queues: all}
flows:
  - name: web
    match: {proto: tcp, local: 192.0.2.10, local_port: 8080, remote: 198.51.100.0/24}
    action: steer
"""
    policy = parse_policy(text, "web.yaml")
    web = Rule(
        0,
        "web",
        TCP,
        ipaddress.ip_network("192.0.2.10"),
        PortRange(8080, 8080),
        ipaddress.ip_network("198.51.100.0/24"),
        None,
        None,
        "steer",
        line=5,
        column=5,
    )
    assert policy == Policy(
        1, "eth1", AfxdpBackend("afxdp", "auto", None, 2048, None, 2048), (web,), "web.yaml"
    )


@settings(max_examples=examples(60))
@given(rule_lists().filter(bool), st.booleans())
def test_what_is_written_is_what_is_read(rules: list[Rule], flow_style: bool) -> None:
    text = yaml.safe_dump(document(rules), default_flow_style=flow_style or None, sort_keys=flow_style)
    read = parse_policy(text).flows
    plain = [
        (r.index, r.name, r.proto, r.local, r.local_port, r.remote, r.remote_port, r.vlan, r.action)
        for r in read
    ]
    wanted = [
        (r.index, r.name, r.proto, r.local, r.local_port, r.remote, r.remote_port, r.vlan, r.action)
        for r in rules
    ]
    assert plain == wanted


@given(rule_lists().filter(bool))
def test_each_rule_knows_its_line(rules: list[Rule]) -> None:
    text = policy_text(rules)
    lines = text.splitlines()
    for rule in parse_policy(text).flows:
        assert lines[rule.line - 1][rule.column - 1 :] == f"name: {rule.name}"


def test_queues_frames_and_modes_are_read() -> None:
    backend = "{kind: afxdp, mode: copy, queues: [3, 1], ring_size: 64, frames: 4096, frame_size: 4096}"
    policy = parse_policy(
        HEAD.replace("{kind: afxdp}", backend) + "  - {name: a, match: {proto: udp}, action: pass}\n"
    )
    assert policy.backend == AfxdpBackend("afxdp", "copy", (1, 3), 64, 4096, 4096)
    assert policy.backend.default_frames(8) == 4096
    assert AfxdpBackend(ring_size=1024).default_frames(2) == 8192


def test_aliases_and_long_forms_mean_the_same() -> None:
    text = HEAD + (
        "  - name: a\n    match: &m\n      proto: 6\n      local: '192.0.2.1/32'\n    action: steer\n"
        "  - {name: b, match: {proto: udp, remote: &net 10.0.0.0/8, local_port: 1-1}, action: steer}\n"
        "  - {name: c, match: {proto: udp, remote: *net, local_port: 2}, action: steer}\n"
        "  - {name: d, match: *m, action: steer}\n"
    )
    a, b, c, d = parse_policy(text).flows
    assert (a.proto, a.local) == (d.proto, d.local) == (TCP, ipaddress.ip_network("192.0.2.1"))
    assert b.remote == c.remote == ipaddress.ip_network("10.0.0.0/8")
    assert b.local_port == PortRange(1, 1)


def test_twenty_thousand_rules_load() -> None:
    flows = "".join(
        f"  - {{name: r{i}, match: {{proto: tcp, local_port: 80, remote: 10.{i >> 16}.{i >> 8 & 255}.{i & 255}}},"
        " action: steer}\n"
        for i in range(20_000)
    )
    policy = parse_policy(HEAD + flows)
    assert len(policy.flows) == len(policy.compiled) == 20_000
    assert policy.flows[19_999].line == 20_004
    assert policy.grant(TCP, None, 80, ipaddress.ip_address("10.0.78.31"), 5) == policy.flows[19_999]


# ---- Grants -------------------------------------------------------------------------------------------------------


def policy_of(*flows: tuple[str, str]) -> Policy:
    return parse_policy(
        HEAD + "".join(f"  - {{name: r{i}, match: {{{m}}}, action: {a}}}\n" for i, (m, a) in enumerate(flows))
    )


def address(text: str | None) -> Address | None:
    return None if text is None else ipaddress.ip_address(text)


def granted(
    policy: Policy, local: str | None, port: int, remote: str | None = None, rport: int | None = None
) -> str:
    rule = policy.grant(TCP, address(local), port, address(remote), rport)
    return "-" if rule is None else rule.name


def test_a_listener_is_granted_by_rules_that_limit_the_remote() -> None:
    policy = policy_of(("proto: tcp, local: 192.0.2.10, local_port: 80, remote: 198.51.100.0/24", "steer"))
    assert granted(policy, "192.0.2.10", 80) == "r0"
    assert granted(policy, None, 80) == granted(policy, "0.0.0.0", 80) == "r0"
    assert granted(policy, "192.0.2.11", 80) == "-"
    assert granted(policy, "192.0.2.10", 81) == "-"
    assert granted(policy, "192.0.2.10", 80, "198.51.100.7", 5000) == "r0"
    assert granted(policy, "192.0.2.10", 80, "203.0.113.7", 5000) == "-"
    assert policy.grant(UDP, address("192.0.2.10"), 80) is None
    assert granted(policy, "::", 80) == granted(policy, "2001:db8::1", 80) == "-"


def test_the_most_specific_rule_grants() -> None:
    policy = policy_of(
        ("proto: tcp", "steer"),
        ("proto: tcp, local_port: 8000-8015", "steer"),
        ("proto: tcp, local_port: 8001", "steer"),
    )
    assert [granted(policy, None, p) for p in (7999, 8000, 8001, 8015, 8016)] == [
        "r0",
        "r1",
        "r2",
        "r1",
        "r0",
    ]


def test_a_narrower_pass_or_drop_rule_denies_what_it_covers_whole() -> None:
    policy = policy_of(
        ("proto: tcp, local_port: 8000-8015", "steer"),
        ("proto: tcp, local_port: 8001", "pass"),
        ("proto: tcp, local_port: 8002, remote: 10.0.0.0/8", "pass"),
        ("local_port: 8003, proto: tcp, local: 192.0.2.10", "drop"),
        ("local_port: 8004, proto: tcp, vlan: 7", "pass"),
        ("local_port: 8005, proto: tcp, remote_port: 5", "pass"),
    )
    assert granted(policy, "192.0.2.10", 8001) == "-"
    assert granted(policy, "192.0.2.10", 8002) == "r0"  # from elsewhere it still receives
    assert granted(policy, "192.0.2.10", 8002, "10.1.1.1", 5) == "-"
    assert granted(policy, "192.0.2.10", 8003) == "-"
    assert granted(policy, "192.0.2.11", 8003) == "r0"
    assert granted(policy, None, 8003) == "r0"
    assert granted(policy, None, 8004) == "r0"  # untagged frames are not covered
    assert granted(policy, None, 8005) == granted(policy, None, 8005, "10.1.1.1", 6) == "r0"
    assert (
        granted(policy, None, 8005, "10.1.1.1", 5)
        == granted(policy, "192.0.2.10", 8005, "10.1.1.1", 5)
        == "-"
    )


def test_a_wider_pass_rule_denies_nothing() -> None:
    policy = policy_of(("proto: tcp, local_port: 80", "steer"), ("proto: tcp", "pass"))
    assert granted(policy, None, 80) == "r0"
    assert granted(policy, None, 81) == "-"


@settings(max_examples=examples(100))
@given(rule_lists().filter(bool), st.data())
def test_a_grant_is_given_just_when_some_packet_would_be_steered(
    rules: list[Rule], data: st.DataObject
) -> None:
    """Exact for connected sockets: these have one flow, granted by the rule that decides its packets."""
    policy = parse_policy(policy_text(rules))
    hosts = [ipaddress.ip_address(a) for a in ("192.0.2.10", "10.1.0.1", "198.51.100.7", "203.0.113.5")]
    local, remote = data.draw(st.sampled_from(hosts)), data.draw(st.sampled_from(hosts))
    ports = st.sampled_from([80, 8000, 8003, 8008, 443, 40000])
    flow = Flow(data.draw(st.sampled_from([TCP, UDP])), local, data.draw(ports), remote, data.draw(ports))
    deciding = min(
        (r for r in policy.flows if matches(r, flow, None)), key=lambda r: (breadth(r), r.index), default=None
    )
    expected = deciding if deciding is not None and deciding.action == "steer" else None
    assert policy.grant(*flow) == expected
    listener = policy.grant(flow.proto, local, flow.local_port)
    if expected is not None:
        assert listener is not None
    assert listener is None or any(
        matches(listener, Flow(flow.proto, local, flow.local_port, *peer), None)
        for peer in itertools.product(some_remotes(policy), range_edges(policy))
    )


def some_remotes(policy: Policy) -> list[Address]:
    return [r.remote.network_address for r in policy.flows if r.remote is not None] + [
        ipaddress.ip_address("8.8.8.8")
    ]


def range_edges(policy: Policy) -> list[int]:
    return [r.remote_port.first for r in policy.flows if r.remote_port is not None] + [9]


# ---- The command ---------------------------------------------------------------------------------------------------


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["policy", *args], standalone_mode=False)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(
        HEAD
        + "  - {name: web, match: {proto: tcp, local: 192.0.2.10, local_port: 8080}, action: steer}\n"
        + "  - {name: ssh, match: {proto: tcp, local_port: 22}, action: pass}\n"
    )
    return path


def test_check_prints_rules_masks_and_conflicts(good: Path) -> None:
    result = run("check", str(good))
    assert result.return_value == 0
    for text in (
        "eth1 by afxdp",
        "web",
        "proto tcp, local_port 22",
        "Masks: 2 of 16; entries: 2",
        "Conflicts: none",
    ):
        assert text in result.output


def test_check_as_json(good: Path) -> None:
    told = json.loads(run("check", "--json", str(good)).output)
    assert told["ok"] is True
    assert [(r["name"], r["rank"]) for r in told["rules"]] == [("web", 2), ("ssh", 1)]
    assert told["entries"] == 2
    assert len(told["masks"]) == 2


def test_check_of_a_broken_file_locates_three_errors_and_leaves_with_2(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(HEAD + "  - {name: on, match: {proto: tpc}, action: stear}\n")
    result = run("check", str(path))
    assert result.return_value == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"{path}:5:12: flows[0].name: on is a boolean in YAML: put it in quotes if it is meant as text; 1 to 64 "
        "letters, digits, `.`, `_` and `-`, starting with a letter or digit",
        f"{path}:5:31: flows[0].match.proto: tpc is not a protocol: did you mean tcp?",
        f"{path}:5:45: flows[0].action: stear is not an action: did you mean steer?",
        "3 problems",
    ]
    result = run("check", "--json", str(path))
    assert result.return_value == 2
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert [(p["line"], p["column"], p["value"]) for p in told["problems"]] == [
        (5, 12, "on"),
        (5, 31, "tpc"),
        (5, 45, "stear"),
    ]


def test_schema_prints_json_schema() -> None:
    result = run("schema")
    assert json.loads(result.output)["$schema"].startswith("https://json-schema.org/")


@pytest.mark.parametrize("args", [("--help",), ("check", "--help"), ("schema", "--help")])
def test_help_has_examples(args: tuple[str, ...]) -> None:
    assert "bypass policy" in run(*args).output.partition("Example")[2]


def test_who_may_use_what_is_read_as_it_was_meant() -> None:
    policy = parse_policy(
        """
version: 1
interface: eth1
mode: shared
quota: {conns: 1000, memory: 256M, rate: 1G, apps: 2}
cpus: [3, 2]
numa: 1
backend: {kind: afxdp}
flows:
  - name: redis
    match: {proto: tcp, local_port: 6000-7000}
    action: steer
    allow: {user: [redis, 1000], group: cache, ports: [6379, 6400-6410], quota: {conns: 10}}
  - name: dns
    match: {proto: udp, local_port: 53}
    action: steer
    allow: {group: 53, ports: 53}
  - name: rest
    match: {proto: tcp}
    action: steer
"""
    )
    redis, dns, rest = (rule.allow for rule in policy.flows)
    ports = (PortRange(6379, 6379), PortRange(6400, 6410))
    assert redis == Allow(("redis", 1000), ("cache",), ports, Quota(conns=10))
    assert dns == Allow((), (53,), (PortRange(53, 53),))
    assert rest is None
    assert (policy.mode, policy.cpus, policy.numa) == ("shared", (2, 3), 1)
    assert policy.quota == Quota(conns=1000, memory=256 << 20, rate=1 << 30, apps=2)
    assert policy.quota.and_also(redis.quota) == Quota(conns=10, memory=256 << 20, rate=1 << 30, apps=2)
