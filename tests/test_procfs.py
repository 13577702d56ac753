# SPDX-License-Identifier: Apache-2.0
"""Processes as /proc shows them: those that end while they are looked at, and those with odd names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_pci import FakeMachine

from bypass import procfs
from bypass.cli.ps import cpu_seconds
from bypass.records import started

NAMED = r"""
import sys
with open("/proc/self/comm", "wb") as comm:
    comm.write(b") \xff\x1b[1m (")
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def odd() -> Iterator[int]:
    """A process whose name is no text, and looks like the end of one."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", NAMED], stdin=pipe, stdout=pipe) as program:
        assert program.stdout
        program.stdout.readline()
        yield program.pid


@pytest.fixture
def ended() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as program:
        program.wait()
    return program.pid


def test_a_name_may_hold_any_bytes(odd: int) -> None:
    assert procfs.name_of(odd) == ") \ufffd?[1m ("
    fields = procfs.stat_of(odd)
    assert fields is not None
    assert fields[1] == str(os.getpid()), "its parent"
    assert fields[0] in "SRD"
    assert (started(odd) or 0) >= (started(os.getpid()) or 0) > 0
    assert cpu_seconds(odd) is not None


def test_what_has_ended_is_none(ended: int) -> None:
    assert procfs.name_of(ended) is None
    assert procfs.stat_of(ended) is None
    assert started(ended) is None
    assert cpu_seconds(ended) is None
    assert list(procfs.descriptors(ended)) == []
    assert ended not in procfs.pids()


def test_the_numbers_are_in_order() -> None:
    found = procfs.pids()
    assert found == sorted(found)
    assert {1, os.getpid()} <= set(found)


def closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each listing of descriptors begins with one that is no more when it is looked at."""
    listdir = os.listdir

    def one_more(path: Any = ".") -> list[str]:
        names = listdir(path)
        return ["999999", *names] if str(path).endswith("/fd") else names

    monkeypatch.setattr(os, "listdir", one_more)


def test_a_descriptor_that_is_closed_meanwhile_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "held"
    with held.open("w") as file:
        closed_meanwhile(monkeypatch)
        found = dict(procfs.descriptors(os.getpid()))
        assert found[Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")] == str(held)


def test_who_has_a_device_is_seen_while_it_closes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or vfio's unbind would wait for it, in the kernel, for ever."""
    machine = FakeMachine(tmp_path)
    folder = machine.proc / "4711/fd"
    folder.mkdir(parents=True)
    (folder / "3").symlink_to("/dev/vfio/17")
    (folder.parent / "comm").write_text("qemu\n")
    closed_meanwhile(monkeypatch)
    assert super(FakeMachine, machine).holders({"/dev/vfio/17"}) == {4711: "qemu"}
