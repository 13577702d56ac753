# SPDX-License-Identifier: Apache-2.0
"""Goodput of this stack with itself under impairment, in virtual time: every figure here repeats exactly, so it may be
judged. And what the wire promises: rate, queue, loss, order, marks (bench/goodput)."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import missing

from bench.goodput import matrix, run, sharing
from bench.goodput.conditions import BY_NAME, CONDITIONS, Condition, Link
from bench.goodput.run import LINUX, OURS, Flow, Job
from bench.programs import BenchError

ROOT = Path(__file__).resolve().parent.parent
PAYLOAD_SHARE = 1448 / 1514  # of a full frame, with timestamps
CLEAN = Condition(
    name="test",
    title="10 Mbit/s, 20 ms",
    why="",
    fwd=Link(rate_mbit=10, delay_ms=10, queue_bytes=60_000),
    rev=Link(rate_mbit=10, delay_ms=10),
    seconds=4,
)

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("bench_programs")]


@functools.cache
def virtual(condition: Condition, cc: str = "reno", flows: int = 1, seed: int = 1) -> dict[str, Any]:
    return run.once(Job(condition, (Flow(OURS, OURS, cc),) * flows, seed, virtual=True))


def with_forward(condition: Condition, **changes: float) -> Condition:
    return replace(condition, fwd=replace(condition.fwd, **changes))


# ---- The wire ----------------------------------------------------------------------------------------------------
def test_equal_arguments_give_equal_runs_and_other_seeds_other_ones() -> None:
    lossy = with_forward(CLEAN, loss=0.02)
    job = Job(lossy, (Flow(OURS, OURS, "reno"),), seed=3, virtual=True)
    first, again, other = (run.once(j) | {"cpu_s": 0} for j in (job, job, replace(job, seed=4)))
    assert first == again
    assert first["fwd"] != other["fwd"]


def test_the_rate_bounds_what_arrives_and_is_reached() -> None:
    result = virtual(with_forward(CLEAN, queue_bytes=50_000_000))
    assert 0.99 * 10 * PAYLOAD_SHARE <= run.goodput(result) <= 1.001 * 10 * PAYLOAD_SHARE


def test_the_queue_is_bounded_by_its_bytes() -> None:
    for queue_bytes in (5 * 1514, 60_000):
        result = virtual(with_forward(CLEAN, queue_bytes=queue_bytes))
        longest_ms = queue_bytes * 8 / 10e6 * 1000
        assert 0.7 * longest_ms <= result["fwd"]["queue_max_ms"] <= longest_ms
        assert result["fwd"]["queue_dropped"] > 0


def test_a_deep_queue_drops_nothing_before_it_is_full() -> None:
    result = virtual(with_forward(CLEAN, queue_bytes=50_000_000))
    assert result["fwd"]["queue_dropped"] == 0
    assert result["flows"][0]["retransmits"] == 0


def test_no_round_trip_is_shorter_than_the_path() -> None:
    """A host that lives in the past would answer frames before they came."""
    for cc in (cc for cc in matrix.CCS if run.has(cc)):
        result = virtual(CLEAN, cc)
        assert 20 <= result["flows"][0]["srtt_ms"] <= 20 + result["fwd"]["queue_max_ms"] + 2


def test_losses_come_as_often_as_asked() -> None:
    sent = virtual(with_forward(CLEAN, loss=0.05))["fwd"]
    assert sent["lost"] == pytest.approx(0.05 * (sent["frames"] - sent["queue_dropped"]), rel=0.5)
    assert sent["burst_lost"] == sent["outage_lost"] == sent["duplicated"] == sent["reordered"] == 0


def test_nothing_is_delivered_during_an_outage() -> None:
    cut = with_forward(CLEAN, outage_every_ms=1000, outage_ms=400)
    result = run.once(Job(cut, (Flow(OURS, OURS, "reno"),), seed=1, virtual=True, sample_ms=20))
    series = result["flows"][0]["series"]
    assert result["fwd"]["outage_lost"] > 0
    for second in range(4):  # from when the last frame before it has arrived, to when it ends
        assert len(set(series[second * 50 + 31 : second * 50 + 50])) == 1
    assert series[-1] > series[50] > 0


def test_late_and_doubled_frames_are_counted() -> None:
    sent = virtual(with_forward(CLEAN, reorder=0.1, reorder_ms=4, duplicate=0.1))["fwd"]
    through = sent["frames"] - sent["queue_dropped"]
    assert sent["reordered"] == pytest.approx(0.1 * through, rel=0.3)
    assert sent["duplicated"] == pytest.approx(0.1 * through, rel=0.3)


@pytest.mark.parametrize(
    "argument",
    ["ms=-1", "ms=", "loss=3", "fwd.los_ppm=1", "sideways.loss_ppm=1", "flow=ours,ours", "flow=ours,mars,reno",
     "flow=ours,ours,fastest", "clock=sundial", "nonsense", "flow=linux,ours,reno"],
)  # fmt: skip
def test_a_wrong_argument_is_one_clear_error(argument: str) -> None:
    argv = [run.program("goodput"), "clock=virtual", "both.delay_ns=1000000", "ms=1", "warmup_ms=0"]
    if not argument.startswith("flow="):
        argv.append("flow=ours,ours,reno")
    done = subprocess.run([*argv, argument], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("goodput: ")
    assert done.stderr.count("\n") == 1


def test_what_the_program_refuses_is_an_error_of_the_benchmark() -> None:
    with pytest.raises(BenchError, match="virtual clock"):
        run.once(Job(CLEAN, (Flow(LINUX, OURS, "reno"),), seed=1, virtual=True))


# ---- The plan ----------------------------------------------------------------------------------------------------
def test_there_are_twelve_conditions_and_each_does_something_of_its_own() -> None:
    assert len(CONDITIONS) == len(BY_NAME) == 12
    assert len({" ".join(c.arguments()) for c in CONDITIONS}) == 12


def test_rounds_are_interleaved_and_begin_with_another_variant_each_time() -> None:
    plan = matrix.jobs(CONDITIONS[:2], ["cubic"], ["cubic"], rounds=3, linux=["cubic"])
    names = [v.name for _, v, _ in plan]
    assert len(names) == 3 * 2 * 4
    assert names[0:4] == names[4:8]  # both conditions of one round
    assert names[8] == names[1]
    assert [job.seed for *_, job in plan] == [1] * 8 + [101] * 8 + [201] * 8


def test_where_chance_decides_a_figure_is_the_mean_of_several_runs() -> None:
    satellite = BY_NAME["satellite"]
    plan = matrix.jobs([satellite], ["reno"], [], rounds=1, linux=["reno"])
    assert [job.seed for *_, job in plan] == list(range(1, satellite.wires + 1))
    assert matrix.means([1, 3, 5, 7], of=2) == [2, 6]


class Fake:
    """In place of the program: remembers what ran beside each other."""

    def __init__(self, fail: int | None = None) -> None:
        self.fail = fail
        self.lock = threading.Lock()
        self.load = 0.0
        self.most = 0.0
        self.seen: list[int] = []

    def __call__(self, job: Job) -> dict[str, Any]:
        with self.lock:
            self.load += job.weight_mbit
            self.most = max(self.most, self.load)
            self.seen.append(job.seed)
        if job.seed == self.fail:
            raise BenchError("broken")
        with self.lock:
            self.load -= job.weight_mbit
        return {"seed": job.seed}


def mixed_jobs() -> list[Job]:
    links = (BY_NAME["clean"], BY_NAME["reorder"], BY_NAME["tiny"], BY_NAME["jitter"])
    return [Job(links[i % 4], (Flow(LINUX, LINUX, "reno"),), seed=i) for i in range(60)]


def test_jobs_beside_each_other_stay_below_the_capacity_and_their_results_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Fake()
    monkeypatch.setattr(run, "steady", fake)
    assert [r["seed"] for r in run.many(mixed_jobs(), at_once=8)] == list(range(60))
    assert 0 < fake.most <= run.CAPACITY_MBIT


def test_a_job_that_fails_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(fail=5)
    monkeypatch.setattr(run, "steady", fake)
    with pytest.raises(BenchError, match="broken"):
        run.many(mixed_jobs(), at_once=1)
    assert len(fake.seen) == 6


def test_a_measurement_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has run is not run again; a line that was cut off, or another program's, counts for nothing."""
    path = tmp_path / "goodput.runs.jsonl"
    first = Fake(fail=5)
    monkeypatch.setattr(run, "steady", first)
    with run.Journal(path, resume=False) as journal, pytest.raises(BenchError, match="broken"):
        run.many(mixed_jobs(), 1, journal=journal)
    done = [seed for seed in first.seen if seed != 5]
    other = {"program": "?", "job": run.Journal.key(mixed_jobs()[5]), "result": {"seed": -1}}
    with path.open("a") as file:
        file.write(json.dumps(other) + "\n" + '{"program": "')
    second = Fake()
    monkeypatch.setattr(run, "steady", second)
    told: list[int] = []
    with run.Journal(path, resume=True) as journal:
        found = run.many(mixed_jobs(), 1, lambda job: told.append(job.seed), journal)
    assert [r["seed"] for r in found] == sorted(told) == list(range(60))
    assert sorted(second.seen + done) == list(range(60))
    with run.Journal(path, resume=False) as journal:
        assert journal.known == {}
    assert path.read_text() == ""


def test_without_linux_and_without_the_algorithm_nothing_is_promised() -> None:
    assert matrix.variants("bbr", [], linux=True) == [matrix.REFERENCE]
    assert matrix.variants("cubic", ["cubic"], linux=False) == [matrix.BOTH]
    assert matrix.variants("cubic", [], linux=False) == []


def test_the_lowest_ratios_are_found() -> None:
    entries = {"a": {"ratios": {"x": 0.9, "y": 0.3}}, "b": {"ratios": {"x": None, "y": 0.5}}}
    assert matrix.worst({"reno": entries}) == [(0.3, "reno", "a", "y"), (0.5, "reno", "b", "y")]


def test_jains_index() -> None:
    assert sharing.jain([5, 5, 5]) == pytest.approx(1)
    assert sharing.jain([7, 0]) == pytest.approx(0.5)
    assert sharing.jain([3, 1]) == pytest.approx(0.8)
    assert sharing.jain([0, 0]) == 1


def test_the_report_has_every_figure(tmp_path: Path) -> None:
    output = tmp_path / "goodput.json"
    argv = [
        sys.executable,
        "-m",
        "bench.goodput",
        "--only",
        "dctcp",
        "--rounds",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["rounds"] == 1
    for by_flows in found["dctcp"]["algorithms"].values():
        assert set(by_flows) == {"1", "4"}
        assert by_flows["4"]["mbit"]["median"] > 50
    assert "Marking" in done.stdout


# ---- Linux at the ends -------------------------------------------------------------------------------------------
@pytest.mark.netns
@pytest.mark.parametrize("ends", [(LINUX, LINUX), (OURS, LINUX), (LINUX, OURS), (OURS, OURS)])
def test_every_pair_of_ends_carries_bytes_in_real_time(ends: tuple[str, str]) -> None:
    if run.missing_for_linux():
        missing(run.missing_for_linux())
    short = replace(CLEAN, warmup_s=0.2, seconds=0.8)
    result = run.once(Job(short, (Flow(*ends, "reno"),), seed=1))
    flow = result["flows"][0]
    assert flow["error"] is None
    assert flow["bytes"] > 0
    # Segments were cut to the MTU before they came to the wire, so that each could be lost by itself.
    assert result["fwd"]["frames"] >= flow["bytes"] / 1448
