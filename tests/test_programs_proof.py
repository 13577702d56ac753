# SPDX-License-Identifier: Apache-2.0
"""The proof of who served (bench/apps/proof.py): it believes what bypass served, and nothing that the kernel served."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.apps.proof import SHARE, Evidence, Snapshot, parse, snapshot
from bypass.lab import SERVER_IFNAME, SERVER_IP, Lab, wait_for

ROOT = Path(__file__).resolve().parent.parent
BEFORE = Snapshot(
    active_opens=1, passive_opens=2, received=1000, ip_received=900, loopback=100, retransmitted=0
)  # fmt: skip

SNMP = """\
Ip: Forwarding InReceives
Ip: 1 77
Tcp: RtoAlgorithm ActiveOpens PassiveOpens RetransSegs
Tcp: 1 5 7 2
"""
NETSTAT = """\
TcpExt: SyncookiesSent
TcpExt: 0
IpExt: InOctets InNoECTPkts InECT1Pkts InECT0Pkts InCEPkts
IpExt: 99999 400 1 20 3
"""
DEV = f"""\
Inter-|   Receive                                    |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets
    lo: 840 10 0 0 0 0 0 0 840 10
{SERVER_IFNAME}: 123456 900 0 0 0 0 0 0 123456 800
"""


def later(**grown: int) -> Evidence:
    """From BEFORE on, these counters grew by so much."""
    changed = {name: (getattr(BEFORE, name) or 0) + n for name, n in grown.items()}
    before = replace(BEFORE, steered=0, passed=0) if "steered" in grown else BEFORE
    return Evidence(before, replace(before, **changed))


def test_what_bypass_served_is_believed() -> None:
    found = later(received=10_000, ip_received=12)
    assert found.problems() == []
    assert found.share > SHARE
    assert later(received=10_000, ip_received=12, steered=9990, passed=10).problems() == []


def test_what_the_kernel_served_is_not_believed() -> None:
    found = later(received=10_000, ip_received=10_000, passive_opens=50).problems()
    assert "the kernel counted 50 passive_opens, 0 are expected" in found
    assert any("0.00% of 10000 packets were steered" in text for text in found)


@pytest.mark.parametrize("name", ["active_opens", "passive_opens"])
def test_one_connection_of_the_kernel_is_one_too_many_unless_it_is_expected(name: str) -> None:
    found = later(received=1000, **{name: 1})
    assert found.problems() == [f"the kernel counted 1 {name}, 0 are expected"]
    assert found.problems(active=1, passive=1) == []


def test_the_share_has_to_be_above_the_bound_and_not_at_it() -> None:
    assert later(received=10_000, ip_received=100).problems() != []
    assert later(received=10_000, ip_received=99).problems() == []


def test_the_loopback_is_nobodys_packet() -> None:
    found = later(received=1000, ip_received=5000, loopback=5000)
    assert found.kernel_packets == 0
    assert found.problems() == []


def test_segments_that_the_kernel_joined_count_one_by_one() -> None:
    """A veth hands a large frame over as one packet, whose segments IP counts: more than there were packets."""
    assert later(received=100, ip_received=4000).share == 0.0


def test_no_packets_are_no_proof() -> None:
    assert later().problems() == ["the interface received nothing"]


def test_a_steering_program_that_passed_too_much_is_a_problem_by_itself() -> None:
    found = later(received=10_000, ip_received=0, steered=9_000, passed=1_000).problems()
    assert found == ["the steering program says 90.00%"]


def test_counters_are_read_from_the_files_of_proc(tmp_path: Path) -> None:
    for name, text in (("snmp", SNMP), ("netstat", NETSTAT), ("dev", DEV)):
        (tmp_path / name).write_text(text)
    assert parse(tmp_path) == Snapshot(
        active_opens=5, passive_opens=7, received=900, ip_received=424, loopback=10, retransmitted=2
    )
    assert parse(tmp_path, (8, 9)).steered == 8


# ---- Live --------------------------------------------------------------------------------------------------------
def served(lab: Lab, tmp_path: Path, policy: str, argv: list[str], port: int) -> list[str]:
    """What the proof says of a server that curl took 3 MB from."""
    (tmp_path / "policy.yaml").write_text(policy)
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    url = f"http://{SERVER_IP}:{port}/file"
    curl = lab.command(
        "client", ["curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{size_download}", url]
    )
    server = subprocess.Popen(
        lab.command("server", argv), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:

        def answers() -> bool:
            assert server.poll() is None
            return subprocess.run(curl, capture_output=True, check=False).returncode == 0

        wait_for(answers, 20, "the server to answer")
        before = snapshot(lab)
        done = subprocess.run(curl, capture_output=True, text=True, check=True)
        assert done.stdout == "3000000"
        return Evidence(before, snapshot(lab)).problems()
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.netns
def test_live_a_server_on_the_stack_is_believed(lab: Lab, tmp_path: Path) -> None:
    policy = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: auto}}
flows:
  - {{name: web, match: {{proto: tcp, local: {SERVER_IP}, local_port: 8080}}, action: steer}}
"""
    argv = [
        sys.executable, "-m", "bypass.webserver", "--policy", str(tmp_path / "policy.yaml"),
        "--directory", str(tmp_path), f"{SERVER_IP}:8080",
    ]  # fmt: skip
    assert served(lab, tmp_path, policy, argv, 8080) == []


@pytest.mark.netns
def test_live_a_server_on_the_kernel_is_not_believed(lab: Lab, tmp_path: Path) -> None:
    argv = ["/usr/bin/python3", "-m", "http.server", "--directory", str(tmp_path), "8080"]
    found = served(lab, tmp_path, "", argv, 8080)
    assert any("passive_opens" in text for text in found)
    assert any("were steered" in text for text in found)
