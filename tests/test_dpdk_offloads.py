# SPDX-License-Identifier: Apache-2.0
"""What a device does for the stack: checksums, large segments (TSO) and packets in several pieces. net_tap does all of
it in software and hands the result to the kernel, which judges it."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import lab_name
from dpdk_support import CLEAN, Node, backend, hear, in_child, needs_dpdk, say, serve_echo

from bypass import netns
from bypass.dpdk_backend import DpdkDevice
from bypass.raw import RawPort

__all__ = ["needs_dpdk"]

PORT = 7
TAP = "dtap0"


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"bypass-{lab_name()}-tap"
    netns.create(name)
    try:
        yield name
    finally:
        netns.remove(name)


def ip(namespace: str, *command: str) -> None:
    netns.run(namespace, subprocess.run, ["ip", *command], check=True)


def counts(ns: str) -> dict[str, int]:
    """The kernel's counters of TCP in a namespace."""
    table = netns.run(ns, Path("/proc/thread-self/net/snmp").read_text).splitlines()
    names, values = (line.split()[1:] for line in table if line.startswith("Tcp:"))
    return dict(zip(names, map(int, values), strict=True))


@in_child
def served_on_tap(size: int, options: dict[str, Any]) -> dict[str, Any]:
    with DpdkDevice(None, backend(f"net_tap0,iface={TAP}", **options)) as device:
        say("ready")
        hear()
        node = Node(device, "192.0.2.1")
        sock = node.listen(PORT)
        say("listening")
        serve_echo(node, sock, size)
        ours, about = device.statistics()[0], device.about()
        return {
            "used": [*about.rx_used, *about.tx_used],
            "tso": [ours["tso_packets"], ours["tso_segments"]],
            "tx_packets": ours["tx_packets"],
            "invalid": ours["tx_invalid"],
            "retransmits": node.core.stats()["tcp_out_retransmits"],
            "csum_bad": ours["rx_csum_bad"],
            "after": node.settled(),
        }


def echo_through_tap(
    namespace: str, size: int, mtu: int = 1500, **options: Any
) -> tuple[bool, dict[str, Any], int]:
    """Whether the bytes are equal, what the port says, and wrong segments that the kernel received."""
    data = hashlib.shake_128(b"tap").digest(4096) * (size // 4096)
    with served_on_tap.start(size, options, netns=namespace) as server:
        assert server.line() == "ready"
        ip(namespace, "link", "set", TAP, "up", "mtu", str(mtu))
        ip(namespace, "addr", "add", "192.0.2.2/24", "dev", TAP)
        server.tell("go")
        assert server.line() == "listening"
        before = counts(namespace)["InErrs"]
        with netns.run(namespace, socket.socket, socket.AF_INET, socket.SOCK_STREAM) as s:
            s.settimeout(30)
            s.connect(("192.0.2.1", PORT))
            got, chunk = b"", 128 * 1024
            for at in range(0, size, chunk):
                s.sendall(data[at : at + chunk])
                while len(got) < at + chunk:
                    got += s.recv(1 << 20)
            s.shutdown(socket.SHUT_WR)
            result = server.result()
            return got == data, result, counts(namespace)["InErrs"] - before


@pytest.mark.netns
def test_large_segments_arrive_as_the_same_bytes_with_right_checksums(namespace: str) -> None:
    """The kernel's MTU is smaller: net_tap refuses segments that fill the port's (see the next test)."""
    same, got, wrong = echo_through_tap(namespace, 2 << 20, 1400)
    assert (same, wrong, got["invalid"]) == (True, 0, 0)
    assert {"TCP_TSO", "MULTI_SEGS", "TCP_CKSUM", "UDP_CKSUM"} <= set(got["used"])
    packets, segments = got["tso"]
    assert segments > 2 * packets > 0
    assert got["after"] == CLEAN


@pytest.mark.netns
def test_a_driver_that_refuses_large_segments_gets_small_ones(namespace: str) -> None:
    same, got, wrong = echo_through_tap(namespace, 1 << 20)
    assert (same, wrong, got["tso"]) == (True, 0, [0, 0])
    assert "TCP_TSO" in got["used"]
    assert got["after"] == CLEAN


@pytest.mark.netns
def test_without_offloads_the_stack_does_it_all(namespace: str) -> None:
    same, got, wrong = echo_through_tap(namespace, 1 << 20, offloads="none")
    assert (same, wrong, got["used"], got["tso"]) == (True, 0, [], [0, 0])
    assert got["after"] == CLEAN


# ---- Packets larger than a frame -----------------------------------------------------------------------------------
def memif(role: str, path: str) -> str:
    return f"net_memif0,role={role},id=0,socket={path},socket-abstract=no"


@in_child
def takes_large_packets(path: str, frame_size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(memif("server", path), frame_size=frame_size)) as device:
        port, frames = RawPort(device), []
        say("ready")
        while sum(s["rx_packets"] + s["rx_bad"] for s in device.statistics().values()) < 3:
            frames += port.recv(10, 0.1)
        hear()
        ours = device.statistics()[0]
        audit = device.audit()
        return {
            "lengths": [len(f.data) for f in frames],
            "intact": all(f.data[14:] == bytes(i % 251 for i in range(len(f.data) - 14)) for f in frames),
            "bad": ours["rx_bad"],
            "conserved": audit.conserved,
            "held": audit.stack + audit.stack_tx + audit.misplaced,
        }


@in_child
def gives_large_packets(path: str) -> str:
    with DpdkDevice(None, backend(memif("client", path), frame_size=8192, mtu=5000)) as device:
        port = RawPort(device)
        while device.health():
            pass
        head = b"\xff" * 6 + b"\x02" * 6 + b"\x08\x00"
        port.send([head + bytes(i % 251 for i in range(n)) for n in (1000, 4000, 60)])
        hear()
        return "sent"


@pytest.mark.parametrize(("frame_size", "lengths"), [(8192, [1014, 4014, 74]), (2048, [1014, 74])])
def test_a_packet_that_comes_in_pieces_becomes_one_frame_or_is_counted(
    tmp_path: Path, frame_size: int, lengths: list[int]
) -> None:
    path = str(tmp_path / "memif.sock")
    with takes_large_packets.start(path, frame_size) as taker:
        assert taker.line() == "ready"
        with gives_large_packets.start(path) as giver:
            taker.tell("done")
            got = taker.result()
            giver.tell("done")
            assert giver.result() == "sent"
    assert got["lengths"] == lengths
    assert got["bad"] == 3 - len(lengths)
    assert (got["intact"], got["conserved"], got["held"]) == (True, True, 0)
