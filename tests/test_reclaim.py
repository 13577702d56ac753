# SPDX-License-Identifier: Apache-2.0
"""A device whose user was killed: whoever takes over brings it back, with every frame in one place.

tests/c/reclaim_steps.c tries every instruction at which the memory changes; here also SIGKILL at random moments, on a
veth, by a process without privileges."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from afxdp_relative import Relative
from afxdp_support import udp_clients
from bypass._core import ffi, lib
from c_programs import ROOT
from test_afxdp_attach import AT_REST, Opener, opener, relative  # noqa: F401 (fixtures)

from bypass.lab import Lab

SOURCES = (
    "tests/c/reclaim_steps.c",
    "tests/c/afxdp_fake.c",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "bypass/afxdp").glob("*.c")),
    "bypass/fwd/port.c",
    "bypass/fwd/peer.c",
)
KILLS = 200


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Optimised as the release is: the order of its instructions is what matters."""
    out = tmp_path_factory.mktemp("reclaim") / "reclaim_steps"
    flags = [
        "-std=c11",
        "-O3",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Ibypass/include",
        "-Ibypass",
        "-Itests/c",
    ]
    subprocess.run(["gcc", *flags, *SOURCES, "-o", out], cwd=ROOT, check=True)
    return out


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("kind", ["afxdp", "port"])
def test_killed_after_any_instruction(steps: Path, kind: str, seed: int) -> None:
    done = subprocess.run([steps, kind, "100", str(seed)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout.split()[-2])
    assert moments > 500, done.stdout


@pytest.mark.netns
def test_killed_at_random_moments(opener: Opener, relative: Callable[..., Relative], lab: Lab) -> None:  # noqa: F811
    seed = random.SystemRandom().getrandbits(32)
    moments = random.Random(seed)
    it = relative()
    with udp_clients(lab) as make:
        s = make()
        for n in range(KILLS):
            s.send(b"%d" % n)  # may be in any ring, or in hand, when it happens
            assert it.call("killed", moments.uniform(0.002, 0.012)) == 0, f"kill {n}, seed {seed}"
            (opener.receive if n % 2 else lambda: it.call("receive"))()
            answered = opener.answered
            it.begin("echo", answered + 1)
            s.send(b"%d" % (KILLS + n))
            assert int(s.recv(100)) == KILLS + n, f"kill {n}, seed {seed}"
            assert it.end() == [KILLS + n]
            assert opener.audit() == AT_REST, f"kill {n}, seed {seed}"
    counters = ffi.new("struct afxdp_counters *")
    assert lib.afxdp_counters(opener.dev, 0, counters) == 0
    assert counters.tx_packets > 10 * KILLS, "the victims were at work, on whatever share of a core they had"
