# SPDX-License-Identifier: Apache-2.0
"""One ring between two cores: no descriptor is torn, lost or repeated, and each of its four barriers is needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from c_library import GCC, ROOT
from support import examples

BARRIERS = re.findall(
    r"__ATOMIC_(?:ACQUIRE|RELEASE)\); /\* ([A-D]) \*/", (ROOT / "bypass/afxdp/ring.h").read_text()
)


def stress(
    folder: Path, count: int, *flags: str, ring_h: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Compiles and runs tests/c/afxdp_ring_stress.c, with another ring.h if given."""
    source = ROOT / "tests/c/afxdp_ring_stress.c"
    include = folder / "afxdp"
    include.mkdir(exist_ok=True)
    (include / "ring.h").write_text(ring_h or (ROOT / "bypass/afxdp/ring.h").read_text())
    program = folder / "stress"
    subprocess.run(
        [*GCC, *flags, "-I", str(folder), str(source), "-lpthread", "-o", str(program)], check=True
    )
    return subprocess.run([program, str(count)], capture_output=True, text=True, env={})


def test_two_cores_share_a_ring_across_the_index_wrap(tmp_path: Path) -> None:
    result = stress(tmp_path, examples(2_000_000), "-O2")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{examples(2_000_000)}\n", "")


@pytest.fixture
def thread_sanitizer(tmp_path: Path) -> None:
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-fsanitize=thread", str(probe), "-o", str(tmp_path / "probe")], check=True)
    subprocess.run([tmp_path / "probe"], check=True, env={})  # no other sanitizer is preloaded


@pytest.mark.usefixtures("thread_sanitizer")
def test_the_thread_sanitizer_finds_no_race(tmp_path: Path) -> None:
    result = stress(tmp_path, 100_000, "-O1", "-fsanitize=thread")
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("thread_sanitizer")
@pytest.mark.parametrize("barrier", ["A", "B", "C", "D"])
def test_without_one_of_its_barriers_there_is_a_race(tmp_path: Path, barrier: str) -> None:
    assert sorted(BARRIERS) == ["A", "B", "C", "D"]
    text, n = re.subn(
        rf"__ATOMIC_(ACQUIRE|RELEASE)\); /\* {barrier} \*/",
        "__ATOMIC_RELAXED);",
        (ROOT / "bypass/afxdp/ring.h").read_text(),
    )
    assert n == 1
    result = stress(tmp_path, 100_000, "-O1", "-fsanitize=thread", ring_h=text)
    assert result.returncode != 0
    assert "data race" in result.stderr
