# SPDX-License-Identifier: Apache-2.0
"""TCP over wires that lose, repeat, reorder, corrupt and delay: bytes received are bytes sent, and nothing is left.

Each exchange follows from its seed: `random_exchange(seed)` in exchange.py repeats it alone. A failure carries the
seed and a pcapng file of the last frames.
"""

from __future__ import annotations

import random

import pytest
from exchange import PCAP_FOLDER, check_clean, exchange, random_exchange
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FUZZ, examples

from bypass.core import Config
from bypass.sim import Fate, Faults, Network

BATCH = 100
FATES = st.lists(
    st.sampled_from([Fate.PASS] * 4 + [Fate.LOSE, Fate.DUPLICATE, Fate.CORRUPT, Fate.REORDER]), max_size=60
)


@pytest.mark.parametrize("batch", range(20 * FUZZ))
def test_2000_random_exchanges(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        random_exchange(seed)


@pytest.mark.parametrize("batch", range(4 * FUZZ))
def test_exchanges_over_wires_that_lose_a_third(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        random_exchange(seed, most_bytes=200_000, harsh=True)


@given(
    up=FATES,
    down=FATES,
    sizes=st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)),
    delay=st.sampled_from([0, 10**6]),
)
@settings(max_examples=examples(300))
def test_whatever_happens_to_the_first_frames(
    up: list[int], down: list[int], sizes: tuple[int, int], delay: int
) -> None:
    """hypothesis chooses the fate of every single frame, and finds the shortest story that fails."""
    rng = random.Random(0)
    with Network(1) as net, net.explain_failure(PCAP_FOLDER / "fates.pcapng"):
        net.wire(faults=Faults(delay_ns=delay))
        config = Config(conns=4)
        a, b = net.stack("10.0.0.1/24", config=config), net.stack("10.0.0.2/24", config=config)
        assert a.port is not None
        assert b.port is not None
        a.port.script(up)
        b.port.script(down)
        exchange(net, a, b, rng.randbytes(sizes[0]), rng.randbytes(sizes[1]), rng)
        check_clean(net, a, b)


def test_twenty_megabytes_over_two_percent_loss() -> None:
    rng = random.Random(2)
    with Network(2) as net, net.explain_failure(PCAP_FOLDER / "two-percent.pcapng"):
        net.wire(faults=Faults(loss=0.02, delay_ns=100_000))
        a, b = net.stack("10.0.0.1/24", name="a"), net.stack("10.0.0.2/24", name="b")
        exchange(net, a, b, rng.randbytes(20_000_000), b"", rng)
        check_clean(net, a, b)
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
        check_clean(net, a, b)
