# SPDX-License-Identifier: Apache-2.0
"""One process writes the classifier's memory, another classifies on it: every frame is judged by the old state or by
the new one, whenever the writer is killed, and the next writer goes on."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NoReturn

import cffi
import pytest
from bypass._core import ffi, lib
from c_library import INCLUDES, ROOT
from test_soft_steering import HOST, MAC, Kernel, frame, left_by, made, policy, rule

from bypass._build_core import declarations
from bypass.dpdk_backend.steering import CLASSIFIER_REASONS, SoftSteering
from bypass.rules import TCP, PortRange, Rule

FOLDER = ROOT / "bypass/dpdk_backend"
KILLS = 24
STABLE, COMING, OTHER = 8080, 8081, 22
BURST = 1024

# In both policies: 8080 is steered and stays live, 8081 is steered by one rule or the other and comes and goes, 22 is
# passed by the first alone. They differ in number, masks and size of keys: each is nonsense when read as the other.
MANY = (rule(3 + i, 9000 + i) for i in range(3000))
FIRST = policy(rule(0, STABLE), rule(1, COMING), rule(2, OTHER, "pass"), *MANY)
SECOND = policy(
    rule(0, COMING),
    rule(1, STABLE),
    Rule(2, "six", None, None, None, ip_network("2001:db8::/32"), None, None, "pass"),
    Rule(3, "udp", 17, None, PortRange(8080, 8087), None, None, None, "steer"),
)
ALLOWED: dict[int, set[tuple[Any, ...]]] = {
    STABLE: {("steered", 0, 0), ("steered", 1, 0)},
    COMING: {("no_endpoint", 1), ("no_endpoint", 0), ("steered", 1), ("steered", 0)},
    OTHER: {("rule_pass", 2), ("no_rule", lib.CLASSIFY_NONE)},
}
"""By port: reason, rule, and of what is stable the entry."""
WANTED = {(port, *said) for port, allowed in ALLOWED.items() for said in allowed}


class Reader:
    """Bursts of the same three frames."""

    def __init__(self, soft: SoftSteering) -> None:
        self._c = soft.classifier
        self._data = [ffi.from_buffer(frame(port)) for port in ALLOWED]
        self._frames = ffi.new("struct classify_frame[]", BURST)
        for i, f in enumerate(self._frames):
            f.data, f.len = self._data[i % 3], len(self._data[i % 3])
        self._out = ffi.new("struct classify_result[]", BURST)
        self.seen: set[tuple[Any, ...]] = set()

    def burst(self) -> None:
        lib.classify_burst(self._c, self._frames, BURST, self._out)
        ports = tuple(ALLOWED)
        results = struct.iter_unpack("=2BH3I", ffi.buffer(self._out))
        for i, (reason, _, _, entry, number, _) in {(i % 3, result) for i, result in enumerate(results)}:
            said: tuple[Any, ...] = (CLASSIFIER_REASONS[reason].name, number)
            if ports[i] == STABLE:
                said += (entry,)
            assert said in ALLOWED[ports[i]], (ports[i], said)
            self.seen.add((ports[i], *said))


def write(soft: SoftSteering, progress: mmap.mmap) -> NoReturn:
    """Policies and entries come and go until somebody ends this. `progress`: how many so far, eight bytes."""
    rng = random.Random(os.getpid())
    entries: list[int] = [e for e in soft.entries() if e]
    for done in itertools.count(1):
        soft.swap(rng.choice((FIRST, SECOND)))
        progress[:8] = struct.pack("=Q", done)
        for _ in range(rng.randrange(40)):
            if entries and rng.random() < 0.5:
                soft.remove_endpoint(entries.pop(rng.randrange(len(entries))))
                continue
            port, peer = rng.choice((STABLE, COMING)), rng.choice((None, ("10.0.0.1", rng.randrange(1, 300))))
            if soft.find(TCP, HOST if peer else "0.0.0.0", port, peer, block=False) is None:
                entries.append(soft.add_endpoint(TCP, HOST if peer else None, port, *(peer or ())))
    raise AssertionError("it counts for ever")


def writer(soft: SoftSteering, progress: mmap.mmap) -> int:
    """A process that goes on with what is there."""
    child = os.fork()
    if child == 0:
        try:
            with made(Kernel(), FIRST, left_by(soft)) as mine:
                write(mine, progress)
        finally:
            os._exit(1)
    return child


def killed(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.timeout(120)
def test_a_reader_sees_the_old_or_the_new_while_writers_are_killed() -> None:
    rng = random.Random(1)
    with ExitStack() as stack:
        soft = stack.enter_context(made(Kernel(), FIRST))
        assert soft.add_endpoint(TCP, HOST, STABLE) == 0
        reader = Reader(soft)
        progress = stack.enter_context(mmap.mmap(-1, mmap.PAGESIZE))
        for kills in range(10 * KILLS):
            if kills >= KILLS and reader.seen == WANTED:
                break
            progress[:8] = bytes(8)
            child = writer(soft, progress)
            enough, more = rng.randrange(6), rng.randrange(40)
            try:
                while struct.unpack("=Q", progress[:8])[0] < enough:
                    reader.burst()
                for _ in range(more):  # somewhere in what it does next
                    reader.burst()
            finally:
                os.kill(child, signal.SIGKILL)
                assert killed(child), "the writer had ended before"
            reader.burst()
        assert reader.seen == WANTED, "what a reader may see it has seen"
        with made(Kernel(), SECOND, left_by(soft)) as last:  # whatever was locked, and whatever is half done
            for entry in [e for e in last.entries() if e]:
                last.remove_endpoint(entry)
            assert last.test_run(frame(COMING)).reason == "no_endpoint"
            assert last.test_run(frame(STABLE)).reason == "steered"
            assert list(last.entries()) == [0]


# ---- The library by itself, on a small range ----------------------------------------------------------------------

Ops = tuple[Any, Any]
"""A classifier's library and its ffi."""
OURS: Ops = (lib, ffi)
ROOM = 8
FULL = 1  # SLOT_FULL of classify_mem.h
CONFIG = {
    "abi": lib.CLASSIFY_ABI, "keys": 64, "endpoints": ROOM, "held": ROOM, "members": ROOM, "seed": 7,
}  # fmt: skip
HOOK = """#include <signal.h>
__attribute__((weak, visibility("default"))) void (*hook)(void);
"""


def key(f: cffi.FFI, port: int) -> Any:
    return f.new("struct classify_key *", {"local_port": port.to_bytes(2, "big"), "proto": TCP})


def add(ops: Ops, c: Any, port: int) -> int:
    value = ops[1].new("struct classify_endpoint *", {"entry": port % ROOM})
    return int(ops[0].classify_endpoint_add(c, key(ops[1], port), value))


def remove(ops: Ops, c: Any, port: int) -> int:
    return int(ops[0].classify_endpoint_del(c, key(ops[1], port), True))


def live(c: Any, port: int) -> bool:
    return bool(lib.classify_endpoint_get(c, key(ffi, port), ffi.new("struct classify_endpoint *")) == 0)


def rules(ops: Ops, c: Any, port: int) -> int:
    """One rule, which passes a port. Of struct rule_key only the local port is compared, behind two addresses."""
    f = ops[1]
    mask = f.new("struct classify_mask[1]", [{"bits": bytes(8) + b"\xff\xff" + bytes(30), "max_rank": 1}])
    keys = f.from_buffer(bytes(8) + port.to_bytes(2, "big") + bytes(6))
    value = f.new("struct classify_rule[1]", [{"rank": 1, "rule_action": 1}])
    p = f.new(
        "struct classify_policy *", {"masks_n": 1, "rules": 1, "keys_n": 1, "masks": mask, "values": value}
    )
    p.keys = f.cast("uint8_t *", keys)
    return int(ops[0].classify_rules_set(c, p))


def judged(ops: Ops, c: Any) -> str:
    result, data = ops[1].new("struct classify_result *"), frame(80)
    ops[0].classify(c, data, len(data), 0, result)
    return CLASSIFIER_REASONS[result.reason].name


@dataclass
class Range:
    """Memory with endpoints 1 and 2 and a rule that passes port 80, and our own view of it."""

    memory: Any
    size: int
    c: Any

    def slot_of(self, port: int) -> int:
        """Where in memory an endpoint is."""
        table, wanted = self.c.endpoints, bytes(ffi.buffer(key(ffi, port)))
        slots = ffi.buffer(self.c.mem + table.slots, 32 << table.bits)[:]
        there = (slots[i : i + 32] for i in range(0, len(slots), 32))
        [at] = [i for i, s in enumerate(there) if s[16:] == wanted and s[0] & 3 == FULL]
        return at


@pytest.fixture
def ours() -> Iterator[Range]:
    cfg = ffi.new("struct classify_config *", CONFIG)
    size = lib.classify_mem_size(cfg)
    with mmap.mmap(-1, size) as mapped, ffi.from_buffer(mapped) as held:
        memory, c = ffi.cast("void *", held), ffi.new("struct classifier *")
        assert lib.classify_init(c, memory, size, cfg) == 0
        assert [add(OURS, c, 1), add(OURS, c, 2), rules(OURS, c, 79), rules(OURS, c, 80)] == [0] * 4
        lib.classify_mac_set(c, MAC)
        assert lib.classify_set_add(c, lib.CLASSIFY_LOCALS4, bytes((192, 0, 2, 10)) + bytes(12)) == 0
        yield Range(memory, size, c)


def changed(folder: Path, file: str, line: str, before: str) -> Ops:
    """The classifier's library, with something before a line."""
    for path in FOLDER.glob("classify*.[ch]"):
        shutil.copy(path, folder)
    text = (folder / file).read_text()
    assert text.count(line) == 1, f"{file}: this line is not there once: {line}"
    (folder / file).write_text(HOOK + text.replace(line, f"{before};\n{line}"))
    command = ["gcc", "-std=gnu11", "-O0", "-w", "-fPIC", "-shared", f"-I{folder}", *INCLUDES]
    subprocess.run([*command, *sorted(folder.glob("*.c")), "-o", "changed.so"], cwd=folder, check=True)
    f = cffi.FFI()
    f.cdef(declarations() + "extern void (*hook)(void);")
    return f.dlopen(str(folder / "changed.so")), f


def attached(ops: Ops, ours: Range) -> Any:
    c = ops[1].new("struct classifier *")
    at = ops[1].cast("void *", int(ffi.cast("uintptr_t", ours.memory)))
    assert ops[0].classify_attach(c, at, ours.size) == 0
    return c


# ---- Killed before a line of a writer: file, line, call
POINTS: tuple[tuple[str, str, Callable[[Ops, Any], int]], ...] = (
    ("classify_table.c", "    STORE_RELEASE(&s->state, ((s->state", lambda ops, c: add(ops, c, 3)),
    ("classify_table.c", "        err = table_add(c, &c->endpoints", lambda ops, c: add(ops, c, 3)),
    ("classify_table.c", "    if (next != SLOT_EMPTY) {", lambda ops, c: remove(ops, c, 1)),
    ("classify_table.c", "        if (--h->endpoints_n[bit] == 0) {", lambda ops, c: remove(ops, c, 1)),
    ("classify_rules.c", "        STORE_RELEASE(&a->seq, a->seq + 1);", lambda ops, c: rules(ops, c, 80)),
    ("classify_rules.c", "        STORE_RELEASE(&h->active, next);", lambda ops, c: rules(ops, c, 80)),
)


@pytest.mark.parametrize(("file", "line", "call"), POINTS, ids=[" ".join(p[1].split()) for p in POINTS])
def test_a_writer_killed_before_a_line_leaves_a_state(
    file: str, line: str, call: Callable[[Ops, Any], int], ours: Range, tmp_path: Path
) -> None:
    killing = changed(tmp_path, file, line, "raise(SIGKILL)")
    child = os.fork()
    if child == 0:
        try:
            call(killing, attached(killing, ours))
        finally:
            os._exit(1)
    assert killed(child), "the line was not reached"
    there = {port for port in range(1, ROOM) if live(ours.c, port)}
    assert there in ({1, 2}, {2}, {1, 2, 3})
    assert judged(OURS, ours.c) == "rule_pass"
    for port in there:  # all goes on, and there is room for exactly as many as before
        assert remove(OURS, ours.c, port) == 0
    added = [add(OURS, ours.c, port) for port in range(1, ROOM + 2)]
    assert added == [0] * ROOM + [-errno.ENOSPC]
    assert rules(OURS, ours.c, 81) == 0
    assert judged(OURS, ours.c) == "no_rule"


# ---- Written between two lines of a reader
@pytest.mark.parametrize(
    ("times", "expected"), [(0, "rule_pass"), (1, "no_rule"), (3, "no_rule"), (4, "busy")]
)
def test_rules_that_are_exchanged_under_a_reader_are_taken_anew(
    ours: Range, tmp_path: Path, times: int, expected: str
) -> None:
    line = "            reason = judge(c, &v, &p, parse_packet(c, &p, &v.depth), queue, out);"
    reading = changed(tmp_path, "classify.c", line, "if (hook) hook()")
    left = times

    def exchange() -> None:
        nonlocal left
        if left:
            left -= 1
            assert rules(OURS, ours.c, 81) == rules(OURS, ours.c, 82) == 0

    reading[0].hook = kept = reading[1].callback("void(void)", exchange)
    assert judged(reading, attached(reading, ours)) == expected
    assert kept
    assert left == 0


def test_a_policy_that_is_half_written_is_not_used(ours: Range, tmp_path: Path) -> None:
    line = "    for (uint32_t i = 0; i < p->keys_n && !err; i++) {"
    writing = changed(tmp_path, "classify_rules.c", line, "if (hook) hook()")
    seen: list[str] = []
    writing[0].hook = kept = writing[1].callback("void(void)", lambda: seen.append(judged(OURS, ours.c)))
    assert rules(writing, attached(writing, ours), 81) == 0
    assert kept
    assert [*seen, judged(OURS, ours.c)] == ["rule_pass", "no_rule"]


def test_an_entry_whose_place_is_given_away_under_a_reader_is_gone(ours: Range, tmp_path: Path) -> None:
    reading = changed(tmp_path, "classify_mem.h", "            *value = LOAD(&s->value);", "if (hook) hook()")
    c, out = attached(reading, ours), reading[1].new("struct classify_endpoint *")
    place, given = ours.slot_of(1), list[int]()

    def replace() -> None:
        assert remove(OURS, ours.c, 1) == 0
        for port in range(256, 3000):  # one falls into that place
            assert add(OURS, ours.c, port) == 0
            if ours.slot_of(port) == place:
                given.append(port)
                return
            assert remove(OURS, ours.c, port) == 0

    reading[0].hook = kept = reading[1].callback("void(void)", replace)
    assert reading[0].classify_endpoint_get(c, key(reading[1], 1), out) == -errno.ENOENT
    assert kept
    assert len(given) == 1
