# SPDX-License-Identifier: Apache-2.0
"""SO_LINGER with seconds (socket(7), RFC 1122 4.2.2.20 (c)): close() waits for the peer's acknowledgment, no longer."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from bypass.sim import Faults, Network
from bypass.sockets import Socket

DELAY = Faults(delay_ns=50_000_000)  # a round trip of 0.1 s


class Pair:
    def __init__(self) -> None:
        self.net = Network(seed=1)
        self.net.wire(faults=DELAY)
        server, client = self.net.stack("10.0.0.2"), self.net.stack("10.0.0.1")
        with server.create_server(("10.0.0.2", 80)) as listener:
            self.a = client.create_connection(("10.0.0.2", 80))
            self.b, _ = listener.accept()
        client.run(timeout=1)  # the handshake is over

    def closing(self, sock: Socket, seconds: int) -> float:
        """How long close() takes, with so many seconds to linger."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", seconds >= 0, max(seconds, 0)))
        began = self.net.now_ns()
        sock.close()
        return (self.net.now_ns() - began) / 1e9


@pytest.fixture
def pair() -> Iterator[Pair]:
    it = Pair()
    yield it
    it.a.close()
    it.b.close()
    it.net.close()


def test_close_waits_until_the_peer_has_everything(pair: Pair) -> None:
    pair.a.sendall(bytes(5000))
    assert 0.1 <= pair.closing(pair.a, 5) < 0.2
    assert pair.b.recv(10_000, socket.MSG_WAITALL) == bytes(5000)


def test_close_waits_for_the_fin_when_nothing_else_is_under_way(pair: Pair) -> None:
    assert 0.1 <= pair.closing(pair.a, 5) < 0.2


def test_close_does_not_wait_longer_than_it_was_told(pair: Pair) -> None:
    port = pair.a.stack.port
    assert port is not None
    port.set_faults(Faults(loss=1.0))
    pair.a.sendall(b"into the void")
    assert pair.closing(pair.a, 3) == pytest.approx(3, abs=0.01)
    port.set_faults(DELAY)
    assert pair.b.recv(100) == b"into the void"  # it goes on behind the program's back


def test_close_does_not_wait_without_linger_nor_with_unread_data(pair: Pair) -> None:
    pair.b.sendall(b"unread")
    pair.a.stack.run(timeout=1)
    assert pair.closing(pair.a, 5) == 0
    with pytest.raises(ConnectionResetError):
        pair.b.recv(1)
    assert pair.closing(pair.b, -1) == 0


def test_zero_seconds_reset_at_once(pair: Pair) -> None:
    pair.a.sendall(bytes(5000))
    assert pair.closing(pair.a, 0) == 0
    assert pair.b.recv(10_000) == bytes(3 * 1448)  # what was on its way; Nagle held the rest
    with pytest.raises(ConnectionResetError):
        pair.b.recv(1)
