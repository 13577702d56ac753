# SPDX-License-Identifier: Apache-2.0
"""The mixed load with Linux (bench/mixed) and iperf3's protocol (bench/iperf3): a short run is without error and leaves
nothing; what would be left is noticed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from conftest import missing

from bench import iperf3
from bench.mixed import leftovers
from bench.mixed.__main__ import Run

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"

pytestmark = pytest.mark.bench


# ---- The run -----------------------------------------------------------------------------------------------------
def command(output: Path, minutes: float) -> list[str]:
    return [
        sys.executable,
        "-m",
        "bench.mixed",
        "--minutes",
        str(minutes),
        "--rate",
        "20",
        "--output",
        str(output),
    ]


def need_tools() -> None:
    if lacking := [name for name in ("curl", "iperf3", "bpftool") if not shutil.which(name)]:
        missing(lacking)


@pytest.mark.netns
@pytest.mark.timeout(300)
def test_a_short_mixed_load_is_without_error_and_leaves_nothing(tmp_path: Path) -> None:
    need_tools()
    output = tmp_path / "mixed.json"
    argv = command(output, 0.2)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no error, nothing left over" in done.stdout
    found = json.loads(output.read_text())
    assert found["ok"]
    assert found["problems"] == []
    assert found["bpf_objects"] > 3
    assert found["processes"] >= 4  # both ends, iperf3 -s, http.server
    linux, ours = (found["ends"][which]["counts"] for which in ("linux", "bypass"))
    for load in (linux["curl"], linux["iperf3 client"], ours["http client"], ours["iperf3 client"]):
        assert load["done"] > 0
        assert load["bytes"] > 0
    assert linux["short client"]["done"] > 50
    assert ours["short client"]["done"] > 50
    kinds = set(ours["short server"])
    assert {"half-close", "server closes", "client closes"} <= kinds
    assert found["after"]["stats"]["tcp_established"] > 100


@pytest.mark.netns
@pytest.mark.timeout(300)
def test_an_interrupted_load_ends_in_order(tmp_path: Path) -> None:
    need_tools()
    output = tmp_path / "mixed.json"
    with subprocess.Popen(
        [sys.executable, "-u", *command(output, 5)[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert " s: curl" in run.stdout.readline()  # the first line of progress
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=200)
    found = json.loads(output.read_text())
    assert found["problems"] == [], said
    assert run.returncode == 130
    assert found["interrupted"]
    assert not [name for name in Path("/run/netns").iterdir() if name.name.startswith(f"bypass-{run.pid}-")]


def test_a_load_that_cannot_be_run_is_refused_with_one_line(tmp_path: Path) -> None:
    env = os.environ | {"PATH": str(tmp_path)}
    argv = command(tmp_path / "mixed.json", 1)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("mixed: missing: curl")
    assert done.stderr.count("\n") == 1


# ---- The verdict -------------------------------------------------------------------------------------------------
AUDIT: dict[str, Any] = {
    "stack": {"conns": 0, "timers": 0, "handles": 3, "frames": 0},
    "frames": {"stack": 0, "tx": 0, "stack_tx": 0, "misplaced": 0, "bad_free": 0, "conserved": True},
    "states": {},
}


def differences(wait_out: bool, states: dict[str, int], **stack: int) -> list[str]:
    after = AUDIT | {"stack": AUDIT["stack"] | stack, "states": states}
    return Run._differences(AUDIT, after, wait_out)


def test_what_the_stack_still_holds_is_told_and_time_wait_only_after_its_time() -> None:
    assert differences(True, {}) == []
    assert differences(False, {"TIME_WAIT": 7}, conns=7, timers=7) == []
    assert len(differences(True, {"TIME_WAIT": 7}, conns=7, timers=7)) == 2
    assert differences(False, {"TIME_WAIT": 7, "LAST_ACK": 1}, conns=8, timers=7) == [
        "stack: conns: 0 at the start, 1 at the end"
    ]
    assert differences(True, {}, frames=1) == ["stack: frames: 0 at the start, 1 at the end"]


@pytest.mark.parametrize(("growth", "grew"), [(0, False), (2 << 20, False), (6 << 20, True)])
def test_memory_that_grows_from_the_second_minute_on_is_noticed(growth: int, grew: bool) -> None:
    memory = leftovers.Memory(os.getpid())
    memory.samples = [
        (float(t), (100 << 20) + (growth * max(0, t - 120) // 380 if t > 120 else 0)) for t in range(601)
    ]
    assert memory.judge()["grew"] is grew
    memory.samples = [(float(t), (100 << 20) + (growth if t > 250 else 0)) for t in range(601)]
    assert memory.judge()["grew"] is False, "a step, and no more"
    memory.samples = memory.samples[:130]
    assert memory.judge()["grew"] is None, "too short to tell"
    assert memory.look() > 1 << 20


def test_processes_below_a_process_are_found() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as shell:
        while "sleep" not in leftovers.descendants(shell.pid).values():
            pass
        below = leftovers.descendants(shell.pid)
        assert below[shell.pid] == "sh"
        for pid in below:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.netns
def test_a_bpf_map_that_is_left_is_noticed() -> None:
    from bypass import libbpf

    held = libbpf.Map(libbpf.MAP_ARRAY, "left", 4, 8, 1)
    objects = {o for o in leftovers.bpf_objects(os.getpid()) if o[0] == "map"}
    assert objects
    assert leftovers.still_there(objects, 0) == objects
    held.close()
    gone = objects - leftovers.bpf_objects(os.getpid())
    assert len(gone) == 1
    assert leftovers.still_there(gone) == set()


# ---- iperf3 ------------------------------------------------------------------------------------------------------
def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def listening(server: iperf3.Server) -> tuple[asyncio.Server, int]:
    listener = await asyncio.start_server(server.handle, HOST, 0)
    return listener, listener.sockets[0].getsockname()[1]


@pytest.mark.parametrize("reverse", [False, True], ids=["client sends", "server sends"])
@pytest.mark.parametrize("parallel", [1, 3])
def test_iperf3_client_and_server_of_ours_agree(parallel: int, reverse: bool) -> None:
    async def main() -> None:
        server = iperf3.Server()
        listener, port = await listening(server)
        async with listener:
            began = time.monotonic()
            result = await iperf3.run_client(
                asyncio.open_connection,
                HOST,
                port,
                seconds=1,
                parallel=parallel,
                reverse=reverse,
                bit_s=20_000_000,
            )
            assert 0 < result.received <= result.sent
            assert result.streams == parallel
            took = time.monotonic() - began  # more than a second on a busy machine
            assert result.sent <= parallel * (20_000_000 // 8 * took + (1 << 17)), "the rate is a bound"
            while not server.done:
                await asyncio.sleep(0.01)
            assert server.results is not None
            assert server.results.received <= server.results.sent
            assert server.errors == []

    run(main())


@pytest.mark.parametrize(
    "options", [[], ["--reverse"], ["--parallel", "3"], ["--reverse", "--parallel", "3"]], ids=str
)
def test_the_iperf3_program_is_served(options: list[str]) -> None:
    need_tools()

    async def main() -> None:
        server = iperf3.Server()
        listener, port = await listening(server)
        async with listener:
            argv = [
                "iperf3",
                "--json",
                "--client",
                HOST,
                "--port",
                str(port),
                "--time",
                "1",
                "--bitrate",
                "20M",
                *options,
            ]
            child = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
            out, _ = await child.communicate()
            assert child.returncode == 0, out
            end = json.loads(out)["end"]
            assert 0 < end["sum_received"]["bytes"] <= end["sum_sent"]["bytes"]
            assert server.errors == []

    run(main())


def test_what_is_no_iperf3_test_of_tcp_is_refused_and_told() -> None:
    async def main() -> None:
        server = iperf3.Server()
        listener, port = await listening(server)
        async with listener:
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"a" * 36 + b"\0")
            assert await reader.readexactly(1) == bytes([iperf3.PARAM_EXCHANGE])
            text = b'{"udp": true, "parallel": 1}'
            busy_reader, busy = await asyncio.open_connection(HOST, port)
            busy.write(b"b" * 36 + b"\0")
            assert await busy_reader.read() == bytes([iperf3.ACCESS_DENIED])
            busy.close()
            writer.write(struct.pack("!I", len(text)) + text)
            assert (await reader.read())[:1] == bytes([iperf3.SERVER_ERROR])
            writer.close()
            while not server.errors:
                await asyncio.sleep(0.01)
            assert "udp" in server.errors[0]
            with pytest.raises(iperf3.ProtocolError, match="0 bytes arrived"):
                iperf3.Result(10, 0, 1, 1).check()

    run(main())
