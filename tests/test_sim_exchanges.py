# SPDX-License-Identifier: Apache-2.0
"""TCP over wires that lose, repeat, reorder, corrupt and delay: bytes received are bytes sent, and nothing is left.

hypothesis draws the conditions and what is said (bypass.testing). A failure carries both, made small, and a pcapng
file of the last frames.
"""

from __future__ import annotations

import random

import pytest
from exchange import PCAP_FOLDER, Conditions, conditions, exchange_in, talk_of
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support import FUZZ, examples

from bypass.core import Config
from bypass.sim import Faults, Network
from bypass.testing import Exchange, exchanges, fates, play
from bypass.testing.streams import assert_clean


@pytest.mark.timeout(300 * FUZZ)
@given(conditions(), exchanges())
@settings(max_examples=examples(3000))
def test_random_exchanges(c: Conditions, talk: Exchange) -> None:
    net = exchange_in(c, talk)
    event(f"{10 ** len(str(net.now_ns() // 10**9))} s of virtual time")


@pytest.mark.timeout(300 * FUZZ)
@given(conditions(most=0.15), exchanges(most_bytes=200_000))
@settings(max_examples=examples(600))
def test_exchanges_over_wires_that_lose_a_third(c: Conditions, talk: Exchange) -> None:
    exchange_in(c, talk)


@given(
    up=fates(),
    down=fates(),
    sizes=st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)),
    delay=st.sampled_from([0, 10**6]),
)
@settings(max_examples=examples(300))
def test_whatever_happens_to_the_first_frames(
    up: list[int], down: list[int], sizes: tuple[int, int], delay: int
) -> None:
    """hypothesis chooses the fate of every single frame, and finds the shortest story that fails."""
    with Network(1) as net, net.explain_failure(PCAP_FOLDER / "fates.pcapng"):
        net.wire(faults=Faults(delay_ns=delay))
        config = Config(conns=4)
        a, b = net.stack("10.0.0.1/24", config=config), net.stack("10.0.0.2/24", config=config)
        assert a.port is not None
        assert b.port is not None
        a.port.script(up)
        b.port.script(down)
        play(net, a, b, talk_of(sizes))
        assert_clean(net, a, b)


def test_twenty_megabytes_over_two_percent_loss() -> None:
    with Network(2) as net, net.explain_failure(PCAP_FOLDER / "two-percent.pcapng"):
        net.wire(faults=Faults(loss=0.02, delay_ns=100_000))
        a, b = net.stack("10.0.0.1/24", name="a"), net.stack("10.0.0.2/24", name="b")
        play(net, a, b, Exchange(random.Random(2).randbytes(20_000_000), b""))
        assert_clean(net, a, b)
        assert a.port is not None
        assert a.port.stats().lost > 100


def test_many_connections_at_once_share_a_bad_wire() -> None:
    rng = random.Random(3)
    n = 200
    with Network(3) as net, net.explain_failure(PCAP_FOLDER / "many.pcapng"):
        net.wire(faults=Faults(loss=0.02, duplicate=0.02, corrupt=0.02, reorder=0.02, delay_ns=1_000_000))
        config = Config(conns=2 * n + 8)
        a, b = net.stack("10.0.0.1/24", config=config), net.stack("10.0.0.2/24", config=config)
        bodies = [rng.randbytes(rng.randrange(1, 5000)) for _ in range(n)]
        with b.create_server(("10.0.0.2", 80), backlog=n) as server:
            clients = [a.socket() for _ in range(n)]
            for client in clients:
                client.setblocking(False)
                assert client.connect_ex(("10.0.0.2", 80)) != 0
            pairs = []
            for client in clients:
                client.setblocking(True)
            for _ in range(n):
                pairs.append(server.accept())
            by_peer = {peer: sock for sock, peer in pairs}
            for client, body in zip(clients, bodies, strict=True):
                client.sendall(body)
            for client, body in zip(clients, bodies, strict=True):
                other = by_peer[client.getsockname()]
                received = bytearray()
                while len(received) < len(body):
                    received += other.recv(4096)
                assert received == body
                other.close()
                client.close()
        assert_clean(net, a, b)
