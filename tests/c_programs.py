# SPDX-License-Identifier: Apache-2.0
"""Programs in C that tests build around the stack: with the sanitizers, or as released and under callgrind."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from conftest import missing

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "bypass/stack").glob("*.c"))
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror"]
INCLUDE = ["-Ibench", "-Ibypass/include", "-Ibypass/stack"]
VARIANTS = {
    "san": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "release": ["-O2"],
}
ENV = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "MAKEFLAGS", "MAKELEVEL", "SAN")}


def run(*command: str | Path) -> str:
    """What the command printed; AssertionError with the end of it when it failed."""
    argv = [str(c) for c in command]
    done = subprocess.run(
        argv, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout[-6000:]}"
    return done.stdout


@lru_cache
def stack_objects(variant: str) -> tuple[str, ...]:
    """The stack's objects of that build, made where they are not there."""
    objects = [f"build/{variant}/{s.relative_to(ROOT).with_suffix('.o')}" for s in SOURCES]
    run("make", "-s", *(["SAN=1"] if variant == "san" else []), *objects)
    return tuple(objects)


def program(name: str, folder: Path, variant: str = "san") -> Path:
    """tests/c/name.c with the whole stack."""
    out = folder / name
    objects = stack_objects(variant)
    run("gcc", *CFLAGS, *VARIANTS[variant], *INCLUDE, f"tests/c/{name}.c", *objects, "-o", out)
    return out


def instructions(program: Path, *args: str) -> tuple[int, str]:
    """What callgrind counts while the program asks for it, and what the program printed."""
    if not shutil.which("valgrind"):
        missing(["valgrind"])
    out = program.with_suffix("." + ".".join(args))
    printed = run(
        "valgrind",
        "-q",
        "--tool=callgrind",
        "--collect-atstart=no",
        f"--callgrind-out-file={out}",
        program,
        *args,
    )
    [summary] = [line for line in out.read_text().splitlines() if line.startswith("totals:")]
    return int(summary.split()[1]), printed
