# SPDX-License-Identifier: Apache-2.0
"""TCP: initial sequence numbers (RFC 6528) and timestamps' offsets (RFC 7323 5.4): moving for those who own a
connection, unpredictable for everybody else."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from conversation import SECOND
from tcp_talk import Talk

TICK_NS = 64  # the clock of the ISN


def first(start_ns: int = SECOND, seed: int = 1, **flow: int | str) -> tuple[int, int]:
    """(ISN, first timestamp) of a passive open."""
    with Talk(iss=None, start_ns=start_ns, seed=seed, **flow) as t:  # type: ignore[arg-type]
        t.server()
        t.peer("S 0:0 <mss 1460, ts 1 0>")
        [syn_ack] = t.out()
        return syn_ack.opts["raw_seq"], syn_ack.opts["ts"][0]


def test_every_part_of_the_flows_name_changes_it() -> None:
    flows = [
        {},
        {"peer_port": 40001},
        {"our_port": 81},
        {"address": "192.0.2.3"},
        {"our_port": 40000, "peer_port": 80},  # swapped
    ]
    seen = {first(**flow)[0] for flow in flows}  # type: ignore[arg-type]
    assert len(seen) == len(flows)


def test_every_stack_has_its_own() -> None:
    assert len({first(seed=seed)[0] for seed in range(20)}) == 20


def test_it_moves_with_the_clock_for_one_flow() -> None:
    a, ts_a = first()
    for seconds in (1e-3, 1, 60, 100):
        b, ts_b = first(start_ns=SECOND + round(seconds * SECOND))
        assert (b - a) % 2**32 == round(seconds * SECOND) // TICK_NS
        assert (ts_b - ts_a) % 2**32 == round(seconds * 1000)


def test_neighbouring_flows_say_nothing_about_each_other() -> None:
    """The differences of consecutive ports spread over the whole space, as drawn at random."""
    values = [first(peer_port=p)[0] for p in range(1000, 1065)]
    steps = sorted((b - a) % 2**32 for a, b in pairwise(values))
    assert len(set(steps)) == len(steps)
    octants = [sum(1 for s in steps if s >> 29 == i) for i in range(8)]
    assert all(octants), octants
    bits = [sum(v >> i & 1 for v in values) for i in range(32)]
    assert all(10 < b < 55 for b in bits), bits


def test_timestamps_begin_elsewhere_for_every_flow() -> None:
    offsets = {first(peer_port=p)[1] for p in range(1000, 1020)}
    assert len(offsets) == 20
    assert max(offsets) - min(offsets) > 1 << 28


def test_an_active_open_uses_the_same_numbers_as_a_passive_one() -> None:
    """Both name the same flow: otherwise a later incarnation could begin behind an earlier one."""
    opened = partial(Talk, iss=None, start_ns=SECOND)
    with opened() as t:
        t.client()
        [syn] = t.out()
    assert (syn.opts["raw_seq"], syn.opts["ts"][0]) == first()
