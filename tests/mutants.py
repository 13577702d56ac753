# SPDX-License-Identifier: Apache-2.0
"""Mutants of the stack: one line changed, built beside the right one. What the tests of tests share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from subprocess import CompletedProcess

from c_programs import ENV, ROOT, make

STACK = ROOT / "bypass/stack"
OUT = ROOT / "build/release"


@dataclass(frozen=True)
class Mutant:
    """One line of a file, what a careless hand made of it, and the test or script that notices."""

    file: str
    right: str
    wrong: str
    test: str


def run(*command: str | Path, **env: str) -> CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=ENV | env, capture_output=True, text=True)


@lru_cache
def objects() -> list[Path]:
    """The extension's, freshly built; what was compiled of sources that are gone is not among them."""
    make("build")
    names = (OUT / "_core.objects").read_text().split()
    return [ROOT / name for name in names]


def build(m: Mutant, folder: Path) -> None:
    """Makes folder/_core.so, the Python extension with the mutant in it: for BYPASS_BUILD."""
    text = (STACK / m.file).read_text()
    assert text.count(m.right) == 1, f"{m.file}: the line is there {text.count(m.right)} times"
    source = folder / m.file
    source.write_text(text.replace(m.right, m.wrong))
    mutated = folder / source.with_suffix(".o").name
    flags = ["-std=c11", "-fPIC", "-fvisibility=hidden", "-O0", "-w", "-Ibypass/include", "-Ibypass/stack"]
    done = run("gcc", *flags, "-c", source, "-o", mutated)
    assert done.returncode == 0, done.stderr
    rest = [o for o in objects() if o != OUT / "bypass/stack" / mutated.name]
    assert len(rest) == len(objects()) - 1
    done = run("gcc", "-shared", *rest, mutated, "-o", folder / "_core.so")
    assert done.returncode == 0, done.stderr


def by_its_test(m: Mutant, folder: Path) -> CompletedProcess[str]:
    """Runs the test that a mutant names, `topic::test` for tests/test_tcp_topic.py, with the mutant built in folder."""
    build(m, folder)
    topic, _, test = m.test.partition("::")
    quick = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    where = f"tests/test_tcp_{topic}.py::{test}"
    return run(sys.executable, "-m", "pytest", "-x", "-q", *quick, where, BYPASS_BUILD=str(folder))


def assert_noticed(done: CompletedProcess[str]) -> None:
    assert done.returncode == 1, f"nothing was noticed:\n{done.stdout}{done.stderr}"
    assert "FAILED" in done.stdout, done.stdout
