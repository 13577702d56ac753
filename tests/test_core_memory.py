# SPDX-License-Identifier: Apache-2.0
"""The memory of a stack: what is not used is not there, and a large arena has large pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bypass.core import HUGE_FROM, Config
from bypass.sim import Network

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mappings() -> dict[str, tuple[int, int, set[str]]]:
    """Address range: size and resident bytes, flags (proc_pid_smaps(5))."""
    found = {}
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M):
        if not block:
            continue
        size, resident = (int(n) << 10 for n in re.findall(r"^(?:Size|Rss): +(\d+) kB$", block, flags=re.M))
        flags = re.search(r"^VmFlags: (.*)$", block, flags=re.M)
        found[block.split()[0]] = size, resident, set(flags[1].split() if flags else ())
    return found


@pytest.mark.skipif(not THP.exists(), reason="the kernel has no transparent huge pages")
def test_a_large_arena_has_huge_pages_and_takes_few_of_them() -> None:
    before = mappings()
    with Network(1) as net:
        net.wire()
        net.stack("10.0.0.1/24", config=Config(conns=300_000))
        new = [v for k, v in mappings().items() if k not in before and "hg" in v[2]]
    assert len(new) == 1, new
    size, resident, _ = new[0]
    assert size >= HUGE_FROM
    assert resident < size / 8


def test_a_small_arena_has_none() -> None:
    before = mappings()
    with Network(1) as net:
        net.wire()
        net.stack("10.0.0.1/24", config=Config(conns=1000))
        assert not [v for k, v in mappings().items() if k not in before and "hg" in v[2]]
