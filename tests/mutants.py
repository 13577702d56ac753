# SPDX-License-Identifier: Apache-2.0
"""Mutants of the stack: one line changed, built beside the right one. What the tests of tests share."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=ENV | env, capture_output=True, text=True)


@lru_cache
def objects() -> list[Path]:
    """The right stack's, freshly built; what was compiled of sources that are gone is not among them."""
    done = run("make", "-s", "build")
    assert done.returncode == 0, done.stderr
    there = [p for p in OUT.rglob("*.o") if (ROOT / p.relative_to(OUT)).with_suffix(".c").exists()]
    return [*there, OUT / "_core.o"]


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
