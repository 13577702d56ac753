# SPDX-License-Identifier: Apache-2.0
"""Rules for rte_flow: tables of patterns and actions, and their bytes where DPDK's own headers have the fields. That
they match what they should is in test_hwflow_rules.py."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import missing
from test_hwflow_rules import WEB, policy

from bypass.cli import cli, hardware, main
from bypass.cli.hardware import entry
from bypass.hwflow import rte_rules, translate
from bypass.hwflow.rte import HEADER_BYTES, PLACES, Field, Item

MAC = "02:00:00:00:00:01"


@pytest.mark.parametrize(
    ("flows", "how", "commands"),
    [
        (
            [WEB],
            {},
            ["eth / ipv4 dst is 192.0.2.10 / tcp dst is 80 / end actions mark id 1 / queue index 0"],
        ),
        (
            ["r: proto: udp, local_port: 8000-8015, remote: 198.51.100.0/24, remote_port: 53 -> steer"],
            {"queues": (0, 1), "mac": MAC, "marks": False},
            [
                f"eth dst is {MAC} / ipv4 src spec 198.51.100.0 src mask 255.255.255.0 / "
                "udp src is 53 dst spec 8000 dst mask 65520 / end actions rss queues 0 1 end"
            ],
        ),
        (
            [WEB],
            {"vf": 3, "marks": False},
            ["eth / ipv4 dst is 192.0.2.10 / tcp dst is 80 / end actions vf id 3"],
        ),
        (
            [WEB],
            {"port_vlan": 9},
            [
                "eth / vlan vid is 9 / ipv4 dst is 192.0.2.10 / tcp dst is 80 / end actions mark id 1 / queue index 0"
            ],
        ),
        (
            ["net: proto: tcp, local: 192.0.2.0/24 -> steer", "not: proto: tcp, local: 192.0.2.10 -> pass"],
            {"kernel_queues": (4,)},
            [
                "eth / ipv4 dst is 192.0.2.10 / tcp / end actions queue index 4",
                "priority 1 eth / ipv4 dst spec 192.0.2.0 dst mask 255.255.255.0 / tcp / end actions "
                "mark id 1 / queue index 0",
            ],
        ),
        # Without a queue of the kernel's: unmarked, so that software decides.
        (
            ["net: proto: tcp, local: 192.0.2.0/24 -> steer", "not: proto: tcp, local: 192.0.2.10 -> pass"],
            {"queues": (0, 1), "group": 2},
            [
                "group 2 eth / ipv4 dst is 192.0.2.10 / tcp / end actions rss queues 0 1 end",
                "group 2 priority 1 eth / ipv4 dst spec 192.0.2.0 dst mask 255.255.255.0 / tcp / end actions "
                "mark id 1 / rss queues 0 1 end",
            ],
        ),
        # A policy that names tags is about tagged frames too.
        (
            [
                "bad: proto: 47, local: '2001:db8::1' -> drop",
                "tag: proto: tcp, local: 192.0.2.9, vlan: 7 -> drop",
            ],
            {},
            [
                "eth / ipv6 proto is 47 dst is 2001:db8::1 / end actions drop",
                "eth / vlan / ipv6 proto is 47 dst is 2001:db8::1 / end actions drop",
                "eth / vlan vid is 7 / ipv4 dst is 192.0.2.9 / tcp / end actions drop",
            ],
        ),
        (
            ["net: proto: udp, local: '2001:db8::1', remote: '2001:db8:8::/45' -> drop"],
            {},
            [
                "eth / ipv6 src spec 2001:db8:8:: src mask ffff:ffff:fff8:: dst is 2001:db8::1 / udp / end actions drop"
            ],
        ),
    ],
)
def test_the_patterns_of_a_policy(flows: list[str], how: dict[str, Any], commands: list[str]) -> None:
    table = rte_rules(
        translate(policy(*flows), by_rule=how.get("marks", True)), how.pop("queues", (0,)), **how
    )
    found = [r.testpmd(5) for r in table]
    for text in found:
        assert text.startswith("flow create 5 ")
        assert text.endswith(" / end")
    short = [t[len("flow create 5 ") : -len(" / end")].replace("ingress pattern ", "") for t in found]
    assert sorted(short) == sorted(commands)


def test_an_item_is_its_header_in_bytes() -> None:
    item = Item("ipv4", (Field("src", 0xC6336400, 0xFFFFFF00), Field("dst", 0xC000020A, 0xFFFFFFFF)))
    assert item.spec == bytes(12) + bytes([198, 51, 100, 0, 192, 0, 2, 10])
    assert item.mask == bytes(12) + bytes([255, 255, 255, 0, 255, 255, 255, 255])
    assert Item("vlan", (Field("vid", 7, 0xFFF),)).mask == bytes([0x0F, 0xFF, 0, 0])
    assert Item("udp").spec == bytes(8)


# testpmd's name of a field -> DPDK's
MEMBERS = {
    ("eth", "dst"): "dst",
    ("vlan", "vid"): "tci",
    ("ipv4", "proto"): "hdr.next_proto_id",
    ("ipv4", "src"): "hdr.src_addr",
    ("ipv4", "dst"): "hdr.dst_addr",
    ("ipv6", "proto"): "hdr.proto",
    ("ipv6", "src"): "hdr.src_addr",
    ("ipv6", "dst"): "hdr.dst_addr",
    ("tcp", "src"): "hdr.src_port",
    ("tcp", "dst"): "hdr.dst_port",
    ("udp", "src"): "hdr.src_port",
    ("udp", "dst"): "hdr.dst_port",
}


def test_fields_are_where_dpdk_has_them(tmp_path: Path) -> None:
    told = subprocess.run(["pkg-config", "--cflags", "libdpdk"], capture_output=True, text=True, check=False)
    if told.returncode != 0:
        missing(["DPDK's headers (apt-get install --no-install-recommends dpdk-dev)"])
    checks = [
        f'_Static_assert(offsetof(struct rte_flow_item_{kind}, {MEMBERS[kind, name]}) == {at}, "{kind} {name}");\n'
        f'_Static_assert(sizeof(((struct rte_flow_item_{kind} *)0)->{MEMBERS[kind, name]}) == {size}, "{name}");\n'
        for (kind, name), (at, size) in PLACES.items()
    ]
    checks += [
        f'_Static_assert(sizeof(struct rte_flow_item_{kind}) >= {size}, "{kind}");\n'
        for kind, size in HEADER_BYTES.items()
    ]
    source = tmp_path / "check.c"
    source.write_text("#include <stddef.h>\n#include <rte_flow.h>\n" + "".join(checks))
    flags = [f for f in told.stdout.split() if not f.startswith("-O")]
    subprocess.run(["gcc", *flags, "-fsyntax-only", str(source)], check=True)
    assert set(MEMBERS) == set(PLACES)


# ---- The command ---------------------------------------------------------------------------------------------------
AFXDP = """version: 1
interface: nope0
backend: {kind: afxdp}
flows:
  - {name: web, match: {proto: tcp, local: 192.0.2.10, local_port: 80}, action: steer}
  - {name: bad, match: {proto: udp, remote: 203.0.113.0/24}, action: drop}
"""


OFFER = (
    "(?:nope0: no rules: its features cannot be read: there is no such interface|"
    r"the port: whether 0000:03:00.0 takes them is seen when it is opened \(bypass stats\))"
)


def run(file: Path, text: str, *args: str) -> str:
    file.write_text(text)
    argv = ["nic", "rules", "-c", str(file), *args]
    done = CliRunner().invoke(cli, argv, standalone_mode=False, catch_exceptions=False)
    *said, rest = re.split(f"^{OFFER}\n", done.output, flags=re.MULTILINE)
    assert len(said) == 1, "once it is said what the device offers"
    return said[0] + rest


def test_the_command_prints_rules_and_what_is_left(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    queues = ("--queues", "3", "--kernel-queues", "0-1,2")
    assert run(file, AFXDP, *queues).splitlines() == [
        f"{file}:6:5: flows[1].match.local: 'bad': it is dropped by the program, for hardware would also drop what is "
        "routed through this host: name one address of this host, or tell the addresses",
        "ethtool -K nope0 ntuple on",
        "ethtool -N nope0 flow-type tcp4 dst-ip 192.0.2.10 dst-port 80 action 3 loc 0",
        "ethtool -X nope0 weight 1 1 1 0",
    ]
    told = run(file, AFXDP, *queues, "--address", "192.0.2.11", "--first", "9")
    assert told.splitlines()[2] == (
        "ethtool -N nope0 flow-type udp4 src-ip 203.0.113.0 m 0.0.0.255 dst-ip 192.0.2.11 action -1 loc 10"
    )
    assert run(file, AFXDP, *queues, "--address", "192.0.2.11", "--first", "9", "--undo").splitlines() == [
        "ethtool -X nope0 default",
        "ethtool -N nope0 delete 10",
        "ethtool -N nope0 delete 9",
    ]
    assert (
        run(file, AFXDP, "--queues", "2,3", "--kernel-queues", "0-1")
        .splitlines()[1]
        .startswith("# The new RSS")
    )
    own = AFXDP.replace("{kind: afxdp}", "{kind: afxdp, queues: [5]}")
    assert "action 5 loc 0" in run(file, own, "--kernel-queues", "0")
    said = json.loads(
        run(
            file,
            own.replace("203.0.113.0/24", "203.0.113.0/24, local: 192.0.2.9"),
            "--kernel-queues",
            "0",
            "--json",
        )
    )
    assert said["stack"] == [5]
    assert len(said["commands"]) == 4


def test_the_command_prints_flows_for_a_port_of_dpdk(tmp_path: Path) -> None:
    dpdk = AFXDP.replace("{kind: afxdp}", '{kind: dpdk, device: "0000:03:00.0", queues: 2}')
    dpdk += "addresses: [192.0.2.10/24]\n"
    out = run(tmp_path / "p.yaml", dpdk, "--port", "1").splitlines()
    assert out == [
        "flow create 1 ingress pattern eth / ipv4 dst is 192.0.2.10 / tcp dst is 80 / end actions "
        "mark id 1 / rss queues 0 1 end / end",
        "flow create 1 ingress pattern eth / ipv4 src spec 203.0.113.0 src mask 255.255.255.0 dst is 192.0.2.10 / "
        "udp / end actions drop / end",
    ]
    (first, _) = json.loads(run(tmp_path / "p.yaml", dpdk, "--json"))["rules"]
    assert first["pattern"][2] == {
        "kind": "tcp",
        "spec": "00000050" + "00" * 16,
        "mask": "0000ffff" + "00" * 16,
    }


def test_only_what_is_live_is_asked_of_running_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "entry": 4,
        "proto": "tcp",
        "local": "192.0.2.10",
        "local_port": 80,
        "last_local_port": 80,
        "remote": "198.51.100.7",
        "remote_port": 5000,
        "drain": False,
    }
    monkeypatch.setattr(
        hardware, "ask_all", lambda what, interface, limit: [{"entries": [told]}, {"entries": []}]
    )
    out = run(tmp_path / "p.yaml", AFXDP, "--queues", "1", "--kernel-queues", "0", "--live")
    assert "tcp4 src-ip 198.51.100.7 dst-ip 192.0.2.10 src-port 5000 dst-port 80 action 1 loc 0" in out
    block = entry({**told, "local_port": 512, "last_local_port": 767, "remote": None, "remote_port": None})
    assert (block.block, block.last_port) == (True, 767)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "which queues are the stack's? The policy takes all: --queues 3, or backend: {queues: [3]}"),
        (["--queues", "3"], "which queues are the kernel's? --kernel-queues 0-2 (no interface 'nope0' here"),
        (["--queues", "3", "--kernel-queues", "2-3"], "queue 3 cannot be the stack's and the kernel's"),
        (["--queues", "3-1"], "'3-1' is no list of queues"),
        (
            ["--queues", "3", "--kernel-queues", "0", "--address", "web"],
            "--address: 'web' does not appear to be",
        ),
        (["--queues", "3", "--kernel-queues", "0", "--limit", "0"], "0 is not in the range"),
        (["--queues", "3", "--kernel-queues", "0", "--live"], "no process steers flows on nope0"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    (tmp_path / "p.yaml").write_text(AFXDP)
    assert main(["nic", "rules", "-c", str(tmp_path / "p.yaml"), *args]) == 2
    assert says in capsys.readouterr().err
