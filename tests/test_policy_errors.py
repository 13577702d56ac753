# SPDX-License-Identifier: Apache-2.0
"""A policy that is wrong is refused with every error, each at its line and column, and nothing of it is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples

from bypass import policy_yaml
from bypass.errors import PolicyError, Problem
from bypass.policy import load_policy, parse_policy
from bypass.testing.policies import policy_text, rule_lists

HEAD = "version: 1\ninterface: eth1\nbackend: {kind: afxdp}\n"


def problems(text: str) -> list[Problem]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return caught.value.problems


def lines(text: str) -> list[str]:
    return [p.text("p.yaml") for p in problems(text)]


def flow(match: str, action: str = "steer") -> str:
    return f"{HEAD}flows:\n  - name: web\n    match: {{{match}}}\n    action: {action}\n"


def test_three_errors_are_told_at_once_with_their_places() -> None:
    text = """\
version: 1
interface: eth1
backend: {kind: afxdp, mode: zerocpy}
flows:
  - name: web
    match: {proto: tcp, local: 192.0.2.10, local_port: 80800}
    action: steer
  - name: dns
    match: {proto: udp, local: 192.0.2.10/24, local_port: 53}
    action: steer
"""
    assert lines(text) == [
        "p.yaml:3:30: backend.mode: zerocpy is not a mode: did you mean zerocopy?",
        "p.yaml:6:56: flows[0].match.local_port: 80800 is not a port: 1 to 65535, or a range such as 8000-8080",
        "p.yaml:9:32: flows[1].match.local: 192.0.2.10/24 has bits set behind its prefix: "
        "192.0.2.0/24 for the prefix, 192.0.2.10 for the host alone",
    ]


MATCH_ERRORS = [
    # match, field, column of the problem (-1: not checked), message
    ("proto: tcp, local_port: 0", "local_port", "0 is not a port"),
    ("proto: tcp, local_port: 65536", "local_port", "65536 is not a port"),
    ("proto: tcp, local_port: -1", "local_port", "-1 is not a port"),
    ("proto: tcp, local_port: 80.5", "local_port", "80.5 is not a port"),
    ("proto: tcp, local_port: http", "local_port", "http is not a port"),
    ("proto: tcp, local_port: '80'", "local_port", "80 is text, not a number: write the port without quotes"),
    ("proto: tcp, local_port: [80]", "local_port", "a list is not a port"),
    ("proto: tcp, local_port: {a: 80}", "local_port", "a mapping is not a port"),
    ("proto: tcp, local_port: ", "local_port", "an empty value is not a port"),
    (
        "proto: tcp, local_port: 8080-8000",
        "local_port",
        "8080-8000 is a range that ends before it begins: 8000-8080",
    ),
    ("proto: tcp, local_port: 0-80", "local_port", "0-80 is not a range of ports"),
    ("proto: tcp, local_port: 1-65536", "local_port", "1-65536 is not a range of ports"),
    ("proto: tcp, local_port: 080-90", "local_port", "080-90 is not a range of ports"),
    ("proto: tcp, local_port: 80-90-100", "local_port", "80-90-100 is not a port"),
    ("proto: tcp, local_port: 22:22", "local_port", "22:22 is the number 1342 in YAML (base 60): 1 to 65535"),
    ("proto: tcp, local_port: 010", "local_port", "010 is the number 8 in YAML (octal)"),
    ("proto: tcp, local_port: 0x50", "local_port", "0x50 is the number 80 in YAML (hexadecimal)"),
    ("proto: tcp, local_port: 8_080", "local_port", "8_080 is the number 8080 in YAML"),
    ("proto: tcp, local_port: true", "local_port", "true is a boolean in YAML"),
    ("proto: tcp, local_port: " + "9" * 5000, "local_port", "is a number of 5000 characters"),
    ("proto: tpc", "proto", "tpc is not a protocol: did you mean tcp?"),
    ("proto: TCP", "proto", "TCP is not a protocol: did you mean tcp?"),
    ("proto: 256", "proto", "256 is not a protocol"),
    ("proto: yes", "proto", "yes is a boolean in YAML: put it in quotes"),
    ("local: 192.0.2", "local", "192.0.2 is not an address or prefix"),
    ("local: 192.0.2.010", "local", "192.0.2.010 is not an address or prefix"),
    ("local: 192.0.2.0/33", "local", "192.0.2.0/33 is not an address or prefix"),
    ("local: 192.0.2.0/255.255.255.0", "local", "192.0.2.0/255.255.255.0 is not an address or prefix"),
    (
        "local: 192.0.2.1/24",
        "local",
        "192.0.2.1/24 has bits set behind its prefix: 192.0.2.0/24 for the prefix",
    ),
    ("local: 3221225994", "local", "3221225994 is not an address or prefix: put it in quotes"),
    ("local: example.org", "local", "example.org is not an address or prefix"),
    ("local: 0.0.0.0", "local", "0.0.0.0 is no address that a packet has: leave the field out"),
    ("local: '::'", "local", ":: is no address that a packet has"),
    ("local: '::ffff:192.0.2.1'", "local", "::ffff:192.0.2.1 is IPv4 inside IPv6: write 192.0.2.1"),
    (
        "local: '::ffff:192.0.2.0/120'",
        "local",
        "::ffff:192.0.2.0/120 is IPv4 inside IPv6: write 192.0.2.0/24",
    ),
    ("local: 'fe80::1%eth0'", "local", "fe80::1%eth0 is not an address or prefix"),
    (
        "local: 2001:10:20:30:40:50:59:1",
        "local",
        "is the number 5602001869623541 in YAML (base 60): put it in quotes",
    ),
    ("local: 192.0.2.1, remote: '2001:db8::1'", "remote", "2001:db8::1 is IPv6, but local is IPv4"),
    ("local_port: 80", "local_port", "80 is a port, and only tcp and udp have ports: say proto: tcp or udp"),
    ("proto: sctp, remote_port: 80", "remote_port", "80 is a port, and only tcp and udp have ports"),
    ("proto: tcp, vlan: 4095", "vlan", "4095 is not a VLAN identifier: 1 to 4094"),
    ("proto: tcp, vlan: 0", "vlan", "0 is not a VLAN identifier"),
    (
        "proto: tcp, local: '2001:db8::1'",
        "local",
        "2001:db8::1 cannot be steered: IPv6 passes to the kernel until",
    ),
    (
        "proto: tcp, remote: '2001:db8::/32'",
        "remote",
        "2001:db8::/32 cannot be steered: IPv6 passes to the kernel",
    ),
    ("proto: tcp, vlan: 5", "vlan", "5 cannot be steered: tagged frames pass to the kernel until"),
    ("proto: icmp", "proto", "icmp cannot be steered: steer takes tcp and udp"),
    ("proto: tcp, lokal: 1", "lokal", "unknown key: did you mean local?"),
    ("proto: tcp, zzz: 1", "zzz", "unknown key: the keys here are proto, local, local_port, remote"),
    ("proto: tcp, on: 1", "on", "unknown key"),
    ("proto: tcp, proto: udp", "proto", "the key is here a second time, first in line 6"),
]


@pytest.mark.parametrize(("match", "field", "message"), MATCH_ERRORS)
def test_a_wrong_match_field_is_told_where_it_stands(match: str, field: str, message: str) -> None:
    action = "drop" if "and only tcp" in message or "but local is" in message else "steer"
    (problem,) = problems(flow(match, action))
    assert problem.path == f"flows[0].match.{field}"
    assert problem.line == 6
    source = flow(match).splitlines()[5]
    at_key = problem.message.startswith(("unknown key", "the key"))
    place = source.rindex(field + ":") if at_key else source.index(":", source.index(f"{field}:")) + 2
    assert problem.column == place + 1
    assert message in f"{problem.message}: {problem.hint}"


def test_protocols_of_the_other_family_are_refused() -> None:
    assert (
        "icmp is not spoken over IPv6: icmpv6" in lines(flow("proto: icmp, local: '2001:db8::1'", "drop"))[0]
    )
    assert "icmpv6 is not spoken over IPv4: icmp" in lines(flow("proto: icmpv6, local: 192.0.2.1", "drop"))[0]


TOP_ERRORS = [
    ("", "1:1: the document is empty: the top level holds version, interface, backend and flows"),
    ("- a\n", "1:1: the document is not a mapping"),
    ("7", "1:1: the document is not a mapping"),
    (
        flow("proto: tcp").replace("version: 1", "version: 2"),
        "1:10: version: 2 is not a version of the policy language: 1",
    ),
    (
        flow("proto: tcp").replace("version: 1", "version: true"),
        "1:10: version: true is a boolean in YAML: 1",
    ),
    (flow("proto: tcp").replace("version: 1", "version: 1.0"), "1:10: version: 1.0 is not a version"),
    (flow("proto: tcp").replace("version: 1\n", ""), "1:1: version is missing: 1"),
    (flow("proto: tcp").replace("eth1", "on"), "2:12: interface: on is a boolean in YAML: put it in quotes"),
    (flow("proto: tcp").replace("eth1", "a/b"), "2:12: interface: a/b is not an interface name"),
    (flow("proto: tcp").replace("eth1", "tap%d"), "2:12: interface: tap%d is not an interface name"),
    (
        flow("proto: tcp").replace("eth1", "sixteen-letters-"),
        "2:12: interface: sixteen-letters- is not an interface name",
    ),
    (flow("proto: tcp").replace("eth1", "éééééééé"), "2:12: interface: éééééééé is longer than 15 bytes"),
    (flow("proto: tcp").replace("eth1", "'..'"), "2:12: interface: .. is not an interface name"),
    (flow("proto: tcp").replace("interface", "interfaces"), "interface is missing"),
    (
        flow("proto: tcp").replace("{kind: afxdp}", "afxdp"),
        "3:10: backend: afxdp is not a backend: a mapping such as",
    ),
    (flow("proto: tcp").replace("{kind: afxdp}", "{}"), "3:10: backend: kind is missing: afxdp or dpdk"),
    (
        flow("proto: tcp").replace("afxdp}", "xdp}"),
        "3:17: backend.kind: xdp is not a backend: did you mean afxdp?",
    ),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, queues: [0, 1, 0]}"),
        "backend.queues[2]: 0 is in the list twice",
    ),
    (flow("proto: tcp").replace("afxdp}", "afxdp, queues: [256]}"), "backend.queues[0]: 256 is not a queue"),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, queues: []}"),
        "backend.queues: a list is an empty list of queues",
    ),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, queues: most}"),
        "backend.queues: most is not a choice of queues",
    ),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, ring_size: 1000}"),
        "backend.ring_size: 1000 is not a ring size",
    ),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, frame_size: 1024}"),
        "backend.frame_size: 1024 is not a frame size",
    ),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, frames: 64}"),
        "backend.frames: 64 is not a number of frames",
    ),
    (
        flow("proto: tcp").replace("afxdp}", "afxdp, frames: 4096, queues: [0, 1]}"),
        "backend.frames: 4096 is too few for the rings: at least 8192",
    ),
    (HEAD + "flows: []\n", "4:8: flows: the list is empty"),
    (HEAD + "flows:\n", "4:7: flows: an empty value is not a list of flows"),
    (HEAD + "flows: {name: web}\n", "4:8: flows: a mapping is not a list of flows"),
    (HEAD + "flows: [7]\n", "4:9: flows[0]: 7 is not a flow"),
    (HEAD + "flows:\n  - name: web\n", "5:5: flows[0]: match is missing"),
    (flow(""), "6:12: flows[0].match: an empty match takes every packet: name at least one of proto, local"),
    (flow("proto: tcp", "stear"), "7:13: flows[0].action: stear is not an action: did you mean steer?"),
    (
        flow("proto: tcp").replace("web", "no"),
        "5:11: flows[0].name: no is a boolean in YAML: put it in quotes",
    ),
    (flow("proto: tcp").replace("web", "80"), "5:11: flows[0].name: 80 is not a flow name: put it in quotes"),
    (flow("proto: tcp").replace("web", "2026-01-01"), "5:11: flows[0].name: 2026-01-01 is a date in YAML"),
    (flow("proto: tcp").replace("web", "'a b'"), "5:11: flows[0].name: a b is not a flow name"),
    (flow("proto: tcp").replace("web", '"a\\e[31m"'), "5:11: flows[0].name: a\\x1b[31m is not a flow name"),
    (flow("proto: tcp").replace("web", "''"), "5:11: flows[0].name: an empty text is not a flow name"),
    (
        HEAD + "flows:\n- &a {name: a, match: {proto: tcp}, action: pass}\n- *a\n",
        "6:3: flows[1].name: a is the name of",
    ),
    (flow("proto: tcp") + "<<: {a: 1}\n", "8:1: <<: unknown key"),
    (flow("proto: tcp") + "flow: 1\n", "8:1: flow: unknown key: did you mean flows?"),
    (flow("proto: tcp") + "version: 1\n", "8:1: version: the key is here a second time, first in line 1"),
    (flow("proto: tcp") + "---\nversion: 1\n", "8:1: a second document: a policy is one YAML document"),
    (flow("proto: !!str tcp"), "6:20: the tag !!str: write the value without a tag"),
    (flow("proto: *x"), "6:20: *x names no anchor"),
    (flow("proto: tcp").replace("eth1", "eth1: x"), "2:16: not YAML: mapping values are not allowed"),
    (
        flow("proto: tcp").replace("interface", "\tinterface"),
        "2:1: not YAML: found a tab character that violates",
    ),
    (flow("proto: tcp").replace("eth1", "eth\x07"), "2:15: not YAML: the character U+0007"),
    ("? [a]\n: 1\n", "1:3: a list or mapping as a key"),
]


@pytest.mark.parametrize(("text", "message"), TOP_ERRORS)
def test_a_wrong_document_is_told_where_it_is_wrong(text: str, message: str) -> None:
    assert any(message in line for line in lines(text)), lines(text)


def test_errors_inside_a_wrong_flow_do_not_hide_each_other() -> None:
    found = lines(flow("lokal: 1, local_port: 99999, remote: '2001:db8::1', vlan: 7"))
    assert [re.sub(": .*", "", line.partition("match.")[2]) for line in found] == [
        "lokal",
        "local_port",
        "remote",
        "vlan",
    ]


def test_contradictions_are_found_beside_other_errors() -> None:
    text = HEAD + (
        "flows:\n"
        "  - {name: a, match: {proto: tcp, local_port: 8000-8009}, action: steer}\n"
        "  - {name: b, match: {proto: tcp, local_port: 8005-8014}, action: drop}\n"
        "  - {name: c, match: {proto: tcp, local_port: 0}, action: drop}\n"
    )
    found = lines(text)
    assert len(found) == 2
    assert found[0].startswith("p.yaml:6:5: flows[1]: 'b' (drop) contradicts 'a' (steer) of line 5")
    assert found[1].startswith("p.yaml:7:47: flows[2].match.local_port: 0 is not a port")


def test_too_many_masks_are_refused_at_the_rule_that_needs_most() -> None:
    found = lines(flow("proto: tcp, local_port: 1-65535, remote_port: 1-65534"))
    assert len(found) == 1
    assert found[0].startswith("p.yaml:5:5: flows[0].match: the rules need ")
    assert "at most 16" in found[0]


def test_many_errors_are_counted_not_all_listed() -> None:
    text = HEAD + "flows:\n" + "  - {name: a b, match: {proto: tcp}, action: drop}\n" * 1500
    found = problems(text)
    assert len(found) == 1001
    assert found[-1].message == "1999 more problems"  # each but the first also repeats a name


def test_nesting_is_bounded() -> None:
    assert "nested deeper than 32 levels" in lines("[" * 100_000)[0]
    assert "nested deeper than 32 levels" in lines("- " * 100_000)[0]


def test_an_alias_bomb_is_refused_without_being_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    assert "aliases count as often as they are used" in lines(bomb)[0]
    assert "names no anchor that is complete" in lines("a: &a [*a]\n")[0]
    monkeypatch.setattr(policy_yaml, "MAX_NODES", 100)
    assert "more than 100 values" in lines("a: [" + "x," * 200 + "]")[0]


def test_the_same_errors_without_the_c_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    text = flow("proto: tpc, local_port: 22:22, zzz: 1").replace("eth1", "on")
    with_c = lines(text)
    monkeypatch.setattr(policy_yaml, "_LOADER", yaml.SafeLoader)
    assert lines(text) == with_c
    assert len(with_c) == 4


def test_files_that_cannot_be_read_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(path: Path) -> str:
        with pytest.raises(PolicyError) as caught:
            load_policy(path)
        return str(caught.value)

    assert told(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    assert "Is a directory" in told(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"version: 1\ninterface: \xc3\xa9\xff\n")
    assert told(bad) == f"{bad}:2:13: the byte 0xff is not UTF-8: save the file as UTF-8"
    monkeypatch.setattr("bypass.policy.MAX_FILE_BYTES", 1 << 20)
    bad.write_bytes(b"#" * ((1 << 20) + 1))
    assert "larger than 1 MiB" in told(bad)
    bad.write_bytes(b"\xef\xbb\xbf" + flow("proto: tcp").encode())
    assert load_policy(bad).interface == "eth1"


@settings(max_examples=examples(150))
@given(rule_lists().filter(bool), st.data())
def test_a_damaged_file_is_refused_or_read_but_never_breaks(rules: list[object], data: st.DataObject) -> None:
    text = policy_text(rules)  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 3))
        text = (
            text[:at]
            + data.draw(st.sampled_from(list(":-{}[]&*!|>'\"%@,#?\n 0on\t\x00é")))
            + text[at + gone :]
        )
    found: list[Problem] = []
    try:
        parse_policy(text)
    except PolicyError as error:
        found = error.problems
    last = len(re.split("\r\n|[\n\r\x85\u2028\u2029]", text))
    for problem in found:
        assert 1 <= problem.line <= last + 1
        assert problem.column >= 1
        assert problem.message


ALLOW_ERRORS = [
    # allow, field, message
    (
        "{user: redis, ports: [6379]}",
        "ports",
        "the ports 6379 are not all of the rule's, 8080: a part of local_port",
    ),
    ("{ports: [8080]}", "", "allows nobody: name user or group"),
    ("{}", "", "allows nobody: name user or group"),
    (
        "redis",
        "",
        "redis is not a mapping of who may use the rule: a mapping such as {user: redis, ports: [6379]}",
    ),
    (
        "{user: [redis, -1]}",
        "user[1]",
        "-1 is neither a name nor a number: a name or a number, or a list of these",
    ),
    ("{user: []}", "user", "a list is an empty list: a name or a number, or a list of these"),
    ("{group: 'a b'}", "group", "a b is neither a name nor a number: a name or a number, or a list of these"),
    ("{user: x, ports: [8080, 0]}", "ports[1]", "0 is not a port: 1 to 65535, or a range such as 8000-8080"),
    ("{user: x, ports: [9-8]}", "ports[0]", "9-8 is a range that ends before it begins: 8-9"),
    ("{usr: x}", "usr", "unknown key: did you mean user?"),
    ("{user: x, quota: {conns: 0}}", "quota.conns", "0 is not a number of connections: 1 to 16777216"),
    (
        "{user: x, quota: {memory: 1T}}",
        "quota.memory",
        "1T is not a size of memory: bytes, or a number with K, M or G",
    ),
    ("{user: x, quota: {memory: 12}}", "quota.memory", "12 is out of range: 4K to 1024G"),
    ("{user: x, quota: {conn: 1}}", "quota.conn", "unknown key: did you mean conns?"),
]


@pytest.mark.parametrize(("allow", "field", "message"), ALLOW_ERRORS)
def test_who_may_use_a_rule(allow: str, field: str, message: str) -> None:
    text = flow("proto: tcp, local_port: 8080") + f"    allow: {allow}\n"
    (problem,) = problems(text)
    assert problem.line == 8
    assert problem.path == ".".join(p for p in ("flows[0].allow", field) if p)
    assert f"{problem.message}: {problem.hint}".startswith(message)


def test_only_a_steer_rule_allows_somebody() -> None:
    text = flow("proto: tcp, local_port: 8080", "pass") + "    allow: {user: redis}\n"
    assert lines(text) == [
        "p.yaml:8:12: flows[0].allow: nobody uses a pass rule: only steer takes flows: leave it out"
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mode: shred", "mode: shred is not a way to use an interface: did you mean shared?"),
        ("quota: {apps: 0}", "quota.apps: 0 is not a number of applications: 1 to 256"),
        ("quota: 7", "quota: 7 is not a mapping of limits"),
        ("cpus: [1, 1]", "cpus[1]: 1 is in the list twice: each CPU once"),
        ("cpus: all", "cpus: all is not a list of CPUs: a list of numbers such as [2, 3]"),
        ("numa: -1", "numa: -1 is not a NUMA node: 0 to 1023"),
    ],
)
def test_how_an_interface_is_shared(key: str, message: str) -> None:
    (line,) = lines(flow("proto: tcp").replace("version: 1", f"version: 1\n{key}"))
    assert re.sub(r"^p.yaml:2:\d+: ", "", line).startswith(message)
