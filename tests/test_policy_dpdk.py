# SPDX-License-Identifier: Apache-2.0
"""A policy with `kind: dpdk`: what it holds, and that what is for the other backend is refused where it stands."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from bypass.cli.policy import policy as policy_command
from bypass.errors import DeviceError, PolicyError
from bypass.policy import AfxdpBackend, DpdkBackend, EalOptions, load_policy, parse_policy, policy_schema

FLOWS = "flows:\n  - {name: web, match: {proto: tcp, local_port: 80}, action: steer}\n"
CONFIG = Path(__file__).parent.parent / "config" / "dpdk.yaml"


def dpdk(keys: str = "", rest: str = "") -> str:
    """Line 3 is the backend, line 4 the first of `rest`."""
    more = f", {keys}" if keys else ""
    return f"version: 1\ninterface: tap0\nbackend: {{kind: dpdk, device: net_null0{more}}}\n{rest}{FLOWS}"


def afxdp(keys: str = "", rest: str = "") -> str:
    more = f", {keys}" if keys else ""
    return f"version: 1\ninterface: eth1\nbackend: {{kind: afxdp{more}}}\n{rest}{FLOWS}"


def lines(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return [p.text("p.yaml") for p in caught.value.problems]


def test_defaults() -> None:
    policy = parse_policy(dpdk())
    assert policy.backend == DpdkBackend("net_null0")
    assert policy.dpdk is policy.backend
    assert policy.mode == "shared"
    assert policy.dpdk.default_frames() == 4096
    assert policy.dpdk.eal == EalOptions()
    assert parse_policy(dpdk("", "mode: shared\n")).mode == "shared"
    assert parse_policy(afxdp()).mode == "direct"


def test_every_field_is_read() -> None:
    keys = (
        "queues: 2, ring_size: 512, frames: 8192, frame_size: 4096, mtu: 3000, vlan: 7, offloads: none, "
        "idle_us: 20, link_poll_ms: 50, exception: none, exception_rate: 77, hardware_rules: auto, "
        "rx_interrupts: required, "
        "eal: {lcores: [3, 1], memory: 128M, hugepages: false, drivers: /opt/pmds, vfio_intr: msi, "
        "devices: ['0000:03:00.1']}"
    )
    rest = "addresses: [192.0.2.10/24, 198.51.100.1/30]\nroutes: [{to: 0.0.0.0/0, via: 192.0.2.1}]\n"
    assert parse_policy(dpdk(keys, rest)).dpdk == DpdkBackend(
        "net_null0",
        2,
        512,
        8192,
        4096,
        3000,
        7,
        "none",
        20,
        50,
        EalOptions((1, 3), 128 << 20, False, "/opt/pmds", ("0000:03:00.1",), "msi"),
        "none",
        77,
        (ipaddress.IPv4Interface("192.0.2.10/24"), ipaddress.IPv4Interface("198.51.100.1/30")),
        ((ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_address("192.0.2.1")),),
        "auto",
        "required",
    )


def test_rules_of_the_interface_are_for_named_queues() -> None:
    b = parse_policy(afxdp("queues: [3], hardware_rules: required, ring_size: 512, frames: 2048")).afxdp
    assert (b.queues, b.hardware_rules) == ((3,), "required")
    everywhere = b.on_all(4)
    assert (everywhere.queues, everywhere.frames, everywhere.hardware_rules) == (None, 4096, "required")
    assert b.on_all(1).frames == 2048
    assert parse_policy(afxdp("queues: [3]")).afxdp.on_all(4).frames is None


def test_a_profile_sets_the_rings_and_a_key_overrides_it() -> None:
    assert parse_policy(dpdk("", "profile: throughput\n")).dpdk.ring_size == 4096
    assert parse_policy(dpdk("ring_size: 256", "profile: throughput\n")).dpdk.ring_size == 256


ERRORS = [
    # text, problems
    (dpdk().replace("dpdk", "dpkd"), ["3:17: backend.kind: dpkd is not a backend: did you mean dpdk?"]),
    (
        dpdk().replace("kind: dpdk, ", ""),
        ["3:10: backend: kind is missing: afxdp or dpdk"],
    ),
    (
        dpdk().replace(", device: net_null0", ""),
        [
            "3:10: backend: device is missing: a PCI address such as 0000:03:00.0, or a virtual one: "
            "net_af_packet0,iface=eth1"
        ],
    ),
    (dpdk().replace("net_null0", "'a b'"), ["3:31: backend.device: a b is not a DPDK device"]),
    (
        dpdk("mode: copy"),
        ["3:42: backend.mode: is for kind: afxdp: a DPDK port has one owner, and offloads says what it does"],
    ),
    (
        afxdp("device: net_null0, exception: tap"),
        [
            "3:24: backend.device: is for kind: dpdk: `interface` names the kernel's device",
            "3:43: backend.exception: is for kind: dpdk: leave it out with afxdp",
        ],
    ),
    (
        afxdp("hardware_rules: auto"),
        [
            "3:40: backend.hardware_rules: auto needs queues of the stack's own: name some in queues, such as "
            "queues: [3]: the kernel keeps the others"
        ],
    ),
    (
        afxdp("queues: [3], hardware_rules: yes"),
        ["3:53: backend.hardware_rules: yes is a boolean in YAML: none, auto or required"],
    ),
    (
        afxdp("queues: [3], hardware_rules: requires"),
        [
            "3:53: backend.hardware_rules: requires is not a use of the interface's own rules: did you mean required?"
        ],
    ),
    (afxdp("vlan: 5"), ["3:24: backend.vlan: is for kind: dpdk: the kernel's VLAN device has it"]),
    (dpdk("queue: 1"), ["3:42: backend.queue: unknown key: did you mean queues?"]),
    (dpdk("queues: all"), ["3:50: backend.queues: all is not a number of queues: 1 to 16"]),
    (dpdk("queues: [0]"), ["3:50: backend.queues: a list is not a number of queues: 1 to 16"]),
    (dpdk("offloads: off"), ["3:52: backend.offloads: off is a boolean in YAML: auto or none"]),
    (
        dpdk("hardware_rules: off"),
        ["3:58: backend.hardware_rules: off is a boolean in YAML: none, auto or required"],
    ),
    (
        dpdk("hardware_rules: requird"),
        [
            "3:58: backend.hardware_rules: requird is not a use of the port's own rules: did you mean required?",
        ],
    ),
    (dpdk("vlan: 4095"), ["3:48: backend.vlan: 4095 is not a VLAN identifier: 1 to 4094"]),
    (dpdk("mtu: 100"), ["3:47: backend.mtu: 100 is not an MTU: 576 to 9702 bytes"]),
    (
        dpdk("frames: 2048"),
        ["3:50: backend.frames: 2048 is too few for the rings: at least 3072"],
    ),
    (dpdk("eal: [2]"), ["3:47: backend.eal: a list is not a mapping of EAL's options"]),
    (dpdk("eal: {lcore: [2]}"), ["3:48: backend.eal.lcore: unknown key: did you mean lcores?"]),
    (dpdk("eal: {lcores: [a]}"), ["3:57: backend.eal.lcores[0]: a is not a CPU: 0 to 8191"]),
    (dpdk("eal: {memory: 1}"), ["3:56: backend.eal.memory: 1 is out of range: 4K to 1024G"]),
    (
        dpdk("eal: {hugepages: 1}"),
        ["3:59: backend.eal.hugepages: 1 is neither true nor false: true, or false"],
    ),
    (dpdk("eal: {drivers: pmds}"), ["3:57: backend.eal.drivers: pmds is not an absolute path"]),
    (dpdk("eal: {devices: [a, a]}"), ["3:61: backend.eal.devices[1]: a is in the list twice"]),
    (dpdk("", "mode: direct\n"), ["4:7: mode: a DPDK port has one owner: leave mode out"]),
    (
        afxdp("", "addresses: [192.0.2.10/24]\nroutes: []\n"),
        [
            "4:1: addresses: is for kind: dpdk: with afxdp the interface is the kernel's: `ip address add`",
            "5:1: routes: is for kind: dpdk: with afxdp the interface is the kernel's: `ip route add`",
        ],
    ),
    (
        dpdk("", "addresses: [192.0.2.10]\n"),
        ["4:13: addresses[0]: 192.0.2.10 has no prefix length: 192.0.2.10/24, say"],
    ),
    (
        dpdk("", "addresses: [192.0.2.1/24, 192.0.2.1/25]\n"),
        ["4:27: addresses[1]: 192.0.2.1/25 is in the list twice: each address once"],
    ),
    (
        dpdk("", "addresses: [192.0.2.0/24]\n"),
        ["4:13: addresses[0]: 192.0.2.0/24 is the network address of 192.0.2.0/24"],
    ),
    (
        dpdk("", "addresses: [127.0.0.1/8]\n"),
        ["4:13: addresses[0]: 127.0.0.1/8 is not an address that a port"],
    ),
    (dpdk("", "addresses: 192.0.2.1/24\n"), ["4:12: addresses: 192.0.2.1/24 is not a list of addresses"]),
    (
        dpdk("", "addresses: [192.0.2.1/24]\nroutes: [{to: 10.0.0.0/8, via: 192.0.3.1}]\n"),
        ["5:32: routes[0].via: 192.0.3.1 is in no prefix of addresses"],
    ),
    (
        dpdk("", "addresses: [192.0.2.1/24]\nroutes: [{to: 10.0.0.0/8, via: 192.0.2.1}]\n"),
        ["5:32: routes[0].via: 192.0.2.1 is the port's own address: the gateway's address"],
    ),
    (
        dpdk("", "addresses: [192.0.2.1/24]\nroutes: [{to: '2001:db8::/32', via: 192.0.2.2}]\n"),
        ["5:37: routes[0].via: 192.0.2.2 is IPv4, but the route is for IPv6: both of one family"],
    ),
    (dpdk("", "routes: [{to: 10.0.0.0/8}]\n"), ["4:10: routes[0]: via is missing: the gateway's, such as"]),
    (dpdk("", "routes: [{to: 10.0.0.0/8, via: x}]\n"), ["4:32: routes[0].via: x is not an address"]),
    (
        dpdk("", "routes: [{to: 10.0.0.1/8, via: 10.0.0.1}]\n"),
        ["4:15: routes[0].to: 10.0.0.1/8 has bits set"],
    ),
    (dpdk("", "routes: [7]\n"), ["4:10: routes[0]: 7 is not a route: a mapping such as"]),
    (
        dpdk("exception: none"),
        ["3:53: backend.exception: none leaves the port without any address: name the port's in addresses"],
    ),
    (
        dpdk("exception: none", "addresses: ['2001:db8::1/64']\n"),
        ["4:13: addresses[0]: 2001:db8::1/64 is IPv6, which the stack does not speak yet: exception: tap"],
    ),
    (
        dpdk("exception: none", "addresses: [192.0.2.1/24]\nroutes: [{to: 10.0.0.0/8, via: 192.0.2.2}]\n"),
        [
            "5:15: routes[0].to: 10.0.0.0/8 is not for all destinations: without a kernel there is one gateway for all"
        ],
    ),
    (
        dpdk("vlan: 7").replace("local_port: 80}, action: steer", "vlan: 7}, action: drop"),
        ["5:43: flows[0].match.vlan: 7 is never seen here: rules are about frames of backend.vlan"],
    ),
]


@pytest.mark.parametrize(("text", "wanted"), ERRORS)
def test_what_is_wrong_is_told_where_it_stands(text: str, wanted: list[str]) -> None:
    found = lines(text)
    assert len(found) == len(wanted), found
    for line, message in zip(found, wanted, strict=True):
        assert line.startswith(f"p.yaml:{message}"), line


def test_the_schema_knows_what_is_for_one_backend() -> None:
    validator = jsonschema.Draft202012Validator(policy_schema())
    for text in (dpdk(), dpdk("queues: 2, eal: {hugepages: false}", "addresses: [192.0.2.10/24]\n"), afxdp()):
        validator.validate(yaml.safe_load(text))
    for text in (
        dpdk("mode: copy"),
        dpdk("", "mode: direct\n"),
        afxdp("device: net_null0"),
        afxdp("", "addresses: [192.0.2.10/24]\n"),
        dpdk("", "addresses: [192.0.2.10]\n"),
        dpdk("", "addresses: [192.0.2.10/24]\nroutes: [{to: 10.0.0.0/8}]\n"),
    ):
        assert lines(text)
        assert not validator.is_valid(yaml.safe_load(text)), text


def test_who_needs_the_other_backend_says_so() -> None:
    with pytest.raises(DeviceError, match=r"^p.yaml: backend.kind is dpdk: this works with kind: afxdp only"):
        _ = parse_policy(dpdk(), "p.yaml").afxdp
    with pytest.raises(DeviceError, match=r"^p.yaml: backend.kind is afxdp: this works with kind: dpdk only"):
        _ = parse_policy(afxdp(), "p.yaml").dpdk
    assert isinstance(parse_policy(afxdp()).afxdp, AfxdpBackend)


def test_check_explains_the_port() -> None:
    told = CliRunner().invoke(policy_command, ["check", str(CONFIG)], standalone_mode=False).output
    assert "bypass0 by dpdk, net_af_packet0,iface=bypass0w, 1 queue, kernel by tap, 50000 packets/s" in told
    assert "Addresses: 192.0.2.10/24\nRoute: 198.51.100.0/24 via 192.0.2.20" in told
    found = yaml.safe_load(
        CliRunner().invoke(policy_command, ["check", "--json", str(CONFIG)], standalone_mode=False).output
    )
    assert found["backend"]["addresses"] == ["192.0.2.10/24"]
    assert found["backend"]["routes"] == [{"to": "198.51.100.0/24", "via": "192.0.2.20"}]
    assert found["backend"]["eal"]["memory"] == 64 << 20
    assert load_policy(CONFIG).dpdk.device == "net_af_packet0,iface=bypass0w"
