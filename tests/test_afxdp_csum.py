# SPDX-License-Identifier: Apache-2.0
"""Transmit checksums left to the kernel or the device (Documentation/networking/xsk-tx-metadata.rst, kernel 6.11)."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading

import pytest
from test_afxdp_stack import PORT, client, served

from bypass import netns
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab
from bypass.testing.wire import checksum, pseudo

pytestmark = pytest.mark.netns


def tx_offload(lab: Lab, state: str) -> None:
    netns.run(
        lab.server_ns,
        subprocess.run,
        ["ethtool", "-K", SERVER_IFNAME, "tx", state],
        check=True,
        capture_output=True,
    )


def sniffer(lab: Lab) -> socket.socket:
    s: socket.socket = netns.run(
        lab.client_ns, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)
    )
    s.bind((CLIENT_IFNAME, 0x0800))
    s.settimeout(10)
    return s


def residues(s: socket.socket, proto: int) -> list[tuple[int, bool]]:
    """(sum over pseudo-header and packet, is it the pseudo-header's alone) of what came from the server so far."""
    found: list[tuple[int, bool]] = []
    s.setblocking(False)
    while True:
        try:
            frame = s.recv(65535)
        except BlockingIOError:
            return found
        ip = frame[14:]
        if ip[9] != proto or ip[12:16] != socket.inet_aton(SERVER_IP):
            continue
        l4 = ip[20 : struct.unpack("!H", ip[2:4])[0]]
        field = {6: 16, 17: 6}[proto]
        head = pseudo(SERVER_IP, socket.inet_ntoa(ip[16:20]), proto, len(l4))
        partial = (~checksum(head)) & 0xFFFF
        found.append((checksum(head + l4), partial == struct.unpack("!H", l4[field : field + 2])[0]))


def download(lab: Lab, sizes: tuple[int, ...], ready: threading.Event) -> None:
    with client(lab, socket.SOCK_STREAM) as c:
        ready.wait(20)
        c.connect((SERVER_IP, PORT))
        got = 0
        while got < sum(sizes):
            got += len(c.recv(1 << 16))


def exchange(lab: Lab, before_traffic: str | None = None) -> list[tuple[int, bool]]:
    """64 bytes and 100 kB to a client of the kernel's; what the packets said of their checksums.

    Args:
        before_traffic: the state of the feature once the device is open.
    """
    sizes, ready = (64, 100_000), threading.Event()
    with sniffer(lab) as sniff, served(lab) as stack, stack.create_server((SERVER_IP, PORT)) as server:
        thread = threading.Thread(target=download, args=(lab, sizes, ready))
        thread.start()
        if before_traffic:
            tx_offload(lab, before_traffic)
        ready.set()
        conn, _ = server.accept()
        for size in sizes:
            conn.sendall(b"x" * size)
        conn.recv(1)
        thread.join(20)
        conn.close()
        assert not thread.is_alive()
        return residues(sniff, 6)


def test_a_device_that_sums_is_left_the_sum(lab: Lab) -> None:
    """A veth with transmit checksums on never sums: the peer's kernel gets the pseudo-header's sum, and knows it."""
    tx_offload(lab, "on")
    seen = exchange(lab)
    assert len(seen) > 30
    assert all(partial for _, partial in seen)


def test_without_the_feature_the_stack_sums(lab: Lab) -> None:
    tx_offload(lab, "off")
    seen = exchange(lab)
    assert len(seen) > 30
    assert all(residue == 0 for residue, _ in seen)


def test_what_is_left_to_the_kernel_is_completed_in_the_right_place(lab: Lab) -> None:
    """When the feature goes after the device was opened, the kernel sums by software, from where it was told."""
    tx_offload(lab, "on")
    seen = exchange(lab, before_traffic="off")
    assert len(seen) > 30
    assert all(residue == 0 for residue, _ in seen)


def test_datagrams_arrive_whole_and_in_fragments(lab: Lab) -> None:
    """Nobody but the stack can sum a datagram that it cuts."""
    tx_offload(lab, "on")
    sizes = (1, 64, 1400, 4000)
    with sniffer(lab) as sniff, served(lab) as stack, client(lab, socket.SOCK_DGRAM) as c:
        with stack.socket(socket.SOCK_DGRAM) as server:
            server.bind((SERVER_IP, PORT))
            c.sendto(b"?", (SERVER_IP, PORT))
            _, peer = server.recvfrom(100)
            for size in sizes:
                server.sendto(b"y" * size, peer)
            assert [len(c.recv(65535)) for _ in sizes] == list(sizes)
        assert [partial for _, partial in residues(sniff, 17)][:3] == [True] * 3
