# SPDX-License-Identifier: Apache-2.0
"""What the classifier costs a packet: instructions counted by callgrind, the same on every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from c_programs import CFLAGS, ROOT, instructions, run

PACKETS = 3200
MOST = 650  # instructions for a TCP segment of a live entry


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cost") / "classify_cost"
    sources = sorted((ROOT / "bypass/dpdk_backend").glob("classify*.c"))
    run("gcc", *CFLAGS, "-O3", "-Ibypass", "tests/c/classify_cost.c", *sources, "-o", out)
    return out


def cost(program: Path, rules: int, call: str) -> float:
    return instructions(program, str(rules), "hot", call, str(PACKETS))[0] / PACKETS


def test_a_packet_costs_the_same_however_many_rules_there_are(classify: Path) -> None:
    """With 4,000 rules a burst asks for its places ahead."""
    one = cost(classify, 1, "single")
    assert one <= MOST
    assert cost(classify, 1000, "single") == pytest.approx(one, rel=0.02)
    assert cost(classify, 4000, "burst") <= 1.1 * one
