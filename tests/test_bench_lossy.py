# SPDX-License-Identifier: Apache-2.0
"""A file each way through random loss, beside Linux; a small run of `python -m bench.lossy`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import lossy

ROOT = Path(__file__).resolve().parent.parent
SIZE = 10_000_000

pytestmark = [pytest.mark.bench, pytest.mark.netns, pytest.mark.timeout(300)]


def run(*options: str, output: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "bench.lossy", "--output", str(output), *options]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_what_arrives_through_loss_is_what_was_sent_and_the_figures_say_what_was_lost(tmp_path: Path) -> None:
    output = tmp_path / "lossy.json"
    done = run("--bytes", str(SIZE), "--loss", "0.02", output=output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["bytes"] == SIZE
    for way, about in found["ways"].items():
        assert set(about["runs"]) == set(lossy.SERVERS)
        data = "to_server" if way == "up" else "to_client"
        for results in about["runs"].values():
            [result] = results
            dropped, seen = result["lost"][data]
            assert seen >= SIZE / 1500, "the program that loses packets saw each of them"
            assert 0.01 < dropped / seen < 0.03
            # each lost segment was sent again, and few besides
            assert 0.9 * dropped - 5 <= result["retransmits"] <= 1.5 * dropped + 20


def test_a_share_that_is_none_is_an_error_of_the_command_line(tmp_path: Path) -> None:
    done = run("--loss", "2", output=tmp_path / "lossy.json")
    assert done.returncode == 2
    assert "--loss" in done.stderr
