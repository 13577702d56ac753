# SPDX-License-Identifier: Apache-2.0
"""What segments behind a hole cost: instructions counted by callgrind, the same on every run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import missing

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("valgrind"):
        missing(["valgrind"])
    out = tmp_path_factory.mktemp("ooo") / "tcp_ooo_cost"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
    includes = ["-Ibench", "-Ibypass/include", "-Ibypass/stack"]
    sources = ["tests/c/tcp_ooo_cost.c", *sorted(map(str, (ROOT / "bypass/stack").glob("*.c")))]
    subprocess.run(["gcc", *flags, *includes, *sources, "-o", str(out)], cwd=ROOT, check=True)
    return out


def cost(program: Path, pattern: str, segments: int) -> float:
    """Instructions a segment, its ACK included."""
    out = program.with_suffix(f".{pattern}.{segments}")
    valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
    done = subprocess.run(
        [*valgrind, str(program), pattern, str(segments)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 0, "nothing was held"
    [summary] = [line for line in out.read_text().splitlines() if line.startswith("totals:")]
    return int(summary.split()[1]) / segments


@pytest.mark.parametrize("pattern", ["burst", "repair"])
def test_segments_behind_holes_cost_the_same_however_many_are_held(program: Path, pattern: str) -> None:
    few, many = cost(program, pattern, 1000), cost(program, pattern, 10_000)
    assert many <= 1.02 * few, f"{few:.0f} instructions a segment for 1,000 segments, {many:.0f} for 10,000"


@pytest.mark.parametrize("pattern", ["descending", "random"])
def test_a_hostile_order_costs_a_bounded_walk(program: Path, pattern: str) -> None:
    """Every second segment of 10,000 only: at most twice what a burst costs."""
    burst, hostile = cost(program, "burst", 10_000), cost(program, pattern, 10_000)
    assert hostile <= 2 * burst, (
        f"{burst:.0f} instructions a segment in a burst, {hostile:.0f} of a hostile sender"
    )
