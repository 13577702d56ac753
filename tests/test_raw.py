# SPDX-License-Identifier: Apache-2.0
"""Raw ports: whole frames on a simulated wire, and flows of a policy steered into Python on a veth."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from bypass import libbpf, netns, raw
from bypass.errors import GrantError, SteeringError
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy
from bypass.sim import Network

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: auto, ring_size: 256}}
flows:
  - name: kept
    match: {{proto: udp, local: {SERVER_IP}, local_port: 5001, remote: 203.0.113.0/24}}
    action: pass
  - name: mine
    match: {{proto: udp, local: {SERVER_IP}, local_port: 5000-5003}}
    action: steer
"""


def swapped(frame: bytes) -> bytes:
    """UDP over IPv4 with both ends exchanged; no checksum changes by it."""
    return b"".join(
        frame[a:b] for a, b in ((6, 12), (0, 6), (12, 26), (30, 34), (26, 30), (36, 38), (34, 36), (38, None))
    )


# ---- On a simulated wire ---------------------------------------------------------------------------------
def test_frames_cross_a_simulated_wire_whole_and_in_order() -> None:
    net = Network()
    wire = net.wire()
    with raw.RawPort(wire.port()) as a, raw.RawPort(wire.port()) as b:
        frames = [b.mac + a.mac + b"\x88\xb5" + bytes([i]) * (46 + i) for i in range(100)]
        assert a.send(frames[:64]) == 64
        net.run(duration_ns=1_000_000)
        assert a.send(frames[64:]) == 36
        net.run(duration_ns=1_000_000)
        assert a.recv(timeout=0) == []
        got = b.recv(30, timeout=0)
        assert len(got) == 30
        got += b.recv(1024, timeout=0)
        assert [f.data for f in got] == frames
        assert {(f.queue, f.entry, f.rule, f.hash) for f in got} == {(0, None, None, 0)}
        assert b.recv(timeout=0) == []


def test_a_simulated_device_cannot_be_waited_for() -> None:
    net = Network()
    with raw.RawPort(net.wire().port()) as port:
        with pytest.raises(OSError, match="not supported") as caught:
            port.recv(timeout=1)
        assert caught.value.errno == errno.ENOTSUP


# ---- On a veth -------------------------------------------------------------------------------------------
@pytest.fixture
def udp(lab: Lab) -> Iterator[Callable[[str, int], socket.socket]]:
    def make(side: str, port: int) -> socket.socket:
        ns, ip = (lab.server_ns, SERVER_IP) if side == "server" else (lab.client_ns, CLIENT_IP)
        with netns.entered(ns):
            s = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            s.bind((ip, port))
        s.settimeout(5)
        return s

    with ExitStack() as stack:
        yield make


@pytest.mark.netns
def test_granted_flows_reach_the_port_and_all_others_the_kernel(
    lab: Lab, udp: Callable[[str, int], socket.socket]
) -> None:
    endpoints: list[raw.Endpoint] = [("udp", SERVER_IP, 5000), ("udp", SERVER_IP, 5002, CLIENT_IP, 7777)]
    kernel = udp("server", 5003)  # granted too, but nobody made it live
    client, other = udp("client", 7777), udp("client", 7778)
    with netns.run(lab.server_ns, raw.open_port, parse_policy(POLICY), endpoints) as port:
        for s, to, data in (
            (client, 5000, b"a"),
            (other, 5000, b"b"),
            (client, 5002, b"c"),
            (client, 5003, b"kernel's"),
        ):
            s.sendto(data, (SERVER_IP, to))
        got: list[raw.Frame] = []
        while len(got) < 3:
            more = port.recv(timeout=5)
            assert more, "a granted packet did not arrive"
            got += more
        assert {(f.data[42:43], f.rule, f.entry) for f in got} == {(b"a", 1, 0), (b"b", 1, 0), (b"c", 1, 1)}
        assert kernel.recv(100) == b"kernel's"
        assert port.send([swapped(f.data) for f in got]) == 3
        assert {client.recvfrom(10)[0], client.recvfrom(10)[0], other.recvfrom(10)[0]} == {b"a", b"b", b"c"}
        assert port.steering is not None
        assert port.steering.rules()["mine"].packets == 4
        assert [count.packets for _, count in port.steering.entries().values()] == [2, 1]


@pytest.mark.netns
def test_the_port_is_reserved_while_it_is_open_and_the_kernels_afterwards(
    lab: Lab, udp: Callable[[str, int], socket.socket]
) -> None:
    client = udp("client", 7777)
    with netns.entered(lab.server_ns):
        ifindex = socket.if_nametoindex(SERVER_IFNAME)
        port = raw.open_port(parse_policy(POLICY), [("udp", SERVER_IP, 5000)])
    with pytest.raises(OSError, match="in use"):
        udp("server", 5000)
    port.close()
    with netns.entered(lab.server_ns):
        assert libbpf.xdp_attached(ifindex) is None
    kernel = udp("server", 5000)
    client.sendto(b"x", (SERVER_IP, 5000))
    assert kernel.recv(10) == b"x"


@pytest.mark.netns
def test_what_cannot_be_opened_leaves_nothing_behind(
    lab: Lab, udp: Callable[[str, int], socket.socket]
) -> None:
    udp("server", 5002)
    with netns.entered(lab.server_ns):
        for endpoint, error, text in (
            (("udp", SERVER_IP, 6000), GrantError, "no rule of the policy grants"),
            (("tcp", SERVER_IP, 5000), GrantError, "no rule of the policy grants"),
            (("icmp", SERVER_IP, 5000), SteeringError, "'tcp' or 'udp', not 'icmp'"),
            (("udp", SERVER_IP, 5002), OSError, f"udp {SERVER_IP}:5002: Address already in use"),
        ):
            with pytest.raises(error, match=text):
                raw.open_port(parse_policy(POLICY), [endpoint])
            assert libbpf.xdp_attached(socket.if_nametoindex(SERVER_IFNAME)) is None
        raw.open_port(parse_policy(POLICY), [("udp", SERVER_IP, 5000)]).close()
