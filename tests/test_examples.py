# SPDX-License-Identifier: Apache-2.0
"""Every example runs as its head says, and the demonstration shows what it promises."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from bypass._core import ffi
from click.testing import CliRunner
from dpdk_support import require_dpdk
from peer import client_socket
from support import INTERRUPTIBLE

from bypass.demo import DemoError, counted, kill_and_watch, main
from bypass.lab import SERVER_IP, Lab

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@contextlib.contextmanager
def running(lab: Lab, name: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """An example in the lab's server, past its first line; ended as by Ctrl-C."""
    argv = lab.command("server", [*INTERRUPTIBLE, sys.executable, str(EXAMPLES / name), *args])
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        assert SERVER_IP in process.stdout.readline()
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def test_all_examples_are_tested() -> None:
    tests = (ROOT / "tests" / f"test_{name}.py" for name in ("examples", "embed", "tcp_cc"))
    named = "".join(path.read_text() for path in tests).replace('"', " ")
    for path in EXAMPLES.iterdir():
        if path.is_file():
            assert f" {path.name} " in named, path.name


@pytest.mark.netns
def test_the_echo_server_echoes(lab: Lab) -> None:
    with running(lab, "echo_server.py", "config/web.yaml", SERVER_IP, "8080"), client_socket(lab) as s:
        s.connect((SERVER_IP, 8080))
        for text in (b"hello", b"x" * 100_000):
            s.sendall(text)
            got = b""
            while len(got) < len(text):
                got += s.recv(1 << 16)
            assert got == text
        s.shutdown(socket.SHUT_WR)
        assert s.recv(1) == b""


@pytest.mark.netns
def test_raw_frames_are_turned_round(lab: Lab) -> None:
    echo = running(lab, "raw_ping.py", "config/udp-echo.yaml", SERVER_IP, "7")
    with echo, client_socket(lab, socket.SOCK_DGRAM) as s:
        s.connect((SERVER_IP, 7))
        for text in (b"hello", b"", b"y" * 1400):
            s.send(text)
            assert s.recv(2000) == text


def test_the_simulation_is_the_same_each_time() -> None:
    argv = [sys.executable, str(EXAMPLES / "simulation.py")]
    runs = {subprocess.run(argv, check=True, capture_output=True, text=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert "equal True" in runs.pop()


def test_the_property_test_finds_nothing_wrong_with_the_echo_server() -> None:
    argv = [sys.executable, str(EXAMPLES / "property_test.py"), "60"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("60 conversations, ")


def demo(tmp_path: Path, *args: str) -> dict:
    path = tmp_path / "demo.json"
    argv = [sys.executable, "-m", "bypass.demo", "--json", str(path), *args]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict = json.loads(path.read_text())
    assert facts["ok"] is True
    return facts


@pytest.mark.netns
def test_the_demonstration_shows_both_servers_and_a_clean_kill(tmp_path: Path) -> None:
    facts = demo(tmp_path, "--megabytes", "10")
    assert facts["mode"] == "interface"
    assert facts["bypass_sha256_equal"] is True
    assert facts["kernel_sha256_equal"] is True
    assert facts["steered_packets"] > 100
    assert facts["left_attached"] == []
    assert facts["answers_after"] == ["ECONNREFUSED"]
    assert facts["ping"]["sent"] == facts["ping"]["received"] > 0


def test_a_busy_machine_may_be_silent_before_the_kill_and_an_answer_decides() -> None:
    def told(*lines: str) -> tuple[float, list[str]]:
        script = "import sys, time\nfor what in sys.argv[1:]: print(time.monotonic(), what, flush=True)"
        place = SimpleNamespace(command=lambda *_: [sys.executable, "-c", script, *lines])
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], text=True) as server:
            try:
                return kill_and_watch(cast(Lab, place), server)
            finally:
                server.kill()

    refused = "ECONNREFUSED"
    assert told("silence", "silence", "open", "silence", refused, refused)[1] == [refused] * 2
    assert told("open", refused, "silence")[1] == [refused, "silence"]
    with pytest.raises(DemoError, match="gave ECONNREFUSED before the kill"):
        told("silence", refused, "open")
    with pytest.raises(DemoError, match="gave silence before the kill"):
        told("silence", "silence")
    with pytest.raises(DemoError, match="never answered"):
        told("open", "silence")


@pytest.mark.parametrize(
    ("sent", "answered", "counts"),
    [
        (100, range(1, 101), (100, 100)),
        (100, range(1, 99), (98, 98)),  # the last two are on their way
        (100, [*range(1, 50), *range(51, 101)], (100, 99)),
        (100, range(1, 61), (100, 60)),  # two seconds of silence
        (10, [], (0, 0)),
        (100, [], (100, 0)),
    ],
)
def test_an_answer_on_its_way_is_not_lost(
    sent: int, answered: Iterable[int], counts: tuple[int, int]
) -> None:
    lines = [f"64 bytes from 192.0.2.10: icmp_seq={n} ttl=64 time=0.05 ms\n" for n in answered]
    lines.append(f"From 192.0.2.20 icmp_seq={sent} Destination Host Unreachable\n")
    summary = f"{sent} packets transmitted, {len(lines) - 1} received, 0% packet loss, time 1 ms\n"
    assert counted("".join(lines) + summary) == counts


@pytest.mark.netns
def test_the_demonstration_on_a_dpdk_port(tmp_path: Path) -> None:
    require_dpdk()
    facts = demo(tmp_path, "--megabytes", "5", "--backend", "dpdk")
    assert facts["bypass_sha256_equal"] is True
    assert facts["kernel_sha256_equal"] is True
    assert facts["steered_packets"] > 100
    assert facts["exception"]["passed"] > 100
    assert facts["ping"]["sent"] == facts["ping"]["received"] > 0
    assert sorted(facts["left_interfaces"]) == ["bypass0w", "lo"]
    assert facts["ping_after"]["received"] == 0


def test_the_demonstration_on_a_dpdk_port_names_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: object, error: Any) -> object:
        error.text = b"there is no DPDK plug-in: apt-get install dpdk"
        return ffi.NULL

    monkeypatch.setattr("bypass.dpdk_backend.eal.lib", SimpleNamespace(dpdk_load=load))
    argv = ["--json", str(tmp_path / "demo.json"), "--backend", "dpdk"]
    assert CliRunner().invoke(main, argv).exit_code == 2
    assert "apt-get install dpdk" in json.loads((tmp_path / "demo.json").read_text())["error"]


def test_the_demonstration_runs_without_privilege(tmp_path: Path) -> None:
    facts = demo(tmp_path, "--megabytes", "10", "--simulate")
    assert facts["mode"] == "simulated"
    assert facts["bypass_sha256_equal"] is True


def test_the_demonstration_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bypass.probe.os.geteuid", lambda: 1000)
    path = tmp_path / "demo.json"
    done = CliRunner().invoke(main, ["--json", str(path), "--megabytes", "1"])
    assert done.exit_code == 0
    facts = json.loads(path.read_text())
    assert facts["mode"] == "simulated"
    assert facts["reason"] == "root"
