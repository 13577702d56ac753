# SPDX-License-Identifier: Apache-2.0
"""A stack that talks to itself: the device of bypass/app/loop.c, and the layout of an application's memory."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from bypass._core import ffi, lib

from bypass.core import Config, CoreStack

FLAGS = lib.BYPASS_F_RST | lib.BYPASS_F_PING | lib.BYPASS_F_LOOPBACK
FRAMES = 1024
ME = "127.0.0.1"


class Loop:
    """One stack on a loop device, in virtual time."""

    def __init__(self, flags: int = FLAGS) -> None:
        size = lib.loop_mem_size(FRAMES)
        self.raw = ffi.new("uint8_t[]", size + 64)
        at = int(ffi.cast("uintptr_t", self.raw))
        self.mem = ffi.cast("void *", (at + 63) & ~63)
        self.dev = ffi.new("struct loop *")
        assert lib.loop_init(self.mem, size, FRAMES) == 0
        assert lib.loop_attach(self.dev, self.mem, size) == 0
        self.netdev = ffi.cast("struct bypass_netdev *", self.dev)
        self.now = 1_000_000_000
        self.core = CoreStack(self.netdev, config=Config(), flags=flags, now_ns=self.now, owner=self)

    def run(self, seconds: float = 1.0) -> None:
        end = self.now + int(seconds * 1e9)
        while self.now < end:
            while self.core.poll(self.now, 64) > 0 or lib.loop_waiting(self.dev):
                pass
            self.now = min(max(self.core.deadline(), self.now + 1), end)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    made.core.addr_add(ME, 8)
    yield made
    made.core.close()
    assert made.netdev.free_frames == FRAMES


def test_a_connection_to_oneself(loop: Loop) -> None:
    core = loop.core
    listener = core.socket(lib.BYPASS_STREAM)
    core.bind(listener, (ME, 80))
    core.listen(listener, 8)
    client = core.socket(lib.BYPASS_STREAM)
    assert core.connect(client, (ME, 80)) == -errno.EINPROGRESS
    loop.run(0.1)
    server = core.accept(listener)
    assert core.peer(server) == core.local(client)
    sent = bytes(range(256)) * 2000
    got, left = bytearray(), sent
    while len(got) < len(sent):
        left = left[max(0, core.send(client, left[:50_000])) :]
        loop.run(0.05)
        data = core.recv(server, 1 << 20)
        got += data if isinstance(data, bytes) else b""
    assert bytes(got) == sent
    for handle in (client, server, listener):
        core.close_socket(handle)
    loop.run(200)


def test_datagrams_and_refusals(loop: Loop) -> None:
    core = loop.core
    a, b = core.socket(lib.BYPASS_DGRAM), core.socket(lib.BYPASS_DGRAM)
    core.bind(a, (ME, 53))
    assert core.sendto(b, b"hello", (ME, 53)) == 5
    loop.run(0.01)
    got = core.recvfrom(a, 100)
    assert isinstance(got, tuple)
    assert got[0] == b"hello"
    assert got[1][1] == core.local(b)[1]
    core.connect(b, (ME, 9))
    core.send(b, b"nobody")
    loop.run(0.01)
    assert core.error(b) == errno.ECONNREFUSED
    client = core.socket(lib.BYPASS_STREAM)
    assert core.connect(client, (ME, 9)) == -errno.EINPROGRESS
    loop.run(0.1)
    assert core.error(client) == errno.ECONNREFUSED


def test_without_the_flag_nothing_loops() -> None:
    made = Loop(lib.BYPASS_F_RST)
    with pytest.raises(OSError, match="Invalid argument"):
        made.core.addr_add(ME, 8)
    made.core.close()
