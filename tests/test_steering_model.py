# SPDX-License-Identifier: Apache-2.0
"""The steering program decides as its model does: the same verdict, reason, rule and entry for the same bytes.

The program runs in the kernel on packets that never were on a wire (BPF_PROG_TEST_RUN); the model (model.py) is
plain Python over the rules themselves. Policies: steering_rules.py; packets: bypass.testing.flows.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import VERDICTS
from steering_rules import draw_rules
from steering_support import Bench, Case
from support import FUZZ, examples

from bypass.steering import REASONS

pytestmark = pytest.mark.netns

POLICIES = 36 * FUZZ
PACKETS_PER_POLICY = 700
SEED = int(os.environ.get("BYPASS_SEED", "20261"))
KINDS = ("steer", "ip4", "all", "steer-bare", "all", "ip4", "all", "ip4-bare", "ranges")
HISTOGRAM = Path("build/steering-histogram.json")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as it:
        yield it


def test_the_reasons_of_the_model_are_those_of_the_program() -> None:
    assert {r.name: r.verdict.lower() for r in REASONS} == VERDICTS
    assert [r.name for r in REASONS] == list(VERDICTS)


@pytest.mark.timeout(600 * FUZZ)
def test_program_and_model_agree_on_packets_derived_from_rules(bench: Bench) -> None:
    histogram: Counter[str] = Counter()
    for number in range(POLICIES):
        seed = SEED + number
        rng = random.Random(seed)
        kind, _, bare = KINDS[number % len(KINDS)].partition("-")
        with bench.case(rng, draw_rules(rng, kind), bare=bool(bare)) as case:
            for _ in range(PACKETS_PER_POLICY if kind != "ranges" else PACKETS_PER_POLICY // 3):
                histogram[case.check(rng, seed)] += 1
            case.check_counters()
    total = histogram.total()
    verdicts = Counter(
        {v: sum(n for r, n in histogram.items() if VERDICTS[r] == v) for v in set(VERDICTS.values())}
    )
    shares = {
        "seed": SEED,
        "policies": POLICIES,
        "packets": total,
        "verdicts": {v: n / total for v, n in sorted(verdicts.items())},
        "reasons": {r: histogram[r] / total for r in VERDICTS},
    }
    HISTOGRAM.parent.mkdir(exist_ok=True)
    HISTOGRAM.write_text(json.dumps(shares, indent=2) + "\n")
    print(f"\n{total} packets of {POLICIES} policies, all as the model says")
    for reason, share in shares["reasons"].items():  # type: ignore[attr-defined]
        print(f"  {reason:<14} {VERDICTS[reason]:<9} {share:6.1%} {'#' * round(share * 100)}")
    assert total >= 20_000
    rare = [r for r in VERDICTS if histogram[r] < 0.02 * total]
    assert not rare, f"less than 2 % of the packets: {rare}; the generator is off"


@settings(max_examples=examples(300))
@given(rng=st.randoms(use_true_random=False))
def test_program_and_model_agree_and_a_difference_is_made_small(case: Case, rng: random.Random) -> None:
    case.check(rng, 0)


@pytest.fixture(scope="module", params=["steer", "ip4", "all", "ranges"])
def case(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Case]:
    rng = random.Random(7)
    with bench.case(rng, draw_rules(rng, request.param)) as it:
        yield it
