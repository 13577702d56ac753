# SPDX-License-Identifier: Apache-2.0
"""The libFuzzer harnesses (tests/c/fuzz_*.c) without libFuzzer: they pass over the committed corpus, under gcc's
sanitizers, and fail when the stack lies to them. `make fuzz` looks for inputs that are not there yet.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from c_programs import CFLAGS, ENV, INCLUDE, ROOT, VARIANTS, run, stack_objects
from conftest import missing

CORPUS = ROOT / "tests/corpus"
HARNESSES = ("options", "reass", "frames", "ops", "fwd", "classify", "filter", "tso")
WRAP = [f"-Wl,--wrap=bypass_{name}" for name in ("recv", "recvfrom", "send", "destroy")]
FWD = ["-Ibypass", *(f"bypass/fwd/{name}.c" for name in ("port", "peer", "lease", "check", "forward"))]
CLASSIFY = [
    "-Ibypass",
    *(f"bypass/dpdk_backend/classify{name}.c" for name in ("", "_mem", "_rules", "_table")),
]

FILTER = [
    "-Ibypass",
    "-U_GNU_SOURCE",
    "-D_GNU_SOURCE=",  # as exception.c says it
    *(f"bypass/dpdk_backend/{name}.c" for name in ("filter", "exception")),
]
TSO = ["-std=gnu11", "-Ibypass", "-Ibypass/dpdk_backend", "bypass/dpdk_backend/eth/tso.c"]


def dpdk_headers() -> list[str]:
    """How they are found; no library is linked."""
    command = ["pkg-config", "--cflags", "libdpdk"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        missing(["DPDK's headers (apt-get install dpdk-dev)"])
    return done.stdout.replace("-I", "-isystem ").split()


@pytest.fixture(scope="module")
def objects() -> tuple[str, ...]:
    return stack_objects("san")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The committed corpus, unpacked."""
    found = {}
    for name in HARNESSES:
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(CORPUS / f"{name}.zip") as archive:
            archive.extractall(folder)
        found[name] = sorted(folder.iterdir())
    return found


def harness(name: str, objects: tuple[str, ...], folder: Path, wrong: int = 0) -> Path:
    out = folder / f"replay_{name}_{wrong}"
    lie = [f"-DFUZZ_WRONG={wrong}", *WRAP] if wrong else []
    if name == "fwd":  # no stack is in it
        lie = [f"-DFUZZ_PASS={wrong}", "-Wl,--wrap=check_send"] if wrong else []
        objects = tuple(FWD)
    if name == "classify":
        lie = [f"-DFUZZ_LIE={wrong}", "-Wl,--wrap=classify_burst"] if wrong else []
        objects = tuple(CLASSIFY)
    if name == "filter":
        lie = [f"-DFUZZ_LOSE={wrong}", "-Wl,--wrap=exception_write"] if wrong else []
        objects = tuple(FILTER)
    if name == "tso":
        lie = [f"-DFUZZ_TSO={wrong}", "-Wl,--wrap=tso_join"] if wrong else []
        objects = (*TSO, *dpdk_headers())
    sources = ["tests/c/fuzz_replay.c", f"tests/c/fuzz_{name}.c"]
    run("gcc", *CFLAGS, "-DBYPASS_DEBUG", *INCLUDE, *VARIANTS["san"], *lie, *sources, *objects, "-o", out)
    return out


def test_the_corpus_is_small() -> None:
    assert {p.name for p in CORPUS.iterdir()} == {f"{name}.zip" for name in HARNESSES}
    assert sum(p.stat().st_size for p in CORPUS.iterdir()) < 300_000


@pytest.mark.parametrize("name", HARNESSES)
def test_the_corpus_finds_nothing_wrong(
    name: str, objects: tuple[str, ...], inputs: dict[str, list[Path]], tmp_path: Path
) -> None:
    assert len(inputs[name]) >= 50
    assert run(harness(name, objects, tmp_path), *inputs[name]).endswith(f"{len(inputs[name])} inputs\n")


@pytest.mark.parametrize(
    ("name", "wrong", "about"),
    [
        ("ops", 1, "of the peer's"),
        ("ops", 2, "byte "),
        ("ops", 3, "conns"),
        ("reass", 1, "bytes"),
        ("frames", 3, "conns"),
        ("fwd", 2, "Ethernet"),
        ("fwd", 11, "from "),
        ("fwd", 14, "nobody began"),
        ("fwd", 16, "from port"),
        ("classify", 1, "then"),
        ("filter", 1, "the kernel has got"),
        ("tso", 1, "bytes"),
        ("tso", 2, "segment "),
    ],
    ids=[
        "a byte read differs",
        "a byte sent differs",
        "nothing is freed",
        "a datagram is short",
        "frames stay",
        "another source leaves",
        "another address leaves",
        "a fragment leaves",
        "another port leaves",
        "a burst is judged otherwise",
        "a frame does not reach the kernel",
        "a device cuts at another place",
        "a device sends other bytes",
    ],
)
def test_a_stack_that_lies_is_noticed(
    name: str, wrong: int, about: str, objects: tuple[str, ...], inputs: dict[str, list[Path]], tmp_path: Path
) -> None:
    command = [harness(name, objects, tmp_path, wrong), *inputs[name]]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False, errors="replace")
    assert done.returncode != 0
    assert about in done.stderr.splitlines()[-1], done.stderr[-500:]


@pytest.mark.hypothesis
def test_the_suite_leaves_its_frames_as_seeds(tmp_path: Path) -> None:
    """BYPASS_CORPUS=build/corpus make test ARGS=...: what conversations sent becomes a corpus for fuzz_frames."""
    env = os.environ | {"BYPASS_CORPUS": str(tmp_path)}
    argv = [
        os.environ.get("BYPASS_PYTHON", ROOT / ".venv/bin/python"),
        "-m",
        "pytest",
        "-q",
        "tests/test_icmp.py",
    ]
    subprocess.run(argv, env=env, check=True, cwd=ROOT, capture_output=True)
    files = list((tmp_path / "frames").iterdir())
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        while data:
            n = int.from_bytes(data[1:3], "big")
            assert n >= 14
            data = data[3 + n :]
