# SPDX-License-Identifier: Apache-2.0
"""Live entries of several owners: none takes a packet that is another's, by whatever entry is more specific."""

from __future__ import annotations

import errno
from itertools import count, product
from typing import Any

import pytest

from bypass.grants import ANY, WHOLE_BLOCK, Key, LiveEntries
from bypass.stack_api import DGRAM, STREAM
from bypass.steering import BLOCK

A, B, PEER, OTHER = "192.0.2.10", "192.0.2.11", ("192.0.2.20", 5000), ("192.0.2.20", 5001)
FIRST = 200 * BLOCK
PORTS = (FIRST, FIRST + 1, FIRST + BLOCK)
SINGLE: list[Key] = [
    (STREAM, (host, port), remote) for host, port, remote in product((ANY, A, B), PORTS, (None, PEER))
]
BLOCKS: list[Key] = [(STREAM, (host, FIRST + i * BLOCK), WHOLE_BLOCK) for host in (A, B) for i in (0, 1)]


class Steering:
    """Counts entries."""

    def __init__(self) -> None:
        self.number, self.there = count(1), set[int]()

    def add_endpoint(self, *args: object, **more: object) -> int:
        entry = next(self.number)
        self.there.add(entry)
        return entry

    def remove_endpoint(self, entry: int) -> None:
        self.there.remove(entry)


class Kernel:
    def tcp_connections(self, port: int) -> int:
        return 0


@pytest.fixture
def entries() -> Any:
    steering: Any = Steering()
    kernel: Any = Kernel()
    return LiveEntries(steering, kernel)


def packets(key: Key) -> set[tuple[str, int, object]]:
    """Those of a small world that an entry is for."""
    _, (host, port), remote = key
    hosts = (A, B) if host == ANY else (host,)
    ports = [p for p in PORTS if port <= p < port + BLOCK] if remote == WHOLE_BLOCK else [port]
    peers = [PEER, OTHER] if remote in (None, WHOLE_BLOCK) else [remote]
    return set(product(hosts, ports, peers))


def refused(entries: LiveEntries, key: Key, owner: int) -> bool:
    try:
        entries.use(key, owner)
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise
        return True
    return False


@pytest.mark.parametrize("held", [*SINGLE, *BLOCKS])
def test_what_would_take_a_packet_of_another_owner_is_refused(entries: LiveEntries, held: Key) -> None:
    entries.use(held, 1)
    for key in [*SINGLE, *BLOCKS]:
        common = bool(packets(held) & packets(key))
        if key[2] == WHOLE_BLOCK and held[2] != WHOLE_BLOCK:
            common = False  # the entry that is there goes before the block
        assert refused(entries, key, 2) == common, key
        if not common:
            assert entries.unuse(key)
            entries.remove(key)


def test_ones_own_may_overlap_and_what_is_gone_hinders_nobody(entries: LiveEntries) -> None:
    for key in [*SINGLE, *BLOCKS]:
        entries.use(key, 1)
        entries.use(key, 1)
    assert refused(entries, SINGLE[0], 2)
    assert not refused(entries, (DGRAM, *SINGLE[0][1:]), 2), "another protocol"
    entries.clear()
    entries.use(SINGLE[0], 2)
    assert refused(entries, SINGLE[1], 1)
    entries.clear()
    assert entries.steering.there == set()  # type: ignore[attr-defined]
