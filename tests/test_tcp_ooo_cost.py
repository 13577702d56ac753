# SPDX-License-Identifier: Apache-2.0
"""What segments behind a hole cost: instructions counted by callgrind, the same on every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from c_programs import instructions, program


@pytest.fixture(scope="module")
def ooo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program("tcp_ooo_cost", tmp_path_factory.mktemp("ooo"), "release")


def cost(ooo: Path, pattern: str, segments: int) -> float:
    """Instructions a segment, its ACK included."""
    counted, printed = instructions(ooo, pattern, str(segments))
    assert int(printed) > 0, "nothing was held"
    return counted / segments


@pytest.mark.parametrize("pattern", ["burst", "repair"])
def test_segments_behind_holes_cost_the_same_however_many_are_held(ooo: Path, pattern: str) -> None:
    few, many = cost(ooo, pattern, 1000), cost(ooo, pattern, 10_000)
    assert many <= 1.02 * few, f"{few:.0f} instructions a segment for 1,000 segments, {many:.0f} for 10,000"


@pytest.mark.parametrize("pattern", ["descending", "random"])
def test_a_hostile_order_costs_a_bounded_walk(ooo: Path, pattern: str) -> None:
    """Every second segment of 10,000 only: at most twice what a burst costs."""
    burst, hostile = cost(ooo, "burst", 10_000), cost(ooo, pattern, 10_000)
    assert hostile <= 2 * burst, (
        f"{burst:.0f} instructions a segment in a burst, {hostile:.0f} of a hostile sender"
    )
