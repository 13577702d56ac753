# SPDX-License-Identifier: Apache-2.0
"""Programs in C that tests build around the stack: with the sanitizers, or as released and under callgrind. What lies
in build/ is made by one worker of pytest-xdist at a time."""

from __future__ import annotations

import fcntl
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
OF_THIS_RUN = ("LD_PRELOAD", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "SAN", "BYPASS_DEBUG")
ENV = {k: v for k, v in os.environ.items() if k not in OF_THIS_RUN}


def run(*command: str | Path) -> str:
    """What the command printed; AssertionError with the end of it when it failed."""
    argv = [str(c) for c in command]
    done = subprocess.run(
        argv, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout[-6000:]}"
    return done.stdout


def make(*args: str) -> str:
    """What make said. None of the other workers reads what is still being written: they wait, and find it made."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/.tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run("make", "--no-print-directory", *args)


@lru_cache
def stack_objects(variant: str) -> tuple[str, ...]:
    """The stack's objects of that build, made where they are not there."""
    objects = [f"build/{variant}/{s.relative_to(ROOT).with_suffix('.o')}" for s in SOURCES]
    make(*(["SAN=1"] if variant == "san" else []), *objects)
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
