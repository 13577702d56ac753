# SPDX-License-Identifier: Apache-2.0
"""The network half in C, under the address and undefined-behaviour sanitizers: checksums, queues, a rain of frames."""

from __future__ import annotations

from pathlib import Path

import pytest
from c_programs import program, run
from support import FUZZ

RAINS = 12 * FUZZ


def test_every_variant_of_the_checksum_agrees_with_the_rfc(tmp_path: Path) -> None:
    assert "checks" in run(program("test_csum", tmp_path))


def test_answers_leave_by_the_queue_of_the_question(tmp_path: Path) -> None:
    run(program("test_queues", tmp_path))


@pytest.fixture(scope="module")
def fuzz_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program("fuzz_net", tmp_path_factory.mktemp("c"))


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
