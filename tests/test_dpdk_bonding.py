# SPDX-License-Identifier: Apache-2.0
"""A port of several members by DPDK's bonding driver: failover when a link goes, when a member is removed, and LACP."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import lab_name
from dpdk_support import CLEAN, Node, ask_echo, backend, in_child, needs_dpdk, say, serve_echo, until

from bypass import netns
from bypass.dpdk_backend import DpdkDevice

__all__ = ["needs_dpdk"]

PORT = 7
SERVER, CLIENT = "192.0.2.1", "192.0.2.2"
MIB = 1 << 20


def ip(namespace: str, command: str) -> None:
    netns.run(namespace, subprocess.run, ["ip", *command.split()], check=True)


@dataclass
class Pair:
    """Two namespaces with two veths in between, `a` and `b`, ends `s...` and `c...`."""

    server: str
    client: str


@pytest.fixture
def pair() -> Iterator[Pair]:
    infix = lab_name()
    p = Pair(f"bypass-{infix}-bs", f"bypass-{infix}-bc")
    try:
        for ns in (p.server, p.client):
            netns.create(ns)
            ip(ns, "link set lo up")
        for name in "ab":
            ip(p.server, f"link add s{name} type veth peer name c{name} netns {p.client}")
            ip(p.server, f"link set s{name} up")
            ip(p.client, f"link set c{name} up")
            for ns, end in ((p.server, f"s{name}"), (p.client, f"c{name}")):
                netns.run(
                    ns, subprocess.run, ["ethtool", "-K", end, "tx", "off"], check=True, capture_output=True
                )
        yield p
    finally:
        for ns in (p.server, p.client):
            if netns.exists(ns):
                netns.remove(ns)


def bond(mode: int, side: str) -> str:
    members = ",".join(f"slave=(net_af_packet{i},iface={side}{name})" for i, name in enumerate("ab"))
    return f"net_bonding0,mode={mode},{members}"


def members(device: DpdkDevice) -> list[list[Any]]:
    return [[m.name[-1], m.link_up, m.active] for m in device.about().members]


@in_child
def serves(mode: int, size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(bond(mode, "s"), link_poll_ms=10)) as device:
        node = Node(device, SERVER)
        sock = node.listen(PORT)
        until(lambda: any(active for _, _, active in members(device)), node)
        before = members(device)
        say("ready")
        serve_echo(node, sock, size)
        return {
            "driver": device.about().driver,
            "mode": device.about().bonding_mode,
            "before": before,
            "now": members(device),
            "after": node.settled(),
        }


def kernel_talks(pair: Pair, size: int, half_way: Callable[[], None]) -> bool:
    """Echo through a bridge that has both links; half_way() happens in the middle."""
    data = hashlib.shake_128(b"bond").digest(4096) * (size // 4096)
    with netns.run(pair.client, socket.socket, socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(40)
        s.connect((SERVER, PORT))
        got, chunk = b"", 64 * 1024
        for at in range(0, size, chunk):
            if at == size // 2:
                half_way()
            s.sendall(data[at : at + chunk])
            while len(got) < at + chunk:
                got += s.recv(MIB)
        return got == data


def bridged(pair: Pair) -> None:
    """The bridge has an address of its own: else it would change with its ports, and nobody would tell our stack."""
    ip(pair.client, "link add br0 address 02:00:00:00:00:42 type bridge forward_delay 0 stp_state 0")
    for name in "ab":
        ip(pair.client, f"link set c{name} master br0")
    ip(pair.client, "link set br0 up")
    ip(pair.client, f"addr add {CLIENT}/24 dev br0")


FAULTS: dict[str, Callable[[Pair], None]] = {
    "no carrier": lambda pair: ip(pair.client, "link set ca down"),
    "down": lambda pair: ip(pair.server, "link set sa down"),
    "removed": lambda pair: ip(pair.server, "link del sa"),
}


@pytest.mark.netns
@pytest.mark.parametrize("fault", FAULTS)
def test_a_transfer_goes_on_by_the_other_member(pair: Pair, fault: str) -> None:
    bridged(pair)
    size = MIB // 2
    with serves.start(1, size, netns=pair.server) as server:
        assert server.line() == "ready"
        assert kernel_talks(pair, size, lambda: FAULTS[fault](pair))
        got = server.result()
    assert (got["driver"], got["mode"]) == ("net_bonding", 1)
    assert got["before"] == [["0", True, True], ["1", True, False]]
    assert got["now"] == [["0", False, False], ["1", True, True]]
    assert got["after"] == CLEAN


# ---- LACP ----------------------------------------------------------------------------------------------------------
@in_child
def lacp_server(size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(bond(4, "s"), link_poll_ms=10)) as device:
        node = Node(device, SERVER)
        sock = node.listen(PORT)
        say("ready")
        serve_echo(node, sock, size)
        until(lambda: all(active for _, _, active in members(device)), node)
        return {"mode": device.about().bonding_mode, "members": members(device), "after": node.settled()}


@in_child
def lacp_client(size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(bond(4, "c"), link_poll_ms=10)) as device:
        node = Node(device, CLIENT)
        until(lambda: all(active for _, _, active in members(device)), node)
        data = hashlib.shake_128(b"lacp").digest(4096) * (size // 4096)
        same = ask_echo(node, (SERVER, PORT), data) == data
        return {"same": same, "members": members(device), "after": node.settled()}


@pytest.mark.netns
def test_two_bonds_agree_on_their_links_by_lacp(pair: Pair) -> None:
    """The driver's own frames go out only when it is called: also while the stack has nothing to send."""
    size = MIB // 4
    with lacp_server.start(size, netns=pair.server) as server:
        assert server.line() == "ready"
        client = lacp_client(size, netns=pair.client)
        got = server.result()
    both = [["0", True, True], ["1", True, True]]
    assert (client["same"], client["members"], client["after"]) == (True, both, CLEAN)
    assert (got["mode"], got["members"], got["after"]) == (4, both, CLEAN)
