# SPDX-License-Identifier: Apache-2.0
"""The timer wheel in C against a plain array of deadlines, under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support import FUZZ

ROOT = Path(__file__).resolve().parent.parent
ENV = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
SEEDS = 20


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel") / "tcp_wheel"
    flags = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Ibypass/include", "-Ibypass/stack"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run("gcc", *flags, *sanitize, "tests/c/tcp_wheel.c", "bypass/stack/wheel.c", "-o", out)
    return out


@pytest.mark.timeout(60 * FUZZ)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_timer_is_looked_at_in_time_and_none_before(wheel: Path, seed: int) -> None:
    """A failure prints its seed and line: `tcp_wheel SEED STEPS` repeats it."""
    run(wheel, str(seed), str(4000 * FUZZ))
