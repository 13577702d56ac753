# SPDX-License-Identifier: Apache-2.0
"""The timer wheel in C against a plain array of deadlines, under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from c_programs import program, run
from support import FUZZ

SEEDS = 20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program("tcp_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.timeout(60 * FUZZ)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_timer_is_looked_at_in_time_and_none_before(wheel: Path, seed: int) -> None:
    """A failure prints its seed and line: `tcp_wheel SEED STEPS` repeats it."""
    run(wheel, str(seed), str(4000 * FUZZ))
