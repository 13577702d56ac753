# SPDX-License-Identifier: Apache-2.0
"""Small things that tests import: the budget of randomised tests."""

from __future__ import annotations

import os

FUZZ = int(os.environ.get("BYPASS_FUZZ", "1"))
"""How many times the usual number of examples is asked for (`make fuzz` sets it)."""


def examples(n: int) -> int:
    """The number of examples for `hypothesis.settings(max_examples=...)`: n, or more when fuzzing."""
    return n * FUZZ
