# SPDX-License-Identifier: Apache-2.0
"""Sockets that do not copy, on a live interface: the frames are those of the UMEM. The peer is Linux."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from backends import policy_for
from support import WAIT_S

from bypass import Stack, netns
from bypass.embedded import DeviceDriver
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy
from bypass.sockets import Socket

pytestmark = [pytest.mark.netns, pytest.mark.backends]

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, ring_size: 512}}
flows:
  - name: web
    match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080}}
    action: steer
"""
SIZE = 2_000_000
DATA = bytes((i * 7 + (i >> 8)) & 0xFF for i in range(SIZE))


@pytest.fixture
def stack(lab: Lab) -> Iterator[Stack]:
    with netns.entered(lab.server_ns):
        it = Stack.from_policy(parse_policy(policy_for(lab, POLICY)))
        yield it
        it.close(linger=0.2)


@pytest.fixture
def ends(stack: Stack, lab: Lab) -> Iterator[tuple[Socket, socket.socket]]:
    """Ours and Linux'."""
    with netns.entered(lab.client_ns):
        peer = socket.socket()
    peer.setblocking(False)
    with peer, stack.create_server((SERVER_IP, 8080)) as server:
        peer.connect_ex((SERVER_IP, 8080))
        sock, _ = server.accept()
        with sock:
            sock.settimeout(WAIT_S)
            yield sock, peer


def copied(stack: Stack) -> int:
    return stack.stats()["tcp_copied_bytes"]


def serving(stack: Stack, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        stack.run(timeout=0.01)


def test_a_megabyte_each_way_without_a_copy(stack: Stack, ends: tuple[Socket, socket.socket]) -> None:
    sock, peer = ends
    at, got = 0, bytearray()
    while len(got) < SIZE:
        if at < SIZE and select.select([], [peer], [], 0)[1]:
            at += peer.send(DATA[at : at + 100 * 1448])
        with sock.recv_zc() as pieces:
            for view in pieces:
                got += view
    assert got == DATA
    short = copied(stack)  # what Linux sent in segments of 256 bytes and less
    assert short <= SIZE // 100
    at, back = 0, bytearray()

    def take() -> bool:
        while select.select([peer], [], [], 0)[0]:
            back.extend(peer.recv(1 << 20))
        return len(back) >= at

    while at < SIZE:
        buffers = sock.alloc_zc(16)
        for buffer in buffers:
            at += buffer.write(DATA[at : at + buffer.size])
        for buffer in buffers:
            if not buffer.used:
                buffer.release()
        buffers = [b for b in buffers if b.used]
        while buffers:
            buffers = buffers[sock.send_zc(buffers) :]
        serving(stack, take)
    assert back == DATA
    assert copied(stack) == short
    assert stack.audit()["lent"] == 0


def test_a_device_lives_as_long_as_somebody_looks_into_its_frames(
    stack: Stack, ends: tuple[Socket, socket.socket]
) -> None:
    sock, peer = ends
    peer.send(DATA[:1000])
    pieces = sock.recv_zc()
    part = pieces[0][:100]
    with pytest.raises(BufferError):
        stack.close()
    assert isinstance(stack.driver, DeviceDriver)
    assert bytes(part) == DATA[:100]
    assert stack.driver.device.audit().conserved
    del part
    pieces.release()
    assert stack.driver.device.audit().conserved
    peer.send(DATA[:1000])
    assert sock.recv(2000) == DATA[:1000]
