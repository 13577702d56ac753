# SPDX-License-Identifier: Apache-2.0
"""DPDK ports between processes and beside the kernel: memif, af_packet on a veth; links that go and come back."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from afxdp_support import link
from bypass._core import lib
from dpdk_support import (
    CLEAN,
    Node,
    ask_echo,
    backend,
    hear,
    in_child,
    needs_dpdk,
    places,
    say,
    serve_echo,
    until,
)

from bypass import netns
from bypass.dpdk_backend import DpdkDevice
from bypass.lab import SERVER_IP, WIRE_IFNAME, Lab
from bypass.raw import RawPort

__all__ = ["needs_dpdk"]

PORT = 7
MIB = 1 << 20
FITS = 2048 - 22 - 96
"""In a frame of net_af_packet's: beside Ethernet's header, and the kernel's in front of it."""


def pattern(size: int) -> bytes:
    return hashlib.shake_128(b"pattern").digest(4096) * (size // 4096)


@contextmanager
def node_on(device: str, address: str, **options: Any) -> Iterator[Node]:
    trust = options.pop("rx_csum_trust", False)
    with DpdkDevice(None, backend(device, **options), rx_csum_trust=trust) as port:
        node = Node(port, address)
        try:
            yield node
        finally:
            node.close()


def adds_up(device: DpdkDevice) -> bool:
    """Ours, the driver's, and its extended statistics say the same of packets."""
    ours = list(device.statistics().values())
    rx, tx = sum(q["rx_packets"] for q in ours), sum(q["tx_packets"] for q in ours)
    theirs, extended = device.device_statistics(), device.extended_statistics()
    counts = (theirs["ipackets"], theirs["opackets"])
    return (rx, tx) == counts == (extended["rx_good_packets"], extended["tx_good_packets"])


# ---- Memory between two processes ----------------------------------------------------------------------------------
def memif(role: str, path: str) -> str:
    """With a MAC address that stays: another one for the same address, a moment after the first, is not believed."""
    mac = {"server": "02:00:00:00:00:01", "client": "02:00:00:00:00:02"}[role]
    return f"net_memif0,role={role},id=0,socket={path},socket-abstract=no,mac={mac}"


@in_child
def memif_server(path: str, size: int) -> dict[str, Any]:
    """Serves one client, sees it go, and serves the next."""
    states, sums = [], []
    with node_on(memif("server", path), "192.0.2.1") as node:
        device, sock = node.device, node.listen(PORT)
        states.append(device.health())
        say("ready")
        for _ in range(2):
            serve_echo(node, sock, size)
            states.append(device.health())
            sums.append(adds_up(device))
            say("served")
            until(lambda: device.health() == errno.ENETDOWN, node)
            states.append(device.health())
            say("gone")
        return {
            "states": states,
            "adds_up": sums[0],
            "after": node.settled(),
        }  # the driver forgets with the link


@in_child
def memif_client(path: str, size: int) -> dict[str, Any]:
    with node_on(memif("client", path), "192.0.2.2") as node:
        until(lambda: node.device.health() == 0, node)
        data = pattern(size)
        same = ask_echo(node, ("192.0.2.1", PORT), data) == data
        hear()
        return {"same": same, "adds_up": adds_up(node.device), "after": node.settled()}


def test_two_processes_talk_over_memif_and_the_one_left_waits_for_the_next(tmp_path: Path) -> None:
    path, size = str(tmp_path / "memif.sock"), MIB // 4
    with memif_server.start(path, size) as server:
        assert server.line() == "ready"
        for _ in range(2):
            with memif_client.start(path, size) as client:
                assert server.line() == "served"
                client.tell("go")
                assert client.result() == {"same": True, "adds_up": True, "after": CLEAN}
            assert server.line() == "gone"
        got = server.result()
    assert got["states"] == [errno.ENETDOWN, 0, errno.ENETDOWN, 0, errno.ENETDOWN]
    assert got["after"] == CLEAN
    assert got["adds_up"]


# ---- Beside the kernel ---------------------------------------------------------------------------------------------
@pytest.fixture
def wire(request: pytest.FixtureRequest) -> Iterator[Lab]:
    from conftest import lab_name

    with Lab(lab_name(), wire=True, **getattr(request, "param", {})) as lab:
        yield lab


@in_child
def served_on(device: str, size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Echoes one TCP connection and one datagram, and says how its device is when it is asked."""
    with node_on(device, SERVER_IP, **options) as node:
        sock, datagrams = node.listen(PORT), node.core.socket(lib.BYPASS_DGRAM)
        node.core.bind(datagrams, ("", PORT))
        say("ready")
        serve_echo(node, sock, size)

        def datagram() -> bool:
            got = node.core.recvfrom(datagrams, 2000)
            return isinstance(got, tuple) and node.core.sendto(datagrams, got[0], got[1]) >= 0

        until(datagram, node)
        about = node.device.about()
        return {
            "driver": about.driver,
            "mtu": about.mtu,
            "packets": sum(q["tx_packets"] for q in node.device.statistics().values()),
            "queues_used": sum(q["rx_packets"] > 0 for q in node.device.statistics().values()),
            "trouble": sorted(node.trouble),
            "after": node.settled(),
            "affinity": len(os.sched_getaffinity(0)) == os.cpu_count(),
        }


@in_child
def several_flows(device: str) -> dict[str, Any]:
    """Echoes datagrams of 32 flows, each by the queue that it came by."""
    with DpdkDevice(None, backend(device, queues=2)) as port:
        raw, done = RawPort(port), 0
        say("ready")
        mac = bytes(raw.mac)
        while done < 32:
            for f in raw.recv(64, 1.0):
                d = bytearray(f.data)
                if d[12:14] == b"\x08\x06" and d[21] == 1:  # who has it?
                    d[0:6], d[6:12], d[21] = d[6:12], mac, 2
                    d[22:42] = mac + d[38:42] + d[22:32]
                elif d[12:14] == b"\x08\x00" and d[23] == 17 and d[36:38] == PORT.to_bytes(2, "big"):
                    d[0:6], d[6:12] = d[6:12], mac
                    d[26:34], d[34:38] = d[30:34] + d[26:30], d[36:38] + d[34:36]
                    done += 1
                else:
                    continue
                raw.send([bytes(d)], queue=f.queue)
        hear()
        ours = port.statistics().values()
        return {
            "rx": [q["rx_packets"] for q in ours],
            "tx": [q["tx_packets"] for q in ours],
            "after": places(port),
        }


def kernel_socket(lab: Lab, kind: int) -> socket.socket:
    s = netns.run(lab.client_ns, socket.socket, socket.AF_INET, kind)
    s.settimeout(30)
    return s


def talk(lab: Lab, size: int, half_way: Any = None) -> bool:
    """The kernel's side: TCP echo of so many bytes (half_way() is called in the middle), a datagram, a ping."""
    data = pattern(size)
    with kernel_socket(lab, socket.SOCK_STREAM) as s:
        s.connect((SERVER_IP, PORT))
        got, chunk = b"", 64 * 1024
        for at in range(0, size, chunk):
            if half_way is not None and at == size // 2:
                half_way()
            s.sendall(data[at : at + chunk])
            want = at + chunk
            while len(got) < want:
                got += s.recv(MIB)
        s.shutdown(socket.SHUT_WR)
    with kernel_socket(lab, socket.SOCK_DGRAM) as u:
        pinged = subprocess.run(
            ["ip", "netns", "exec", lab.client_ns, "ping", "-c", "1", "-W", "5", SERVER_IP],
            stdout=subprocess.DEVNULL,
        )
        u.sendto(b"datagram", (SERVER_IP, PORT))
        return got == data and u.recv(100) == b"datagram" and pinged.returncode == 0


@pytest.mark.netns
def test_a_port_on_a_veth_speaks_with_the_kernel_at_its_other_end(wire: Lab) -> None:
    size = 2 * MIB
    with served_on.start(f"net_af_packet0,iface={WIRE_IFNAME}", size, {}, netns=wire.server_ns) as server:
        assert server.line() == "ready"
        assert talk(wire, size)
        got = server.result()
    assert got.pop("packets") > size / 1500
    assert got == {
        "driver": "net_af_packet",
        "mtu": 1500,
        "queues_used": 1,
        "trouble": [],
        "after": CLEAN,
        "affinity": True,
    }


@in_child
def mtus(device: str, options: dict[str, Any], changes: list[int]) -> list[int]:
    """What it says of itself when the kernel's device has another one."""
    with DpdkDevice(None, backend(device, **options)) as port:
        found = [port.mtu]
        for mtu in changes:
            subprocess.run(["ip", "link", "set", WIRE_IFNAME, "mtu", str(mtu)], check=True)
            time.sleep(0.01)  # it looks again after link_poll_ms
            assert port.health() == 0
            found.append(port.mtu)
        return found


@pytest.mark.netns
@pytest.mark.parametrize(
    ("options", "found"),
    [({}, [1500, 1400, 1600, FITS, 68]), ({"mtu": 1450}, [1450, 1400, 1450, 1450, 68])],
)
def test_the_mtu_of_the_kernels_device_below_is_followed(
    wire: Lab, options: dict[str, Any], found: list[int]
) -> None:
    """Up to what frames hold, or what the policy says."""
    device = f"net_af_packet0,iface={WIRE_IFNAME}"
    changes = [1400, 1600, 9000, 68]
    assert mtus(device, {**options, "link_poll_ms": 1}, changes, netns=wire.server_ns) == found


@in_child
def looks_late(device: str, ring_size: int, frames: int) -> int:
    """Frames that have come when it looks for the first time after `frames` were sent."""
    with DpdkDevice(None, backend(device, ring_size=ring_size)) as port:
        say("ready")
        hear()
        raw, got = RawPort(port), 0
        while n := sum(f.data[12:14] == b"\x08\x00" for f in raw.recv(64, 0.2)):
            got += n
        return got


@pytest.mark.netns
@pytest.mark.parametrize(("more", "kept"), [("", 1000), (",framecnt=512", 512)])
def test_a_ring_holds_what_the_policy_says(wire: Lab, more: str, kept: int) -> None:
    """The kernel's ring below net_af_packet, whose own size is 512."""
    from bypass.lab import CLIENT_IFNAME

    device = f"net_af_packet0,iface={WIRE_IFNAME}{more}"
    with looks_late.start(device, 1024, 1000, netns=wire.server_ns) as port:
        assert port.line() == "ready"
        with netns.run(wire.client_ns, socket.socket, socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind((CLIENT_IFNAME, 0))
            for _ in range(1000):
                s.send(b"\x02" * 12 + b"\x08\x00" + bytes(100))
        port.tell("look")
        got = port.result()
    assert got == kept if not more else got <= kept


@pytest.mark.netns
@pytest.mark.parametrize("wire", [{"mtu": 9000}], indirect=True)
def test_jumbo_frames_are_sent_and_received(wire: Lab) -> None:
    size, options = MIB, {"frame_size": 16384, "mtu": 9000, "rx_csum_trust": True}
    with served_on.start(
        f"net_af_packet0,iface={WIRE_IFNAME}", size, options, netns=wire.server_ns
    ) as server:
        assert server.line() == "ready"
        assert talk(wire, size)
        got = server.result()
    assert (got["mtu"], got["after"]) == (9000, CLEAN)
    assert got["packets"] < size / 3000, "acknowledgments included"


@pytest.mark.netns
@pytest.mark.parametrize("wire", [{"queues": 2}], indirect=True)
def test_flows_are_spread_over_queues(wire: Lab) -> None:
    device = f"net_af_packet0,iface={WIRE_IFNAME},qpairs=2"
    with several_flows.start(device, netns=wire.server_ns) as server:
        assert server.line() == "ready"
        sockets = [kernel_socket(wire, socket.SOCK_DGRAM) for _ in range(32)]
        for s in sockets:
            s.sendto(b"datagram", (SERVER_IP, PORT))
        assert all(s.recv(100) == b"datagram" for s in sockets)
        for s in sockets:
            s.close()
        server.tell("end")
        got = server.result()
    assert all(queue >= 1 for queue in got["tx"]), "both queues were used"
    assert all(tx <= rx for rx, tx in zip(got["rx"], got["tx"], strict=True)), (
        "answers go by the question's queue"
    )
    assert got["after"] == CLEAN


@pytest.mark.netns
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_transfer_goes_on_when_the_link_went_and_came_back(wire: Lab, side: str) -> None:
    size = MIB

    def flap() -> None:
        ns, ifname = (wire.server_ns, WIRE_IFNAME) if side == "server" else (wire.client_ns, "bypass1")
        link(ns, ifname, state="down")
        link(ns, ifname, state="up")

    with served_on.start(
        f"net_af_packet0,iface={WIRE_IFNAME}", size, {"link_poll_ms": 1}, netns=wire.server_ns
    ) as server:
        assert server.line() == "ready"
        assert talk(wire, size, flap)
        got = server.result()
    assert got["after"] == CLEAN
    assert set(got["trouble"]) <= {errno.ENETDOWN}


@in_child
def device_health(device: str, frames: int) -> dict[str, Any]:
    """How the port is, each time it is asked, until it is removed; then closes it and opens another."""
    states = []
    with node_on(device, SERVER_IP, link_poll_ms=1, frames=frames) as node:
        sock = node.core.socket(lib.BYPASS_DGRAM)
        node.core.nexthop_set("192.0.2.99", b"\x02" * 6)
        say("ready")
        while (step := hear()) != "end":
            node.core.sendto(sock, b"x" * 100, ("192.0.2.99", 9))
            for _ in range(5):
                node.poll()
            states.append([step, node.device.health(), int(node.core.flush())])
            say(states[-1])
        after = node.settled()
    with DpdkDevice(None, backend("net_null0")) as other:
        return {"states": states, "after": after, "other": other.about().driver}


@pytest.mark.netns
@pytest.mark.parametrize(("driver", "frames"), [("net_af_packet0", 1024), ("net_af_xdp0", 8192)])
def test_down_and_up_are_told_and_removal_is_for_good(wire: Lab, driver: str, frames: int) -> None:
    with device_health.start(f"{driver},iface={WIRE_IFNAME}", frames, netns=wire.server_ns) as port:
        assert port.line() == "ready"

        def comes_to(wanted: int) -> bool:
            """The kernel takes its time with carriers."""
            for _ in range(200):
                port.tell("how is it?")
                if port.line()[1] == wanted:
                    return True
                time.sleep(0.01)
            return False

        assert comes_to(0)
        link(wire.server_ns, WIRE_IFNAME, state="down")
        assert comes_to(errno.ENETDOWN)
        link(wire.server_ns, WIRE_IFNAME, state="up")
        assert comes_to(0)
        link(wire.client_ns, "bypass1", state="down")
        assert comes_to(errno.ENETDOWN)
        link(wire.client_ns, "bypass1", state="up")
        assert comes_to(0)
        netns.run(wire.server_ns, subprocess.run, ["ip", "link", "del", WIRE_IFNAME], check=True)
        assert comes_to(errno.ENXIO)
        port.tell("end")
        got = port.result()
    assert got["after"] == CLEAN
    assert got["other"] == "net_null"
