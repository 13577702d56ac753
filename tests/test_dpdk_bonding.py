# SPDX-License-Identifier: Apache-2.0
"""A port of several members by DPDK's bonding driver: failover when a link goes, when a member is removed, and LACP."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bypass._core import lib
from conftest import lab_name
from dpdk_support import CLEAN, Node, backend, finish, hear, in_child, needs_dpdk, say, serve_echo, until

from bypass import netns
from bypass.dpdk_backend import DpdkDevice
from bypass.policy import parse_policy

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


POLICY = """\
version: 1
interface: bond9
backend:
  kind: dpdk
  device: net_bonding0,mode=1,slave=net_af_packet0,slave=net_af_packet1
  link_poll_ms: 10
  ring_size: 256
  eal:
    hugepages: false
    devices: ["net_af_packet0,iface=sa", "net_af_packet1,iface=sb"]
flows:
  - {name: echo, match: {proto: tcp, local_port: 7}, action: steer}
"""


@in_child
def serves(by_policy: bool, size: int) -> dict[str, Any]:
    asked = parse_policy(POLICY, "bond.yaml").dpdk if by_policy else backend(bond(1, "s"), link_poll_ms=10)
    with DpdkDevice(None, asked) as device:
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
@pytest.mark.parametrize(("fault", "by_policy"), [("no carrier", False), ("down", True), ("removed", True)])
def test_a_transfer_goes_on_by_the_other_member(pair: Pair, fault: str, by_policy: bool) -> None:
    """The bond's members within the device's arguments, or in the policy's eal.devices."""
    bridged(pair)
    size = MIB // 2
    with serves.start(by_policy, size, netns=pair.server) as server:
        assert server.line() == "ready"
        assert kernel_talks(pair, size, lambda: FAULTS[fault](pair))
        got = server.result()
    assert (got["driver"], got["mode"]) == ("net_bonding", 1)
    assert got["before"] == [["0", True, True], ["1", True, False]]
    assert got["now"] == [["0", False, False], ["1", True, True]]
    assert got["after"] == CLEAN


# ---- LACP ----------------------------------------------------------------------------------------------------------
BOTH = [["0", True, True], ["1", True, True]]
ONE = [["0", False, False], ["1", True, True]]


def memif_bond(role: str, folder: str) -> str:
    """Two memory links. By the bonds' MAC addresses, the first member's, what they say to each other goes by the first
    (the driver's hash of both, modulo two)."""
    mac = {"server": "02:00:00:00:00:01", "client": "02:00:00:00:00:03"}[role]
    common = f"role={role},socket-abstract=no"
    members = (f"slave=(net_memif{i},id={i},socket={folder}/{i},mac={mac},{common})" for i in (0, 1))
    return f"net_bonding0,mode=4,{','.join(members)}"


def cut(path: str) -> None:
    """This process's connection to a Unix socket ends, as it does when the process at its other end does."""
    found = False
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket, or one without a peer
            s = socket.socket(fileno=os.dup(int(name)))
            with s:
                if s.getpeername() == path:
                    s.shutdown(socket.SHUT_RDWR)
                    found = True
    assert found


@in_child
def lacp_server(device: str, size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(device, link_poll_ms=10)) as port:
        node = Node(port, SERVER)
        sock = node.listen(PORT)
        say("ready")
        serve_echo(node, sock, size)
        until(lambda: members(port) == ONE, node)
        until(lambda: select.select([0], [], [], 0)[0], node)  # the last ACK may be on its way yet
        return {"mode": port.about().bonding_mode, "after": node.settled()}


@in_child
def lacp_client(device: str, size: int, states: list[list[list[Any]]], cut_path: str) -> dict[str, Any]:
    """One connection, a piece of the bytes before each change and one after the last: what the members come to."""
    with DpdkDevice(None, backend(device, link_poll_ms=10)) as port:
        node = Node(port, CLIENT)
        until(lambda: members(port) == BOTH, node)
        data = hashlib.shake_128(b"lacp").digest(4096) * (size // 4096)
        sock, piece = node.core.socket(lib.BYPASS_STREAM), size // (len(states) + 1)
        node.core.connect(sock, (SERVER, PORT))
        got = exchange(node, sock, data[:piece])
        for state in states:
            if cut_path:
                cut(cut_path)
            else:
                say("change")
                hear()
            got += exchange(node, sock, data[len(got) : len(got) + piece])
            until(lambda state=state: members(port) == state, node)
        finish(node, sock)
        return {"same": got == data, "after": node.settled()}


def exchange(node: Node, sock: int, data: bytes) -> bytes:
    """What comes back of data."""
    sent, got = 0, b""

    def step() -> bool:
        nonlocal sent, got
        if sent < len(data) and (n := node.core.send(sock, data[sent:])) > 0:
            sent += n
        more = node.core.recv(sock, 1 << 16)
        if isinstance(more, bytes):
            got += more
        return len(got) >= len(data)

    until(step, node)
    return got


@pytest.mark.netns
def test_lacp_goes_on_without_a_carrier_with_it_again_and_without_the_member(pair: Pair) -> None:
    """The kernel's devices below net_af_packet, whose driver knows neither. The bonding driver's own frames go out only
    when it is called: also while the stack has nothing to send."""
    size = MIB // 4
    changes = {"link set sa down": ONE, "link set sa up": BOTH, "link del sa": ONE}
    with lacp_server.start(bond(4, "s"), size, netns=pair.server) as server:
        assert server.line() == "ready"
        with lacp_client.start(bond(4, "c"), size, list(changes.values()), "", netns=pair.client) as client:
            for change in changes:
                assert client.line() == "change"
                ip(pair.server, change)
                client.tell("go on")
            asked = client.result()
        server.tell("end")
        got = server.result()
    assert asked == {"same": True, "after": CLEAN}
    assert got == {"mode": 4, "after": CLEAN}


def test_lacp_goes_on_when_the_link_that_carries_it_is_lost(tmp_path: Path) -> None:
    size = MIB // 4
    with lacp_server.start(memif_bond("server", str(tmp_path)), size) as server:
        assert server.line() == "ready"
        asked = lacp_client(memif_bond("client", str(tmp_path)), size, [ONE], f"{tmp_path}/0")
        server.tell("end")
        got = server.result()
    assert asked == {"same": True, "after": CLEAN}
    assert got == {"mode": 4, "after": CLEAN}
