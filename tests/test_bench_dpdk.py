# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.dpdk`: every part runs, and its figures are of what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import missing

from bench import instructions, network
from bench.dpdk import memory, veth
from bench.programs import ROOT
from bypass.dpdk_backend.eal import load_plugin
from bypass.errors import BypassError

pytestmark = [pytest.mark.bench, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def result(bench_programs: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of a quick run."""
    try:
        load_plugin()
    except BypassError as e:
        missing([str(e)])
    output: Path = tmp_path_factory.mktemp("bench") / "dpdk.json"
    argv = [sys.executable, "-m", "bench.dpdk", "--quick", "--output", str(output)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_two_processes_answer_each_other_in_memory(result: dict[str, Any]) -> None:
    assert list(result["memory"]) == [t.name for t in memory.TESTS]
    for test in memory.TESTS:
        about = result["memory"][test.name]
        servers = {"stack", "bare"} if test.mode == "udp" else {"stack"}
        assert set(about["variants"]) == servers
        assert ("ratio" in about) == ("bare" in servers)
        for found in about["variants"].values():
            assert found["rate"]["median"] > 0
            assert ("p50_us" in found) == (not test.bulk and (test.mode == "tcp" or test.parallel == 1))


@pytest.mark.netns
def test_a_client_of_the_kernel_meets_each_server(result: dict[str, Any]) -> None:
    for test in network.TESTS:
        about = result["veth"][test.name]
        assert list(about["variants"]) == [v for v in veth.VARIANTS if veth.applies(v, test)]
        assert set(about["ratios"]) >= {"dpdk/kernel", "dpdk/afxdp"}
        assert all(found["rate"]["median"] > 0 for found in about["variants"].values())


def test_a_vhost_user_socket_joins_two_stacks_too(result: dict[str, Any]) -> None:
    """As a switch in user space has it."""
    for test in (t for t in memory.TESTS if t.mode == "tcp" and t.parallel > 1):
        found = memory.once("stack", test, 20, 100, vhost=True)
        assert found["ops"] > test.parallel


def test_instructions_are_told_apart(result: dict[str, Any]) -> None:
    if instructions.missing():
        missing([instructions.missing()])
    one, batch = result["instructions"]
    for found in (one, batch):
        assert found["operations"] >= 200
        parts = found["stack"] + found["netdev"] + found["driver"]
        assert all(found[part] > 100 for part in ("stack", "netdev", "driver")), found
        assert parts <= found["per_request"]
    assert batch["per_request"] < one["per_request"]
