# SPDX-License-Identifier: Apache-2.0
"""The classifier decides as the steering program does: same verdict, reason, rule, entry and hash for the same bytes.

The program runs in the kernel (BPF_PROG_TEST_RUN), the classifier here, on the same frames, derived from the rules and
then damaged (bypass.testing.flows), under the same policies. `make test-classifier` compares 100,000 frames; the suite
some of them. The program itself is compared with a model in test_steering_model.py.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from classify_support import Pair, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from model import VERDICTS
from steering_rules import draw_rules
from steering_support import Bench
from support import FUZZ, examples

pytestmark = pytest.mark.netns

FRAMES = int(os.environ.get("BYPASS_CLASSIFIER_FRAMES", "10000")) * FUZZ
FRAMES_PER_POLICY = 1000
SEED = int(os.environ.get("BYPASS_SEED", "50261"))
KINDS = ("all", "ip4", "steer", "all", "ranges")
HISTOGRAM = Path("build/classifier-histogram.json")
NEVER = {"steered_bare"}  # drivers without room for metadata: the classifier writes none


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as it:
        yield it


@pytest.mark.timeout(60 + FRAMES // 100)
def test_program_and_classifier_agree_on_frames_derived_from_rules(bench: Bench) -> None:
    histogram: Counter[str] = Counter()
    policies = 0
    while histogram.total() < FRAMES:
        seed = SEED + policies
        rng = random.Random(seed)
        with pair(bench, rng, draw_rules(rng, KINDS[policies % len(KINDS)])) as both:
            for _ in range(min(FRAMES_PER_POLICY, FRAMES - histogram.total())):
                verdict, reason, _ = both.check(rng, f"seed {seed}")
                assert verdict == VERDICTS[reason]
                histogram[reason] += 1
            both.check_counters()
        policies += 1
    total = histogram.total()
    verdicts: Counter[str] = Counter()
    for reason, n in histogram.items():
        verdicts[VERDICTS[reason]] += n
    told = {"seed": SEED, "policies": policies, "frames": total, "verdicts": verdicts, "reasons": histogram}
    HISTOGRAM.parent.mkdir(exist_ok=True)
    HISTOGRAM.write_text(json.dumps(told, indent=2) + "\n")
    print(f"\n{total} frames under {policies} policies: no difference; {dict(verdicts)}")
    for reason, verdict in VERDICTS.items():
        share = histogram[reason] / total
        print(f"  {reason:<14} {verdict:<9} {histogram[reason]:7} {share:6.1%} {'#' * round(share * 100)}")
    rare = [r for r in VERDICTS if histogram[r] < 0.002 * total and r not in NEVER]
    assert not rare, f"hardly any frames: {rare}; the generator is off"


@settings(max_examples=examples(150))
@given(rng=st.randoms(use_true_random=False))
def test_they_agree_and_a_difference_is_made_small(both: Pair, rng: random.Random) -> None:
    both.check(rng, "hypothesis")


@pytest.fixture(scope="module", params=["ip4", "all"])
def both(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Pair]:
    rng = random.Random(11)
    with pair(bench, rng, draw_rules(rng, request.param)) as it:
        yield it
