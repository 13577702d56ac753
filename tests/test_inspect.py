# SPDX-License-Identifier: Apache-2.0
"""An application's memory read from outside (bypass/app/inspect.c): all of a good one, and damage without a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from bypass._core import ffi, lib
from c_programs import CFLAGS, ROOT, VARIANTS, make, run
from support import FUZZ

ROUNDS = 10_000 * FUZZ
SOURCES = [
    *(ROOT / "bypass/stack").glob("*.c"),
    *(ROOT / f"bypass/app/{name}.c" for name in ("app", "loop", "inspect")),
    ROOT / "bypass/preload/group.c",
]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/c/inspect_damaged.c with the sanitizers."""
    out = tmp_path_factory.mktemp("inspect") / "inspect_damaged"
    objects = [f"build/san/{s.relative_to(ROOT).with_suffix('.o')}" for s in SOURCES]
    make("SAN=1", *objects)
    include = ("-Ibypass", "-Ibypass/include")
    run("gcc", *CFLAGS, *VARIANTS["san"], *include, "tests/c/inspect_damaged.c", *objects, "-o", out)
    return out


@pytest.mark.parametrize("seed", range(1, 5))
def test_all_is_told_and_damage_is_survived(program: Path, seed: int) -> None:
    summary, sockets, socket, connections, rows = map(int, run(program, str(seed), str(ROUNDS)).split())
    assert min(summary, sockets, connections) > ROUNDS // 20, "damage was found"
    assert socket > ROUNDS // 100, "... in single sockets too"
    assert rows > 5 * ROUNDS, "and much was read all the same"


def test_every_reason_has_a_text() -> None:
    texts = []
    for i in range(256):
        if (text := lib.app_reason(i)) != ffi.NULL:
            texts.append(ffi.string(text).decode())
    assert len(texts) >= 14
    assert texts[0] == ""
    assert all(texts[1:])
    assert len(set(texts)) == len(texts)
    assert lib.app_reason(-1) == lib.app_reason(len(texts)) == ffi.NULL
