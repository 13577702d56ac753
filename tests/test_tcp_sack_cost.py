# SPDX-License-Identifier: Apache-2.0
"""What ACKs of a peer that lies cost the sender: instructions counted by callgrind, the same on every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from c_programs import instructions, program

ACKS = 2000
MOST = 16_000  # instructions for an ACK with four blocks anywhere among 10,000 segments

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program("tcp_sack_cost", tmp_path_factory.mktemp("sack"), "release")


def cost(liar: Path, pattern: str, flight: int) -> tuple[float, dict[str, int]]:
    """Instructions for an ACK or a segment that was sent again, whichever it was; and what the stack counted."""
    spent, printed = instructions(liar, pattern, str(flight), str(ACKS))
    counted: dict[str, int] = json.loads(printed)
    return spent / (ACKS + counted.get("tcp_out_retransmits", 0)), counted


@pytest.mark.parametrize(
    ("pattern", "sign", "least"),
    [
        ("beyond", "tcp_sack_ignored", 4 * ACKS),
        ("random", "tcp_lost_retransmits", 100),
        ("edges", "tcp_dup_acks", ACKS),
        ("descend", "tcp_reordered", 1),
        ("whole", "tcp_fast_retransmits", 1),
        ("dsack", "tcp_in_dsacks", ACKS),
        ("undo", "tcp_undone_recoveries", 1),
        ("renege", "tcp_sack_reneged", 1),
    ],
)
def test_a_peer_that_lies_about_what_it_has_costs_bounded_work(
    liar: Path, pattern: str, sign: str, least: int
) -> None:
    """Ten times as much in flight may not cost three times as much for each ACK: no ACK walks what is out."""
    few, _ = cost(liar, pattern, 1000)
    many, counted = cost(liar, pattern, 10_000)
    assert counted[sign] >= least, "the pattern is what it is meant to be"
    assert many <= 3 * few, f"{few:.0f} instructions with 1,000 segments in flight, {many:.0f} with 10,000"
    assert many <= MOST


def test_an_honest_acknowledgment_costs_the_same_however_much_is_in_flight(liar: Path) -> None:
    few, _ = cost(liar, "honest", 1000)
    many, _ = cost(liar, "honest", 10_000)
    assert many <= 1.25 * few, f"{few:.0f} instructions with 1,000 segments in flight, {many:.0f} with 10,000"
