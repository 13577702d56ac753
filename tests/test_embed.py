# SPDX-License-Identifier: Apache-2.0
"""The C library as a stranger embeds it: one header, one shared library, the example program."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from c_programs import ROOT, stack_objects

LIBRARY = ROOT / "build" / "libbypass.so"
HEADER = ROOT / "bypass" / "include" / "bypass.h"


def exported() -> set[str]:
    out = subprocess.run(
        ["nm", "-D", "--defined-only", LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1] for line in out.splitlines()}


def test_the_library_exports_what_the_header_declares_and_nothing_else() -> None:
    declared = set(re.findall(r"^BYPASS_API [^(]*?(bypass_\w+)\(", HEADER.read_text(), re.MULTILINE))
    assert len(declared) > 40
    assert exported() == declared


def test_the_library_needs_nothing_but_the_c_library() -> None:
    out = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", out)
    assert set(needed) <= {"libc.so.6"}


def test_the_core_asks_the_system_for_nothing() -> None:
    """No system call, clock, allocation or exit is even linked."""
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True
    )
    names = {line.split()[-1].split("@")[0] for line in out.stdout.splitlines()}
    allowed = {
        "memcpy",
        "memmove",
        "memset",
        "memcmp",
        "strcmp",
        "strlen",
        "vsnprintf",
        "__stack_chk_fail",
        "__vsnprintf_chk",
    }
    weak = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert names <= allowed | weak


@pytest.mark.parametrize(
    "flags", [["-O2"], ["-O1", "-g", "-fsanitize=address,undefined"]], ids=["release", "sanitized"]
)
def test_the_example_program_builds_from_the_header_and_runs(tmp_path: Path, flags: list[str]) -> None:
    program = tmp_path / "embed"
    stack = ["-L", str(LIBRARY.parent), "-lbypass", f"-Wl,-rpath,{LIBRARY.parent}"]
    if flags != ["-O2"]:  # so that the stack itself is checked too
        stack = [str(ROOT / o) for o in stack_objects("san")]
    subprocess.run(
        [
            "gcc",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            *flags,
            "-I",
            str(HEADER.parent),
            str(ROOT / "examples" / "embed.c"),
            *stack,
            "-o",
            str(program),
        ],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, env={})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "server: accepted a connection",
        "server: got 12 bytes, sends them back",
        'client: got "hello, stack"',
    ]
