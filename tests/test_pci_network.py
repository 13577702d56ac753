# SPDX-License-Identifier: Apache-2.0
"""An interface that went away and came back, bare and under another name, gets everything back that it had: tried on
the kernel, with a veth that is removed and made anew."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest

from bypass import netns
from bypass.pci import network

MAC = "02:00:00:00:00:42"
SET_UP = f"""
ip link add nic1 address {MAC} type veth peer name far1; ip link set far1 up; ip link add br9 type bridge
ip link set nic1 mtu 1400; ip link set nic1 up; ip link set lo up
sysctl -qw net.ipv4.conf.nic1.rp_filter=2 net.ipv6.conf.nic1.accept_ra=0
ip addr add 192.0.2.10/24 brd + dev nic1; ip addr add 192.0.2.11/24 dev nic1
ip addr add 198.51.100.1/32 dev nic1 scope link noprefixroute; ip addr add 2001:db8::10/64 dev nic1 nodad
ip addr add 203.0.113.9/24 dev nic1 valid_lft 1000 preferred_lft 900
ip route add default via 192.0.2.1; ip route add 198.51.100.64/26 via 192.0.2.2 metric 50 mtu 1300
ip route add 203.0.113.128/25 via 192.0.2.3 table 100; ip route add 198.51.100.200/32 dev nic1 src 192.0.2.11
ip -6 route add 2001:db8:1::/48 via 2001:db8::1; ip -6 route add default via fe80::1 dev nic1 metric 7
ip route add 198.18.0.0/15 nexthop via 192.0.2.4 weight 2 nexthop via 192.0.2.5
ip neigh add 192.0.2.77 lladdr 02:00:00:00:00:77 dev nic1 nud permanent
"""


def sh(namespace: str, script: str) -> str:
    command = ["ip", "netns", "exec", namespace, "sh", "-ec", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def elsewhere(namespace: str) -> Iterator[None]:
    with netns.entered(namespace):
        yield


def lasting(routes: str) -> list[dict[str, Any]]:
    """Without IPv6's own, of the link-local address: they come when the link is seen to be up, and one a second or two
    later, when nobody else was found to have the address (RFC 4862 5.4)."""
    return [r for r in json.loads(routes) if not r["dst"].startswith(("fe80:", "ff00:"))]


def known(namespace: str) -> dict[str, Any]:
    """What ip(8) tells of the interface, without what is new each time."""
    found: dict[str, Any] = {
        "link": json.loads(sh(namespace, "ip -j link show dev nic1")),
        "addresses": json.loads(sh(namespace, "ip -j addr show dev nic1 scope global; ")),
        "scoped": json.loads(sh(namespace, "ip -j addr show dev nic1 scope link to 198.51.100.0/24")),
        "routes": lasting(sh(namespace, "ip -d -j route show table all dev nic1")),
        "multipath": [r for r in json.loads(sh(namespace, "ip -d -j route show")) if "nexthops" in r],
        "routes6": lasting(sh(namespace, "ip -d -j -6 route show table main dev nic1")),
        "neighbours": json.loads(sh(namespace, "ip -j neigh show dev nic1 nud permanent")),
        "settings": sh(namespace, "sysctl net.ipv4.conf.nic1.rp_filter net.ipv6.conf.nic1.accept_ra"),
    }

    def plain(what: Any) -> Any:
        if isinstance(what, list):
            return [plain(w) for w in what if w]
        if isinstance(what, dict):
            gone = (
                "ifindex",
                "link_index",
                "valid_life_time",
                "preferred_life_time",
                "operstate",
                "flags",
                "qdisc",
            )
            return {k: plain(v) for k, v in what.items() if k not in gone}
        return what

    result = plain(found)
    assert isinstance(result, dict)
    return result


@pytest.mark.netns
def test_an_interface_that_comes_back_bare_gets_everything_again(namespace: str) -> None:
    sh(namespace, SET_UP)
    before = known(namespace)
    assert len(before["routes"]) >= 8
    assert before["multipath"]
    with elsewhere(namespace):
        saved = network.snapshot("nic1")
    saved = network.Saved.from_json(json.loads(json.dumps(asdict(saved))))  # by way of the record
    assert {i.text for i in saved.addresses} == {
        "192.0.2.10/24",
        "192.0.2.11/24",
        "198.51.100.1/32",
        "203.0.113.9/24",
        "2001:db8::10/64",
    }
    assert "198.51.100.64/26 via 192.0.2.2 metric 50" in [i.text for i in saved.routes]
    sh(
        namespace,
        f"ip link del nic1; ip link add eth9 address {MAC} type veth peer name far1; ip link set far1 up",
    )
    with elsewhere(namespace):
        assert network.restore(saved, "eth9") == []
        assert known(namespace) == before
        assert network.restore(saved, "nic1") == []  # what is there stays
    assert known(namespace) == before
    told = json.loads(sh(namespace, "ip -j addr show dev nic1 to 203.0.113.9"))[0]["addr_info"]
    (lease,) = (address for address in told if address)
    assert 900 < lease["valid_life_time"] <= 1000


@pytest.mark.netns
def test_master_mac_and_state_come_back(namespace: str) -> None:
    veth = "ip link add nic1 type veth peer name far1"
    sh(
        namespace,
        f"ip link add br9 type bridge; {veth}; ip link set nic1 address {MAC}; ip link set nic1 master br9",
    )
    with elsewhere(namespace):
        saved = network.snapshot("nic1")
    assert (saved.master, saved.up, saved.lost) == ("br9", False, [])
    sh(namespace, f"ip link del nic1; {veth}; ip link set nic1 up")
    with elsewhere(namespace):
        assert network.restore(saved, "nic1") == []
    (link,) = json.loads(sh(namespace, "ip -j link show dev nic1"))
    assert (link["address"], link["master"], "UP" in link["flags"]) == (MAC, "br9", False)
    sh(namespace, f"ip link del br9; ip link del nic1; {veth}")
    with elsewhere(namespace):
        assert network.restore(saved, "nic1") == ["master br9: there is no such interface any more"]


@pytest.mark.netns
def test_what_will_not_come_back_is_known_before(namespace: str) -> None:
    sh(
        namespace,
        "ip link add nic1 type veth peer name far1; ip link set nic1 up; ip link set far1 up",
    )
    sh(namespace, "ip addr add 192.0.2.1/24 dev nic1; ip link add link nic1 name mv0 type macvlan")
    sh(namespace, "ip nexthop add id 9 via 192.0.2.2 dev nic1")
    sh(namespace, "ip route add 198.18.0.0/15 nhid 9")
    with elsewhere(namespace):
        lost = network.snapshot("nic1").lost
    assert lost == [
        "the interface mv0 on top of it",
        "the route 198.18.0.0/15 via 192.0.2.2, which names a nexthop object",
    ]


@pytest.mark.netns
def test_a_route_that_cannot_be_set_is_told_and_the_others_are_set(namespace: str) -> None:
    sh(
        namespace,
        "ip link add nic1 type veth peer name far1; ip link set nic1 up; ip addr add 192.0.2.10/24 dev nic1",
    )
    sh(namespace, "ip route add 198.18.0.0/15 via 192.0.2.1; ip route add 198.51.100.0/24 via 192.0.2.2")
    with elsewhere(namespace):
        saved = network.snapshot("nic1")
        sh(namespace, "ip route flush dev nic1 proto boot; ip route add blackhole 198.18.0.0/15 metric 9")
        assert network.restore(saved, "nic1") == []
        sh(namespace, "ip addr flush dev nic1")
        bare = network.Saved.from_json({**asdict(saved), "addresses": []})
        problems = network.restore(bare, "nic1")
    assert problems == [
        "route 198.18.0.0/15 via 192.0.2.1: Network is unreachable",
        "route 198.51.100.0/24 via 192.0.2.2: Network is unreachable",
    ]
