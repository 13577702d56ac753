# SPDX-License-Identifier: Apache-2.0
"""Mutants of the stack: one line changed, built beside the right one. What the tests of tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

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


def run(*command: str | Path) -> CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=ENV, capture_output=True, text=True)


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


class Runs:
    """Runs on mutants in children of one process (mutant_child.py): what they import is imported once."""

    def __init__(self) -> None:
        self._process: Popen[str] | None = None

    def close(self) -> None:
        if self._process is not None:
            with self._process:  # closes its pipes, and waits
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process = None

    def __call__(self, folder: Path, *args: str | Path) -> CompletedProcess[str]:
        """What pytest, or oracle where that is the first of args, said and returned, with folder/_core.so in place."""
        if self._process is None:
            self._process = Popen(
                [sys.executable, "tests/mutant_child.py"],
                cwd=ROOT, env=ENV, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        said = folder / "said"
        argv = [str(a) for a in args]
        try:
            self._process.stdin.write(json.dumps([str(folder), str(said), argv]) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
        except BaseException:  # it hangs (the test's time is over) or is gone: the next mutant has another
            self.close()
            raise
        return CompletedProcess(argv, code, said.read_text(errors="replace"), "")


def by_its_test(m: Mutant, folder: Path, runs: Runs) -> CompletedProcess[str]:
    """Runs the test that a mutant names, `topic::test` for tests/test_tcp_topic.py, with the mutant built in folder."""
    build(m, folder)
    topic, _, test = m.test.partition("::")
    quick = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return runs(folder, "-x", "-q", *quick, f"tests/test_tcp_{topic}.py::{test}")


def assert_noticed(done: CompletedProcess[str]) -> None:
    assert done.returncode == 1, f"nothing was noticed:\n{done.stdout}{done.stderr}"
    assert "FAILED" in done.stdout, done.stdout
