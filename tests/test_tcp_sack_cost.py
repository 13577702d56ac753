# SPDX-License-Identifier: Apache-2.0
"""What ACKs of a peer that lies cost the sender: instructions counted by callgrind, the same on every run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import missing

ROOT = Path(__file__).resolve().parent.parent
ACKS = 2000
MOST = 16_000  # instructions for an ACK with four blocks anywhere among 10,000 segments

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("valgrind"):
        missing(["valgrind"])
    out = tmp_path_factory.mktemp("sack") / "tcp_sack_cost"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
    includes = ["-Ibench", "-Ibypass/include", "-Ibypass/stack"]
    sources = ["tests/c/tcp_sack_cost.c", *sorted(map(str, (ROOT / "bypass/stack").glob("*.c")))]
    subprocess.run(["gcc", *flags, *includes, *sources, "-o", str(out)], cwd=ROOT, check=True)
    return out


def cost(program: Path, pattern: str, flight: int) -> tuple[float, dict[str, int]]:
    """Instructions for an ACK or a segment that was sent again, whichever it was; and what the stack counted."""
    out = program.with_suffix(f".{pattern}.{flight}")
    valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
    done = subprocess.run(
        [*valgrind, str(program), pattern, str(flight), str(ACKS)], capture_output=True, text=True, check=True
    )
    counted: dict[str, int] = json.loads(done.stdout)
    [summary] = [line for line in out.read_text().splitlines() if line.startswith("totals:")]
    return int(summary.split()[1]) / (ACKS + counted.get("tcp_out_retransmits", 0)), counted


@pytest.mark.parametrize(
    ("pattern", "sign", "least"),
    [
        ("beyond", "tcp_sack_ignored", 4 * ACKS),
        ("random", "tcp_lost_retransmits", 100),
        ("edges", "tcp_dup_acks", ACKS),
        ("descend", "tcp_reordered", 1),
        ("whole", "tcp_fast_retransmits", 1),
        ("dsack", "tcp_in_dsacks", ACKS),
        ("undo", "tcp_undone_recoveries", 1),
        ("renege", "tcp_sack_reneged", 1),
    ],
)
def test_a_peer_that_lies_about_what_it_has_costs_bounded_work(
    program: Path, pattern: str, sign: str, least: int
) -> None:
    """Ten times as much in flight may not cost three times as much for each ACK: no ACK walks what is out."""
    few, _ = cost(program, pattern, 1000)
    many, counted = cost(program, pattern, 10_000)
    assert counted[sign] >= least, "the pattern is what it is meant to be"
    assert many <= 3 * few, f"{few:.0f} instructions with 1,000 segments in flight, {many:.0f} with 10,000"
    assert many <= MOST


def test_an_honest_acknowledgment_costs_the_same_however_much_is_in_flight(program: Path) -> None:
    few, _ = cost(program, "honest", 1000)
    many, _ = cost(program, "honest", 10_000)
    assert many <= 1.25 * few, f"{few:.0f} instructions with 1,000 segments in flight, {many:.0f} with 10,000"
