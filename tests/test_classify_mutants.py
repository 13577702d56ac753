# SPDX-License-Identifier: Apache-2.0
"""The comparison of classifier and steering program notices when either of them is wrong.

Each mutant has one line changed; the frames of test_classify_equivalence.py have to show a difference. A mutant of the
classifier is a library of its own that reads the memory which the right one has written; mutants of the program are
loaded in its place. A mutant whose line is gone is a failure: mend the list.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cffi
import pytest
from c_library import INCLUDES, ROOT
from classify_support import Judgement, Pair, Reader, pair
from steering_rules import draw_rules
from steering_support import Bench
from test_steering_mutants import MUTANTS as OF_PROGRAM
from test_steering_mutants import Mutant

from bypass._build_core import declarations
from bypass.bpf import build

pytestmark = pytest.mark.netns

FOLDER = ROOT / "bypass/dpdk_backend"
SOURCES = (
    "classify_mem.c",
    "classify_rules.c",
    "classify_table.c",
)  # the right ones, beside a wrong classify.c
GCC = ["gcc", "-std=c11", "-O0", "-w", "-fPIC", f"-I{FOLDER}", *INCLUDES]
FRAMES = 3000
CASES = 6  # of a mutant of the program

CLASSIFIER = (
    Mutant("the last mask wins, not the highest rank", "if (value >> 32 > best->rank)", "if (1)", "ranges"),
    Mutant(
        "the first mask that matches ends the search",
        "best.rank < LOAD(&v->area->mask[i].max_rank)",
        "!best.rank",
        "ranges",
    ),
    Mutant("the VLAN identifier is read backwards", "read16(tag) & 0xfff", "raw16(tag) & 0xfff", "all"),
    Mutant("a tagged frame is steered", "if (p->tagged) {", "if (0) {", "all"),
    Mutant("Ethernet padding counts as payload", " || p->l4 + FRAGMENT_MIN > p->end", ""),
    Mutant("options are read as ports", "p->l4 = p->l3 + bytes;", "p->l4 = p->l3 + IP4_MIN;"),
    Mutant("first fragments of live TCP pass", "proto == PROTO_TCP ? REASON_TCP_FRAGMENT : ", ""),
    Mutant("TIME_WAIT swallows new connections", "(flags & CLASSIFY_TIME_WAIT) && syn", "0 && syn"),
    Mutant("a block has half of its ports", "f->local_port & 0xff,", "f->local_port & 0x80ff,"),
    Mutant("owners share their queues", "unserved[owner]", "unserved[0]"),
    Mutant("an error about another host's packet is taken", " || raw32(ip + 12) != p->flow.local[3]", ""),
    Mutant("AH is measured like other headers", "(ext[1] + 2u) * 4", "(ext[1] + 1u) * 8", "all"),
    Mutant("the hash knows no ports", "(uint32_t)f->local_port << 16 | f->remote_port", "0"),
)
PROGRAM = (
    Mutant("the hash knows no ports", "((u32)f->local_port << 16 | f->remote_port)", "0"),
    *(
        m
        for m in OF_PROGRAM
        if m.name
        in {
            "the last mask wins, not the highest rank",
            "TCP to a group MAC address is steered",
            "routed packets are taken",
            "an impossible TCP header length is accepted",
            "options are read as ports",
            "any ICMP type has a quote",
            "connected endpoints are overlooked",
            "a block is every port of its address",
            "one extension header too few is walked",
            "the verdict names the wrong rule",
        }
    ),
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as it:
        yield it


Judged = dict[str, list[tuple[Pair, list[tuple[bytes, int, Judgement]]]]]


@pytest.fixture(scope="module")
def judged(bench: Bench) -> Iterator[Judged]:
    """By kind of policy: classifier and program with such, and what the classifier says about frames."""
    with ExitStack() as open_:
        found: Judged = {}
        for kind, seed in (("ip4", 5), ("ip4", 6), ("all", 5), ("ranges", 5)):
            rng = random.Random(seed)
            both = open_.enter_context(pair(bench, rng, draw_rules(rng, kind)))
            drawn = [both.draw(rng) for _ in range(FRAMES)]
            said = [(f, q, both.by_classifier(f, q)) for f, q in drawn]
            found.setdefault(kind, []).append((both, said))
        yield found


Built = Callable[[Mutant | None, Path], tuple[Any, Any]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Builds the classifier, one line of it changed: (lib, ffi)."""
    folder = tmp_path_factory.mktemp("right")
    subprocess.run([*GCC, "-c", *(FOLDER / s for s in SOURCES)], cwd=folder, check=True)
    ffi = cffi.FFI()
    ffi.cdef(declarations())

    def make(mutant: Mutant | None, out: Path) -> tuple[Any, Any]:
        for name in ("classify.c", "classify_parse.h"):
            shutil.copy(FOLDER / name, out)
        if mutant:
            [path] = [p for p in out.iterdir() if mutant.right in p.read_text()]
            text = path.read_text()
            assert text.count(mutant.right) == 1, f"this line is not there once: {mutant.right}"
            path.write_text(text.replace(mutant.right, mutant.wrong))
        rest = [str(folder / s).replace(".c", ".o") for s in SOURCES]
        subprocess.run([*GCC, "-shared", "classify.c", *rest, "-o", "mutant.so"], cwd=out, check=True)
        return ffi.dlopen(str(out / "mutant.so")), ffi

    return make


def differs(judged: Judged, kind: str, lib: Any, ffi: Any) -> bool:
    """Whether program and mutant contradict each other. (The program is slow: it is asked about frames on which the
    right classifier and the mutant do.)"""
    for both, frames in judged[kind]:
        reader = Reader(both.soft, lib, ffi)
        for frame, queue, right in frames:
            said = reader.judge(frame, queue)
            if said != right:
                return said != both.by_program(frame, queue)
    return False


def test_the_right_classifier_built_so_shows_no_difference(
    judged: Judged, built: Built, tmp_path: Path
) -> None:
    right = built(None, tmp_path)
    for [(both, frames), *_] in judged.values():
        reader = Reader(both.soft, *right)
        for frame, queue, _ in frames[:200]:
            assert reader.judge(frame, queue) == both.by_program(frame, queue)


@pytest.mark.parametrize("mutant", CLASSIFIER, ids=lambda m: m.name.replace(" ", "-"))
def test_a_wrong_classifier_is_noticed(judged: Judged, built: Built, mutant: Mutant, tmp_path: Path) -> None:
    assert differs(judged, mutant.kind, *built(mutant, tmp_path)), (
        "every frame was judged as the program does"
    )


@pytest.mark.parametrize("mutant", PROGRAM, ids=lambda m: m.name.replace(" ", "-"))
def test_a_wrong_program_is_noticed(bench: Bench, mutant: Mutant) -> None:
    text = build.source()
    assert text.count(mutant.right) == 1, f"this line is not in the program once: {mutant.right}"
    text = text.replace(mutant.right, mutant.wrong)
    for seed in range(CASES):
        rng = random.Random(seed)
        with pair(bench, rng, draw_rules(rng, mutant.kind), text=text) as both:
            for _ in range(FRAMES):
                frame, queue = both.draw(rng)
                if both.by_program(frame, queue) != both.by_classifier(frame, queue):
                    return
    pytest.fail("every frame was judged as the classifier judges it")


def test_the_lists_are_whole() -> None:
    assert len(CLASSIFIER) >= 10
    assert len(PROGRAM) == 11
