# SPDX-License-Identifier: Apache-2.0
"""bypass_ack(): who has read all and waits for more does not let its peer wait for a delayed acknowledgment."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from test_app_loop import ME, Loop

DELAY_S = 0.02  # less than an acknowledgment is delayed


def pair(loop: Loop) -> tuple[int, int]:
    core = loop.core
    core.addr_add(ME, 8)
    listener = core.socket(lib.BYPASS_STREAM)
    core.bind(listener, (ME, 80))
    core.listen(listener, 8)
    client = core.socket(lib.BYPASS_STREAM)
    assert core.connect(client, (ME, 80)) == -errno.EINPROGRESS
    loop.run(0.1)
    server = core.accept(listener)
    core.close_socket(listener)
    return client, server


def test_small_writes_one_way_do_not_wait_for_the_delay() -> None:
    loop = Loop()
    core = loop.core
    client, server = pair(loop)
    for _ in range(20):
        assert core.send(client, b"x") == 1
        loop.run(0.001)
        assert core.recv(server, 10) == b"x"
        assert core.ack(server) == 1
        assert core.ack(server) == 0, "it has left"
        loop.run(0.001)
    core.close()


def test_without_it_the_second_waits() -> None:
    loop = Loop()
    core = loop.core
    client, server = pair(loop)
    core.send(client, b"x")
    loop.run(0.001)
    assert core.recv(server, 10) == b"x"
    core.send(client, b"y")
    loop.run(DELAY_S)
    assert core.recv(server, 10) == -errno.EAGAIN, "Nagle's algorithm holds it back"
    loop.run(1)
    assert core.recv(server, 10) == b"y"
    core.close()


def test_nothing_leaves_while_something_is_unread_or_nothing_is_owed() -> None:
    loop = Loop()
    core = loop.core
    client, server = pair(loop)
    assert core.ack(server) == 0
    core.send(client, b"xy")
    loop.run(0.001)
    assert core.ack(server) == 0
    assert core.recv(server, 1) == b"x"
    assert core.ack(server) == 0
    assert core.recv(server, 1) == b"y"
    assert core.ack(server) == 1
    udp = core.socket(lib.BYPASS_DGRAM)
    assert core.ack(udp) == 0
    core.close_socket(udp)
    with pytest.raises(OSError, match="Bad file descriptor"):
        core.ack(udp)
    core.close()
