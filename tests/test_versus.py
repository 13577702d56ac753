# SPDX-License-Identifier: Apache-2.0
"""The comparison of programs on the kernel and on bypass (bench/versus): it runs and leaves the figures that
docs/benchmark.md names; the client that asks cannot be deceived. No test judges a time, but one that is made."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import missing

from bench.apps.place import lacking
from bench.programs import BenchError, program
from bench.versus import profile, rounds
from bench.versus.rounds import COMPARED, KEYS, LOADS, derived
from bench.versus.servers import MEMCACHED, NGINX, RR, WORKLOADS, threaded

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("bench_programs")]


def is_spread(value: dict[str, float]) -> bool:
    return 0 <= value["min"] <= value["median"] <= value["max"]


# ---- The whole ---------------------------------------------------------------------------------------------------
@pytest.mark.netns
@pytest.mark.timeout(300)
def test_every_workload_is_measured_and_kernel_compared_with_kernel(tmp_path: Path) -> None:
    if lack := lacking(["redis-server", "memcached", "nginx"]):
        missing(lack)
    output = tmp_path / "versus.json"
    argv = [sys.executable, "-m", "bench.versus", "--quick", "--on", "again", "--output", str(output)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert set(found["workloads"]) == {w.name for w in WORKLOADS}
    for about in found["workloads"].values():
        for load in LOADS:
            assert set(about[load]["variants"]) == {"kernel", "again"}
            for v in about[load]["variants"].values():
                assert set(v) == set(KEYS)
                assert all(is_spread(s) for s in v.values())
                assert v["rate"]["median"] > 0
                assert v["cpu_s"]["median"] > 0
            assert set(about[load]["ratios"]) == {"again:kernel"}
            assert set(about[load]["ratios"]["again:kernel"]) == set(COMPARED)
    if "profiles" in found:  # perf is there
        for variants in found["profiles"].values():
            assert variants["kernel"]["ours"] == 0
            assert abs(sum(variants["kernel"]["groups"].values()) - 1) < 1e-6
    assert set(found["threads"]) == {"memcached_get", "nginx_small", "rr_50"}
    assert found["threads"]["rr_50"]["kernel"]["ratio"]["median"] > 0
    assert "redis GET, 50 connections, at one rate for all" in done.stdout


def test_documentation_names_every_figure() -> None:
    text = (ROOT / "docs" / "benchmark.md").read_text()
    part = text[text.index("## Programs") :]
    for name in (*KEYS, *(w.name for w in WORKLOADS), "offered_per_s", "again:kernel", "bypass:kernel"):
        assert f"`{name}`" in part, name


def test_threads_are_set_where_a_program_has_them() -> None:
    assert threaded(NGINX, 2).worker_processes == 2  # type: ignore[attr-defined]
    assert threaded(MEMCACHED, 2).threads == 2  # type: ignore[attr-defined]
    assert RR.threads == 1


def test_figures_are_per_million_requests_and_without_the_client() -> None:
    raw = {
        "ops": 2_000_000, "seconds": 2.0, "task_cpu_s": 5.0, "client_cpu_s": 1.0, "core_cpu_s": [2.5, 3.5],
        "due": 4_000_000,
    }  # fmt: skip
    found = derived(raw)
    assert (found["rate"], found["cpu_s"], found["cores_cpu_s"], found["served"]) == (1e6, 2.0, 3.0, 0.5)
    assert found["other_cpu_share"] == 0.25
    with pytest.raises(BenchError, match="no request"):
        derived(raw | {"ops": 0})


def test_samples_are_grouped_by_whose_code_it_is() -> None:
    owner = {"bypass_poll": profile.STACK, "data_send": profile.SURFACE, "ring_take": profile.RINGS}
    library = "libbypass-preload.so"
    chains = [
        [("bypass_poll.constprop.0", library), ("epoll_wait", library)],
        [("data_send", library)],
        [("ring_take", library)],
        [("a_static_function_of_somebody", library)],
        [("processCommand", "redis-server"), ("main", "redis-server")],
        [("copy_user", "[kernel.kallsyms]"), ("__xsk_generic_xmit", "[kernel.kallsyms]")],
        [("tcp_v4_rcv", "[kernel.kallsyms]"), ("napi_threaded_poll", "[kernel.kallsyms]")],
        [("x", "bpf_prog_123")],
    ]
    found = profile.groups_of(chains, owner)
    assert found["samples"] == 8
    assert found["ours"] == 0.5
    assert found["groups"][profile.SURFACE] == 0.25
    assert found["groups"][profile.PROGRAM] == 0.125
    assert found["groups"][profile.SERVER_RECEIVE] == 0.125
    with pytest.raises(BenchError, match="no samples"):
        profile.groups_of([], owner)


def test_who_got_no_samples_measures_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """perf may take longer to begin, on a busy machine, than the first measurement takes."""
    tried: list[int] = []

    def recorded(it: object, w: object, plan: rounds.Plan) -> list[list[tuple[str, str]]]:
        tried.append(plan.measure_ms)
        return [[("main", "redis-server")]] if plan.measure_ms >= enough else []

    monkeypatch.setattr(rounds, "_recorded", recorded)
    plan = rounds.Plan(1, 50, 1000, ("kernel",))
    enough = 4000
    assert len(rounds._sampled(cast(rounds.Serving, None), WORKLOADS[0], plan)) == 1
    assert tried == [1000, 2000, 4000]
    enough = 10**6
    assert rounds._sampled(cast(rounds.Serving, None), WORKLOADS[0], plan) == []
    assert tried[3:] == [1000, 2000, 4000, 8000]


def test_functions_of_the_library_are_known_by_the_folder_of_their_source() -> None:
    owner = profile.owners()
    assert owner["bypass_poll"] == profile.STACK
    assert set(owner.values()) >= {profile.STACK, profile.RINGS}


# ---- The client that asks ----------------------------------------------------------------------------------------
@contextmanager
def server(serve: Any) -> Iterator[int]:
    """serve(sock, number) in a thread for each connection; its port."""
    listener = socket.create_server((HOST, 0))
    threads: list[threading.Thread] = []

    def accept() -> None:
        number = 0
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=handle, args=(sock, number)))
            threads[-1].start()
            number += 1

    def handle(sock: socket.socket, number: int) -> None:
        with sock:
            try:
                serve(sock, number)
            except ConnectionError:
                return

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        listener.close()
        for thread in threads:
            thread.join()


def load(
    port: int, *, parallel: int = 1, rate: int = 0, ms: int = 200, answer: int = 4
) -> subprocess.CompletedProcess[str]:
    argv = [program("load"), HOST, str(port), str(parallel), str(rate), "0", str(ms), "", str(answer)]
    return subprocess.run(argv, input="ask\n", capture_output=True, text=True, check=False, timeout=30)


def echo(sock: socket.socket, number: int) -> None:
    while data := sock.recv(100):
        sock.sendall(data)


def test_every_connection_asks_one_request_after_another() -> None:
    asked: dict[int, bytes] = {}

    def serve(sock: socket.socket, number: int) -> None:
        asked[number] = b""
        while data := sock.recv(100):
            asked[number] += data
            sock.sendall(data)

    with server(serve) as port:
        done = load(port, parallel=3)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
    assert len(asked) == 3
    assert all(got.startswith(b"ask\nask\n") for got in asked.values())
    assert 0 < found["ops"] <= sum(len(got) for got in asked.values()) // 4
    assert found["bytes"] == 4 * found["ops"]


def test_at_a_rate_no_more_is_asked_than_is_due() -> None:
    with server(echo) as port:
        found = json.loads(load(port, parallel=4, rate=200, ms=500).stdout)
    assert 95 <= found["due"] <= 1000  # more on a machine that does not come to it in time
    assert 0 < found["ops"] <= found["due"] + 1


def test_a_measurement_goes_on_until_there_is_an_answer() -> None:
    def serve(sock: socket.socket, number: int) -> None:
        while data := sock.recv(100):
            time.sleep(0.3)
            sock.sendall(data)

    with server(serve) as port:
        found = json.loads(load(port, ms=50).stdout)
    assert found["ops"] == 1
    assert found["seconds"] >= 0.3


def test_a_request_that_waits_for_a_server_that_stalls_counts_from_when_it_was_due() -> None:
    def serve(sock: socket.socket, number: int) -> None:
        sock.sendall(sock.recv(4))
        time.sleep(0.4)
        echo(sock, number)

    with server(serve) as port:
        found = json.loads(load(port, rate=100, ms=800).stdout)
    assert found["p50_us"] > 0
    assert found["p99_us"] > 300_000  # 40 requests were due meanwhile, the first waited for all of it


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            lambda sock, n: (sock.recv(4), sock.sendall(b"aaaa"), sock.recv(4), sock.sendall(b"bbbb")),
            "begins with bbbb",
        ),
        (lambda sock, n: (sock.recv(4), sock.sendall(b"aaaaa"), sock.recv(4)), "more than 4 bytes"),
        (lambda sock, n: sock.recv(4), "recv"),
    ],
    ids=["another", "longer", "none"],
)
def test_an_answer_that_is_another_longer_or_none_ends_the_measurement(answer: Any, why: str) -> None:
    with server(answer) as port:
        done = load(port)
    assert done.returncode == 1
    assert why in done.stderr
