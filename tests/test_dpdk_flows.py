# SPDX-License-Identifier: Apache-2.0
"""A policy's rules in a DPDK port's hardware (rte_flow): which, in which structs, and what is left when it refuses.

No port here has such rules but net_tap in the guest of `make test-vm`. So DPDK's functions are replaced by ones that
write down what a driver would be given (tests/c/rte_flow_shim.c), or that refuse.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import pytest
from bypass._core import ffi
from dpdk_support import in_child, needs_dpdk
from flow_support import hardware, shim

from bypass.backends import attach
from bypass.dpdk_backend import DpdkDevice
from bypass.dpdk_backend.flows import flows_of, pack, put_flows
from bypass.errors import DeviceError
from bypass.policy import Policy, parse_policy
from bypass.status import Snapshot

__all__ = ["hardware", "needs_dpdk", "shim"]

HOST = [ipaddress.ip_address("192.0.2.10"), ipaddress.ip_address("2001:db8::1")]
RULES = """
  - {name: web, match: {proto: tcp, local_port: 80}, action: steer}
  - {name: bad, match: {proto: udp, local: 192.0.2.10, local_port: 9}, action: drop}
"""
SHIELD = """
  - {name: dns, match: {proto: udp, local_port: 53, remote: 198.51.100.0/24}, action: steer}
  - {name: web, match: {proto: tcp, local_port: 80}, action: steer}
  - {name: udp, match: {proto: udp, local: 192.0.2.10}, action: drop}
"""


def policy(how: str = "auto", queues: int = 1, flows: str = RULES, more: str = "") -> Policy:
    return parse_policy(
        f"""version: 1
interface: port0
backend:
  kind: dpdk
  device: net_null0
  queues: {queues}
  ring_size: 256
  hardware_rules: {how}
  exception: none
  eal: {{lcores: [0], hugepages: false}}
{more}addresses: [192.0.2.10/24]
flows:{flows}""",
        "p.yaml",
    )


# ---- Which rules ---------------------------------------------------------------------------------------------------
def table(p: Policy) -> list[str]:
    return [r.testpmd().partition("ingress ")[2].removeprefix("pattern ") for r in flows_of(p, HOST).rules]


def test_one_queue_has_drops_only_and_what_is_asked_before_them() -> None:
    assert table(policy()) == ["eth / ipv4 dst is 192.0.2.10 / udp dst is 9 / end actions drop / end"]
    assert table(policy(flows=SHIELD)) == [
        "eth / ipv4 src spec 198.51.100.0 src mask 255.255.255.0 / udp dst is 53 / end actions queue index 0 / end",
        "eth / ipv4 dst is 192.0.2.10 / udp / end actions drop / end",
    ]
    only = flows_of(
        policy(flows="\n  - {name: web, match: {proto: tcp, local_port: 80}, action: steer}\n"), HOST
    )
    assert (only.rules, only.rest) == ((), -1)
    assert only.reason() == "the policy has no rule that hardware does better"


def test_several_queues_are_the_stacks_but_the_first() -> None:
    found = flows_of(policy(queues=4, flows=SHIELD), HOST)
    assert table(policy(queues=4, flows=SHIELD)) == [
        "eth / ipv4 src spec 198.51.100.0 src mask 255.255.255.0 / udp dst is 53 / end actions "
        "rss queues 1 2 3 end / end",
        "eth / ipv4 / tcp dst is 80 / end actions rss queues 1 2 3 end / end",
        "eth / ipv4 dst is 192.0.2.10 / udp / end actions drop / end",
    ]
    assert (found.rest, found.lines) == (0, (13, 14, 15))
    assert found.reason() == "1 drop; steered flows on queues 1, 2, 3, the rest on 0"


def test_a_ports_vlan_is_in_each_pattern() -> None:
    assert table(policy(more="  vlan: 7\n")) == [
        "eth / vlan vid is 7 / ipv4 dst is 192.0.2.10 / udp dst is 9 / end actions drop / end"
    ]


def test_what_crosses_to_the_plug_in_is_the_headers_bytes() -> None:
    flows = pack(flows_of(policy(queues=3), HOST).rules)  # whose memory the two are in
    bad, web = flows
    assert [i.kind for i in web.item[0 : web.items]] == [1, 3, 5]
    assert list(web.queue[0 : web.queues]) == [1, 2]
    assert (bad.items, bad.queues) == (3, 0)
    ip, udp = bad.item[1], bad.item[2]
    assert bytes(ffi.buffer(ip.spec))[16:20] == b"\xc0\x00\x02\x0a"
    assert bytes(ffi.buffer(ip.mask)) == bytes(16) + b"\xff" * 4 + bytes(20)
    assert bytes(ffi.buffer(udp.spec))[:4] == b"\0\0\0\x09"
    assert bytes(ffi.buffer(udp.mask))[:4] == b"\0\0\xff\xff"


# ---- On a port -----------------------------------------------------------------------------------------------------
@in_child
def port_with(queues: int, *hows: str) -> list[dict[str, Any]]:
    """Opens the policy's port, as often: what it says, and what the driver was told by then."""
    return [opened(policy(how, queues)) for how in hows]


def opened(p: Policy) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        attached = attach(p)
    except DeviceError as error:
        found["error"] = str(error)
    else:
        found["hardware"] = Snapshot(attached.steering, attached.device).stats(1)["hardware"]
        found["log"] = Path(os.environ.get("BYPASS_FLOWS", os.devnull)).read_text().splitlines()
        attached.close()
    DpdkDevice(None, p.dpdk).close()  # it is free
    return found

    return os.environ.get("BYPASS_FLOWS", "/dev/null")


ETH, IP = "6:/", "8:00000000000000000000000000000000c000020a/00000000000000000000000000000000ffffffff"
WEB = f"12:00000050{'00' * 16}/0000ffff{'00' * 16}"
BAD = f"{ETH} {IP} 11:0000000900000000/0000ffff00000000 drop"


def test_the_driver_gets_the_policys_rules_and_they_go_with_the_port(hardware: Path) -> None:
    (got,) = port_with(3, "required")
    assert got["log"] == [
        f"create 0 {BAD}",
        f"create 0 {ETH} 8:/ {WEB} rss 1 2",
        "create 1 6:/ queue 0",  # no hash table: one more rule keeps the rest on queue 0
    ]
    assert got["hardware"] == {"rules": 2, "reason": "1 drop; steered flows on queues 1, 2, the rest on 0"}
    assert hardware.read_text().splitlines()[3:] == ["destroy 3", "destroy 2", "destroy 1"]


def test_the_hash_table_keeps_the_rest_on_a_queue_and_is_put_back(
    hardware: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYPASS_FLOWS_TABLE", "1")
    (got,) = port_with(2, "required")
    assert got["log"] == [
        f"create 0 {BAD}",
        f"create 0 {ETH} 8:/ {WEB} queue 1",
        "table 128 entries, queues 0x1",
    ]
    assert hardware.read_text().splitlines()[3:] == [
        "destroy 2",
        "destroy 1",
        "table 128 entries, queues 0x3",
    ]


REFUSALS = [
    # what the driver lacks, what is said, what it did
    ("ROOM", "1", "p.yaml:14: .* does not take 'bad': No space left on device .table full.", []),
    ("ROOM", "2", "p.yaml:13: .* does not take 'web': No space left .*", ["create", "destroy"]),
    (
        "ROOM",
        "3",
        "net_null0 cannot keep what is not steered on queue 0: No space left .*",
        ["create", "destroy"] * 2,
    ),
    ("NO", "drop", "p.yaml:14: .* does not take 'bad': .* .no such action here.", []),
    ("NO", "queue", "p.yaml:13: .* does not take 'web': .* .no such action here.", []),
]


@in_child
def refused() -> list[Any]:
    """Each of REFUSALS for both who requires rules and who does not."""
    found = []
    log = Path(os.environ["BYPASS_FLOWS"])
    for setting, value, _, _ in REFUSALS:
        os.environ[f"BYPASS_FLOWS_{setting}"] = value
        for how in ("required", "auto"):
            log.write_text("")
            answer = opened(policy(how, 2))
            found.append((answer, sorted(line.split()[0] for line in log.read_text().splitlines())))
        del os.environ[f"BYPASS_FLOWS_{setting}"]
    return found


def test_whatever_the_driver_refuses_nothing_is_left_of_it(hardware: Path) -> None:
    got = refused()
    assert len(got) == 2 * len(REFUSALS)
    for (_, _, says, did), (required, log), (auto, auto_log) in zip(
        REFUSALS, got[::2], got[1::2], strict=True
    ):
        assert re.fullmatch(f"backend.hardware_rules is required, and cannot be: .*{says}", required["error"])
        assert auto["hardware"]["rules"] == 0
        assert re.fullmatch(f".*{says}", auto["hardware"]["reason"])
        assert log == auto_log == sorted(did)


def test_a_port_without_such_rules_is_said_and_auto_goes_on() -> None:
    why = "p.yaml:14: the hardware of net_null0 does not take 'bad': its driver has no rules (rte_flow)"
    auto, required, none = port_with(1, "auto", "required", "none")
    assert auto == {"hardware": {"rules": 0, "reason": why}, "log": []}
    assert required == {"error": f"backend.hardware_rules is required, and cannot be: {why}"}
    assert none == {"hardware": None, "log": []}  # who does not ask hears nothing


@in_child
def exchanged() -> list[str]:
    """Other rules in place of the first; then none."""
    p, other = policy(queues=2), policy(queues=2, flows=SHIELD)
    with DpdkDevice(None, p.dpdk) as device:
        for one in (p, other):
            put_flows(one, HOST, device.put_flows)
        assert device.put_flows(pack([]), -1) is None
    return []


def test_rules_are_exchanged_as_a_whole(hardware: Path) -> None:
    exchanged()
    did = [line.split()[0] for line in hardware.read_text().splitlines()]
    assert did == ["create"] * 3 + ["destroy"] * 3 + ["create"] * 4 + ["destroy"] * 4


@in_child
def nonsense() -> list[str]:
    """What is no rule comes to no driver."""
    said = []
    with DpdkDevice(None, policy(queues=2).dpdk) as device:
        for field, value in (
            ("items", 0),
            ("items", 5),
            ("queues", 3),
            ("kind", 0),
            ("kind", 7),
            ("queue", 2),
        ):
            (flow,) = array = pack(flows_of(policy(queues=2), HOST).rules[-1:])
            if field == "kind":
                flow.item[1].kind = value
            elif field == "queue":
                flow.queue[0] = value
            else:
                setattr(flow, field, value)
            refused = device.put_flows(array, -1)
            said.append("" if refused is None else refused.why)
        refused = device.put_flows(pack([]), 2)
        said.append("" if refused is None else refused.why)
    return said


def test_what_is_no_rule_comes_to_no_driver(hardware: Path) -> None:
    *said, rest = nonsense()
    assert said == ["it is no rule"] * 6
    assert rest == "at most 4096 rules, and queues that the port has"
    assert hardware.read_text() == ""
