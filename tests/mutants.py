# SPDX-License-Identifier: Apache-2.0
"""Mutants of the stack: one line changed, built beside the right one. What the tests of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).resolve().parent.parent
STACK = ROOT / "bypass/stack"
OUT = ROOT / "build/release"
ENV = {
    k: v
    for k, v in os.environ.items()
    if k not in ("LD_PRELOAD", "MAKEFLAGS", "MAKELEVEL", "SAN", "BYPASS_DEBUG")
}


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
    done = run("make", "-s", "build")
    assert done.returncode == 0, done.stderr
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


@contextmanager
def all_at_once(
    request: pytest.FixtureRequest,
    factory: pytest.TempPathFactory,
    mutants: Mapping[str, Mutant],
    play: Callable[[Mutant, Path], CompletedProcess[str]],
) -> Iterator[Callable[[str], CompletedProcess[str]]]:
    """What came of each mutant, by name. Those that this run tests are built and played beside the tests that wait for
    them, one on each core."""
    wanted = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    ]
    folder = factory.mktemp("mutants")
    objects()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        jobs = {n: pool.submit(play, mutants[n], folder / str(i)) for i, n in enumerate(wanted)}
        yield lambda name: jobs[name].result()
    finally:
        pool.shutdown(cancel_futures=True)


def by_its_test(m: Mutant, folder: Path) -> CompletedProcess[str]:
    """Runs the test that a mutant names, `topic::test` for tests/test_tcp_topic.py, with the mutant."""
    folder.mkdir()
    build(m, folder)
    topic, _, test = m.test.partition("::")
    quick = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    where = f"tests/test_tcp_{topic}.py::{test}"
    return run(sys.executable, "-m", "pytest", "-x", "-q", *quick, where, BYPASS_BUILD=str(folder))


def assert_noticed(done: CompletedProcess[str]) -> None:
    assert done.returncode == 1, f"nothing was noticed:\n{done.stdout}{done.stderr}"
    assert "FAILED" in done.stdout, done.stdout
