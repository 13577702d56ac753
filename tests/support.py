# SPDX-License-Identifier: Apache-2.0
"""Small things that tests import: the budget of randomised tests, and what a child of theirs can be interrupted by."""

from __future__ import annotations

import os

FUZZ = int(os.environ.get("BYPASS_FUZZ", "1"))
"""How many times the usual number of examples is asked for (`make fuzz` sets it)."""


WAIT_S = 60
"""How long a test waits for what takes milliseconds: it may take seconds where all cores are busy."""

INTERRUPTIBLE = ("env", "--default-signal=INT")
"""In front of a command that a test ends as by Ctrl-C: a shell that runs the tests in the background lets them, and so
their children, ignore the signal."""


def examples(n: int) -> int:
    """The number of examples for `hypothesis.settings(max_examples=...)`: n, or more when fuzzing."""
    return n * FUZZ
