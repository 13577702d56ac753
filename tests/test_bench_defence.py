# SPDX-License-Identifier: Apache-2.0
"""What a flood of SYNs may cost those who are connected, and what connections that come and go leave behind; small runs
of `python -m bench.defence`."""

from __future__ import annotations

import pytest
from conftest import missing

from bench import defence, instructions

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("bench_programs")]


def test_a_flood_of_syns_does_not_make_requests_dearer_nor_keep_new_clients_out() -> None:
    if instructions.missing():
        missing([instructions.missing()])
    found = defence.flood(400, 40)
    assert found["syns"] == 400 * defence.SYNS
    assert found["ratio"] <= defence.FLOOD_BUDGET
    assert found["syn"] <= 2500, "what a forged SYN costs: it is hashed, tagged and answered"
    assert found["newcomers"] == 40
    assert found["cookies"] >= 30_000, "the queue of half-open connections was full"
    assert len(set(found["resident"])) == 1, "no page came to life"


def test_connections_that_come_and_go_leave_no_memory_behind() -> None:
    found = defence.churn(60_000)
    assert found["conns"] == 60_000
    assert found["taken_over"] >= 30_000, "there are 28,232 ports: TIME_WAIT was reused"
    memory = found["memory"]
    assert [m["conns"] for m in memory] == [6_000, 30_000, 60_000]
    assert len({m["server"] for m in memory}) == 1
    assert memory[2]["client"] < 40_000 * 512, "TIME_WAIT of each port, and no more"
    assert all(m["open"] <= 1 and m["chunks"] == 0 for m in memory)
