# SPDX-License-Identifier: Apache-2.0
"""DPDK ports whose hardware has rules, for tests: DPDK's functions are replaced in the processes that a test starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import missing


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "flows.so"
    said = subprocess.run(["pkg-config", "--cflags", "libdpdk"], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        missing(["DPDK's headers (dpdk-dev)"])
    source = Path(__file__).parent / "c/rte_flow_shim.c"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *said.stdout.split()]
    subprocess.run(
        ["gcc", *flags, "-o", path, source, "-Wl,--no-as-needed", "-lrte_ethdev", "-lrte_eal"], check=True
    )
    return path


@pytest.fixture
def hardware(shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ports of children have rules; what they are told is in this file."""
    log = tmp_path / "flows"
    log.touch()
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    monkeypatch.setenv("BYPASS_FLOWS", str(log))
    return log
