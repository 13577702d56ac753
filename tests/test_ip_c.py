# SPDX-License-Identifier: Apache-2.0
"""The network half in C, under the address and undefined-behaviour sanitizers: checksums, queues, a rain of frames."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support import FUZZ

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "bypass/stack").glob("*.c"))
OBJECTS = [f"build/san/{s.relative_to(ROOT).with_suffix('.o')}" for s in SOURCES]
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
INCLUDE = ["-Ibypass/include", "-Ibypass/stack"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENV = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "MAKEFLAGS", "MAKELEVEL")}
RAINS = 12 * FUZZ


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def stack_objects() -> list[str]:
    """The stack's objects of the sanitizer build, made where they are not there."""
    run("make", "-s", "SAN=1", *OBJECTS)
    return OBJECTS


def program(name: str, objects: list[str], folder: Path) -> Path:
    out = folder / name
    run("gcc", *CFLAGS, *INCLUDE, *SANITIZE, f"tests/c/{name}.c", *objects, "-o", out)
    return out


def test_every_variant_of_the_checksum_agrees_with_the_rfc(stack_objects: list[str], tmp_path: Path) -> None:
    assert "checks" in run(program("test_csum", stack_objects, tmp_path))


def test_answers_leave_by_the_queue_of_the_question(stack_objects: list[str], tmp_path: Path) -> None:
    run(program("test_queues", stack_objects, tmp_path))


@pytest.fixture(scope="module")
def fuzz_net(stack_objects: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program("fuzz_net", stack_objects, tmp_path_factory.mktemp("c"))


@pytest.mark.hypothesis  # by its kind: `make fuzz` selects by this mark
@pytest.mark.timeout(60 * FUZZ)
def test_a_rain_of_frames_neither_crashes_nor_leaks(fuzz_net: Path) -> None:
    """A failure prints its seed: `fuzz_net SEED 2000` repeats it."""
    moved: set[str] = set()
    for seed in range(RAINS):
        for line in run(fuzz_net, str(seed), "2000").splitlines():
            name, value = line.split()
            if int(value):
                moved.add(name)
    network = ("eth_in", "arp_in", "ip_in", "ip_frag", "icmp_in", "udp_in")
    every = {
        n for n in (line.split()[0] for line in run(fuzz_net, "0", "1").splitlines()) if n.startswith(network)
    }
    assert every - moved == set(), "the rain does not reach these"
